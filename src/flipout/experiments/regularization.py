"""Tables 2 and 3: language models on Penn Treebank, each regularised by one method (Wen et al. 2018, Sec. 4.2, Appendix D).

Every method trains the same model from the same initial weights, once for each seed, until the validation loss of its mean weights
stops falling. The weights of the best epoch are then evaluated on the whole validation and test splits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from flipout.data import Text, penn_treebank
from flipout.estimators import Flipout
from flipout.experiments.console import interval
from flipout.experiments.environment import find_device
from flipout.experiments.language.evaluation import bits, evaluate, evaluate_samples, perplexity
from flipout.experiments.language.figures import draw_histories
from flipout.experiments.language.models import ModelSettings, build_model
from flipout.experiments.language.text import cut, limit_vocabulary
from flipout.experiments.language.training import TrainingSettings, train_language_model
from flipout.experiments.networks import count_parameters
from flipout.experiments.reproduce import Experiment, choose
from flipout.experiments.run import Progress, Run
from flipout.experiments.variance import Count, from_json
from flipout.moments import Estimate, combine, estimate_mean
from flipout.perturb import Perturbed
from flipout.regularize import CHAR, TRANSFORMER, WORD, Method, Regularized
from flipout.variance import gradient_variance

__all__ = ["EXPERIMENT", "METHODS", "PAPER", "RegularizationSettings", "estimates"]

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


_AMSGRAD = TrainingSettings(200, 32, 100, "amsgrad", 0.002, clip=1.0, patience=10)
_SGD = TrainingSettings(100, 40, 35, "sgd", 30.0, clip=0.25, quarter_after=5)
_CHAR = RegularizationSettings("char", (), ModelSettings("char", 1000), _AMSGRAD)
_WORD = RegularizationSettings("word", (), ModelSettings("word", 650, layers=2), _SGD)
_GPT2 = ModelSettings("transformer", 768, layers=12, heads=12)
_TRANSFORMER = replace(_CHAR, level="transformer", model=_GPT2, training=replace(_AMSGRAD, learning_rate=3e-4))

_LAPTOP: Mapping[str, Any] = {"samples": 8, "draws": 100}
_SMALL_CHAR = replace(
    _AMSGRAD, epochs=30, window=50, learning_rate=0.008, patience=6, evaluation_rows=32, watched=50_000
)  # fmt: skip
_SMALL_WORD = replace(_SGD, epochs=30, batch=20, learning_rate=20.0, evaluation_rows=20, watched=20_000)
_SMOKE: Mapping[str, Any] = {"seeds": 2, "train_tokens": 400, "held_tokens": 400, "samples": 2, "draws": 8, "download": False}
_FEW: Mapping[str, Any] = {"epochs": 2, "batch": 4, "window": 10, "evaluation_rows": 8, "watched": 200, "save_steps": 4}

_PRESETS: Mapping[str, Mapping[str, RegularizationSettings]] = {
    "char": {
        "smoke": replace(_CHAR, model=ModelSettings("char", 8), training=replace(_AMSGRAD, **_FEW), **_SMOKE),
        "laptop": replace(_CHAR, model=ModelSettings("char", 256), training=_SMALL_CHAR, train_tokens=200_000, **_LAPTOP),
        "paper": _CHAR,
    },
    "word": {
        "smoke": replace(_WORD, model=ModelSettings("word", 8, layers=2), training=replace(_SGD, **_FEW), vocabulary=50, **_SMOKE),
        "laptop": replace(
            _WORD, model=ModelSettings("word", 128, layers=2), training=_SMALL_WORD, train_tokens=60_000, vocabulary=2_000,
            **_LAPTOP,
        ),
        "paper": _WORD,
    },
    "transformer": {
        "smoke": replace(
            _TRANSFORMER, model=ModelSettings("transformer", 8, 1, 2), training=replace(_AMSGRAD, **_FEW), **_SMOKE
        ),
        "laptop": replace(
            _TRANSFORMER, model=ModelSettings("transformer", 128, 2, 4), training=replace(_SMALL_CHAR, learning_rate=0.001),
            train_tokens=200_000, **_LAPTOP,
        ),
        "paper": _TRANSFORMER,
    },
}  # fmt: skip


def _run(settings: RegularizationSettings, run: Run, progress: Progress) -> dict[str, Any]:
    device = find_device(settings.device)
    with run.phase("load-data", progress):
        text = _load(settings)
    moved = text.to(device)
    rows: dict[str, Any] = {}
    variances: dict[str, Any] = {}
    for name in settings.methods:
        found = [_train(settings, name, i, moved, run, progress) for i in range(settings.seeds)]
        rows[name] = {key: [each[key] for each in found] for key in found[0]}
        method = METHODS[settings.level][name]
        if method.noise is not None and isinstance(method.estimator, Flipout):
            variances[name] = _variance(settings, name, moved, run, progress)
    with run.phase("figure", progress):
        run.figure("regularization", draw_histories({name: row["watched"] for name, row in rows.items()}, unit(settings.level)))
    model = build_model(settings.model, len(text.vocabulary), settings.training.window, settings.seed)
    record = {
        "data": text.source,
        "trained_on": len(text.train),
        "parameters": count_parameters(model),
        "unit": unit(settings.level),
    }
    return {**record, "rows": rows, "variance": variances}


def unit(level: str) -> str:
    """What a level's numbers are."""
    return "perplexity" if level == "word" else "bits per character"


def _load(settings: RegularizationSettings) -> Text:
    level = "word" if settings.level == "word" else "char"
    text = penn_treebank(level, data_dir=settings.data_dir, download=settings.download)
    return limit_vocabulary(cut(text, settings.train_tokens, settings.held_tokens), settings.vocabulary)


def _net(settings: RegularizationSettings, name: str, text: Text, seed: int) -> Regularized:
    module = build_model(settings.model, len(text.vocabulary), settings.training.window, seed)
    return Regularized(module.to(text.train.device), METHODS[settings.level][name])


def _train(
    settings: RegularizationSettings, name: str, index: int, text: Text, run: Run, progress: Progress
) -> dict[str, Any]:  # fmt: skip
    """One training, and what it reached; from its checkpoint if it is done."""
    phase, seed, training = f"{name}-{index}", settings.seed + index, settings.training
    with run.phase(phase, progress) as report:
        state = run.load_checkpoint(phase)
        if state is None or "reached" not in state:
            net = _net(settings, name, text, seed)
            trained = train_language_model(
                net, text.train, text.valid, training, seed, lambda s: run.save_checkpoint(phase, s), lambda: state, run.log, report
            )
            number = perplexity if settings.level == "word" else bits
            rows, window = training.evaluation_rows, training.window
            reached: dict[str, Any] = {
                "valid": number(evaluate(net, text.valid, rows, window)),
                "test": number(evaluate(net, text.test, rows, window)),
                "sampled": None,
                "watched": [number(nats) for nats in trained.valid],
                "train": [number(nats) for nats in trained.train],
                "best_epoch": trained.best,
                "steps": trained.steps,
            }
            if settings.samples and net.method.noise is not None:
                part = text.valid[: training.watched]
                reached["sampled"] = number(evaluate_samples(net, part, settings.samples, rows, window, seed))
            run.log(step=trained.steps, valid=reached["valid"], test=reached["test"])
            state = {"reached": reached, "module": net.module.state_dict()}
            run.save_checkpoint(phase, state)
    return dict(state["reached"])


def _variance(settings: RegularizationSettings, name: str, text: Text, run: Run, progress: Progress) -> dict[str, Any]:
    """The variance of the gradient under shared noise and under flipout, at the weights that the first seed's training reached."""
    phase, batch = f"{name}-variance", settings.training.batch
    with run.phase(phase, progress) as report:
        state = run.load_checkpoint(phase)
        if state is None:
            net = _net(settings, name, text, settings.seed)
            trained = run.load_checkpoint(f"{name}-0")
            assert trained is not None
            net.module.load_state_dict(trained["module"])
            method = net.method
            assert method.noise is not None
            found = gradient_variance(
                Perturbed(net.module, method.noise, include=method.include), token_loss,
                lambda n, g: text.sample(n, settings.training.window, g), batch, ("shared", "flipout"), settings.draws,
                confidence=settings.confidence, seed=settings.seed, on_draw=Count(report, 2 * settings.draws),
            )  # fmt: skip
            totals = {each: estimator.total.as_dict() for each, estimator in found.items()}
            ratio = found.ratio("shared", "flipout").as_dict()
            state = {"batch_size": batch, "draws": settings.draws, **totals, "shared / flipout": ratio}
            run.save_checkpoint(phase, state)
    return dict(state)


def token_loss(net: Perturbed, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy of the next token over a batch of windows, each from a state of zeros, in nats."""
    tokens, targets = batch
    module: Any = net.module
    logits, _ = net(tokens, module.initial_state(len(tokens)))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def estimates(result: Mapping[str, Any], split: str) -> dict[str, Estimate]:
    """For each method the mean over seeds with its interval: of ``"valid"``, ``"test"`` or ``"best_epoch"``."""
    return {name: estimate_mean(row[split], result["settings"]["confidence"]) for name, row in result["rows"].items()}


def gains(result: Mapping[str, Any], split: str = "valid") -> dict[tuple[str, str], Estimate]:
    """How much lower a method's mean is than that of another: of none, and of the same noise shared."""
    found, confidence = estimates(result, split), result["settings"]["confidence"]
    pairs = [("none", name) for name in found if name != "none" and "none" in found]
    pairs += [(other, f"{other}-flipout") for other in ("gaussian", "wd") if {other, f"{other}-flipout"} <= set(found)]
    return {(worse, better): combine([1.0, -1.0], [found[worse], found[better]], confidence) for worse, better in pairs}


def _show(result: dict[str, Any], console: Console) -> None:
    level = result["settings"]["level"]
    paper = PAPER[level]
    console.print(f"\ndata: {result['data']}; trained on the first {result['trained_on']:,} tokens", highlight=False)
    title = f"{result['unit']} ({result['parameters']:,} parameters, {result['settings']['seeds']} seeds)"
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    for name in ("paper, valid", "paper, test", "valid", "test", "best epoch"):
        table.add_column(name, justify="right")
    valid, test, epochs = (estimates(result, split) for split in ("valid", "test", "best_epoch"))
    for name in result["rows"]:
        published = [f"{value:g}" for value in paper.get(name, ())] or ["", ""]
        table.add_row(name, *published, precise(valid[name]), precise(test[name]), f"{epochs[name].value:.0f}")
    console.print(table)
    for (worse, better), gain in gains(result).items():
        console.print(f"{better} is lower than {worse} by {precise(gain)}", highlight=False)
    for name, row in result["rows"].items():
        if row["sampled"][0] is not None:
            best = [min(watched) for watched in row["watched"]]
            told = f"{_mean(row['sampled']):.4g} by averaging samples, {_mean(best):.4g} by mean weights"
            console.print(f"{name}, on what is watched of the validation split: {told}", highlight=False)
    for name, found in result["variance"].items():
        numbers = ", ".join(f"{each} {interval(from_json(found[each]))}" for each in ("shared", "flipout", "shared / flipout"))
        console.print(f"variance of the gradient at {name}'s weights, N = {found['batch_size']}: {numbers}", highlight=False)


def precise(estimate: Estimate) -> str:
    """A number with four digits and its interval.

    Example:
        >>> precise(Estimate(1.2567, 1.25, 1.2634, 0.002, 2))
        '1.257 [1.25, 1.263]'
    """
    if estimate.high == float("inf"):
        return f"{estimate.value:.4g}"
    return f"{estimate.value:.4g} [{estimate.low:.4g}, {estimate.high:.4g}]"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


EXPERIMENT = Experiment(RegularizationSettings.preset, _run, _show)
