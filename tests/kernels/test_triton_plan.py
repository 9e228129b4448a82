"""The tiles of the backend `triton`, in plain Python: what is covered, what is chosen, what is refused."""

import dataclasses
import importlib.metadata
import importlib.util
import math
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import bn_fused
from bn_fused import kernels
from bn_fused.kernels import tuned
from bn_fused.kernels.activations import ACTIVATIONS
from bn_fused.kernels.backends.triton import limits, operations as triton_backend
from bn_fused.kernels.backends.triton.plan import (
    MERGE_TILE,
    MOST_FOLDED,
    Plan,
    check,
    fold_of,
    heuristic,
    make_plan,
    merge_tile,
    parse,
    search_set,
    slab_columns,
)
from bn_fused.kernels.chips import CHIPS, AmdChip, GpuChip
from bn_fused.kernels.registry import check_plan, choose
from bn_fused.kernels.target import BackendError, Problem, Target

from support import ROOT

A100, H200 = Target("cuda", CHIPS["a100"]), Target("cuda", CHIPS["h200"])
MI250X, MI300X = Target("rocm", CHIPS["mi250x"]), Target("rocm", CHIPS["mi300x"])
GPUS = [chip.name for chip in CHIPS.values() if chip.platform in ("cuda", "rocm")]
SHAPES = [
    (groups, rows, channels)
    for groups in (1, 3)
    for rows in (1, 2, 8, 49, 96, 2048, 6272, 100352, 4096 * 49 + 1)
    for channels in (1, 3, 8, 17, 24, 64, 65, 96, 128, 136, 256, 960, 1000, 2048, 8192)
]


@pytest.fixture
def installed(monkeypatch):
    """As if jax-triton and Triton were installed, in versions that fit."""
    monkeypatch.setattr(limits, "missing", lambda platform: None)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("chip", ["a100", "h200", "b200", "mi250x", "mi300x"])
def test_every_plan_of_every_configuration_fits_its_array(chip, itemsize):
    for groups, rows, channels in SHAPES:
        for config in search_set(groups, rows, channels, itemsize, CHIPS[chip]):
            plan = make_plan(groups, rows, channels, itemsize, CHIPS[chip], config)
            check(plan, rows, channels)
            width, columns = plan.fold * channels, plan.columns
            # No block of columns lies beyond the row, and none of rows beyond the range.
            assert columns < 2 * width and columns * itemsize <= config.row_bytes
            assert plan.tile_rows < 2 * (rows // plan.fold)
            assert rows // plan.fold >= plan.splits * min(2, rows // plan.fold)
            for inputs in (1, 2, 3):
                tile = plan.rows_of(inputs) * columns
                # Shared memory for the tiles in flight, where there are several.
                if plan.stages > 1 and chip.startswith(("a", "h", "b")):
                    assert inputs * plan.stages * tile * itemsize <= CHIPS[chip].shared_memory_per_block
            entries, merge_columns, warps = merge_tile(plan, channels)
            assert entries * merge_columns <= MERGE_TILE and merge_columns < 2 * channels
            assert entries < 2 * plan.splits * plan.fold and warps * plan.lanes in (128, 256)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("chip", GPUS)
def test_every_thread_of_a_block_loads_16_bytes_at_once_from_large_arrays(chip, itemsize):
    """32 threads a warp on NVIDIA, 64 on AMD."""
    for channels in (64, 256, 2048):
        plan = make_plan(1, 100352, channels, itemsize, CHIPS[chip])
        assert plan.lanes == CHIPS[chip].lanes == (64 if chip.startswith("mi") else 32)
        for inputs in (1, 2, 3):
            assert plan.rows_of(inputs) * plan.columns * itemsize >= 16 * plan.warps * plan.lanes, (channels, plan)


@pytest.mark.parametrize("chip", GPUS)
def test_large_arrays_keep_the_whole_chip_busy(chip):
    """Blocks of threads for every multiprocessor, and no more in a launch than it has places for at once."""
    chip = CHIPS[chip]
    for rows in (6272, 25088, 100352, 401408):
        for channels in (64, 128, 256, 512, 1024, 2048):
            for itemsize in (2, 4):
                if rows * channels * itemsize < 8e6:
                    continue
                plan = make_plan(1, rows, channels, itemsize, chip)
                grid = plan.splits * math.ceil(slab_columns(plan, channels) / plan.columns)
                most = heuristic(1, rows, channels, itemsize, chip).blocks_per_core * chip.cores
                assert chip.cores <= grid <= most, (rows, channels, plan)
                assert plan.fold == 1


def test_slabs_are_for_chips_with_a_large_cache_before_a_slow_memory():
    assert [name for name in GPUS if heuristic(1, 50176, 512, 2, CHIPS[name]).slab_bytes] == [
        "l4",
        "l40s",
        "rtx4090",
        "mi300x",
    ]
    unknown = GpuChip("rtx", "RTX", (8, 9), 76, 1 << 16)
    assert heuristic(1, 50176, 512, 2, unknown).slab_bytes == 0


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("chip", ["l4", "rtx4090", "mi300x"])
def test_a_slab_stays_in_half_of_the_cache_with_all_that_a_backward_reads_of_it(chip, itemsize):
    half = CHIPS[chip].last_cache // 2
    several = 0
    for groups, rows, channels in (*SHAPES, (1, 50176, 512), (1, 200704, 256), (1, 802816, 64), (1, 12544, 4096)):
        for residual in (False, True):
            plan = make_plan(groups, rows, channels, itemsize, CHIPS[chip], residual=residual, derivative=residual)
            check(plan, rows, channels)
            read = groups * rows * itemsize * (3 if residual else 2)
            columns = slab_columns(plan, channels * plan.fold)
            if plan.slabs > 1:
                several += 1
                assert read * columns <= half < read * channels
                assert columns % plan.columns == 0 and plan.columns * itemsize >= 128
                # One slab less would be too much for it.
                assert read * math.ceil(math.ceil(channels / plan.columns) / (plan.slabs - 1)) * plan.columns > half
            else:
                assert columns == channels * plan.fold
                # All fits, or not even the narrowest slab does, or a channel is in several columns.
                assert read * channels <= half or read * min(channels, 128 // itemsize) > half or plan.fold > 1
    assert several > 5


def test_with_slabs_forward_and_backward_are_launched_for_each_and_nothing_else_is():
    plan = make_plan(1, 50176, 512, 2, CHIPS["rtx4090"])
    assert plan.slabs == 4 and plan.kind("forward") == plan.kind("backward") == "slab"
    assert plan.launches("forward") == 4 * ("bn_fused_moments", "bn_fused_merge_moments", "bn_fused_normalise")
    assert plan.launches("normalise") == ("bn_fused_normalise",) and plan.kind("normalise") == "streaming"
    assert plan.passes("forward") == (2, 1) and plan.passes("backward") == (4, 1)


def test_the_document_says_what_its_example_prints(installed, capsys):
    text = (ROOT / "docs" / "kernels-gpu.md").read_text()
    ((code, printed),) = re.findall(r"```py\n(.*?)```\n\nprints `(.*?)`", text, re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out.strip() == printed


def test_partial_results_are_small_beside_x():
    for rows, channels in ((100352, 64), (25088, 256), (6272, 2048), (1024, 4096), (401408, 32)):
        for itemsize in (2, 4):
            plan = make_plan(1, rows, channels, itemsize, CHIPS["h200"])
            partial = plan.splits * plan.fold * channels * 3 * 4
            assert partial <= rows * channels * itemsize / 16, (rows, channels, plan)


def test_rows_are_folded_where_that_makes_loads_of_16_bytes():
    # 2^11 * 49 rows.
    assert {channels: fold_of(100352, channels, 4, 256) for channels in (64, 256, 1000, 4, 16)} == dict.fromkeys(
        (64, 256, 1000, 4, 16), 1
    )
    for channels in (1, 3, 17, 65, 6):
        for itemsize in (2, 4):
            fold = fold_of(100352, channels, itemsize, 256)
            assert 1 < fold <= MOST_FOLDED and 100352 % fold == 0
            assert fold * channels * itemsize % 16 == 0, (channels, itemsize, fold)
    assert fold_of(100351, 3, 4, 256) == 1  # a prime number of rows


def test_the_heuristic_is_what_was_the_fastest_in_most_classes_on_an_h200():
    _, entries = tuned.read(tuned.FOLDER / "nvidia-h200.json", "NVIDIA H200")
    fastest = {entry.of: parse(entry.backends["triton"].config) for entry in entries}
    by_rule = {of: heuristic(1, of.rows, of.channels, 2, CHIPS["h200"]) for of in fastest}
    assert {of.dtype for of in fastest} == {"bfloat16"}
    assert sum(fastest[of] == by_rule[of] for of in fastest) >= 0.8 * len(fastest)
    for of, config in fastest.items():
        assert config in search_set(1, of.rows, of.channels, 2, CHIPS["h200"])


def test_the_search_set_starts_with_the_heuristic_and_is_small():
    configs = search_set(1, 100352, 64, 2, CHIPS["h200"])
    assert configs[0] == heuristic(1, 100352, 64, 2, CHIPS["h200"])
    assert len(configs) == len(set(configs)) <= 20
    assert {config.slab_bytes for config in configs} == {0, 50 << 18, 50 << 19}  # a quarter and a half of the cache


def test_a_plan_says_its_passes_and_launches():
    problem = Problem(1, 100352, 64, "float32", "relu", residual=True)
    plan = limits.plan(problem, H200)
    assert plan.architecture == 90
    assert plan.passes("forward") == (3, 1) and plan.passes("backward") == (5, 2)
    assert plan.launches("forward") == ("bn_fused_moments", "bn_fused_merge_moments", "bn_fused_normalise")
    assert limits.plan(problem, MI250X).architecture == "gfx90a"
    assert limits.plan(problem, MI300X).architecture == "gfx942"
    assert plan == limits.plan(problem, H200) and hash(plan) == hash(limits.plan(problem, H200))


@pytest.mark.parametrize(
    ("problem", "target", "sentence"),
    [
        (Problem(1, 64, 8, "float64"), H200, "float32, bfloat16, float16, not float64"),
        (Problem(1, 64, 8, "float32", "tanh"), H200, "the activations relu, leaky_relu, silu, gelu, not tanh"),
        (Problem(1, 64, 8, "float32", mask=True), H200, "take no mask"),
        (Problem(1, 64, 8, "float32"), Target("cuda"), "not known for which GPU"),
        (Problem(1, 64, 8, "float32"), Target("cpu"), "written for GPUs"),
        (Problem(1, 64, 8, "float32"), Target("tpu", CHIPS["v5e"]), "written for GPUs"),
        (Problem(1, 64, 8, "float32"), Target("rocm"), "not known for which GPU"),
        (Problem(1, 64, 8, "float64"), MI300X, "float32, bfloat16, float16, not float64"),
        (Problem(1, 64, 8, "float32", mask=True), MI250X, "take no mask"),
        (Problem(1, 64, 8, "float32"), Target("rocm", CHIPS["mi300x"], True), "partitions"),
        (
            Problem(1, 64, 8, "float32"),
            Target("rocm", AmdChip("rx", "AMD Radeon RX 7900 XTX", "gfx1100", 48, 1 << 16)),
            "compiled for AMD's gfx90a and gfx942 .*, and AMD Radeon RX 7900 XTX is gfx1100",
        ),
        (Problem(1 << 27, 2, 8, "float32"), MI300X, r"of 2\^32 threads or more .* 134217728 times 8 channels"),
        (Problem(1, 64, 8, "float32"), Target("cuda", CHIPS["a100"], True), "partitions"),
        (Problem(1, 1 << 31, 8, "float32"), H200, "in 32 bits, and there are 2147483648 rows"),
        (Problem(1 << 28, 1, 8, "float32"), H200, "268435456 times 8 channels"),
        (
            Problem(1, 128, 1 << 27, "float32"),
            H200,
            "within a tile of rows in 32 bits, and there are 134217728 channels",
        ),
        (Problem(1, 64, 8, "float32"), Target("cuda", GpuChip("t4", "T4", (7, 5), 40, 65536)), "t4 has 7.5"),
        (Problem(1, 64, 8, "float32"), Target("cuda", GpuChip("thor", "T", (11, 0), 20, 1)), "capability 11.0 .thor"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused_in_a_sentence(problem, target, sentence, installed):
    with pytest.raises(BackendError, match=sentence) as error:
        choose(problem, target, "triton")
    assert str(error.value).startswith("backend 'triton' cannot run on ") and "\n" not in str(error.value)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_of_the_table_is_taken(activation, installed):
    assert choose(Problem(1, 64, 8, "float32", activation), H200, "triton").name == "triton"


@pytest.mark.parametrize("chip", GPUS)
def test_what_the_kernels_take_is_taken_by_name_and_not_by_auto(chip, installed):
    target = Target(CHIPS[chip].platform, CHIPS[chip])
    problem = Problem(2, 63, 17, "bfloat16", "silu", residual=True)
    choice = choose(problem, target, "triton")
    assert choice.name == "triton" and isinstance(choice.plan, Plan)
    why = "only unmasked arrays of one group, in programs for one device, were measured"
    assert choice.reason == f"asked for by name; auto does not take it: {why}"
    assert choose(problem, target).name != "triton"


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        ({"jax_triton": None}, "jax-triton is not installed: pip install jax-triton==0.3.1 triton"),
        ({"triton": None}, "triton is not installed: pip install jax-triton==0.3.1 triton"),
        ({"jax_triton": "0.4.1"}, "works with jax-triton 0.3.1, and 0.4.1 is installed: pip install"),
        ({"triton": "3.5.1"}, "needs triton 3.6 or later, and 3.5.1 is installed: pip install 'triton>=3.6'"),
        ({}, None),
    ],
)
def test_what_is_not_installed_is_named_with_the_command_that_installs_it(found, sentence, monkeypatch):
    versions = {"jax_triton": "0.3.1", "triton": "3.10.0+git1"} | found
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: versions[name])
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions[name.replace("-", "_")])
    limits.missing.cache_clear()
    try:
        if sentence is None:
            assert choose(Problem(1, 64, 8, "float32"), A100, "triton").name == "triton"
        else:
            with pytest.raises(BackendError, match=sentence):
                choose(Problem(1, 64, 8, "float32"), A100, "triton")
    finally:
        limits.missing.cache_clear()


@pytest.mark.parametrize("package", ["jax-triton", "triton"])
def test_a_package_without_metadata_is_named_and_auto_takes_another_backend(package, monkeypatch):
    def version(name):
        if name == package:
            raise importlib.metadata.PackageNotFoundError(name)
        return {"jax-triton": "0.3.1", "triton": "3.6.0"}[name]

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(importlib.metadata, "version", version)
    limits.missing.cache_clear()
    try:
        with pytest.raises(BackendError, match=f" {package} is there without its metadata.*: pip install jax-triton"):
            choose(Problem(1, 64, 8, "float32"), A100, "triton")
        assert choose(Problem(1, 64, 8, "float32"), A100).name == "jnp"
    finally:
        limits.missing.cache_clear()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"architecture": "gfx942"}, "architecture is 'gfx942', and that of h200 is 90"), ({"stages": 9}, "does not fit")],
)
def test_a_plan_by_hand_that_cannot_run_is_refused_before_it_is_lowered(change, sentence, installed):
    problem = Problem(1, 4096, 64, "float32")
    choice = choose(problem, H200, "triton")
    check_plan(choice, choice.plan, problem, H200)
    with pytest.raises(BackendError, match=sentence):
        check_plan(choice, dataclasses.replace(choice.plan, **change), problem, H200)


@pytest.mark.parametrize(("version", "works"), [("3.6.0", True), ("3.7.1", False), ("3.10.0", False)])
def test_for_amd_a_triton_that_jax_triton_does_not_work_with_is_refused(version, works, monkeypatch):
    versions = {"jax-triton": "0.3.1", "triton": version}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    limits.missing.cache_clear()
    try:
        assert choose(Problem(1, 64, 8, "float32"), A100, "triton").name == "triton"
        if works:
            assert choose(Problem(1, 64, 8, "float32"), MI300X, "triton").name == "triton"
        else:
            with pytest.raises(
                BackendError, match=f"triton 3.6 alone, and {version} is installed: pip install 'triton==3"
            ):
                choose(Problem(1, 64, 8, "float32"), MI300X, "triton")
    finally:
        limits.missing.cache_clear()


@pytest.mark.parametrize(
    "change",
    [
        {"fold": 5},
        {"splits": 0},
        {"splits": 65},
        {"columns": 12},
        {"tile_rows": 0},
        {"stages": 0},
        {"stages": 9},
        {"warps": 64},
        {"architecture": "gfx942", "warps": 32},
        {"slabs": 0},
        {"slabs": 3},
        {"slabs": 2, "fold": 2},
    ],
)
def test_a_plan_that_does_not_fit_the_array_is_refused(change):
    plan = Plan(
        **{"architecture": 90, "fold": 1, "columns": 16, "tile_rows": 8, "splits": 4, "warps": 4, "stages": 1} | change
    )
    with pytest.raises(ValueError, match="does not fit 64 rows of 24 channels"):
        triton_backend.moments(jnp.ones((1, 64, 24)), spec=kernels.Spec("grc", plan=plan))


def test_a_plan_of_another_backend_is_refused():
    with pytest.raises(TypeError, match="triton needs one of"):
        triton_backend.moments(jnp.ones((1, 64, 24)), spec=kernels.Spec("grc"))


def test_on_a_cpu_the_backend_is_refused_by_name():
    stats = bn_fused.RunningStats.init(8)
    with pytest.raises(BackendError, match="'triton' cannot run on cpu: it is written for GPUs"):
        bn_fused.batch_norm(np.ones((16, 8), np.float32), stats, backend="triton")


def test_neither_the_import_nor_the_choice_of_a_backend_imports_triton():
    script = (
        "import sys, bn_fused\n"
        "print(bn_fused.explain((4096, 64), 'float32', target='a100').name)\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('triton', 'jax_triton')])"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert process.stdout.split("\n")[1] == "[]", process.stdout + process.stderr
