"""Multi-head attention: one rule for ``F.multi_head_attention_forward``, which is handed its projection weights.

    q_n = Q_n W_qnᵀ,  k_n = K_n W_knᵀ,  v_n = V_n W_vnᵀ,      y_n = softmax(q_n k_nᵀ / √d + mask) v_n W_onᵀ

The four projections are linear maps and go through the rule for :func:`torch.nn.functional.linear`, whatever the estimator; what
lies between them has no weights. The function takes ``[L, N, E]``, also from a module with ``batch_first=True``: here the rows are
axis 1, wherever the module around it has them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flipout.errors import BatchError
from flipout.estimators import Estimator
from flipout.registry import rule
from flipout.rows import NONE, Mixed, Rows
from flipout.rules.axes import take
from flipout.rules.per_row import per_row
from flipout.rules.pointwise import on_place
from flipout.weight import PerturbedWeight, carriers_in, missing_rule, require_data

__all__ = ["attend"]


@rule(F.multi_head_attention_forward, Estimator)
def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Any,
    in_proj_bias: Any,
    bias_k: Any,
    bias_v: Any,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Any,
    out_proj_bias: Any,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Any = None,
    k_proj_weight: Any = None,
    v_proj_weight: Any = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """torch's function, argument for argument, with a weight per member. Returns ``[L, N, E]`` and the attention weights."""
    weights = [in_proj_weight, q_proj_weight, k_proj_weight, v_proj_weight]
    if use_separate_proj_weight:
        weights[0] = None
    everything = (*weights, in_proj_bias, bias_k, bias_v, out_proj_weight, out_proj_bias)
    batched = F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, num_heads)  # type: ignore[attr-defined]
    place = _rows_of_operands(query, key, value, everything)
    if query.shape[-1] != embed_dim_to_check or embed_dim_to_check % num_heads:
        raise ValueError(
            f"attention of {embed_dim_to_check} features and {num_heads} heads got queries of shape {tuple(query.shape)}"
        )
    if not batched:
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    # rows first from here on: [N, L, E]
    *projections, in_proj_bias, bias_k, bias_v, out_proj_weight, out_proj_bias = (_rows_first(w, place) for w in everything)
    q, k, v = _project(_swapped(query, key, value), projections, in_proj_bias)
    own = k.shape[1] if static_k is None else static_k.shape[1]
    if bias_k is not None:
        k, v = _extended(k, bias_k), _extended(v, bias_v)
    q, k, v = (
        t.view(*t.shape[:2], num_heads, embed_dim_to_check // num_heads).transpose(1, 2) for t in (q, k, v)
    )  # [N, heads, L, d]
    k = k if static_k is None else static_k.view(*k.shape[:2], *static_k.shape[1:])
    v = v if static_v is None else static_v.view(*v.shape[:2], *static_v.shape[1:])
    if add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    if is_causal and attn_mask is None:
        raise ValueError("is_causal is a hint about attn_mask, and needs it: pass the causal mask as well")
    is_causal = is_causal and key_padding_mask is None and not need_weights
    mask = None if is_causal else _merged(attn_mask, key_padding_mask, q, k, own)
    y, probabilities = attend(q, k, v, mask, dropout_p if training else 0.0, is_causal, need_weights)
    y = F.linear(y.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias).transpose(0, 1)
    if probabilities is not None and average_attn_weights:
        probabilities = probabilities.mean(1)
    if batched:
        return y, probabilities
    return y.squeeze(1), None if probabilities is None else probabilities.squeeze(0)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, is_causal: bool, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention, and its weights where asked for.

    Args:
        q, k, v: ``[N, heads, L, d]``, ``[N, heads, S, d]``, ``[N, heads, S, d]``.
        mask: added to the logits; broadcastable to ``[N, heads, L, S]``.
        dropout: probability of dropping an attention weight.
        is_causal: mask the future without a ``mask``; not with ``need_weights``.
        need_weights: whether to return the weights ``[N, heads, L, S]``.
    """
    if not need_weights:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal), None
    logits = torch.matmul(q * math.sqrt(1.0 / q.shape[-1]), k.mT)
    probabilities = F.softmax(logits if mask is None else logits + mask, -1)
    if dropout > 0.0:
        probabilities = F.dropout(probabilities, dropout)
    return torch.matmul(probabilities, v), probabilities


@rule(F.scaled_dot_product_attention, Estimator)
def scaled_dot_product(query: Any, key: Any, value: Any, attn_mask: Any = None, *rest: Any, **named: Any) -> Tensor:
    """Attention whose mask is a weight: a bias of positions, of which each row has its member's."""
    require_data(F.scaled_dot_product_attention, query, key, value)
    place = attn_mask.batch.known(query)
    if not isinstance(place, Rows):
        _, place = attn_mask.rows_in(query, 2, "attention")
    mask = on_place(attn_mask, query.dim(), place, "attention")
    return F.scaled_dot_product_attention(query, key, value, mask.to(query.dtype), *rest, **named)


def _rows_of_operands(query: Tensor, key: Tensor, value: Tensor, weights: tuple[Any, ...]) -> Rows | None:
    """Where the rows of queries, keys and values ``[L, N, E]`` stand on axis 1; None where signs are drawn per token.

    Raises:
        BatchError: where the rows of the operands are not the members' rows.
    """
    some = next(carriers_in(weights), None)
    if some is None:  # the operands themselves are carriers
        found = next(carriers_in((query, key, value)))
        raise missing_rule(F.multi_head_attention_forward, found, (query, key, value), "it stands where the data should")
    layout = some.batch
    if layout.members is None:
        return None
    operands = [operand for operand in (query, key, value) if operand.dim() == 3]
    facts = [layout.known(operand) for operand in operands]
    places = [fact for fact in facts if isinstance(fact, Rows)]
    mixed = [fact for fact in facts if isinstance(fact, Mixed) and fact is not NONE]
    rows = {operand.shape[1] for operand in operands} - {1}
    if not places and not mixed and query.dim() == 3:
        allowed = {layout.rows} if layout.rows is not None else {r for r in rows if r % layout.members == 0}
        if not rows - allowed:
            size = layout.rows or next(iter(rows), layout.members)
            return Rows(1, size)
    if places and not mixed and query.dim() == 3 and all(place.axis == 1 and place.same(places[0]) for place in places):
        return places[0]
    raise BatchError(
        f"attention met {some.origin.name!r} with queries, keys and values of shapes {tuple(query.shape)}, {tuple(key.shape)}, "
        f"{tuple(value.shape)} in the order [length, batch, features], but the module's own input has {layout.rows} rows on "
        f"batch_dim={layout.dim} for {layout.members} members{''.join(': an operand ' + m.why for m in mixed)}; pass the "
        "batch_dim of the examples (1 where a module has batch_first=False), and give unbatched input a batch dimension"
    )


def _rows_first(weight: Any, place: Rows | None) -> Any:
    """The carrier for operands whose axis 0 holds the rows."""
    if not isinstance(weight, PerturbedWeight) or place is None:
        return weight
    return weight.at(place._replace(axis=0))


def _swapped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``[N, L, E]`` of each; one tensor given twice stays one tensor, so that one product serves both."""
    q = query.transpose(0, 1)
    k = q if key is query else key.transpose(0, 1)
    return q, k, k if value is key else value.transpose(0, 1)


def _project(operands: tuple[Tensor, Tensor, Tensor], weights: list[Any], bias: Any) -> tuple[Tensor, ...]:
    """The projected queries, keys and values, from one fused weight ``[3E, E]`` or from three."""
    fused, *separate = weights
    width = operands[0].shape[-1]
    if fused is None:
        biases = [_rows_of(bias, i * width, (i + 1) * width) for i in range(3)]
        return tuple(F.linear(x, w, b) for x, w, b in zip(operands, separate, biases, strict=True))
    q, k, v = operands
    if k is v:
        if q is k:
            return F.linear(q, fused, bias).chunk(3, -1)
        pieces = [(q, 0, 1), (k, 1, 3)]
    else:
        pieces = [(q, 0, 1), (k, 1, 2), (v, 2, 3)]
    projected = [F.linear(x, _rows_of(fused, a * width, b * width), _rows_of(bias, a * width, b * width)) for x, a, b in pieces]
    return (projected[0], *projected[1].chunk(2, -1)) if len(pieces) == 2 else tuple(projected)


def _rows_of(weight: Any, start: int, stop: int) -> Any:
    if isinstance(weight, PerturbedWeight):
        return take(weight, 0, slice(start, stop))
    return None if weight is None else weight[start:stop]


def _extended(x: Tensor, extra: Any) -> Tensor:
    """``x`` ``[N, S, E]`` with one more position: the learned ``bias_k`` or ``bias_v`` ``[1, 1, E]``, each row its member's."""
    rows = x.shape[0]
    extra = extra.for_tokens(rows) if isinstance(extra, PerturbedWeight) else extra
    values = per_row(extra, rows).reshape(-1, 1, x.shape[-1]).to(x.dtype)
    return torch.cat([x, values.expand(rows, 1, -1)], 1)


def _merged(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor, own: int) -> Tensor | None:
    """Both masks as numbers to add to the logits ``[N, heads, L, S]``; all see the keys beyond the ``own`` ones."""
    rows, heads, length, keys = *q.shape[:3], k.shape[2]
    other = F._none_or_dtype(attn_mask)
    padding = F._canonical_mask(key_padding_mask, "key_padding_mask", other, "attn_mask", q.dtype)
    mask = F._canonical_mask(attn_mask, "attn_mask", None, "", q.dtype, check_other=False)
    if mask is not None:
        _require_shape("attn_mask", mask, (length, own) if mask.dim() == 2 else (rows * heads, length, own))
        mask = mask.view(rows, heads, length, own) if mask.dim() == 3 else mask
        mask = F.pad(mask, (0, keys - own))
    if padding is None:
        return mask
    _require_shape("key_padding_mask", padding, (rows, own))
    padding = F.pad(padding, (0, keys - own)).view(rows, 1, 1, keys)
    return padding if mask is None else mask + padding


def _require_shape(name: str, mask: Tensor, shape: tuple[int, ...]) -> None:
    if mask.shape != shape:
        raise ValueError(f"the shape of {name} is {tuple(mask.shape)}, but should be {shape}")
