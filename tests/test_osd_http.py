"""Online distillation as clients and operators see it: what is kept, and who may say so."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from drafts.calibration import CALIBRATION_NAME
from drafts.errors import EngineNotReady, StoreError
from drafts.manifest import load_ensemble
from drafts.store import DraftsStore
from drafts.text import TextEncoder
from osd.control import MEASURES, STALE_S, Control, TrainerStatus
from osd.corpus import Text
from osd.errors import SpoolError
from osd.evaluate import Agreement
from osd.pace import is_busy
from osd.progress import Progress
from osd.publish import first_version, stage
from osd.shards import conversation_key
from osd.spool import START, Entry, open_spool
from osd.status import Reporter
from server.attempts import Attempts
from server.capture import Capture
from tests.calibrations import fake_calibration
from tests.conftest import Service, run_service
from tests.serving import gauge_of
from tests.tiny import edit_manifest, mixed_ensemble

ADMIN = {"Authorization": "Bearer admin"}
QUESTION = [{"role": "user", "content": "The capital of Japan?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixed_ensemble(tmp_path_factory.mktemp("osd") / "ensemble", version="v1")


@pytest.fixture
async def service(encoder: TextEncoder, folder: Path, tmp_path: Path) -> AsyncIterator[Service]:
    async with serve(encoder, folder, tmp_path) as running:
        yield running


@asynccontextmanager
async def serve(
    encoder: TextEncoder, folder: Path, tmp_path: Path, **settings: Any
) -> AsyncIterator[Service]:
    given = {
        "ensemble": folder,
        "osd": "capture",
        "osd_folder": tmp_path / "osd",
        "api_keys": ["user"],
        "admin_keys": ["admin"],
        "follow_every_s": 0.05,
    }
    async for running in run_service(encoder, **(given | settings)):
        yield running


async def kept(service: Service, count: int) -> list[Text]:
    """The spool's conversations, once there are so many."""
    place = service.app.state.demur.settings.spool_place
    with open_spool(place) as spool:
        for _ in range(500):
            entries: list[Entry] = spool.read(START, 100)
            if len(entries) >= count:
                break
            await asyncio.sleep(0.02)
        assert len(entries) == count
        return [entry.text for entry in entries]


async def until(holds: Callable[[], bool]) -> None:
    for _ in range(500):
        if holds():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it never held")


async def test_scored_and_generated_conversations_are_kept_as_they_were_measured(
    service: Service, encoder: TextEncoder
) -> None:
    client = service.client
    body: dict[str, Any] = {"messages": QUESTION, "response": "Tokyo."}
    assert (await client.post("/v1/score", json=body, headers=ADMIN)).status_code == 200
    raw = {"prompt": "The capital of Japan is", "response": " Tokyo."}
    assert (await client.post("/v1/score", json=[raw], headers=ADMIN)).status_code == 200
    chat = {"messages": QUESTION, "max_tokens": 3, "n": 2}
    assert (await client.post("/v1/chat/completions", json=chat, headers=ADMIN)).status_code == 200
    text = {"prompt": "4 * 15 =", "max_tokens": 2, "stream": True}
    assert (await client.post("/v1/completions", json=text, headers=ADMIN)).status_code == 200

    # Both choices of the chat are the same text, and that is kept once.
    found = await kept(service, 4)
    rendered = encoder.token_ids(encoder.render(QUESTION), rendered=True)
    scored = encoder.encode(encoder.render(QUESTION), "Tokyo.", rendered=True, max_tokens=64)
    asked = conversation_key(messages=QUESTION)
    assert found[0] == Text(
        key=asked, response_start=scored.response_start, token_ids=list(scored.token_ids)
    )
    assert found[1].key == conversation_key(prompt=raw["prompt"])
    assert found[2] == Text(
        key=asked, response_start=len(rendered), token_ids=[*rendered, 40, 41, 42]
    )
    prompt = encoder.token_ids("4 * 15 =", rendered=False)
    assert found[3].key == conversation_key(prompt="4 * 15 =")
    assert found[3].token_ids == [*prompt, 40, 41]


async def test_what_must_not_be_kept_is_not(service: Service) -> None:
    client = service.client
    score = {"messages": QUESTION, "response": "Tokyo.", "store": False}
    chat = {"messages": QUESTION, "max_tokens": 3, "store": False}
    text = {"prompt": "4 * 15 =", "max_tokens": 2, "store": False}
    await client.post("/v1/score", json=score, headers=ADMIN)
    await client.post("/v1/score", json=[score, {**score, "response": ""}], headers=ADMIN)
    await client.post("/v1/chat/completions", json=chat, headers=ADMIN)
    await client.post("/v1/chat/completions", json={**chat, "stream": True}, headers=ADMIN)
    await client.post("/v1/completions", json=text, headers=ADMIN)
    service.engine.broken_numbers = True  # nor is an answer that failed
    failed = await client.post("/v1/score", json={**score, "store": True}, headers=ADMIN)
    assert failed.status_code == 500
    service.engine.broken_numbers = False
    sign = {"messages": QUESTION, "response": "Kyoto."}
    await client.post("/v1/score", json=sign, headers=ADMIN)
    assert len(await kept(service, 1)) == 1


async def test_a_service_with_osd_off_keeps_nothing_and_says_so(
    encoder: TextEncoder, folder: Path, tmp_path: Path
) -> None:
    async with serve(encoder, folder, tmp_path, osd="off") as service:
        await service.client.post("/v1/score", json={"prompt": "a", "response": "b"}, headers=ADMIN)
        status = await service.client.get("/v1/osd", headers=ADMIN)
        assert status.json() == {
            "object": "osd",
            "mode": "off",
            "paused": None,
            "store_error": None,
            "spool": None,
            "trainer_alive": False,
            "trainer": None,
        }
        for method, path in (
            ("POST", "/v1/osd/pause"),
            ("POST", "/v1/osd/resume"),
            ("DELETE", "/v1/osd/spool"),
            ("POST", "/v1/drafts/rollback"),
        ):
            answer = await service.client.request(method, path, headers=ADMIN)
            assert answer.status_code == 400
            assert answer.json()["error"]["code"] == "osd_off"
        assert (await service.client.get("/v1/drafts", headers=ADMIN)).json()["versions"] is None
    assert not (tmp_path / "osd").exists()


async def test_what_was_kept_before_osd_was_turned_off_can_be_deleted(
    encoder: TextEncoder, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "osd").mkdir()
    with open_spool(str(tmp_path / "osd" / "spool.sqlite")) as spool:
        spool.append([Text(key=1, response_start=1, token_ids=[1, 2])])
        async with serve(encoder, folder, tmp_path, osd="off") as service:
            deleted = await service.client.delete("/v1/osd/spool", headers=ADMIN)
            assert (deleted.status_code, deleted.json()["deleted"]) == (200, 1)
        assert spool.stats().texts == 0


async def test_a_page_of_another_site_does_not_administer_a_service_without_keys(
    encoder: TextEncoder, folder: Path, tmp_path: Path
) -> None:
    async with serve(encoder, folder, tmp_path, api_keys=[], admin_keys=[]) as service:
        host = str(service.client.base_url.netloc.decode())
        for origin, status in (
            ("https://elsewhere.example", 403),
            ("null", 403),
            (f"http://{host}", 200),
            (None, 200),
        ):
            headers = {} if origin is None else {"Origin": origin}
            answer = await service.client.post("/v1/osd/pause", headers=headers)
            assert answer.status_code == status, (origin, answer.text)


async def test_only_admins_see_and_change_it(service: Service) -> None:
    for method, path in (
        ("GET", "/v1/drafts"),
        ("POST", "/v1/drafts/rollback"),
        ("GET", "/v1/osd"),
        ("POST", "/v1/osd/pause"),
        ("POST", "/v1/osd/resume"),
        ("DELETE", "/v1/osd/spool"),
    ):
        assert (await service.client.request(method, path)).status_code == 401
        user = {"Authorization": "Bearer user"}
        assert (await service.client.request(method, path, headers=user)).status_code == 403


async def test_the_spool_is_emptied_on_request(service: Service) -> None:
    for word in ("one", "two", "three"):
        body = {"prompt": "a", "response": word}
        await service.client.post("/v1/score", json=body, headers=ADMIN)
    await kept(service, 3)
    status = (await service.client.get("/v1/osd", headers=ADMIN)).json()
    assert status["spool"]["texts"] == 3
    assert status["spool"]["error"] is None
    answer = await service.client.delete("/v1/osd/spool", headers=ADMIN)
    assert answer.json() == {"object": "spool.deleted", "deleted": 3}
    await kept(service, 0)
    # And what came before may come again.
    await service.client.post("/v1/score", json={"prompt": "a", "response": "one"}, headers=ADMIN)
    await kept(service, 1)


async def test_a_spool_that_is_away_fails_no_answer_and_gets_all_when_it_is_back(
    encoder: TextEncoder, folder: Path, tmp_path: Path
) -> None:
    place = tmp_path / "spool.sqlite"
    place.mkdir()  # no file can be there
    async with serve(encoder, folder, tmp_path, spool=str(place)) as service:
        for word in ("one", "two"):
            body = {"prompt": "a", "response": word}
            answer = await service.client.post("/v1/score", json=body, headers=ADMIN)
            assert answer.status_code == 200
        capture = service.app.state.demur.serving.online.capture
        await until(lambda: capture.error is not None)
        status = (await service.client.get("/v1/osd", headers=ADMIN)).json()
        assert "cannot be used" in status["spool"]["error"]
        place.rmdir()
        await until(lambda: capture.error is None)
        await kept(service, 2)


def test_too_many_conversations_are_dropped_and_counted(tmp_path: Path) -> None:
    def away() -> Any:
        raise SpoolError("away")

    before = gauge_of("demur_spool_captured_total", outcome="dropped")
    capture = Capture(away, max_queued=3)
    capture.start()
    for number in range(10):
        capture.offer(1, [1, 2, number], 1)
    assert capture.queued <= 3
    capture.end(within_s=0.2)
    # All ten, but for the ones that were never written because the queue was full or ended.
    assert gauge_of("demur_spool_captured_total", outcome="dropped") - before == 10


def test_what_waits_is_bounded_in_tokens_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.capture._MAX_TOKENS", 25)
    capture = Capture(lambda: open_spool(str(tmp_path / "spool.sqlite")), 100)
    for number in range(5):
        capture.offer(1, [number] * 10, 2)
    assert capture.queued == 2
    assert capture.forget() == 2
    capture.offer(1, [7] * 25, 2)
    assert capture.queued == 1


def test_a_text_that_comes_again_is_kept_once(tmp_path: Path) -> None:
    place = str(tmp_path / "spool.sqlite")
    capture = Capture(lambda: open_spool(place), max_queued=100)
    capture.start()
    for _ in range(50):
        capture.offer(1, [1, 2, 3], 1)
        capture.offer(1, [1, 2, 3], 2)
        capture.offer(1, [1, 2], 2)  # no response
        capture.offer(1, [1, 2], 0)  # nothing before it
    capture.end(within_s=10)
    with open_spool(place) as spool:
        assert [entry.text.response_start for entry in spool.read(START, 10)] == [1, 2]


def fitted_with(version: str) -> str:
    """A calibration that says it was fitted with a version."""
    calibration = fake_calibration()
    origin = calibration.origin.model_copy(update={"weights_version": version})
    return calibration.model_copy(update={"origin": origin}).text()


def another_version(folder: Path, place: Path, version: str, *, calibrated: bool = False) -> Path:
    """Weights of their own under another name."""
    mixed_ensemble(place / version, seed=len(version), version=version)
    target = load_ensemble(folder).target_path
    edit_manifest(
        place / version, name="tiny-llama", target={"source": str(target)}, weights_version=version
    )
    if calibrated:
        (place / version / CALIBRATION_NAME).write_text(fitted_with(version))
    return place / version


async def test_it_follows_the_store_and_rolls_back(
    service: Service, folder: Path, tmp_path: Path
) -> None:
    store = DraftsStore(str(tmp_path / "osd" / "drafts"))
    assert service.engine.weights_version == "v1"  # the ensemble is the store's first version
    assert store.current().name == "v1"
    store.publish(another_version(folder, tmp_path, "v2"), about={"refused": []})
    await until(lambda: service.engine.weights_version == "v2")
    body = {"prompt": "a", "response": "b"}
    answer = (await service.client.post("/v1/score", json=body, headers=ADMIN)).json()
    assert answer["estimator"]["weights_version"] == "v2"

    listed = (await service.client.get("/v1/drafts", headers=ADMIN)).json()
    assert listed["weights_version"] == "v2"
    assert [(v["name"], v["parent"], v["current"]) for v in listed["versions"]] == [
        ("v1", None, False),
        ("v2", "v1", True),
    ]
    rolled = await service.client.post("/v1/drafts/rollback", headers=ADMIN)
    assert rolled.status_code == 200
    assert rolled.json()["weights_version"] == "v1"  # when it answers, that is what serves
    assert service.engine.weights_version == "v1"
    assert "by request" in (store.withdrawn("v2") or "")

    named = {"version": "v2"}
    forward = await service.client.post("/v1/drafts/rollback", json=named, headers=ADMIN)
    assert forward.json()["weights_version"] == "v2"
    for bad, status in (({"version": "v9"}, 404), ({"versions": "v1"}, 400)):
        answer = await service.client.post("/v1/drafts/rollback", json=bad, headers=ADMIN)
        assert answer.status_code == status
    await service.client.post("/v1/drafts/rollback", json={"version": "v1"}, headers=ADMIN)
    again = await service.client.post("/v1/drafts/rollback", headers=ADMIN)
    assert again.status_code == 400
    assert again.json()["error"]["code"] == "no_parent"


async def test_two_services_follow_one_store(
    service: Service, encoder: TextEncoder, folder: Path, tmp_path: Path
) -> None:
    other_place = {"osd_folder": tmp_path / "other", "drafts_store": str(tmp_path / "osd/drafts")}
    async with serve(encoder, folder, tmp_path, **other_place) as other:
        store = DraftsStore(str(tmp_path / "osd" / "drafts"))
        store.publish(another_version(folder, tmp_path, "v2"), about={})
        await until(lambda: service.engine.weights_version == "v2")
        await until(lambda: other.engine.weights_version == "v2")
        await service.client.post("/v1/drafts/rollback", headers=ADMIN)
        await until(lambda: other.engine.weights_version == "v1")


@pytest.mark.parametrize("damage", ["truncated", "missing", "refused by the engine", "no version"])
async def test_a_version_that_cannot_be_used_leaves_what_serves(
    service: Service, folder: Path, tmp_path: Path, damage: str
) -> None:
    failed = gauge_of("demur_drafts_swaps_total", outcome="failed")
    store = DraftsStore(str(tmp_path / "osd" / "drafts"))
    service.engine.refuses_swaps = damage == "refused by the engine"
    version = store.publish(another_version(folder, tmp_path, "v2"), about={}, make_current=False)
    place = tmp_path / "osd/drafts/versions/v2"
    [file] = place.glob("exit_a/model.safetensors.*")
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "missing":
        file.unlink()
    elif damage == "no version":
        (place / "version.json").write_text('{"name": "v2"')
    (tmp_path / "osd/drafts/current").write_text(version.name)
    if damage != "no version":
        await until(lambda: gauge_of("demur_drafts_swaps_total", outcome="failed") > failed)
    body = {"prompt": "a", "response": "b"}
    answer = await service.client.post("/v1/score", json=body, headers=ADMIN)
    assert answer.json()["estimator"]["weights_version"] == "v1"
    if damage == "no version":
        listed = (await service.client.get("/v1/drafts", headers=ADMIN)).json()
        assert [version["name"] for version in listed["versions"]] == ["v1"]
        named = {"version": "v1"}
        rolled = await service.client.post("/v1/drafts/rollback", json=named, headers=ADMIN)
        assert rolled.json()["weights_version"] == "v1"
        assert store.current().name == "v1"
        return
    service.engine.refuses_swaps = False
    rolled = await service.client.post("/v1/drafts/rollback", headers=ADMIN)
    assert rolled.json()["weights_version"] == "v1"
    if damage == "refused by the engine":
        return
    # Nor can anybody choose it: the store stays with what can be served.
    chosen = {"version": "v2"}
    refused = await service.client.post("/v1/drafts/rollback", json=chosen, headers=ADMIN)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "unusable_version"
    assert store.current().name == "v1"


async def test_each_version_has_its_own_calibration_or_none(
    encoder: TextEncoder, folder: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(folder, base)
    (base / CALIBRATION_NAME).write_text(fitted_with("v1"))
    body = {"prompt": "a", "response": "b"}
    async with serve(encoder, base, tmp_path) as service:
        store = DraftsStore(str(tmp_path / "osd" / "drafts"))

        async def score() -> dict[str, Any]:
            answer = await service.client.post("/v1/score", json=body, headers=ADMIN)
            return dict(answer.json())

        assert (await score())["hallucination_score"] is not None
        store.publish(another_version(folder, tmp_path, "v2"), about={})
        await until(lambda: service.engine.weights_version == "v2")
        answer = await score()
        assert answer["hallucination_score"] is None
        assert answer["calibration"] is None
        store.publish(another_version(folder, tmp_path, "v33", calibrated=True), about={})
        await until(lambda: service.engine.weights_version == "v33")
        answer = await score()
        assert answer["hallucination_score"] is not None
        assert not [w for w in answer["warnings"] if w["code"] == "calibrated_on_other_weights"]
        models = (await service.client.get("/v1/models", headers=ADMIN)).json()
        assert models["data"][0]["calibration"] == answer["calibration"]["id"]
        await service.client.post("/v1/drafts/rollback", json={"version": "v1"}, headers=ADMIN)
        assert (await score())["hallucination_score"] is not None


async def test_a_version_that_ends_the_engine_is_not_tried_for_ever(
    service: Service, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DraftsStore(str(tmp_path / "osd" / "drafts"))
    follower = service.app.state.demur.serving.online.follower
    await until(lambda: store.current_name() == "v1")
    swap, tried = service.engine.swap, []

    async def fatal(folder: Path, target_path: Path | None = None) -> None:
        tried.append(load_ensemble(folder, target_path).manifest.weights_version)
        raise EngineNotReady("a worker died")

    monkeypatch.setattr(service.engine, "swap", fatal)
    store.publish(another_version(folder, tmp_path, "v2"), about={})
    await until(lambda: len(tried) == 1)
    with pytest.raises(EngineNotReady):  # as once the engine has been started again
        await follower.look(again=True)
    for _ in range(3):
        with pytest.raises(StoreError, match="v2 has twice ended the engine"):
            await follower.look(again=True)
    assert tried == ["v2", "v2"]
    # It is known to the next process, too.
    assert Attempts(tmp_path / "osd" / "served" / "attempts").too_many("v2")
    assert gauge_of("demur_drafts_current_served") == 0
    # Another version is none of its business, and whoever asks for it gets it.
    monkeypatch.setattr(service.engine, "swap", swap)
    store.publish(another_version(folder, tmp_path, "v3"), about={})
    await until(lambda: service.engine.weights_version == "v3")
    answer = await service.client.post("/v1/drafts/rollback", json={"version": "v2"}, headers=ADMIN)
    assert answer.status_code == 200, answer.text
    assert service.engine.weights_version == "v2"
    assert gauge_of("demur_drafts_current_served") == 1


async def test_a_store_that_is_away_is_told_and_costs_nothing_else(
    service: Service, tmp_path: Path
) -> None:
    place = tmp_path / "osd" / "drafts"
    await until(lambda: (place / "current").exists())
    place.rename(tmp_path / "away")
    place.write_text("no folder")
    await until(lambda: gauge_of("demur_drafts_store_up") == 0)
    answer = await service.client.get("/v1/osd", headers=ADMIN)
    assert answer.status_code == 200, answer.text
    status = answer.json()
    assert status["store_error"]
    assert status["trainer"] is None
    assert status["spool"]["texts"] == 0
    place.unlink()
    (tmp_path / "away").rename(place)
    await until(lambda: gauge_of("demur_drafts_store_up") == 1)
    assert (await service.client.get("/v1/osd", headers=ADMIN)).json()["store_error"] is None


def test_a_first_publication_that_fails_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DraftsStore, "publish", full)
    work = tmp_path / "work"
    with pytest.raises(OSError, match="No space"):
        first_version(DraftsStore(str(tmp_path / "store")), load_ensemble(folder), work)
    assert list(work.iterdir()) == []


def test_a_status_names_known_measures_only(tmp_path: Path) -> None:
    assert Agreement._fields == MEASURES
    control = Control(DraftsStore(str(tmp_path)))
    Reporter(control).report("training", Progress.new("v1", 2, "a spool"))
    status = control.status()
    assert status is not None
    given = dict.fromkeys(MEASURES, 0.1)
    told = status.model_dump() | {"traffic": given}
    assert TrainerStatus.model_validate(told).traffic == given
    with pytest.raises(ValidationError, match="1 unknown measures"):
        TrainerStatus.model_validate(told | {"traffic": given | {"x" * 1000: 1.0}})


async def test_pause_resume_and_what_the_trainer_reports(service: Service, tmp_path: Path) -> None:
    status = (await service.client.get("/v1/osd", headers=ADMIN)).json()
    assert (status["mode"], status["trainer"], status["trainer_alive"]) == ("capture", None, False)
    paused = (await service.client.post("/v1/osd/pause", headers=ADMIN)).json()
    assert paused["paused"] == "by request"
    control = Control(DraftsStore(str(tmp_path / "osd" / "drafts")))
    assert control.paused() == "by request"
    resumed = (await service.client.post("/v1/osd/resume", headers=ADMIN)).json()
    assert resumed["paused"] is None
    assert control.paused() is None
    again = await service.client.post("/v1/osd/resume", headers=ADMIN)
    assert again.status_code == 200

    progress = Progress.new("v1", 2, "a spool")
    progress.steps, progress.texts, progress.refused = [3, 4], [9, 12], 1
    progress.reference = {"kl_mixture": 0.25, "jsd": 0.125}
    Reporter(control).report("training", progress)
    status = (await service.client.get("/v1/osd", headers=ADMIN)).json()
    assert status["trainer_alive"]
    assert status["trainer"]["step"] == 7
    assert status["trainer"]["reference"]["jsd"] == 0.125
    await until(lambda: gauge_of("demur_osd_texts") == 21)
    measured = "demur_osd_measured_nats"
    assert gauge_of(measured, on="reference", measure="kl_mixture") == 0.25
    assert gauge_of("demur_osd_versions", verdict="refused") == 1
    assert gauge_of("demur_osd_trainer_up") == 1
    stale = control.status()
    assert stale is not None
    control.report(stale.model_copy(update={"updated": stale.updated - STALE_S - 1}))
    assert not (await service.client.get("/v1/osd", headers=ADMIN)).json()["trainer_alive"]


async def test_the_trainer_can_tell_that_the_service_is_busy(
    service: Service, tmp_path: Path
) -> None:
    load = tmp_path / "osd" / "load"
    assert not is_busy(load)
    service.engine.release.clear()
    body = {"prompt": "a", "response": "b"}
    asking = asyncio.create_task(service.client.post("/v1/score", json=body, headers=ADMIN))
    await until(lambda: is_busy(load))
    service.engine.release.set()
    assert (await asking).status_code == 200
    assert not is_busy(load)


async def test_a_staged_ensemble_is_the_same_ensemble(folder: Path, tmp_path: Path) -> None:
    ensemble = load_ensemble(folder)
    stage(ensemble, tmp_path / "staged")
    staged = load_ensemble(tmp_path / "staged")
    assert staged.manifest.weights_version == "v1"
    assert staged.target_path == ensemble.target_path
    for one, other in zip(staged.members, ensemble.members, strict=True):
        assert one.draft.name == other.draft.name
        weights = (one.path / "model.safetensors").read_bytes()
        assert weights == (other.path / "model.safetensors").read_bytes()
