"""Tables 2 and 3: language models on Penn Treebank, each regularised by one method (Wen et al. 2018, Sec. 4.2, Appendix D).

Every method trains the same model from the same initial weights, once for each seed, until the validation loss of its mean weights
stops falling. The weights of the best epoch are then evaluated on the whole validation and test splits.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from flipout.data import Text, penn_treebank
from flipout.estimators import Flipout
from flipout.perturb import Perturbed
from flipout.regularize import Regularized
from flipout.variance import gradient_variance
from flipout_experiments.harness.console import Count
from flipout_experiments.harness.environment import find_device
from flipout_experiments.harness.reproduce import Experiment
from flipout_experiments.harness.run import Progress, Run
from flipout_experiments.language.evaluation import bits, evaluate, evaluate_samples, perplexity
from flipout_experiments.language.history_plot import draw_histories
from flipout_experiments.language.models import build_model
from flipout_experiments.language.paper_tables import claims, show
from flipout_experiments.language.settings import METHODS, RegularizationSettings, unit
from flipout_experiments.language.tokens import cut, limit_vocabulary
from flipout_experiments.language.training import train_language_model
from flipout_experiments.nets.networks import count_parameters

__all__ = ["EXPERIMENT", "token_loss"]


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


EXPERIMENT = Experiment(RegularizationSettings.preset, _run, show, claims)
