"""What the backend `triton` refuses, in a sentence each, and which packages must be installed for it."""

import functools
import importlib.metadata
import importlib.util
import re

import jax.numpy as jnp

from bn_fused.kernels.backends.triton import plan as plans
from bn_fused.kernels.backends.triton.plan import architecture_of, check, make_plan, most_threads

DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = ("relu", "leaky_relu", "silu", "gelu")  # that `passes` has in Triton's language
CAPABILITIES = (8, 9, 10, 12)  # major versions for which these kernels were compiled
ARCHITECTURES = ("gfx90a", "gfx942")  # of AMD, for which these kernels were compiled: CDNA 2 and 3
MOST = 1 << 31
MOST_AMD = 1 << 32  # threads of a launch, which HIP counts in 32 bits
JAX_TRITON = "0.3.1"  # what the extra `triton` installs; later versions fail with some versions of JAX
OLDEST_TRITON = (3, 6)
# With 3.7, 3.8 and 3.9 that jax-triton ends in a KeyError when it compiles for AMD; for NVIDIA it works with them.
NEWEST_TRITON_FOR_AMD = (3, 6)
INSTALL = f"pip install jax-triton=={JAX_TRITON} triton"
ELSE = "backend='auto' takes one that does"


def plan(problem, target, config=None):
    """The `Plan` for a problem."""
    return make_plan(
        *_sizes(problem, target),
        config,
        residual=problem.residual,
        derivative=problem.activation is not None,
    )


def search_set(problem, target):
    """The configurations to time for a problem."""
    return plans.search_set(*_sizes(problem, target))


def _sizes(problem, target):
    return problem.groups, problem.rows, problem.channels, jnp.dtype(problem.dtype).itemsize, target.chip


def refusal(problem, target):
    """None, or one sentence: why these kernels cannot compute the problem on the target."""
    chip = target.chip
    if target.platform not in ("cuda", "rocm"):
        return "it is written for GPUs; backend='auto' takes one that runs there"
    if problem.dtype not in DTYPES:
        return f"its kernels take {', '.join(DTYPES)}, not {problem.dtype}; {ELSE}"
    if problem.activation is not None and problem.activation not in ACTIVATIONS:
        return f"its kernels take the activations {', '.join(ACTIVATIONS)}, not {problem.activation}; {ELSE}"
    if problem.mask:
        return f"its kernels take no mask; {ELSE}"
    if chip is None:
        return (
            "it is not known for which GPU it is compiled, and its code depends on that: name one of "
            "bn_fused.kernels.CHIPS, or ask where the GPU is, without a target"
        )
    unsuited = _unsuited(chip)
    if unsuited is not None:
        return unsuited
    if target.partitioned:
        return "XLA partitions the arrays over several devices, and would gather them whole for a kernel"
    if max(problem.rows, problem.groups * problem.channels) >= MOST:
        return (
            f"it counts rows, and values per channel, in 32 bits, and there are {problem.rows} rows of "
            f"{problem.groups} times {problem.channels} channels"
        )
    planned = plan(problem, target)
    if planned.tile_rows * planned.fold * problem.channels >= MOST:
        return f"it counts places within a tile of rows in 32 bits, and there are {problem.channels} channels"
    if target.platform == "rocm" and most_threads(planned, problem.groups, problem.channels) >= MOST_AMD:
        return (
            f"a launch of 2^32 threads or more does not run on an AMD GPU, and {problem.groups} times "
            f"{problem.channels} channels need one"
        )
    return missing(target.platform)


def _unsuited(chip):
    """None if these kernels were compiled for a GPU's architecture, else one sentence."""
    if chip.platform == "rocm":
        if chip.architecture in ARCHITECTURES:
            return None
        return (
            f"its kernels were compiled for AMD's {' and '.join(ARCHITECTURES)} (Instinct MI200 and MI300), and "
            f"{chip.device_kind} is {chip.architecture}"
        )
    major, minor = chip.compute_capability
    if major < CAPABILITIES[0]:
        return f"it needs compute capability 8.0 (Ampere) or later, and {chip.name} has {major}.{minor}"
    if major not in CAPABILITIES:
        return f"it is not known to compile for compute capability {major}.{minor} ({chip.name})"
    return None


@functools.cache
def missing(platform="cuda"):
    """None if jax-triton can be used here for GPUs of a platform, else one sentence: what to install."""
    for module, package in (("jax_triton", "jax-triton"), ("triton", "triton")):
        if importlib.util.find_spec(module) is None:
            return f"{package} is not installed: {INSTALL}"
    jax_triton, triton = _version("jax-triton"), _version("triton")
    if jax_triton is None or triton is None:
        package = "jax-triton" if jax_triton is None else "triton"
        return f"{package} is there without its metadata, so that its version is not known: {INSTALL}"
    if jax_triton != JAX_TRITON:
        return f"it works with jax-triton {JAX_TRITON}, and {jax_triton} is installed: {INSTALL}"
    numbers = tuple(int(number) for number in re.findall(r"\d+", triton)[:2])
    if numbers < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return (
            f"jax-triton {JAX_TRITON} needs triton {oldest} or later, and {triton} is installed: "
            f"pip install 'triton>={oldest}'"
        )
    if platform == "rocm" and numbers > NEWEST_TRITON_FOR_AMD:
        newest = ".".join(map(str, NEWEST_TRITON_FOR_AMD))
        return (
            f"for AMD GPUs jax-triton {JAX_TRITON} works with triton {newest} alone, and {triton} is installed: "
            f"pip install 'triton=={newest}.*'"
        )
    return None


def _version(package):
    """The installed version of a package, None where its metadata is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def plan_refusal(plan, problem, target):
    """None, or one sentence: why a plan that was given by hand cannot run."""
    architecture = architecture_of(target.chip)
    if plan.architecture != architecture:
        return f"its architecture is {plan.architecture!r}, and that of {target.chip.name} is {architecture!r}"
    try:
        check(plan, problem.rows, problem.channels)
    except ValueError as error:
        return str(error)
    return None
