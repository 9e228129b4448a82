"""An Equinox layer or model on a whole batch."""

import jax


def over_batch(model, x, state, name="batch"):
    """What `model` gives of each example of x and one state, the batch's axis having this name."""
    return jax.vmap(model, axis_name=name, in_axes=(0, None), out_axes=(0, None))(x, state)
