"""Fixtures of the tests of `bn-bench`."""

import signal

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from bn_fused.bench import deviceless


@pytest.fixture(scope="session")
def compiled_programs(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(autouse=True)
def compiled_once(compiled_programs):
    """What a command has compiled is kept for the next: most of them run the same few layers and networks.

    JAX finds it by the whole program and its options. The other tests hardly ever compile a program twice.
    """
    settings = {
        "jax_compilation_cache_dir": str(compiled_programs),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}

    def use(settings):
        for name, value in settings.items():
            jax.config.update(name, value)
        reset_cache()  # which is made anew, with these settings, when something is compiled

    use(settings)
    yield
    use(before)


@pytest.fixture
def narrow_terminal(monkeypatch):
    """The terminal is narrow, to see that nothing is cut off."""
    monkeypatch.setenv("COLUMNS", "60")


@pytest.fixture
def no_compiler_needed(monkeypatch):
    """The compilers for all targets count as installed; a test that asks for it starts none."""
    monkeypatch.setattr(deviceless, "missing", lambda target: None)


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt even where it was ignored when pytest started, as in a script's job with &."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
