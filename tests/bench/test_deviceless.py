"""Compilers for chips that are not there: what has to be installed, what they are asked for, and what is refused."""

import importlib.metadata
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from bn_fused.bench import deviceless, installing

from support.compilers import skip_without_compilers


def test_the_requirements_are_those_of_the_installed_jax():
    version = jax.__version__
    assert deviceless.requirements("cuda") == (f"jax-cuda13-plugin=={version}", f"jax-cuda13-pjrt=={version}")
    (libtpu,) = deviceless.requirements("tpu")
    assert libtpu.startswith("libtpu==")
    assert not set(libtpu) & set(" ;\"'")


def test_the_requirements_of_triton_are_those_of_the_extra():
    (extra,) = (
        requirement.split(";")[0].strip()
        for requirement in importlib.metadata.requires("bn_fused")
        if requirement.startswith("jax-triton") and "triton" in requirement.split(";")[1]
    )
    assert deviceless.requirements("triton")[0] == extra


def test_the_requirements_print_without_the_bench_extra():
    script = (
        "import sys; sys.modules.update(click=None, rich=None, sklearn=None)\n"
        "from bn_fused.bench import deviceless; sys.exit(deviceless.main(['cuda', 'tpu']))"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == [*deviceless.requirements("cuda"), *deviceless.requirements("tpu")]


def test_a_missing_compiler_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(deviceless.importlib.util, "find_spec", lambda name: None)
    for target, platform in {"b200": "cuda", "v5e": "tpu"}.items():
        listed = f"$({installing.python()} -m bn_fused.bench.deviceless {platform})"
        command = f"{target} is not installed: {installing.pip_install('--no-deps')} {listed}"
        with pytest.raises(deviceless.DevicelessUnavailable, match=re.escape(command)):
            deviceless.compile_for(target, jnp.sin, jnp.ones(3))


@pytest.mark.compilers
def test_what_jax_keeps_of_compiled_programs_is_left_aside():
    skip_without_compilers("h200")
    assert jax.config.jax_compilation_cache_dir and jax.config.jax_enable_compilation_cache  # by conftest
    first, second = (deviceless.compile_for("h200", lambda x: jnp.sin(x), jnp.ones(3)) for _ in range(2))
    assert first.as_text() == second.as_text()
    assert jax.config.jax_enable_compilation_cache


def test_for_an_amd_gpu_nothing_is_compiled_and_one_line_says_so():
    for target in ("mi210", "mi250x", "mi300x"):
        with pytest.raises(deviceless.DevicelessUnavailable, match=f"^{target} is an AMD GPU, and .*runs without one$"):
            deviceless.compile_for(target, jnp.sin, jnp.ones(3))


def test_unknown_targets_and_platforms_are_refused_by_name(capsys):
    with pytest.raises(ValueError, match="target is 'h2000'; accepted are .*'h200'"):
        deviceless.compile_for("h2000", jnp.sin, jnp.ones(3))
    with pytest.raises(ValueError, match="platform is 'metal'"):
        deviceless.requirements("metal")
    with pytest.raises(SystemExit) as exit_:
        deviceless.main(["metal"])
    assert exit_.value.code == 2
    assert "unknown platform 'metal'" in capsys.readouterr().err


def test_without_arguments_every_target_is_listed(capsys):
    assert deviceless.main([]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(deviceless.TARGETS)
