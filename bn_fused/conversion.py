"""Models with `equinox.nn.BatchNorm` and models with `bn_fused.BatchNorm`, made of each other with what was trained."""

import equinox as eqx
import jax.numpy as jnp

from bn_fused.arguments import EQUINOXS, held
from bn_fused.kernels.contract import widest
from bn_fused.layer import MODES, BatchNorm
from bn_fused.models import check_settings, layer_moments, named, replaced, with_fields


def from_equinox(model, state, **settings):
    """A model with every `equinox.nn.BatchNorm` in it replaced by a `bn_fused.BatchNorm` that was trained as far.

    Inference gives what it gave, to rounding. Mode "ema" becomes approach "ema_compatibility", mode "batch" becomes
    "batch" with debias "none": training goes on as it would have gone on, and `settings` can say otherwise. (In mode
    "batch" Equinox's running variance starts at one, and inference divides that start by a small number in the first
    steps; it is taken over as it is, and fades as it would have.) A layer that was never trained becomes a new one of
    ours: mean 0 and variance 1 where Equinox infers with what it happens to hold, and a first step that replaces them.
    Weight and bias keep their dtype, statistics of 16 bits become float32.

    **Arguments:**

    - `model`, `state`: as `equinox.nn.make_with_state` made them, and as they were trained since; an ensemble that
        `equinox.filter_vmap` made, too.
    - `settings`: those of `bn_fused.BatchNorm` that shall not be the old layers', as of `bn_fused.with_settings`.

    **Returns:**

    The new model and its state. Other stateful layers keep their state; the old model and state remain valid.

    **Raises:**

    TypeError for another setting, a subclass of `equinox.nn.BatchNorm` or what is no state; ValueError if there is no
    layer to replace or the state is another model's; and what `bn_fused.BatchNorm` raises, with the layer's path.
    """
    check_settings(settings)
    return replaced(model, state, eqx.nn.BatchNorm, lambda path, old: _ours(path, old, state, settings))


def to_equinox(model, state):
    """A model with every `bn_fused.BatchNorm` in it replaced by an `equinox.nn.BatchNorm` that was trained as far.

    Inference gives what it gave, to rounding. "ema_compatibility" becomes mode "ema", "batch" becomes mode "batch",
    which keeps the biased variance in the steps to come. Equinox stores the number of steps and not `zero_frac`: it
    gets the number that fits best, and moments that give the same inference with it. It has weight and bias or neither:
    where one of them is missing here, it is there as 1 or 0, and trains from then on. In mode "ema", which trains only
    where the statistics have x's dtype, they get the weight's, as Equinox's constructor gives it to both, rounded where
    it has 16 bits; without a weight they keep their own, and for 16-bit inputs the new state is to be cast.

    **Arguments:**

    - `model`, `state`: as of `from_equinox`.

    **Returns:**

    The new model and its state, as of `from_equinox`.

    **Raises:**

    ValueError if there is no layer to replace, and for what Equinox does not have: the approach "ema", an activation,
    virtual batches, groups of devices. It names the layer and what to do. TypeError and ValueError for subclasses and
    states, as of `from_equinox`.
    """
    return replaced(model, state, BatchNorm, lambda path, old: _equinoxs(path, old, state))


def _check_no_subclass(path, layer, kind):
    if type(layer) is not kind:
        raise TypeError(
            f"{path or 'model'} is a {type(layer).__name__}, a subclass of {kind.__name__}: what it does beside that "
            "would be lost; accepted is the class itself"
        )


def _ours(path, old, state, settings):
    _check_no_subclass(path, old, eqx.nn.BatchNorm)
    whose = path or "this layer"
    if old.mode == "ema":
        first = held(state, old.ema_first_time_index, whose, EQUINOXS)
        mean, var = state.get(old.ema_state_index)
        zero_frac = jnp.where(first, 1.0, 0.0)
    else:
        counter = held(state, old.batch_counter, whose, EQUINOXS)
        first = counter == 0
        mean, var = state.get(old.batch_state_index)
        zero_frac = old.momentum**counter
    own = {
        "axis_name": old.axis_name,
        "approach": MODES[old.mode],
        "debias": "none",
        "eps": old.eps,
        "momentum": old.momentum,
        "inference": old.inference,
    }
    dtype = widest(mean.dtype)
    with named(path):
        new = BatchNorm(old.input_size, channelwise_affine=old.channelwise_affine, dtype=dtype, **(own | settings))
    # Before the first step Equinox holds anything, or ones; here it is zeros.
    mean, var = (jnp.where(first[..., None], jnp.zeros((), dtype), value.astype(dtype)) for value in (mean, var))
    return with_fields(
        new,
        {
            # Equinox computes without what somebody put there.
            "weight": old.weight if old.channelwise_affine else None,
            "bias": old.bias if old.channelwise_affine else None,
            "state_index": eqx.nn.StateIndex((mean, var)),
            "zero_frac_index": eqx.nn.StateIndex(zero_frac.astype(dtype)),
            "count_index": eqx.nn.StateIndex(jnp.zeros(first.shape, jnp.int32)),
        },
    )


def _equinoxs(path, old, state):
    _check_no_subclass(path, old, BatchNorm)
    whose = path or "model"
    for name in ("activation", "virtual_batch_size", "axis_index_groups"):
        if getattr(old, name) is not None:
            raise ValueError(
                f"{whose} has {name} {getattr(old, name)!r}, which equinox.nn.BatchNorm does not have: give "
                f"bn_fused.with_settings(model, {name}=None) and see to it outside of the layer"
            )
    if old.approach not in MODES.values():
        raise ValueError(
            f'{whose} has approach {old.approach!r}, which equinox.nn.BatchNorm does not have: "batch" or '
            '"ema_compatibility", by bn_fused.with_settings, infer with the same statistics and train otherwise'
        )
    mean, var = layer_moments(old, state, path)
    zero_frac = state.get(old.zero_frac_index)
    first = zero_frac == 1
    mode = next(mode for mode, approach in MODES.items() if approach == old.approach)
    weight, bias = old.weight, old.bias
    affine = weight is not None or bias is not None
    if affine:
        weight = jnp.ones_like(bias) if weight is None else weight
        bias = jnp.zeros_like(weight) if bias is None else bias
    new = eqx.nn.BatchNorm(
        old.input_size,
        old.axis_name,
        eps=old.eps,
        channelwise_affine=affine,
        momentum=old.momentum,
        inference=old.inference,
        dtype=mean.dtype,
        mode=mode,
    )
    fields = {"weight": weight, "bias": bias}
    if mode == "ema":
        fields["ema_first_time_index"] = eqx.nn.StateIndex(first)
        dtype = weight.dtype if affine else mean.dtype
        fields["ema_state_index"] = eqx.nn.StateIndex((mean.astype(dtype), var.astype(dtype)))
    else:
        counter = _steps(zero_frac, old.momentum)
        share = jnp.where(first, 1, 1 - old.momentum**counter)[..., None]  # what Equinox divides by
        fields["batch_counter"] = eqx.nn.StateIndex(counter)
        fields["batch_state_index"] = eqx.nn.StateIndex((mean * share, var * share))
    return with_fields(new, fields)


def _steps(zero_frac, momentum):
    """The number of steps after which about this share of the start is left: 0 for all of it alone."""
    # Where it is less than the rounding of 1 the start is gone, and more steps change nothing.
    smallest = jnp.finfo(zero_frac.dtype).eps / 4
    kept = jnp.log(jnp.maximum(zero_frac, smallest)) / jnp.log(jnp.asarray(max(momentum, 1e-30), zero_frac.dtype))
    return jnp.where(zero_frac == 1, 0, jnp.maximum(jnp.round(kept), 1)).astype(int)
