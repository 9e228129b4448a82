"""bench/measure_gpu.sh: all of it, on a CPU with tiny sizes; and what a part that runs too long does to the others."""

import json
import os
import subprocess
import sys
import time

import pytest

from bn_fused.bench.measure import __main__ as measure
from bn_fused.bench.run import records
from bn_fused.kernels import tuned

from support import ROOT
from support.child_process import child_environment
from support.versions import on_the_newest_jax

SCRIPT = ROOT / "bench" / "measure_gpu.sh"


# What its parts do is tested part by part on every JAX.
@on_the_newest_jax
def test_it_goes_through_all_parts_and_saves_what_report_takes(tmp_path):
    environment = child_environment(PYTHON=sys.executable)
    done = subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path), "--rehearse", "--minutes", "8", "--shape", "16,8"],
        capture_output=True, text=True, timeout=520, env=environment, cwd=ROOT,
    )  # fmt: skip
    log = (tmp_path / "log.txt").read_text() if (tmp_path / "log.txt").exists() else ""
    assert done.returncode == 0, done.stderr + log[-3000:]
    summary = (tmp_path / "summary.txt").read_text()
    assert summary == done.stdout
    assert [line.split(" after")[0] for line in summary.splitlines()] == [
        f"{part}: exit 0" for part in ("doctor", "numbers", "tune", "layers", "step")
    ], log[-3000:]
    assert "test_gpu_device.py" in log and "xdist" in log
    _, entries = tuned.read(tmp_path / "tune.json", "cpu")
    assert [entry.of.residual for entry in entries] == [False, True] and all(entry.backends for entry in entries)
    for name, rivals in {"shapes": (), "resnet50": ("equinox", "flax"), "mlp": ("equinox", "flax")}.items():
        run = records.load(tmp_path / f"{name}.json")
        assert not run.interrupted and run.rivals == rivals and {row.dtype for row in run.rows} == {"bfloat16"}
        assert {row.pass_name for row in run.rows} == {"fwd", "bwd"}
        assert {row.status for row in run.rows if row.layer in ("jnp", "equinox")} == {"ok"}
    assert {row.shape for row in records.load(tmp_path / "shapes.json").rows} == {(16, 8)}
    rows = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert {row["name"]: row["status"] for row in rows} == {
        "jnp batch, fused, nhwc": "ok", "equinox batch": "ok", "no norm": "not compared",
    }  # fmt: skip
    assert all(row["median"] > 0 and row["compilation"] > 0 for row in rows)


def test_it_asks_for_a_gpu_and_names_the_rehearsal(tmp_path):
    done = subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path)],
        capture_output=True, text=True, timeout=100, cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 2 and "--rehearse" in done.stderr and not done.stdout


SAVES = """
import time
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("saved")
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("program", "how", "printed"),
    [
        ("print('done')", "exit 0", "done\n"),
        ("raise SystemExit(3)", "exit 3", ""),
        (SAVES, "stopped at its limit, exit 0", "saved\n"),
        (STUBBORN, "stopped at its limit, exit -9", ""),
    ],
)
@on_the_newest_jax
def test_a_part_is_ended_at_its_limit_and_may_save_what_it_has_before(program, how, printed, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "GRACE", 3.0)
    begin = time.monotonic()
    with (tmp_path / "log.txt").open("a") as log:
        assert measure.ended([sys.executable, "-c", program], 6.0, log, os.environ) == how
    assert time.monotonic() - begin < 30
    assert (tmp_path / "log.txt").read_text() == printed
