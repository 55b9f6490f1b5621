"""Operations entry by entry, copies, and tensors that are filled."""

from __future__ import annotations

from typing import Any

import torch

from flipout.following.facts import aligned, argument, fact_of, first_operand, joined, lost, operands_of, without_axis
from flipout.following.families import HANDLERS, register
from flipout.rows import BATCH, FRESH, NONE, UNKNOWN, Mixed, Part, Rows, Tracker
from flipout.weight import PerturbedWeight

__all__ = ["elementwise", "unknown"]


def unknown(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    facts = [fact_of(tracker, x) for x in operands_of(args, kwargs)]
    parts = [fact for fact in facts if isinstance(fact, Part)]
    if parts:
        return joined(tracker, facts)
    mixed = next((fact for fact in facts if isinstance(fact, Mixed) and fact is not NONE and fact is not BATCH), None)
    if mixed is not None:
        return mixed
    if facts and all(fact is NONE or fact is BATCH for fact in facts) and BATCH in facts:
        return BATCH
    return NONE if facts and all(fact is NONE for fact in facts) else UNKNOWN


def elementwise(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    ndim = result.dim()
    return joined(tracker, [aligned(fact_of(tracker, x), x, ndim) for x in operands_of(args, kwargs)])


def _broadcast(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """The data stand where they stood; a weight that met data has got their rows."""
    tensors = args[0] if len(args) == 1 and isinstance(args[0], (list, tuple)) else args
    facts = [aligned(fact_of(tracker, x), x, result[0].dim()) for x in tensors]
    rows = joined(tracker, facts)
    return [
        rows if type(x) is PerturbedWeight or (isinstance(rows, Rows) and fact is NONE) else fact
        for x, fact in zip(tensors, facts, strict=True)
    ]


def _copied(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """x.copy_(y): what was in x is gone."""
    y = argument(args, kwargs, 1, "src")
    fact = aligned(fact_of(tracker, y), y, result.dim())
    return fact_of(tracker, args[0]) if fact is NONE and isinstance(fact_of(tracker, args[0]), Rows) else fact


def _cast(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    return first_operand(tracker, args, kwargs)[1]


def _compared(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """cosine_similarity(x1, x2, dim=1) and pairwise_distance, whose axis goes."""
    a, b = operands_of(args, kwargs)[:2]
    ndim = max(a.dim(), b.dim())
    fact = joined(tracker, [aligned(fact_of(tracker, x), x, ndim) for x in (a, b)])
    if not isinstance(fact, Rows):
        return fact
    dim = argument(args, kwargs, 2, "dim", 1) % ndim
    return lost(a, fact) if dim == fact.axis else fact if result.dim() == ndim else without_axis(fact, dim, a)


def _fresh(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """new_zeros and its kin: of the operand they have the dtype and the device."""
    return FRESH


def _random(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    return UNKNOWN


def _constant(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    return NONE if not operands_of(args, kwargs) else UNKNOWN


def _filled(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """zeros_like and its kin: a tensor in the shape of one with rows has them; in the shape of anything else, it may."""
    _, fact = first_operand(tracker, args, kwargs)
    return fact if isinstance(fact, Rows) and fact.order is None else FRESH


def _filled_at_random(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    fact = _filled(tracker, args, kwargs, result)
    return UNKNOWN if fact is FRESH else fact


_ELEMENTWISE = """abs absolute neg negative exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal sin cos tan asin
acos atan
arcsin arccos arctan sinh cosh tanh asinh acosh atanh sigmoid logit erf erfc erfinv relu relu6 elu selu celu gelu silu mish softplus
softsign hardtanh hardswish hardsigmoid leaky_relu tanhshrink softshrink hardshrink threshold logsigmoid rrelu prelu dropout
dropout1d
dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout native_dropout clamp clip clamp_min clamp_max round
floor ceil
trunc fix frac sign sgn isnan isinf isfinite nan_to_num add sub subtract mul multiply div divide true_divide floor_divide
remainder fmod
pow float_power maximum minimum fmax fmin lerp addcmul addcdiv where eq ne lt le gt ge not_equal equal greater less greater_equal
less_equal logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not bitwise_xor masked_fill atan2 hypot
copysign float double half bfloat16 int long short bool clone contiguous detach cpu cuda fill zero normal
uniform bernoulli exponential real conj angle complex polar rsub heaviside deg2rad rad2deg digamma lgamma
__add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__ __truediv__ __rtruediv__ __itruediv__ __div__ __rdiv__
__idiv__ __pow__ __rpow__ __ipow__ __neg__ __abs__ __invert__ __and__ __or__ __xor__ __iand__ __ior__ __ixor__ __eq__ __ne__ __lt__
__le__ __gt__ __ge__ __mod__ __floordiv__ __rand__ __ror__ pin_memory requires_grad triu tril"""


register(elementwise, _ELEMENTWISE)


register(_filled, "zeros_like ones_like full_like empty_like")


register(_filled_at_random, "rand_like randn_like randint_like")


register(_cast, "to type type_as view_as_real view_as_complex")


register(_copied, "copy")


register(_fresh, "new_zeros new_ones new_full new_empty zeros ones full empty")


register(_random, "new_tensor rand randn randint randperm")


register(_compared, "cosine_similarity pairwise_distance")


HANDLERS[torch.functional.broadcast_tensors] = _broadcast


register(_constant, "arange linspace logspace eye tril_indices triu_indices")


for _property in ("data", "real", "imag"):
    HANDLERS[getattr(torch.Tensor, _property).__get__] = elementwise
