"""Random signs as bits: drawn as machine words, kept one bit each, unpacked through a byte table.

A Bernoulli draw per sign costs an order of magnitude more on a CPU than drawing 64 signs with one random word, and
a float per sign costs 32 times the memory of a bit between the forward and the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from flipout.modes import functional, transformed

__all__ = ["draw_bits", "draw_signs", "flip_", "flip_by_", "pack", "packed_size", "unpack"]

_INT64_MIN = -(2**63)


def packed_size(size: int) -> int:
    """Bytes that hold ``size`` signs."""
    return (size + 7) // 8


def draw_bits(rows: int, sizes: Sequence[int], *, generator: torch.Generator | None, device: torch.device) -> list[Tensor]:
    """Draws ``rows`` x ``size`` independent fair bits for each of ``sizes``, from one stream of random words.

    Returns:
        One uint8 tensor ``[rows, ceil(size / 8)]`` for each size; bit ``i`` of a row is bit ``i % 8`` of byte ``i // 8``.

    Example:
        >>> bits, = draw_bits(3, [10], generator=torch.Generator().manual_seed(0), device=torch.device("cpu"))
        >>> bits.shape, bits.dtype
        (torch.Size([3, 2]), torch.uint8)
    """
    counts = [rows * packed_size(size) for size in sizes]
    stream = _random_bytes(sum(counts), generator, device)
    pieces = torch.split_with_sizes(stream, [*counts, stream.numel() - sum(counts)])
    return [piece.view(rows, packed_size(size)) for piece, size in zip(pieces, sizes, strict=False)]


def draw_signs(
    rows: int, sizes: Sequence[int], *, generator: torch.Generator | None, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """As :func:`draw_bits`, but as numbers -1 and +1, ``[rows, size]`` for each size: cheaper where the signs are few.

    Example:
        >>> signs, = draw_signs(3, [10], generator=None, device=torch.device("cpu"), dtype=torch.float32)
        >>> signs.shape, signs.abs().unique()
        (torch.Size([3, 10]), tensor([1.]))
    """
    width = packed_size(sum(sizes))
    stream = _random_bytes(rows * width, generator, device)[: rows * width].view(rows, width)
    pieces = torch.split_with_sizes(unpack(stream, 8 * width, dtype), [*sizes, 8 * width - sum(sizes)], 1)
    return list(pieces[:-1])


def _random_bytes(count: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """At least ``count`` random bytes: a whole number of words."""
    if torch.compiler.is_compiling() or functional():
        # the compiler and vmap have no random_(), and the compiler no generator=None for a size that it does not know
        source: dict[str, Any] = {} if generator is None else {"generator": generator}
        return torch.randint(256, (count,), dtype=torch.uint8, device=device, **source)
    # All 64 bits of a word are random only over the full range: random_() alone leaves the sign bit 0.
    words = torch.empty((count + 7) // 8, dtype=torch.int64, device=device)
    return words.random_(_INT64_MIN, None, generator=generator).view(torch.uint8)


def unpack(bits: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Signs ``[rows, size]`` of -1 and +1 in ``dtype`` from packed bits ``[rows, ceil(size / 8)]``.

    Example:
        >>> unpack(torch.tensor([[0b101]], dtype=torch.uint8), 4, torch.float32)
        tensor([[ 1., -1.,  1., -1.]])
    """
    rows, width = bits.shape
    if transformed():  # arithmetic fuses into the consumer; a table would be a graph input, or be kept from inside a transform
        shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
        signs = ((bits.unsqueeze(-1) >> shifts) & 1).to(dtype) * 2 - 1
    else:
        signs = _byte_table(dtype, bits.device).index_select(0, bits.reshape(-1).int())
    signs = signs.view(rows, 8 * width)
    return signs if 8 * width == size else signs[:, :size]


def pack(signs: Tensor) -> Tensor:
    """The inverse of :func:`unpack`: signs ``[rows, size]`` to bits ``[rows, ceil(size / 8)]``."""
    rows, size = signs.shape
    bits = torch.nn.functional.pad((signs > 0).to(torch.uint8), (0, -size % 8)).view(rows, packed_size(size), 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=signs.device)).sum(-1, dtype=torch.uint8)


def flip_(x: Tensor, bits: Tensor) -> Tensor:
    """Signs times numbers of two bytes, in place: sign bits of ``x [..., size]`` are flipped where a packed bit is 0.

    Args:
        x: ``[rows, size]`` or ``[A, rows, T, size]`` in bfloat16 or float16; nothing is differentiated.
        bits: packed signs ``[rows, ceil(size / 8)]``.

    Example:
        >>> flip_(torch.tensor([[1.0, 2.0, -3.0, 4.0]], dtype=torch.bfloat16), torch.tensor([[0b0101]], dtype=torch.uint8))
        tensor([[ 1., -2., -3., -4.]], dtype=torch.bfloat16)
    """
    size = x.shape[-1]
    masks = _mask_table(bits.device).index_select(0, bits.reshape(-1).int()).view(bits.shape[0], -1)[:, :size]
    x.view(torch.int16).bitwise_xor_(masks if x.dim() == 2 else masks.unsqueeze(1))
    return x


def flip_by_(x: Tensor, signs: Tensor) -> Tensor:
    """As :func:`flip_`, by signs as numbers, which broadcast to ``x``: sign bits are flipped where they are negative."""
    x.view(torch.int16).bitwise_xor_((signs < 0).to(torch.int16).mul_(-(2**15)))
    return x


@cache
def _mask_table(device: torch.device) -> Tensor:
    """The sign bit of a number of two bytes for each 0 of each byte, ``[256, 8]``: a constant."""
    with torch.inference_mode(False):
        bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
        return ((1 - bits) * -(2**15)).to(torch.int16).to(device)


@cache
def _byte_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The eight signs of each byte, ``[256, 8]``: a constant."""
    with torch.inference_mode(False):
        bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
        return bits.to(dtype).mul_(2).sub_(1).to(device)
