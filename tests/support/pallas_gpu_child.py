"""A process that computes operations of `pallas_gpu`, in Mosaic GPU's interpreter or on a GPU: `python ... FILE...`.

Each FILE is a call that `kernel_results.save_call` has written; the results are written beside it. The other operations
take their statistics from the forward's results. Settings besides the case's own:

- `plan`: the fields of a plan, or None for the backend's own; `races`: whether to look for them in the interpreter.
- `on_gpu`: on the GPU of this machine, twice, and the bits must be the same; `backend`: there, another one.
- `waits`: False for kernels of one launch whose blocks do not wait for each other.
"""

import os
import sys

# Blocks and warpgroups of the interpreter are threads, which wait for each other: there must be enough of them.
os.environ.setdefault("PJRT_NPROC", "16")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from bn_fused.kernels import contract
from bn_fused.kernels.backends.pallas_gpu import barrier, operations as pallas_gpu
from bn_fused.kernels.backends.pallas_gpu.one_launch_plan import OneLaunch
from bn_fused.kernels.backends.pallas_gpu.plan import Plan
from bn_fused.kernels.dispatch import run as dispatched

from support.interpreted_operations import compute_all, read_call


class ClusterBarrier(barrier.CounterBarrier):
    """In place of the counters in global memory, which the interpreter has not: the barrier of a cluster."""

    waits = True

    def scratch(self):
        return [plgpu.ClusterBarrier(collective_axes=("member",))]

    def prepare(self, scratch):
        (self.met,) = scratch

    def signal(self, unit):
        del unit
        if self.waits:
            plgpu.barrier_arrive(self.met)

    def wait(self, unit):
        del unit
        if self.waits:
            plgpu.barrier_wait(self.met)


def plan_of(fields):
    if fields is None:
        return None
    in_one_launch = {name: OneLaunch(**fields[name]) for name in ("forward", "backward") if fields[name] is not None}
    return Plan(**fields | in_one_launch)


def interpreted(operation, spec, arguments, races):
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=races)):
        # Half of the time here is LLVM's, which has nothing to do with what a kernel computes.
        function = jax.jit(
            lambda values: getattr(pallas_gpu, operation)(**values, spec=spec),
            compiler_options={"xla_backend_optimization_level": 0},
        )
        found = jax.block_until_ready(function(arguments))
    if races:
        from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

        assert not gpu_callbacks.get_races().races_found, f"{operation} has a race"
    return found


def on_gpu(operation, spec, arguments):
    (device,) = jax.devices("cuda")[:1]
    arguments = jax.device_put(arguments, device)
    function = jax.jit(lambda values: dispatched(operation, spec, **values))
    first, second = (jax.device_get(function(arguments)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one.tobytes() == other.tobytes(), f"{operation} gives other bits in a second run"
    return [jnp.asarray(value) for value in first]


def main(path):
    operands, settings = read_call(path)
    barrier.barrier_type = barrier.CounterBarrier if settings.get("on_gpu") else ClusterBarrier
    ClusterBarrier.waits = settings.get("waits", True)
    backend = settings.get("backend", "pallas_gpu")
    spec = contract.Spec(settings["layout"], 1e-5, settings["activation"], backend, plan_of(settings["plan"]))

    def compute(operation, arguments):
        if settings.get("on_gpu"):
            return on_gpu(operation, spec, arguments)
        return interpreted(operation, spec, arguments, settings["races"])

    results = compute_all(compute, spec, operands, settings["rows"], settings["operations"])
    np.savez(path + ".results.npz", **results)


if __name__ == "__main__":
    for path in sys.argv[1:]:
        main(path)
