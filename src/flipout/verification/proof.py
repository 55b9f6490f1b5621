"""The comparison of a net with its members."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from flipout.draw import Draw
from flipout.errors import ArgumentError, VerificationError
from flipout.modes import autocasts
from flipout.perturb import Perturbed
from flipout.rows import first_batch, own_rows_dim
from flipout.verification.blame import Blame
from flipout.verification.keeping import seed_all
from flipout.verification.recording import Failing, Operation, Place, Recorder, owners_of
from flipout.verification.report import Report
from flipout.verification.values import cloned, gap_of, leaves_of, mapped, packed_in, paths_of, scale_of
from flipout.weight import PerturbedWeight

__all__ = ["Proof", "TOLERANCES"]


#: The largest difference to allow, relative to the scale of the output, by the coarsest dtype that a model computes in.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 0.05}


class Proof:
    """The comparison of a net with its members."""

    def __init__(self, net: Perturbed, draw: Draw, rows: int, args: Any, kwargs: Any, tolerance: float | None) -> None:
        assert draw.members is not None
        self.net, self.draw, self.rows, self.members = net, draw, rows, draw.members
        self.inputs = (args, kwargs)
        self.first = first_batch(args, kwargs)
        self.ragged = bool(packed_in(self.inputs))
        self.tolerance, self.rounding = tolerance or 0.0, 0.0
        self.given = tolerance is not None

    @property
    def name(self) -> str:
        return type(self.net.module).__name__

    def report(self) -> Report:
        seen = Recorder(self.net.module)
        whole = self._perturbed(seen)
        again = list(leaves_of(self._whole(self.net)))
        outputs = list(leaves_of(whole))
        if any(tensor.device.type == "meta" for _, tensor in outputs):
            raise ArgumentError('the outputs are on the device "meta", which has no numbers to compare')
        dtypes = {tensor.dtype for _, tensor in outputs} | {site.mean.dtype for site in self.draw.sites} | seen.dtypes
        self.rounding = max(TOLERANCES.get(dtype, 1e-9) for dtype in dtypes | _autocast(outputs))
        if not self.given:
            self.tolerance = self.rounding
        if len(again) != len(outputs) or any(gap_of(b, a) > self.tolerance for (_, a), (_, b) in zip(outputs, again, strict=True)):
            raise self._unsteady()
        del again
        call = seen.call
        places = [owners_of(call, tensor) for _, tensor in outputs]
        shared: dict[int, list[Tensor]] = {}
        largest = 0.0
        for n in range(self.members):
            parts = list(leaves_of(self._alone(self.draw.module(n), n)))
            if [path for path, _ in parts] != [path for path, _ in outputs]:
                raise VerificationError(
                    f"{self.name} has other outputs for {self._whose(n)} alone ({paths_of(parts)}) than for the batch "
                    f"({paths_of(outputs)})"
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
                f"{self.name} returns nothing that has rows ({paths_of(outputs)}), so there is nothing to compare; wrap and verify "
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
        args, kwargs = mapped(self.inputs, cloned)
        return module(*args, **kwargs)

    def _perturbed(self, recorder: Recorder) -> Any:
        """A call of the net, with what its module does shown to a recorder."""
        with recorder.on(self.net.module):
            return self._whole(self.net)

    def _alone(self, module: nn.Module, n: int) -> Any:
        """A plain module on the rows of a member."""
        args, kwargs = mapped(self.inputs, lambda leaf: self._part(leaf, n))
        mode = Failing(module)
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
        return cloned(leaf) if axis is None else cloned(leaf.narrow(axis, n * k, k))

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

    def _distance(self, whole: Tensor, part: Tensor, n: int, owners: Place | None) -> float | None:
        """How far a member's part of a result is from the member's own result; None for a result without rows."""
        if self.members == 1:
            return gap_of(part, whole)
        closest = self._closest(whole, part, n, owners)
        return None if closest is None else closest[0]

    def _places(self, whole: Tensor, part: Tensor, n: int, owners: Place | None) -> Iterator[Place]:
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

    def _at(self, whole: Tensor, part: Tensor, place: Place) -> Tensor | None:
        """What of a result stands at a place; None where that has not the shape of a member's own result."""
        axis, index = place
        mine = whole.index_select(axis, index)
        if self.ragged:  # a member's own result may be shorter
            for other in range(part.dim()):
                if other != axis and mine.shape[other] > part.shape[other]:
                    mine = mine.narrow(other, 0, part.shape[other])
        return mine if mine.shape == part.shape else None

    def _closest(self, whole: Tensor, part: Tensor, n: int, owners: Place | None = None) -> tuple[float, Place] | None:
        """The place that agrees best with a member's own result, and how far it is from it; None for a result without rows."""
        scale = scale_of(whole)
        found = [(self._at(whole, part, place), place) for place in self._places(whole, part, n, owners)]
        gaps = [(gap_of(part, mine, scale), place) for mine, place in found if mine is not None]
        return min(gaps, key=lambda each: each[0], default=None)

    def _is_common(self, whole: Tensor, parts: list[Tensor]) -> bool:
        """Whether a result without rows is the members' common one, or the mean or the sum of theirs."""
        if any(part.shape != whole.shape for part in parts):
            return False
        if all(gap_of(part, whole) <= self.tolerance for part in parts):
            return True
        if not whole.is_floating_point():
            return False
        total = torch.stack(parts).double().sum(0)
        return min(gap_of(total, whole), gap_of(total / len(parts), whole)) <= self.tolerance

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
        expected, own = list(leaves_of(self._whole(mean))), list(leaves_of(self._alone(mean, n)))
        gaps = [self._distance(y, part, n, None) or 0.0 for (_, y), (_, part) in zip(expected, own, strict=True)]
        recorder = Recorder(mean, keep=True)
        with recorder.on(mean):
            self._whole(mean)
        blame = self._mixing(recorder.operations, n)
        if max(gaps) > self.tolerance:
            return VerificationError(
                f"the plain {self.name} is not independent row by row: without any noise, {self._whose(n)} alone and within the "
                f"batch differ by {max(gaps):.2g} of the output's scale. {blame.mixing()} Examples that look at each other have "
                "no weights of their own; exclude the parameters up to there, or verify the part before it"
            )
        recorder = Recorder(mean, keep=True)
        self._perturbed(recorder)
        blame = self._straying(recorder.operations, n, blame.places)
        met = set() if recorder.call is None else recorder.call.met
        unmet = [repr(site.name) for i, site in enumerate(self.draw.sites) if i not in met]
        hidden = f". Parameters that met no operation: {', '.join(unmet)}" if unmet else ""
        return VerificationError(f"{start} {blame.astray().strip()}{hidden}")

    def _mixing(self, kept: list[Operation], n: int) -> Blame:
        """The first operation of the plain module whose rows depend on others; and where a member's rows stand up to there."""
        blame = Blame()

        def visit(operation: Operation, results: list[Tensor]) -> None:
            other = blame.matching(operation, results, kept)
            if other is None:
                return
            places: list[Place | None] = []
            for whole, part in zip(other.results, results, strict=True):
                assert whole is not None
                closest = None if self.members == 1 or operation.is_empty else self._closest(whole, part, n)
                if closest is not None and closest[0] > self.tolerance:
                    closest = self._search(whole, part)
                places.append(None if closest is None else closest[1])
                if closest is None and not operation.is_empty and blame.reader is None and gap_of(part, whole) > self.tolerance:
                    blame.reader = other
                if closest is not None and closest[0] > self.tolerance:
                    blame.first, blame.gap = other, closest[0]
            blame.places.append(places)

        mean = self.net.module
        with Recorder(mean, visit).on(mean):
            self._alone(mean, n)
        return blame

    def _straying(self, kept: list[Operation], n: int, places: list[list[Place | None]]) -> Blame:
        """The first operation whose rows are not those of the plain module with a member's weights.

        Args:
            kept: the operations of the perturbed net.
            n: the member.
            places: where its rows stand in each result, as the plain module has it.
        """
        blame, remaining = Blame(), iter(places)

        def visit(operation: Operation, results: list[Tensor]) -> None:
            other = blame.matching(operation, results, kept)
            if other is None:
                return
            there = next(remaining, [None] * len(results))
            for whole, part, place, owners in zip(other.results, results, there, other.owners, strict=True):
                if whole is None or type(part) is PerturbedWeight or operation.is_empty:
                    continue
                if self.members == 1:
                    gap = gap_of(part, whole)
                elif place is None and owners is None:
                    continue
                elif place is None:  # sequences of several lengths in one tensor
                    gap = self._distance(whole, part, n, owners) or 0.0
                else:
                    mine = self._at(whole, part, place) if whole.shape[place[0]] > int(place[1].max()) else None
                    gap = float("inf") if mine is None else gap_of(part, mine, scale_of(whole))
                if gap > self.tolerance:
                    blame.first, blame.gap = other, gap
                    return

        plain = self.draw.module(n)
        with Recorder(plain, visit).on(plain):
            self._alone(plain, n)
        return blame

    def _search(self, whole: Tensor, part: Tensor) -> tuple[float, Place]:
        """Where a result that was put into another order has a member's rows: at the entries that agree best."""
        axis = next(a for a in range(whole.dim()) if whole.shape[a] == part.shape[a] * self.members)
        rows, mine = (t.detach().double().movedim(axis, 0).reshape(t.shape[axis], -1) for t in (whole, part))
        distances = [torch.nan_to_num(rows - each).abs().amax(1) for each in mine]
        index = torch.stack([each.argmin() for each in distances])
        return float(torch.stack([each.min() for each in distances]).max()) / scale_of(whole), (axis, index)

    def _unsteady(self) -> VerificationError:
        """Why two calls under one draw gave two results."""
        first, second = self.draw.module(0), self.draw.module(0)
        kept = Recorder(first, keep=True)
        seed_all(0)
        with kept.on(first):
            self._whole(first)
        seed_all(0)
        found = self._different(kept, second)
        start = f"two calls of {self.name} in evaluation mode under one draw give different results"
        end = "so its rows cannot be compared with anything"
        if found is not None:
            return VerificationError(
                f"{start}, {end}: two copies of the plain module differ as well, from one random state. {found}"
            )
        seed_all(0)
        found = self._different(kept, first)
        if found is not None:
            return VerificationError(
                f"{start}, {end}: the plain module keeps a state from one call to the next that changes its result. {found} "
                "Reset that state, or pass it as an argument"
            )
        seed_all(1)
        found = self._different(kept, self.draw.module(0))
        if found is not None:
            return VerificationError(
                f"{start}, {end}: the plain module draws random numbers in evaluation mode. {found} Pass these numbers as an "
                "argument, or switch them off"
            )
        return VerificationError(
            f"{start}, {end}, while the plain module is deterministic: a rule or an estimator draws anew at each call"
        )

    def _different(self, kept: Recorder, module: nn.Module) -> str | None:
        """The first operation that gives another result than in a run before; None where none does and the results agree."""
        told: list[str] = []
        before = iter(kept.operations)

        def visit(operation: Operation, results: list[Tensor]) -> None:
            other = next(before, None)
            if told or operation.is_empty:
                return
            if other is None or other.func is not operation.func:
                told.append(f"The first difference is {operation}, which the run before did not have there.")
            elif any(
                whole is not None and gap_of(part, whole) > self.tolerance
                for whole, part in zip(other.results, results, strict=False)
            ):
                told.append(f"The first operation with another result is {operation}.")

        with Recorder(module, visit).on(module):
            self._whole(module)
        return told[0] if told else None


def _autocast(outputs: list[tuple[str, Tensor]]) -> set[torch.dtype]:
    """The dtype of autocast, where it is on."""
    return {torch.get_autocast_dtype(kind) for kind in {tensor.device.type for _, tensor in outputs} if autocasts(kind)}
