"""A tiny target, drafts distilled on one kind of text, and traffic of another, for tests of OSD."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from osd.config import DistillConfig
from osd.corpus import Corpus, Text
from osd.online import OnlineTrainer, Places
from osd.online_config import OnlineConfig
from osd.shards import conversation_key
from osd.spool import Spool, open_spool
from osd.spool_sqlite import SqliteSpool
from osd.trainer import train
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
    "teacher_draws": 2,
    "match": 1.0,
}
EXIT = {"kind": "exit", "students": 2, "layer": 2, "own_layers": 1}
OLD, NEW = range(160), range(160, 320)  # tokens of prompts


@dataclass(frozen=True)
class World:
    """What a trainer is given; `kind` is of its drafts."""

    places: Places
    target: Path
    kind: str

    def trainer(self, spool: Spool, **changes: Any) -> OnlineTrainer:
        return OnlineTrainer(online(**changes), self.places, spool)

    def spool(self) -> Spool:
        spool = open_spool(self.places.spool)
        assert isinstance(spool, SqliteSpool)
        # What is held out hangs on it: the same texts in every run of a test.
        spool._db.execute("UPDATE facts SET value = 'a test' WHERE name = 'identity'")
        return spool

    def beside(self, folder: Path) -> World:
        """The same ensemble, with a store, a spool and a trainer's folder of its own."""
        places = replace(
            self.places,
            store=str(folder / "store"),
            spool=str(folder / "spool.sqlite"),
            folder=folder / "trainer",
            load=folder / "load",
        )
        return replace(self, places=places)


def online(**changes: Any) -> OnlineConfig:
    """A configuration in which things happen after few steps."""
    values: dict[str, Any] = {
        "share": 1.0,
        "dtype": "float32",
        "texts": 4,
        "replay": 0.25,
        "teacher_draws": 2,
        "learning_rate": 5e-3,
        "warmup": 0,
        "publish_every": 16,
        "checkpoint_every": 4,
        "held_out_one_in": 4,
        "held_out_texts": 12,
        "least_held_out": 6,
        "held_out_draws": 6,
        "reference_texts": 8,
        "reference_draws": 6,
        "keep_versions": 4,
        "gate": {"reference_margin": 0.5, "jsd_floor": 0.0, "norm_factor": 10.0},
    }
    return OnlineConfig.model_validate(values | changes)


def make_world(folder: Path, drafts: dict[str, Any], steps: int = 60) -> World:
    """Distil `drafts` on texts whose prompts are of `OLD` tokens."""
    target = save_lm(folder / "target", seed=1)
    corpus = Corpus(folder / "corpus", {"target": "tiny"})
    corpus.add(0, answers(target, OLD, 64, "old"))
    config = DistillConfig.model_validate(
        {
            "target": str(target),
            "corpus": folder / "corpus",
            "run": folder / "run",
            "drafts": drafts,
            "steps": steps,
            "texts": 4,
            "warmup": 2,
            "learning_rate": 5e-3,
            "dtype": "float32",
            "held_out": 6,
            "held_out_draws": 4,
            "evaluate_every": 1000,
            "checkpoint_every": 1000,
        }
    )
    ensemble = train(config).ensemble
    places = Places(
        ensemble=ensemble,
        store=str(folder / "store"),
        spool=str(folder / "spool.sqlite"),
        folder=folder / "trainer",
        corpus=folder / "corpus",
        load=folder / "load",
    )
    return World(places, target, str(drafts["kind"]))


def answers(target: Path, tokens: Sequence[int], count: int, name: str) -> list[Text]:
    """The target's own samples after random prompts of some tokens."""
    model = AutoModelForCausalLM.from_pretrained(target)
    torch.manual_seed(len(name))
    prompts = torch.tensor(list(tokens))[torch.randint(0, len(tokens), (count, 6))]
    ids = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        max_new_tokens=14,
        pad_token_id=0,
    )
    return [
        Text(
            key=conversation_key(prompt=f"{name} {number}"),
            response_start=prompts.shape[1],
            token_ids=row.tolist(),
        )
        for number, row in enumerate(ids)
    ]
