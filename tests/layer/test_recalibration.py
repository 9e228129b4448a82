"""`recalibrate`: every layer's statistics are NumPy's over the union of all batches, as they reached the layer."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import bn_fused
from bn_fused.approaches import APPROACHES

from support.over_batch import over_batch as over_batch_eagerly
from support.tolerances import assert_close, assert_same_bits
from support.versions import also_on_the_newest_jax

CHANNELS = 3
BATCHES = [8, 4, 8]  # unequal

over_batch = eqx.filter_jit(over_batch_eagerly)


class Network(eqx.Module):
    """Three layers, the second of them used twice; gives what each of the four calls got."""

    convs: list
    norms: list

    def __init__(self, key, norm=bn_fused.BatchNorm, axis_name="batch", approach="batch", **settings):
        self.convs = [eqx.nn.Conv1d(CHANNELS, CHANNELS, 3, padding=1, key=key) for key in jax.random.split(key, 4)]
        self.norms = [norm(CHANNELS, axis_name, approach, activation="relu", **settings) for _ in range(3)]

    def __call__(self, x, state, mask=None):
        got = []
        for conv, norm in zip(self.convs, [*self.norms, self.norms[1]], strict=True):
            x = 3 + conv(x)
            got.append(x)
            x, state = norm(x, state, mask=mask)
        return got, state


def make(**settings):
    return eqx.nn.make_with_state(Network)(jax.random.key(0), **settings)


def batches(sizes=BATCHES, dtype=np.float32):
    random = np.random.default_rng(0)
    # Means that differ: the average of the batches' variances would not do.
    return [jnp.asarray(3 * place + random.standard_normal((n, CHANNELS, 9)), dtype) for place, n in enumerate(sizes)]


def masked(x, mask):
    return np.moveaxis(np.asarray(x, np.float64), 1, -1)[np.asarray(mask, bool)]


def union(seen):
    """What reached each layer, [positions, channels] in float64, from (what the calls got, mask) of the batches."""
    calls = [np.concatenate([masked(got[call], mask) for got, mask in seen]) for call in range(4)]
    return [calls[0], np.concatenate([calls[1], calls[3]]), calls[2]]


def assert_moments_are(model, state, wanted, **options):
    assert_are(bn_fused.moments_of(model, state), wanted, **options)


def assert_are(moments, wanted, dtype=np.float32, c=50):
    for (path, (mean, var)), values in zip(moments.items(), wanted, strict=True):
        size = 1 + abs(values).max()
        assert_close(mean, values.mean(0), size, dtype=dtype, c=c, what=f"mean of {path}")
        assert_close(var, values.var(0), size**2, dtype=dtype, c=c, what=f"variance of {path}")


def recording(seen):
    def run(model, state, x):
        got, state = over_batch(model, x, state)
        seen.append((got, np.ones((x.shape[0], x.shape[-1]), bool)))
        return state

    return run


SETTINGS = [{"approach": name} for name in APPROACHES] + [{"virtual_batch_size": 2}]


@pytest.mark.parametrize(
    ("settings", "trained"),
    [({}, False), (SETTINGS[0], True), *also_on_the_newest_jax(*((one, True) for one in SETTINGS[1:]))],
    ids=str,
)
def test_unequal_batches_of_a_network_with_a_layer_used_twice(settings, trained):
    model, state = make(warmup_period=10, **settings)
    if trained:
        _, state = over_batch(model, batches()[0] - 20, state)
    before = [layer.get_stats(state) for layer in model.norms]
    seen = []
    after = bn_fused.recalibrate(model, state, iter(batches()), recording(seen))
    assert_moments_are(model, after, union(seen))
    for layer, old in zip(model.norms, before, strict=True):
        new = layer.get_stats(after)
        assert new.zero_frac == 0
        assert_same_bits(new.count, old.count)
        for one, other in zip(layer.get_stats(state), old, strict=True):  # the given state is as it was
            assert_same_bits(one, other)
    # The layers normalised with their batch's moments, whatever the approach.
    got, _ = over_batch(bn_fused.with_settings(model, approach="batch"), batches()[0], after)
    assert_close(seen[0][0][1], np.asarray(got[1], np.float64), 10.0)


@eqx.filter_jit
def with_mask(model, x, state, mask):
    """As `over_batch`, and a mask or None."""
    axes = dict(in_axes=(0, None, None if mask is None else 0), out_axes=(0, None))
    return jax.vmap(model, axis_name="batch", **axes)(x, state, mask)


def test_masks_and_batches_of_which_a_layer_gets_nothing():
    model, state = make()
    seen = []

    def run(model, state, batch):
        x, mask = batch
        got, state = with_mask(model, x, state, mask)
        seen.append((got, mask))
        return {"state": state}

    masks = [np.random.default_rng(1).random((n, 9)) < 0.6 for n in BATCHES]
    masks[1][:] = False
    after = bn_fused.recalibrate(model, state, zip(batches(), map(jnp.asarray, masks), strict=True), run)
    assert_moments_are(model, after, union(seen))


def test_layers_under_inference_and_those_that_nothing_reaches_keep_their_statistics():
    model, state = eqx.nn.make_with_state(lambda key: [Network(key), Network(key)])(jax.random.key(0))
    _, state = over_batch(model[0], batches()[0], state)
    frozen = bn_fused.with_settings(model, where=lambda path, layer: path == "0.norms.1", inference=True)
    after = bn_fused.recalibrate(frozen, state, batches(), lambda model, state, x: over_batch(model[0], x, state))
    layers = frozen[0].norms + frozen[1].norms
    changed = [not eqx.tree_equal(layer.get_stats(state), layer.get_stats(after)) for layer in layers]
    assert changed == [True, False, True, False, False, False]
    assert float(state.get(model[1].norms[0].zero_frac_index)) == 1


def test_one_batch_gives_what_a_step_without_memory_gives():
    x = batches()[1]
    layer, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(CHANNELS, "batch", "batch", debias="none", momentum=0.0)
    after = bn_fused.recalibrate(layer, state, [x], lambda model, state, x: over_batch(model, x, state)[1])
    _, stepped = over_batch(layer, x, state)
    for one, other in zip(layer.get_stats(after), layer.get_stats(stepped), strict=True):
        assert_same_bits(one, other)


def test_many_batches_far_from_zero_lose_no_digits():
    random = np.random.default_rng(0)
    layer, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(CHANNELS, "batch", "batch")
    many = [jnp.asarray(1e3 + random.standard_normal((8, CHANNELS)), jnp.float32) for _ in range(300)]
    after = bn_fused.recalibrate(layer, state, many, lambda model, state, x: over_batch(model, x, state))
    values = np.concatenate(many).astype(np.float64)
    stats = layer.get_stats(after)
    # A batch's mean is rounded to one number in float32: an error of the mean that does not add up, and hardly one of
    # the variance, to which it contributes its square.
    assert_close(stats.mean, values.mean(0), c=1)
    assert_close(stats.var, values.var(0), 1.0)


def test_members_of_an_ensemble_have_their_own():
    models, states = eqx.filter_vmap(lambda key: eqx.nn.make_with_state(Network)(key))(
        jax.random.split(jax.random.key(1), 2)
    )
    seen = [[], []]

    @eqx.filter_jit
    def forward(models, states, x):
        return eqx.filter_vmap(over_batch, in_axes=(eqx.if_array(0), None, eqx.if_array(0)))(models, x, states)

    def run(models, states, x):
        got, states = forward(models, states, x)
        for member in range(2):
            seen[member].append(([value[member] for value in got], np.ones((x.shape[0], 9), bool)))
        return states

    after = bn_fused.recalibrate(models, states, batches(), run)
    moments = bn_fused.moments_of(models, after)
    for member in range(2):
        assert_are({path: (mean[member], var[member]) for path, (mean, var) in moments.items()}, union(seen[member]))
    assert jax.tree.structure(after) == jax.tree.structure(states)


class Doubling(bn_fused.BatchNorm):
    def __call__(self, x, state, **options):
        return super().__call__(2 * x, state, **options)


def test_a_subclass_records_what_it_gives_to_the_layer():
    model, state = make(norm=Doubling)
    seen = []
    after = bn_fused.recalibrate(model, state, batches(), recording(seen))
    assert_moments_are(model, after, [2 * values for values in union(seen)])


def test_other_state_stays_and_16_bit_statistics_and_inputs_are_taken():
    class Mixed(eqx.Module):
        norm: bn_fused.BatchNorm
        steps: eqx.nn.StateIndex

        def __init__(self):
            self.norm = bn_fused.BatchNorm(CHANNELS, "batch", "batch")
            self.steps = eqx.nn.StateIndex(jnp.zeros((), int))

        def __call__(self, x, state):
            state = state.set(self.steps, state.get(self.steps) + 1)
            return self.norm(x, state)

    model, state = eqx.nn.make_with_state(Mixed)()
    state = jax.tree.map(lambda value: value.astype(jnp.bfloat16) if value.dtype == np.float32 else value, state)
    given = batches(dtype=jnp.bfloat16)
    after = bn_fused.recalibrate(model, state, given, lambda model, state, x: over_batch(model, x, state))
    assert after.get(model.steps) == 0
    values = np.concatenate([masked(x, np.ones((x.shape[0], 9))) for x in given])
    mean, var = after.get(model.norm.state_index)
    assert mean.dtype == jnp.bfloat16
    assert_close(mean, values.mean(0), 10.0)
    assert_close(var, values.var(0), 100.0)


def test_with_64_bit_types(x64):
    model, state = make(dtype=jnp.float64)
    seen = []
    after = bn_fused.recalibrate(model, state, batches(dtype=np.float64), recording(seen))
    assert_moments_are(model, after, union(seen), dtype=np.float64)


def test_an_axis_of_devices_that_was_forgotten_is_named():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    layer, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(CHANNELS, "batch", "batch")

    def run(layer, state, x):
        arrays, static = eqx.partition((layer, state), eqx.is_array)

        def on_a_device(arrays, x):
            return eqx.filter(over_batch_eagerly(layer, x, eqx.combine(arrays, static)[1])[1], eqx.is_array)

        return jax.shard_map(on_a_device, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())(arrays, x)

    with pytest.raises(ValueError, match="axis_name lacks 'data'"):
        bn_fused.recalibrate(layer, state, batches([8]), run)


@pytest.mark.parametrize(
    ("ragged", "check_vma"),
    [
        (True, True),
        *also_on_the_newest_jax((False, False)),
        pytest.param(True, False, marks=pytest.mark.slow),
        pytest.param(False, True, marks=pytest.mark.slow),
    ],
)
def test_devices_that_share_their_statistics(ragged, check_vma):
    model, state = make(axis_name=("batch", "data"))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    seen = []

    @eqx.filter_jit
    def forward(model, state, x, mask):
        arrays, static = eqx.partition((model, state), eqx.is_array)

        def on_a_device(arrays, x, mask):
            model, state = eqx.combine(arrays, static)
            got, state = with_mask(model, x, state, mask)
            return got, eqx.filter(state, eqx.is_array)

        specs = dict(in_specs=(P(), P("data"), P("data")), out_specs=(P("data"), P()))
        got, state_arrays = jax.shard_map(on_a_device, mesh=mesh, check_vma=check_vma, **specs)(arrays, x, mask)
        return got, eqx.combine(state_arrays, eqx.filter(state, eqx.is_array, inverse=True))

    def run(model, state, x):
        mask = np.ones((x.shape[0], 9), bool)
        mask[-2 * x.shape[0] // 4 :] = not ragged  # two devices have nothing
        mask[0, 3:] = not ragged
        got, state = forward(model, state, x, jnp.asarray(mask) if ragged else None)
        seen.append((got, mask))
        return state

    after = bn_fused.recalibrate(model, state, batches(), run)
    assert_moments_are(model, after, union(seen), c=100)


def test_groups_of_devices_have_the_statistics_of_all_of_them():
    layer, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(
        CHANNELS, ("batch", "data"), "batch", axis_index_groups=[[0, 1], [2, 3]]
    )

    def run(layer, state, x):
        arrays, static = eqx.partition((layer, state), eqx.is_array)

        def on_a_device(arrays, x):
            layer, state = eqx.combine(arrays, static)
            y, state = over_batch_eagerly(layer, x, state)
            return y, eqx.filter(state, eqx.is_array)

        y, state_arrays = jax.pmap(on_a_device, axis_name="data", in_axes=(None, 0))(arrays, x.reshape(4, -1, CHANNELS))
        pairs = np.asarray(y, np.float64).reshape(2, -1, CHANNELS)
        np.testing.assert_allclose(pairs.mean(1), 0, atol=1e-5)  # each group normalises with its own
        return eqx.combine(jax.tree.map(lambda value: value[0], state_arrays), state)

    x = batches([8])[0][:, :, 0] + jnp.arange(8.0)[:, None]
    after = bn_fused.recalibrate(layer, state, [x, x[:4]], run)
    values = np.concatenate([x, x[:4]]).astype(np.float64)
    stats = layer.get_stats(after)
    assert_close(stats.mean, values.mean(0), 10.0)
    assert_close(stats.var, values.var(0), 100.0)


@pytest.mark.parametrize(
    "axis_type", [jax.sharding.AxisType.Auto, *also_on_the_newest_jax(jax.sharding.AxisType.Explicit)]
)
def test_sharded_arrays_under_jit(axis_type):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
    model, state = make()
    arrays, static = eqx.partition((model, state), eqx.is_array)
    placed = NamedSharding(mesh, P())
    model, state = eqx.combine(jax.device_put(arrays, placed), static)
    seen = []
    given = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in batches()]
    after = bn_fused.recalibrate(model, state, given, recording(seen))
    assert_moments_are(model, after, union(seen))
    assert all(leaf.sharding == placed for leaf in jax.tree.leaves(after))


def test_a_state_that_lies_nowhere_in_particular_goes_on_with_sharded_arrays():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    model, state = make()
    x = jax.device_put(batches()[0], NamedSharding(mesh, P("data")))
    after = bn_fused.recalibrate(model, state, [batches()[0]], recording([]))
    y, _ = over_batch(model, x, after)
    expected, _ = over_batch(model, batches()[0], after)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_a_function_is_compiled_once_for_all_batches_of_a_size_and_all_calls():
    model, state = make()
    traced = []

    @eqx.filter_jit
    def run(model, state, x):
        traced.append(x.shape)
        return over_batch(model, x, state)

    for _ in range(2):
        state = bn_fused.recalibrate(model, state, [*batches(), *batches()], run)
    assert sorted(traced) == sorted((n, CHANNELS, 9) for n in set(BATCHES))


def forward(model, state, x):
    return over_batch(model, x, state)


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (
            lambda model, state, x: forward(model, state, x)[0],
            TypeError,
            "run returned 0 of equinox.nn.State in",
        ),
        (lambda model, state, x: state, ValueError, "no layer recorded"),
        (lambda model, state, x: forward(eqx.nn.inference_mode(model), state, x), ValueError, "no layer recorded"),
        (lambda model, state, x: make()[1], ValueError, "run returned another state"),
    ],
)
def test_what_a_run_has_to_do_is_said(run, error, message):
    model, state = make()
    with pytest.raises(error, match=message):
        bn_fused.recalibrate(model, state, batches(), run)


def test_models_without_layers_that_train_and_batches_that_are_none():
    model, state = make()
    with pytest.raises(ValueError, match="batches is empty"):
        bn_fused.recalibrate(model, state, [], forward)
    with pytest.raises(ValueError, match="that trains.*value=False"):
        bn_fused.recalibrate(eqx.nn.inference_mode(model), state, batches(), forward)
    with pytest.raises(ValueError, match="model has no bn_fused.BatchNorm$"):
        bn_fused.recalibrate(model.convs, state, batches(), forward)


def test_arguments_of_other_kinds_or_in_another_order_are_named():
    model, state = make()
    with pytest.raises(TypeError, match=r"run is a list; .*recalibrate\(model, state, batches, run\)"):
        bn_fused.recalibrate(model, state, forward, batches())
    with pytest.raises(TypeError, match="batches is a NoneType; accepted is anything to iterate over"):
        bn_fused.recalibrate(model, state, None, forward)
    with pytest.raises(TypeError, match=r"model is an equinox.nn.State"):
        bn_fused.recalibrate(state, model, batches(), forward)
    with pytest.raises(TypeError, match="state is a Network; accepted is the equinox.nn.State"):
        bn_fused.recalibrate(model, model, batches(), forward)


def test_under_a_transform_it_says_that_it_is_called_outside():
    model, state = make()
    with pytest.raises(TypeError, match="model and state are traced, by jax.jit .* call it outside"):
        eqx.filter_jit(bn_fused.recalibrate)(model, state, batches(), forward)
    with pytest.raises(TypeError, match="batches are traced"):
        jax.jit(lambda x: jax.tree.leaves(bn_fused.recalibrate(model, state, [x], forward)))(batches()[0])
