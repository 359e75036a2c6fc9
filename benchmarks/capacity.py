"""What fits on a machine, and how fast it goes: arithmetic from published shapes, no measurement.

    python benchmarks/capacity.py                       # the tables of docs/scaling.md
    python benchmarks/capacity.py --stock 20000         # tokens/s, where stock vLLM does so many

Shapes are those of the models' config.json on the Hugging Face hub. Operations are counted as
`drafts.cost` does for `make bench`, whose measured ratio over counted operations goes into the
estimates. Nothing here was run on a GPU.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from drafts import channel
from drafts.cost import head_cost, layers_cost, student_cost, unit
from drafts.divergence import block_rows
from drafts.residual import N_CONFIDENCE, ResidualConfig

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
# Of an H100 80 GB: 81559 MiB; how much of it vLLM takes; and, assumed, what is neither weights nor
# keys and values nor logits: the CUDA context, activations, NCCL's buffers.
DEVICE_GIB, TAKEN, OTHER_GIB = 79.6, 0.9, 3.0
BYTES = 2  # bfloat16
STEP_TOKENS = 8192  # max_num_batched_tokens
CONTEXT = 4096  # tokens of a request, for how many run at once
DRAFTS = 4
LOGIT_ROWS = 128  # of `drafts.vllm_model`, at once
SLOTS = 2  # versions of residual drafts that are in memory


@dataclass(frozen=True)
class Shape:
    """A Llama, as its config.json has it."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    tied: bool
    vocab_size: int = 128256

    @property
    def parameters(self) -> float:
        """Layers, embedding, head (if it is not the embedding), norms."""
        tables = (1 if self.tied else 2) * self.vocab_size * self.hidden_size
        norms = (2 * self.num_hidden_layers + 1) * self.hidden_size
        return layers_cost(self) + tables + norms

    @property
    def kv_bytes(self) -> int:
        """Of a token."""
        heads = self.num_key_value_heads * self.head_dim
        return 2 * self.num_hidden_layers * heads * BYTES


LLAMA_8B = Shape("Llama-3.1-8B", 4096, 14336, 32, 32, 8, 128, tied=False)
LLAMA_70B = Shape("Llama-3.1-70B", 8192, 28672, 80, 64, 8, 128, tied=False)
LLAMA_1B = Shape("Llama-3.2-1B", 2048, 8192, 16, 32, 8, 64, tied=True)


@dataclass(frozen=True)
class Plan:
    """A target, four drafts and the devices that share them (tensor parallel)."""

    target: Shape
    devices: int
    draft: Shape | ResidualConfig

    @property
    def name(self) -> str:
        drafts = self.draft.name if isinstance(self.draft, Shape) else "`residual`"
        machine = f"{self.devices} × H100" if self.devices > 1 else "one H100"
        return f"{self.target.name} + {DRAFTS} × {drafts}, {machine}"

    @property
    def target_gib(self) -> float:
        """On each device."""
        return self.target.parameters * BYTES / self.devices / GIB

    @property
    def drafts_gib(self) -> float:
        """On each device; residual students are whole on each."""
        if isinstance(self.draft, Shape):
            return DRAFTS * self.draft.parameters * BYTES / self.devices / GIB
        return SLOTS * DRAFTS * student_parameters(self.draft) * BYTES / GIB

    @property
    def kv_kib(self) -> float:
        """Of a token, on each device."""
        drafts = DRAFTS * self.draft.kv_bytes if isinstance(self.draft, Shape) else 0
        return (self.target.kv_bytes + drafts) / self.devices / 1024

    @property
    def logits_gib(self) -> float:
        """Of a step that scores prompts, on each device: logits are whole on each."""
        vocab = self.target.vocab_size
        rows = STEP_TOKENS * (vocab + channel.M) * 4  # what the model returns
        ranks = STEP_TOKENS * vocab  # a comparison of each, one byte
        heads = LOGIT_ROWS * vocab * ((1 + DRAFTS) * BYTES + 4)
        at_once = min(LOGIT_ROWS, block_rows(DRAFTS * vocab, torch.device("cuda")))
        block = DRAFTS * at_once * vocab * 4
        return (rows + ranks + heads + block) / GIB

    @property
    def room_gib(self) -> float:
        """For keys and values, on each device."""
        return DEVICE_GIB * TAKEN - OTHER_GIB - self.target_gib - self.drafts_gib - self.logits_gib

    @property
    def kv_tokens(self) -> float:
        """Tokens whose keys and values fit."""
        return self.room_gib * 2**20 / self.kv_kib

    @property
    def operations(self) -> float:
        """Of a measured token, the target's alone being 1."""
        vocab = self.target.vocab_size
        if isinstance(self.draft, Shape):
            added = DRAFTS * unit(self.draft)
        else:
            student = student_cost(self.draft, 1) + 2 * vocab
            added = DRAFTS * (student + head_cost(self.target))
        return 1 + added / unit(self.target)

    @property
    def weights_read(self) -> float:
        """Bytes of weights of a step, the target's alone being 1."""
        if isinstance(self.draft, Shape):
            drafts = self.draft.parameters
        else:  # all go through the target's head at once, a second time
            drafts = student_parameters(self.draft) + head_cost(self.target) / DRAFTS
        return 1 + DRAFTS * drafts / self.target.parameters


def student_parameters(config: ResidualConfig) -> float:
    """Of a residual student with one draw; its basis is stored, too."""
    inputs = config.hidden_size * (1 + len(config.taps)) + N_CONFIDENCE
    outputs = config.rank * (config.factors + 2) + 1
    return float(config.width * (inputs + outputs) + config.hidden_size * config.rank)


def residual(target: Shape) -> ResidualConfig:
    """A student of the default's shape on another target."""
    return ResidualConfig(
        hidden_size=target.hidden_size,
        taps=[1, 2, 3, 4, 5],  # five of them, wherever they are
        rank=256,
        factors=8,
        width=384,
        draws=1,
    )


PLANS = [
    Plan(LLAMA_8B, 1, LLAMA_1B),
    Plan(LLAMA_8B, 1, residual(LLAMA_8B)),
    Plan(LLAMA_70B, 8, LLAMA_1B),
    Plan(LLAMA_70B, 8, residual(LLAMA_70B)),
]


def over_operations() -> tuple[float, float]:
    """Measured slowdown over that of counted operations: of scoring, of 32 generated streams.

    Scoring is held against stock vLLM, generating against demur without uncertainty: on the CPU of
    the benchmark that was itself faster than stock, by settings that mean nothing on a GPU.
    """
    score = json.loads((RESULTS / "score_throughput.json").read_text())
    stream = json.loads((RESULTS / "generate_throughput.json").read_text())["ratios"]["32"]
    slower = stream["plain_over_stock"] / stream["uncertainty_over_stock"]
    return (
        score["ratios"]["b_over_a"] / score["flop_ratio"]["ensemble_over_target"],
        slower / stream["operations_ensemble_over_target"],
    )


def tables(stock: float | None = None) -> str:
    """Markdown.

    Args:
        stock: tokens/s of stock vLLM with the target alone, as measured by the reader.
    """
    return "\n".join([*_memory(), "", *_speed(stock)])


def _memory() -> list[str]:
    lines = [
        "| GiB on each device | target | drafts | logits of a step | left for KV | KV of a token, "
        f"KiB | tokens that fit | requests of {CONTEXT} tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for plan in PLANS:
        figures = [
            f"{plan.target_gib:.1f}",
            f"{plan.drafts_gib:.1f}",
            f"{plan.logits_gib:.1f}",
            f"{plan.room_gib:.1f}",
            f"{plan.kv_kib:.0f}",
            f"{plan.kv_tokens:,.0f}",
            f"{plan.kv_tokens / CONTEXT:.0f}",
        ]
        lines.append(f"| {plan.name} | {' | '.join(figures)} |")
    return lines


def _speed(stock: float | None) -> list[str]:
    scoring, generating = over_operations()
    what = "share of stock vLLM's tokens/s" if stock is None else "tokens/s"
    lines = [
        f"| {what} | operations of a token | scoring | generating, large batch | weights that a "
        "step reads | generating, small batch |",
        "|---|---|---|---|---|---|",
    ]
    for plan in PLANS:
        shares = [
            1 / plan.operations / scoring,
            1 / plan.operations / generating,
            1 / plan.weights_read / generating,
        ]
        said = [f"{x:.2f}" if stock is None else f"{x * stock:,.0f}" for x in shares]
        lines.append(
            f"| {plan.name} | × {plan.operations:.2f} | {said[0]} | {said[1]} | "
            f"× {plan.weights_read:.2f} | {said[2]} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stock", type=float, help="measured tokens/s of stock vLLM, same machine")
    print(tables(parser.parse_args().stock))


if __name__ == "__main__":
    main()
