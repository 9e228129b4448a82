"""What the TPU's compiler makes of the kernels, for all five generations, without a TPU: launches, copies, registers.

The compiler runs in processes of their own for each chip, told beforehand to write down its final code.
"""

import re

import jax
import pytest

from bn_fused.kernels import CHIPS

from support.child_process import answer
from support.compilers import skip_without_compilers
from support.versions import ON_THE_NEWEST_JAX

pytestmark = pytest.mark.compilers

CHIP_NAMES = [chip.name for chip in CHIPS.values() if chip.platform == "tpu"]
# rows, channels, dtype, activation, residual
CASES = {
    "resident": ((16384, 512), "float32", "relu", False),
    "large": ((262144, 256), "bfloat16", None, False),
    "large, of y": ((262144, 256), "bfloat16", "relu", True),
    "large, of the residual": ((131072, 256), "float32", "gelu", True),
    "wide": ((512, 4096), "float32", "gelu", True),
    "ragged": ((3, 77, 130), "bfloat16", "silu", True),
}
GRID = {
    f"{rows}x{channels}-{dtype}-{activation}-{residual}": ((rows, channels), dtype, activation, residual)
    for rows, channels in ((1, 1), (17, 100), (1000, 200), (4096, 1024), (200000, 128))
    for dtype in ("float32", "bfloat16")
    for activation in (None, "relu", "gelu", "silu", "leaky_relu")
    for residual in (False, True)
}


# Of the many texts of a kernel, the last.
DUMP = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"


def compile_in_a_process(chip, cases, extras, dump=None):
    skip_without_compilers(chip)
    dumped = {} if dump is None else {"LIBTPU_INIT_ARGS": DUMP.format(dump)}
    return answer(["-m", "support.pallas_tpu_compiled"], [chip, cases, extras], dumped, timeout=600)


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=() if name == "v5e" else ON_THE_NEWEST_JAX) for name in CHIP_NAMES]
)
def compiled(request, tmp_path_factory):
    """The chip's name, what was found in each compiled program, and the final code of each kernel."""
    dump = tmp_path_factory.mktemp(request.param)
    found = compile_in_a_process(request.param, CASES, ["halves"], dump)
    # Convolutions take the compiler long, and five times as long where it writes down their code: one chip's must do.
    if request.param == "v5e":
        found |= compile_in_a_process(request.param, {}, ["convolutions"])
    return request.param, found, final_code(dump)


def final_code(dump):
    """The name and the code of each kernel, in the order in which they were compiled."""
    paths = [path for path in dump.glob("*bn_fused*final_bundles.txt") if "schedule-analysis" not in path.name]
    paths.sort(key=lambda path: int(path.name.split("-")[0]))
    return [(path.name.split("-")[1].split(".")[0], path.read_text()) for path in paths]


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_one_launch_each_way(compiled, case):
    assert compiled[1][case]["launches"] == ["bn_fused_backward", "bn_fused_forward"]


@pytest.mark.parametrize("operation", ["moments", "moments_backward", "normalise", "normalise_backward"])
def test_each_half_is_one_launch_and_nothing_of_xs_size_is_around_it(compiled, operation):
    figures = compiled[1][operation]
    assert figures["launches"] == [f"bn_fused_{operation}"]
    assert figures["copies"] == []
    reads, writes = {"moments": (1, 0), "normalise_backward": (2, 1)}.get(operation, (1, 1))
    assert (figures["reads"], figures["writes"]) == (reads, writes), figures["details"]


def test_virtual_batches_are_one_launch_each_way_too(compiled):
    assert compiled[1]["virtual batches"]["launches"] == ["bn_fused_backward", "bn_fused_forward"]


# The operands and results of the two kernels: x and y, x, dy and dx; with a residual, that and y or it again, and its
# gradient.
@pytest.mark.parametrize(
    ("case", "passes"), [("large", (3, 2)), ("large, of y", (5, 3)), ("large, of the residual", (5, 3))]
)
def test_nothing_of_xs_size_is_around_the_kernels(compiled, case, passes):
    figures = compiled[1][case]
    assert figures["copies"] == []
    assert (figures["reads"], figures["writes"]) == passes, figures["details"]


def test_a_convolutions_result_is_taken_as_it_lies(compiled):
    if compiled[0] != "v5e":
        pytest.skip("convolutions are compiled for v5e alone")
    ours, plain = (compiled[1][f"conv {backend}"] for backend in ("pallas_tpu", "jnp"))
    assert ours["launches"] == ["bn_fused_forward"]
    assert len(ours["copies"]) <= len(plain["copies"]), ours["details"]


def test_jnp_sums_in_the_convolution_and_writes_no_mask_of_relu(compiled):
    if compiled[0] != "v5e":
        pytest.skip("convolutions are compiled for v5e alone")
    # The two sums of the moments, and nothing beside arrays of x's dtype; without its plan none, and a mask.
    assert compiled[1]["residual block"] == {"sums": 2, "others": []}


def test_over_several_chips_one_all_reduce_each_way(compiled):
    figures = compiled[1]["four chips"]
    kernels = ["moments", "moments_backward", "normalise", "normalise_backward"]
    assert figures["launches"] == [f"bn_fused_{name}" for name in kernels]
    assert figures["all_reduces"] == 2


# ---------------------------------------------------------------------------------------------- the final code

# One line is one bundle: all that the core does in a cycle. `>>` marks the second loop from outside, which is the
# loop over a block's chunks inside the loop over the grid; `LB` its first bundle.
BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(?P<mark>[A-Z]{2})?\s*:\s*(?P<depth>>*)\s*\{(?P<code>.*)")
VECTOR_SPILL = re.compile(r"vst\w*\s+\[vmem:\[#allocation\d+_spill")
LOAD, STORE = re.compile(r"= vld\s+\[vmem"), re.compile(r"= vst\s+\[vmem")


def inner_loops(code):
    """The bodies of the loops inside the grid's, each a list of bundles: to the branch back, and what runs while that
    is taken.
    """
    loops, inside = [], False
    for line in code.splitlines():
        bundle = BUNDLE.match(line)
        if bundle is None:
            continue
        deep, branch = len(bundle["depth"]) >= 2, "sbr.rel" in bundle["code"]
        if deep and bundle["mark"] == "LB":
            loops.append([])
            inside = True
        elif not deep and not (inside and branch and "sbr.rel" not in "".join(loops[-1])):
            inside = False
        if inside:
            loops[-1].append(bundle["code"])
    return loops


def test_the_code_of_every_kernel_is_there_to_be_read(compiled):
    names = {name for name, _ in compiled[2]}
    assert {"bn_fused_forward", "bn_fused_backward", "bn_fused_moments", "bn_fused_normalise"} <= names
    loops = [loop for name, code in compiled[2] if name == "bn_fused_forward" for loop in inner_loops(code)]
    assert loops and any(LOAD.search(bundle) for bundle in loops[0])


def most_spills(chip):
    """Of a kernel. v4 has half as many vector registers, and the compiler of JAX 0.10 puts two of those with values per
    channel aside before a loop there.
    """
    return 2 if chip == "v4" and jax.__version_info__ < (0, 11) else 0


def test_no_vector_register_is_spilled(compiled):
    chip, _, code = compiled
    for name, text in code:
        assert len(VECTOR_SPILL.findall(text)) <= most_spills(chip), f"{name} spills on {chip}"
        assert not any(VECTOR_SPILL.search(bundle) for loop in inner_loops(text) for bundle in loop)


# Bundles for one vector register of float32. A chip's memory takes 2.4 (v6e) to 7 (v4) for it, and half of that where x
# is bfloat16. v4 issues half as many vector operations at once.
@pytest.mark.parametrize(("operation", "most", "on_v4"), [("moments", 1.6, 3.5), ("normalise", 2.6, 3.5)])
def test_the_inner_loops_are_faster_than_the_memory(compiled, operation, most, on_v4):
    chip, _, code = compiled
    most = on_v4 if chip == "v4" else most
    loops = [loop for name, text in code if name == f"bn_fused_{operation}" for loop in inner_loops(text)]
    assert loops
    for loop in loops:
        registers = sum(len(LOAD.findall(bundle)) for bundle in loop)
        assert registers >= 16
        assert len(loop) <= most * registers


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIP_NAMES)
def test_every_kernel_compiles_and_spills_nothing(chip, tmp_path):
    found = compile_in_a_process(chip, GRID, [], tmp_path)
    code = final_code(tmp_path)
    assert len(code) == 2 * len(GRID)
    for index, (case, figures) in enumerate(found.items()):
        assert figures["launches"] == ["bn_fused_backward", "bn_fused_forward"], case
        # Fewer rows than two tiles leave no loop on v4: one straight line, which spills some registers once.
        if chip != "v4" or GRID[case][0][0] >= 32:
            for name, text in code[2 * index : 2 * index + 2]:
                assert len(VECTOR_SPILL.findall(text)) <= most_spills(chip), (case, name)
