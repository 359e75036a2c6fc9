"""The asyncio engine: one vLLM `AsyncLLM` that holds a target and its drafts.

    engine = await Engine.start(EngineConfig(ensemble=folder))
    scores = await engine.score(token_ids, response_start)
    async with aclosing(engine.stream(token_ids, Sampling(max_new_tokens=100))) as steps:
        async for step in steps:
            print(step.token_ids, step.scores.epistemic)
    await engine.shutdown()

Scoring a text is one prefill of it; a generated token's measures come from the forward pass that
made it. vLLM batches what is under way at once; any number of calls may run side by side.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from functools import partial
from pathlib import Path
from typing import Any

from drafts.cost import ensemble_cost
from drafts.errors import EngineNotReady, WeightsError
from drafts.gate import Gate
from drafts.launch import EngineConfig, build, runs_on_cpu, set_environment
from drafts.manifest import Ensemble, Manifest, load_ensemble
from drafts.outputs import generation_params, read_prompt, read_step, scoring_params
from drafts.processes import Processes
from drafts.same_shape import check_same_shape
from drafts.scores import Generated, Sampling, TokenScores
from drafts.weights import check_shapes, check_target

__all__ = ["Engine", "EngineConfig"]

DEAD = "the engine has died"
STOPPING = "the engine is stopping"
_RESET_WITHIN_S = 30
_LOOK_EVERY_S = 1.0
# A swap reads all weights of the drafts, and keeps the workers from answering meanwhile.
_SWAP_WITHIN_S = 600.0


class Engine:
    """Scores given texts, and generates, with an ensemble in one vLLM engine."""

    def __init__(
        self, llm: Any, ensemble: Ensemble, max_model_len: int, processes: Processes
    ) -> None:
        self._llm = llm
        self._processes = processes
        self._ensemble = ensemble
        # One for each version of the drafts that the model has room for. With two, requests under
        # way end with the one while new ones begin with the other.
        self._gates = [Gate() for _ in range(1 if ensemble.has_states else 2)]
        self._versions = [ensemble.manifest.weights_version] * len(self._gates)
        self._held: list[Path | None] = [None] * len(self._gates)  # the folder it came from
        self._held[0] = ensemble.folder
        self._slot = 0
        self._one_swap = asyncio.Lock()
        self._under_way: set[str] = set()
        self._swapping: asyncio.Task[None] | None = None
        self._loading = False  # the workers read weights, and answer nothing else meanwhile
        self._broken: str | None = None
        self.n_drafts = len(ensemble.members)
        # vLLM samples one token after the text, which needs a place too.
        self.max_tokens = max_model_len - 1
        # vLLM's CPU engine dies of a seed as soon as a prompt is taken in pieces.
        self.takes_seed = not runs_on_cpu()

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
        set_environment(config.devices)
        processes = Processes()
        llm = await asyncio.to_thread(build, ensemble, config)
        processes.remember()
        engine = cls(llm, ensemble, config.max_model_len, processes)
        try:
            await engine._call_workers("measure_prompts")
            # The first request compiles vLLM's small kernels; nobody should wait for that.
            await engine.score([0, 0, 0, 0], 1)
            await engine.generate([0], max_new_tokens=2)
        except BaseException:
            await engine.shutdown()
            raise
        return engine

    @property
    def weights_version(self) -> str:
        return self._ensemble.manifest.weights_version

    @property
    def vocab_size(self) -> int:
        """V, the number of real tokens."""
        return self._ensemble.vocab_size

    @property
    def manifest(self) -> Manifest:
        """The manifest of the ensemble that serves now."""
        return self._ensemble.manifest

    @property
    def added_passes(self) -> float:
        """What the drafts cost, in forward passes of the target."""
        return sum(ensemble_cost(self._ensemble))

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
        params_of = partial(scoring_params, response_start)
        async with aclosing(self._outputs(ids, params_of)) as outputs:
            [(final, version)] = [output async for output in outputs]
        return read_prompt(final.prompt_logprobs, version)

    async def stream(
        self, token_ids: Sequence[int], sampling: Sampling
    ) -> AsyncGenerator[Generated, None]:
        """Sample a continuation from the target; its tokens as they come, with their measures.

        Close the generator to stop early: that aborts the request. Only the last `Generated` has
        a `finish_reason`. If it is "stop", the last token is the target's end-of-text token.

        Raises:
            ValueError: if the arguments do not fit this engine.
            NonFiniteError: if the forward pass gave NaN or infinity.
            EngineNotReady: if the engine is dead.
        """
        ids = self._checked(token_ids, self.max_tokens + 1 - sampling.max_new_tokens)
        if sampling.seed is not None and not self.takes_seed:
            raise ValueError("this engine cannot sample by a seed")
        params_of = partial(generation_params, sampling, len(ids))
        async with aclosing(self._outputs(ids, params_of)) as outputs:
            async for output, version in outputs:
                yield read_step(output.outputs[0], sampling.top, self.vocab_size, version)

    async def generate(
        self, token_ids: Sequence[int], *, max_new_tokens: int, temperature: float = 1.0
    ) -> list[int]:
        """The token ids of a continuation, without measures. Arguments and errors as in `stream`.

        Returns:
            At most `max_new_tokens` token ids; the last is the target's end-of-text token if it
            came to one.
        """
        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, measured=False)
        async with aclosing(self.stream(token_ids, sampling)) as steps:
            return [token async for step in steps for token in step.token_ids]

    async def _outputs(
        self, ids: list[int], params_of: Callable[[int], Any]
    ) -> AsyncGenerator[tuple[Any, str], None]:
        """vLLM's outputs of a request, and the version of the weights that makes them.

        Args:
            params_of: what is asked of vLLM, by the slot of the drafts.
        """
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        await self.check_health()
        slot = self._slot
        async with self._gates[slot].shared():
            await self.check_health()  # while it waited at the gate, much can have happened
            version = self._versions[slot]
            request_id = uuid.uuid4().hex
            self._under_way.add(request_id)
            finished = False
            try:
                # Closing vLLM's generator aborts the request.
                outputs = self._llm.generate(tokens_input(ids), params_of(slot), request_id)
                async with aclosing(outputs):
                    async for output in outputs:
                        finished = output.finished and output.outputs[0].finish_reason != "abort"
                        if not output.finished or finished:
                            yield output, version
            except EngineDeadError as error:
                raise EngineNotReady(DEAD) from error
            finally:
                self._under_way.discard(request_id)
        if not finished:
            raise EngineNotReady(STOPPING)

    async def swap(self, folder: Path, target_path: Path | None = None) -> None:
        """Serve with the drafts' weights of another version of this ensemble, from now on.

        Requests under way end with the weights they began with, so no answer ever mixes two
        versions. Of residual drafts the engine holds two versions: later requests begin with the
        new one at once, and only a third version waits until the first has no request left. Drafts
        that keep keys and values have room for one: the swap waits for what is under way, and later
        requests for the swap.

        Cancelling the caller does not stop a swap that has begun.

        Args:
            folder: of the version.
            target_path: this machine's copy of the target; None: where the version's manifest says.

        Raises:
            ManifestError, WeightsError: if they cannot be used; the old weights serve on.
            EngineNotReady: if the swap failed half-way; the engine scores nothing any more.
        """
        ensemble = await asyncio.to_thread(load_ensemble, folder, target_path)
        check_same_shape(self._ensemble, ensemble)
        for member in ensemble.members:
            await asyncio.to_thread(check_shapes, member)
        # In a task of its own: cancelled between the worker's swap and the bookkeeping here, it
        # would leave answers that name a version they were not measured with.
        self._swapping = asyncio.create_task(self._swap(ensemble))
        await asyncio.shield(self._swapping)

    async def _swap(self, ensemble: Ensemble) -> None:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._one_swap)
            slot = (self._slot + 1) % len(self._gates)
            if self._held[slot] == ensemble.folder and slot != self._slot:
                # It is there still, as after a version that is taken back soon: nobody has to end.
                self._ensemble, self._slot = ensemble, slot
                return
            await stack.enter_async_context(self._gates[slot].alone())
            await self.check_health()
            self._held[slot] = None
            self._loading = True
            try:
                async with asyncio.timeout(_SWAP_WITHIN_S):
                    problems = await self._call_workers(
                        "swap_drafts", str(ensemble.folder), str(ensemble.target_path), slot
                    )
                if refused := [problem for problem in problems if problem]:
                    if len(refused) < len(problems):
                        raise RuntimeError(f"some workers refused it: {refused[0]}")
                    raise WeightsError(refused[0])
                if ensemble.has_states:
                    await self._forget_prefixes()
            except WeightsError:
                raise
            except Exception as error:
                hangs = isinstance(error, TimeoutError)
                alive = self._llm is not None and not self._llm.errored and not hangs
                if len(self._gates) > 1 and alive:
                    # Only the slot that nobody uses is in an unknown state.
                    raise WeightsError(f"a swap of weights failed half-way ({error})") from error
                self._broken = self._broken or f"a swap of weights failed half-way ({error})"
                raise EngineNotReady(self._broken) from error
            finally:
                self._loading = False
            self._versions[slot] = ensemble.manifest.weights_version
            self._held[slot] = ensemble.folder
            self._ensemble, self._slot = ensemble, slot

    async def _call_workers(self, method: str, *arguments: Any) -> list[Any]:
        """vLLM's `collective_rpc`, which never returns if the engine dies meanwhile.

        Returns:
            What each worker answered, of each tensor-parallel rank of each data-parallel engine.
        """
        # `AsyncLLM.collective_rpc` asks all data-parallel engines and drops what all but the first
        # have answered.
        core = self._llm.engine_core
        call = asyncio.ensure_future(
            core.call_utility_all_async("collective_rpc", method, None, arguments, None)
        )
        try:
            while not (await asyncio.wait({call}, timeout=_LOOK_EVERY_S))[0]:
                await self.check_health()
        finally:
            call.cancel()
        return [answer for workers in call.result() for answer in workers]

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
            raise EngineNotReady(DEAD)

    async def ping(self, within_s: float) -> None:
        """Ask the engine's workers for a sign of life; they give it between two steps.

        Args:
            within_s: how long to wait for it; longer while weights are swapped.

        Raises:
            EngineNotReady: if the engine is dead, has been shut down, or does not answer.
        """
        await self.check_health()
        within_s = max(within_s, _SWAP_WITHIN_S) if self._loading else within_s
        try:
            async with asyncio.timeout(within_s):
                await self._call_workers("ping")
        except TimeoutError:
            raise EngineNotReady(f"the engine has not answered for {within_s:g} s") from None
        except EngineNotReady:
            raise
        except Exception as error:  # vLLM's of a worker that dies meanwhile are of many kinds
            raise EngineNotReady(f"the engine does not answer ({error})") from error

    async def abort_all(self) -> None:
        """End what is under way, and begin nothing more; all fails with `EngineNotReady`."""
        await self.check_health()
        self._broken = STOPPING
        await self._llm.abort(list(self._under_way))

    async def kill(self) -> None:
        """End the engine's processes at once, even those that hear no signal.

        Requests under way fail with `EngineNotReady`.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        self._broken = self._broken or DEAD
        await asyncio.to_thread(self._processes.kill)
        llm, self._llm = self._llm, None
        if llm is not None:
            # vLLM tells those who wait only if its own watch is faster than its shutdown.
            llm.output_processor.propagate_error(EngineDeadError())
            llm.shutdown()
            llm.shutdown = lambda: None  # see `shutdown`

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
