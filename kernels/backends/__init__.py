"""The backends, a module or a folder each, which computes the operations of `contract` in one way.

Each exports one `BACKEND`: what it offers. The module `reference` has none, because it is never asked for an operation:
JAX differentiates it as a whole.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Verdict:
    """Whether `auto` takes a backend for a problem, and why; of several the one that took the smallest `share`.

    `share`: its seconds over jnp's beside it, where they were measured.
    """

    taken: bool
    why: str
    share: float = math.inf


def no_refusal(problem, target):
    """A backend that takes every problem on every target."""
    del problem, target


def not_taken(problem, target):
    """The verdict on a backend that runs by name alone."""
    del problem, target
    return Verdict(False, "it does not say where it is the faster one")


def no_plan(problem, target, config=None):
    """A backend whose tiles and launches XLA decides."""
    del problem, target, config


def no_plan_refusal(plan, problem, target):
    """A backend that can run every plan of its type, or finds out while it lowers."""
    del plan, problem, target


@dataclass(frozen=True)
class Tuning:
    """What `bn-bench tune` has to know of a backend's kernels. A configuration is a frozen dataclass of its own.

    - `revision`: raised with every change to the kernels or plans that makes earlier timings meaningless.
    - `search_set(problem, target)`: the configurations to time, the first the one of the plan that is made by rule;
      several may come to the same plan.
    - `parse(stored)`: a configuration from what `dataclasses.asdict` and JSON made of it; raises TypeError, ValueError
      or KeyError.
    - `combine(forward, backward)`: the configuration with the forward of one and the backward of another; None where
      both are always the same.
    """

    revision: int
    search_set: Callable
    parse: Callable
    combine: Callable | None = None


@dataclass(frozen=True)
class Backend:
    """One way to compute the operations of `contract.OPERATIONS`.

    - `operations`: name to function; each takes the operation's operands by keyword and `spec`, and returns its
      results in the order of the table (a tuple, or the array where there is one).
    - `refusal(problem, target)`: None, or one sentence: why it cannot run that.
    - `verdict(problem, target)`: whether `auto` takes it there, and why; see `auto`. Asked where nothing is refused.
    - `plan(problem, target, config=None)`: a frozen description of tiles and launches, or None. Of a configuration of
      `tuning`'s it may make nothing where it does not fit the problem; then, and without one, it is made by rule.
    - `plan_refusal(plan, problem, target)`: None, or one sentence: why a plan given by hand must not run there.
    - `tuning`: a `Tuning` where plans are found by measurement.
    - `open_sizes`: whether it takes sizes that `jax.export` leaves open. Where it does not, it is not asked about them.
    - `slow_to_lower`: whether its kernels take so long to lower that the lowered code is kept; see `kernels.kept`.

    `problem` and `target` are those of `bn_fused.kernels.target`.
    """

    name: str
    operations: Mapping[str, Callable] = field(hash=False)
    refusal: Callable = no_refusal
    verdict: Callable = not_taken
    plan: Callable = no_plan
    plan_refusal: Callable = no_plan_refusal
    tuning: Tuning | None = None
    open_sizes: bool = False
    slow_to_lower: bool = False
