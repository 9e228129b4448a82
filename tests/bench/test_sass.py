"""What is counted in a kernel's SASS, against kernels written by hand; none of them needs a compiler."""

import dataclasses
import json
import re

import pytest

from bn_fused.bench.audit import sass
from bn_fused.bench.audit.control_flow import read


def nvdisasm(body, name="kernel"):
    """Lines of a kernel as nvdisasm writes them."""
    lines, address = [f'\t.section\t.text.{name},"ax",@progbits', f"        .global         {name}", f"{name}:"], 0
    lines.append(f".text.{name}:")
    for line in map(str.strip, body.strip().splitlines()):
        if line.endswith(":"):
            lines.append(line)
            continue
        guard, code = line.split(" ", 1) if line.startswith("@") else ("", line)
        lines.append(f"        /*{address:04x}*/ {guard:>20} {code} ;")
        address += 16
    return "\n".join(lines)


def with_control_codes(text):
    """The same as Mosaic GPU dumps it: with the scheduler's codes, without semicolons."""
    return "\n".join(f"  1&0:-:2:Y:05{line.removesuffix(' ;')}" if "/*" in line else line for line in text.splitlines())


def cuobjdump(text):
    """The same as cuobjdump writes it: with the codes of instructions, and addresses in place of labels."""
    lines, addresses, waiting = [], {}, []
    for line in text.splitlines():
        if line.startswith(".L"):
            waiting.append(line.removesuffix(":"))
        elif "/*" in line:
            addresses |= {label: "0x" + line.split("*/")[0].split("/*")[1].lstrip("0") for label in waiting}
            waiting = []
            lines.append(f"{line}                    /* 0x000000ff0e027210 */")
            lines.append("                                                      /* 0x000fc60007ffe0ff */")
        elif line.startswith(".text"):
            lines.append(f"\t\tFunction : {line.removeprefix('.text.').removesuffix(':')}")
    text = "\n".join(lines)
    for label, address in addresses.items():
        text = text.replace(f"`({label})", address)
    return text


def counted(body, text=nvdisasm):
    (kernel,) = sass.kernels(text(body))
    return kernel


def loops_of(kernel):
    return {loop.label: loop for loop in kernel.loops}


# A loop over tiles, each of which it waits for, around one over rows, with runs of four 16-bit values, and one for the
# rest of a tile. Where a barrier is not yet through, it is waited for behind the kernel's end.
TILES = """
    S2R R0, SR_TID.X
    LDC.64 R2, c[0x0][0x210]
    .L_tiles:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R30+URZ], R31
    @!P0 BRA `(.L_wait)
    .L_filled:
    UMOV UR4, 0x8
    .L_rows:
    LDS.64 R4, [R0]
    LDS.64 R6, [R0+0x400]
    PRMT R8, R4.reuse, 0x7632, R8
    IMAD.U32 R9, R4, 0x10000, RZ
    SHF.L.U32 R10, R5, 0x10, RZ
    LOP3.LUT R11, R5, 0xffff0000, RZ, 0xc0, !PT
    PRMT R12, R6, 0x7632, R12
    SHF.L.U32 R13, R7, 0x10, RZ
    FFMA R14, R9, R10, R11
    @!PT LDS RZ, [RZ]
    @P2 FADD R14, R14, R12
    F2FP.BF16.F32.PACK_AB R16, R13, R14
    STS.64 [R0+0x8000], R16
    UIADD3 UR4, UR4, -0x1, URZ
    ISETP.NE.U32.AND P1, PT, RZ, UR4, PT
    @P1 BRA `(.L_rows)
    @P3 BRA `(.L_no_rest)
    .L_rest:
    LDS R4, [R0]
    SHF.L.U32 R5, R4, 0x10, RZ
    STS [R0], R5
    @P4 BRA `(.L_rest)
    .L_no_rest:
    UTMASTG.2D [UR4], [UR8]
    @P5 BRA `(.L_tiles)
    STG.E.128 desc[UR8][R2.64], R4
    EXIT
    .L_wait:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R30+URZ], R31
    @!P0 NANOSLEEP.SYNCS 0x989680
    @!P0 BRA `(.L_wait)
    BRA `(.L_filled)
    .L_end:
    BRA `(.L_end)
"""


@pytest.mark.parametrize("text", [nvdisasm, lambda body: with_control_codes(nvdisasm(body))])
def test_loops_have_the_instructions_that_no_inner_loop_has(text):
    kernel = counted(TILES, text)
    loops = loops_of(kernel)
    assert list(loops) == [".L_tiles", ".L_wait", ".L_rows", ".L_rest"]
    assert {label: (loop.kind, loop.around) for label, loop in loops.items()} == {
        ".L_tiles": ("outer", ()),
        ".L_wait": ("waits", (".L_tiles",)),
        ".L_rows": ("innermost", (".L_tiles",)),
        ".L_rest": ("innermost", (".L_tiles",)),
    }
    counts = {label: loop.counts for label, loop in loops.items()}
    # the way back from waiting is the outer loop's, and what stands behind the kernel's end is nobody's
    assert {label: count.instructions for label, count in counts.items()} == {
        ".L_tiles": 7, ".L_wait": 3, ".L_rows": 16, ".L_rest": 4,
    }  # fmt: skip
    assert kernel.counts.instructions == 2 + 7 + 3 + 16 + 4 + 2
    assert counts[".L_rows"].accesses == {"LDS.64": 2, "STS.64": 1} and counts[".L_rows"].stored_bytes == 8
    assert counts[".L_tiles"].accesses == {"UTMASTG": 1}
    assert kernel.counts.accesses == {"LDS": 1, "LDS.64": 2, "STG.128": 1, "STS": 1, "STS.64": 1, "UTMASTG": 1}
    assert (counts[".L_rows"].values16, counts[".L_rows"].values32) == (8, 0)
    assert (kernel.name, kernel.registers, kernel.local) == ("kernel", 32, 0)


def test_addresses_do_as_well_as_labels():
    with_labels, without = counted(TILES), counted(TILES, lambda body: cuobjdump(nvdisasm(body)))
    assert without.counts == with_labels.counts
    assert [loop.counts for loop in without.loops] == [loop.counts for loop in with_labels.loops]
    assert [len(loop.around) for loop in without.loops] == [0, 1, 1, 1]


def test_instructions_for_an_element_are_those_of_the_loops_over_x():
    kernel = counted(TILES)
    (rows,) = kernel.over_x
    assert rows.label == ".L_rows" and rows.per_element is None
    assert [dataclasses.replace(rows, arrays=arrays).per_element for arrays in (1, 2)] == [2, 4]
    assert dataclasses.replace(loops_of(kernel)[".L_tiles"], arrays=1).per_element is None


def test_a_loop_that_stores_is_not_the_rest_of_one_that_adds_up():
    loop = "{label}:\nLDS.{width} R4, [R0]\nFADD R8, R8, R4\n{store}\n@P0 BRA `({label})"
    sums, rest = (
        loop.format(label=".L_sums", width=128, store="NOP"),
        loop.format(label=".L_rest", width=64, store="NOP"),
    )
    results = loop.format(label=".L_results", width="64", store="STS [R1], R8")
    kernel = counted("\n".join([sums, rest, results, "EXIT"]))
    assert [one.label for one in kernel.over_x] == [".L_sums", ".L_results"]


def test_code_around_an_inner_loop_over_x_is_none():
    inner = ".L_inner:\nLDS.64 R4, [R0]\nFADD R8, R4, R5\n@P0 BRA `(.L_inner)"
    kernel = counted(f".L_outer:\nLDS.64 R4, [R0]\nFADD R8, R4, R5\n{inner}\n@P1 BRA `(.L_outer)\nEXIT")
    assert loops_of(kernel)[".L_outer"].counts.values == 2
    assert [one.label for one in kernel.over_x] == [".L_inner"]


@pytest.mark.parametrize(
    ("code", "halves", "wholes"),
    [
        ("LDS R4, [R0]\nFADD R5, R4, R4", 0, 1),
        ("LDS.128 R4, [R0]\nFADD R8, R4, R5\nFADD R9, R6, R7", 0, 4),
        ("LDS R4, [R0]\nHADD2.F32 R5, -RZ, R4.H0_H0", 2, 0),
        # a copy, and an overwritten register
        ("LDS R4, [R0]\nIMAD.MOV.U32 R5, RZ, RZ, R4\nMOV R4, R7\nSHF.L.U32 R6, R5, 0x10, RZ", 2, 0),
        ("LDS R4, [R0]\nFADD R5, R4, R4\nMOV R4, R7\nSHF.L.U32 R6, R4, 0x10, RZ", 0, 1),
        # what the next iteration uses
        ("SHF.L.U32 R6, R4, 0x10, RZ\nLDS R4, [R0]", 2, 0),
        ("LDS.U16 R4, [R0]\nSHF.L.U32 R6, R4, 0x10, RZ", 1, 0),
        # rounding to 16 bits is no sign that 16 were loaded
        ("LDS.64 R4, [R0]\nF2FP.BF16.F32.PACK_AB R6, R4, R5", 0, 2),
        ("LDG.E.64 R4, desc[UR8][R2.64]\nFADD R5, R4, R4", 0, 0),
    ],
)
def test_values_are_of_16_bits_where_something_takes_halves_of_their_register(code, halves, wholes):
    (loop,) = counted(f".L_0:\n{code}\n@P0 BRA `(.L_0)\nEXIT").loops
    assert (loop.counts.values16, loop.counts.values32) == (halves, wholes)


def test_beside_values_of_16_bits_those_of_32_are_parameters():
    (loop,) = counted(".L_0:\nLDS.64 R4, [R0]\nLDS R6, [R1]\nHFMA2 R7, R4, R5, R6\n@P0 BRA `(.L_0)\nEXIT").loops
    assert loop.counts.values == 6
    (loop,) = counted(".L_0:\nLDS.64 R4, [R0]\nLDS R6, [R1]\nHADD2 R7, R4, R5\n@P0 BRA `(.L_0)\nEXIT").loops
    assert (loop.counts.values, loop.counts.values32) == (4, 1)


@pytest.mark.parametrize(
    ("code", "rounds"),
    [
        # side by side
        ("LOAD R4 R2; LOAD R5 R2; FADD R6, R4, R5", 1),
        # nothing waits for it
        ("LOAD R4 R2", 0),
        # the second one's address, its high half too, is loaded by the first one
        ("LOAD.64 R4 R2; LOAD R6 R4; MOV R7, R6", 2),
        ("LOAD R5 R2; LOAD R6 R4; MOV R7, R6", 2),
        # what is loaded behind a wait cannot be on its way before
        ("LOAD R4 R2; MOV R8, R4; LOAD R5 R2; MOV R9, R5", 2),
        # a branch waits for its predicate, which waits for the load
        ("LOAD R4 R2; ISETP.NE.AND P0, PT, R4, RZ, PT; @P0 EXIT; LOAD R5 R2; MOV R9, R5", 2),
        # a store waits for what it stores, for its second register too
        ("LOAD R5 R2; STL.64 [R1], R4; LOAD R6 R2; MOV R7, R6", 2),
        # what overwrites a register waits for the load that was to fill it
        ("LOAD R4 R2; MOV R4, R9; LOAD R5 R2; MOV R5, R9", 2),
        ("LOAD R4 R2; SHFL.IDX PT, R4, R9, RZ, 0x1f; LOAD R5 R2; MOV R5, R9", 2),
        # one that is waited for already is not waited for again
        ("LOAD R4 R2; MOV R8, R4; MOV R9, R4", 1),
        # of two branches the longer one
        ("@P0 BRA `(.L_b); LOAD R4 R2; MOV R4, R4; LOAD R4 R2; MOV R4, R4; BRA `(.L_c); "
         ".L_b:; LOAD R4 R2; MOV R4, R4; .L_c:; LOAD R4 R2; MOV R4, R4", 3),
        # each loop with one iteration
        (".L_a:; LOAD R4 R2; MOV R4, R4; @P0 BRA `(.L_a); .L_b:; LOAD R4 R2; MOV R4, R4; @P0 BRA `(.L_b)", 2),
    ],
)  # fmt: skip
def test_rounds_are_the_waits_for_loads_one_after_the_other(code, rounds):
    def counts(load):
        found = re.sub(r"LOAD(\S*) (R\d+) (R\d+)", rf"{load}\1 \2, desc[UR4][\3.64]", code).replace("; ", "\n")
        return counted(f"{found}\nEXIT").counts

    far, near = counts("LDG.E"), counts("LDS")
    assert (far.global_rounds, far.shared_rounds) == (rounds, 0)
    assert (near.global_rounds, near.shared_rounds) == (0, rounds)


@pytest.mark.parametrize(
    "code",
    [
        "LDG.E R4, desc[UR4][R2.64]\nFADD R5, R5, R4",
        # the next iteration's value, loaded ahead
        "FADD R5, R5, R4\nLDG.E R4, desc[UR4][R2.64]",
    ],
)
def test_a_loop_that_loads_ahead_waits_once_for_an_iteration_as_well(code):
    (loop,) = counted(f".L_0:\n{code}\n@P0 BRA `(.L_0)\nEXIT").loops
    assert loop.counts.global_rounds == 1


def test_a_loop_that_polls_a_counter_waits_and_one_that_adds_up_what_others_wrote_does_not():
    poll = "{label}:\nLDG.E.STRONG.GPU R4, desc[UR4][R2.64]\n{use}\nISETP.NE.AND P0, PT, R4, R5, PT\n@P0 BRA `({label})"
    uses = ("NANOSLEEP 0x20", "FADD R6, R6, R4", "LDS R6, [R0]", "STS [R0], R4")
    text = "\n".join(poll.format(label=f".L_{index}", use=use) for index, use in enumerate(uses))
    kernel = counted(f"{text}\nEXIT")
    assert [loop.kind for loop in kernel.loops] == ["waits", "innermost", "innermost", "innermost"]
    assert [loop.counts.global_rounds for loop in kernel.loops] == [1, 1, 1, 1]


def test_spills_are_accesses_to_local_memory():
    kernel = counted("STL.64 [R1], R4\nLDL R4, [R1+0x4]\n@!PT LDL R5, [R1]\nEXIT")
    assert kernel.local == 3 and kernel.counts.accesses == {"LDL": 1, "STL.64": 1}


def test_a_failed_assertion_leads_nowhere():
    # Else the loop could be entered in its middle, and would be none.
    code = """
    @P0 BRA `(.L_fails)
    .L_loop:
    @!P1 BRA `(.L_wait)
    .L_back:
    LDS R4, [R0]
    @P2 BRA `(.L_loop)
    EXIT
    .L_fails:
    CALL.ABS.NOINC R2
    .L_wait:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R30+URZ], R31
    @!P0 BRA `(.L_wait)
    BRA `(.L_back)
    """
    assert [(loop.label, loop.kind) for loop in counted(code).loops] == [(".L_loop", "innermost"), (".L_wait", "waits")]


def test_what_can_be_entered_in_its_middle_is_no_loop():
    kernel = counted("@P0 BRA `(.L_b)\n.L_a:\nNOP\n.L_b:\nNOP\n@P1 BRA `(.L_a)\nEXIT")
    assert kernel.loops == () and kernel.counts.instructions == 5


def test_branches_come_together_where_it_was_said():
    # BSYNC goes on behind what stands between, which only the branch leads to.
    code = """
    .L_loop:
    BSSY B0, `(.L_joined)
    @P0 BRA `(.L_slow)
    BSYNC B0
    .L_slow:
    LDG.E R4, desc[UR4][R2.64]
    MOV R5, R4
    BSYNC B0
    .L_other:
    NOP
    .L_joined:
    @P1 BRA `(.L_loop)
    EXIT
    """
    kernel = counted(code)
    assert [(loop.label, loop.counts.instructions) for loop in kernel.loops] == [(".L_loop", 7)]
    assert kernel.counts.instructions == 8


@pytest.mark.parametrize("branch", ["BRA P1, `(.L_0)", "BRA.U UP0, `(.L_0)", "@P0 BRA `(.L_0)", "@UP2 BRA `(.L_0)"])
def test_a_branch_may_have_its_predicate_among_its_operands(branch):
    kernel = counted(f".L_0:\nLDS R4, [R0]\n{branch}\nSTG.E desc[UR4][R2.64], R4\nEXIT")
    assert [loop.label for loop in kernel.loops] == [".L_0"] and kernel.counts.instructions == 4
    # a predicate that is never true
    kernel = counted(f".L_0:\nLDS R4, [R0]\n@!PT {branch.split(' ', 1)[1] if branch.startswith('@') else branch}\nEXIT")
    assert kernel.loops == () and kernel.counts.instructions == 3


def test_a_text_may_have_several_kernels_or_none():
    text = nvdisasm("EXIT", "one") + "\n" + nvdisasm("NOP\nEXIT", "two")
    assert [(kernel.name, kernel.counts.instructions) for kernel in sass.kernels(text)] == [("one", 1), ("two", 2)]
    for text in ("", "nvdisasm fatal : no such file\n", "\t.target\tsm_90\n", ".text.empty:\n"):
        assert sass.kernels(text) == [] and read(text) == {}


def test_a_kernel_is_the_same_after_json():
    kernel = counted(TILES)
    kernel = dataclasses.replace(kernel, loops=tuple(dataclasses.replace(loop, arrays=2) for loop in kernel.loops))
    assert sass.kernel_from_json(json.loads(json.dumps(dataclasses.asdict(kernel)))) == kernel


def test_the_command_prints_the_kernels_of_a_folder_in_the_order_of_their_lowering(tmp_path, capsys):
    for name, number in (("a", 10), ("b", 9)):
        (tmp_path / f"{name}_{number}.sass_ctrl").write_text(with_control_codes(nvdisasm(TILES, name)))
    (tmp_path / "b_9.ptx").write_text("not looked at")
    assert sass.main([str(tmp_path), "--arrays", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines if line[0] != " "] == ["b", "a"]
    assert "    .L_rows innermost: 16 instructions, 4.00 for each of 4 elements, 2 LDS.64, 1 STS.64; rounds" in lines[3]
    assert sass.main([str(tmp_path / "a_10.sass_ctrl"), "--json"]) == 0
    assert sass.kernel_from_json(json.loads(capsys.readouterr().out)).name == "a"


@pytest.mark.parametrize("name", ["none.sass", "none.cubin"])
def test_a_file_that_cannot_be_read_is_named_with_status_2(name, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        sass.main([str(tmp_path / name)])
    assert left.value.code == 2 and name in capsys.readouterr().err
