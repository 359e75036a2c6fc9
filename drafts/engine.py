"""The asyncio engine: one vLLM `AsyncLLM` that holds a target and its drafts.

    engine = await Engine.start(EngineConfig(ensemble=folder))
    scores = await engine.score(token_ids, response_start)
    await engine.shutdown()

Scoring a text is one prefill of it. vLLM batches what is under way at once; any number of `score`
calls may run side by side.
"""

from __future__ import annotations

import asyncio
import atexit
import multiprocessing
import os
import shutil
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from drafts import channel
from drafts.errors import EngineNotReady, ManifestError, WeightsError
from drafts.gate import Gate
from drafts.manifest import Ensemble, Member, ResidualDraft, load_ensemble
from drafts.scores import TokenScores
from drafts.weights import check_shapes, check_target, read_member

_DEAD = "the engine has died; restart the service"
_RESET_WITHIN_S = 30


class EngineConfig(BaseModel):
    """How to run an ensemble."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ensemble: Path
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="bfloat16", description="of weights and activations"
    )
    max_model_len: int = Field(default=4096, ge=16, description="tokens of prompt and response")
    max_num_batched_tokens: int = Field(
        default=1024, gt=0, description="tokens a step; bounds the memory that logits take"
    )
    max_num_seqs: int = Field(default=64, gt=0, description="requests in one step")
    kv_cache_gib: float = Field(
        default=1.0,
        ge=0,
        allow_inf_nan=False,
        description="KV cache of all members; 0 leaves the size to vLLM",
    )


class Engine:
    """Scores given texts with an ensemble in one vLLM engine."""

    def __init__(self, llm: Any, ensemble: Ensemble, max_model_len: int) -> None:
        self._llm = llm
        self._ensemble = ensemble
        self._gate = Gate()
        self._under_way: set[str] = set()
        self._swapping: asyncio.Task[None] | None = None
        self._broken: str | None = None
        self.n_drafts = len(ensemble.members)
        # vLLM samples one token after the text, which needs a place too.
        self.max_tokens = max_model_len - 1

    @classmethod
    async def start(cls, config: EngineConfig) -> Engine:
        """Load an ensemble and warm it up.

        Raises:
            ManifestError, WeightsError: if the ensemble cannot be used.
            EngineNotReady: if vLLM does not come up.
        """
        ensemble = await asyncio.to_thread(load_ensemble, config.ensemble)
        await asyncio.to_thread(check_target, ensemble)
        for member in ensemble.members:
            await asyncio.to_thread(check_shapes, member)
        set_environment()
        llm = await asyncio.to_thread(_build, ensemble, config)
        engine = cls(llm, ensemble, config.max_model_len)
        try:
            # The first request compiles vLLM's small kernels; nobody should wait for that.
            await engine.score([0, 0, 0, 0], 1)
        except BaseException:
            await engine.shutdown()
            raise
        return engine

    @property
    def weights_version(self) -> str:
        return self._ensemble.manifest.weights_version

    @property
    def ensemble(self) -> Ensemble:
        """The ensemble whose weights serve now."""
        return self._ensemble

    async def score(self, token_ids: Sequence[int], response_start: int) -> TokenScores:
        """Measures of the tokens from `response_start` on, given all that stand before each.

        Args:
            token_ids: prompt and response, at most `max_tokens`.
            response_start: index of the first response token, at least 1.

        Raises:
            ValueError: if the arguments do not fit this engine.
            NonFiniteError: if the forward pass gave NaN or infinity.
            EngineNotReady: if the engine is dead.
        """
        ids = self._checked(token_ids, self.max_tokens)
        if not 1 <= response_start < len(ids):
            raise ValueError(
                f"response_start must lie in 1..{len(ids) - 1} for {len(ids)} tokens, "
                f"got {response_start}"
            )
        final, version = await self._run(ids, _scoring_params(response_start))
        return self._read(final.prompt_logprobs, len(ids), response_start, version)

    async def generate(
        self, token_ids: Sequence[int], *, max_new_tokens: int, temperature: float = 1.0
    ) -> list[int]:
        """Sample a continuation from the target.

        Returns:
            At most `max_new_tokens` token ids; the last is the target's end-of-text token if it
            came to one.

        Raises:
            ValueError: if the arguments do not fit this engine.
            EngineNotReady: if the engine is dead.
        """
        ids = self._checked(token_ids, self.max_tokens + 1 - max_new_tokens)
        final, _ = await self._run(ids, _generation_params(max_new_tokens, temperature))
        return list(final.outputs[0].token_ids)

    async def _run(self, ids: list[int], params: Any) -> tuple[Any, str]:
        """vLLM's last output of a request, and the version of the weights that made it."""
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        await self.check_health()
        # Cancelling this coroutine closes the generator, which aborts the request in vLLM.
        async with self._gate.shared():
            await self.check_health()  # while it waited at the gate, much can have happened
            version = self.weights_version
            request_id = uuid.uuid4().hex
            self._under_way.add(request_id)
            final = None
            try:
                async for output in self._llm.generate(tokens_input(ids), params, request_id):
                    final = output
            except EngineDeadError as error:
                raise EngineNotReady(_DEAD) from error
            finally:
                self._under_way.discard(request_id)
        if final is None or final.outputs[0].finish_reason == "abort":
            raise EngineNotReady("the engine is stopping")
        return final, version

    async def swap(self, folder: Path) -> None:
        """Serve with the drafts' weights of another version of this ensemble, from now on.

        Requests under way end with the weights they began with; later ones wait for the swap. So
        no answer, and no draft's KV cache, ever mixes two versions.

        Cancelling the caller does not stop a swap that has begun.

        Raises:
            ManifestError, WeightsError: if they cannot be used; the old weights serve on.
            EngineNotReady: if the swap failed half-way; the engine scores nothing any more.
        """
        ensemble = await asyncio.to_thread(load_ensemble, folder)
        _check_same_shape(self._ensemble, ensemble)
        for member in ensemble.members:
            await asyncio.to_thread(check_shapes, member)
        # In a task of its own: cancelled between the worker's swap and the bookkeeping here, it
        # would leave answers that name a version they were not measured with.
        self._swapping = asyncio.create_task(self._swap(ensemble))
        await asyncio.shield(self._swapping)

    async def _swap(self, ensemble: Ensemble) -> None:
        async with self._gate.alone():
            await self.check_health()
            try:
                problems = await self._llm.collective_rpc(
                    "swap_drafts", args=(str(ensemble.folder),)
                )
                if any(problems):
                    raise WeightsError(next(problem for problem in problems if problem))
                await self._forget_prefixes()
            except WeightsError:
                raise
            except Exception as error:
                self._broken = f"a swap of weights failed half-way ({error}); restart the service"
                raise EngineNotReady(self._broken) from error
            self._ensemble = ensemble

    async def _forget_prefixes(self) -> None:
        """Empty the prefix cache: it holds keys and values that the old drafts made."""
        async with asyncio.timeout(_RESET_WITHIN_S):
            # False while blocks of a request that was cancelled a moment ago are still held.
            while not await self._llm.reset_prefix_cache():  # noqa: ASYNC110 - vLLM has no event
                await asyncio.sleep(0.01)

    async def check_health(self) -> None:
        """Raise `EngineNotReady` if the engine is dead or has been shut down."""
        if self._broken is not None:
            raise EngineNotReady(self._broken)
        if self._llm is None:
            raise EngineNotReady("the engine has been stopped")
        if self._llm.errored:
            raise EngineNotReady(_DEAD)

    async def shutdown(self) -> None:
        """Stop the engine's processes. Requests under way fail with `EngineNotReady`."""
        llm, self._llm = self._llm, None
        if llm is not None:
            await llm.abort(list(self._under_way))
            # Not in a thread: vLLM's output task would run meanwhile and report a dead engine.
            llm.shutdown()
            # Its `__del__` does it again, and at interpreter exit would print a traceback.
            llm.shutdown = lambda: None

    def _checked(self, token_ids: Sequence[int], limit: int) -> list[int]:
        ids = [int(token) for token in token_ids]
        if not 1 <= len(ids) <= limit:
            raise ValueError(f"{len(ids)} tokens, at least 1 and at most {limit} can be taken")
        if min(ids) < 0 or max(ids) >= self._ensemble.vocab_size:
            raise ValueError(f"token ids must lie in 0..{self._ensemble.vocab_size - 1}")
        return ids

    def _read(self, flat: Any, n_tokens: int, response_start: int, version: str) -> TokenScores:
        # Row i of `flat` is of token i: first the token itself, then the top M raw values.
        width = channel.M + 1
        begin = flat.start_indices[response_start]
        shape = (n_tokens - response_start, width)
        values = np.asarray(flat.logprobs[begin:], dtype=np.float64).reshape(shape)
        ids = np.asarray(flat.token_ids[begin:], dtype=np.int64).reshape(shape)
        ranks = np.asarray(flat.ranks[begin:], dtype=np.int64).reshape(shape)[:, 0]
        columns = channel.decode(values[:, 0], ids[:, 1:], values[:, 1:], self._ensemble.vocab_size)
        return TokenScores(
            logprob=columns["logprob"],
            rank=ranks - channel.M,  # vLLM counts the metric columns too; all lie above
            entropy=columns["entropy"],
            total=columns["total"],
            jsd=columns["jsd"],
            kl=columns["kl"],
            weights_version=version,
        )


def abandon_start() -> None:
    """Make an `Engine.start` under way fail soon, by ending the processes that it has begun."""
    for process in multiprocessing.active_children():
        process.terminate()


def _scoring_params(response_start: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprobs=channel.M,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={channel.MEASURE_FROM: response_start},
    )


def _generation_params(max_new_tokens: int, temperature: float) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=max_new_tokens,
        temperature=temperature,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _build(ensemble: Ensemble, config: EngineConfig) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    _check_length(ensemble, config.max_model_len)
    kv_cache = int(config.kv_cache_gib * 2**30) or None
    arguments = AsyncEngineArgs(
        model=str(ensemble.target_path),
        served_model_name=[ensemble.manifest.name],
        hf_overrides={
            "architectures": ["EnsembleForCausalLM"],
            "vocab_size": ensemble.vocab_size + channel.M,
            "demur_ensemble": str(ensemble.folder),
        },
        dtype=config.dtype,
        max_model_len=config.max_model_len,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        kv_cache_memory_bytes=kv_cache,
        # No torch.compile, no CUDA graphs: a graph would freeze which rows are wanted.
        enforce_eager=True,
        logprobs_mode="raw_logits",
        max_logprobs=channel.M + 20,
        logits_processors=["drafts.vllm_model:MaskMetricColumns"],
        worker_extension_cls="drafts.vllm_model.SwapDrafts",
        generation_config="vllm",
        enable_log_requests=False,
    )
    try:
        return AsyncLLM.from_engine_args(arguments)
    except Exception as error:
        # vLLM tells no more than that its worker died.
        if refused := _refused_weights(ensemble):
            raise refused from error
        raise EngineNotReady(
            f"vLLM did not start: {error} If what it printed above speaks of memory, lower "
            "max_model_len or max_num_batched_tokens; kv_cache_gib can be too high and too low"
        ) from error


def _refused_weights(ensemble: Ensemble) -> WeightsError | None:
    """What the worker has against the drafts' weights, if that is why it died."""
    checkpoints = {member.path: member for member in ensemble.members}
    for member in checkpoints.values():
        try:
            read_member(member)
        except WeightsError as error:
            return error
    return None


def _check_length(ensemble: Ensemble, max_model_len: int) -> None:
    limits = {"the target": ensemble.target_config.max_position_embeddings}
    for member in ensemble.members:
        if not isinstance(member.draft, ResidualDraft):
            limits[f"draft '{member.draft.name}'"] = member.config.max_position_embeddings
    shortest = min(limits, key=lambda name: int(limits[name]))
    if max_model_len > limits[shortest]:
        raise ManifestError(
            f"max_model_len is {max_model_len} and {shortest} takes at most {limits[shortest]} "
            "tokens; set it to that or less"
        )


def set_environment() -> None:
    """What vLLM reads from the environment; what the user has set stays."""
    # Not a matter of choice: `drafts.vllm_model` is written for the V1 runner.
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    cores = len(os.sched_getaffinity(0))
    defaults = {
        # Left alone, vLLM's CPU worker keeps a core for its front end.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(cores),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    if shutil.which("g++") is None:
        # vLLM compiles one small function with Inductor, which needs a C++ compiler.
        defaults["TORCHDYNAMO_DISABLE"] = "1"
    if "VLLM_RPC_BASE_PATH" not in os.environ:
        # vLLM leaves its processes' sockets behind; here they go with this process.
        defaults["VLLM_RPC_BASE_PATH"] = tempfile.mkdtemp(prefix="demur-")
        atexit.register(shutil.rmtree, defaults["VLLM_RPC_BASE_PATH"], ignore_errors=True)
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _check_same_shape(old: Ensemble, new: Ensemble) -> None:
    if old.target_path != new.target_path:
        raise ManifestError(
            f"a swap changes drafts only: the target is {old.target_path}, "
            f"the new ensemble's is {new.target_path}"
        )
    for attribute in ("name", "kind", "layer", "draw"):
        have, want = (
            [getattr(member.draft, attribute, None) for member in ensemble.members]
            for ensemble in (new, old)
        )
        if have != want:
            raise ManifestError(
                f"a swap cannot change the drafts' {attribute}: {want} serve, {have} were given"
            )
    for before, after in zip(old.members, new.members, strict=True):
        if _shape(before) != _shape(after):
            raise ManifestError(
                f"a swap changes weights only, and the config.json of draft "
                f"'{after.draft.name}' differs from the one that serves"
            )
    if list(old.students().values()) != list(new.students().values()):
        raise ManifestError("a swap cannot change which residual drafts share a checkpoint")


def _shape(member: Member) -> object:
    if isinstance(member.draft, ResidualDraft):
        return member.config
    # What a checkpoint was called and who saved it is no part of its shape.
    names = {"_name_or_path", "transformers_version", "dtype"}
    return {key: value for key, value in member.config.to_dict().items() if key not in names}
