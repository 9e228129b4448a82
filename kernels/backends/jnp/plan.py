"""The form in which XLA compiles the operations well, on each platform."""

from dataclasses import dataclass

import jax.numpy as jnp


@dataclass(frozen=True)
class Plan:
    """What is written otherwise than plainly.

    - `fold`: rows are cut into about so many parts that are added up before the sums, see `sums`, and what has a short
        last axis is written with a longer one, see `operations.with_merged_rows`; None: neither.
    - `stages`: sums over rows that lie together before the channels are made in two stages, see `sums`.
    - `expects`: a forward's moments are made about the running mean first, see `operations`.
    - `chooses`: where dz = dy * relu' is a result of a backward too, it is dy or zero, chosen in place of a product.
    """

    fold: int | None = None
    stages: bool = False
    expects: bool = False
    chooses: bool = False


def plan(problem, target, config=None):
    """Fold on a CPU, two stages on a GPU, the others on a TPU.

    With 16 parts XLA:CPU was faster than with 8, and about as fast as with 32 in float32, faster in bfloat16, in three
    versions and with arrays of either layout. A loop over 64 it does not unroll, which took six times as long.

    Nothing of it where XLA partitions the arrays over devices: a part would cross them. Nor are there parts or stages
    along axes that `jax.export` leaves open.
    """
    del config
    if target.partitioned:
        return Plan()
    return Plan(
        fold=16 if target.platform == "cpu" else None,
        stages=target.platform in ("cuda", "rocm"),
        expects=target.platform == "tpu" and _leaves_the_chip(problem, target.chip),
        chooses=target.platform == "tpu",
    )


def _leaves_the_chip(problem, chip):
    """Whether x is larger than half of a TPU's on-chip memory, or that is not known.

    What XLA keeps there costs nothing to read again, and what a condition may read it does not keep there.
    """
    if chip is None or problem.left_open:
        return True
    nbytes = problem.groups * problem.rows * problem.channels * jnp.dtype(problem.dtype).itemsize
    return nbytes > max(chip.vmem, chip.cmem) / 2


def plan_of(spec):
    """The plan that a spec has of these; one without anything where it has none, or another backend's."""
    return spec.plan if isinstance(spec.plan, Plan) else Plan()
