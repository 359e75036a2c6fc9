"""vLLM's general-plugin entry point: called in each of vLLM's processes before it does anything."""

import multiprocessing
import os
import threading
from multiprocessing.connection import wait

_WATCH = "demur-watch-parent"
_SPIN_S = 0.001


def register() -> None:
    """Register the architecture by name; the model itself is imported only where it runs."""
    from vllm import ModelRegistry

    if "EnsembleForCausalLM" not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model("EnsembleForCausalLM", "drafts.vllm_model:EnsembleForCausalLM")
    _wait_without_spinning()
    _end_with_parent()
    _may_use_amx()


def _may_use_amx() -> None:
    """Ask Linux for AMX's tile registers, where the CPU has them.

    vLLM's attention uses them and does not ask. With a usual target oneDNN has asked before;
    with a tiny one nobody has, and the first token ends the worker with SIGILL.
    """
    import torch

    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


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
    if parent is None or not multiprocessing.current_process().name.startswith("EngineCore"):
        return
    if any(thread.name == _WATCH for thread in threading.enumerate()):
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)  # its workers end with it, by a pipe of vLLM's

    threading.Thread(target=watch, name=_WATCH, daemon=True).start()
