"""A rival that gives no drafts: a small network regressed straight onto EU*.

    python benchmarks/eu_probe.py benchmarks/drafts/residual.yaml

It reads what residual drafts read (the target's final and inner hidden states, and how sure the
target is), on the same texts, and learns EU* as the same kept draws of the posterior show it, by
least squares, in as many passes over its texts as the default's students make. One sees all texts,
four others a shard each, as those students do. Writes them into `probes/` beside the run.
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

from drafts.manifest import resolve_source
from drafts.residual import N_CONFIDENCE
from osd.build import load_teacher, shards, split
from osd.config import ResidualDrafts, read_config
from osd.corpus import Corpus, Text
from osd.schedule import derived_seed
from osd.states import Clean, KeptStates
from osd.teacher import Batch, collate

WIDTH, EPOCHS, ROWS, RATE = 512, 6, 512, 1e-3


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
    assert config.draws_per_text is not None
    teacher = load_teacher(config, resolve_source(Path.cwd(), config.target, config.revision))
    texts = Corpus(config.corpus).read(teacher.model.config.vocab_size)
    usable = [text for text in texts if text.response_start < config.max_tokens]
    _, training = split(usable, config.held_out)
    layers = config.drafts.layers
    states = KeptStates(
        teacher,
        training,
        layers=layers,
        draws=config.draws_per_text,
        max_tokens=config.max_tokens,
        seed=config.seed,
        folder=config.run.parent,
    )
    parts = [
        shown(states, shard, config.max_tokens)
        for shard in tqdm(shards(training, config.drafts.students), desc="states", unit="shard")
    ]
    everything = tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))
    out = config.run.parent / "probes"
    out.mkdir(exist_ok=True)
    for name, (x_TX, y_T) in [
        ("all", everything),
        *((f"shard-{number}", part) for number, part in enumerate(parts)),
    ]:
        torch.manual_seed(derived_seed(config.seed, "probe", name))
        probe = Probe(teacher.head_Vd.shape[1], layers)
        fit(probe, x_TX, y_T)
        file = out / f"{name}.safetensors"
        save_file(probe.state_dict() | {"layers": torch.tensor(layers)}, file)
        print(f"wrote {file}")


def shown(states: KeptStates, texts: list[Text], max_tokens: int) -> tuple[Tensor, Tensor]:
    """Inputs [T, X] and EU* as the kept draws show it [T], of all response tokens."""
    features, targets = [], []
    for start in range(0, len(texts), 8):
        group = texts[start : start + 8]
        batch = collate(group, max_tokens)
        features.append(inputs(states.clean(group, batch), batch).bfloat16())
        targets.append(states.eu(group, batch))
    return torch.cat(features), torch.cat(targets)


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
