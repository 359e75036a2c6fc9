"""The ensemble as one vLLM model, its masking logits processor and its worker extension.

This is the one file that touches vLLM's internals. It is written against vLLM 0.32.0 with the V1
model runner (`VLLM_USE_V2_MODEL_RUNNER=0`) and relies on:

- `models.utils.init_vllm_registered_model`: builds a member by its own Hugging Face config; layer
  names must differ between members and hold no digit before the layer's index.
- `SupportsEagle3.set_aux_hidden_state_layers` (EAGLE-3): the target then also returns its hidden
  states after the given layers, ascending by layer.
- `GPUModelRunner`: treats the returned hidden states as opaque rows, hands `compute_logits` the
  rows it wants scored, and with `logprobs_mode="raw_logits"` returns raw top-k values of its
  result, prompt rows through `_get_prompt_logprobs_dict`, which is done with those of a request
  before it asks for the next one's, sampled rows (`max_num_seqs` at most) through `Sampler`.
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
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
from drafts.divergence import block_rows, measure_block
from drafts.errors import DraftsError
from drafts.manifest import Ensemble, ExitDraft, Member, ModelDraft, ResidualDraft, load_ensemble
from drafts.residual import ResidualHead
from drafts.residual_group import ResidualGroup
from drafts.weights import read_member

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = logging.getLogger(__name__)

# Rows whose logits are held at once, for each member: 128 x 152k x float32 are 78 MB.
_LOGIT_ROWS = 128


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


class _Draft(NamedTuple):
    """A draft's logits of a block of rows; or, with a scale, how it changes the target's."""

    values_BV: Tensor
    scale_B: Tensor | None = None

    def logits(self, part: slice, target_BV: Tensor, out_BV: Tensor) -> None:
        """Write its logits of some of the rows as float32; those of the target are given."""
        out_BV.copy_(self.values_BV[part])
        if self.scale_B is not None:
            torch.addcmul(target_BV, self.scale_B[part].unsqueeze(-1), out_BV, out=out_BV)


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
        scheduler = vllm_config.scheduler_config
        self._max_sampled, self._max_rows = scheduler.max_num_seqs, scheduler.max_num_batched_tokens
        self._prompt_logits: Tensor | None = None
        # Columns of a row that `forward` returns.
        d = ensemble.target_config.hidden_size
        own = [member.config.hidden_size for member in ensemble.members if _is_run(member)]
        taps = [d for config, _ in students for _ in config.taps]
        self.widths = [d, *own, *taps, 1]

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
        for config, _ in self.ensemble.students().values():
            parts.extend(state_of[layer] for layer in config.taps)
        parts.append(_measure_from.rows(positions).unsqueeze(-1).to(h_Td.dtype))
        return torch.cat(parts, dim=-1)

    def compute_logits(self, rows_TX: Tensor) -> Tensor:
        out_TW = self._empty_logits(rows_TX)
        for start in range(0, rows_TX.shape[0], _LOGIT_ROWS):
            block = slice(start, start + _LOGIT_ROWS)
            self._logits_block(rows_TX[block], out_TW[block])
        return out_TW

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

    def _empty_logits(self, rows_TX: Tensor) -> Tensor:
        """Room for the result, [T, V + M] float32."""
        rows, width = rows_TX.shape[0], self.vocab_size + channel.M
        if rows_TX.device.type != "cpu" or rows <= self._max_sampled:
            return torch.empty(rows, width, dtype=torch.float32, device=rows_TX.device)
        # Rows of a prompt, of which the runner is done before it asks for the next ones. Another
        # place of another size for each would leave holes in the heap, which grows with them.
        if self._prompt_logits is None or len(self._prompt_logits) < rows:
            self._prompt_logits = torch.empty(max(rows, self._max_rows), width, dtype=torch.float32)
        return self._prompt_logits[:rows]

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
                self._measure(int(mark) - 1, wanted, h_Bd[wanted], own, out_BW)
        columns_BM[broken_B] = channel.NOT_FINITE

    def _measure(
        self, slot: int, wanted: Tensor, h_Bd: Tensor, states: list[Tensor], out_BW: Tensor
    ) -> None:
        """Fill the columns of the wanted rows, whose target's logits are there."""
        target_BV = out_BW[:, : self.vocab_size][wanted]
        drafts = self._drafts(slot, h_Bd, states, target_BV)
        values_MB = out_BW.new_empty(channel.M, wanted.numel())
        size = block_rows(len(drafts) * self.vocab_size, out_BW.device)
        block_KBV = out_BW.new_empty(len(drafts), min(size, wanted.numel()), self.vocab_size)
        for start in range(0, wanted.numel(), size):
            part = slice(start, start + size)
            logits_KBV = block_KBV[:, : len(target_BV[part])]
            for draft, logits in zip(drafts, logits_KBV, strict=True):
                draft.logits(part, target_BV[part], logits)
            measure_block(logits_KBV, target_BV[part], values_MB[:, part])
        out_BW[:, self.vocab_size :][wanted] = channel.encode(values_MB.T)

    def _drafts(
        self, slot: int, h_Bd: Tensor, states: list[Tensor], target_BV: Tensor
    ) -> list[_Draft]:
        """What makes the logits of each draft."""
        own, taps = states[: len(self.members)], states[len(self.members) :]
        members = list(zip(self.members.items(), own, strict=True))
        drafts = [
            _Draft(module.compute_logits(state))
            for (name, module), state in members
            if name not in self.exits
        ]
        exits = [state for (name, _), state in members if name in self.exits]
        students = self.students[slot] if len(self.students) else None
        if not exits and students is None:
            return drafts
        moves, wanted = [], []
        if students is not None:
            moves, wanted = students.moves(h_Bd, taps, target_BV)
        # All that the target's LM head is for at once: its weights are read once, not K times.
        through_head = torch.cat([*exits, *moves]).contiguous()
        heads = self.target.compute_logits(through_head).split(len(h_Bd))
        drafts += [_Draft(logits) for logits in heads[: len(exits)]]
        if students is not None:
            changes = heads[len(exits) :]
            scales = students.scales(changes, wanted, target_BV)
            drafts += [_Draft(*pair) for pair in zip(changes, scales, strict=True)]
        return drafts

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


class SwapDrafts:
    """Worker extension: swaps the drafts' weights. Its methods become the worker's own."""

    model_runner: Any

    def ping(self) -> None:
        """A sign of life."""

    def swap_drafts(self, folder: str, target: str, slot: int) -> str | None:
        """Load the drafts of the ensemble in `folder`; return what was wrong with them, or None.

        The caller sees to it that no request of the slot is under way.
        """
        runner = self.model_runner
        with torch.inference_mode():
            problem: str | None = runner.model.swap(folder, target, slot, runner.model_config)
        return problem
