"""What the variance experiments measure: the paper's four nets on their data, pre-trained, frozen, their weights made random."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flipout.data import Dataset, Text, cifar10, mnist, penn_treebank
from flipout.errors import ArgumentError
from flipout.gradients import LossFunction, SampleBatch
from flipout.noise import MultiplicativeGaussian
from flipout.perturb import Perturbed
from flipout.streams import stream
from flipout.variance.measure import Parts
from flipout_experiments.harness.environment import find_device
from flipout_experiments.harness.run import Progress, Run
from flipout_experiments.nets import pretrain
from flipout_experiments.nets.networks import ConvLe, ConvVGG, FullyConnected, WordLSTM, count_parameters
from flipout_experiments.nets.pretrain import PretrainingSettings

__all__ = ["SUBJECTS", "Subject", "SubjectSettings", "prepare", "subject_settings"]

#: The gates of torch's LSTM, in the order of its rows, and their names in the paper.
_GATES = ("W_i", "W_f", "W_c", "W_o")


@dataclass(frozen=True)
class SubjectSettings:
    """A net, its data, its noise and its pre-training.

    Attributes:
        net: ``fc``, ``convle``, ``convgg`` or ``lstm``.
        pretraining: how it is trained first.
        include: which weights are random, under multiplicative Gaussian noise of ``std``: all matrices and kernels; of the LSTM the
            hidden-to-hidden ones, the paper's setting for language models.
        width: of ConvLe and ConVGG, relative to the paper's.
        units: of the LSTM.
        window: tokens of one example of the LSTM's.
        download: whether data may be downloaded where ``data_dir`` is None.
    """

    net: str
    pretraining: PretrainingSettings
    include: str = "*weight"
    std: float = 1.0
    width: float = 1.0
    units: int = 650
    window: int = 35
    seed: int = 0
    device: str = "cpu"
    data_dir: Path | None = None
    download: bool = True


@dataclass(frozen=True)
class Subject:
    """A frozen net with its noise, and how to draw gradients of it.

    Attributes:
        net: with its noise.
        loss_fn, sample_batch: as the instrument takes them; batches are drawn with replacement from the training data.
        panels: the paper's layers: a title and the parameters or parts to sum over.
        parts: rows of parameters that panels name.
        record: the data, the net and what its pre-training reached, for the result.
    """

    net: Perturbed
    loss_fn: LossFunction
    sample_batch: SampleBatch
    panels: Mapping[str, tuple[str, ...]]
    parts: Parts
    record: dict[str, Any]


#: How each net is trained at full size; ``subject_settings`` makes them smaller.
_PAPER = {
    "fc": SubjectSettings("fc", PretrainingSettings(True, 0.85, 5000, 128, 1e-3)),
    "convle": SubjectSettings("convle", PretrainingSettings(True, 0.85, 5000, 128, 1e-3)),
    "convgg": SubjectSettings("convgg", PretrainingSettings(False, 0.85, 40000, 128, 1e-4)),
    "lstm": SubjectSettings("lstm", PretrainingSettings(True, None, 1992, 40, 2e-3, clip=0.25), include="lstm.weight_hh*"),
}
SUBJECTS = tuple(_PAPER)


def subject_settings(net: str, preset: str, **common: Any) -> SubjectSettings:
    """A net's settings under a preset. The LSTM's 1,992 steps of ``paper`` are three epochs of Penn Treebank.

    Example:
        >>> subject_settings("lstm", "paper").units, subject_settings("lstm", "laptop").units
        (650, 200)
    """
    paper = replace(_PAPER[net], **common)
    training = paper.pretraining
    if preset == "paper":
        return paper
    if preset == "smoke":
        short = replace(training, accuracy=None, steps=4, batch=8)
        return replace(paper, pretraining=short, width=1 / 16, units=8, window=5, download=False)
    if net == "convgg":
        return replace(paper, pretraining=replace(training, batch=64, learning_rate=5e-4), width=0.25)
    if net == "lstm":
        return replace(paper, pretraining=replace(training, steps=300, learning_rate=4e-3), units=200)
    return paper


def prepare(settings: SubjectSettings, run: Run, progress: Progress) -> Subject:
    """Loads the data, builds the net, pre-trains it (or takes its weights from the run's checkpoint) and freezes it.

    Raises:
        ArgumentError: if the data cannot be had or pre-training fails.
    """
    device = find_device(settings.device)
    with run.phase("load-data", progress):
        data = _load(settings)
    net = Perturbed(_module(settings, data).to(device), MultiplicativeGaussian(settings.std), include=settings.include)
    moved: Any = data.to(device)
    with run.phase("pre-train", progress) as report:
        done = run.load_checkpoint("pretrained")
        if done is None:
            done = _pretrain(settings, net, moved, run, report)
            run.save_checkpoint("pretrained", done)
        net.module.load_state_dict(done["module"])
    record = {"data": data.source, "parameters": count_parameters(net.module), "pretraining": done["reached"]}
    panels, parts = _panels(settings)
    if isinstance(data, Text):
        text: Text = moved
        return Subject(net, pretrain.token_loss, lambda n, g: text.sample(n, settings.window, g), panels, parts, record)
    return Subject(net, pretrain.mean_loss, moved.train.sample, panels, parts, record)


def _load(settings: SubjectSettings) -> Dataset | Text:
    where: Any = {"data_dir": settings.data_dir, "download": settings.download}
    if settings.net == "lstm":
        return penn_treebank("word", **where)
    return cifar10(**where) if settings.net == "convgg" else mnist(settings.seed, **where)


def _module(settings: SubjectSettings, data: Dataset | Text) -> Any:
    generator = stream(settings.seed, 0)
    if isinstance(data, Text):
        return WordLSTM(generator, len(data.vocabulary), settings.units)
    if settings.net == "fc":
        return FullyConnected(generator)
    return (ConvLe if settings.net == "convle" else ConvVGG)(generator, settings.width)


def _pretrain(settings: SubjectSettings, net: Perturbed, data: Any, run: Run, report: Any) -> dict[str, Any]:
    def save(state: dict[str, Any]) -> None:
        run.save_checkpoint("pretraining", state)

    def load() -> dict[str, Any] | None:
        return run.load_checkpoint("pretraining")

    if isinstance(data, Text):
        found = pretrain.pretrain_language_model(
            net, data, settings.window, settings.pretraining, settings.seed, save, load, report
        )  # fmt: skip
    else:
        found = pretrain.pretrain_classifier(net, data.train, settings.pretraining, settings.seed, save, load, report)
    return {"module": net.module.state_dict(), "reached": {"steps": found.steps, **found.measures}}


def _panels(settings: SubjectSettings) -> tuple[dict[str, tuple[str, ...]], Parts]:
    """The layers that the paper's Figure 1 shows."""
    if settings.net == "fc":
        return {"FC1": ("fc1.weight",), "FC2": ("fc2.weight",), "FC3": ("fc3.weight",)}, {}
    if settings.net == "convle":
        return {"Conv1": ("conv1.weight",), "Conv2": ("conv2.weight",), "FC1": ("fc1.weight",), "FC2": ("fc2.weight",)}, {}
    if settings.net == "convgg":
        return {"Conv1": ("convs.0.weight",), "Conv8": ("convs.7.weight",)}, {}
    if settings.net != "lstm":
        raise ArgumentError(f"net {settings.net!r}: choose {', '.join(SUBJECTS)}")
    n = settings.units
    parts = {gate: ("lstm.weight_hh_l0", slice(i * n, (i + 1) * n)) for i, gate in enumerate(_GATES)}
    return {gate: (gate,) for gate in _GATES}, parts
