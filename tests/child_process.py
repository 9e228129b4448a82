"""Processes of their own that read and write JSON: what compiles for another chip, or on other devices."""

import json
import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent


def answer(program, given, environment=(), timeout=580):
    """What a program that reads and writes JSON answers, on a CPU and without XLA_FLAGS but for `environment`.

    `program`: the arguments of Python; a file is looked for in this folder.
    """
    arguments = [str(HERE / word) if word.endswith(".py") else word for word in program]
    inherited = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    process = subprocess.run(
        [sys.executable, *arguments],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**inherited, "JAX_PLATFORMS": "cpu", **dict(environment)},
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout)
