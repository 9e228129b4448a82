"""`bn-bench tune`, with a timer that makes up times: what it finds, writes and says."""

import dataclasses
import math

import jax.numpy as jnp
import pytest

from bn_fused import kernels
from bn_fused.bench import cli, tune
from bn_fused.bench.commands import tune as command
from bn_fused.bench.workloads import SUITES, WORKLOADS, Workload
from bn_fused.kernels.backends.jnp import Plan
from bn_fused.kernels.backends.triton import tuning
from bn_fused.kernels.backends.triton.plan import Config, heuristic, make_plan, search_set
from bn_fused.kernels.chips import CHIPS

H200 = CHIPS["h200"]
KIND = H200.device_kind
TUNED = Config(row_bytes=512, values=8, warps=8, stages=3, blocks_per_core=2)


def with_config(config, rows, channels=64, itemsize=2):
    return make_plan(1, rows, channels, itemsize, H200, config)


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """The file for an H200 in a folder that BN_FUSED_TUNING names."""
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path))
    return tmp_path / "nvidia-h200.json"


def fastest_is(config, share=0.5):
    """A timer by which this configuration takes a share of the time of the others."""

    def timer(workload, plans):
        rows, channels = tune.sizes_of(workload)
        itemsize = jnp.dtype(workload.dtype).itemsize
        best = make_plan(1, rows, channels, itemsize, H200, config, derivative=True)
        return [share if plan == best else 1.0 for plan in plans]

    return timer


WORKLOAD = dataclasses.replace(WORKLOADS["resnet-early"], dtype="bfloat16")


def test_the_fastest_configuration_is_found():
    for config in search_set(1, *tune.sizes_of(WORKLOAD), 2, H200):
        (result,) = tune.tune([WORKLOAD], H200, fastest_is(config))
        rows, channels = tune.sizes_of(WORKLOAD)
        assert make_plan(1, rows, channels, 2, H200, result.entry.config) == with_config(config, rows, channels)
        assert result.entry.key == (1, 100352, 64, "bfloat16") and result.entry.seconds == 0.5
        assert result.ran > 10 and result.failures == ()


def test_what_is_hardly_faster_does_not_take_the_heuristics_place():
    first, *others = search_set(1, *tune.sizes_of(WORKLOAD), 2, H200)
    other = next(config for config in others if with_config(config, 100352) != with_config(first, 100352))
    (result,) = tune.tune([WORKLOAD], H200, fastest_is(other, 0.99))
    assert result.entry.config == first and result.entry.seconds == result.entry.heuristic_seconds == 1.0


def test_a_configuration_that_fails_is_left_out_and_named():
    first = heuristic(1, *tune.sizes_of(WORKLOAD), 2, H200)

    def timer(workload, plans):
        return ["it is wrong" if plan.stages > 1 or plan == with_config(first, 100352, 64) else 1.0 for plan in plans]

    # The plans that are timed have an activation.
    (result,) = tune.tune(
        [WORKLOAD],
        H200,
        lambda workload, plans: timer(workload, [dataclasses.replace(p, derivative=False) for p in plans]),
    )
    assert result.entry.config.stages == 1 and result.entry.config != first
    assert len(result.failures) == 5 and all("it is wrong" in failure for failure in result.failures)
    (result,) = tune.tune([WORKLOAD], H200, lambda workload, plans: ["no GPU"] * len(plans))
    assert result.entry is None and result.ran == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plans_are_timed_and_checked_on_the_device(dtype):
    """The real timer, with another backend that has plans."""
    plans = [Plan(), Plan(fold=8), "no plan"]
    times = tune.time_plans(Workload("small", (16, 8, 4), dtype), plans, seconds=0.01, backend="jnp")
    assert all(isinstance(time, float) and 0 < time < 60 for time in times[:2])
    assert times[2].startswith("TypeError: plan is 'no plan'")


def test_wrong_results_are_not_timed(broken_backend):
    (time,) = tune.time_plans(Workload("small", (16, 8, 4)), [None], seconds=0.01, backend=broken_backend)
    assert "its dx is wrong" in time


@pytest.fixture
def on_an_h200(monkeypatch):
    """As if the device were an H200 whose times are made up."""
    monkeypatch.setattr(command, "refusal", lambda workload, backend: None)
    monkeypatch.setattr(command, "chip_of", lambda device: H200)
    calls = []

    def timer(workload, plans, *, seconds, device):
        calls.append(workload.name)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return fastest_is(TUNED, 0.5)(workload, plans)

    monkeypatch.setattr(command.tune, "time_plans", timer)
    return calls


def test_the_command_writes_a_file_that_is_used_and_adds_to_it(on_an_h200, tuned, capsys):
    assert cli.main(["tune", "--dtype", "bfloat16", "--workload", "mlp", "--output", str(tuned)]) == 0
    assert cli.main(["tune", "--shape", "512,24,7,7", "--workload", "mlp", "--output", str(tuned)]) == 0
    entries = tuning.read(tuned, KIND)
    assert [one.key for one in entries] == [
        (1, 4096, 512, "bfloat16"),
        (1, 4096, 512, "float32"),
        (1, 25088, 24, "float32"),
    ]
    written = next(one for one in entries if one.key == (1, 4096, 512, "bfloat16"))
    problem, target = kernels.Problem(1, 4096, 512, "bfloat16"), kernels.Target("cuda", H200)
    assert tuning.plan(problem, target) == make_plan(1, 4096, 512, 2, H200, written.config)
    out = capsys.readouterr().out
    assert "mlp (4096,512) bfloat16" in out and f"written to {tuned}" in "".join(out.splitlines())


def test_the_command_writes_into_the_package_by_default(on_an_h200, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path / "tuned")
    assert cli.main(["tune", "--workload", "mlp"]) == 0
    assert tuning.read(tmp_path / "tuned" / "nvidia-h200.json", KIND)


def test_an_interrupted_command_keeps_what_is_finished(on_an_h200, tuned):
    assert cli.main(["tune", "--suite", "resnet50", "--output", str(tuned)]) == 130
    assert len(tuning.read(tuned, KIND)) == 3 < len(SUITES["resnet50"])


def test_the_command_replaces_a_damaged_file(on_an_h200, tuned, capsys):
    tuned.write_text("{")
    assert cli.main(["tune", "--workload", "mlp", "--output", str(tuned)]) == 0
    assert "is replaced: it is not JSON" in capsys.readouterr().out.replace("\n", " ")
    assert len(tuning.read(tuned, KIND)) == 1


def test_on_a_cpu_the_command_says_that_it_needs_a_gpu(tuned, capsys):
    assert cli.main(["tune", "--workload", "mlp", "--output", str(tuned)]) == 2
    assert "'triton' cannot run on cpu" in capsys.readouterr().err and not tuned.exists()


def test_a_workload_without_a_configuration_that_runs_makes_the_exit_status_1(on_an_h200, tuned, monkeypatch, capsys):
    monkeypatch.setattr(command.tune, "time_plans", lambda workload, plans, **_: ["RuntimeError: no"] * len(plans))
    assert cli.main(["tune", "--workload", "mlp", "--output", str(tuned)]) == 1
    assert "RuntimeError: no" in capsys.readouterr().out and not tuned.exists()


def test_times_are_finite():
    (result,) = tune.tune([WORKLOAD], H200, fastest_is(TUNED))
    assert math.isfinite(result.entry.seconds) and math.isfinite(result.entry.heuristic_seconds)
