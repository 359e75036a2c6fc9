"""The gate: what a version of the drafts must keep to before it goes live.

It is measured as it would serve, on traffic that was kept from all drafts and on a reference set
that never changes, beside the version that serves now and beside the first one. Traffic cannot move
the reference set: who floods the service with degenerate text moves the first measure only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from osd.evaluate import Agreement
from osd.online_config import GateConfig
from osd.students import Trainee

_NOISE = 5e-4  # nats


class Measured(NamedTuple):
    """A version on the two sets."""

    reference: Agreement
    traffic: Agreement


def judge(candidate: Measured, serving: Measured, first: Measured, config: GateConfig) -> list[str]:
    """Why a version must not go live; nothing if it may.

    Args:
        serving: the version that serves now, on the same texts and draws.
        first: the one that the service began with, on the same texts and draws.
    """
    reasons = []

    def bound(what: str, value: float, base: float, margin: float, of: str) -> None:
        most = _most(base, margin)
        if not value <= most:  # so that NaN is over every bound
            reasons.append(f"{what} is {value:.4g} nats, over {most:.4g}: {of}, and {margin:.1%}")

    def floor(what: str, value: float, least: float, of: str) -> None:
        if not value >= least:
            reasons.append(f"{what} is {value:.4g} nats, under {least:.4g}: {of}")

    kl, margin = "KL to the posterior mean", config.reference_margin
    bound(
        f"{kl} on held-out traffic",
        candidate.traffic.kl_mixture,
        serving.traffic.kl_mixture,
        config.kl_margin,
        "what serves",
    )
    bound(
        f"{kl} on held-out traffic",
        candidate.traffic.kl_mixture,
        first.traffic.kl_mixture,
        margin,
        "the first version's",  # or small losses would add up
    )
    for what, field in ((kl, "kl_mixture"), ("RMSE against EU*", "rmse")):
        start = float(getattr(first.reference, field))
        bound(
            f"{what} on the reference set",
            float(getattr(candidate.reference, field)),
            start,
            margin,
            "the first version's",
        )
    for where, new, old in (
        ("the reference set", candidate.reference, first.reference),
        ("held-out traffic", candidate.traffic, first.traffic),
    ):
        # Disagreement beyond what the posterior has is error, and may go.
        least = config.jsd_floor * min(old.jsd, old.reference)
        floor(
            f"JSD of the drafts on {where}",
            new.jsd,
            least,
            f"{config.jsd_floor:.0%} of the first version's, or of EU* if that is less",
        )
    return reasons


def check_norms(
    candidate: Sequence[Trainee], first: Sequence[Trainee], config: GateConfig
) -> list[str]:
    """Which weights' norms ran away; all are finite, or they could not have been read."""
    reasons = []
    for number, (new, old) in enumerate(zip(candidate, first, strict=True)):
        before = dict(old.module.named_parameters())
        for name, tensor in new.module.named_parameters():
            now, then = _norm(tensor), _norm(before[name])
            if not then / config.norm_factor <= now <= then * config.norm_factor and then > 0:
                reasons.append(
                    f"student {number}: the norm of {name} is {now:.3g}, and was {then:.3g}"
                )
    return reasons


def watch(serving: Agreement, parent: Agreement, config: GateConfig) -> str | None:
    """Why a version that serves should be taken back; both on traffic that came after it."""
    most = _most(parent.kl_mixture, config.watch_margin)
    if serving.kl_mixture <= most:
        return None
    return (
        f"KL to the posterior mean on traffic since it serves is {serving.kl_mixture:.4g} nats, "
        f"over {most:.4g}: its parent's there, and {config.watch_margin:.1%}"
    )


def _most(base: float, margin: float) -> float:
    """A share over a base; where that is next to nothing, noise must not decide."""
    return base + margin * max(base, 0.0) + _NOISE


def _norm(tensor: Tensor) -> float:
    return float(tensor.detach().float().norm())
