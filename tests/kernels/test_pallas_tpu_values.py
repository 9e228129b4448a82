"""The TPU kernels in Pallas's interpreters on a CPU: numbers, memory that was never written, races; and their plans.

What the TPU's compiler makes of them is the matter of `test_pallas_tpu_compiled`.
"""

import dataclasses
import functools
import importlib
import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_fused
from bn_fused import kernels
from bn_fused.kernels import CHIPS, Problem, Spec, Target
from bn_fused.kernels.backends.jnp import operations as in_jnp
from bn_fused.kernels.backends.pallas_tpu import operations as pallas_tpu
from bn_fused.kernels.contract import OPERATIONS, kept_for_derivative
from bn_fused.kernels.target import problem_of

from support.kernel_cases import BATCH, BLEND, CASES, Case, grid
from support.kernel_results import INTERPRETED, as_given, check_step, operands
from support.tolerances import assert_close
from support.versions import ON_THE_NEWEST_JAX, also_on_the_newest_jax

TPUS = [chip for chip in CHIPS.values() if chip.platform == "tpu"]
V5E = Target("tpu", CHIPS["v5e"])


# ---------------------------------------------------------------------------------------------- plans

SIZES = [(1, 1), (5, 3), (77, 130), (1000, 200), (4096, 1024), (32 * 56 * 56, 256), (128 * 112 * 112, 64)]
PROBLEMS = [
    Problem(1, rows, channels, dtype, activation, residual)
    for (rows, channels), dtype, (activation, residual) in itertools.product(
        SIZES, pallas_tpu.DTYPES, [(None, False), (None, True), ("relu", True), ("gelu", False)]
    )
]


def of_plan(plan):
    return [getattr(plan, field.name) for field in dataclasses.fields(plan)]


@pytest.mark.parametrize("chip", TPUS, ids=lambda chip: chip.name)
def test_what_a_kernel_keeps_and_copies_fits_into_the_memory_it_asks_for(chip):
    for problem in PROBLEMS:
        itemsize = jnp.dtype(problem.dtype).itemsize
        inner = problem.residual and problem.activation is not None
        plan = pallas_tpu.plan(problem, Target("tpu", chip))
        for kernel, windows, kept in (
            (plan.forward, 2 + problem.residual, 1),
            (plan.backward, 3 + 2 * inner, 2),
            (plan.moments, 1, 0),
        ):
            block = kernel.block_rows * kernel.block_channels * itemsize
            assert (2 * windows + kept * kernel.resident) * block < kernel.vmem_limit_bytes <= chip.vmem
            assert kernel.block_rows % 16 == 0 and kernel.block_channels % 128 == 0
            assert 0 <= kernel.resident <= -(-problem.rows // kernel.block_rows)
            assert kernel.block_rows - problem.rows < 16, "no larger than x"


def test_passes_follow_from_what_stays_on_the_chip():
    plan = pallas_tpu.plan(Problem(1, 100352, 256, "float32", "relu"), V5E)
    assert (plan.forward.reads, plan.forward.writes) == (1, 1)
    small = pallas_tpu.plan(Problem(1, 4096, 1024, "float32", "relu", residual=True), V5E)
    assert (small.forward.reads, small.backward.reads, small.backward.writes) == (2, 3, 2)
    # 51 MB for 128 channels: more than a v4 has.
    v4 = pallas_tpu.plan(Problem(1, 100352, 256, "float32", "relu"), Target("tpu", CHIPS["v4"]))
    assert v4.forward.resident > 0 and 1 < v4.forward.reads < 2 and 2 < v4.backward.reads < 4
    assert (v4.moments.reads, v4.normalise.reads, v4.normalise_backward.reads) == (1, 1, 2)
    # With a residual two arrays stay of a block, and a third is not read again either.
    added = pallas_tpu.plan(Problem(1, 100352, 256, "float32", "relu", residual=True), Target("tpu", CHIPS["v4"]))
    for kernel, once, again in ((added.forward, 2, 1), (added.backward, 3, 3)):
        blocks = -(-100352 // kernel.block_rows)
        assert 0 < kernel.resident < blocks
        assert kernel.reads == pytest.approx(once + again * (1 - kernel.resident / blocks))
    # 51 MB for 128 channels: two such arrays fit on a v5e, three do not.
    images = pallas_tpu.plan(Problem(1, 200704, 256, "bfloat16", "relu", residual=True), V5E)
    assert images.kind("backward") == "resident" and images.passes("backward") == (3, 2)


def test_a_small_problem_asks_for_little_memory():
    plan = pallas_tpu.plan(Problem(1, 256, 128, "float32"), V5E)
    assert all(kernel.vmem_limit_bytes < 2**21 for kernel in of_plan(plan))


@pytest.mark.parametrize(
    "change", [{"block_rows": 100}, {"chunk_rows": 8}, {"block_channels": 64}, {"unroll": 0}, {"resident": -1}]
)
def test_a_plan_that_does_not_fit_the_tiles_is_refused(change):
    plan = pallas_tpu.plan(Problem(1, 256, 128, "float32"), V5E)
    with pytest.raises(ValueError, match=rf"{next(iter(change))} (is )?-?\d"):
        dataclasses.replace(plan.forward, **change)


def test_a_plan_that_keeps_more_than_there_is_is_refused():
    x = jnp.ones((1, 256, 128))
    with pytest.raises(ValueError, match="keeps 9 row blocks of 1 "):
        forward = functools.partial(pallas_tpu.forward, spec=spec_for(x, lambda plan: with_blocks(plan, resident=9)))
        vector = jnp.ones((1, 128))
        jax.eval_shape(forward, x, vector, vector, vector, vector, packed(BATCH))


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "target", "words"),
    [
        ({}, Target("cpu"), "compiled for TPUs"),
        ({}, Target("cuda", CHIPS["h200"]), "compiled for TPUs"),
        ({}, Target("tpu"), "which TPU it is lowered for is not known"),
        ({"dtype": "float64"}, V5E, "float64.* take float32 and bfloat16"),
        ({"dtype": "float16"}, V5E, "float16.* take float32 and bfloat16"),
        ({"mask": True}, V5E, "mask"),
        ({}, Target("tpu", CHIPS["v5e"], partitioned=True), "partitions x over several devices"),
    ],
)
def test_what_it_does_not_take_is_refused_by_name_and_auto_takes_another(change, target, words):
    problem = dataclasses.replace(Problem(1, 64, 128, "float32"), **change)
    with pytest.raises(bn_fused.BackendError, match=rf"(?s)'pallas_tpu' cannot run on {target.platform}.*{words}"):
        kernels.choose(problem, target, "pallas_tpu")
    assert kernels.choose(problem, target).name == "jnp"


def test_auto_leaves_the_choice_to_jnp_and_a_name_forces_the_kernel():
    problem = Problem(1, 65536, 1024, "bfloat16", "relu")
    assert kernels.choose(problem, V5E).name == "jnp"
    assert kernels.choose(problem, V5E, "pallas_tpu").plan == pallas_tpu.plan(problem, V5E)
    choice = bn_fused.explain((65536, 1024), jnp.bfloat16, target="v6e", backend="pallas_tpu")
    assert choice.name == "pallas_tpu" and choice.plan.forward.reads == 1


def test_pallas_is_not_imported_before_a_kernel_is_lowered():
    script = "import sys, bn_fused, bn_fused.kernels; sys.exit('jax.experimental.pallas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == 0


# ---------------------------------------------------------------------------------------------- numbers


def with_blocks(plan, rows=None, resident=None, **change):
    """Smaller blocks, so that a small x has several, and so many of them resident; None for all."""

    def changed(kernel):
        values = dict(change)
        if rows is not None:
            values["block_rows"] = rows
        values["resident"] = kernel.resident if resident is None else resident
        return dataclasses.replace(kernel, **values)

    return dataclasses.replace(
        plan,
        forward=changed(plan.forward),
        backward=changed(plan.backward),
        **{
            name: dataclasses.replace(getattr(plan, name), block_rows=rows or getattr(plan, name).block_rows, **change)
            for name in ("moments", "moments_backward", "normalise", "normalise_backward")
        },
    )


@pytest.fixture
def interpreted():
    """A function that registers the kernels, interpreted, under a name; with a change to their plan."""
    names = []

    def make(change=lambda plan: plan, interpret=True):
        name = f"interpreted_{len(names)}"
        names.append(name)
        kernels.register(
            kernels.Backend(
                name,
                {
                    operation: functools.partial(compute, interpret=interpret)
                    for operation, compute in kernels.backends.pallas_tpu.BACKEND.operations.items()
                },
                refusal=lambda problem, target: pallas_tpu.refusal(problem, V5E),
                plan=lambda problem, target: change(pallas_tpu.plan(problem, V5E)),
            )
        )
        return name

    yield make
    for name in names:
        kernels.unregister(name)


# Rows of a block and resident blocks for the cases with several blocks, the last one ragged or not; None for all.
BLOCKS = {
    "130 channels": (None, None),
    "groups": (None, None),
    "3 channels": (None, None),
    "one row": (None, None),
    "bfloat16": (None, None),
    "200 rows": (64, 0),
    "200 rows, bfloat16": (64, 1),
    "256 rows": (128, 1),
    "300 rows": (64, 5),
    "300 rows, 150 channels": (64, 2),
    "512 rows": (128, 4),
}
TAKEN = [name for name, case in CASES.items() if case.dtype in pallas_tpu.DTYPES]
GRID = grid([(1, 1), (15, 127), (17, 129), (128, 128), (129, 128), (3, 1000, 300)], pallas_tpu.DTYPES)


def marks_of(name):
    """On an older JAX groups, small blocks of which some are resident, 16 bits and few channels."""
    if name not in BLOCKS:
        return pytest.mark.slow
    return () if name in ("groups", "200 rows, bfloat16", "3 channels") else ON_THE_NEWEST_JAX


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks_of(name)) for name in TAKEN])
def test_values_and_all_gradients_agree_with_float64(interpreted, name):
    rows, resident = BLOCKS.get(name, (None, None))
    check_step(CASES[name], interpreted(lambda plan: with_blocks(plan, rows, resident)), interpreted=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", GRID)
def test_every_activation_with_and_without_a_residual(interpreted, name):
    check_step(GRID[name], interpreted(), interpreted=True)


STEP = ("x", "weight", "bias", "running_mean", "running_var")


def named(operation, results):
    """The results of an operation by name."""
    return dict(zip(OPERATIONS[operation].results, results, strict=True))


def without_pivot(forward):
    """The results of `forward`, with those that are relative to the pivot made absolute: backends choose others."""
    results = {name: np.asarray(value, np.float64) for name, value in named("forward", forward).items()}
    pivot = results.pop("pivot")
    return results | {name: pivot + results[name] for name in ("delta", "offset")}


def grouped(case):
    """The operands of a case as operations take them, with an axis of groups."""
    return as_given(case, operands(case), one_group=False)


def packed(coefficients, dtype="float32"):
    """Coefficients of one group as operations take them."""
    return jnp.asarray([coefficients], dtype)


def spec_for(x, backend_plan=lambda plan: plan, layout="grc", activation=None, present=("x",)):
    spec = Spec(layout, 1e-5, activation)
    return dataclasses.replace(
        spec, plan=backend_plan(pallas_tpu.plan(problem_of(spec, x, present, V5E, "forward"), V5E))
    )


def interpret(operation, spec, interpret=True):
    """An operation of the kernels, interpreted and jitted."""
    return jax.jit(functools.partial(operation, spec=spec, interpret=interpret), compiler_options=INTERPRETED)


def moments_of(x, **blocks):
    """Mean and variance of x [rows, channels] by the interpreted kernel."""
    spec = spec_for(x[None], lambda plan: with_blocks(plan, **blocks))
    pivot, delta, var = interpret(pallas_tpu.moments, spec)(x[None])
    return pivot[0], delta[0], var[0]


DISTRIBUTIONS = {
    "far from zero": lambda random, n: 1e4 + random.standard_normal((n, 128)),
    "a first row far away": lambda random, n: random.standard_normal((n, 128)) + 1e4 * (np.arange(n)[:, None] == 0),
    "a last row far away": lambda random, n: random.standard_normal((n, 128)) + 1e4 * (np.arange(n)[:, None] == n - 1),
    "first block constant": lambda random, n: 1e4 + random.standard_normal((n, 128)) * (np.arange(n)[:, None] > 130),
    "growing": lambda random, n: random.standard_normal((n, 128)) + np.arange(n)[:, None] / 10,
    "blocks apart": lambda random, n: random.standard_normal((n, 128)) + 1e3 * (np.arange(n)[:, None] // 128 % 2),
}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_moments_lose_no_digits(distribution):
    x = jnp.asarray(DISTRIBUTIONS[distribution](np.random.default_rng(0), 1000), jnp.float32)
    pivot, delta, var = moments_of(x, rows=128)
    wide = np.asarray(x, np.float64)
    std = wide.std(0)
    assert_close(var, wide.var(0), what="var")
    mean = np.asarray(pivot, np.float64) + np.asarray(delta, np.float64)
    assert_close(mean.astype(np.float64), wide.mean(0), std, what="mean", stored=np.float32)


def test_a_constant_channel_has_no_variance():
    pivot, delta, var = moments_of(jnp.full((300, 128), 0.1, jnp.float32), rows=64)
    np.testing.assert_array_equal(var, 0)


SPECIAL = {
    "nan": [np.nan],
    "inf": [np.inf],
    "minus inf": [-np.inf],
    "both": [np.inf, -np.inf],
    "large": [1e30],
    "alternating": [1e30, -1e30],
}


@pytest.mark.parametrize("where", ["last", *also_on_the_newest_jax("first", "middle", "everywhere")])
def test_what_is_not_finite_stays_in_its_channel_and_looks_as_in_jnp(where):
    x = np.random.default_rng(0).standard_normal((300, 128)).astype(np.float32)
    for channel, (name, values) in enumerate(SPECIAL.items()):
        if (name, where) == ("large", "everywhere"):
            continue  # a constant: its variance is zero, and infinite only where its mean is rounded
        spread = np.resize(values, 300)
        start, stop = {"first": (0, 2), "middle": (150, 152), "last": (298, 300), "everywhere": (0, 300)}[where]
        x[start:stop, channel] = spread[start:stop]
    x = jnp.asarray(x)
    spec = spec_for(x[None], lambda plan: with_blocks(plan, rows=64, resident=2), activation="relu")
    ones, zeros = jnp.ones((1, 128)), jnp.zeros((1, 128))
    arrays = (x[None], ones, zeros, zeros, ones, packed(BATCH))
    got = interpret(pallas_tpu.forward, spec)(*arrays)
    wanted = jax.jit(functools.partial(in_jnp.forward, spec=dataclasses.replace(spec, plan=None)))(*arrays)
    got, wanted = (named("forward", results) for results in (got, wanted))
    for name in ("y", "var", "rstd", "new_running_mean", "new_running_var"):
        kinds = [np.where(np.isfinite(array), 0, np.asarray(array, np.float32)) for array in (got[name], wanted[name])]
        np.testing.assert_array_equal(*kinds, err_msg=name)
    np.testing.assert_array_equal(np.isfinite(got["y"][..., len(SPECIAL) :]), True)


def test_running_statistics_that_have_no_part_in_the_result_may_be_anything():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 40, 128)), jnp.float32)
    spec = spec_for(x)
    ones, nan = jnp.ones((1, 128)), jnp.full((1, 128), jnp.nan)
    first = packed((1.0, 0.0, 0.0, 1.0, 1.0, 0.0))
    results = interpret(pallas_tpu.forward, spec)(x, ones, ones, nan, nan, first)
    assert all(np.isfinite(result).all() for result in results)


@pytest.mark.parametrize("layout", ["grcr", "c", *also_on_the_newest_jax("rcrr", "rrrc", "crg")])
def test_every_layout_gives_what_jnp_gives(layout):
    random = np.random.default_rng(0)
    shape = tuple({"g": 2, "c": 5}.get(role, 3 + axis) for axis, role in enumerate(layout))
    x, dy = (jnp.asarray(random.standard_normal(shape), jnp.float32) for _ in range(2))
    spec = spec_for(x, layout=layout, activation="silu")
    per_channel = (*(2 for role in layout if role == "g"), 5)
    weight, bias, mean, var = (jnp.asarray(1 + random.random(per_channel), jnp.float32) for _ in range(4))
    groups = per_channel[:-1]
    coefficients = jnp.broadcast_to(jnp.asarray(BLEND, jnp.float32), (*groups, 6))
    plain = dataclasses.replace(spec, plan=None)
    step = (x, weight, bias, mean, var, coefficients)
    wanted = jax.jit(functools.partial(in_jnp.forward, spec=plain))(*step)
    got = interpret(pallas_tpu.forward, spec)(*step)
    absolute = without_pivot(got)
    for name, value in without_pivot(wanted).items():
        assert_close(absolute[name], value, 1 + np.abs(value), stored=jnp.float32, what=name)
    wanted = named("forward", wanted)
    count = jnp.full(groups, x.size // (5 * max(1, 2 * len(groups))), jnp.float32)
    statistics = (wanted[name] for name in ("pivot", "offset", "rstd"))
    gradient = (dy, mean, var, x, *statistics, weight, bias, wanted["delta"], coefficients[..., 0], count)
    for one, other in zip(
        interpret(pallas_tpu.backward, spec)(*gradient),
        jax.jit(functools.partial(in_jnp.backward, spec=plain))(*gradient),
        strict=True,
    ):
        assert_close(one, np.asarray(other, np.float64), 1 + np.abs(other))


@pytest.mark.parametrize("activation", ["gelu", *also_on_the_newest_jax(None, "leaky_relu")])
def test_the_two_halves_give_what_jnp_gives(activation):
    case = dataclasses.replace(CASES["200 rows"], activation=activation)
    arrays, random = grouped(case), np.random.default_rng(1)
    spec = spec_for(
        arrays["x"], lambda plan: with_blocks(plan, rows=64), activation=activation, present=("x", "residual")
    )
    plain = dataclasses.replace(spec, plan=None)
    per_channel = {
        name: jnp.asarray(1 + random.random((2, 130)), jnp.float32) for name in ("pivot", "offset", "rstd", "delta")
    }
    count = jnp.asarray([200.0, 400.0])

    def choose(*names):
        every = {**arrays, **per_channel, "count": count}
        return {name: every[name] for name in names}

    normalisation = ("x", "pivot", "offset", "rstd", "weight", "bias")
    y = in_jnp.normalise(**choose(*normalisation, "residual"), spec=plain)
    kept = kept_for_derivative(spec, arrays["residual"], y)
    for operation, values in (
        ("normalise", choose(*normalisation, "residual")),
        ("normalise_backward", choose("dy", *normalisation) | kept),
        ("moments_backward", choose("dmean", "dvar", "x", "pivot", "delta", "count")),
    ):
        got = interpret(getattr(pallas_tpu, operation), spec)(**values)
        wanted = jax.jit(functools.partial(getattr(in_jnp, operation), spec=plain))(**values)
        got, wanted = (result if isinstance(result, tuple) else (result,) for result in (got, wanted))
        for one, other in zip(got, wanted, strict=True):
            # Sums of 200 terms of order ten.
            scale = 10 * 200 if one.ndim == 2 else 10
            assert_close(one, np.asarray(other, np.float64), scale + np.abs(other), what=operation)


def test_state_in_other_dtypes_keeps_them():
    arrays = grouped(Case(40, 128))
    x, weight, bias, mean, var = (arrays[name] for name in STEP)
    spec = spec_for(x)
    with jax.enable_x64(True):
        for dtype in (jnp.bfloat16, jnp.float64):
            wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
            coefficients = packed(BLEND, wide)
            state = mean.astype(dtype), var.astype(dtype)
            got = interpret(pallas_tpu.forward, spec)(x, weight, bias, *state, coefficients)
            plain = jax.jit(functools.partial(in_jnp.forward, spec=dataclasses.replace(spec, plan=None)))
            wanted = plain(x, weight, bias, *state, coefficients)
            absolute = without_pivot(got)
            for name, value in without_pivot(wanted).items():
                stored = dtype if name.startswith("new_running") else jnp.float32
                assert named("forward", got)[name].dtype == stored
                assert_close(absolute[name], value, 1 + np.abs(value), stored=stored, what=name)


def test_the_layer_trains_with_it(interpreted):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6, 5, 5)), jnp.float32)
    stats = bn_fused.RunningStats.init(6)

    @functools.partial(jax.jit, static_argnums=1)
    def step(x, backend):
        def loss(x):
            y, new = bn_fused.batch_norm(
                x, stats, channel_axis=1, approach="ema", activation="silu", residual=x, backend=backend
            )
            return jnp.sum(y**3), new

        return jax.value_and_grad(loss, has_aux=True)(x)

    got, wanted = (jax.tree.leaves(step(x, backend)) for backend in (interpreted(), "jnp"))
    for one, other in zip(got, wanted, strict=True):
        if one.dtype == jnp.int32:
            assert one == other
            continue
        # A sum of 600 cubes of order ten.
        assert_close(one, np.asarray(other, np.float64), 6000 if one.ndim == 0 else 100 + np.abs(other))


# ---------------------------------------------------------------------------------------------- the TPU's interpreter


def tpu_interpreter():
    """Parameters of the interpreter that simulates a TPU's memories, and its module with the races it has found."""
    from jax.experimental.pallas import tpu as pltpu

    if not hasattr(pltpu, "InterpretParams"):
        pytest.skip("this jax has no pltpu.InterpretParams")
    names = ("jax._src.pallas.mosaic.interpret.interpret_pallas_call", "jax._src.pallas.mosaic.interpret")
    for name in names:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        if hasattr(module, "races"):
            return pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan"), module
    pytest.skip("this jax's interpreter does not say which races it has found")


@pytest.mark.parametrize(
    ("case", "rows", "resident"),
    [
        *also_on_the_newest_jax((Case(77, 130, activation="relu"), None, None)),
        (Case(150, 128, activation="relu", residual=True), 64, 1),
    ],
)
def test_nothing_is_read_that_was_not_written_and_nothing_races(case, rows, resident):
    params, module = tpu_interpreter()
    arrays = grouped(case)
    x, *per_channel = (arrays[name] for name in STEP)
    dy, residual = arrays["dy"], arrays.get("residual")
    names = ("x",) if residual is None else ("x", "residual")
    spec = spec_for(x, lambda plan: with_blocks(plan, rows, resident), activation="relu", present=names)
    plain = dataclasses.replace(spec, plan=None)
    step = (x, *per_channel, packed(BLEND), residual)
    wanted = jax.jit(functools.partial(in_jnp.forward, spec=plain))(*step)
    got = interpret(pallas_tpu.forward, spec, params)(*step)
    assert module.races is not None and not module.races.races_found
    assert_close(got[0], np.asarray(wanted[0], np.float64), 10, what="y")
    assert_close(got[3], np.asarray(wanted[3], np.float64), what="var")
    weight, bias, *_ = per_channel
    pivot, delta, rstd = wanted[1], wanted[2], wanted[5]
    one, count = jnp.ones((1,)), jnp.full((1,), case.rows, jnp.float32)
    gradient = (dy, delta, delta, x, pivot, delta, rstd, weight, bias, delta, one, count)
    kept = kept_for_derivative(spec, residual, wanted[0])
    wanted = jax.jit(functools.partial(in_jnp.backward, spec=plain))(*gradient, **kept)
    got = interpret(pallas_tpu.backward, spec, params)(*gradient, **kept)
    assert not module.races.races_found
    for one, other in zip(got, wanted, strict=True):
        # A few values of dz lie on the other side of the kink in one of them; sums of 150 terms of order ten.
        assert_close(one, np.asarray(other, np.float64), 10 * case.rows if one.ndim == 2 else 10)


def test_the_interpreter_would_find_memory_that_was_never_written():
    """The same kernel with a slab it does not fill: so the test above can fail."""
    from bn_fused.kernels.backends.pallas_tpu import kernels as pallas_tpu_kernels

    params, _ = tpu_interpreter()
    x = grouped(Case(150, 128))["x"]
    spec = spec_for(x, lambda plan: with_blocks(plan, 64, 3))
    ones, zeros = jnp.ones((1, 128)), jnp.zeros((1, 128))
    add = pallas_tpu_kernels._add_to_moments
    pallas_tpu_kernels._add_to_moments = lambda walk, rows, x, slab, stats: add(walk, rows, x, None, stats)
    try:
        arrays = (x, ones, zeros, zeros, ones, packed(BATCH))
        y = interpret(pallas_tpu.forward, spec, params)(*arrays)[0]
    finally:
        pallas_tpu_kernels._add_to_moments = add
    assert np.isnan(y).all()
