"""The whole training step of a residual network with each BatchNorm: loss, gradients, SGD with momentum.

Every contender is the same network with the same weights on the same images. Parameters are float32; with
`dtype="bfloat16"` images, convolutions and activations are bfloat16. Before anything is timed, two losses are compared
with those of `equinox.nn.BatchNorm(mode="batch")`: of the initial weights, and of the weights after one step, both with
statistics that were never updated. With those every BatchNorm normalises by the batch, whatever it does later on, so
that the same numbers must come out; the second one depends on every gradient.
"""

import dataclasses
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import bn_fused
from bn_fused import kernels

from . import resnet
from .timing import Interrupted, Samples, Timed, measure

SGD_MOMENTUM = 0.9
DTYPES = ("float32", "bfloat16")
RIVALS = ("equinox", "flax", "torch")
# It is the definition itself, kept slow and plain, to be checked against and not to be timed.
UNTIMED = ("reference",)
# What the others are compared with.
BASELINE = "equinox batch"


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is trained: a name of `resnet.ARCHITECTURES`, the sizes, and the learning rate of the compared step."""

    model: str
    batch: int
    image: int
    dtype: str
    classes: int = 1000
    lr: float = 0.01

    @property
    def architecture(self) -> resnet.Architecture:
        """The network's sizes."""
        return resnet.ARCHITECTURES[self.model]

    def __str__(self) -> str:
        return f"{self.model}, {self.batch} images of {self.image}x{self.image}, {self.classes} classes, {self.dtype}"


class Carry(NamedTuple):
    """What a step takes and returns: parameters, running statistics, and the velocity of SGD with momentum."""

    parameters: Any
    statistics: Any
    velocity: Any


class Program(NamedTuple):
    """A training step `step(carry, images, labels, lr) -> (carry, loss)`, its first carry, and whether the images are
    channels last."""

    step: Callable
    carry: Carry
    channels_last: bool = False


@dataclasses.dataclass(frozen=True)
class Contender:
    """One network to time.

    - `name`: for the tables.
    - `norm`: for Equinox networks makes its layers, `norm(channels, activation)` given the setting.
    - `module`: the package of a network in another library.
    - `ours`: whether it is `bn_fused`.
    """

    name: str
    norm: Callable[[Setting], Callable] | None = None
    module: str | None = None
    ours: bool = False

    @property
    def missing(self) -> str | None:
        """None where its package is installed, else one sentence that says what to install."""
        if self.module is None or importlib.util.find_spec(self.module) is not None:
            return None
        return f"{self.name} is not installed: pip install {self.module}"


def _ours(backend, approach, fused):
    def norm(setting):
        def layer(channels, activation):
            if fused:
                return bn_fused.BatchNorm(channels, resnet.AXIS_NAME, approach, activation=activation, backend=backend)
            return resnet.Apart(bn_fused.BatchNorm(channels, resnet.AXIS_NAME, approach, backend=backend), activation)

        return layer

    return norm


def _equinox(mode):
    def norm(setting):
        # It takes no x in bfloat16 beside weights in float32 (mode "ema"), or returns float32 then (mode "batch").
        wide = setting.dtype != "float32"

        def layer(channels, activation):
            return resnet.Apart(eqx.nn.BatchNorm(channels, resnet.AXIS_NAME, mode=mode), activation, wide)

        return layer

    return norm


def _timed_backends():
    return [name for name in kernels.backend_names() if name not in UNTIMED]


def refusal(backend: str, setting: Setting, target: str | None = None) -> str | None:
    """Why a backend cannot run the norms of a network, of the first that it cannot; None if it can.

    `target` is a chip's name, None for JAX's default device.
    """
    for index, shape in enumerate(resnet.norm_shapes(setting.architecture, setting.image)):
        try:
            bn_fused.explain(
                (setting.batch, *shape),
                setting.dtype,
                channel_axis=1,
                activation="relu",
                target=target,
                backend=backend,
            )
        except bn_fused.BackendError as error:
            return f"norm {index}, {shape[0]} channels of {shape[1]}x{shape[2]}: {error}" if index else str(error)
    return None


def default_backends(setting: Setting, target: str | None = None) -> list[str]:
    """All backends but the reference, those too that cannot run the network; and "auto" where it has a choice."""
    named = _timed_backends()
    able = [name for name in named if refusal(name, setting, target) is None]
    return [*named, "auto"] if len(able) > 1 else named


def contenders(
    backends: Sequence[str] = (),
    rivals: Sequence[str] = RIVALS,
    approaches: Sequence[str] = ("batch",),
    fusion: str = "fused",
) -> list[Contender]:
    """The networks that the options ask for; equinox's mode "batch", with which they are compared, is always there.

    `backends`: default all but the reference; see `default_backends`. `fusion`: whether residual and relu are given to the layer ("fused"), are
    operations after it ("plain"), or "both" in turn.
    """
    named = list(dict.fromkeys(backends)) or _timed_backends()
    made = [
        Contender(f"{backend} {approach}{', fused' if fused else ''}", _ours(backend, approach, fused), ours=True)
        for backend in named
        for approach in approaches
        for fused in {"both": (True, False), "fused": (True,), "plain": (False,)}[fusion]
    ]
    made.append(Contender(BASELINE, _equinox("batch")))
    if "equinox" in rivals:
        made.append(Contender("equinox ema", _equinox("ema")))
    made += [Contender(name, module=name) for name in ("flax", "torch") if name in rivals]
    return made


# The step


def cross_entropy(logits, labels):
    """The mean cross-entropy, in float32."""
    logits = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.mean(jnp.take_along_axis(logits, labels[:, None], 1))


def training_step(loss_of: Callable) -> Callable:
    """The step of SGD with momentum for `loss_of(parameters, statistics, images, labels) -> (loss, statistics)`."""

    def step(carry, images, labels, lr):
        (loss, statistics), gradient = jax.value_and_grad(loss_of, has_aux=True)(
            carry.parameters, carry.statistics, images, labels
        )
        velocity = jax.tree.map(lambda v, g: SGD_MOMENTUM * v + g, carry.velocity, gradient)
        parameters = jax.tree.map(lambda p, v: p - lr * v, carry.parameters, velocity)
        return Carry(parameters, statistics, velocity), loss

    return step


def equinox_model(setting: Setting, norm: Callable):
    """The Equinox network of a setting and its state; its weights depend on the setting alone, not on the norm."""
    return eqx.nn.make_with_state(resnet.ResNet)(setting.architecture, setting.classes, norm, jax.random.key(0))


def program(contender: Contender, setting: Setting) -> Program:
    """The training step of a network in JAX."""
    if contender.module == "flax":
        return _flax_program(setting)
    model, state = equinox_model(setting, contender.norm(setting))
    parameters, static = eqx.partition(model, eqx.is_inexact_array)

    def loss_of(parameters, state, images, labels):
        model = resnet.cast(eqx.combine(parameters, static), setting.dtype)
        logits, state = jax.vmap(model, axis_name=resnet.AXIS_NAME, in_axes=(0, None), out_axes=(0, None))(
            images, state
        )
        return cross_entropy(logits, labels), state

    return Program(training_step(loss_of), Carry(parameters, state, jax.tree.map(jnp.zeros_like, parameters)))


def _plain_equinox(setting):
    """The Equinox network whose weights the other libraries' networks take."""
    return equinox_model(setting, _equinox("batch")(setting))[0]


def _flax_program(setting):
    model = resnet.flax_model(setting.architecture, setting.classes, setting.dtype)
    parameters, statistics = resnet.flax_variables(_plain_equinox(setting))

    def loss_of(parameters, statistics, images, labels):
        variables = {"params": parameters, "batch_stats": statistics}
        logits, new = model.apply(variables, images, mutable=["batch_stats"])
        return cross_entropy(logits, labels), new["batch_stats"]

    carry = Carry(parameters, statistics, jax.tree.map(jnp.zeros_like, parameters))
    return Program(training_step(loss_of), carry, channels_last=True)


def data(setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    """Synthetic images [batch, 3, image, image], float32, and labels [batch]."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((setting.batch, 3, setting.image, setting.image), np.float32)
    return images, rng.integers(setting.classes, size=setting.batch, dtype=np.int32)


class Memory(NamedTuple):
    """Bytes on the device: of what the compiled program holds at once, and the measured peak while its first step ran.

    None where it is not known: a device may not tell, and the peak is a process's, so that only a program that takes more
    than those before it shows in it.
    """

    compiled: int | None
    measured: int | None


class JaxRun:
    """A compiled program with its arrays on the device."""

    def __init__(self, contender: Contender, setting: Setting):
        made = program(contender, setting)
        images, labels = data(setting)
        images = np.moveaxis(images, 1, -1) if made.channels_last else images
        self.images, self.labels = jnp.asarray(images, setting.dtype), jnp.asarray(labels)
        self._lr = setting.lr
        # The arrays of a carry are given away in every step, as in training.
        self._first = jax.device_get(made.carry)
        lr = jnp.float32(0)
        self._step = jax.jit(made.step, donate_argnums=0).lower(made.carry, self.images, self.labels, lr).compile()
        del made
        self._still = lr
        self._carry = None

    def losses(self) -> tuple[float, float]:
        """The loss of the initial weights, and of the weights after a step, both with the initial statistics."""
        carry, before = self._step(jax.device_put(self._first), self.images, self.labels, jnp.float32(self._lr))
        carry = carry._replace(statistics=jax.device_put(self._first.statistics))
        self._carry, after = self._step(carry, self.images, self.labels, self._still)
        return float(before), float(after)

    def once(self):
        """Start one step; with a learning rate of 0, so that the weights stay where they are however long it is timed."""
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
        self.device = torch.device("cuda" if platform == "gpu" else "cpu")
        order = torch.channels_last
        self.model = resnet.torch_model(_plain_equinox(setting), setting.architecture)
        self.model = self.model.to(self.device, memory_format=order).train()
        images, labels = data(setting)
        self.images = torch.from_numpy(images).to(self.device, memory_format=order)
        self.labels = torch.from_numpy(labels).long().to(self.device)
        self.optimiser = torch.optim.SGD(self.model.parameters(), lr=setting.lr, momentum=SGD_MOMENTUM)

    def _step(self):
        self.optimiser.zero_grad(set_to_none=True)
        wide = self.setting.dtype == "float32"
        with self.torch.autocast(self.device.type, dtype=self.torch.bfloat16, enabled=not wide):
            logits = self.model(self.images)
        loss = self.torch.nn.functional.cross_entropy(logits.float(), self.labels)
        loss.backward()
        self.optimiser.step()
        return loss.detach()

    def losses(self) -> tuple[float, float]:
        """As of `JaxRun`. torch normalises by the batch while it trains: its statistics need not be put back."""
        before = self._step()
        for group in self.optimiser.param_groups:
            group["lr"] = 0.0
        return float(before), float(self._step())

    def once(self):
        """One step, waited for."""
        self._step()
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()

    def memory(self) -> int | None:
        """The peak of torch's allocator, where it counts."""
        return self.torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None


def compiled_memory(compiled) -> int | None:
    """Bytes that a compiled program holds at once: arguments, results and temporaries; None if XLA does not say."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return int(analysis.argument_size_in_bytes + results + analysis.temp_size_in_bytes)


# The comparison


@dataclasses.dataclass(frozen=True)
class Row:
    """One network.

    - `status`: "ok"; "failed"; "refused": it cannot run this here; "missing": it is not installed; "untimed": its losses
        are right, and the run was interrupted before it was timed.
    - `reason`: why it is not ok.
    - `loss`, `loss_after`: of the initial weights, and after one step; see the module's text.
    - `median`, `p10`, `p90`: seconds for a step, of `rounds` rounds; `images_per_second`.
    - `ratio`: the time over the baseline's, the median over paired rounds.
    - `memory`: bytes that the compiled program holds at once (torch: its allocator's peak).
    - `peak`: bytes that the device had in use at most while the first step ran, if that was the most so far.
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
    memory: int | None = None
    peak: int | None = None


# The unit of rounding of a float32 convolution or matrix product at JAX's default precision: TF32, and bfloat16.
PRODUCT_EPSILON = {"gpu": 2.0**-10, "tpu": 2.0**-7}


class Tolerance(NamedTuple):
    """By how much two networks with the same weights may differ: relative to a loss, and, for the loss after a step,
    relative to its change as well."""

    loss: float
    change: float


def tolerance(setting: Setting, platform: str) -> Tolerance:
    """What rounding explains on a platform.

    The losses are means over the batch, whose errors cancel in part: one unit of rounding of the convolutions, and what
    float32 sums over the classes and the batch lose. The gradient passes every layer, whose errors add as random ones
    do, and those of a layer are amplified where its variance is small.
    """
    layers = len(resnet.norm_shapes(setting.architecture, setting.image))
    epsilon = max(float(jnp.finfo(setting.dtype).eps), PRODUCT_EPSILON.get(platform, 0.0))
    loss = epsilon + 64 * float(jnp.finfo(jnp.float32).eps)
    return Tolerance(loss, 4 * math.sqrt(layers) * loss)


def disagreement(losses: tuple[float, float], expected: tuple[float, float] | None, allowed: Tolerance) -> str:
    """Why losses are not what they should be, in one line; empty if they are."""
    if not all(map(math.isfinite, losses)):
        return f"the losses are {losses[0]:.6g} and, after a step, {losses[1]:.6g}"
    if expected is None:
        return f"there is nothing to compare the loss with: {BASELINE} gave none"
    before, after = expected
    limits = allowed.loss * abs(before), allowed.loss * abs(after) + allowed.change * abs(after - before)
    for what, found, wanted, limit in zip(("the loss", "the loss after a step"), losses, expected, limits, strict=True):
        if abs(found - wanted) > limit:
            return f"{what} is {found:.6g}, of {BASELINE} {wanted:.6g} (they may differ by {limit:.1e})"
    return ""


def one_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}"[:300]


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
    finished = [_timed(rows[one.name], samples, setting) for one in networks if one.name in rows]
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
    # The baseline first: the others are compared with it.
    order = sorted(networks, key=lambda one: one.name != BASELINE)
    for place, one in enumerate(order):
        progress(f"compiling {one.name}", 0.7 * place / len(order))
        if one.missing is not None:
            rows[one.name] = Row(one.name, "missing", one.missing)
            continue
        before = _peak(device.memory_stats())
        try:
            built = (TorchRun if one.module == "torch" else JaxRun)(one, setting)
            losses = built.losses()
            memory = built.memory()
        except bn_fused.BackendError as error:
            rows[one.name] = Row(one.name, "refused", str(error))
            continue
        except Exception as error:  # a kernel may fail in any way; it must show, whatever it raised
            rows[one.name] = Row(one.name, "failed", one_line(error))
            continue
        after = _peak(device.memory_stats())
        risen = before is not None and after is not None and after > before
        first = rows.get(BASELINE)
        expected = losses if one.name == BASELINE else None
        if first is not None and first.status == "ok":
            expected = (first.loss, first.loss_after)
        wrong = disagreement(losses, expected, tolerance(setting, device.platform))
        rows[one.name] = Row(
            one.name, "failed" if wrong else "ok", wrong, *losses, memory=memory, peak=after if risen else None
        )
        if not wrong:
            runs[one.name] = built


def _timed(row: Row, samples: Mapping[str, Samples], setting: Setting) -> Row:
    found = samples.get(row.name)
    if found is None and row.status == "ok":
        return dataclasses.replace(row, status="untimed", reason="interrupted before it was timed")
    if found is None:
        return row
    return dataclasses.replace(
        row,
        median=found.median,
        p10=found.p10,
        p90=found.p90,
        rounds=len(found.seconds),
        images_per_second=setting.batch / found.median,
        ratio=found.ratio_to(samples[BASELINE]) if BASELINE in samples else None,
    )
