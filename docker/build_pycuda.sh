#!/usr/bin/env bash
# Compile pycuda, which comes as source alone, into a wheel.
#   build_pycuda.sh --constraints constraints.txt --cuda /usr/local/cuda --output /wheels
#                   [--driver FOLDER] [--flags "-O0 -g0"] [--python python3]
# The constraints pin pycuda. CUDA's folder holds include/cuda.h; the driver's folder a libcuda.so to link to, which
# need not be a working one: without it the toolkit's stub serves.
set -euo pipefail

python=python3 driver='' flags=''
while [ $# -gt 1 ]; do
    case $1 in
        --constraints) constraints=$2 ;;
        --cuda) cuda=$2 ;;
        --output) output=$2 ;;
        --driver) driver=$2 ;;
        --flags) flags=$2 ;;
        --python) python=$2 ;;
        *) break ;;
    esac
    shift 2
done
[ $# -eq 0 ] || { echo "build_pycuda.sh: no option, or one without its value: $*" >&2; exit 2; }
: "${constraints:?--constraints is missing}" "${cuda:?--cuda is missing}" "${output:?--output is missing}"
driver=${driver:-$cuda/lib64/stubs}
for file in "$constraints" "$cuda/include/cuda.h" "$cuda/include/cudaProfiler.h" "$driver/libcuda.so"; do
    [ -e "$file" ] || { echo "build_pycuda.sh: error: there is no $file" >&2; exit 1; }
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --constraint "$constraints" setuptools wheel numpy pybind11

# pycuda's settings are a Python file in the home folder. Of itself it would compile one file after the other; random
# numbers and OpenGL are left out, as no engine needs them.
mkdir "$work/home"
cat > "$work/home/.aksetup-defaults.py" <<SETTINGS
from pybind11.setup_helpers import ParallelCompile

ParallelCompile().install()
CUDA_ROOT = "$cuda"
CUDADRV_LIB_DIR = ["$driver"]
CUDA_ENABLE_CURAND = False
CUDA_ENABLE_GL = False
CXXFLAGS = "$flags".split()
SETTINGS
export XDG_CONFIG_HOME=${XDG_CONFIG_HOME:-$HOME/.config}  # where pip's own settings are
HOME=$work/home "$work/venv/bin/python" -m pip wheel --quiet --no-cache-dir --no-deps --no-build-isolation \
    --no-binary pycuda --constraint "$constraints" --wheel-dir "$output" pycuda
