"""Students that go on from the drafts of an ensemble."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from drafts.manifest import Ensemble, ExitDraft, Member, ResidualDraft
from drafts.residual import ResidualHead
from drafts.weights import read_member
from osd.config import ExitDrafts, ModelDrafts, ResidualDrafts
from osd.corpus import Text
from osd.objectives import fisher_metric
from osd.online_config import OnlineConfig
from osd.states import States
from osd.students import ExitStudent, ModelStudent, ResidualStudent, Trainee
from osd.teacher import Teacher, collate

_METRIC_ROWS = 2048


def checkpoints(ensemble: Ensemble) -> dict[Path, list[Member]]:
    """Each checkpoint once, with the drafts that are made of it, in the manifest's order."""
    found: dict[Path, list[Member]] = {}
    for member in ensemble.members:
        found.setdefault(member.path, []).append(member)
    return found


def students_of(
    ensemble: Ensemble, config: OnlineConfig, teacher: Teacher, metric_dd: Tensor | None = None
) -> list[Trainee]:
    """A student for each checkpoint of an ensemble, with its weights.

    Args:
        metric_dd: `target_metric`; without it residual students can be measured, not trained.

    Raises:
        WeightsError: if a file cannot be used.
    """
    return [
        _student(path, members, config, teacher, metric_dd, config.seed + number)
        for number, (path, members) in enumerate(checkpoints(ensemble).items())
    ]


def target_metric(
    states: States, texts: Sequence[Text], teacher: Teacher, max_tokens: int
) -> Tensor:
    """The target's average Fisher metric on some texts [d, d]."""
    rows: list[Tensor] = []
    for text in texts:
        batch = collate([text], max_tokens, teacher.head_Vd.device)
        rows.append(states.clean([text], batch).h_Td)
        if sum(map(len, rows)) >= _METRIC_ROWS:
            break
    return fisher_metric(torch.cat(rows)[:_METRIC_ROWS], teacher.head_Vd)


def _student(
    path: Path,
    members: list[Member],
    config: OnlineConfig,
    teacher: Teacher,
    metric_dd: Tensor | None,
    seed: int,
) -> Trainee:
    first = members[0]
    dtype = getattr(torch, config.dtype)
    weights = read_member(first)  # whole and finite, or an error
    if isinstance(first.draft, ResidualDraft):
        return _residual(members, weights, config, teacher, metric_dd)
    if isinstance(first.draft, ExitDraft):
        own = first.config.num_hidden_layers
        drafts = ExitDrafts(
            kind="exit", layer=first.draft.layer, own_layers=own, lora_rank=config.lora_rank
        )
        return ExitStudent(drafts, path, teacher.head_Vd, dtype, seed)
    source = ModelDrafts(kind="model", source=str(path), lora_rank=config.lora_rank)
    return ModelStudent(source, path, teacher.head_Vd, dtype, seed)


def _residual(
    members: list[Member],
    weights: dict[str, Tensor],
    config: OnlineConfig,
    teacher: Teacher,
    metric_dd: Tensor | None,
) -> ResidualStudent:
    shape = members[0].config
    head = ResidualHead(shape)
    head.load_weights((name, tensor.float()) for name, tensor in weights.items())
    drafts = ResidualDrafts(
        kind="residual",
        students=1,
        draws=shape.draws,
        taps=tuple(shape.taps),
        rank=shape.rank,
        factors=shape.factors,
        width=shape.width,
        teacher_draws=config.teacher_draws,
        match=config.match if shape.scaled else 0.0,
    )
    into_dr = torch.zeros_like(head.basis)
    if metric_dd is not None:
        into_dr = moves_into(head.basis.to(metric_dd.device), metric_dd)
    listed = [
        draft.draw for draft in (m.draft for m in members) if isinstance(draft, ResidualDraft)
    ]
    return ResidualStudent(
        drafts, head, into_dr, teacher.head_Vd, getattr(torch, config.dtype), listed
    )


def moves_into(basis_dr: Tensor, metric_dd: Tensor) -> Tensor:
    """What brings moves of the hidden state into a basis' coordinates, as `MoveBasis.into_dr`.

    The projection that is orthogonal in the metric: G B (B^T G B)^-1. A residual head's checkpoint
    holds its basis only.
    """
    basis, metric = basis_dr.double(), metric_dd.double()
    weighted = metric @ basis
    solved: Tensor = torch.linalg.solve(basis.T @ weighted, weighted.T)
    return solved.T.float()


def widths(path: Path) -> dict[str, torch.dtype]:
    """The types in which a checkpoint's tensors are stored."""
    return {
        name: tensor.dtype
        for file in sorted(path.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
