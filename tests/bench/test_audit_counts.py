"""What the audit counts in a compiled program and in what compilers dump, against programs written by hand."""

import jax
import pytest

from bn_fused.bench import workloads
from bn_fused.bench.audit.blocks import Setting, make_program
from bn_fused.bench.audit.compile import OPERATIONS, count, gpu_resources, planned_passes, tpu_resources
from bn_fused.bench.audit.rows import Passes, Row, ideal

from support.audited import case_for

HLO = """HloModule m

%subtract (p0: f32[64,128], p1: f32[128]) -> f32[64,128] {
  %p0 = f32[64,128]{1,0} parameter(0)
  %p1 = f32[128]{0} parameter(1)
  %b = f32[64,128]{1,0} broadcast(%p1), dimensions={1}
  ROOT %s = f32[64,128]{1,0} subtract(%p0, %b)
}

ENTRY %main (x: f32[64,128], m: f32[128]) -> f32[64,128] {
  %x = f32[64,128]{1,0} parameter(0)
  %m = f32[128]{0} parameter(1)
  %d = f32[64,128]{1,0} fusion(%x, %m), kind=kLoop, calls=%subtract
  %t = f32[128,64]{1,0} transpose(%d), dimensions={1,0}
  %k = (f32[128,64]{1,0}, f32[64]{0}) custom-call(%t, %m), custom_call_target="TARGET", backend_config={CONFIG}
  ROOT %y = f32[128,64]{1,0} get-tuple-element(%k), index=0
}
"""


VMEM = '"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"524288"}]'


@pytest.mark.parametrize("target", ["mosaic_gpu_v2", "tpu_custom_call", "triton_kernel_call"])
def test_a_kernels_operands_are_taken_out_of_the_passes_around_it(target):
    text = HLO.replace("TARGET", target).replace("CONFIG", VMEM)
    counted = count(text, 64 * 128, 64 * 128 * 4, {"forward": Passes(1, 1)})
    # subtract and transpose: one read and one write each.
    assert (counted["reads"], counted["writes"]) == (2, 2)
    assert (counted["operand_reads"], counted["operand_writes"]) == (1, 1)
    assert (counted["inside_reads"], counted["inside_writes"]) == (1, 1)
    assert (counted["kernels"], counted["launches"]) == (1, 3)
    assert counted["copies"] == ["t"]
    assert counted["on_chip_bytes"] == 524288


def test_a_librarys_call_is_no_kernel_of_ours():
    text = HLO.replace("TARGET", "__cudnn$convForward").replace("CONFIG", "")
    counted = count(text, 64 * 128, 64 * 128 * 4, {"forward": Passes(5, 5)})
    assert (counted["reads"], counted["writes"]) == (3, 3)
    assert (counted["kernels"], counted["inside_reads"], counted["inside_writes"]) == (0, 0, 0)


# The forward's operand comes from memory, in a layout that pads it to twice its size; its result stays on the chip. The
# backward reads that, and an array that XLA has brought onto the chip.
ON_CHIP = """HloModule m

ENTRY %main (x: f32[64,64], dy: f32[64,64]) -> f32[64,64] {
  %x = f32[64,64]{1,0:T(8,128)} parameter(0)
  %dy = f32[64,64]{1,0:T(8,128)} parameter(1)
  %near = f32[64,64]{1,0:T(8,128)S(1)} copy(%dy)
  %bn_fused_forward.1 = f32[64,64]{1,0:T(8,128)S(1)} custom-call(%x), custom_call_target="tpu_custom_call"
  ROOT %NAME = f32[64,64]{1,0:T(8,128)} custom-call(%bn_fused_forward.1, %near), custom_call_target="tpu_custom_call"
}
"""


def test_what_a_kernel_finds_on_the_chip_or_leaves_there_is_no_pass_through_memory():
    inside = {"forward": Passes(2, 1), "backward": Passes(4, 1)}
    counted = count(ON_CHIP.replace("NAME", "bn_fused_backward.1"), 64 * 64, 64 * 64 * 4, inside)
    assert (counted["reads"], counted["writes"], counted["padded_reads"]) == (1, 0, 2)
    assert (counted["inside_reads"], counted["inside_writes"]) == (2, 1)
    assert (counted["padded_inside_reads"], counted["padded_inside_writes"]) == (4, 2)
    row = Row(case_for(), "compiled", **counted)
    assert row.total == (6, 2)
    # where a kernel does not say what it computes, all of them share alike: a third of the operands is in memory
    counted = count(ON_CHIP.replace("NAME", "somebody"), 64 * 64, 64 * 64 * 4, inside)
    assert (counted["inside_reads"], counted["inside_writes"]) == (2, 1)


def test_a_kernel_whose_plan_does_not_tell_is_opaque():
    text = HLO.replace("TARGET", "mosaic_gpu_v2").replace("CONFIG", "")
    assert "inside_reads" not in count(text, 64 * 128, 64 * 128 * 4, None)


def test_a_plan_tells_its_passes_by_a_method_or_a_mapping():
    class Method:
        def passes(self, operation):
            return {"forward": (1, 1), "backward": (2, 1)}[operation]

    class Half:
        passes = {"forward": (2, 1)}

    both = {"forward": (1, 1), "backward": (2, 1)}
    assert planned_passes(Method(), OPERATIONS["fwd+bwd"]) == both
    assert planned_passes(Half(), OPERATIONS["fwd"]) == {"forward": (2, 1)}
    assert planned_passes(Half(), OPERATIONS["fwd+bwd"]) is None
    assert planned_passes(object(), OPERATIONS["fwd"]) is None


@pytest.mark.parametrize(
    ("options", "streaming", "resident"),
    [
        # Forward: statistics, then normalise. Backward: sums over (x, dy), then dx from them.
        ({}, {"fwd": (2, 1), "bwd": (4, 1), "fwd+bwd": (6, 2)}, {"fwd": (1, 1), "bwd": (2, 1), "fwd+bwd": (3, 2)}),
        ({"activation": "relu"}, {"fwd": (2, 1), "bwd": (4, 1)}, {"fwd": (1, 1), "bwd": (2, 1)}),
        # Added before nothing: its gradient is dy.
        ({"residual": True}, {"fwd": (3, 1), "bwd": (4, 1)}, {"fwd": (2, 1), "bwd": (2, 1)}),
        (
            {"residual": True, "activation": "relu"},
            {"fwd": (3, 1), "bwd": (5, 2), "fwd+bwd": (8, 3)},
            {"fwd": (2, 1), "bwd": (3, 2), "fwd+bwd": (5, 3)},
        ),
    ],
)
def test_the_ideal_counts_every_array_that_has_to_move(options, streaming, resident):
    setting = Setting((8, 4, 3, 3), **options)
    for name, figures in streaming.items():
        assert ideal(setting, name) == {"streaming": figures, "resident": resident[name]}


def test_registers_spills_and_shared_memory_are_the_largest_of_the_kernels(tmp_path):
    for name, registers, spills, shared in (("a", 29, 0, 65536), ("b", 255, 48, 1024)):
        (tmp_path / f"{name}.ptxas").write_text(
            f"    0 bytes stack frame, {spills} bytes spill stores, {spills} bytes spill loads\n"
            f"ptxas info    : Used {registers} registers, used 2 barriers, 1 bytes smem\n"
        )
        (tmp_path / f"{name}.mlir-passes.log").write_text(
            "gpu.launch blocks(%a) in (%b = %c8) threads(%d) in (%e = %c128) "
            f"dynamic_shared_memory_size %c{shared}_i32 {{\n"
        )
    assert gpu_resources(tmp_path) == {"registers": 255, "spill_bytes": 48, "on_chip_bytes": 65536}
    table = "MXU, VSTORE, VSTORE:SPILL, SALU\n    4     1     1     2\n== UTILIZATION:\n"
    for name, lines in (("k.1", "0 1 0 0\n0 0 1 1\n1 0 1 2\n"), ("other", "0 0 9 9\n" * 9)):
        (tmp_path / f"17-{name}-70-final_hlo-static-per-bundle-utilization.txt").write_text(table + lines)
    assert tpu_resources(tmp_path, ["k.1", "k.2"]) == {"bundles": 3, "spill_bytes": 2 * 4096}
    assert tpu_resources(tmp_path, []) == {}
    (empty := tmp_path / "empty").mkdir()
    assert gpu_resources(empty) == {}


@pytest.mark.parametrize("layout", workloads.LAYOUTS)
@pytest.mark.parametrize("layer", ["jnp", "equinox batch", "equinox ema", "no norm"])
def test_every_program_takes_and_gives_arrays_of_the_settings_shape(layer, layout):
    for block in (None, "conv-bn-relu-conv"):
        setting = Setting((4, 6, 5, 3), layout=layout, activation="relu", residual=True, block=block)
        outputs = {}
        for name in workloads.PASSES:
            function, specs, kept_bytes = make_program(setting, layer, name)
            outputs[name] = jax.eval_shape(function, *specs)
            assert (kept_bytes is None) == (name == "fwd")
        y, _ = outputs["fwd"]
        dparameters, dx, dresidual = outputs["bwd"]
        assert y.shape == dx.shape == dresidual.shape == setting.array_shape
        assert jax.tree.map(lambda leaf: leaf.shape, outputs["fwd+bwd"][2]) == jax.tree.map(
            lambda leaf: leaf.shape, outputs["bwd"]
        )
        # weight and bias, and inside a block both maps' weights
        assert len(jax.tree.leaves(dparameters)) == (2 if block is None else 4)
