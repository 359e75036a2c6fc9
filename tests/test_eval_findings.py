"""From made-up runs to what a report says of them."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from demur.evals._reading import headline
from demur.evals.analysis import Table, load_run, tasks, verdict
from demur.evals.detectors import STATISTICS, all_detectors
from demur.evals.findings import choose, find, localisation
from demur.evals.records import RunError
from demur.evals.report import write_report

N = 200


def line(i: int, **changes: Any) -> dict[str, Any]:
    """An answer whose `jsd` knows whether it is right, and whose other measures do not."""
    rng = np.random.default_rng(i)
    correct = bool(rng.random() < 0.5)
    words = ["It", " is", " Tokyo", "."]
    columns = {
        name: rng.gamma(2, 0.5, len(words)).round(5).tolist()
        for name in ("entropy", "total", "jsd", "kl")
    }
    doubt = 0.0 if correct else 1.0
    columns["jsd"] = [round(value + doubt, 5) for value in columns["jsd"]]
    return {
        "id": f"q{i}",
        "task": "facts/capital" if i % 4 else "facts/language",
        "group": f"g{i // 2}",
        "half": "dev" if i // 2 % 2 else "test",
        "prompt": "What is the capital of Japan?",
        "accepted": ["tokyo"],
        "response": "It is Tokyo.",
        "correct": correct,
        "flexible": correct,
        "extracted": "tokyo",
        "weights_version": "w",
        "tokens": {
            "text": words,
            "logprob": [-float(value) for value in rng.gamma(2, 0.5, len(words)).round(5)],
            **columns,
        },
    } | changes


def write_run(folder: Path, lines: list[dict[str, Any]], **settings: Any) -> Path:
    folder.mkdir(parents=True)
    about = {
        "set": "facts",
        "mode": "generate",
        "model": "tiny",
        "weights_version": "w",
        "drafts": 4,
        "asking": {"samples": 0},
        "sessions": [{"seconds": 2.0}, {"seconds": 3.0}],
    }
    (folder / "run.json").write_text(json.dumps(about | settings))
    (folder / "answers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = [line(i) for i in range(N)]
    refused = {k: v for k, v in line(N).items() if k != "tokens"} | {"error": "too long"}
    return write_run(tmp_path_factory.mktemp("runs") / "facts-generate", [*lines, refused])


def test_the_statistic_is_chosen_on_dev_and_every_detector_is_in_every_table(run: Path) -> None:
    found = find([load_run(run)], commands=["demur eval facts"], n_boot=20)
    assert found["chosen"]["statistic"].startswith("jsd ")
    titles = [table["title"] for table in found["tables"]]
    assert titles == [
        "facts, generate: all",
        "facts, generate: test half",
        "facts, generate: dev half",
        "facts/language",
        "facts/capital",
    ]
    measured = {one.name for one in all_detectors() if one.family in ("demur", "target")}
    for table in found["tables"]:
        names = {row["detector"] for row in table["rows"]}
        assert names == measured | {"length", "random"}
        rows = {row["detector"]: row for row in table["rows"]}
        assert rows["jsd mean"]["auroc"]["value"] > 0.8 > rows["kl mean"]["auroc"]["value"]
        assert rows["length"]["auroc"]["value"] == 0.5
    assert found["runs"][0]["questions"] == N + 1
    assert found["runs"][0]["refused"] == 1
    assert found["runs"][0]["seconds"] == 5.0
    by_rival = {one["rival"]: one["difference"]["low"] for one in found["paired"]}
    assert set(by_rival) == {"surprisal mean", "entropy mean", "length"}
    assert all(low > 0 for low in by_rival.values())


def test_the_dev_half_alone_decides(run: Path, tmp_path: Path) -> None:
    """What the test half says of the labels does not matter to the choice."""
    lines = [json.loads(one) for one in (run / "answers.jsonl").read_text().splitlines()]
    for one in lines:
        if one["half"] == "test":
            one["correct"] = not one["correct"]
    turned = load_run(write_run(tmp_path / "turned", lines))
    assert choose(turned.answers) == choose(load_run(run).answers)


def test_each_metric_has_one_table_of_differences_with_the_best_rivals(
    run: Path, tmp_path: Path
) -> None:
    lines = [line(i, p_true=0.5 + i / 1000) for i in range(N)]
    found = find([load_run(write_run(tmp_path / "run", lines))], commands=[], n_boot=20)
    titles = [one["title"] for one in found["paired"]]
    assert list(dict.fromkeys(titles)) == [title for title, _ in groupby(titles)]
    assert len(set(titles)) == 2
    rivals = [one["rival"] for one in found["paired"] if one["title"] == titles[0]]
    assert len(rivals) == len(set(rivals))
    assert "P(True)" in rivals
    assert not any(rival.startswith(("jsd", "total", "kl")) for rival in rivals)


@pytest.mark.parametrize("half", ["dev", "test"])
def test_a_half_alone_becomes_a_report(tmp_path: Path, half: str) -> None:
    folder = write_run(tmp_path / "run", [line(i, half=half) for i in range(60)])
    found = find([load_run(folder)], commands=[], n_boot=2)
    assert [table["half"] for table in found["tables"]][:2] == ["all", half]
    assert (found["chosen"] is None) == (half == "test")
    assert found["paired"] == []
    write_report(found, tmp_path / "out")


def test_refused_questions_alone_become_a_report(tmp_path: Path) -> None:
    refused = {k: v for k, v in line(0).items() if k != "tokens"} | {"error": "too long"}
    folder = write_run(tmp_path / "run", [refused])
    found = find([load_run(folder)], commands=[], n_boot=2)
    assert (found["tables"], found["chosen"], found["runs"][0]["refused"]) == ([], None, 1)
    write_report(found, tmp_path / "out")


def test_few_right_answers_choose_nothing_and_are_no_verdict(tmp_path: Path) -> None:
    """One right answer has an AUROC, and a narrow interval; it says nothing."""
    lines = [line(i, correct=i < 4, half="dev" if i % 2 else "test") for i in range(400)]
    for one in lines:
        one["tokens"]["jsd"] = [0.0 if one["correct"] else 1.0] * 4
    found = find([load_run(write_run(tmp_path / "run", lines))], commands=[], n_boot=20)
    assert found["chosen"] is None
    assert found["tables"][0]["rows"]
    assert headline(found).verdict == "There are too few right answers to judge the detectors by."


def test_the_costs_are_the_services(tmp_path: Path) -> None:
    lines = [line(i) for i in range(60)]
    paths = [
        write_run(tmp_path / f"run{cost}", lines, set=f"s{cost}", added_passes=cost)
        for cost in (0.9, 0.4)
    ]
    costs = []
    for runs in ([load_run(paths[0])], [load_run(path) for path in paths]):
        rows = find(runs, commands=[], n_boot=2)["tables"][0]["rows"]
        costs.append({row["detector"]: row["cost"] for row in rows})
    assert (costs[0]["jsd mean"], costs[0]["length"]) == (0.9, 0.0)
    assert costs[1]["jsd mean"] is None


def test_it_becomes_a_report(run: Path, tmp_path: Path) -> None:
    page = write_report(find([load_run(run)], commands=[], n_boot=20), tmp_path / "out")
    text = page.read_text()
    assert "jsd mean" in text
    assert "surprisal mean" in text


def test_examples_are_the_most_doubted_right_and_the_least_doubted_wrong(run: Path) -> None:
    loaded = load_run(run)
    found = find([loaded], commands=[], n_boot=2)["examples"]
    labels = {answer.record.id: answer.record.correct for answer in loaded.answers}
    assert [labels[one["id"]] for one in found["doubted_right"]] == [True] * 10
    assert [labels[one["id"]] for one in found["undoubted_wrong"]] == [False] * 10
    scores = [one["score"] for one in found["doubted_right"]]
    assert scores == sorted(scores, reverse=True)


def test_what_lies_beside_a_run_is_read_with_it(run: Path, tmp_path: Path) -> None:
    lines = [json.loads(one) for one in (run / "answers.jsonl").read_text().splitlines()]
    folder = write_run(tmp_path / "run", lines)
    answered = [one for one in lines if "error" not in one]
    rivals = [
        {"id": one["id"], "text": ["It is Tokyo."], "columns": {"tokur_eu_10": [float(i)]}}
        for i, one in enumerate(answered[:50])
    ]
    text = "".join(json.dumps(one) + "\n" for one in rivals)
    (folder / "rivals.jsonl").write_text(text + '{"id": "q50", "te')  # killed in mid-line
    scores = [
        {"id": one["id"], "hallucination_score": 0.25, "calibration": "c"} for one in answered
    ]
    (folder / "calibrated.jsonl").write_text("".join(json.dumps(one) + "\n" for one in scores))
    loaded = load_run(folder)
    assert [len(answer.rivals) for answer in loaded.answers] == [1] * 50 + [0] * (N - 50)
    table = Table("x", loaded.answers[:50], half="all", n_boot=2)
    assert table.doubts["tokur_eu_10 mean"].tolist() == [float(i) for i in range(50)]
    assert set(table.doubts["hallucination_score"]) == {0.25}
    whole = Table("x", loaded.answers, half="all", n_boot=2)
    assert "tokur_eu_10 mean" not in whole.doubts
    n = len(STATISTICS)
    assert whole.note == f"Left out: {n} of tokur, which {N - 50} of these answers lack."
    assert table.note == ""
    # Of one answer it says nothing; what the service had said of it does not stand in.
    (folder / "calibrated.jsonl").write_text("".join(json.dumps(one) + "\n" for one in scores[1:]))
    lines[0]["hallucination_score"] = 0.75
    (folder / "answers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    loaded = load_run(folder)
    assert loaded.calibration == "c"
    assert loaded.answers[0].record.hallucination_score is None
    # An answer that was given anew is not what the rivals measured.
    lines[1]["response"] = "It is Kyoto."
    (folder / "answers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    assert [len(answer.rivals) for answer in load_run(folder).answers[:3]] == [1, 0, 1]
    (folder / "calibrated.jsonl").write_text("{}\n")
    with pytest.raises(RunError, match="delete it and make it again"):
        load_run(folder)


def test_several_answers_to_a_question_are_compared_within_it(tmp_path: Path) -> None:
    """`jsd` tells the questions apart, and nothing of the answers to one."""
    lines = []
    for i in range(40):
        for j, correct in enumerate([True, False, i % 2 == 0]):
            one = line(3 * i + j, group=f"g{i}", source=f"m{j}", correct=correct, half="test")
            one["tokens"]["jsd"] = [0.1 + (i % 2)] * 4
            lines.append(one)
    table = Table("x", load_run(write_run(tmp_path / "r", lines)).answers, half="all", n_boot=2)
    assert table.metric("auroc", "jsd mean").value > 0.6
    assert table.metric("auroc_within", "jsd mean").value == 0.5


@pytest.mark.parametrize(
    ("right", "wrong", "says"),
    [
        (5, 95, "too hard"),
        (95, 5, "too easy"),
        (10, 30, "too few"),
        (50, 50, "can be judged"),
    ],
)
def test_verdicts(right: int, wrong: int, says: str) -> None:
    assert verdict([True] * right + [False] * wrong) == says


def test_accuracy_comes_with_its_interval(run: Path) -> None:
    found = {task["task"]: task for task in tasks([load_run(run)])}
    for task in found.values():
        accuracy = task["accuracy"]
        assert accuracy["low"] < accuracy["value"] < accuracy["high"]
        assert accuracy["value"] == pytest.approx(1 - task["wrong"] / task["n"], abs=1e-4)
    assert found["facts/language"]["n"] == N // 4


def test_doubt_that_peaks_on_the_first_wrong_number_is_seen(tmp_path: Path) -> None:
    """Three results, the second wrong: `jsd` is greatest there, and `kl` at the first."""
    annotated = "2 + 3 = <<2+3=5>>5\n5 + 4 = <<5+4=10>>10\n10 + 1 = <<10+1=11>>11"
    text = ["2 + 3 = ", "5", "\n5 + 4 = ", "10", "\n10 + 1 = ", "11"]
    lines = []
    for i in range(20):
        one = line(i, correct=False, annotated=annotated, gold="2 + 3 = 5\n5 + 4 = 9\n9 + 1 = 10")
        one["tokens"] = {name: [0.0] * 6 for name in ("logprob", "entropy", "total")}
        one["tokens"] |= {"text": text, "jsd": [0, 0, 0, 1.0, 0, 0], "kl": [0, 1.0, 0, 0, 0, 0]}
        lines.append(one | {"response": "".join(text)})
    (found,) = localisation([load_run(write_run(tmp_path / "r", lines))], n_boot=20)
    rows = {row["measure"]: row for row in found["rows"]}
    assert found["n"] == 20
    assert rows["jsd"]["hit"]["value"] == 1.0
    assert rows["jsd"]["auroc"]["value"] == 1.0
    assert rows["kl"]["hit"]["value"] == 0.0
    assert rows["entropy"]["auroc"]["value"] == 0.5
    assert rows["jsd"]["chance"] == pytest.approx(1 / 3)
