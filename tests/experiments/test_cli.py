"""The command line: what it prints, what it refuses, and what it says where an extra is missing."""

import builtins
import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import flipout
from flipout_experiments.cli import main
from flipout_experiments.commands.app import app
from flipout_experiments.paper import demo


def run(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_demo_prints_tables_and_saves_its_results(tmp_path, monkeypatch):
    small = demo.DemoSettings(
        batch_sizes=(1, 4), shared_draws=4, flipout_draws=4, training_steps=2, training_batch=4, accuracy=0.5, seed=5
    )
    monkeypatch.setattr(demo.DemoSettings, "quick", lambda self: small)
    found = run("demo", "--quick", "--seed", "5", "--out", str(tmp_path / "out"))
    assert found.exit_code == 0, found.output
    for text in ("Variance of the gradient", "Relative to independent", "Slope", "noisy training run", "mlxtend", "demo.png"):
        assert text in found.output
    assert json.loads((tmp_path / "out" / "result.json").read_text())["settings"]["seed"] == 5


@pytest.mark.parametrize("arguments", [("demo", "--seed", "-1"), ("demo", "--seed", "x"), ("demmo",), ("demo", "--nonsense")])
def test_refuses_what_it_does_not_know(arguments):
    assert run(*arguments).exit_code == 2


def test_version_and_help():
    assert run("--version").output.strip() == flipout.__version__
    assert "demo" in run("--help").output


def call_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["flipout", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code


def test_errors_of_the_library_are_one_line(monkeypatch, tmp_path):
    code = call_main(monkeypatch, "demo", "--device", "cuda:99", "--out", str(tmp_path))
    assert code.startswith("flipout: device 'cuda:99' cannot be used here")


@pytest.mark.parametrize("package", ["typer", "rich", "matplotlib"])
def test_names_the_extra_that_is_missing(package, monkeypatch, tmp_path):
    real = builtins.__import__

    def refuse(name, *rest):
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest)

    for module in [m for m in sys.modules if m.partition(".")[0] == package or m.startswith("flipout_experiments.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", refuse)
    code = call_main(monkeypatch, "demo", "--quick", "--out", str(tmp_path))
    assert code == f"flipout: the command line needs {package}, which is not installed: pip install 'flipout[experiments]'"


def test_other_missing_modules_are_not_hidden(monkeypatch):
    monkeypatch.setitem(sys.modules, "flipout_experiments.commands.app", None)
    monkeypatch.setattr(sys, "argv", ["flipout"])
    with pytest.raises(ModuleNotFoundError):
        main()


def test_python_m_flipout_and_what_importing_the_library_loads():
    found = subprocess.run([sys.executable, "-m", "flipout", "--version"], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == flipout.__version__
    heavy = "{'matplotlib', 'typer', 'rich', 'mlxtend', 'pandas', 'scipy'}"
    code = f"import sys, flipout, flipout.variance, flipout.data; sys.exit(str({heavy} & set(sys.modules) or ''))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert loaded.stderr.strip() == ""
