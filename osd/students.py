"""What is trained: a student of each kind of draft, behind one small interface.

A student reads some of the target's hidden states, gives a loss against teachers' final hidden
states, and the final states [T, d] (with the LM head above them) of the drafts made of it.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from drafts.residual import ResidualConfig, ResidualHead
from osd.config import ExitDrafts, ModelDrafts, ResidualDrafts
from osd.objectives import (
    MoveBasis,
    Student,
    eu_mismatch,
    forward_kl,
    latent_factor_nll,
    sampled_eu,
)
from osd.precision import bfloat16_products
from osd.states import Clean
from osd.teacher import Batch

_ROWS = 128  # whose logits are held at once


class Lesson(NamedTuple):
    """What a step shows a student: T rows of a batch and what a teacher made of them."""

    batch: Batch
    clean: Clean
    teacher_MTd: Tensor  # final states of M teachers
    chosen: Tensor  # rows on which divergences over the vocabulary are taken
    eu_T: Tensor | None = None  # EU* of all rows as draws show it, where that is kept


class Trainee(Protocol):
    """A student as the trainer sees it."""

    @property
    def module(self) -> nn.Module: ...

    def loss(self, lesson: Lesson) -> Tensor:
        """What a step minimises, a mean over tokens."""
        ...

    def drafts(self, batch: Batch, clean: Clean) -> list[Student]:
        """Final states and LM head of each draft that the student gives."""
        ...

    def save(self, folder: Path) -> list[dict[str, object]]:
        """Write the finished weights; return what a manifest says of its drafts, without names."""
        ...


class ResidualStudent:
    """Learns where draws of the posterior move the target's final hidden state.

    Args:
        config: how it is trained.
        head: what is trained.
        into_dr: coordinates of moves of the hidden state (`osd.objectives.MoveBasis`).
        listed: which of its draws are drafts; None: all.
    """

    def __init__(
        self,
        config: ResidualDrafts,
        head: ResidualHead,
        into_dr: Tensor,
        head_Vd: Tensor,
        dtype: torch.dtype,
        listed: list[int] | None = None,
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.head = head
        self.head_Vd = head_Vd
        self.layers = list(head.config.taps)
        self.listed = list(range(config.draws)) if listed is None else listed
        self.module = _InCoordinates(head, into_dr).to(head_Vd.device)
        self._directions: tuple[int, Tensor] | None = None

    @classmethod
    def new(
        cls,
        config: ResidualDrafts,
        head_Vd: Tensor,
        basis: MoveBasis,
        dtype: torch.dtype,
        seed: int,
        places: tuple[Tensor, Tensor],
    ) -> ResidualStudent:
        """One that has learned nothing."""
        shape = ResidualConfig(
            hidden_size=head_Vd.shape[1],
            taps=config.layers,
            rank=config.rank,
            factors=config.factors,
            width=config.width,
            draws=config.draws,
            scaled=config.match > 0,
        )
        head = ResidualHead(shape).initialise(torch.Generator().manual_seed(seed))
        z, eps = places
        with torch.no_grad():
            head.basis.copy_(basis.basis_dr)
            head.z.copy_(z)
            head.eps.copy_(eps)
        return cls(config, head, basis.into_dr, head_Vd, dtype)

    def directions(self) -> Tensor:
        """What a move does to logits; made again when a checkpoint has changed the basis."""
        version = self.head.basis._version
        if self._directions is None or self._directions[0] != version:
            self._directions = version, self.head_Vd @ self.head.basis
        return self._directions[1]

    def loss(self, lesson: Lesson) -> Tensor:
        batch, clean, teacher_MTd, chosen, eu_T = lesson
        h = clean.h_Td
        moves = self.head.moves(h, self._taps(batch, clean), clean.confidence_T4)
        group = batch.text_T if self.config.shared_z else None
        m_MTr = (teacher_MTd - h) @ self.module.into_dr
        loss = latent_factor_nll(moves, m_MTr, group) / self.config.rank
        if moves.kl_T is None:
            return loss
        estimate_T = moves.kl_T
        if eu_T is None:
            with bfloat16_products(self.dtype == torch.bfloat16):
                eu_T = sampled_eu(teacher_MTd[:, chosen], self.head_Vd)
            estimate_T = estimate_T[chosen]
        return loss + self.config.match * eu_mismatch(estimate_T, eu_T)

    def drafts(self, batch: Batch, clean: Clean) -> list[Student]:
        taps = self._taps(batch, clean)
        blocks = []
        for start in range(0, len(clean.h_Td), _ROWS):
            rows = slice(start, start + _ROWS)
            h, inner = clean.h_Td[rows], [tap[rows] for tap in taps]
            logits_TV = F.linear(h, self.head_Vd)
            blocks.append(self.head(h, inner, logits_TV, self.directions(), self.listed))
        moved = [torch.cat(parts) for parts in zip(*blocks, strict=True)]
        return [Student(state, self.head_Vd) for state in moved]

    def save(self, folder: Path) -> list[dict[str, object]]:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(self.head.config.model_dump_json(indent=1))
        weights = {
            name: tensor.cpu().contiguous() for name, tensor in self.head.state_dict().items()
        }
        save_file(weights, folder / "model.safetensors")
        return [
            {"kind": "residual", "source": folder.name, "draw": draw}
            for draw in range(self.config.draws)
        ]

    def _taps(self, batch: Batch, clean: Clean) -> list[Tensor]:
        return [batch.rows(clean.states[layer]) for layer in self.layers]


class _InCoordinates(nn.Module):
    """A head, and the coordinates that it learns in: a checkpoint holds both, for they belong
    together and another machine may find the same directions in another order."""

    into_dr: Tensor

    def __init__(self, head: ResidualHead, into_dr: Tensor) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("into_dr", into_dr)


def places_of(
    students: int, draws: int, factors: int, rank: int, generator: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """z [draws, q] and eps [draws, r] of each student.

    Dealt out in turn: one draw of each student, then a second, are in the order of `quadrature`.
    """
    z, eps = quadrature(students * draws, factors, rank, generator)
    return [(z[number::students], eps[number::students]) for number in range(students)]


def quadrature(
    draws: int, factors: int, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draws (z [n, q], eps [n, r]) of N(0, I) whose first two moments are nearly exact for small n.

    In opposite pairs, so odd moments vanish; signs for eps, so that each coordinate's variance is
    exactly 1; rows of z orthogonal and of length sqrt(q) as far as they go. What drafts cost grows
    with their number: few, well placed draws give the mean KL with less noise than random ones.
    """
    pairs = (draws + 1) // 2
    z = torch.randn(pairs, factors, generator=generator)
    for start in range(0, pairs, factors):
        block = z[start : start + factors]
        block.copy_(torch.linalg.qr(block.T).Q.T * factors**0.5)
    eps = torch.randint(0, 2, (pairs, rank), generator=generator).float() * 2 - 1
    both = [torch.stack([half, -half], dim=1).flatten(0, 1)[:draws] for half in (z, eps)]
    return both[0], both[1]


class ExitStudent:
    """Own layers on the target's hidden state, under the target's LM head."""

    def __init__(
        self, config: ExitDrafts, folder: Path, head_Vd: Tensor, dtype: torch.dtype, seed: int
    ) -> None:
        self.config = config
        self.folder = folder
        self.head_Vd = head_Vd
        self.dtype = dtype
        model = _load_exit(folder)
        self.module = _trainable(model, config.lora_rank, seed).to(head_Vd.device)

    def loss(self, lesson: Lesson) -> Tensor:
        h_Td, head_Vd = self._student(lesson.batch, lesson.clean)
        (teacher_Td,) = lesson.teacher_MTd
        chosen = lesson.chosen
        with bfloat16_products(self.dtype == torch.bfloat16):
            return forward_kl(Student(h_Td[chosen], head_Vd), teacher_Td[chosen], self.head_Vd)

    def drafts(self, batch: Batch, clean: Clean) -> list[Student]:
        return [self._student(batch, clean)]

    def save(self, folder: Path) -> list[dict[str, object]]:
        _save(self.module, self.folder, folder)
        return [{"kind": "exit", "source": folder.name, "layer": self.config.layer}]

    def _student(self, batch: Batch, clean: Clean) -> Student:
        with _compute(self.dtype, self.head_Vd.device):
            out = _base(self.module)(
                inputs_embeds=clean.states[self.config.layer], attention_mask=batch.mask_BL
            )
        return Student(batch.rows(out.last_hidden_state).to(self.head_Vd.dtype), self.head_Vd)


class ModelStudent:
    """An independent small language model."""

    def __init__(
        self,
        config: ModelDrafts,
        folder: Path,
        teacher_head_Vd: Tensor,
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        self.folder = folder
        self.teacher_head_Vd = teacher_head_Vd
        self.dtype = dtype
        self.module = _trainable(_load(folder), config.lora_rank, seed).to(teacher_head_Vd.device)

    def loss(self, lesson: Lesson) -> Tensor:
        ((h_Td, head_Vd),) = self.drafts(lesson.batch, lesson.clean)
        (teacher_Td,) = lesson.teacher_MTd
        chosen = lesson.chosen
        student = Student(h_Td[chosen], head_Vd)
        with bfloat16_products(self.dtype == torch.bfloat16):
            return forward_kl(student, teacher_Td[chosen], self.teacher_head_Vd)

    def drafts(self, batch: Batch, clean: Clean) -> list[Student]:
        with _compute(self.dtype, self.teacher_head_Vd.device):
            out = _base(self.module)(batch.ids_BL, attention_mask=batch.mask_BL)
        head = self.module.get_output_embeddings().weight
        return [Student(batch.rows(out.last_hidden_state).to(head.dtype), head)]

    def save(self, folder: Path) -> list[dict[str, object]]:
        _save(self.module, self.folder, folder)
        for file in self.folder.glob("tokenizer*"):
            shutil.copy(file, folder)
        return [{"kind": "model", "source": folder.name}]


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    # Float32 master weights; autocast narrows them for the forward pass.
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    model.config.use_cache = False
    return model


def _load_exit(folder: Path) -> Any:
    """The layers and norm of an `exit` checkpoint; it has no embedding and no head."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(
        folder, local_files_only=True, use_cache=False, trust_remote_code=False
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.base_model.embed_tokens = nn.Identity()
    model.lm_head = nn.Identity()
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return model


def _trainable(model: Any, lora_rank: int | None, seed: int) -> Any:
    if lora_rank is None:
        return model.train()
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear")
    return get_peft_model(model, config).train()


def _base(module: Any) -> Any:
    """The decoder under the LM head, peft's wrapper looked through."""
    model = module.get_base_model() if hasattr(module, "get_base_model") else module
    return model.base_model


def _compute(dtype: torch.dtype, device: torch.device) -> Any:
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def _save(module: Any, start: Path, folder: Path) -> None:
    """Write a checkpoint of the form it started from, low-rank updates merged in."""
    model = module
    if hasattr(module, "merge_and_unload"):
        model = copy.deepcopy(module).merge_and_unload()
    folder.mkdir(parents=True)
    config = json.loads((start / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shared = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
    weights = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in model.state_dict().items()
        if name not in shared
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
