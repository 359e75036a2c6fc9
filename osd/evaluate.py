"""How far drafts are from the posterior mean, and from each other, on texts nobody trains on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from drafts.divergence import measures
from osd.corpus import Text
from osd.states import Clean, States
from osd.students import Trainee
from osd.teacher import Batch, collate

_ROWS = 64
_TEXTS = 8


class Agreement(NamedTuple):
    """Means over held-out response tokens, in nats."""

    kl_drafts: float  # (1/K) sum_k KL(p_T || q_k)
    kl_mixture: float  # KL(p_T || q_bar)
    jsd: float  # of the drafts among themselves: near zero, they have collapsed
    epistemic: float  # jsd + KL(q_bar || p), what the service would answer
    reference: float  # EU*, corrected for the number of draws
    rmse: float  # of `epistemic` against EU*, token by token; EU*'s own noise is in it


class HeldOut:
    """Texts, their hidden states at some draws of the posterior, and nothing of size V.

    Args:
        draws: how many draws make p_T.
        seed: of the first of them.
        breathe: called between pieces of work, of some seconds each on a core.
    """

    def __init__(
        self,
        states: States,
        head_Vd: Tensor,
        texts: Sequence[Text],
        *,
        draws: int,
        max_tokens: int,
        seed: int,
        breathe: Callable[[], None] = lambda: None,
    ) -> None:
        self.head_Vd = head_Vd
        self._breathe = breathe
        ordered = sorted(texts, key=lambda text: len(text.token_ids))
        self.batches: list[tuple[Batch, Clean, list[Tensor]]] = []
        for start in range(0, len(ordered), _TEXTS):
            chosen = ordered[start : start + _TEXTS]
            batch = collate(chosen, max_tokens, self.head_Vd.device)
            clean = states.clean(chosen, batch)
            members = []
            for draw in range(draws):
                members.append(states.draw(chosen, batch, draw, seed + draw))
                breathe()
            self.batches.append((batch, clean, members))

    @torch.no_grad()
    def measure(self, students: Sequence[Trainee]) -> Agreement:
        """Compare the drafts of all students with p_T."""
        totals = torch.zeros(len(Agreement._fields), dtype=torch.float64)
        n_tokens = 0
        for batch, clean, members in self.batches:
            drafts = [draft for s in students for draft in s.drafts(batch, clean)]
            h = clean.h_Td
            n_tokens += len(h)
            for start in range(0, len(h), _ROWS):
                rows = slice(start, start + _ROWS)
                logq_KTV = torch.stack([_logp(d.h_Td[rows], d.head_Vd) for d in drafts])
                logp_MTV = torch.stack([_logp(m[rows], self.head_Vd) for m in members])
                totals += _sums(logq_KTV, logp_MTV, _logp(h[rows], self.head_Vd))
                self._breathe()
        means = totals / n_tokens
        means[-1].sqrt_()
        return Agreement(*means.tolist())


def _sums(logq_KTV: Tensor, logp_MTV: Tensor, logp_TV: Tensor) -> Tensor:
    served = measures(logq_KTV, logp_TV)
    n_draws = logp_MTV.shape[0]
    reference = measures(logp_MTV, logp_TV).jsd * n_draws / (n_draws - 1)
    mean_TV = logp_MTV.exp().mean(0)
    # The entropy of a mean of few draws is low by about EU* / M.
    entropy_T = -(mean_TV * mean_TV.clamp_min(1e-38).log()).sum(-1) + reference / n_draws
    cross_KT = -(logq_KTV * mean_TV).sum(-1)
    mixture_TV = logq_KTV.exp().mean(0).clamp_min(1e-38).log()
    cross_mixture_T = -(mixture_TV * mean_TV).sum(-1)
    rows = (
        cross_KT.mean(0) - entropy_T,
        cross_mixture_T - entropy_T,
        served.jsd,
        served.epistemic,
        reference,
        (served.epistemic - reference).square(),
    )
    return torch.stack([row.double().sum().cpu() for row in rows])


def _logp(h_Td: Tensor, head_Vd: Tensor) -> Tensor:
    return torch.log_softmax(F.linear(h_Td, head_Vd).float(), -1)
