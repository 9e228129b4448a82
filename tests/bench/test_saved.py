"""The JSON that commands save: one envelope around the rows, and files of earlier versions."""

import json

import pytest

from bn_fused.bench import saved
from bn_fused.bench.audit import rows
from bn_fused.bench.run import records

from support import ROOT

RESULTS = ROOT / "bench" / "results"
AUDITS = sorted(RESULTS.glob("audit/*/*.json"))
RUNS = sorted(RESULTS.glob("cpu-*/*.json"))


@pytest.mark.parametrize("path", AUDITS, ids=lambda path: path.stem)
def test_a_recorded_audit_is_written_with_all_that_was_read(path):
    text = path.read_text(encoding="utf-8")
    recorded = rows.load_document(text)
    around = {name: recorded[name] for name in ("command", "versions", "interrupted")}
    written = rows.load_document(rows.to_json(rows.load(text), **around))
    for before, after in zip(recorded.pop("rows"), written.pop("rows"), strict=True):
        before.pop("seconds", None)  # of lowering and compiling together, as rows had it once
        assert before == {name: after[name] for name in before}
    assert recorded == written


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_recorded_run_is_written_with_all_that_was_read(path):
    recorded, written = (json.loads(text) for text in (path.read_text(), records.to_json(records.load(path))))
    assert list(recorded) == list(written)
    for before, after in zip(recorded.pop("rows"), written.pop("rows"), strict=True):
        assert before == {name: after[name] for name in before}
    assert recorded == written


def test_what_commands_save_tells_its_kind_and_version():
    for kind in (saved.RUN, saved.AUDIT, "step", "step audit"):
        text = saved.envelope(kind, {"device": "cpu"}, [{"name": "jnp"}], command="bn-bench", interrupted=True)
        document = saved.read(text)
        assert (document.kind, document.version) == (kind, saved.SCHEMA)
        assert list(document.content)[-4:] == ["command", "device", "interrupted", "rows"]
    assert {saved.read(path.read_bytes()).kind for path in AUDITS} == {saved.AUDIT}
    assert {saved.read(path.read_bytes()).kind for path in RUNS} == {saved.RUN}


@pytest.mark.parametrize("text", ["{}", "[]", "3", '{"rows": []}'])
def test_what_no_command_saved_has_no_kind(text):
    assert saved.read(text)[:2] == (None, None)


@pytest.mark.parametrize("text", ["", "{", b"\xff\xfe\x00"])
def test_what_is_not_json_is_refused_in_a_line(text):
    with pytest.raises(ValueError, match="^not JSON: .+$"):
        saved.read(text)
