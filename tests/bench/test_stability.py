"""`bn-bench stability`: what it trains, how it judges, its table, picture and JSON, and what it refuses."""

import json
import math

import jax
import numpy as np
import pytest
from click.testing import CliRunner

from bn_fused.approaches import APPROACHES
from bn_fused.bench import digits, plots, saved, stability
from bn_fused.bench.commands.stability import command

from support.versions import on_the_newest_jax

SKLEARN = pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


def curves(norm="batch", seeds=2, steps=120, level=0.1):
    """Curves with these losses throughout, and gradients a tenth of them."""
    losses = np.full((seeds, steps), level)
    return stability.Curves(norm, losses, losses / 10)


def run(*arguments):
    """The result of a command line."""
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


# What is trained


def test_there_is_every_approach_and_equinox_in_both_modes():
    assert list(stability.NORMS) == [*APPROACHES, "equinox batch", "equinox ema"]


@pytest.mark.slow
def test_a_seeds_curves_are_those_of_training_it_alone():
    settings = stability.Settings(steps=3, seeds=2)
    (both,) = stability.run(settings, ["batch"])
    images, labels = digits.load_digits_split()[0]
    for seed in range(2):
        model, state = digits.make_model(jax.random.key(seed), digits.fused_norm("batch"))
        *_, losses, gradients = digits.train(model, state, images, labels, steps=3, seed=seed)
        np.testing.assert_array_equal(both.losses[seed], losses)
        np.testing.assert_array_equal(both.gradients[seed], gradients)
    assert not np.array_equal(both.losses[0], both.losses[1])


@on_the_newest_jax
def test_a_norm_is_compiled_once_for_all_seeds(monkeypatch):
    traced = []
    original = digits.cross_entropy

    def counted(*arguments):
        traced.append(1)
        return original(*arguments)

    monkeypatch.setattr(digits, "cross_entropy", counted)
    (batch,) = stability.run(stability.Settings(steps=2, seeds=3), ["equinox batch"])
    assert batch.losses.shape == (3, 2) and len(traced) == 1


def test_the_settings_reach_the_layer():
    settings = stability.Settings(momentum=0.7, warmup_period=9)
    ours = stability.NORMS["ema"](settings)(4)
    assert (ours.momentum, ours.warmup_period, ours.approach) == (0.7, 9, "ema")
    theirs = stability.NORMS["equinox ema"](settings)(4).norm
    assert (theirs.momentum, theirs.mode) == (0.7, "ema")


# How it judges


def test_a_seed_has_trained_if_the_median_of_its_last_losses_is_low():
    losses = np.concatenate([np.full((3, 100), 5.0), np.full((3, stability.LAST), 0.1)], axis=1)
    losses[1, -stability.LAST :] = 2.3
    losses[2, -10:] = 9.0  # a minority
    batch = stability.Curves("batch", losses, losses)
    np.testing.assert_allclose(batch.last, [0.1, 2.3, 0.1])
    assert batch.trained == 2
    assert batch.figures()["worst_loss_last"] == 2.3 and batch.figures()["largest_loss"] == 9.0


def test_what_is_no_number_has_not_trained_and_is_the_largest_loss():
    batch = curves(seeds=1)
    batch.losses[0, 5:] = math.nan
    assert batch.trained == 0 and batch.largest_loss == math.inf
    assert batch.largest_gradient == pytest.approx(0.01)


# The picture


@pytest.mark.parametrize("steps", [2, 7, 300, 5000])
def test_the_points_of_a_curve_take_every_step_once(steps):
    drawn = [step for part in plots.together(steps) for step in range(steps)[part]]
    assert drawn == list(range(steps))
    assert len(plots.together(steps)) <= plots.POINTS


def test_a_curve_is_the_median_in_the_band_of_all_that_is_finite():
    values = np.array([[1.0, 4.0, 3.0], [2.0, math.nan, 5.0], [9.0, math.inf, 7.0]])
    step, median, smallest, largest = plots.curve(values)
    np.testing.assert_array_equal(step, [1, 2, 3])
    np.testing.assert_array_equal(median, [2, 4, 5])
    np.testing.assert_array_equal(smallest, [1, 4, 3])
    np.testing.assert_array_equal(largest, [9, 4, 7])


def test_the_picture_shows_loss_and_gradient_of_every_norm_on_logarithmic_axes():
    pytest.importorskip("matplotlib", reason="the pictures are drawn with matplotlib")
    every_norm = [curves(norm, level=1.0 + place) for place, norm in enumerate(stability.NORMS)]
    figure = plots.stability_figure(every_norm, "the caption")
    assert figure.get_supxlabel() == "the caption"
    for panel, scale in zip(figure.axes, (1.0, 0.1), strict=True):
        assert (panel.get_xscale(), panel.get_yscale()) == ("log", "log")
        drawn = {line.get_label(): line.get_ydata() for line in panel.lines}
        expected = ["bn_fused batch", "bn_fused ema", "bn_fused ema_compatibility", "equinox batch", "equinox ema"]
        assert list(drawn) == expected and len(panel.collections) == len(expected)
        for place, values in enumerate(drawn.values()):
            np.testing.assert_allclose(values, (1.0 + place) * scale)


def test_every_norm_has_a_look_of_its_own():
    assert set(plots.STABILITY_STYLES) == set(stability.NORMS)
    assert len({colour for colour, _ in plots.STABILITY_STYLES.values()}) == len(stability.NORMS)


# The command


@on_the_newest_jax
def test_the_command_prints_a_row_for_each_norm_and_saves_picture_and_json(tmp_path):
    picture, record = tmp_path / "curves.png", tmp_path / "curves.json"
    done = run("--steps", 3, "--seeds", 2, "--norm", "ema", "--norm", "equinox batch", "--momentum", 0.9,
               "--out", picture, "--json", record)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "bn_fused ema " in done.output and "equinox batch " in done.output and "0 of 2" in done.output
    from PIL import Image

    with Image.open(picture) as image:
        assert image.format == "PNG" and image.size == (1080, 528)
        assert len(np.unique(np.asarray(image.convert("L")))) > 20
    document = json.loads(record.read_text())
    assert (document["schema_version"], document["kind"]) == (saved.SCHEMA, "stability")
    assert document["settings"] == dict(steps=3, lr=0.3, seeds=2, momentum=0.9, warmup_period=1)
    assert [row["norm"] for row in document["rows"]] == ["ema", "equinox batch"]
    assert np.shape(document["rows"][0]["losses"]) == (2, 3) == np.shape(document["rows"][1]["gradients"])


def test_json_has_null_for_what_is_no_number():
    text = saved.to_json("stability", "cpu", {}, [{"loss": math.nan, "all": [1.0, math.inf]}])
    assert json.loads(text)["rows"] == [{"loss": None, "all": [1.0, None]}]


def test_an_interrupted_run_keeps_the_finished_rows(monkeypatch, tmp_path):
    def interrupted(settings, norms, progress):
        yield curves("batch")
        raise KeyboardInterrupt

    monkeypatch.setattr(stability, "run", interrupted)
    record = tmp_path / "curves.json"
    done = run("--out", tmp_path / "curves.png", "--json", record)
    assert done.exit_code == 130 and "1 of 5 rows are finished" in done.output
    assert (tmp_path / "curves.png").stat().st_size > 1000
    document = json.loads(record.read_text())
    assert document["interrupted"] and [row["norm"] for row in document["rows"]] == ["batch"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--steps", 1), "--steps"),
        (("--lr", 0), "--lr"),
        (("--lr", "nan"), "nan"),
        (("--lr", "inf"), "inf"),
        (("--seeds", 0), "--seeds"),
        (("--momentum", 1), "--momentum"),
        (("--warmup-period", 0), "--warmup-period"),
        (("--norm", "group"), "'group'"),
        (("--out", "picture.jpg"), "'picture.jpg'"),
        (("--out", "/no/such/folder/picture.png"), "'/no/such/folder/picture.png'"),
        (("--json", "/no/such/folder/rows.json"), "'/no/such/folder/rows.json'"),
    ],
)
def test_input_it_cannot_use_is_named_with_status_2(arguments, named, monkeypatch):
    monkeypatch.setattr(stability, "run", lambda *_: pytest.fail("it began"))
    done = run(*arguments)
    assert done.exit_code == 2 and named in done.output.splitlines()[-1]


@pytest.mark.parametrize("package", ["sklearn", "matplotlib"])
def test_a_missing_package_is_named_with_what_to_install(package, monkeypatch):
    from bn_fused.bench.commands import stability as module

    find_spec = module.importlib.util.find_spec
    monkeypatch.setattr(
        module.importlib.util, "find_spec", lambda name, *rest: None if name == package else find_spec(name, *rest)
    )
    done = run()
    assert done.exit_code == 2
    assert f'{module.NEEDED[package]}: pip install "bn_fused[bench]"' in done.output.splitlines()[-1]


@pytest.mark.parametrize(("spike", "cut"), [(1e7, True), (20.0, False)])
def test_a_spike_does_not_squeeze_the_range_that_people_look_at(spike, cut):
    """One of three seeds goes wild for a step: the medians keep the axis, and the spike's height is written on it."""
    pytest.importorskip("matplotlib", reason="the pictures are drawn with matplotlib")
    losses = np.ones((3, 10))
    gradients = losses.copy()
    gradients[0, 4] = spike
    figure = plots.stability_figure([stability.Curves("batch", losses, gradients)], "")
    figure.draw_without_rendering()
    panel = figure.axes[1]
    top = panel.get_ylim()[1]
    assert top == pytest.approx(plots.ABOVE_MEDIANS) if cut else top > spike
    assert [text.get_text() for text in panel.texts] == (["to 1e+07"] if cut else [])
