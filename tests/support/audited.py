"""The audit's command line, and cases and rows of it that are made up."""

from click.testing import CliRunner

from bn_fused.bench.audit.blocks import Setting
from bn_fused.bench.audit.rows import Case, Row
from bn_fused.bench.commands.audit import command

SETTING = Setting((32, 64, 56, 56))


def run(*arguments):
    """What `bn-bench audit` does with these arguments."""
    return CliRunner().invoke(command, [str(argument) for argument in arguments], prog_name="bn-bench audit")


def compiled_row(case, **fields):
    """The row of a case whose program reads x twice and writes it once, without a kernel of ours."""
    return Row(
        case, "compiled", reads=2.0, writes=1.0, padded_reads=2.0, padded_writes=1.0, inside_reads=0.0,
        inside_writes=0.0, padded_inside_reads=0.0, padded_inside_writes=0.0, launches=3, temporary_bytes=0, **fields,
    )  # fmt: skip


def case_for(target="h200", layer="jnp", pass_name="fwd", setting=SETTING):
    """A case of one shape."""
    return Case(target, "shape", setting, layer, pass_name)


# A backend whose forward hands y through a kernel that copies it, for the process that compiles. Its plan says that the
# kernel reads what it copies three times.
COPYING = """
import dataclasses
import jax
from jax.experimental import pallas as pl
from bn_fused import kernels
from bn_fused.kernels.backends.jnp import operations as in_jnp
from bn_fused.kernels.contract import OPERATIONS

def tpu_copy(y):
    from jax.experimental.pallas import tpu as pltpu

    def kernel(y_ref, out_ref, scratch):
        scratch[...] = y_ref[...]
        out_ref[...] = scratch[...]

    block = pl.BlockSpec((64, 128), lambda i: (i, 0))
    return pl.pallas_call(
        kernel, out_shape=jax.ShapeDtypeStruct(y.shape, y.dtype), grid=(y.shape[0] // 64,), in_specs=[block],
        out_specs=block, scratch_shapes=[pltpu.VMEM((64, 128), y.dtype)],
    )(y)

def gpu_copy(y):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def kernel(y_ref, out_ref, scratch, barrier):
        rows = pl.ds(jax.lax.axis_index("rows") * 64, 64)
        plgpu.copy_gmem_to_smem(y_ref.at[rows, :], scratch, barrier)
        plgpu.barrier_wait(barrier)
        plgpu.copy_smem_to_gmem(scratch, out_ref.at[rows, :])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel, out_type=jax.ShapeDtypeStruct(y.shape, y.dtype), grid=(y.shape[0] // 64,), grid_names=("rows",),
        scratch_types=[plgpu.SMEM((64, y.shape[1]), y.dtype), plgpu.Barrier(num_arrivals=1)],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(y)

@dataclasses.dataclass(frozen=True)
class Plan:
    platform: str

class TellingPlan(Plan):
    passes = {"forward": (3, 1)}

def forward(*operands, spec, **named):
    y, *rest = in_jnp.forward(*operands, spec=spec, **named)
    return {"tpu": tpu_copy, "cuda": gpu_copy}[spec.plan.platform](y), *rest

operations = {name: getattr(in_jnp, name) for name in OPERATIONS} | {"forward": forward}
for name, plan in (("telling", TellingPlan), ("silent", Plan)):
    kernels.register(
        kernels.Backend(name, operations, plan=lambda problem, target, plan=plan: plan(target.platform))
    )
kernels.register(kernels.Backend("refusing", operations, refusal=lambda problem, target: "it wants more rows"))
from bn_fused.bench.audit.compile import serve
serve()
"""
