"""A network's training step, compiled for a chip that is not there: the bytes it moves and the memory it takes."""

import dataclasses
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax.numpy as jnp

import bn_fused
from bn_fused.bench import deviceless
from bn_fused.bench.audit.traffic import passes
from bn_fused.bench.child import Child, ChildEnded, answer_requests
from bn_fused.bench.step import resnet
from bn_fused.bench.step.networks import Contender, Setting, argument_types, contender_named, program
from bn_fused.bench.step.timed import one_line


@dataclasses.dataclass(frozen=True)
class AuditRow:
    """The step of one network, compiled for a chip.

    - `status`, `reason`: as of `Row`, "ok" if it was compiled.
    - `read`, `written`: bytes moved through the chip's memory by all kernels, counted in the program (`audit.traffic`).
    - `passes`: those bytes over the bytes of all that the norms take: what the step costs in passes over the
        activations. Convolutions and the optimiser are in it, the same for all.
    - `seldom`: bytes beside those, read and written, in a step in which every layer sums its moments again.
    - `accessed`: XLA's own estimate of the bytes.
    - `temporary`: bytes of temporary memory. `launches`: kernels, copies and library calls.
    """

    name: str
    status: str
    reason: str = ""
    read: int | None = None
    written: int | None = None
    passes: float | None = None
    accessed: int | None = None
    temporary: int | None = None
    launches: int | None = None
    seldom: int | None = None


def norm_bytes(setting: Setting) -> int:
    """The bytes of all that the norms of a network take."""
    elements = sum(math.prod(shape) for shape in resnet.norm_shapes(setting.architecture, setting.image))
    return setting.batch * elements * jnp.dtype(setting.dtype).itemsize


def audit_one(target: str, one: Contender, setting: Setting) -> AuditRow:
    """Compile one network's step for a target, in this process."""
    try:
        training = program(one, setting)
        compiled = deviceless.compile_for(target, training.step, *argument_types(training, setting))
    except bn_fused.BackendError as error:
        return AuditRow(one.name, "refused", str(error))
    except deviceless.DevicelessUnavailable as error:
        return AuditRow(one.name, "missing", str(error))
    except Exception as error:  # a compiler may fail in any way
        return AuditRow(one.name, "failed", one_line(error))
    # In units of one byte, with nothing left out.
    traffic = passes(compiled.as_text(), 1, 1, smallest=0)
    analysis = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    accessed = cost.get("bytes accessed")
    return AuditRow(
        one.name,
        "ok",
        read=int(traffic.reads),
        written=int(traffic.writes),
        passes=(traffic.reads + traffic.writes) / norm_bytes(setting),
        accessed=None if accessed is None else int(accessed),
        temporary=None if analysis is None else int(analysis.temp_size_in_bytes),
        launches=traffic.launches,
        seldom=int(traffic.seldom),
    )


def why_left_out(one: Contender) -> tuple[str, str] | None:
    """Status and reason of a network that XLA does not compile here; None of the others."""
    if one.missing is not None:
        return "missing", one.missing
    return ("refused", "torch is not compiled by XLA") if one.module == "torch" else None


def audit(
    target: str,
    setting: Setting,
    networks: Sequence[Contender],
    options: Mapping,
    *,
    time_limit: float,
    before: Callable[[str], None] = lambda name: None,
) -> Iterator[AuditRow]:
    """Compile every network for a target; yields the rows as they are done.

    In a process of its own, because a process compiles for one GPU only; a new one after a compiler that ended it or
    ran past `time_limit` seconds. `options` are the arguments with which `contenders` made the networks.
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "bn_fused.bench.step.audit"]
    child = None
    try:
        for one in networks:
            before(one.name)
            if (left_out := why_left_out(one)) is not None:
                yield AuditRow(one.name, *left_out)
            else:
                child = child or Child(command, environment)
                request = {
                    "target": target, "setting": dataclasses.asdict(setting), "options": dict(options), "name": one.name
                }  # fmt: skip
                try:
                    yield AuditRow(**child.ask(request, time_limit))
                except ChildEnded as error:
                    child = None
                    yield AuditRow(one.name, "failed", str(error))
    finally:
        if child is not None:
            child.close()


def _answer(request):
    one = contender_named(request["name"], request["options"])
    return dataclasses.asdict(audit_one(request["target"], one, Setting(**request["setting"])))


if __name__ == "__main__":
    answer_requests(_answer)
