"""What a target shows its students: hidden states of texts, made anew at each step or kept on disk.

A target's forward passes are most of what a step costs. Kept states let several runs, students and
epochs share them: d numbers a token and draw, from which the LM head makes the whole distribution.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from osd.corpus import Text
from osd.errors import CorpusError
from osd.schedule import derived_seed
from osd.teacher import Batch, Teacher, collate

# Texts of one forward pass of a target whose states are kept, of like length.
_GROUP = 8


class Clean(NamedTuple):
    """What the unperturbed target makes of the T rows of a batch."""

    h_Td: Tensor  # final hidden states, float32
    states: dict[int, Tensor]  # those after some layers, [B, L, d]
    confidence_T4: Tensor  # `drafts.residual.confidence` of the logits


class States(Protocol):
    """Hidden states of texts that were padded to one batch."""

    def clean(self, texts: Sequence[Text], batch: Batch) -> Clean: ...

    def draw(self, texts: Sequence[Text], batch: Batch, visit: int, seed: int) -> Tensor:
        """Final states [T, d] of the rows at a draw of the posterior, float32.

        `visit` counts how often these texts were seen before; `seed` is of this step alone.
        """
        ...

    def eu(self, texts: Sequence[Text], batch: Batch) -> Tensor | None:
        """EU* of the rows [T] as all kept draws show it; None if none are kept."""
        ...


class FreshStates:
    """A forward pass each time, and so a fresh draw each step."""

    def __init__(self, teacher: Teacher, layers: Sequence[int]) -> None:
        self.teacher = teacher
        self.layers = tuple(layers)

    def clean(self, texts: Sequence[Text], batch: Batch) -> Clean:
        final, states = self.teacher.states(batch, self.layers)
        h_Td = batch.rows(final).float()
        return Clean(h_Td, states, self.teacher.confidence(h_Td))

    def draw(self, texts: Sequence[Text], batch: Batch, visit: int, seed: int) -> Tensor:
        return self.teacher.draw(batch, seed)

    def eu(self, texts: Sequence[Text], batch: Batch) -> Tensor | None:
        return None


class KeptStates:
    """States on disk, made once: of each text the clean ones and those at `draws` draws.

    A text's visit number v is shown its draw v mod `draws`. Eight texts share a draw of the
    weights. The folder may be shared by runs: it is for one target, posterior, list of texts and
    seed, and each file holds one layer or one draw.

    Args:
        teacher: whose states they are.
        texts: all that will be asked for, in a stable order.
        layers: whose states are kept beside the final ones.
        draws: how many draws of the posterior each text is shown.
        max_tokens: longer texts are cut.
        seed: of the draws.
        folder: where folders of states are kept.
    """

    def __init__(
        self,
        teacher: Teacher,
        texts: Sequence[Text],
        *,
        layers: Sequence[int],
        draws: int,
        max_tokens: int,
        seed: int,
        folder: Path,
    ) -> None:
        self.layers = tuple(layers)
        self.draws = draws
        self.device = teacher.head_Vd.device
        order = sorted(range(len(texts)), key=lambda i: (len(texts[i].token_ids), texts[i].key, i))
        self.folder = folder / f"states-{fingerprint(teacher, texts, max_tokens, seed)}"
        self.folder.mkdir(parents=True, exist_ok=True)
        groups = [order[start : start + _GROUP] for start in range(0, len(order), _GROUP)]
        self.places = {
            _identity(texts[i]): (number, str(place))
            for number, group in enumerate(groups)
            for place, i in enumerate(group)
        }
        names = ["final", *(f"layer-{layer}" for layer in self.layers), "confidence"]
        names += [f"draw-{draw}" for draw in range(draws)]
        self._eu = f"eu-{draws}"
        if draws > 1:
            names.append(self._eu)
        for number, group in enumerate(tqdm(groups, desc="states of the target", unit="batch")):
            missing = [name for name in names if not self._file(number, name).exists()]
            if missing:
                chosen = [texts[i] for i in group]
                self._make(teacher, chosen, number, missing, max_tokens, seed)

    def clean(self, texts: Sequence[Text], batch: Batch) -> Clean:
        states = {
            layer: torch.nn.utils.rnn.pad_sequence(
                self._read(texts, f"layer-{layer}"), batch_first=True
            )
            for layer in self.layers
        }
        final = torch.cat(self._read(texts, "final")).float()
        return Clean(final, states, torch.cat(self._read(texts, "confidence")))

    def draw(self, texts: Sequence[Text], batch: Batch, visit: int, seed: int) -> Tensor:
        return torch.cat(self._read(texts, f"draw-{visit % self.draws}")).float()

    def eu(self, texts: Sequence[Text], batch: Batch) -> Tensor | None:
        return torch.cat(self._read(texts, self._eu)) if self.draws > 1 else None

    def _read(self, texts: Sequence[Text], name: str) -> list[Tensor]:
        parts = []
        for text in texts:
            number, place = self.places[_identity(text)]
            path = self._file(number, name)
            try:
                with safe_open(path, framework="pt") as file:
                    parts.append(file.get_tensor(place).to(self.device))
            except SafetensorError as error:
                raise CorpusError(f"{path} cannot be read ({error}); remove it") from error
        return parts

    def _make(
        self,
        teacher: Teacher,
        texts: list[Text],
        number: int,
        names: list[str],
        max_tokens: int,
        seed: int,
    ) -> None:
        batch = collate(texts, max_tokens, self.device)
        dtype = teacher.model.dtype  # what the states come in: nothing is lost
        layers = [int(name.removeprefix("layer-")) for name in names if name.startswith("layer-")]
        if layers or "final" in names:
            final, states = teacher.states(batch, layers)
            lengths = batch.mask_BL.sum(1).tolist()
            kept = {f"layer-{layer}": state for layer, state in states.items()}
            for name, state in kept.items():
                self._write(number, name, [s[:n] for s, n in zip(state, lengths, strict=True)])
            self._write(number, "final", batch.by_text(batch.rows(final)))
        if "confidence" in names:
            h_Td = torch.cat(self._read(texts, "final")).float()
            self._write(number, "confidence", batch.by_text(teacher.confidence(h_Td)))
        for name in names:
            if name.startswith("draw-"):
                theta = derived_seed(seed, "draw", number, name)
                self._write(number, name, batch.by_text(teacher.draw(batch, theta).to(dtype)))
        if self._eu in names:
            shown = [torch.cat(self._read(texts, f"draw-{draw}")) for draw in range(self.draws)]
            self._write(number, self._eu, batch.by_text(teacher.sampled_eu(torch.stack(shown))))

    def _write(self, number: int, name: str, parts: list[Tensor]) -> None:
        file = self._file(number, name)
        tensors = {str(place): part.cpu().contiguous() for place, part in enumerate(parts)}
        partial = file.with_suffix(f".{os.getpid()}.partial")
        save_file(tensors, partial)
        partial.rename(file)

    def _file(self, number: int, name: str) -> Path:
        return self.folder / f"{number:05d}-{name}.safetensors"


def _identity(text: Text) -> tuple[int, ...]:
    return (text.response_start, *text.token_ids)


def fingerprint(teacher: Teacher, texts: Sequence[Text], max_tokens: int, seed: int) -> str:
    """Of a target's weights, its posterior, and texts."""
    digest = hashlib.sha256(f"{max_tokens} {seed} {teacher.model.dtype}".encode())
    digest.update(teacher.posterior.config.model_dump_json().encode())
    for name, tensor in sorted(teacher.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.float().cpu().numpy().tobytes())
    for text in texts:
        digest.update(text.model_dump_json().encode())
    return digest.hexdigest()[:16]
