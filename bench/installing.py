"""What is installed here, and what a message tells the user to type: pip of the Python that runs, not the shell's."""

import importlib.metadata
import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Mapping

import bn_fused

# Packages whose versions decide about a result.
PACKAGES = ("jax", "jaxlib", "equinox", "numpy", "flax", "torch", "triton", "jax-triton", "libtpu", "jax-cuda13-plugin")


def python() -> str:
    """How a shell calls this Python: `python` where that is it, else its path, relative if it is in this folder."""
    executable = os.path.abspath(sys.executable)
    on_path = shutil.which("python")
    # Not what the names resolve to: those of a virtual environment resolve to the Python that it was made of.
    if on_path is not None and os.path.abspath(on_path) == executable:
        return "python"
    below = os.path.relpath(executable)
    return shlex.quote(executable if below.startswith(os.pardir) else below)


def has_compiler(platform: str) -> bool:
    """Whether the compiler for "cuda" or "tpu", with which JAX also looks for the chip, is installed."""
    if platform == "tpu":
        return importlib.util.find_spec("libtpu") is not None
    # The folder of all plugins first: it may be missing.
    return all(importlib.util.find_spec(name) is not None for name in ("jax_plugins", "jax_plugins.xla_cuda13"))


def pip_install(what: str) -> str:
    """The command that installs requirements for this Python."""
    return f"{python()} -m pip install {what}"


def versions() -> dict[str, str]:
    """The versions of the installed packages of `PACKAGES`, and of bn_fused."""
    installed = {"bn_fused": bn_fused.__version__}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def versions_text(versions: Mapping[str, str]) -> str:
    """Packages and their versions in a line."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())
