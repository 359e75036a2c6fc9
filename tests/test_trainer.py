"""The trainer on a tiny target: it learns, goes on exactly after a kill, and refuses bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from drafts.errors import ManifestError
from drafts.manifest import load_ensemble
from drafts.reference import Reference
from osd.build import shards, split
from osd.config import DistillConfig, ExitDrafts, ModelDrafts, ResidualDrafts, read_config
from osd.corpus import Corpus, Text, weights_digest
from osd.errors import CheckpointError, ConfigError, CorpusError, OsdError
from osd.log import read_measured
from osd.posterior import PosteriorConfig
from osd.schedule import batch_at, learning_rate
from osd.teacher import collate
from osd.trainer import Run, train
from tests.tiny import save_lm

RESIDUAL = {
    "kind": "residual",
    "students": 2,
    "draws": 2,
    "taps": [2],
    "rank": 24,
    "factors": 4,
    "width": 48,
    "basis_rows": 256,
}
EXIT = {"kind": "exit", "students": 2, "layer": 2, "own_layers": 1}
# What benchmarks/drafts/residual.yaml asks for, and accumulation.
AS_SHIPPED = {
    "drafts": RESIDUAL | {"teacher_draws": 2, "match": 1.0},
    "draws_per_text": 2,
    "loss_tokens": 24,
    "accumulate": 2,
    "dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lm(tmp_path_factory.mktemp("distil") / "target", seed=1)


@pytest.fixture(scope="module")
def corpus(target: Path) -> Path:
    """The target's own samples after random prompts, two to each."""
    model = AutoModelForCausalLM.from_pretrained(target)
    torch.manual_seed(0)
    folder = target.parent / "corpus"
    corpus = Corpus(folder, {"target": "tiny"})
    for part in range(3):
        texts = []
        for key in range(part * 24, part * 24 + 24):
            prompt = torch.randint(0, 320, (1, 4 + key % 5))
            prompt = prompt.expand(2, -1)
            ids = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=True, max_new_tokens=16,
                pad_token_id=0,
            )  # fmt: skip
            texts += [
                Text(key=key, response_start=prompt.shape[1], token_ids=row.tolist()) for row in ids
            ]
        corpus.add(part, texts)
    return folder


def configured(target: Path, corpus: Path, run: Path, **changes: Any) -> DistillConfig:
    values: dict[str, Any] = {
        "target": str(target),
        "corpus": corpus,
        "run": run,
        "drafts": RESIDUAL,
        "steps": 12,
        "texts": 4,
        "warmup": 2,
        "learning_rate": 5e-3,
        "dtype": "float32",
        "held_out": 6,
        "held_out_draws": 6,
        "evaluate_every": 1000,
        "checkpoint_every": 1000,
    }
    return DistillConfig.model_validate(values | changes)


def weights(ensemble: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.parent.name}/{name}": tensor
        for file in sorted(ensemble.glob("student_*/model.safetensors"))
        for name, tensor in load_file(file).items()
    }


def test_residual_students_learn_how_far_the_posterior_moves(
    target: Path, corpus: Path, tmp_path: Path
) -> None:
    config = configured(
        target, corpus, tmp_path / "run", steps=60, evaluate_every=30, checkpoint_every=30
    )
    result = train(config)

    def miss(agreement: Any) -> float:
        return abs(float(agreement.epistemic) - float(agreement.reference))

    assert result.before is not None
    assert miss(result.after) < 0.5 * miss(result.before)
    ensemble = load_ensemble(result.ensemble)
    assert [member.draft.name for member in ensemble.members] == [
        f"draft_{letter}" for letter in "abcd"
    ]
    scores = Reference(ensemble).score([3, 5, 7, 9, 11], 2)
    assert scores.epistemic.min() > 0
    log = (tmp_path / "run/log.csv").read_text().splitlines()
    assert sum(line.split(",")[1] != "" for line in log[1:]) == 60
    assert (tmp_path / "run/log.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "changes, left", [({}, 0.9), ({"lora_rank": 4}, 0.98)], ids=["full", "lora"]
)
def test_exit_drafts_come_nearer_to_the_posterior_mean(
    target: Path, corpus: Path, tmp_path: Path, changes: dict[str, Any], left: float
) -> None:
    config = configured(target, corpus, tmp_path / "run", drafts=EXIT | changes, steps=40)
    result = train(config)
    assert result.after.kl_drafts < left * result.before.kl_drafts
    start = load_file(tmp_path / "run/start-1/model.safetensors")
    for folder in ("student_a", "student_b"):
        trained = load_file(result.ensemble / folder / "model.safetensors")
        assert trained.keys() == start.keys()
        assert any(not torch.equal(trained[name], start[name]) for name in trained)
    scores = Reference(load_ensemble(result.ensemble)).score([3, 5, 7, 9, 11], 2)
    assert scores.jsd.min() > 0
    made = json.loads((result.ensemble / "training.json").read_text())
    assert made["config"]["drafts"]["layer"] == 2
    assert made["corpus"] == {"target": "tiny"}
    assert made["held out"]["40"]["kl_drafts"] == pytest.approx(result.after.kl_drafts, rel=1e-4)
    assert str(tmp_path / "run") not in json.dumps(made)


def test_plain_distillation_comes_nearer_to_the_target(
    target: Path, corpus: Path, tmp_path: Path
) -> None:
    """KD: the target as it is teaches, on all texts; what layers left out did is learned."""
    drafts = EXIT | {"layer": 1}
    config = configured(
        target, corpus, tmp_path / "run", drafts=drafts, steps=40, teacher="clean", diverse=False
    )
    result = train(config)
    assert result.after.epistemic < 0.9 * result.before.epistemic


def test_the_arms_differ_in_texts_and_in_teachers(
    target: Path, corpus: Path, tmp_path: Path
) -> None:
    def run(name: str, **changes: Any) -> Run:
        return Run(configured(target, corpus, tmp_path / name, drafts=EXIT, **changes))

    diverse, same = run("diverse"), run("same", diverse=False, teacher="clean")
    first, second = diverse.texts
    assert min(len(first), len(second)) > 0
    assert not {text.key for text in first} & {text.key for text in second}
    assert same.texts[0] == same.texts[1]
    assert sorted(text.key for text in [*first, *second]) == sorted(t.key for t in same.texts[0])
    for trained, moved in ((diverse, True), (same, False)):
        texts = trained.texts[0][:2]
        lesson = trained._lesson(0, 0, texts, collate(texts, 512))
        assert bool((lesson.teacher_MTd[0] - lesson.clean.h_Td).abs().max() > 1e-3) is moved


def test_model_drafts_come_nearer_to_the_posterior_mean(
    target: Path, corpus: Path, tmp_path: Path
) -> None:
    small = save_lm(
        tmp_path / "small", 7, hidden_size=32, num_attention_heads=1, num_key_value_heads=1,
        num_hidden_layers=1,
    )  # fmt: skip
    drafts = {"kind": "model", "students": 2, "source": str(small)}
    result = train(configured(target, corpus, tmp_path / "run", drafts=drafts, steps=40))
    assert result.after.kl_drafts < 0.9 * result.before.kl_drafts
    assert len(load_ensemble(result.ensemble).members) == 2


@pytest.mark.parametrize(
    "changes",
    [{"drafts": RESIDUAL}, {"drafts": EXIT | {"lora_rank": 2}}, AS_SHIPPED],
    ids=["residual", "exit", "as shipped"],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    target: Path, corpus: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    whole = train(configured(target, corpus, tmp_path / "whole/run", **changes))
    killed = configured(target, corpus, tmp_path / "killed/run", checkpoint_every=2, **changes)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(json.loads(killed.model_dump_json())))
    code = (
        "import sys; from pathlib import Path; from osd.config import read_config; "
        "from osd.trainer import train; train(read_config(Path(sys.argv[1])))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(file)], env=os.environ | {"TQDM_DISABLE": "1"}
    ) as process:
        deadline = time.monotonic() + 120
        while not list(killed.run.glob("checkpoint-?????????")) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert not (killed.run / "ensemble").exists(), "it ended before it was killed"
    # What a kill in the middle of a checkpoint leaves is no checkpoint.
    (killed.run / "checkpoint-000000099.partial").mkdir(exist_ok=True)
    resumed = train(killed)
    got, expected = weights(resumed.ensemble), weights(whole.ensemble)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
    assert resumed.after == whole.after
    steps = [line.split(",")[0] for line in (killed.run / "log.csv").read_text().splitlines()[1:]]
    assert [int(step) for step in steps] == sorted(int(step) for step in steps)


def test_two_processes_make_what_one_makes(target: Path, corpus: Path, tmp_path: Path) -> None:
    """As on a machine with several GPUs; here both processes compute on the CPU."""
    drafts = RESIDUAL | {"students": 3}
    changes: dict[str, Any] = {"drafts": drafts, "draws_per_text": 2, "evaluate_every": 5}
    one = train(configured(target, corpus, tmp_path / "one/run", **changes))
    two = configured(target, corpus, tmp_path / "two/run", checkpoint_every=4, **changes)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(json.loads(two.model_dump_json())))
    demur = Path(sys.executable).with_name("demur")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2"]
    command += ["--num_machines=1", "--num_cpu_threads_per_process=1", "--mixed_precision=no"]
    command += ["--dynamo_backend=no", str(demur), "distill", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("serve it:") == 1
    got, expected = weights(two.run / "ensemble"), weights(one.ensemble)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, atol=1e-5, rtol=1e-4)
    assert len(list(two.run.glob("checkpoint-?????????"))) == 2
    logs = [read_measured(config_run) for config_run in (tmp_path / "one/run", two.run)]
    assert [step for step, _ in logs[0]] == [step for step, _ in logs[1]] == [0, 5, 10, 12]
    for (_, ours), (_, theirs) in zip(*logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_a_checkpoint_that_cannot_be_used_is_refused_by_name(
    target: Path, corpus: Path, tmp_path: Path
) -> None:
    config = configured(target, corpus, tmp_path / "run", steps=2, checkpoint_every=1)
    train(config)
    with pytest.raises(CheckpointError, match="another learning_rate"):
        train(config.model_copy(update={"learning_rate": 1e-4}))
    file = tmp_path / "run/checkpoint-000000002/student-1.safetensors"
    whole = file.read_bytes()
    tensors = load_file(file)
    tensors["head.up.weight"][0, 0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(
        CheckpointError, match=r"student-1\.safetensors: head\.up\.weight holds NaN"
    ):
        train(config)
    file.write_bytes(whole[:-20])
    with pytest.raises(CheckpointError, match=r"student-1\.safetensors cannot be read"):
        train(config)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda file: file.write_bytes(file.read_bytes()[:-30]),
            "part-00001.jsonl is not what was",
        ),
        (lambda file: file.unlink(), "part-00001.jsonl is missing"),
    ],
)
def test_a_truncated_part_of_the_corpus_is_refused_by_name(
    target: Path, corpus: Path, tmp_path: Path, spoil: Any, message: str
) -> None:
    copy = tmp_path / "corpus"
    copy.mkdir()
    for file in corpus.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    spoil(copy / "part-00001.jsonl")
    with pytest.raises(CorpusError, match=message):
        train(configured(target, copy, tmp_path / "run"))


def test_a_poisoned_part_is_refused_by_name_and_line(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path / "corpus", {"target": "tiny"})
    corpus.add(0, [Text(key=1, response_start=1, token_ids=[1, 2, 400])])
    with pytest.raises(CorpusError, match=r"part-00000\.jsonl:1: token 400 is beyond the vocab"):
        corpus.read(320)
    with pytest.raises(CorpusError, match="made with another target"):
        Corpus(tmp_path / "corpus", {"target": "other"})
    with pytest.raises(CorpusError, match="holds no corpus"):
        Corpus(tmp_path / "nothing")


def test_a_loss_that_is_no_number_stops_the_run(target: Path, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(OsdError, match="the loss or its gradient is not"):
        train(configured(target, corpus, tmp_path / "run", learning_rate=1e30, steps=20))


def test_unknown_and_wrong_fields_are_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("target: t\ncorpus: c\nrun: r\nsteps: 0\nlr: 1\ndrafts: {kind: residual}\n")
    with pytest.raises(ConfigError, match=r"steps: .*greater than 0.*lr: unknown field"):
        read_config(file)
    file.write_text(
        "target: t\ncorpus: c\nrun: r\nsteps: 1\nteacher: clean\ndrafts: {kind: residual}\n"
    )
    with pytest.raises(ConfigError, match="a clean teacher makes none"):
        read_config(file)
    file.write_text(
        "target: t\ncorpus: c\nrun: r\nsteps: 1\ndraws_per_text: 1\n"
        "drafts: {kind: residual, teacher_draws: 2, match: 1.0}\n"
    )
    with pytest.raises(ConfigError, match="draws_per_text: a step shows 2"):
        read_config(file)
    file.write_text("- a list\n")
    with pytest.raises(ConfigError, match="holds no fields"):
        read_config(file)


def test_the_documented_configuration_is_one(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs/distillation.md").read_text()
    text = page.split("```yaml")[1].split("```")[0]
    file = tmp_path / "distill.yaml"
    file.write_text(text)
    read_config(file)
    described = {DistillConfig, ResidualDrafts, ExitDrafts, ModelDrafts, PosteriorConfig}
    fields = {name for model in described for name in model.model_fields}
    assert not {name for name in fields if not re.search(rf"\b{name}\b", text)}


@pytest.mark.parametrize(
    "drafts, message",
    [
        (RESIDUAL | {"taps": [4]}, r"drafts\.taps: the target has 4 layers, and 4 is not inside"),
        (RESIDUAL | {"rank": 65}, r"drafts\.rank: the target's hidden state has 64 numbers"),
        (EXIT | {"layer": 40}, r"drafts\.layer: the target has 4 layers, and 40 is not inside"),
        (EXIT | {"own_layers": 5}, r"drafts\.own_layers: the target has 4 layers"),
    ],
)
def test_drafts_that_the_target_has_no_room_for_are_refused_before_training(
    target: Path, corpus: Path, tmp_path: Path, drafts: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(configured(target, corpus, tmp_path / "run", drafts=drafts))


def test_a_target_or_posterior_that_does_not_do_is_refused_before_training(
    target: Path, corpus: Path, tmp_path: Path
) -> None:
    posterior = {"modules": ["x_proj"]}
    with pytest.raises(ConfigError, match="posterior: the model has no linear layers named x_proj"):
        train(configured(target, corpus, tmp_path / "run", posterior=posterior))
    other = shutil.copytree(target, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(ManifestError, match=r"drafts\.kind: 'residual', which reads the target's"):
        train(configured(other, corpus, tmp_path / "run"))
    drafts = {"kind": "model", "source": str(save_lm(tmp_path / "small", 7, vocab_size=300))}
    with pytest.raises(ManifestError, match="its vocab_size is 300, the target's is 320"):
        train(configured(target, corpus, tmp_path / "run", drafts=drafts))


def test_weights_that_are_no_numbers_are_refused_before_training(
    target: Path, corpus: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(target, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"other: model\.norm\.weight holds NaN"):
        train(configured(other, corpus, tmp_path / "run"))


def test_another_targets_answers_are_refused(target: Path, corpus: Path, tmp_path: Path) -> None:
    own = Corpus(tmp_path / "own", {"target_sha256": weights_digest(target)})
    own.add(0, Corpus(corpus).read(320))
    train(configured(target, own.folder, tmp_path / "run", steps=1))
    other = save_lm(tmp_path / "other", seed=9)
    with pytest.raises(CorpusError, match="holds answers of weights with SHA-256"):
        train(configured(other, own.folder, tmp_path / "another"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(target: Path, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"device: cuda, but torch .* sees 0 CUDA devices"):
        train(configured(target, corpus, tmp_path / "run", device="cuda"))
    with pytest.raises(ValidationError, match="device"):
        configured(target, corpus, tmp_path / "run", device="banana")


def test_a_log_that_is_none_is_refused_and_a_lost_one_begun_again(
    target: Path, corpus: Path, tmp_path: Path
) -> None:
    config = configured(target, corpus, tmp_path / "run", steps=2)
    train(config)
    log = config.run / "log.csv"
    kept = log.read_text()
    log.write_bytes(b"\x89PNG\r\n no log\n1,2\n")
    with pytest.raises(OsdError, match=r"log\.csv is no log of a run .*; remove it"):
        train(config)
    log.write_text(kept.replace("0,,,,", "0,,,,x", 1))
    with pytest.raises(OsdError, match="is no log of a run"):
        train(config)
    log.unlink()
    assert train(config).before is None
    assert [step for step, _ in read_measured(config.run)] == [2]


def test_one_folder_is_trained_in_by_one(target: Path, corpus: Path, tmp_path: Path) -> None:
    config = configured(target, corpus, tmp_path / "run", steps=2)
    config.run.mkdir()
    with FileLock(config.run / ".lock"), pytest.raises(OsdError, match="another `demur distill`"):
        train(config)
    train(config)


def test_a_run_does_not_go_on_with_another_corpus(
    target: Path, corpus: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(corpus, tmp_path / "corpus")
    config = configured(target, own, tmp_path / "run", steps=2)
    train(config)
    Corpus(own).add(7, [Text(key=9999, response_start=2, token_ids=[3, 4, 5, 6])])
    with pytest.raises(CheckpointError, match="of a run with another target or corpus"):
        train(config)


def texts_of(count: int) -> list[Text]:
    return [Text(key=n, response_start=1, token_ids=[1] * (2 + n % 9)) for n in range(count)]


def test_students_learn_from_disjoint_shards_and_never_from_held_out_texts() -> None:
    held_out, training = split(texts_of(200), 20)
    parts = shards(training, 4)
    keys = [{text.key for text in part} for part in (held_out, *parts)]
    assert [len(keys[0]), sum(map(len, keys))] == [20, 200]
    assert len(set().union(*keys)) == 200


def test_an_epoch_visits_each_text_once() -> None:
    texts = texts_of(50)
    for epoch in range(2):
        seen = [text.key for n in range(10) for text in batch_at(texts, epoch * 10 + n, 5, seed=3)]
        assert sorted(seen) == list(range(50))
    assert batch_at(texts, 0, 5, seed=3) != batch_at(texts, 10, 5, seed=3)


def test_the_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    rates = [learning_rate(step, 100, 1.0, 10) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (n + 1) for n in range(10)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
