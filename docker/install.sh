#!/usr/bin/env bash
# Install trt-int8 into a virtual environment of its own, and see that it starts.
#   install.sh /opt/trt-int8 PROJECT tensorrt10,cuda [OPTION OF PIP ...]
# PROJECT is the repository or a wheel of it. TensorRT's wheels are placeholders on the package index, which fetch the
# libraries from NVIDIA's own; both must be reachable.
set -euo pipefail

[ $# -ge 3 ] || { echo "install.sh: VENV, PROJECT and EXTRAS are needed, not: $*" >&2; exit 2; }
venv=$1 project=$2 extras=$3
shift 3
python3 -m venv "$venv"
"$venv/bin/python" -m pip install "$@" "$project[$extras]"
"$venv/bin/trt-int8" --version
