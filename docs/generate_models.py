"""Writes docs/models.md from the registry of rules and the zoo of tested models: ``python docs/generate_models.py``."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

from flipout import Flipout, Independent, LocalReparameterization, LowRank, Shared
from flipout.registry import find_rule, rules
from flipout.weight import operation_name

#: Families with a rule for every estimator, where LocalReparameterization finds a weight used more than once and refuses it.
SHARE_WEIGHTS = {"attention", "embedding", "recurrent"}

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
ESTIMATORS = (Flipout, Shared, Independent, LowRank, LocalReparameterization)

#: What each family of rules serves, in the order of the page: layers of torch.nn, and what is exact about it.
FAMILIES = {
    "linear": (
        "`Linear`, `Bilinear`, and models that multiply by a parameter (GPT-2's `Conv1D`)",
        "one weight per example whatever the rank of the input",
    ),
    "einsum": (
        "`torch.einsum` of one parameter with one operand of data, in whichever order; stacks of matrices",
        "a factor multiplies the operand, data or result, that has its letter",
    ),
    "scales": (
        "`weight_norm` and `spectral_norm`, as parametrizations and in their older form",
        "each member's own norm or σ; in training mode the vectors of spectral_norm follow the mean weight",
    ),
    "conv": (
        "`Conv1d/2d/3d`, `ConvTranspose1d/2d/3d`; groups, dilation and every padding mode",
        "one sign per example and channel, so that what is added is a perturbation of the kernel",
    ),
    "recurrent": (
        "`RNN`, `LSTM`, `GRU` and their cells; several layers, bidirectional, `proj_size`, packed sequences",
        "one draw a sequence, held over time; `Flipout(per_step=True)` is the other choice",
    ),
    "attention": (
        "`MultiheadAttention`, `Transformer`, its layers and stacks, in training and evaluation",
        "each row's own four projections; torch's fused evaluation paths are not taken while weights are perturbed",
    ),
    "embedding": (
        "`Embedding`, `EmbeddingBag`, a parameter indexed by token or position numbers",
        "signs along the columns; the index needs a batch dimension (1 for what all examples share)",
    ),
    "normalization": (
        "`BatchNorm`, `LayerNorm`, `RMSNorm`, `GroupNorm`, `InstanceNorm`",
        "gain and bias per example; the statistics never see a weight",
    ),
    "pointwise": (
        "biases, gains, positions, class tokens, `PReLU`, any function of single entries (Mamba's `exp(A_log)`)",
        "exact; a function that is not linear lists every member's entries, which costs N times the parameter",
    ),
    "structure": (
        "what a model does to a weight before using it: views, slices, casts, concatenation",
        "the result is again a weight per example",
    ),
    "routed": (
        "stacks of experts that rows are routed to (Mixtral)",
        "one weight per token; one weight per example is refused by name, since routed rows have lost their example",
    ),
}

HEAD = """# Which layers and models work

*This page is written by `python docs/generate_models.py` from the rules and the tests. Do not edit it by hand.*

A model works if every torch operation that receives one of its perturbed parameters has a rule. An operation without one raises
`MissingRuleError` with the operation, the parameter and the way out; noise is never dropped in silence. So to find out, wrap the
model and run it once:

```python
net = flipout.Perturbed(model, flipout.Gaussian(0.01))
net(**batch)
```

## Layers
"""

OPERATIONS = """
Operations by family, and the estimators that serve them. `Shared` needs no rule: all rows see one ordinary weight.
"""

MODELS = """
## Models

Built from their configurations with random weights and checked in `tests/core/test_models.py`: wrapped in one line, equal to the
loop over members in float64 to 1e-10, trained, equal to the untouched model bit for bit in evaluation mode, saved by `net.module`
and loaded by plain `transformers`. Inside `flipout.perturbed(model, noise, members=N)` every row of `generate()` is one model for
the whole generation, key/value cache and beams included.
"""

TAIL = """
## What to exclude, and why it raises

* **An index without a batch dimension**: positions `[L]` or `[1, L]` are shared by all examples, and each reads its own weights.
  Where an index of more axes (relative positions `[L, L]`) cannot be told from a batch, the error names the pattern for
  `exclude=`.
* **Rows routed among examples** (mixtures of experts): use `Flipout(granularity="token")`, or exclude the experts. Experts that
  are separate `Linear` layers raise as soon as the rows sent to one are not a multiple of the batch; do not rely on it.
* **Custom `autograd.Function`s and TorchScript** hide what they do to a weight and raise. So does reentrant activation
  checkpointing; pass `use_reentrant=False`, under which what is computed again has the draw of its call.
* **The batch is not on dimension 0**: `Perturbed(..., batch_dim=1)`. Recurrent and attention modules wrapped by themselves use
  their own `batch_first`. Where the first tensor is not the batch, `rows=` names the argument that counts the rows.
* **Attention with `kdim` or `vdim`** whose `q_proj_weight`, `k_proj_weight` or `v_proj_weight` alone are perturbed: torch shows
  them to no rule; include `out_proj.weight` or `in_proj_bias` as well.

## Loops that own the model

`flipout.perturbed` around the forward pass works inside a Lightning `training_step`, a Hugging Face `Trainer.compute_loss`, and
with `DistributedDataParallel`, which averages the ranks' gradients as ever. Give each rank a generator with its own seed: ranks
that share a seed share their noise. The model holds its own parameters throughout, so optimisers, clipping and checkpoints are
those of the plain model. Checkpointing, sharding, compiled parts and threads are in [situations](situations.md).

## Export

`net.module` (the mean) and `draw.module(n)` (one member) are plain modules: `torch.export`, ONNX and `save_pretrained` take them.
"""


def _short(name: str) -> str:
    """``linear`` for ``torch.nn.functional.linear``; one name for a function and its method."""
    parts = [part for part in name.split(".") if part not in ("__get__",)]
    return parts[-1]


def _families() -> dict[str, dict[str, set[str]]]:
    """By family: the operations, and the estimators that each has a rule for."""
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for operation, _ in rules():
        for estimator in ESTIMATORS:
            function = find_rule(operation, estimator)
            if function is None or function.__name__ == "refuse":
                continue
            family = function.__module__.rpartition(".")[2]
            if function.__module__.startswith("flipout.rules."):
                found[family][_short(operation_name(operation))].add(estimator.__name__)
    missing = set(found) ^ set(FAMILIES)
    if missing:
        raise SystemExit(f"describe the families {sorted(missing)} in docs/generate_models.py")
    return found


def _operations() -> list[str]:
    found = _families()
    lines = ["| family | operations | estimators |", "|---|---|---|"]
    for family in FAMILIES:
        groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for name, estimators in sorted(found[family].items()):
            if name == "__getitem__" or (not name.startswith("__") and name != "spmm"):  # an alias of mm
                refused = {"LocalReparameterization"} if family in SHARE_WEIGHTS else set()
                served = tuple(kind.__name__ for kind in ESTIMATORS if kind is Shared or kind.__name__ in estimators - refused)
                groups[served].append(f"`{name}`")
        for served, names in groups.items():
            if family == "routed":
                served = ("Flipout(granularity='token')", "Shared")
            listed = "all" if len(served) == len(ESTIMATORS) else ", ".join(f"`{name}`" for name in served)
            lines.append(f"| {family} | {', '.join(names)} | {listed} |")
    return lines


def _models() -> list[str]:
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        from zoo import MIXTRAL, ZOO
    finally:
        sys.path.pop(0)
    lines = ["| model | `generate()` | exclude | because |", "|---|---|---|---|"]
    for entry in ZOO:
        excluded = ", ".join(f"`{pattern}`" for pattern in entry.exclude) or "nothing"
        lines.append(f"| {entry.name} | {'yes' if entry.generates else '–'} | {excluded} | {entry.why} |")
    why = "rows are routed to a stack of experts; nothing need be excluded with `Flipout(granularity='token')`"
    lines.append(f"| {MIXTRAL.name} | – | `*.experts.*` | {why} |")
    return lines


def page() -> str:
    """The page as it should be."""
    layers = ["| layers | what each example gets |", "|---|---|", *(f"| {layer} | {what} |" for layer, what in FAMILIES.values())]
    return "\n".join([HEAD, *layers, OPERATIONS, *_operations(), MODELS, *_models(), TAIL])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
