"""What is kept of lowered kernels: it is read in place of lowering, and nothing else is read."""

import contextlib
import re

import jax
import jax.numpy as jnp
import pytest

from bn_fused.kernels import kept
from bn_fused.kernels.backends import pallas_gpu

from support.child_process import answer
from support.compilers import skip_without_compilers
from support.kept_kernels import CHANNELS, compiled, forward, lowered, temporary_bytes
from support.versions import on_the_newest_jax

pytestmark = pytest.mark.compilers


@pytest.fixture(autouse=True)
def folder(tmp_path):
    """JAX keeps programs in a folder of the test, and the process remembers no kernels."""
    skip_without_compilers("h200")
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    kept._LOWERED.clear()
    yield tmp_path / "bn_fused"
    kept._LOWERED.clear()
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def not_lowered(monkeypatch):
    """A context in which the kernels cannot be lowered."""

    def fails(**_):
        raise AssertionError("lowered again")

    @contextlib.contextmanager
    def context():
        with monkeypatch.context() as patch:
            patch.setitem(pallas_gpu.BACKEND.operations, "forward", fails)
            yield

    return context


def test_what_was_lowered_is_read_by_another_program_and_another_process(folder, not_lowered):
    first = lowered().as_text()
    assert len(list(folder.iterdir())) == 1
    with not_lowered():
        assert lowered().as_text() == first
        kept._LOWERED.clear()  # as in another process
        assert lowered().as_text() == first


@on_the_newest_jax
def test_another_process_compiles_what_it_reads(folder):
    here = compiled()
    there = answer(["-m", "support.kept_kernels"], None, {"JAX_COMPILATION_CACHE_DIR": str(folder.parent)})
    assert there == temporary_bytes(here)
    assert len(list(folder.iterdir())) == 1


@on_the_newest_jax
def test_the_compiled_program_is_the_one_that_is_made_without_keeping(folder):
    def facts():
        program = compiled()
        # Where the code stands in files, and by what names it was traced.
        text = re.sub(r', metadata=\{[^}]*\}|"[^"]*"|%[\w.-]+', "", program.as_text().split("FileNames")[0])
        return text, temporary_bytes(program)

    lowered()
    kept._LOWERED.clear()
    from_the_folder = facts()
    jax.config.update("jax_compilation_cache_dir", None)
    assert from_the_folder == facts()


def test_it_belongs_to_the_operation_its_types_and_the_kernels(folder, monkeypatch):
    lowered()
    lowered(lambda *arrays: forward(*arrays, activation="leaky_relu"))
    lowered(x=jax.ShapeDtypeStruct((8192, CHANNELS), jnp.bfloat16))
    monkeypatch.setattr(kept, "_made_by", lambda: "other kernels")
    lowered()
    assert len(list(folder.iterdir())) == 4


def test_a_damaged_file_is_named_and_made_again(folder, not_lowered):
    lowered()
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    for damaged in (b"", b"nothing", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        kept._LOWERED.clear()
        with pytest.warns(UserWarning, match=re.escape(str(path))):
            lowered()
        kept._LOWERED.clear()
        with not_lowered():
            lowered()


def test_nothing_is_kept_where_jax_keeps_nothing(folder):
    for place in (None, "gs://bucket/programs"):
        jax.config.update("jax_compilation_cache_dir", place)
        lowered()
        assert kept.folder() is None and not kept._LOWERED
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_is_named(folder):
    folder.write_text("in the way")
    with pytest.warns(UserWarning, match="is not kept"):
        lowered()
