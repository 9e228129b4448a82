"""The registered backends, and which of them computes a given problem for a given target: `choose`."""

import math
from dataclasses import dataclass

from bn_fused.kernels import tuned
from bn_fused.kernels.backends import Backend, jnp as jnp_backend, pallas_gpu, pallas_tpu, triton
from bn_fused.kernels.contract import OPERATIONS
from bn_fused.kernels.target import FLOATING, BackendError

_REFERENCE = "reference"


@dataclass(frozen=True)
class BackendChoice:
    """The backend that runs, why it was chosen, and its plan (None where it has none: reference)."""

    name: str
    reason: str
    plan: object = None


# Insertion order is the order in which `auto` asks: what is registered later is asked earlier, jnp last. Of those that
# were measured it takes the fastest, else the first that is for it.
_BACKENDS: dict[str, Backend] = {}


def register(backend):
    """Plug in a backend. Its name must be new."""
    if backend.name in _BACKENDS or backend.name in ("auto", _REFERENCE):
        raise ValueError(f"backend name {backend.name!r} is taken; registered are {', '.join(backend_names())}")
    missing = sorted(set(OPERATIONS) - set(backend.operations))
    if missing:
        raise ValueError(f"backend {backend.name!r} lacks the operations {', '.join(missing)}")
    _BACKENDS[backend.name] = backend


def unregister(name):
    """Take a backend out again; compiled functions that use it keep it."""
    if name not in _BACKENDS or name == "jnp":
        raise ValueError(f"backend {name!r} cannot be unregistered; registered are {', '.join(_BACKENDS)}")
    del _BACKENDS[name]


for _backend in (jnp_backend.BACKEND, triton.BACKEND, pallas_gpu.BACKEND, pallas_tpu.BACKEND):
    register(_backend)


def tuned_backends():
    """The registered backends whose plans are found by measurement, by name."""
    return {name: backend for name, backend in _BACKENDS.items() if backend.tuning is not None}


def is_reference(backend):
    """Whether a name is that of the definition: it has no operations and no plan, JAX differentiates it as a whole."""
    return backend == _REFERENCE


def backend_names():
    """The names `backend=` takes besides "auto"."""
    return (*_BACKENDS, _REFERENCE)


def check_backend_name(backend):
    """ValueError unless `backend` is "auto" or registered."""
    if backend != "auto" and backend not in backend_names():
        raise ValueError(f"backend is {backend!r}; accepted are 'auto', {', '.join(map(repr, backend_names()))}")


def _refusal(backend, problem, target):
    """One sentence: why a backend cannot run a problem on a target. None if it can."""
    if problem.left_open and not backend.open_sizes:
        return f"it needs to know all sizes, and the exported program leaves {problem.left_open} open"
    return backend.refusal(problem, target)


def choose(problem, target, requested="auto"):
    """The backend for a problem on a target.

    Raises BackendError if `requested` names a backend that cannot run there, ValueError if there is none of that name.
    """
    check_backend_name(requested)
    if problem.dtype not in FLOATING:
        raise TypeError(f"dtype is {problem.dtype}; accepted are {', '.join(FLOATING)}")
    if is_reference(requested):
        return BackendChoice(requested, "asked for by name: the definition, differentiated by JAX")
    if 0 in (problem.groups, problem.rows, problem.channels):
        backend = _BACKENDS["jnp"]
        return BackendChoice(backend.name, "x is empty: there is nothing to compute", backend.plan(problem, target))
    if requested != "auto":
        backend = _BACKENDS[requested]
        refusal = _refusal(backend, problem, target)
        if refusal is not None:
            raise BackendError(f"backend {requested!r} cannot run on {target}: {refusal}")
        verdict = backend.verdict(problem, target)
        reason = "asked for by name" if verdict.taken else f"asked for by name; auto does not take it: {verdict.why}"
        return _choice(backend, reason, problem, target)
    passed_over, taken = [], []
    for backend in reversed(_BACKENDS.values()):
        refusal = _refusal(backend, problem, target)
        if refusal is not None:
            passed_over.append(f"{backend.name} cannot run here: {refusal}")
            continue
        verdict = backend.verdict(problem, target)
        if verdict.taken:
            taken.append((verdict.share, len(taken), backend, verdict.why))
            if verdict.share == math.inf:
                break
        else:
            passed_over.append(f"{backend.name} runs by name: {verdict.why}")
    _, _, backend, why = min(taken)  # the jnp backend takes every problem
    return _choice(backend, "; ".join([why, *reversed(passed_over)]), problem, target)


def _choice(backend, reason, problem, target):
    """The choice of a backend, with the plan that was measured as its fastest, or the one by rule."""
    plan = backend.plan(problem, target)
    found = None if backend.tuning is None else tuned.find(backend.name, backend.tuning, problem, target)
    if isinstance(found, tuned.Found):
        try:
            fastest = _fastest_plan(backend, found, problem, target)
        except tuned.Unusable as error:
            tuned.warn(found.path, str(error))
        else:
            # Of a configuration that does not fit this problem a backend makes its plan by rule.
            if fastest not in (None, plan):
                plan, reason = fastest, f"{reason}; its plan is from {found.where}"
    return BackendChoice(backend.name, reason, plan)


def _fastest_plan(backend, found, problem, target):
    """The plan of what was measured, None where it is the rule's; raises `tuned.Unusable`."""
    config = tuned.config_of(found, backend.tuning, problem)
    if config is None:
        return None
    plan = backend.plan(problem, target, config)
    refusal = backend.plan_refusal(plan, problem, target)
    if refusal is not None:
        raise tuned.Unusable(f"its plan for {found.entry.of} cannot run: {refusal}")
    return plan


def check_plan(choice, plan, problem, target):
    """Raise unless a chosen backend can run the problem with this plan in place of its own.

    TypeError for a plan that is not of its type, BackendError where the backend refuses it.
    """
    if type(plan) is not type(choice.plan):
        raise TypeError(f"plan is {plan!r}; backend {choice.name!r} takes one such as its own, {choice.plan!r}")
    refusal = _BACKENDS[choice.name].plan_refusal(plan, problem, target)
    if refusal is not None:
        raise BackendError(f"backend {choice.name!r} cannot run {plan!r} on {target}: {refusal}")


def operation_of(choice, operation):
    """The function with which a chosen backend computes an operation."""
    return _BACKENDS[choice.name].operations[operation]


def slow_to_lower(choice):
    """Whether the lowered code of a chosen backend is to be kept."""
    return _BACKENDS[choice.name].slow_to_lower
