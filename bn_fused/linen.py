"""`BatchNorm` in place of `flax.linen.BatchNorm`. It needs flax: the extra `flax`."""

import jax.numpy as jnp

try:
    from flax import linen
    from flax.linen.dtypes import canonicalize_dtype
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('bn_fused.linen needs flax: pip install "bn_fused[flax]"', name=error.name) from error

from bn_fused import arguments, flax_common

COLLECTION = "batch_stats"


class BatchNorm(linen.BatchNorm):
    """`flax.linen.BatchNorm` computed by `bn_fused.batch_norm`: its arguments, defaults, variables and dtypes.

    The parameters `scale` and `bias` and the statistics `mean` and `var` are flax's, in name, shape, dtype and meaning,
    and inference with the same values gives the same numbers, to rounding; docs/flax.md has what differs. `init` puts
    two scalars beside the statistics: `zero_frac`, the share of the running averages that is still their start (1 in a
    new layer; `mean` and `var` are stored after it was divided out); and `count`, the steps of the warm-up of the
    approach "ema".
    Variables that lack them were trained: training goes on from them, and `zero_frac` stays away.

    **Attributes:**

    - those of `flax.linen.BatchNorm`, with its defaults. `axis` is one axis; `use_fast_variance` changes nothing: one
        pass is exact here; `force_float32_reductions=False` is refused.
    - `approach`, `warmup_period`, `activation`, `virtual_batch_size`, `backend`: as `bn_fused.BatchNorm` has them.
    - `debias`: likewise; "none" is flax's biased variance, "samples" PyTorch's unbiased one.

    A call raises ValueError or TypeError that names the attribute, its value and what is accepted.
    """

    approach: str = "batch"
    warmup_period: int = 1
    activation: str | None = None
    debias: str = "none"
    virtual_batch_size: int | None = None
    backend: str = "auto"

    @linen.compact
    def __call__(self, x, use_running_average: bool | None = None, *, mask=None, residual=None):
        """Normalise a batch; in training, update the statistics too, but not while the module is initialised.

        **Arguments:**

        - `x`: the batch, with its features on `axis`; real, integers are promoted as flax does.
        - `use_running_average`: whether to infer; give it here or to the constructor.
        - `mask`: None, or an array that broadcasts to x with size 1 on `axis`: which positions count.
        - `residual`: None, or of x's shape; added before the activation.

        **Returns:**

        y, of x's shape and of the dtype that flax gives it.

        **Raises:**

        ValueError or TypeError that names the argument, its value and what is accepted.
        """
        flax_common.check(self)
        if not self.force_float32_reductions:
            raise ValueError(
                "force_float32_reductions is False; accepted is True: statistics are computed and kept in float32"
            )
        inference = linen.merge_param("use_running_average", self.use_running_average, use_running_average)
        x = arguments.as_array("x", x)
        shape = (x.shape[flax_common.feature_axis(self.axis, x.shape)],)
        new_layer = self.is_initializing()

        def scalar(name, start, wanted):
            there = wanted or new_layer or self.has_variable(COLLECTION, name)
            return self.variable(COLLECTION, name, jnp.full, (), start, jnp.float32) if there else None

        variables = flax_common.Stored(
            self.variable(COLLECTION, "mean", jnp.zeros, shape, jnp.float32),
            self.variable(COLLECTION, "var", jnp.ones, shape, jnp.float32),
            scalar("zero_frac", 1, wanted=False),
            scalar("count", 0, wanted=self.approach == "ema" and not inference),
        )
        scale = self.param("scale", self.scale_init, shape, self.param_dtype) if self.use_scale else None
        bias = self.param("bias", self.bias_init, shape, self.param_dtype) if self.use_bias else None
        stored = flax_common.Stored(*(None if variable is None else variable.value for variable in variables))

        dtype = canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        # Not narrower than x, as flax computes: what is narrower is y alone.
        own = x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.float32
        x = x.astype(jnp.promote_types(own, dtype))
        if inference:
            return flax_common.infer(self, stored, x, scale, bias, residual=residual, mask=mask).astype(dtype)
        y, new = flax_common.train(
            self, stored, x, scale, bias, residual=residual, mask=mask, synchronised=not new_layer
        )
        if not new_layer:
            for variable, value in zip(variables, new, strict=True):
                if variable is not None:
                    variable.value = value.astype(jnp.asarray(variable.value).dtype)
        return y.astype(dtype)
