# The image of every pod: Autotune, Ray and DeepSpeed on CUDA. Versions are those of constraints.txt.
#   docker build -t registry.example.com/autotune:0.1.0-ray2.60.0 .
# With `devel`, since Triton, torch.compile and DeepSpeed's ops need compilers while trials run.
# CUDA's major version must be that of the PyTorch wheel, which the build checks below.
ARG CUDA=13.0.1
FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04

# Of the GPUs that trials run on: A100 8.0, L40S 8.9, H100 and H200 9.0, B200 10.0.
ARG CUDA_ARCHITECTURES="8.0;9.0"

ENV DEBIAN_FRONTEND=noninteractive \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    PATH=/opt/autotune/bin:$PATH

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# wget and procps are for the probes and scripts of cluster operators.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        build-essential libaio-dev ninja-build procps python3.12-dev python3.12-venv wget \
    && rm -rf /var/lib/apt/lists/* \
    && python3.12 -m venv /opt/autotune \
    && userdel --remove ubuntu \
    && groupadd --gid 1000 autotune \
    && useradd --uid 1000 --gid 1000 --create-home autotune \
    && install -d -o autotune -g autotune /results /models

# What changes seldom comes first: a change of the code rebuilds the last layers alone.
WORKDIR /src
COPY constraints.txt ./
RUN pip install -c constraints.txt torch setuptools wheel packaging ninja \
    && python -c 'import subprocess, torch; \
nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout; \
major = str(torch.version.cuda).split(".")[0]; \
assert f"release {major}." in nvcc, f"PyTorch is for CUDA {torch.version.cuda}: build with --build-arg CUDA={major}.x.y"'

# DeepSpeed's optimizers, built now instead of in the first trial of every node.
RUN DS_BUILD_CPU_ADAM=1 DS_BUILD_FUSED_ADAM=1 TORCH_CUDA_ARCH_LIST="${CUDA_ARCHITECTURES}" \
    pip install -c constraints.txt --no-build-isolation --no-binary deepspeed deepspeed

COPY pyproject.toml README.md LICENSE ./
COPY autotune ./autotune
RUN pip install -c constraints.txt '.[postgres]'

COPY search_spaces /search_spaces
USER 1000:1000
WORKDIR /home/autotune
# KubeRay brings its own command, `ray start`; on its own the image is the command line.
CMD ["autotune", "--help"]
