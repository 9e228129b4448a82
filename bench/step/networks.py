"""The networks whose training steps are timed, each with another BatchNorm: loss, gradients, SGD with momentum.

Every contender is the same network with the same weights on the same images. Parameters are float32; with
`dtype="bfloat16"` images, convolutions and activations are bfloat16.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import bn_fused
from bn_fused.bench.installing import pip_install
from bn_fused.bench.providers import nnx_batch_norm, timed_backends
from bn_fused.bench.step import resnet

SGD_MOMENTUM = 0.9
DTYPES = ("float32", "bfloat16")
RIVALS = ("equinox", "flax", "torch")
# What runs only if it is asked for: flax.nnx's BatchNorm in our network with channels last, torch.compile, and the
# network without any BatchNorm.
TORCH_COMPILED, NO_NORM = "torch compiled", "no norm"
MORE_RIVALS = {"nnx": "flax nnx", "torch-compile": TORCH_COMPILED, "no-norm": NO_NORM}
# At the end of the names of our networks with channels last.
CHANNELS_LAST = ", nhwc"
# What the others are compared with.
BASELINE = "equinox batch"


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is trained: a name of `resnet.ARCHITECTURES`, and the sizes."""

    model: str
    batch: int
    image: int
    dtype: str
    classes: int = 1000

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
    """A training step `step(carry, images, labels, lr) -> (carry, loss)` and its first carry.

    - `channels_last`: whether the images are.
    """

    step: Callable
    carry: Carry
    channels_last: bool = False


@dataclasses.dataclass(frozen=True)
class Contender:
    """One network to time.

    - `name`: for the tables.
    - `norm`: for Equinox networks makes its layers, `norm(channels, activation)` given the setting.
    - `function`: for networks whose channels are last, `norm` of `resnet.channels_last`.
    - `module`: the package of a network in another library.
    - `ours`: whether it is `bn_fused`.
    - `compiled`: of a network in torch, whether torch.compile does.
    """

    name: str
    norm: Callable[[Setting], Callable] | None = None
    function: Callable | None = None
    module: str | None = None
    ours: bool = False
    compiled: bool = False

    @property
    def missing(self) -> str | None:
        """None where its package is installed, else one sentence that says what to install."""
        if self.module is None or importlib.util.find_spec(self.module) is not None:
            return None
        return f"{self.name} is not installed: {pip_install(self.module)}"


def _ours(backend, approach, fused):
    def norm(setting):
        def layer(channels, activation):
            if fused:
                return bn_fused.BatchNorm(channels, resnet.AXIS_NAME, approach, activation=activation, backend=backend)
            return resnet.Apart(bn_fused.BatchNorm(channels, resnet.AXIS_NAME, approach, backend=backend), activation)

        return layer

    return norm


def _ours_channels_last(backend, approach, fused):
    def norm(x, stats, scale, bias, activation, residual):
        options = dict(approach=approach, channel_axis=-1, backend=backend)
        if fused:
            return bn_fused.batch_norm(x, stats, scale, bias, activation=activation, residual=residual, **options)
        y, stats = bn_fused.batch_norm(x, stats, scale, bias, **options)
        y = y if residual is None else y + residual
        return (y if activation is None else jax.nn.relu(y)), stats

    return norm


def _equinox(mode):
    def norm(setting):
        # It takes no x in bfloat16 beside weights in float32 (mode "ema"), or returns float32 then (mode "batch").
        in_float32 = setting.dtype != "float32"

        def layer(channels, activation):
            return resnet.Apart(eqx.nn.BatchNorm(channels, resnet.AXIS_NAME, mode=mode), activation, in_float32)

        return layer

    return norm


def _nnx(x, stats, scale, bias, activation, residual):
    # As `RunningStats`, which keeps the sums that are not corrected; here they are the averages.
    y, mean, var = nnx_batch_norm(x, stats.mean, stats.var, scale, bias, axis=-1, dtype=x.dtype)
    y = y if residual is None else y + residual
    return (y if activation is None else jax.nn.relu(y)), stats._replace(mean=mean, var=var)


def _no_norm(x, stats, scale, bias, activation, residual):
    y = x if residual is None else x + residual
    return (y if activation is None else jax.nn.relu(y)), stats


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
    named = timed_backends()
    able = [name for name in named if refusal(name, setting, target) is None]
    return [*named, "auto"] if len(able) > 1 else named


def default_layouts(rivals: Sequence[str]) -> tuple[str, ...]:
    """Ours with channels first, and with channels last where Flax is there to be compared with."""
    flax = any(one.module == "flax" and one.missing is None for one in contenders(rivals=rivals))
    return ("nchw", "nhwc") if flax else ("nchw",)


def contenders(
    backends: Sequence[str] = (),
    rivals: Sequence[str] = RIVALS,
    approaches: Sequence[str] = ("batch",),
    fusion: str = "fused",
    layouts: Sequence[str] = ("nchw",),
) -> list[Contender]:
    """The networks that the options ask for; equinox's mode "batch", with which they are compared, is always there.

    `backends`: default all but the reference; see `default_backends`. `fusion`: whether residual and relu are given to
    the layer ("fused"), are operations after it ("plain"), or "both" in turn. `layouts`: "nchw" for our layer in the
    Equinox network, "nhwc" for our function in the same network with channels last, as Flax's.
    """
    named = list(dict.fromkeys(backends)) or timed_backends()
    networks = [
        Contender(f"{backend} {approach}{', fused' if fused else ''}", _ours(backend, approach, fused), ours=True)
        if layout == "nchw"
        else Contender(
            f"{backend} {approach}{', fused' if fused else ''}{CHANNELS_LAST}",
            function=_ours_channels_last(backend, approach, fused),
            ours=True,
        )
        for layout in layouts
        for backend in named
        for approach in approaches
        for fused in {"both": (True, False), "fused": (True,), "plain": (False,)}[fusion]
    ]
    networks.append(Contender(BASELINE, _equinox("batch")))
    if "equinox" in rivals:
        networks.append(Contender("equinox ema", _equinox("ema")))
    networks += [Contender(name, module=name) for name in ("flax", "torch") if name in rivals]
    if "nnx" in rivals:
        networks.append(Contender(MORE_RIVALS["nnx"], function=_nnx, module="flax"))
    if "torch-compile" in rivals:
        networks.append(Contender(TORCH_COMPILED, module="torch", compiled=True))
    if "no-norm" in rivals:
        networks.append(Contender(NO_NORM, function=_no_norm))
    return networks


def contender_named(name: str, options: Mapping) -> Contender:
    """The one with this name of the `contenders` of these options."""
    return next(one for one in contenders(**options) if one.name == name)


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
    if contender.function is not None:
        return _channels_last_program(setting, contender.function)
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


def plain_equinox(setting):
    """The Equinox network whose weights the other libraries' networks take."""
    return equinox_model(setting, _equinox("batch")(setting))[0]


def _flax_program(setting):
    model = resnet.flax_model(setting.architecture, setting.classes, setting.dtype)
    parameters, statistics = resnet.flax_variables(plain_equinox(setting))

    def loss_of(parameters, statistics, images, labels):
        variables = {"params": parameters, "batch_stats": statistics}
        logits, new = model.apply(variables, images, mutable=["batch_stats"])
        return cross_entropy(logits, labels), new["batch_stats"]

    carry = Carry(parameters, statistics, jax.tree.map(jnp.zeros_like, parameters))
    return Program(training_step(loss_of), carry, channels_last=True)


def _channels_last_program(setting, norm):
    apply = resnet.channels_last(setting.architecture, setting.dtype, norm)
    parameters, statistics = resnet.flax_variables(plain_equinox(setting))
    first = {name: bn_fused.RunningStats.init(value["mean"].size) for name, value in statistics.items()}

    def loss_of(parameters, statistics, images, labels):
        logits, statistics = apply(parameters, statistics, images)
        return cross_entropy(logits, labels), statistics

    carry = Carry(parameters, first, jax.tree.map(jnp.zeros_like, parameters))
    return Program(training_step(loss_of), carry, channels_last=True)


def argument_types(training: Program, setting: Setting) -> tuple:
    """The arguments of its step, with shapes and dtypes in place of the images, the labels and the learning rate."""
    sizes = (setting.image, setting.image)
    shape = (setting.batch, *sizes, 3) if training.channels_last else (setting.batch, 3, *sizes)
    images, labels = jax.ShapeDtypeStruct(shape, setting.dtype), jax.ShapeDtypeStruct((setting.batch,), jnp.int32)
    return training.carry, images, labels, jax.ShapeDtypeStruct((), jnp.float32)


def data(setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    """Synthetic images [batch, 3, image, image], float32, and labels [batch]."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((setting.batch, 3, setting.image, setting.image), np.float32)
    return images, rng.integers(setting.classes, size=setting.batch, dtype=np.int32)
