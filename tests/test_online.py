"""The online trainer on a tiny target: it follows traffic, once, whatever happens to it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from drafts.errors import ManifestError, StoreError
from drafts.manifest import MANIFEST_NAME, load_ensemble
from drafts.store import DraftsStore
from osd import checkpoint
from osd.corpus import Text
from osd.errors import OsdError, OtherRunError
from osd.online import OnlineTrainer, Places, run
from osd.online_command import osd as osd_command
from osd.online_config import OnlineConfig
from osd.pace import Pace
from osd.publish import first_version, open_version
from osd.shards import conversation_key, is_held_out, shard_of
from osd.spool import open_spool
from server.settings import read_settings
from tests.online_world import EXIT, NEW, OLD, RESIDUAL, World, answers, make_world, online


@pytest.fixture(scope="module", params=["exit", "residual"])
def world(request: Any, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp(request.param)
    return make_world(folder, EXIT if request.param == "exit" else RESIDUAL)


@pytest.fixture(scope="module")
def exits(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("exits"), EXIT)


@pytest.fixture(scope="module")
def traffic(exits: World) -> list[Text]:
    return answers(exits.target, NEW, 160, "new")


def weights(trainer: OnlineTrainer) -> list[dict[str, torch.Tensor]]:
    return [
        {name: tensor.clone() for name, tensor in student.module.state_dict().items()}
        for student in trainer.learner.students
    ]


def rounds(trainer: OnlineTrainer, until: Any) -> None:
    """Rounds until something holds; the store and the spool are looked at in each."""
    for _ in range(300):
        trainer._looked = float("-inf")
        trainer.round()
        if until():
            return
    raise AssertionError("300 rounds, and it did not come to that")


def test_it_publishes_a_version_that_is_nearer_the_target_on_the_traffic(
    world: World, tmp_path: Path
) -> None:
    here = world.beside(tmp_path)
    with here.spool() as spool:
        spool.append(answers(here.target, NEW, 160, "new"))
        gate = {"kl_margin": 0.2, "reference_margin": 0.5, "jsd_floor": 0.0}
        trainer = here.trainer(spool, gate=gate)
        before = weights(trainer)
        first = trainer.progress.base
        assert first == load_ensemble(here.places.ensemble).manifest.weights_version
        rounds(trainer, lambda: trainer.progress.published)
        assert any(
            not torch.equal(tensor, after[name])
            for student, after in zip(before, weights(trainer), strict=True)
            for name, tensor in student.items()
        )
    store = DraftsStore(here.places.store)
    version = store.current()
    assert version.parent == first
    assert version.name == trainer.progress.base != first
    assert version.about["refused"] == []
    kl, was = (version.about[k]["kl_mixture"] for k in ("traffic", "serving, on traffic"))
    # The residual drafts of a random target know it on all texts alike.
    assert kl < was * (1.0 if here.kind == "exit" else 1.2)
    status = trainer.control.status()
    assert status is not None
    assert status.published == 1
    assert status.last_verdict is not None
    assert (status.last_verdict.version, status.last_verdict.verdict) == (version.name, "published")
    # What was published is an ensemble that serves, with drafts of the same shape.
    folder = store.fetch(version, tmp_path / "fetched")
    published = load_ensemble(folder)
    original = load_ensemble(here.places.ensemble)
    assert [m.draft.name for m in published.members] == [m.draft.name for m in original.members]
    assert published.target_path == original.target_path


def test_each_text_is_learned_from_by_one_draft_and_held_out_ones_by_none(
    exits: World, tmp_path: Path, traffic: list[Text]
) -> None:
    here = exits.beside(tmp_path)
    with here.spool() as spool:
        spool.append(traffic)
        trainer = here.trainer(spool, publish_every=10_000, replay=0.0, texts=2)
        seen: list[list[Text]] = [[], []]
        lesson = trainer.learner.lesson

        def watched(number: int, index: int, texts: list[Text]) -> Any:
            seen[number] += texts
            return lesson(number, index, texts)

        trainer.learner.lesson = watched  # type: ignore[method-assign]
        rounds(trainer, lambda: trainer._next() == "waiting")
        salt = spool.identity()
    for number, texts in enumerate(seen):
        own = [
            text
            for text in traffic
            if shard_of(text.key, 2) == number and not is_held_out(text.key, 4, salt)
        ]
        assert texts == own[: len(own) // 2 * 2]  # the last one waits for a second
        assert trainer.progress.texts[number] == len(texts)
    held_out = [text for text in traffic if is_held_out(text.key, 4, salt)]
    assert trainer.traffic.held_out_after() == held_out[-12:]


def test_without_ddd_every_draft_learns_from_everything(
    exits: World, tmp_path: Path, traffic: list[Text]
) -> None:
    here = exits.beside(tmp_path)
    with here.spool() as spool:
        spool.append(traffic[:40])
        trainer = here.trainer(spool, publish_every=10_000, replay=0.0, texts=1, diverse=False)
        rounds(trainer, lambda: trainer._next() == "waiting")
        salt = spool.identity()
    learned = sum(not is_held_out(text.key, 4, salt) for text in traffic[:40])
    assert trainer.progress.texts == [learned, learned]


_KILLED = """
import sys, threading
from pathlib import Path
from osd.online import Places, run
from tests.online_world import online
paths = [Path(argument) for argument in sys.argv[1:]]
places = Places(paths[0], str(paths[1]), str(paths[2]), *paths[3:])
run(online(publish_every=10_000, checkpoint_every=3), places, threading.Event())
"""


def test_killed_at_any_line_it_comes_to_the_same_weights(
    exits: World, tmp_path: Path, traffic: list[Text]
) -> None:
    changes = {"publish_every": 10_000, "checkpoint_every": 3}
    whole, cut = exits.beside(tmp_path / "whole"), exits.beside(tmp_path / "cut")
    for here in (whole, cut):
        with here.spool() as spool:
            spool.append(traffic)
    with whole.spool() as spool:
        expected = whole.trainer(spool, **changes)
        rounds(expected, lambda: expected._next() == "waiting")

    places = cut.places
    arguments = [places.ensemble, places.store, places.spool, places.folder, places.corpus]
    rng = random.Random(1)
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", _KILLED, *map(str, arguments), str(places.load)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
        )
        earlier = set(places.folder.glob("checkpoint-*"))
        deadline = time.monotonic() + 120
        while not set(places.folder.glob("checkpoint-*")) - earlier:
            assert process.poll() is None, process.stderr and process.stderr.read().decode()
            if time.monotonic() > deadline:
                break  # it had come to the end before
            time.sleep(0.005)
        time.sleep(rng.random() * 0.1)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        if len(earlier) and not set(places.folder.glob("checkpoint-*")) - earlier:
            break
    with cut.spool() as spool:
        after = cut.trainer(spool, **changes)
        resumed_at = after.progress.step
        rounds(after, lambda: after._next() == "waiting")
    assert resumed_at > 0
    assert after.progress.texts == expected.progress.texts
    assert after.progress.positions == expected.progress.positions
    assert after.progress.steps == expected.progress.steps
    for one, other in zip(weights(after), weights(expected), strict=True):
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name]), name


def test_killed_between_a_version_and_its_checkpoint_it_learns_nothing_twice(
    exits: World, tmp_path: Path, traffic: list[Text], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = exits.beside(tmp_path)
    with here.spool() as spool:
        spool.append(traffic)
        trainer = here.trainer(spool, checkpoint_every=10_000)

        def killed(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(trainer, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            rounds(trainer, lambda: False)
        version = DraftsStore(here.places.store).current()
        assert version.about["progress"]["published"] == 1
        again = here.trainer(spool)
        assert again.progress.base == version.name
        assert again.progress.positions == trainer.traffic.positions
        assert again.progress.texts == trainer.progress.texts
        assert again.progress.published == 1


def test_restarted_after_a_version_it_has_the_same_weights(
    exits: World, tmp_path: Path, traffic: list[Text]
) -> None:
    here = exits.beside(tmp_path)
    with here.spool() as spool:
        spool.append(traffic)
        trainer = here.trainer(spool)
        rounds(trainer, lambda: trainer.progress.published)
        # Low-rank updates go on from the weights that they began with, not from the version's.
        assert trainer.progress.origin == trainer.progress.first != trainer.progress.base
        rounds(trainer, lambda: trainer.progress.since)
        trainer.save()
        again = here.trainer(spool)
    assert again.progress == trainer.progress
    for one, other in zip(weights(again), weights(trainer), strict=True):
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name]), name


def degenerate(count: int, kind: str) -> list[Text]:
    """What floods a service: one token repeated, or random ones."""
    rng = random.Random(kind)
    texts = []
    for number in range(count):
        tokens = [rng.randrange(320) for _ in range(20)]
        if kind == "repeated":
            tokens = [rng.randrange(320)] * 20
        key = conversation_key(prompt=f"{kind} {number}")
        texts.append(Text(key=key, response_start=2, token_ids=tokens))
    return texts


@pytest.mark.parametrize("kind", ["repeated", "random"])
def test_no_version_that_poison_made_worse_goes_live(
    exits: World, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    here = exits.beside(tmp_path)
    with here.spool() as spool:
        spool.append(degenerate(240, kind))
        gate = {"reference_margin": 0.02, "jsd_floor": 0.5}
        trainer = here.trainer(spool, learning_rate=3e-2, replay=0.0, gate=gate)
        first, clean = trainer.progress.base, weights(trainer)
        rounds(trainer, lambda: trainer.progress.refused or trainer.progress.published)
        assert trainer.progress.refused == 1
        # It goes on from what serves, more carefully, and behind what it has read.
        assert trainer.progress.base == first
        assert trainer.progress.rate == 0.5
        assert sum(trainer.progress.texts) > 0
        for one, other in zip(weights(trainer), clean, strict=True):
            assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    store = DraftsStore(here.places.store)
    assert store.current().name == first
    [refused] = [version for version in store.versions() if version.name != first]
    reasons = refused.about["refused"]
    assert any("reference set" in reason for reason in reasons)
    assert f"version {refused.name} is refused: {reasons[0]}" in caplog.text


def test_a_version_that_does_worse_than_its_parent_is_taken_back(
    exits: World, tmp_path: Path, traffic: list[Text]
) -> None:
    here = exits.beside(tmp_path)
    with here.spool() as spool:
        trainer = here.trainer(spool, replay=0.0)
        good = trainer.progress.base
        # A version that a gate should not have let through.
        with torch.no_grad():
            for student in trainer.learner.students:
                for parameter in student.module.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
        spool.append(traffic[:60])
        trainer.traffic.pull()
        lenient = online(gate={"kl_margin": 100, "reference_margin": 100, "jsd_floor": 0})
        trainer.reviewer._config = lenient
        trainer.judge()
        bad = trainer.progress.base
        assert bad != good
        rounds(trainer, lambda: trainer._next() == "waiting" or trainer.progress.taken_back)
        assert trainer.progress.taken_back == 0  # nothing has come since
        spool.append(traffic[60:])
        make_current = trainer.store.make_current

        def away(name: str) -> Any:
            raise StoreError("the bucket is away")

        trainer.store.make_current = away  # type: ignore[method-assign]
        with pytest.raises(StoreError):
            rounds(trainer, lambda: False)
        trainer.store.make_current = make_current  # type: ignore[method-assign]
        assert (trainer.progress.base, trainer.progress.taken_back) == (bad, 0)
        rounds(trainer, lambda: trainer.progress.taken_back)
        assert trainer.progress.base == good
        assert trainer.progress.rate == 0.5
    store = DraftsStore(here.places.store)
    assert store.current().name == good
    assert "on traffic since it serves" in (store.withdrawn(bad) or "")
    verdict = trainer.progress.last_verdict
    assert verdict is not None
    assert (verdict.version, verdict.verdict) == (bad, "taken back")


def test_it_goes_on_from_the_version_that_somebody_chose(
    exits: World, tmp_path: Path, traffic: list[Text]
) -> None:
    here = exits.beside(tmp_path)
    with here.spool() as spool:
        spool.append(traffic)
        trainer = here.trainer(spool)
        first, start = trainer.progress.base, weights(trainer)
        rounds(trainer, lambda: trainer.progress.published)
        learned = list(trainer.progress.texts)
        trainer.store.rollback()
        trainer._follow_store()
        assert trainer.progress.base == first
        for one, other in zip(weights(trainer), start, strict=True):
            assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
        assert trainer.progress.texts == learned  # and what was read stays read
        assert trainer.traffic.positions == trainer.progress.positions


def test_a_damaged_version_that_somebody_chose_leaves_nothing_behind(
    exits: World, tmp_path: Path, traffic: list[Text]
) -> None:
    here = exits.beside(tmp_path)
    with here.spool() as spool:
        spool.append(traffic)
        trainer = here.trainer(spool)
        rounds(trainer, lambda: trainer.progress.published)
        before, base = trainer.progress.model_copy(deep=True), trainer.progress.base
        folder = trainer.store.fetch(trainer.store.version(base), tmp_path / "copies")
        manifest = json.loads((folder / MANIFEST_NAME).read_text())
        (folder / MANIFEST_NAME).write_text(json.dumps(manifest | {"weights_version": "damaged"}))
        trainer.store.publish(folder, about={})
        for file in Path(here.places.store, "versions/damaged").rglob("*.safetensors*"):
            file.write_bytes(file.read_bytes()[:100])
        with pytest.raises(StoreError, match="damaged"):
            trainer._follow_store()
        trainer.store.make_current(base)
        trainer._follow_store()
        assert trainer.progress == before


def test_a_damaged_checkpoint_costs_time_and_no_text(
    exits: World, tmp_path: Path, traffic: list[Text]
) -> None:
    here = exits.beside(tmp_path)
    with here.spool() as spool:
        spool.append(traffic)
        trainer = here.trainer(spool, publish_every=10_000)
        rounds(trainer, lambda: trainer.progress.step >= 10)
        before = sorted(here.places.folder.glob("checkpoint-*"))
        assert len(before) == 2
        file = before[-1] / "student-1.safetensors"
        file.write_bytes(file.read_bytes()[:100])
        again = here.trainer(spool, publish_every=10_000)
        assert again.progress.step == 4
        rounds(again, lambda: again._next() == "waiting")
        rounds(trainer, lambda: trainer._next() == "waiting")
        assert again.progress.texts == trainer.progress.texts
        for one, other in zip(weights(again), weights(trainer), strict=True):
            assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_full_disk_stops_it_until_there_is_room(
    exits: World, tmp_path: Path, traffic: list[Text], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = exits.beside(tmp_path)
    monkeypatch.setattr("osd.online._STUCK_S", (0.01,))
    with here.spool() as spool:
        spool.append(traffic)
        trainer = here.trainer(spool, publish_every=10_000)
        real, failures, problems = checkpoint.save, [0], []
        stuck = trainer.reporter.stuck

        def reported(problem: str, *arguments: Any) -> None:
            stuck(problem, *arguments)
            status = trainer.control.status()
            assert status is not None
            problems.append((status.activity, status.problem))

        def full(*arguments: Any) -> Path:
            failures[0] += 1
            if failures[0] <= 3:
                raise OSError(28, "No space left on device")
            return real(*arguments)

        monkeypatch.setattr(checkpoint, "save", full)
        monkeypatch.setattr(trainer.reporter, "stuck", reported)
        stop = threading.Event()
        thread = threading.Thread(target=trainer.follow_traffic, args=(stop,), daemon=True)
        thread.start()
        while not trainer.progress.step or trainer._next() != "waiting" or failures[0] < 4:
            time.sleep(0.05)
        stop.set()
        thread.join()
        assert failures[0] > 3
        assert problems == [("stuck", "[Errno 28] No space left on device")] * 3
        again = here.trainer(spool, publish_every=10_000)
        assert again.progress.texts == trainer.progress.texts


def test_it_rests_while_it_is_paused(exits: World, tmp_path: Path, traffic: list[Text]) -> None:
    here = exits.beside(tmp_path)
    with here.spool() as spool:
        spool.append(traffic)
        trainer = here.trainer(spool)
        trainer.control.pause("by a test")
        assert trainer.round() == "paused"
        step = trainer.progress.step
        trainer._looked = float("-inf")
        assert trainer.round() == "paused"
        assert trainer.progress.step == step == 0
        trainer.control.resume()
        trainer._looked = float("-inf")
        assert trainer.round() == "training"
        assert trainer.progress.step == 1


def test_texts_that_nothing_can_be_learned_from_are_counted(
    exits: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here = exits.beside(tmp_path)
    keys = [conversation_key(prompt=str(number)) for number in range(200)]
    texts = [Text(key=key, response_start=1, token_ids=[1, 5000]) for key in keys[:100]]
    texts += [Text(key=key, response_start=450, token_ids=[1] * 460) for key in keys[100:]]
    with here.spool() as spool:
        spool.append(texts)
        trainer = here.trainer(spool, replay=0.0)
        before = weights(trainer)
        rounds(trainer, lambda: trainer._next() == "waiting")
        for one, other in zip(weights(trainer), before, strict=True):
            assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert trainer.progress.step == 0
    assert trainer.traffic.waiting(0) == 0
    status = trainer.control.status()
    assert status is not None
    assert (status.unusable, status.held_out, status.texts) == (200, 0, [0, 0])
    assert caplog.text.count("a text cannot be used") == 1


@pytest.mark.parametrize("what", ["pause", "clear"])
def test_a_pause_and_a_deletion_are_heard_in_the_midst_of_a_judgement(
    exits: World, tmp_path: Path, traffic: list[Text], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    here = exits.beside(tmp_path)
    monkeypatch.setattr("osd.online._LOOK_EVERY_S", 0.01)
    with here.spool() as spool:
        spool.append(traffic)
        trainer = here.trainer(spool)
        while trainer._next() != "judging":
            trainer.round()
        review = trainer.reviewer.review

        def meanwhile(*arguments: Any, **named: Any) -> Any:
            trainer.control.pause("by a test") if what == "pause" else spool.clear()
            return review(*arguments, **named)

        trainer.reviewer.review = meanwhile  # type: ignore[method-assign]
        trainer.round()
        assert trainer.progress.last_verdict is None
        assert [version.name for version in trainer.store.versions()] == [trainer.progress.first]
        if what == "clear":
            assert trainer.traffic.all_waiting() == [0, 0]
            assert trainer.traffic.held_out_after() == []
        assert trainer.round() == ("paused" if what == "pause" else "waiting")


def test_a_step_that_torch_cannot_make_costs_no_text(
    exits: World, tmp_path: Path, traffic: list[Text]
) -> None:
    here = exits.beside(tmp_path)
    with here.spool() as spool:
        spool.append(traffic[:40])
        trainer = here.trainer(spool)
        trainer._look()
        waiting, lesson = trainer.traffic.all_waiting(), trainer.learner.lesson

        def short_of_memory(*_: Any) -> Any:
            raise torch.OutOfMemoryError("there is no memory left")

        trainer.learner.lesson = short_of_memory  # type: ignore[method-assign]
        with pytest.raises(OsdError, match="no memory left"):
            trainer.round()
        assert trainer.traffic.all_waiting() == waiting
        assert trainer.progress.step == sum(trainer.progress.texts) == 0
        trainer.learner.lesson = lesson  # type: ignore[method-assign]
        assert trainer.round() == "training"
        assert sum(trainer.progress.texts) == 3


def test_a_judgement_keeps_to_the_share_and_hears_a_stop(
    exits: World, tmp_path: Path, traffic: list[Text]
) -> None:
    here = exits.beside(tmp_path)
    with here.spool() as spool:
        spool.append(traffic)
        trainer = here.trainer(spool)
        trainer._look()
        while trainer._next() == "training":
            trainer.step()
        assert trainer._next() == "judging"
        trainer.pace = Pace(share=1e-4, busy_share=1e-4, busy=lambda: False)
        stop = threading.Event()
        thread = threading.Thread(target=trainer.follow_traffic, args=(stop,), daemon=True)
        thread.start()
        deadline = time.monotonic() + 60
        while not trainer.pace._owed:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.2)
        status = trainer.control.status()
        assert status is not None
        assert status.activity == "judging"
        stop.set()
        thread.join(30)
        assert not thread.is_alive()
        assert [version.name for version in trainer.store.versions()] == [trainer.progress.first]
        again = here.trainer(spool)  # it was cut short, and is made again
        assert again.progress == trainer.progress
        rounds(again, lambda: again.progress.published)


def test_weights_that_hold_nan_are_refused_with_the_reason(
    exits: World, tmp_path: Path, traffic: list[Text]
) -> None:
    here = exits.beside(tmp_path)
    with here.spool() as spool:
        spool.append(traffic)
        trainer = here.trainer(spool)
        first, clean = trainer.progress.base, weights(trainer)
        trainer.traffic.pull()
        with torch.no_grad():
            next(trainer.learner.students[1].module.parameters()).view(-1)[0] = torch.nan
        trainer.judge()
        assert trainer.progress.base == trainer.store.current().name == first
        for one, other in zip(weights(trainer), clean, strict=True):
            assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    verdict = trainer.progress.last_verdict
    assert verdict is not None
    assert verdict.verdict == "refused"
    assert "NaN" in verdict.reasons[0]
    [refused] = [version for version in trainer.store.versions() if version.name != first]
    assert refused.about["refused"] == verdict.reasons


def test_a_student_that_goes_on_is_the_one_that_was_written(world: World, tmp_path: Path) -> None:
    from osd.publish import write_version

    here = world.beside(tmp_path)
    with here.spool() as spool:
        trainer = here.trainer(spool)
    ensemble = load_ensemble(here.places.ensemble)
    name = write_version(ensemble, trainer.learner.students, tmp_path / "again", "same")
    assert name.startswith("same-")
    for member in ensemble.members:
        written = load_file(tmp_path / "again" / member.path.name / "model.safetensors")
        for key, tensor in load_file(member.path / "model.safetensors").items():
            assert torch.equal(written[key], tensor)


def test_weights_in_bfloat16_are_published_in_bfloat16(world: World, tmp_path: Path) -> None:
    from osd.publish import stage, write_version

    ensemble = load_ensemble(world.places.ensemble)
    stage(ensemble, tmp_path / "narrow")
    for file in (tmp_path / "narrow").rglob("*.safetensors"):
        save_file({k: t.bfloat16() for k, t in load_file(file).items()}, file)
    narrow = load_ensemble(tmp_path / "narrow")
    here = world.beside(tmp_path)
    with here.spool() as spool:
        trainer = here.trainer(spool)
    write_version(narrow, trainer.learner.students, tmp_path / "version", "v")
    for file in (tmp_path / "version").rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}


def test_the_ensemble_stands_in_for_the_first_version_if_the_store_has_lost_it(
    exits: World, tmp_path: Path
) -> None:
    """Or no version could be judged again: bounds are taken from the first one."""
    here = exits.beside(tmp_path)
    ensemble, store = load_ensemble(here.places.ensemble), DraftsStore(here.places.store)
    first = first_version(store, ensemble, tmp_path / "work")
    for file in Path(here.places.store).rglob("*.safetensors*"):
        file.write_bytes(file.read_bytes()[:100])
    assert open_version(store, first, ensemble, tmp_path / "work") is ensemble
    renamed = first.model_copy(update={"name": "another"})
    with pytest.raises(StoreError):
        open_version(store, renamed, ensemble, tmp_path / "work")


def test_the_command_looks_where_the_service_keeps_things(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Places] = []
    monkeypatch.setattr("osd.online.run", lambda _, places, __: found.append(places))
    monkeypatch.setattr("osd.online_command.signal.signal", lambda *_: None)
    monkeypatch.setenv("DEMUR_OSD", "capture")
    monkeypatch.setenv("DEMUR_OSD_FOLDER", str(tmp_path / "here"))
    monkeypatch.setenv("DEMUR_ENSEMBLE", str(tmp_path / "ensemble"))
    app = typer.Typer()
    app.command()(osd_command)
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 0, result.output
    settings = read_settings()
    [places] = found
    assert (places.spool, places.store) == (settings.spool_place, settings.store)
    assert (places.ensemble, places.corpus) == (settings.ensemble, settings.corpus)
    assert places.load == settings.osd_place / "load"


def test_two_trainers_do_not_share_a_folder(exits: World, tmp_path: Path) -> None:
    from filelock import FileLock

    here = exits.beside(tmp_path)
    here.places.folder.mkdir(parents=True)
    with (
        FileLock(here.places.folder / ".lock"),
        pytest.raises(OsdError, match="another `demur osd` is at work"),
    ):
        run(online(), here.places, threading.Event())


def test_a_store_of_another_ensemble_is_refused(exits: World, tmp_path: Path) -> None:
    other = make_world(tmp_path / "other", EXIT | {"own_layers": 2}, steps=1)
    here = exits.beside(tmp_path)
    DraftsStore(here.places.store).publish(other.places.ensemble, about={})
    with here.spool() as spool, pytest.raises(ManifestError, match="differs from the one"):
        here.trainer(spool)


def test_the_defaults_are_a_configuration() -> None:
    assert OnlineConfig().replayed == 1
    with pytest.raises(ValueError, match="leaves no text"):
        OnlineConfig(replay=0.9)
    with pytest.raises(ValueError, match="over held_out_texts"):
        OnlineConfig(least_held_out=50)


def test_the_corpus_and_the_traffic_share_their_hash() -> None:
    """Each shard has the same share held out, and and which, no client can tell."""
    keys = [conversation_key(prompt=str(number)) for number in range(4000)]
    for shard in range(4):
        own = [key for key in keys if shard_of(key, 4) == shard]
        share = sum(is_held_out(key, 8, "salt") for key in own) / len(own)
        assert 0.08 < share < 0.17
    other = [is_held_out(key, 8, "another") for key in keys]
    assert other != [is_held_out(key, 8, "salt") for key in keys]


def test_traffic_of_the_old_kind_is_not_refused_for_being_old(exits: World, tmp_path: Path) -> None:
    here = exits.beside(tmp_path)
    with here.spool() as spool:
        spool.append(answers(exits.target, OLD, 160, "more"))
        trainer = here.trainer(spool, learning_rate=1e-3)
        rounds(trainer, lambda: trainer.progress.refused or trainer.progress.published)
        assert trainer.progress.published == 1, trainer.progress.last_verdict
    assert open_spool(here.places.spool).stats().texts == 160


def test_a_choice_that_was_made_while_a_version_was_judged_stands(
    exits: World, tmp_path: Path, traffic: list[Text]
) -> None:
    here = exits.beside(tmp_path)
    with here.spool() as spool:
        spool.append(traffic[:80])
        trainer = here.trainer(spool)
        first = trainer.progress.base
        rounds(trainer, lambda: trainer.progress.published)
        second = trainer.progress.base
        review = trainer.reviewer.review

        def meanwhile(*arguments: Any, **named: Any) -> Any:
            found = review(*arguments, **named)
            trainer.store.make_current(first)
            return found

        trainer.reviewer.review = meanwhile  # type: ignore[method-assign]
        spool.append(traffic[80:])
        rounds(trainer, lambda: trainer.progress.base == first)
        assert trainer.store.current().name == first
        assert {version.name for version in trainer.store.versions()} == {first, second}

        trainer.reviewer.review = review  # type: ignore[method-assign]
        publish = trainer.store.publish

        def slowly(*arguments: Any, **named: Any) -> Any:
            version = publish(*arguments, **named)
            trainer.store.make_current(second)
            return version

        trainer.store.publish = slowly  # type: ignore[method-assign]
        spool.append(answers(exits.target, NEW, 160, "newer"))
        rounds(trainer, lambda: trainer.progress.base == second)
        assert trainer.store.current().name == second
        [third] = {version.name for version in trainer.store.versions()} - {first, second}
        assert "while it was published" in (trainer.store.withdrawn(third) or "")
        trainer.store.publish = publish  # type: ignore[method-assign]

        trainer.reviewer.review = lambda *a, **n: (  # type: ignore[method-assign]
            trainer.control.pause("meanwhile"),
            review(*a, **n),
        )[1]
        spool.append(answers(exits.target, NEW, 160, "even newer"))
        rounds(trainer, lambda: trainer.control.paused() is not None)
        assert {version.name for version in trainer.store.versions()} == {first, second, third}


def test_another_spool_is_read_from_its_start(
    exits: World, tmp_path: Path, traffic: list[Text]
) -> None:
    here = exits.beside(tmp_path)
    with here.spool() as spool:
        spool.append(traffic)
        trainer = here.trainer(spool, publish_every=10_000)
        rounds(trainer, lambda: trainer._next() == "waiting")
        step = trainer.progress.step
    for file in tmp_path.glob("spool.sqlite*"):
        file.unlink()
    with open_spool(here.places.spool) as spool:  # with a name of its own
        spool.append(answers(exits.target, NEW, 40, "newer"))
        again = here.trainer(spool, publish_every=10_000)
        assert again.progress.step == step
        rounds(again, lambda: again._next() == "waiting")
        assert again.progress.step > step


def test_a_checkpoint_of_another_ensemble_is_left_alone(
    exits: World, tmp_path: Path, traffic: list[Text]
) -> None:
    here = exits.beside(tmp_path)
    with here.spool() as spool:
        spool.append(traffic)
        trainer = here.trainer(spool, publish_every=10_000)
        rounds(trainer, lambda: trainer.progress.step >= 4)
        kept = sorted(here.places.folder.glob("checkpoint-*"))
        trainer.learner.fixed["ensemble"] = "another"
        with pytest.raises(OtherRunError, match="another ensemble"):
            trainer._go_on(trainer.store.current(), spool)
        assert sorted(here.places.folder.glob("checkpoint-*")) == kept


def test_who_deletes_the_spool_or_pauses_is_heard_while_it_rests(
    exits: World, tmp_path: Path, traffic: list[Text], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = exits.beside(tmp_path)
    monkeypatch.setattr("osd.online._LOOK_EVERY_S", 0.05)
    with here.spool() as spool:
        spool.append(traffic)
        trainer = here.trainer(spool, publish_every=10_000)
        trainer.round()
        trainer.pace.worked(1e6, within=0.0)  # rests for days
        stop = threading.Event()
        thread = threading.Thread(target=trainer.follow_traffic, args=(stop,), daemon=True)
        thread.start()
        assert sum(trainer.traffic.all_waiting()) > 0
        spool.clear()
        trainer.control.pause("by a test")
        deadline = time.monotonic() + 60
        while (
            sum(trainer.traffic.all_waiting())
            or not trainer._paused
            or (status := trainer.control.status()) is None
            or status.activity != "resting"
        ):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        stop.set()
        thread.join()
