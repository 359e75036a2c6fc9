"""All residual students of an ensemble at once, as the vLLM model runs them.

The same mathematics as `ResidualHead.forward`, arranged so that little of it runs once a draw:
logits are linear in h, so a draw's logits are the target's plus s times the change W B m that its
unscaled move makes, and s can be found from that change. The directions W B, [V, r], are computed
when weights are loaded. r is smaller than d, so a draw costs less than an LM head does. Students of
one shape are computed as one, and so are draws along the same directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drafts.passes import TargetRows, local_scales
from drafts.residual import (
    ResidualConfig,
    ResidualHead,
    kl_of,
    moves_of,
    network_inputs,
)

LMHead = Callable[[Tensor], Tensor]


class _Alike(NamedTuple):
    """S students of one shape, whose networks are computed as one."""

    config: ResidualConfig
    up: tuple[Tensor, Tensor]  # weight [S * width, inputs] and bias
    down: tuple[Tensor, Tensor]  # weight [S, width, outputs] and bias [S, 1, outputs]
    divergence: tuple[Tensor, Tensor] | None  # weight [S, width, 1] and bias [S, 1, 1]
    draws: list[tuple[Tensor, Tensor]]  # z and eps of each student's that serve, float32


class ResidualGroup(nn.Module):
    """S students with K draws of theirs that serve, in the students' order.

    Call `prepare` when the weights of its `heads` have been loaded.
    """

    share_SK: Tensor
    unscaled_K1: Tensor

    def __init__(self, students: Sequence[tuple[ResidualConfig, list[int]]]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(ResidualHead(config) for config, _ in students)
        self.draws = [draws for _, draws in students]
        # The students that scale their draws: row s takes the mean over the draws of student s.
        # float32, whatever the weights are loaded in.
        shares = [torch.full((1, len(draws)), 1 / len(draws)).float() for _, draws in students]
        all_SK = torch.block_diag(*shares)  # type: ignore[no-untyped-call]
        share_SK = all_SK[[config.scaled for config, _ in students]]
        self.register_buffer("share_SK", share_SK, persistent=False)
        unscaled_K1 = (share_SK.sum(0) == 0).float().unsqueeze(-1)
        self.register_buffer("unscaled_K1", unscaled_K1, persistent=False)
        self._networks: list[_Alike] = []
        # Directions, and how many draws in a row go along them.
        self._directions: list[tuple[Tensor, int]] = []

    @property
    def is_prepared(self) -> bool:
        return bool(self._directions)

    def prepare(self, lm_head: LMHead) -> None:
        """Arrange the weights that are loaded now.

        Args:
            lm_head: the target's, from hidden states [T, d] to logits [T, V].
        """
        heads = [head for head in self.heads if isinstance(head, ResidualHead)]
        students = list(zip(heads, self.draws, strict=True))
        self._networks = [
            _alike(list(same)) for _, same in groupby(students, lambda student: student[0].config)
        ]
        self._directions = []
        basis: Tensor | None = None
        for head, draws in students:
            if basis is not None and torch.equal(basis, head.basis):
                directions_Vr, count = self._directions.pop()
                self._directions.append((directions_Vr, count + len(draws)))
            else:
                basis = head.basis
                directions_Vr = lm_head(basis.T.contiguous()).T.contiguous()
                self._directions.append((directions_Vr, len(draws)))

    def moves(
        self, h_Td: Tensor, taps: dict[int, Tensor], confidence_T4: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """How each draw moves h before it is scaled, in units of the basis, [K, T, r] float32; and
        what each scaling student wants the mean KL(q_k || p) of its draws to be, [T].

        Args:
            taps: hidden states after the layers that the students read, [T, d] each.
            confidence_T4: of the target's distribution.
        """
        moved, wanted = [], []
        for alike in self._networks:
            states = [h_Td, *(taps[layer] for layer in alike.config.taps)]
            inputs = network_inputs(states, confidence_T4, alike.up[0].dtype)
            hidden = F.silu(F.linear(inputs, *alike.up))
            hidden_STw = hidden.view(len(hidden), -1, alike.config.width).transpose(0, 1)
            out_STo = torch.baddbmm(alike.down[1], hidden_STw, alike.down[0])
            kl_ST: Sequence[Tensor | None] = [None] * len(alike.draws)
            if alike.divergence is not None:
                weight, bias = alike.divergence
                kl_ST = kl_of(torch.baddbmm(bias, hidden_STw, weight)).unbind()
            for out, kl, (z, eps) in zip(out_STo, kl_ST, alike.draws, strict=True):
                moves = moves_of(alike.config, out, kl)
                moved.append(moves.at(z, eps))
                if kl is not None:
                    wanted.append(kl)
        return torch.cat(moved), wanted

    def changes(self, moves_KTr: Tensor) -> Tensor:
        """What the moves do to the target's logits, [K, T, V] in the LM head's dtype."""
        split = torch.split(moves_KTr, [count for _, count in self._directions])
        parts = [
            F.linear(moves.flatten(0, 1).to(directions_Vr.dtype), directions_Vr)
            for moves, (directions_Vr, _) in zip(split, self._directions, strict=True)
        ]
        changes = parts[0] if len(parts) == 1 else torch.cat(parts)
        return changes.view(*moves_KTr.shape[:2], -1)

    def scales(self, changes_KTV: Tensor, wanted: list[Tensor], rows: TargetRows) -> Tensor:
        """The factor of each draw's change of the logits, [K, T].

        Args:
            changes_KTV: what the moves do to the target's logits.
            wanted: as `moves` gives it.
            rows: what was read of the target's logits.
        """
        ones_KT = self.unscaled_K1.expand(-1, changes_KTV.shape[1])
        if not wanted:
            return ones_KT
        s_ST = local_scales(rows, changes_KTV, self.share_SK, torch.stack(wanted))
        return (self.share_SK > 0).T.float() @ s_ST + ones_KT


def _alike(students: list[tuple[ResidualHead, list[int]]]) -> _Alike:
    heads = [head for head, _ in students]
    ups = [head.up for head in heads]
    divergence = None
    if heads[0].config.scaled:
        divergence = _stacked([head.divergence for head in heads])
    return _Alike(
        heads[0].config,
        (torch.cat([up.weight for up in ups]), torch.cat([up.bias for up in ups])),
        _stacked([head.down for head in heads]),
        divergence,
        [(head.z[draws].float(), head.eps[draws].float()) for head, draws in students],
    )


def _stacked(linears: list[nn.Linear]) -> tuple[Tensor, Tensor]:
    """Weights [S, inputs, outputs] and biases [S, 1, outputs], as `torch.baddbmm` takes them."""
    weight = torch.stack([linear.weight.T for linear in linears])
    return weight, torch.stack([linear.bias for linear in linears]).unsqueeze(1)
