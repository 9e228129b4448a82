"""ResNet-18 and ResNet-50 in Equinox, the BatchNorm chosen by the caller.

He et al. 2015, https://arxiv.org/abs/1512.03385. The model takes one image (3, height, width) and runs under `jax.vmap`
with the axis name "batch". The stride of a bottleneck is in its 3x3 convolution, as in torchvision and in what is
usually timed as ResNet-50.

`channels_last` is the same network without Equinox and its vmap: a function of arrays whose channels are last, as Flax
has them. `flax_model` and `torch_model` are the same networks in the two other libraries. All take the weights of the
Equinox model.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

AXIS_NAME = "batch"
# Strides of the four stages.
STRIDES = (1, 2, 2, 2)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A residual network: the number of blocks in each stage, their kind, and the channels of the first stage."""

    depths: tuple[int, ...]
    bottleneck: bool
    width: int = 64

    @property
    def blocks(self) -> tuple["BlockSizes", ...]:
        """The blocks in order."""
        blocks, channels = [], self.width
        for stage, depth in enumerate(self.depths):
            inner = self.width * 2**stage
            for index in range(depth):
                block = BlockSizes(channels, inner, STRIDES[stage] if index == 0 else 1, self.bottleneck)
                blocks.append(block)
                channels = block.outputs
        return tuple(blocks)


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Of one residual block: the channels it takes, those of its 3x3 convolution, and its stride."""

    inputs: int
    inner: int
    stride: int
    bottleneck: bool

    @property
    def outputs(self) -> int:
        """The channels it returns."""
        return self.inner * (4 if self.bottleneck else 1)

    @property
    def convolutions(self) -> tuple[tuple[int, int, int, int], ...]:
        """(channels taken, channels returned, kernel size, stride) of each convolution on the main path."""
        if self.bottleneck:
            sizes = (self.inner, 1, 1), (self.inner, 3, self.stride), (self.outputs, 1, 1)
        else:
            sizes = (self.inner, 3, self.stride), (self.outputs, 3, 1)
        inputs = (self.inputs, *(size[0] for size in sizes))
        return tuple((before, *size) for before, size in zip(inputs, sizes, strict=False))

    @property
    def has_shortcut(self) -> bool:
        """Whether the other path is a 1x1 convolution with BatchNorm, and not the identity."""
        return self.stride != 1 or self.inputs != self.outputs


ARCHITECTURES = {
    "resnet18": Architecture((2, 2, 2, 2), bottleneck=False),
    "resnet50": Architecture((3, 4, 6, 3), bottleneck=True),
    # To try the command with.
    "tiny": Architecture((1,), bottleneck=False, width=4),
}


def _convolution(inputs, outputs, kernel, stride, key):
    return eqx.nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, use_bias=False, key=key)


class Block(eqx.Module):
    """A residual block; the last norm adds the shortcut and applies relu."""

    convolutions: list
    norms: list
    shortcut: eqx.nn.Conv2d | None
    shortcut_norm: eqx.Module | None

    def __init__(self, sizes, norm, key):
        keys = iter(jax.random.split(key, len(sizes.convolutions) + 1))
        self.convolutions = [_convolution(*each, next(keys)) for each in sizes.convolutions]
        self.norms = [norm(each[1], "relu") for each in sizes.convolutions]
        self.shortcut = self.shortcut_norm = None
        if sizes.has_shortcut:
            self.shortcut = _convolution(sizes.inputs, sizes.outputs, 1, sizes.stride, next(keys))
            self.shortcut_norm = norm(sizes.outputs, None)

    def __call__(self, x, state):
        """One example's x (channels, height, width) and the state, new ones for both."""
        residual = x
        if self.shortcut is not None:
            residual, state = self.shortcut_norm(self.shortcut(x), state)
        for convolution, norm in zip(self.convolutions[:-1], self.norms[:-1], strict=True):
            x, state = norm(convolution(x), state)
        return self.norms[-1](self.convolutions[-1](x), state, residual=residual)


class ResNet(eqx.Module):
    """Images (3, height, width) to logits (classes,).

    `norm(channels, activation)` makes a layer that is called with `(x, state)` or `(x, state, residual=...)`: it
    normalises, adds the residual and applies the activation, "relu" or None.
    """

    stem: eqx.nn.Conv2d
    stem_norm: eqx.Module
    pool: eqx.nn.MaxPool2d
    blocks: list
    head: eqx.nn.Linear

    def __init__(self, architecture, classes, norm, key):
        sizes = architecture.blocks
        first, last, *keys = jax.random.split(key, len(sizes) + 2)
        self.stem = _convolution(3, architecture.width, 7, 2, first)
        self.stem_norm = norm(architecture.width, "relu")
        self.pool = eqx.nn.MaxPool2d(3, 2, padding=1)
        self.blocks = [Block(each, norm, key) for each, key in zip(sizes, keys, strict=True)]
        self.head = eqx.nn.Linear(sizes[-1].outputs, classes, key=last)

    def __call__(self, x, state):
        """Logits of one image, and the new state."""
        x, state = self.stem_norm(self.stem(x), state)
        x = self.pool(x)
        for block in self.blocks:
            x, state = block(x, state)
        return self.head(jnp.mean(x, (1, 2))), state


class Apart(eqx.nn.StatefulLayer):
    """A norm layer, and after it, as operations of their own, the residual and relu.

    - `in_float32`: x is converted for the layer, and what it returns is converted back, as layers need it that do not
        take x in one precision and their weights in another.
    """

    norm: eqx.nn.StatefulLayer
    activation: str | None = eqx.field(static=True)
    in_float32: bool = eqx.field(static=True, default=False)

    def __call__(self, x, state, *, residual=None):
        """The layer's y, plus the residual, through relu, in x's dtype; and the new state."""
        y, state = self.norm(x.astype(jnp.float32) if self.in_float32 else x, state)
        y = y.astype(x.dtype)
        if residual is not None:
            y = y + residual
        return (y if self.activation is None else jax.nn.relu(y)), state


def cast(model, dtype):
    """The model with its convolutions and its last layer in `dtype`, the norms as they are."""

    def of(leaf):
        return leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf

    def is_norm(node):
        return isinstance(node, eqx.nn.StatefulLayer)

    return jax.tree.map(lambda node: node if is_norm(node) else of(node), model, is_leaf=is_norm)


class _Recorder(eqx.Module):
    """In place of a norm, keeps the shape of what it is called with."""

    shapes: list = eqx.field(static=True)

    def __call__(self, x, state, *, residual=None):
        self.shapes.append(x.shape)
        return x, state


def norm_shapes(architecture: Architecture, image: int) -> list[tuple[int, int, int]]:
    """The shapes (channels, height, width) of what the norms take, for images of this height and width."""
    shapes = []

    def logits(x):
        model = ResNet(architecture, 2, lambda channels, activation: _Recorder(shapes), jax.random.key(0))
        return model(x, None)[0]

    jax.eval_shape(logits, jax.ShapeDtypeStruct((3, image, image), jnp.float32))
    return shapes


# The same with channels last, in Flax and in PyTorch


def channels_last(architecture: Architecture, dtype: str, norm):
    """The network as a function `(parameters, statistics, images [n, height, width, 3]) -> (logits, statistics)`.

    `norm(x, statistics, scale, bias, activation, residual)` returns y and the new statistics of one layer. `parameters`
    are those of `flax_variables`; `statistics` maps the names of the norms to whatever `norm` takes.
    """

    def convolve(x, kernel, stride):
        padding = [(size // 2,) * 2 for size in kernel.shape[:2]]
        return jax.lax.conv_general_dilated(
            x, kernel.astype(dtype), (stride,) * 2, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def apply(parameters, statistics, images):
        new = {}

        def layer(name, x, stride, activation=None, residual=None):
            x = convolve(x, parameters[name]["kernel"], stride)
            name = f"{name}_norm"
            affine = parameters[name]["scale"], parameters[name]["bias"]
            y, new[name] = norm(x, statistics[name], *affine, activation, residual)
            return y

        x = layer("stem", images, 2, "relu")
        window = ((0, 0), (1, 1), (1, 1), (0, 0))
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), window)
        for place, sizes in enumerate(architecture.blocks):
            residual = layer(f"block{place}_shortcut", x, sizes.stride) if sizes.has_shortcut else x
            last = len(sizes.convolutions) - 1
            for index, (*_, stride) in enumerate(sizes.convolutions):
                x = layer(f"block{place}_{index}", x, stride, "relu", residual if index == last else None)
        head = {name: value.astype(dtype) for name, value in parameters["head"].items()}
        return jnp.mean(x, (1, 2)) @ head["kernel"] + head["bias"][None], new

    return apply


def flax_model(architecture: Architecture, classes: int, dtype: str):
    """The network as a flax.linen module: images [n, height, width, 3] to logits [n, classes]."""
    import flax.linen as nn

    def convolution(outputs, kernel, stride, name):
        padding = [(kernel // 2,) * 2] * 2
        return nn.Conv(outputs, (kernel,) * 2, (stride,) * 2, padding, use_bias=False, dtype=dtype, name=name)

    def norm(name):
        return nn.BatchNorm(False, momentum=0.99, epsilon=1e-5, dtype=dtype, name=f"{name}_norm")

    class FlaxResNet(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(norm("stem")(convolution(architecture.width, 7, 2, "stem")(x)))
            x = nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])
            for place, sizes in enumerate(architecture.blocks):
                residual = x
                if sizes.has_shortcut:
                    name = f"block{place}_shortcut"
                    residual = norm(name)(convolution(sizes.outputs, 1, sizes.stride, name)(x))
                for index, (_, *size) in enumerate(sizes.convolutions):
                    name = f"block{place}_{index}"
                    x = norm(name)(convolution(*size, name)(x))
                    if index == len(sizes.convolutions) - 1:
                        x = x + residual
                    x = nn.relu(x)
            return nn.Dense(classes, dtype=dtype, name="head")(jnp.mean(x, (1, 2)))

    return FlaxResNet()


def named_convolutions(model: ResNet) -> dict[str, eqx.nn.Conv2d]:
    """The convolutions by name, each followed by a norm; main path before shortcut."""
    convolutions = {"stem": model.stem}
    for place, block in enumerate(model.blocks):
        convolutions |= {f"block{place}_{index}": each for index, each in enumerate(block.convolutions)}
        if block.shortcut is not None:
            convolutions[f"block{place}_shortcut"] = block.shortcut
    return convolutions


def flax_variables(model: ResNet) -> tuple[dict, dict]:
    """The parameters and the batch statistics of `flax_model`, with the weights of an Equinox model."""
    parameters, statistics = {}, {}
    for name, convolution in named_convolutions(model).items():
        channels = convolution.out_channels
        parameters[name] = {"kernel": jnp.transpose(convolution.weight, (2, 3, 1, 0))}
        parameters[f"{name}_norm"] = {"scale": jnp.ones(channels), "bias": jnp.zeros(channels)}
        statistics[f"{name}_norm"] = {"mean": jnp.zeros(channels), "var": jnp.ones(channels)}
    parameters["head"] = {"kernel": model.head.weight.T, "bias": model.head.bias}
    return parameters, statistics


def torch_model(model: ResNet, architecture: Architecture):
    """The network as a torch module, with the weights of an Equinox model: [n, 3, height, width] to [n, classes]."""
    import torch
    from torch import nn

    weights = {name: np.array(each.weight) for name, each in named_convolutions(model).items()}

    def convolution_norm(name, inputs, outputs, kernel, stride):
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        convolution.weight = nn.Parameter(torch.from_numpy(weights[name]))
        # torch counts what is new, not what is kept.
        return nn.Sequential(convolution, nn.BatchNorm2d(outputs, eps=1e-5, momentum=0.01))

    class TorchBlock(nn.Module):
        def __init__(self, name, sizes):
            super().__init__()
            self.path = nn.ModuleList(
                convolution_norm(f"{name}_{index}", *each) for index, each in enumerate(sizes.convolutions)
            )
            self.shortcut = nn.Identity()
            if sizes.has_shortcut:
                self.shortcut = convolution_norm(f"{name}_shortcut", sizes.inputs, sizes.outputs, 1, sizes.stride)

        def forward(self, x):
            residual = self.shortcut(x)
            for layer in self.path[:-1]:
                x = torch.relu(layer(x))
            return torch.relu(self.path[-1](x) + residual)

    head = nn.Linear(model.head.in_features, model.head.out_features)
    head.weight = nn.Parameter(torch.from_numpy(np.array(model.head.weight)))
    head.bias = nn.Parameter(torch.from_numpy(np.array(model.head.bias)))
    return nn.Sequential(
        convolution_norm("stem", 3, architecture.width, 7, 2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=1),
        *(TorchBlock(f"block{place}", sizes) for place, sizes in enumerate(architecture.blocks)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        head,
    )
