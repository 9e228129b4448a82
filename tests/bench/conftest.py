"""Fixtures of the tests of `bn-bench`."""

import signal

import pytest

from bn_fused.bench import deviceless


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
