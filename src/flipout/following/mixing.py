"""Operations along axes: reductions, norms, sorting, and those whose entries come from anywhere."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from flipout.following.facts import argument, fact_of, first_operand, joined, lost, operands_of, without_axis
from flipout.following.families import HANDLERS, Handler, register
from flipout.following.pointwise import elementwise, unknown
from flipout.rows import BATCH, UNKNOWN, Mixed, Rows, Tracker

__all__ = ["along_dim", "leading"]


def leading(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """Operations that keep the leading axes and change the last ones: pooling, resizing, convolutions, lookups."""
    x, fact = first_operand(tracker, args, kwargs)
    y = result[0] if isinstance(result, (tuple, list)) else result
    if not isinstance(fact, Rows):
        return fact if isinstance(fact, Mixed) else UNKNOWN
    return fact if fact.axis < y.dim() and y.shape[fact.axis] == x.shape[fact.axis] else lost(x, fact)


def _scattered(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """Operations whose entries come from anywhere in their operands."""
    for x in operands_of(args, kwargs):
        fact = fact_of(tracker, x)
        if isinstance(fact, Rows):
            return Mixed(f"which was picked from entries of one of shape {tuple(x.shape)}, whoever's they are")
    return unknown(tracker, args, kwargs, result)


def _matrixwise(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """Functions of the matrices in the last two axes, which may hold no rows."""
    facts = []
    for x in operands_of(args, kwargs):
        fact = fact_of(tracker, x)
        facts.append(lost(x, fact) if isinstance(fact, Rows) and fact.axis >= x.dim() - 2 else fact)
    return joined(tracker, facts)


def _across(at: int, default: Any = None) -> Handler:
    """Operations that mix the entries along a dimension, which is their argument at a position."""

    def handler(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
        x, fact = first_operand(tracker, args, kwargs)
        if not isinstance(fact, Rows):
            return fact
        dim = argument(args, kwargs, at, "dim", default)
        dims = range(x.dim()) if dim is None else (dim,) if isinstance(dim, int) else dim
        return lost(x, fact) if fact.axis in {d % x.dim() for d in dims} else fact

    return handler


def _beyond(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """Layer norms, which mix the axes of their normalized shape."""
    x, fact = first_operand(tracker, args, kwargs)
    shape = argument(args, kwargs, 1, "normalized_shape")
    width = 1 if isinstance(shape, int) else len(shape)
    return lost(x, fact) if isinstance(fact, Rows) and fact.axis >= x.dim() - width else fact


def _before(axes: int) -> Handler:
    """Norms over channels or positions, which keep their first axes apart, or see a whole batch on purpose."""

    def handler(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
        x, fact = first_operand(tracker, args, kwargs)
        return lost(x, fact) if isinstance(fact, Rows) and fact.axis >= axes else fact

    return handler


def _along(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """Gathers, scatters, sorts and running sums along a dimension: along the rows they mix them."""
    x, _ = first_operand(tracker, args, kwargs)
    dim = argument(args, kwargs, 1, "dim", -1)
    if not isinstance(dim, int):
        dim = kwargs.get("dim", -1)
    return along_dim(tracker, x, dim, [t for t in operands_of(args, kwargs) if t.dim() == x.dim()])


def along_dim(tracker: Tracker, x: Tensor, dim: int, operands: list[Tensor]) -> Any:
    facts = [fact_of(tracker, t) for t in operands]
    for t, fact in zip(operands, facts, strict=True):
        if isinstance(fact, Rows) and dim % max(x.dim(), 1) == fact.axis:
            return lost(t, fact)
    return joined(tracker, facts)


def _taken(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """take_along_dim(input, indices, dim)."""
    x, index, dim = args[0], argument(args, kwargs, 1, "indices"), argument(args, kwargs, 2, "dim")
    return _scattered(tracker, args, kwargs, result) if dim is None else along_dim(tracker, x, dim, [x, index])


def _ranked(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """topk and kthvalue."""
    x, fact = first_operand(tracker, args, kwargs)
    dim = argument(args, kwargs, 2, "dim", -1) % max(x.dim(), 1)
    if not isinstance(fact, Rows):
        return fact
    if dim == fact.axis:
        return lost(x, fact)
    y = result[0]
    return fact if y.dim() == x.dim() else without_axis(fact, dim, x)


def _reduced(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    x, fact = first_operand(tracker, args, kwargs)
    others = [value for value in args[1:] if isinstance(value, Tensor)]
    if others:  # max and min of two tensors
        return elementwise(tracker, args, kwargs, result)
    if not isinstance(fact, Rows):
        return fact
    y = result[0] if isinstance(result, (tuple, list)) else result
    named = [kwargs[name] for name in ("dim", "axis", "dims") if name in kwargs]
    listed = [v for v in args[1:] if (isinstance(v, int) and not isinstance(v, bool)) or (isinstance(v, (tuple, list)) and v)]
    dim = named[0] if named else (listed[0] if listed else None)
    if dim is None:
        return BATCH
    dims = {d % x.dim() for d in ([dim] if isinstance(dim, int) else dim)} or set(range(x.dim()))
    if fact.axis in dims:
        return BATCH
    return fact if y.dim() == x.dim() else fact._replace(axis=fact.axis - sum(d < fact.axis for d in dims))


def _normed(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """norm(x, p, dim): the order comes first."""
    rest = (args[0], *args[2:])
    return _reduced(tracker, rest, {k: v for k, v in kwargs.items() if k in ("dim", "keepdim")}, result)


register(_across(1), "softmax log_softmax softmin")


register(_across(4, -1), "gumbel_softmax")


register(_across(2, 1), "normalize")


register(_across(1, -1), "glu diff")


register(_beyond, "layer_norm rms_norm native_layer_norm")


register(_before(1), "group_norm local_response_norm")


register(_before(2), "instance_norm batch_norm")


register(
    _scattered,
    "take masked_select cov corrcoef unique unique_consecutive nonzero argwhere bincount histc cartesian_prod combinations pdist "
    "block_diag",
)


register(
    _matrixwise,
    "inverse inv pinv pinverse qr svd svdvals cholesky eigh eigvalsh eig eigvals det slogdet logdet matrix_exp matrix_power "
    "matrix_norm solve lstsq lu_factor cond matrix_rank",
)


register(_along, "gather cumsum cumprod cummax cummin logcumsumexp sort argsort")


register(_along, "index_fill")


register(_taken, "take_along_dim")


register(_ranked, "topk kthvalue")


HANDLERS[F.fold] = leading


register(
    _reduced,
    "sum mean amax amin max min var std prod logsumexp any all argmax argmin median nanmedian mode nansum nanmean std_mean "
    "var_mean aminmax count_nonzero",
)


register(_normed, "norm vector_norm")


register(
    leading,
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d max_pool1d max_pool2d max_pool3d avg_pool1d "
    "avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d lp_pool1d lp_pool2d interpolate upsample grid_sample pixel_shuffle pixel_unshuffle one_hot multinomial "
    "max_pool1d_with_indices max_pool2d_with_indices fractional_max_pool2d max_unpool1d max_unpool2d channel_shuffle",
)
