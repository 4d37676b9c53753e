# An image for training on GPUs: docker build -t vlprep-train:0.1.0 .   (docs/cluster.md, "Containers")
# CUDA must be of the major version that torch is built with: DeepSpeed and Triton compile kernels in the container.
ARG CUDA=13.0.2
FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc g++ python3.12 python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3.12 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /opt/vlprep
COPY setup.cfg setup.py pyproject.toml constraints.txt README.md LICENSE datasets.toml ./
COPY prep prep
COPY schemas schemas
COPY storage storage
COPY train train
RUN pip install -c constraints.txt -e '.[train,lora]' \
    && pip install -c constraints.txt liger-kernel
RUN python -c "import os, torch; \
    found, built = os.environ['CUDA_VERSION'], torch.version.cuda; \
    assert built and found.split('.')[0] == built.split('.')[0], f'CUDA {found} here, torch is built with {built}'"
