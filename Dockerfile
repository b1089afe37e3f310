# stllm in a container. The base and the builds of torch are arguments: for a CPU by default, or for a GPU.
# CPU:  docker build -t stllm .
# CUDA: docker build -t stllm --build-arg BASE=nvidia/cuda:13.0.2-base-ubuntu24.04 --build-arg TORCH_INDEX= .
# Use:  docker run --rm -v "$PWD/videos:/videos" stllm chat --video /videos/clip.mp4 --question "What happens?"
#       docker run --rm --gpus all -p 8000:8000 -v "$PWD/weights:/weights" stllm serve --ckpt-path /weights --host 0.0.0.0
ARG BASE=python:3.12-slim
FROM ${BASE}
# where torch is installed from; empty: PyPI, whose torch needs a GPU driver for CUDA 13 (580 or newer)
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

RUN command -v python3 || (apt-get update && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*)
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /opt/stllm
COPY requirement.txt .
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch torchvision \
    && pip install --no-cache-dir -r requirement.txt
COPY . .
RUN pip install --no-cache-dir --no-deps -e . && useradd --create-home stllm
USER stllm
WORKDIR /home/stllm
ENTRYPOINT ["stllm"]
