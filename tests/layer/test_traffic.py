"""Passes over x that the layer makes through a GPU's memory, counted in its HLO compiled for an H200, without one.

The compiler runs in a process of its own, because a process compiles for one GPU only. At the end, the tests of
`bn_fused.bench.deviceless` itself.
"""

import importlib.metadata
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from bn_fused.bench import deviceless, installing

from support.child_process import answer
from support.compilers import skip_without_compilers

# NCHW and NHWC images: examples under vmap, channels first as the layer has it, and the function with channels last.
# Few rows of many channels, which XLA sums in another way than many rows of few channels.
LAYOUTS = {"NCHW": (32, 64, 56, 56), "NHWC": (32, 56, 56, 64), "NHWC late": (64, 7, 7, 512), "no maps": (4096, 512)}
DTYPES = ("float32", "bfloat16")
OPTIONS = {"plain": {}, "relu": {"activation": "relu"}}
# Channels last with an activation is left out: there XLA writes its derivative to memory, 5 to 6 reads in all.
CASES = [
    (layout, dtype, option)
    for layout in LAYOUTS
    for dtype in DTYPES
    for option in OPTIONS
    if layout == "NCHW" or option == "plain"
]

COMPILE = """
import json, math, sys
import equinox as eqx, jax, jax.numpy as jnp
import bn_fused
from bn_fused.bench.deviceless import DevicelessUnavailable, compile_for
from bn_fused.bench.audit.traffic import passes

def layer_step(shape, options):
    layer, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(shape[1], "batch", approach="batch", **options)
    def step(x, weight, bias):
        moved = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, (weight, bias))
        y, new = jax.vmap(moved, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
        return y, jax.tree.leaves(new)
    return shape[1], step

def function_step(shape, options):
    stats = bn_fused.RunningStats.init(shape[-1])
    def step(x, weight, bias):
        y, new = bn_fused.batch_norm(x, stats, weight, bias, approach="batch", **options)
        return y, jax.tree.leaves(new)
    return shape[-1], step

def count(layout, dtype, shape, options):
    channels, step = (layer_step if layout == "NCHW" else function_step)(shape, options)
    x = jax.ShapeDtypeStruct(shape, dtype)
    parameter = jax.ShapeDtypeStruct((channels,), jnp.float32)
    structure = []

    def forward(x, weight, bias):
        y, pullback, state = jax.vjp(step, x, weight, bias, has_aux=True)
        kept, tree = jax.tree.flatten(pullback)
        structure[:] = [tree, [leaf is x for leaf in kept]]
        # x is kept as it lies; returning it from here would copy it.
        return y, state, [None if leaf is x else leaf for leaf in kept]

    _, _, kept = jax.eval_shape(forward, x, parameter, parameter)
    tree, is_x = structure

    def backward(kept, x, dy):
        return jax.tree.unflatten(tree, [x if mine else leaf for mine, leaf in zip(is_x, kept, strict=True)])(dy)

    nbytes = math.prod(shape) * jnp.dtype(dtype).itemsize
    figures = {}
    for name, function, specs in (
        ("forward", forward, (x, parameter, parameter)), ("backward", backward, (kept, x, x))
    ):
        traffic = passes(compile_for("h200", function, *specs).as_text(), math.prod(shape), nbytes)
        figures[name] = {
            "reads": traffic.reads,
            "writes": traffic.writes,
            "launches": traffic.launches,
            "copies": traffic.copies_or_transposes,
            "details": [str(access) for access in traffic.details],
        }
    return figures

counts = [count(*case) for case in json.load(sys.stdin)]
try:
    compile_for("a100", jnp.sin, jnp.ones(3))
    second = None
except DevicelessUnavailable as error:
    second = str(error)
json.dump([counts, second], sys.stdout)
"""


@pytest.fixture(scope="module")
def compiled():
    """What the process that compiles found: each case's traffic, forward and backward, and how it refused an A100."""
    skip_without_compilers("h200")
    cases = [(layout, dtype, LAYOUTS[layout], OPTIONS[option]) for layout, dtype, option in CASES]
    return answer(["-c", COMPILE], cases, timeout=300)


@pytest.fixture(scope="module")
def counted(compiled):
    """The traffic of every case."""
    return dict(zip(CASES, compiled[0], strict=True))


@pytest.mark.compilers
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_forward_reads_x_twice_and_writes_it_once(counted, case):
    forward = counted[case]["forward"]
    assert forward["reads"] <= 2 and forward["writes"] <= 1, forward["details"]


@pytest.mark.compilers
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_backward_reads_at_most_four_times_and_writes_once(counted, case):
    backward = counted[case]["backward"]
    assert backward["reads"] <= 4 and backward["writes"] <= 1, backward["details"]


@pytest.mark.compilers
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_nothing_of_the_size_of_x_is_copied_or_transposed(counted, case):
    assert counted[case]["forward"]["copies"] == []
    assert counted[case]["backward"]["copies"] == []


@pytest.mark.compilers
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_counts_are_not_empty(counted, case):
    # No implementation reads x less than once in the forward, x and dy less than once in the backward.
    assert counted[case]["forward"]["reads"] >= 1 and counted[case]["forward"]["writes"] >= 1
    assert counted[case]["backward"]["reads"] >= 2 and counted[case]["backward"]["writes"] >= 1


@pytest.mark.compilers
def test_a_second_gpu_is_refused_in_the_same_process(compiled):
    assert "compiles for h200" in compiled[1]
    assert "a100" in compiled[1]


def test_the_requirements_are_those_of_the_installed_jax():
    version = jax.__version__
    assert deviceless.requirements("cuda") == (f"jax-cuda13-plugin=={version}", f"jax-cuda13-pjrt=={version}")
    (libtpu,) = deviceless.requirements("tpu")
    assert libtpu.startswith("libtpu==")
    assert not set(libtpu) & set(" ;\"'")


def test_the_requirements_of_triton_are_those_of_the_extra():
    (extra,) = (
        requirement.split(";")[0].strip()
        for requirement in importlib.metadata.requires("bn_fused")
        if requirement.startswith("jax-triton") and "triton" in requirement.split(";")[1]
    )
    assert deviceless.requirements("triton")[0] == extra


def test_the_requirements_print_without_the_bench_extra():
    script = (
        "import sys; sys.modules.update(click=None, rich=None, sklearn=None)\n"
        "from bn_fused.bench import deviceless; sys.exit(deviceless.main(['cuda', 'tpu']))"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == [*deviceless.requirements("cuda"), *deviceless.requirements("tpu")]


def test_a_missing_compiler_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(deviceless.importlib.util, "find_spec", lambda name: None)
    for target, platform in {"b200": "cuda", "v5e": "tpu"}.items():
        listed = f"$({installing.python()} -m bn_fused.bench.deviceless {platform})"
        command = f"{target} is not installed: {installing.pip_install('--no-deps')} {listed}"
        with pytest.raises(deviceless.DevicelessUnavailable, match=re.escape(command)):
            deviceless.compile_for(target, jnp.sin, jnp.ones(3))


def test_for_an_amd_gpu_nothing_is_compiled_and_one_line_says_so():
    for target in ("mi210", "mi250x", "mi300x"):
        with pytest.raises(deviceless.DevicelessUnavailable, match=f"^{target} is an AMD GPU, and .*runs without one$"):
            deviceless.compile_for(target, jnp.sin, jnp.ones(3))


def test_unknown_targets_and_platforms_are_refused_by_name(capsys):
    with pytest.raises(ValueError, match="target is 'h2000'; accepted are .*'h200'"):
        deviceless.compile_for("h2000", jnp.sin, jnp.ones(3))
    with pytest.raises(ValueError, match="platform is 'metal'"):
        deviceless.requirements("metal")
    with pytest.raises(SystemExit) as exit_:
        deviceless.main(["metal"])
    assert exit_.value.code == 2
    assert "unknown platform 'metal'" in capsys.readouterr().err


def test_without_arguments_every_target_is_listed(capsys):
    assert deviceless.main([]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(deviceless.TARGETS)
