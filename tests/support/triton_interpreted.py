"""A process that computes operations of `triton` in Triton's interpreter: `python triton_interpreted.py FOLDER`.

FOLDER holds calls that `kernel_results.save_call` has written, with a `plan`; the results are written beside them. The
interpreter runs kernels on numpy arrays, block by block; it asks for tensors of torch, for which a few methods are
enough.
"""

import os
import pathlib
import sys

# Read when Triton is imported.
os.environ["TRITON_INTERPRET"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from triton.runtime import interpreter

from bn_fused.kernels import contract
from bn_fused.kernels.backends.triton import operations as triton_backend
from bn_fused.kernels.backends.triton.plan import Plan

from support.interpreted_operations import compute_all, read_call

GUARD = 64  # values before and behind each array


class Tensor:
    """An array between guards, as much of a torch tensor as the interpreter asks for. It is worked on in place."""

    def __init__(self, shape, dtype, values=None):
        size = int(np.prod(shape))
        # Where nothing was written there is NaN, or -1, and around it too: bytes of 255.
        self.memory = np.empty(size + 2 * GUARD, jnp.dtype(dtype))
        self.memory.view(np.uint8)[:] = 255
        self.array = self.memory[GUARD : GUARD + size].reshape(shape)
        self.dtype = jnp.dtype(dtype).name
        if values is not None:
            self.array[...] = values

    def data_ptr(self):
        return self.array.ctypes.data

    def guards_hold(self):
        return all((guard.view(np.uint8) == 255).all() for guard in (self.memory[:GUARD], self.memory[-GUARD:]))

    def itself(self, *_, **__):
        return self

    def nothing(self, *_, **__):
        return None

    untyped_storage = cpu = new_empty = itself
    set_ = copy_ = storage_offset = size = stride = nothing


def launch(kernel, name, inputs, outputs, *, grid, warps, architecture, in_place, **constants):
    """`triton_backend.launch` in the interpreter."""
    del warps, architecture
    given = [Tensor(value.shape, value.dtype, np.asarray(value)) for value in inputs]
    results = [Tensor(spec.shape, spec.dtype) for spec in outputs]
    for place, continued in in_place.items():
        results[continued] = given[place]
    kernel[(grid,)](*given, *results, **constants)
    for place, (tensor, value) in enumerate(zip(given, inputs, strict=True)):
        if place not in in_place:
            assert tensor.array.tobytes() == np.asarray(value).tobytes(), f"{name} has changed an operand"
    assert all(tensor.guards_hold() for tensor in (*given, *results)), f"{name} wrote outside"
    return [jnp.asarray(tensor.array) for tensor in results]


def with_integers(patch):
    """The interpreter makes a loop's bounds from arrays of one element, as numpy 2.4 and later do no more."""

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patched


def main(folder):
    triton_backend.launch = launch
    interpreter._patch_lang_tensor = with_integers(interpreter._patch_lang_tensor)
    for path in sorted(pathlib.Path(folder).glob("*.npz")):
        operands, settings = read_call(path)
        spec = contract.Spec(settings["layout"], 1e-5, settings["activation"], "triton", Plan(**settings["plan"]))

        def compute(operation, arguments, spec=spec):
            with jax.disable_jit():
                return getattr(triton_backend, operation)(**arguments, spec=spec)

        with np.errstate(all="ignore"):  # what is not finite is a case
            results = compute_all(compute, spec, operands, settings["rows"], settings["operations"])
        np.savez(path.with_suffix(".results"), **results)


if __name__ == "__main__":
    main(sys.argv[1])
