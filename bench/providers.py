"""The layers that are checked and timed on the same work: ours with each backend, and its rivals.

A provider makes, for a workload, a pure function `apply(parameters, state, x, residual) -> (y, state)`: a training
step, with x in the workload's layout, `parameters` the pair (weight, bias) and `state` a pytree of arrays; and the
first state.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

import bn_fused
from bn_fused import kernels
from bn_fused.bench.installing import pip_install
from bn_fused.bench.workloads import Arranged, Workload
from bn_fused.kernels.activations import ACTIVATIONS
from bn_fused.kernels.registry import is_reference

EXAMPLES, DEVICES = "batch", "devices"


@dataclasses.dataclass(frozen=True)
class Provider:
    """A layer to run.

    - `name`: for the tables; for ours the backend's.
    - `make(workload, approach, names)`: `apply` and the first state (see the module); `names` are the device axes over
        which it averages.
    - `ours`: whether it is `bn_fused`, which is held to a tighter limit and offers every approach.
    - `module`: the package it needs, if it is not always there.
    """

    name: str
    make: Callable[[Workload, str, tuple[str, ...]], tuple[Callable, Any]]
    ours: bool = False
    module: str | None = None

    @property
    def missing(self) -> str | None:
        """None where it can run, else one sentence that says what to install."""
        if self.module is None or importlib.util.find_spec(self.module) is not None:
            return None
        return f"{self.module} is not installed: {pip_install(self.module)}"


def timed_backends() -> list[str]:
    """The names of the registered backends but the reference, which is slow and plain: it is checked against."""
    return [name for name in kernels.backend_names() if not is_reference(name)]


def explain(workload: Arranged, backend: str = "auto", target: str | None = None) -> kernels.BackendChoice:
    """`bn_fused.explain` of a workload, or of a setting of the audit; `target` None is JAX's default device."""
    return bn_fused.explain(
        workload.array_shape,
        workload.dtype,
        channel_axis=workload.channel_axis,
        activation=workload.activation,
        residual=workload.residual,
        target=target,
        backend=backend,
    )


def pull_back(apply: Callable, parameters, state, x, residual):
    """A step of a provider's `apply`: y, the function of dy that gives its gradient, and the new state.

    The gradient is with respect to parameters, x and residual.
    """

    def with_state(parameters, x, residual):
        return apply(parameters, state, x, residual)

    return jax.vjp(with_state, parameters, x, residual, has_aux=True)


def forward_backward(apply: Callable, parameters, state, x, residual, dy):
    """A step of a provider's `apply` and its gradient: y, the new state, and the gradients as of `pull_back`."""
    y, pullback, new_state = pull_back(apply, parameters, state, x, residual)
    # In training dy follows from y: without that, XLA computes parts of both in one kernel.
    y, dy = jax.lax.optimization_barrier((y, dy))
    return y, new_state, pullback(dy)


def bn_fused_layer(backend: str) -> Provider:
    """`bn_fused` with the given backend: the layer for channels first, the function for channels last."""

    def make(workload, approach, names):
        options = dict(approach=approach, activation=workload.activation, backend=backend)

        def function(parameters, stats, x, residual):
            return bn_fused.batch_norm(
                x, stats, *parameters, axis_name=names or None, residual=residual, channel_axis=-1, **options
            )

        if workload.layout == "nhwc":
            return function, bn_fused.RunningStats.init(workload.channels)
        axis_name = (EXAMPLES, *names)
        layer, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(workload.channels, axis_name, **options)
        state, rest = eqx.partition(state, eqx.is_array)

        def under_vmap(parameters, state, x, residual):
            moved, state = _with_parameters(layer, parameters), eqx.combine(state, rest)
            y, new = jax.vmap(
                lambda x, residual: moved(x, state, residual=residual), axis_name=EXAMPLES, out_axes=(0, None)
            )(x, residual)
            return y, eqx.filter(new, eqx.is_array)

        return under_vmap, state

    return Provider(backend, make, ours=True)


def _with_parameters(layer, parameters):
    return eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, parameters)


def _finish(y, residual, activation):
    """What follows another library's BatchNorm: add the residual, apply the activation."""
    if residual is not None:
        y = y + residual.astype(y.dtype)
    return y if activation is None else ACTIVATIONS[activation].definition(y)


def _equinox(workload, approach, names):
    # It has no warm-up: its nearest to `ema` is the batch's statistics.
    mode = "ema" if approach == "ema_compatibility" else "batch"
    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(workload.channels, (EXAMPLES, *names), mode=mode)
    state, rest = eqx.partition(state, eqx.is_array)
    last = workload.layout == "nhwc"

    def apply(parameters, state, x, residual):
        moved, state = _with_parameters(layer, parameters), eqx.combine(state, rest)
        # It takes channels first: who has them last moves them there and back.
        y, new = jax.vmap(moved, axis_name=EXAMPLES, in_axes=(0, None), out_axes=(0, None))(
            jnp.moveaxis(x, -1, 1) if last else x, state
        )
        y = jnp.moveaxis(y, 1, -1) if last else y
        return _finish(y, residual, workload.activation), eqx.filter(new, eqx.is_array)

    return apply, state


def _flax(workload, approach, names, fast=True):
    import flax.linen

    del approach  # it has one way to train: with the batch's statistics
    layer = flax.linen.BatchNorm(
        use_running_average=False,
        axis=workload.channel_axis,
        momentum=0.99,
        epsilon=1e-5,
        dtype=workload.dtype,
        axis_name=names or None,
        use_fast_variance=fast,
    )
    stats = {"mean": jnp.zeros(workload.channels), "var": jnp.ones(workload.channels)}

    def apply(parameters, stats, x, residual):
        scale, bias = parameters
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
        y, new = layer.apply(variables, x, mutable=["batch_stats"])
        return _finish(y, residual, workload.activation), new["batch_stats"]

    return apply, stats


def nnx_batch_norm(x, mean, var, scale, bias, *, axis, dtype, axis_name=None):
    """A training step of `flax.nnx.BatchNorm` as a function of arrays: y, and the new running mean and variance."""
    from flax import nnx

    layer = nnx.BatchNorm(
        x.shape[axis],
        use_running_average=False,
        axis=axis,
        momentum=0.99,
        epsilon=1e-5,
        dtype=dtype,
        axis_name=axis_name,
        rngs=nnx.Rngs(0),
    )
    layer.mean[...], layer.var[...], layer.scale[...], layer.bias[...] = mean, var, scale, bias
    return layer(x), layer.mean[...], layer.var[...]


def _nnx(workload, approach, names):
    del approach

    def apply(parameters, stats, x, residual):
        y, *stats = nnx_batch_norm(
            x, *stats, *parameters, axis=workload.channel_axis, dtype=workload.dtype, axis_name=names or None
        )
        return _finish(y, residual, workload.activation), stats

    return apply, [jnp.zeros(workload.channels), jnp.ones(workload.channels)]


def _no_norm(workload, approach, names):
    del approach, names
    return lambda parameters, state, x, residual: (_finish(x, residual, workload.activation), state), ()


def _torch(workload, approach, names):
    raise NotImplementedError("torch's functions are not JAX's: see `bench.run.torch_case`")


EQUINOX = Provider("equinox", _equinox)
EQUINOX_EMA = Provider("equinox ema", lambda workload, approach, names: _equinox(workload, "ema_compatibility", names))
FLAX = Provider("flax", _flax, module="flax")
FLAX_TWO_PASS = Provider("flax two-pass", functools.partial(_flax, fast=False), module="flax")
# What a network costs without a BatchNorm.
NO_NORM = Provider("no norm", _no_norm)
NNX = Provider("nnx", _nnx, module="flax")
TORCH = Provider("torch", _torch, module="torch")
JNP = bn_fused_layer("jnp")

# What `--against` takes. `jnp` is our own form in plain jnp, which XLA compiles: the least that a kernel must beat.
RIVALS = {provider.name: provider for provider in (EQUINOX, FLAX, NNX, TORCH, JNP)}
