"""The kernels of the backend `pallas_gpu` compiled for an H200 and a B200, without one: what the compilers say of them.

One process for each chip, because a process compiles for one GPU only.
"""

import os
import re
import subprocess
import sys

import pytest

from bn_fused.kernels.chips import CHIPS

from support.child_process import answer
from support.compiled_operations import by_operation, check_block, check_traffic
from support.compilers import ON_THE_NEWEST_JAX, skip_without_compilers

# On an older JAX test_collectives compiles these kernels, and test_pallas_gpu_plan counts what they move.
pytestmark = [pytest.mark.compilers, *ON_THE_NEWEST_JAX]

# Groups, rows, channels, dtype, activation, residual.
STREAMED = [(3, 65536, 96, "float32", "gelu", True)]  # the residual is kept for the derivative
FORWARD_AND_BACKWARD = [
    (1, 6272, 2048, "bfloat16", "relu", True),  # slab after slab
    (1, 2048, 65, "float32", "silu", False),  # resident, of folded rows
    (1, 1 << 23, 512, "bfloat16", "relu", True),  # 2^32 elements, streamed; y is kept for the derivative
]
MORE = [
    (1, 100352, 64, "bfloat16", "relu", False),
    (2, 4097 * 7, 1000, "float16", "leaky_relu", False),
    (1, 1, 128, "bfloat16", None, True),
    (1, 100352, 256, "float32", None, False),
    (1, 49, 8192, "float32", "silu", True),
    (1, 8, 128, "float32", None, False),
    (5, 1003, 136, "float16", "gelu", True),
    # More than 2^31 elements, slab after slab; in one group and in many.
    (1, 49 * 1024, 1 << 16, "bfloat16", "relu", False),
    (4100, 1000, 1024, "bfloat16", None, False),
]
# Channels that are a multiple of nothing, under every operation.
ODD = [
    (1, 4096, 3, "float32", "silu", False),
    (1, 4096, 17, "bfloat16", None, True),
    (2, 12544, 64, "float16", "relu", True),
    (1, 4096, 65, "bfloat16", "gelu", True),
    (1, 4096, 96, "float16", "leaky_relu", False),
    (1, 784, 1000, "bfloat16", "silu", True),
]
OPERATIONS = ("forward", "backward", "moments", "moments_backward", "normalise", "normalise_backward")
BOTH, ALL_BUT_FORWARD = OPERATIONS[:2], OPERATIONS[1:]


def every_case(*lists):
    return [
        (case, OPERATIONS if case in ODD else ALL_BUT_FORWARD if case in STREAMED else BOTH)
        for cases in lists
        for case in cases
    ]


# The B200's code differs from the H200's in little but its number of cores.
CASES = {
    "h200": every_case(STREAMED, FORWARD_AND_BACKWARD),
    "b200": every_case(FORWARD_AND_BACKWARD[:1]),
}


def compiled_for(target, cases, dump, **programs):
    """What was counted in the programs (see `compiled_operations`), and the dumps of the kernels."""
    skip_without_compilers(target)
    dumped = {"MOSAIC_GPU_DUMP_TO": str(dump), "MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    found = answer(["-m", "support.compiled_operations"], ["pallas_gpu", target, cases, programs], dumped)
    return found, {path.name: path.read_text() for path in dump.iterdir()}


@pytest.fixture(scope="module")
def h200(tmp_path_factory):
    return compiled_for(
        "h200", CASES["h200"], tmp_path_factory.mktemp("h200"), entrances=True, plans=True, blocks=["bfloat16"]
    )


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


def check_shared_memory(dumps, chip, least=0.5):
    """A block that asks for more would only fail when it is launched."""
    asked = []
    for name, text in dumps.items():
        if name.endswith(".mlir-passes.log"):
            asked += map(int, re.findall(r"dynamic_shared_memory_size %c(\d+)_i32", text))
    assert max(asked) <= chip.shared_memory_per_block
    assert max(asked) > chip.shared_memory_per_block * least  # the rings are seen


def test_no_kernel_spills_registers_or_uses_local_memory(chip):
    check_registers(*chip)


@pytest.mark.parametrize("target", ON_EACH_CHIP)
def test_every_block_fits_into_shared_memory(target, request):
    check_shared_memory(request.getfixturevalue(target)[1], CHIPS[target])


def test_launches_and_passes_are_those_of_the_plan_and_nothing_of_the_size_of_x_happens_around_the_kernels(chip):
    check_traffic(chip[0])


@pytest.mark.slow
@pytest.mark.parametrize("target", ["h200", "b200"])
@pytest.mark.parametrize("more", [[case] for case in MORE + ODD], ids=lambda more: "-".join(map(str, more[0])))
def test_more_shapes_compile_in_the_same_way(target, more, tmp_path):
    found, dumps = compiled_for(target, every_case(more), tmp_path)
    counted = by_operation(every_case(more), found)
    check_registers(counted, dumps)
    check_shared_memory(dumps, CHIPS[target], least=0)
    check_traffic(counted)
    for groups, rows, channels, *_ in more:
        if groups * rows * channels > 1 << 31:
            kernels = [text for name, text in dumps.items() if name.endswith(".ptx") and "resident" in name]
            assert kernels
            for text in kernels:
                check_wide_addresses(text, channels * 2)
                if groups > 1:
                    check_wide_addresses(text, rows * channels * 2)


def check_wide_addresses(text, stride):
    """A number of rows or groups is multiplied by their bytes to an address of 64 bits, and not to one of 32."""
    assert re.search(rf"mul\.(wide\.[su]32|lo\.s64)\s+%rd\d+, %rd?\d+, {stride};", text)
    assert not re.search(rf"mul\.lo\.s32\s+%r\d+, %r\d+, {stride};", text)


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
    filled_again = []
    for name, text in dumps.items():
        if not name.endswith(".ptx") or "merge" in name:
            continue
        order = r"fence\.proxy\.async|bar\.sync \t?%r\d+, 128|cp\.async\.bulk\.tensor|ld\.shared|ld\.local|st\.local"
        found = [word.split()[0] for word in re.findall(order, text)]
        assert "ld.local" not in found and "st.local" not in found, name
        last_copy = len(found) - 1 - found[::-1].index("cp.async.bulk.tensor")
        before = [word for word in found[:last_copy] if word != "cp.async.bulk.tensor"]
        if "ld.shared" in before:  # else everything fits into the tiles at once
            assert before[-2:] == ["fence.proxy.async", "bar.sync"], (name, before)
            filled_again.append(name)
    assert sum("resident" in name for name in filled_again) >= 2 and len(filled_again) >= 6, filled_again


def test_blocks_wait_for_each_other_between_their_partial_results_and_the_merge(chip):
    """All threads' stores, the barrier of the warpgroup, the release; the acquire, the barrier, all threads' loads."""
    counted, dumps = chip
    kernels = [text for name, text in dumps.items() if name.endswith(".ptx") and "resident" in name]
    assert len(kernels) >= sum(figures["kind"] != "streaming" for figures in counted.values()) >= 2
    for text in kernels:
        order = r"st\.global|ld\.global(?:\.nc)?|bar\.sync|red\.release\.gpu|ld\.acquire\.gpu|__assertfail(?=,)"
        found = re.findall(order, text.split(".entry", 1)[1])
        # The copy engine's descriptors and the values per channel are read before.
        assert "ld.global.nc" not in found
        (signal,) = (index for index, word in enumerate(found) if word == "red.release.gpu")
        (wait,) = (index for index, word in enumerate(found) if word == "ld.acquire.gpu")
        before = found[:signal]
        assert before[-1] == "bar.sync" and before[-2] == "st.global", before[-6:]
        after = [word for word in found[wait + 1 :] if word != "__assertfail"]
        assert signal < wait and after[0] == "bar.sync" and "ld.global" in after, after[:6]
        assert "__assertfail" in found


def test_between_convolutions_no_copy_or_transpose_is_added(h200):
    """Forward and gradients; the forward of 13 MB stays on chip."""
    check_block(h200[0], "pallas_gpu", "bfloat16", kernels=4)


@pytest.mark.slow
def test_between_convolutions_nothing_is_added_in_float32(tmp_path):
    found, _ = compiled_for("h200", [], tmp_path, blocks=["float32"])
    check_block(found, "pallas_gpu", "float32", kernels=6)


def test_every_way_in_lowers_to_the_kernels(h200):
    one = dict.fromkeys(("layer", "function", "raw", "ensemble", "inference", "x64"), 1)
    virtual = {"virtual batches, both ways": 2, "copies for virtual batches": 0}
    assert h200[0]["entrances"] == one | virtual


def test_a_plan_that_streams_is_taken(h200):
    assert h200[0]["plans"]["streaming"] == 3


def test_a_plan_whose_blocks_could_wait_for_ever_is_refused_before_it_is_lowered(h200):
    assert "200 blocks wait for each other, and h200 has 132 multiprocessors" in h200[0]["plans"]["refused"]


def test_an_older_gpu_is_refused_before_anything_is_lowered():
    """Mosaic GPU would end the process there."""
    skip_without_compilers("a100")
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
    assert "9.x or 10.x (Hopper, Blackwell), and a100 has 8.0" in process.stdout
