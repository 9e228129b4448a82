"""The layers in networks written as flax writes them: transforms, devices, checkpoints."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from support.tolerances import assert_close

pytest.importorskip("flax", reason="flax is not installed: the extra `flax`")

import optax
from flax import linen, nnx, serialization

import bn_fused.linen
import bn_fused.nnx

from support.flax_layers import APIS, NAMES, checkpoint

pytestmark = pytest.mark.usefixtures("standard_promotion")
CHANNELS = 4
every_api = pytest.mark.parametrize("api", APIS)


def data(seed=0, shape=(8, 6, 6, CHANNELS)):
    return jnp.asarray(1 + 2 * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


class Block(linen.Module):
    """The residual block of flax's ResNet; with `fused`, relu and residual are the norm's."""

    norm: type
    train: bool = True
    fused: bool = False

    @linen.compact
    def __call__(self, x):
        norm = functools.partial(self.norm, use_running_average=not self.train, momentum=0.9)
        conv = functools.partial(linen.Conv, CHANNELS, (3, 3), use_bias=False)
        start = linen.initializers.zeros_init()
        if self.fused:
            y = norm(activation="relu")(conv()(x))
            return norm(activation="relu", scale_init=start)(conv()(y), residual=x)
        y = linen.relu(norm()(conv()(x)))
        return linen.relu(x + norm(scale_init=start)(conv()(y)))


class NnxBlock(nnx.Module):
    """The same with nnx."""

    def __init__(self, norm, *, rngs, fused=False):
        conv = functools.partial(nnx.Conv, CHANNELS, CHANNELS, (3, 3), use_bias=False, rngs=rngs)
        norm = functools.partial(norm, CHANNELS, momentum=0.9, rngs=rngs)
        inside = {"activation": "relu"} if fused else {}
        self.first, self.second = conv(), conv()
        self.norm = norm(**inside)
        self.last = norm(scale_init=nnx.initializers.zeros_init(), **inside)
        self.fused = fused

    def __call__(self, x):
        if self.fused:
            return self.last(self.second(self.norm(self.first(x))), residual=x)
        y = nnx.relu(self.norm(self.first(x)))
        return nnx.relu(x + self.last(self.second(y)))


def trained_linen(norm, steps=3, **settings):
    """Losses and variables of a block that is trained."""
    model = Block(norm, **settings)
    variables = Block(norm, train=False, **settings).init(jax.random.key(0), data())
    optimiser = optax.sgd(0.1, momentum=0.9)

    @jax.jit
    def step(variables, velocity, x):
        def loss(params):
            y, updated = model.apply(variables | {"params": params}, x, mutable=["batch_stats"])
            return jnp.mean((y - jnp.sin(x)) ** 2), updated

        (value, updated), gradient = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        change, velocity = optimiser.update(gradient, velocity)
        return {"params": optax.apply_updates(variables["params"], change)} | updated, velocity, value

    velocity, losses = optimiser.init(variables["params"]), []
    for seed in range(steps):
        variables, velocity, value = step(variables, velocity, data(seed))
        losses.append(value)
    return np.asarray(losses), variables


def trained_nnx(norm, steps=3, **settings):
    """Losses and the block that is trained."""
    model = NnxBlock(norm, rngs=nnx.Rngs(0), **settings)
    optimiser = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimiser, x):
        value, gradient = nnx.value_and_grad(lambda model: jnp.mean((model(x) - jnp.sin(x)) ** 2))(model)
        optimiser.update(model, gradient)
        return value

    return np.asarray([step(model, optimiser, data(seed)) for seed in range(steps)]), model


@every_api
@pytest.mark.parametrize("fused", [False, True])
def test_a_residual_block_trains_as_with_flax(api, fused):
    train = {"nnx": trained_nnx, "linen": trained_linen}[api]
    wanted, _ = train(APIS[api].flaxs)
    losses, _ = train(APIS[api].ours, fused=fused)
    # Three steps, each of which amplifies the roundings of sums of 36 products.
    assert_close(losses, wanted, 10, what="loss")
    assert losses[0] != losses[2]


@every_api
def test_inference_from_the_network_that_flax_trained_is_flaxs(api):
    x = data(9)
    if api == "linen":
        _, variables = trained_linen(linen.BatchNorm)
        wanted = Block(linen.BatchNorm, train=False).apply(variables, x)
        y = Block(bn_fused.linen.BatchNorm, train=False).apply(variables, x)
    else:
        _, flaxs = trained_nnx(nnx.BatchNorm)
        ours = NnxBlock(bn_fused.nnx.BatchNorm, rngs=nnx.Rngs(1))
        nnx.update(ours, nnx.state(flaxs))
        for model in (flaxs, ours):
            model.eval()
        wanted, y = flaxs(x), ours(x)
    assert_close(y, wanted, np.max(np.abs(wanted)))


def test_linens_lifted_transforms():
    """scan over layers and remat; vmap over an ensemble; each against the same network without it."""
    norm = functools.partial(bn_fused.linen.BatchNorm, use_running_average=False)
    x = data()

    class Deep(linen.Module):
        @linen.compact
        def __call__(self, x):
            layer = linen.scan(
                lambda module, x, _: (linen.remat(bn_fused.linen.BatchNorm)(use_running_average=False)(x * x), None),
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
                length=2,
            )
            return layer(self, x, None)[0]

    variables = Deep().init(jax.random.key(0), x)
    y, updated = Deep().apply(variables, x, mutable=["batch_stats"])
    wanted, zero_frac = x, []
    single = norm().init(jax.random.key(0), x)
    for _ in range(2):
        wanted, one = norm().apply(single, wanted * wanted, mutable=["batch_stats"])
        zero_frac.append(one["batch_stats"]["zero_frac"])
    assert_close(y, wanted, np.max(np.abs(wanted)))
    (stats,) = updated["batch_stats"].values()
    np.testing.assert_array_equal(stats["zero_frac"], zero_frac)
    # What lacks zero_frac is carried as it is.
    (params,), given = variables["params"].values(), {"mean": jnp.zeros((2, CHANNELS)), "var": jnp.ones((2, CHANNELS))}
    (name,) = variables["params"]
    _, updated = Deep().apply({"params": {name: params}, "batch_stats": {name: given}}, x, mutable=["batch_stats"])
    assert jax.tree.structure(updated) == jax.tree.structure({"batch_stats": {name: given}})

    ensemble = linen.vmap(
        bn_fused.linen.BatchNorm,
        in_axes=0,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
    )(use_running_average=False)
    xs = jnp.stack([x, 2 * x + 1])
    variables = ensemble.init(jax.random.key(0), xs)
    y, updated = ensemble.apply(variables, xs, mutable=["batch_stats"])
    for member in range(2):
        wanted, one = norm().apply(single, xs[member], mutable=["batch_stats"])
        assert_close(y[member], wanted, np.max(np.abs(wanted)))
        assert_close(updated["batch_stats"]["var"][member], one["batch_stats"]["var"])


def test_nnxs_transforms():
    """The same with nnx."""
    x = data()

    def make(rngs):
        return bn_fused.nnx.BatchNorm(CHANNELS, rngs=rngs)

    layers = nnx.vmap(make)(nnx.Rngs(0).split(2))

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    @nnx.remat
    def deep(layer, x):
        return layer(x * x)

    y = deep(layers, x)
    single, wanted = make(nnx.Rngs(0)), x
    for _ in range(2):
        single = make(nnx.Rngs(0))
        wanted = single(wanted * wanted)
    assert_close(y, wanted, np.max(np.abs(wanted)))
    np.testing.assert_array_equal(layers.zero_frac[...], [single.zero_frac[...]] * 2)
    assert_close(layers.mean[...][1], single.mean[...], 3)

    ensemble = nnx.vmap(make)(nnx.Rngs(0).split(2))
    xs = jnp.stack([x, 2 * x + 1])
    y = nnx.vmap(lambda layer, x: layer(x))(ensemble, xs)
    for member in range(2):
        single = make(nnx.Rngs(0))
        assert_close(y[member], single(xs[member]), np.max(np.abs(y)))
        assert_close(ensemble.var[...][member], single.var[...])


def test_split_merge_views_and_a_carried_state():
    model = NnxBlock(bn_fused.nnx.BatchNorm, rngs=nnx.Rngs(0))
    structure, parameters, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    @jax.jit
    def steps(stats, xs):
        def step(stats, x):
            model = nnx.merge(structure, parameters, stats)
            y = model(x)
            return nnx.state(model, nnx.BatchStat), jnp.sum(y)

        return jax.lax.scan(step, stats, xs)

    xs = jnp.stack([data(0), data(1)])
    stats, _ = steps(stats, xs)
    for x in xs:
        model(x)
    merged = nnx.merge(structure, parameters, stats)
    for name in ("mean", "var", "zero_frac"):
        assert_close(getattr(merged.last, name)[...], getattr(model.last, name)[...], 3, what=name)
    view = nnx.view(model, use_running_average=True)
    before = np.asarray(model.norm.mean[...])
    view(data(2))
    np.testing.assert_array_equal(model.norm.mean[...], before)


@every_api
@pytest.mark.parametrize("groups", [None, [[0, 1], [2, 3]]])
def test_devices_share_their_statistics(api, groups):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    layer = APIS[api](APIS[api].ours, CHANNELS, axis_name="data", axis_index_groups=groups)
    layer.load(checkpoint(CHANNELS))
    x = data()
    if api == "linen":
        given = layer.variables

        def apply(variables, x):
            return layer.layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])[0]
    else:
        structure, given = nnx.split(layer.layer)

        def apply(state, x):
            return nnx.merge(structure, state)(x)

    mapped = jax.shard_map(apply, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), check_vma=groups is None)
    y = jax.jit(mapped)(given, x)
    plain = APIS[api](APIS[api].flaxs, CHANNELS)
    plain.load(checkpoint(CHANNELS))
    parts = [x] if groups is None else jnp.split(x, 2)
    wanted = jnp.concatenate([plain(part, False) for part in parts])
    assert_close(y, wanted, np.max(np.abs(wanted)))


def test_bytes_of_a_linen_checkpoint():
    _, flaxs = trained_linen(linen.BatchNorm)
    saved = serialization.to_bytes(flaxs)
    x = data(5)
    wanted, flaxs_next = Block(linen.BatchNorm).apply(flaxs, x, mutable=["batch_stats"])
    y, ours = Block(bn_fused.linen.BatchNorm).apply(serialization.msgpack_restore(saved), x, mutable=["batch_stats"])
    assert_close(y, wanted, np.max(np.abs(wanted)))
    assert jax.tree.structure(ours) == jax.tree.structure(flaxs_next)
    jax.tree.map(lambda one, other: assert_close(one, other, 20), ours, flaxs_next)


def test_checkpoints_of_orbax(tmp_path):
    """Ours of ours; and flax's, which lack zero_frac, into a new network of ours."""
    orbax = pytest.importorskip("orbax.checkpoint", reason="orbax is not installed: the extra `test`")

    def abstract(state):
        return jax.tree.map(lambda value: jax.ShapeDtypeStruct(value.shape, value.dtype), state)

    def flax_has(path, value):
        return not (isinstance(value, nnx.BatchStat) and path[-1] in ("zero_frac", "count"))

    x = data(5)
    _, flaxs = trained_nnx(nnx.BatchNorm)
    _, ours = trained_nnx(bn_fused.nnx.BatchNorm)
    for model in (flaxs, ours):
        model.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))  # which has a `count` of its own
    with orbax.StandardCheckpointer() as checkpointer:
        for folder, model in (("flaxs", flaxs), ("ours", ours)):
            checkpointer.save(tmp_path / folder, nnx.to_pure_dict(nnx.state(model)))
        checkpointer.wait_until_finished()
        for folder, model, kept in (("ours", ours, lambda *_: True), ("flaxs", flaxs, flax_has)):
            new = NnxBlock(bn_fused.nnx.BatchNorm, rngs=nnx.Rngs(8))
            new.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(1))
            state = nnx.filter_state(nnx.state(new), kept)
            restored = checkpointer.restore(tmp_path / folder, abstract(nnx.to_pure_dict(state)))
            nnx.replace_by_pure_dict(state, restored)
            nnx.update(new, state)
            for name in NAMES[2:]:
                np.testing.assert_array_equal(getattr(new.last, name)[...], getattr(model.last, name)[...])
            wanted, y = model(x), new(x)
            assert_close(y, wanted, np.max(np.abs(wanted)))
            assert new.last.zero_frac[...] == (0 if model is flaxs else ours.last.zero_frac[...])
            assert_close(new.last.mean[...], model.last.mean[...], 20)
