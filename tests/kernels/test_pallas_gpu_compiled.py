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
from support.compilers import skip_without_compilers
from support.ptx import Flow
from support.versions import ON_THE_NEWEST_JAX

# On an older JAX test_collectives compiles these kernels, and test_pallas_gpu_plan counts what they move.
pytestmark = [pytest.mark.compilers, *ON_THE_NEWEST_JAX]

# Groups, rows, channels, dtype, activation, residual.
STREAMED = [
    (3, 65536, 96, "float32", "gelu", True),  # the residual is kept for the derivative, and dz is written
    (1, 1 << 23, 512, "bfloat16", "relu", True),  # 2^32 elements; y is kept for the derivative
]
IN_ONE_LAUNCH = [
    (1, 6272, 2048, "bfloat16", "relu", True),  # partial
    (1, 2048, 65, "float32", "silu", False),  # resident, of folded rows
    (1, 6272, 4096, "float32", None, False),  # slab after slab
    (1, 1 << 23, 512, "bfloat16", "relu", True),
]
MORE = [
    (1, 100352, 64, "bfloat16", "relu", False),
    (2, 4097 * 7, 1000, "float16", "leaky_relu", False),
    (1, 1, 128, "bfloat16", None, True),
    (1, 100352, 256, "float32", None, False),
    (1, 49, 8192, "float32", "silu", True),
    (1, 8, 128, "float32", None, False),
    (5, 1003, 136, "float16", "gelu", True),
    # More than 2^31 elements, unit after unit; in one group and in many.
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
BOTH, STREAMED_BOTH = ("forward", "backward"), ("streamed forward", "streamed backward")
OTHERS = ("moments", "moments_backward", "normalise", "normalise_backward")


def every_case(cases, operations):
    return [(case, operations) for case in cases]


# The B200's code differs from the H200's in little but its number of cores.
CASES = {
    "h200": [
        *every_case(IN_ONE_LAUNCH, BOTH),
        *every_case(STREAMED[:1], (*STREAMED_BOTH, *OTHERS[1:])),
        *every_case(STREAMED[1:], STREAMED_BOTH),
    ],
    "b200": every_case(IN_ONE_LAUNCH[:1], BOTH),
}


def compiled_for(target, cases, dump, **programs):
    """What was counted in the programs (see `compiled_operations`), and the dumps of the kernels."""
    skip_without_compilers(target)
    dumped = {"MOSAIC_GPU_DUMP_TO": str(dump), "MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    found = answer(["-m", "support.compiled_operations"], ["pallas_gpu", target, cases, programs], dumped)
    return found, {path.name: path.read_text() for path in dump.iterdir()}


@pytest.fixture(scope="module")
def h200(tmp_path_factory):
    programs = dict(entrances=True, plans=True, fills=True, blocks=["bfloat16"])
    return compiled_for("h200", CASES["h200"], tmp_path_factory.mktemp("h200"), **programs)


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
        (threads,) = map(int, re.findall(r"\.maxntid (\d+), 1, 1", dumps[name.removesuffix("as")]))
        # What a multiprocessor has for all of them.
        assert registers * threads <= 1 << 16, (name, text)


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


def test_every_kind_of_kernel_is_compiled(h200):
    kinds = {(name, figures["kind"]) for (_, name), figures in by_operation(CASES["h200"], h200[0]).items()}
    for kind in ("resident", "partial", "slab"):
        assert {("forward", kind), ("backward", kind)} <= kinds
    assert {(name, "streaming") for name in STREAMED_BOTH} <= kinds


@pytest.mark.slow
@pytest.mark.parametrize("target", ["h200", "b200"])
@pytest.mark.parametrize("more", MORE + ODD, ids=lambda more: "-".join(map(str, more)))
def test_more_shapes_compile_in_the_same_way(target, more, tmp_path):
    cases = every_case([more], (*BOTH, *STREAMED_BOTH, *OTHERS) if more in ODD else BOTH)
    found, dumps = compiled_for(target, cases, tmp_path)
    counted = by_operation(cases, found)
    check_registers(counted, dumps)
    check_shared_memory(dumps, CHIPS[target], least=0)
    check_traffic(counted)
    check_only_the_copy_engine_moves_arrays(dumps)


def kernels_of(dumps):
    """The texts of the kernels, by name."""
    return {name: text for name, text in dumps.items() if name.endswith(".ptx")}


def in_one_launch(dumps):
    """The texts of those that are a whole operation."""
    return {
        name: text
        for name, text in kernels_of(dumps).items()
        if re.fullmatch(r"bn_fused_(forward|backward)_\d+\.ptx", name)
    }


def check_only_the_copy_engine_moves_arrays(dumps):
    """By numbers of rows and columns of 32 bits, and no address that would need more is computed in a kernel.

    Seen where they have 16 bits: values per channel and partial results, which threads read and write, have 32.
    """
    kernels = {name: text for name, text in kernels_of(dumps).items() if "merge" not in name}
    for name, text in kernels.items():
        assert re.search(FILLED, text) and not re.search(r"(ld|st)\.global\S*\.[bsu]16", text), name


def test_arrays_of_more_than_2_31_elements_have_no_addresses_of_32_bits(h200):
    check_only_the_copy_engine_moves_arrays(h200[1])
    assert any(re.search(r"ld\.shared\S*\.b16", text) for text in kernels_of(h200[1]).values())


def test_a_value_that_is_not_a_number_passes_the_relu(h200):
    _, dumps = h200
    maxima = [
        line for name, text in dumps.items() if name.endswith(".ptx") for line in re.findall(r"max\.\S*f32", text)
    ]
    assert maxima and set(maxima) == {"max.NaN.f32"}


# The copy engine's way into shared memory and out of it, and what it has to wait for: all threads of the warpgroup have
# read and written the tile, and told the copy engine so; results have left the tile, or arrived.
FILLED, EMPTIED = r"cp\.async\.bulk\.tensor\.\dd\.shared", r"cp\.async\.bulk\.tensor\.\dd\.global"
WARPGROUP_IS_DONE = (r"fence\.proxy\.async", r"bar\.sync\s+%r\d+, 128")
LEFT, ARRIVED = r"cp\.async\.bulk\.wait_group", r"cp\.async\.bulk\.wait_group\s+0;"


def too_early(text):
    """The instructions that fill or empty a tile on some way before they may, and those that may read a tile again."""
    flow = Flow(text)
    filled, emptied = flow.find(FILLED), flow.find(EMPTIED)
    found = [each for each in filled + emptied if flow.unguarded(each, WARPGROUP_IS_DONE, r"(ld|st)\.shared")]
    found += [each for each in filled if flow.unguarded(each, [LEFT], EMPTIED)]
    tiles = flow.find(r"ld\.shared\.v[24]")
    return found, [each for each in filled if any(flow.leads(tile, each) for tile in tiles)]


def test_a_tile_is_filled_and_emptied_only_behind_the_fence_and_the_barrier_of_its_warpgroup(h200):
    """What the interpreter cannot see: it has one thread for the 128 of a warpgroup."""
    kernels = {name: text for name, text in kernels_of(h200[1]).items() if "merge" not in name}
    filled_again = []
    for name, text in kernels.items():
        assert not re.search(r"(ld|st)\.local", text), name
        early, again = too_early(text)
        assert not early, (name, [Flow(text).instructions[each] for each in early])
        filled_again += [name] * bool(again)
        for guard in ("fence.proxy.async", "cp.async.bulk.wait_group"):
            # Without it the check above would fail, where it is needed.
            without = "\n".join(line for line in text.splitlines() if guard not in line)
            assert too_early(without)[0] or not (again if "fence" in guard else again and re.search(EMPTIED, text)), (
                name
            )
    assert sum(name in in_one_launch(h200[1]) for name in filled_again) >= 5 and len(filled_again) >= 11, filled_again


def test_what_the_first_pass_writes_has_arrived_before_the_second_may_read_it(h200):
    found = 0
    for name, text in in_one_launch(h200[1]).items():
        flow = Flow(text)
        (signal,) = flow.find(r"red\.release\.gpu")
        written = [each for each in flow.find(EMPTIED) if flow.leads(each, signal)]
        if written and not flow.leads(signal, signal):  # else what the second pass of the unit before has written
            found += 1
            assert not flow.unguarded(signal, [ARRIVED], EMPTIED), name
    assert found >= 1


def test_blocks_wait_for_each_other_between_their_partial_results_and_the_merge(chip):
    """All threads' stores, the barrier of the warpgroup, the release; the acquire, the barrier, all threads' loads."""
    counted, dumps = chip
    kernels = in_one_launch(dumps)
    assert len(kernels) >= sum(name in BOTH for _, name in counted) >= 2
    for text in kernels.values():
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
    """Forward and gradients, one launch each."""
    check_block(h200[0], "pallas_gpu", "bfloat16", kernels=2)


@pytest.mark.slow
def test_between_convolutions_nothing_is_added_in_float32(tmp_path):
    found, _ = compiled_for("h200", [], tmp_path, blocks=["float32"])
    check_block(found, "pallas_gpu", "float32", kernels=2)


def test_every_way_in_lowers_to_the_kernels(h200):
    one = dict.fromkeys(("layer", "function", "raw", "ensemble", "inference", "x64"), 1)
    virtual = {"virtual batches, both ways": 2, "copies for virtual batches": 0}
    assert h200[0]["entrances"] == one | virtual


def test_the_counters_of_all_layers_are_zeroed_in_one_launch(h200):
    assert h200[0]["fills"] == {"kernels": 6, "fills": 1}


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
