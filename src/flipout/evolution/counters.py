"""Noise as a function of where it is used: (seed, generation, base, parameter, member), and of nothing else.

The random words come from Philox (Salmon et al. 2011, *Parallel random numbers: as easy as 1, 2, 3*), a generator without state:
the words at a counter are a bijection of the counter under the seed's key. Here the four words of the counter are

    (position, parameter, base, generation)

with a block of positions of its own for every member, so that no two uses share a word, and any member of any generation can be
drawn alone, in any chunk, on any machine. Words are made on the CPU and moved, so devices agree as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flipout.signs import packed_size

__all__ = ["Counters", "Place"]

Words = np.ndarray[Any, np.dtype[np.uint64]]

#: Words that Philox makes from one counter.
_BLOCK = 4


@dataclass(frozen=True, slots=True)
class Place:
    """Whose noise is drawn.

    Attributes:
        generation: 0, 1, ...
        base: which base perturbation of the generation; 0 for what belongs to single members.
        parameter: which parameter, and which of its draws.
    """

    generation: int
    base: int
    parameter: int


class Counters:
    """Bits and normal numbers at places.

    Args:
        seed: any integer of at least 0; two seeds have nothing in common.

    Example:
        >>> place, noise = Place(generation=3, base=0, parameter=1), Counters(seed=0)
        >>> torch.equal(noise.bits(place, 0, 100, 24)[7:9], noise.bits(place, 7, 9, 24))
        True
    """

    def __init__(self, seed: int) -> None:
        self._key = np.random.SeedSequence(seed).generate_state(2, np.uint64)

    def words(self, place: Place, start: int, stop: int, each: int) -> Words:
        """Random 64-bit words ``[stop - start, each]`` of members ``start`` to ``stop - 1``."""
        blocks = -(-each // _BLOCK)
        counter = np.array([start * blocks, place.parameter, place.base, place.generation], dtype=np.uint64)
        raw = np.random.Philox(counter=counter, key=self._key).random_raw((stop - start) * blocks * _BLOCK)
        words: Words = raw.reshape(stop - start, blocks * _BLOCK)[:, :each]
        return words

    def bits(self, place: Place, start: int, stop: int, count: int) -> Tensor:
        """Independent fair bits of each member, packed: uint8 ``[stop - start, ceil(count / 8)]`` on the CPU."""
        words = self.words(place, start, stop, -(-count // 64))
        packed = np.ascontiguousarray(words).astype("<u8", copy=False).view(np.uint8)
        return torch.from_numpy(packed[:, : packed_size(count)])

    def normals(self, place: Place, start: int, stop: int, count: int) -> Tensor:
        """Independent normal numbers of each member: float32 ``[stop - start, count]`` on the CPU.

        Sixteen bits each pick one of 65,536 equally likely quantiles, so that the law is symmetric, has variance one and ends at
        4.3 standard deviations, and a number is the same to the last bit wherever it is drawn.
        """
        words = self.words(place, start, stop, -(-count // 4))
        index = np.ascontiguousarray(words).astype("<u8", copy=False).view(np.uint16)
        return torch.from_numpy(_quantiles()[index[:, :count]])


@cache
def _quantiles() -> np.ndarray[Any, np.dtype[np.float32]]:
    """The normal quantiles at the midpoints of 65,536 equal parts, scaled to variance one."""
    with torch.inference_mode(False):
        middle = (torch.arange(2**15, dtype=torch.float64) + 0.5) / 2**15
        upper = torch.erfinv(middle)
        upper = upper / upper.square().mean().sqrt()
        table: np.ndarray[Any, np.dtype[np.float32]] = torch.cat([-upper.flip(0), upper]).numpy().astype(np.float32)
        return table
