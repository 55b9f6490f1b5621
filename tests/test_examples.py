"""Every example runs as a script, scaled down."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples"

#: For each example: what makes it short, what it must print, and the packages that it needs.
EXAMPLES = {
    "custom_rule": ((), "after: (64, 1)", ()),
    "ddp": (("--steps", "3"), "weights on 2 ranks equal: True", ("mlxtend",)),
    "dqn_noisy_net": (("--steps", "300", "--envs", "2"), "mean return over 20 episodes", ("stable_baselines3",)),
    "dqn_parameter_noise": (("--steps", "300", "--envs", "2"), "mean return over 20 episodes", ("stable_baselines3",)),
    "es_cartpole": (("--population", "8", "--generations", "2"), "of the mean policy over 100 episodes", ("gymnasium",)),
    "es_language_model": (("--population", "4", "--generations", "1"), "on 500 new prompts", ("transformers",)),
    "es_mnist": (("--seconds", "0.5"), "generations 0.", ("mlxtend",)),
    "huggingface_trainer": (("--steps", "3", "--width", "16"), "loads in plain transformers", ("transformers", "accelerate")),
    "lightning_module": (("--steps", "5"), "accuracy of the mean weights", ("lightning", "mlxtend")),
    "mnist_uncertainty": (("--steps", "20", "--samples", "4"), "told apart by entropy", ("mlxtend", "torchmetrics")),
    "regularized_gru": (
        ("--epochs", "1", "--characters", "2000", "--units", "8"),
        "weight drop, a mask a sequence",
        (),
    ),
    "lstm_weight_drop": (("--steps", "3", "--units", "16"), "a mask a sequence", ()),
}


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
