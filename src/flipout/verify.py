"""Proving a model: every row of a perturbed net against the plain module with that row's weights."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from flipout.buffers import kept_buffers
from flipout.calls import Call
from flipout.compiled import run_eagerly
from flipout.draw import Draw
from flipout.errors import ArgumentError, BatchError, DrawError, VerificationError
from flipout.modes import autocasts
from flipout.perturb import Perturbed
from flipout.rows import Rows, count_rows, first_batch, own_rows_dim
from flipout.weight import PerturbedWeight, operation_name

__all__ = ["Report", "verify"]

#: The largest difference to allow, relative to the scale of the output, by the coarsest dtype that a model computes in.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 0.05}
#: An axis, and entries of it; or the member of each entry.
_Place = tuple[int, Tensor]
#: Outputs smaller than this are compared as if they were of this size.
_SMALLEST_SCALE = 1e-3


@dataclass(frozen=True)
class Report:
    """What :func:`verify` has found of a model that passed.

    Attributes:
        module: the class of the module.
        estimator: how the members shared the draw.
        members: N, the number of different weights.
        rows: of the input.
        difference: the largest difference between a row and the plain module, relative to the scale of the output.
        tolerance: the largest one that was allowed.
        operations: the torch operations that the module ran.
        met: the perturbed parameters that met an operation.
        unmet: the perturbed parameters that did not, whose noise has no effect in such a call.
        unchecked: the outputs that have no rows and are neither shared, nor the sum or the mean of the members' outputs.

    Example:
        >>> import torch, flipout
        >>> net = flipout.Perturbed(torch.nn.Linear(4, 3), flipout.Gaussian(0.1))
        >>> report = flipout.verify(net, torch.ones(2, 4))
        >>> report.members, report.met, report.difference <= report.tolerance
        (2, ('weight', 'bias'), True)
    """

    module: str
    estimator: str
    members: int
    rows: int
    difference: float
    tolerance: float
    operations: int
    met: tuple[str, ...]
    unmet: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{self.module} under {self.estimator}: each of {self.rows} rows is that of the plain module with its member's weights "
            f"({self.members} members)",
            f"largest difference: {self.difference:.2g} of the output's scale (tolerance {self.tolerance:.2g})",
            f"torch operations: {self.operations}; perturbed parameters that met one: {len(self.met)} of "
            f"{len(self.met) + len(self.unmet)}",
        ]
        if self.unmet:
            lines.append(f"without effect in this call: {', '.join(self.unmet)}")
        if self.unchecked:
            lines.append(f"not compared, since they have no rows: {', '.join(self.unchecked)}")
        return "\n".join(lines)


def verify(net: Perturbed, *inputs: Any, members: int | None = None, tolerance: float | None = None, **kwargs: Any) -> Report:
    """Checks every row against the plain module with its weights.

    Runs the net in evaluation mode under a held draw, and the plain module of each member (``draw.module(n)``) on the rows of that
    member. Buffers, modes, attributes of the module, the global random state and the generator of the net are put back, also after
    an exception. Costs about ``members + 2`` forward passes; where a check fails, some more to find the operation.

    Args:
        net: the wrapper.
        inputs, kwargs: arguments of the module. Tensors and packed sequences in them, also in dicts, lists and dataclasses, that
            have as many entries on ``batch_dim`` as the batch has rows are split; anything else is passed whole.
        members: N, a divisor of the number of rows; None for one member a row.
        tolerance: the largest difference to allow, relative to the scale of each output; None for 1e-9 in float64, 1e-4 in
            float32, 1e-2 in float16, .05 in bfloat16, by the coarsest of these that the model computes in.

    Returns:
        What was found.

    Raises:
        VerificationError: where a row is not that of the plain module, with the first operation whose rows went astray; where the
            plain module itself mixes rows, draws random numbers in evaluation mode, or keeps a state that changes its result.
        DrawError: under an estimator whose members have no weights; while a draw is held.
        ArgumentError: for an argument that cannot mean anything.

    Example:
        >>> import torch, flipout
        >>> net = flipout.Perturbed(torch.nn.GRU(3, 4, batch_first=True).double(), flipout.Gaussian(0.1))
        >>> print(flipout.verify(net, torch.randn(2, 5, 3, dtype=torch.float64)))  # doctest: +ELLIPSIS
        GRU under Flipout(...): each of 2 rows is that of the plain module with its member's weights (2 members)
        largest difference: ... of the output's scale (tolerance 1e-09)
        torch operations: ...; perturbed parameters that met one: 4 of 4
    """
    if not isinstance(net, Perturbed):
        raise ArgumentError(f"verify takes a flipout.Perturbed, got {type(net).__name__}; wrap the module first")
    if tolerance is not None and (isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not tolerance > 0):
        raise ArgumentError(f"tolerance={tolerance!r}: expected a positive number, relative to the scale of the output")
    if not net.estimator.has_members:
        other = "Flipout" if all(noise.symmetric for noise in net.noises.values()) else "Independent"
        raise DrawError(
            f"under {net.estimator} members have no weights that can be listed, so rows cannot be compared with plain modules; "
            f"verify the same weights under another estimator: with net.using(flipout.{other}()): flipout.verify(net, ...)"
        )
    rows = count_rows(net.module, net.batch_dim, inputs, kwargs, net.rows)
    if not rows:
        raise BatchError("the input has no rows, so there is nothing to verify")
    with _put_back(net), run_eagerly():
        net.eval()
        with net.hold(rows if members is None else members) as draw:
            return _Proof(net, draw, rows, inputs, kwargs, tolerance).report()


# --- what is run ------------------------------------------------------------------------------------------------------


class _Proof:
    """The comparison of a net with its members."""

    def __init__(self, net: Perturbed, draw: Draw, rows: int, args: Any, kwargs: Any, tolerance: float | None) -> None:
        assert draw.members is not None
        self.net, self.draw, self.rows, self.members = net, draw, rows, draw.members
        self.inputs = (args, kwargs)
        self.first = first_batch(args, kwargs)
        self.ragged = bool(_packed(self.inputs))
        self.tolerance, self.rounding = tolerance or 0.0, 0.0
        self.given = tolerance is not None

    @property
    def name(self) -> str:
        return type(self.net.module).__name__

    def report(self) -> Report:
        seen = _Recorder(self.net.module)
        whole = self._perturbed(seen)
        again = list(_leaves(self._whole(self.net)))
        outputs = list(_leaves(whole))
        if any(tensor.device.type == "meta" for _, tensor in outputs):
            raise ArgumentError('the outputs are on the device "meta", which has no numbers to compare')
        dtypes = {tensor.dtype for _, tensor in outputs} | {site.mean.dtype for site in self.draw.sites} | seen.dtypes
        self.rounding = max(_TOLERANCES.get(dtype, 1e-9) for dtype in dtypes | _autocast(outputs))
        if not self.given:
            self.tolerance = self.rounding
        if len(again) != len(outputs) or any(_gap(b, a) > self.tolerance for (_, a), (_, b) in zip(outputs, again, strict=True)):
            raise self._unsteady()
        del again
        call = seen.call
        places = [_owners(call, tensor) for _, tensor in outputs]
        shared: dict[int, list[Tensor]] = {}
        largest = 0.0
        for n in range(self.members):
            parts = list(_leaves(self._alone(self.draw.module(n), n)))
            if [path for path, _ in parts] != [path for path, _ in outputs]:
                raise VerificationError(
                    f"{self.name} has other outputs for {self._whose(n)} alone ({_paths(parts)}) than for the batch "
                    f"({_paths(outputs)})"
                )
            for i, ((path, y), (_, part)) in enumerate(zip(outputs, parts, strict=True)):
                gap = self._distance(y, part, n, places[i])
                if gap is None:
                    shared.setdefault(i, []).append(part)
                elif gap > self.tolerance:
                    raise self._astray(n, path, gap)
                else:
                    largest = max(largest, gap)
        unchecked = [outputs[i][0] for i, parts in shared.items() if not self._is_common(outputs[i][1], parts)]
        if len(unchecked) == len(outputs):
            raise VerificationError(
                f"{self.name} returns nothing that has rows ({_paths(outputs)}), so there is nothing to compare; wrap and verify "
                "the part that gives one result for each example, and compute losses outside of it"
            )
        sites = self.draw.sites
        met = set() if call is None else call.met
        return Report(
            self.name, str(self.draw.estimator), self.members, self.rows, largest, self.tolerance, seen.count,
            tuple(site.name for i, site in enumerate(sites) if i in met),
            tuple(site.name for i, site in enumerate(sites) if i not in met),
            tuple(unchecked),
        )  # fmt: skip

    def _whole(self, module: nn.Module) -> Any:
        args, kwargs = _mapped(self.inputs, _cloned)
        return module(*args, **kwargs)

    def _perturbed(self, recorder: _Recorder) -> Any:
        """A call of the net, with what its module does shown to a recorder."""
        with recorder.on(self.net.module):
            return self._whole(self.net)

    def _alone(self, module: nn.Module, n: int) -> Any:
        """A plain module on the rows of a member."""
        args, kwargs = _mapped(self.inputs, lambda leaf: self._part(leaf, n))
        mode = _Failing(module)
        try:
            with mode:  # under any such mode torch takes the same of its fast paths
                return module(*args, **kwargs)
        except Exception as error:
            where = f", in {mode.failed}" if mode.failed else ""
            raise VerificationError(
                f"the plain {self.name} cannot run on {self._whose(n)} alone, so its rows cannot be compared{where} "
                f"({type(error).__name__}: {error}). Tensors with {self.rows} entries on batch_dim={self.net.batch_dim} were "
                "split, the others passed whole; verify a part of it that takes one row alone, or fewer members with several "
                "rows each (members=)"
            ) from error

    def _part(self, leaf: Any, n: int) -> Any:
        """What of an argument belongs to a member."""
        k = self.rows // self.members
        if isinstance(leaf, PackedSequence):
            padded, lengths = pad_packed_sequence(leaf, batch_first=True)
            mine = slice(n * k, (n + 1) * k)
            return pack_padded_sequence(padded[mine], lengths[mine], True, enforce_sorted=leaf.sorted_indices is None)
        axis = self._axis(leaf)
        return _cloned(leaf) if axis is None else _cloned(leaf.narrow(axis, n * k, k))

    def _axis(self, leaf: Tensor) -> int | None:
        """The axis of rows of an argument."""
        module, dim = self.net.module, self.net.batch_dim
        if self.members == 1:
            return None
        if isinstance(module, nn.RNNBase) and leaf is not self.first:
            return 1 if leaf.dim() == 3 else None  # states [layers, N, hidden]
        if leaf.dim() > dim and leaf.shape[dim] == self.rows:
            return dim
        padding = dim == 1 and own_rows_dim(module) == 1 and leaf.dim() == 2  # a mask [N, T] beside tokens [T, N, features]
        return 0 if padding and leaf.shape[0] == self.rows else None

    def _whose(self, n: int) -> str:
        k = self.rows // self.members
        return f"row {n}" if k == 1 else f"rows {n * k} to {(n + 1) * k - 1} (member {n})"

    # --- comparing ------------------------------------------------------------------------------------------------------

    def _distance(self, whole: Tensor, part: Tensor, n: int, owners: _Place | None) -> float | None:
        """How far a member's part of a result is from the member's own result; None for a result without rows."""
        if self.members == 1:
            return _gap(part, whole)
        closest = self._closest(whole, part, n, owners)
        return None if closest is None else closest[0]

    def _places(self, whole: Tensor, part: Tensor, n: int, owners: _Place | None) -> Iterator[_Place]:
        """Where a member's rows may stand: where they were followed to, in a block, in a block of each time step."""
        if part.dim() != whole.dim():
            return
        k = self.rows // self.members
        if owners is not None:
            axis, index = owners
            yield axis, (index == n).nonzero().flatten()
        for axis, size in enumerate(part.shape):
            if size and whole.shape[axis] == size * self.members:
                entries = torch.arange(size * self.members, device=whole.device)
                yield axis, entries[n * size : (n + 1) * size]
                if size % k == 0 and size > k:
                    yield axis, entries.view(size // k, self.rows)[:, n * k : (n + 1) * k].flatten()

    def _at(self, whole: Tensor, part: Tensor, place: _Place) -> Tensor | None:
        """What of a result stands at a place; None where that has not the shape of a member's own result."""
        axis, index = place
        mine = whole.index_select(axis, index)
        if self.ragged:  # a member's own result may be shorter
            for other in range(part.dim()):
                if other != axis and mine.shape[other] > part.shape[other]:
                    mine = mine.narrow(other, 0, part.shape[other])
        return mine if mine.shape == part.shape else None

    def _closest(self, whole: Tensor, part: Tensor, n: int, owners: _Place | None = None) -> tuple[float, _Place] | None:
        """The place that agrees best with a member's own result, and how far it is from it; None for a result without rows."""
        scale = _scale(whole)
        found = [(self._at(whole, part, place), place) for place in self._places(whole, part, n, owners)]
        gaps = [(_gap(part, mine, scale), place) for mine, place in found if mine is not None]
        return min(gaps, key=lambda each: each[0], default=None)

    def _is_common(self, whole: Tensor, parts: list[Tensor]) -> bool:
        """Whether a result without rows is the members' common one, or the mean or the sum of theirs."""
        if any(part.shape != whole.shape for part in parts):
            return False
        if all(_gap(part, whole) <= self.tolerance for part in parts):
            return True
        if not whole.is_floating_point():
            return False
        total = torch.stack(parts).double().sum(0)
        return min(_gap(total, whole), _gap(total / len(parts), whole)) <= self.tolerance

    # --- what to say where it fails ---------------------------------------------------------------------------------------

    def _astray(self, n: int, path: str, gap: float) -> VerificationError:
        mean = self.net.module
        where = f"output {path}" if path else "the output"
        start = (
            f"{self._whose(n)} of {where} of {self.name} under {self.draw.estimator} differs by {gap:.2g} of its scale from the "
            f"plain module with the weights of member {n} (tolerance {self.tolerance:.2g})."
        )
        if gap <= self.rounding:
            return VerificationError(
                f"{start} Rounding does as much in this dtype; verify in float64, or under a larger tolerance="
            )
        expected, own = list(_leaves(self._whole(mean))), list(_leaves(self._alone(mean, n)))
        gaps = [self._distance(y, part, n, None) or 0.0 for (_, y), (_, part) in zip(expected, own, strict=True)]
        recorder = _Recorder(mean, keep=True)
        with recorder.on(mean):
            self._whole(mean)
        blame = self._mixing(recorder.operations, n)
        if max(gaps) > self.tolerance:
            return VerificationError(
                f"the plain {self.name} is not independent row by row: without any noise, {self._whose(n)} alone and within the "
                f"batch differ by {max(gaps):.2g} of the output's scale. {blame.mixing()} Examples that look at each other have "
                "no weights of their own; exclude the parameters up to there, or verify the part before it"
            )
        recorder = _Recorder(mean, keep=True)
        self._perturbed(recorder)
        blame = self._straying(recorder.operations, n, blame.places)
        met = set() if recorder.call is None else recorder.call.met
        unmet = [repr(site.name) for i, site in enumerate(self.draw.sites) if i not in met]
        hidden = f". Parameters that met no operation: {', '.join(unmet)}" if unmet else ""
        return VerificationError(f"{start} {blame.astray().strip()}{hidden}")

    def _mixing(self, kept: list[_Operation], n: int) -> _Blame:
        """The first operation of the plain module whose rows depend on others; and where a member's rows stand up to there."""
        blame = _Blame()

        def visit(operation: _Operation, results: list[Tensor]) -> None:
            other = blame.matching(operation, results, kept)
            if other is None:
                return
            places: list[_Place | None] = []
            for whole, part in zip(other.results, results, strict=True):
                assert whole is not None
                closest = None if self.members == 1 or operation.is_empty else self._closest(whole, part, n)
                if closest is not None and closest[0] > self.tolerance:
                    closest = self._search(whole, part)
                places.append(None if closest is None else closest[1])
                if closest is None and not operation.is_empty and blame.reader is None and _gap(part, whole) > self.tolerance:
                    blame.reader = other
                if closest is not None and closest[0] > self.tolerance:
                    blame.first, blame.gap = other, closest[0]
            blame.places.append(places)

        mean = self.net.module
        with _Recorder(mean, visit).on(mean):
            self._alone(mean, n)
        return blame

    def _straying(self, kept: list[_Operation], n: int, places: list[list[_Place | None]]) -> _Blame:
        """The first operation whose rows are not those of the plain module with a member's weights.

        Args:
            kept: the operations of the perturbed net.
            n: the member.
            places: where its rows stand in each result, as the plain module has it.
        """
        blame, remaining = _Blame(), iter(places)

        def visit(operation: _Operation, results: list[Tensor]) -> None:
            other = blame.matching(operation, results, kept)
            if other is None:
                return
            there = next(remaining, [None] * len(results))
            for whole, part, place, owners in zip(other.results, results, there, other.owners, strict=True):
                if whole is None or type(part) is PerturbedWeight or operation.is_empty:
                    continue
                if self.members == 1:
                    gap = _gap(part, whole)
                elif place is None and owners is None:
                    continue
                elif place is None:  # sequences of several lengths in one tensor
                    gap = self._distance(whole, part, n, owners) or 0.0
                else:
                    mine = self._at(whole, part, place) if whole.shape[place[0]] > int(place[1].max()) else None
                    gap = float("inf") if mine is None else _gap(part, mine, _scale(whole))
                if gap > self.tolerance:
                    blame.first, blame.gap = other, gap
                    return

        plain = self.draw.module(n)
        with _Recorder(plain, visit).on(plain):
            self._alone(plain, n)
        return blame

    def _search(self, whole: Tensor, part: Tensor) -> tuple[float, _Place]:
        """Where a result that was put into another order has a member's rows: at the entries that agree best."""
        axis = next(a for a in range(whole.dim()) if whole.shape[a] == part.shape[a] * self.members)
        rows, mine = (t.detach().double().movedim(axis, 0).reshape(t.shape[axis], -1) for t in (whole, part))
        distances = [torch.nan_to_num(rows - each).abs().amax(1) for each in mine]
        index = torch.stack([each.argmin() for each in distances])
        return float(torch.stack([each.min() for each in distances]).max()) / _scale(whole), (axis, index)

    def _unsteady(self) -> VerificationError:
        """Why two calls under one draw gave two results."""
        first, second = self.draw.module(0), self.draw.module(0)
        kept = _Recorder(first, keep=True)
        _seed(0)
        with kept.on(first):
            self._whole(first)
        _seed(0)
        found = self._different(kept, second)
        start = f"two calls of {self.name} in evaluation mode under one draw give different results"
        end = "so its rows cannot be compared with anything"
        if found is not None:
            return VerificationError(
                f"{start}, {end}: two copies of the plain module differ as well, from one random state. {found}"
            )
        _seed(0)
        found = self._different(kept, first)
        if found is not None:
            return VerificationError(
                f"{start}, {end}: the plain module keeps a state from one call to the next that changes its result. {found} "
                "Reset that state, or pass it as an argument"
            )
        _seed(1)
        found = self._different(kept, self.draw.module(0))
        if found is not None:
            return VerificationError(
                f"{start}, {end}: the plain module draws random numbers in evaluation mode. {found} Pass these numbers as an "
                "argument, or switch them off"
            )
        return VerificationError(
            f"{start}, {end}, while the plain module is deterministic: a rule or an estimator draws anew at each call"
        )

    def _different(self, kept: _Recorder, module: nn.Module) -> str | None:
        """The first operation that gives another result than in a run before; None where none does and the results agree."""
        told: list[str] = []
        before = iter(kept.operations)

        def visit(operation: _Operation, results: list[Tensor]) -> None:
            other = next(before, None)
            if told or operation.is_empty:
                return
            if other is None or other.func is not operation.func:
                told.append(f"The first difference is {operation}, which the run before did not have there.")
            elif any(
                whole is not None and _gap(part, whole) > self.tolerance
                for whole, part in zip(other.results, results, strict=False)
            ):
                told.append(f"The first operation with another result is {operation}.")

        with _Recorder(module, visit).on(module):
            self._whole(module)
        return told[0] if told else None


# --- what is recorded -------------------------------------------------------------------------------------------------


@dataclass
class _Operation:
    """A torch operation that a module ran."""

    func: Any
    path: str
    shapes: tuple[tuple[int, ...], ...]
    results: list[Tensor | None] = field(default_factory=list)
    owners: list[_Place | None] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether its result is memory that nobody has written."""
        return "empty" in getattr(self.func, "__name__", "")

    def __str__(self) -> str:
        shapes = ", ".join(map(str, self.shapes)) or "no tensors"
        return f"{operation_name(self.func)} in {self.path} (arguments of shape {shapes})"


@dataclass
class _Blame:
    """Where the rows of two runs part."""

    first: _Operation | None = None
    gap: float = 0.0
    reader: _Operation | None = None
    split: tuple[_Operation | None, _Operation] | None = None
    places: list[list[_Place | None]] = field(default_factory=list)
    seen: int = 0

    def matching(self, operation: _Operation, results: list[Tensor], kept: list[_Operation]) -> _Operation | None:
        """The operation of the other run that stands where this one does; None once something was found."""
        if self.first is not None or self.split is not None:
            return None
        other = kept[self.seen] if self.seen < len(kept) else None
        self.seen += 1
        if other is None or other.func is not operation.func or len(other.results) != len(results):
            self.split = (other, operation)
            return None
        return other

    def astray(self) -> str:
        if self.first is not None:
            return (
                f"The first operation whose rows went astray is {self.first}: by {self.gap:.2g} of their scale. Its rule may be "
                "wrong; rows may have been given to the wrong members (name the batch dimension or the argument that counts the "
                "rows, batch_dim=, rows=); or it takes a weight from where copies of the module share it, such as a closure. "
                "exclude= leaves its parameters unperturbed"
            )
        return self._otherwise() + (
            "No operation departs by more than the tolerance before the output does: rounding may have added up; try float64, "
            "or tolerance="
            if self.split is None
            else ""
        )

    def mixing(self) -> str:
        if self.first is None and self.reader is None:
            return self._otherwise() or "No operation that torch shows does it."
        parts = []
        if self.reader is not None:
            parts.append(f"The first operation whose result depends on the whole batch is {self.reader}.")
        if self.first is not None:
            parts.append(f"The first operation with other rows is {self.first}.")
        return " ".join(parts)

    def _otherwise(self) -> str:
        if self.split is None:
            return ""
        ours, theirs = self.split
        return (
            f"The batch and the row alone take different paths through the code: {ours or 'the end'} within the batch, {theirs} "
            "alone; no operation before that departs. "
        )


class _Recorder(TorchFunctionMode):
    """Shows the operations of a module, as the module calls them, to a function, or keeps them.

    Args:
        module: whose parts name the operations.
        visit: called with each operation and its results.
        keep: whether to keep copies of the results.
    """

    def __init__(
        self, module: nn.Module, visit: Callable[[_Operation, list[Tensor]], None] | None = None, keep: bool = False
    ) -> None:
        super().__init__()
        self._paths = _names(module)
        self._visit, self._keep, self._depth = visit, keep, 0
        self.count, self.operations = 0, list[_Operation]()
        self.dtypes: set[torch.dtype] = set()
        self.call: Call | None = None

    def start(self) -> None:
        """Goes on top of the mode of a call: what the call does for its own purposes is not shown."""
        self._depth += 1
        if self._depth == 1:
            self.call = next((mode for mode in reversed(_get_current_function_mode_stack()) if isinstance(mode, Call)), None)
            self.__enter__()  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        self._depth -= 1
        if not self._depth:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    @contextmanager
    def on(self, module: nn.Module) -> Iterator[None]:
        """Records the calls of a module inside."""
        handles = [
            module.register_forward_pre_hook(lambda *_: self.start()),
            module.register_forward_hook(lambda *_: self.stop(), always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = _shapes(args, kwargs) if self._keep or self._visit else ()
        result = func(*args, **(kwargs or {}))
        results = _tensors(result)
        if results:
            self.count += 1
            self.dtypes.update(tensor.dtype for tensor in results)
            if self._keep or self._visit is not None:
                operation = _Operation(func, _path(self._paths), shapes)
                with torch._C.DisableTorchFunction():
                    if self._keep:
                        operation.results = [None if type(t) is PerturbedWeight else t.detach().clone() for t in results]
                        operation.owners = [_owners(self.call, tensor) for tensor in results]
                        self.operations.append(operation)
                    if self._visit is not None:
                        self._visit(operation, results)
        return result


class _Failing(TorchFunctionMode):
    """Notes the operation that raises."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._paths = _names(module)
        self.failed: _Operation | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except Exception:
            self.failed = _Operation(func, _path(self._paths), _shapes(args, kwargs))
            raise


def _names(module: nn.Module) -> dict[int, str]:
    return {id(part): name or type(part).__name__ for name, part in module.named_modules()}


def _path(names: dict[int, str]) -> str:
    """The part of a module whose call the caller is in."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = names.get(id(frame.f_locals.get("self"))) if frame.f_code is _MODULE_CALL else None
        if name is not None:
            return repr(name)
        frame = frame.f_back
    return "the module"


_MODULE_CALL = nn.Module._call_impl.__code__


def _shapes(args: Any, kwargs: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensor.shape) for tensor in _tensors((args, kwargs or {})))


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of arguments or results, two levels deep at most."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [tensor for each in value for tensor in _tensors(each)] if isinstance(value, (list, tuple)) else []


def _owners(call: Call | None, tensor: Tensor) -> _Place | None:
    """The axis of rows of a result, and the member of each entry, where they were followed."""
    fact = None if call is None else call.tracker.find(tensor)
    if call is None or not isinstance(fact, Rows) or fact.size != tensor.shape[fact.axis]:
        return None
    with torch._C.DisableTorchFunction():
        return fact.axis, call.tracker.owners(fact, tensor.device)


# --- numbers ----------------------------------------------------------------------------------------------------------


def _scale(tensor: Tensor) -> float:
    """The largest finite number of a tensor by size."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or not tensor.numel():
        return 1.0
    return max(float(torch.nan_to_num(tensor.detach().abs(), nan=0.0, posinf=0.0).max()), _SMALLEST_SCALE)


def _gap(a: Tensor, b: Tensor, scale: float | None = None) -> float:
    """The largest difference of two results, relative to their scale; whole numbers agree or do not."""
    if a.shape != b.shape:
        return float("inf")
    if not a.numel():
        return 0.0
    if not (b.is_floating_point() or b.is_complex()):
        return 0.0 if torch.equal(a, b) else float("inf")
    wide = torch.complex128 if b.is_complex() else torch.float64
    a, b = a.detach().to(wide), b.detach().to(wide)
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.nan_to_num(torch.where(same, 0.0, (a - b).abs()), nan=float("inf")).max()
    return float(difference) / (_scale(b) if scale is None else scale)


def _autocast(outputs: list[tuple[str, Tensor]]) -> set[torch.dtype]:
    """The dtype of autocast, where it is on."""
    return {torch.get_autocast_dtype(kind) for kind in {tensor.device.type for _, tensor in outputs} if autocasts(kind)}


# --- nested arguments and results -------------------------------------------------------------------------------------


def _children(value: Any) -> list[tuple[str, Any]]:
    """What a container holds, with the way to it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f".{each.name}", getattr(value, each.name, None)) for each in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", each) for key, each in value.items()]
    if isinstance(value, (list, tuple)) and not isinstance(value, PackedSequence):
        names = getattr(value, "_fields", None)
        return [(f".{names[i]}" if names else f"[{i}]", each) for i, each in enumerate(value)]
    return []


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a result; a packed batch of sequences as a padded one."""
    if isinstance(value, PackedSequence):
        yield path, pad_packed_sequence(value, batch_first=True)[0]
    elif isinstance(value, Tensor):
        yield path, value if value.layout == torch.strided else value.to_dense()
    for name, child in _children(value):
        yield from _leaves(child, path + name)


def _packed(value: Any) -> list[PackedSequence]:
    found = [value] if isinstance(value, PackedSequence) else []
    return found + [each for _, child in _children(value) for each in _packed(child)]


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """A container of the same kind with other tensors in it."""
    if isinstance(value, (Tensor, PackedSequence)):
        return function(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        other: Any = copy.copy(value)
        for each in dataclasses.fields(value):
            new = _mapped(getattr(value, each.name, None), function)
            if isinstance(value, Mapping):
                setattr(other, each.name, new)
            else:
                object.__setattr__(other, each.name, new)
        return other
    if isinstance(value, MutableMapping):
        other = copy.copy(value)
        for key in value:
            other[key] = _mapped(value[key], function)
        return other
    if isinstance(value, (list, tuple)):
        items = [_mapped(each, function) for each in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _cloned(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _paths(leaves: list[tuple[str, Tensor]]) -> str:
    return ", ".join(f"{path} {tuple(tensor.shape)}".strip() for path, tensor in leaves) or "no tensors"


# --- putting back -----------------------------------------------------------------------------------------------------


@contextmanager
def _put_back(net: Perturbed) -> Iterator[None]:
    """Puts back what running a net may change: modes, buffers, attributes of its parts, random states."""
    modes = [(part, part.training) for part in net.modules()]
    attributes = [(part, _own_attributes(part)) for part in net.module.modules()]
    told = set(net.ledger._told)
    state = None if net.generator is None else net.generator.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices), kept_buffers(net):
        try:
            yield
        finally:
            for part, kept in attributes:
                _restore(part, kept)
            for part, mode in modes:
                part.training = mode
            net.ledger._told = told
            if state is not None and net.generator is not None:
                net.generator.set_state(state)


def _seed(seed: int) -> None:
    """Seeds the global generators, which are put back at the end."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


def _own_attributes(part: nn.Module) -> dict[str, tuple[Any, Any]]:
    """The attributes of a part's own, with copies of those that can change in place."""
    own = {name: value for name, value in vars(part).items() if name not in _MODULE_ATTRIBUTES}
    return {name: (value, _copied(value)) for name, value in own.items()}


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone() if value.layout == torch.strided and type(value) in (Tensor, nn.Parameter) else None
    return value.copy() if type(value) in (list, dict, set, deque) else None


def _restore(part: nn.Module, kept: dict[str, tuple[Any, Any]]) -> None:
    now = vars(part)
    for name in [name for name in now if name not in _MODULE_ATTRIBUTES and name not in kept]:
        del now[name]
    for name, (value, copied) in kept.items():
        now[name] = value
        if isinstance(copied, Tensor):
            with torch.no_grad():
                if value.shape == copied.shape and not torch.equal(value, copied):
                    value.copy_(copied)
        elif isinstance(copied, dict):
            if len(copied) != len(value) or any(value.get(key, now) is not each for key, each in copied.items()):
                value.clear()
                value.update(copied)
        elif isinstance(copied, set):
            if copied != value:
                value.clear()
                value.update(copied)
        elif copied is not None and (len(copied) != len(value) or any(a is not b for a, b in zip(copied, value, strict=True))):
            value.clear()
            value.extend(copied)
