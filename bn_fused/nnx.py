"""`BatchNorm` in place of `flax.nnx.BatchNorm`. It needs flax: the extra `flax`."""

import inspect

import jax
import jax.numpy as jnp

try:
    from flax import nnx
    from flax.nnx.nn.dtypes import canonicalize_dtype
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('bn_fused.nnx needs flax: pip install "bn_fused[flax]"', name=error.name) from error

from bn_fused import arguments, flax_common


class BatchNorm(nnx.BatchNorm):
    """`flax.nnx.BatchNorm` computed by `bn_fused.batch_norm`: its arguments, defaults, variables and dtypes.

    `mean`, `var`, `scale` and `bias` are flax's, in shape, dtype and meaning, and inference with the same values gives
    the same numbers, to rounding; docs/flax.md has what differs. Beside them the layer has two scalars of type
    `nnx.BatchStat`: `zero_frac`, the share of the running averages that is still their start (1 in a new layer; `mean`
    and `var` are stored after it was divided out); and `count`, the steps of the warm-up of the approach "ema". Moments
    from a checkpoint that lacks them, put into a new layer (`nnx.update`), count as trained. `__init__` lists the
    arguments.
    """

    def __init__(
        self,
        num_features: int,
        *,
        approach: str = "batch",
        warmup_period: int = 1,
        activation: str | None = None,
        debias: str = "none",
        virtual_batch_size: int | None = None,
        backend: str = "auto",
        **flax_arguments,
    ):
        """Make the layer.

        **Arguments:**

        - `num_features`, and by keyword every other argument of `flax.nnx.BatchNorm`, with its default: `rngs`,
            `use_running_average`, `axis` (one axis), `momentum`, `epsilon`, `dtype`, `param_dtype`, `use_bias`,
            `use_scale`, `bias_init`, `scale_init`, `axis_name`, `axis_index_groups`, `use_fast_variance` (which changes
            nothing: one pass is exact here), `promote_dtype` (of x, scale and bias; moments are not rounded),
            `bias_metadata`, `scale_metadata`.
        - `approach`, `warmup_period`, `activation`, `virtual_batch_size`, `backend`: as `bn_fused.BatchNorm` has them.
        - `debias`: likewise; "none" is flax's biased variance, "samples" PyTorch's unbiased one.

        **Raises:**

        ValueError or TypeError that names the argument, its value and what is accepted.
        """
        super().__init__(num_features, **flax_arguments)
        self.approach = approach
        self.warmup_period = warmup_period
        self.activation = activation
        self.debias = debias
        self.virtual_batch_size = virtual_batch_size
        self.backend = backend
        flax_common.check(self)
        self.zero_frac = nnx.BatchStat(jnp.ones((), jnp.float32))
        self.count = nnx.BatchStat(jnp.zeros((), jnp.float32))

    @jax.named_scope("bn_fused.nnx.BatchNorm")
    def __call__(self, x, use_running_average: bool | None = None, *, mask=None, residual=None):
        """Normalise a batch; in training, update the statistics too.

        **Arguments:**

        - `x`: the batch, with its features on `axis`; real, integers are promoted as flax does.
        - `use_running_average`: whether to infer; None is the layer's own.
        - `mask`: None, or an array that broadcasts to x with size 1 on `axis`: which positions count.
        - `residual`: None, or of x's shape; added before the activation.

        **Returns:**

        y, of x's shape and of the dtype that flax gives it.

        **Raises:**

        ValueError or TypeError that names the argument, its value and what is accepted.
        """
        inference = nnx.module.first_from(
            use_running_average,
            self.use_running_average,
            error_msg="use_running_average is None in the layer and in its call; accepted are True (to infer) and "
            "False (to train), in one of them",
        )
        x = arguments.as_array("x", x)
        if jnp.iscomplexobj(x):
            arguments.check_floating("x", x)  # before scale and bias are promoted to its dtype
        scale, bias = (None if value is None else value[...] for value in (self.scale, self.bias))
        stored = flax_common.Stored(self.mean[...], self.var[...], self.zero_frac[...], self.count[...])
        x, _, _, scale, bias = self.promote_dtype((x, stored.mean, stored.var, scale, bias), dtype=self.dtype)
        dtype = canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        if inference:
            return flax_common.infer(self, stored, x, scale, bias, residual=residual, mask=mask).astype(dtype)
        y, new = flax_common.train(self, stored, x, scale, bias, residual=residual, mask=mask)
        for name, value in new._asdict().items():
            variable = getattr(self, name)
            # As flax does: what is a reference takes no tangents.
            value = jax.lax.stop_gradient(value) if variable._can_update else value
            variable[...] = value.astype(variable[...].dtype)
        return y.astype(dtype)


def _with_flaxs_arguments(init):
    """The signature of `__init__` with flax's keywords, which it passes on, by name: for `help` and `inspect`."""
    own = list(inspect.signature(init).parameters.values())
    flaxs = inspect.signature(nnx.BatchNorm.__init__).parameters.values()
    passed_on = [parameter for parameter in flaxs if parameter.kind == parameter.KEYWORD_ONLY]
    return inspect.Signature([*own[:-1], *passed_on])  # without `**flax_arguments`


BatchNorm.__init__.__signature__ = _with_flaxs_arguments(BatchNorm.__init__)
