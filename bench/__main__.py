"""Console entry of `bn-bench`, also run by `python -m bn_fused.bench`."""

import glob
import importlib.util
import sys

import jax

from bn_fused.bench.allocator import keep_freed_memory
from bn_fused.bench.installing import has_compiler

# What a Linux has where a driver of a GPU or TPU is loaded.
DRIVERS = ("/dev/nvidia*", "/dev/dxg", "/dev/kfd", "/dev/accel*", "/dev/vfio/*")
NEEDED = ("click", "pydantic", "rich")


def missing_modules() -> list[str]:
    """Names of the modules of the `bench` extra that cannot be imported here."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def without_a_driver() -> bool:
    """Whether JAX would look for a GPU or TPU in vain, and complain: a compiler for one is installed, and no driver."""
    if sys.platform != "linux" or any(map(glob.glob, DRIVERS)):
        return False
    return has_compiler("cuda") or has_compiler("tpu")


def main() -> None:
    """Run the command line and exit with its status; see `cli.main`."""
    missing = missing_modules()
    if missing:
        print(f'bn-bench needs {" and ".join(missing)}: pip install "bn_fused[bench]"', file=sys.stderr)
        sys.exit(2)
    keep_freed_memory()
    # bn_fused, which holds this package, has imported JAX: the environment is read already.
    if not jax.config.jax_platforms and without_a_driver():
        print("bn-bench: there is no driver of a GPU or TPU here; JAX is told to use the CPU", file=sys.stderr)
        jax.config.update("jax_platforms", "cpu")
    try:
        from bn_fused.bench import cli

        status = cli.main()
    except KeyboardInterrupt:  # while it was still importing
        print("bn-bench: interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    main()
