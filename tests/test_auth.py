"""Who may ask what: every route against every kind of key."""

import json
import logging
import os
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from pydantic import SecretStr
from starlette.routing import Route
from typer.testing import CliRunner

from drafts.text import TextEncoder
from server.auth import KeyRoute
from server.keys import Keyring, digest_of, keys_of, read_keys
from server.keys_command import keys
from server.logs import formatter
from server.settings import Settings, read_settings
from tests.conftest import Service, run_service
from tests.serving import demur, gauge_of
from tests.test_http import GOOD, error_of

keys_command = typer.Typer()
keys_command.command()(keys)
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
TEXT = {"prompt": "a", "max_tokens": 2}

# What each route needs: a scope, any key, or nothing. A route that is not here fails the test.
OPEN, ANY = "open", "any"
RULES: dict[tuple[str, str], tuple[str, Any]] = {
    ("POST", "/v1/score"): ("score", {"prompt": "a", "response": "b"}),
    ("POST", "/v1/chat/completions"): ("generate", CHAT),
    ("POST", "/v1/completions"): ("generate", TEXT),
    ("GET", "/v1/models"): (ANY, None),
    ("GET", "/v1/models/{model}"): (ANY, None),
    ("GET", "/version"): (ANY, None),
    ("GET", "/metrics"): (ANY, None),
    ("GET", "/openapi.json"): (ANY, None),
    ("GET", "/docs"): (ANY, None),
    ("GET", "/redoc"): (ANY, None),
    ("GET", "/v1/drafts"): ("admin", None),
    ("POST", "/v1/drafts/rollback"): ("admin", None),
    ("GET", "/v1/osd"): ("admin", None),
    ("POST", "/v1/osd/pause"): ("admin", None),
    ("POST", "/v1/osd/resume"): ("admin", None),
    ("DELETE", "/v1/osd/spool"): ("admin", None),
    ("GET", "/health"): (OPEN, None),
    ("GET", "/ready"): (OPEN, None),
}
KEYS = {"score": ["score"], "generate": ["generate"], "admin": ["admin"], "none": []}


def keys_file(folder: Path, **budgets: int) -> Path:
    """Keys whose secret is their name."""
    lines = []
    for name, scopes in KEYS.items():
        lines += [
            "[[keys]]",
            f'name = "{name}"',
            f'sha256 = "{digest_of(name)}"',
            f"scopes = {scopes}",
            *(f"{budget} = {value}" for budget, value in budgets.items()),
        ]
    path = folder / "keys.toml"
    path.write_text("\n".join(lines))
    return path


async def test_every_route_against_every_key(encoder: TextEncoder, tmp_path: Path) -> None:
    async for service in run_service(encoder, keys_file=keys_file(tmp_path)):
        seen = set()
        for route in service.app.routes:
            assert isinstance(route, Route), f"{route} is no route that this test knows"
            for method in sorted(route.methods or ()):
                if method == "HEAD" and "GET" in (route.methods or ()):
                    continue
                assert (method, route.path) in RULES, f"{method} {route.path} has no rule"
                seen.add((method, route.path))
                rule, body = RULES[method, route.path]
                await _check(service, method, route.path, rule, body)
                assert rule == OPEN or isinstance(route, KeyRoute)
        assert seen == set(RULES)


async def _check(service: Service, method: str, path: str, rule: str, body: Any) -> None:
    async def ask(authorization: str | bytes | None) -> httpx.Response:
        headers = {} if authorization is None else {"Authorization": authorization}
        url = path.replace("{model}", "tiny")
        return await service.client.request(method, url, json=body, headers=headers)

    def let_in(answer: httpx.Response) -> bool:
        return answer.status_code not in (401, 403)

    wrong = (None, "Bearer wrong", "Bearer ", "Basic score", "score", "Bearer scor", b"Bearer \xe9")
    for authorization in wrong:
        answer = await ask(authorization)
        if rule == OPEN:
            assert answer.status_code == 200
        else:
            assert error_of(answer, 401)["type"] == "authentication_error"
            assert answer.headers["WWW-Authenticate"] == "Bearer"
    for name, scopes in KEYS.items():
        answer = await ask(f"Bearer {name}")
        good = rule in (OPEN, ANY) or rule in scopes or "admin" in scopes
        assert let_in(answer) == good, (method, path, name, answer.text)
        if not good:
            assert error_of(answer, 403)["code"] == "scope_needed"


async def test_a_body_is_not_read_before_the_key(encoder: TextEncoder, tmp_path: Path) -> None:
    async for service in run_service(encoder, keys_file=keys_file(tmp_path)):
        answer = await service.client.post("/v1/score", content=b"{" * 10_000)
        error_of(answer, 401)


def test_a_key_can_be_taken_back_while_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.keys._LOOK_EVERY_S", 0.0)
    file = keys_file(tmp_path)
    ring = Keyring([], file)
    assert ring.find("score") is not None
    file.write_text(f'[[keys]]\nname = "new"\nsha256 = "{digest_of("new")}"\nscopes = []')
    assert ring.find("score") is None
    assert ring.find("new") is not None
    # A file that cannot be used locks nobody out, and lets nobody in.
    for broken in ("keys = 3", "[[keys]]", "\x00"):
        file.write_text(broken)
        assert ring.find("new") is not None
        assert ring.find("score") is None
        assert gauge_of("demur_keys_file_usable") == 0


@pytest.mark.parametrize("how", ["emptied", "deleted"])
def test_the_last_key_can_be_taken_back(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.keys._LOOK_EVERY_S", 0.0)
    file = keys_file(tmp_path)
    ring = Keyring([], file)
    assert ring.find("score") is not None
    if how == "emptied":
        file.write_text("# nobody\n")
    else:
        file.unlink()
    assert ring.find("score") is None
    assert ring, "without keys everything would be open"
    keys_file(tmp_path)
    assert ring.find("score") is not None
    assert gauge_of("demur_keys_file_usable") == 1


@pytest.mark.parametrize(
    "content",
    [
        '[[keys]]\nname = "a"\nsha256 = "secret"\nscopes = []',
        f'[[keys]]\nname = "a b"\nsha256 = "{digest_of("x")}"\nscopes = []',
        f'[[keys]]\nname = "a"\nsha256 = "{digest_of("x")}"\nscopes = ["root"]',
        f'[[keys]]\nname = "a"\nsha256 = "{digest_of("x")}"\nscopes = []\nkey = "secret"',
        f'[[keys]]\nname = "a"\nsha256 = "{digest_of("x")}"\nscopes = []\n' * 2,
    ],
)
def test_a_bad_file_is_refused_without_its_values(tmp_path: Path, content: str) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"keys_file .*keys\.toml") as refused:
        read_keys(file)
    assert "secret" not in str(refused.value)


def test_a_name_is_of_one_key(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(f'[[keys]]\nname = "api-1"\nsha256 = "{digest_of("x")}"\nscopes = []')
    with pytest.raises(ValueError, match="api-1"):
        Keyring(keys_of([SecretStr("a")], "api", {"score"}), file)


async def test_keys_of_the_environment_may_be_hashed(encoder: TextEncoder) -> None:
    hashed = f"sha256:{digest_of('right')}"
    async for service in run_service(encoder, api_keys=[hashed], admin_keys=["plain"]):
        for key, status in (("right", 200), ("plain", 200), (hashed, 401), ("wrong", 401)):
            headers = {"Authorization": f"Bearer {key}"}
            answer = await service.client.get("/v1/models", headers=headers)
            assert answer.status_code == status
    with pytest.raises(ValueError, match="64 hex digits"):
        read_settings(api_keys=["sha256:abc"])


def test_demur_keys_makes_them(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            demur("keys", *arguments, "--file", str(file)), capture_output=True, text=True
        )

    first = run("team-a", "--tokens-per-minute", "500", "--scope", "score")
    assert first.returncode == 0, first.stderr
    secret = first.stdout.strip()
    assert secret not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    second = run("prometheus", "--metrics-only")
    [one, two] = read_keys(file)
    assert (one.scopes, one.tokens_per_minute, one.sha256) == ({"score"}, 500, digest_of(secret))
    assert (two.scopes, two.sha256) == (frozenset(), digest_of(second.stdout.strip()))
    for arguments in (("team-a",), ("new", "--scope", "root"), ("a b",)):
        refused = run(*arguments)
        assert refused.returncode == 1
        assert refused.stderr.startswith("demur: ")
        assert "Traceback" not in refused.stderr
    assert len(read_keys(file)) == 2
    # Comments and the other keys stay as they are.
    before = file.read_text()
    file.write_text(f"# ours\n{before}# and theirs\n")
    assert run("team-a", "--remove").returncode == 0
    [left] = read_keys(file)
    assert left.name == "prometheus"
    assert "# ours" in file.read_text()
    again = run("team-a", "--remove")
    assert again.returncode == 1
    assert "no key named team-a" in again.stderr
    assert run("prometheus", "--remove").returncode == 0
    assert read_keys(file) == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", ""])
def test_a_public_address_needs_keys(host: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="demur keys"):
        read_settings(host=host).check_reachable()
    for given in ({"api_keys": ["k"]}, {"keys_file": tmp_path}, {"allow_no_keys": True}):
        read_settings(host=host, **given).check_reachable()
    for loopback in ("127.0.0.1", "127.3.2.1", "::1", "localhost"):
        read_settings(host=loopback).check_reachable()


def test_serve_does_not_listen_there(tmp_path: Path) -> None:
    from tests.tiny import mixed_ensemble

    folder = mixed_ensemble(tmp_path / "ensemble")
    command = demur("serve", "--host", "0.0.0.0", "--port", "0", "--ensemble", str(folder))
    refused = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 1
    assert "can be reached from other machines" in refused.stderr


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("localhost", 200),
        ("10.0.0.7", 200),
        ("attacker.example:8000", 400),
        ("localhost.attacker.example", 400),
        ("[::1", 400),
    ],
)
async def test_without_keys_it_answers_for_no_foreign_name(
    service: Service, host: str, status: int
) -> None:
    """A page whose name was made to lead here (DNS rebinding) could else read the answers."""
    answer = await service.client.get("/v1/models", headers={"Host": host})
    assert answer.status_code == status
    if status == 400:
        assert error_of(answer, 400)["code"] == "unknown_host"


async def test_the_log_says_whose_request_it_was(
    encoder: TextEncoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Those that are refused, too; and probes that are."""
    caplog.set_level(logging.INFO)
    async for service in run_service(encoder, keys_file=keys_file(tmp_path, requests_per_minute=1)):
        for path, key in (
            ("/v1/score", "score"),
            ("/v1/score", "score"),
            ("/v1/score", "generate"),
            ("/metrics", "wrong"),
            ("/metrics", "none"),
        ):
            headers = {"Authorization": f"Bearer {key}"}
            method = "GET" if path == "/metrics" else "POST"
            await service.client.request(method, path, json=GOOD, headers=headers)
    told = [(r.status, r.key) for r in caplog.records if r.name == "server.middleware"]  # type: ignore[attr-defined]
    assert told == [(200, "score"), (429, "score"), (403, "generate"), (401, None)]
    assert "429" in caplog.text


async def test_no_key_and_no_text_in_the_log(
    encoder: TextEncoder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes well or wrong, at the level that services run at."""
    secret, said = "dm-very-secret-key", "my private words"
    caplog.set_level(logging.INFO)
    async for service in run_service(encoder, api_keys=[secret]):
        for key in (secret, "dm-other-secret"):
            headers = {"Authorization": f"Bearer {key}"}
            for path, body in (
                ("/v1/score", {"prompt": said, "response": said}),
                ("/v1/score", {"prompt": said, "response": said, "what": said}),
                ("/v1/score", [{"prompt": said}]),
                ("/v1/chat/completions", {"messages": [{"role": said, "content": said}]}),
                (f"/v1/{said}", {}),
            ):
                await service.client.post(path, json=body, headers=headers)

        def explode(*_: object) -> None:
            raise RuntimeError(said)

        monkeypatch.setattr("server.scoring.find_spans", explode)
        headers = {"Authorization": f"Bearer {secret}"}
        body = {"prompt": said, "response": said}
        error_of(await service.client.post("/v1/score", json=body, headers=headers), 500)
    for form in ("text", "json"):
        for record in caplog.records:
            record.request_id, record.trace_id = "id", None
            record.exc_text = None  # what another formatter has kept
        lines = [formatter(form).format(record) for record in caplog.records]  # type: ignore[arg-type]
        assert any("RuntimeError" in line and "find_spans" in line for line in lines)
        for line in lines:
            assert "secret" not in line
            assert said not in line
        if form == "json":
            facts = [json.loads(line) for line in lines]
            assert any(
                fact.get("route") == "/v1/score" and fact.get("status") == 200 for fact in facts
            )
            assert any(fact.get("key") == "api-1" for fact in facts)


def test_settings_show_no_key() -> None:
    settings = Settings(api_keys=["hush"], admin_keys=["hush"])
    assert "hush" not in repr(settings)
    assert "hush" not in settings.model_dump_json()


def test_a_key_that_cannot_be_read_now_is_read_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.keys._LOOK_EVERY_S", 0.0)
    file = keys_file(tmp_path)
    ring = Keyring([], file)
    read, is_broken = Path.read_text, True

    def text_of(path: Path) -> str:
        if is_broken:
            raise PermissionError("of another user")
        return read(path)

    monkeypatch.setattr(Path, "read_text", text_of)
    file.write_text(f'[[keys]]\nname = "new"\nsha256 = "{digest_of("new")}"\nscopes = []')
    for _ in range(2):
        assert ring.find("new") is None
        assert gauge_of("demur_keys_file_usable") == 0
    is_broken = False  # its time, size and place are what they were
    assert ring.find("new") is not None
    assert ring.find("score") is None
    assert gauge_of("demur_keys_file_usable") == 1


def test_a_file_that_was_broken_and_is_gone_holds_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.keys._LOOK_EVERY_S", 0.0)
    file = keys_file(tmp_path)
    ring = Keyring([], file)
    file.write_text("keys = 3")
    assert ring.find("score") is not None
    file.unlink()
    assert ring.find("score") is None
    assert gauge_of("demur_keys_file_usable") == 1


ENTRY = "name = '{name}'\nsha256 = '{digest}'\nscopes = []\n"
TWO = [ENTRY.format(name=name, digest=digest_of(name)) for name in "ab"]
IN_LINE = "keys = [{" + "}, {".join(entry.strip().replace("\n", ", ") for entry in TWO) + "}]"
QUOTED = f"[[keys]]\n{TWO[0]}[['keys']]\n{TWO[1]}"


@pytest.mark.parametrize("layout", [IN_LINE, QUOTED])
def test_a_file_of_another_layout_loses_no_key_but_that(layout: str, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(layout)
    assert [key.name for key in read_keys(file)] == ["a", "b"]
    refused = CliRunner().invoke(keys_command, ["a", "--file", str(file), "--remove"])
    assert refused.exit_code == 1
    assert "by hand" in refused.output
    assert file.read_text() == layout


def test_a_file_keeps_its_mode_whatever_the_umask(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text("")
    file.chmod(0o644)
    umask = os.umask(0o077)
    try:
        for how in ([], ["--remove"]):
            done = CliRunner().invoke(keys_command, ["a", "--file", str(file), *how])
            assert done.exit_code == 0, done.output
    finally:
        os.umask(umask)
    assert file.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [file]
