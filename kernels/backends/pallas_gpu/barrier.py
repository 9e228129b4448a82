"""Where the blocks of a kernel wait for each other, and why they do not wait for ever.

Waiting for each other is sound only if all blocks of a unit are on the chip together. No more blocks are launched than
there are multiprocessors, each of which takes one: `one_launch_plan.not_co_resident` refuses everything else before it
is lowered, with the number of multiprocessors that the device itself reports if that is less than the chip's table says
(a slice of a GPU: MIG; a share under MPS). In a program for several devices a unit is a cluster, which the hardware
places together or not at all: a collective that runs beside such a kernel holds multiprocessors until it has met those
of the other devices, which may be waiting for multiprocessors in the same way. What is left to go wrong at run time:

- A program that was compiled for a whole chip and is run, from a file, on a part of one.
- Two of these kernels at the same time on one device, each of which holds multiprocessors that the other one needs.
  JAX runs the programs of a process one after another on a device, and XLA the kernels of a program in one stream; two
  processes that share a device with MPS, or XLA with `--xla_gpu_command_buffer_scheduling_mode=CONCURRENT`, do not.
  (Other kernels, which end by themselves, only delay it.)

Therefore no block waits longer than `PATIENCE_SECONDS`: it then ends the kernel by a trap, with an assertion's message
on the process's standard error. That is an error in place of a hang, but the CUDA context, and so the process's use of
the device, ends with it. Nothing of a half-run kernel is ever returned. `plan=` with `forward=None, backward=None`
streams.

The counters of the barrier are zeroed by XLA before the launch, and belong to that launch: launches that are repeated,
in loops or of other programs, never see each other's. Each unit has its own counter and uses it once: it counts up to
the number of members, and is never lowered or used again.
"""

from bn_fused.kernels.backends.pallas_gpu.block import pallas
from bn_fused.kernels.jax_internals import barrier_signal, barrier_wait

# Far more than any kernel that shares the device holds its multiprocessors, and less than anybody waits for a hang.
PATIENCE_SECONDS = 60
# XLA zeroes counters that are arrays of one size in one launch for all layers of a network, up to some 90 of them, and
# copies a zero for each array of a single one.
LEAST_COUNTERS = 2


class CounterBarrier:
    """Where the blocks of a unit wait for each other: a counter in global memory for each unit."""

    def __init__(self, members, units):
        self.members, self.units = members, units

    def scratch(self):
        """The types of the scratch memory that it needs."""
        return []

    def prepare(self, scratch):
        """Once in each thread; with the references to that memory."""
        del scratch
        pl, plgpu = pallas()
        self.counters = pl.get_global(plgpu.SemaphoreType.REGULAR((max(self.units, LEAST_COUNTERS),)))

    def signal(self, unit):
        """One warpgroup of each block: what the block wrote to global memory is there."""
        barrier_signal(self.counters.at[unit])

    def wait(self, unit):
        """Every warpgroup: until all members have signalled; sees all that they wrote before."""
        barrier_wait(self.counters.at[unit], self.members, PATIENCE_SECONDS)


# The tests put another one in its place, for the interpreter, which has no global counters.
barrier_type = CounterBarrier
