"""What is timed: classes of arrays, and the configurations that each backend has for one. Without a device."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from bn_fused.bench.workloads import Workload
from bn_fused.kernels.chips import chip_of
from bn_fused.kernels.registry import choose, tuned_backends
from bn_fused.kernels.target import BackendError, Problem, Target
from bn_fused.kernels.tuned import Class


@dataclasses.dataclass(frozen=True)
class Part:
    """A class with the backend whose plans are timed in it beside jnp; None: jnp alone."""

    of: Class
    backend: str | None

    def __str__(self):
        return f"{self.of}: {self.backend or 'jnp'}"


def classes_of(
    workloads: Iterable[Workload], activations: Sequence[str | None], residuals: Sequence[bool]
) -> list[Class]:
    """The classes of workloads, each seen as [rows, channels], the largest arrays first."""
    found = {
        Class(workload.elements // workload.channels, workload.channels, workload.dtype, activation, residual, True)
        for workload in workloads
        for activation in activations
        for residual in residuals
    }
    return sorted(found, key=lambda one: (-one.rows * one.channels, str(one)))


def problem_of(of: Class) -> Problem:
    """What a backend is asked about a class."""
    return Problem(1, of.rows, of.channels, of.dtype, of.activation, of.residual, channels_last=of.channels_last)


def target_of(device) -> Target:
    """What a program for a device of JAX's is lowered for."""
    chip = chip_of(device)
    return Target(device.platform if chip is None else chip.platform, chip)


def refusal(name: str, of: Class, target: Target) -> str | None:
    """Why a backend cannot run a class on a target, None if it can."""
    try:
        choose(problem_of(of), target, name)
    except BackendError as error:
        return str(error)
    return None


def parts_of(classes: Iterable[Class], target: Target) -> list[Part]:
    """The parts of classes: one for every backend with plans that can run a class there, or one for jnp alone."""
    parts = []
    for of in classes:
        able = [name for name in tuned_backends() if refusal(name, of, target) is None]
        parts += [Part(of, name) for name in able or [None]]
    return parts


def searched(name: str, of: Class, target: Target) -> list[tuple[Any, Any]]:
    """(configuration, plan) of a backend's search set, the rule's first; those that come to the same plan once."""
    backend, problem = tuned_backends()[name], problem_of(of)
    plans: dict[Any, Any] = {}
    for config in backend.tuning.search_set(problem, target):
        plans.setdefault(backend.plan(problem, target, config), config)
    return [(config, plan) for plan, config in plans.items()]
