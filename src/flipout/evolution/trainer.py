"""Hugging Face's Trainer without a gradient: losses of examples, each along a direction of its own."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from flipout.errors import ArgumentError, BatchError
from flipout.evolution.zeroth_order import ZerothOrder

__all__ = ["ZerothOrderTrainer"]

#: Kinds of loss (``model.loss_type``; None is the first) by what their labels number. Labels of the causal kinds may stand one
#: place further on: which, the comparison with the model's own loss tells.
_CAUSAL = ("ForCausalLM", "ForConditionalGeneration")
_TOKENS = ("ForMaskedLM", "ForTokenClassification", *_CAUSAL)
_WHOLE = ("ForSequenceClassification", "ForImageClassification", "ForVideoClassification", "ForAudioClassification")


class ZerothOrderTrainer(transformers.Trainer):
    """A ``transformers.Trainer`` whose gradients are those of :class:`~flipout.evolution.ZerothOrder`.

    All else is the Trainer's: optimiser, schedule, accumulation, clipping, evaluation, checkpoints. Micro-batches of one step have
    directions of their own. The noise of a step follows from its number, so a resumed run goes on as it would have.

    The loss is taken apart into that of each example for models of tokens (causal, masked, token classification) and of whole
    examples (classification, regression); at the first step their mean is compared with the model's own loss. For others override
    :meth:`example_losses`.

    Args:
        zeroth_order: settings of :class:`~flipout.evolution.ZerothOrder`, such as ``{"std": 1e-3, "directions": 1}``.
        args, kwargs: as for the Trainer.

    Raises:
        ArgumentError: with several processes, DeepSpeed, or a loss function of one's own (``compute_loss_func``, label smoothing).

    Example:
        >>> import tempfile, torch, transformers
        >>> config = transformers.GPT2Config(
        ...     vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        ... )
        >>> rows = [{"input_ids": row, "labels": row} for row in torch.randint(9, (8, 5))]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     arguments = transformers.TrainingArguments(
        ...         folder, max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", logging_strategy="no"
        ...     )
        ...     trainer = ZerothOrderTrainer(
        ...         model=transformers.GPT2LMHeadModel(config), args=arguments, train_dataset=rows, zeroth_order={"std": 0.01}
        ...     )
        ...     trainer.remove_callback(transformers.PrinterCallback)
        ...     loss = trainer.train().training_loss
        >>> loss > 0
        True
    """

    def __init__(self, *args: Any, zeroth_order: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.world_size > 1 or self.args.n_gpu > 1 or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ArgumentError(
                "ZerothOrderTrainer runs in one process on one device: what several would reduce in backward() is not made there"
            )
        if self.compute_loss_func is not None or self.label_smoother is not None:
            raise ArgumentError(
                "ZerothOrderTrainer needs the loss of each example, and compute_loss_func= and label smoothing give that of a "
                "batch: override example_losses(model, inputs) in their place"
            )
        model: Any = self.model
        self.zeroth_order = ZerothOrder(model, **{"seed": self.args.seed, **(zeroth_order or {})})
        self._step, self._micro = -1, 0
        self._shifted: bool | None = None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Fills ``.grad`` from two passes of a micro-batch, and returns its loss as the Trainer's own step does."""
        inputs = self._prepare_inputs(inputs)
        if self._step != self.state.global_step:
            self._step, self._micro = self.state.global_step, 0
        micro, self._micro = self._micro, self._micro + 1
        items = float(num_items_in_batch) if self.model_accepts_loss_kwargs and num_items_in_batch is not None else None
        scale = 1.0 if items is not None else 1.0 / self.current_gradient_accumulation_steps
        examples = _rows(inputs)

        def losses(module: nn.Module, rows: dict[str, Any]) -> Tensor:
            """Losses of which the Trainer's is the mean."""
            with self.compute_loss_context_manager():
                totals, counts = self.example_losses(module, rows)
            totals = totals.double()
            return totals * (len(totals) / counts.double().sum()) if items is None else totals * (examples / items)

        self.zeroth_order.generation = self._step * self.args.gradient_accumulation_steps + micro
        loss = self.zeroth_order.backward(losses, inputs, scale=scale, examples=examples)
        return (loss * scale).to(device=self.args.device, dtype=torch.float32)

    def example_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """What each example adds to the loss: a sum over its items, and their number, both ``[N]``.

        The loss of a batch is the sum of the first over the sum of the second.

        Args:
            model: under whatever weights.
            inputs: of the model, with ``labels``.

        Raises:
            ArgumentError: for a model whose loss is of another kind.
        """
        if "labels" not in inputs:
            raise ArgumentError(f"the inputs are {sorted(inputs)} and have no labels: override example_losses(model, inputs)")
        owner: Any = self.model
        outputs, labels = model(**_positioned(model, inputs)), inputs["labels"]
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[1]
        kind = getattr(owner, "loss_type", None) or _CAUSAL[0]
        if kind in _TOKENS and logits.dim() == 3:
            ways = (True, False) if kind in _CAUSAL else (False,)
            if self._shifted is None:
                found = [_of_tokens(logits, labels, shifted) for shifted in ways]
                self._shifted = ways[self._compare(outputs, found)]
            return _of_tokens(logits, labels, self._shifted)
        if kind in _WHOLE and logits.dim() == 2:
            losses = _of_examples(logits, labels, getattr(owner.config, "problem_type", None))
            if self._shifted is None:
                self._shifted = bool(self._compare(outputs, [losses]))
            return losses
        raise ArgumentError(
            f"{type(self.model).__name__} has a loss of the kind {kind!r} on logits of shape {tuple(logits.shape)}, which is not "
            "known by example: override example_losses(model, inputs)"
        )

    def _compare(self, outputs: Any, found: list[tuple[Tensor, Tensor]]) -> int:
        """Which of the losses of the examples are those of the model."""
        theirs = float(outputs["loss"] if isinstance(outputs, dict) else outputs[0])
        ours = [float(totals.double().sum() / counts.double().sum()) for totals, counts in found]
        for i, loss in enumerate(ours):
            if math.isclose(loss, theirs, rel_tol=1e-3, abs_tol=1e-5):
                return i
        raise ArgumentError(
            f"the mean loss of the examples is {ours[0]}, and {type(self.model).__name__} says {theirs}: its loss has more in it "
            "than the labels' own; override example_losses(model, inputs)"
        )


def _rows(inputs: dict[str, Any]) -> int:
    first = next((value for value in inputs.values() if isinstance(value, Tensor) and value.dim()), None)
    if first is None:
        raise BatchError(f"the inputs {sorted(inputs)} have no tensor whose first dimension counts the examples")
    return int(first.shape[0])


def _positioned(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with the positions that the model would take, a row for each example."""
    tokens = inputs.get("input_ids")
    if "position_ids" in inputs or tokens is None or "position_ids" not in inspect.signature(model.forward).parameters:
        return inputs
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    return {**inputs, "position_ids": positions}


def _of_tokens(logits: Tensor, labels: Tensor, shifted: bool) -> tuple[Tensor, Tensor]:
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return losses.sum(1), (labels != -100).sum(1)


def _of_examples(logits: Tensor, labels: Tensor, problem: str | None) -> tuple[Tensor, Tensor]:
    logits = logits.float()
    if problem == "regression":
        losses = (logits.view(len(logits), -1) - labels.view(len(labels), -1)).square().mean(1)
    elif problem == "multi_label_classification":
        losses = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").mean(1)
    else:
        losses = F.cross_entropy(logits, labels.view(-1), reduction="none")
    return losses, torch.ones_like(losses)
