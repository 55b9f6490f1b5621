"""Whole layers: lookups, attention, recurrent layers, packed sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flipout.following.facts import aligned, argument, fact_of, first_operand, joined, lost, operands_of
from flipout.following.families import HANDLERS, register
from flipout.following.indexing import index_selected
from flipout.rows import NONE, UNKNOWN, Mixed, Rows, Tracker, entries, ordered


def _lookup(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    index = argument(args, kwargs, 0, "input")
    table = argument(args, kwargs, 1, "weight")
    fact, of_table = fact_of(tracker, index), fact_of(tracker, table)
    if isinstance(of_table, Rows):
        return index_selected(tracker, (table, 0, index), {}, result) if index.dim() == 1 else lost(table, of_table)
    if of_table is not NONE and isinstance(of_table, Mixed):
        return of_table
    return fact if fact is not NONE or of_table is NONE else UNKNOWN


def _bags(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    index, offsets = argument(args, kwargs, 0, "input"), argument(args, kwargs, 2, "offsets")
    return fact_of(tracker, index if index.dim() == 2 else offsets)


def _attended(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """scaled_dot_product_attention: the batch axes of queries, keys and values."""
    operands = operands_of(args, kwargs)
    facts = [aligned(fact_of(tracker, x), x, result.dim()) for x in operands]
    fact = joined(tracker, facts)
    return lost(operands[0], fact) if isinstance(fact, Rows) and fact.axis >= result.dim() - 2 else fact


def _multi_head(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    operands = operands_of(args, kwargs)[:3]
    fact = joined(tracker, [fact_of(tracker, x) for x in operands])
    if isinstance(fact, Rows) and fact.axis != operands[0].dim() - 2:
        fact = lost(operands[0], fact)
    return [fact, fact._replace(axis=0) if isinstance(fact, Rows) else fact]


def _recurrent(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """torch.lstm and its kin: the output stands as the input, final states have the sequences on axis 1."""
    x, fact = first_operand(tracker, args, kwargs)
    if not isinstance(fact, Rows):
        return fact
    if x.dim() == 2 and (isinstance(args[1], Tensor) and args[1].dim() == 1):  # packed
        first = int(args[1][0])
        states = Rows(1, fact.count, order=entries(fact, x.device)[:first])
    else:
        states = fact._replace(axis=1)
    return [fact, *[states] * (len(result) - 1)]


def _cell(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    return fact_of(tracker, argument(args, kwargs, 0, "input"))


def _packed(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """_pack_padded_sequence(input, lengths, batch_first) -> data, batch_sizes."""
    x, fact = first_operand(tracker, args, kwargs)
    if not isinstance(fact, Rows):
        return fact
    stand = entries(fact, x.device)
    order = torch.cat([stand[: int(size)] for size in result[1]])
    return [Rows(0, fact.count, order=order), NONE]


def _unpacked(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """_pad_packed_sequence(data, batch_sizes, batch_first, …) -> padded, lengths."""
    fact, sizes = fact_of(tracker, args[0]), args[1]
    if not isinstance(fact, Rows):
        return fact
    axis = 0 if args[2] else 1
    return [ordered(fact, entries(fact, args[0].device)[: int(sizes[0])], axis), NONE]


register(_lookup, "embedding")


register(_bags, "embedding_bag")


register(_attended, "scaled_dot_product_attention")


HANDLERS[F.multi_head_attention_forward] = _multi_head


register(_recurrent, "lstm gru rnn_tanh rnn_relu")


register(_cell, "lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell")


register(_packed, "_pack_padded_sequence")


register(_unpacked, "_pad_packed_sequence")
