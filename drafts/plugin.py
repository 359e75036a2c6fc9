"""vLLM's general-plugin entry point: called in each of vLLM's processes before it does anything."""

import multiprocessing
import os
import threading
from functools import wraps
from multiprocessing.connection import wait
from typing import Any

from drafts.channel import SCORE_FROM

_WATCH = "demur-watch-parent"
_SPIN_S = 0.001


def register() -> None:
    """Register the architecture by name; the model itself is imported only where it runs."""
    from vllm import ModelRegistry

    if "EnsembleForCausalLM" not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model("EnsembleForCausalLM", "drafts.vllm_model:EnsembleForCausalLM")
    _wait_without_spinning()
    _end_with_parent()
    _share_prompts()
    _may_use_amx()


def _may_use_amx() -> None:
    """Ask Linux for AMX's tile registers, where the CPU has them.

    vLLM's attention uses them and does not ask. With a usual target oneDNN has asked before;
    with a tiny one nobody has, and the first token ends the worker with SIGILL.
    """
    import torch

    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


class _Prefix:
    """A request as far as its keys and values may be taken from another's."""

    def __init__(self, request: Any, num_tokens: int) -> None:
        self._request = request
        self.num_tokens = num_tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


def _share_prompts() -> None:
    """Let texts that are scored read vLLM's prefix cache, up to where their response begins.

    vLLM can have one or the other: where all of a text was there already, nothing would be left to
    measure. It computes at least the last of `num_tokens`, which predicts the first that is scored.
    """
    if not _is_engine_core():
        return
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    find = KVCacheManager.get_computed_blocks
    if hasattr(find, "__wrapped__"):  # vLLM asks for plugins more than once
        return

    @wraps(find)
    def get_computed_blocks(manager: Any, request: Any) -> Any:
        asked = (request.sampling_params and request.sampling_params.extra_args) or {}
        if (first := asked.get(SCORE_FROM)) is not None:
            request = _Prefix(request, first)
        return find(manager, request)

    KVCacheManager.get_computed_blocks = get_computed_blocks


def _is_engine_core() -> bool:
    return multiprocessing.current_process().name.startswith("EngineCore")


def _wait_without_spinning() -> None:
    """Let vLLM's engine process sleep while its CPU worker computes.

    It polls for the worker's answer, by default for a second, on a core that the worker needs:
    with two cores, a quarter of one. After this long it waits to be notified instead.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

        SpinCondition.__init__.__defaults__ = (_SPIN_S,)  # of its one default, busy_loop_s


def _end_with_parent() -> None:
    """vLLM's engine process outlives a front end that is killed, and works on; end it then."""
    parent = multiprocessing.parent_process()
    if parent is None or not _is_engine_core():
        return
    if any(thread.name == _WATCH for thread in threading.enumerate()):
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)  # its workers end with it, by a pipe of vLLM's

    threading.Thread(target=watch, name=_WATCH, daemon=True).start()
