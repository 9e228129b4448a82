"""`bn-bench audit`: what it counts for chips that are not there, the processes it works in, what it prints and saves.

What is compiled for a chip needs its compiler; those tests name what to install when they are skipped.
"""

import dataclasses
import json
import os
import sys
import time

import pytest
from click.testing import CliRunner

from bn_fused.bench import deviceless, installing, providers, workloads
from bn_fused.bench.audit.blocks import Setting, make_program
from bn_fused.bench.audit.compile import (
    OPERATIONS,
    audit,
    cases_of,
    count,
    gpu_resources,
    planned_passes,
    tpu_resources,
)
from bn_fused.bench.audit.report import columns
from bn_fused.bench.audit.rows import Case, Passes, Row, ideal, load, to_json
from bn_fused.bench.audit.summary import summary
from bn_fused.bench.child import Child, ChildEnded
from bn_fused.bench.commands.audit import choose_layers, command

from support import ROOT
from support.compilers import skip_without_compilers

SETTING = Setting((32, 64, 56, 56))
SMALL = Setting((256, 128))


def run(*arguments):
    return CliRunner().invoke(command, [str(argument) for argument in arguments], prog_name="bn-bench audit")


def compiled_row(case, **fields):
    return Row(
        case, "compiled", reads=2.0, writes=1.0, padded_reads=2.0, padded_writes=1.0, inside_reads=0.0,
        inside_writes=0.0, padded_inside_reads=0.0, padded_inside_writes=0.0, launches=3, temporary_bytes=0, **fields,
    )  # fmt: skip


def case_for(target="h200", layer="jnp", pass_name="fwd", setting=SETTING):
    return Case(target, "shape", setting, layer, pass_name)


# ------------------------------------------------------------------------------------- compiled for chips


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """The saved rows of one run for two GPUs, by target, layer and pass; and what it printed."""
    skip_without_compilers("h200", "a100")
    path = tmp_path_factory.mktemp("audit") / "audit.json"
    done = run(
        "--target", "h200", "--target", "a100", "--shape", "32,64,56,56", "--backend", "jnp", "--against", "equinox",
        "--json", path,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = load(path.read_text(encoding="utf-8"))
    return {(row.case.target, row.case.layer, row.case.pass_name): row for row in rows}, done.output


@pytest.mark.compilers
def test_equinox_reads_x_three_times_forward_and_eight_times_in_all(audited):
    for layer in ("equinox batch", "equinox ema"):
        forward, both = (audited[0]["h200", layer, name] for name in ("fwd", "fwd+bwd"))
        assert (forward.reads, forward.writes) == (3, 1), forward.details
        assert (both.reads, both.writes) == (8, 2), both.details


@pytest.mark.compilers
def test_the_jnp_backend_makes_the_passes_of_the_streaming_ideal(audited):
    for name in ("fwd", "fwd+bwd"):
        row = audited[0]["h200", "jnp", name]
        assert (row.reads, row.writes) == ideal(SETTING, name)["streaming"], row.details
        assert row.auto and row.copies == ()


@pytest.mark.compilers
def test_two_gpus_are_compiled_for_in_one_run(audited):
    assert {target for target, _, _ in audited[0]} == {"h200", "a100"}
    assert all(row.status == "compiled" for row in audited[0].values())


@pytest.mark.compilers
def test_kept_is_x_alone_with_the_hand_written_gradient_and_more_without(audited):
    nbytes = SETTING.nbytes
    assert audited[0]["h200", "jnp", "fwd"].kept_bytes is None
    assert 1 <= audited[0]["h200", "jnp", "fwd+bwd"].kept_bytes / nbytes < 1.01
    assert audited[0]["h200", "equinox batch", "fwd+bwd"].kept_bytes / nbytes > 2


@pytest.mark.compilers
def test_the_ideal_stands_beside_the_rows(audited):
    lines = [line.split() for line in audited[1].splitlines()]
    assert ["fwd", "ideal,", "streaming", "2R+1W"] in lines and ["fwd+bwd", "ideal,", "resident", "3R+2W"] in lines
    assert any(line[:4] == ["fwd", "jnp", "(auto)", "2R+1W"] for line in lines)
    assert "h200: shape (32,64,56,56) float32 nchw" in audited[1]


# A backend whose forward hands y through a kernel that copies it, for the process that compiles. Its plan says that the
# kernel reads what it copies three times.
COPYING = """
import dataclasses
import jax
from jax.experimental import pallas as pl
from bn_fused import kernels
from bn_fused.kernels.backends import jnp
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
    y, *rest = jnp.forward(*operands, spec=spec, **named)
    return {"tpu": tpu_copy, "cuda": gpu_copy}[spec.plan.platform](y), *rest

operations = {name: getattr(jnp, name) for name in OPERATIONS} | {"forward": forward}
for name, plan in (("telling", TellingPlan), ("silent", Plan)):
    kernels.register(
        kernels.Backend(name, operations, plan=lambda problem, target, plan=plan: plan(target.platform))
    )
kernels.register(kernels.Backend("refusing", operations, refusal=lambda problem, target: "it wants more rows"))
from bn_fused.bench.audit.compile import serve
serve()
"""


def audit_with_kernels(target, *layers, **options):
    cases = [case_for(target, layer, setting=SMALL) for layer in layers]
    return {row.case.layer: row for row in audit(cases, command=(sys.executable, "-c", COPYING), **options)}


@pytest.mark.compilers
@pytest.mark.parametrize("target", ["h200", "v5e"])
def test_passes_inside_a_kernel_are_its_plans_and_those_around_do_not_count_its_operands(target):
    skip_without_compilers(target)
    found = audit_with_kernels(target, "telling", "silent", "refusing")
    telling, silent, refusing = (found[name] for name in ("telling", "silent", "refusing"))
    for row in (telling, silent):
        assert (row.status, row.kernels) == ("compiled", 1), row.reason
        assert (row.operand_reads, row.operand_writes) in ((1, 1), (0, 0), (1, 0), (0, 1))  # 0 where VMEM holds them
        assert row.writes >= (1 if target == "h200" else 0)
    # Three reads and a write by the plan, of what lies in memory.
    assert (telling.inside_reads, telling.inside_writes) == (3 * telling.operand_reads, telling.operand_writes)
    assert target != "h200" or telling.inside_reads == 3
    assert silent.inside_reads is None
    # 64 x 128 float32, and what the pipeline adds.
    assert telling.on_chip_bytes >= 64 * 128 * 4
    if target == "h200":
        assert (telling.operand_reads, telling.operand_writes) == (1, 1)
        assert telling.registers > 0 and telling.spill_bytes == 0
    assert refusing.status == "refused" and "it wants more rows" in refusing.reason
    headings, lines = columns([telling, silent, refusing])
    cells = {line[1]: dict(zip(headings, line, strict=True)) for line in lines}
    inside = str(Passes(telling.inside_reads, telling.inside_writes))
    assert cells["telling"]["inside"] == inside and "opaque" in cells["silent"]["inside"]
    assert cells["refusing"]["around"] == "not compiled"


@pytest.mark.compilers
def test_a_tpu_kernels_instructions_are_counted_when_asked_for():
    skip_without_compilers("v5e")
    row = audit_with_kernels("v5e", "telling", instructions=True)["telling"]
    assert row.status == "compiled", row.reason
    # 64 x 128 float32 are 8 registers: at least that many loads, of which an instruction runs few.
    assert row.bundles > 8 and row.spill_bytes == 0


@pytest.mark.compilers
def test_a_block_is_held_against_itself_without_a_norm(tmp_path):
    skip_without_compilers("h200")
    done = run(
        "--shape", "8,64,16,16", "--block", "conv-bn-relu-conv", "--layout", "nchw", "--layout", "nhwc", "--backend",
        "jnp", "--against", "none", "--json", tmp_path / "block.json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = {
        (row.case.setting.layout, row.case.layer, row.case.pass_name): row
        for row in load((tmp_path / "block.json").read_text(encoding="utf-8"))
    }
    assert len(rows) == 8 and all(row.status == "compiled" for row in rows.values())
    for layout in ("nchw", "nhwc"):
        for pass_name in ("fwd", "fwd+bwd"):
            assert rows[layout, "jnp", pass_name].launches > rows[layout, "no norm", pass_name].launches
        assert rows[layout, "jnp", "fwd"].reads > rows[layout, "no norm", "fwd"].reads
    assert "over no norm" in done.output and "in conv-bn-relu-conv" in done.output


@pytest.mark.compilers
@pytest.mark.slow
@pytest.mark.parametrize("target", deviceless.COMPILABLE)
def test_every_target_compiles_every_backend_that_takes_it(target):
    skip_without_compilers(target)
    settings = [("shape", SETTING), ("shape", Setting((64, 256, 14, 14), "bfloat16", "nhwc", "relu", True))]
    layers = [name for name in audit_layers() if name != "reference"]
    for row in audit(cases_of([target], settings, layers, ["fwd", "bwd", "fwd+bwd"]), time_limit=300):
        assert row.status in ("compiled", "refused"), row


def audit_layers():
    from bn_fused import kernels

    return kernels.backend_names()


# ------------------------------------------------------------------------------------- counting


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


# The forward's operand comes from memory, in a layout that pads it to twice its size; what it returns stays on the chip.
# The backward reads that, and an array that XLA has brought onto the chip.
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
            {"fwd": (3, 1), "bwd": (6, 2), "fwd+bwd": (9, 3)},
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
    import jax

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


# ------------------------------------------------------------------------------------- processes


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"


# Answers a request with the process id of a child of its own, and hangs at the next.
HANGS = """
import subprocess, sys, time
from bn_fused.bench.child import answer_requests
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
answer_requests(lambda request: time.sleep(600) if request == "hang" else grandchild.pid)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_process_that_hangs_is_ended_with_its_children():
    with Child((sys.executable, "-c", HANGS), os.environ) as child:
        grandchild = child.ask("who", 60)
        assert alive(grandchild)
        with pytest.raises(ChildEnded, match="stopped at the time limit of 0.5 s"):
            child.ask("hang", 0.5)
    deadline = time.monotonic() + 10
    while alive(grandchild) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(grandchild)


def test_how_a_process_ended_is_said_in_a_line():
    script = "import os, sys; sys.stdin.readline(); print('LLVM ERROR: no', file=sys.stderr, flush=True); os.abort()"
    with Child((sys.executable, "-c", script), os.environ) as child:
        with pytest.raises(ChildEnded, match="the process was ended by SIGABRT: LLVM ERROR: no"):
            child.ask("anything", 60)


def test_what_a_compiler_prints_does_not_get_between_the_answers():
    script = (
        "import os; from bn_fused.bench.child import answer_requests\n"
        "answer_requests(lambda request: (os.system('echo noise'), print('noise'), request)[-1])"
    )
    with Child((sys.executable, "-c", script), os.environ) as child:
        assert [child.ask(word, 60) for word in ("one", "two")] == ["one", "two"]


# Dies at the layer "aborts", hangs at "hangs", and answers the others with a row that names its process. It needs no
# JAX, so that it starts within any time limit.
UNSTABLE = """
import json, os, sys, time
for line in sys.stdin:
    case = json.loads(line)
    setting = case.pop("setting")
    if case["layer"] == "aborts":
        os.abort()
    if case["layer"] == "hangs":
        time.sleep(600)
    print(json.dumps({**case, **setting, "status": "compiled", "reads": os.getpid(), "writes": 1.0}), flush=True)
"""


def test_a_compiler_that_aborts_or_hangs_costs_its_own_row_only(no_compiler_needed):
    cases = [case_for(layer=layer) for layer in ("one", "aborts", "two", "hangs", "three")]
    rows = list(audit(cases, time_limit=4, command=(sys.executable, "-c", UNSTABLE)))
    assert [row.case for row in rows] == cases
    assert [row.status for row in rows] == ["compiled", "failed", "compiled", "failed", "compiled"]
    assert "SIGABRT" in rows[1].reason and "time limit of 4 s" in rows[3].reason


def test_every_target_has_a_process_of_its_own(no_compiler_needed):
    cases = [case_for(target, layer) for target in ("h200", "v5e", "a100") for layer in ("one", "two")]
    rows = list(audit(cases, command=(sys.executable, "-c", UNSTABLE)))
    processes = [row.reads for row in rows]
    assert processes[::2] == processes[1::2] and len(set(processes)) == 3


# ------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--target", "h2000"), "'h2000' is not one of 'a100', 'l4', 'l40s', 'rtx4090', 'h100'"),
        (("--shape", "32,x"), "'32,x'"),
        (("--layout", "chwn"), "'chwn'"),
        (("--backend", "cuda"), "'cuda': accepted are "),
        (("--against", "numpy"), "'numpy'"),
        (("--pass", "backward"), "'backward'"),
        (("--block", "attention"), "'attention'"),
        (("--block", "conv-bn-relu-conv", "--workload", "mlp"), "block 'conv-bn-relu-conv' takes workloads with"),
        (("--time-limit", "0"), "--time-limit"),
        (("--json", "no/such/folder/a.json"), "the folder of 'no/such/folder/a.json' does not exist"),
    ],
)
def test_input_it_cannot_use_is_named_with_status_2(arguments, named):
    done = run(*arguments)
    assert done.exit_code == 2
    assert named in " ".join(done.output.split())


def test_a_compiler_that_is_not_installed_is_named_with_its_command_and_status_1(monkeypatch):
    monkeypatch.setattr(deviceless.importlib.util, "find_spec", lambda name: None)
    done = run("--target", "v5e", "--shape", "8,4", "--backend", "jnp", "--against", "none")
    assert done.exit_code == 1
    text = " ".join(done.output.split())
    listed = f"$({installing.python()} -m bn_fused.bench.deviceless tpu)"
    assert (
        f"not compiled: the compiler for v5e is not installed: {installing.pip_install('--no-deps')} {listed}" in text
    )
    # Neither an empty table nor what its columns mean.
    assert "around" not in text


@pytest.fixture
def answers(monkeypatch):
    """The rows that a run gets instead of compiling: `answers(function of the case)`."""

    def set_answers(answer):
        def fake(cases, **_):
            for case in cases:
                yield answer(case)

        monkeypatch.setattr("bn_fused.bench.commands.audit.audit", fake)

    return set_answers


@pytest.mark.parametrize(
    ("statuses", "exit_code"),
    [
        ({}, 0),
        ({"jnp": "failed"}, 1),
        ({"jnp": "refused"}, 0),
        ({"equinox batch": "failed"}, 0),
        ({"equinox batch": "missing", "equinox ema": "missing"}, 0),
        ({"jnp": "refused", "equinox batch": "failed", "equinox ema": "missing"}, 1),
    ],
)
def test_the_exit_status_is_1_if_ours_failed_or_nothing_was_compiled(statuses, exit_code, answers):
    def answer(case):
        status = statuses.get(case.layer)
        return compiled_row(case) if status is None else Row(case, status, "the reason why")

    answers(answer)
    done = run("--shape", "8,4", "--backend", "jnp", "--against", "equinox")
    assert done.exit_code == exit_code, done.output
    assert ("the reason why" in done.output) == bool(statuses)
    assert ("FAILED: jnp, fwd for h200" in done.output) == (statuses.get("jnp") == "failed")


def test_an_interrupted_run_prints_and_saves_what_is_finished(answers, tmp_path):
    asked = []

    def answer(case):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(case)
        return compiled_row(case)

    answers(answer)
    done = run("--shape", "8,4", "--against", "equinox", "--backend", "jnp", "--json", tmp_path / "audit.json")
    assert done.exit_code == 130
    assert "interrupted: 2 of 6 rows are finished" in done.output and "equinox batch" in done.output
    text = (tmp_path / "audit.json").read_text(encoding="utf-8")
    assert [row.case for row in load(text)] == asked
    assert json.loads(text)["interrupted"] is True


def test_the_saved_rows_read_back_as_they_were(answers, tmp_path):
    made = []

    def answer(case):
        made.append(
            compiled_row(case, copies=("t",), kept_bytes=7, details=("t (transpose): 1R + 1W",))
            if case.layer == "jnp"
            else Row(case, "refused", "why")
        )
        return made[-1]

    answers(answer)
    done = run(
        "--shape", "8,4,2,2", "--layout", "nhwc", "--dtype", "bfloat16", "--activation", "relu", "--residual",
        "--backend", "jnp", "--against", "equinox", "--json", tmp_path / "a.json", "--markdown", tmp_path / "a.md",
    )  # fmt: skip
    assert done.exit_code == 0
    assert load((tmp_path / "a.json").read_text(encoding="utf-8")) == tuple(made)
    assert made[0].case.setting == Setting((8, 4, 2, 2), "bfloat16", "nhwc", "relu", True)
    lines = (tmp_path / "a.md").read_text(encoding="utf-8").splitlines()
    assert "### h200: shape (8,4,2,2) bfloat16 nhwc relu residual" in lines
    table = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert any("| fwd | jnp | 2R+1W | 3 | 1 | 0.00 |" in line for line in table)


@pytest.mark.parametrize("text", ["", "[]", '{"audit_schema_version": 99, "rows": []}'])
def test_another_versions_file_is_refused_in_a_line(text):
    with pytest.raises(ValueError, match="not JSON|reads version 1") as refused:
        load(text)
    assert "\n" not in str(refused.value)


def test_a_rival_that_is_not_installed_is_named_with_its_command(no_compiler_needed, monkeypatch):
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: None)
    (row,) = audit([case_for(layer="flax")], command=(sys.executable, "-c", UNSTABLE))
    assert (row.status, row.reason) == ("missing", f"flax is not installed: {installing.pip_install('flax')}")


def test_without_spatial_axes_both_layouts_are_one(answers):
    answers(compiled_row)
    done = run("--shape", "8,4", "--layout", "nchw", "--layout", "nhwc", "--backend", "jnp", "--against", "none")
    assert done.output.count("h200: shape (8,4) float32\n") + done.output.count("h200: shape (8,4) float32 ") == 1


def test_an_interruption_ends_the_compiling_process(no_compiler_needed):
    rows = audit([case_for(layer="one"), case_for(layer="two")], command=(sys.executable, "-c", UNSTABLE))
    process = int(next(rows).reads)
    assert alive(process)
    rows.close()
    assert not alive(process)


# ------------------------------------------------------------------------------------- saved audits, summed up


def with_total(case, reads, writes=1.0):
    return dataclasses.replace(compiled_row(case), reads=reads, padded_reads=reads, writes=writes, padded_writes=writes)


def line_of(text, setting, layer):
    """The cells of a layer's line in the first table that has the setting."""
    lines = text.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(f"| {setting} "))
    line = next(line for line in lines[start:] if line.split("|")[2].strip() == layer)
    return [cell.strip() for cell in line.strip("|").split("|")][2:]


def test_the_summary_marks_the_fewest_passes_of_a_setting_on_a_chip():
    block = dataclasses.replace(SETTING, block="conv-bn-relu-conv")
    rows = [
        with_total(case_for("v4", "jnp"), 2.0), with_total(case_for("v4", "equinox batch"), 4.0),
        with_total(case_for("v5e", "jnp"), 4.0), with_total(case_for("v5e", "equinox batch"), 4.03),
        with_total(case_for("v5e", "no norm", setting=block), 0.5), with_total(case_for("v5e", "jnp", setting=block), 1.0),
        with_total(case_for("v5e", "equinox batch", setting=block), 2.0),
        Row(case_for("v4", "pallas_tpu"), "failed", "it hung"),
    ]  # fmt: skip
    text = summary("Chips", rows, [{"command": "bn-bench audit", "versions": {"jax": "1.2"}}])
    alone, inside = "alone (32,64,56,56) nchw float32", "conv-bn-relu-conv (32,64,56,56) nchw float32"
    assert line_of(text, alone, "jnp") == ["**3**", "**5**"]
    # within 2 % of the fewest
    assert line_of(text, alone, "equinox batch") == ["5", "**5.03**"]
    assert line_of(text, alone, "pallas_tpu") == ["failed", ""]
    # what a block moves without a norm is no layer's
    assert line_of(text, inside, "no norm") == ["", "1.5"] and line_of(text, inside, "jnp") == ["", "**2**"]
    assert (
        "- alone: of 2 programs the fewest passes are those of jnp in 2 (1 of them alone), equinox batch in 1" in text
    )
    assert "not compiled: v4, pallas_tpu: it hung" in text and "jax 1.2" in text and "# Chips" in text


def test_saved_audits_are_read_and_summed_up_without_compiling(tmp_path, monkeypatch):
    monkeypatch.setattr("bn_fused.bench.commands.audit.audit", lambda *_, **__: pytest.fail("it compiled"))
    paths = []
    for target in ("v4", "v5e"):
        rows = [with_total(case_for(target, layer), 2.0) for layer in ("jnp", "equinox batch")]
        paths.append(tmp_path / f"{target}.json")
        text = to_json(rows, command=f"bn-bench audit --target {target}", versions={"jax": "1"}, interrupted=False)
        paths[-1].write_text(text)
    sources = [argument for path in paths for argument in ("--from", path)]
    done = run(*sources, "--summary", tmp_path / "all.md", "--json", tmp_path / "all.json", "--title", "Both")
    assert done.exit_code == 0, done.output
    assert "v4: shape" in done.output and "v5e: shape" in done.output
    text = (tmp_path / "all.md").read_text()
    assert text.startswith("# Both\n") and "--target v4" in text and "--target v5e" in text
    assert len(load((tmp_path / "all.json").read_text())) == 4
    (tmp_path / "other.json").write_text("{}")
    for path, said in ((tmp_path / "other.json", "audit_schema_version"), (tmp_path / "none.json", "No such file")):
        done = run("--from", path)
        assert done.exit_code == 2 and said in done.output.splitlines()[-1] and str(path) in done.output


@pytest.mark.parametrize(("chips", "title"), [("tpu", "a TPU"), ("gpu", "an NVIDIA GPU")])
def test_the_document_of_the_chips_is_that_of_the_recorded_audits(chips, title, tmp_path):
    recorded = sorted((ROOT / "bench" / "results" / "audit" / chips).glob("*.json"))
    assert recorded
    sources = [argument for path in recorded for argument in ("--from", path)]
    done = run(*sources, "--summary", tmp_path / "made.md", "--title", f"What each layer moves on {title}")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "made.md").read_text() == (ROOT / "docs" / f"{chips}-audit.md").read_text()


def test_one_form_of_a_rival_can_be_asked_for():
    assert choose_layers(("jnp",), ("equinox batch",)) == ["jnp", "equinox batch"]
    assert choose_layers(("jnp",), ("equinox",)) == ["jnp", "equinox batch", "equinox ema"]
    assert choose_layers(("jnp",), ("none",)) == ["jnp"]


def test_what_chooses_programs_does_not_go_with_saved_rows(tmp_path):
    row = compiled_row(case_for())
    saved = tmp_path / "audit.json"
    saved.write_text(to_json([row], command="bn-bench audit", versions={}, interrupted=False))
    assert run("--from", str(saved)).exit_code == 0
    for option in (("--target", "v5e"), ("--shape", "9,9"), ("--backend", "jnp")):
        done = run("--from", str(saved), *option)
        assert done.exit_code == 2 and f"{option[0]} does not go with it" in done.output


def test_over_no_norm_is_the_difference_of_what_is_in_all():
    setting = Setting((4, 64), block="mlp")
    fields = {"padded_reads": 3.0, "padded_writes": 2.0, "padded_inside_reads": 4.0, "padded_inside_writes": 2.0}
    base = dataclasses.replace(compiled_row(case_for(layer="no norm")), padded_reads=1.0, padded_writes=1.0)
    ours = dataclasses.replace(compiled_row(case_for()), kernels=1, **fields)
    rows = [dataclasses.replace(row, case=dataclasses.replace(row.case, setting=setting)) for row in (base, ours)]
    headings, lines = columns(rows)
    found = dict(zip(headings, lines[-1], strict=True))
    assert (found["in all"], found["over no norm"], found["launches"]) == ("7R+4W", "6R+3W", "3 (1 ours)")


def test_fewer_passes_than_without_the_norm_are_a_plain_minus():
    assert str(Passes(-0.5, -1)) == "-0.5R-1W"
