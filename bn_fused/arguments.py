"""What users give, checked before anything is computed: `check_*` raises, `as_*` raises or converts.

An error names the argument, its value and what is accepted.
"""

import math
import numbers
import reprlib
import sys
import warnings
from collections.abc import Hashable
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from bn_fused.approaches import APPROACHES, DEBIAS
from bn_fused.kernels.activations import ACTIVATIONS
from bn_fused.kernels.jax_internals import axis_size, device_axis_names, is_traced, varying_axes
from bn_fused.kernels.registry import check_backend_name
from bn_fused.kernels.target import FLOATING

LOW_PRECISION = ("bfloat16", "float16")
_PACKAGES = (__package__, "equinox", "jax")  # whose lines a warning does not point at
STATE_DTYPES = ("float32", "float64")
OURS = (
    "layer, state = equinox.nn.make_with_state(bn_fused.BatchNorm)(...), or the same of the model that contains it; "
    "what was trained with equinox.nn.BatchNorm comes by bn_fused.from_equinox(model, state)"
)
EQUINOXS = "model, state = equinox.nn.make_with_state(...)(...), and go on with what training makes of this state"


@dataclass(frozen=True)
class Settings:
    """The static settings of a BatchNorm, checked when they are made; `bn_fused.BatchNorm` describes each.

    ValueError or TypeError for one that is not accepted. The momentum, which may be traced, is not among them.
    """

    approach: str = "batch"
    eps: float = 1e-5
    warmup_period: int = 1
    activation: str | None = None
    debias: str = "samples"
    virtual_batch_size: int | None = None
    backend: str = "auto"

    def __post_init__(self):
        check_one_of("approach", self.approach, APPROACHES)
        check_one_of("debias", self.debias, DEBIAS)
        check_one_of("activation", self.activation, (None, *ACTIVATIONS))
        check_backend_name(self.backend)
        check_eps("eps", self.eps)
        check_positive_integer("warmup_period", self.warmup_period)
        if self.virtual_batch_size is not None:
            check_positive_integer("virtual_batch_size", self.virtual_batch_size)


def check_one_of(name, value, accepted):
    """ValueError unless the value is one of the accepted."""
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in accepted):
        raise ValueError(f"{name} is {value!r}; accepted are {', '.join(map(repr, accepted))}")


def check_real(name, value):
    """TypeError unless the value is a real number known while tracing; NumPy's of a 16-bit type is one."""
    of_numpy = isinstance(value, np.generic) and jnp.issubdtype(value.dtype, jnp.floating)
    if isinstance(value, bool) or not (of_numpy or isinstance(value, numbers.Real)):
        raise TypeError(f"{name} is {value!r}; accepted is a Python number")


def held(state, index, whose="this layer", advice=OURS):
    """What a state holds at an `equinox.nn.StateIndex`; TypeError for no state, ValueError for that of others.

    The advice, `OURS` or `EQUINOXS`, ends the latter: how the state of such a layer is made.
    """
    if not isinstance(state, eqx.nn.State):
        given = state if state is None else f"a {type(state).__name__}"
        raise TypeError(
            f"state is {given}; accepted is the equinox.nn.State that equinox.nn.make_with_state gives with the layer"
        )
    try:
        return state.get(index)
    except KeyError:
        raise ValueError(f"state holds nothing of {whose}; make both together: {advice}") from None


def check_eps(name, value):
    """TypeError unless the value is a real number, ValueError unless it is finite and above 0."""
    check_real(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}; accepted is a finite number above 0")


def check_integer(name, value):
    """TypeError unless the value is an integer."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} is {value!r}; accepted is an integer")


def known(value):
    """An array's values as numpy; None where they are traced, or lie with other processes."""
    if is_traced(value) or not getattr(value, "is_fully_addressable", True):
        return None
    return np.asarray(jax.device_get(value))


def as_momentum(value):
    """A momentum as a Python float, or as the scalar array that it is, which may be traced.

    TypeError unless it is one of them, ValueError unless it is at least 0 and below 1, where it is known.
    """
    accepted = "a number from 0 (the last batch alone) to 1, without 1"
    if isinstance(value, (jax.Array, np.ndarray)):
        if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(
                f"momentum is {value.dtype}{list(value.shape)}; accepted is {accepted}, or a floating scalar"
            )
        number = known(value)
    else:
        check_real("momentum", value)
        number = value = float(value)
    if number is not None and not 0 <= number < 1:
        raise ValueError(f"momentum is {float(number)!r}; accepted is {accepted}")
    return value


def check_momentum_in(dtype, momentum):
    """ValueError where a momentum that is known rounds to 1 in the running statistics' dtype."""
    number = known(momentum)
    if number is not None and number.astype(dtype) == 1:
        raise ValueError(
            f"momentum is {float(number)!r}, which {dtype.name} rounds to 1: running statistics of that type would "
            f"never move; accepted are smaller ones, or statistics of a wider type ({', '.join(STATE_DTYPES)})"
        )


def check_boolean(name, value):
    """TypeError unless the value is True or False, known while tracing."""
    if isinstance(value, (bool, np.bool_)):
        return
    if isinstance(value, jax.Array) and value.shape == () and value.dtype == jnp.bool_:
        try:
            bool(value)
            return
        except jax.errors.TracerBoolConversionError:
            pass
    raise TypeError(f"{name} is {value!r}; accepted is True or False, known when it is traced")


def as_boolean_or(name, value, default):
    """A flag, or the default where it is None. TypeError unless it is one of these."""
    if value is None:
        return default
    check_boolean(name, value)
    return value


def check_initial_weight(value, use_weight):
    """TypeError or ValueError unless it is a finite number, and 1 where there is no weight."""
    check_real("initial_weight", value)
    if not math.isfinite(value):
        raise ValueError(f"initial_weight is {value!r}; accepted is a finite number")
    if value != 1 and not use_weight:
        raise ValueError(f"initial_weight is {value!r} and the layer has no weight: give use_weight=True with it")


def check_positive_integer(name, value):
    """TypeError unless the value is an integer, ValueError unless it is at least 1."""
    check_integer(name, value)
    if value < 1:
        raise ValueError(f"{name} is {value!r}; accepted is an integer, 1 or more")


def as_channel_axis(value, shape, name):
    """The channels' axis of a batch of this shape, counted from the front.

    TypeError unless it is an integer, ValueError unless the shape has it beside axis 0, the examples. `name` is what
    has the shape.
    """
    check_integer("channel_axis", value)
    if len(shape) < 2:
        raise ValueError(f"{name} has shape {shape!r}; it needs two axes at least, examples and channels")
    if not -len(shape) <= value < len(shape) or value % len(shape) == 0:
        raise ValueError(
            f"channel_axis is {value!r}; for {name} of shape {shape!r} accepted is any axis but 0, the examples"
        )
    return value % len(shape)


def as_state_dtype(dtype):
    """The state's dtype, float32 or float64; None is JAX's default float. ValueError for any other.

    16-bit floats are refused with the reason.
    """
    dtype = jnp.zeros((), float).dtype if dtype is None else jnp.dtype(dtype)
    if dtype.name in LOW_PRECISION:
        raise ValueError(
            f"dtype is {dtype.name}: running statistics in 16 bits do not move, because an update of 1 % is near or "
            f"below the type's epsilon; accepted are {', '.join(STATE_DTYPES)} (x itself may have 16 bits)"
        )
    if dtype.name not in STATE_DTYPES:
        raise ValueError(f"dtype is {dtype.name}; accepted are {', '.join(STATE_DTYPES)}")
    return dtype


def as_axis_names(axis_name):
    """axis_name (a name, a list or tuple of names, or None for none) as a tuple of names.

    TypeError for what is no name, ValueError for a name that stands in it twice.
    """
    if axis_name is None:
        return ()
    names = tuple(axis_name) if isinstance(axis_name, (list, tuple)) else (axis_name,)
    for name in names:
        # JAX's collectives take an integer for the position of an axis, not for its name.
        if not isinstance(name, Hashable) or name is None or isinstance(name, numbers.Number):
            raise TypeError(f"axis_name has the name {name!r}; accepted are hashable names other than None and numbers")
    if len(set(names)) != len(names):
        raise ValueError(f"axis_name is {axis_name!r}; a name may stand in it once")
    return names


def as_device_groups(value):
    """axis_index_groups as a tuple of tuples of integers, or None.

    TypeError unless it holds groups of integers, ValueError unless the groups are of one size and every index from 0
    on stands in them once.
    """
    if value is None:
        return None
    try:
        groups = tuple(tuple(group) for group in value)
    except TypeError:
        raise TypeError(f"axis_index_groups is {value!r}; accepted are None and lists of indices") from None
    indices = [index for group in groups for index in group]
    for index in indices:
        check_integer("an index in axis_index_groups", index)
    if not indices or len(set(map(len, groups))) != 1 or sorted(indices) != list(range(len(indices))):
        raise ValueError(
            f"axis_index_groups is {value!r}; accepted are groups of the same size in which each index of the axis "
            "stands once, as [[0, 1], [2, 3]]"
        )
    return tuple(tuple(int(index) for index in group) for group in groups)


def check_bound(names, one_example=None):
    """NameError for a name that no surrounding vmap, shard_map or pmap has.

    What to do is said for a caller that gets `one_example` (True) or a whole batch (False).
    """
    unbound = [name for name in names if not _is_bound(name)]
    if not unbound:
        return
    name, of_devices = unbound[0], device_axis_names()
    devices = ", ".join(map(repr, sorted(of_devices, key=str)))
    if one_example is None:
        advice = ""
    elif not one_example:
        advice = (
            ". axis_name is for axes around the call, a jax.vmap's or those of devices in jax.shard_map or jax.pmap; "
            "the examples of x need no name, and under plain jax.jit over sharded arrays nothing does"
        )
    elif set(names) - set(unbound) - of_devices:  # the batch's own axis is there
        advice = (
            ". An axis of devices is bound by jax.shard_map or jax.pmap around the jax.vmap; on one device, and under "
            "plain jax.jit over sharded arrays, leave it out: bn_fused.with_settings(model, axis_name=...)"
        )
    else:
        advice = (
            f". The layer is called on one example, as in jax.vmap(layer, axis_name={name!r}, in_axes=(0, None), "
            "out_axes=(0, None))(x, state)"
        )
    raise NameError(
        f"unbound axis name: {name!r}, which is in axis_name, is an axis of no surrounding vmap, shard_map or pmap"
        f"{f'; the axes of devices are {devices}' if devices else ''}{advice}"
    )


def _is_bound(name):
    try:
        axis_size(name)
    except NameError:
        return False
    return True


def check_input(x, channels, axis, expected, inference):
    """TypeError unless x is floating, ValueError unless it has so many channels on this axis.

    And unless there is something to average over, but at inference. `expected` ends the message about the channels:
    where their number comes from.
    """
    check_floating("x", x)
    if x.shape[axis] != channels:
        raise ValueError(f"x has shape {x.shape}, with {x.shape[axis]} channels on axis {axis}; {expected}")
    if 0 in x.shape and not inference:
        raise ValueError(
            f"x has shape {x.shape}: an axis is empty and there is nothing to average over. A padded batch whose mask "
            "is False everywhere leaves the statistics as they are"
        )


def as_stats(stats, holder="stats"):
    """A `RunningStats` of JAX arrays. TypeError or ValueError, which name the holder, unless its fields fit each other.

    That is: mean and var have shape [channels] and one floating dtype, which may have 16 bits; zero_frac is a floating
    scalar, count a scalar integer.
    """
    for name, value in stats._asdict().items():
        check_array(f"{holder}.{name}", value)
    stats = jax.tree.map(jnp.asarray, stats)
    mean, var = stats.mean, stats.var
    if mean.ndim != 1:
        raise ValueError(
            f"{holder}.mean has shape {mean.shape}; accepted is [channels], one value for each (of what pmap has "
            "stacked, the first: value[0])"
        )
    if (mean.shape, mean.dtype) != (var.shape, var.dtype):
        raise ValueError(
            f"{holder}.mean is {mean.dtype}{list(mean.shape)} and {holder}.var is {var.dtype}{list(var.shape)}; "
            "accepted are two of the same shape and dtype"
        )
    check_floating(f"{holder}.mean", mean)
    integer = "an integer scalar (the average of several states keeps the count of one)"
    for name, kind, accepted in (("zero_frac", jnp.floating, "a floating scalar"), ("count", jnp.integer, integer)):
        value = getattr(stats, name)
        if value.shape != () or not jnp.issubdtype(value.dtype, kind):
            raise ValueError(f"{holder}.{name} is {value.dtype}{list(value.shape)}; accepted is {accepted}")
    return stats


def check_zero_start(holder, stats):
    """ValueError where zero_frac says that the statistics are their zero start alone, and they are not zero.

    Where the values are known, that is. `holder` is what the message calls them.
    """
    if known(stats.zero_frac) != 1:
        return
    for field, value in (("mean", known(stats.mean)), ("var", known(stats.var))):
        if value is not None and (value != 0).any():
            raise ValueError(
                f"{holder} has zero_frac 1, by which nothing was trained yet, and a {field} that is not zero, which "
                "would be ignored: statistics from elsewhere are bn_fused.RunningStats.of(mean, var), whose zero_frac "
                "is 0 (a layer takes them by `layer.set_stats(state, stats)`); the average of several states has the "
                "average of their zero_frac, in a type that does not round it to 1"
            )


def check_same_on_devices(new, old):
    """ValueError if new running statistics differ between devices that share the old ones, or lie on another mesh."""
    mesh = jax.typeof(new.mean).sharding.mesh
    if jax.typeof(old.mean).sharding.mesh.empty and jax.sharding.AxisType.Explicit in mesh.axis_types:
        raise ValueError(
            "state does not lie on x's mesh, whose axes are explicit: put the layer and the state there, as in "
            "jax.device_put(arrays, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))"
        )
    apart = varying_axes(new.mean) - varying_axes(old.mean)
    if apart:
        names = ", ".join(sorted(map(repr, apart)))
        raise ValueError(
            f"axis_name lacks {names}: x differs over that axis of the mesh and the state does not; name it too, as in "
            f'axis_name=("batch", {names}), and all devices share their statistics'
        )


def check_floating(name, value):
    """TypeError unless the array has one of the floating dtypes."""
    dtype = jnp.dtype(value.dtype)
    if dtype.name in FLOATING:
        return
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"{name} has dtype {dtype.name}: complex input is not normalised; accepted are {', '.join(FLOATING)}"
        )
    raise TypeError(f"{name} has dtype {dtype.name}; accepted are {', '.join(FLOATING)}")


def check_dtype(name, value):
    """TypeError unless it is one of the floating dtypes."""
    if jnp.dtype(value).name not in FLOATING:
        raise TypeError(f"{name} is {jnp.dtype(value).name}; accepted are {', '.join(FLOATING)}")


def check_array(name, value):
    """TypeError unless the value is an array."""
    if not isinstance(value, (jax.Array, np.ndarray, np.generic)):
        raise TypeError(f"{name} is {value!r}; accepted is an array")


def as_array(name, value):
    """A JAX array of an array, or of a number or nested lists of them. TypeError for anything else."""
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} is {reprlib.repr(value)}; accepted is an array") from error


def check_no_ensemble(mean):
    """ValueError where what a state holds as a layer's running mean, [C], has axes before that."""
    if mean.ndim > 1:
        raise ValueError(
            f"state holds running statistics of shape {mean.shape}, with a leading axis: the layer is an ensemble. Use "
            "it under equinox.filter_vmap, as in equinox.filter_vmap(lambda layer, state: layer.get_stats(state))("
            "layer, state); of what pmap has stacked, take the first (value[0])"
        )


def as_parameter(name, value, shape, source):
    """A weight or bias as a JAX array; None for None. TypeError or ValueError unless it is floating, of this shape.

    `source` is what has that shape.
    """
    if value is None:
        return None
    check_array(name, value)
    check_floating(name, value)
    if value.shape != shape:
        raise ValueError(f"{name} has shape {value.shape}; accepted is {shape}, as {source}")
    return jnp.asarray(value)


def as_residual(residual, x):
    """A residual as a JAX array; None for None. TypeError or ValueError unless it has x's shape and dtype."""
    if residual is None:
        return None
    check_array("residual", residual)
    check_floating("residual", residual)
    residual = jnp.asarray(residual)
    if residual.shape != x.shape:
        raise ValueError(f"residual has shape {residual.shape}; it must have x's, {x.shape}")
    if residual.dtype != x.dtype:
        raise TypeError(f"residual has dtype {residual.dtype}; it must have x's, {x.dtype}")
    return residual


def as_mask(mask, x, axis):
    """A mask with x's rank: x's shape with one channel, bool. None for None.

    TypeError unless it is a bool array, ValueError unless it broadcasts to x's shape without the channel axis.
    """
    if mask is None:
        return None
    check_array("mask", mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(f"mask has dtype {mask.dtype}; accepted is bool, True where a position counts")
    positions = x.shape[:axis] + x.shape[axis + 1 :]
    try:
        fits = jnp.broadcast_shapes(mask.shape, positions) == positions
    except ValueError:
        fits = False
    if not fits:
        of_examples = ", as mask[:, None, None] of whole examples is" if mask.shape == positions[:1] else ""
        raise ValueError(
            f"mask has shape {mask.shape}; it must be x's shape without the channel axis, {positions}, or "
            f"broadcastable to it{of_examples}"
        )
    missing = (1,) * (len(positions) - mask.ndim)
    mask = jnp.broadcast_to(jnp.reshape(mask, (*missing, *mask.shape)), positions)
    return jnp.expand_dims(mask, axis)


def warn(message):
    """A UserWarning that points at the first line outside of this package, Equinox and JAX."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PACKAGES:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def warn_of_few_values(settings, positions, examples):
    """One warning where a training step has too little to estimate a variance from."""
    if positions == 1:
        warn("a single value per channel: its variance is 0, and the output does not depend on x")
    elif _counts_examples(settings) and examples == 1:
        warn(f"a batch of one example {_ONE_EXAMPLE}")


def warn_of_few_counted(settings, mask):
    """The same for a mask [examples, ...] of a whole batch, where its values are known."""
    counts = known(mask) if _counts_examples(settings) else None
    if counts is not None and counts.size:
        counted = counts.reshape(len(counts), -1).any(1)
        size = settings.virtual_batch_size or len(counted)
        if len(counted) % size == 0 and (counted.reshape(-1, size).sum(1) == 1).any():
            warn(f"a mask that lets one example count {_ONE_EXAMPLE}")


def _counts_examples(settings):
    return settings.approach == "batch" and settings.debias == "axis"


_ONE_EXAMPLE = (
    'with debias="axis": n/(n-1) of n examples has no value, and the step keeps the variance as it is; '
    'debias="samples" counts positions'
)


def warn_of_low_precision(dtype):
    """One warning where running statistics were cast to 16 bits after their construction."""
    if jnp.dtype(dtype).name in LOW_PRECISION:
        warn(
            f"the running statistics are {jnp.dtype(dtype).name}: the update is computed in float32 and rounded back, "
            "and small updates are lost; keep them in float32"
        )
