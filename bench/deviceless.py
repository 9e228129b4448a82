"""Compile a JAX function for a chip that is not there: `compile_for(target, fn, *specs)`.

The compilers for NVIDIA GPUs and TPUs come as Python wheels and need the chip's description, not the chip. What comes
back is the optimised program: its HLO text (`audit.traffic` counts passes over memory in it), its memory, its kernels.

    python -m bn_fused.bench.deviceless            # the targets, and which can be compiled for here
    python -m bn_fused.bench.deviceless cuda tpu   # pip requirements of the compilers, for the installed JAX
    python -m bn_fused.bench.deviceless triton     # and of Triton, for the backend of that name

so that `pip install --no-deps $(python -m bn_fused.bench.deviceless cuda)` installs what is needed for GPUs: about
140 MB, no driver and none of the CUDA libraries (which `--no-deps` leaves out). Compile with `JAX_PLATFORMS=cpu` in the
environment: without it, JAX refuses the compiler where there is no driver.

A process compiles for one GPU only: XLA keeps the first one's description, and `compile_for` raises
`DevicelessUnavailable` for a second.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import re
import sys
from types import MappingProxyType

from bn_fused.bench.installing import has_compiler, pip_install, python
from bn_fused.kernels.backends.triton.limits import JAX_TRITON, OLDEST_TRITON
from bn_fused.kernels.chips import CHIPS, Chip, GpuChip, TpuChip

CUDA, TPU, TRITON = "cuda", "tpu", "triton"
INSTALLABLE = (CUDA, TPU, TRITON)


class DevicelessUnavailable(RuntimeError):
    """The process cannot compile for the target; the message says what to install or to do."""


def gpu_description(chip: GpuChip) -> str:
    """XLA's target configuration of a GPU, as a protocol buffer's text."""
    major, minor = chip.compute_capability
    return f"""
        platform_name: "CUDA"
        device_description_str: "{chip.device_kind}"
        dnn_version_info {{ major: 9 minor: 8 }}
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          core_count: {chip.cores}
          clock_rate_ghz: {chip.clock_ghz}
          fpus_per_core: {64 if (major, minor) == (8, 0) else 128}
          threads_per_warp: 32
          threads_per_block_limit: 1024
          threads_per_core_limit: {2048 if minor == 0 else 1536}
          registers_per_block_limit: 65536
          registers_per_core_limit: 65536
          shared_memory_per_block: 49152
          shared_memory_per_block_optin: {chip.shared_memory_per_block}
          shared_memory_per_core: {chip.shared_memory_per_core}
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
          device_memory_size: {chip.memory}
          memory_bandwidth: {chip.memory_bandwidth}
          l2_cache_size: {chip.l2_cache}
        }}
    """


# The smallest topology of each TPU generation that libtpu describes, and the accelerator type it belongs to.
TPU_TOPOLOGIES = MappingProxyType(
    {
        "v4": ("v4:2x2x1", "v4-8"),
        "v5e": ("v5e:2x2", "v5litepod-4"),
        "v5p": ("v5p:2x2x1", "v5p-8"),
        "v6e": ("v6e:2x2", "v6e-4"),
        "v7x": ("tpu7x:2x2x1", "tpu7x-8"),
    }
)
TARGETS = CHIPS
COMPILABLE = tuple(name for name, chip in CHIPS.items() if chip.platform in INSTALLABLE)  # not AMD's

# The GPU that this process compiles for, once there is one.
_chosen_gpu: GpuChip | None = None


def target_named(target: str) -> Chip:
    """The entry of `TARGETS`; ValueError for another name."""
    if target not in TARGETS:
        raise ValueError(f"target is {target!r}; accepted are {', '.join(map(repr, TARGETS))}")
    return TARGETS[target]


def requirements(platform: str) -> tuple[str, ...]:
    """The pip requirements of the compiler for "cuda" or "tpu", or of "triton", that match the installed JAX."""
    if platform == CUDA:
        version = importlib.metadata.version("jax")
        return f"jax-cuda13-plugin=={version}", f"jax-cuda13-pjrt=={version}"
    if platform == TPU:
        # JAX's own pin, such as: libtpu==0.0.48.*; extra == "tpu"
        for requirement in importlib.metadata.requires("jax") or ():
            pin = re.match(r'\s*(libtpu\s*[^;]*?)\s*;.*extra\s*==\s*["\']tpu["\']', requirement)
            if pin:
                return (pin.group(1),)
        raise DevicelessUnavailable("the installed jax names no libtpu in its `tpu` extra: install jax[tpu]")
    if platform == TRITON:
        # jax-triton, what it needs beside JAX, and the oldest Triton that it works with: 190 MB.
        return f"jax-triton=={JAX_TRITON}", "absl-py>=1.4", f"triton=={'.'.join(map(str, OLDEST_TRITON))}.*"
    raise ValueError(f"platform is {platform!r}; accepted are {', '.join(map(repr, INSTALLABLE))}")


def missing(target: str) -> str | None:
    """None if the compiler for a target is installed, else one sentence: what is missing and how to install it."""
    platform = target_named(target).platform
    if platform not in INSTALLABLE:
        return f"{target} is an AMD GPU, and bn_fused has no compiler for those that runs without one"
    if has_compiler(platform):
        return None
    listed = f"$({python()} -m bn_fused.bench.deviceless {platform})"
    return f"the compiler for {target} is not installed: {pip_install(f'--no-deps {listed}')}"


def compile_for(target: str, fn, *specs):
    """Compile a function for one chip of a target, whatever this machine has.

    **Arguments:**

    - `target`: a name of `TARGETS`.
    - `fn`: the function, jitted or not.
    - `specs`: its arguments, as arrays, `jax.ShapeDtypeStruct`s or pytrees of them. Only shapes and dtypes matter.

    **Returns:** the `jax.stages.Compiled`. It cannot be called; `as_text()` is the optimised HLO.

    **Raises:** ValueError for an unknown target; `DevicelessUnavailable` if its compiler is not installed or does not
    start, or if this process has compiled for another GPU before.
    """
    return compile_lowered(lower_for(target, fn, *specs))


def compile_lowered(lowered):
    """The `jax.stages.Compiled` of what `lower_for` lowered.

    JAX's cache of compiled programs is left aside: it cannot read those for devices that are not there.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    def enable(value):
        jax.config.update("jax_enable_compilation_cache", value)
        compilation_cache.reset_cache()  # which looks at the setting once

    enabled = jax.config.jax_enable_compilation_cache
    enable(False)
    try:
        return lowered.compile()
    finally:
        enable(enabled)


def lower_for(target: str, fn, *specs):
    """The `jax.stages.Lowered` that `compile_for` compiles: the function traced, and lowered for the target."""
    return lower_traced(target, trace_for(target, fn, *specs))


def lower_traced(target: str, traced):
    """What `trace_for` traced, as `lower_for`."""
    return traced.lower(lowering_platforms=(target_named(target).platform,))


def trace_for(target: str, fn, *specs):
    """The `jax.stages.Traced` that `lower_for` lowers."""
    import jax
    import numpy as np

    description = target_named(target)
    sentence = missing(target)
    if sentence is not None:
        raise DevicelessUnavailable(sentence)
    topology = _gpu_topology(description) if description.platform == CUDA else _tpu_topology(description)
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("device",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def place(spec):
        return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding)

    placed = jax.tree.map(place, specs)
    # Without arguments there is nothing that says where the results should be, other than this.
    function = jax.jit(fn, out_shardings=sharding)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return function.trace(*placed)


def _gpu_topology(target: GpuChip):
    from jax.experimental import topologies

    global _chosen_gpu
    if _chosen_gpu not in (None, target):
        raise DevicelessUnavailable(
            f"this process compiles for {_chosen_gpu.name}; XLA keeps one GPU's description for a process: compile for "
            f"{target.name} in another"
        )
    try:
        topology = topologies.get_topology_desc(
            platform=CUDA, topology_name=target.name, target_config=gpu_description(target), topology="1x1x1"
        )
    except Exception as error:
        raise _does_not_start(target, error) from error
    _chosen_gpu = target
    return topology


def _tpu_topology(target: TpuChip):
    from jax.experimental import topologies

    topology, accelerator_type = TPU_TOPOLOGIES[target.name]
    # libtpu asks the cloud's metadata server which machine it is on; here it is told.
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_ACCELERATOR_TYPE", accelerator_type),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        # One process at a time may use a TPU; none is used here.
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
    ):
        os.environ.setdefault(name, value)
    try:
        return topologies.get_topology_desc(platform=TPU, topology_name=topology)
    except Exception as error:
        raise _does_not_start(target, error) from error


def _does_not_start(target, error) -> DevicelessUnavailable:
    import jax

    if target.platform == CUDA and not jax.config.jax_platforms:
        remedy = "without a GPU driver it needs JAX_PLATFORMS=cpu in the environment"
    else:
        versions = " ".join(requirements(target.platform))
        remedy = f"it must match jax {importlib.metadata.version('jax')}: {versions}"
    return DevicelessUnavailable(
        f"the compiler for {target.name} does not start ({type(error).__name__}: {error}); {remedy}"
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line; see the module's text."""
    parser = argparse.ArgumentParser(
        prog="python -m bn_fused.bench.deviceless",
        description="Print the pip requirements with which functions compile for chips that are not there.",
    )
    parser.add_argument(
        "platforms",
        nargs="*",
        metavar="{cuda,tpu,triton}",
        help="the platforms to print requirements for; without any, list the targets",
    )
    platforms = parser.parse_args(arguments).platforms
    unknown = [platform for platform in platforms if platform not in INSTALLABLE]
    if unknown:
        parser.error(f"unknown platform {unknown[0]!r}; accepted are {', '.join(INSTALLABLE)}")
    for platform in platforms:
        print(*requirements(platform), sep="\n")
    if not platforms:
        for target in TARGETS:
            print(f"{target:7} {missing(target) or 'can be compiled for'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
