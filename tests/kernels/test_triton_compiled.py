"""The kernels of the backend `triton`, compiled: by Triton for each kind of GPU, and within XLA's programs for two.

For AMD GPUs, for which there is no XLA here, programs are lowered to what XLA would be given.
"""

import pytest

from bn_fused.kernels.backends.triton import limits
from bn_fused.kernels.backends.triton.plan import heuristic, search_set
from bn_fused.kernels.chips import CHIPS
from bn_fused.kernels.target import Problem, Target

from support.child_process import answer
from support.compiled_operations import by_operation, check_block, check_traffic
from support.compilers import skip_without_compilers, skip_without_triton
from support.versions import ON_THE_NEWEST_JAX, on_the_newest_jax

pytestmark = pytest.mark.compilers

OPERATIONS = ("forward", "backward", "moments", "moments_backward", "normalise", "normalise_backward")
BOTH = OPERATIONS[:2]


# --- by Triton alone ------------------------------------------------------------------------------------------

CUDA = (80, 86, 89, 90, 100, 120)
HIP = {"gfx90a": "mi250x", "gfx942": "mi300x"}
# Groups, rows, channels, dtype, activation, residual, configuration.
BFLOAT16 = (1, 100352, 64, "bfloat16", "gelu", True, None)
FLOAT32 = (1, 100352, 256, "float32", "relu", False, None)
RAGGED = (2, 4096, 65, "float16", "silu", False, None)
LARGE = (1, 1 << 23, 512, "bfloat16", "relu", False, None)  # 2^32 values
SLABS = (1, 50176, 512, "bfloat16", "relu", True, vars(heuristic(1, 50176, 512, 2, CHIPS["rtx4090"])))


def searched(case, chip="h200"):
    """The case with every configuration that `bn-bench tune` tries."""
    groups, rows, channels, dtype, activation, residual, _ = case
    itemsize = {"float32": 4}.get(dtype, 2)
    configs = search_set(groups, rows, channels, itemsize, CHIPS[chip])
    return [(*case[:-1], vars(config)) for config in configs]


@pytest.fixture(scope="module")
def by_triton():
    """What the compilers say of each launch: [backend, architecture, case, operation, launch, figures]."""
    skip_without_triton()
    work = [
        ["cuda", architecture, [BFLOAT16], OPERATIONS if architecture in (80, 90) else BOTH] for architecture in CUDA
    ]
    work += [["hip", architecture, [BFLOAT16], OPERATIONS] for architecture in HIP]
    work += [["hip", architecture, [FLOAT32, RAGGED], BOTH] for architecture in HIP]
    work += [["cuda", 89, [SLABS], BOTH]]
    work += [["cuda", 80, [FLOAT32, RAGGED], BOTH], ["cuda", 90, [LARGE], BOTH], ["hip", "gfx942", [LARGE], BOTH]]
    return answer(["-m", "support.triton_compiled"], work)


def check_registers(found):
    """No spills, and registers for as many blocks of threads on each multiprocessor as the plan starts there."""
    for backend, architecture, case, operation, name, figures in found:
        what = (architecture, case, operation, name, figures)
        assert figures["spills"] == 0, what
        # 256 KiB of registers in a multiprocessor, 512 in a compute unit.
        most, lanes = (131072, 64) if backend == "hip" else (65536, 32)
        assert figures["registers"] * figures["warps"] * lanes <= most, what
        # What every GPU since Ampere gives to a block of threads, where several tiles are in flight; AMD's have 64.
        several = case[-1] is not None and case[-1]["stages"] > 1
        assert figures["shared"] <= (99 if several else 48) * 1024, what


def test_no_kernel_spills_registers(by_triton):
    assert {(backend, architecture) for backend, architecture, *_ in by_triton} == {
        *(("cuda", architecture) for architecture in CUDA),
        *(("hip", architecture) for architecture in HIP),
    }
    assert {(operation, name) for *_, operation, name, _ in by_triton} >= {
        (operation, "normalise") for operation in ("forward", "normalise")
    }
    check_registers(by_triton)


def test_the_blocks_that_the_heuristic_starts_fit_on_a_multiprocessor_together(by_triton):
    for backend, architecture, case, operation, name, figures in by_triton:
        what = (architecture, case, operation, name, figures)
        itemsize = {"float32": 4}.get(case[3], 2)
        if backend == "hip" and "merge" not in name:
            config = heuristic(*case[:3], itemsize, CHIPS[HIP[architecture]])
            # Each of four SIMDs has 512 registers of 64 lanes, given out by eights, for at most 8 wavefronts.
            wavefronts = 4 * min(8, 512 // (-(-figures["registers"] // 8) * 8))
            assert wavefronts // figures["warps"] >= config.blocks_per_core, what
        if backend == "cuda" and "merge" not in name:
            chip = CHIPS["h200" if architecture == 90 else "a100"]
            config = heuristic(*case[:3], itemsize, chip)
            blocks = 65536 // (figures["registers"] * figures["warps"] * 32)
            assert config.blocks_per_core * figures["shared"] <= chip.shared_memory_per_core, what
            # Two passes of a backward with an activation have one block in six wait for a place.
            assert blocks >= config.blocks_per_core - 2, what


def narrow_stores(name, figures):
    """Values per channel leave one by one, and so does the number of the next slab."""
    next_slab = figures["slab"] and name in ("normalise", "backward_dx")
    return {"moments": 3, "backward_sums": 2, "normalise_backward": 2}.get(name, 0) + next_slab


def test_tiles_are_loaded_and_stored_16_bytes_at_a_time(by_triton):
    seen = 0
    for backend, _, case, operation, name, figures in by_triton:
        if "merge" in name or case == list(RAGGED):
            continue
        what = (case, operation, name, figures)
        if backend == "hip":
            assert set(figures["loads"]) <= {"dwordx4", "dword"} and "dwordx4" in figures["loads"], what
            narrow = [load for load in figures["loads"] if load == "dword"]
            assert len(narrow) < 8, what
            narrow = narrow_stores(name, figures)
            assert [store for store in figures["stores"] if store != "dwordx4"] == ["dword"] * narrow, what
            seen += 1
            continue
        # A value of 16 bits is loaded alone nowhere; of the others that are, there are no more than the values per
        # channel of a thread's columns and the count of a group. A tile read one by one has 8 for each array. Or tiles
        # are copied to shared memory.
        narrow = [load for load in figures["loads"] if load != "v4.b32"]
        assert set(narrow) <= {"v1.b32"} and len(narrow) < 8, what
        assert "v4.b32" in figures["loads"] or set(figures["copies"]) == {16}, what
        narrow = narrow_stores(name, figures)
        assert [store for store in figures["stores"] if store != "v4.b32"] == ["v1.b32"] * narrow, what
        seen += 1
    assert seen >= len(CUDA) * 4 + len(HIP) * 8
    assert {backend for backend, *_, figures in by_triton if figures["slab"]} == {"cuda", "hip"}


def test_what_is_not_read_again_need_not_stay_in_the_cache(by_triton):
    """Of the residual's step in slabs: x and the residual; dy and y, of which dz has been made; dz and x."""
    dropped = {
        name: figures["dropped"]
        for *_, case, _, name, figures in by_triton
        if case == list(SLABS) and "merge" not in name
    }
    assert dropped == {"moments": 0, "normalise": 2, "backward_sums": 2, "backward_dx": 2}


def test_folded_rows_are_loaded_16_bytes_at_a_time_too(by_triton):
    for backend, _, case, operation, name, figures in by_triton:
        if case == list(RAGGED) and name in ("moments", "normalise"):
            widest = "dwordx4" if backend == "hip" else "v4.b32"
            assert widest in figures["loads"], (operation, name, figures)


def test_addresses_are_computed_in_64_bits(by_triton):
    """In the kernels for 2^32 values, a row's number is multiplied by the size of a row to a product of 64 bits."""
    large = [(backend, name, figures) for backend, _, case, _, name, figures in by_triton if case == list(LARGE)]
    found = [(name, figures) for backend, name, figures in large if backend == "cuda"]
    assert {name for name, _ in found} > {"moments", "normalise", "backward_sums", "backward_dx"}
    for name, figures in found:
        if "merge" not in name:
            assert {512, 1024} & set(figures["factors"]), (name, figures)  # values or bytes
    found = [(name, figures) for backend, name, figures in large if backend == "hip" and "merge" not in name]
    assert len(found) == 4
    for name, figures in found:
        assert {9, 10} & set(figures["shifts"]), (name, figures)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
def test_no_configuration_of_the_search_set_spills(architecture):
    skip_without_triton()
    found = answer(
        ["-m", "support.triton_compiled"], [["cuda", architecture, [*searched(BFLOAT16), *searched(FLOAT32)], BOTH]]
    )
    check_registers(found)
    copies = [figures["copies"] for *_, case, _, _, figures in found if case[-1]["stages"] > 1]
    assert any(copies) and all(size == 16 for sizes in copies for size in sizes)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", HIP)
def test_no_configuration_of_the_search_set_spills_on_amd(architecture):
    skip_without_triton()
    cases = [*searched(BFLOAT16, HIP[architecture]), *searched(FLOAT32, HIP[architecture])]
    check_registers(answer(["-m", "support.triton_compiled"], [["hip", architecture, cases, BOTH]]))


# --- through jax-triton, for AMD ------------------------------------------------------------------------------

EVERY = (1, 100352, 64, "bfloat16", "relu", True)
AMD = [
    ["mi300x", "gfx942:sramecc+:xnack-", [[EVERY, OPERATIONS], [(2, 4096, 65, "float16", "silu", False), BOTH]]],
    ["mi210", "gfx90a:sramecc+:xnack-", [[(1, 100352, 256, "float32", None, True), BOTH]]],
]
FEW = (1, 64, 64, "float32", None, False)


@pytest.fixture(scope="module")
def for_amd():
    """{(chip, case, operation): what was lowered}, see `triton_lowered`, for the device there and for none."""
    skip_without_compilers("h200", triton="rocm")  # JAX's part: in the plugins
    work = [*AMD, ["mi250x", None, [[FEW, ["moments"]]]], ["mi250x", "gfx942", [[FEW, ["moments"]]]]]
    # Each in a process of its own: jax-triton compiles for one GPU.
    found = [(index, answer(["-m", "support.triton_lowered"], [one])) for index, one in enumerate(work)]
    return {(chip, index, tuple(case), name): said for index, each in found for chip, case, name, said in each}


@on_the_newest_jax
def test_for_amd_launches_and_passes_are_those_of_the_plan(for_amd):
    checked = 0
    for (chip, index, case, name), said in for_amd.items():
        if index < len(AMD):
            calls = said["launches"]
            assert [target for target, _, _ in calls] == ["triton_kernel_call"] * len(said["planned_launches"])
            counted = [sum(numbers) for numbers in list(zip(*calls, strict=True))[1:]]
            assert counted == said["planned_passes"], (chip, case, name, calls)
            checked += 1
    assert checked == len(OPERATIONS) + 2 * len(BOTH)


@on_the_newest_jax
def test_for_amd_jax_triton_makes_code_for_the_architecture_that_does_not_spill(for_amd):
    machines = {"mi300x": "gfx942", "mi210": "gfx90a"}
    seen = 0
    for (chip, index, *_), said in for_amd.items():
        if index >= len(AMD):
            continue
        for kernel in said["kernels"]:
            assert kernel["machine"] == machines[chip] and kernel["wavefront_size"] == 64, kernel
            assert kernel["max_flat_workgroup_size"] == 64 * kernel["warps"], kernel
            assert kernel["shared"] <= CHIPS[chip].shared_memory_per_block
            for spilled in ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size"):
                assert kernel[spilled] == 0, kernel
            seen += "dwordx4" in kernel["loads"]
    assert seen >= 10


@on_the_newest_jax
def test_without_the_amd_gpu_one_sentence_says_why_nothing_is_lowered(for_amd):
    errors = [said["error"] for (_, index, *_), said in for_amd.items() if index >= len(AMD)]
    for error, there in zip(errors, ("there is none", "that is gfx942"), strict=True):
        wanted = f"for the first AMD GPU of the process alone, and {there}: triton cannot be lowered for gfx90a here"
        assert wanted in error and "\n" not in error


# --- within XLA's programs ------------------------------------------------------------------------------------

EVERY_OPERATION = (1, 100352, 64, "bfloat16", "relu", True)
FORWARD_AND_BACKWARD = [
    (3, 65536, 96, "float32", "gelu", False),
    (2, 4097 * 7, 1000, "float16", "leaky_relu", False),
    (1, 2048, 65, "float32", "silu", False),
]
# Between convolutions of float32 XLA keeps arrays channels-first on an A100, where the kernels need a transpose: the
# backend's text says so.
PROGRAMS = {"a100": {"entrances": True, "blocks": ["bfloat16"]}, "h200": {"entrances": False, "blocks": ["float32"]}}
CASES = {
    "a100": [(EVERY_OPERATION, OPERATIONS), *((case, BOTH) for case in FORWARD_AND_BACKWARD)],
    "h200": [(FORWARD_AND_BACKWARD[0], BOTH)],
}


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=() if name == "a100" else ON_THE_NEWEST_JAX) for name in CASES]
)
def by_xla(request):
    """What is counted in the programs: see `compiled_operations`."""
    target = request.param
    skip_without_compilers(target, triton="cuda")
    return target, answer(["-m", "support.compiled_operations"], ["triton", target, CASES[target], PROGRAMS[target]])


def test_launches_and_passes_are_those_of_the_plan_and_nothing_of_the_size_of_x_happens_around_the_kernels(by_xla):
    target, found = by_xla
    check_traffic(by_operation(CASES[target], found))


def test_between_convolutions_no_copy_or_transpose_is_added(by_xla):
    target, found = by_xla
    for dtype in PROGRAMS[target]["blocks"]:
        check_block(found, "triton", dtype, kernels=6)


@pytest.mark.parametrize(("residual", "number"), [(False, 4), (True, 8)])
@on_the_newest_jax
def test_the_launches_of_a_slab_run_after_those_of_the_one_before_it_and_write_into_the_same_arrays(residual, number):
    """On an RTX 4090, for which the rule takes slabs."""
    skip_without_compilers("rtx4090", triton="cuda")
    programs = {"order": [[64, 28, 28, 512], "bfloat16", residual]}
    found = answer(["-m", "support.compiled_operations"], ["triton", "rtx4090", [], programs])["order"]
    problem = Problem(1, 64 * 28 * 28, 512, "bfloat16", "relu", residual)
    slabs = limits.plan(problem, Target("cuda", CHIPS["rtx4090"])).slabs
    assert slabs == number and found["scheduled"] and not found["copies"]
    forward, backward = found["launches"][: 3 * slabs], found["launches"][3 * slabs :]
    assert len(backward) == 3 * slabs
    for launches, writes_dz in ((forward, False), (backward, residual)):
        before = None
        for first in range(0, len(launches), 3):
            sums, merge, second = launches[first : first + 3]
            # The results that the slabs share: y or dx of the second pass, and dz of the first.
            continued = [sums, second] if writes_dz else [second]
            for launch in (sums, merge, second):
                name, operands, in_place = launch
                assert "constant" in operands[0] if before is None else operands[0] == before[-1], launch
                assert in_place == (before is not None and launch in continued), launch
            assert sums[0] in merge[1] and merge[0] in second[1]
            # The second pass reads what the first has written of dz, which the next slab's writes to only after it.
            assert (sums[0] in second[1]) == writes_dz, second
            if before is not None:
                assert [operands[1] for _, operands, _ in continued] == before
            before = [name for name, *_ in continued]


@pytest.mark.parametrize("by_xla", ["a100"], indirect=True)
def test_every_way_in_lowers_to_the_kernels(by_xla):
    three = dict.fromkeys(("layer", "function", "raw", "ensemble", "x64"), 3)
    virtual = {"virtual batches, both ways": 6, "copies for virtual batches": 0}
    assert by_xla[1]["entrances"] == three | {"inference": 1} | virtual
