"""`bn-bench audit`: what it counts for chips that are not there, the processes it works in, what it prints and saves.

What is compiled for a chip needs its compiler; those tests name what to install when they are skipped.
"""

import json
import os
import sys
import time

import pytest

from bn_fused.bench import deviceless, installing, providers
from bn_fused.bench.audit.blocks import Setting
from bn_fused.bench.audit.compile import audit, cases_of
from bn_fused.bench.audit.report import columns
from bn_fused.bench.audit.rows import Passes, Row, ideal, load
from bn_fused.bench.child import Child, ChildEnded
from bn_fused.bench.commands.audit import choose_layers

from support.audited import COPYING, SETTING, case_for, compiled_row, run
from support.compilers import skip_without_compilers
from support.versions import on_the_newest_jax

SMALL = Setting((256, 128))


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


def audit_with_kernels(target, *layers, **options):
    cases = [case_for(target, layer, setting=SMALL) for layer in layers]
    return {row.case.layer: row for row in audit(cases, command=(sys.executable, "-c", COPYING), **options)}


@pytest.mark.compilers
@pytest.mark.parametrize("target", ["h200", "v5e"])
@on_the_newest_jax
def test_passes_inside_a_kernel_are_its_plans_and_those_around_do_not_count_its_operands(target):
    skip_without_compilers(target)
    rows = audit_with_kernels(target, "telling", "silent", "refusing")
    telling, silent, refusing = (rows[name] for name in ("telling", "silent", "refusing"))
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
@on_the_newest_jax
def test_a_tpu_kernels_instructions_are_counted_when_asked_for():
    skip_without_compilers("v5e")
    row = audit_with_kernels("v5e", "telling", instructions=True)["telling"]
    assert row.status == "compiled", row.reason
    # 64 x 128 float32 are 8 registers: at least that many loads, of which an instruction runs few.
    assert row.bundles > 8 and row.spill_bytes == 0


@pytest.mark.compilers
@on_the_newest_jax
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
    said = pytest.raises(ChildEnded, match="the process was ended by SIGABRT: LLVM ERROR: no")
    with Child((sys.executable, "-c", script), os.environ) as child, said:
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
    rows = []

    def answer(case):
        rows.append(
            compiled_row(case, copies=("t",), kept_bytes=7, details=("t (transpose): 1R + 1W",))
            if case.layer == "jnp"
            else Row(case, "refused", "why")
        )
        return rows[-1]

    answers(answer)
    done = run(
        "--shape", "8,4,2,2", "--layout", "nhwc", "--dtype", "bfloat16", "--activation", "relu", "--residual",
        "--backend", "jnp", "--against", "equinox", "--json", tmp_path / "a.json", "--markdown", tmp_path / "a.md",
    )  # fmt: skip
    assert done.exit_code == 0
    assert load((tmp_path / "a.json").read_text(encoding="utf-8")) == tuple(rows)
    assert rows[0].case.setting == Setting((8, 4, 2, 2), "bfloat16", "nhwc", "relu", True)
    lines = (tmp_path / "a.md").read_text(encoding="utf-8").splitlines()
    assert "### h200: shape (8,4,2,2) bfloat16 nhwc relu residual" in lines
    table = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert any("| fwd | jnp | 2R+1W | 3 | 1 | 0.00 |" in line for line in table)


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


def test_one_form_of_a_rival_can_be_asked_for():
    assert choose_layers(("jnp",), ("equinox batch",)) == ["jnp", "equinox batch"]
    assert choose_layers(("jnp",), ("equinox",)) == ["jnp", "equinox batch", "equinox ema"]
    assert choose_layers(("jnp",), ("none",)) == ["jnp"]
