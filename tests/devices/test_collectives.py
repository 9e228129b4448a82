"""What crosses devices, counted in compiled programs: however they are differentiated, over 4 devices and over 128.

The kernels' programs are compiled for four chips that are not there. The process of each reads and writes JSON.
"""

import json
import re
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import bn_fused
from bn_fused.bench import deviceless
from bn_fused.bench.audit.hlo import parse

from support.child_process import answer
from support.compilers import skip_without_compilers
from support.versions import also_on_the_newest_jax

CHANNELS, POSITIONS, LOCAL = 24, 1, 64
CHECK_VMA = pytest.mark.parametrize("check_vma", [True, False], ids=["check_vma", "no_check_vma"])


def programs(channels, backend="auto"):
    """Functions of (x, dy, arrays of the layer's state) on one device's examples, and which results are whole."""
    layer, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(channels, ("batch", "dev"), "ema", backend=backend)
    arrays, rest = eqx.partition(state, eqx.is_array)

    def example(x, arrays):
        y, new = layer(x, eqx.combine(arrays, rest))
        return y, eqx.filter(new, eqx.is_array)

    def forward(x, dy, arrays):
        return jax.vmap(example, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, arrays)

    def gradient(x, dy, arrays):
        y, pullback = jax.vjp(lambda x: forward(x, dy, arrays)[0], x)
        return y, pullback(dy)[0]

    def tangent(x, dy, arrays):
        return jax.jvp(lambda x: forward(x, dy, arrays)[0], (x,), (dy,))

    def per_example(x, dy, arrays):
        def one(x, dy):
            return jax.vjp(lambda x: example(x, arrays)[0], x)[1](dy)[0]

        return jax.vmap(one, axis_name="batch")(x, dy)

    split = P("dev")
    return arrays, {
        "forward": (forward, (split, P())),
        "gradient": (gradient, (split, split)),
        "tangent": (tangent, (split, split)),
        "per_example": (per_example, split),
    }


def compiled(function, results, mesh, arrays, shape, spec=None, platform="cpu", **options):
    """A program over a mesh, of x and dy of this shape, split by example over "dev"."""
    split = P("dev")
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, split if spec is None else spec))
    whole = NamedSharding(mesh, P())
    arrays = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), arrays)
    spread = jax.shard_map(function, mesh=mesh, in_specs=(split, split, P()), out_specs=results, **options)
    return jax.jit(spread).trace(x, x, arrays).lower(lowering_platforms=(platform,)).compile().as_text()


def exchanges(text):
    """[operation, values, how many exchanges it waits for] of every exchange in compiled HLO, in order."""
    module = parse(text)
    # Where one is started and awaited apart, the start lists what goes in beside what comes out.
    operation = re.compile("(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(-done)?")
    exchanged = []
    for instructions in module.computations.values():
        before = {}
        for name, instruction in instructions.items():
            behind = frozenset().union(*(before.get(operand, frozenset()) for operand in instruction.operands))
            before[name] = behind
            if operation.fullmatch(instruction.opcode):
                values = sum(array.elements for array in instruction.arrays)
                exchanged.append([instruction.opcode.removesuffix("-done"), values, len(behind)])
                before[name] = behind | {name}
    return exchanged


def mesh_of(shape, names):
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names), devices=devices)


@pytest.fixture
def four_devices():
    if jax.device_count() < 4:
        pytest.skip(f"needs 4 devices, here are {jax.device_count()}")


@CHECK_VMA
@pytest.mark.parametrize("name", ["forward", "gradient", "tangent", "per_example"])
def test_each_way_is_one_all_reduce_of_moments_or_sums_however_it_is_differentiated(name, check_vma, four_devices):
    arrays, functions = programs(CHANNELS)
    shape = (4 * LOCAL, CHANNELS, POSITIONS)
    text = compiled(*functions[name], mesh_of((4,), ("dev",)), arrays, shape, check_vma=check_vma)
    packed = 4 * (3 * CHANNELS + 1)
    expected = [packed] if name == "forward" else [packed, 2 * CHANNELS]
    assert exchanges(text) == [["all-reduce", values, place] for place, values in enumerate(expected)]
    assert max(expected) < LOCAL * CHANNELS * POSITIONS


def test_a_shard_map_that_leaves_an_axis_to_xla_exchanges_the_same(four_devices):
    arrays, functions = programs(CHANNELS)
    mesh, shape = mesh_of((2, 2), ("dev", "rest")), (4 * LOCAL, CHANNELS, POSITIONS)
    packed = 2 * (3 * CHANNELS + 1)
    text = compiled(*functions["gradient"], mesh, arrays, shape, axis_names={"dev"})
    assert exchanges(text) == [["all-reduce", packed, 0], ["all-reduce", 2 * CHANNELS, 1]]
    # Where XLA splits channels or examples further, it exchanges more, and nothing of the size of a part of x.
    for spec in (P("dev", "rest"), P(("dev", "rest"))):
        text = compiled(*functions["gradient"], mesh, arrays, shape, spec, axis_names={"dev"})
        assert all(values < LOCAL * CHANNELS * POSITIONS // 2 for _, values, _ in exchanges(text)), exchanges(text)


# --- in processes of their own ---------------------------------------------------------------------------------


def child(work, devices=None):
    flags = {} if devices is None else {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    return answer([__file__], work, flags, timeout=300)


def test_beyond_64_devices_two_sums_of_channels_follow_each_other_forward_and_one_is_enough_backward():
    answers = child({"target": None, "devices": 128}, devices=128)
    forward = [["all-reduce", CHANNELS + 1, 0], ["all-reduce", 2 * CHANNELS, 1]]
    for check_vma in ("True", "False"):
        counted = answers[check_vma]
        assert counted["forward"] == forward
        assert counted["gradient"] == counted["per_example"] == [*forward, ["all-reduce", 2 * CHANNELS, 2]]
        # The sums of the tangent need the mean alone, and go with the second.
        assert counted["tangent"] == [["all-reduce", CHANNELS + 1, 0], ["all-reduce", 4 * CHANNELS, 1]]


# Each half of a step; forward of a gradient per example is moments alone, whose y is not asked for.
LAUNCHES = {"gradient": 4, "tangent": 2, "per_example": 3}
# What adds up partial results is a launch more for each kernel with sums.
LAUNCHES_ON_GPUS = {"gradient": 6, "tangent": 3, "per_example": 5}


@pytest.mark.compilers
@pytest.mark.parametrize(
    ("backend", "target"),
    [("pallas_tpu", "v5e"), ("pallas_gpu", "h200"), *also_on_the_newest_jax(("triton", "a100"))],
)
def test_the_kernels_on_four_chips_exchange_once_each_way(backend, target):
    skip_without_compilers(target, triton="cuda" if backend == "triton" else None)
    answers = child({"target": target, "devices": 4, "backend": backend})
    refusal = answers.pop("left to XLA")
    assert "XLA partitions" in refusal, refusal
    expected = LAUNCHES if backend == "pallas_tpu" else LAUNCHES_ON_GPUS
    for counted in answers.values():
        for name, (exchanged, launches) in counted.items():
            assert exchanged == [["all-reduce", 4 * (3 * CHIP_CHANNELS + 1), 0], ["all-reduce", 2 * CHIP_CHANNELS, 1]]
            assert launches == expected[name], name
    assert [list(counted) for counted in answers.values()] == [list(LAUNCHES), ["gradient"]]


CHIP_CHANNELS, CHIP_EXAMPLES = 128, 4 * 1024


def devices_of(target):
    """Four chips that are not there, and their platform."""
    if target is None:
        return jax.devices(), "cpu"
    chip = bn_fused.kernels.CHIPS[target]
    if chip.platform == "tpu":
        return deviceless._tpu_topology(chip).devices[:4], "tpu"
    from jax.experimental import topologies

    description = deviceless.gpu_description(chip)
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=target, topology="1x1x4", target_config=description
    )
    return topology.devices, "cuda"


def main():
    work = json.load(sys.stdin)
    devices, platform = devices_of(work["target"])
    mesh = jax.sharding.Mesh(np.array(devices[: work["devices"]]), ("dev",))
    backend = work.get("backend", "auto")
    here = work["target"] is None
    channels, examples = (CHANNELS, 2 * len(devices)) if here else (CHIP_CHANNELS, CHIP_EXAMPLES)
    arrays, functions = programs(channels, backend)
    kernel = re.compile(r"%bn_fused_\w+(?:\.\d+)? = " if platform == "tpu" else '"(?:mosaic_gpu|triton_kernel_call)')
    answer = {}
    for check_vma in (True, False):
        # The compilers for chips take long: one program must do.
        names = functions if here else ("gradient", "tangent", "per_example") if check_vma else ("gradient",)
        answer[str(check_vma)] = counted = {}
        for name in names:
            text = compiled(
                *functions[name], mesh, arrays, (examples, channels), platform=platform, check_vma=check_vma
            )
            counted[name] = exchanges(text) if here else [exchanges(text), len(kernel.findall(text))]
    if not here:
        square = jax.sharding.Mesh(np.array(devices).reshape(2, 2), ("dev", "rest"))
        try:
            compiled(*functions["forward"], square, arrays, (examples, channels), platform=platform, axis_names={"dev"})
        except bn_fused.BackendError as error:
            answer["left to XLA"] = str(error)
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
