"""Layers of flax and ours, nnx's and linen's, under one interface: made, trained, inferred with and read."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

import bn_fused.linen
import bn_fused.nnx

NAMES = ("scale", "bias", "mean", "var")


class Nnx:
    """An nnx layer."""

    flaxs, ours = nnx.BatchNorm, bn_fused.nnx.BatchNorm

    def __init__(self, kind, channels, **settings):
        self.layer = kind(channels, rngs=nnx.Rngs(7), **settings)

    def __call__(self, x, inference, **options):
        return self.layer(x, use_running_average=inference, **options)

    def values(self):
        return {path[-1]: np.asarray(value[...]) for path, value in nnx.to_flat_state(nnx.state(self.layer))}

    def load(self, values):
        for name, value in values.items():
            getattr(self.layer, name)[...] = jnp.asarray(value)


class Linen:
    """A linen layer with its variables."""

    flaxs, ours = linen.BatchNorm, bn_fused.linen.BatchNorm

    def __init__(self, kind, channels, **settings):
        self.layer = kind(**settings)
        shape = [1, 1, 1]
        shape[settings.get("axis", -1)] = channels
        self.variables = self.layer.init(jax.random.key(7), jnp.zeros(shape), use_running_average=True)

    def __call__(self, x, inference, **options):
        y, updated = self.layer.apply(
            self.variables, x, use_running_average=inference, mutable=["batch_stats"], **options
        )
        self.variables = self.variables | updated
        return y

    def values(self):
        return {name: np.asarray(value) for part in self.variables.values() for name, value in part.items()}

    def load(self, values):
        """With what is given alone in `batch_stats`, as from a checkpoint."""
        given = {name: jnp.asarray(value) for name, value in values.items()}
        parts = {"params": NAMES[:2], "batch_stats": (*NAMES[2:], "zero_frac", "count")}
        self.variables = {part: {name: given[name] for name in names if name in given} for part, names in parts.items()}


APIS = {"nnx": Nnx, "linen": Linen}


def pair(api, channels, ours=None, **settings):
    """flax's layer and ours, with the same settings and, for ours, some more."""
    api = APIS[api]
    return api(api.flaxs, channels, **settings), api(api.ours, channels, **settings, **(ours or {}))


def checkpoint(channels, settings=None, seed=3):
    """Values of a layer that flax trained, by name: those that the settings leave."""
    random, settings = np.random.default_rng(seed), settings or {}
    values = {name: random.standard_normal(channels).astype(np.float32) for name in NAMES[:3]}
    values["var"] = (0.1 + 4 * random.random(channels)).astype(np.float32)
    return {name: value for name, value in values.items() if settings.get(f"use_{name}", True)}
