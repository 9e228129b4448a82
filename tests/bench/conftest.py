"""Fixtures of the tests of `bn-bench`."""

import signal

import pytest

from bn_fused.bench import deviceless


@pytest.fixture
def no_compiler_needed(monkeypatch):
    """The compilers for all targets count as installed; a test that asks for it starts none."""
    monkeypatch.setattr(deviceless, "missing", lambda target: None)


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt even where pytest was started with it ignored, as a script starts a job with &."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
