"""A step of the layer as a function of everything it can be differentiated with respect to.

`Program` is one call of the layer with the backend named, so that a test can run the same code with the fused
operation and with `backend="reference"`, whose derivatives and batching are JAX's own. All in float64.
"""

import dataclasses
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import bn_fused

from support.tolerances import assert_close

EXAMPLES, CHANNELS, POSITIONS = 4, 3, 2
WARMUP_PERIOD = 3


class Inputs(NamedTuple):
    """What a step is differentiated with respect to; `residual` may be None."""

    x: jax.Array
    residual: jax.Array | None
    weight: jax.Array
    bias: jax.Array
    mean: jax.Array
    var: jax.Array
    zero_frac: jax.Array


class Outputs(NamedTuple):
    """What a step gives, its int32 counter apart."""

    y: jax.Array
    mean: jax.Array
    var: jax.Array
    zero_frac: jax.Array


IN_AXES = Inputs(0, 0, None, None, None, None, None)
OUT_AXES = Outputs(0, None, None, None)
STATE_MAPPED = Outputs(0, 0, 0, 0)


@dataclasses.dataclass(frozen=True)
class Case:
    """The static options of a layer."""

    approach: str
    activation: str | None = None
    residual: bool = False
    mask: bool = False
    inference: bool = False
    virtual_batch_size: int | None = None


CASES = {
    "batch": Case("batch"),
    "ema-all": Case("ema", "silu", residual=True, mask=True),
    "ema_compatibility-residual": Case("ema_compatibility", residual=True, mask=True),
}
MORE_CASES = {
    "batch-all": Case("batch", "gelu", residual=True, mask=True),
    "batch-leaky_relu": Case("batch", "leaky_relu", residual=True),
    "ema": Case("ema"),
    "ema_compatibility": Case("ema_compatibility"),
    "ema_compatibility-all": Case("ema_compatibility", "relu", residual=True, mask=True),
    "inference": Case("ema", inference=True),
    "inference-all": Case("batch", "silu", residual=True, mask=True, inference=True),
    "virtual": Case("batch", virtual_batch_size=2),
    "virtual-all": Case("ema", "silu", residual=True, mask=True, virtual_batch_size=2),
}


def put_into_state(layer, state, moments, zero_frac, count):
    """The state with these values, whatever devices they are on: `State.set` takes the type of the old value only."""
    leaves, structure = jax.tree.flatten(state)
    places = jax.tree.unflatten(structure, range(len(leaves)))
    for place, value in zip(places.get(layer.state_index), moments, strict=True):
        leaves[place] = value
    leaves[places.get(layer.zero_frac_index)] = zero_frac
    leaves[places.get(layer.count_index)] = count
    return jax.tree.unflatten(structure, leaves)


@dataclasses.dataclass(frozen=True)
class Program:
    """A layer's step as a function of `Inputs`; the mask [examples, positions] (or None) and the counter are given."""

    case: Case
    backend: str
    mask: jax.Array | None
    count: jax.Array
    axis_name: object = "batch"

    def step(self, inputs, mask):
        """One example, under the vmap that names its axis; returns `Outputs` and the counter."""
        case = self.case
        layer, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(
            CHANNELS,
            self.axis_name,
            case.approach,
            momentum=0.9,
            warmup_period=WARMUP_PERIOD,
            inference=case.inference,
            activation=case.activation,
            virtual_batch_size=case.virtual_batch_size,
            backend=self.backend,
        )
        layer = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, (inputs.weight, inputs.bias))
        # The counter's type on devices (mesh, varying axes) is that of the other state.
        count = self.count + jnp.zeros_like(inputs.zero_frac, dtype=jnp.int32)
        state = put_into_state(layer, state, (inputs.mean, inputs.var), inputs.zero_frac, count)
        y, state = layer(inputs.x, state, residual=inputs.residual, mask=mask)
        outputs = Outputs(y, *state.get(layer.state_index), state.get(layer.zero_frac_index))
        return outputs, state.get(layer.count_index)

    def example(self, inputs, mask):
        """One example, without the counter."""
        return self.step(inputs, mask)[0]

    def batch(self, inputs, wrap=lambda function: function, in_axes=IN_AXES, out_axes=OUT_AXES, size=None):
        """The whole batch of `size` examples: `wrap(example)` under the named vmap."""
        mapped = jax.vmap(
            wrap(self.example),
            in_axes=(in_axes, 0),
            out_axes=out_axes,
            axis_name=self.axis_name,
            axis_size=size,
        )
        return mapped(inputs, self.mask)

    def counted_batch(self, inputs):
        """The whole batch; returns `Outputs` and the program of the next step."""
        mapped = jax.vmap(self.step, axis_name=self.axis_name, in_axes=(IN_AXES, 0), out_axes=(OUT_AXES, None))
        outputs, count = mapped(inputs, self.mask)
        return outputs, dataclasses.replace(self, count=count)


class Function(Program):
    """The same for the functional form, which takes the whole batch."""

    def counted_batch(self, inputs, axis_name=None):
        case = self.case
        stats = bn_fused.RunningStats(inputs.mean, inputs.var, inputs.zero_frac, self.count)
        y, stats = bn_fused.batch_norm(
            inputs.x,
            stats,
            inputs.weight,
            inputs.bias,
            approach=case.approach,
            momentum=0.9,
            warmup_period=WARMUP_PERIOD,
            channel_axis=1,
            axis_name=axis_name,
            activation=case.activation,
            residual=inputs.residual,
            mask=self.mask,
            virtual_batch_size=case.virtual_batch_size,
            inference=case.inference,
            backend=self.backend,
        )
        return Outputs(y, stats.mean, stats.var, stats.zero_frac), dataclasses.replace(self, count=stats.count)

    def batch(self, inputs):
        return self.counted_batch(inputs)[0]


# --- data ------------------------------------------------------------------------------------------------------


def inputs_and_count(case, later, shape=(EXAMPLES,)):
    """The inputs of a layer's first step, or of a later one with running statistics from elsewhere."""
    rng = np.random.default_rng(later)
    shape = (*shape, CHANNELS, POSITIONS)
    inputs = Inputs(
        x=2 * rng.standard_normal(shape) + 1,
        residual=rng.standard_normal(shape) if case.residual else None,
        weight=1 + 0.3 * rng.standard_normal(CHANNELS),
        bias=rng.standard_normal(CHANNELS),
        mean=rng.standard_normal(CHANNELS) if later else np.zeros(CHANNELS),
        var=1 + rng.random(CHANNELS) if later else np.zeros(CHANNELS),
        zero_frac=np.asarray(0.3 if later else 1.0),
    )
    return jax.tree.map(jnp.asarray, inputs), jnp.asarray(1 if later else 0, jnp.int32)


def mask_of(case):
    """One example counts whole, one in part, one not at all."""
    mask = [[True, True], [False, True], [False, False], [True, True]]
    return jnp.asarray(mask) if case.mask else None


def scalar(outputs):
    """A number to which every value contributes, none of them linearly and no two alike."""

    def total(values):
        return jnp.sum(
            jnp.reshape(jnp.cos(jnp.arange(values.size, dtype=values.dtype)), values.shape) * values + values**2
        )

    return sum(total(values) for values in jax.tree.leaves(outputs))


def another(inputs, seed=7):
    """Inputs of the same shapes that point elsewhere: a tangent."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda value: jnp.asarray(rng.standard_normal(value.shape)), inputs)


def stacked(inputs, *others):
    """Several inputs along a new leading axis."""
    return jax.tree.map(lambda *values: jnp.stack(values), inputs, *others)


def varied(inputs, scale):
    """Inputs of the same kind with other values; the variance stays positive, zero_frac what it is."""
    changed = jax.tree.map(lambda value: value * scale + 0.1, inputs)
    return changed._replace(var=inputs.var * scale, zero_frac=inputs.zero_frac)


def with_state(inputs, outputs):
    """The inputs of the step after the one that gave these outputs."""
    return inputs._replace(mean=outputs.mean, var=outputs.var, zero_frac=outputs.zero_frac)


# --- the comparison --------------------------------------------------------------------------------------------


def assert_trees_close(actual, expected, n=EXAMPLES * POSITIONS):
    """Every leaf agrees to c * eps * sqrt(n) of the largest number among all, n the values of a channel.

    Both sides compute the same sums of up to n terms in float64, in another order. The sizes of the terms are not those
    of the results, which may cancel (a gradient of x sums to zero): the largest of all results stands for them.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    leaves = jax.tree.leaves(expected)
    assert leaves
    scale = max(1.0, *(float(jnp.max(jnp.abs(leaf))) for leaf in leaves)) * np.sqrt(n)
    for (path, got), want in zip(jax.tree_util.tree_leaves_with_path(actual), leaves, strict=True):
        assert got.dtype == want.dtype == jnp.float64, jax.tree_util.keystr(path)
        assert_close(got, want, scale, dtype=np.float64, what=jax.tree_util.keystr(path))
