"""The backends, a module or a folder each, which computes the operations of `contract` in one way.

Each exports one `BACKEND`: what it offers. The module `reference` has none, because it is never asked for an operation:
JAX differentiates it as a whole.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Verdict:
    """Whether `auto` takes a backend on a chip, and why."""

    taken: bool
    why: str


def no_refusal(problem, target):
    """A backend that takes every problem on every target."""
    del problem, target


def not_taken(problem, target):
    """The verdict on a backend that runs by name alone."""
    del problem, target
    return Verdict(False, "it does not say where it is the faster one")


def no_plan(problem, target):
    """A backend whose tiles and launches XLA decides."""
    del problem, target


def no_plan_refusal(plan, problem, target):
    """A backend that can run every plan of its type, or finds out while it lowers."""
    del plan, problem, target


@dataclass(frozen=True)
class Backend:
    """One way to compute the operations of `contract.OPERATIONS`.

    - `operations`: name to function; each takes the operation's operands by keyword and `spec`, and returns its
      results in the order of the table (a tuple, or the array where there is one).
    - `refusal(problem, target)`: None, or one sentence: why it cannot run that.
    - `verdict(problem, target)`: whether `auto` takes it there, and why; see `auto`. Asked where nothing is refused.
    - `plan(problem, target)`: a frozen description of tiles and launches, or None.
    - `plan_refusal(plan, problem, target)`: None, or one sentence: why a plan given by hand must not run there.
    - `open_sizes`: whether it takes sizes that `jax.export` leaves open. Where it does not, it is not asked about them.

    `problem` and `target` are those of `bn_fused.kernels.target`.
    """

    name: str
    operations: Mapping[str, Callable] = field(hash=False)
    refusal: Callable = no_refusal
    verdict: Callable = not_taken
    plan: Callable = no_plan
    plan_refusal: Callable = no_plan_refusal
    open_sizes: bool = False
