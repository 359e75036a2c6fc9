"""The ensemble as one vLLM model, its masking logits processor and its worker extension.

This is the one file that touches vLLM's internals. It is written against vLLM 0.32.0 with the V1
model runner (`VLLM_USE_V2_MODEL_RUNNER=0`) and relies on:

- `models.utils.init_vllm_registered_model`: builds a member by its own Hugging Face config; layer
  names must differ between members and hold no digit before the layer's index.
- `SupportsEagle3.set_aux_hidden_state_layers` (EAGLE-3): the target then also returns its hidden
  states after the given layers, ascending by layer.
- `GPUModelRunner`: treats the returned hidden states as opaque rows, hands `compute_logits` those
  that it samples from (`max_num_seqs` at most), and with `logprobs_mode="raw_logits"` returns raw
  top-k values of its result. What it does for a prompt's rows is replaced (`drafts.vllm_prompts`).
- `LogitsProcessor.update_state` (with `process_dict_updates`), called with each change of the
  persistent batch before the forward pass; `ForwardContext.attn_metadata[layer].query_start_loc`,
  which says where in the step's rows each request of that batch begins.
- `model_loader.reload.{initialize,finalize}_layerwise_reload`: reloads the weights of a module in
  place and redoes what loading did to them (on a CPU, packing for oneDNN), but for a tied head,
  whose `quant_method.process_weights_after_loading` has to be called.
- `worker_extension_cls`: its methods become the worker's, callable by `collective_rpc`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from drafts import channel
from drafts.errors import DraftsError
from drafts.manifest import Ensemble, ExitDraft, Member, ModelDraft, ResidualDraft, load_ensemble
from drafts.passes import TargetRows, measure_rows, target_rows
from drafts.residual import LOCAL_TOKENS, ResidualHead
from drafts.residual_group import ResidualGroup
from drafts.vllm_prompts import measure_prompts
from drafts.weights import read_member

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = logging.getLogger(__name__)

# Logits held at once, of all members, so that memory does not grow with the vocabulary.
_HELD_LOGITS = 2**24


class _MeasureFrom:
    """For each place of vLLM's persistent batch, the first token whose measures are wanted, and
    the slot of the residual drafts that make them.

    The logits processor keeps it up to date and the model reads it; both live in one process.
    """

    def __init__(self) -> None:
        self.first: dict[int, tuple[int, int]] = {}

    def rows(self, positions_T: Tensor) -> Tensor:
        """For each row of this step, 0 if its prediction (of the next token) is not wanted, else
        1 + slot, [T]."""
        wanted_T = torch.zeros_like(positions_T)
        metadata = get_forward_context().attn_metadata
        if not isinstance(metadata, dict):  # a profiling run, which has no requests
            return wanted_T
        starts = next(iter(metadata.values())).query_start_loc.tolist()
        for place, (start, end) in enumerate(pairwise(starts)):
            if (wanted := self.first.get(place)) is not None:
                first, slot = wanted
                wanted_T[start:end] = (positions_T[start:end] + 1 >= first) * (1 + slot)
        return wanted_T


def _wanted(extra_args: dict[str, int] | None) -> tuple[int, int] | None:
    if not extra_args or channel.MEASURE_FROM not in extra_args:
        return None
    return extra_args[channel.MEASURE_FROM], extra_args.get(channel.SLOT, 0)


_measure_from = _MeasureFrom()


class MaskMetricColumns(LogitsProcessor):  # type: ignore[misc]
    """Keeps the metric columns from being sampled; vLLM took the raw values before this runs."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.vocab_size = vllm_config.model_config.get_vocab_size() - channel.M

    def apply(self, logits: Tensor) -> Tensor:
        logits[:, self.vocab_size :] = float("-inf")
        return logits

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        process_dict_updates(
            _measure_from.first,
            batch_update,
            lambda params, prompt, output: _wanted(params.extra_args),
        )


class EnsembleForCausalLM(nn.Module):
    """A target and its drafts, scheduled, batched and paged by vLLM as one model.

    `forward` returns, side by side for each row, the target's final hidden state, the final hidden
    states of `exit` and `model` drafts, the hidden states that `residual` drafts read, and a mark:
    are this row's measures wanted, and of which slot? `compute_logits` turns rows into the
    target's logits and the metric columns (`drafts.channel`).
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        ensemble = load_ensemble(vllm_config.model_config.hf_config.demur_ensemble)
        self.ensemble = ensemble
        self.vocab_size = ensemble.vocab_size
        # vLLM and torch containers are untyped to mypy, hence Any.
        self.target: Any = init_vllm_registered_model(
            vllm_config, prefix=maybe_prefix(prefix, "target"), hf_config=ensemble.target_config
        )
        self.hidden_layers = ensemble.hidden_layers
        if self.hidden_layers:
            self.target.set_aux_hidden_state_layers(self.hidden_layers)
        # `model` and `exit` drafts by name, which vLLM runs; residual heads, one a checkpoint.
        self.members: Any = nn.ModuleDict()
        self.exits: set[str] = set()
        for member in ensemble.members:
            if _is_run(member):
                self.members[member.draft.name] = _build(vllm_config, prefix, member)
            if isinstance(member.draft, ExitDraft):
                self.exits.add(member.draft.name)
        students = list(ensemble.students().values())
        # Without drafts that keep states, there is room for two versions: requests under way end
        # with the one they began with while others begin with the next.
        slots = 0 if not students else 1 if ensemble.has_states else 2
        self.students: Any = nn.ModuleList(ResidualGroup(students) for _ in range(slots))
        self._block = max(1, _HELD_LOGITS // ((1 + len(ensemble.members)) * self.vocab_size))
        # Columns of a row that `forward` returns.
        d = ensemble.target_config.hidden_size
        own = [member.config.hidden_size for member in ensemble.members if _is_run(member)]
        self.taps = sorted({layer for config, _ in students for layer in config.taps})
        self.widths = [d, *own, *(d for _ in self.taps), 1]

    # What the runner calls.

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        embedded: Tensor = self.target.embed_input_ids(input_ids)
        return embedded

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        out = self.target(input_ids, positions)
        h_Td, states = out if self.hidden_layers else (out, [])
        state_of = dict(zip(self.hidden_layers, states, strict=True))
        parts = [h_Td]
        for member in self.ensemble.members:
            if isinstance(member.draft, ExitDraft):
                # A copy: on a GPU the fused norm of the exit's first layer works in place, and
                # the target's state is read by others too.
                state = state_of[member.draft.layer].clone()
                module = self.members[member.draft.name]
                parts.append(module(None, positions, inputs_embeds=state))
            elif isinstance(member.draft, ModelDraft):
                parts.append(self.members[member.draft.name](input_ids, positions))
        parts.extend(state_of[layer] for layer in self.taps)
        parts.append(_measure_from.rows(positions).unsqueeze(-1).to(h_Td.dtype))
        return torch.cat(parts, dim=-1)

    def compute_logits(self, rows_TX: Tensor) -> Tensor:
        """The target's logits and the metric columns of rows to sample from, [T, V + M]."""
        width = self.vocab_size + channel.M
        out_TW = rows_TX.new_empty(rows_TX.shape[0], width, dtype=torch.float32)
        for start in range(0, rows_TX.shape[0], self._block):
            block = slice(start, start + self._block)
            self._logits_block(rows_TX[block], out_TW[block])
        return out_TW

    def measure_prompt(self, rows_TX: Tensor, tokens_T: Tensor, slot: int) -> tuple[Tensor, Tensor]:
        """Measures of given tokens, without logits of more than a block of rows at any time.

        Args:
            rows_TX: of `forward`; each predicts a token.
            tokens_T: which, int64.
            slot: of the residual drafts.

        Returns:
            Log-prob, then the metric columns' values, [T, 1 + M] float32, NaN where a forward pass
            gave NaN or infinity; and the tokens' ranks, [T].
        """
        values, ranks = [], []
        for start in range(0, rows_TX.shape[0], self._block):
            block = slice(start, start + self._block)
            h_Bd, *states, _ = torch.split(rows_TX[block], self.widths, dim=-1)
            logits_BV = self.target.compute_logits(h_Bd.contiguous())
            rows = target_rows(logits_BV, tokens_T[block], LOCAL_TOKENS)
            columns_BM = self._measure(slot, h_Bd, states, logits_BV, rows)
            values.append(torch.cat([rows.logprob.unsqueeze(-1), columns_BM], -1))
            ranks.append(rows.rank)
        return torch.cat(values), torch.cat(ranks)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the target from vLLM's iterator and each draft from its own folder.

        Returns:
            The names of the parameters that were loaded; vLLM refuses to start if any is missing.
        """
        loaded = {f"target.{name}" for name in self.target.load_weights(weights)}
        for module, tensors in self._read(self.ensemble, 0):
            module.load_weights(tensors.items())
        # `read_member` has seen to it that a draft's files hold all that its config asks for.
        drafts = ("members.", "students.")
        return loaded | {name for name, _ in self.named_parameters() if name.startswith(drafts)}

    # Logits and measures.

    def _logits_block(self, rows_BX: Tensor, out_BW: Tensor) -> None:
        h_Bd, *states, wanted_B1 = torch.split(rows_BX, self.widths, dim=-1)
        logits_BV = out_BW[:, : self.vocab_size]
        columns_BM = out_BW[:, self.vocab_size :]
        logits_BV.copy_(self.target.compute_logits(h_Bd.contiguous()))
        # Shifting by the greatest logit changes no softmax and puts every logit below the columns.
        top_B1 = logits_BV.amax(-1, keepdim=True)
        logits_BV.sub_(top_B1)
        # A row with NaN or +inf becomes uniform, so that sampling from it cannot crash.
        broken_B = ~torch.isfinite(top_B1.squeeze(-1))
        if bool(broken_B.any()):
            logits_BV[broken_B] = 0.0
        columns_BM.fill_(channel.NOT_FINITE)
        for mark in torch.unique(wanted_B1).tolist():
            if mark:
                wanted = (wanted_B1.squeeze(-1) == mark).nonzero().squeeze(-1)
                own = [state[wanted] for state in states]
                shifted_BV = logits_BV[wanted]
                no_tokens = torch.zeros_like(wanted)  # they are sampled later
                rows = target_rows(shifted_BV, no_tokens, LOCAL_TOKENS)
                values_BM = self._measure(int(mark) - 1, h_Bd[wanted], own, shifted_BV, rows)
                columns_BM[wanted] = channel.encode(values_BM)
        columns_BM[broken_B] = channel.NOT_FINITE

    def _measure(
        self, slot: int, h_Bd: Tensor, states: list[Tensor], logits_BV: Tensor, rows: TargetRows
    ) -> Tensor:
        """The values of the metric columns, [B, M]; the target's logits and what was read of them
        are given."""
        drafts_KBV, scale_KB = self._drafts(slot, h_Bd, states, rows)
        total, jsd, kl = measure_rows(logits_BV, rows, drafts_KBV, scale_KB)
        return torch.stack([rows.log_z, rows.entropy, total, jsd, kl], -1)

    def _drafts(
        self, slot: int, h_Bd: Tensor, states: list[Tensor], rows: TargetRows
    ) -> tuple[Tensor, Tensor]:
        """What each draft adds to the target's logits before it is scaled, or its own logits,
        [K, B, V]; and its factor, NaN where the logits are its own, [K, B]."""
        own = states[: len(self.members)]
        members = list(zip(self.members.items(), own, strict=True))
        parts = [
            module.compute_logits(state.contiguous()).unsqueeze(0)
            for (name, module), state in members
            if name not in self.exits
        ]
        exits = [state for (name, _), state in members if name in self.exits]
        if exits:
            # The target's LM head at once for all: its weights are read once, not K times.
            heads = self.target.compute_logits(torch.cat(exits).contiguous())
            parts.append(heads.view(len(exits), len(h_Bd), -1))
        scales = [rows.top.new_full((sum(map(len, parts)), len(h_Bd)), math.nan)]
        if len(self.students):
            students = self.students[slot]
            if not students.is_prepared:  # the target's head is usable only after vLLM has begun
                students.prepare(self.target.compute_logits)
            taps = dict(zip(self.taps, states[len(own) :], strict=True))
            moves_KBr, wanted = students.moves(h_Bd, taps, rows.confidence())
            changes_KBV = students.changes(moves_KBr)
            parts.append(changes_KBV)
            scales.append(students.scales(changes_KBV, wanted, rows))
        return parts[0] if len(parts) == 1 else torch.cat(parts), torch.cat(scales)

    # Weights.

    def _read(self, ensemble: Ensemble, slot: int) -> list[tuple[Any, dict[str, Tensor]]]:
        """Each draft module of a slot with its new weights, read whole and checked.

        Raises:
            WeightsError: if any file is broken; no module was touched then.
        """
        pairs: list[tuple[Any, dict[str, Tensor]]] = []
        students = iter(self.students[slot].heads if len(self.students) else ())
        seen: set[Path] = set()
        for member in ensemble.members:
            if _is_run(member):
                pairs.append((self.members[member.draft.name], read_member(member)))
            elif member.path not in seen:
                seen.add(member.path)
                pairs.append((next(students), read_member(member)))
        return pairs

    def swap(self, folder: str, target: str, slot: int, model_config: ModelConfig) -> str | None:
        """Put another version of the drafts' weights in place of the one in a slot.

        Returns:
            What is wrong with the new files, or None; the old weights then serve on. An exception
            means that the weights of the slot are in an unknown state.
        """
        try:
            ensemble = load_ensemble(folder, Path(target))
            pairs = self._read(ensemble, slot)
        except DraftsError as error:
            return str(error)
        except Exception as error:  # no file may cost the engine its life
            logger.exception("a version cannot be read")
            return f"{folder} cannot be read ({type(error).__name__}: {error})"
        _replace(pairs, model_config)
        if len(self.students):
            self.students[slot].prepare(self.target.compute_logits)
        self.ensemble = ensemble
        return None


def _replace(pairs: list[tuple[Any, dict[str, Tensor]]], model_config: ModelConfig) -> None:
    for module, weights in pairs:
        if isinstance(module, ResidualHead):
            module.load_weights(weights.items())
            continue
        initialize_layerwise_reload(module)
        module.load_weights(weights.items())
        finalize_layerwise_reload(module, model_config)
        head = getattr(module, "lm_head", None)
        if isinstance(head, VocabParallelEmbedding) and module.config.tie_word_embeddings:
            # A tied head was not loaded itself and would keep what was packed of its old weights.
            head.quant_method.process_weights_after_loading(head)


def _is_run(member: Member) -> bool:
    """Is it a model that vLLM runs, with a KV cache? A residual head is not."""
    return not isinstance(member.draft, ResidualDraft)


def _build(vllm_config: VllmConfig, prefix: str, member: Member) -> nn.Module:
    module: Any = init_vllm_registered_model(
        vllm_config, prefix=maybe_prefix(prefix, member.draft.name), hf_config=member.config
    )
    if isinstance(member.draft, ExitDraft):
        # It is fed with hidden states and its logits come from the target's head: what it was
        # built with is dropped, so that both stay one copy in memory.
        module.model.embed_tokens = nn.Identity()
        module.lm_head = nn.Identity()
    built: nn.Module = module
    return built


class WorkerMethods:
    """Worker extension: its methods become the worker's own."""

    model_runner: Any

    def ping(self) -> None:
        """A sign of life."""

    def measure_prompts(self) -> None:
        """From now on prompts are answered with the measures of the tokens asked for."""
        runner = self.model_runner
        runner._get_prompt_logprobs_dict = partial(measure_prompts, runner)

    def swap_drafts(self, folder: str, target: str, slot: int) -> str | None:
        """Load the drafts of the ensemble in `folder`; return what was wrong with them, or None.

        The caller sees to it that no request of the slot is under way.
        """
        runner = self.model_runner
        with torch.inference_mode():
            problem: str | None = runner.model.swap(folder, target, slot, runner.model_config)
        return problem
