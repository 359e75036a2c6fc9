"""A posterior over the target's weights: low-rank Gaussian noise on some of its matrices.

TokUR's posterior (arXiv 2505.11737, Alg. 1 and eq. 16-18; modules as in its released code):

    W = W_0 + U_r eps^T,   eps [in, r] ~ N(0, sigma^2),   U_r = first r left singular vectors

for each q_proj and v_proj. A draw gives a member p_theta of the target's posterior; the mean over
draws is the posterior mean p_T, and EU* = E KL(p_theta || p_T) is what estimators are measured
against.

    posterior = WeightPosterior(model, PosteriorConfig(), cache=folder)
    with posterior.sampled(seed=3):
        model(...)                       # one theta for all that runs here: our reference
    tokur_states(model, posterior, ids, samples=5, seed=3)      # TokUR's own protocol
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm


class PosteriorConfig(BaseModel):
    """Which weights vary and how much."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(default=8, gt=0, description="r, directions in which each matrix moves")
    sigma: float = Field(default=0.1, ge=0, description="standard deviation of each coefficient")
    modules: tuple[str, ...] = Field(
        default=("q_proj", "v_proj"), min_length=1, description="last part of the modules' names"
    )


class WeightPosterior:
    """The posterior of one transformers model.

    Args:
        model: its selected modules must be `nn.Linear`.
        config: rank, sigma and modules.
        cache: folder where singular vectors are kept, by a hash of the weights.

    Raises:
        ValueError: if no module is selected, or one has fewer directions than the rank.
    """

    def __init__(self, model: Any, config: PosteriorConfig, cache: Path | None = None) -> None:
        self.config = config
        self.layers: dict[str, nn.Linear] = {
            name: module
            for name, module in model.named_modules()
            if name.rpartition(".")[2] in config.modules and isinstance(module, nn.Linear)
        }
        if not self.layers:
            raise ValueError(f"the model has no linear layers named {', '.join(config.modules)}")
        for name, layer in self.layers.items():
            if min(layer.weight.shape) < config.rank:
                raise ValueError(
                    f"{name} is {list(layer.weight.shape)}, too small for rank {config.rank}"
                )
        self.bases = _bases(self.layers, config.rank, cache)
        self._saved: dict[str, Tensor] | None = None

    @contextmanager
    def sampled(self, seed: int) -> Iterator[None]:
        """Hold the model at one draw; afterwards its weights are what they were, bit for bit.

        The same seed gives the same draw on every device. Draws do not nest.
        """
        if self._saved is not None:
            raise RuntimeError("the model is at a draw of its posterior already")
        generator = torch.Generator().manual_seed(seed)
        self._saved = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
        try:
            with torch.no_grad():
                for name, layer in self.layers.items():
                    eps = torch.randn(layer.in_features, self.config.rank, generator=generator)
                    # U eps^T in float32 and rounded once, whatever the model's dtype is.
                    move = self.bases[name] @ (self.config.sigma * eps).to(layer.weight.device).T
                    layer.weight.copy_(self._saved[name].float() + move)
            yield
        finally:
            with torch.no_grad():
                for name, layer in self.layers.items():
                    layer.weight.copy_(self._saved[name])
            self._saved = None

    @contextmanager
    def token_noise(self, seed: int) -> Iterator[None]:
        """Perturb each token by noise of its own: y = W_0 x + sigma ||x|| xi U_r^T, xi ~ N(0, I_r).

        For one token this has the distribution of `sampled`; between tokens it is independent
        (TokUR's released layer, `LowRankBayesianLinear`).
        """
        generator = torch.Generator().manual_seed(seed)
        sigma, rank = self.config.sigma, self.config.rank

        def hook_of(basis: Tensor) -> Any:
            def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
                (x,) = inputs
                xi = torch.randn(*x.shape[:-1], rank, generator=generator).to(x.device)
                norm = x.float().norm(dim=-1, keepdim=True)
                noisy: Tensor = output + (sigma * norm * xi @ basis.T).to(output.dtype)
                return noisy

            return hook

        with ExitStack() as stack:
            for name, layer in self.layers.items():
                handle = layer.register_forward_hook(hook_of(self.bases[name]))
                stack.callback(handle.remove)
            yield


@torch.no_grad()
def tokur_states(
    model: Any,
    posterior: WeightPosterior,
    token_ids: list[int],
    samples: int,
    seed: int,
    first: int = 0,
) -> Tensor:
    """Final hidden states of TokUR's samples from token `first` on, shape [M, T - first, d]; the
    first sample is unperturbed.

    As decoding with TokUR's released code: a perturbed token sees the clean keys and values of all
    that stands before it, and its own perturbed ones. Here all tokens of a text go at once: with
    the clean pass's cache as past, row t attends to places < t of it and to itself.
    """
    from transformers import DynamicCache

    ids = torch.tensor([token_ids], device=model.device)
    n_tokens = ids.shape[1]
    cache = DynamicCache(config=model.config)
    clean = model.base_model(ids, past_key_values=cache, use_cache=True).last_hidden_state[0]
    states = [clean[first:]]
    past = torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=ids.device).tril(-1)
    own = torch.eye(n_tokens - first, dtype=torch.bool, device=ids.device)
    allowed = torch.cat([past[first:], own], dim=1)
    mask = torch.zeros(allowed.shape, dtype=model.dtype, device=ids.device)
    mask.masked_fill_(~allowed, torch.finfo(model.dtype).min)
    for sample in range(1, samples):
        with posterior.token_noise(seed + sample):
            out = model.base_model(
                ids[:, first:],
                past_key_values=cache,
                use_cache=True,
                attention_mask=mask[None, None],
                position_ids=torch.arange(first, n_tokens, device=ids.device)[None],
            )
        cache.crop(first - n_tokens)
        states.append(out.last_hidden_state[0])
    return torch.stack(states)


def _bases(layers: dict[str, nn.Linear], rank: int, cache: Path | None) -> dict[str, Tensor]:
    """U_r [out, r] of each layer, float32, on the layer's device."""
    file = None if cache is None else cache / f"svd-{_fingerprint(layers, rank)}.safetensors"
    bases = None if file is None else _read(file, layers, rank)
    if bases is None:
        bases = {
            name: torch.linalg.svd(layer.weight.detach().float(), full_matrices=False)[0][:, :rank]
            for name, layer in tqdm(layers.items(), desc="singular vectors", unit="matrix")
        }
        bases = {name: basis.contiguous().cpu() for name, basis in bases.items()}
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".{os.getpid()}.partial")
            save_file(bases, partial)
            partial.rename(file)
    return {name: bases[name].to(layer.weight.device) for name, layer in layers.items()}


def _read(file: Path, layers: dict[str, nn.Linear], rank: int) -> dict[str, Tensor] | None:
    """What the cache holds, or None if that cannot be used."""
    if not file.exists():
        return None
    try:
        bases = load_file(file)
    except SafetensorError:
        return None
    shapes = {name: (layer.out_features, rank) for name, layer in layers.items()}
    return bases if {name: tuple(b.shape) for name, b in bases.items()} == shapes else None


def _fingerprint(layers: dict[str, nn.Linear], rank: int) -> str:
    digest = hashlib.sha256(f"rank {rank}".encode())
    for name, layer in layers.items():
        weight = layer.weight.detach().float().cpu().contiguous()
        digest.update(name.encode())
        digest.update(weight.numpy().tobytes())
    return digest.hexdigest()[:32]
