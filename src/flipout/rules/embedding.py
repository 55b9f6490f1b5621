"""Lookups: ``embedding``, ``embedding_bag`` and indexing a weight by a tensor of the batch.

    y_n = W̄[i_n] + ΔW[i_n] ∘ c_n

A row of the table is read, so signs along the columns suffice: c_n ∈ {±1}^dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flipout.errors import BatchError, UnsupportedNoiseError
from flipout.estimators import Estimator, LocalReparameterization
from flipout.registry import rule
from flipout.rows import Rows
from flipout.rules.axes import broadcast, reshape, take
from flipout.rules.constants import listed
from flipout.rules.routed import routed_error
from flipout.rules.structure import index_basic
from flipout.weight import Layout, PerturbedWeight, Term, carriers_in, missing_rule, require_data

__all__ = ["lookup"]


def _refuse_local(weight: PerturbedWeight, indices: Tensor) -> None:
    if isinstance(weight.origin.estimator, LocalReparameterization):
        raise UnsupportedNoiseError(
            f"LocalReparameterization met the table {weight.origin.name!r} at indices of shape {tuple(indices.shape)}: repeated "
            "indices share a row, and independent noise would be biased; use Flipout(), or exclude the table"
        )


def lookup(indices: Tensor, weight: PerturbedWeight, read: Any, padding_idx: int | None = None) -> Tensor:
    """``weight[indices]`` per member, with ``read(indices, table)`` the plain lookup; result ``[*indices.shape, dim]``.

    Entries at ``padding_idx`` get no gradient, as from ``read``.
    """
    _refuse_local(weight, indices)
    if weight.batch.members is None:
        flat = indices.reshape(-1)
        return lookup(flat, weight.for_tokens(flat.numel()), read, padding_idx).view(*indices.shape, *weight.mean_weight.shape[1:])
    if weight.batch.constant(indices):  # positions: a part of the table, which is a weight
        index = indices  # an expanded axis is looked up once
        for axis, (n, step) in enumerate(zip(indices.shape, indices.stride(), strict=True)):
            index = index.narrow(axis, 0, 1) if n > 1 and step == 0 else index
        part = take(weight, 0, index.flatten())
        part = reshape(part, (*index.shape, *part.mean_weight.shape[1:]))
        part = listed(part, part.dense()) if index.shape[:1] == (1,) else part
        return part if index is indices else broadcast(part, (*indices.shape, *part.mean_weight.shape[indices.dim() :]))
    indices, place = weight.rows_in(indices, 0, "a lookup")
    weight, axis = weight.at(place), place.axis
    rows = indices.shape[axis]
    y: Tensor = read(indices, weight.mean_weight)
    if not rows:
        return y
    for term in weight.terms:
        value = _term(indices, axis, rows, term, weight, read)
        if term.per_member and padding_idx is not None:
            padded = indices == padding_idx % weight.mean_weight.shape[0]
            value = torch.where(padded.unsqueeze(-1), value.detach(), value)
        y = y + value
    return y


def _term(indices: Tensor, axis: int, rows: int, term: Term, weight: PerturbedWeight, read: Any) -> Tensor:
    members = weight.batch.members or 1
    owner = torch.arange(members, device=indices.device).repeat_interleave(rows // members)
    owner = owner.view(*[1] * axis, rows, *[1] * (indices.dim() - axis - 1))  # which member a row belongs to
    if term.per_member:
        table, whose = term.base.expand(-1, *weight.mean_weight.shape), owner
        if term.groups is not None:
            whose = term.groups.of(len(table), indices.device)[owner]
        elif len(table) != members:
            table = table.expand(members, *weight.mean_weight.shape)
        value: Tensor = table[whose, indices]
    else:
        base = term.base
        value = read(indices, base) if base.dim() else base.expand(*indices.shape, *weight.mean_weight.shape[1:])
    for factor in term.factors:
        by_member = factor.broadcast(weight.mean_weight.dim(), term.base.dtype)
        at_row = by_member[owner, indices] if by_member.shape[1] != 1 else by_member[owner, 0]
        value = value * at_row
    return value


@rule(F.embedding, Estimator)
def embedding(
    input: Tensor,
    weight: PerturbedWeight,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    require_data(F.embedding, input)
    if max_norm is not None:
        raise missing_rule(F.embedding, weight, (input, weight), "max_norm rewrites the table in place")

    def read(indices: Tensor, table: Tensor) -> Tensor:
        return F.embedding(indices, table, padding_idx, None, norm_type, scale_grad_by_freq, sparse)

    return lookup(input, weight, read, padding_idx)


@rule(torch.Tensor.__getitem__, Estimator)
def getitem(weight: Any, index: Any) -> Any:
    """Basic indexing of a weight stays a carrier; one tensor of indices is a lookup; a carrier indexes nothing."""
    if not isinstance(weight, PerturbedWeight):
        raise missing_rule(torch.Tensor.__getitem__, next(carriers_in(index)), (weight, index), "it stands where an index should")
    items: Any = index if isinstance(index, tuple) else (index,)
    if not any(isinstance(item, (Tensor, list)) for item in items):
        return index_basic(weight, items)
    if len(items) > 1 or not isinstance(items[0], Tensor) or items[0].dtype == torch.bool:
        raise missing_rule(torch.Tensor.__getitem__, weight, (weight,), "only one tensor of integer indices is a lookup")
    if not items[0].dim() and weight.batch.members is None:  # one matrix for all the tokens at hand
        return index_basic(weight, (int(items[0]),))
    if not items[0].dim() and weight.mean_weight.dim() > 2:
        raise routed_error(weight, "an index")
    return lookup(items[0], weight, lambda i, table: table[i])


@rule(F.embedding_bag, Estimator)
def embedding_bag(
    input: Tensor,
    weight: Any,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Any = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Sum, mean or maximum over each bag; a bag is a row of a 2-D ``input``, or a run between ``offsets``.

    ``sparse`` gives the table a sparse gradient, as from torch. ``norm_type`` is the norm of ``max_norm``, which is refused, and
    has no effect without it.
    """
    require_data(F.embedding_bag, input, offsets)
    if max_norm is not None or not isinstance(weight, PerturbedWeight):
        carrier = weight if isinstance(weight, PerturbedWeight) else per_sample_weights
        raise missing_rule(F.embedding_bag, carrier, (input, weight), "max_norm and perturbed per_sample_weights have no rule")
    _refuse_local(weight, input)
    if mode == "max" and sparse:
        raise ValueError("embedding_bag: torch has no sparse gradient of the maximum over a bag; take sparse=False")
    layout = weight.batch
    if input.dim() == 2:
        bags, length = input.shape
        offsets = torch.arange(0, bags * length, length, device=input.device) if length else input.new_zeros(bags)
        flat, samples = input.reshape(-1), None if per_sample_weights is None else per_sample_weights.reshape(-1)
    else:
        assert offsets is not None
        offsets = offsets[:-1] if include_last_offset else offsets
        flat, samples, bags = input, per_sample_weights, offsets.shape[0]
    whose = input if input.dim() == 2 else offsets
    members = layout.members
    if not bags and layout.rows == 0:
        return F.embedding_bag(flat, weight.mean_weight, offsets, mode=mode, per_sample_weights=samples)
    if not members or bags % members or (layout.rows is not None and bags != layout.rows):
        raise BatchError(
            f"embedding_bag met {weight.origin.name!r} with {bags} bags for {members} members and {layout.rows} rows of the "
            "module's own input; give it one bag a row (a 2-D input), or call the module with its offsets first, by keyword: "
            "the first tensor of a call counts its examples"
        )
    fact = layout.known(whose)
    owner = layout.index(fact) if isinstance(fact, Rows) else layout.owner
    ends = torch.cat([offsets[1:], torch.full_like(offsets[:1], flat.numel())])
    bag = torch.repeat_interleave(torch.arange(bags, device=flat.device), ends - offsets, output_size=flat.numel())
    member = bag // (bags // members) if owner is None else owner.to(bag.device)[bag]

    def read(indices: Tensor, table: Tensor) -> Tensor:
        return F.embedding(indices, table, padding_idx, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse)

    # every index becomes a row of its own, read under its bag's member
    by_index = weight.with_rows(
        Layout(flat.numel(), flat.numel(), 0, place=Rows(0, flat.numel())), tuple(term.members(member) for term in weight.terms)
    )
    y = lookup(flat, by_index, read)
    kept = (
        torch.ones_like(flat, dtype=y.dtype)
        if padding_idx is None
        else (flat != padding_idx % weight.mean_weight.shape[0]).to(y.dtype)
    )
    shape = (bags, y.shape[-1])
    if mode == "max":
        lowest = y.masked_fill((kept == 0).unsqueeze(-1), -torch.inf)
        result = torch.full(shape, -torch.inf, dtype=y.dtype, device=y.device)
        result = result.scatter_reduce(0, bag.unsqueeze(-1).expand_as(y), lowest, "amax")
        return torch.where(result.isinf(), 0.0, result)
    scales = kept if samples is None else kept * samples
    total = torch.zeros(shape, dtype=y.dtype, device=y.device).index_add(0, bag, y * scales.unsqueeze(-1))
    if mode == "sum":
        return total
    count = torch.zeros(bags, dtype=y.dtype, device=y.device).index_add(0, bag, kept)
    return total / count.clamp(min=1).unsqueeze(-1)
