"""What rivals say of answers: against their definitions, and a run that goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from scipy.special import digamma
from transformers import AutoModelForCausalLM

from drafts.text import TextEncoder
from osd.errors import OsdError
from osd.posterior import PosteriorConfig, WeightPosterior
from osd.rivals import measure, measure_run
from osd.teacher import Teacher
from tests.tiny import byte_level_tokenizer, save_lm, save_tokenizer

PROMPT = "What is the capital of Japan?"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> tuple[Teacher, TextEncoder]:
    folder = save_lm(tmp_path_factory.mktemp("rivals") / "target", seed=1)
    save_tokenizer(folder, byte_level_tokenizer())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    posterior = WeightPosterior(model, PosteriorConfig(rank=4, sigma=0.5))
    return Teacher(model, posterior), TextEncoder(folder)


def run_of(folder: Path, **answers: bool) -> Path:
    """A run with an answer for each name, which says whether it is right."""
    folder.mkdir()
    (folder / "run.json").write_text('{"model": "tiny"}')
    lines = [
        {"id": name, "prompt": PROMPT, "response": f"It is {name}.", "correct": right, "tokens": {}}
        for name, right in answers.items()
    ]
    lines.append({"id": "refused", "prompt": PROMPT, "correct": False, "error": "too long"})
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def lines_of(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "rivals.jsonl").read_text().splitlines()]


@torch.inference_mode()
def test_columns_are_what_their_definitions_say(target: tuple[Teacher, TextEncoder]) -> None:
    teacher, encoder = target
    prompt = encoder.render([{"role": "user", "content": PROMPT}])
    text = encoder.encode(prompt, "It is Tokyo.", rendered=True)
    found = measure(teacher, text, samples=10, seed=3)
    ids = torch.tensor([text.token_ids])
    logits = teacher.model(ids).logits[0, text.response_start - 1 : -1].double()
    n_vocab = logits.shape[1]
    for t, row in enumerate(logits):
        p = row.softmax(-1)
        certainty = float((torch.log(1 / (n_vocab * p)) / n_vocab).sum())
        assert found["self_certainty"][t] == pytest.approx(certainty, abs=1e-4)
        top = p.log().sort(descending=True).values[:20].mean()
        assert found["top_logprob_mean"][t] == pytest.approx(float(top), abs=1e-4)
        a = [max(float(x), 0.0) for x in row.sort(descending=True).values[:10]]
        aleatoric = -sum(x / sum(a) * (digamma(x + 1) - digamma(sum(a) + 1)) for x in a)
        assert found["logtoku_au"][t] == pytest.approx(aleatoric, abs=1e-3)
        assert found["logtoku_eu"][t] == pytest.approx(10 / (sum(a) + 10), abs=1e-4)
        for count in (2, 5, 10):
            parts = [found[f"tokur_{kind}_{count}"][t] for kind in ("tu", "au", "eu")]
            assert parts[0] == pytest.approx(parts[1] + parts[2], abs=1e-5)
            assert 0 <= parts[2] <= math.log(count) + 1e-6
    # More samples see more of the uncertainty, on the whole.
    assert sum(found["tokur_eu_2"]) < sum(found["tokur_eu_10"])


def test_without_tokur_there_is_one_pass_and_the_same_rest(
    target: tuple[Teacher, TextEncoder],
) -> None:
    teacher, encoder = target
    text = encoder.encode(PROMPT, " Tokyo", rendered=False)
    whole, single = (measure(teacher, text, samples, seed=3) for samples in (10, 1))
    assert set(whole) - set(single) == {
        f"tokur_{kind}_{count}" for kind in ("tu", "au", "eu") for count in (2, 5, 10)
    }
    for name, values in single.items():
        assert values == pytest.approx(whole[name], abs=1e-5)


def test_a_run_is_gone_on_with(target: tuple[Teacher, TextEncoder], tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", Tokyo=True, Kyoto=False, Osaka=False)
    assert measure_run(run, *target, model="tiny", with_tokur=None, seed=0) == 3
    whole = lines_of(run)
    assert [line["id"] for line in whole] == ["Tokyo", "Kyoto", "Osaka"]
    assert "".join(map(str, whole[0]["text"])) == "It is Tokyo."  # type: ignore[call-overload]
    file = run / "rivals.jsonl"
    # Cut off in the middle of the second line: it and the third are made again, and are the same.
    file.write_bytes(file.read_bytes()[: len(json.dumps(whole[0])) + 40])
    assert measure_run(run, *target, model="tiny", with_tokur=None, seed=0) == 2
    assert lines_of(run) == whole
    assert measure_run(run, *target, model="tiny", with_tokur=None, seed=0) == 0
    # A question that was asked again and answered otherwise.
    answers = run / "answers.jsonl"
    answers.write_text(answers.read_text().replace("It is Kyoto.", "It is Nara."))
    assert measure_run(run, *target, model="tiny", with_tokur=None, seed=0) == 1
    assert lines_of(run)[-1]["id"] == "Kyoto"


def test_tokur_of_some_takes_as_many_right_as_wrong(
    target: tuple[Teacher, TextEncoder], tmp_path: Path
) -> None:
    labels = {f"city{i}": i < 3 for i in range(12)}
    run = run_of(tmp_path / "run", **labels)
    assert measure_run(run, *target, model="tiny", with_tokur=4, seed=0) == 12
    chosen = [line["id"] for line in lines_of(run) if line["tokur"]]
    assert sorted(labels[str(name)] for name in chosen) == [False, False, True, True]
    few = run_of(tmp_path / "few", **labels)
    assert measure_run(few, *target, model="tiny", with_tokur=2, seed=0, limit=4) == 4
    assert sorted(labels[str(line["id"])] for line in lines_of(few)) == [False, False, True, True]
    # All of the rarer ones, where there are too few of them.
    assert measure_run(run, *target, model="tiny", with_tokur=8, seed=0) == 4
    chosen = [line["id"] for line in lines_of(run) if line["tokur"]]
    assert sum(labels[str(name)] for name in chosen) == 3
    assert len(chosen) == 8


def test_what_is_no_run_is_refused(target: tuple[Teacher, TextEncoder], tmp_path: Path) -> None:
    with pytest.raises(OsdError, match="holds no run"):
        measure_run(tmp_path, *target, model="tiny", with_tokur=None, seed=0)
    run = run_of(tmp_path / "run", Tokyo=True)
    with pytest.raises(OsdError, match="is of tiny, and this is small"):
        measure_run(run, *target, model="small", with_tokur=None, seed=0)
    (run / "run.json").unlink()
    with pytest.raises(OsdError, match="holds no run"):
        measure_run(run, *target, model="tiny", with_tokur=None, seed=0)
