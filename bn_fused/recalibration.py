"""`recalibrate`: running statistics that are the exact average over batches."""

import dataclasses
import functools
import types
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from bn_fused.arguments import check_same_on_devices, held
from bn_fused.kernels.contract import widest
from bn_fused.kernels.jax_internals import is_traced
from bn_fused.layer import BatchNorm
from bn_fused.models import layers_of, renewed, replaced, with_fields
from bn_fused.running_stats import RunningStats
from bn_fused.step import count_positions, train


def recalibrate(model, state, batches, run):
    """A state whose running statistics are the mean and the variance over all positions of all batches.

    For weights that were averaged, pruned or quantised after training, and wherever the moving average is too noisy or
    lags behind: "precise BatchNorm" (Wu & Johnson, "Rethinking 'Batch' in BatchNorm", 2021), PyTorch's
    `torch.optim.swa_utils.update_bn`. With a function `forward` as a training step has one, that is

    ```python
    state = bn_fused.recalibrate(model, state, batches, eqx.filter_jit(forward))
    ```

    where, for instance,

    ```python
    def forward(model, state, images):
        return jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(images, state)
    ```

    While it runs, each layer normalises with its batch's own moments, whatever its approach, so the batches should be
    as large as in training; it records how many of the positions counted, and their moments. Batches are merged in
    float64 by Chan's formula, so that unequal ones, masks, layers that a batch reaches not at all or several times, and
    devices that share their statistics are weighted exactly. The variance is that of all positions, divided by their
    number (no `debias`), virtual batches and groups of devices or not.

    **Arguments:**

    - `model`, `state`: as `equinox.nn.make_with_state` made them and as they were trained since; an ensemble too.
        Layers under `inference`, and those that no batch reaches, keep their statistics.
    - `batches`: anything to iterate over, read once.
    - `run`: a function of model, state and one batch that calls the model as in training and returns the new state,
        alone or among other things (as in `(logits, state)`). It gets a model with layers that record and must use that
        one. Compile it (`equinox.filter_jit`), without donating its arguments; `jax.shard_map` and the like belong in
        it.

    **Returns:**

    The new state. Nothing else of it changes: neither the steps of a warm-up nor the state of other layers. The given
    one remains valid.

    **Raises:**

    ValueError if there are no batches, no layer in the model, or none that recorded; TypeError if `run` is no function
    or returns no state, if `batches` is nothing to iterate over, and inside of `jax.jit` and other transforms.
    """
    if not callable(run):
        raise TypeError(
            f"run is a {type(run).__name__}; accepted is a function of model, state and a batch, the last argument of "
            "recalibrate(model, state, batches, run)"
        )
    try:
        batches = iter(batches)
    except TypeError:
        raise TypeError(f"batches is a {type(batches).__name__}; accepted is anything to iterate over") from None
    layers = layers_of(model).values()
    _check_not_traced("model and state", (model, state))
    if all(layer.inference is True for layer in layers):
        raise ValueError(
            "model has no bn_fused.BatchNorm that trains; equinox.nn.inference_mode(model, value=False) has all of them"
            " train"
        )
    recording, start = replaced(model, state, BatchNorm, lambda path, layer: _recording(path, layer, state))
    places = [layer.record_index for layer in layers_of(recording).values()]
    totals = latest = None
    for batch in batches:
        records = _records_in(run(recording, _clone(start), batch), places)
        # Read one batch later: the next one is loaded while the device computes.
        totals, latest = _added(totals, latest), records
    totals = _added(totals, latest)
    if totals is None:
        raise ValueError("batches is empty: there is nothing to average over")
    if not any(total.count.any() for total in totals):
        raise ValueError(
            "no layer recorded anything: run must call the model that it is given, in training, and return the state "
            "that this gives"
        )
    state = _clone(state)
    for layer, total in zip(layers, totals, strict=True):
        for index, new in ((layer.state_index, (total.mean, total.var)), (layer.zero_frac_index, 0.0)):
            old = state.get(index)
            state = state.set(index, jax.tree.map(functools.partial(_where_seen, total.count), new, old))
    return state


class Record(NamedTuple):
    """The moments of the positions that counted so far: `count` [*members], `mean` and `var` [*members, channels]."""

    count: jax.Array
    mean: jax.Array
    var: jax.Array

    def merged(self, other):
        """The record of both, by Chan's formula; of JAX's arrays or NumPy's."""
        count = self.count + other.count
        share = (other.count / count.clip(min=1))[..., None]
        change = other.mean - self.mean
        var = (1 - share) * self.var + share * (other.var + (1 - share) * change * change)
        return Record(count, self.mean + share * change, var)


class _Records(eqx.Module):
    """What a layer is besides, while it records: a training step with momentum 0, which leaves its state as it is."""

    record_index: eqx.nn.StateIndex

    def _train(self, call, x, stats, residual, mask, state):
        # The batch's moments come in the dtype of the statistics, which was cast to 16 bits or is less than x's.
        dtype = widest(x.dtype, stats.mean.dtype)
        old = RunningStats(*(value.astype(dtype) for value in stats[:3]), stats.count)
        settings = dataclasses.replace(call.settings, debias="none")  # a momentum of 0 makes all approaches one
        shared = dataclasses.replace(settings, virtual_batch_size=None)
        whole = dataclasses.replace(call, settings=shared, device_groups=None)

        def step(call):
            return train(call, 0.0, x, old, self.weight, self.bias, residual, mask)

        y, new = step(whole)
        check_same_on_devices(new, stats)
        if (settings, call.device_groups) != (shared, None):
            y, _ = step(dataclasses.replace(call, settings=settings))
        record, count = state.get(self.record_index), count_positions(whole, x, mask, dtype)
        # Where nothing counts, the statistics are the old ones.
        moments = (jnp.where(count > 0, value, jnp.zeros_like(value)) for value in (new.mean, new.var))
        record = record.merged(Record(*(value.astype(record.count.dtype) for value in (count, *moments))))
        return y, state.set(self.record_index, record)


@functools.cache
def _recording_class(cls):
    """A class's own subclass that records: one per class, so that a function is compiled once for it."""
    return types.new_class(cls.__name__, (_Records, cls))


def _recording(path, layer, state):
    """The layer as one that records, with an empty record as its start."""
    mean, zero_frac = held(state, layer.state_index, path or "this layer")[0], state.get(layer.zero_frac_index)
    dtype = widest(jnp.zeros((), float).dtype, mean.dtype)
    empty = (_placed(np.zeros(like.shape, dtype), like) for like in (zero_frac, mean, mean))
    layer = renewed(layer, state)
    return with_fields(layer, {"record_index": eqx.nn.StateIndex(Record(*empty))}, _recording_class(type(layer)))


def _records_in(result, places):
    """What is at these places of the state in what `run` returned."""
    leaves = jax.tree.leaves(result, is_leaf=lambda node: isinstance(node, eqx.nn.State))
    states = [leaf for leaf in leaves if isinstance(leaf, eqx.nn.State)]
    if len(states) != 1:
        raise TypeError(
            f"run returned {len(states)} of equinox.nn.State in a {type(result).__name__}; accepted is one, the state "
            "that the model left, alone or in a tuple"
        )
    try:
        records = [states[0].get(place) for place in places]
    except KeyError:
        raise ValueError("run returned another state than the one that it was given, as the model left it") from None
    _check_not_traced("batches", records)
    return records


def _check_not_traced(name, values):
    """TypeError for what a transform traces: batches are merged on the host."""
    if any(map(is_traced, jax.tree.leaves(values))):
        raise TypeError(
            f"{name} are traced, by jax.jit or another transform around recalibrate, which merges batches outside of "
            "JAX; accepted are arrays: call it outside, and compile run"
        )


def _added(totals, records):
    """The records of all batches so far, in float64, and one more."""
    if records is None:
        return totals
    records = [Record(*(np.asarray(value, np.float64) for value in record)) for record in jax.device_get(records)]
    return records if totals is None else [old.merged(new) for old, new in zip(totals, records, strict=True)]


def _where_seen(count, new, old):
    seen = count > 0
    return _placed(np.where(seen.reshape(seen.shape + (1,) * (old.ndim - seen.ndim)), new, old), old)


def _placed(value, like):
    """A NumPy array as JAX's, in the dtype and on the devices of another one, if these were chosen."""
    return jax.device_put(value.astype(like.dtype), like.sharding if getattr(like, "committed", False) else None)


def _clone(state):
    """A State may be used once; this leaves the given one for another use."""
    return jax.tree.map(lambda value: value, state)
