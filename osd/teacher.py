"""The target as a teacher: hidden states of texts, unperturbed and at draws of its posterior.

Rows are the places that predict response tokens, as in `drafts.reference`: T of them over the
texts of a batch, text after text. A teacher's final hidden state [T, d] stands for its whole
distribution, softmax(W h), since the LM head W is not perturbed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from drafts.residual import confidence
from osd.corpus import Text
from osd.objectives import sampled_eu
from osd.posterior import WeightPosterior
from osd.precision import bfloat16_products

_ROWS = 128  # whose logits are held at once


@dataclass(frozen=True)
class Batch:
    """B texts padded at their ends to L tokens, and the T rows that predict response tokens."""

    ids_BL: Tensor
    mask_BL: Tensor
    text_T: Tensor  # which text a row is of
    place_T: Tensor  # and where in it

    def rows(self, states_BLd: Tensor) -> Tensor:
        """States [T, d] of the rows out of states [B, L, d]."""
        return states_BLd[self.text_T, self.place_T]

    def by_text(self, rows_Td: Tensor) -> list[Tensor]:
        """Values of the rows [T, ...], one tensor a text."""
        return [rows_Td[self.text_T == i] for i in range(len(self.ids_BL))]


def collate(texts: Sequence[Text], max_tokens: int, device: torch.device | str = "cpu") -> Batch:
    """Pad texts to one length; each is cut at `max_tokens`."""
    cut = [text.token_ids[:max_tokens] for text in texts]
    ids = torch.zeros(len(cut), max(map(len, cut)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    index: list[int] = []
    place: list[int] = []
    for i, (text, tokens) in enumerate(zip(texts, cut, strict=True)):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        mask[i, : len(tokens)] = 1
        rows = range(text.response_start - 1, len(tokens) - 1)
        index += [i] * len(rows)
        place += rows
    if not place:
        raise ValueError(f"no text has a response token among its first {max_tokens} tokens")
    return Batch(
        ids.to(device),
        mask.to(device),
        torch.tensor(index, device=device),
        torch.tensor(place, device=device),
    )


class Teacher:
    """A frozen target and the posterior over its weights.

    Args:
        model: a transformers causal language model; it is put in evaluation mode and frozen.
    """

    def __init__(self, model: Any, posterior: WeightPosterior) -> None:
        self.model = model.eval().requires_grad_(False)
        self.posterior = posterior
        # Float32 whatever the model is: bfloat16 logits of 20 are off by up to 0.06, which is as
        # much as what drafts are to learn.
        self.head_Vd: Tensor = self.model.get_output_embeddings().weight.float()

    @torch.no_grad()
    def logits(self, h_Td: Tensor) -> Tensor:
        """Logits [T, V], float32, of final states of this model."""
        # Both factors came out of bfloat16 numbers: nothing is lost, in 60% of the time.
        with bfloat16_products(self.model.dtype == torch.bfloat16):
            return F.linear(h_Td, self.head_Vd)

    @torch.no_grad()
    def confidence(self, h_Td: Tensor) -> Tensor:
        """`drafts.residual.confidence` [T, 4] of the target's logits."""
        return torch.cat([confidence(self.logits(block)) for block in torch.split(h_Td, _ROWS)])

    @torch.no_grad()
    def sampled_eu(self, members_MTd: Tensor) -> Tensor:
        """EU* of each token [T] as M draws show it: noisy, and corrected for M."""
        with bfloat16_products(self.model.dtype == torch.bfloat16):
            return sampled_eu(members_MTd.float(), self.head_Vd)

    @torch.no_grad()
    def states(self, batch: Batch, layers: Sequence[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        """Unperturbed states: the final ones [B, L, d], and those after some layers, each so."""
        out = self.model.base_model(
            batch.ids_BL, attention_mask=batch.mask_BL, output_hidden_states=bool(layers)
        )
        return out.last_hidden_state, {layer: out.hidden_states[layer] for layer in layers}

    @torch.no_grad()
    def draw(self, batch: Batch, seed: int) -> Tensor:
        """Final states [T, d] of the rows at one draw of the weights for all texts, float32."""
        with self.posterior.sampled(seed):
            out = self.model.base_model(batch.ids_BL, attention_mask=batch.mask_BL)
        return batch.rows(out.last_hidden_state).float()
