"""Device times: what is read from a trace of JAX's profiler, and the rows of a run that are made of it."""

import types

import numpy as np
import pytest
from jax.profiler import ProfileData

from bn_fused.bench import device_time
from bn_fused.bench.device_time import Event, Kernel
from bn_fused.bench.run import report, suite
from bn_fused.bench.timing import Samples, Timed
from bn_fused.bench.workloads import Workload

from support.versions import on_the_newest_jax

# Two parts that are marked on the host. On the device the first one's last kernel begins before the second one's mark,
# the second one's first kernel does so too, by as much as two clocks may differ; a line of modules says it all again.
TRACE = """
planes {
  name: "/host:CPU"
  lines { name: "python"
    events { metadata_id: 1 offset_ps: 5000000000 duration_ps: 1000000 }
    events { metadata_id: 2 offset_ps: 10000000000 duration_ps: 1000000 }
    events { metadata_id: 3 offset_ps: 0 duration_ps: 1000000 }
  }
  event_metadata { key: 1 value { id: 1 name: "bn_bench:0" } }
  event_metadata { key: 2 value { id: 2 name: "bn_bench:1" } }
  event_metadata { key: 3 value { id: 3 name: "something else" } }
}
planes {
  name: "/device:GPU:0"
  lines { name: "Stream #20(Compute)"
    events { metadata_id: 1 offset_ps: 5200000000 duration_ps: 4000000 }
    events { metadata_id: 2 offset_ps: 9800000000 duration_ps: 6000000 }
  }
  lines { name: "Stream #21(MemcpyD2D)" events { metadata_id: 3 offset_ps: 6000000000 duration_ps: 2000000 } }
  lines { name: "XLA Modules" events { metadata_id: 1 offset_ps: 5200000000 duration_ps: 9000000 } }
  event_metadata { key: 1 value { id: 1 name: "reduce" } }
  event_metadata { key: 2 value { id: 2 name: "normalise" } }
  event_metadata { key: 3 value { id: 3 name: "MemcpyD2D" } }
}
"""


def test_the_kernels_of_a_trace_are_shared_out_by_the_marks_of_the_parts():
    events, began = device_time.read(ProfileData.from_text_proto(TRACE))
    assert [(event.name, event.duration) for event in events] == [
        ("reduce", 4000), ("MemcpyD2D", 2000), ("normalise", 6000),
    ]  # fmt: skip
    assert began == {0: 5e6, 1: 10e6}
    parts = device_time.shared_out(events, began)
    assert {number: [event.name for event in found] for number, found in parts.items()} == {
        0: ["reduce", "MemcpyD2D"], 1: ["normalise"],
    }  # fmt: skip


def test_a_call_takes_what_its_kernels_take_and_each_name_has_its_share():
    """Kernels of one name may be of different sizes: launches times seconds is what they take together."""
    rounds = [
        [Event(0, 1000, "sums"), Event(2000, 1000, "dx"), Event(6000, 5000, "dx")],
        [Event(0, 3000, "sums"), Event(9000, 2000, "dx"), Event(12000, 8000, "dx")],
    ]
    found = device_time.summary(rounds, calls=2)
    assert found.samples.seconds.tolist() == [3.5e-6, 6.5e-6]
    assert list(found.kernels) == ["dx", "sums"]
    assert found.kernels["dx"] == pytest.approx((1, 4e-6)) and found.kernels["sums"] == pytest.approx((0.5, 2e-6))
    assert found.launches == 1.5 and found.span == pytest.approx((5.5e-6 + 10e-6) / 2)


def test_what_a_trace_mixes_up_is_traced_alone_and_what_has_no_kernels_is_left_out(monkeypatch):
    """The first round lends a kernel of the one function to the other; host functions have none."""
    timed = {name: Timed(lambda: None, calls=2) for name in ("a", "b", "host")}
    names = {id(one): name for name, one in timed.items()}
    traces = []

    def traced(functions):
        traces.append([names[id(one)] for one in functions])
        kernels = {"a": [Event(0, 8000, "k")], "b": [Event(0, 4000, "l")] * 2, "host": []}
        if len(traces) == 1:
            kernels |= {"a": kernels["a"] + kernels["b"][:1], "b": kernels["b"][:1]}
        return [kernels[name] for name in traces[-1]]

    monkeypatch.setattr(device_time, "_traced", traced)
    found = device_time.measure_device(timed, rounds=3)
    assert traces[:3] == [["a", "b", "host"], ["host", "b", "a"], ["a", "b", "host"]]
    assert traces[3:] == [["a"]] * 3 + [["b"]] * 3 + [["host"]] * 3
    calls = device_time.STARTS * 2
    assert {name: one.samples.seconds.tolist() for name, one in found.items()} == {
        "a": [8e-6 / calls] * 3, "b": [8e-6 / calls] * 3,
    }  # fmt: skip


@pytest.fixture
def on_a_gpu(monkeypatch):
    """The CPU passes for a GPU whose kernels take what is set here: seconds by the key of `Prepared.work`."""
    seconds = {}

    def measure_device(work, progress):
        times = {
            name: types.SimpleNamespace(
                samples=Samples(np.full(3, seconds[name if isinstance(name, str) else (name.layer, name.pass_name)])),
                kernels={"kernel": Kernel(1, 1e-6)},
            )
            for name in work
        }
        progress(1.0)
        return times

    monkeypatch.setattr(suite, "_on_gpu", lambda: True)
    monkeypatch.setattr(suite, "measure_device", measure_device)
    return seconds


@on_the_newest_jax
def test_on_a_gpu_a_row_has_the_device_time_against_the_fastest_copy_and_the_clock_beside_it(on_a_gpu):
    on_a_gpu |= {"copy": 4e-6, "device copy": 2e-6}
    on_a_gpu |= {("jnp", "fwd"): 5e-6, ("jnp", "bwd"): 2e-6, ("equinox", "fwd"): 8e-6, ("equinox", "bwd"): 6e-6}
    settings = suite.Settings(backends=("jnp",), passes=("fwd", "bwd"), seconds=0.01, cold=True, threads=2)
    workloads = [Workload("one", (8, 4, 3, 3)), Workload("two", (6, 4))]
    found = list(suite.run(workloads, settings))
    assert [workload.name for workload, _ in found] == ["one", "two"]
    for _, rows in found:
        assert [row.status for row in rows] == ["ok"] * 4, [row.reason for row in rows]
        by_key = {(row.layer, row.pass_name): row for row in rows}
        ours = by_key["jnp", "fwd"]
        assert (ours.timed_by, ours.median, ours.copied_by) == ("device", 5e-6, "device copy")
        assert ours.clock > 0 and ours.kernels == {"kernel": (1, 1e-6)}
        assert ours.of_copy == pytest.approx(2 / 5) and ours.ratios == {"equinox": pytest.approx(5 / 8)}
        # Three passes in the time of the copy's two.
        assert by_key["jnp", "bwd"].of_copy == pytest.approx(1.5)
        lines = report.timing_lines(rows, cold=True)
        assert lines[0].startswith("device copy of x:")
        assert [line for line in lines if "wrong measurement" in line] == [
            "bn_fused (jnp) bwd: more than a copy moves is a wrong measurement"
        ]
        assert "clock ms" in report.headings(("equinox",), report.on_devices(rows))
        assert report.kernel_lines(rows)[0] == "fwd bn_fused (jnp): kernel x1 1.0 us"


def test_what_is_not_compiled_before_the_deadline_is_skipped_and_says_so(on_a_gpu):
    settings = suite.Settings(backends=("jnp",), passes=("fwd",), seconds=0.01, threads=1, deadline=0.0)
    on_a_gpu |= {"copy": 4e-6, "device copy": 2e-6, ("jnp", "fwd"): 5e-6, ("equinox", "fwd"): 8e-6}
    rows = suite.run_workload(Workload("any", (8, 4)), settings)
    assert "skipped" in {row.status for row in rows} <= {"skipped", "ok"}
    assert "not compiled within the time" in report.reasons(rows)[0]
    assert "(skipped)" in report.passed(rows)
