"""`residual` drafts: a small head that moves the target's final hidden state.

    q_k = softmax(W (h + s B m_k)),    m_k = mu(x) + Phi(x) z_k + sigma(x) * eps_k

W is the target's LM head, h its final hidden state, x = h, a few inner hidden states ("taps") and
four numbers that say how sure p is (`confidence`, which no small network finds from h by itself), B
a fixed basis of r directions, and z_k, eps_k ~ N(0, I) are drawn once per draft and kept with the
weights; s(x), `local_scale`, makes a few draws as long as many are on average.

This is Gaussian distillation (deep latent factor model, arXiv 2510.19290, section 3) carried from a
process over V logits to one over d numbers, since logits are linear in h. One student gives any
number of drafts; each costs no attention and no KV cache.

The same module runs in the vLLM model and in the reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from drafts.errors import ManifestError

CONFIG_NAME = "config.json"
N_CONFIDENCE = 4
LOCAL_TOKENS = 64
_LOCAL_ROWS = 128  # whose directions are gathered at once
_LONGEST = 1.5
_TINY = 1e-12


class ResidualConfig(BaseModel):
    """Shape of a residual head; `config.json` of its folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["residual"] = "residual"
    hidden_size: int = Field(gt=0)
    taps: list[Annotated[int, Field(ge=1)]] = Field(
        default=[], description="layers after which hidden states are read, beside the final one"
    )
    rank: int = Field(gt=0, description="r, directions in which h moves")
    factors: int = Field(gt=0, description="q, dimension of z")
    width: int = Field(gt=0, description="hidden units of the head")
    draws: int = Field(gt=0, description="(z, eps) pairs kept with the weights")

    @classmethod
    def read(cls, folder: Path) -> ResidualConfig:
        """Parse `folder/config.json`; `ManifestError` if it is not a residual head's."""
        try:
            return cls.model_validate_json((folder / CONFIG_NAME).read_bytes())
        except (OSError, ValidationError) as error:
            raise ManifestError(f"{folder}: no usable residual {CONFIG_NAME} ({error})") from error


def confidence(logits_TV: Tensor) -> Tensor:
    """How sure a distribution is, [T, 4], float32: its entropy, the standard deviation of log p(y)
    over y ~ p, and the log-probs of its two most likely tokens, all in nats.

    Args:
        logits_TV: logits or log-probs.
    """
    logits = logits_TV.float()
    floor = math.log(torch.finfo(logits.dtype).tiny)  # so that 0 * log 0 is 0
    logp, p = torch.log_softmax(logits, -1).clamp_min_(floor), torch.softmax(logits, -1)
    mean = torch.linalg.vecdot(p, logp)
    spread = torch.linalg.vecdot(p, logp.square()) - mean.square()
    top = logp.topk(2, dim=-1).values.clamp_min(-10)
    return torch.cat([torch.stack([-mean, spread.clamp_min(0).sqrt()], -1), top], -1)


class Moves(NamedTuple):
    """The distribution of moves m of T tokens: means [T, r], factors [T, r, q], scales [T, r]."""

    mu_Tr: Tensor
    phi_Trq: Tensor
    sigma_Tr: Tensor

    def at(self, z_Kq: Tensor, eps_Kr: Tensor) -> Tensor:
        """mu + Phi z + sigma * eps at K draws, [K, T, r]."""
        return self.mu_Tr + torch.stack(
            [self.phi_Trq @ z + self.sigma_Tr * eps for z, eps in zip(z_Kq, eps_Kr, strict=True)]
        )


def local_scale(
    moves: Moves, drawn_KTr: Tensor, directions_Vr: Tensor, logits_TV: Tensor
) -> Tensor:
    """What the K draws of each token are to be multiplied with, [T], so that few serve as many do.

    A small move m changes p by KL = 1/2 Var_p(A m), A = directions: only a few combinations of its
    r coordinates count, other ones at each token, and in those a handful of draws is now long, now
    short. The scale brings the draws' mean of that variance to its expectation over all draws. Both
    are taken over p's likeliest tokens; a fourth of the expectation is added to both, and no draws
    are lengthened by more than half: what is short among the likeliest tokens may be long among the
    others, and KL grows faster than by the square there.
    """
    scales = []
    for start in range(0, len(logits_TV), _LOCAL_ROWS):
        block = slice(start, start + _LOCAL_ROWS)
        mu, phi, sigma = (part[block] for part in moves)
        top, tokens = logits_TV[block].float().topk(min(LOCAL_TOKENS, logits_TV.shape[-1]), -1)
        p = torch.softmax(top, -1)
        a_Tnr = directions_Vr[tokens].float()
        a_Tnr = a_Tnr - (p.unsqueeze(-2) @ a_Tnr)
        variances = (
            (a_Tnr @ mu.unsqueeze(-1)).squeeze(-1).square()
            + (a_Tnr @ phi).square().sum(-1)
            + (a_Tnr.square() @ sigma.square().unsqueeze(-1)).squeeze(-1)
        )
        expected = (p * variances).sum(-1)
        shifts_TKn = drawn_KTr[:, block].transpose(0, 1) @ a_Tnr.transpose(1, 2)
        found = (p.unsqueeze(1) * shifts_TKn.square()).sum(-1).mean(-1)
        room = 0.25 * expected + _TINY
        scales.append(((expected + room) / (found + room)).sqrt().clamp(max=_LONGEST))
    return torch.cat(scales)


class ResidualHead(nn.Module):
    """The move of h for one student and all of its draws."""

    basis: Tensor
    z: Tensor
    eps: Tensor

    def __init__(self, config: ResidualConfig) -> None:
        super().__init__()
        self.config = config
        inputs = config.hidden_size * (1 + len(config.taps))
        outputs = config.rank * (config.factors + 2)
        self.up = nn.Linear(inputs + N_CONFIDENCE, config.width)
        self.down = nn.Linear(config.width, outputs)
        self.register_buffer("basis", torch.empty(config.hidden_size, config.rank))
        self.register_buffer("z", torch.empty(config.draws, config.factors))
        self.register_buffer("eps", torch.empty(config.draws, config.rank))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator, scale: float = 0.02) -> ResidualHead:
        """Random weights, an orthonormal basis and standard normal draws."""
        for linear in (self.up, self.down):
            nn.init.normal_(linear.weight, std=scale, generator=generator)
            nn.init.zeros_(linear.bias)
        basis = torch.randn(self.basis.shape, generator=generator)
        self.basis.copy_(torch.linalg.qr(basis).Q)
        for draws in (self.z, self.eps):
            draws.copy_(torch.randn(draws.shape, generator=generator))
        return self

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load a checkpoint in place, as vLLM's modules do; every tensor must be there."""
        self.load_state_dict(dict(weights), strict=True)

    def moves(self, h_Td: Tensor, taps: list[Tensor], confidence_T4: Tensor) -> Moves:
        """The distribution of the moves of h.

        Args:
            h_Td: the target's final hidden states.
            taps: those after the layers of the config, [T, d] each.
            confidence_T4: `confidence` of the target's logits.
        """
        # Hidden states differ in scale by orders of magnitude between layers, hence the norms.
        states = [F.rms_norm(state.float(), state.shape[-1:]) for state in (h_Td, *taps)]
        x = torch.cat([*states, confidence_T4.float()], dim=-1).to(self.up.weight.dtype)
        out = self.down(F.silu(self.up(x))).float()
        mu, rest = out.split([self.config.rank, out.shape[-1] - self.config.rank], dim=-1)
        raw_sigma, phi = rest.split([self.config.rank, rest.shape[-1] - self.config.rank], dim=-1)
        shape = (-1, self.config.rank, self.config.factors)
        return Moves(mu, phi.reshape(shape), F.softplus(raw_sigma))

    def drawn(
        self, moves: Moves, directions_Vr: Tensor, logits_TV: Tensor, draws: list[int]
    ) -> Tensor:
        """The moves [K, T, r] of K of the draws that are kept with the weights.

        Args:
            moves: their distribution.
            directions_Vr: LM head times basis: what a move does to logits.
            logits_TV: the target's.
            draws: which; they are scaled for being so many.
        """
        drawn_KTr = moves.at(self.z[draws].float(), self.eps[draws].float())
        return drawn_KTr * local_scale(moves, drawn_KTr, directions_Vr, logits_TV).unsqueeze(-1)

    def forward(
        self,
        h_Td: Tensor,
        taps: list[Tensor],
        logits_TV: Tensor,
        directions_Vr: Tensor,
        draws: list[int],
    ) -> list[Tensor]:
        """The moved hidden states [T, d], one for each of `draws`, in the dtype of h."""
        moves = self.moves(h_Td, taps, confidence(logits_TV))
        drawn_KTr = self.drawn(moves, directions_Vr, logits_TV, draws)
        return list((h_Td.float() + drawn_KTr @ self.basis.float().T).to(h_Td.dtype))
