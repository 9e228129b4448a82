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
from bn_fused.kernels import contract, pallas_gpu
from bn_fused.kernels.pallas_gpu_plan import Plan
from interpreted_operations import compute_all
from jax.experimental.pallas import mosaic_gpu as plgpu


def main(path):
    stored = dict(np.load(path))
    settings = json.loads(str(stored.pop("settings")))
    spec = contract.Spec(settings["layout"], 1e-5, settings["activation"], "pallas_gpu", Plan(**settings["plan"]))
    operands = {
        name: jnp.asarray(value, settings["dtype"] if name in ("x", "dy", "residual") else jnp.float32)
        for name, value in stored.items()
    }
    params = plgpu.InterpretGPUParams(detect_races=settings["races"])

    def compute(operation, arguments):
        with plgpu.force_gpu_interpret_mode(params):
            function = jax.jit(lambda values: getattr(pallas_gpu, operation)(**values, spec=spec))
            found = jax.block_until_ready(function(arguments))
        if settings["races"]:
            from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

            assert not gpu_callbacks.get_races().races_found, f"{operation} has a race"
        return found

    results = compute_all(compute, spec, operands, settings["rows"], settings["operations"])
    np.savez(path + ".results.npz", **results)


if __name__ == "__main__":
    main(sys.argv[1])
