"""Random signs: fair, pairwise independent, packed without loss, from all 64 bits of a word."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import Z_LIMIT, worst, z_mean

from flipout.signs import draw_bits, draw_signs, pack, packed_size, unpack

CPU = torch.device("cpu")


def _drawn(rows: int, size: int, seed: int, packed: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if packed:
        (bits,) = draw_bits(rows, [size], generator=generator, device=CPU)
        return unpack(bits, size, torch.float64)
    (signs,) = draw_signs(rows, [size], generator=generator, device=CPU, dtype=torch.float64)
    return signs


both = pytest.mark.parametrize("packed", [True, False], ids=["bits", "numbers"])


@both
def test_every_place_is_a_fair_sign(packed: bool) -> None:
    signs = _drawn(20_000, 64, 0, packed)  # 64 places: every bit of a word
    assert signs.abs().eq(1).all()
    assert worst(z_mean(signs, 0.0)) < Z_LIMIT


@both
def test_places_are_pairwise_independent(packed: bool) -> None:
    signs = _drawn(20_000, 64, 1, packed)
    correlations = (signs.T @ signs / 20_000)[torch.ones(64, 64).triu(1).bool()]
    assert worst(correlations * 20_000**0.5) < Z_LIMIT


@both
def test_rows_are_pairwise_independent(packed: bool) -> None:
    signs = _drawn(40, 30_000, 2, packed)
    correlations = (signs @ signs.T / 30_000)[torch.ones(40, 40).triu(1).bool()]
    assert worst(correlations * 30_000**0.5) < Z_LIMIT


@both
def test_triples_are_independent(packed: bool) -> None:
    """Beyond pairs: a sign is not the product of two others, as in a linear code it would be."""
    signs = _drawn(20_000, 64, 3, packed)
    for i in range(0, 64, 7):
        others = torch.cat([signs[:, :i], signs[:, i + 1 :]], 1)
        correlations = ((signs[:, i : i + 1] * others).T @ others / 20_000)[torch.ones(63, 63).triu(1).bool()]
        assert worst(correlations * 20_000**0.5) < Z_LIMIT


def test_every_byte_occurs_equally_often() -> None:
    (bits,) = draw_bits(1, [8 * 256 * 400], generator=torch.Generator().manual_seed(4), device=CPU)
    counts = torch.bincount(bits.flatten().int(), minlength=256).double()
    chi_square = ((counts - 400) ** 2 / 400).sum()
    assert abs(chi_square - 255) < Z_LIMIT * (2 * 255) ** 0.5


def test_targets_of_one_stream_share_nothing() -> None:
    first, second = (
        unpack(bits, 16, torch.float64)
        for bits in draw_bits(20_000, [16, 16], generator=torch.Generator().manual_seed(5), device=CPU)
    )
    assert worst(z_mean(first[:, :, None] * second[:, None, :], 0.0)) < Z_LIMIT


@given(rows=st.integers(0, 5), size=st.integers(0, 70), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_packing_loses_nothing(rows: int, size: int, dtype: torch.dtype) -> None:
    signs = torch.randint(2, (rows, size), generator=torch.Generator().manual_seed(rows + size)).to(dtype) * 2 - 1
    bits = pack(signs)
    assert bits.shape == (rows, packed_size(size))
    assert bits.dtype == torch.uint8
    back = unpack(bits, size, dtype)
    assert back.dtype == dtype
    assert torch.equal(back, signs)


def test_bit_i_of_a_row_is_bit_i_mod_8_of_its_byte() -> None:
    signs = unpack(torch.tensor([[1, 128]], dtype=torch.uint8), 16, torch.float32)
    assert signs.gt(0).nonzero()[:, 1].tolist() == [0, 15]


@both
def test_one_seed_one_draw_and_the_global_state_untouched(packed: bool) -> None:
    before = torch.random.get_rng_state()
    assert torch.equal(_drawn(5, 33, 7, packed), _drawn(5, 33, 7, packed))
    assert not torch.equal(_drawn(5, 33, 7, packed), _drawn(5, 33, 8, packed))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_table_of_signs_is_not_changed_by_its_users() -> None:
    bits = torch.arange(256, dtype=torch.uint8).unsqueeze(0)
    first = unpack(bits, 2048, torch.float32)
    kept = first.clone()
    first.mul_(3)
    assert torch.equal(unpack(bits, 2048, torch.float32), kept)
