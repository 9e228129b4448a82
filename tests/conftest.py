"""Settings of every test: CPU, 4 virtual devices, strict promotion; and the summary of which backends ran."""

import os

# Before JAX is imported. A person with an accelerator may name it: JAX_PLATFORMS=cuda pytest ...
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = " ".join(
        [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=4"]
    ).strip()

import collections
import tempfile

import hypothesis
import jax
import pytest

from support.compilers import CompilerMissing

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Many tests run the same small programs as others: what a process compiled it reads again. Each process has a cache of
# its own, for as long as it runs: JAX writes entries while others may read them.
COMPILATION_CACHE = tempfile.TemporaryDirectory(prefix="bn_fused_tests_")
jax.config.update("jax_compilation_cache_dir", COMPILATION_CACHE.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# The same examples in every run, and no data base of them in the working directory.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")

# (backend, platform) to the number of operations it was compiled for. Choosing happens when an operation is
# lowered, so a call that JAX has compiled before is not counted again.
COMPILED = collections.Counter()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tests that share what is made once in a module (a compiled program, a wheel) go to the same worker of xdist."""
    for item in items:
        definitions = item._fixtureinfo.name2fixturedefs
        shared = next((name for name in sorted(definitions) if definitions[name][-1].scope == "module"), None)
        if shared is not None:
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            item.add_marker(pytest.mark.xdist_group(f"{item.path.stem} {parameters.get(shared, shared)}"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A test that is skipped for want of a compiler is marked so, or `-m compilers` would not run it where they are."""
    report = yield
    if call.excinfo is None or not call.excinfo.errisinstance(CompilerMissing):
        return report
    if item.get_closest_marker("compilers") is None:
        report.outcome, report.longrepr = "failed", f"{item.nodeid} needs the marker `compilers`"
    else:  # with the reason alone, as of every other skip
        report.longrepr = (*report.longrepr[:2], f"Skipped: {call.excinfo.value}")
    return report


@pytest.fixture
def unoptimised():
    """JAX compiles without LLVM's optimisations, which take long: for tests that tell nothing about them.

    What is compared in float64 is what JAX and XLA make of a program; numbers in the dtypes that are trained with are
    compared as LLVM optimises them.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def x64(unoptimised):
    """The test runs with JAX's 64-bit types."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def standard_promotion():
    """The test runs with JAX's default promotion of dtypes, without which equinox's layer takes no 16-bit inputs."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def broken_backend():
    """The name of a backend that is jnp but for the gradient of x, which it doubles."""
    from bn_fused import kernels

    operations = kernels.backends.jnp.BACKEND.operations

    def doubled(**operands):
        dx, *others = operations["backward"](**operands)
        return (2 * dx, *others)

    kernels.register(kernels.Backend("broken", operations | {"backward": doubled}))
    yield "broken"
    kernels.unregister("broken")


def count_backends():
    """Count which backends are compiled, and for which platform."""
    from bn_fused.kernels import dispatch
    from bn_fused.kernels.backends import reference

    choose, moments = dispatch.choose, reference.moments

    def counting_choose(problem, target, requested="auto"):
        choice = choose(problem, target, requested)
        COMPILED[choice.name, target.platform] += 1
        return choice

    # The reference backend is differentiated by JAX, never chosen at lowering: its moments stand for it.
    def counting_moments(*arguments):
        COMPILED["reference", jax.default_backend()] += 1
        return moments(*arguments)

    dispatch.choose, reference.moments = counting_choose, counting_moments


def pytest_configure(config):
    count_backends()


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist, which the main process asks
        session.config.workeroutput["compiled"] = [[*key, count] for key, count in COMPILED.items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    for name, platform, count in getattr(node, "workeroutput", {}).get("compiled", ()):
        COMPILED[name, platform] += count


def pytest_terminal_summary(terminalreporter):
    here = jax.default_backend()

    def listed(ran):
        found = (
            f"{name} {count}" if ran else f"{name} for {platform} {count}"
            for (name, platform), count in sorted(COMPILED.items())
            if ran == (platform == here)
        )
        return ", ".join(found) or "none"

    terminalreporter.write_line(
        f"backends that ran on {here} (operations compiled): {listed(True)}; only lowered: {listed(False)}"
    )
