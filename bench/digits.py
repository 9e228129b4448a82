"""Train a small network on scikit-learn's handwritten digits with each approach of BatchNorm, and compare.

    python -m bn_fused.bench.digits [--approach batch] [--steps 300] [--lr 0.3] [--seed 0] [--warmup-period 1]

Six times convolution 3x3, BatchNorm, relu, of width 16; the mean over the positions; a linear layer. Batches of 32, SGD
with momentum 0.9. In seconds it shows how stably each approach trains (the losses while training) and, after a longer
run at a smaller learning rate (--steps 1500 --lr 0.1), what its running statistics are worth at inference.
"""

import argparse
import importlib.util
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import bn_fused
from bn_fused.approaches import APPROACHES

WIDTH, DEPTH, CLASSES = 16, 6, 10
BATCH_SIZE, SGD_MOMENTUM = 32, 0.9


class Classifier(eqx.Module):
    """Images (1, 8, 8) to logits (10,). `norm(channels)` makes the layer between two convolutions, relu included."""

    convs: list
    norms: list
    head: eqx.nn.Linear

    def __init__(self, norm, key):
        *keys, last = jax.random.split(key, DEPTH + 1)
        self.convs = [eqx.nn.Conv2d(WIDTH if i else 1, WIDTH, 3, padding=1, key=keys[i]) for i in range(DEPTH)]
        self.norms = [norm(WIDTH) for _ in range(DEPTH)]
        self.head = eqx.nn.Linear(WIDTH, CLASSES, key=last)

    def __call__(self, x, state):
        """Logits of one image, and the new state."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x, state = norm(conv(x), state)
        return self.head(jnp.mean(x, (1, 2))), state


class ThenRelu(eqx.nn.StatefulLayer):
    """A norm layer without an activation of its own, such as `equinox.nn.BatchNorm`, followed by relu."""

    norm: eqx.nn.StatefulLayer

    def __call__(self, x, state):
        """The layer's own, then relu."""
        x, state = self.norm(x, state)
        return jax.nn.relu(x), state


def fused_norm(approach, **settings):
    """The norm of `Classifier` that is `bn_fused.BatchNorm` with these settings."""
    return lambda channels: bn_fused.BatchNorm(channels, "batch", approach, activation="relu", **settings)


def equinox_norm(mode, **settings):
    """The norm of `Classifier` that is `equinox.nn.BatchNorm` in this mode, "ema" or "batch", with these settings."""
    return lambda channels: ThenRelu(eqx.nn.BatchNorm(channels, "batch", mode=mode, **settings))


def load_digits_split():
    """(images, labels) to train and to test on: 1437 and 360 images [n, 1, 8, 8], float32 between 0 and 1."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images, labels = np.float32(images.reshape(-1, 1, 8, 8) / 16), np.int32(labels)
    order = np.random.default_rng(0).permutation(len(images))
    train, test = np.split(order, [len(order) * 4 // 5])
    return (images[train], labels[train]), (images[test], labels[test])


def make_model(key, norm):
    """A new classifier and its state."""
    return eqx.nn.make_with_state(Classifier)(norm, key)


def forward(model, state, images):
    """Logits [n, 10] of images [n, 1, 8, 8], and the new state."""
    return jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(images, state)


def cross_entropy(model, state, images, labels):
    """The mean cross-entropy of a batch, and the new state."""
    logits, state = forward(model, state, images)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
    return -jnp.mean(chosen), state


@eqx.filter_jit
def step(model, state, velocity, images, labels, lr):
    """One step of SGD with momentum; returns model, state, velocity, loss and the gradient's norm."""
    loss_and_gradient = eqx.filter_value_and_grad(cross_entropy, has_aux=True)
    (loss, state), gradient = loss_and_gradient(model, state, images, labels)
    velocity = jax.tree.map(lambda v, g: SGD_MOMENTUM * v + g, velocity, gradient)
    model = eqx.apply_updates(model, jax.tree.map(lambda v: -lr * v, velocity))
    return model, state, velocity, loss, jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient)))


def draw_batches(examples, steps, seed):
    """Indices [steps, batch] of batches drawn without replacement, a new order for every epoch."""
    rng = np.random.default_rng(seed)
    per_epoch = examples // BATCH_SIZE
    epochs = [rng.permutation(examples)[: per_epoch * BATCH_SIZE] for _ in range(-(-steps // per_epoch))]
    return np.concatenate(epochs).reshape(-1, BATCH_SIZE)[:steps]


def train(model, state, images, labels, *, steps=300, lr=0.3, seed=0):
    """Train from scratch; returns model, state, losses and gradient norms (numpy, shape [steps])."""
    # One call for each step: a lax.scan over all of them is ten times slower on a CPU, whose convolutions use several
    # threads only outside of loops.
    velocity = jax.tree.map(jnp.zeros_like, eqx.filter(model, eqx.is_inexact_array))
    history = []
    for batch in draw_batches(len(images), steps, seed):
        model, state, velocity, *measured = step(model, state, velocity, images[batch], labels[batch], lr)
        history.append(measured)
    losses, norms = np.asarray(jax.device_get(history)).T
    return model, state, losses, norms


def accuracy(model, state, images, labels):
    """The share of images that the model classifies right at inference."""
    logits, _ = eqx.filter_jit(forward)(eqx.nn.inference_mode(model), state, images)
    return float(np.mean(np.argmax(logits, 1) == labels))


def main(arguments=None):
    """The command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m bn_fused.bench.digits", description=__doc__.splitlines()[0])
    parser.add_argument("--approach", action="append", choices=APPROACHES, help="may be repeated; default: all three")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=0.3, help="learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and of the batches")
    parser.add_argument("--warmup-period", type=int, default=1, help='steps of the warm-up of "ema"')
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.warmup_period < 1:
        parser.error("--steps and --warmup-period are at least 1")
    if importlib.util.find_spec("sklearn") is None:
        parser.exit(2, 'the digits come with scikit-learn: pip install "bn_fused[bench]"\n')

    training, testing = load_digits_split()
    print(f"{options.steps} steps, learning rate {options.lr:g}, seed {options.seed}")
    print("approach            median loss, last 50   largest loss   largest gradient   test accuracy   seconds")
    for approach in options.approach or APPROACHES:
        start = time.perf_counter()
        norm = fused_norm(approach, warmup_period=options.warmup_period)
        model, state = make_model(jax.random.key(options.seed), norm)
        model, state, losses, norms = train(
            model, state, *training, steps=options.steps, lr=options.lr, seed=options.seed
        )
        right, seconds = accuracy(model, state, *testing), time.perf_counter() - start
        print(
            f"{approach:<20}{np.median(losses[-50:]):20.3f}{np.max(losses):15.2f}{np.max(norms):19.1f}"
            f"{right:16.3f}{seconds:10.1f}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
