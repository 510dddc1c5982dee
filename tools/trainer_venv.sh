#!/usr/bin/env bash
# A virtual environment with one trainer and this checkout, for `make test-trainers`.
#
#     tools/trainer_venv.sh NAME FOLDER [PYTHON]    # Python 3.11 or later; 2 to 6 GB, some minutes
#
# NAME is axolotl, llamafactory, megatron, swift, torchao, torchtitan or trl.
#
# What a trainer requires for GPUs, pictures, web pages or other tasks is left out: the rest is installed by
# name, and its own wheel without requirements.
#
# Exit code 75 where it cannot be had here: another Python, no network, no such wheel.
set -euo pipefail
name=$1 venv=$2 python=${3:-python3} torch=torch==2.13.0 more=
cd "$(dirname "$0")/.."
[ -e "$venv/.installed" ] && [ "$venv/.installed" -nt pyproject.toml ] && exit 0
unavailable() { echo "$1" >&2; exit 75; }
case $name in
  axolotl) package=axolotl==0.19.0
    without="torch|xformers|liger-kernel|torchao|fla-core|flash-linear-attention|lm_eval|gradio|modal"
    without="$without|mistral-common|adlfs|ocifs|s3fs|gcsfs|openenv-core|optimum|trackio|art" ;;
  llamafactory) package=llamafactory==0.9.5
    # torchaudio loads beside the torch it was built for, whose libraries of CUDA it needs.
    torch="torch==2.11.0 torchaudio==2.11.0 torchvision==0.26.0"
    without="torch|torchaudio|torchvision|av|fastapi|gradio|hf-transfer|modelscope|sse-starlette|uvicorn" ;;
  megatron) package=megatron-core==0.16.1 without=torch ;;
  swift) package=ms-swift==4.6.0
    without="torch|aiohttp|attrdict|cpm-kernels|fastapi|importlib-metadata|nltk|openai|oss2|rouge"
    without="$without|transformers-stream-generator|uvicorn" ;;
  torchao) package=torchao==0.18.0 without=torch ;;
  # Its modules import Triton, which PyTorch's CPU build does not bring.
  torchtitan) package=torchtitan==0.3.0 without="torch|wandb" more=triton ;;
  trl) package=trl==1.16.0 without=torch ;;
  *) echo "no adapter for $name" >&2; exit 2 ;;
esac
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || unavailable "$name is tested with Python 3.11 or later"
"$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
pip install $torch || unavailable "$torch cannot be installed"
pip download --no-deps -d "$wheels" "$package" || unavailable "$package cannot be fetched"
"$venv/bin/python" tools/needs.py "$wheels"/*.whl "$without" > "$wheels/needs.txt"
pip install $torch -r "$wheels/needs.txt" || unavailable "what $package needs cannot be installed"
pip install --no-deps "$wheels"/*.whl
pip install $torch -r "$wheels/needs.txt" -e . peft pytest pytest-timeout $more
touch "$venv/.installed"
