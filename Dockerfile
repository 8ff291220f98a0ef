# The image of every node, with GPUs and without: PyPI's torch brings CUDA's libraries, the machine only the driver.
#   docker build --tag REGISTRY/prefray . && docker push REGISTRY/prefray
FROM python:3.11-slim

# wget: KubeRay's probes. A compiler and ninja: DeepSpeed builds its small C++ operations when they are used.
# openssh-client and rsync: `ray up` reaches the other machines from within the container.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential ninja-build openssh-client rsync wget \
    && rm -rf /var/lib/apt/lists/*

ENV DS_BUILD_OPS=0 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

WORKDIR /opt/prefray
COPY constraints.txt ./
# torch first and by its exact version, as in the Makefile; it is the largest layer, and the last to change.
RUN python -m pip install --constraint constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY cluster ./cluster
COPY pipeline ./pipeline
COPY strategies ./strategies
RUN python -m pip install --constraint constraints.txt '.[trackers]'

RUN useradd --create-home --uid 1000 --shell /bin/bash ray
USER ray
WORKDIR /home/ray
