"""What PyTorch trained, taken over as docs/migrate.md says: inference and further training are PyTorch's."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_fused
from bn_fused.bench.step.resnet import ARCHITECTURES, ResNet

from support import ROOT
from support.over_batch import over_batch
from support.tolerances import assert_close, tol

torch = pytest.importorskip("torch")


def from_torch(*arguments):
    """The recipe of the document."""
    text = (ROOT / "docs/migrate.md").read_text()
    (recipe,) = re.findall(r"```python\n(def from_torch\(.*?)```", text, re.DOTALL)
    names = {"eqx": eqx, "jnp": jnp, "bn_fused": bn_fused}
    exec(recipe, names)
    return names["from_torch"](*arguments)


def randomise(module):
    """What training would have made of the norms' scale, shift and statistics."""
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            with torch.no_grad():
                if layer.affine:
                    layer.weight.uniform_(0.5, 1.5)
                    layer.bias.normal_()
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.5, 2)


def tensors_of(module):
    return {name: tensor.numpy().copy() for name, tensor in module.state_dict().items()}


def counterparts(model):
    """(where a layer is in our ResNet-18, torchvision's name for it), convolutions and the head, and norms."""
    layers, norms = [(lambda m: m.stem, "conv1"), (lambda m: m.head, "fc")], [(lambda m: m.stem_norm, "bn1")]
    for place, block in enumerate(model.blocks):
        name = f"layer{place // 2 + 1}.{place % 2}"
        for index in range(2):
            layers.append((lambda m, p=place, i=index: m.blocks[p].convolutions[i], f"{name}.conv{index + 1}"))
            norms.append((lambda m, p=place, i=index: m.blocks[p].norms[i], f"{name}.bn{index + 1}"))
        if block.shortcut is not None:
            layers.append((lambda m, p=place: m.blocks[p].shortcut, f"{name}.downsample.0"))
            norms.append((lambda m, p=place: m.blocks[p].shortcut_norm, f"{name}.downsample.1"))
    return layers, norms


def test_a_whole_resnet_gives_torchs_logits():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=10).eval()
    randomise(theirs)
    tensors = tensors_of(theirs)

    def norm(channels, activation):
        return bn_fused.BatchNorm(channels, "batch", "batch", momentum=0.9, activation=activation)

    model, state = eqx.nn.make_with_state(ResNet)(ARCHITECTURES["resnet18"], 10, norm, jax.random.key(0))
    layers, norms = counterparts(model)
    for where, name in layers:
        model = eqx.tree_at(lambda m, where=where: where(m).weight, model, jnp.asarray(tensors.pop(f"{name}.weight")))
    model = eqx.tree_at(lambda m: m.head.bias, model, jnp.asarray(tensors.pop("fc.bias")))
    for where, name in norms:
        layer, state = from_torch(where(model), state, tensors, name)
        model = eqx.tree_at(where, model, layer)
        for each in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            del tensors[f"{name}.{each}"]
    assert tensors == {}  # all of torch's was taken

    x = np.random.default_rng(0).standard_normal((2, 3, 64, 64)).astype(np.float32)
    with torch.no_grad():
        wanted = theirs.double()(torch.from_numpy(x).double()).numpy()
    y, _ = eqx.filter_jit(over_batch)(eqx.nn.inference_mode(model), jnp.asarray(x), state)
    # Sums of up to 512 * 9 products.
    np.testing.assert_allclose(y, wanted, rtol=0, atol=tol(np.float32, n=512 * 9) * abs(wanted).max())


@pytest.mark.parametrize("affine", [True, False])
def test_training_goes_on_as_torchs(affine):
    torch.manual_seed(0)
    theirs = torch.nn.BatchNorm2d(4, eps=1e-4, momentum=0.2, affine=affine).double()
    randomise(theirs)
    norm, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(
        4, "batch", "batch", eps=1e-4, momentum=0.8, channelwise_affine=affine
    )
    norm, state = from_torch(norm, state, {f"bn.{name}": value for name, value in tensors_of(theirs).items()}, "bn")
    for step in range(3):
        x = (2 + 3 * np.random.default_rng(step).standard_normal((2, 4, 3, 3))).astype(np.float32)
        y, state = over_batch(norm, jnp.asarray(x), state)
        assert_close(y, theirs(torch.from_numpy(x).double()).detach().numpy(), 10.0)
    stats = norm.get_stats(state)
    assert_close(stats.mean, theirs.running_mean.numpy(), 10.0)
    assert_close(stats.var, theirs.running_var.numpy(), 10.0)
