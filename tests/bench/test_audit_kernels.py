"""What the audit tells of our kernels: what compiling took, and the instructions of their loops."""

import dataclasses
import json
import sys

import pytest

from bn_fused.bench.audit import sass
from bn_fused.bench.audit.blocks import Setting
from bn_fused.bench.audit.compile import arrays_read, audit, gpu_kernels
from bn_fused.bench.audit.report import NOT_COMPILED, columns, notes
from bn_fused.bench.audit.rows import Row, load, to_json

from support.audited import COPYING, case_for, compiled_row
from support.compilers import skip_without_compilers, skip_without_triton
from support.versions import on_the_newest_jax

SMALL = Setting((256, 128))


@pytest.mark.compilers
@on_the_newest_jax
def test_the_loops_of_a_kernel_of_pallas_gpu_are_found_and_spill_nothing():
    skip_without_compilers("h200")
    skip_without_triton()
    setting = Setting((64, 256, 14, 14), "bfloat16", "nhwc", "relu")
    (row,) = audit([case_for(layer="pallas_gpu", setting=setting)])
    assert (row.status, row.reason) == ("compiled", "")
    assert row.lowering_seconds > 0 and row.compiling_seconds > 0
    assert row.kernels == len(row.sass) and row.spill_bytes == 0
    over_x = [loop for kernel in row.sass for loop in kernel.over_x]
    assert len(over_x) >= 2 and any(loop.stores for loop in over_x) and not all(loop.stores for loop in over_x)
    for kernel in row.sass:
        assert kernel.local == 0 and kernel.registers <= row.registers
    for loop in over_x:
        # a shift, a subtraction, and two sums or a normalisation: no fewer, and not many times as many
        assert loop.arrays == 1 and 3 < loop.per_element < 20, loop
    headings, lines = columns([row])
    # `auto` takes it here.
    (cell,) = [
        dict(zip(headings, line, strict=True))["instructions"] for line in lines if line[1] == "pallas_gpu (auto)"
    ]
    assert cell.replace(", ", "/").count("/") == len(over_x) - 1


@pytest.mark.compilers
@on_the_newest_jax
def test_without_a_disassembler_the_row_says_what_to_install():
    skip_without_compilers("h200")
    hidden = "from bn_fused.bench.audit import sass\nsass.nvdisasm = lambda: None\n"
    (row,) = audit([case_for(layer="telling", setting=SMALL)], command=(sys.executable, "-c", hidden + COPYING))
    assert row.status == "compiled" and row.registers > 0 and row.sass == ()
    assert "instructions are not counted: they need nvdisasm" in row.reason and "deviceless triton" in row.reason
    headings, lines = columns([row])
    assert headings[-1] == "instructions" and lines[-1][-1] == "-"
    assert notes([row]) == [row.reason]


# Answers with a row of a program with a kernel, whose seconds and registers are 2 where kernels are dumped and 1 where
# they are not. It ends there at the layer "aborts".
ANSWERING = """
import json, os, sys
dumps = "BN_FUSED_AUDIT_DUMP" in os.environ
assert dumps == ("MOSAIC_GPU_DUMP_TO" in os.environ)
for line in sys.stdin:
    case = json.loads(line)
    setting = case.pop("setting")
    if dumps and case["layer"] == "aborts":
        os.abort()
    row = {"status": "compiled", "lowering_seconds": 1 + dumps, "registers": 1 + dumps, "sass": []}
    if case["layer"] == "plain":
        del row["sass"]
    print(json.dumps({**case, **setting, **row}), flush=True)
"""


def test_what_compilers_dump_is_of_a_process_of_its_own_and_the_seconds_are_not(no_compiler_needed):
    cases = [case_for(layer=layer) for layer in ("kernel", "plain", "aborts", "kernel")]
    rows = list(audit(cases, command=(sys.executable, "-c", ANSWERING)))
    assert [row.status for row in rows] == ["compiled"] * 4
    assert [row.lowering_seconds for row in rows] == [1, 1, 1, 1]
    assert [row.registers for row in rows] == [2, 1, 1, 2]
    assert [bool(row.reason) for row in rows] == [False, False, True, False]
    assert "what its kernels use is not known" in rows[2].reason and "SIGABRT" in rows[2].reason


def loop(label="a", instructions=60, values=16, stored=0, arrays=1):
    counts = sass.Counts(instructions, {"LDS.64": 4}, values, 0, stored, 0, 1)
    return sass.Loop(label, (), "innermost", counts, arrays)


def kernel(*loops, name="k"):
    return sass.Kernel(name, 32, 0, sass.Counts(200, {}, 0, 0, 0, 1, 1), loops)


def test_the_table_has_the_seconds_and_the_instructions_for_an_element():
    forward = kernel(loop(), loop("b", 100, 32, 8, 2))
    row = compiled_row(
        case_for(), lowering_seconds=0.36, compiling_seconds=1.24, sass=(forward, kernel(), kernel(loop("c", 40)))
    )
    others = (
        compiled_row(case_for(layer="flax"), lowering_seconds=0.04, compiling_seconds=0.5),
        Row(case_for(layer="triton"), "refused", "why"),
    )
    headings, lines = columns([row, *others])
    cells = {line[1]: dict(zip(headings, line, strict=True)) for line in lines}
    assert (cells["jnp"]["seconds"], cells["jnp"]["instructions"]) == ("0.4+1.2 s", "3.8/6.2, 2.5")
    assert (cells["flax"]["seconds"], cells["flax"]["instructions"]) == ("0.0+0.5 s", "-")
    assert (cells["triton"]["around"], cells["triton"]["seconds"]) == (NOT_COMPILED, "")


def test_a_compiled_rows_reason_does_not_say_that_it_was_not():
    rows = [compiled_row(case_for(), reason="unknown"), Row(case_for(layer="triton"), "refused", "why")]
    assert notes(rows) == ["jnp: unknown", "triton: not compiled: why"]


def test_kernels_are_saved_and_read_back():
    row = compiled_row(case_for(), lowering_seconds=0.5, compiling_seconds=1.0, sass=(kernel(loop(), loop("b")),))
    for one in (row, dataclasses.replace(row, sass=()), dataclasses.replace(row, sass=None)):
        assert load(to_json([one], command="bn-bench audit", versions={}, interrupted=False)) == (one,)


def test_an_audit_that_was_saved_without_them_is_read_and_has_no_columns_for_them():
    row = compiled_row(case_for(), lowering_seconds=0.5, compiling_seconds=1.0, sass=(kernel(loop()),))
    document = json.loads(to_json([row], command="bn-bench audit", versions={}, interrupted=False))
    (values,) = document["rows"]
    for name in ("lowering_seconds", "compiling_seconds", "sass"):
        del values[name]
    values["seconds"] = 1.5
    (before,) = load(json.dumps(document))
    assert before == compiled_row(case_for())
    headings, _ = columns([before])
    assert not {"seconds", "instructions"} & set(headings)


def test_a_forwards_sums_read_x_alone_and_its_results_the_residual_too(tmp_path):
    code = "{label}:\nLDS R4, [R0]\nSHF.L.U32 R6, R4, 0x10, RZ\n{store}\n@P0 BRA `({label})"
    lines = [code.format(label=".L_a", store="NOP"), code.format(label=".L_b", store="STS [R0], R6"), "EXIT"]
    numbered = enumerate("\n".join(lines).splitlines())
    text = "\n".join(line if line.endswith(":") else f"  /*{16 * index:04x}*/ {line} ;" for index, line in numbered)
    for number, name in enumerate(("bn_fused_some_forward", "bn_fused_some_backward", "other")):
        (tmp_path / f"{name}_{number}.sass").write_text(f".text.{name}_mosaic_gpu_kernel:\n{text}\n")
    found = gpu_kernels(tmp_path, {"bn_fused_some_forward": 2, "bn_fused_some_backward": 3})
    assert {kernel.name: [loop.arrays for loop in kernel.loops] for kernel in found} == {
        "bn_fused_some_forward": [1, 2], "bn_fused_some_backward": [3, 3], "other": [None, None],
    }  # fmt: skip
    assert [loop.per_element for loop in found[-1].loops] == [None, None]


CALLS = """HloModule m

ENTRY %main (x: bf16[64,128], r: bf16[64,128], w: f32[128]) -> bf16[64,128] {
  %x = bf16[64,128]{1,0} parameter(0)
  %r = bf16[64,128]{1,0} parameter(1)
  %w = f32[128]{0} parameter(2)
  %call.1 = f32[2,128]{1,0} custom-call(%x), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/vmap()/bn_fused_moments/mpmd_map" id=1}
  %call.2 = f32[2,128]{1,0} custom-call(%call.1, %w), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/bn_fused_merge/mpmd_map"}
  ROOT %call.3 = bf16[64,128]{1,0} custom-call(%x, %r, %call.2), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/bn_fused_normalise/mpmd_map"}
}
"""  # noqa: E501


def test_how_many_arrays_of_xs_size_a_kernel_reads_stands_in_the_program():
    assert arrays_read(CALLS, 64 * 128, 64 * 128 * 2) == {"bn_fused_moments": 1, "bn_fused_normalise": 2}
