"""The wheel (what it holds, what it installs, that it imports from there), and the README."""

import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

from support import ROOT

# The repository's folders and the packages they are installed as.
PACKAGES = {"bn_fused": "bn_fused", "kernels": "bn_fused/kernels", "bench": "bn_fused/bench"}


def run(*command, cwd):
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True, timeout=300).stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built in a copy of the sources: a build leaves files beside them."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-q", "-w", out, ".", cwd=source)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def site_packages(wheel, tmp_path_factory):
    """A folder with the wheel installed into it."""
    target = tmp_path_factory.mktemp("site-packages")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "--no-deps", "--no-index", "-q", "--target", target, wheel, cwd=target)
    return target


def test_the_wheel_puts_only_bn_fused_and_its_metadata_into_site_packages(files):
    top_level = {name.split("/")[0] for name in files}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"bn_fused"}


def test_the_wheel_holds_every_module_of_the_three_folders(files):
    expected = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, package in PACKAGES.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {name for name in files if name.endswith(".py")} == expected


def test_the_wheel_says_that_it_is_typed_and_carries_the_licence(files):
    assert "bn_fused/py.typed" in files
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in files)


def test_the_installed_wheel_imports_from_where_it_is_installed(site_packages, tmp_path):
    # -P and a neutral directory keep the repository off the path; the folder comes before an editable
    # install.
    program = (
        f"import sys; sys.path.insert(0, {str(site_packages)!r})\n"
        "import bn_fused, bn_fused.kernels, bn_fused.bench.workloads\n"
        "print(bn_fused.__version__)\n"
        "for module in (bn_fused, bn_fused.kernels, bn_fused.bench.workloads): print(module.__file__)"
    )
    version, *paths = run(sys.executable, "-P", "-c", program, cwd=tmp_path).splitlines()
    assert len(paths) == 3
    for path in paths:
        assert pathlib.Path(path).is_relative_to(site_packages)
    assert list(site_packages.glob(f"bn_fused-{version}.dist-info"))


def test_the_runtime_dependencies_are_jax_jaxlib_equinox_and_jaxtyping():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert sorted(name.split(">=")[0] for name in project["dependencies"]) == [
        "equinox",
        "jax",
        "jaxlib",
        "jaxtyping",
    ]


def test_importing_the_package_needs_none_of_the_extras(site_packages, tmp_path):
    extras = (
        "click",
        "rich",
        "sklearn",
        "matplotlib",
        "hypothesis",
        "pytest",
        "beartype",
        "jax_triton",
        "torch",
    )
    program = (
        f"import sys; sys.path.insert(0, {str(site_packages)!r})\n"
        f"extras = {extras!r}\n"
        "for name in extras: sys.modules[name] = None\n"
        "import bn_fused, bn_fused.kernels, bn_fused.bench\n"
        "print('imported')"
    )
    assert run(sys.executable, "-P", "-c", program, cwd=tmp_path).strip() == "imported"


def test_ci_runs_the_commands_of_the_readme_as_they_stand_there():
    readme = (ROOT / "README.md").read_text()
    commands = [line for line in readme.splitlines() if line.startswith("python3 -m venv .venv && ")]
    assert len(commands) == 2
    ci = (ROOT / ".ci" / "run").read_text()
    for command in commands:
        assert f"\n{command} || exit 1\n" in ci
    deviceless = (
        "\n.venv/bin/pip install -q --no-deps $(.venv/bin/python -m bn_fused.bench.deviceless cuda tpu triton)\n"
    )
    assert deviceless in readme
    assert deviceless in ci


def test_everybody_checks_style_with_the_same_ruff():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["lint"]
    (version,) = re.findall(r"rev: v(\S+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert extra == [f"ruff=={version}"]


def python_blocks_of_the_readme():
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_network_of_the_readme_is_that_of_the_script():
    network = python_blocks_of_the_readme()[0]
    script = (ROOT / "bench" / "digits.py").read_text()
    parts = network.strip().split("\n\n\n")
    assert len(parts) > 4 and any(part.startswith("class Classifier") for part in parts)
    for part in parts[1:]:
        assert f"\n{part}\n" in script
