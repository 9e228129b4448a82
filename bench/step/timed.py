"""The whole training step of a residual network with each BatchNorm: compared, then timed.

The networks stand in `networks`. Before anything is timed, two losses are compared with those of
`equinox.nn.BatchNorm(mode="batch")`: of the initial weights, and of the weights after one step, both with statistics
that were never updated. With those every BatchNorm normalises by the batch, whatever it does later on, so that the same
numbers must come out, but for rounding (`agreement`); the second one depends on every gradient.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import bn_fused
from bn_fused.bench.check import failure_of
from bn_fused.bench.step import resnet
from bn_fused.bench.step.agreement import (
    NOISES,
    STEP_SHARE,
    Expected,
    Losses,
    disagreement,
    epsilon,
    incomparable,
    tolerance,
)
from bn_fused.bench.step.networks import (
    BASELINE,
    NO_NORM,
    SGD_MOMENTUM,
    Contender,
    Setting,
    data,
    plain_equinox,
    program,
)
from bn_fused.bench.timing import Interrupted, Samples, Timed, measure


class JaxRun:
    """A program with its arrays on the device, lowered when it is made; the rest wants it compiled: `compile`."""

    def __init__(self, contender: Contender, setting: Setting):
        training = program(contender, setting)
        images, labels = data(setting)
        images = np.moveaxis(images, 1, -1) if training.channels_last else images
        self.images, self.labels = jnp.asarray(images, setting.dtype), jnp.asarray(labels)
        # The arrays of a carry are given away in every step, as in training.
        self._first = jax.device_get(training.carry)
        lr = jnp.float32(0)
        step = jax.jit(training.step, donate_argnums=0)
        self._lowered = step.lower(training.carry, self.images, self.labels, lr)
        self._step = None
        self._still = lr
        self._carry = None

    def compile(self) -> None:
        """Compile the step."""
        self._step, self._lowered = self._lowered.compile(), None

    def losses(self, lr: float, images=None) -> Losses:
        """Of the initial weights, and of the weights after a step with this learning rate.

        Both with the initial statistics. `images` in place of the setting's.
        """
        images = self.images if images is None else images
        carry, before = self._step(jax.device_put(self._first), images, self.labels, jnp.float32(lr))
        carry = carry._replace(statistics=jax.device_put(self._first.statistics))
        self._carry, after = self._step(carry, images, self.labels, self._still)
        return Losses(float(before), float(after))

    def learning_rate(self) -> float:
        """With it, a step changes the loss by about `STEP_SHARE` of it, as far as it is linear in the weights."""
        carry, loss = self._step(jax.device_put(self._first), self.images, self.labels, self._still)
        # Of a first step the velocity is the gradient.
        squares = sum(float(jnp.vdot(leaf, leaf)) for leaf in jax.tree.leaves(carry.velocity))
        return STEP_SHARE * float(loss) / squares if squares > 0 else 0.0

    def expected(self, lr: float, losses: Losses, unit: float) -> Expected:
        """These losses of this network, and how they change with images that differ by one unit of rounding."""
        rng = np.random.default_rng(1)
        changes = [(0.0, 0.0)]
        for _ in range(NOISES):
            factors = 1 + unit * rng.choice(np.float32([-1, 1]), self.images.shape)
            images = self.images * jnp.asarray(factors, jnp.float32).astype(self.images.dtype)
            changes.append([abs(one - other) for one, other in zip(self.losses(lr, images), losses, strict=True)])
        return Expected(losses, Losses(*map(max, zip(*changes, strict=True))))

    def once(self):
        """Start one step with a learning rate of 0: the weights stay where they are however long it is timed."""
        self._carry, loss = self._step(self._carry, self.images, self.labels, self._still)
        return loss

    def memory(self) -> int | None:
        """Bytes that the compiled program holds at once."""
        return compiled_memory(self._step)


class TorchRun:
    """The same in PyTorch, on the device that JAX uses."""

    def __init__(self, contender: Contender, setting: Setting):
        import torch

        platform = jax.devices()[0].platform
        if platform not in ("cpu", "gpu"):
            raise bn_fused.BackendError(f"torch is not timed on {platform}")
        if platform == "gpu" and not torch.cuda.is_available():
            raise bn_fused.BackendError("this torch has no GPU: it is not compared with what runs on one")
        self.torch, self.setting = torch, setting
        torch.backends.cudnn.benchmark = True
        self.device = torch.device("cuda" if platform == "gpu" else "cpu")
        order = torch.channels_last
        self.model = resnet.torch_model(plain_equinox(setting), setting.architecture)
        self.model = self.model.to(self.device, memory_format=order).train()
        if contender.compiled:
            self.model = torch.compile(self.model)
        images, labels = data(setting)
        self.images = torch.from_numpy(images).to(self.device, memory_format=order)
        self.labels = torch.from_numpy(labels).long().to(self.device)
        self.optimiser = torch.optim.SGD(self.model.parameters(), lr=0.0, momentum=SGD_MOMENTUM)

    def compile(self) -> None:
        """A step, for which torch compiles what it compiles and chooses convolutions; then the state is as before."""
        self.once()
        self.optimiser.state.clear()

    def _step(self):
        self.optimiser.zero_grad(set_to_none=True)
        in_float32 = self.setting.dtype == "float32"
        with self.torch.autocast(self.device.type, dtype=self.torch.bfloat16, enabled=not in_float32):
            logits = self.model(self.images)
        loss = self.torch.nn.functional.cross_entropy(logits.float(), self.labels)
        loss.backward()
        self.optimiser.step()
        return loss.detach()

    def losses(self, lr: float) -> Losses:
        """As of `JaxRun`. torch normalises by the batch while it trains: its statistics need not be put back."""
        losses = []
        for rate in (lr, 0.0):
            for group in self.optimiser.param_groups:
                group["lr"] = rate
            losses.append(float(self._step()))
        return Losses(*losses)

    def once(self):
        """One step, waited for."""
        self._step()
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()

    def memory(self) -> int | None:
        """The peak of torch's allocator, where it counts."""
        return self.torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None


def make_run(contender: Contender, setting: Setting) -> JaxRun | TorchRun:
    """The network of a contender with its arrays, not compiled yet."""
    return (TorchRun if contender.module == "torch" else JaxRun)(contender, setting)


def compiled_memory(compiled) -> int | None:
    """Bytes that a compiled program holds at once: arguments, results and temporaries; None if XLA does not say."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return int(analysis.argument_size_in_bytes + results + analysis.temp_size_in_bytes)


# The comparison


# Of rows that are timed.
TIMED = ("ok", "not compared")


@dataclasses.dataclass(frozen=True)
class Row:
    """One network.

    - `status`: "ok"; "not compared": it was timed, and no loss can tell whether it is right; "failed"; "refused": it
        cannot run this here; "missing": it is not installed; "untimed": the run was interrupted before it was timed, or
        it was not compiled in time.
    - `reason`: why it is not ok.
    - `loss`, `loss_after`: of the initial weights, and after one step; see the module's text.
    - `median`, `p10`, `p90`: seconds for a step, of `rounds` rounds; `images_per_second`.
    - `ratio`: the time over the baseline's, the median over paired rounds; `ratio_p10`, `ratio_p90`: their spread.
    - `memory`: bytes that the compiled program holds at once (torch: its allocator's peak).
    - `peak`: bytes that the device had in use at most while the first step ran, if that was the most so far.
    - `lowering`, `compilation`: seconds, of a network in a process of its own.
    - `busy`: on a GPU, seconds of all kernels in a step; `span`: from the first one's begin to the last one's end;
        `launches`: their number; `kernels`: of each name launches and seconds of one. See `bench.device_time`.
    """

    name: str
    status: str
    reason: str = ""
    loss: float | None = None
    loss_after: float | None = None
    median: float | None = None
    p10: float | None = None
    p90: float | None = None
    rounds: int = 0
    images_per_second: float | None = None
    ratio: float | None = None
    ratio_p10: float | None = None
    ratio_p90: float | None = None
    memory: int | None = None
    peak: int | None = None
    lowering: float | None = None
    compilation: float | None = None
    busy: float | None = None
    span: float | None = None
    launches: float | None = None
    kernels: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)


def one_line(error: BaseException) -> str:
    """`failure_of`, cut to what a line below a table has room for."""
    return failure_of(error)[:300]


def _peak(statistics) -> int | None:
    return None if not statistics else statistics.get("peak_bytes_in_use")


def run(
    setting: Setting,
    networks: Sequence[Contender],
    *,
    seconds: float,
    progress: Callable[[str, float], None] = lambda *_: None,
) -> list[Row]:
    """Build, compare and time the networks; the rows in their order.

    `seconds` is the time for the samples of all. A network that fails or disagrees is not timed. `progress` is called
    with what is done and the share of the work. Raises `RunInterrupted` in place of KeyboardInterrupt.
    """
    rows: dict[str, Row] = {}
    runs: dict[str, JaxRun | TorchRun] = {}
    samples, interrupted = {}, False
    try:
        _build(setting, networks, rows, runs, progress)
        samples = measure(
            {name: Timed(one.once) for name, one in runs.items()},
            seconds=seconds,
            progress=lambda share: progress("timing", 0.7 + 0.3 * share),
        )
    except Interrupted as stopped:
        samples, interrupted = stopped.samples, True
    except KeyboardInterrupt:
        interrupted = True
    finished = [timed(rows[one.name], samples, setting) for one in networks if one.name in rows]
    if interrupted:
        raise RunInterrupted(finished)
    return finished


class RunInterrupted(KeyboardInterrupt):
    """Ctrl-C during `run`. `rows` are those of the networks that were built, with the times of the whole rounds."""

    def __init__(self, rows: list[Row]):
        super().__init__()
        self.rows = rows


def _build(setting, networks, rows, runs, progress):
    """Build and compare the networks: fills `rows`, and `runs` with those that are to be timed."""
    device = jax.devices()[0]
    unit = epsilon(setting.dtype, device.platform)
    lr, expected = 0.0, None
    # The baseline first: the others are compared with it.
    order = sorted(networks, key=lambda one: one.name != BASELINE)
    for place, one in enumerate(order):
        progress(f"compiling {one.name}", 0.7 * place / len(order))
        if one.missing is not None:
            rows[one.name] = Row(one.name, "missing", one.missing)
            continue
        before = _peak(device.memory_stats())
        try:
            built = make_run(one, setting)
            built.compile()
            if one.name == BASELINE:
                lr = built.learning_rate()
            losses = built.losses(lr)
            if one.name == BASELINE:
                expected = built.expected(lr, losses, unit)
            memory = built.memory()
        except bn_fused.BackendError as error:
            rows[one.name] = Row(one.name, "refused", str(error))
            continue
        except Exception as error:  # a kernel may fail in any way; it must show, whatever it raised
            rows[one.name] = Row(one.name, "failed", one_line(error))
            continue
        after = _peak(device.memory_stats())
        risen = before is not None and after is not None and after > before
        row = compared(one, losses, expected, setting, device.platform)
        rows[one.name] = dataclasses.replace(row, memory=memory, peak=after if risen else None)
        if rows[one.name].status in TIMED:
            runs[one.name] = built


def compared(one: Contender, losses: Losses, expected: Expected | None, setting: Setting, platform: str) -> Row:
    """The row of a network with these losses, those of the baseline being `expected` (None: it gave none)."""
    sizes = resnet.norm_shapes(setting.architecture, setting.image)
    allowed = tolerance(setting.dtype, len(sizes), platform)
    if one.name == NO_NORM:
        wrong, why = "", "without a BatchNorm its losses are others"
    else:
        wrong, why = disagreement(losses, expected, allowed, BASELINE), ""
    if not wrong and not why:
        fewest = setting.batch * min(math.prod(size[1:]) for size in sizes)
        why = incomparable(expected, allowed, fewest)
    return Row(one.name, "failed" if wrong else "not compared" if why else "ok", wrong or why, *losses)


def timed(row: Row, samples: Mapping[str, Samples], setting: Setting) -> Row:
    """The row with what the samples of its network say."""
    times = samples.get(row.name)
    if times is None and row.status in TIMED:
        return dataclasses.replace(row, status="untimed", reason="interrupted before it was timed")
    if times is None:
        return row
    ratios = {}
    if BASELINE in samples:
        names = ("ratio_p10", "ratio", "ratio_p90")
        ratios = dict(zip(names, times.ratios_to(samples[BASELINE], (10, 50, 90)), strict=True))
    return dataclasses.replace(
        row,
        **ratios,
        median=times.median,
        p10=times.p10,
        p90=times.p90,
        rounds=len(times.seconds),
        images_per_second=setting.batch / times.median,
    )
