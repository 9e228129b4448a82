"""Which chip a device is, and that a backend's choice is told."""

import jax
import jax.numpy as jnp
import pytest

import bn_fused
from bn_fused.kernels import CHIPS, Target, dispatch
from bn_fused.kernels.chips import chip_of
from bn_fused.kernels.contract import OPERATIONS, Spec

from support.described_devices import device


def test_a_device_of_the_table_is_known_by_its_kind():
    for chip in CHIPS.values():
        assert chip_of(device(chip.device_kind)) is chip
    assert chip_of(device("TPU v5p")) is CHIPS["v5p"]


def test_another_nvidia_gpu_is_described_by_what_it_says_of_itself():
    chip = chip_of(device("NVIDIA GeForce RTX 4080", compute_capability="8.9", core_count=76))
    assert (chip.name, chip.compute_capability, chip.cores) == ("geforce rtx 4080", (8, 9), 76)
    assert chip.shared_memory_per_block == 99 * 1024


def test_amd_gpus_are_described_by_what_they_say_of_themselves():
    """JAX gives the product's name or the architecture with features as device_kind, and the architecture alone."""
    mi300a = chip_of(device("AMD Instinct MI300A", compute_capability="gfx942", core_count=228))
    assert (mi300a.name, mi300a.architecture, mi300a.cores) == ("instinct mi300a", "gfx942", 228)
    unnamed = chip_of(device("gfx90a:sramecc+:xnack-", compute_capability="gfx90a:sramecc+:xnack-", core_count=104))
    assert (unnamed.name, unnamed.architecture, unnamed.platform) == ("gfx90a", "gfx90a", "rocm")
    assert unnamed.lanes == mi300a.lanes == 64 and unnamed.shared_memory_per_block == 64 * 1024
    radeon = chip_of(device("AMD Radeon RX 7900 XTX", compute_capability="gfx1100", core_count=48))
    assert (radeon.architecture, radeon.lanes) == ("gfx1100", 32)


def test_a_partition_of_an_amd_gpu_is_believed_to_have_fewer_cores():
    whole, part = (device("AMD Instinct MI300X", compute_capability="gfx942", core_count=n) for n in (304, 38))
    assert chip_of(whole) is CHIPS["mi300x"]
    assert chip_of(part).cores == 38 and chip_of(part).name == "mi300x"


@pytest.mark.parametrize(
    "unknown",
    [
        device("cpu"),
        device("TPU v2"),
        device("AMD Instinct MI300A"),
        device("NVIDIA Odd", compute_capability="new", core_count=1),
        device("NVIDIA Later", compute_capability="99.0", core_count=1),
    ],
    ids=lambda unknown: unknown.device_kind,
)
def test_what_is_not_known_has_no_chip(unknown):
    assert chip_of(unknown) is None


def test_this_processs_cpu_has_no_chip():
    assert chip_of(jax.devices("cpu")[0]) is None


@pytest.mark.parametrize(
    ("there", "platform"),
    [
        (device("NVIDIA H200", platform="gpu"), "rocm"),
        (device("AMD Instinct MI300X", platform="gpu", core_count=304), "cuda"),
    ],
    ids=["rocm on an NVIDIA GPU", "cuda on an AMD GPU"],
)
def test_a_program_for_the_other_vendors_gpus_is_not_made_for_the_gpu_that_is_there(there, platform, monkeypatch):
    monkeypatch.setattr(dispatch, "lowering_device", lambda context, platform: there)

    def lower(backend):
        spec = Spec("grc", 1e-5, None, backend)
        traced = jax.jit(lambda x: dispatch.run("moments", spec, x=x)).trace(jnp.ones((1, 64, 8)))
        return traced.lower(lowering_platforms=(platform,))

    assert "triton" not in lower("auto").as_text()
    with pytest.raises(bn_fused.BackendError, match=f"cannot run on {platform}: it is not known for which GPU"):
        lower("triton")


def test_explain_takes_a_chip_or_a_platform():
    named_by = {"h200": "cuda (h200)", "v5e": "tpu (v5e)", "mi300x": "rocm (mi300x)", "rocm": "rocm"}
    for target, named in named_by.items():
        assert named in bn_fused.explain((64, 8), jnp.float32, target=target).reason
    assert bn_fused.explain((64, 8), jnp.float32, target=Target("cpu")) == bn_fused.explain((64, 8), jnp.float32)
    with pytest.raises(ValueError, match="target is 'h2000'; accepted are 'a100'"):
        bn_fused.explain((64, 8), jnp.float32, target="h2000")


def test_vmem_limits_lie_within_the_memory():
    tpus = [chip for chip in CHIPS.values() if chip.platform == "tpu"]
    assert tpus and all(0 < chip.vmem_limit <= chip.vmem for chip in tpus)
    assert not CHIPS["v4"].can_raise_vmem_limit and CHIPS["v5e"].can_raise_vmem_limit


@pytest.mark.parametrize("chip", [chip.name for chip in CHIPS.values() if chip.platform == "tpu"])
def test_auto_says_what_keeps_it_from_the_kernels_of_a_tpu(chip):
    def said(channels, **asked):
        return bn_fused.explain((64, 28, 28, channels), "bfloat16", target=chip, **asked).reason

    assert "fewer than 128 channels XLA copies and pads x" in said(64)
    assert "blocks of networks then move fewer bytes" in said(128)
    assert said(64, backend="pallas_tpu").startswith("asked for by name; auto does not take it: with fewer than 128")


def test_plans_of_kernels_tell_kind_passes_and_launches_in_one_way():
    shape, dtype = (512, 28, 28, 256), "bfloat16"
    for target, backend in (("h200", "pallas_gpu"), ("v5e", "pallas_tpu"), ("v4", "pallas_tpu")):
        plan = bn_fused.explain(shape, dtype, target=target, backend=backend).plan
        for operation in OPERATIONS:
            reads, writes = plan.passes(operation)
            launches = plan.launches(operation)
            assert reads >= 1 and writes in (0, 1) and len(launches) == len(set(launches)) >= 1
            assert plan.kind(operation) in ("resident", "slab", "partial", "hybrid", "streaming")
            fewest = {"forward": 1, "backward": 2}
            if operation in fewest:
                assert (plan.kind(operation) in ("resident", "slab")) == (reads == fewest[operation])
