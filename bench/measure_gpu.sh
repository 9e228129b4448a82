#!/usr/bin/env bash
# All that wants a GPU, in one command: bench/measure_gpu.sh FOLDER [PART...] [--minutes N] [--shape N,C,...] [--rehearse]
#
# It runs the Python of $PYTHON (default: python3) on this tree, installed or not, which needs the packages of the extras
# bench and test, and jax[cuda13]; for the Triton kernels that of the extra triton. flax and torch take part where they
# are installed. `bench/measure/__main__.py` says what is measured and where it is saved; `bn-bench report --add
# FOLDER/SUITE.json` records a run.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# The packages as they are installed: the kernels and the benchmark below bn_fused.
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mkdir "$tree/bn_fused"
ln -s "$root"/bn_fused/* "$root/kernels" "$root/bench" "$tree/bn_fused/"
export PYTHONPATH=$tree${PYTHONPATH:+:$PYTHONPATH}
# Not the folder it is called in, which may be the repository: its bn_fused lacks the packages beside it.
export PYTHONSAFEPATH=1
"${PYTHON:-python3}" -m bn_fused.bench.measure "$@"
