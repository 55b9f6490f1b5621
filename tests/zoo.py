"""Models that nobody here wrote: tiny, with random weights, from their configurations. The tests and docs/models.md name them.

Each entry makes a model and a batch of inputs. Importing this module needs nothing; making an entry needs ``transformers``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MIXTRAL", "ZOO", "Entry"]

VOCABULARY, LENGTH = 37, 6


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        name: its name in the documentation.
        make: builds it, in evaluation mode.
        inputs: keyword arguments of a batch of ``n`` examples.
        exclude: the parameters that cannot be perturbed per example, with the reason in ``why``.
        generates: whether it has ``generate()``.
        generate_inputs: its arguments, where they differ from ``inputs``.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Tensor]]
    exclude: tuple[str, ...] = ()
    why: str = ""
    generates: bool = False
    generate_inputs: Callable[[int], dict[str, Tensor]] | None = None


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _tokens(n: int, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(4, VOCABULARY, (n, length), generator=_generator(seed))


def _text(n: int) -> dict[str, Tensor]:
    return {"input_ids": _tokens(n), "attention_mask": torch.ones(n, LENGTH, dtype=torch.long)}


def _pair(n: int) -> dict[str, Tensor]:
    return {**_text(n), "decoder_input_ids": _tokens(n, 4, 1)}


def _image(n: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(n, 3, 16, 16, generator=_generator(), dtype=torch.float64)}


def _sound(n: int) -> dict[str, Tensor]:
    return {"input_features": torch.randn(n, 8, 16, generator=_generator(), dtype=torch.float64)}


def _sound_and_text(n: int) -> dict[str, Tensor]:
    return {**_sound(n), "decoder_input_ids": _tokens(n, 4, 1)}


def _built(family: str, head: str, **config: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        torch.manual_seed(0)
        made = getattr(transformers, family + "Config")(**config)
        return getattr(transformers, family + head)(made).double().eval()  # type: ignore[no-any-return]

    return make


_WIDTHS = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
_PATCHES = {key: value for key, value in _WIDTHS.items() if key != "vocab_size"}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_GROUPED = {**_WIDTHS, **_SPECIAL, "num_key_value_heads": 2}

ZOO = [
    Entry(
        "GPT-2",
        _built("GPT2", "LMHeadModel", vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=4, n_positions=32, **_SPECIAL),
        _text,
        generates=True,
    ),
    Entry("Llama", _built("Llama", "ForCausalLM", **_GROUPED), _text, generates=True),
    Entry("Gemma 2", _built("Gemma2", "ForCausalLM", **_GROUPED, head_dim=4, sliding_window=8), _text, generates=True),
    Entry("BERT", _built("Bert", "ForMaskedLM", **_WIDTHS, max_position_embeddings=32), _text),
    Entry(
        "T5",
        _built(
            "T5", "ForConditionalGeneration", vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
        ),
        _pair,
        generates=True,
        generate_inputs=_text,
    ),
    Entry(
        "Whisper",
        _built(
            "Whisper", "ForConditionalGeneration", vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=8,
            max_source_positions=8, max_target_positions=16, decoder_start_token_id=1, **_SPECIAL,
        ),
        _sound_and_text,
        generates=True,
        generate_inputs=_sound,
    ),
    Entry("ViT", _built("ViT", "ForImageClassification", **_PATCHES, image_size=16, patch_size=4), _image),
    Entry(
        "ResNet",
        _built("ResNet", "ForImageClassification", embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic"),
        _image,
    ),
    Entry(
        "Mamba",
        _built("Mamba", "ForCausalLM", vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=2, **_SPECIAL),
        _text,
        generates=True,
    ),
]  # fmt: skip

MIXTRAL = Entry(
    "Mixtral", _built("Mixtral", "ForCausalLM", **_GROUPED, num_local_experts=4, num_experts_per_tok=2), _text, generates=True
)
