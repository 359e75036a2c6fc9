"""Versions of drafts against the posterior mean, text by text, for benchmarks/online_drift.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from drafts.divergence import measures
from osd.corpus import Text
from osd.precision import bfloat16_products
from osd.states import Clean, KeptStates
from osd.students import Trainee
from osd.teacher import Batch, Teacher, collate

Floats = NDArray[np.float64]
FIELDS = ("kl_mixture", "kl_drafts", "jsd", "epistemic", "eu_true", "squared_error")
_TEXTS = 8
_ROWS = 64


class Sums(NamedTuple):
    """Sums over each text's response tokens, in nats."""

    sums_NF: Floats  # of `FIELDS`
    tokens_N: Floats

    def mean(self, field: str, weights_N: Floats | None = None) -> float:
        """A token's; weights count texts, as a bootstrap draws them. RMSE is a root of it."""
        weights = np.ones_like(self.tokens_N) if weights_N is None else weights_N
        total = float(weights @ self.sums_NF[:, FIELDS.index(field)])
        return total / float(weights @ self.tokens_N)

    def rmse(self, weights_N: Floats | None = None) -> float:
        """Of what the service answers against EU*."""
        return float(np.sqrt(self.mean("squared_error", weights_N)))


class Truth:
    """Texts, and what the posterior makes of them: p_T and EU* of each token.

    Args:
        draws: of the posterior, which make p_T and EU*.
        folder: where states of the target are kept.
    """

    def __init__(
        self,
        teacher: Teacher,
        texts: Sequence[Text],
        layers: Sequence[int],
        *,
        draws: int,
        max_tokens: int,
        folder: Path,
    ) -> None:
        self._teacher = teacher
        self._parts: list[tuple[Batch, Clean, Tensor, Tensor, Tensor]] = []
        ordered = sorted(texts, key=lambda text: len(text.token_ids))
        states = KeptStates(
            teacher,
            ordered,
            layers=layers,
            draws=draws,
            max_tokens=max_tokens,
            seed=20261123,
            folder=folder,
        )
        for start in tqdm(range(0, len(ordered), _TEXTS), desc=f"p_T, {draws} draws"):
            chosen = ordered[start : start + _TEXTS]
            batch = collate(chosen, max_tokens)
            members = [states.draw(chosen, batch, draw, 0) for draw in range(draws)]
            mean_TV, eu_T, entropy_T = self._posterior(torch.stack(members))
            clean = states.clean(chosen, batch)
            self._parts.append((batch, clean, mean_TV, eu_T, entropy_T))

    @torch.no_grad()
    def measure(self, students: Sequence[Trainee]) -> Sums:
        """The drafts of all students on all texts."""
        sums: list[Tensor] = []
        tokens: list[Tensor] = []
        for batch, clean, mean_TV, eu_T, entropy_T in self._parts:
            drafts = [draft for one in students for draft in one.drafts(batch, clean)]
            fields = []
            for start in range(0, len(mean_TV), _ROWS):
                rows = slice(start, start + _ROWS)
                logq_KTV = torch.stack([self._logp(d.h_Td[rows], d.head_Vd) for d in drafts])
                logp_TV = self._logp(clean.h_Td[rows], self._teacher.head_Vd)
                served = measures(logq_KTV, logp_TV)
                mean = mean_TV[rows]
                mixture_TV = logq_KTV.exp().mean(0).clamp_min(1e-38).log()
                # Several times faster than a product and a sum.
                cross_T = -torch.einsum("tv,tv->t", mixture_TV, mean)
                crosses = [-torch.einsum("tv,tv->t", logq_TV, mean) for logq_TV in logq_KTV]
                each_T = torch.stack(crosses).mean(0)
                eu = eu_T[rows]
                columns = (
                    cross_T - entropy_T[rows],
                    each_T - entropy_T[rows],
                    served.jsd,
                    served.epistemic,
                    eu,
                    (served.epistemic - eu).square(),
                )
                fields.append(torch.stack(columns, dim=1).double())
            by_text = batch.by_text(torch.cat(fields))
            sums += [values.sum(0) for values in by_text]
            tokens += [torch.tensor(float(len(values))) for values in by_text]
        return Sums(torch.stack(sums).numpy(), torch.stack(tokens).double().numpy())

    def _posterior(self, members_MTd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """p_T [T, V]; EU* and the entropy of p_T, both corrected for the number of draws [T]."""
        draws = len(members_MTd)
        means, eus, entropies = [], [], []
        for rows_MTd in torch.split(members_MTd, _ROWS // 4, dim=1):
            logp_MTV = self._logp(rows_MTd, self._teacher.head_Vd)
            p_MTV = logp_MTV.exp()
            mean_TV = p_MTV.mean(0)
            entropy_T = -torch.einsum("tv,tv->t", mean_TV, mean_TV.clamp_min(1e-38).log())
            # Several times faster than one sum over three dimensions.
            each_MT = torch.einsum("nv,nv->n", p_MTV.flatten(0, 1), logp_MTV.flatten(0, 1))
            jsd_T = entropy_T + each_MT.view(draws, -1).mean(0)
            eu_T = jsd_T * draws / (draws - 1)
            means.append(mean_TV)
            eus.append(eu_T)
            entropies.append(entropy_T + eu_T / draws)
        return torch.cat(means), torch.cat(eus), torch.cat(entropies)

    def _logp(self, h: Tensor, head_Vd: Tensor) -> Tensor:
        # Rounded factors for the logits alone, as in training and as the service has them.
        with bfloat16_products(self._teacher.model.dtype == torch.bfloat16):
            # Two dimensions, or the head is narrowed anew for each member.
            logits = F.linear(h.reshape(-1, h.shape[-1]), head_Vd)
        return torch.log_softmax(logits.float(), -1).view(*h.shape[:-1], -1)
