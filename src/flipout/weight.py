"""The carrier: a weight that differs per member, as torch operations meet it.

Member n of N sees the weight

    W_n = W̄ + Σ_t B_t ∘ f_t1[n] ∘ f_t2[n] ∘ …

a mean plus *terms*: a base perturbation B, shared by all members, times *factors* that vary per member along some axes of
the weight. Flipout has one term, ΔW, with sign factors r (output axis) and s (input axis). A low-rank draw has one term a
rank. An independent draw has one term whose base itself has a leading member axis and no factors. The form is closed under
everything that models do to a weight before they use it (see ``rules/structure.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from flipout.errors import BatchError, DrawError, MemberError, MissingRuleError, UnsupportedNoiseError
from flipout.modes import require_randomness, uncounted
from flipout.registry import find_rule, unruled
from flipout.rows import NONE, UNKNOWN, UNSEEN, Layout, Rows
from flipout.signs import draw_bits
from flipout.terms import Factor, Term

__all__ = ["METADATA", "Factor", "Layout", "Origin", "PerturbedWeight", "Term", "carriers_in", "missing_rule", "operation_name"]


@dataclass(frozen=True, slots=True, eq=False)
class Origin:
    """Where a carrier comes from, for its rules and its error messages."""

    name: str
    estimator: Any
    fallback: str | None = None
    generator: torch.Generator | None = None
    uses: list[str] = field(default_factory=list)
    draw: Any = None  # a weak reference, where a call knows it


class PerturbedWeight(torch.Tensor):
    """An immutable weight that differs per member. See the module's docstring for the form.

    It answers metadata reads (shape, dtype, device, …) as the mean does; every other torch operation is handed to a rule of the
    registry or raises :class:`flipout.MissingRuleError`. It is a wrapper subclass without storage whose
    ``__torch_dispatch__`` raises, so that no operation can read it as plain numbers.

    Attributes:
        mean_weight: W̄.
        terms: the summands of the perturbation.
        batch: which rows belong to which member.
        origin: the parameter's name, estimator and fallback.

    Example:
        >>> import flipout
        >>> class Look(torch.nn.Linear):
        ...     def forward(self, x):
        ...         print(self.weight.t())
        ...         return super().forward(x)
        >>> y = flipout.Perturbed(Look(3, 2), flipout.Gaussian(0.1))(torch.ones(4, 3))
        PerturbedWeight('weight', shape=(3, 2), members=4, estimator=Flipout(granularity='example', per_step=False))
    """

    mean_weight: Tensor
    terms: tuple[Term, ...]
    batch: Layout
    origin: Origin

    @staticmethod
    def __new__(cls, mean: Tensor, terms: tuple[Term, ...], layout: Layout, origin: Origin) -> PerturbedWeight:
        carrier: PerturbedWeight = torch.Tensor._make_wrapper_subclass(
            cls,
            mean.shape,
            strides=mean.stride(),
            dtype=mean.dtype,
            device=mean.device,
            requires_grad=mean.requires_grad,
        )
        return carrier

    def __init__(self, mean: Tensor, terms: tuple[Term, ...], layout: Layout, origin: Origin) -> None:
        self.mean_weight = mean
        self.terms = terms
        self.batch = layout
        self.origin = origin

    def replace(self, mean: Tensor, terms: Sequence[Term]) -> PerturbedWeight:
        """The same members with another mean, whose dtype they take, and other terms."""
        cast = tuple(term if term.base.dtype == mean.dtype else term.map(lambda base: base.to(mean.dtype)) for term in terms)
        return PerturbedWeight(mean, cast, self.batch, self.origin)

    def with_rows(self, layout: Layout, terms: tuple[Term, ...] | None = None) -> PerturbedWeight:
        """The same weight for other rows, with the terms of their members where these are others."""
        return PerturbedWeight(self.mean_weight, self.terms if terms is None else terms, layout, self.origin)

    def map(self, function: Callable[[Tensor], Tensor]) -> PerturbedWeight:
        """The carrier with a linear function of each entry applied."""
        return self.replace(function(self.mean_weight), [term.map(function) for term in self.terms])

    def rows_in(self, x: Tensor, features: int, what: str) -> tuple[Tensor, Rows]:
        """Where the rows of ``x`` stand: see :meth:`flipout.rows.Layout.where`."""
        return self.batch.where(x, features, what)

    def moved(self, x: Tensor, y: Tensor, axis: Callable[[int], int] = lambda axis: axis) -> Tensor:
        """Follows the rows of an operand ``x`` into ``y``, which a rule has made of it.

        Args:
            x: the operand, as the rule was given it.
            y: what the rule hands on.
            axis: which axis of ``y`` an axis of ``x`` has become.

        Returns:
            ``y``.
        """
        tracker = self.batch.tracker
        if tracker is not None and self.batch.place is None:
            fact = tracker.consult(x)
            tracker.note(y, fact._replace(axis=axis(fact.axis)) if isinstance(fact, Rows) else UNKNOWN if fact is UNSEEN else fact)
        return y

    def at(self, place: Rows) -> PerturbedWeight:
        """The carrier for an operand whose rows stand at ``place``: its axis has ``k * members`` rows in member-major blocks.

        Where they stand in another order, each entry of the axis becomes a member of its own.
        """
        layout, size = self.batch, place.size
        if layout.members is None:
            return self
        index = layout.index(place)
        if index is None:
            there = Layout(layout.members, size, place.axis, place=Rows(place.axis, size))
            return self.with_rows(there)
        index = index.to(self.mean_weight.device)
        there = Layout(len(index), len(index), place.axis, place=Rows(place.axis, len(index)))
        return self.with_rows(there, tuple(term.members(index) for term in self.terms))

    def dense(self) -> Tensor:
        """The weights of all members, ``[N, *shape]``; costs N times the weight's memory."""
        if self.batch.members is None:
            raise DrawError(f"{self.origin.name} draws its signs per token, so it has no weights to list")
        self.require_drawn("an operation on its entries")
        weights = self.mean_weight.unsqueeze(0)
        for term in self.terms:
            weights = weights + term.dense(self.mean_weight.dim())
        return weights.expand(self.batch.members, *self.mean_weight.shape)

    @property
    def drawn(self) -> bool:
        """Whether the members have weights; not where an estimator draws the noise of a result instead of a weight's."""
        return not any(f.in_result for term in self.terms for f in term.factors)

    def require_drawn(self, what: str) -> None:
        """Raises UnsupportedNoiseError if ``what`` needs weights that the estimator does not draw."""
        if not self.drawn:
            raise UnsupportedNoiseError(
                f"{self.origin.estimator} met {self.origin.name!r} {tuple(self.mean_weight.shape)} in {what}: it draws the noise "
                "of a linear map's result and no weights, so it serves linear maps alone; use Flipout(), or exclude the parameter"
            )

    def member(self, n: int) -> Tensor:
        """The weight of member ``n``, of the mean's shape."""
        members = self.batch.members
        if members is None or not 0 <= n < members:
            raise MemberError(f"member {n} of {self.origin.name}: the draw has members 0 to {(members or 0) - 1}")
        weight = self.mean_weight
        for term in self.terms:
            weight = weight + term.members(slice(n, n + 1)).dense(self.mean_weight.dim())[0]
        return weight

    def for_tokens(self, rows: int) -> PerturbedWeight:
        """Where signs are drawn per token: the carrier with signs for ``rows`` tokens. Otherwise itself."""
        if self.batch.members is not None:
            return self
        require_randomness()
        generator, device = self.origin.generator, self.mean_weight.device
        terms = []
        for term in self.terms:
            with uncounted():
                bits = draw_bits(rows, [factor.count for factor in term.factors], generator=generator, device=device)
            factors = [replace(factor, values=b, packed=True, repeat=1) for factor, b in zip(term.factors, bits, strict=True)]
            terms.append(term.over(term.base, tuple(factors)))
        return self.with_rows(Layout(rows, rows, 0), tuple(terms))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"PerturbedWeight({self.origin.name!r}, shape={tuple(self.mean_weight.shape)}, members={self.batch.members}, "
            f"estimator={self.origin.estimator})"
        )

    def _leaves(self) -> Iterator[tuple[str, Tensor]]:
        yield "mean_weight", self.mean_weight
        for i, term in enumerate(self.terms):
            yield f"_base{i}", term.base
            if term.groups is not None and term.groups.index is not None:
                yield f"_group{i}", term.groups.index
            for j, factor in enumerate(term.factors):
                if factor.values is not None:
                    yield f"_factor{i}_{j}", factor.values

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        leaves = dict(self._leaves())
        vars(self).update(leaves)
        return list(leaves), (self.terms, self.batch, self.origin)

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], context: Any, outer_size: Any, outer_stride: Any) -> PerturbedWeight:
        terms, layout, origin = context
        rebuilt = tuple(
            Term(
                inner[f"_base{i}"],
                tuple(replace(f, values=inner.get(f"_factor{i}_{j}")) for j, f in enumerate(term.factors)),
                term.per_member,
                groups=term.groups and replace(term.groups, index=inner.get(f"_group{i}")),
            )
            for i, term in enumerate(terms)
        )
        return cls(inner["mean_weight"], rebuilt, layout, origin)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        carrier = next((a for a in args if type(a) is PerturbedWeight), None)
        if carrier is None:
            carrier = next(carriers_in((args, kwargs)))
        estimator = carrier.origin.estimator
        several = getattr(estimator, "bases", 1) > 1
        found = find_rule(func, type(estimator), several)
        if "out" in kwargs and not getattr(found, "takes_out", False):
            if kwargs["out"] is not None:
                raise missing_rule(func, carrier, args, _OUT, loops=False)
            kwargs = {key: value for key, value in kwargs.items() if key != "out"}
        if found is None:
            alone = several and find_rule(func, type(estimator)) is not None
            why = "its rule reads one base perturbation, and there are several (write it with bases=True)" if alone else ""
            return unruled(func, args, kwargs, missing_rule(func, carrier, args, why))
        try:
            return found(*args, **kwargs)
        except MissingRuleError as error:
            return unruled(func, args, kwargs, error)
        except BatchError as error:
            name = repr(carrier.origin.name)
            if name in str(error):
                raise
            raise BatchError(f"{error}. The parameter is {name}; exclude={name} leaves it unperturbed") from error

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        raise missing_rule(func, next(carriers_in((args, kwargs or {}))), args)


_OUT = "out= would write each example's result into one tensor"


def carriers_in(tree: Any) -> Iterator[PerturbedWeight]:
    """The carriers among the arguments of an operation, in order."""
    if isinstance(tree, PerturbedWeight):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from carriers_in(item)
    elif isinstance(tree, dict):
        yield from carriers_in(tuple(tree.values()))


def operation_name(func: Any) -> str:
    """A torch function's name as its documentation has it, for messages."""
    name = torch.overrides.resolve_name(func) if callable(func) else None
    if name is None and getattr(func, "__name__", "") in {"__get__", "__set__"}:
        name = f"torch.Tensor.{getattr(getattr(func, '__self__', None), '__name__', '?')}"
    name = name or getattr(func, "__qualname__", None) or str(func)
    return name.replace("_VariableFunctionsClass.", "torch.")


def missing_rule(func: Any, carrier: PerturbedWeight, args: Any, why: str = "", loops: bool = True) -> MissingRuleError:
    """The error for an operation that met a carrier and has no rule; ``loops``: whether the loop over members could serve it."""
    advice = _loop_advice(func, carrier) if loops else ""
    return missing_rule_for(func, carrier.origin.name, carrier.origin.estimator, args, why, advice)


def missing_rule_for(func: Any, parameter: str, estimator: Any, args: Any, why: str = "", advice: str = "") -> MissingRuleError:
    """As :func:`missing_rule`, for a parameter that has no carrier (all members share one weight)."""
    name = operation_name(func)
    shapes = [tuple(a.shape) for a in args if isinstance(a, Tensor)]
    reason = why or f"no rule says how it acts on a weight that differs per example (under {estimator})"
    return MissingRuleError(
        f"{name} met the perturbed parameter {parameter!r} (argument shapes {shapes}), and {reason}. Noise is never "
        f"dropped in silence: pass exclude={parameter!r} to leave this parameter unperturbed, or write a rule with "
        f"@flipout.rule({name}, ...){advice}"
    )


def _loop_advice(func: Any, carrier: PerturbedWeight) -> str:
    """Names the loop over members where it can run, and the estimator under which it could."""
    if not can_loop(func) or carrier.origin.fallback == "loop":
        return ""
    if carrier.origin.estimator.has_members:
        return '. fallback="loop" runs the operation once per member'
    return '. Under flipout.Independent(), fallback="loop" runs the operation once per member'


def can_loop(func: Any) -> bool:
    """Whether an operation has a meaning member by member: not if it writes into a tensor or reads it out of torch."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") in {"H", "mH", "real", "imag"}
    in_place = (name.endswith("_") and not name.endswith("__")) or name.startswith("__i") or name in {"__set__", "__setitem__"}
    return not in_place and name not in _READS


_READS = frozenset(
    """item tolist numpy backward register_hook __bool__ __float__ __int__ __index__ __complex__ __array__ __contains__ __format__
    __deepcopy__ __reduce_ex__ __cuda_array_interface__ __dlpack__ __delete__ as_subclass data_ptr untyped_storage storage equal
    retain_grad share_memory_ is_pinned pin_memory is_shared""".split()  # noqa: SIM905
)


def require_data(func: Any, *operands: Any) -> None:
    """Raises MissingRuleError if a weight stands where an operation takes data."""
    for operand in operands:
        if isinstance(operand, PerturbedWeight):
            raise missing_rule(func, operand, operands, "it stands where the data should")


def loop(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Runs an operation once per member over that member's dense weights and its rows of every other tensor.

    Exact and slow: the meaning that every rule must reproduce.
    """
    carrier = next(carriers_in((args, kwargs)))
    layout = carrier.batch
    members = layout.members
    if not members:
        raise missing_rule(func, carrier, args, "the loop over members needs at least one member")
    places = {id(x): _place(x, layout) for x in tensors_in((args, kwargs)) if not isinstance(x, PerturbedWeight)}
    rows = {key: place for key, place in places.items() if place is not None}
    if not rows and members > 1:
        raise missing_rule(func, carrier, args, "none of its other arguments has the batch's rows to loop over")

    def entries(place: Rows, n: int) -> Tensor:
        owner = layout.index(place)
        if owner is None:
            step = place.size // members
            return torch.arange(n * step, (n + 1) * step, device=carrier.device)
        return (owner == n).nonzero().flatten()

    def of_member(value: Any, n: int) -> Any:
        if isinstance(value, PerturbedWeight):
            return value.member(n)
        if isinstance(value, Tensor):
            place = rows.get(id(value))
            return value if place is None else value.index_select(place.axis, entries(place, n).to(value.device))
        if isinstance(value, (list, tuple)):
            return type(value)(of_member(item, n) for item in value)
        return value

    outputs = [func(*(of_member(a, n) for a in args), **{k: of_member(v, n) for k, v in kwargs.items()}) for n in range(members)]
    first = next(iter(rows.values()), Rows(layout.dim, members))
    axis = first.axis if all(isinstance(y, Tensor) and y.dim() > first.axis for y in outputs) else layout.dim
    if not all(isinstance(output, Tensor) and output.dim() > axis for output in outputs):
        raise missing_rule(func, carrier, args, "its result has no batch dimension to join members on")
    joined = torch.cat(outputs, axis)
    if layout.index(first) is not None and joined.shape[axis] == first.size:  # back into the order of the rows
        order = torch.cat([entries(first, n) for n in range(members)])
        joined = joined.index_select(axis, torch.argsort(order).to(joined.device))
    if layout.tracker is not None and joined.shape[axis] == first.size:
        layout.tracker.landed = first._replace(axis=axis)
    return joined


def _place(x: Tensor, layout: Layout) -> Rows | None:
    """Where an operand of the loop has its rows; None if it has none."""
    fact = layout.known(x)
    if isinstance(fact, Rows):
        return fact
    if fact is NONE:
        return None
    if isinstance(fact, tuple):
        return layout.where(x, 0, "the loop over members")[1]
    dim, rows, members = layout.dim, layout.rows, layout.members or 1
    if x.dim() <= dim or x.shape[dim] % members or (rows is not None and x.shape[dim] != rows):
        return None
    return Rows(dim, x.shape[dim])


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors among the arguments of an operation, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from tensors_in(item)
    elif isinstance(tree, dict):
        yield from tensors_in(tuple(tree.values()))


def _metadata() -> frozenset[Any]:
    properties = """shape dtype device requires_grad ndim is_leaf layout is_cuda is_cpu is_sparse is_sparse_csr is_quantized
        is_nested is_meta is_mkldnn is_mps is_xpu is_xla is_mtia is_ipu is_maia is_vulkan itemsize nbytes output_nr
        _version _base names name retains_grad grad_fn""".split()  # noqa: SIM905
    methods = """size dim stride numel nelement element_size is_contiguous is_floating_point is_complex is_signed
        storage_offset __len__ get_device is_conj is_neg is_inference ndimension is_same_size""".split()  # noqa: SIM905
    reads = [getattr(torch.Tensor, name).__get__ for name in properties if hasattr(torch.Tensor, name)]
    reads += [getattr(torch.Tensor, name) for name in methods]
    return frozenset([*reads, torch.is_floating_point, torch.is_complex, torch.numel])


METADATA = _metadata()
