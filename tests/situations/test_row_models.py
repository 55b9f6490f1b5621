"""Models of the transformers package whose rows are hard to follow: windows, frames, choices, tables of positions made by nets."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws import distance
from torch import Tensor, nn
from zoo import _PATCHES, _SPECIAL, _WIDTHS, VOCABULARY, _built

import flipout

transformers = pytest.importorskip("transformers", reason="models from outside need the transformers package")
transformers.logging.set_verbosity_error()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(n: int, length: int, *more: int) -> Tensor:
    return torch.randint(4, VOCABULARY, (n, length, *more), generator=seeded())


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(), dtype=torch.float64)


def text(n: int, length: int) -> dict[str, Tensor]:
    mask = torch.ones(n, length, dtype=torch.long)
    mask[0, length - 1 :] = 0
    return {"input_ids": tokens(n, length), "attention_mask": mask}


def image(n: int, length: int) -> dict[str, Tensor]:
    return {"pixel_values": floats(n, 3, 16, 16)}


def frames(n: int, length: int) -> dict[str, Tensor]:
    return {"pixel_values": floats(n, 4, 3, 16, 16)}


def ending(n: int, length: int) -> dict[str, Tensor]:
    """Text that ends at different places, where CLIP pools."""
    ids = tokens(n, length)
    for i in range(n):
        ids[i, 1 + i % (length - 1)] = 2
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def choices(n: int, length: int) -> dict[str, Tensor]:
    ids = tokens(n, n, length)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def layout(n: int, length: int) -> dict[str, Tensor]:
    boxes = torch.randint(0, 10, (n, length, 2), generator=seeded(3))
    return {**text(n, length), "bbox": torch.cat([boxes, boxes + torch.randint(1, 5, (n, length, 2), generator=seeded(4))], -1)}


def sound(n: int, length: int) -> dict[str, Tensor]:
    return {"input_features": floats(n, 8, 16), "decoder_input_ids": tokens(n, length)}


def pair(n: int, length: int) -> dict[str, Tensor]:
    return {**text(n, length), "decoder_input_ids": tokens(n, length)}


_SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 2}
_T5 = {
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
_TEXT = {**_WIDTHS, "max_position_embeddings": 32}
_CLIP_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
_DEBERTA = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 4,
    "type_vocab_size": 0,
    "pooler_hidden_size": 16,
}

#: TimeSformer takes the class tokens of all examples from the frames of the first ones, which differ where weights do.
REFUSED = {"TimeSformer"}

Inputs = Callable[[int, int], dict[str, Tensor]]
MODELS: dict[str, tuple[Callable[[], nn.Module], Inputs, dict[str, Any]]] = {
    "Swin": (_built("Swin", "ForImageClassification", **_SWIN), image, {}),
    "SwinV2": (_built("Swinv2", "ForImageClassification", **_SWIN), image, {}),
    "BERT, choices": (_built("Bert", "ForMultipleChoice", **_TEXT), choices, {}),
    "CLIP, text": (_built("CLIPText", "Model", **_TEXT, bos_token_id=1, eos_token_id=2, pad_token_id=0), ending, {}),
    "CLIP, vision": (_built("CLIPVision", "Model", **_CLIP_VISION), image, {}),
    "DeBERTa-v2": (_built("DebertaV2", "Model", **_TEXT, **_DEBERTA), text, {}),
    "Longformer": (
        _built("Longformer", "Model", **{**_TEXT, "max_position_embeddings": 40}, attention_window=[4, 4], **_SPECIAL),
        text,
        {},
    ),
    "T5": (_built("T5", "ForConditionalGeneration", vocab_size=VOCABULARY, **_T5), pair, {}),
    "Whisper": (
        _built(
            "Whisper",
            "ForConditionalGeneration",
            vocab_size=VOCABULARY,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            num_mel_bins=8,
            max_source_positions=8,
            max_target_positions=16,
            decoder_start_token_id=1,
            **_SPECIAL,
        ),
        sound,
        {},
    ),
    "ViT": (_built("ViT", "ForImageClassification", **_PATCHES, image_size=16, patch_size=4), image, {}),
    "DINOv2": (_built("Dinov2", "ForImageClassification", **_PATCHES, image_size=16, patch_size=4), image, {}),
    "LayoutLM": (_built("LayoutLM", "Model", **_TEXT, max_2d_position_embeddings=32), layout, {}),
    "VideoMAE": (
        _built("VideoMAE", "ForVideoClassification", **_PATCHES, image_size=16, patch_size=8, num_frames=4, tubelet_size=2),
        frames,
        {},
    ),
    "TimeSformer": (
        _built("Timesformer", "ForVideoClassification", **_PATCHES, image_size=16, patch_size=8, num_frames=4),
        frames,
        {},
    ),
    "Mamba": (
        _built("Mamba", "ForCausalLM", vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=2, **_SPECIAL),
        lambda n, length: {"input_ids": tokens(n, length)},
        {},
    ),
    "Perceiver": (
        _built(
            "Perceiver",
            "ForMaskedLM",
            vocab_size=VOCABULARY,
            num_latents=3,
            d_latents=16,
            d_model=16,
            num_blocks=1,
            num_self_attends_per_block=2,
            num_self_attention_heads=2,
            num_cross_attention_heads=2,
            max_position_embeddings=8,
        ),
        lambda n, length: {"inputs": tokens(n, 8), "attention_mask": torch.ones(n, 8, dtype=torch.long)},
        {},
    ),
}


@functools.cache
def built(name: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = MODELS[name][0]()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=seeded(1), dtype=parameter.dtype) * 0.1)
    return module


def outputs(result: Any) -> Tensor:
    """What a model returns, whatever it calls it."""
    return result.logits if "logits" in result else result.last_hidden_state if "last_hidden_state" in result else result[0]


def pooled(result: Any) -> Tensor | None:
    return getattr(result, "pooler_output", None)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("n", "length"), [(2, 6), (3, 3), (4, 4)])
@pytest.mark.parametrize("name", MODELS)
def test_every_row_is_its_member(name: str, n: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs, options = built(name), MODELS[name][1](n, length), MODELS[name][2]
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    if name in REFUSED:
        with pytest.raises(flipout.BatchError, match="exclude="):
            flipout.Perturbed(module, flipout.Gaussian(0.1), generator=seeded())(**inputs)
        return
    net = flipout.Perturbed(module, flipout.Gaussian(0.1), generator=seeded(), unmet="ignore", **options)
    with torch.no_grad(), net.hold(members=n) as draw:
        ours = net(**inputs)
        for i in range(n):
            alone = draw.module(i)(**{key: value[i : i + 1] for key, value in inputs.items()})
            assert distance(outputs(ours)[i : i + 1], outputs(alone)) < 1e-8
            if pooled(ours) is not None:
                assert distance(pooled(ours)[i : i + 1], pooled(alone)) < 1e-8
