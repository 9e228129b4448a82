"""Examples of the documents run as they stand, on 4 virtual devices; what documents and programs name exists."""

import importlib
import os
import re
import subprocess
import sys

import pytest

from support import ROOT
from support.versions import also_on_the_newest_jax

DOCUMENTS = ("README.md", "docs/devices.md", "docs/flax.md", "docs/migrate.md", "docs/kernels-gpu.md")
NEEDED = {"docs/flax.md": "flax"}  # what a document's examples import, of an extra
FLAGS = "--xla_force_host_platform_device_count=4"


@pytest.mark.parametrize("document", [DOCUMENTS[0], *also_on_the_newest_jax(*DOCUMENTS[1:])])
def test_the_examples_run_one_after_the_other(document, tmp_path):
    if document in NEEDED:
        pytest.importorskip(NEEDED[document], reason=f"{NEEDED[document]} is not installed: the extra of that name")
    text = (ROOT / document).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 2
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(blocks)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if any("print(" in block for block in blocks):
        assert done.stdout.strip()


def texts(*patterns):
    """The texts of the repository's files of these names, by path."""
    return {path: path.read_text(encoding="utf-8") for pattern in patterns for path in ROOT.glob(pattern)}


def test_every_file_that_a_document_names_exists():
    named = {
        (path.name, file)
        for path, text in texts("*.md", "docs/**/*.md").items()
        for file in re.findall(r"\b(?:bn_fused|kernels|bench|tests|docs)/[\w/]+\.\w+", text)
    }
    assert len(named) > 10
    assert [pair for pair in sorted(named) if not (ROOT / pair[1]).exists()] == []


def test_every_picture_and_file_that_a_document_links_to_exists():
    links = {
        (path, link)
        for path, text in texts("*.md", "docs/**/*.md", "bench/**/*.md").items()
        for link in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    }
    assert any(link.endswith(".png") for _, link in links)
    assert [(path.name, link) for path, link in sorted(links) if not (path.parent / link).exists()] == []


def test_every_picture_is_shown_in_a_document():
    shown = "\n".join(texts("*.md", "docs/**/*.md").values())
    pictures = [path.name for path in ROOT.glob("docs/**/*.png")]
    assert pictures and [name for name in pictures if f"{name})" not in shown] == []


def test_every_import_in_a_document_or_in_a_program_within_a_test_is_of_something_that_exists():
    """Programs that tests run as text: those that need a chip or a compiler are run where it is, which is rarely."""
    imports = {
        (path.name, module, name)
        for path, text in texts("*.md", "docs/**/*.md", "tests/**/*.py").items()
        for module, names in re.findall(r"^\W*from (bn_fused[\w.]*) import ([\w, ]+)", text, re.MULTILINE)
        for name in re.split(r"\s*,\s*", re.sub(r" as \w+", "", names.strip(" ,")))
    }
    assert len(imports) > 50
    missing = []
    for where, module, name in sorted(imports):
        try:
            exists = hasattr(importlib.import_module(module), name) or importlib.util.find_spec(f"{module}.{name}")
        except ModuleNotFoundError as error:
            exists = not error.name.startswith("bn_fused")  # an extra that is not installed
        if not exists:
            missing.append((where, module, name))
    assert missing == []
