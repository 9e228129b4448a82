"""The examples of the documents run as they stand there, on 4 virtual devices."""

import os
import re
import subprocess
import sys

import pytest

from support import ROOT

DOCUMENTS = ("README.md", "docs/devices.md", "docs/equinox.md", "docs/kernels-gpu.md")
FLAGS = "--xla_force_host_platform_device_count=4"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_examples_run_one_after_the_other(document, tmp_path):
    text = (ROOT / document).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 2
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(blocks)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if any("print(" in block for block in blocks):
        assert done.stdout.strip()
