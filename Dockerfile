# For machines with NVIDIA GPUs:
#     docker build -t pgprune .
#     docker run --gpus all -v "$PWD:/data" -v "$HOME/.cache/huggingface:/root/.cache/huggingface" pgprune doctor
# CUDA chooses the torch wheel: docs/scale.md says which driver each one needs.
FROM python:3.12-slim
ARG CUDA=cu126
RUN pip install --no-cache-dir torch --index-url "https://download.pytorch.org/whl/$CUDA"
COPY . /opt/pgprune
RUN pip install --no-cache-dir "/opt/pgprune[gguf,multi-gpu,eval,recovery]"
WORKDIR /data
ENTRYPOINT ["pgprune"]
