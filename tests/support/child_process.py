"""Processes of their own that read and write JSON: what compiles for another chip, or on other devices."""

import json
import os
import subprocess
import sys

from support import ROOT


def child_environment(hidden=("XLA_FLAGS",), **settings):
    """The environment of a process that imports `support`: the one here without the variables of `hidden`."""
    inherited = {name: value for name, value in os.environ.items() if name not in hidden}
    path = os.pathsep.join(filter(None, [str(ROOT / "tests"), inherited.get("PYTHONPATH")]))
    return {**inherited, "PYTHONPATH": path, **settings}


def answer(program, given, environment=(), timeout=580):
    """What a program that reads and writes JSON answers, on a CPU and without XLA_FLAGS but for `environment`.

    `program`: the arguments of Python.
    """
    process = subprocess.run(
        [sys.executable, *program],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=timeout,
        env=child_environment(JAX_PLATFORMS="cpu", **dict(environment)),
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout)
