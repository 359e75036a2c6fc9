"""Tiny random checkpoints, tokenizers and ensembles, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from drafts.exits import copy_exit
from drafts.init import write_manifest
from drafts.residual import ResidualConfig, ResidualHead

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "The capital of Japan is Tokyo. The capital of France is Paris.",
    "4 shirts cost 4 * 15 = 60 dollars. She gets 100 - 60 = 40 dollars.",
    "Ein kurzer Satz, damit es auch andere Buchstaben gibt.",
]


def byte_level_tokenizer() -> Tokenizer:
    """GPT-2's kind: every byte has a symbol, so every text has tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_fallback_tokenizer() -> Tokenizer:
    """SentencePiece's kind (Llama 2): spaces as a symbol, unknown characters as <0x..> bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,"]
    merges = [("\u2581", "t"), ("\u2581t", "h"), ("\u2581th", "e")]
    pieces += ["\u2581t", "\u2581th", "\u2581the"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def save_tokenizer(folder: Path, tokenizer: Tokenizer, bos: str = "<|im_start|>") -> None:
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, chat_template=TEMPLATE
    ).save_pretrained(folder)


def save_lm(folder: Path, seed: int, architecture: str = "llama", **changes: Any) -> Path:
    """A random causal language model with its tokenizer."""
    settings: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,  # heads of 32, the smallest that vLLM takes on a CPU
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        # Large weights: distributions that differ clearly between members and positions.
        "initializer_range": 0.15,
        **changes,
    }
    config = (LlamaConfig if architecture == "llama" else Qwen2Config)(**settings)
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    perturb(folder, seed)
    save_tokenizer(folder, byte_level_tokenizer())
    return folder


def save_residual(folder: Path, seed: int, config: ResidualConfig, scale: float = 0.3) -> Path:
    """A random residual head."""
    folder.mkdir(parents=True)
    head = ResidualHead(config).initialise(torch.Generator().manual_seed(seed), scale)
    (folder / "config.json").write_text(config.model_dump_json())
    save_file(head.state_dict(), folder / "model.safetensors")
    return folder


def perturb(folder: Path, seed: int, scale: float = 0.3) -> None:
    """Change a checkpoint's weights, so that a copied draft is one of its own."""
    file = folder / "model.safetensors"
    torch.manual_seed(seed)
    weights = {
        # Constant tensors (norms of ones, biases of zero) get noise as well.
        name: tensor + scale * max(float(tensor.std(correction=0)), 0.1) * torch.randn_like(tensor)
        for name, tensor in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})


def mixed_ensemble(
    folder: Path, seed: int = 0, architecture: str = "llama", version: str = "v1", **changes: Any
) -> Path:
    """All three kinds of draft, of different depth and width, in one ensemble."""
    target = folder.parent / f"target-{architecture}"
    if not target.exists():
        save_lm(target, 1, architecture, **changes)
    folder.mkdir(parents=True)
    drafts: list[dict[str, object]] = [
        copy_exit(target, folder / "exit_a", own_layers=1, layer=2),
        copy_exit(target, folder / "exit_b", own_layers=2, layer=1),
    ]
    for draft in drafts:
        perturb(folder / str(draft["source"]), seed + len(str(draft["name"])))
    width = {"hidden_size": 32, "num_attention_heads": 1, "num_key_value_heads": 1}
    for name, layers in (("model_a", 2), ("model_b", 3)):
        save_lm(folder / name, seed + 10 * layers, architecture, **width, num_hidden_layers=layers)
        drafts.append({"name": name, "kind": "model", "source": name})
    config = ResidualConfig(hidden_size=64, taps=[1, 3], rank=16, factors=4, width=32, draws=4)
    save_residual(folder / "student", seed + 5, config)
    drafts += [
        {"name": f"residual_{letter}", "kind": "residual", "source": "student", "draw": draw}
        for letter, draw in (("a", 0), ("b", 3))
    ]
    write_manifest(folder, f"tiny-{architecture}", version, str(target), drafts)
    return folder


def edit_manifest(folder: Path, **changes: Any) -> None:
    file = folder / "demur.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
