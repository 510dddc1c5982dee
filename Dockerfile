# kdcache in a container.
#
#   docker build -t kdcache .                                     on CPUs
#   docker build -t kdcache --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 \
#       --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .        on GPUs
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" kdcache build --help
#                                                                 (GPUs: docker run --gpus all …)
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE}

# The build of PyTorch: its index, as on pytorch.org.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=cluster,lora,plot,s3

# A compiler, for the kernels that torch.compile writes; Python where the base has none.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && { command -v python3 || apt-get install -y --no-install-recommends \
        python3 python3-dev python3-venv; } \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/kdcache
ENV PATH=/opt/kdcache/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN pip install "torch>=2.6" --index-url "${TORCH_INDEX}"

COPY pyproject.toml README.md LICENSE /src/
COPY kdcache /src/kdcache
RUN pip install "/src[${EXTRAS}]" && rm -rf /src

# Not root. With --user, whose files in /work are then yours, a process has neither a name nor a home:
# it gets both here. Models from the hub are kept in /cache: mount a volume there to keep them.
RUN useradd --create-home kdcache && mkdir -p /work /cache && chmod 1777 /work /cache
ENV HOME=/cache HF_HOME=/cache/huggingface USER=kdcache
USER kdcache
WORKDIR /work
ENTRYPOINT ["kdcache"]
