"""Saved audits: read again, in tables, and summed up over chips."""

import dataclasses

import pytest

from bn_fused.bench.audit.blocks import Setting
from bn_fused.bench.audit.report import columns
from bn_fused.bench.audit.rows import Passes, Row, load, to_json
from bn_fused.bench.audit.summary import summary

from support import ROOT
from support.audited import SETTING, case_for, compiled_row, run


@pytest.mark.parametrize("text", ["", "[]", '{"audit_schema_version": 99, "rows": []}'])
def test_another_versions_file_is_refused_in_a_line(text):
    with pytest.raises(ValueError, match="not JSON|reads version 1") as refused:
        load(text)
    assert "\n" not in str(refused.value)


def with_total(case, reads, writes=1.0):
    return dataclasses.replace(compiled_row(case), reads=reads, padded_reads=reads, writes=writes, padded_writes=writes)


def line_of(text, setting, layer):
    """The cells of a layer's line in the first table that has the setting."""
    lines = text.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(f"| {setting} "))
    line = next(line for line in lines[start:] if line.split("|")[2].strip() == layer)
    return [cell.strip() for cell in line.strip("|").split("|")][2:]


def test_the_summary_marks_the_fewest_passes_of_a_setting_on_a_chip():
    block = dataclasses.replace(SETTING, block="conv-bn-relu-conv")
    rows = [
        with_total(case_for("v4", "jnp"), 2.0), with_total(case_for("v4", "equinox batch"), 4.0),
        with_total(case_for("v5e", "jnp"), 4.0), with_total(case_for("v5e", "equinox batch"), 4.03),
        with_total(case_for("v5e", "no norm", setting=block), 0.5),
        with_total(case_for("v5e", "jnp", setting=block), 1.0),
        with_total(case_for("v5e", "equinox batch", setting=block), 2.0),
        Row(case_for("v4", "pallas_tpu"), "failed", "it hung"),
    ]  # fmt: skip
    text = summary("Chips", rows, [{"command": "bn-bench audit", "versions": {"jax": "1.2"}}])
    alone, inside = "alone (32,64,56,56) nchw float32", "conv-bn-relu-conv (32,64,56,56) nchw float32"
    assert line_of(text, alone, "jnp") == ["**3**", "**5**"]
    # within 2 % of the fewest
    assert line_of(text, alone, "equinox batch") == ["5", "**5.03**"]
    assert line_of(text, alone, "pallas_tpu") == ["failed", ""]
    # what a block moves without a norm is no layer's
    assert line_of(text, inside, "no norm") == ["", "1.5"] and line_of(text, inside, "jnp") == ["", "**2**"]
    assert (
        "- alone: of 2 programs the fewest passes are those of jnp in 2 (1 with no other), equinox batch in 1" in text
    )
    assert "not compiled: v4, pallas_tpu: it hung" in text and "jax 1.2" in text and "# Chips" in text


def test_saved_audits_are_read_and_summed_up_without_compiling(tmp_path, monkeypatch):
    monkeypatch.setattr("bn_fused.bench.commands.audit.audit", lambda *_, **__: pytest.fail("it compiled"))
    paths = []
    for target in ("v4", "v5e"):
        rows = [with_total(case_for(target, layer), 2.0) for layer in ("jnp", "equinox batch")]
        paths.append(tmp_path / f"{target}.json")
        text = to_json(rows, command=f"bn-bench audit --target {target}", versions={"jax": "1"}, interrupted=False)
        paths[-1].write_text(text)
    sources = [argument for path in paths for argument in ("--from", path)]
    done = run(*sources, "--summary", tmp_path / "all.md", "--json", tmp_path / "all.json", "--title", "Both")
    assert done.exit_code == 0, done.output
    assert "v4: shape" in done.output and "v5e: shape" in done.output
    text = (tmp_path / "all.md").read_text()
    assert text.startswith("# Both\n") and "--target v4" in text and "--target v5e" in text
    assert len(load((tmp_path / "all.json").read_text())) == 4
    (tmp_path / "other.json").write_text("{}")
    for path, said in ((tmp_path / "other.json", "audit_schema_version"), (tmp_path / "none.json", "No such file")):
        done = run("--from", path)
        assert done.exit_code == 2 and said in done.output.splitlines()[-1] and str(path) in done.output


@pytest.mark.parametrize(("chips", "title"), [("tpu", "a TPU"), ("gpu", "an NVIDIA GPU")])
def test_the_document_of_the_chips_is_that_of_the_recorded_audits(chips, title, tmp_path):
    recorded = sorted((ROOT / "bench" / "results" / "audit" / chips).glob("*.json"))
    assert recorded
    sources = [argument for path in recorded for argument in ("--from", path)]
    done = run(*sources, "--summary", tmp_path / "made.md", "--title", f"What each layer moves on {title}")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "made.md").read_text() == (ROOT / "docs" / f"{chips}-audit.md").read_text()


def test_what_chooses_programs_does_not_go_with_saved_rows(tmp_path):
    row = compiled_row(case_for())
    saved = tmp_path / "audit.json"
    saved.write_text(to_json([row], command="bn-bench audit", versions={}, interrupted=False))
    assert run("--from", str(saved)).exit_code == 0
    for option in (("--target", "v5e"), ("--shape", "9,9"), ("--backend", "jnp")):
        done = run("--from", str(saved), *option)
        assert done.exit_code == 2 and f"{option[0]} does not go with it" in done.output


def test_over_no_norm_is_the_difference_of_what_is_in_all():
    setting = Setting((4, 64), block="mlp")
    fields = {"padded_reads": 3.0, "padded_writes": 2.0, "padded_inside_reads": 4.0, "padded_inside_writes": 2.0}
    base = dataclasses.replace(compiled_row(case_for(layer="no norm")), padded_reads=1.0, padded_writes=1.0)
    ours = dataclasses.replace(compiled_row(case_for()), kernels=1, **fields)
    rows = [dataclasses.replace(row, case=dataclasses.replace(row.case, setting=setting)) for row in (base, ours)]
    headings, lines = columns(rows)
    cells = dict(zip(headings, lines[-1], strict=True))
    assert (cells["in all"], cells["over no norm"], cells["launches"]) == ("7R+4W", "6R+3W", "3 (1 ours)")


def test_fewer_passes_than_without_the_norm_are_a_plain_minus():
    assert str(Passes(-0.5, -1)) == "-0.5R-1W"
