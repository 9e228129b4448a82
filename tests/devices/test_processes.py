"""Several processes on this machine train together as one, and end when one of them dies.

The processes talk over the loopback interface through JAX's own distributed runtime (gloo between CPUs).
"""

import json
import re
import socket
import subprocess
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_fused

from support import ROOT
from support.child_process import child_environment
from support.tolerances import assert_close
from support.versions import also_on_the_newest_jax

DEVICES, STEPS = 4, 4
# Seconds after which a process that says nothing counts as dead, and for which the whole may take at most.
HEARTBEAT, LIMIT = 10, 150
DIED = 17


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train(processes, checkpoint, *, approach="batch", dies_at=None):
    """Start the processes and wait for all; [(exit status, output, errors)] in order."""
    settings = {
        "address": f"127.0.0.1:{free_port()}",
        "processes": processes,
        "approach": approach,
        "steps": STEPS,
        "heartbeat": HEARTBEAT,
        "checkpoint": str(checkpoint),
        "dies_at": dies_at,
    }
    arguments = [
        ["-m", "support.training_worker", json.dumps(settings | {"process": process})] for process in range(processes)
    ]
    return run(arguments, devices=DEVICES // processes)


def run(arguments, devices):
    """Start Python with each of these arguments and wait for all; [(exit status, output, errors)] in order."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    started = [
        subprocess.Popen(
            [sys.executable, *words],
            env=child_environment(JAX_PLATFORMS="cpu", XLA_FLAGS=flags),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for words in arguments
    ]
    end = time.monotonic() + LIMIT
    try:
        ended = [process.communicate(timeout=max(0.1, end - time.monotonic())) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(started, ended, strict=True)]


def result(output):
    """What a process printed at its end, below what the runtime prints."""
    return json.loads(output.splitlines()[-1])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The results of one process with all 4 devices, by approach."""
    results = {}
    for approach in ("batch", "ema"):
        ((status, output, errors),) = train(1, tmp_path_factory.mktemp("alone") / "state.eqx", approach=approach)
        assert status == 0, errors
        results[approach] = result(output)
    return results


@pytest.mark.parametrize(("processes", "approach"), [(2, "ema"), *also_on_the_newest_jax((4, "batch"))])
def test_processes_train_together_as_one(processes, approach, alone, tmp_path):
    ended = train(processes, tmp_path / "state.eqx", approach=approach)
    assert [status for status, *_ in ended] == [0] * processes, [errors[-2000:] for *_, errors in ended]
    results = [result(output) for _, output, _ in ended]
    # All processes hold the same bits; they differ from one process's by the order of the sums in the gradients.
    assert all(one == results[0] for one in results)
    want = alone[approach]
    epsilon = float(np.finfo(np.float32).eps)
    np.testing.assert_allclose(results[0]["losses"], want["losses"], rtol=50 * epsilon)
    for got, wanted in zip(results[0]["state"], want["state"], strict=True):
        np.testing.assert_allclose(got, wanted, rtol=50 * epsilon, atol=50 * epsilon)


# Four train together above; that the others notice the death of one is the same for two.
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_when_a_process_dies_the_others_end_with_an_error_and_the_last_checkpoint_is_whole(processes, tmp_path):
    begin = time.monotonic()
    ended = train(processes, tmp_path / "state.eqx", dies_at=STEPS - 1)
    assert time.monotonic() - begin < LIMIT
    statuses = [status for status, *_ in ended]
    assert statuses[-1] == DIED
    assert all(status not in (0, None, -9) for status in statuses[:-1]), statuses
    # The checkpoint of the step before reads into a layer of this process, which knows nothing of devices.
    like = eqx.nn.make_with_state(bn_fused.BatchNorm)(6, "batch", "batch")[1]
    linear = [eqx.nn.Linear(5, 6, key=jax.random.key(0)), eqx.nn.Linear(6, 1, key=jax.random.key(0))]
    layer = eqx.nn.make_with_state(bn_fused.BatchNorm)(6, "batch", "batch")[0]
    arrays = eqx.filter(((linear[0], layer, linear[1]), like), eqx.is_array)
    restored = eqx.tree_deserialise_leaves(tmp_path / "state.eqx", arrays)
    # In the approach `batch`, zero_frac is momentum to the number of steps.
    momentum = 0.99
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(restored[1])]
    assert any(leaf.shape == () and np.isclose(leaf, momentum ** (STEPS - 1)) for leaf in leaves), leaves


PLAIN_JIT = """
import json, sys, jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import bn_fused

address, process = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, 2, int(process))
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
examples = np.random.default_rng(0).normal(3, 2, (16, 5)).astype(np.float32)
mine = np.split(examples, 2)[jax.process_index()]
x = jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), mine)
stats = jax.device_put(bn_fused.RunningStats.init(5), NamedSharding(mesh, P()))

@jax.jit
@jax.value_and_grad
def loss(x, stats):
    return jnp.sum(bn_fused.batch_norm(x, stats)[0] ** 3)

(value, dx), compiled = loss(x, stats), loss.lower(x, stats).compile().as_text()
parts = {part.index[0].start: np.asarray(part.data).tolist() for part in dx.addressable_shards}
print(json.dumps([float(value), parts, "all-gather" in compiled]))
"""


def test_plain_jit_over_the_devices_of_two_processes_is_one_process_with_the_whole_batch():
    address = f"127.0.0.1:{free_port()}"
    ended = run([["-c", PLAIN_JIT, address, str(process)] for process in range(2)], devices=2)
    assert [status for status, *_ in ended] == [0, 0], [errors[-2000:] for *_, errors in ended]
    x = jnp.asarray(np.random.default_rng(0).normal(3, 2, (16, 5)).astype(np.float32))
    stats = bn_fused.RunningStats.init(5)
    expected, dx = jax.value_and_grad(lambda x: jnp.sum(bn_fused.batch_norm(x, stats)[0] ** 3))(x)
    parts = {}
    for value, by_start, gathered in (result(output) for _, output, _ in ended):
        assert not gathered
        assert_close(np.float32(value), expected, scale=x.size)  # of the terms of the loss
        parts |= {int(start): rows for start, rows in by_start.items()}
    whole = np.concatenate([np.asarray(parts[start], np.float32) for start in sorted(parts)])
    assert_close(whole, dx, scale=1 + np.abs(dx).max())


def test_the_program_of_the_document_gives_every_process_the_same_statistics():
    text = (ROOT / "docs" / "devices.md").read_text()
    (program,) = re.findall(r"```py\n(.*?)```", text, re.DOTALL)
    program = program.replace("localhost:12345", f"127.0.0.1:{free_port()}")
    ended = run([["-c", program, str(process)] for process in range(2)], devices=2)
    assert [status for status, *_ in ended] == [0, 0], [errors[-2000:] for *_, errors in ended]
    means = [float(output.splitlines()[-1]) for _, output, _ in ended]
    x = np.concatenate([np.random.default_rng(process).normal(3, 2, (8, 16)) for process in range(2)])
    assert means[0] == means[1]
    np.testing.assert_allclose(
        means[0], (1 - 0.99) * x.astype(np.float32).mean(0)[0], rtol=50 * np.finfo(np.float32).eps
    )
