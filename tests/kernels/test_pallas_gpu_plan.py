"""The plans of the backend `pallas_gpu`, in plain Python: what is covered, what is merged, what is refused."""

import dataclasses
import itertools
import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_fused
from bn_fused import kernels
from bn_fused.kernels.backends.pallas_gpu import operations as pallas_gpu
from bn_fused.kernels.backends.pallas_gpu.plan import Plan, make_plan, splits_of, tiling
from bn_fused.kernels.backends.pallas_gpu.tiles import BARRIERS, LEAST_STAGES, MOMENTS, WARPGROUP, fold_of
from bn_fused.kernels.chips import CHIPS
from bn_fused.kernels.contract import OPERATIONS, Spec
from bn_fused.kernels.registry import choose
from bn_fused.kernels.target import BackendError, Problem, Target

from support.operand_specs import operand_specs
from support.pallas_gpu_tiles import SHAPES, check_merged_by_hand
from support.versions import on_the_newest_jax

H200, B200 = Target("cuda", CHIPS["h200"]), Target("cuda", CHIPS["b200"])


@on_the_newest_jax  # plain integers
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("chip", ["h200", "b200"])
def test_every_plan_fits_the_chip_and_covers_every_column(chip, itemsize):
    chip, planned = CHIPS[chip], 0
    for groups, rows, channels in SHAPES:
        plan = make_plan(groups, rows, channels, itemsize, chip)
        if plan is None:
            continue
        planned += 1
        for inputs in (1, 2, 3):
            t = tiling(plan, groups, rows, channels, itemsize, inputs)
            tiles = inputs * t.warpgroups * t.stages * t.tile_rows * t.columns * itemsize
            exchanged = MOMENTS * t.warpgroups * t.columns * 4
            fragments = t.warpgroups * t.fragment_rows * t.columns * 4
            assert tiles <= plan.ring_bytes
            assert tiles + exchanged + fragments + BARRIERS <= chip.shared_memory_per_block
            assert t.width * itemsize % 16 == 0 and t.tile_rows <= 256 and t.columns <= 256
            assert t.warpgroups * t.stages <= 32  # barriers that Mosaic has in a group
            most_tiles = t.worker_range(0, 0).tiles
            assert min(LEAST_STAGES, most_tiles) <= t.stages <= most_tiles
            assert t.tile_rows <= t.worker_range(t.splits - 1, t.warpgroups - 1).rows
            assert t.rows * t.width == rows * channels and t.samples == rows
            covered = set()
            for block in range(t.blocks):
                start = t.block_start(block)
                assert start >= 0 and start + t.columns <= t.width
                covered |= set(range(start, start + t.columns))
            assert covered == set(range(t.width))
            # The columns of the other copies of a merge's channels, which are neighbours in the partial results too.
            for block in {0, t.merge_blocks // 2, t.merge_blocks - 1}:
                start = t.merge_start(block)
                assert start >= 0 and start + WARPGROUP <= t.width
                for copy in range(t.fold):
                    there = t.copy_start(start, copy)
                    assert there + WARPGROUP <= t.padded_width and (there - start) % channels == 0
    assert planned > 200


@pytest.mark.parametrize("chip", ["h200", "b200"])
def test_large_arrays_keep_the_whole_chip_busy(chip):
    """Blocks for at least 85 % of the cores, in the last wave too, and enough bytes in flight on each."""
    chip = CHIPS[chip]
    for rows, channels in itertools.product((6272, 25088, 100352, 401408), (64, 128, 256, 512, 1024, 2048)):
        for itemsize, inputs in itertools.product((2, 4), (1, 2, 3)):
            if rows * channels * itemsize < 8e6:
                continue
            plan = make_plan(1, rows, channels, itemsize, chip)
            t = tiling(plan, 1, rows, channels, itemsize, inputs)
            waves = math.ceil(t.grid / chip.cores)
            assert t.grid >= 0.85 * waves * chip.cores, (rows, channels, plan)
            in_flight = inputs * t.warpgroups * t.stages * t.tile_rows * t.columns * itemsize
            assert in_flight >= 96 * 1024, (rows, channels, plan)


def test_folded_rows_are_read_with_hardly_any_overlap():
    for channels in (1, 3, 8, 17, 24, 64, 65, 96, 128, 256, 1000, 2048):
        fold, columns = fold_of(100352, channels, 2)  # 2^11 * 49 rows
        again = -(-fold * channels // columns) * columns / (fold * channels) - 1
        assert again <= 0.005 and (channels % 8 or again == 0), (channels, fold, columns)
    assert fold_of(100352, 256, 2) == (1, 256)
    assert fold_of(100352, 64, 2) == (4, 256)
    # 49 rows fold by 7 or 49 alone: the last block overlaps the one before.
    fold, columns = fold_of(49, 64, 4)
    assert fold == 7 and fold * 64 % columns
    assert fold_of(1, 64, 4) is None and fold_of(3, 17, 4) is None and fold_of(1009, 8, 4) is None


def test_folding_leaves_rows_enough_to_make_its_own_traffic_small():
    shapes = [*itertools.product((25088, 100352), (3, 17, 65, 1000)), (28679, 1000)]
    for rows, channels in shapes:
        fold, _ = fold_of(rows, channels, 2)
        assert 90 / (rows // fold * 2) < 0.25, (rows, channels, fold)


def test_splits_fill_the_last_wave():
    for rows, blocks, cores in itertools.product((8, 64, 1000, 100352), range(1, 400), (132, 148)):
        splits = splits_of(rows, blocks, 4, cores)
        assert splits >= 1 and (splits == 1 or rows // (4 * splits) >= 8)
        if blocks <= cores:
            assert blocks * splits <= cores


@pytest.mark.parametrize(
    "change", [{"fold": 3}, {"columns": 96}, {"splits": 0}, {"splits": 10**6}, {"ring_bytes": 100}]
)
def test_a_plan_by_hand_that_does_not_fit_is_refused(change):
    plan = make_plan(1, 1024, 128, 4, CHIPS["h200"])
    fields = {name: getattr(plan, name) for name in plan.__dataclass_fields__} | change
    with pytest.raises(ValueError, match="does not fit"):
        tiling(Plan(**fields), 1, 1024, 128, 4, 1)


@pytest.mark.parametrize("centre", [0.0, 1e4])
@pytest.mark.parametrize("channels", [32, 128])
def test_the_merge_of_any_cut_is_the_whole(channels, centre):
    random = np.random.default_rng(0)
    fold = 128 // channels
    for rows, splits, warpgroups in itertools.product((1, 2, 3, 7, 12, 31), (1, 2, 3), (1, 2, 4)):
        if splits * warpgroups > rows:
            continue
        plan = Plan(fold, 128, splits, warpgroups, ring_bytes=warpgroups * 2 * 4 * 128 * 4)
        t = tiling(plan, 1, rows * fold, channels, 4, 1)
        x = (centre + random.standard_normal((rows * fold, channels))).astype(np.float32)
        check_merged_by_hand(t, x)


# --- what the kernels read and write --------------------------------------------------------------------------


def passes_of_kernels(operation, plan, *case, monkeypatch, state="float32"):
    """(name, reads, writes) of arrays of x's size, of each kernel that an operation launches for them.

    The operation is traced, with all of its kernels; its results have the shapes and dtypes of the contract. `state`:
    the dtype of the running statistics.
    """
    found = []

    def recording(kernel, passes):
        def call(tiling, name, arrays, *others, **settings):
            assert all(array.shape == (tiling.groups, tiling.rows, tiling.width) for array in arrays)
            found.append((name, *passes(len(arrays), **settings)))
            return kernel(tiling, name, arrays, *others, **settings)

        return call

    def of_a_stream(arrays, outputs=0, **_):
        return arrays, outputs

    def of_one_launch(arrays, reads, outputs=0, **_):
        # What is not kept is read again: what the first pass has read, or its result in place of that, and x.
        again = 1 - plan.one_launch(operation).kept
        return arrays + again * (2 if outputs else reads), 1 + outputs

    groups, rows, channels, dtype, activation, residual = case
    operands = operand_specs(operation, groups, rows, channels, dtype, residual, activation, state)
    spec = Spec("grc", activation=activation, plan=plan)
    with monkeypatch.context() as patched:
        patched.setattr(pallas_gpu, "stream", recording(pallas_gpu.stream, of_a_stream))
        patched.setattr(pallas_gpu, "one_launch", recording(pallas_gpu.one_launch, of_one_launch))
        results = jax.eval_shape(lambda given: getattr(pallas_gpu, operation)(**given, spec=spec), operands)
    expected = []
    for name, kind in OPERATIONS[operation].result_kinds(operands).items():
        of_channels = (groups, channels), state if name.startswith("new_running") else "float32"
        expected.append(((groups, rows, channels), dtype) if kind == "x" else of_channels)
    results = results if isinstance(results, tuple) else (results,)
    assert [(each.shape, each.dtype) for each in results] == expected
    return found


@pytest.mark.parametrize(
    ("dtype", "activation", "residual"),
    [
        ("float32", None, True),
        ("float16", "silu", False),
        ("bfloat16", "relu", True),  # y is kept for the derivative
        ("float32", "gelu", True),  # the residual is
    ],
)
@pytest.mark.parametrize("rows", [4096, 65536], ids=["resident", "partial"])
def test_the_kernels_read_and_write_what_the_plan_says(rows, dtype, activation, residual, monkeypatch):
    case = 4, rows, 96, dtype, activation, residual
    own = choose(Problem(*case), H200, "pallas_gpu").plan
    kind = "resident" if rows == 4096 else "partial"
    assert own.kind("forward") == own.kind("backward") == kind
    streaming = dataclasses.replace(own, forward=None, backward=None)
    planned = [(operation, streaming) for operation in OPERATIONS] + [("forward", own), ("backward", own)]
    for operation, plan in planned:
        kernels = passes_of_kernels(operation, plan, *case, monkeypatch=monkeypatch)
        names, reads, writes = zip(*kernels, strict=True)
        assert names == tuple(name for name in plan.launches(operation) if "merge" not in name)
        assert (sum(reads), sum(writes)) == pytest.approx(plan.passes(operation)), (operation, kernels)
        if (operation, plan) == ("backward", streaming) and residual and activation is not None:
            # The residual's gradient is written with its sums, and the other pass reads it and x alone.
            assert kernels == [("bn_fused_backward_sums", 3, 1), ("bn_fused_backward_dx", 2, 1)]


def test_running_statistics_in_float64_are_blended_beside_a_stream(monkeypatch):
    case = 2, 4096, 96, "bfloat16", "relu", True
    plan = choose(Problem(*case), H200, "pallas_gpu").plan
    with jax.enable_x64(True):
        kernels = passes_of_kernels("forward", plan, *case, monkeypatch=monkeypatch, state="float64")
    assert kernels == [("bn_fused_moments", 1, 0), ("bn_fused_normalise", 2, 1)]


# --- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "change", "words"),
    [
        (Target("cpu"), {}, "NVIDIA"),
        (Target("tpu", CHIPS["v5e"]), {}, "NVIDIA"),
        (Target("rocm"), {}, "NVIDIA"),
        (Target("cuda"), {}, "not known for which GPU"),
        (Target("cuda", CHIPS["a100"]), {}, r"9\.x or 10\.x \(Hopper, Blackwell\).*a100 has 8\.0"),
        (Target("cuda", CHIPS["h200"], partitioned=True), {}, "partitions"),
        (H200, {"dtype": "float64"}, "float64"),
        (H200, {"mask": True}, "mask"),
        (H200, {"rows": 3, "channels": 17}, "copy engine"),
        (H200, {"rows": 1 << 31}, "2147483648"),
    ],
)
def test_what_it_cannot_run_is_refused_with_the_reason(target, change, words):
    problem = Problem(**{"groups": 1, "rows": 4096, "channels": 64, "dtype": "float32"} | change)
    with pytest.raises(BackendError, match=rf"(?s)'pallas_gpu' cannot run on {target.platform}.*{words}"):
        choose(problem, target, "pallas_gpu")
    choice = choose(problem, target, "auto")
    assert choice.name == "jnp" and "pallas_gpu cannot run here" in choice.reason


def test_by_name_on_this_machine_it_raises():
    x, stats = jnp.ones((64, 128)), bn_fused.RunningStats.init(128)
    with pytest.raises(bn_fused.BackendError, match=r"(?s)'pallas_gpu'.*cpu.*NVIDIA"):
        bn_fused.batch_norm(x, stats, backend="pallas_gpu")


@pytest.mark.parametrize("target", ["h100", "h200", "b200"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_explain_shows_the_plan(target, dtype):
    choice = bn_fused.explain((32, 64, 56, 56), dtype, channel_axis=1, target=target, backend="pallas_gpu")
    assert choice.name == "pallas_gpu" and isinstance(choice.plan, Plan)
    assert choice.plan.fold == 4 and choice.plan.passes("moments") == (1, 0)


@pytest.mark.parametrize("target", ["h100", "h200", "b200"])
def test_auto_leaves_to_jnp_what_was_not_measured(target):
    choice = bn_fused.explain((32, 64, 56, 56), jnp.float32, channel_axis=1, target=target)
    assert choice.name == "jnp"
    assert re.search("pallas_gpu runs by name: nothing .*was measured", choice.reason)


@pytest.mark.parametrize("capability", [(11, 0), (12, 0)])
def test_a_capability_nobody_compiled_for_is_refused(capability):
    chip = kernels.chips.GpuChip("new", "NVIDIA New", capability, 100, 228 * 1024)
    refusal = pallas_gpu.refusal(Problem(1, 4096, 64, "float32"), Target("cuda", chip))
    assert "not known to compile" in refusal


def test_the_import_brings_nothing_of_pallas_that_jax_and_equinox_do_not():
    script = (
        "import sys, jax, equinox; before = set(sys.modules); import bn_fused\n"
        "new = [name for name in set(sys.modules) - before if not name.startswith('bn_fused')]\n"
        "print([name for name in new if 'pallas' in name or 'mosaic' in name or 'jaxlib.mlir' in name])"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert process.stdout.strip() == "[]", process.stdout + process.stderr
