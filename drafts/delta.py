"""A checkpoint as its low-rank difference from another: what shipped `exit` drafts are made of.

    W = W_0 + B A    for each matrix that training changed; other changed tensors are kept whole

An `exit` draft starts as a copy of the target's last layers, which every machine has, so only what
training added travels.
"""

from __future__ import annotations

import torch
from torch import Tensor

Weights = dict[str, Tensor]

_A, _B, _WHOLE = ".delta_a", ".delta_b", ".whole"


def split_delta(start: Weights, trained: Weights, rank: int) -> Weights:
    """The difference, bfloat16, each matrix cut to its `rank` greatest directions.

    Nothing but rounding is lost where training was of that rank itself.
    """
    delta: Weights = {}
    for name, tensor in trained.items():
        move = tensor.float() - start[name].float()
        if not bool(move.any()):
            continue
        if tensor.ndim != 2:
            delta[name + _WHOLE] = tensor.bfloat16()
            continue
        u, s, vh = torch.linalg.svd(move, full_matrices=False)
        root = s[:rank].sqrt()
        delta[name + _B] = (u[:, :rank] * root).bfloat16().contiguous()
        delta[name + _A] = (root[:, None] * vh[:rank]).bfloat16().contiguous()
    return delta


def apply_delta(start: Weights, delta: Weights) -> Weights:
    """What `split_delta` was taken from, in the dtypes of `start`.

    Raises:
        KeyError: if the difference is of another checkpoint.
    """
    trained = dict(start)
    for key, tensor in delta.items():
        if key.endswith(_WHOLE):
            name = key.removesuffix(_WHOLE)
            trained[name] = tensor.to(start[name].dtype)
        elif key.endswith(_B):
            name = key.removesuffix(_B)
            move = tensor.float() @ delta[name + _A].float()
            trained[name] = (start[name].float() + move).to(start[name].dtype)
    return trained
