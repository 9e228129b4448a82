"""A process that computes operations of `pallas_gpu` in Mosaic GPU's interpreter: `python pallas_gpu_interpreted.py FILE`.

FILE is an .npz with the operands of `forward` and cotangents, and the settings as JSON; the results are written
beside it. The other operations take their statistics from the forward's results.
"""

import json
import os
import sys

# Blocks and warpgroups of the interpreter are threads, which wait for each other: there must be enough of them.
os.environ["PJRT_NPROC"] = "16"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from bn_fused.kernels import contract, pallas_gpu, pallas_gpu_resident
from bn_fused.kernels.pallas_gpu_plan import Plan, Resident
from jax.experimental.pallas import mosaic_gpu as plgpu


class ClusterBarrier(pallas_gpu_resident.CounterBarrier):
    """In place of the counters in global memory, which the interpreter has not: the barrier of a cluster."""

    def scratch(self):
        return [plgpu.ClusterBarrier(collective_axes=("member",))]

    def prepare(self, scratch):
        (self.met,) = scratch

    def signal(self, unit):
        del unit
        plgpu.barrier_arrive(self.met)

    def wait(self, unit):
        del unit
        plgpu.barrier_wait(self.met)


def main(path):
    pallas_gpu_resident.barrier_type = ClusterBarrier
    stored = dict(np.load(path))
    settings = json.loads(str(stored.pop("settings")))
    plan = settings["plan"]
    plan |= {name: Resident(**plan[name]) for name in ("forward", "backward") if plan[name] is not None}
    spec = contract.Spec(settings["layout"], 1e-5, settings["activation"], "pallas_gpu", Plan(**plan))
    operands = {
        name: jnp.asarray(value, settings["dtype"] if name in ("x", "dy", "residual") else jnp.float32)
        for name, value in stored.items()
    }
    forward = [*contract.OPERATIONS["forward"].operands]
    given = {name: operands.get(name) for name in forward if name != "mask"}
    params = plgpu.InterpretGPUParams(detect_races=settings["races"])
    results = {}

    def run(operation, **arguments):
        with plgpu.force_gpu_interpret_mode(params):
            function = jax.jit(lambda values: getattr(pallas_gpu, operation)(**values, spec=spec))
            found = jax.block_until_ready(function({k: v for k, v in arguments.items() if v is not None}))
        if settings["races"]:
            from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

            assert not gpu_callbacks.get_races().races_found, f"{operation} has a race"
        found = found if isinstance(found, (tuple, list)) else (found,)
        names = contract.OPERATIONS[operation].result_kinds([k for k, v in arguments.items() if v is not None])
        for name, value in zip(names, found, strict=True):
            results[f"{operation}.{name}"] = np.asarray(value.astype(jnp.float32))
            results[f"{operation}.{name}.dtype"] = str(value.dtype)
        return found

    _, pivot, delta, var, _, _ = run("forward", **given)
    coefficients = operands["coefficients"]
    new = contract.blend(pivot, delta, var, operands["running_mean"], operands["running_var"], coefficients)
    count = jnp.full(coefficients.shape[:-1], settings["rows"], jnp.float32)
    common = {name: operands.get(name) for name in ("x", "weight", "bias", "residual", "dy", "dmean", "dvar")}
    common |= {
        "pivot": pivot,
        "delta": delta,
        "offset": new.offset,
        "rstd": contract.reciprocal_std(new.norm_var, spec.eps),
        "batch": coefficients[..., 0],
        "count": count,
    }
    for operation in settings["operations"]:
        wanted = contract.OPERATIONS[operation].operands
        run(operation, **{name: common.get(name) for name in wanted if name != "mask"})
    np.savez(path + ".results.npz", **results)


if __name__ == "__main__":
    main(sys.argv[1])
