"""The arithmetic of docs/scaling.md is what benchmarks/capacity.py computes."""

from __future__ import annotations

import re
from pathlib import Path

import capacity
import pytest
from transformers import AutoModelForCausalLM, LlamaConfig


def test_the_page_has_the_computed_tables() -> None:
    page = Path("docs/scaling.md").read_text()
    written = re.findall(r"<!-- capacity: \w+ -->\n(.*?)<!-- end -->", page, re.DOTALL)
    assert "\n".join(written) == capacity.tables() + "\n"


@pytest.mark.parametrize(
    "shape, published",
    [
        (capacity.LLAMA_8B, 8_030_261_248),
        (capacity.LLAMA_70B, 70_553_706_496),
        (capacity.LLAMA_1B, 1_235_814_400),
    ],
)
def test_shapes_have_the_published_numbers_of_parameters(
    shape: capacity.Shape, published: int
) -> None:
    assert shape.parameters == published


def test_parameters_are_counted_as_transformers_has_them() -> None:
    shape = capacity.Shape("tiny", 64, 128, 2, 4, 2, 16, tied=True, vocab_size=320)
    sizes = {name: value for name, value in vars(shape).items() if name not in ("name", "tied")}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, tie_word_embeddings=True))
    assert shape.parameters == sum(tensor.numel() for tensor in model.parameters())
