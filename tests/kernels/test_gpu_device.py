"""The kernels of `pallas_gpu` and `triton` on a real GPU: numbers, bits, large arrays, and what the barrier does.

pytest -n 0 tests/kernels/test_gpu_device.py
pytest -n 0 -m "slow or not slow" tests/kernels/test_gpu_device.py

The first runs each shape in one setting on pallas_gpu and a third of them on triton, the second everything.
"""

import functools
import json
import subprocess
import sys

import pytest

from bn_fused.kernels.backends.triton import limits

from support.child_process import child_environment
from support.kernel_cases import ALL, DEVICE_SETTINGS, DEVICE_SHAPES, Case, on_a_device
from support.pallas_gpu_calls import check
from support.pallas_gpu_plans import DEVICE_PLANS

# The lowest compute capability of each backend.
LEAST = {"pallas_gpu": 9, "triton": 8}


@functools.cache
def no_gpu(backend):
    """None where this machine has a GPU that a backend's kernels run on, else why not."""
    absent = f"no NVIDIA GPU of compute capability {LEAST[backend]} or later"
    if backend == "triton" and limits.missing() is not None:
        return limits.missing()
    try:
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=60)
        capable = [float(line) >= LEAST[backend] for line in asked.stdout.split()]
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return absent
    if asked.returncode or not capable or not capable[0]:
        return absent
    script = "import jax; jax.devices('cuda')"
    environment = child_environment(("JAX_PLATFORMS",))
    asked = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120, env=environment)
    return (
        None if asked.returncode == 0 else "there is a GPU, but JAX was installed without CUDA: pip install jax[cuda13]"
    )


@pytest.fixture(autouse=True)
def gpu(request):
    callspec = getattr(request.node, "callspec", None)
    missing = no_gpu("pallas_gpu" if callspec is None else callspec.params.get("backend", "pallas_gpu"))
    if missing is not None:
        pytest.skip(missing)


def cases(every):
    """All shapes in all settings; those are slow but for one setting of every so many shapes."""
    for index, shape in enumerate(DEVICE_SHAPES):
        for number, setting in enumerate(DEVICE_SETTINGS):
            mark = [] if number == index % len(DEVICE_SETTINGS) and index % every == 0 else [pytest.mark.slow]
            name, case = on_a_device(*shape, setting)
            yield pytest.param(case, marks=mark, id=name)


def taken(case):
    """Whether pallas_gpu takes a shape: where it cannot, because of the number of rows, it says so."""
    import jax.numpy as jnp

    from bn_fused.kernels.backends.pallas_gpu.tiles import fold_of

    return fold_of(case.rows, case.channels, jnp.dtype(case.dtype).itemsize) is not None


@pytest.mark.parametrize("case", list(cases(every=1)))
def test_numbers_agree_with_float64_and_two_runs_give_the_same_bits(case, tmp_path):
    if not taken(case):
        pytest.skip("no view of this array has rows that the copy engine can address")
    check(case, tmp_path, on_gpu=True)


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("case", list(cases(every=3)))
def test_the_numbers_of_triton_agree_with_float64_and_two_runs_give_the_same_bits(case, backend, tmp_path):
    check(case, tmp_path, on_gpu=True, backend=backend)


@pytest.mark.parametrize("name", DEVICE_PLANS)
def test_plans_by_hand_of_every_kind_give_numbers_that_agree_and_the_same_bits_twice(name, tmp_path):
    case, plan = DEVICE_PLANS[name]
    check(case, tmp_path, on_gpu=True, plan=plan)


@pytest.mark.parametrize("backend", LEAST)
@pytest.mark.parametrize("rows", [1568, 28679])
def test_far_from_zero(rows, backend, tmp_path):
    check(Case(rows, 256, centre=1e4, operations=ALL), tmp_path, on_gpu=True, backend=backend)


@pytest.mark.parametrize("backend", LEAST)
def test_nchw_arrays(backend, tmp_path):
    case = Case(1568, 128, layout="rcr", activation="relu", operations=ALL)
    check(case, tmp_path, on_gpu=True, backend=backend)


def on_gpu(script, *arguments, timeout=560):
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=child_environment(("XLA_FLAGS", "JAX_PLATFORMS")),
    )


COMMON = """
import dataclasses, json, sys, threading
import jax, jax.numpy as jnp, numpy as np
import bn_fused
from bn_fused import kernels
blend = kernels.Coefficients(1.0, 0.0, 0.0, 0.1, 0.1, 0.9)

def step(x, backend="pallas_gpu", plan=None):
    one = jnp.ones(x.shape[-1])
    return kernels.fused_batch_norm(x, one, one, one, one, blend, eps=1e-5, backend=backend, plan=plan)

def agree(x, rows=slice(None), plan=None):
    ours = jax.jit(lambda x: step(x, plan=plan))(x)
    theirs = jax.jit(lambda x: step(x, "jnp"))(x)
    for one, other in zip(ours[1:], theirs[1:]):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-4, atol=1e-5)
    one, other = (np.asarray(y[rows].astype(jnp.float32)) for y in (ours[0], theirs[0]))
    np.testing.assert_allclose(one, other, rtol=2**-7, atol=2**-7)
"""

LARGE = """
rows, channels = json.loads(sys.argv[1])
x = jax.random.normal(jax.random.key(0), (rows, channels), jnp.bfloat16)
plan = bn_fused.explain((rows, channels), "bfloat16", backend="pallas_gpu").plan
streaming = dataclasses.replace(plan, forward=None, backward=None)
for each in (plan, streaming):
    agree(x, slice(-1000, None), each)  # behind 2^31 elements
    print(each.kind("forward"))
"""


@pytest.mark.parametrize(("shape", "kind"), [((1 << 23, 512), "partial"), ((49 * 1024, 1 << 16), "partial")])
def test_more_than_2_31_elements(shape, kind):
    process = on_gpu(COMMON + LARGE, json.dumps(shape))
    assert process.returncode == 0, process.stderr[-4000:]
    assert process.stdout.split() == [kind, "streaming"]


SLABS = """
x = jax.random.normal(jax.random.key(0), (25088, 520), jnp.bfloat16) + 3
residual, dy = jnp.roll(x, 1, 0), jnp.roll(x, 2, 0)
one = jnp.linspace(0.5, 2.0, 520)
plan = bn_fused.explain(x.shape, x.dtype, activation="gelu", residual=True, backend="triton").plan
plan = dataclasses.replace(plan, fold=1)  # folded rows have a channel in several slabs

def both(plan):
    def forward(x, residual, weight, bias):
        return kernels.fused_batch_norm(x, weight, bias, one, one, blend, eps=1e-5, activation="gelu",
                                        residual=residual, backend="triton", plan=plan)
    found, pullback = jax.vjp(forward, x, residual, one, one)
    return found, pullback((dy, *map(jnp.ones_like, found[1:])))

whole = jax.tree.leaves(jax.jit(lambda: both(dataclasses.replace(plan, slabs=1)))())
for slabs in (2, 3, 5):  # of 128 columns each: 3 + 2, 2 + 2 + 1, one each
    for one_, other in zip(whole, jax.tree.leaves(jax.jit(lambda: both(dataclasses.replace(plan, slabs=slabs)))())):
        assert np.asarray(one_).tobytes() == np.asarray(other).tobytes(), slabs
print(len(whole), plan.columns)
"""


@pytest.mark.parametrize("backend", ["triton"])
def test_slabs_give_the_same_bits_as_none(backend):
    """The ranges of rows are the same, and what is found of a column does not depend on its neighbours."""
    process = on_gpu(COMMON + SLABS)
    assert process.returncode == 0, process.stderr[-4000:]
    assert process.stdout.strip() == "9 128"


REPEATED = """
x = jax.random.normal(jax.random.key(0), (json.loads(sys.argv[1]), 512), jnp.bfloat16)
print(bn_fused.explain(x.shape, x.dtype, backend="pallas_gpu").plan.kind("forward"))
compiled = jax.jit(step)
first = jax.device_get(compiled(x))
def same(others):
    for others in others:
        for one, other in zip(first, jax.device_get(others)):
            assert one.tobytes() == other.tobytes()
same([compiled(x) for _ in range(200)])
# From several threads, and the launches of two programs in a row.
again, found = jax.jit(lambda x: step(x)), []
threads = [threading.Thread(target=lambda: found.extend([compiled(x), again(x)] * 20)) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(found) == 160
same(found)
# In a loop on the device, and in groups.
def repeat(x): return jax.lax.scan(lambda carry, _: (carry, step(carry)), x, length=5)[1]
repeated = jax.jit(repeat)(x)
same([jax.tree.map(lambda a: a[i], repeated) for i in range(5)])
# Groups are cut in another way, and so rounded in another.
grouped = jax.jit(jax.vmap(step))(jnp.stack([x, x + 1, x]))
for i in (0, 2):
    for one, other in zip(first, jax.device_get(grouped)):
        np.testing.assert_allclose(np.float32(one), np.float32(other[i]), rtol=2**-7, atol=2**-7)
"""


@pytest.mark.parametrize(("rows", "kind"), [(12544, "resident"), (50176, "partial")])
def test_kernels_of_one_launch_in_loops_threads_and_groups_give_the_same_bits(rows, kind):
    process = on_gpu(COMMON + REPEATED, json.dumps(rows))
    assert process.returncode == 0, process.stderr[-4000:]
    assert process.stdout.strip() == kind


UNSOUND = """
from bn_fused.kernels.backends.pallas_gpu import barrier
from bn_fused.kernels.backends.pallas_gpu.one_launch_plan import OneLaunch
barrier.PATIENCE_SECONDS = 3
kernels.registry._BACKENDS["pallas_gpu"] = dataclasses.replace(
    kernels.registry._BACKENDS["pallas_gpu"], plan_refusal=kernels.backends.no_plan_refusal)
# One unit of twice as many blocks as there are multiprocessors, each of which fills its shared memory.
members = 2 * jax.devices("cuda")[0].core_count
x = jnp.ones((members * 4 * 160, 128), jnp.bfloat16)
plan = bn_fused.explain(x.shape, x.dtype, backend="pallas_gpu").plan
forward = OneLaunch(fold=1, columns=128, warpgroups=4, members=members, at_once=1, slabs=1, tiles=1, tile_rows=160,
                    stages=1, cluster=False)
plan = dataclasses.replace(plan, forward=forward, backward=None)
jax.block_until_ready(jax.jit(lambda x: step(x, plan=plan))(x))
print("ended")
"""


def test_blocks_that_are_not_all_on_the_device_end_with_an_error_and_not_in_a_hang():
    process = on_gpu(COMMON + UNSOUND, timeout=200)
    assert process.returncode != 0 and "ended" not in process.stdout
    # The assertion's own text, CUDA's, is not on standard error.
    assert "device-side assert triggered" in process.stderr
