"""How stably each BatchNorm trains: the network of `digits`, several seeds, the losses and the gradients' norms.

Every norm has the same weights, batches and optimiser for a seed. It is compiled once for all seeds.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from bn_fused.approaches import APPROACHES
from bn_fused.bench import digits

LAST = 50
# A run has trained if the median of its last `LAST` losses is below this; guessing costs log(10) = 2.3.
TRAINED_BELOW = 0.5


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of one experiment; `momentum` and `warmup_period` are BatchNorm's, the second for "ema" alone."""

    steps: int = 300
    lr: float = 0.3
    seeds: int = 3
    momentum: float = 0.99
    warmup_period: int = 1

    def __str__(self) -> str:
        warmup = f", warm-up {self.warmup_period} steps" if self.warmup_period > 1 else ""
        seeds = "seed 0" if self.seeds == 1 else f"seeds 0 to {self.seeds - 1}"
        return (
            f"{self.steps} steps, batches of {digits.BATCH_SIZE}, learning rate {self.lr:g}, BatchNorm momentum "
            f"{self.momentum:g}{warmup}, {seeds}"
        )


def _fused(approach):
    def make(settings):
        return digits.fused_norm(approach, momentum=settings.momentum, warmup_period=settings.warmup_period)

    return make


def _equinox(mode):
    return lambda settings: digits.equinox_norm(mode, momentum=settings.momentum)


# What makes the norm of `digits.Classifier`, by name.
NORMS: dict[str, Callable[[Settings], Callable]] = {
    **{approach: _fused(approach) for approach in APPROACHES},
    **{f"equinox {mode}": _equinox(mode) for mode in ("batch", "ema")},
}


@dataclasses.dataclass(frozen=True)
class Curves:
    """The runs of one norm: `losses` and `gradients` (the gradient's norm), both [seeds, steps]."""

    norm: str
    losses: np.ndarray
    gradients: np.ndarray

    @property
    def last(self) -> np.ndarray:
        """For every seed the median of its last losses; infinite if half of them are no numbers."""
        return np.median(_without_nan(self.losses[:, -LAST:]), axis=1)

    @property
    def trained(self) -> int:
        """How many seeds have trained."""
        return int(np.sum(self.last < TRAINED_BELOW))

    @property
    def largest_loss(self) -> float:
        """The largest loss of all seeds; infinite if one is no number."""
        return float(np.max(_without_nan(self.losses)))

    @property
    def largest_gradient(self) -> float:
        """The largest gradient norm of all seeds; infinite if one is no number."""
        return float(np.max(_without_nan(self.gradients)))

    def figures(self) -> dict:
        """What the table says, and the curves, for JSON."""
        return {
            "norm": self.norm,
            "median_loss_last": float(np.median(self.last)),
            "worst_loss_last": float(np.max(self.last)),
            "last": min(LAST, self.losses.shape[1]),
            "largest_loss": self.largest_loss,
            "largest_gradient": self.largest_gradient,
            "seeds": len(self.losses),
            "trained": self.trained,
            "losses": [[float(f"{value:.5g}") for value in row] for row in self.losses.tolist()],
            "gradients": [[float(f"{value:.5g}") for value in row] for row in self.gradients.tolist()],
        }


def _without_nan(values):
    return np.where(np.isnan(values), math.inf, values)


def run(
    settings: Settings, norms: Sequence[str] = tuple(NORMS), progress: Callable[[str, float], None] = lambda *_: None
) -> Iterator[Curves]:
    """Train every norm with every seed; yields the curves of a norm as soon as its last seed is done.

    `progress` is called with what is being trained and the share of the work that is done.
    """
    (images, labels), _ = digits.load_digits_split()
    total = len(norms) * settings.seeds
    for place, name in enumerate(norms):
        norm = NORMS[name](settings)
        first, first_state = digits.make_model(jax.random.key(0), norm)
        structure = jax.tree.structure(first)
        measured = []
        for seed in range(settings.seeds):
            progress(f"{name}, seed {seed}", (place * settings.seeds + seed) / total)
            # Every model of Equinox has state indices of its own, and with them a compilation: the new weights go into
            # the first model. The state is the same for all.
            model, _ = digits.make_model(jax.random.key(seed), norm)
            model = jax.tree.unflatten(structure, jax.tree.leaves(model))
            state = jax.tree.unflatten(jax.tree.structure(first_state), jax.tree.leaves(first_state))
            _, _, losses, gradients = digits.train(
                model, state, images, labels, steps=settings.steps, lr=settings.lr, seed=seed
            )
            measured.append((losses, gradients))
        losses, gradients = (np.asarray(kind) for kind in zip(*measured, strict=True))
        yield Curves(name, losses, gradients)
