"""A process that compiles the kernels of `triton` for a GPU with Triton alone: `python triton_compiled.py`.

Reads JSON from standard input: a list of [backend, architecture, cases, operations], a case being [groups, rows,
channels, dtype, activation, residual, configuration or null]. For each architecture the launches of the operations are
those of the plan for the chip, or for one that resembles it. Writes what the compilers say of each launch.
"""

import json
import os
import re
import subprocess
import sys
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from bn_fused.kernels.backends.triton import operations as triton_backend
from bn_fused.kernels.backends.triton.plan import Config, make_plan, most_threads
from bn_fused.kernels.chips import CHIPS, GpuChip
from bn_fused.kernels.contract import Spec

from support.operand_specs import operand_specs

TYPES = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "int32": "*i32"}
# Multiprocessors of an A100, an A10, an L4, an H100, a B200, an RTX 5090.
CORES = {80: 108, 86: 72, 89: 58, 90: 132, 100: 148, 120: 170}


def chip_with(architecture):
    """A chip of an architecture: of AMD's, the one of the table with the most compute units."""
    if isinstance(architecture, int):
        return GpuChip("some", "some", divmod(architecture, 10), CORES[architecture], 0)
    chips = [chip for chip in CHIPS.values() if getattr(chip, "architecture", None) == architecture]
    return max(chips, key=lambda chip: chip.cores)


def launches(case, architecture, operations):
    """(operation, name, kernel, signature, constants, warps) of every launch of a case's operations."""
    groups, rows, channels, dtype, activation, residual, config = case
    chip = chip_with(architecture)
    itemsize = jax.numpy.dtype(dtype).itemsize
    config = None if config is None else Config(**config)
    plan = make_plan(
        groups, rows, channels, itemsize, chip, config, residual=residual, derivative=activation is not None
    )
    found, threads = [], []

    def record(kernel, name, inputs, outputs, *, grid, warps, architecture, in_place, **constants):
        assert 0 < grid < 1 << 31 and architecture == plan.architecture
        threads.append(grid * warps * plan.lanes)
        arrays = [*inputs, *outputs]
        signature = dict(zip(kernel.arg_names, (TYPES[str(array.dtype)] for array in arrays), strict=False))
        found.append((operation, name, kernel, signature, constants, warps))
        return [jax.numpy.zeros(spec.shape, spec.dtype) for spec in outputs]

    triton_backend.launch = record
    for operation in operations:
        operands = operand_specs(operation, groups, rows, channels, dtype, residual, activation)
        spec = Spec("grc", 1e-5, activation, "triton", plan)
        function = getattr(triton_backend, operation)
        jax.eval_shape(lambda values, function=function, spec=spec: function(**values, spec=spec), operands)
    # A launch over one slab has fewer.
    assert max(threads) == most_threads(plan, groups, channels) or plan.slabs > 1 and max(threads) > 0
    return found


def compiled(backend, architecture, kernel, signature, constants, warps):
    """What the compilers say of one launch."""
    pointers = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in signature}
    signature = signature | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constants, pointers)
    target = GPUTarget(backend, architecture, 64 if backend == "hip" else 32)
    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
    made = triton.compile(source, target=target, options=options)
    whole = constants["CHANNELS"] if "WIDTH" not in constants else constants["WIDTH"]
    found = {"shared": made.metadata.shared, "warps": warps, "slab": constants["SLAB"] != whole}
    if backend == "hip":
        text = made.asm["amdgcn"]
        found["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", text).group(1))
        spills = re.findall(r"\.(?:v|s)gpr_spill_count:\s+(\d+)", text)
        found["spills"] = sum(map(int, spills)) + int(
            re.search(r"\.private_segment_fixed_size:\s+(\d+)", text).group(1)
        )
        found["loads"] = re.findall(r"\b(?:global|buffer)_load_(\w+)", text)
        # By how much numbers of 64 bits are shifted: products with powers of two.
        found["shifts"] = [int(value) for value in re.findall(r"s_lshl_b64 s\[.*?\], s\[.*?\], (\d+)\b", text)]
        found["stores"] = re.findall(r"\b(?:global|buffer)_store_(\w+)", text)
        return found
    text = made.asm["ptx"]
    # Loads to registers; copies to shared memory, with the number of bytes.
    found["loads"] = [
        (vector or "v1") + "." + kind for vector, kind in re.findall(r"ld\.global\S*?(?:\.(v\d))?\.(b\d+)\b", text)
    ]
    found["dropped"] = len(re.findall(r"ld\.global\S*evict_first", text))  # loads that the cache need not keep
    found["copies"] = [
        int(size, 16)
        for size in re.findall(r"cp\.async\.c[ag]\.shared\.global\S* \[.*?\], \[.*?\], (0x[0-9a-f]+)", text)
    ]
    found["stores"] = [
        (vector or "v1") + "." + kind for vector, kind in re.findall(r"st\.global\S*?(?:\.(v\d))?\.(b\d+)\b", text)
    ]
    # Factors of products with 64 bits.
    found["factors"] = [int(value) for value in re.findall(r"(?:mul|mad)\.wide\.[su]32\s+%rd\d+, %r\d+, (\d+)", text)]
    # Assembled as JAX does it, without the options that Triton has of its own.
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(text)
        file.flush()
        (assembled_for,) = re.findall(r"^\.target (\w+)", text, re.MULTILINE)
        command = [get_ptxas(architecture).path, "-v", f"-arch={assembled_for}", file.name, "-o", os.devnull]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found["registers"] = int(re.search(r"Used (\d+) registers", usage).group(1))
    frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", usage)
    found["spills"] = sum(map(int, frame.groups()))
    return found


def main():
    results = []
    for backend, architecture, cases, operations in json.load(sys.stdin):
        for case in cases:
            seen = {}
            for operation, name, *launch in launches(case, architecture, operations):
                kernel, _, constants, warps = launch
                key = kernel.fn.__name__, str(launch[1]), str(sorted(constants.items(), key=str)), warps
                if key not in seen:
                    seen[key] = compiled(backend, architecture, *launch)
                results.append([backend, architecture, case, operation, name, seen[key]])
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
