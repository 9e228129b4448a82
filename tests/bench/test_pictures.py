"""`bn-bench report --pictures`: what is drawn of recorded results, in numbers."""

import dataclasses
import json
import shutil

import pytest

from bn_fused.bench import cli, pictures
from bn_fused.bench.step.parts import Untold, parts

from support import ROOT

RESULTS = ROOT / "bench" / "results"
STEP, BEFORE = "nvidia-h200/2026-11-27/step.json", "nvidia-h200/2026-11-27/step-before.json"
# The beginnings of names that kernels of the recorded steps have, written down by hand.
LIBRARIES = (
    *("sm90_xmma_", "nvjet_", "void cutlass", "_ZN17cutlass", "void cask_plugin", "void cublasLt"),
    *("gemm_fusion_dot", "void nhwcAddPaddingKernel"),
)
RELUS = ("loop_maximum_fusion", "loop_select_fusion")


def rows_of(path):
    return {row["name"]: row for row in json.loads((RESULTS / path).read_text())["rows"]}


def seconds(row, *beginnings):
    return sum(launches * each for name, (launches, each) in row["kernels"].items() if name.startswith(beginnings))


@pytest.fixture(scope="module")
def newest():
    return pictures.newest(RESULTS)


def test_the_parts_of_a_recorded_step_are_what_its_kernels_add_up_to(newest):
    step = newest["nvidia-h200-step.png"]
    rows, without = rows_of(STEP), rows_of(BEFORE)["no norm"]
    assert (step.steps.path, step.without_norm.path) == (STEP, BEFORE)
    assert list(step.parts) == [*rows, "no norm"]
    rest = seconds(without, "") - seconds(without, *LIBRARIES) - seconds(without, *RELUS)
    for name, row in (rows | {"no norm": without}).items():
        part = step.parts[name]
        assert seconds(row, "") == pytest.approx(row["busy"], rel=1e-9)
        assert sum(part) == pytest.approx(row["busy"], rel=1e-9)
        assert part.products == pytest.approx(seconds(row, *LIBRARIES), rel=1e-9)
        assert part.rest == pytest.approx(rest, rel=1e-9)
    # Without BatchNorm it is relu and residual; with our kernels it is these, and a little around them.
    assert step.parts["no norm"].norm == pytest.approx(seconds(without, *RELUS), rel=1e-9)
    ours = rows["auto batch, fused, nhwc"]
    assert 1 < step.parts["auto batch, fused, nhwc"].norm / seconds(ours, "bn_fused_") < 1.1


def test_the_other_kernels_of_a_network_with_our_kernels_take_what_the_rest_takes(newest):
    """Told by names alone: a check of the rest, which is told by the network without BatchNorm."""
    row, rest = rows_of(STEP)["auto batch, fused, nhwc"], newest["nvidia-h200-step.png"].parts["flax"].rest
    others = seconds(row, "") - seconds(row, *LIBRARIES, "bn_fused_")
    assert rest < others < 1.2 * rest


def test_networks_whose_kernels_have_other_names_are_not_told(newest):
    steps = newest["nvidia-h200-step.png"].without_norm
    (row,) = [row for row in steps.rows if row.name == "no norm"]
    renamed = {name.replace("loop_select", "loop_where"): kernel for name, kernel in row.kernels.items()}
    row = dataclasses.replace(row, kernels=renamed)
    with pytest.raises(Untold, match="0 kernels named as the gradients of its 49 relus"):
        parts([row], row, steps.setting)


def test_the_layers_drawn_are_those_of_the_newest_run_on_a_gpu(newest):
    assert newest["nvidia-h200-layers.png"].path == "nvidia-h200/2026-11-26-one-launch/shapes.json"
    assert set(newest) == {"nvidia-h200-layers.png", "nvidia-h200-step.png"}


def test_a_step_is_drawn_where_a_network_without_batch_norm_was_recorded(tmp_path, capsys):
    there = tmp_path / "results" / "nvidia-h200"
    there.mkdir(parents=True)
    shutil.copyfile(RESULTS / STEP, there / "step.json")
    arguments = ("report", "--results", str(tmp_path / "results"), "--pictures", str(tmp_path / "pictures"))
    assert cli.main(list(arguments)) == 2
    assert "there are no recorded times of kernels" in capsys.readouterr().err
    shutil.copyfile(RESULTS / BEFORE, there / "before.json")
    pytest.importorskip("matplotlib", reason="the pictures are drawn with matplotlib")
    assert cli.main(list(arguments)) == 0
    assert capsys.readouterr().out == f"drawn: {tmp_path / 'pictures' / 'nvidia-h200-step.png'}\n"
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["nvidia-h200-step.png"]


def test_a_file_that_is_damaged_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "nvidia-h200").mkdir()
    (tmp_path / "nvidia-h200" / "step.json").write_text("not JSON")
    assert cli.main(["report", "--results", str(tmp_path), "--pictures", str(tmp_path / "pictures")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "step.json is not JSON" in said


def test_the_bars_of_a_step_are_its_parts_in_milliseconds(newest, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the pictures are drawn with matplotlib")
    from matplotlib.axes import Axes

    from bn_fused.bench import plots

    step, drawn = newest["nvidia-h200-step.png"], {}
    bar = Axes.barh

    def noting(self, names, lengths, height, begin, *, label, **settings):
        drawn[label] = dict(zip(names, zip(begin, lengths, strict=True), strict=True))
        return bar(self, names, lengths, height, begin, label=label, **settings)

    monkeypatch.setattr(Axes, "barh", noting)
    plots.plot_step(step, str(tmp_path / "step.png"))
    flax = step.parts["flax"]
    assert [drawn[label]["flax"] for label in plots.STEP_PARTS] == [
        pytest.approx((0, 1e3 * flax.products)),
        pytest.approx((1e3 * flax.products, 1e3 * flax.rest)),
        pytest.approx((1e3 * (flax.products + flax.rest), 1e3 * flax.norm)),
    ]
    assert "bn_fused (jnp) batch, fused, nhwc" in drawn["the rest"]


def test_the_pictures_of_the_documents_are_those_of_the_newest_results(newest):
    image = pytest.importorskip("PIL.Image", reason="Pillow, which comes with matplotlib, reads the pictures")
    folder = ROOT / "docs" / "pictures"
    assert {path.name for path in folder.iterdir()} == set(newest)
    for name, one in newest.items():
        with image.open(folder / name) as picture:
            assert picture.text["Source"] == one.source, "`bn-bench report --pictures docs/pictures` draws them anew"
