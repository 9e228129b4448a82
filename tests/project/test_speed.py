"""On a CPU the layer is about as fast as equinox's in the forward pass, and much faster with its gradient.

Ratios of times that are taken in turn in one process, because times on a shared machine mean nothing alone; in a
process of its own, because the allocator's settings are read when it starts; the best of three, because what else
runs there can only spoil a ratio.
"""

import platform

import pytest

from bn_fused.bench.allocator import ALLOCATOR
from bn_fused.bench.workloads import SUITES

from support.child_process import answer
from support.versions import on_the_newest_jax

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc",
    reason="times of large arrays need glibc's allocator, which can be told to keep freed memory",
)

LIMITS = {"fwd": 1.1, "fwd+bwd": 0.6}

TIME = """
import json, os, sys
if hasattr(os, "sched_setaffinity"):
    # One core, before XLA counts them: a neighbour on another core then does not change how the work is split.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from bn_fused.bench.providers import EQUINOX, bn_fused_layer
from bn_fused.bench.run.cases import make_inputs
from bn_fused.bench.run.jax_case import jax_case
from bn_fused.bench.timing import measure
from bn_fused.bench.workloads import WORKLOADS

names, limits = json.load(sys.stdin)
best = {}
for name in names:
    inputs = make_inputs(WORKLOADS[name], sets=1)
    timed = {}
    for provider in (EQUINOX, bn_fused_layer("auto")):
        programs = jax_case(provider, inputs, "batch", tuple(limits), sync=False).programs
        timed |= {(provider.name, part): program for part, program in programs.items()}
    best[name] = {part: float("inf") for part in limits}
    for _ in range(3):
        samples = measure(timed, seconds=1.5)
        for part in limits:
            ratio = samples["auto", part].ratio_to(samples["equinox", part])
            best[name][part] = min(best[name][part], ratio)
        if all(best[name][part] <= limit for part, limit in limits.items()):
            break
json.dump(best, sys.stdout)
"""


@pytest.fixture(scope="module")
def ratios():
    """The layer's time over equinox's, by workload and pass."""
    return answer(["-c", TIME], [SUITES["quick"], LIMITS], ALLOCATOR, timeout=300)


@pytest.mark.parametrize("part", LIMITS)
@pytest.mark.parametrize("workload", SUITES["quick"])
@on_the_newest_jax
def test_the_layer_takes_at_most_this_share_of_equinoxs_time(ratios, workload, part):
    assert ratios[workload][part] <= LIMITS[part], ratios
