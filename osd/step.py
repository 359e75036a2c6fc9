"""One optimiser step of one student: what the offline and the online trainer share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from osd.corpus import Text
from osd.errors import OsdError
from osd.states import States
from osd.students import Lesson, Trainee
from osd.teacher import Batch


class Diverged(OsdError):
    """The loss or its gradient is not finite; no weight was changed."""


def new_optimiser(module: nn.Module, rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over what a student trains."""
    return torch.optim.AdamW(
        _trained(module), lr=rate, weight_decay=weight_decay, betas=(0.9, 0.95)
    )


def posterior_lesson(
    states: States,
    texts: list[Text],
    batch: Batch,
    *,
    visit: int,
    seeds: Sequence[int],
    rows_seed: int,
    loss_tokens: int | None,
    with_eu: bool,
) -> Lesson:
    """Texts as draws of the posterior see them; without seeds, as the target itself does.

    Args:
        visit: how many draws these texts were shown before.
        seeds: of the draws, one each.
        rows_seed: of the choice of rows.
        loss_tokens: on so many rows divergences over the vocabulary are taken; None: on all.
        with_eu: add EU* of the rows, where the states keep it.
    """
    clean = states.clean(texts, batch)
    teachers = clean.h_Td.unsqueeze(0)
    if seeds:
        draws = [states.draw(texts, batch, visit + n, seed) for n, seed in enumerate(seeds)]
        teachers = torch.stack(draws)
    generator = torch.Generator().manual_seed(rows_seed)
    chosen = torch.randperm(len(clean.h_Td), generator=generator)[:loss_tokens]
    eu_T = states.eu(texts, batch) if with_eu else None
    return Lesson(batch, clean, teachers, chosen.to(clean.h_Td.device), eu_T)


def take_step(
    student: Trainee,
    optimiser: torch.optim.Optimizer,
    lessons: Iterable[Lesson],
    *,
    count: int,
    rate: float,
    clip_norm: float,
) -> tuple[float, int]:
    """One step on the mean over lessons.

    Args:
        count: how many lessons come; each is made when it is needed.

    Returns:
        The loss, and how many tokens the student saw.

    Raises:
        Diverged: if the loss or its gradient is not finite.
    """
    total, n_tokens = 0.0, 0
    for lesson in lessons:
        try:
            loss = student.loss(lesson) / count
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise Diverged("the loss is not finite") from error
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
        n_tokens += int(lesson.batch.mask_BL.sum())
    norm = torch.nn.utils.clip_grad_norm_(_trained(student.module), clip_norm)
    if not bool(torch.isfinite(norm)):
        optimiser.zero_grad()
        raise Diverged("the gradient is not finite")
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.step()
    optimiser.zero_grad()
    return total, n_tokens


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
