"""`bn-bench doctor`: what it says is here, what can run, and whether it is right."""

import sys
import types

import jax
import pytest

from bn_fused import kernels
from bn_fused.bench import doctor
from bn_fused.bench.cli import main

pytestmark = pytest.mark.usefixtures("narrow_terminal")


def test_the_doctor_names_devices_backends_rivals_and_compilers(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"{len(jax.devices())} x {jax.default_backend()}" in out and jax.__version__ in out
    assert all(name in out for name in (*kernels.backend_names(), "flax", "torch", "cuda", "tpu"))
    assert "FAILED" not in out


def test_the_doctor_speaks_of_tuning_files_where_there_is_a_gpu_or_somebody_names_one(monkeypatch, tmp_path):
    here = jax.devices()[0]
    monkeypatch.delenv("BN_FUSED_TUNING", raising=False)
    assert bool(doctor.tuning()) == (here.platform == "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(platform="gpu", device_kind="Some GPU")])
    assert doctor.tuning() == ["no file for Some GPU: plans are made by rule, and auto takes jnp"]
    monkeypatch.setattr(jax, "devices", lambda: [here])
    monkeypatch.setenv("BN_FUSED_TUNING", str(tmp_path / "mine.json"))
    (line,) = doctor.tuning()
    assert (
        line
        == f"{tmp_path / 'mine.json'} (by BN_FUSED_TUNING) is ignored: it cannot be read (No such file or directory)"
    )


def test_the_doctor_says_where_lowered_kernels_are_kept_on_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(platform="gpu", device_kind="Some GPU")])
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        assert doctor.lowered_kernels() == [f"lowered kernels are kept in {tmp_path / 'bn_fused'}"]
        monkeypatch.setitem(sys.modules, "flatbuffers", None)
        assert doctor.lowered_kernels() == ["lowered kernels are not kept: pip install flatbuffers"]
        jax.config.update("jax_compilation_cache_dir", None)
        assert "JAX_COMPILATION_CACHE_DIR" in doctor.lowered_kernels()[0]
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_the_doctor_exits_with_1_if_a_backend_computes_wrong_numbers(broken_backend, capsys):
    assert main(["doctor"]) == 1
    assert "FAILED: broken, batch: dx is off by" in capsys.readouterr().out


def test_the_doctor_says_why_a_backend_cannot_run(broken_backend, capsys):
    operations = kernels.backends.jnp.BACKEND.operations
    kernels.unregister(broken_backend)
    kernels.register(kernels.Backend(broken_backend, operations, refusal=lambda problem, target: "it needs a chip"))
    assert main(["doctor"]) == 0
    assert "broken does not: backend 'broken' cannot run on cpu: it needs a chip" in " ".join(
        capsys.readouterr().out.split()
    )
    assert broken_backend not in {backend for backend, *_ in doctor.check_backends()}
