"""The kernels of the backend `pallas_gpu` compiled for an H200 and a B200, without one: what the compilers say of them.

One process for each chip, because a process compiles for one GPU only.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from bn_fused.bench import deviceless
from bn_fused.kernels.chips import CHIPS
from compiled_operations import by_operation, check_traffic

# Groups, rows, channels, dtype, activation, residual.
EVERY_OPERATION = [
    (1, 100352, 64, "bfloat16", "relu", False),
    (3, 65536, 96, "float32", "gelu", True),
]
FORWARD_AND_BACKWARD = [
    (1, 6272, 2048, "bfloat16", "relu", True),
    (2, 4097 * 7, 1000, "float16", "leaky_relu", False),
    (1, 2048, 65, "float32", "silu", False),
    (1, 1, 128, "bfloat16", None, True),
    (1, 1 << 23, 512, "bfloat16", "relu", False),  # 2^32 elements
]
MORE = [
    (1, 100352, 256, "float32", None, False),
    (1, 4096, 3, "float32", "silu", False),
    (1, 4096, 17, "bfloat16", None, True),
    (1, 49, 8192, "float32", "silu", True),
    (1, 8, 128, "float32", None, False),
    (5, 1003, 136, "float16", "gelu", True),
]
OPERATIONS = ("forward", "backward", "moments", "moments_backward", "normalise", "normalise_backward")
BOTH = OPERATIONS[:2]


def every_case(*lists):
    return [(case, OPERATIONS if case in EVERY_OPERATION else BOTH) for cases in lists for case in cases]


# The B200's code differs from the H200's in little but its number of cores.
CASES = {
    "h200": every_case(EVERY_OPERATION, FORWARD_AND_BACKWARD),
    "b200": every_case(EVERY_OPERATION[1:], FORWARD_AND_BACKWARD[:1]),
}

PROGRAMS = {"entrances": True, "blocks": ["float32", "bfloat16"]}
COMPILE = pathlib.Path(__file__).with_name("compiled_operations.py")


def compiled_for(target, cases, dump, blocks=False):
    missing = deviceless.missing(target)
    if missing is not None:
        pytest.skip(missing)
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "MOSAIC_GPU_DUMP_TO": str(dump),
        "MOSAIC_GPU_DUMP_PTX": "1",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
    }
    process = subprocess.run(
        [sys.executable, str(COMPILE)],
        input=json.dumps(["pallas_gpu", target, cases, PROGRAMS if blocks else {}]),
        capture_output=True,
        text=True,
        timeout=580,
        env=environment,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout), {path.name: path.read_text() for path in dump.iterdir()}


@pytest.fixture(scope="module")
def h200(tmp_path_factory):
    return compiled_for("h200", CASES["h200"], tmp_path_factory.mktemp("h200"), blocks=True)


@pytest.fixture(scope="module")
def b200(tmp_path_factory):
    return compiled_for("b200", CASES["b200"], tmp_path_factory.mktemp("b200"))


# The tests that ask for a chip's fixture by its name go to the worker that has it.
ON_EACH_CHIP = [pytest.param(name, marks=pytest.mark.xdist_group(f"test_pallas_gpu_compiled {name}")) for name in CASES]


@pytest.fixture(params=ON_EACH_CHIP)
def chip(request):
    """What was counted, by case and operation, and the dumps of the kernels."""
    found, dumps = request.getfixturevalue(request.param)
    return by_operation(CASES[request.param], found), dumps


def check_registers(counted, dumps):
    reports = {name: text for name, text in dumps.items() if name.endswith(".ptxas")}
    assert len(reports) >= len(counted)
    for name, text in reports.items():
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in text, (name, text)
        (registers,) = map(int, re.findall(r"Used (\d+) registers", text))
        # A block of 1024 threads has no more than 64 for each; one of 512, twice as many.
        assert registers <= (64 if "merge" in name else 128), (name, text)


def check_shared_memory(dumps, chip):
    """A block that asks for more would only fail when it is launched."""
    asked = []
    for name, text in dumps.items():
        if name.endswith(".mlir-passes.log"):
            asked += map(int, re.findall(r"dynamic_shared_memory_size %c(\d+)_i32", text))
    assert max(asked) <= chip.shared_memory_per_block
    assert max(asked) > chip.shared_memory_per_block // 2  # the rings are seen


def test_no_kernel_spills_registers_or_uses_local_memory(chip):
    check_registers(*chip)


@pytest.mark.parametrize("target", ON_EACH_CHIP)
def test_every_block_fits_into_shared_memory(target, request):
    check_shared_memory(request.getfixturevalue(target)[1], CHIPS[target])


def test_launches_and_passes_are_those_of_the_plan_and_nothing_of_the_size_of_x_happens_around_the_kernels(chip):
    check_traffic(chip[0])


@pytest.mark.slow
@pytest.mark.parametrize("target", ["h200", "b200"])
def test_more_shapes_compile_in_the_same_way(target, tmp_path):
    cases = every_case(EVERY_OPERATION, FORWARD_AND_BACKWARD, MORE)
    found, dumps = compiled_for(target, cases, tmp_path)
    counted = by_operation(cases, found)
    check_registers(counted, dumps)
    check_shared_memory(dumps, CHIPS[target])
    check_traffic(counted)


def test_addresses_are_computed_in_64_bits(h200):
    """In the kernel for 2^32 elements, a row's number is multiplied to an address of 64 bits."""
    _, dumps = h200
    kernels = [text for name, text in dumps.items() if name.endswith(".ptx") and "normalise" in name]
    assert any(re.search(r"mul\.wide\.[su]32\s+%rd\d+, %r\d+, 1024;", text) for text in kernels)


def test_a_value_that_is_not_a_number_passes_the_relu(h200):
    _, dumps = h200
    maxima = [
        line for name, text in dumps.items() if name.endswith(".ptx") for line in re.findall(r"max\.\S*f32", text)
    ]
    assert maxima and set(maxima) == {"max.NaN.f32"}


def test_a_tile_is_filled_again_only_behind_the_fence_and_the_barrier_of_its_warpgroup(h200):
    """What the interpreter cannot see: it has one thread for the 128 of a warpgroup."""
    _, dumps = h200
    refilled = 0
    for name, text in dumps.items():
        if not name.endswith(".ptx") or "merge" in name:
            continue
        order = r"fence\.proxy\.async|bar\.sync \t?%r\d+, 128|cp\.async\.bulk\.tensor|ld\.shared|ld\.local|st\.local"
        found = [word.split()[0] for word in re.findall(order, text)]
        assert "ld.local" not in found and "st.local" not in found, name
        last_copy = len(found) - 1 - found[::-1].index("cp.async.bulk.tensor")
        before = [word for word in found[:last_copy] if word != "cp.async.bulk.tensor"]
        if before:  # else all rows are one tile, as for the array of one row
            assert before[-2:] == ["fence.proxy.async", "bar.sync"], (name, before)
            refilled += 1
    assert refilled > 20, refilled


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_between_convolutions_no_copy_or_transpose_is_added(h200, dtype):
    blocks = h200[0]["blocks"][dtype]
    ours, theirs = blocks["pallas_gpu"], blocks["jnp"]
    assert len(ours["copies"]) <= len(theirs["copies"]), (ours["details"], theirs["details"])
    assert ours["kernels"] == 6
    assert ours["reads"] <= theirs["reads"] and ours["writes"] <= theirs["writes"], (ours, theirs)


def test_every_way_in_lowers_to_the_kernels(h200):
    three = dict.fromkeys(("layer", "function", "raw", "ensemble", "x64"), 3)
    assert h200[0]["entrances"] == three | {"inference": 1}


def test_an_older_gpu_is_refused_before_anything_is_lowered():
    """Mosaic GPU would end the process there."""
    missing = deviceless.missing("a100")
    if missing is not None:
        pytest.skip(missing)
    script = (
        "import jax, jax.numpy as jnp, bn_fused\n"
        "from bn_fused.bench.deviceless import compile_for\n"
        "stats = bn_fused.RunningStats.init(64)\n"
        "run = lambda x: bn_fused.batch_norm(x, stats, backend='pallas_gpu')[0]\n"
        "try: compile_for('a100', run, jax.ShapeDtypeStruct((4096, 64), jnp.float32))\n"
        "except bn_fused.BackendError as error: print(error)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert process.returncode == 0, process.stderr
    assert "9.0 (Hopper) or later, and a100 has 8.0" in process.stdout
