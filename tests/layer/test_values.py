"""Values, running state and every gradient of the layer and the function against the float64 oracle."""

import dataclasses
import functools

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_fused
from bn_fused.approaches import APPROACHES
from bn_fused.kernels import activations

from support import oracle
from support.tolerances import assert_close, computed_in
from support.versions import on_the_newest_jax

ACTIVATIONS = (None, *activations.ACTIVATIONS)
BACKENDS = ("auto", "jnp", "reference")
# Shape of the whole batch (axis 0 the examples) and its channel axis. Few, so that little is compiled; with
# sizes that no vector width divides, one channel, one position per example, one example.
LAYOUTS = {
    "rows": ((12, 5), 1),
    "nchw": ((6, 5, 3, 4), 1),
    "nhwc": ((6, 3, 4, 5), -1),
    "one spatial axis": ((7, 3, 9), 1),
    "channels between spatial axes": ((4, 3, 5, 2), 2),
    "one channel": ((9, 1, 5), 1),
    "one example": ((1, 4, 3, 3), 1),
}
CHANNEL_FIRST = tuple(name for name, (_, axis) in LAYOUTS.items() if axis == 1)


@dataclasses.dataclass(frozen=True)
class Case:
    """Everything that is static about one compiled step and its gradient."""

    route: str = "function"  # or "layer": vmapped with an axis name
    approach: str = "batch"
    dtype: str = "float32"
    layout: str = "nchw"
    affine: bool = True
    activation: str | None = None
    residual: bool = False
    mask: bool = False
    inference: bool = False
    debias: str = "samples"
    warmup_period: int = 1
    momentum: float = 0.9
    backend: str = "auto"

    @property
    def shape(self):
        return LAYOUTS[self.layout][0]

    @property
    def channel_axis(self):
        return LAYOUTS[self.layout][1]

    @property
    def channels(self):
        return self.shape[self.channel_axis]

    @property
    def positions(self):
        """x's shape without the channel axis."""
        return tuple(np.delete(self.shape, self.channel_axis).tolist())

    @property
    def settings(self):
        return {
            "approach": self.approach,
            "momentum": self.momentum,
            "warmup_period": self.warmup_period,
            "debias": self.debias,
            "activation": self.activation,
            "inference": self.inference,
            "backend": self.backend,
        }

    @property
    def definition(self):
        settings = {name: value for name, value in self.settings.items() if name != "backend"}
        precision = computed_in(self.dtype).type
        # For float64 the oracle has no more digits than what it checks, and computes by the definition itself.
        written_out = self.backend == "reference" or self.dtype == "float64"
        return oracle.Definition(
            **settings, channel_axis=self.channel_axis, precision=precision, written_out=written_out
        )


def function_step(case, inputs):
    """y and the new (mean, var, zero_frac, count) of `batch_norm`."""
    stats = bn_fused.RunningStats(**inputs["stats"], count=inputs["count"])
    y, stats = bn_fused.batch_norm(
        inputs["x"],
        stats,
        inputs.get("weight"),
        inputs.get("bias"),
        residual=inputs.get("residual"),
        mask=inputs.get("mask"),
        channel_axis=case.channel_axis,
        **case.settings,
    )
    return y, dict(mean=stats.mean, var=stats.var, zero_frac=stats.zero_frac), stats.count


def layer_step(case, inputs):
    """The same through the layer under `jax.vmap` with an axis name."""
    layer, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(
        case.channels, "batch", channelwise_affine=case.affine, **case.settings
    )
    if case.affine:
        layer = eqx.tree_at(lambda tree: (tree.weight, tree.bias), layer, (inputs["weight"], inputs["bias"]))
    stats = inputs["stats"]
    state = state.set(layer.state_index, (stats["mean"], stats["var"]))
    state = state.set(layer.zero_frac_index, stats["zero_frac"])
    state = state.set(layer.count_index, inputs["count"])

    def one(x, residual, mask):
        return layer(x, state, residual=residual, mask=mask)

    y, state = jax.vmap(one, axis_name="batch", out_axes=(0, None))(
        inputs["x"], inputs.get("residual"), inputs.get("mask")
    )
    mean, var = state.get(layer.state_index)
    return (
        y,
        dict(mean=mean, var=var, zero_frac=state.get(layer.zero_frac_index)),
        state.get(layer.count_index),
    )


@functools.cache
def compiled(case):
    """One jitted function for the step's values and the gradients of everything that has one."""
    step = {"function": function_step, "layer": layer_step}[case.route]

    @jax.jit
    def values_and_gradients(inputs, cotangents):
        fixed = {name: inputs[name] for name in ("count", "mask") if name in inputs}
        varying = {name: value for name, value in inputs.items() if name not in fixed}

        def of(varying):
            y, stats, count = step(case, {**varying, **fixed})
            return (y, stats), count

        (y, stats), pullback, count = jax.vjp(of, varying, has_aux=True)
        return y, stats, count, pullback(cotangents)[0]

    return values_and_gradients


def rounded(random, shape, dtype, spread=1.0, centre=0.0):
    return jnp.asarray(centre + spread * random.standard_normal(shape), dtype)


def make_inputs(case, seed, first, offset=3.0, spread=2.0):
    """Arrays of one call, every channel with its own mean and spread. `first`: with the initial state."""
    random, state_dtype = np.random.default_rng(seed), computed_in(case.dtype)
    channel_shape = [1] * len(case.shape)
    channel_shape[case.channel_axis] = case.channels
    centre = (offset * random.standard_normal(case.channels)).reshape(channel_shape)
    width = (spread * random.uniform(0.5, 2, case.channels)).reshape(channel_shape)
    stats = (np.zeros(case.channels), np.zeros(case.channels), 1.0)
    if not first:
        zero_frac = 0.0 if case.approach == "ema_compatibility" else case.momentum**3
        trained = 1 - zero_frac
        stats = (
            trained * (centre.ravel() + 0.3 * random.standard_normal(case.channels)),
            trained * (width.ravel() ** 2) * random.uniform(0.5, 2, case.channels),
            zero_frac,
        )
    inputs = {
        "x": rounded(random, case.shape, case.dtype, width, centre),
        "stats": {
            name: jnp.asarray(value, state_dtype)
            for name, value in zip(("mean", "var", "zero_frac"), stats, strict=True)
        },
        "count": jnp.asarray(0 if first else min(3, case.warmup_period), jnp.int32),
    }
    if case.affine:
        inputs["weight"] = rounded(random, case.channels, state_dtype, 0.5, 1.0)
        inputs["bias"] = rounded(random, case.channels, state_dtype)
    if case.residual:
        inputs["residual"] = rounded(random, case.shape, case.dtype)
    if case.mask:
        mask = random.uniform(size=case.positions) < 0.7
        mask.flat[0] = True
        inputs["mask"] = jnp.asarray(mask)
    return inputs, random


def check(case, seed, first, offset=3.0, spread=2.0):
    """Run the case and compare all that comes out with the oracle."""
    inputs, random = make_inputs(case, seed, first, offset, spread)
    state = oracle.State(**inputs["stats"], count=inputs["count"])
    optional = {name: inputs.get(name) for name in ("weight", "bias", "residual", "mask")}
    expected = oracle.batch_norm(case.definition, inputs["x"], state, **optional)

    dy = random.standard_normal(case.shape)
    if case.activation in oracle.KINKED:
        # Next to the kink the slope depends on the last bit of its argument: no promise is made there.
        dy = np.where(abs(expected.pre) < 1e-3 * expected.y_scale, 0, dy)
    dy = jnp.asarray(dy, case.dtype)
    state_dtype = computed_in(case.dtype)
    dstats = {
        "mean": rounded(random, case.channels, state_dtype),
        "var": rounded(random, case.channels, state_dtype),
        "zero_frac": rounded(random, (), state_dtype),
    }
    y, stats, count, gradients = compiled(case)(inputs, (dy, dstats))

    close = functools.partial(assert_close, dtype=state_dtype)
    assert y.dtype == inputs["x"].dtype
    close(y, expected.y, expected.y_scale, what="y")
    assert count.dtype == jnp.int32 and count == expected.state.count
    for name in ("mean", "var", "zero_frac"):
        assert stats[name].dtype == state_dtype
        scale = getattr(expected.state_scale, name)
        close(stats[name], getattr(expected.state, name), scale, what=f"running {name}")

    wanted, scales = expected.backward(dy, **{f"d{name}": value for name, value in dstats.items()})
    gradients = {**gradients, **gradients["stats"]}
    for name in ("x", "weight", "bias", "residual", "mean", "var", "zero_frac"):
        if name in gradients:
            value, scale = getattr(wanted, name), getattr(scales, name)
            close(gradients[name], value, scale, what=f"gradient of {name}")


def check_in_its_precision(case, *arguments, **options):
    with jax.enable_x64(case.dtype == "float64"):
        if case.definition.debias == "axis" and case.shape[0] == 1 and case.approach == "batch":
            with pytest.warns(UserWarning, match="debias"):
                compiled.cache_clear()
                check(case, *arguments, **options)
        else:
            check(case, *arguments, **options)


# A fixed part that every run has: each approach, route and dtype, with the other options cycling through.
FIXED = [
    Case(
        route=route,
        approach=approach,
        dtype=dtype,
        layout=("nchw", "rows", "one spatial axis", "nhwc")[(i + j) % (3 if route == "layer" else 4)],
        affine=(i + j + k) % 3 != 0,
        activation=ACTIVATIONS[(i + 2 * j + 3 * k) % len(ACTIVATIONS)],
        residual=(i + j) % 2 == 0,
        mask=(j + k) % 3 == 0,
        debias=("axis", "samples", "none")[(j + k) % 3],
        warmup_period=(1, 10)[(i + k) % 2],
    )
    for i, approach in enumerate(APPROACHES)
    for j, dtype in enumerate(("float32", "bfloat16", "float16", "float64"))
    for k, route in enumerate(("function", "layer"))
]


def describe(case):
    changed = (field for field in dataclasses.fields(case) if getattr(case, field.name) != field.default)
    return ",".join(f"{field.name}={getattr(case, field.name)}" for field in changed) or "default"


@pytest.mark.parametrize("case", FIXED, ids=describe)
def test_values_state_and_gradients_agree_with_the_oracle(case):
    check_in_its_precision(case, seed=0, first=True)
    check_in_its_precision(case, seed=1, first=False)


@pytest.mark.parametrize("approach", APPROACHES)
@pytest.mark.parametrize("route", ["function", "layer"])
def test_inference_and_its_gradients_agree_with_the_oracle(approach, route):
    layout = {"function": "nhwc", "layer": "nchw"}[route]
    case = Case(
        route=route,
        approach=approach,
        layout=layout,
        inference=True,
        activation="silu",
        residual=route == "layer",
    )
    check_in_its_precision(case, seed=2, first=True)
    check_in_its_precision(case, seed=3, first=False)


@pytest.mark.parametrize("approach", APPROACHES)
def test_reference_agrees_with_the_oracle(approach):
    case = Case(approach=approach, backend="reference", activation="gelu", residual=True, mask=True)
    check_in_its_precision(case, seed=4, first=True)
    check_in_its_precision(case, seed=5, first=False)


@pytest.mark.parametrize("approach", APPROACHES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_virtual_batch_has_statistics_of_its_own_and_the_state_moves_by_their_mean(approach, backend):
    size, shape = 4, (12, 3, 5)
    random = np.random.default_rng(8)
    # Every virtual batch with another mean and spread, so that mixing them up shows.
    x = jnp.asarray(random.standard_normal(shape) * np.repeat([1, 2, 3], size).reshape(-1, 1, 1), jnp.float32)
    x = x + jnp.repeat(jnp.array([0.0, 4.0, -2.0]), size).reshape(-1, 1, 1)
    dy = jnp.asarray(random.standard_normal(shape), jnp.float32)
    settings = dict(approach=approach, momentum=0.9, warmup_period=3, channel_axis=1)
    stats = bn_fused.RunningStats(jnp.ones(3), 2 * jnp.ones(3), jnp.float32(0.5), jnp.int32(1))

    @jax.jit
    def run(x):
        def of(x):
            return bn_fused.batch_norm(x, stats, virtual_batch_size=size, backend=backend, **settings)

        y, pullback, new = jax.vjp(of, x, has_aux=True)
        return y, new, pullback(dy)[0]

    y, new, dx = run(x)
    definition = oracle.Definition(**settings, written_out=backend == "reference")
    parts = [oracle.batch_norm(definition, part, stats) for part in np.split(np.asarray(x), 3)]
    assert_close(y, np.concatenate([part.y for part in parts]), np.concatenate([part.y_scale for part in parts]))
    for name in ("mean", "var"):
        wanted = np.mean([getattr(part.state, name) for part in parts], 0)
        scale = np.mean([getattr(part.state_scale, name) for part in parts], 0)
        assert_close(getattr(new, name), wanted, scale, what=f"running {name}")
    assert_close(new.zero_frac, parts[0].state.zero_frac, what="zero_frac")
    assert new.count == parts[0].state.count
    zeros = np.zeros(3)
    both = [part.backward(d, zeros, zeros, 0.0) for part, d in zip(parts, np.split(np.asarray(dy), 3), strict=True)]
    wanted, scale = (np.concatenate([one.x for one in ones]) for ones in zip(*both, strict=True))
    assert_close(dx, wanted, scale, what="gradient of x")


@st.composite
def cases(draw):
    route = draw(st.sampled_from(["function", "layer"]))
    layouts = tuple(LAYOUTS) if route == "function" else CHANNEL_FIRST
    case = Case(
        route=route,
        approach=draw(st.sampled_from(APPROACHES)),
        dtype=draw(st.sampled_from(["float32", "bfloat16", "float16", "float64"])),
        layout=draw(st.sampled_from(layouts)),
        affine=draw(st.booleans()),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        residual=draw(st.booleans()),
        mask=draw(st.booleans()),
        inference=draw(st.sampled_from([False, False, False, True])),
        debias=draw(st.sampled_from(["axis", "samples", "none"])),
        warmup_period=draw(st.sampled_from([1, 4, 100])),
        momentum=draw(st.sampled_from([0.9, 0.99])),
        backend=draw(st.sampled_from(BACKENDS)),
    )
    # One example debiased over the axis is a factor of 1/eps, warned about: `test_errors` has it.
    hypothesis.assume(case.shape[0] > 1 or case.debias != "axis")
    return case


DATA = {
    "case": cases(),
    "seed": st.integers(0, 2**16),
    "first": st.booleans(),
    "offset": st.sampled_from([0.0, 3.0, 20.0]),
    "spread": st.sampled_from([1e-2, 1.0, 10.0]),
}


@on_the_newest_jax
@hypothesis.given(**DATA)
@hypothesis.settings(max_examples=20)
def test_any_combination_agrees_with_the_oracle(case, seed, first, offset, spread):
    check_in_its_precision(case, seed, first, offset, spread)


@pytest.mark.slow
@hypothesis.given(**DATA)
@hypothesis.settings(max_examples=1000)
def test_a_thousand_combinations_agree_with_the_oracle(case, seed, first, offset, spread):
    check_in_its_precision(case, seed, first, offset, spread)


# --- the oracle's own gradients -----------------------------------------------------------------------------


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("approach", APPROACHES)
def test_the_oracles_gradients_are_the_numerical_derivatives_of_its_values(approach, activation, inference):
    random = np.random.default_rng(7)
    definition = oracle.Definition(
        approach=approach,
        activation=activation,
        inference=inference,
        momentum=0.8,
        warmup_period=5,
        channel_axis=1,
        precision=np.float64,
    )
    shape, channels = (5, 3, 4), 3
    point = {
        "x": 2 + random.standard_normal(shape),
        "weight": 1 + 0.5 * random.standard_normal(channels),
        "bias": random.standard_normal(channels),
        "residual": random.standard_normal(shape),
        "mean": random.standard_normal(channels),
        "var": random.uniform(0.5, 2, channels),
        "zero_frac": 0.6,
    }
    mask = random.uniform(size=(5, 4)) < 0.7

    def at(point):
        state = oracle.State(point["mean"], point["var"], point["zero_frac"], 2)
        optional = {name: point[name] for name in ("weight", "bias", "residual")}
        return oracle.batch_norm(definition, point["x"], state, mask=mask, **optional)

    cotangents = {
        "dy": random.standard_normal(shape),
        "dmean": random.standard_normal(channels),
        "dvar": random.standard_normal(channels),
        "dzero_frac": random.standard_normal(),
    }

    def weighted_sum(point):
        result = at(point)
        return sum(
            np.sum(ct * value) for ct, value in zip(cotangents.values(), (result.y, *result.state[:3]), strict=True)
        )

    gradients, _ = at(point).backward(**cotangents)
    step = 1e-5
    for name, value in point.items():
        direction = random.standard_normal(np.shape(value))
        ahead = weighted_sum({**point, name: value + step * direction})
        behind = weighted_sum({**point, name: value - step * direction})
        # The difference quotient is off by step**2 and by the values' roundings over the step, both about
        # 1e-10.
        numerical, closed = (ahead - behind) / (2 * step), np.sum(getattr(gradients, name) * direction)
        if approach == "ema_compatibility" and not inference and name == "zero_frac":
            assert closed == 0
        assert abs(numerical - closed) < 1e-7 * (1 + abs(closed)), name
