"""A process that lowers operations of `triton` for AMD GPUs that are not there: `python triton_lowered.py`.

Reads JSON from standard input: a list of [chip, architecture, cases], a case being [[groups, rows, channels, dtype,
activation, residual], names of operations]. The questions that the library and jax-triton put to the device are
answered here: what it is, and, with `architecture`, what it is compiled for. Writes of each operation its launches, as
they are in the program, or what the error says.
"""

import json
import math
import pathlib
import re
import sys
import types

import jax
from jaxlib import gpu_triton
from triton.backends.amd.compiler import HIPBackend

from bn_fused.kernels import dispatch
from bn_fused.kernels.chips import CHIPS
from bn_fused.kernels.contract import Spec
from bn_fused.kernels.registry import choose
from bn_fused.kernels.target import Problem, Target

from support.operand_specs import operand_specs

answers = {"get_compute_capability": 90}
made = []  # of each compilation by jax-triton: the assembler's text
kernels = []  # of each kernel that it made: name, warps, and the architecture that its code says it is for
MACHINES = {0x3F: "gfx90a", 0x4C: "gfx942"}  # EF_AMDGPU_MACH of an ELF file


def ask(name):
    """Let jax-triton ask `answers` in place of the device."""

    def answer(device):
        assert device == 0
        if name not in answers:
            raise RuntimeError("UNIMPLEMENTED: Not a HIP GPU")
        return answers[name]

    setattr(gpu_triton, name, answer)


def watch():
    """Keep what passes between jax-triton, Triton and JAX."""
    assemble, kernel = HIPBackend.make_amdgcn, gpu_triton.TritonKernel

    def assembled(*arguments):
        made.append(assemble(*arguments))
        return made[-1]

    def kernel_of(name, warps, ctas, shared, path, *rest):
        code = pathlib.Path(path).read_bytes()
        pathlib.Path(path).unlink()  # as JAX does when it has loaded the code
        flags = int.from_bytes(code[0x30:0x34], "little")
        assert code[:4] == b"\x7fELF" and ctas == 1
        kernels.append({"warps": warps, "shared": shared, "machine": MACHINES.get(flags & 0xFF), "text": made[-1]})
        return kernel(name, warps, ctas, shared, path, *rest)

    HIPBackend.make_amdgcn = staticmethod(assembled)
    gpu_triton.TritonKernel = kernel_of


def said_of(kernel):
    """A kernel, with what its assembler text says in place of the text."""
    text = kernel.pop("text")
    numbers = {
        name: int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))
        for name in ("wavefront_size", "max_flat_workgroup_size", "vgpr_spill_count", "sgpr_spill_count",
                     "private_segment_fixed_size")
    }  # fmt: skip
    loads = sorted(set(re.findall(r"\b(?:global|buffer)_load_(\w+)", text)))
    return kernel | numbers | {"loads": loads}


def launches_in(lowered, elements):
    """Of each custom call of a lowered program: target, and how many operands and results are of x's size."""
    found = []

    def visit(operation):
        if operation.name == "stablehlo.custom_call":
            large = [
                sum(math.prod(value.type.shape) == elements for value in values)
                for values in (operation.operands, operation.results)
            ]
            found.append([str(operation.attributes["call_target_name"]).strip('"'), *large])
        for region in operation.regions:
            for block in region:
                for inner in block:
                    visit(inner.operation)

    visit(lowered.compiler_ir().operation)
    return found


def lowered_operation(chip, name, groups, rows, channels, dtype, activation, residual):
    """The launches of an operation and what its plan says of them."""
    operands = operand_specs(name, groups, rows, channels, dtype, residual, activation)
    spec = Spec("grc", 1e-5, activation, "triton")
    device = types.SimpleNamespace(
        platform="gpu", device_kind=chip.device_kind, compute_capability=chip.architecture, core_count=chip.cores
    )
    dispatch.lowering_device = lambda context, platform: device
    kernels.clear()
    traced = jax.jit(lambda values: dispatch.run(name, spec, **values)).trace(operands)
    try:
        lowered = traced.lower(lowering_platforms=("rocm",))
    except ValueError as error:
        return {"error": str(error)}
    problem = Problem(groups, rows, channels, dtype, activation, residual)
    plan = choose(problem, Target("rocm", chip), "triton").plan
    return {
        "launches": launches_in(lowered, groups * rows * channels),
        "kernels": [said_of(kernel) for kernel in kernels],
        "planned_launches": plan.launches(name),
        "planned_passes": plan.passes(name),
        "warps": plan.warps,
    }


def main():
    ask("get_compute_capability")
    ask("get_arch_details")
    watch()
    results = []
    for chip, architecture, cases in json.load(sys.stdin):
        answers.pop("get_arch_details", None)
        if architecture is not None:
            answers["get_arch_details"] = architecture
        results += [
            [chip, case, name, lowered_operation(CHIPS[chip], name, *case)] for case, names in cases for name in names
        ]
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
