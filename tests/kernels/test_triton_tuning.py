"""Tuned configurations of the backend `triton`: which file is used, and which is not."""

import dataclasses
import json
import os
import warnings

import pytest

import bn_fused
from bn_fused.kernels.backends.triton import limits, tuning as triton_tuning
from bn_fused.kernels.backends.triton.plan import Config, make_plan
from bn_fused.kernels.backends.triton.tuning import FOLDER, VARIABLE, Entry
from bn_fused.kernels.chips import CHIPS
from bn_fused.kernels.target import Problem, Target

H200 = CHIPS["h200"]
KIND = H200.device_kind
TUNED = Config(row_bytes=512, values=8, warps=8, stages=3, blocks_per_core=2)
OTHER = dataclasses.replace(TUNED, stages=1)


def planned(rows, channels=64, dtype="bfloat16", groups=1):
    return triton_tuning.plan(Problem(groups, rows, channels, dtype), Target("cuda", H200))


def with_config(config, rows, channels=64, itemsize=2, groups=1):
    return make_plan(groups, rows, channels, itemsize, H200, config)


def text(*entries, **changes):
    document = json.loads(triton_tuning.to_json(KIND, entries, {"triton": "3.6.0"}))
    return json.dumps(document | changes)


def entry(rows=100352, channels=64, config=TUNED, dtype="bfloat16"):
    return Entry(1, rows, channels, dtype, config, 1e-4, 2e-4)


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """A folder that BN_FUSED_TUNING names."""
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return tmp_path / "nvidia-h200.json"


def test_without_a_file_the_heuristic_is_used(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(triton_tuning, "FOLDER", tmp_path / "none")
    assert planned(100352) == with_config(None, 100352)


@pytest.mark.parametrize("where", ["file", "folder", "package"])
def test_a_tuned_configuration_is_used_wherever_the_file_is(where, tmp_path, monkeypatch):
    path = tmp_path / ("mine.json" if where == "file" else "nvidia-h200.json")
    path.write_text(text(entry()))
    if where == "package":
        monkeypatch.delenv(VARIABLE, raising=False)
        monkeypatch.setattr(triton_tuning, "FOLDER", tmp_path)
    else:
        monkeypatch.setenv(VARIABLE, str(path if where == "file" else tmp_path))
    assert planned(100352) == with_config(TUNED, 100352) != with_config(None, 100352)


def test_a_plan_names_the_file_that_it_is_from(tuned):
    tuned.write_text(text(entry()))
    plan, other = planned(100352), planned(100352, channels=128)
    assert plan.tuning == str(tuned) and f"tuning='{tuned}'" in repr(plan)
    assert other.tuning == "by rule"
    # Which file it is from does not make it another plan.
    moved = dataclasses.replace(plan, tuning="elsewhere.json")
    assert moved == plan and hash(moved) == hash(plan)


def test_explain_shows_it_and_the_files_in_use_are_listed(tuned, monkeypatch):
    monkeypatch.setattr(limits, "missing", lambda platform: None)
    tuned.write_text(text(entry()))
    choice = bn_fused.explain((100352, 64), "bfloat16", target="h200", backend="triton")
    assert str(tuned) in str(choice)
    packaged = tuned.parent / "package" / tuned.name
    packaged.parent.mkdir()
    packaged.write_text(text(entry(), entry(10)))
    monkeypatch.setattr(triton_tuning, "FOLDER", packaged.parent)
    assert triton_tuning.in_use(KIND) == [
        f"{tuned} (by BN_FUSED_TUNING), entries: 1",
        f"{packaged} (from the package), entries: 2",
    ]
    tuned.write_text("{")
    assert triton_tuning.in_use(KIND)[0] == f"{tuned} (by BN_FUSED_TUNING) is ignored: it is not JSON"
    assert triton_tuning.in_use("Some GPU")[1:] == ["no file for Some GPU: plans are made by rule"]


def test_it_is_used_for_about_as_many_rows_and_for_nothing_else(tuned):
    tuned.write_text(text(entry(1000, config=OTHER), entry(1500)))
    assert {rows: planned(rows) for rows in (500, 1000, 1200, 1500, 3000)} == {
        500: with_config(OTHER, 500),
        1000: with_config(OTHER, 1000),
        1200: with_config(OTHER, 1200),
        1500: with_config(TUNED, 1500),
        3000: with_config(TUNED, 3000),
    }
    for other in ({"rows": 499}, {"rows": 3001}, {"channels": 128}, {"dtype": "float16"}, {"groups": 2}):
        given = {"rows": 1000, "channels": 64, "dtype": "bfloat16", "groups": 1} | other
        sizes = (given["rows"], given["channels"], 2, given["groups"])
        assert planned(**given) == with_config(None, *sizes), other


DAMAGED = {
    "nothing": (None, "it cannot be read"),
    "not JSON": ("{", "it is not JSON"),
    "JSON too deep": ("[" * 200_000, "it is not JSON"),
    "a time that is none": (
        text(entries=[dataclasses.asdict(entry()) | {"seconds": -1.0}]),
        "an entry's seconds is -1",
    ),
    "a time of text": (
        text(entries=[dataclasses.asdict(entry()) | {"heuristic_seconds": "1"}]),
        "heuristic_seconds is '1'",
    ),
    "not text": (b"\xff\xfe\x00", "it is not JSON"),
    "a list": ("[]", "not one of the backend"),
    "of another backend": (text(entry(), backend="other"), "not one of the backend"),
    "another format": (text(entry(), format=0), "its format is 0"),
    "stale": (text(entry(), revision=0), "its revision is 0, not .*bn-bench tune"),
    "of another device": (text(entry(), device_kind="NVIDIA A100-SXM4-80GB"), "its device_kind is 'NVIDIA A100"),
    "no entries": (text(entries=None), "no entries"),
    "an entry that is none": (text(entries=[3]), "an entry is 3"),
    "a field too many": (text(entries=[dataclasses.asdict(entry()) | {"more": 1}]), "an entry is"),
    "a size of text": (text(entries=[dataclasses.asdict(entry()) | {"rows": "100352"}]), "an entry's rows is '100352'"),
    "a size of 0": (text(entries=[dataclasses.asdict(entry()) | {"rows": 0}]), "an entry's rows is 0"),
    "seven warps": (text(entry(config=dataclasses.replace(TUNED, warps=7))), "an entry's warps is 7"),
    "slabs of half a byte": (
        text(entry(config=dataclasses.replace(TUNED, slab_bytes=0.5))),
        "an entry's slab_bytes is 0.5",
    ),
    "slabs of less than nothing": (
        text(entry(config=dataclasses.replace(TUNED, slab_bytes=-1))),
        "an entry's slab_bytes is -1",
    ),
    "too many stages": (text(entry(config=dataclasses.replace(TUNED, stages=9))), "an entry's stages is 9"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_file_that_is_no_use_is_ignored_with_one_warning(name, tmp_path, monkeypatch):
    content, reason = DAMAGED[name]
    path = tmp_path / "tuning.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setenv(VARIABLE, str(path))
    with pytest.warns(UserWarning, match=f"tuning.json is ignored: .*{reason}") as warned:
        assert planned(100352) == with_config(None, 100352)
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert planned(100352) == with_config(None, 100352)
        assert planned(50176) == with_config(None, 50176)


def test_what_cannot_be_a_path_is_ignored_with_a_warning(monkeypatch):
    monkeypatch.setenv(VARIABLE, "x" * 5000)
    with pytest.warns(UserWarning, match="is ignored: it cannot be read"):
        assert planned(100352) == with_config(None, 100352)


def test_a_folder_without_a_file_for_the_device_is_named(tuned):
    (tuned.parent / "nvidia-a100.json").write_text(text(entry()))
    folder = tuned.parent
    assert triton_tuning.in_use(KIND)[0] == f"{folder} (by BN_FUSED_TUNING) has no nvidia-h200.json"


def test_a_file_that_is_mended_is_read_again(tuned):
    tuned.write_text("{")
    with pytest.warns(UserWarning, match="is ignored"):
        planned(100352)
    tuned.write_text(text(entry()))
    os.utime(tuned, ns=(1, 1))  # whatever the clock's resolution is
    assert planned(100352) == with_config(TUNED, 100352)


def test_the_files_in_the_package_can_be_used():
    for path in FOLDER.glob("*.json"):
        kind = json.loads(path.read_text())["device_kind"]
        assert path.name == triton_tuning.file_name(kind) and triton_tuning.read(path, kind)
