"""Derivatives that padding does not get into: what is masked may hold anything, and its product with zero is zero.

Backward everything is a product of a cotangent and of what it is the cotangent of. Where a mask leaves a position out
and a loss does not use it, the cotangent is zero; but x may be NaN there, and 0 * NaN would be in every sum. Putting
another x there is not the same: a masked position is normalised too, and where its cotangent is not zero, it counts.
So it is the product that knows: `product` is bilinear, with derivatives that are such products again, of every order
and in both modes, and `guarded` makes any elementwise function's derivatives of it.
"""

import jax
import jax.numpy as jnp

from bn_fused.kernels.jax_internals import (
    Primitive,
    ad,
    define_evaluation,
    fancy_primitive_batchers,
    lower_plainly,
    output_type,
    register_lowering,
    vary_together,
)

product_p = Primitive("bn_fused_product")


def product(mask, one, other):
    """one * other; where a mask is False and one of them is zero, zero, whatever the other is.

    The factors broadcast against each other, the mask (bool of their rank, or None for a plain product) to them.
    """
    if mask is None:
        return one * other
    one = _as(one, other)
    return product_p.bind(*vary_together([mask, one, _as(other, one)]))


def without_padding(mask, values):
    """The values, zero where a mask is False; as they are where it is None."""
    return values if mask is None else jnp.where(mask, values, jnp.zeros_like(values))


def guarded(function, mask):
    """An elementwise function of arrays whose derivatives are made of `product`; as it is where the mask is None.

    The arguments broadcast to the shape of the first, and may be None.
    """
    if mask is None:
        return function

    @jax.custom_jvp
    def guard(mask, *arguments):
        del mask
        return function(*arguments)

    def jvp(primals, tangents):
        mask, *arguments = primals
        total = jnp.zeros_like(arguments[0])
        for index, tangent in enumerate(tangents[1:]):
            if tangent is not None and not isinstance(tangent, jax.custom_derivatives.SymbolicZero):
                derivative = guarded(_partial_derivative(function, index), mask)
                total = total + product(mask, tangent, derivative(*arguments))
        return guard(*primals), total

    guard.defjvp(jvp, symbolic_zeros=True)
    return lambda *arguments: guard(mask, *arguments)


def _partial_derivative(function, index):
    """The derivative of an elementwise function with respect to one of its arguments."""

    def derivative(*arguments):
        def of_one(argument):
            return function(*arguments[:index], argument, *arguments[index + 1 :])

        return jax.jvp(of_one, (arguments[index],), (jnp.ones_like(arguments[index]),))[1]

    return derivative


def _as(value, other):
    """A value with the shape and sharding that its product with another has."""
    return value if jax.typeof(value) == jax.typeof(other) else value * jnp.ones_like(other)


def _compute(mask, one, other):
    result = one * other
    return jnp.where(mask | ((one != 0) & (other != 0)), result, jnp.zeros_like(result))


def _batch(axis, values, dims):
    if all(dim is None for dim in dims):
        return product(*values), None
    mask, *factors = (
        jnp.expand_dims(value, 0) if dim is None else jnp.moveaxis(value, dim, 0)
        for value, dim in zip(values, dims, strict=True)
    )
    if dims[1] is None and dims[2] is None:
        factors = [jnp.broadcast_to(factor, (axis.size, *factor.shape[1:])) for factor in factors]
    return product(mask, *factors), 0


def _jvp(primals, tangents):
    mask, one, other = primals
    _, tone, tother = tangents
    terms = []
    if not isinstance(tone, ad.Zero):
        terms.append(product(mask, tone, other))
    if not isinstance(tother, ad.Zero):
        terms.append(product(mask, one, tother))
    return product_p.bind(*primals), sum(terms[1:], *terms[:1])


def _transpose(cotangent, mask, one, other):
    """The gradient of the factor that is linear: the product of the cotangent and the other factor."""
    linear, factor = (one, other) if ad.is_undefined_primal(one) else (other, one)
    gradient = ad.Zero(linear.aval) if isinstance(cotangent, ad.Zero) else product(mask, cotangent, factor)
    return [None, gradient, None] if linear is one else [None, None, gradient]


define_evaluation(product_p)
product_p.def_abstract_eval(lambda mask, one, other: output_type(one, one.shape, one.dtype, range(one.ndim)))
register_lowering(
    product_p, lambda context, *values: lower_plainly(lambda *arrays: [_compute(*arrays)], context, *values)
)
fancy_primitive_batchers[product_p] = _batch
ad.primitive_jvps[product_p] = _jvp
ad.primitive_transposes[product_p] = _transpose
