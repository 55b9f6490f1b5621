"""The wheel and the sdist, and the wheel in an environment that holds what it depends on and nothing else."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import flipout

ROOT = Path(__file__).parent.parent

_spec = importlib.util.spec_from_file_location("release", ROOT / "tools/release.py")
release = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(release)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel, made from the sdist, and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    release.build(ROOT, folder)
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def test_they_hold_what_they_should_and_nothing_else(built):
    assert not release.problems(*built)


def test_the_sdist_gives_the_wheel_that_the_tree_gives(built, tmp_path):
    release.build(ROOT, tmp_path, "--wheel")
    assert release.in_wheel(next(tmp_path.glob("*.whl"))) == release.in_wheel(built[0])


def test_one_version_everywhere(built):
    version = flipout.__version__
    assert all(path.name.startswith(f"flipout-{version}") for path in built)
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def closure(*names):
    """The distributions of these names and of all that they depend on here, extras left out."""
    found, todo = {}, list(names)
    while todo:
        name = todo.pop()
        if name not in found:
            found[name] = importlib.metadata.distribution(name)
            wanted = [Requirement(text) for text in found[name].requires or ()]
            todo += [each.name for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]
    return found.values()


@pytest.fixture(scope="module")
def bare(built, tmp_path_factory):
    """The python of a fresh environment: the wheel, and links to the packages that its metadata name, which are installed here."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = next(folder.glob("lib/python*/site-packages"))
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(built[0])]
    release.run(command)
    (own,) = importlib.metadata.distributions(name="flipout", path=[str(site)])
    for distribution in closure(*(Requirement(text).name for text in own.requires if "extra ==" not in text)):
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                os.symlink(distribution.locate_file(top), site / top)
    return python


def test_the_first_example_runs_where_the_wheel_is_installed_and_the_command_line_names_its_extra(bare):
    release.meet(bare)


def test_importing_the_library_loads_torch_numpy_and_itself():
    """Nothing that makes `import flipout` slower than `import torch`: how much slower it is, benchmarks/imports.py measures."""
    code = "import sys, torch; before = set(sys.modules); import flipout; print(*sorted(set(sys.modules) - before))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    others = {name for name in found.stdout.split() if name.partition(".")[0] not in {"flipout", "numpy", *sys.stdlib_module_names}}
    assert not others


@pytest.mark.parametrize(
    ("name", "module", "package", "extra"), [("RayWorkers", "ray", "ray", "ray"), ("Rollouts", "rollouts", "gymnasium", "rl")]
)
def test_what_needs_an_extra_names_it(name, module, package, extra, monkeypatch):
    monkeypatch.delitem(sys.modules, f"flipout.evolution.{module}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)  # what the import system takes for a package that is not there
    with pytest.raises(ModuleNotFoundError, match=rf"flipout\.evolution\.{name} needs {package}.*'flipout\[{extra}\]'"):
        getattr(flipout.evolution, name)


def test_what_is_installed_is_typed(bare):
    site = next(bare.parent.parent.glob("lib/python*/site-packages"))
    assert (site / "flipout" / "py.typed").exists()
    assert not (site / "tests").exists()
