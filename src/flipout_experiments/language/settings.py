"""The methods, the paper's numbers and the presets of Tables 2 and 3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flipout.regularize import CHAR, TRANSFORMER, WORD, Method
from flipout_experiments.harness.reproduce import choose
from flipout_experiments.language.models import ModelSettings
from flipout_experiments.language.training import TrainingSettings

__all__ = ["METHODS", "PAPER", "RegularizationSettings", "unit"]

#: The methods of each level's table, by name.
METHODS: Mapping[str, Mapping[str, Method]] = {"char": CHAR, "word": WORD, "transformer": TRANSFORMER}

#: What the paper reports: validation and test, in bits per character (Table 2) and perplexity (Table 3).
PAPER: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "char": {
        "none": (1.468, 1.423), "semeniuta": (1.337, 1.300), "zoneout": (1.306, 1.270), "gal": (1.277, 1.245),
        "gaussian": (1.257, 1.230), "gaussian-flipout": (1.256, 1.227),
    },
    "word": {
        "none": (132.23, 128.97), "zaremba": (80.40, 76.81), "semeniuta": (81.91, 77.88), "gal": (78.24, 75.39),
        "zoneout": (78.66, 75.45), "wd": (78.82, 75.71), "wd-flipout": (76.88, 73.20),
    },
    "transformer": {},
}  # fmt: skip


@dataclass(frozen=True)
class RegularizationSettings:
    """A level's model, its training, and what is measured of it.

    Attributes:
        level: ``char``, ``word`` or ``transformer``, which reads characters.
        methods: names in :data:`METHODS`.
        model, training: what is trained, and how.
        seeds: trainings of each method, under seeds ``seed``, ``seed + 1``, ...
        train_tokens: the first so many tokens of the training split are trained on; None for all.
        held_tokens: the first so many tokens of the validation and test splits are evaluated; None for all of them.
        vocabulary: words of the model, the others being ``<unk>``; None for all.
        samples: nets with drawn weights whose predictions are averaged, besides the mean weights; 0 for none.
        draws: gradients drawn to measure the variance under each estimator, of the net that was trained with flipout.
        confidence: of the intervals over seeds.
    """

    level: str
    methods: tuple[str, ...]
    model: ModelSettings
    training: TrainingSettings
    seeds: int = 3
    train_tokens: int | None = None
    held_tokens: int | None = None
    vocabulary: int | None = None
    samples: int = 0
    draws: int = 200
    confidence: float = 0.9
    seed: int = 0
    device: str = "cpu"
    data_dir: Path | None = None
    download: bool = True

    @classmethod
    def preset(cls, name: str, level: str, method: str, **common: Any) -> RegularizationSettings:
        """The settings of a preset.

        Raises:
            ArgumentError: for a method that the level's table has not.
        """
        table = METHODS[level]
        if method != "all":
            choose(method, table, f"{level}: method")
        return replace(_PRESETS[level][name], methods=tuple(table) if method == "all" else (method,), **common)


def unit(level: str) -> str:
    """What a level's numbers are."""
    return "perplexity" if level == "word" else "bits per character"


_AMSGRAD = TrainingSettings(200, 32, 100, "amsgrad", 0.002, clip=1.0, patience=10)
_SGD = TrainingSettings(100, 40, 35, "sgd", 30.0, clip=0.25, quarter_after=5)
_CHAR = RegularizationSettings("char", (), ModelSettings("char", 1000), _AMSGRAD)
_WORD = RegularizationSettings("word", (), ModelSettings("word", 650, layers=2), _SGD)
_GPT2 = ModelSettings("transformer", 768, layers=12, heads=12)
_TRANSFORMER = replace(_CHAR, level="transformer", model=_GPT2, training=replace(_AMSGRAD, learning_rate=3e-4))

_LAPTOP: Mapping[str, Any] = {"samples": 8, "draws": 100}
_SMALL_CHAR = replace(
    _AMSGRAD, epochs=32, window=50, learning_rate=0.008, patience=6, evaluation_rows=32, watched=50_000
)  # fmt: skip
_SMALL_WORD = replace(_SGD, epochs=24, batch=20, learning_rate=20.0, evaluation_rows=20, watched=20_000)
_SMOKE: Mapping[str, Any] = {"seeds": 2, "train_tokens": 400, "held_tokens": 400, "samples": 2, "draws": 8, "download": False}
_FEW: Mapping[str, Any] = {"epochs": 2, "batch": 4, "window": 10, "evaluation_rows": 8, "watched": 200, "save_steps": 4}

_PRESETS: Mapping[str, Mapping[str, RegularizationSettings]] = {
    "char": {
        "smoke": replace(_CHAR, model=ModelSettings("char", 8), training=replace(_AMSGRAD, **_FEW), **_SMOKE),
        "laptop": replace(_CHAR, model=ModelSettings("char", 256), training=_SMALL_CHAR, train_tokens=120_000, **_LAPTOP),
        "paper": _CHAR,
    },
    "word": {
        "smoke": replace(_WORD, model=ModelSettings("word", 8, layers=2), training=replace(_SGD, **_FEW), vocabulary=50, **_SMOKE),
        "laptop": replace(
            _WORD, model=ModelSettings("word", 128, layers=2), training=_SMALL_WORD, train_tokens=60_000, vocabulary=2_000,
            **{**_LAPTOP, "draws": 1_000},
        ),
        "paper": _WORD,
    },
    "transformer": {
        "smoke": replace(
            _TRANSFORMER, model=ModelSettings("transformer", 8, 1, 2), training=replace(_AMSGRAD, **_FEW), **_SMOKE
        ),
        "laptop": replace(
            _TRANSFORMER, model=ModelSettings("transformer", 96, 2, 4), train_tokens=60_000, **_LAPTOP,
            training=replace(_SMALL_CHAR, epochs=20, learning_rate=0.002, watched=20_000),
        ),
        "paper": _TRANSFORMER,
    },
}  # fmt: skip
