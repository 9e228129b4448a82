"""`bn-bench run`, `compare` and `report`: what they print, save and draw, and the status they exit with."""

import csv
import json
import re

import jax
import numpy as np
import pytest

import bn_fused
from bn_fused import kernels
from bn_fused.approaches import APPROACHES
from bn_fused.bench import cli, doctor, timing
from bn_fused.bench.commands import common, run as run_command
from bn_fused.bench.providers import RIVALS
from bn_fused.bench.run import performance, records, report, suite
from bn_fused.bench.workloads import SUITES, WORKLOADS, Workload

from support import ROOT
from support.versions import ON_THE_NEWEST_JAX, on_the_newest_jax

pytestmark = pytest.mark.usefixtures("narrow_terminal")

SMALL = ("run", "--shape", "8,4,5,3", "--seconds", "0.01")


def bn_bench(*arguments):
    return cli.main(list(arguments))


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    """A small run, saved: its text."""
    path = tmp_path_factory.mktemp("saved") / "run.json"
    assert bn_bench(*SMALL, "--against", "equinox", "--against", "jnp", "--json", str(path)) == 0
    return path.read_text()


@pytest.fixture
def saved(a_run, tmp_path):
    """The path of a small run that is saved, which the test may change."""
    path = tmp_path / "run.json"
    path.write_text(a_run)
    return path


# run


def test_a_run_checks_times_and_names_the_backend_and_exits_with_0(capsys):
    status = bn_bench(*SMALL)
    out = capsys.readouterr().out
    assert status == 0, out
    assert "every check passed" in out and "FAILED" not in out
    assert bn_fused.explain((8, 4, 5, 3), "float32", channel_axis=1).name + "), auto" in out
    # two passes, each with our layer and equinox's: time, spread, ratio, GB/s, share of the copy, error
    row = r" [\d.]+ +[\d.]+-[\d.]+ +(?:[\d.]+|-) +[\d.]+ +\d+ % +\de-\d\d"
    assert len(re.findall(row, out)) == 4


def test_without_a_command_it_is_the_doctor_and_the_quick_suite(monkeypatch, capsys):
    ran = []

    def run_workload(workload, settings, progress):
        ran.append(workload.name)
        assert settings.rivals == ("equinox", *["flax"] * (RIVALS["flax"].missing is None))
        return suite_rows(workload)

    def suite_rows(workload):
        planned = suite.plan(workload, suite.Settings())
        return [suite._row(workload, layer, "fwd", status="refused", reason="not now") for layer in planned]

    monkeypatch.setattr(suite, "run_workload", run_workload)
    assert bn_bench() == 0
    out = capsys.readouterr().out
    assert ran == list(SUITES["quick"])
    able, refusals = doctor.backends()
    assert {"jnp", "reference"} <= set(able) and all(f"{name} does not: {why}" in out for name, why in refusals.items())
    for backend in able:
        for approach in APPROACHES:
            assert re.search(rf"{backend}\s.*{approach}\s.*ok", out)


def test_a_backend_whose_check_fails_shows_FAILED_is_not_timed_and_the_status_is_1(broken_backend, capsys, tmp_path):
    path = tmp_path / "run.json"
    assert bn_bench(*SMALL, "--pass", "fwd", "--pass", "bwd", "--json", str(path)) == 1
    out = capsys.readouterr().out
    assert len(re.findall(r"broken\) +FAILED", out)) == 1
    assert "FAILED: bn_fused (broken), batch, bwd at shape (8,4,5,3) float32: dx is off by" in out
    assert "every check passed" not in out
    rows = {(row.layer, row.pass_name): row for row in records.load(path).rows}
    # its forward is right, and timed
    assert rows["broken", "fwd"].status == "ok" and rows["broken", "fwd"].median > 0
    assert rows["broken", "bwd"].status == "failed" and rows["broken", "bwd"].median is None
    assert all(row.status == "ok" for (layer, _), row in rows.items() if layer != "broken")


def test_a_layer_that_raises_fails_in_one_line_and_the_others_run(broken_backend, capsys):
    operations = kernels.backends.jnp.BACKEND.operations

    def raises(**operands):
        raise RuntimeError("no such instruction\nand more")

    kernels.unregister(broken_backend)
    kernels.register(kernels.Backend(broken_backend, operations | {"forward": raises}))
    assert bn_bench(*SMALL) == 1
    out = capsys.readouterr().out
    assert "RuntimeError: no such instruction" in out and "and more" not in out
    assert re.search(r"bn_fused \(jnp\), auto +[\d.]", out)


def test_a_backend_that_cannot_run_here_is_named_with_its_reason(broken_backend, capsys):
    operations = kernels.backends.jnp.BACKEND.operations
    kernels.unregister(broken_backend)
    kernels.register(kernels.Backend(broken_backend, operations, refusal=lambda problem, target: "it needs a chip"))
    assert bn_bench(*SMALL) == 0
    assert "it needs a chip" in capsys.readouterr().out
    # asked for by name, it is input that cannot be used
    assert bn_bench(*SMALL, "--backend", broken_backend) == 2
    assert "it needs a chip" in capsys.readouterr().err


def test_a_rival_that_is_not_installed_is_named_with_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("bn_fused.bench.providers.importlib.util.find_spec", lambda name: None)
    assert bn_bench(*SMALL, "--against", "flax", "--against", "torch") == 0
    out = capsys.readouterr().out
    assert "pip install flax" in out and "pip install torch" in out
    assert len(re.findall(r"flax +missing", out)) == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("run", "--shape", "32,x"), "'32,x'"),
        (("run", "--shape", "32"), "'32'"),
        (("run", "--shape", "32,0,4"), "'32,0,4'"),
        (("run", "--seconds", "0"), "--seconds"),
        (("run", "--seconds", "soon"), "'soon'"),
        (("run", "--seconds", "nan"), "nan is not a finite number"),
        (("run", "--seconds", "inf"), "inf is not a finite number"),
        (("run", "--shape", "1000000000,1000000"), "x, y and dy alone take 1.2e+07 GB"),
        (("run", "--suite", "huge"), "'huge'"),
        (("run", "--workload", "huge"), "'huge'"),
        (("run", "--backend", "cudnn"), "'cudnn'"),
        (("run", "--against", "keras"), "'keras'"),
        (("run", "--pass", "sideways"), "'sideways'"),
        (("run", "--dtype", "int8"), "'int8'"),
        (("run", "--activation", "softmax"), "'softmax'"),
        (("run", "--devices", "0"), "--devices"),
        (("run", "--devices", "64", "--shape", "64,4"), "devices is 64: there are 4"),
        (("run", "--devices", "3", "--shape", "8,4"), "devices is 3: it must divide the 8 examples"),
        (("run", "--sync"), "sync needs --devices"),
        (("run", "--json", "no/such/folder/run.json"), "no/such/folder"),
        (("compare", "one.json"), "SECOND"),
        (("compare", "no-such.json", "no-such.json"), "no-such.json"),
        (("report", "--results", "no-such-folder"), "no-such-folder"),
        (("report", "--check"), "--readme"),
        (("report", "--pictures", "pictures", "--readme", "README.md"), "two reports"),
        (("--nothing",), "--nothing"),
        (("nothing",), "nothing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_input_it_cannot_use_is_answered_in_one_line_with_status_2(arguments, named, capsys):
    assert bn_bench(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("bn-bench: ") and err.count("\n") == 1 and named in err


def test_two_options_with_one_file_are_refused_before_anything_runs(tmp_path, capsys):
    path = str(tmp_path / "both.json")
    assert bn_bench(*SMALL, "--json", path, "--csv", path) == 2
    assert "is the file of several options" in capsys.readouterr().err and not (tmp_path / "both.json").exists()


def test_without_a_device_it_says_so_in_one_line_with_status_2(monkeypatch, capsys):
    def devices():
        raise RuntimeError("no such platform\nand a long story")

    monkeypatch.setattr(common.jax, "devices", devices)
    assert bn_bench() == 2
    assert capsys.readouterr().err == "bn-bench: JAX finds no device: no such platform\n"


def test_list_names_every_workload_and_a_dry_run_every_layer_and_neither_runs(monkeypatch, capsys):
    monkeypatch.setattr(run_command, "run", lambda *arguments: pytest.fail("it ran"))
    assert bn_bench("run", "--list") == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in WORKLOADS)
    assert bn_bench("run", "--suite", "mlp", "--against", "equinox", "--dry-run") == 0
    planned = capsys.readouterr().out
    assert all(name in planned for name in SUITES["mlp"]) and "equinox" in planned and "jnp" in planned


def test_a_dry_run_names_devices_and_whether_they_share_statistics(capsys):
    arguments = ("run", "--shape", "8,4,5,3", "--layout", "NHWC", "--dry-run")
    assert bn_bench(*arguments) == 0
    out = capsys.readouterr().out
    assert f"on 1 of {len(jax.devices())} x cpu" in out and "caches warm" in out and "nhwc" in out
    assert bn_bench(*arguments, "--devices", "2") == 0
    assert "each with statistics of its own" in capsys.readouterr().out
    assert bn_bench(*arguments, "--devices", "2", "--sync") == 0
    assert "which share their statistics" in capsys.readouterr().out


def test_what_was_not_compared_is_named_where_every_check_passed():
    def row(layer, status, pass_name="fwd"):
        values = dict(median=1.0, p10=1.0, p90=1.0, of_copy=1.0) if status == "ok" else {}
        return records.Row(
            workload="w", shape=(2, 3), dtype="float32", layout="nchw", activation=None, residual=False, layer=layer,
            approach="batch", pass_name=pass_name, status=status, **values,
        )  # fmt: skip

    assert report.passed([row("jnp", "ok"), row("equinox", "ok")]) == "every check passed"
    some = [row("jnp", "ok"), row("flax", "missing"), row("flax", "missing", "bwd"), row("pallas_gpu", "refused")]
    assert report.passed(some) == "every check passed; not compared: flax (missing), pallas_gpu (refused)"
    assert report.passed([row("jnp", "ok"), row("jnp", "refused")]).endswith("jnp (refused at some workloads)")
    assert report.passed([row("jnp", "ok")], ["pallas_gpu"]).endswith("; not compared: pallas_gpu (skipped)")
    assert report.passed([row("jnp", "refused")]).startswith("nothing was checked")


def test_the_options_choose_workloads_and_their_settings():
    options = dict(suite=None, names=(), shapes=(), examples=None, dtypes=("float32",))
    quick = common.choose_workloads(**options, residual=False)
    assert quick == [Workload(name, WORKLOADS[name].shape, purpose=WORKLOADS[name].purpose) for name in SUITES["quick"]]
    options |= dict(
        suite="mlp", names=("mlp", "wide-3"), examples=6, layouts=("nhwc",), dtypes=("bfloat16",), activations=("relu",)
    )
    chosen = common.choose_workloads(**options, residual=True)
    assert [workload.name for workload in chosen] == [*SUITES["mlp"], "wide-3"]
    assert chosen[-1].array_shape == (6, 8, 8, 640)
    assert {(one.dtype, one.activation, one.residual) for one in chosen} == {("bfloat16", "relu", True)}


def test_repeated_options_are_all_taken(capsys):
    names = {"dtype": ("float32", "bfloat16"), "layout": ("nchw", "nhwc"), "activation": ("none", "relu")}
    arguments = [word for name, values in names.items() for value in values for word in (f"--{name}", value)]
    assert bn_bench("run", "--shape", "8,4,5,3", "--dry-run", *arguments) == 0
    out = capsys.readouterr().out
    titles = [line.split(") ")[1].split() for line in out.splitlines() if line.startswith("shape (8,4,5,3)")]
    assert sorted(titles) == sorted(
        [dtype, *["nhwc"] * (layout == "nhwc"), *["relu"] * (activation == "relu")]
        for dtype in names["dtype"] for layout in names["layout"] for activation in names["activation"]
    )  # fmt: skip


def test_a_run_ends_in_a_sentence_that_says_how_many_times_as_fast_and_that_all_was_checked():
    def row(name, layer, pass_name, **ratios):
        return records.Row(
            workload=name, shape=(2, 3), dtype="float32", layout="nchw", activation=None, residual=False, layer=layer,
            approach="batch", pass_name=pass_name, status="ok", median=1.0, p10=1.0, p90=1.0, of_copy=1.0,
            ratios=ratios,
        )  # fmt: skip

    rows = [
        row("a", "jnp", "fwd", equinox=0.5, flax=1.0), row("b", "jnp", "fwd", equinox=0.125, flax=1.0),
        row("a", "jnp", "fwd+bwd", equinox=0.8), row("b", "jnp", "fwd+bwd", equinox=0.8),
        row("a", "other", "fwd", equinox=0.01), row("a", "equinox", "fwd", equinox=1.0),
    ]  # fmt: skip
    assert report.sentence(rows, ("equinox", "flax"), lambda workload: "jnp") == (
        "Here bn_fused is 4.00 times forward and 1.25 times both ways as fast as equinox; 1.00 times forward as fast "
        "as flax (the geometric mean of 2 workloads), and every number was checked against float64."
    )
    assert report.sentence(rows, ("torch",), lambda workload: "jnp") == ""
    assert "at this workload" in report.sentence(rows[:1], ("equinox",), lambda workload: "jnp")


def test_torch_whose_threads_and_xlas_disturb_each_other_is_refused(monkeypatch):
    """Twice the smallest time is noise, a hundred times is none of what torch computes."""
    key = suite.Key("torch", "batch", "fwd", False)
    assert suite._disturbed(key, timing.Samples(np.array([1e-5, 2e-5, 2e-5]))) == ""
    assert suite._disturbed(key._replace(layer="jnp"), timing.Samples(np.array([1e-5, 1e-3, 1e-3]))) == ""
    assert "OMP_NUM_THREADS" in suite._disturbed(key, timing.Samples(np.array([1e-5, 1e-3, 1e-3])))


@pytest.mark.parametrize(
    "options",
    [
        ("--dtype", "bfloat16", "--layout", "nhwc", "--activation", "relu", "--residual"),
        *(
            pytest.param(options, marks=ON_THE_NEWEST_JAX)
            for options in (
                ("--approach", "ema", "--approach", "ema_compatibility", "--cold"),
                ("--devices", "4", "--sync", "--against", "equinox", "--against", "jnp"),
                ("--dtype", "float64"),
            )
        ),
    ],
    ids=" ".join,
)
def test_a_run_with_options_passes_its_checks(options, capsys, request, standard_promotion):
    request.addfinalizer(lambda before=jax.config.jax_enable_x64: jax.config.update("jax_enable_x64", before))
    assert bn_bench(*SMALL, "--pass", "fwd", "--pass", "bwd", "--pass", "fwd+bwd", *options) == 0
    out = capsys.readouterr().out
    assert "every check passed" in out
    assert ("exchanged B" in out) == ("/ no sync" in out) == ("--devices" in options)
    assert ("each with statistics of its own" in " ".join(out.split())) == ("--sync" in options)


@on_the_newest_jax
def test_what_sharing_statistics_costs_is_in_every_file_and_a_run_from_before_is_compared_with_it(tmp_path, capsys):
    files = {kind: tmp_path / f"run.{kind}" for kind in ("json", "csv", "markdown")}
    named = [argument for kind, path in files.items() for argument in (f"--{kind}", str(path))]
    assert bn_bench(*SMALL, "--devices", "2", "--sync", *named) == 0
    run = records.load(files["json"])
    ratios = [row.sync_ratio for row in run.rows]
    assert len(ratios) == 4 and all(ratio > 0 for ratio in ratios)
    rows = list(csv.DictReader(files["csv"].read_text().splitlines()))
    assert [float(row["sync_ratio"]) for row in rows] == ratios
    heading, *lines = [
        line.split(" | ") for line in files["markdown"].read_text().splitlines() if line.startswith("| ")
    ]
    place = heading.index("/ no sync")
    assert [line[place] for line in lines] == [f"{ratio:.2f}" for ratio in ratios]
    # As it was saved before there was the field.
    content = json.loads(files["json"].read_text())
    for row in content["rows"]:
        del row["sync_ratio"]
    older = tmp_path / "older.json"
    older.write_text(json.dumps(content))
    capsys.readouterr()
    assert bn_bench("compare", str(older), str(files["json"])) == 0
    assert "differs" not in capsys.readouterr().out


def test_the_recorded_runs_are_read_and_compared(capsys):
    recorded = sorted((ROOT / "bench" / "results" / "cpu-intel-r-xeon-r-processor-2-cores").glob("*.json"))
    assert recorded
    for path in recorded:
        assert bn_bench("compare", str(path), str(path)) == 0, capsys.readouterr().err


def test_few_rounds_and_small_arrays_are_said(saved):
    rows = records.load(saved).rows
    first, few, small = report.timing_lines(rows, cold=False)
    assert "warm caches; 5 rounds" in first and "--seconds" in few and "small" in small
    enough = [row.model_copy(update={"rounds": report.FEW_ROUNDS, "shape": (64, 256, 1)}) for row in rows]
    (only,) = report.timing_lines(enough, cold=True)
    assert "cold caches" in only


def test_an_interrupted_run_keeps_the_finished_rows_in_the_files_too(monkeypatch, capsys, tmp_path):
    run_workload = suite.run_workload

    def interrupted(workload, settings, progress):
        if workload.shape == (6, 3):
            raise KeyboardInterrupt
        return run_workload(workload, settings, progress)

    monkeypatch.setattr(suite, "run_workload", interrupted)
    path = tmp_path / "run.json"
    assert bn_bench(*SMALL, "--shape", "6,3", "--shape", "4,2", "--json", str(path)) == 130
    assert "interrupted: 4 rows are finished" in capsys.readouterr().out
    run = records.load(path)
    assert run.interrupted and {row.shape for row in run.rows} == {(8, 4, 5, 3)} and len(run.rows) == 4


# What is saved


def test_a_saved_run_reads_back_as_it_was_and_says_what_it_ran_on(saved):
    run = records.load(saved)
    assert records.Run.model_validate_json(records.to_json(run)) == run
    assert run.environment.platform == jax.default_backend()
    assert run.environment.versions["jax"] == jax.__version__
    assert run.rivals == ("equinox", "jnp") and not run.interrupted
    for row in run.rows:
        assert row.status == "ok" and row.p10 <= row.median <= row.p90
        assert row.bandwidth == pytest.approx(row.nbytes / row.median)
        assert row.nbytes == row.at.passes(row.pass_name) * 4 * 8 * 4 * 5 * 3
        assert row.error <= row.limit
        assert row.ratios[row.layer] == 1


def test_csv_and_markdown_have_every_row(tmp_path, capsys):
    files = [tmp_path / "run.csv", tmp_path / "run.md"]
    assert bn_bench(*SMALL, "--csv", str(files[0]), "--markdown", str(files[1])) == 0
    header, *rows = csv.reader(files[0].read_text().splitlines())
    assert len(rows) == 4 and {len(row) for row in rows} == {len(header)}
    assert header[-1] == "ratio_to_equinox" and "median_s" in header
    assert all(row[header.index("shape")] == "8,4,5,3" for row in rows)
    table = [line for line in files[1].read_text().splitlines() if line.startswith("|")]
    assert len(table) == 2 + 4 and len({line.count("|") for line in table}) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content.update(schema_version=99), "version 99"),
        (lambda content: content.pop("schema_version"), "no run of bn-bench"),
        (lambda content: content.update(kind="step"), "was saved by bn-bench step, and not by bn-bench run"),
        (lambda content: content["rows"][0].update(median="fast"), "rows.0.median"),
        (lambda content: content.update(surprise=1), "surprise"),
    ],
    ids=["another version", "no version", "another command", "a wrong type", "an unknown field"],
)
def test_a_file_that_is_no_run_is_refused_in_one_line(saved, change, said, capsys):
    content = json.loads(saved.read_text())
    change(content)
    saved.write_text(json.dumps(content))
    assert bn_bench("compare", str(saved), str(saved)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err


def test_text_that_is_no_json_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "run.json").write_text("not JSON")
    assert bn_bench("compare", str(tmp_path / "run.json"), str(tmp_path / "run.json")) == 2
    assert "is not JSON" in capsys.readouterr().err


def test_the_plot_is_a_png_with_a_bar_for_every_row(saved, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    from bn_fused.bench import plots

    drawn, texts = {}, []
    bar, text = Axes.barh, Axes.text

    def counting(self, places, lengths, *arguments, label, **settings):
        drawn.setdefault(label, []).append(list(lengths))
        return bar(self, places, lengths, *arguments, label=label, **settings)

    def writing(self, x, y, words, **settings):
        texts.append(words)
        return text(self, x, y, words, **settings)

    monkeypatch.setattr(Axes, "barh", counting)
    monkeypatch.setattr(Axes, "text", writing)
    run = records.load(saved)
    first = run.rows[0]
    absent = first.model_copy(update=dict(layer="flax", status="missing", median=None, of_copy=None))
    spread = first.model_copy(update=dict(p90=1e6 * first.median))
    plots.plot_run(run.model_copy(update={"rows": (spread, *run.rows[1:], absent)}), str(tmp_path / "run.png"))
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    # Bars begin at the copy's time.
    times = {(row.layer, row.pass_name): 1 / row.of_copy for row in run.rows}
    assert drawn == {
        called: [[times.get((layer, name), 1) - 1] for name in ("fwd", "fwd+bwd")]
        for called, layer in {"bn_fused (jnp)": "jnp", "equinox": "equinox", "flax": "flax"}.items()
    }
    assert sorted(texts) == sorted(
        [*(f"{one:.{1 if one >= 10 else 2}f}" for one in times.values()), "missing", "not run"]
    )


# compare


def altered(path, **changes):
    run = records.load(path)
    environment = run.environment.model_copy(update=changes.pop("environment", {}))
    other = path.with_name("other.json")
    other.write_text(records.to_json(run.model_copy(update=changes | {"environment": environment})))
    return str(other)


def test_compare_gives_the_ratio_of_every_row_and_names_what_differs(saved, capsys):
    run = records.load(saved)
    slower = [
        row.model_copy(update={"median": 2 * row.median, "p10": 2 * row.p90, "p90": 3 * row.p90}) for row in run.rows
    ]
    versions = run.environment.versions | {"jax": "99.0"}
    other = altered(saved, rows=tuple(slower), environment={"versions": versions})
    assert bn_bench("compare", str(saved), other) == 0
    out = capsys.readouterr().out
    assert f"differs: jax: {jax.__version__} / 99.0" in out
    assert len(re.findall(r" 2\.00 .*\* *$", out, re.MULTILINE)) == len(run.rows)
    assert f"{len(run.rows)} of {len(run.rows)} rows are apart" in out
    assert bn_bench("compare", str(saved), str(saved)) == 0
    out = capsys.readouterr().out
    assert "differs" not in out and len(re.findall(r" shape .* 1\.00 ", out)) == len(run.rows)
    assert "no row is apart" in out and "*" not in out


def test_compare_shows_rows_that_only_one_run_has(saved, capsys):
    run = records.load(saved)
    assert bn_bench("compare", str(saved), altered(saved, rows=run.rows[1:])) == 0
    assert capsys.readouterr().out.count("not run") == 1


def test_compare_says_that_two_runs_have_no_row_in_common_and_exits_with_2(saved, capsys):
    run = records.load(saved)
    others = [row.model_copy(update={"shape": (8, 4, 5, 7)}) for row in run.rows]
    assert bn_bench("compare", str(saved), altered(saved, rows=tuple(others))) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no row in common" in said and "(8,4,5,3)" in said and "(8,4,5,7)" in said
    assert bn_bench("compare", altered(saved, rows=()), str(saved)) == 2
    assert "no rows" in capsys.readouterr().err


def test_compare_refuses_different_devices_unless_forced(saved, capsys):
    other = altered(saved, environment={"device": "NVIDIA H200"})
    assert bn_bench("compare", str(saved), other) == 2
    assert "NVIDIA H200" in capsys.readouterr().err
    assert bn_bench("compare", str(saved), other, "--force") == 0


def test_compare_exits_with_1_if_a_check_fails_that_did_not_before(saved, capsys):
    run = records.load(saved)
    failed = run.rows[0].model_copy(update={"status": "failed", "reason": "y is off", "median": None})
    other = altered(saved, rows=(failed, *run.rows[1:]))
    assert bn_bench("compare", str(saved), other) == 1
    assert "y is off" in capsys.readouterr().out
    assert bn_bench("compare", other, str(saved)) == 0


# report


def test_report_puts_the_newest_run_of_a_device_and_suite_into_the_readme(saved, tmp_path, capsys):
    folder, readme = tmp_path / "results", tmp_path / "README.md"
    readme.write_text(f"before\n{performance.BEGIN}\nold\n{performance.END}\nafter\n")
    run = records.load(saved)
    older = altered(saved, date="2001-01-01T00:00:00+00:00")
    assert (
        bn_bench("report", "--results", str(folder), "--add", str(saved), "--add", older, "--readme", str(readme)) == 0
    )
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert run.date[:10] in text and "2001" not in text and run.environment.device in text
    (row,) = [line for line in text.splitlines() if line.startswith("| shape")]
    by_pass = {row.pass_name: row for row in run.rows if row.layer == "jnp"}
    assert [cell.strip() for cell in row.strip("|").split("|")][2:] == [
        *(f"{by_pass[name].ratios['equinox']:.2f}" for name in ("fwd", "fwd+bwd")),
        *(f"{100 * by_pass[name].of_copy:.0f} %" for name in ("fwd", "fwd+bwd")),
    ]
    assert bn_bench("report", "--results", str(folder), "--readme", str(readme), "--check") == 0
    readme.write_text(text.replace("| jnp |", "| other |"))
    capsys.readouterr()
    assert bn_bench("report", "--results", str(folder), "--readme", str(readme), "--check") == 1
    assert "not up to date" in capsys.readouterr().err


def test_report_has_a_column_for_each_library_and_pass(saved, tmp_path):
    slower = {"equinox": 0.5, "flax": 1.25}
    rows = tuple(row.model_copy(update={"ratios": slower}) for row in records.load(saved).rows if row.layer == "jnp")
    added = altered(saved, rows=rows, rivals=("equinox", "flax", "jnp"))
    assert bn_bench("report", "--results", str(tmp_path), "--add", added) == 0
    lines = performance.section(performance.recorded(tmp_path), "results").splitlines()
    (heads,) = [line for line in lines if line.startswith("| workload")]
    (cells,) = [line for line in lines if line.startswith("| shape")]
    by_column = dict(
        zip(*([cell.strip() for cell in line.strip("|").split("|")] for line in (heads, cells)), strict=True)
    )
    ratios = {"fwd / equinox": "0.50", "fwd+bwd / equinox": "0.50", "fwd / flax": "1.25", "fwd+bwd / flax": "1.25"}
    assert {name: value for name, value in by_column.items() if "/" in name} == ratios


def test_report_records_no_run_that_failed_or_was_interrupted(saved, tmp_path, capsys):
    for changes in (
        {"interrupted": True},
        {"rows": (records.load(saved).rows[0].model_copy(update={"status": "failed"}),)},
    ):
        assert bn_bench("report", "--results", str(tmp_path / "results"), "--add", altered(saved, **changes)) == 2
        assert "is not recorded" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_report_says_in_one_line_that_nothing_is_recorded(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert bn_bench("report", "--results", str(folder)) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and str(folder) in said and "--add" in said


def test_report_says_when_the_readme_has_no_place_for_it(saved, tmp_path, capsys):
    (tmp_path / "README.md").write_text("nothing")
    arguments = ("--results", str(tmp_path / "results"), "--add", str(saved), "--readme", str(tmp_path / "README.md"))
    assert bn_bench("report", *arguments) == 2
    assert "bn-bench report" in capsys.readouterr().err


def test_the_readmes_performance_section_is_that_of_the_recorded_runs(capsys):
    arguments = ("--results", str(ROOT / "bench" / "results"), "--readme", str(ROOT / "README.md"))
    assert bn_bench("report", *arguments, "--check") == 0, capsys.readouterr().err
