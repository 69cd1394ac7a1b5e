# `cascade serve` in a container:
#
#     docker build -t cascade .                          for CPU
#     docker build -t cascade --build-arg DEVICE=gpu .   for CUDA (x86-64); run it with --gpus all, serves on the GPU
#     docker run --rm -p 8080:8080 -v "$PWD/model_store:/app/model_store:ro" -v "$PWD/keys:/etc/cascade/keys:ro" cascade
#     docker run --rm -p 127.0.0.1:8080:8080 cascade --host 0.0.0.0 --no-auth      for this machine only, without keys
#
# `keys` has lines BUNDLE SHA256 (docs/http.md). Port 8080 takes images and has /metrics; with `--frontend torchserve` the
# metrics are on 8082. To listen on another port, set PORT (-e PORT=9000), not --port: the health check reads PORT, too.
#
# The bases are exact version tags. To pin one by its digest (docker buildx imagetools inspect IMAGE shows it):
#
#     docker build --build-arg CPU_BASE=python:3.12.12-slim-bookworm@sha256:... .
#
# Every RUN line is one that `make system` or `make env EXTRAS=cpu,all` runs (tests/test_dockerfile.py). torch installs CUDA's libraries
# as wheels, so the smallest CUDA base is enough.

ARG DEVICE=cpu
ARG CPU_BASE=python:3.12.12-slim-bookworm
ARG GPU_BASE=nvidia/cuda:13.0.1-base-ubuntu24.04

FROM ${CPU_BASE} AS cpu

FROM ${GPU_BASE} AS gpu
# The distribution's Python, in whatever version it ships. Triton compiles its launcher at the first launch of a kernel.
# hadolint ignore=DL3008
RUN --mount=type=tmpfs,target=/var/lib/apt/lists \
    apt-get update && apt-get install --yes --no-install-recommends python3 python3-venv gcc libc6-dev python3-dev
ENV CASCADE_SERVE_DEVICE=cuda

FROM ${DEVICE}
ARG DEVICE
WORKDIR /app
ENV PATH=/app/.venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1

# What the installation reads, so that other changes of the code keep this layer.
COPY requirements requirements
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY cascade/__init__.py cascade/
RUN python3 -m venv .venv && \
    .venv/bin/python -u -m pip install --quiet --constraint requirements/${DEVICE}.txt setuptools && \
    .venv/bin/python -u -m pip install --no-build-isolation --constraint requirements/${DEVICE}.txt \
    --editable ".[${DEVICE},all]"

COPY . .

# The code belongs to root and the server only writes to /tmp, so `docker run --read-only --tmpfs /tmp:exec` works; `exec`
# because Triton, on a GPU, loads the code that it has compiled from there.
USER 10001:10001
ENV HOME=/tmp USER=cascade PORT=8080
EXPOSE 8080

HEALTHCHECK --interval=10s --timeout=5s --start-period=2m CMD ["python", "-m", "handlers.health"]

ENTRYPOINT ["cascade", "serve"]
CMD ["--host", "0.0.0.0", "--api-keys", "/etc/cascade/keys"]
