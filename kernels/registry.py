"""The backends there are, and which of them computes a given problem for a given target: `choose`."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from bn_fused.kernels.auto import Verdict, verdict
from bn_fused.kernels.backends import jnp as jnp_backend
from bn_fused.kernels.backends.pallas_gpu import operations as pallas_gpu
from bn_fused.kernels.backends.pallas_tpu import operations as pallas_tpu
from bn_fused.kernels.backends.triton import operations as triton_backend
from bn_fused.kernels.contract import OPERATIONS
from bn_fused.kernels.target import FLOATING, BackendError

REFERENCE = "reference"


@dataclass(frozen=True)
class BackendChoice:
    """The backend that runs, why it was chosen, and its plan (None where it has none: reference)."""

    name: str
    reason: str
    plan: object = None


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
    - `verdict(problem, target)`: whether `auto` takes it there, and why; see `auto`. It is asked where nothing is refused.
    - `plan(problem, target)`: a frozen description of tiles and launches, or None.
    - `plan_refusal(plan, problem, target)`: None, or one sentence: why a plan that was given by hand must not run there.
    """

    name: str
    operations: Mapping[str, Callable] = field(hash=False)
    refusal: Callable = no_refusal
    verdict: Callable = not_taken
    plan: Callable = no_plan
    plan_refusal: Callable = no_plan_refusal


def _jnp_verdict(problem, target):
    del problem
    return Verdict(True, f"plain jnp, which XLA compiles for {target} and fuses with the operations around it")


# Insertion order is the order in which `auto` asks: what is registered later is asked earlier, jnp last.
_BACKENDS: dict[str, Backend] = {}


def register(backend):
    """Plug in a backend. Its name must be new."""
    if backend.name in _BACKENDS or backend.name in ("auto", REFERENCE):
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


register(
    Backend(
        "jnp",
        {name: getattr(jnp_backend, name) for name in OPERATIONS},
        verdict=_jnp_verdict,
        plan=jnp_backend.plan,
    )
)


def _verdict_of_the_table(name, problem, target):
    return verdict(name, problem, target)


for _name, _module in (("triton", triton_backend), ("pallas_gpu", pallas_gpu), ("pallas_tpu", pallas_tpu)):
    register(
        Backend(
            _name,
            {name: getattr(_module, name) for name in OPERATIONS},
            refusal=_module.refusal,
            verdict=functools.partial(_verdict_of_the_table, _name),
            plan=_module.plan,
            plan_refusal=getattr(_module, "plan_refusal", no_plan_refusal),
        )
    )


def backend_names():
    """The names `backend=` takes besides "auto"."""
    return (*_BACKENDS, REFERENCE)


def check_backend_name(backend):
    """ValueError unless `backend` is "auto" or registered."""
    if backend != "auto" and backend not in backend_names():
        raise ValueError(f"backend is {backend!r}; accepted are 'auto', {', '.join(map(repr, backend_names()))}")


def choose(problem, target, requested="auto"):
    """The backend for a problem on a target.

    Raises BackendError if `requested` names a backend that cannot run there, ValueError if there is none of that name.
    """
    check_backend_name(requested)
    if problem.dtype not in FLOATING:
        raise TypeError(f"dtype is {problem.dtype}; accepted are {', '.join(FLOATING)}")
    if requested == REFERENCE:
        return BackendChoice(REFERENCE, "asked for by name: the definition, differentiated by JAX")
    if requested != "auto":
        backend = _BACKENDS[requested]
        refusal = backend.refusal(problem, target)
        if refusal is not None:
            raise BackendError(f"backend {requested!r} cannot run on {target}: {refusal}")
        found = backend.verdict(problem, target)
        reason = "asked for by name" if found.taken else f"asked for by name; auto does not take it: {found.why}"
        return BackendChoice(requested, reason, backend.plan(problem, target))
    passed_over = []
    for backend in reversed(_BACKENDS.values()):
        refusal = backend.refusal(problem, target)
        if refusal is not None:
            passed_over.append(f"{backend.name} cannot run here: {refusal}")
            continue
        found = backend.verdict(problem, target)
        if found.taken:
            reason = "; ".join([found.why, *reversed(passed_over)])
            return BackendChoice(backend.name, reason, backend.plan(problem, target))
        passed_over.append(f"{backend.name} runs by name: {found.why}")
    raise AssertionError("the jnp backend takes every problem")


def check_plan(choice, plan, problem, target):
    """Raise unless a chosen backend can run the problem with this plan in place of its own.

    TypeError for a plan that is not of its type, BackendError where the backend refuses it.
    """
    if type(plan) is not type(choice.plan):
        raise TypeError(f"plan is {plan!r}; backend {choice.name!r} takes one such as its own, {choice.plan!r}")
    refusal = None if choice.name == REFERENCE else _BACKENDS[choice.name].plan_refusal(plan, problem, target)
    if refusal is not None:
        raise BackendError(f"backend {choice.name!r} cannot run {plan!r} on {target}: {refusal}")


def operation_of(choice, operation):
    """The function with which a chosen backend computes an operation."""
    return _BACKENDS[choice.name].operations[operation]
