"""Console entry of `bn-bench`, also run by `python -m bn_fused.bench`."""

import importlib.util
import sys

from .allocator import keep_freed_memory

NEEDED = ("click", "pydantic", "rich")


def missing_modules() -> list[str]:
    """Names of the modules of the `bench` extra that cannot be imported here."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def main() -> None:
    """Run the command line and exit with its status; see `cli.main`."""
    missing = missing_modules()
    if missing:
        print(f'bn-bench needs {" and ".join(missing)}: pip install "bn_fused[bench]"', file=sys.stderr)
        sys.exit(2)
    keep_freed_memory()
    try:
        from . import cli

        status = cli.main()
    except KeyboardInterrupt:  # while it was still importing
        print("bn-bench: interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    main()
