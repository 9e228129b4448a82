"""`bn-bench`: its oracle, its checks, its timing, what it prints and the status it exits with."""

import dataclasses
import os
import platform
import re
import subprocess
import sys

import numpy as np
import pytest

import bn_fused
from bn_fused import kernels
from bn_fused.bench import allocator, check, cli, report, suite, timing
from bn_fused.bench.workloads import SUITES, WORKLOADS, parse_shape

SMALL = ("--shape", "8,4,5,3", "--seconds", "0.01")


@pytest.fixture
def broken_backend():
    """A backend that is jnp but for the gradient of x, which it doubles."""
    operations = {name: getattr(kernels.jnp_backend, name) for name in kernels.contract.OPERATIONS}
    backward = operations["backward"]

    def doubled(**operands):
        dx, *others = backward(**operands)
        return (2 * dx, *others)

    kernels.register(kernels.Backend("broken", operations | {"backward": doubled}))
    yield "broken"
    kernels.unregister("broken")


# The oracle


@pytest.mark.parametrize("approach", suite.APPROACHES)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_the_oracles_gradient_is_the_slope_of_its_output(approach, steps_before):
    shape, settings = (4, 3, 2), dict(approach=approach, momentum=0.8, eps=1e-3, warmup_period=5)
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(2, 3))
    state = check.initial_state(3)
    for _ in range(steps_before):
        state = check.train_oracle(*rng.normal(size=(2, *shape)), weight, bias, state, **settings).state
    arguments = [rng.normal(size=shape) + 1, weight, bias]
    dy = rng.normal(size=shape)

    def loss(x, weight, bias):
        return np.sum(check.train_oracle(x, dy, weight, bias, state, **settings).y * dy)

    step = check.train_oracle(arguments[0], dy, weight, bias, state, **settings)
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
    step = check.train_oracle(
        x,
        x,
        np.ones(2),
        np.zeros(2),
        check.initial_state(2),
        approach="batch",
        momentum=0.9,
        eps=0.0,
        warmup_period=1,
    )
    np.testing.assert_allclose(step.state.mean / (1 - step.state.zero_frac), x.mean((0, 2)), rtol=1e-12)
    np.testing.assert_allclose(step.state.var / (1 - step.state.zero_frac), x.var((0, 2)) * 6 / 5, rtol=1e-12)
    np.testing.assert_allclose(step.y.mean((0, 2)), 0, atol=1e-12)
    np.testing.assert_allclose(step.y.std((0, 2)), 1, rtol=1e-12)


# The checks


@pytest.mark.parametrize("backend", kernels.backend_names())
@pytest.mark.parametrize("approach", suite.APPROACHES)
def test_every_installed_backend_passes_the_check_of_every_approach(backend, approach):
    assert check.check_approach(backend, approach).reason == ""


def test_a_check_names_the_quantity_that_is_wrong(broken_backend):
    found = check.check_approach(broken_backend, "batch")
    assert [error.quantity for error in found.errors if not error.ok] == ["dx"]
    assert found.reason.startswith("dx is off by ")


def test_a_check_of_a_backend_that_raises_says_so_in_one_line():
    found = check.check_approach("no such backend", "batch")
    assert not found.ok and "no such backend" in found.reason and "\n" not in found.reason


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_error_that_is_not_finite_passes_no_limit(value):
    assert not check.Check((check.Error("y", value, 1.0),)).ok


def test_a_check_that_compared_nothing_is_not_ok():
    assert not check.Check(()).ok


# Timing


class FakeClock:
    """Time that passes only when a timed function says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def takes(self, *durations):
        """A function whose calls take these seconds in turn."""
        calls = iter(range(10**6))

        def function():
            self.now += durations[next(calls) % len(durations)]

        return function


def test_times_are_per_call_and_ratios_are_medians_of_paired_rounds():
    clock = FakeClock()
    samples = timing.measure({"slow": clock.takes(0.6), "fast": clock.takes(0.2)}, seconds=10.0, clock=clock)
    assert samples["slow"].median == pytest.approx(0.6)
    assert samples["slow"].p10 == pytest.approx(0.6)
    assert samples["fast"].ratio_to(samples["slow"]) == pytest.approx(1 / 3)
    assert (
        len(samples["slow"].seconds) == len(samples["fast"].seconds) == 13
    )  # 0.8 s a round, until 10 s are over


def test_a_function_too_short_for_the_clock_is_called_often_in_a_sample():
    clock = FakeClock()
    samples = timing.measure({"short": clock.takes(1e-5)}, seconds=0.005, clock=clock)
    assert samples["short"].median == pytest.approx(1e-5)
    assert len(samples["short"].seconds) == timing.MIN_ROUNDS


def test_the_share_of_the_copys_bandwidth_counts_the_passes_that_none_can_save():
    copy = timing.Samples(np.full(5, 2.0))
    # fwd moves as many bytes as the copy; fwd+bwd 5 passes in place of 2
    assert timing.share_of_copy("fwd", timing.Samples(np.full(5, 4.0)), copy) == pytest.approx(0.5)
    assert timing.share_of_copy("fwd+bwd", timing.Samples(np.full(5, 10.0)), copy) == pytest.approx(0.5)
    assert timing.bandwidth(timing.COPY_PASSES, 10**9, 2.0) == pytest.approx(1e9)


# The command


def test_every_suite_names_workloads_that_are_in_the_table():
    assert set(SUITES["quick"]) <= set(WORKLOADS)
    assert [WORKLOADS[name].shape for name in SUITES["quick"]] == [
        (32, 64, 56, 56),
        (64, 256, 14, 14),
        (4096, 512),
    ]
    assert WORKLOADS["mlp"].nbytes == 4096 * 512 * 4


def test_a_run_checks_times_and_names_the_backend_and_exits_with_0(capsys):
    status = cli.run(SMALL)
    out = capsys.readouterr().out
    assert status == 0, out
    assert "every check passed" in out and "FAILED" not in out
    assert bn_fused.explain((8, 4, 5, 3), "float32", channel_axis=1).name + " (auto)" in out
    for backend in kernels.backend_names():
        for approach in suite.APPROACHES:
            assert re.search(rf"{backend}\s.*{approach}\s.*ok", out)
    # two passes, each with our layer and equinox's: time, spread, ratio, GB/s, share of the copy, error
    row = r" [\d.]+ +[\d.]+-[\d.]+ +[\d.]+ +[\d.]+ +\d+ % +\de-\d\d"
    assert len(re.findall(row, out)) == 4


def test_a_backend_whose_check_fails_shows_FAILED_is_not_timed_and_the_status_is_1(broken_backend, capsys):
    found = suite.run_workload(parse_shape("8,4,5,3"), seconds=0.01, progress=lambda share: None)
    rows = [row for row in found.rows if row.layer == broken_backend]
    assert len(rows) == 2 and all(row.samples is None for row in rows)
    assert all(row.samples is not None for row in found.rows if row.layer != broken_backend)

    assert cli.run(SMALL) == 1
    out = capsys.readouterr().out
    assert len(re.findall(r"broken +FAILED", out)) == 2
    assert "FAILED: broken at shape (8,4,5,3) float32: dx is off by" in out
    assert "every check passed" not in out


def test_a_backend_that_cannot_run_here_is_named_with_its_reason(broken_backend, capsys):
    kernels.unregister(broken_backend)
    operations = {name: getattr(kernels.jnp_backend, name) for name in kernels.contract.OPERATIONS}
    kernels.register(kernels.Backend("broken", operations, refusal=lambda problem, target: "it needs a chip"))
    assert cli.run(SMALL) == 0
    assert "it needs a chip" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--shape", "32,x"), "'32,x'"),
        (("--shape", "32"), "'32'"),
        (("--shape", "32,0,4"), "'32,0,4'"),
        (("--seconds", "0"), "--seconds"),
        (("--seconds", "soon"), "'soon'"),
        (("--nothing",), "--nothing"),
        (("nothing",), "nothing"),
    ],
)
def test_input_it_cannot_use_is_answered_in_one_line_with_status_2(arguments, named, capsys):
    assert cli.run(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("bn-bench: ") and err.count("\n") == 1 and named in err


def test_without_a_device_it_says_so_in_one_line_with_status_2(monkeypatch, capsys):
    def devices():
        raise RuntimeError("no such platform\nand a long story")

    monkeypatch.setattr(cli.jax, "devices", devices)
    assert cli.run([]) == 2
    assert capsys.readouterr().err == "bn-bench: JAX finds no device: no such platform\n"


def test_every_failed_check_is_said_in_a_line():
    found = check.Check((check.Error("y", float("inf"), 1.0),))
    assert report.failures([suite.ApproachRow("jnp", "ema", found)], []) == [
        "jnp, approach ema: y is off by inf (limit 1.0e+00)"
    ]


def console_entry(program, **environment):
    """Run a program in a process of its own that is no test runner, without the allocator's settings."""
    unset = ("PYTEST_CURRENT_TEST", *allocator.ALLOCATOR)
    environment = {name: value for name, value in os.environ.items() if name not in unset} | environment
    return subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_without_the_extra_it_says_in_one_line_what_to_install():
    done = console_entry(
        "import sys; sys.modules['click'] = None; from bn_fused.bench.__main__ import main; main()"
    )
    assert done.returncode == 2
    assert done.stderr == 'bn-bench needs click: pip install "bn_fused[bench]"\n'


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator's settings are glibc's")
def test_the_console_entry_restarts_once_with_the_allocators_settings():
    program = (
        "import os; from bn_fused.bench.allocator import ALLOCATOR, keep_freed_memory\n"
        "print({name: os.environ.get(name) for name in ALLOCATOR}, flush=True)\n"
        "keep_freed_memory(); print('ran')"
    )
    unset = dict.fromkeys(allocator.ALLOCATOR)
    assert console_entry(program).stdout.splitlines() == [str(unset), str(allocator.ALLOCATOR), "ran"]
    # what the user has set stays
    given = allocator.ALLOCATOR | {"MALLOC_TRIM_THRESHOLD_": "1234567"}
    assert console_entry(program, MALLOC_TRIM_THRESHOLD_="1234567").stdout.splitlines()[1] == str(given)


def test_neither_import_nor_a_test_runner_restarts_the_process(monkeypatch):
    monkeypatch.setattr(os, "execv", lambda *arguments: pytest.fail("the process would have been replaced"))
    for name in allocator.ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    allocator.keep_freed_memory()
    assert not set(allocator.ALLOCATOR) & set(os.environ)


def test_the_module_runs_as_the_console_script_does():
    done = subprocess.run(
        [sys.executable, "-m", "bn_fused.bench", "--version"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, f"{bn_fused.__version__}\n")


def test_the_workload_table_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        WORKLOADS["mlp"].name = "other"
    with pytest.raises(TypeError):
        WORKLOADS["new"] = WORKLOADS["mlp"]
