"""The backend `jnp`: plain jnp for everything and every platform, in the form that XLA compiles best there."""

from bn_fused.kernels.backends import Backend, Verdict
from bn_fused.kernels.backends.jnp import operations
from bn_fused.kernels.backends.jnp.plan import plan


def verdict(problem, target):
    """`auto` takes it wherever it takes no kernels."""
    del problem
    return Verdict(True, f"plain jnp, which XLA compiles for {target} and fuses with the operations around it")


BACKEND = Backend(
    "jnp",
    {
        operation.__name__: operations.with_merged_rows(operation)
        for operation in (
            operations.forward,
            operations.backward,
            operations.moments,
            operations.moments_backward,
            operations.normalise,
            operations.normalise_backward,
        )
    },
    verdict=verdict,
    plan=plan,
    open_sizes=True,
)
