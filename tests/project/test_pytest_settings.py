"""The suite's settings hold on a machine that has other people's pytest plugins."""

import os
import subprocess
import sys

from support import ROOT
from support.versions import on_the_newest_jax

# As pytest-benchmark 5.1 does under pytest-xdist while pytest is configured, of a class that no setting here can name.
WARNS = """
import warnings
def pytest_configure(config):
    warnings.warn("Benchmarks are automatically disabled because xdist plugin is active.")
"""


@on_the_newest_jax
def test_pytest_benchmark_does_not_end_the_run_with_its_warning(tmp_path):
    (tmp_path / "warns.py").write_text(WARNS)
    metadata = tmp_path / "warns-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: warns\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[pytest11]\nbenchmark = warns\n")

    def collect(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "--collect-only", *arguments, "tests/kernels/test_chips.py"],
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
            cwd=ROOT,
        )

    done = collect()
    assert done.returncode == 0 and "automatically disabled" not in done.stdout + done.stderr
    # But for the setting the plugin would be loaded, whose warning some versions of pytest make an error.
    done = collect("-p", "benchmark")
    assert "automatically disabled" in done.stdout + done.stderr
