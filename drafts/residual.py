"""`residual` drafts: a small head that moves the target's final hidden state.

    q_k = softmax(W (h + s B m_k)),    m_k = mu(x) + Phi(x) z_k + sigma(x) * eps_k

W is the target's LM head, h its final hidden state, x = h, a few inner hidden states ("taps") and
four numbers that say how sure p is (`confidence`, which no small network finds from h by itself), B
a fixed basis of r directions, and z_k, eps_k ~ N(0, I) are drawn once per draft and kept with the
weights. A few draws are at each token now longer, now shorter than draws are on average: s(x)
scales them so that their mean KL(q_k || p) is the student's own estimate of it (`draw_scale`).

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
LOCAL_TOKENS = 256
LOCAL_STEPS = 5
_LOCAL_ROWS = 64  # whose directions are gathered at once
SMALL_SCALE = 1e-3  # a scale at which KL is of second order
LOG_SCALES = (-20.0, math.log(2.0))  # least and greatest
TINY = 1e-12


# Far beyond any head; products of three stay numbers that torch can count with, and all are held
# against the weights before anything is allocated.
_MAX_BYTES = 2**20
_Size = Annotated[int, Field(gt=0, le=2**18)]


class ResidualConfig(BaseModel):
    """Shape of a residual head; `config.json` of its folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["residual"] = "residual"
    hidden_size: _Size
    taps: list[Annotated[int, Field(ge=1)]] = Field(
        default=[],
        max_length=1024,
        description="layers after which hidden states are read, beside the final one",
    )
    rank: _Size = Field(description="r, directions in which h moves")
    factors: _Size = Field(description="q, dimension of z")
    width: _Size = Field(description="hidden units of the head")
    draws: _Size = Field(description="(z, eps) pairs kept with the weights")
    scaled: bool = Field(
        default=True, description="draws are scaled to the student's estimate of mean KL(q_k || p)"
    )

    @classmethod
    def read(cls, folder: Path) -> ResidualConfig:
        """Parse `folder/config.json`; `ManifestError` if it is not a residual head's."""
        try:
            with (folder / CONFIG_NAME).open("rb") as file:
                return cls.model_validate_json(file.read(_MAX_BYTES))  # what is longer is cut
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
    """The distribution of moves m of T tokens: means [T, r], factors [T, r, q], scales [T, r]; and
    the mean KL(q_k || p) that draws are brought to, nats [T], if they are."""

    mu_Tr: Tensor
    phi_Trq: Tensor
    sigma_Tr: Tensor
    kl_T: Tensor | None = None

    def at(self, z_Kq: Tensor, eps_Kr: Tensor) -> Tensor:
        """mu + Phi z + sigma * eps at K draws, [K, T, r]."""
        return self.mu_Tr + torch.stack(
            [self.phi_Trq @ z + self.sigma_Tr * eps for z, eps in zip(z_Kq, eps_Kr, strict=True)]
        )


def draw_scale(drawn_KTr: Tensor, kl_T: Tensor, directions_Vr: Tensor, logits_TV: Tensor) -> Tensor:
    """The factor s [T] with which mean_k KL(q_k || p) of moves s m_k is `kl_T`; at most 2.

    Along a ray, KL grows with s (its slope is s Var_q of the change of logits), from 1/2 s^2 Var_p
    on, and so does the mean: Newton's method in log s. All taken over p's likeliest tokens, as if
    there were no others.
    """
    return torch.cat(
        [
            _scale_block(drawn_KTr[:, rows], kl_T[rows], directions_Vr, logits_TV[rows])
            for rows in (
                slice(start, start + _LOCAL_ROWS) for start in range(0, len(logits_TV), _LOCAL_ROWS)
            )
        ]
    )


def _scale_block(
    drawn_KTr: Tensor, kl_T: Tensor, directions_Vr: Tensor, logits_TV: Tensor
) -> Tensor:
    top_Tn, tokens_Tn = likeliest(logits_TV)
    change_TKn = drawn_KTr.transpose(0, 1) @ directions_Vr[tokens_Tn].float().transpose(1, 2)
    mean_1K = torch.full((1, len(drawn_KTr)), 1 / len(drawn_KTr), device=kl_T.device)
    return local_scale(change_TKn.transpose(0, 1), top_Tn, kl_T.unsqueeze(0), mean_1K)[0]


def likeliest(logits_TV: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and ids of the tokens over which `local_scale` works, likeliest first, [T, n]."""
    top_Tn, tokens_Tn = logits_TV.float().topk(min(LOCAL_TOKENS, logits_TV.shape[-1]), -1)
    return top_Tn, tokens_Tn


def local_scale(change_KTn: Tensor, top_Tn: Tensor, kl_ST: Tensor, mean_SK: Tensor) -> Tensor:
    """`draw_scale` of S students at once, from what their K draws do to the likeliest tokens.

    Args:
        change_KTn: the changes of those tokens' logits by each draw, float32.
        top_Tn: their logits.
        kl_ST: what each student wants the mean KL(q_k || p) of its draws to be.
        mean_SK: row s takes the mean over the draws of student s.

    Returns:
        The scales, [S, T].
    """
    logp_Tn = torch.log_softmax(top_Tn, -1)
    draws_KS = (mean_SK > 0).T.float()

    def mean_kl(s_ST: Tensor) -> tuple[Tensor, Tensor]:
        """Mean KL of each student, and its derivative by log s."""
        s_KT1 = (draws_KS @ s_ST).unsqueeze(-1)
        logq_KTn = torch.log_softmax(logp_Tn + s_KT1 * change_KTn, -1)
        q_KTn = logq_KTn.exp()
        mean_KT1 = (q_KTn * change_KTn).sum(-1, keepdim=True)
        variance_KT = (q_KTn * (change_KTn - mean_KT1).square()).sum(-1)
        kl_KT = (q_KTn * (logq_KTn - logp_Tn)).sum(-1)
        return (mean_SK @ kl_KT).clamp_min(TINY), s_ST.square() * (mean_SK @ variance_KT)

    # To second order, KL is half its derivative by log s and grows as s^2: the first guess.
    _, slope = mean_kl(torch.full_like(kl_ST, SMALL_SCALE))
    log_s = math.log(SMALL_SCALE) + 0.5 * ((2 * kl_ST).clamp_min(TINY) / (slope + TINY)).log()
    log_s = log_s.clamp(*LOG_SCALES)
    for _ in range(LOCAL_STEPS):
        found, slope = mean_kl(log_s.exp())
        step = (kl_ST.clamp_min(TINY).log() - found.log()) * found / slope.clamp_min(TINY)
        log_s = (log_s + step.clamp(-1, 1)).clamp(*LOG_SCALES)
    return log_s.exp()


def network_inputs(states: list[Tensor], confidence_T4: Tensor, dtype: torch.dtype) -> Tensor:
    """What a student's network reads, [T, inputs]: h, the taps, and `confidence`."""
    # Hidden states differ in scale by orders of magnitude between layers, hence the norms.
    normed = [F.rms_norm(state.float(), state.shape[-1:]) for state in states]
    return torch.cat([*normed, confidence_T4.float()], dim=-1).to(dtype)


def moves_of(config: ResidualConfig, out_To: Tensor, kl_T: Tensor | None) -> Moves:
    """The distribution that a student's network has put out."""
    rank = config.rank
    sizes = [rank, rank, rank * config.factors]
    mu, raw_sigma, phi = torch.split(out_To.float(), sizes, dim=-1)
    return Moves(mu, phi.reshape(-1, rank, config.factors), F.softplus(raw_sigma), kl_T)


def kl_of(out_T1: Tensor) -> Tensor:
    """The mean KL(q_k || p) that a student's network estimates, in nats; the last dimension, of 1,
    is gone."""
    return F.softplus(out_T1.float()).squeeze(-1)


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
        if config.scaled:
            self.divergence = nn.Linear(config.width, 1)
        self.register_buffer("basis", torch.empty(config.hidden_size, config.rank))
        self.register_buffer("z", torch.empty(config.draws, config.factors))
        self.register_buffer("eps", torch.empty(config.draws, config.rank))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator, scale: float = 0.02) -> ResidualHead:
        """Random weights, an orthonormal basis and standard normal draws."""
        for linear in (self.up, self.down):
            nn.init.normal_(linear.weight, std=scale, generator=generator)
            nn.init.zeros_(linear.bias)
        if self.config.scaled:
            nn.init.zeros_(self.divergence.weight)
            nn.init.constant_(self.divergence.bias, -1.8)  # softplus of it is 0.15 nats
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
        x = network_inputs([h_Td, *taps], confidence_T4, self.up.weight.dtype)
        hidden = F.silu(self.up(x))
        kl_T = kl_of(self.divergence(hidden)) if self.config.scaled else None
        return moves_of(self.config, self.down(hidden), kl_T)

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
        if moves.kl_T is None:
            return drawn_KTr
        return drawn_KTr * draw_scale(drawn_KTr, moves.kl_T, directions_Vr, logits_TV).unsqueeze(-1)

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
