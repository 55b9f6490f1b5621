"""``flipout lm``: a language model with random weights on anybody's text: trained, evaluated, and sampled from."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flipout.data import Text
from flipout.errors import ArgumentError
from flipout.regularize import Regularized
from flipout.streams import stream
from flipout_experiments.harness.environment import find_device
from flipout_experiments.harness.reproduce import choose
from flipout_experiments.harness.run import Progress, Run, silent
from flipout_experiments.language.evaluation import bits, draw_text, evaluate, perplexity
from flipout_experiments.language.models import ModelSettings, build_model
from flipout_experiments.language.settings import METHODS, unit
from flipout_experiments.language.tokens import UNKNOWN, encode, own_text, read_text, split_tokens
from flipout_experiments.language.training import TrainingSettings, train_language_model

__all__ = ["LmSettings", "Model", "lm_settings", "run_lm"]

#: The method of a level where none is asked for.
_DEFAULTS = {"char": "gaussian-flipout", "word": "wd-flipout"}
#: Streams of a long text that run side by side. A short one is cut into fewer, so that an epoch has about so many steps at least.
_STREAMS, _STEPS = {"char": 32, "word": 20}, 20


@dataclass(frozen=True)
class LmSettings:
    """A text and how a model of it is trained; :func:`lm_settings` fills most of it in.

    Attributes:
        text: the file.
        sha256: of its content, so that a run does not go on with another text.
        level, method: as in :data:`flipout_experiments.language.settings.METHODS`.
        model, training: what is trained, and how.
    """

    text: Path
    sha256: str
    level: str
    method: str
    model: ModelSettings
    training: TrainingSettings
    seed: int = 0
    device: str = "cpu"


def lm_settings(
    text: Path,
    level: str = "char",
    method: str | None = None,
    units: int = 256,
    epochs: int = 20,
    seed: int = 0,
    device: str = "cpu",
    learning_rate: float | None = None,
) -> LmSettings:
    """The settings for a text; a short one is cut into fewer streams.

    Args:
        text: the file.
        level: ``"char"`` or ``"word"``.
        method: of the level's table; None takes the one with flipout.
        units: of each LSTM layer.
        epochs: at most so many passes.
        seed, device: as everywhere.
        learning_rate: None takes 0.008 for characters (AMSGrad) and 20 for words (SGD).

    Raises:
        ArgumentError: for a text that cannot be read, is shorter than a window, or has no token twice; for another level or
            method; if units, epochs or the learning rate are not above 0.
    """
    choose(level, _DEFAULTS, "level")
    method = _DEFAULTS[level] if method is None else method
    choose(method, METHODS[level], f"{level}: method")
    if units < 1 or epochs < 1:
        raise ArgumentError(f"{units} units, {epochs} epochs: expected 1 or more of each")
    rate = {"char": 0.008, "word": 20.0}[level] if learning_rate is None else learning_rate
    if not 0 < rate < math.inf:
        raise ArgumentError(f"learning_rate={learning_rate}: expected a number above 0")
    window = 50 if level == "char" else 35
    count = len(own_text(text, level).train)
    if count <= window:
        raise ArgumentError(
            f"{text} has {count:,} {level}s to train on, nine tenths of all, and a window takes {window} and the one after them: "
            "name a longer text"
        )
    streams = max(1, min(_STREAMS[level], count // (_STEPS * window)))
    if level == "char":
        model = ModelSettings("char", units)
        training = TrainingSettings(epochs, streams, window, "amsgrad", rate, clip=1.0, patience=5, evaluation_rows=8)
    else:
        model = ModelSettings("word", units, layers=2)
        training = TrainingSettings(
            epochs, streams, window, "sgd", rate, clip=0.25, patience=10, quarter_after=5, evaluation_rows=8
        )  # fmt: skip
    digest = hashlib.sha256(read_text(text).encode()).hexdigest()
    return LmSettings(text.resolve(), digest, level, method, model, training, seed, device)


class Model:
    """A trained model of a text.

    Attributes:
        net: under its method, in evaluation mode.
        vocabulary: its tokens; the first is ``<unk>``.
        result: what training reached, as in ``result.json``.
    """

    def __init__(self, settings: LmSettings, net: Regularized, vocabulary: tuple[str, ...], result: dict[str, Any]) -> None:
        self.net, self.vocabulary, self.result = net.eval(), vocabulary, result
        self._settings = settings
        self._device = next(net.module.parameters()).device

    def unknown(self, text: str) -> list[str]:
        """The different tokens of a text that the model does not know, in their order."""
        return [token for token in dict.fromkeys(split_tokens(text, self._settings.level)) if token not in self.vocabulary]

    def sample(self, count: int, prompt: str = "", temperature: float = 1.0, seed: int = 0) -> str:
        """The prompt and ``count`` tokens drawn after it by the mean weights. An empty prompt is the end of a line.

        Raises:
            ArgumentError: for a temperature or a count below 0.
        """
        level = self._settings.level
        start = split_tokens(prompt, level) or (["\n"] if "\n" in self.vocabulary else [self.vocabulary[-1]])
        read = encode(start, self.vocabulary).to(self._device)
        never = torch.tensor([self.vocabulary.index(UNKNOWN)], device=self._device)
        drawn = draw_text(self.net, read, count, stream(seed, 30, device=self._device), temperature, never)
        tokens = [*(start if prompt else []), *(self.vocabulary[i] for i in drawn.tolist())]
        return "".join(tokens) if level == "char" else " ".join(tokens).replace(" \n ", "\n").replace(" \n", "\n")

    def evaluate(self, path: Path) -> dict[str, float]:
        """How well the mean weights predict another file: bits per character or perplexity, tokens, and how many are unknown.

        Raises:
            ArgumentError: if the file cannot be read or is too short.
        """
        level = self._settings.level
        tokens = encode(split_tokens(read_text(path), level), self.vocabulary).to(self._device)
        number = perplexity if level == "word" else bits
        found = number(evaluate(self.net, tokens, 1, self._settings.training.window))
        return {
            unit(level): round(found, 4),
            "tokens": len(tokens),
            "unknown": int((tokens == self.vocabulary.index(UNKNOWN)).sum()),
        }


def run_lm(settings: LmSettings, folder: Path, resume: bool = False, progress: Progress = silent) -> Model:
    """Trains a model in a run folder, or goes on with one; a finished one is only loaded.

    Args:
        settings: made by :func:`lm_settings`.
        folder: of the run.
        resume: go on with the run in the folder.
        progress: shows how far it is.

    Raises:
        ArgumentError: if the text is too short for its windows, the folder will not do, or the loss explodes.
        SaveError: if something cannot be written; what was saved before is kept.
    """
    with Run.open(folder, "lm", settings, resume) as run:
        text = own_text(settings.text, settings.level)
        device = find_device(settings.device)
        window = settings.training.window
        module = build_model(settings.model, len(text.vocabulary), window, settings.seed).to(device)
        net = Regularized(module, METHODS[settings.level][settings.method])
        with run.phase("train", progress) as report:
            state = run.load_checkpoint("train")
            if state is None or "reached" not in state:
                reached = _train(settings, net, text.to(device), run, state, report)
                state = {"reached": reached, "module": net.module.state_dict(), "vocabulary": list(text.vocabulary)}
                run.save_checkpoint("train", state)
        net.module.load_state_dict(state["module"])
        record = {"data": text.source, "parameters": sum(p.numel() for p in module.parameters()), "unit": unit(settings.level)}
        result = run.result if run.finished else run.finish({**record, **state["reached"]})
    return Model(settings, net, tuple(state["vocabulary"]), result)


def _train(
    settings: LmSettings, net: Regularized, text: Text, run: Run, state: dict[str, Any] | None, report: Any
) -> dict[str, Any]:
    training = settings.training
    number = perplexity if settings.level == "word" else bits
    trained = train_language_model(
        net,
        text.train,
        text.valid,
        training,
        settings.seed,
        lambda s: run.save_checkpoint("train", s),
        lambda: state,
        run.log,
        report,
    )
    rows, window = training.evaluation_rows, training.window
    return {
        "train": number(trained.train[trained.best - 1]),
        "valid": number(evaluate(net, text.valid, rows, window)),
        "test": number(evaluate(net, text.test, rows, window)),
        "test_by_frequency": number(_by_frequency(text)),
        "best_epoch": trained.best,
        "epochs": len(trained.valid),
    }


def _by_frequency(text: Text) -> float:
    """Nats a token of the test split for one who knows how often training has each token, and nothing else.

    Every count is one more than it is, so that nothing is impossible.
    """
    counts = torch.bincount(text.train, minlength=len(text.vocabulary)).double() + 1
    return -float((counts / counts.sum()).log()[text.test[1:]].mean())
