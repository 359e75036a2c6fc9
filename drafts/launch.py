"""Starting vLLM with an ensemble: settings, environment, checks.

The rest of the engine is in `drafts.engine`.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from drafts import channel
from drafts.errors import EngineNotReady, ManifestError, WeightsError
from drafts.manifest import Ensemble, ResidualDraft
from drafts.parallel import check_divides
from drafts.weights import read_member

# Likeliest tokens that can be asked for beside each token; OpenAI's limit.
MAX_TOP = 20
_CPU_BLOCK = 32  # the least that vLLM's attention on a CPU is made for


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
        description="KV cache of all members, on each device; 0 leaves the size to vLLM",
    )
    tensor_parallel_size: int = Field(
        default=1, ge=1, description="devices that share the target and the drafts"
    )
    data_parallel_size: int = Field(
        default=1, ge=1, description="engines side by side, of so many devices each"
    )
    pipeline_parallel_size: int = Field(default=1, description="1: no other is supported")

    @field_validator("pipeline_parallel_size")
    @classmethod
    def _no_pipeline(cls, size: int) -> int:
        if size != 1:
            raise ValueError(
                "pipeline parallelism is not supported: drafts read hidden states of the target's "
                "inner layers, and the logits of target and drafts must meet on one device; share "
                "the layers with tensor_parallel_size"
            )
        return size

    @property
    def devices(self) -> int:
        """How many devices (on a CPU, worker processes) the engine takes."""
        return self.tensor_parallel_size * self.data_parallel_size


def abandon_start(*, kill: bool = False) -> None:
    """Make an `Engine.start` under way fail soon, by ending the processes that it has begun.

    Args:
        kill: also those that do not hear SIGTERM.
    """
    for process in multiprocessing.active_children():
        if kill:
            process.kill()
        else:
            process.terminate()


def build(ensemble: Ensemble, config: EngineConfig) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    _check_length(ensemble, config.max_model_len)
    check_divides(ensemble, config.tensor_parallel_size)
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
        # vLLM's 128 on a CPU is longer than most prompts, and shares whole blocks only.
        block_size=_CPU_BLOCK if runs_on_cpu() else None,
        tensor_parallel_size=config.tensor_parallel_size,
        data_parallel_size=config.data_parallel_size,
        # Left alone, vLLM would spread its workers over Ray's machines wherever Ray runs.
        distributed_executor_backend="mp" if config.devices > 1 else None,
        # No torch.compile, no CUDA graphs: a graph would freeze which rows are wanted.
        enforce_eager=True,
        logprobs_mode="raw_logits",
        max_logprobs=channel.M + MAX_TOP,
        logits_processors=["drafts.vllm_model:MaskMetricColumns"],
        worker_extension_cls="drafts.vllm_model.WorkerMethods",
        generation_config="vllm",
        # Never pickles, never code of a model's folder.
        load_format="safetensors",
        trust_remote_code=False,
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


def set_environment(workers: int = 1) -> None:
    """What vLLM reads from the environment; what the user has set stays.

    Args:
        workers: processes that share this machine's cores.
    """
    # Not a matter of choice: `drafts.vllm_model` is written for the V1 runner.
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    cores = len(os.sched_getaffinity(0))
    defaults = {
        # Left alone, vLLM's CPU worker keeps a core for its front end.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(max(1, cores // workers)),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        # glibc would give logits back to the system at each step and fault their pages in anew.
        "MALLOC_MMAP_THRESHOLD_": str(4 * 2**30),
        "MALLOC_TRIM_THRESHOLD_": str(4 * 2**30),
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


def runs_on_cpu() -> bool:
    """Is vLLM's platform here the CPU?"""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())
