"""Lowered kernels, kept beside the programs that JAX keeps: `lower_kept`.

Mosaic builds a kernel for GPUs operation by operation in Python, for which a large network waits longer than for all
else that is lowered. Where JAX keeps compiled programs (`JAX_COMPILATION_CACHE_DIR`, a folder here), lowered code is
kept in its folder `bn_fused`, as `jax.export` writes it, and neither traced nor lowered again: not by another program,
and not by another process. It belongs to what made it: the operation, its plan and types, the chip, the versions of JAX
and the text of this package's kernels.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import pathlib
import tempfile
import warnings

import jax
from jax import export

from bn_fused.kernels.jax_internals import is_one_devices_program, lower_plainly

# What Mosaic calls its kernels in a program. It keeps no promise that another version of JAX can run them.
_KERNELS = tuple(map(export.DisabledSafetyCheck.custom_call, ("mosaic_gpu", "mosaic_gpu_v2")))
# Importing it tells XLA where to find what Mosaic's kernels are compiled with. Who makes a kernel imports it anyway.
_COMPILED_WITH = "jax.experimental.mosaic.gpu"
_LOWERED: dict[pathlib.Path, export.Exported] = {}


def folder():
    """The folder where lowered kernels are kept; None where `why_not` says why they are not."""
    return None if why_not() else pathlib.Path(jax.config.jax_compilation_cache_dir) / "bn_fused"


def why_not():
    """What is to be done to have lowered kernels kept; "" where they are."""
    place = jax.config.jax_compilation_cache_dir
    if not jax.config.jax_enable_compilation_cache or not place or "://" in str(place):
        return "JAX keeps no programs in a folder here: set JAX_COMPILATION_CACHE_DIR"
    if importlib.util.find_spec("flatbuffers") is None:  # in which jax.export writes
        return "pip install flatbuffers"
    return ""


def lower_kept(function, described, context, *values):
    """`lower_plainly`, of what is kept where it can be. `described` tells all that `function` depends on but types."""
    place = folder()
    if place is None or not is_one_devices_program(context):
        return lower_plainly(function, context, *values)
    types = [jax.ShapeDtypeStruct(type_.shape, type_.dtype) for type_ in context.avals_in]
    lowered = _lowered(place / f"{_name(described, types)}.mlir", function, types, context.module_context.platforms[0])
    return lower_plainly(lambda *arrays: list(lowered.call(*arrays)), context, *values)


def _lowered(path, function, types, platform):
    if path in _LOWERED:
        return _LOWERED[path]
    lowered = _read(path)
    if lowered is None:
        lowered = export.export(jax.jit(function), platforms=(platform,), disabled_checks=_KERNELS)(*types)
        _write(path, lowered)
    return _LOWERED.setdefault(path, lowered)


def _name(described, types):
    facts = (described, [(type_.shape, type_.dtype.name) for type_ in types], jax.config.jax_enable_x64, _made_by())
    return hashlib.sha256(repr(facts).encode()).hexdigest()


@functools.cache
def _made_by():
    """The versions of JAX, and the text of all of the package's kernels."""
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return *map(importlib.metadata.version, ("jax", "jaxlib")), digest.hexdigest()


def _read(path):
    try:
        lowered = export.deserialize(bytearray(path.read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # whatever reading a damaged file raises
        warnings.warn(f"{path} is not read, and made again: {type(error).__name__}: {error}", stacklevel=2)
        return None
    importlib.import_module(_COMPILED_WITH)
    return lowered


def _write(path, lowered):
    """In one step, so that no other process reads half a file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(lowered.serialize())
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"a lowered kernel is not kept: {error}", stacklevel=2)
