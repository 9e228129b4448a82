"""How `bn-bench` starts: what it needs, the allocator's settings, a compiler without its driver."""

import os
import platform
import shlex
import subprocess
import sys

import pytest

import bn_fused
from bn_fused.bench import __main__ as entry, allocator, installing


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
    done = console_entry("import sys; sys.modules['click'] = None; from bn_fused.bench.__main__ import main; main()")
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
    expected = allocator.ALLOCATOR | {"MALLOC_TRIM_THRESHOLD_": "1234567"}
    assert console_entry(program, MALLOC_TRIM_THRESHOLD_="1234567").stdout.splitlines()[1] == str(expected)


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


def test_the_hints_name_the_python_that_runs(monkeypatch, tmp_path):
    assert subprocess.run([*shlex.split(installing.python()), "-c", ""], timeout=60).returncode == 0
    for name in ("python", "elsewhere"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(installing.sys, "executable", str(tmp_path / "python"))
    assert installing.pip_install("flax") == "python -m pip install flax"
    monkeypatch.setattr(installing.sys, "executable", str(tmp_path / "elsewhere"))
    assert installing.python() == str(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path.parent)
    assert installing.python() == f"{tmp_path.name}/elsewhere"


def test_without_a_driver_jax_is_told_to_use_the_cpu(monkeypatch):
    installed = {"jax_plugins", "jax_plugins.xla_cuda13"}
    monkeypatch.setattr(installing.importlib.util, "find_spec", lambda name: name if name in installed else None)
    monkeypatch.setattr(entry.sys, "platform", "linux")
    monkeypatch.setattr(entry.glob, "glob", lambda pattern: [])
    assert entry.without_a_driver()
    monkeypatch.setattr(entry.glob, "glob", lambda pattern: ["/dev/nvidia0"] if "nvidia" in pattern else [])
    assert not entry.without_a_driver()
    monkeypatch.setattr(entry.glob, "glob", lambda pattern: [])
    installed.clear()
    assert not entry.without_a_driver()


def test_a_compiler_without_its_driver_is_no_traceback_at_the_start():
    if not entry.without_a_driver():
        pytest.skip("there is a driver here, or no compiler for a GPU or TPU")
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    command = [sys.executable, "-m", "bn_fused.bench", "run", "--shape", "8,4", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0 and done.stdout.startswith("on 1 of ") and "x cpu" in done.stdout
    assert done.stderr == "bn-bench: there is no driver of a GPU or TPU here; JAX is told to use the CPU\n"
