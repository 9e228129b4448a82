"""Programs whose kernels are kept, lowered for a GPU that is not there. As a process, what has no kernels of its own.

It answers with the bytes of temporary memory of the program that it compiles with the kernel that it reads.
"""

import json
import sys

import jax
import jax.numpy as jnp

import bn_fused
from bn_fused.bench import deviceless
from bn_fused.kernels.backends import pallas_gpu

CHANNELS = 64
X = jax.ShapeDtypeStruct((4096, CHANNELS), jnp.bfloat16)
VALUES = jax.ShapeDtypeStruct((CHANNELS,), jnp.float32)


def forward(x, mean, var, weight, bias, activation="relu"):
    stats = bn_fused.RunningStats.of(mean, var)
    return bn_fused.batch_norm(x, stats, weight, bias, activation=activation, backend="pallas_gpu")


def lowered(function=forward, x=X):
    """A new program of it, of which JAX knows nothing."""
    jax.clear_caches()
    return deviceless.lower_for("h200", lambda *arrays: function(*arrays), x, *(4 * [VALUES]))


def compiled():
    return deviceless.compile_lowered(lowered())


def temporary_bytes(program):
    return program.memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    pallas_gpu.BACKEND.operations.clear()
    json.dump(temporary_bytes(compiled()), sys.stdout)
