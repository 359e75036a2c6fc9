"""What estimators are measured against: the default target, its posterior, EU* of some texts."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from eu_estimators import MAX_TOKENS
from transformers import AutoModelForCausalLM

from drafts.init import default_folder
from osd.corpus import Corpus, Text
from osd.posterior import PosteriorConfig, WeightPosterior
from osd.schedule import derived_seed
from osd.states import fingerprint
from osd.teacher import Teacher
from osd.true_eu import TrueEU, true_eu


def load() -> tuple[Teacher, Path]:
    """The default target with its posterior, and the folder where texts and EU* are kept."""
    root = default_folder().parent
    model = AutoModelForCausalLM.from_pretrained(default_folder() / "target", dtype=torch.bfloat16)
    return Teacher(model, WeightPosterior(model, PosteriorConfig(), cache=root / "true_eu")), root


def reference_of(
    teacher: Teacher, root: Path, name: str, draws: int, limit: int, seed: int
) -> tuple[list[TrueEU], list[Text], str]:
    """EU* of the first texts of a corpus, the texts, and a label that is of nothing else."""
    texts = Corpus(root / name).read(teacher.model.config.vocab_size)[:limit]
    of = fingerprint(teacher, texts, MAX_TOKENS, seed)
    label = f"{name}-{len(texts)}-M{draws}-{of}"
    reference = true_eu(
        teacher,
        texts,
        draws=draws,
        max_tokens=MAX_TOKENS,
        seed=derived_seed(seed, "reference"),
        cache=root / "true_eu" / label,
    )
    return reference, texts, label


def described(reference: list[TrueEU], draws: int) -> dict[str, Any]:
    """The reference, and how noisy it is."""
    whole = np.concatenate([eu.whole for eu in reference])
    halves = np.concatenate([eu.first - eu.second for eu in reference])
    return {
        "draws": draws,
        "texts": len(reference),
        "tokens": len(whole),
        "mean": float(whole.mean()),
        "standard_deviation": float(whole.std()),
        # Each half has twice the variance of the whole, their difference four times.
        "noise_rms": float(np.sqrt(np.mean(halves**2)) / 2),
        "kl_posterior_mean_target": float(np.concatenate([eu.shift for eu in reference]).mean()),
    }


def machine() -> dict[str, Any]:
    """What a result was made on."""
    return {
        "machine": {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version()},
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "numpy")},
    }
