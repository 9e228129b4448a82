"""HLO as it is read, and the passes over memory counted in it, against programs written and counted by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from bn_fused.bench.audit.hlo import parse
from bn_fused.bench.audit.traffic import passes
from bn_fused.kernels.backends.jnp.operations import AGAIN

# x is f32[64,1024]: 65536 elements, 262144 bytes.
ELEMENTS, BYTES = 64 * 1024, 64 * 1024 * 4


def count(text, elements=ELEMENTS, nbytes=BYTES, **options):
    return passes(text, elements, nbytes, **options)


def figures(traffic):
    return traffic.reads, traffic.writes, traffic.launches


BATCH_NORM_FORWARD = """
HloModule jit_forward, is_scheduled=true, entry_computation_layout={(f32[64,1024]{1,0})->f32[64,1024]{1,0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused_mean (param_0: f32[64,1024]) -> f32[1024] {
  %param_0 = f32[64,1024]{1,0} parameter(0)
  %zero = f32[] constant(0)
  ROOT %reduce = f32[1024]{0} reduce(%param_0, %zero), dimensions={0}, to_apply=%add
}

%fused_square (param_0: f32[64,1024], param_1: f32[1024]) -> f32[1024] {
  %param_0 = f32[64,1024]{1,0} parameter(0)
  %param_1 = f32[1024]{0} parameter(1)
  %broadcast = f32[64,1024]{1,0} broadcast(%param_1), dimensions={1}
  %subtract = f32[64,1024]{1,0} subtract(%param_0, %broadcast)
  %multiply = f32[64,1024]{1,0} multiply(%subtract, %subtract)
  %zero = f32[] constant(0)
  ROOT %reduce = f32[1024]{0} reduce(%multiply, %zero), dimensions={0}, to_apply=%add
}

%fused_normalise (param_0: f32[64,1024], param_1: f32[1024], param_2: f32[1024]) -> f32[64,1024] {
  %param_0 = f32[64,1024]{1,0} parameter(0)
  %param_1 = f32[1024]{0} parameter(1)
  %mean = f32[64,1024]{1,0} broadcast(%param_1), dimensions={1}
  %subtract = f32[64,1024]{1,0} subtract(%param_0, %mean)
  %param_2 = f32[1024]{0} parameter(2)
  %scale = f32[64,1024]{1,0} broadcast(%param_2), dimensions={1}
  ROOT %multiply = f32[64,1024]{1,0} multiply(%subtract, %scale)
}

ENTRY %main (x: f32[64,1024]) -> f32[64,1024] {
  %x = f32[64,1024]{1,0} parameter(0), metadata={op_name="x"}
  %mean = f32[1024]{0} fusion(%x), kind=kInput, calls=%fused_mean
  %square = f32[1024]{0} fusion(%x, %mean), kind=kInput, calls=%fused_square, metadata={op_name="a(b)"}
  ROOT %y = f32[64,1024]{1,0} fusion(%x, %mean, %square), kind=kLoop, calls=%fused_normalise
}
"""


def test_each_fusion_reads_x_once_and_statistics_per_channel_do_not_count():
    traffic = count(BATCH_NORM_FORWARD)
    assert figures(traffic) == (3, 1, 3)
    assert [access.instruction for access in traffic.details] == ["mean", "square", "y"]
    assert traffic.copies_or_transposes == ()


def test_passes_are_bytes_over_the_bytes_of_x():
    # The same program for a bfloat16 x of as many elements: what it moves in float32 makes two passes each.
    traffic = count(BATCH_NORM_FORWARD, nbytes=BYTES // 2)
    assert figures(traffic) == (6, 2, 3)


def test_names_without_percent_signs_and_typed_operands_are_read_too():
    plain = BATCH_NORM_FORWARD.replace("%", "")
    typed = BATCH_NORM_FORWARD.replace("fusion(%x, %mean", "fusion(f32[64,1024]{1,0} %x, f32[1024]{0} %mean")
    assert figures(count(plain)) == figures(count(typed)) == (3, 1, 3)


def test_a_fusion_that_takes_slices_reads_the_slices():
    traffic = count("""
%fused (param_0: f32[64,1024], param_1: s32[]) -> f32[16,1024] {
  %param_0 = f32[64,1024]{1,0} parameter(0)
  %view = f32[64,1024]{1,0} bitcast(%param_0)
  %first = f32[16,1024]{1,0} slice(%view), slice={[0:16], [0:1024]}
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %second = f32[16,1024]{1,0} dynamic-slice(%param_0, %param_1, %zero), dynamic_slice_sizes={16,1024}
  ROOT %sum = f32[16,1024]{1,0} add(%first, %second)
}

ENTRY %main (x: f32[64,1024], start: s32[]) -> f32[16,1024] {
  %x = f32[64,1024]{1,0} parameter(0)
  %start = s32[] parameter(1)
  ROOT %part = f32[16,1024]{1,0} fusion(%x, %start), kind=kLoop, calls=%fused
}
""")
    assert figures(traffic) == (0.5, 0.25, 1)


def test_a_fusion_that_slices_and_also_uses_the_whole_operand_reads_it_once():
    traffic = count("""
%fused (param_0: f32[64,1024]) -> f32[64,1024] {
  %param_0 = f32[64,1024]{1,0} parameter(0)
  %row = f32[32,1024]{1,0} slice(%param_0), slice={[0:32], [0:1024]}
  %twice = f32[64,1024]{1,0} concatenate(%row, %row), dimensions={0}
  ROOT %sum = f32[64,1024]{1,0} add(%param_0, %twice)
}

ENTRY %main (x: f32[64,1024]) -> f32[64,1024] {
  %x = f32[64,1024]{1,0} parameter(0)
  ROOT %y = f32[64,1024]{1,0} fusion(%x), kind=kLoop, calls=%fused
}
""")
    assert figures(traffic) == (1, 1, 1)


def test_slices_below_the_threshold_do_not_count_and_the_threshold_can_be_lowered():
    text = """
ENTRY %main (x: f32[64,1024]) -> f32[1,1024] {
  %x = f32[64,1024]{1,0} parameter(0)
  ROOT %row = f32[1,1024]{1,0} slice(%x), slice={[0:1], [0:1024]}
}
"""
    assert figures(count(text)) == (0, 0, 1)
    assert figures(count(text, smallest=1 / 64)) == (1 / 64, 1 / 64, 1)


def test_a_kernel_that_names_an_operand_twice_or_through_a_bitcast_reads_it_once():
    traffic = count("""
ENTRY %main (x: f32[64,1024], dy: f32[64,1024]) -> f32[65536] {
  %x = f32[64,1024]{1,0} parameter(0)
  %dy = f32[64,1024]{1,0} parameter(1)
  %flat = f32[65536]{0} bitcast(%x)
  %again = f32[65536]{0} bitcast(%flat)
  ROOT %out = f32[65536]{0} custom-call(%x, %flat, %again, %dy), custom_call_target="kernel"
}
""")
    assert figures(traffic) == (2, 1, 1)


def test_results_in_a_tuple_are_all_written_and_grouping_them_is_free():
    traffic = count("""
ENTRY %main (x: f32[64,1024]) -> (f32[64,1024], f32[64,1024]) {
  %x = f32[64,1024]{1,0} parameter(0)
  %call = (f32[64,1024]{1,0}, f32[1024]{0}, /*index=2*/f32[64,1024]{1,0}) custom-call(%x), custom_call_target="triton"
  %y = f32[64,1024]{1,0} get-tuple-element(%call), index=0
  %z = f32[64,1024]{1,0} get-tuple-element(%call), index=2
  ROOT %out = (f32[64,1024]{1,0}, f32[64,1024]{1,0}) tuple(%y, %z)
}
""")
    assert figures(traffic) == (1, 2, 1)


def test_copies_and_transposes_are_named_also_inside_a_fusion():
    traffic = count("""
%fused_transpose (param_0: f32[64,1024]) -> f32[1024,64] {
  %param_0 = f32[64,1024]{1,0} parameter(0)
  ROOT %transpose = f32[1024,64]{1,0} transpose(%param_0), dimensions={1,0}
}

%fused_work (param_0: f32[1024,64]) -> f32[64,1024] {
  %param_0 = f32[1024,64]{1,0} parameter(0)
  %transpose = f32[64,1024]{1,0} transpose(%param_0), dimensions={1,0}
  ROOT %negate = f32[64,1024]{1,0} negate(%transpose)
}

ENTRY %main (x: f32[64,1024], scale: f32[1024]) -> f32[64,1024] {
  %x = f32[64,1024]{1,0} parameter(0)
  %scale = f32[1024]{0} parameter(1)
  %small = f32[1024]{0} copy(%scale)
  %copied = f32[64,1024]{0,1} copy(%x)
  %transposed = f32[1024,64]{1,0} fusion(%x), kind=kInput, calls=%fused_transpose
  ROOT %y = f32[64,1024]{1,0} fusion(%transposed), kind=kLoop, calls=%fused_work
}
""")
    assert figures(traffic) == (3, 3, 4)
    assert traffic.copies_or_transposes == ("copied", "transposed")


LOOP = """
%body (state: (s32[], f32[64,1024], f32[16,1024])) -> (s32[], f32[64,1024], f32[16,1024]) {
  %state = (s32[], f32[64,1024]{1,0}, f32[16,1024]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[64,1024]{1,0} get-tuple-element(%state), index=1
  %sums = f32[16,1024]{1,0} get-tuple-element(%state), index=2
  %zero = s32[] constant(0)
  %rows = f32[16,1024]{1,0} dynamic-slice(%x, %i, %zero), dynamic_slice_sizes={16,1024}
  %added = f32[16,1024]{1,0} custom-call(%sums, %rows), custom_call_target="add"
  ROOT %next = (s32[], f32[64,1024]{1,0}, f32[16,1024]{1,0}) tuple(%i, %x, %added)
}

%condition (state: (s32[], f32[64,1024], f32[16,1024])) -> pred[] {
  %state = (s32[], f32[64,1024]{1,0}, f32[16,1024]{1,0}) parameter(0)
  %whole = f32[64,1024]{1,0} get-tuple-element(%state), index=1
  ROOT %more = pred[] custom-call(%whole), custom_call_target="more"
}

ENTRY %main (start: (s32[], f32[64,1024], f32[16,1024])) -> (s32[], f32[64,1024], f32[16,1024]) {
  %start = (s32[], f32[64,1024]{1,0}, f32[16,1024]{1,0}) parameter(0)
  ROOT %loop = (s32[], f32[64,1024]{1,0}, f32[16,1024]{1,0}) while(%start), condition=%condition, body=%bodyTRIPS
}
"""


def test_the_body_of_a_loop_counts_as_often_as_it_runs():
    # A round: slice 1/4 R + 1/4 W, then 2/4 R + 1/4 W.
    once = count(LOOP.replace("TRIPS", ""))
    assert figures(once) == (0.75, 0.5, 2)
    four = count(LOOP.replace("TRIPS", ', backend_config={"known_trip_count":{"n":"4"}}'))
    assert figures(four) == (3, 2, 8)
    assert all(access.times == 4 for access in four.details)


def test_small_parts_read_in_a_loop_add_up():
    # 1/4 of x is below this threshold in one round, and x in all four is not.
    traffic = count(LOOP.replace("TRIPS", ', backend_config={"known_trip_count":{"n":"4"}}'), smallest=1 / 2)
    assert traffic.reads == 3


def test_a_conditional_counts_its_most_expensive_branch():
    text = """
%cheap (x: f32[64,1024]) -> f32[64,1024] {
  ROOT %x = f32[64,1024]{1,0} parameter(0)
}

%dear (x: f32[64,1024]) -> f32[64,1024] {
  %x = f32[64,1024]{1,0} parameter(0)
  ROOT %y = f32[64,1024]{1,0} copy(%x)
}

ENTRY %main (which: s32[], x: f32[64,1024]) -> f32[64,1024] {
  %which = s32[] parameter(0)
  %x = f32[64,1024]{1,0} parameter(1)
  ROOT %y = f32[64,1024]{1,0} conditional(%which, %x, %x), BRANCHES
}
"""
    for branches in (
        "branch_computations={%cheap, %dear}",
        "true_computation=%dear, false_computation=%cheap",
    ):
        assert figures(count(text.replace("BRANCHES", branches))) == (1, 1, 1)
        seldom = count(text.replace("BRANCHES", f'{branches}, metadata={{op_name="jit(f)/{AGAIN}/cond"}}'))
        assert figures(seldom) == (0, 0, 0) and seldom.seldom == 2


def test_called_computations_count_where_they_are_called():
    traffic = count("""
%command_buffer (x: f32[64,1024]) -> f32[64,1024] {
  %x = f32[64,1024]{1,0} parameter(0)
  %first = f32[64,1024]{1,0} custom-call(%x), custom_call_target="a"
  ROOT %second = f32[64,1024]{1,0} custom-call(%first), custom_call_target="b"
}

%never_called (x: f32[64,1024]) -> f32[64,1024] {
  %x = f32[64,1024]{1,0} parameter(0)
  ROOT %y = f32[64,1024]{1,0} copy(%x)
}

ENTRY %main (x: f32[64,1024]) -> f32[64,1024] {
  %x = f32[64,1024]{1,0} parameter(0)
  ROOT %y = f32[64,1024]{1,0} call(%x), to_apply=%command_buffer
}
""")
    assert figures(traffic) == (2, 2, 2)


def test_an_asynchronous_kernel_counts_once():
    traffic = count("""
%wrapped (x: f32[64,1024]) -> f32[64,1024] {
  %x = f32[64,1024]{1,0} parameter(0)
  ROOT %y = f32[64,1024]{1,0} custom-call(%x), custom_call_target="kernel"
}

ENTRY %main (x: f32[64,1024]) -> f32[64,1024] {
  %x = f32[64,1024]{1,0} parameter(0)
  %start = ((f32[64,1024]{1,0}), f32[64,1024]{1,0}, u32[]) async-start(%x), calls=%wrapped
  %update = ((f32[64,1024]{1,0}), f32[64,1024]{1,0}, u32[]) async-update(%start)
  %done = f32[64,1024]{1,0} async-done(%update)
  %reduced = f32[64,1024]{1,0} all-reduce-start(%done), to_apply=%add
  ROOT %result = f32[64,1024]{1,0} all-reduce-done(%reduced)
}
""")
    assert figures(traffic) == (2, 2, 2)


@pytest.mark.parametrize("space", ["S(1)", "S(3)"])
def test_memory_on_the_chip_is_free_and_a_copy_there_reads_once(space):
    # x comes in once, is used twice there, and the result goes out once.
    text = """
ENTRY %main (x: f32[64,1024]) -> f32[64,1024] {
  %x = f32[64,1024]{1,0:T(8,128)} parameter(0)
  %in = (f32[64,1024]{1,0:T(8,128)S(1)}, f32[64,1024]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %inside = f32[64,1024]{1,0:T(8,128)S(1)} copy-done(%in)
  %a = f32[64,1024]{1,0:T(8,128)S(1)} custom-call(%inside), custom_call_target="a"
  %b = f32[64,1024]{1,0:T(8,128)S(1)} custom-call(%inside, %a), custom_call_target="b"
  %out = (f32[64,1024]{1,0:T(8,128)}, f32[64,1024]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) copy-start(%b)
  ROOT %y = f32[64,1024]{1,0:T(8,128)} copy-done(%out)
}
"""
    assert figures(count(text.replace("S(1)", space))) == (1, 1, 4)


def test_an_update_in_place_moves_the_update():
    traffic = count("""
%fused_update (param_0: f32[64,1024], param_1: f32[16,1024], param_2: s32[]) -> f32[64,1024] {
  %param_0 = f32[64,1024]{1,0} parameter(0)
  %param_1 = f32[16,1024]{1,0} parameter(1)
  %negate = f32[16,1024]{1,0} negate(%param_1)
  %param_2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %update = f32[64,1024]{1,0} dynamic-update-slice(%param_0, %negate, %param_2, %zero)
}

ENTRY %main (x: f32[64,1024], rows: f32[16,1024], start: s32[]) -> f32[64,1024] {
  %x = f32[64,1024]{1,0} parameter(0)
  %rows = f32[16,1024]{1,0} parameter(1)
  %start = s32[] parameter(2)
  %zero = s32[] constant(0)
  %first = f32[64,1024]{1,0} fusion(%x, %rows, %start), kind=kLoop, calls=%fused_update
  ROOT %second = f32[64,1024]{1,0} dynamic-update-slice(%first, %rows, %start, %zero)
}
""")
    assert figures(traffic) == (0.5, 0.5, 2)


def test_a_fusion_with_two_results_writes_each_as_it_is():
    # One result is updated in place (a quarter of x), the other is all of x.
    traffic = count("""
%fused (param_0: f32[64,1024], param_1: f32[16,1024], param_2: f32[64,1024]) -> (f32[64,1024], f32[64,1024]) {
  %param_0 = f32[64,1024]{1,0} parameter(0)
  %param_1 = f32[16,1024]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %update = f32[64,1024]{1,0} dynamic-update-slice(%param_0, %param_1, %zero, %zero)
  %param_2 = f32[64,1024]{1,0} parameter(2)
  %negate = f32[64,1024]{1,0} negate(%param_2)
  ROOT %both = (f32[64,1024]{1,0}, f32[64,1024]{1,0}) tuple(%update, %negate)
}

ENTRY %main (x: f32[64,1024], rows: f32[16,1024], dy: f32[64,1024]) -> (f32[64,1024], f32[64,1024]) {
  %x = f32[64,1024]{1,0} parameter(0)
  %rows = f32[16,1024]{1,0} parameter(1)
  %dy = f32[64,1024]{1,0} parameter(2)
  ROOT %both = (f32[64,1024]{1,0}, f32[64,1024]{1,0}) fusion(%x, %rows, %dy), kind=kLoop, calls=%fused
}
""")
    assert figures(traffic) == (1.25, 1.25, 1)


def test_the_padding_of_tiled_layouts_counts_on_request():
    # 12 x 100 in tiles of 8 x 128 fills 16 x 128; the minor dimension is the first of the layout.
    for layout in ("{1,0:T(8,128)}", "{1,0:T(8,128)(2,1)}"):
        text = f"""
ENTRY %main (x: f32[12,100]) -> f32[12,100] {{
  %x = f32[12,100]{layout} parameter(0)
  ROOT %y = f32[12,100]{layout} copy(%x)
}}
"""
        assert figures(count(text, 1200, 4800)) == (1, 1, 1)
        padded = count(text, 1200, 4800, padded=True)
        assert padded.reads == padded.writes == pytest.approx(16 * 128 / 1200)


def test_sizes_of_all_dtypes_are_known():
    for dtype, nbytes in {
        "bf16": 200,
        "pred": 100,
        "s4": 50,
        "f8e4m3fn": 100,
        "c64": 800,
        "u64": 800,
    }.items():
        module = parse(
            f"ENTRY %main (x: {dtype}[<=10,10]) -> {dtype}[<=10,10] {{\n  ROOT %x = {dtype}[<=10,10] parameter(0)\n}}"
        )
        assert module.computations["main"]["x"].arrays[0].nbytes == nbytes


def test_text_that_is_not_a_compiled_module_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        count("module @jit_f { func.func public @main() }")
    with pytest.raises(ValueError, match="x_elements is 0"):
        passes(BATCH_NORM_FORWARD, 0, 0)


def test_the_counter_agrees_with_what_xla_compiles_here():
    x = jnp.zeros((64, 1024), jnp.float32)

    def program(x):
        mean = lax.optimization_barrier(jnp.mean(x, 0))
        return (x - mean[None]) * jnp.float32(2)

    traffic = count(jax.jit(program).lower(x).compile().as_text())
    assert (traffic.reads, traffic.writes) == (2, 1), traffic.details
