#!/usr/bin/env bash
# All that wants a GPU, in one command: bench/measure_gpu.sh FOLDER [PART...]
#
# Numbers on the device, times of the named workloads, configurations of Triton's kernels, and whole training steps. What
# each part prints goes to FOLDER/log.txt, what it found to FOLDER/PART.json, how it ended to FOLDER/summary.txt; a part
# that fails or runs too long does not keep the others from running. Without parts all of them, in the order below, which
# puts first what the rest depends on: about an hour, mostly compilation.
#
# It runs the Python of $PYTHON (default: python3), which needs bn_fused with the extras bench, test and cuda, for the
# Triton kernels the extra triton too; flax and torch take part where they are installed. `bn-bench report --add
# FOLDER/PART.json` records a run.
set -uo pipefail
parts="doctor numbers quick bfloat16 float32 mlp tune step"
if [[ $# == 0 || $1 == -* ]]; then
    echo "usage: $0 FOLDER [PART...], the parts being $parts" >&2
    exit 2
fi
for word in "${@:2}"; do
    [[ " $parts " == *" $word "* ]] || { echo "$word is no part; the parts are $parts" >&2; exit 2; }
done
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
shift
python=${PYTHON:-python3}
[[ $python == */* ]] && python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
cd "$(dirname "$0")/.."
bench="$python -m bn_fused.bench"
rivals="--against equinox --against flax --against torch"
if "$python" -c 'import bn_fused.bench' 2>/dev/null; then :; else
    echo "$python has no bn_fused: pip install -e '.[bench,test,cuda,triton]', or name another one in PYTHON" >&2
    exit 2
fi
if "$python" -c 'import jax, sys; sys.exit(jax.default_backend() != "gpu")' 2>/dev/null; then :; else
    echo "there is no GPU that JAX sees here: the tests are skipped, and what is timed is not a GPU" >&2
fi

# part NAME SECONDS COMMAND...: run it if it is asked for.
wanted=" $* "
part() {
    local name=$1 seconds=$2 start=$SECONDS
    shift 2
    [[ $wanted == "  " || $wanted == *" $name "* ]] || return 0
    printf '\n===== %s: %s\n' "$name" "$*" >>"$out/log.txt"
    timeout --signal=INT --kill-after=20 "$seconds" "$@" >>"$out/log.txt" 2>&1
    printf '%s: exit %s after %s s\n' "$name" $? $((SECONDS - start)) | tee -a "$out/summary.txt"
}

part doctor 120 $bench doctor
part numbers 900 "$python" -m pytest -n 4 -q tests/kernels/test_gpu_device.py
part quick 300 $bench run --suite quick $rivals --seconds 3 --json "$out/quick.json"
part bfloat16 900 $bench run --suite resnet50 --dtype bfloat16 --layout nhwc $rivals --pass fwd --pass bwd --seconds 3 --json "$out/bfloat16.json"
part float32 900 $bench run --suite resnet50 --layout nhwc $rivals --pass fwd --pass bwd --seconds 3 --json "$out/float32.json"
part mlp 300 $bench run --suite mlp --dtype bfloat16 $rivals --seconds 3 --json "$out/mlp.json"
part tune 900 $bench tune --suite resnet50 --dtype bfloat16 --seconds 3 --output "$out/tune.json"
part step 900 $bench step --seconds 20 --json "$out/step.json"
