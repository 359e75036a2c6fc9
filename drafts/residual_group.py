"""All residual students of an ensemble at once, as the vLLM model runs them.

The same mathematics as `ResidualHead.forward`, arranged so that the LM head, by far the most work,
runs once for all draws: logits are linear in h, so a draw's logits are the target's plus s times
the change W B m that its unscaled move makes, and s can be found from that change.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from drafts.divergence import block_rows
from drafts.residual import ResidualConfig, ResidualHead, confidence, likeliest, local_scale


class ResidualGroup(nn.Module):
    """S students with K draws of theirs that serve, in the students' order."""

    mean_SK: Tensor

    def __init__(self, students: Sequence[tuple[ResidualConfig, list[int]]]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(ResidualHead(config) for config, _ in students)
        self.draws = [draws for _, draws in students]
        # Of the students that scale their draws: which draws those are, and the mean over them.
        scaled = [(config.scaled, len(draws)) for config, draws in students]
        self.is_scaled_K = [is_scaled for is_scaled, count in scaled for _ in range(count)]
        counts = [count for is_scaled, count in scaled if is_scaled]
        # float32, whatever the weights are loaded in.
        means = [torch.full((1, count), 1 / count, dtype=torch.float32) for count in counts]
        mean_SK = torch.block_diag(*means)  # type: ignore[no-untyped-call]
        self.register_buffer("mean_SK", mean_SK, persistent=False)

    def moves(
        self, h_Td: Tensor, taps: list[Tensor], logits_TV: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """How each draw moves h before it is scaled, [K, T, d] in the dtype of h; and what each
        scaling student wants the mean KL(q_k || p) of its draws to be, [T].

        Args:
            taps: hidden states of the first student's taps, then the second's, ..., [T, d] each.
            logits_TV: the target's.
        """
        # In blocks, so that the passes over the vocabulary find their rows in the cache.
        size = block_rows(2 * logits_TV.shape[-1], logits_TV.device)
        sure_T4 = torch.cat([confidence(block) for block in torch.split(logits_TV, size)])
        moved, wanted = [], []
        for head, draws in zip(self.heads, self.draws, strict=True):
            assert isinstance(head, ResidualHead)
            mine, taps = taps[: len(head.config.taps)], taps[len(head.config.taps) :]
            moves = head.moves(h_Td, mine, sure_T4)
            drawn_KTr = moves.at(head.z[draws].float(), head.eps[draws].float())
            moved.append((drawn_KTr @ head.basis.float().T).to(h_Td.dtype))
            if moves.kl_T is not None:
                wanted.append(moves.kl_T)
        return torch.cat(moved), wanted

    def scales(
        self, changes: Sequence[Tensor], wanted: list[Tensor], logits_TV: Tensor
    ) -> list[Tensor]:
        """The factor of each draw's change of the logits, K of [T].

        Args:
            changes: what the moves do to the target's logits, K of [T, V].
            wanted: as `moves` gives it.
            logits_TV: the target's.
        """
        ones_T = torch.ones_like(logits_TV[:, 0])
        if not wanted:
            return [ones_T] * len(changes)
        top_Tn, tokens_Tn = likeliest(logits_TV)
        scaled = [change for change, yes in zip(changes, self.is_scaled_K, strict=True) if yes]
        change_KTn = torch.stack([change.gather(-1, tokens_Tn).float() for change in scaled])
        s_ST = local_scale(change_KTn, top_Tn, torch.stack(wanted), self.mean_SK)
        found = iter((self.mean_SK > 0).T.float() @ s_ST)
        return [next(found) if yes else ones_T for yes in self.is_scaled_K]
