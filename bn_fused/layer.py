"""`BatchNorm`: the Equinox layer."""

from collections.abc import Hashable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from bn_fused import arguments
from bn_fused.approaches import APPROACHES
from bn_fused.running_stats import RunningStats, check_stats
from bn_fused.step import Call, infer, train

MODES = {"ema": "ema_compatibility", "batch": "batch"}  # of equinox.nn.BatchNorm, and the approach that each is


class _NotGiven(str):
    """A default that says what it stands for, and is told from the same value when that is given."""


_DEBIAS = _NotGiven("samples")


class BatchNorm(eqx.nn.StatefulLayer):
    r"""Normalises each channel over the batch and the spatial dimensions.

    Keeps running statistics for inference, and applies an affine map, an optional residual and an optional activation
    in the same pass.

    Given an example $x$ of shape `(C, *spatial)` inside a `jax.vmap` (or `jax.pmap`, `jax.shard_map`) whose axis has
    the name `axis_name`, the layer computes for each channel $c$

    $$y_c = \text{activation}\left(\frac{x_c - \mu^{\text{norm}}_c}{\sqrt{v^{\text{norm}}_c + \varepsilon}} \gamma_c
    + \beta_c + \text{residual}_c\right)$$

    with $\gamma$ (`weight`) and $\beta$ (`bias`) of shape `(C,)`, or 1 and 0 where the layer has none.

    **Training.** Let $\mu$ and $v$ be the mean and the biased variance of the channel over all positions of the whole
    batch, $m$ the momentum, $\hat\mu$ and $\hat v$ the running statistics, which start at zero, and $z$ (`zero_frac`),
    which starts at one, the share of them that is still that zero. Each step gives, for the approaches

    - `"batch"`:
      $\mu^{\text{norm}} = \mu$, $v^{\text{norm}} = v$;
      $\hat\mu' = (1-m)\mu + m\hat\mu$, $\hat v' = (1-m) k v + m\hat v$, $z' = zm$.
      What Ioffe & Szegedy describe, PyTorch and Flax do. Take it unless the batches are small. $k$ makes the variance
      unbiased, see `debias`.
    - `"ema"`:
      $\hat\mu' = (1-m)\mu + m\hat\mu$, $\hat v' = (1-m)v + m\hat v$, $z' = zm$;
      $\mu^{\text{norm}} = (1-f)\mu + f(z'\mu + \hat\mu')$ and $v^{\text{norm}}$ alike, with $f = c'/P$, where
      the counter $c' = \min(c+1, P)$ runs up to the `warmup_period` $P$.
      Training moves from batch to running statistics, so that training and inference normalise alike in the end:
      for small batches, and for what is fine-tuned or run with statistics from elsewhere.
    - `"ema_compatibility"`:
      $\hat\mu' = \mu$ in the first step, then $(1-m)\mu + m\hat\mu$, $\hat v'$ alike;
      $\mu^{\text{norm}} = \hat\mu'$, $v^{\text{norm}} = \hat v'$; $z' = 0$.
      What `equinox.nn.BatchNorm(mode="ema")` computes, to the bit with `backend="reference"`. To continue what was
      trained with it. New training is unstable: from the second step on, the normalisation hardly follows the
      activations.

    **Inference**, every approach: $\mu^{\text{norm}} = \hat\mu/(1-z)$, $v^{\text{norm}} = \hat v/(1-z)$; so the
    statistics are right from the first step on, without the bias of their start. Before any training ($z = 1$), mean 0
    and variance 1. What float32 leaves, from a rounding in each step, is a relative error of the statistics of at most
    $2^{-23}/(1-m)$: 1.2e-5 for a momentum of .99, 1.2e-3 for .9999.

    **How to choose `warmup_period`.** There is no good universal default. It should cover the time in which the
    distribution of the layer's input moves quickly, in steps; too short a warm-up normalises with statistics that lag
    behind the weights. A small convolutional network (six convolutions of width 16, scikit-learn's digits, SGD with
    momentum 0.9 at learning rate 0.3, 300 steps) trains with periods of 1, 100 and 1000 as with "batch": the median
    loss of the last 50 steps lies between .02 and .25, depending on seed and processor. With "ema_compatibility" it
    stays above 1. Until the warm-up has ended, training says nothing about the running statistics, with which
    inference normalises: after those 300 steps they still lag the weights, the more so with a period of 1000. `python
    -m bn_fused.bench.digits` repeats that.

    !!! example

        ```python
        layer, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(64, axis_name="batch", approach="batch")
        y, state = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
        layer = eqx.nn.inference_mode(layer)
        y, state = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
        ```

    The statistics are computed in float32 (float64 for float64 inputs), whatever the input's dtype; `y` has x's dtype.

    `get_stats(state)` and `set_stats(state, stats)` read and write what the state holds of the layer. The average of
    several states (a teacher) is that of their floating arrays, with the counters of one; see `RunningStats`.

    The settings are static: neither `equinox.tree_at` nor `dataclasses.replace` changes one, `bn_fused.with_settings`
    does, in a layer and in a whole model.

    ??? cite

        [Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
        Shift](https://arxiv.org/abs/1502.03167)

        ```bibtex
        @inproceedings{ioffe2015batch,
            author = {Ioffe, Sergey and Szegedy, Christian},
            title = {Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift},
            booktitle = {Proceedings of the 32nd International Conference on Machine Learning},
            pages = {448--456},
            year = {2015},
            eprint = {1502.03167},
            eprinttype = {arXiv},
        }
        ```
    """

    weight: Float[Array, "input_size"] | None
    bias: Float[Array, "input_size"] | None
    count_index: eqx.nn.StateIndex[Int[Array, ""]]
    state_index: eqx.nn.StateIndex[tuple[Float[Array, "input_size"], Float[Array, "input_size"]]]
    zero_frac_index: eqx.nn.StateIndex[Float[Array, ""]]
    inference: bool
    axis_name: Hashable | Sequence[Hashable] = eqx.field(static=True)
    input_size: int = eqx.field(static=True)
    approach: str = eqx.field(static=True)
    eps: float = eqx.field(static=True)
    channelwise_affine: bool = eqx.field(static=True)
    momentum: float = eqx.field(static=True)
    warmup_period: int = eqx.field(static=True)
    activation: str | None = eqx.field(static=True)
    debias: str = eqx.field(static=True)
    virtual_batch_size: int | None = eqx.field(static=True)
    axis_index_groups: tuple[tuple[int, ...], ...] | None = eqx.field(static=True)
    backend: str = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        axis_name: Hashable | Sequence[Hashable] | None,
        approach: str | None = None,
        eps: float = 1e-5,
        channelwise_affine: bool = True,
        momentum: float = 0.99,
        warmup_period: int = 1,
        inference: bool = False,
        dtype=None,
        *,
        activation: str | None = None,
        debias: str = _DEBIAS,
        virtual_batch_size: int | None = None,
        axis_index_groups: Sequence[Sequence[int]] | None = None,
        backend: str = "auto",
        mode: str | None = None,
        use_weight: bool | None = None,
        use_bias: bool | None = None,
        initial_weight: float = 1.0,
    ):
        """Make the layer; `equinox.nn.make_with_state` makes its state with it.

        **Arguments:**

        - `input_size`: the number of channels C.
        - `axis_name`: the name of the batch axis, as given to `jax.vmap`, `jax.pmap` or a mesh; a sequence of names to
            average over several. None is allowed for inference only.
        - `approach`: "batch", "ema" or "ema_compatibility", see above. None warns and means "ema_compatibility".
        - `eps`: added to the variance; above 0.
        - `channelwise_affine`: whether there are a weight and a bias per channel, where `use_weight` and `use_bias`
            do not say otherwise. As an attribute of the layer: whether it was made with either of them.
        - `momentum`: weight of the old running statistics in the new: a number from 0 (the last batch alone) to 1,
            without 1; PyTorch's is 1 minus this one. `bn_fused.batch_norm` takes a traced one (a schedule) too.
        - `warmup_period`: steps over which "ema" moves from batch to running statistics; 1 or more.
        - `inference`: normalise with the running statistics and leave them as they are. `equinox.nn.inference_mode`
            toggles it.
        - `dtype`: of the running statistics, float32 or float64; None is JAX's default. 16-bit floats are refused: an
            update of 1 % is lost in their rounding.
        - `activation`: None, "relu", "silu", "gelu" (tanh form) or "leaky_relu" (slope 0.01).
        - `debias`: the factor $k$ on the variance that "batch" keeps. "samples" (the default): n/(n-1), n the number of
            positions of the channel, 1 where n is 1, as in the paper and in PyTorch. "axis": n/max(n-1, eps), n the
            number of examples, the formula with which the three approaches were proposed for Equinox; the same number
            for inputs without spatial axes, and far from unbiased with few examples and large maps: two examples of
            56×56 double the running variance. One example leaves it as it is, and warns. "none": 1, as in Flax.
        - `virtual_batch_size`: None, or a divisor of the batch: that many consecutive examples share their statistics,
            and the running statistics move by the mean over these virtual batches.
        - `axis_index_groups`: None, or groups of indices along the one axis of devices in `axis_name`, of the same
            size, as [[0, 1], [2, 3]]: each group of devices has statistics of its own, the running ones too. JAX sums
            over groups under `pmap` and in `shard_map(..., check_vma=False)` only.
        - `backend`: "auto" or a name of `bn_fused.kernels.backend_names()`. `bn_fused.explain` says what "auto" takes.
        - `mode`: `equinox.nn.BatchNorm`'s spelling of `approach`: "ema" is `approach="ema_compatibility"`, "batch" is
            `approach="batch"`, with `debias="none"` where `debias` is not given. Give one of `mode` and `approach`.
        - `use_weight`, `use_bias`: whether there is a weight, and a bias; None is what `channelwise_affine` says. So
            `use_bias=False` makes a layer with a weight alone, and `channelwise_affine=False, use_bias=True` one with a
            bias alone.
        - `initial_weight`: what the weight is in all channels before any training. 0 for the last norm of a residual
            block, which then starts as the identity.

        **Raises:**

        ValueError or TypeError that names the argument, its value and what is accepted.
        """
        arguments.check_positive_integer("input_size", input_size)
        approach, debias = _approach_and_debias(approach, mode, debias)
        arguments.check_boolean("channelwise_affine", channelwise_affine)
        use_weight = arguments.as_boolean_or("use_weight", use_weight, channelwise_affine)
        use_bias = arguments.as_boolean_or("use_bias", use_bias, channelwise_affine)
        arguments.check_initial_weight(initial_weight, use_weight)
        arguments.check_boolean("inference", inference)
        settings = arguments.Settings(approach, eps, warmup_period, activation, debias, virtual_batch_size, backend)
        arguments.as_axis_names(axis_name)  # raises; what is stored is the user's own form of it
        dtype = arguments.as_state_dtype(dtype)
        arguments.check_real("momentum", momentum)
        momentum = arguments.as_momentum(momentum)
        arguments.check_momentum_in(dtype, momentum)

        parameters = jnp.zeros((), float).dtype
        self.weight = jnp.full((input_size,), initial_weight, parameters) if use_weight else None
        self.bias = jnp.zeros((input_size,), parameters) if use_bias else None
        initial = RunningStats.init(input_size, dtype)
        self.count_index = eqx.nn.StateIndex(initial.count)
        self.state_index = eqx.nn.StateIndex((initial.mean, initial.var))
        self.zero_frac_index = eqx.nn.StateIndex(initial.zero_frac)
        self.inference = inference
        self.axis_name = tuple(axis_name) if isinstance(axis_name, list) else axis_name
        self.input_size = input_size
        self.channelwise_affine = bool(use_weight or use_bias)
        self.approach = settings.approach
        self.eps = settings.eps
        self.momentum = momentum
        self.warmup_period = settings.warmup_period
        self.activation = settings.activation
        self.debias = settings.debias
        self.virtual_batch_size = settings.virtual_batch_size
        self.axis_index_groups = arguments.as_device_groups(axis_index_groups)
        self.backend = settings.backend

    @jax.named_scope("bn_fused.BatchNorm")
    def __call__(
        self,
        x: Float[Array, "input_size *spatial"],
        state: eqx.nn.State,
        *,
        residual: Float[Array, "input_size *spatial"] | None = None,
        mask: Bool[Array, "..."] | None = None,
        key: PRNGKeyArray | None = None,
        inference: bool | None = None,
    ) -> tuple[Array, eqx.nn.State]:
        """Normalise one example, with the statistics of the whole batch in training and the running ones at inference.

        **Arguments:**

        - `x`: one example, shape `(input_size, *spatial)`, float32, bfloat16, float16 or float64.
        - `state`: the `equinox.nn.State` that holds the running statistics.
        - `residual`: None, or x's shape and dtype; added before the activation.
        - `mask`: None, or bool of shape `spatial` (shape `()` without spatial axes) or broadcastable to it: which
            positions count in the statistics. Every position is normalised. If none counts in the whole batch, the
            state stays as it is and the running statistics normalise. What x and residual hold where it is False, NaN
            too, reaches no statistics, and no gradient if the loss does not use y there (select with `jnp.where`: the
            gradient of y is then zero); for the gradients' sake it is taken at inference too.
        - `key`: ignored; for compatibility with Equinox.
        - `inference`: overrides `self.inference` if it is not None.

        **Returns:**

        `y`, with x's shape and dtype, and the new state (at inference, the same).

        **Raises:**

        NameError outside of a `vmap` or mesh with the layer's `axis_name`; ValueError or TypeError that names the
        argument, its value and what is accepted; `bn_fused.BackendError`, when it is compiled, for a named backend that
        cannot run there. `state` remains valid after any error.
        """
        del key
        inference = self.inference if inference is None else inference
        arguments.check_boolean("inference", inference)
        x = arguments.as_array("x", x)
        if x.ndim < 1:
            raise ValueError(f"x has shape {x.shape}; it needs the channels' axis, of size {self.input_size}")
        expected = f"input_size is {self.input_size}, and x is one example, without the batch's axis"
        arguments.check_input(x, self.input_size, 0, expected, inference)
        residual = arguments.as_residual(residual, x)
        mask = arguments.as_mask(mask, x, 0)
        if self.axis_name is None and not inference:
            raise ValueError(
                "axis_name is None, with which the layer can only infer; for training it must name the batch axis"
            )
        settings = arguments.Settings(
            self.approach,
            self.eps,
            self.warmup_period,
            self.activation,
            self.debias,
            self.virtual_batch_size,
            self.backend,
        )
        call = Call(settings, 0, arguments.as_axis_names(self.axis_name), self.axis_index_groups)
        stats = self.get_stats(state)
        for name in ("weight", "bias"):  # `equinox.tree_at` puts in anything
            arguments.as_parameter(name, getattr(self, name), (self.input_size,), f"input_size is {self.input_size}")
        if inference:
            return infer(call, x, stats, self.weight, self.bias, residual, mask), state
        arguments.check_bound(call.axis_names, one_example=True)
        return self._train(call, x, stats, residual, mask, state)

    def _train(self, call, x, stats, residual, mask, state):
        """y and the state after a training step from these statistics; `bn_fused.recalibrate` has its own."""
        y, new = train(call, self.momentum, x, stats, self.weight, self.bias, residual, mask)
        arguments.check_same_on_devices(new, stats)
        return y, self._store(state, new)

    def get_stats(self, state: eqx.nn.State) -> RunningStats:
        """The layer's running statistics in a state; their `moments()` are what inference normalises with.

        ValueError or TypeError for a state that does not hold them.
        """
        mean, var = arguments.held(state, self.state_index)
        stats = RunningStats(mean, var, state.get(self.zero_frac_index), state.get(self.count_index))
        arguments.check_no_ensemble(mean)
        if mean.shape != (self.input_size,) or var.shape != mean.shape:
            raise ValueError(
                f"state holds running statistics of shapes {mean.shape} and {var.shape}, those of another layer; "
                f"accepted are {(self.input_size,)}, as input_size is {self.input_size}"
            )
        stats = arguments.as_stats(stats, "state")
        arguments.check_zero_start("state", stats)
        return stats

    def set_stats(self, state: eqx.nn.State, stats: RunningStats) -> eqx.nn.State:
        """A state that holds these running statistics for the layer, in its own dtype.

        `RunningStats.of(mean, var)` are those of another library. ValueError or TypeError unless they fit the layer,
        and for a state that does not hold its own.
        """
        check_stats(stats)
        arguments.check_no_ensemble(arguments.held(state, self.state_index)[0])
        stats = arguments.as_stats(stats)
        if stats.mean.shape != (self.input_size,):
            raise ValueError(f"stats has {stats.mean.shape[0]} channels; input_size is {self.input_size}")
        arguments.check_zero_start("stats", stats)
        return self._store(state, stats)

    def _store(self, state, stats):
        places = (self.state_index, self.zero_frac_index, self.count_index)
        for place, new in zip(places, ((stats.mean, stats.var), stats.zero_frac, stats.count), strict=True):
            state = state.set(
                place, jax.tree.map(lambda value, old: value.astype(jnp.asarray(old).dtype), new, state.get(place))
            )
        return state


def _approach_and_debias(approach, mode, debias):
    """The approach and debias that are meant, from both spellings of the approach."""
    if mode is not None:
        if approach is not None:
            raise ValueError(f"mode is {mode!r} and approach is {approach!r}: give one of them")
        arguments.check_one_of("mode", mode, MODES)
        approach = MODES[mode]
        debias = "none" if debias is _DEBIAS else debias
    if not isinstance(approach, (str, type(None))):
        raise TypeError(
            f"approach is {approach!r}; accepted are {', '.join(map(repr, APPROACHES))}. Where equinox.nn.BatchNorm "
            "has eps in this place: give the settings by keyword"
        )
    if approach is None:
        arguments.warn(
            'approach is not given, and "ema_compatibility" is used, as equinox.nn.BatchNorm does by default. It '
            'trains unstably: approach="batch" or approach="ema" is better for new code.'
        )
        approach = "ema_compatibility"
    return approach, str(debias) if debias is _DEBIAS else debias
