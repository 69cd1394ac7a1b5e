# The same server as `make serve`:
#
#     docker build -t cascade .                          on CPU
#     docker build -t cascade --build-arg DEVICE=gpu .   on CUDA (x86-64); run it with --gpus all
#     docker run --rm -p 8080:8080 -p 8082:8082 -v "$PWD/model_store:/app/model_store:ro" cascade
#
# 8080 takes images, 8082 has the metrics; with `--host 0.0.0.0 --frontend asgi` as arguments 8080 has both. Every RUN
# line is one that `make system` or `make env` runs (tests/test_dockerfile.py). CUDA's libraries come as wheels with torch, so its base image is the smallest.

ARG DEVICE=cpu

FROM python:3.12-slim-bookworm AS cpu

FROM nvidia/cuda:13.0.1-base-ubuntu24.04 AS gpu
# The distribution's Python, in the version that it has.
# hadolint ignore=DL3008
RUN --mount=type=tmpfs,target=/var/lib/apt/lists \
    apt-get update && apt-get install --yes --no-install-recommends python3 python3-venv

FROM ${DEVICE}
ARG DEVICE
WORKDIR /app
ENV PATH=/app/.venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1

COPY requirements requirements
RUN python3 -m venv .venv && \
    .venv/bin/python -u -m pip install --requirement requirements/${DEVICE}.txt

COPY . .
RUN .venv/bin/python -u -m pip install --quiet --no-deps --no-build-isolation --editable .

# The code belongs to root and the server writes to /tmp alone, so `docker run --read-only --tmpfs /tmp` works, too.
USER 10001:10001
ENV HOME=/tmp USER=cascade
EXPOSE 8080 8082

HEALTHCHECK --interval=10s --timeout=5s --start-period=2m CMD ["python", "-m", "handlers.health"]

ENTRYPOINT ["cascade", "serve"]
CMD ["--frontend", "torchserve", "--host", "0.0.0.0"]
