"""`bn-bench`'s foundations: its oracle, its checks, its timing, its workloads and its console entry."""

import dataclasses
import importlib.util
import itertools
import sys
from unittest import mock

import jax
import numpy as np
import pytest

from bn_fused import kernels
from bn_fused.approaches import APPROACHES
from bn_fused.bench import check, oracle, timing
from bn_fused.bench.providers import RIVALS
from bn_fused.bench.run import cases, suite
from bn_fused.bench.run.jax_case import collective_bytes
from bn_fused.bench.workloads import PASSES, SUITES, WORKLOADS, Workload
from bn_fused.kernels.activations import ACTIVATIONS

from support.versions import ON_THE_NEWEST_JAX

# The oracle


@pytest.mark.parametrize("approach", APPROACHES)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_the_oracles_gradient_is_the_slope_of_its_output(approach, steps_before):
    shape, settings = (4, 3, 2), dict(approach=approach, momentum=0.8, eps=1e-3, warmup_period=5)
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(2, 3))
    state = oracle.initial_state(3)
    for _ in range(steps_before):
        state = oracle.train_oracle(*rng.normal(size=(2, *shape)), weight, bias, state, **settings).state
    arguments = [rng.normal(size=shape) + 1, weight, bias]
    dy = rng.normal(size=shape)

    def loss(x, weight, bias):
        return np.sum(oracle.train_oracle(x, dy, weight, bias, state, **settings).y * dy)

    step = oracle.train_oracle(arguments[0], dy, weight, bias, state, **settings)
    h = 1e-5  # central differences in float64: error about h**2 + epsilon / h, 1e-10
    for position, gradient in enumerate((step.dx, step.dweight, step.dbias)):
        direction = rng.normal(size=arguments[position].shape)
        ends = [list(arguments), list(arguments)]
        for end, sign in zip(ends, (1, -1), strict=True):
            end[position] = arguments[position] + sign * h * direction
        slope = (loss(*ends[0]) - loss(*ends[1])) / (2 * h)
        assert abs(slope - np.sum(gradient * direction)) < 1e-7 * np.sum(np.abs(gradient * direction))


def test_the_oracles_batch_statistics_are_unbiased_from_the_first_step():
    x = np.random.default_rng(0).normal(size=(6, 2, 4))
    step = oracle.train_oracle(
        x,
        x,
        np.ones(2),
        np.zeros(2),
        oracle.initial_state(2),
        approach="batch",
        momentum=0.9,
        eps=0.0,
        warmup_period=1,
    )
    np.testing.assert_allclose(step.state.mean / (1 - step.state.zero_frac), x.mean((0, 2)), rtol=1e-12)
    np.testing.assert_allclose(step.state.var / (1 - step.state.zero_frac), x.var((0, 2), ddof=1), rtol=1e-12)
    np.testing.assert_allclose(step.y.mean((0, 2)), 0, atol=1e-12)
    np.testing.assert_allclose(step.y.std((0, 2)), 1, rtol=1e-12)


# The checks


@pytest.mark.parametrize("backend", kernels.backend_names())
@pytest.mark.parametrize("approach", APPROACHES)
def test_every_backend_that_runs_here_passes_the_check_of_every_approach(backend, approach):
    refusal = suite.refusal(check.CHECKED, backend)
    if refusal is not None:
        pytest.skip(refusal)
    assert check.check_approach(backend, approach).reason == ""


def test_a_check_names_the_quantity_that_is_wrong(broken_backend):
    outcome = check.check_approach(broken_backend, "batch")
    assert [error.quantity for error in outcome.errors if not error.ok] == ["dx"]
    assert outcome.reason.startswith("dx is off by ")


def test_a_check_of_a_backend_that_raises_says_so_in_one_line():
    outcome = check.check_approach("no such backend", "batch")
    assert not outcome.ok and "no such backend" in outcome.reason and "\n" not in outcome.reason


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_error_that_is_not_finite_passes_no_limit(value):
    assert not check.Check((check.Error("y", value, 1.0),)).ok


def test_where_rounding_decides_on_relus_derivative_either_side_is_right_and_elsewhere_not():
    """x was chosen so that one value before relu is as good as zero, as happens in some array of a million values."""
    (x, dy), (weight, bias) = check.draw((512, 2)), check.draw_parameters(2)
    options = dict(approach="batch", momentum=0.9, eps=1e-5, warmup_period=1, activation="relu")

    def step(x):
        return oracle.train_oracle(x, dy, np.float64(weight), np.float64(bias), oracle.initial_state(2), **options)

    x, want = np.float64(x), step(x)
    for _ in range(8):  # Newton's method: the statistics depend a little on the value itself
        x[0, 0] -= (want.z[0, 0] - 1e-9) / (weight[0] * want.rstd[0])
        want = step(x)
    assert 0 < want.z[0, 0] < 1e-8 < np.abs(np.delete(want.z, 0)).min()

    def errors_without(row):
        """Of results that have relu's derivative of the other side there."""
        slope = np.where(want.z > 0, 1.0, 0.0)
        slope[row, 0] = 1 - slope[row, 0]
        dz, scale = dy * slope, weight * want.rstd
        dweight, dbias = (dz * want.normalised).sum(0), dz.sum(0)
        dx = scale * (dz - dbias / 512 - want.normalised * dweight / 512)
        results = {"y": want.y, "dx": dx, "dweight": dweight, "dbias": dbias, "dresidual": dz}
        return check.step_errors(results, want, dy, weight, check.Limits.of("float32"), "relu")

    assert all(error.ok for error in errors_without(0))
    assert not any(error.ok for error in errors_without(1) if error.quantity != "y")


def test_a_check_that_compared_nothing_is_not_ok():
    assert not check.Check(()).ok


def test_a_failed_check_is_worth_infinitely_more_than_its_limit():
    errors = (check.Error("y", float("nan"), 1.0), check.Error("dx", 0.5, 1.0))
    assert not check.Check(errors).ok and np.isnan(check.Check(errors).worst())


# Timing


class FakeClock:
    """Time that passes only when a timed function says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def takes(self, *durations):
        """A function to time, whose calls take these seconds in turn."""
        calls = iter(range(10**6))

        def function():
            self.now += durations[next(calls) % len(durations)]

        return timing.Timed(function)


def test_times_are_per_call_and_ratios_are_medians_of_paired_rounds():
    clock = FakeClock()
    samples = timing.measure({"slow": clock.takes(0.6), "fast": clock.takes(0.2)}, seconds=10.0, clock=clock)
    assert samples["slow"].median == pytest.approx(0.6)
    assert samples["slow"].p10 == pytest.approx(0.6)
    assert samples["fast"].ratio_to(samples["slow"]) == pytest.approx(1 / 3)
    assert len(samples["slow"].seconds) == len(samples["fast"].seconds) == 13  # 0.8 s a round, until 10 s are over


def test_a_function_too_short_for_the_clock_is_called_often_in_a_sample():
    clock = FakeClock()
    samples = timing.measure({"short": clock.takes(1e-5)}, seconds=0.005, clock=clock)
    assert samples["short"].median == pytest.approx(1e-5)
    assert len(samples["short"].seconds) == timing.MIN_ROUNDS


def test_a_function_that_does_its_work_several_times_is_given_its_share_of_the_time():
    clock = FakeClock()
    once, four_times = clock.takes(0.5), dataclasses.replace(clock.takes(2.0), calls=4)
    samples = timing.measure({"once": once, "four times": four_times}, seconds=1.0, clock=clock)
    assert samples["four times"].median == pytest.approx(samples["once"].median) == pytest.approx(0.5)


# The workloads


def test_every_suite_names_workloads_that_are_in_the_table():
    for names in SUITES.values():
        assert names and set(names) <= set(WORKLOADS)
    assert [WORKLOADS[name].shape for name in SUITES["quick"]] == [(32, 64, 56, 56), (64, 256, 14, 14), (4096, 512)]
    assert WORKLOADS["mlp"].nbytes == 4096 * 512 * 4


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({}, (2, 3)),  # x, y; x, dy, dx
        ({"activation": "relu"}, (2, 3)),
        ({"residual": True}, (3, 3)),  # x, residual, y; the residual's gradient is dy
        ({"residual": True, "activation": "relu"}, (3, 5)),  # x, dy, residual, dx, dresidual
    ],
    ids=str,
)
def test_the_passes_that_none_can_save_are_counted(options, passes):
    workload = Workload("any", (2, 3), **options)
    assert (workload.passes("fwd"), workload.passes("bwd")) == passes
    assert workload.passes("fwd+bwd") == sum(passes)


def test_a_layout_says_where_the_channels_are_in_memory():
    images = Workload("images", (2, 3, 5, 7))
    assert (images.array_shape, images.channel_axis) == ((2, 3, 5, 7), 1)
    last = dataclasses.replace(images, layout="nhwc")
    assert (last.array_shape, last.channel_axis, last.channels) == ((2, 5, 7, 3), 3, 3)


def test_the_workload_table_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        WORKLOADS["mlp"].name = "other"
    with pytest.raises(TypeError):
        WORKLOADS["new"] = WORKLOADS["mlp"]


# What is timed is what was checked


# By default every pair of a layout with a number of sets, each activation, both layouts with a residual and without.
PROGRAMS = {
    (None, False): [("nchw", 1)],
    ("relu", True): [("nhwc", 3), ("nchw", 1)],
    ("gelu", False): [("nchw", 3), ("nhwc", 1)],
    ("silu", True): [("nhwc", 1)],
}


def marks_of(options, by_default):
    """On an older JAX the programs with everything in them."""
    return pytest.mark.slow if not by_default else () if options == ("silu", True) else ON_THE_NEWEST_JAX


@pytest.mark.parametrize(
    ("layout", "activation", "residual", "sets"),
    [
        pytest.param(layout, *options, sets, marks=marks_of(options, (layout, sets) in default))
        for (options, default), layout, sets in itertools.product(PROGRAMS.items(), ("nchw", "nhwc"), (1, 3))
    ],
)
def test_the_programs_of_our_layer_and_of_equinoxs_give_the_oracles_results(layout, activation, residual, sets):
    workload = Workload("any", (6, 5, 4, 3), layout=layout, activation=activation, residual=residual)
    inputs = cases.make_inputs(workload, sets=sets)
    want = cases.make_oracle(inputs, "batch")
    for provider in (RIVALS["jnp"], RIVALS["equinox"]):
        case = suite.make_case(provider, inputs, "batch", PASSES)
        for pass_name in PASSES:
            outcome = cases.check_case(case, pass_name, want, workload, provider.ours)
            assert outcome.ok, outcome.reason
            quantities = {"fwd": {"y"}, "bwd": {"dx", "dweight", "dbias"} | ({"dresidual"} if residual else set())}
            quantities["fwd+bwd"] = quantities["fwd"] | quantities["bwd"]
            assert {error.quantity for error in outcome.errors} == quantities[pass_name]
            assert len(case.programs[pass_name].start()) == sets == case.programs[pass_name].calls


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_inputs_are_checked_to_one_rounding_of_ours_and_more_of_rivals(dtype, standard_promotion):
    workload = Workload("any", (8, 4, 5, 5), dtype, activation="leaky_relu")
    inputs = cases.make_inputs(workload, sets=1)
    want = cases.make_oracle(inputs, "batch")
    for provider in (RIVALS["jnp"], RIVALS["equinox"]):
        case = suite.make_case(provider, inputs, "batch", ("fwd+bwd",))
        assert cases.check_case(case, "fwd+bwd", want, workload, provider.ours).reason == ""
    assert check.Limits.of(dtype).array < check.Limits.of(dtype, ours=False).array


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_over_several_devices_statistics_are_shared_only_if_asked(sync, layout):
    workload = Workload("any", (8, 4, 3, 3), layout=layout)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("devices",))
    inputs = cases.make_inputs(workload, sets=1, mesh=mesh)
    case = suite.make_case(RIVALS["jnp"], inputs, "batch", PASSES, sync)
    shared, own = cases.make_oracle(inputs, "batch", 1), cases.make_oracle(inputs, "batch", 4)
    for pass_name in PASSES:
        assert cases.check_case(case, pass_name, shared, workload, True).ok == sync
        assert cases.check_case(case, pass_name, own, workload, True).ok != sync
    # The packed moments forward; without sharing nothing. Backward, the parameters' own gradients are summed anyway.
    assert (case.collective_bytes["fwd"] > 0) == sync
    parameters = 2 * 4 * workload.channels
    assert case.collective_bytes["bwd"] > parameters if sync else case.collective_bytes["bwd"] == parameters


def test_an_exchange_that_is_started_and_awaited_apart_counts_once():
    program = """
HloModule jit_step, is_scheduled=true

ENTRY %main (x: f32[8], y: f32[4]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %y = f32[4]{0} parameter(1)
  %start = ((f32[8]{0}), f32[8]{0}) all-reduce-start(%x), channel_id=1, replica_groups={{0,1}}, to_apply=%add
  %gathered = f32[8]{0} all-gather(%y), channel_id=2, dimensions={0}
  %done = f32[8]{0} all-reduce-done(%start)
  ROOT %sum = f32[8]{0} add(%done, %gathered)
}
"""
    assert collective_bytes(program) == 8 * 4 + 8 * 4


def test_what_sharing_statistics_costs_is_the_median_over_rounds_of_the_same_layer_with_and_without(monkeypatch):
    exchanged = {}

    def measure(work, **settings):
        rounds = dict.fromkeys(work, np.ones(3))
        for key, timed in work.items():
            if key != "copy":
                exchanged[key] = collective_bytes(timed.start.func.as_text())
                # In the rounds twice, three times and twice as long; the ratio of the medians is 3.
                rounds[key] = np.array([2.0, 30.0, 400.0] if key.sync else [1.0, 10.0, 200.0])
        return {key: timing.Samples(seconds) for key, seconds in rounds.items()}

    monkeypatch.setattr(suite, "measure", measure)
    workload = Workload("any", (8, 4, 3, 3))
    settings = suite.Settings(backends=("jnp",), passes=PASSES, devices=4, sync=True)
    rows = suite.run_workload(workload, settings)
    assert [row.sync_ratio for row in rows] == [2.0] * 6, [row.reason for row in rows]
    assert {key.layer for key in exchanged} == {"jnp", "equinox"} and len(exchanged) == 12
    # The program of each device for itself exchanges nothing but, backward, the parameters' gradients.
    parameters = 2 * 4 * workload.channels
    for key, nbytes in exchanged.items():
        own = 0 if key.pass_name == "fwd" else parameters
        assert nbytes > own if key.sync else nbytes == own, key
    # Without sharing there is nothing to compare with.
    (row,) = suite.run_workload(workload, dataclasses.replace(settings, rivals=(), passes=("fwd",), sync=False))
    assert row.status == "ok" and row.sync_ratio is None


def test_a_layer_that_fails_without_sharing_its_statistics_is_not_timed_with(monkeypatch):
    make_case = suite.make_case

    def fails_alone(provider, inputs, approach, passes, sync):
        if not sync:
            raise RuntimeError("alone")
        return make_case(provider, inputs, approach, passes, sync)

    monkeypatch.setattr(suite, "make_case", fails_alone)
    settings = suite.Settings(backends=("jnp",), rivals=(), passes=("fwd",), devices=2, sync=True, seconds=0.01)
    (row,) = suite.run_workload(Workload("any", (8, 4)), settings)
    assert (row.status, row.reason, row.median) == ("failed", "without --sync: RuntimeError: alone", None)


def test_large_workloads_are_compared_in_some_channels_the_first_and_the_last_among_them(monkeypatch):
    monkeypatch.setattr(cases, "ELEMENTS_COMPARED", 4 * 6)
    inputs = cases.make_inputs(Workload("any", (6, 9)), sets=1)
    assert cases.make_oracle(inputs, "batch").channels.tolist() == [0, 2, 5, 8]


def test_cold_programs_work_on_more_than_the_last_cache_holds():
    workload = Workload("any", (1024, 1024))
    sets = cases.sets_for(workload, jax.devices()[0], cold=True)
    assert sets * workload.nbytes >= cases.UNKNOWN_CACHE
    assert cases.sets_for(workload, jax.devices()[0], cold=False) == 1
    assert cases.sets_for(Workload("tiny", (2, 2)), jax.devices()[0], cold=True) == cases.MOST_SETS


def test_an_activation_that_torch_is_not_timed_with_is_refused_by_name(monkeypatch):
    for name in ("torch", "torch.nn"):  # which need not be installed
        monkeypatch.setitem(sys.modules, name, mock.MagicMock())
    spec = importlib.util.find_spec("bn_fused.bench.run.torch_case")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    inputs = cases.make_inputs(Workload("any", (4, 3), activation="softplus"), sets=1)
    with pytest.raises(ValueError, match="activation is 'softplus': torch is timed with relu, silu, gelu, leaky_relu"):
        module.torch_case(inputs, ("fwd",))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_copy_reads_and_writes_what_it_says_and_nothing_else(dtype):
    workload = Workload("copied", (8, 4, 5, 3), dtype)
    inputs = cases.make_inputs(workload, sets=2)
    timed = cases.copy_program(inputs)
    outputs = timed.start()
    assert timed.calls == 2 and len(outputs) == 2
    for (copy,), (x, _, _) in zip(outputs, inputs.sets, strict=True):
        assert copy.dtype == x.dtype and copy.shape == x.shape
        bits = [np.asarray(array).view(f"u{array.dtype.itemsize}") for array in (copy, x)]
        assert (bits[0] == bits[1] ^ 1).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_oracles_activations_are_jaxs(name):
    z = np.linspace(-4, 4, 81)
    y, derivative = oracle.ACTIVATIONS[name](z)
    with jax.enable_x64(True):
        want, pullback = jax.vjp(ACTIVATIONS[name].definition, jax.numpy.asarray(z))
        (slope,) = pullback(np.ones_like(z))
    # At zero itself the kinked ones have no derivative.
    away = z != 0
    np.testing.assert_allclose(y, want, atol=1e-14)
    np.testing.assert_allclose(derivative[away], np.asarray(slope)[away], atol=1e-13)
