"""The models of the tables, small or as large as the paper's, and a transformer in GPT-2's shape beside them.

Each takes tokens ``[N, T]`` and a state, returns logits ``[N, T, vocabulary]`` and the next state, and has ``vocabulary`` and
``initial_state(rows)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flipout.errors import ArgumentError
from flipout.streams import stream
from flipout_experiments.nets.networks import CharLSTM, WordLSTM

__all__ = ["LEVELS", "ModelSettings", "Transformer", "build_model"]

LEVELS = ("char", "word", "transformer")


@dataclass(frozen=True)
class ModelSettings:
    """The size of a model.

    Attributes:
        kind: ``"char"`` and ``"word"`` are the paper's LSTMs, ``"transformer"`` a GPT-2.
        units: of each layer.
        layers: their number; the character model has one.
        heads: of attention, in a transformer.
    """

    kind: str
    units: int
    layers: int = 1
    heads: int = 1


class Transformer(nn.Module):
    """``transformers``' GPT-2 with random weights, built from a configuration; takes windows one by one and carries no state.

    Args:
        generator: source of the initial weights; None is torch's own.
        vocabulary: tokens.
        units, layers, heads: of the configuration.
        context: the longest window.

    Raises:
        ArgumentError: if transformers is not installed, or units are no multiple of heads.

    Example:
        >>> net = Transformer(vocabulary=11, units=8, layers=1, heads=2, context=5)
        >>> logits, state = net(torch.zeros(2, 5, dtype=torch.long), net.initial_state(2))
        >>> logits.shape, state
        (torch.Size([2, 5, 11]), ())
    """

    def __init__(
        self,
        generator: torch.Generator | None = None,
        vocabulary: int = 50,
        units: int = 128,
        layers: int = 2,
        heads: int = 4,
        context: int = 50,
    ) -> None:
        super().__init__()
        try:
            from transformers import GPT2Config, GPT2LMHeadModel
        except ImportError as error:
            raise ArgumentError(
                f"a transformer needs the package transformers ({error}): pip install 'flipout[models]', or choose another model"
            ) from error
        if units % heads:
            raise ArgumentError(f"{units} units cannot be parted among {heads} heads; make them a multiple")
        self.vocabulary = vocabulary
        config = GPT2Config(
            vocab_size=vocabulary, n_positions=context, n_embd=units, n_layer=layers, n_head=heads,
            attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        seed = int(torch.randint(2**31, (), generator=generator))
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # transformers draws from the global generators
            torch.manual_seed(seed)
            self.gpt: Any = GPT2LMHeadModel(config)

    def initial_state(self, rows: int) -> tuple[Tensor, ...]:
        """Nothing."""
        return ()

    def forward(self, tokens: Tensor, state: tuple[Tensor, ...] = ()) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.gpt(tokens).logits, ()


def build_model(settings: ModelSettings, vocabulary: int, window: int, seed: int) -> nn.Module:
    """A model with initial weights of its seed's.

    Raises:
        ArgumentError: for another kind, or a character model of several layers.
    """
    generator = stream(seed, 20)
    if settings.kind == "word":
        return WordLSTM(generator, vocabulary, settings.units, settings.layers)
    if settings.kind == "transformer":
        return Transformer(generator, vocabulary, settings.units, settings.layers, settings.heads, window)
    if settings.kind != "char":
        raise ArgumentError(f"model {settings.kind!r}: choose {', '.join(LEVELS)}")
    if settings.layers != 1:
        raise ArgumentError(f"layers={settings.layers}: the character model has one")
    return CharLSTM(generator, vocabulary, settings.units)
