"""A rival that gives no drafts: a small network regressed straight onto EU*.

    python benchmarks/eu_probe.py benchmarks/drafts/residual.yaml

It reads what residual drafts read (the target's final and inner hidden states, and how sure the
target is), on the same texts, and learns EU* as the same kept draws of the posterior show it, by
least squares. Writes probe.safetensors into the folder of the runs.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from drafts.residual import N_CONFIDENCE
from osd.config import ResidualDrafts, read_config
from osd.states import Clean, KeptStates
from osd.teacher import Batch, collate
from osd.trainer import Run

WIDTH, EPOCHS, ROWS, RATE = 512, 3, 512, 1e-3


class Probe(nn.Module):
    """EU* [T] from hidden states and confidence."""

    def __init__(self, hidden_size: int, layers: list[int]) -> None:
        super().__init__()
        self.layers = layers
        self.up = nn.Linear(hidden_size * (1 + len(layers)) + N_CONFIDENCE, WIDTH)
        self.down = nn.Linear(WIDTH, 1)
        nn.init.constant_(self.down.bias, -1.8)  # softplus of it is 0.15

    def forward(self, x_TX: Tensor) -> Tensor:
        return F.softplus(self.down(F.silu(self.up(x_TX)))).squeeze(-1)


def inputs(clean: Clean, batch: Batch) -> Tensor:
    """What the probe reads, [T, X]."""
    states = [clean.h_Td, *(batch.rows(state) for _, state in sorted(clean.states.items()))]
    normed = [F.rms_norm(state.float(), state.shape[-1:]) for state in states]
    return torch.cat([*normed, clean.confidence_T4], dim=-1)


def load_probe(file: Path) -> Probe:
    """A trained probe."""
    weights = load_file(file)
    layers = weights.pop("layers").tolist()
    hidden_size = (weights["up.weight"].shape[1] - N_CONFIDENCE) // (1 + len(layers))
    probe = Probe(hidden_size, layers)
    probe.load_state_dict(weights)
    return probe.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="of residual drafts, with draws_per_text")
    config = read_config(parser.parse_args().config)
    assert isinstance(config.drafts, ResidualDrafts)
    run = Run(config)
    assert isinstance(run.states, KeptStates)
    out = config.run.parent / "probe.safetensors"
    features, targets = [], []
    texts = [text for shard in run.texts for text in shard]
    groups = [texts[i : i + 8] for i in range(0, len(texts), 8)]
    for group in tqdm(groups, desc="EU* of the draws", unit="batch"):
        batch = collate(group, config.max_tokens)
        clean = run.states.clean(group, batch)
        targets.append(run.states.eu(group, batch))
        features.append(inputs(clean, batch).bfloat16())
    x_TX, y_T = torch.cat(features), torch.cat(targets)
    torch.manual_seed(config.seed)
    layers = config.drafts.layers
    probe = Probe(run.teacher.head_Vd.shape[1], layers)
    fit(probe, x_TX, y_T)
    save_file(probe.state_dict() | {"layers": torch.tensor(layers)}, out)
    print(f"wrote {out}")


def fit(probe: Probe, x_TX: Tensor, y_T: Tensor) -> None:
    """Least squares by AdamW with a cosine."""
    optimiser = torch.optim.AdamW(probe.parameters(), lr=RATE, weight_decay=0.1, betas=(0.9, 0.95))
    steps = EPOCHS * (len(y_T) // ROWS)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: (
            min(1, (step + 1) / 50) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))
        ),
    )
    with tqdm(total=steps, desc="probe", unit="step") as bar:
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(y_T)).split(ROWS)[: len(y_T) // ROWS]:
                loss = (probe(x_TX[rows].float()) - y_T[rows]).square().mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                bar.set_postfix(loss=f"{loss.item():.5f}")
                bar.update()


if __name__ == "__main__":
    main()
