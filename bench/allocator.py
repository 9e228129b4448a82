"""The memory allocator's settings without which times on a CPU mean little."""

import os
import platform
import sys

# glibc hands large blocks back to the kernel when they are freed, so that every new output array is paid for
# again in page faults: on a CPU that costs more than the arithmetic that is to be timed. Above the two thresholds
# (bytes) it still does so; an array of a benchmark stays below them. A single arena, which grows by half a gigabyte
# at a time, because the arenas of further threads are handed back whatever the thresholds say.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TOP_PAD_": str(512 << 20),
}


def keeps_freed_memory() -> bool:
    """Whether the settings of `ALLOCATOR`, or the user's own, are in force in this process."""
    return platform.libc_ver()[0] == "glibc" and all(name in os.environ for name in ALLOCATOR)


def keep_freed_memory() -> None:
    """Restart this process, once, with the allocator told to keep the memory that is freed.

    glibc reads the settings when a process starts, hence the restart. It is the same command line in the same
    environment plus the variables of `ALLOCATOR`; a variable that the user has set is left alone. Does
    nothing with other C libraries, and nothing under pytest, whose process it would replace.
    """
    unset = {name: value for name, value in ALLOCATOR.items() if name not in os.environ}
    if not unset or platform.libc_ver()[0] != "glibc" or "pytest" in sys.modules:
        return
    os.environ.update(unset)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
