"""A draw: the perturbations of one forward pass, or of as many as it is held for."""

from __future__ import annotations

import copy
import operator
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flipout.errors import ArgumentError, DrawError, MemberError
from flipout.estimators import Estimator, Shared
from flipout.hooks import clear
from flipout.modes import functional, require_randomness, uncounted
from flipout.rows import Layout
from flipout.samples import Sample, Target
from flipout.select import Selection, Site, held, hooks_on
from flipout.sharded import whole
from flipout.weight import Origin, PerturbedWeight, Term

__all__ = ["Draw"]

#: What a draw computes for its own purposes meets the means, also inside a call that perturbs them.
_UNMODED = torch._C.DisableTorchFunction


class Draw:
    """What was drawn for every selected parameter of a module, for ``members`` members.

    Users get one from :meth:`flipout.Perturbed.hold` or :func:`flipout.perturbed`; they do not make it. Only unit draws and signs
    are kept, so the perturbation follows the mean weights and the learnable scales when an optimiser moves them.

    Attributes:
        members: N, the number of different weights (None per token).
        estimator: how the members share the draw.
        owner: the member of each row, where rows are not in member-major blocks; else None.
        read: whether members' weights or sums of them were asked for.

    Example:
        >>> import flipout
        >>> net = flipout.Perturbed(torch.nn.Linear(3, 2), flipout.Gaussian(0.1))
        >>> with net.hold(members=4) as draw:
        ...     y = net(torch.ones(4, 3))
        ...     own = draw.module(1)
        >>> torch.allclose(own(torch.ones(3)), y[1])
        True
    """

    #: How many calls are running under it.
    running = 0
    #: What looks up the parameters as the module stands.
    selection: Selection | None = None

    def __init__(
        self,
        module: nn.Module,
        sites: Sequence[Site],
        log_std: Mapping[str, Tensor],
        estimator: Estimator,
        members: int | None,
        generator: torch.Generator | None,
        fallback: str | None = None,
        samples: Sequence[Sample] | None = None,
        device: torch.device | None = None,
        owner: Tensor | None = None,
    ) -> None:
        self.members = None if estimator.per_token else members
        self.estimator = estimator
        self.owner = owner
        #: Whether all rows see one weight (Shared, a single member): an ordinary tensor, which needs no rule.
        self.is_one_weight = isinstance(estimator, Shared) or (self.members == 1 and estimator.has_members)
        self.read = False
        self._module = module
        self._sites = sites
        self._log_std = log_std
        self._generator = generator
        self._fallback = fallback
        self._home: tuple[int, int | None] | None = None
        with uncounted():
            self._samples = self._padded(self._sample(device) if samples is None else samples)
        self._fixed: dict[int, Tensor] = {}
        self._layouts: dict[tuple[int | None, int], Layout] = {}
        self._carriers: dict[tuple[int, Layout], tuple[Tensor, Any, Tensor]] = {}

    @property
    def samples(self) -> list[Sample]:
        """What was drawn. Resampling makes another list."""
        return self._samples

    @property
    def generator(self) -> torch.Generator | None:
        """The source of the draw; None for torch's global generators."""
        return self._generator

    def as_it_was(self, samples: list[Sample], generator: torch.Generator | None) -> Draw:
        """The same draw with the samples that it had, and with a generator for what operations draw."""
        past = Draw.__new__(Draw)
        past.members, past.estimator, past.owner, past.read = self.members, self.estimator, self.owner, False
        past._module, past._sites, past._log_std, past._fallback = self._module, self._sites, self._log_std, self._fallback
        past._generator, past._samples, past._home = generator, samples, None
        past._fixed, past._layouts, past._carriers = {}, {}, {}
        past.is_one_weight = self.is_one_weight
        return past

    @property
    def sites(self) -> tuple[Site, ...]:
        """The perturbed parameters."""
        return tuple(self._sites)

    def _targets(self) -> list[Target]:
        return [Target(site.name, site.mean, site.noise, site.axes, site.matrix) for site in self._sites]

    def _padded(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples, without noise on the padding rows of tables."""
        rows = [site.padding for site in self._sites]
        return [sample if row is None else sample.without_row(row) for sample, row in zip(samples, rows, strict=True)]

    def _sample(self, device: torch.device | None) -> list[Sample]:
        targets = self._targets()
        devices = {target.mean.device for target in targets}
        if functional():
            return self._sample_functional(targets)
        if len(devices) == 1 and "meta" not in {d.type for d in devices}:
            return self.estimator.sample(targets, self.members, self._generator)
        where = [_drawing_device(target, site, device, self._generator) for target, site in zip(targets, self._sites, strict=True)]
        samples: dict[str, Sample] = {}
        for each in sorted(set(where), key=str):
            here = [target for target, place in zip(targets, where, strict=True) if place == each]
            drawn = self.estimator.sample([target.on(each) for target in here], self.members, self._generator)
            samples.update(zip((target.name for target in here), drawn, strict=True))
        return [samples[target.name] for target in targets]

    def _sample_functional(self, targets: list[Target]) -> list[Sample]:
        """Draws under a transform of ``torch.func``."""
        require_randomness()
        try:
            return self.estimator.sample(targets, self.members, self._generator)
        except RuntimeError as error:
            laws = ", ".join(sorted({type(target.noise).__name__ for target in targets}))
            raise DrawError(
                f"{laws} noise could not be drawn under a transform of torch.func ({str(error).splitlines()[0]}): under vmap a "
                "noise must draw with functions such as torch.randn and torch.rand, not in place and by no number that it reads; "
                "hold a draw around the transform instead (with net.hold(...))"
            ) from error

    def _terms(self, i: int, mean: Tensor) -> tuple[Term, ...]:
        """The terms of a parameter, for its mean as it stands: of another dtype or on another device than when it was drawn,
        too.
        """
        site, sample = self._sites[i], self._samples[i]
        if mean.is_meta and not sample.unit.is_meta:
            raise DrawError(
                f"the parameter {site.name!r} has no values now: it is offloaded (on the device meta) between the calls of its "
                "part; ask a net that is not offloaded, whose draw under the same generator is the same"
            )
        sample = sample.like(mean)
        if mean.shape != site.shape:
            raise DrawError(
                f"the parameter {site.name!r} has shape {tuple(mean.shape)}, and its draw was made for {tuple(site.shape)}: it "
                "was replaced since, or FSDP1 had it in pieces when the draw was made (make the draw inside the call, or use "
                "fully_shard)"
            )
        base, source = self._fixed.get(i), None
        if base is None or base.dtype != mean.dtype or base.device != mean.device:
            scale = self._log_std.get(site.name) if site.noise.learnable else None
            if scale is None and site.noise.learnable:
                raise DrawError(
                    f"the learnable scale of {site.name!r} is not where the wrapper keeps it (its log_std); leave it there"
                )
            if scale is not None and scale.device.type == "meta" and mean.device.type != "meta":
                raise DrawError(
                    f"the learnable scale of {site.name!r} has no values (it is on the device meta): give the wrapper values as "
                    "its module was given them (load_state_dict with assign=True), or wrap the module after it has got them"
                )
            if scale is not None:
                scale = whole(scale).to(dtype=mean.dtype, device=mean.device)  # the mean may be cast, or elsewhere, for a call
            base, source = site.noise.sourced(sample.unit, mean, scale, scaled=sample.scaled)
            if not site.noise.moves and not torch.compiler.is_compiling() and not functional():
                self._fixed[i] = base  # depends on nothing that moves
        if torch.compiler.is_compiling():  # which differentiates what the rules compose
            source = None
        return tuple([Term(base, factors, sample.per_member, source, sample.groups) for factors in sample.factors])

    @property
    def _has_values(self) -> bool:
        """Whether anything was drawn: not for a module without values, on the device meta."""
        return any(sample.unit.device.type != "meta" for sample in self._samples)

    def layout(self, rows: int | None, dim: int) -> Layout:
        """Whose rows are whose in an input with ``rows`` rows on ``dim``."""
        found = self._layouts.get((rows, dim))
        if found is None:
            found = self._layouts[rows, dim] = Layout(self.members, rows, dim, self.owner, followed=rows != 0)
        return found

    def carrier(self, i: int, mean: Tensor, layout: Layout) -> Tensor:
        """The weight of the i-th selected parameter, whose mean stands as ``mean``; the last one where nothing in it has moved."""
        last = None if torch.compiler.is_compiling() else self._carriers.get((i, layout))
        if last is not None and last[0] is mean and last[1] == (mean.dtype, mean.device, mean.requires_grad):
            return last[2]
        if self.is_one_weight:
            return _only(mean, self._terms(i, mean))
        site = self._sites[i]
        generator = None if self.estimator.has_members else self._generator
        origin = Origin(
            site.name, self.estimator, self._fallback, generator, [], None if torch.compiler.is_compiling() else weakref.ref(self)
        )
        weight = PerturbedWeight(mean, self._terms(i, mean), layout, origin)
        if (
            i in self._fixed and self.estimator.has_members and not torch.compiler.is_compiling()
        ):  # it reads the mean in place, but copied its metadata
            self._carriers[i, layout] = (mean, (mean.dtype, mean.device, mean.requires_grad), weight)
        return weight

    def carriers(self, rows: int, dim: int) -> list[Tensor]:
        """One perturbed weight a selected parameter, for an input with ``rows`` rows on ``dim``."""
        layout = self.layout(rows, dim)
        return [self.carrier(i, site.mean, layout) for i, site in enumerate(self._sites)]

    def weights(self, n: int) -> dict[str, Tensor]:
        """Member ``n``'s dense weights by parameter name, differentiable in the means and scales.

        Sharded parameters (FSDP2) are gathered, so every process must ask.

        Args:
            n: member index, 0 to ``members - 1``.

        Raises:
            MemberError: if ``n`` lies outside the draw.
            DrawError: if the estimator gives members no weights (LocalReparameterization, signs per token), or the module has
                changed since the draw was made: a part or a tie is another.

        Example:
            >>> import torch, flipout
            >>> net = flipout.Perturbed(torch.nn.Linear(3, 2), flipout.Gaussian(0.1))
            >>> with net.hold(members=4) as draw:
            ...     sorted(draw.weights(0)), draw.weights(0)["weight"].shape
            (['bias', 'weight'], torch.Size([2, 3]))
        """
        n = self._index(n)
        self._require_standing()
        with _UNMODED():
            return {site.name: self._weight(i, whole(site.mean), n) for i, site in enumerate(self._sites)}

    def _weight(self, i: int, mean: Tensor, n: int) -> Tensor:
        terms = self._terms(i, mean)
        if not isinstance(self.estimator, Shared):
            terms = tuple(term.members(slice(n, n + 1)) for term in terms)
        return _only(mean, terms)

    def module(self, n: int) -> nn.Module:
        """A plain copy of the module with member ``n``'s weights: no trace of flipout is left in it.

        Raises:
            MemberError, DrawError: as :meth:`weights`; DrawError for a module that cannot be copied, such as one that FSDP shards.
        """
        self._index(n)
        self._require_standing()
        with torch.no_grad(), _UNMODED():
            try:
                plain = copy.deepcopy(self._module, _activations(self._module))
            except Exception as error:
                raise DrawError(
                    f"{type(self._module).__name__} cannot be copied ({type(error).__name__}: {error}); take draw.weights({n}), "
                    "for torch.func.functional_call or a module that you build"
                ) from error
            clear(plain)
            parameters = dict(plain.named_parameters(remove_duplicate=False))
            for name, weight in self.weights(n).items():
                if name not in parameters or parameters[name].device.type == "meta":
                    raise DrawError(
                        f"a copy of {type(self._module).__name__} has no memory for {name!r}, which hooks bring and take away "
                        f"around its calls; take draw.weights({n}) in a call, or a module that is not offloaded"
                    )
                parameters[name].copy_(weight)
        return plain

    def _require_standing(self, sites: Sequence[Site] | None = None) -> None:
        """Raises DrawError where the module has changed so that the draw is no longer one of its parameters.

        Args:
            sites: the selected parameters as the module stands, where they were looked up.
        """
        if sites is None and self.selection is not None:
            try:
                sites = self.selection.sites()
            except ArgumentError as error:
                raise DrawError(f"the module has become one that the draw was not made for: {error}") from error
        if sites is self._sites:
            return
        changed = changed_since(self._module, self._sites)
        if changed is None and sites is not None:
            names = {site.name for site in self._sites}
            changed = next((repr(site.name) for site in sites if site.name not in names), None)
            changed = changed or next((repr(name) for name in names - {site.name for site in sites}), None)
        if changed is not None:
            raise DrawError(
                f"{changed} of {type(self._module).__name__} is not a parameter that the draw was made for: a part was replaced, "
                "or a tie made or cut since; make another draw"
            )

    def resample(self, members: Sequence[int]) -> None:
        """Draws the given members afresh; the others keep their weights, and members go on sharing what they share.

        Args:
            members: distinct member indices.

        Raises:
            MemberError: if an index lies outside the draw.
            UnsupportedNoiseError: under Shared, where members cannot differ.
        """
        wanted = [self._index(n) for n in members]
        if len(set(wanted)) != len(wanted):
            raise ArgumentError(f"resample({list(members)}): each member once")
        if not wanted:
            return
        self._require_standing()
        with _UNMODED():
            self._samples = self._padded(self.estimator.resample(self._targets(), self._samples, wanted, self._generator))
        self._fixed.clear()
        self._carriers.clear()

    def weighted_sum(self, f: Tensor) -> dict[str, Tensor]:
        """Σ_n f[n] ΔW_n by parameter name, without any member's weights in memory.

        For flipout this is ΔW ∘ (rᵀ diag(f) s): one product a parameter. Evolution strategies build their update from it.

        Args:
            f: ``[members]`` weights, for example shaped fitness.

        Returns:
            One tensor of the parameter's shape each.

        Raises:
            ArgumentError: if ``f`` has another shape.
            DrawError: as :meth:`weights`.
        """
        self._require_members()
        if not isinstance(f, Tensor) or f.shape != (self.members,):
            found = tuple(f.shape) if isinstance(f, Tensor) else type(f).__name__
            raise ArgumentError(f"weighted_sum takes one weight for each of {self.members} members, got {found}")
        self._require_standing()
        with _UNMODED():
            return {site.name: self._sum(i, whole(site.mean), f) for i, site in enumerate(self._sites)}

    def _sum(self, i: int, mean: Tensor, f: Tensor) -> Tensor:
        weights = f.to(dtype=mean.dtype, device=mean.device)
        parts = [_weighted(term, weights, mean) for term in self._terms(i, mean)]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    def stays_in_this_thread(self) -> Draw:
        """Ties the draw to the thread that holds it: its methods raise in any other."""
        self._home = (os.getpid(), threading.get_ident())
        return self

    def _require_members(self) -> None:
        process, thread = self._home or (os.getpid(), None)
        if process != os.getpid() or thread not in (None, threading.get_ident()):
            where = "process" if process != os.getpid() else "thread"
            raise DrawError(f"the draw is held in another {where}; hold one in this {where}, or hand over draw.weights(n)")
        self.read = True
        if not self.estimator.has_members:
            raise DrawError(f"under {self.estimator} members have no weights of their own; hold a draw of another estimator")

    def _index(self, n: Any) -> int:
        self._require_members()
        try:
            index = operator.index(n)
        except TypeError:
            raise MemberError(f"member index {n!r} is a {type(n).__name__}; expected an integer") from None
        if self.members is None or not 0 <= index < self.members:
            raise MemberError(f"member {index} is out of range: the draw has members 0 to {(self.members or 0) - 1}")
        return index

    def __reduce__(self) -> Any:
        raise DrawError(
            "a draw is held in one process and is neither copied nor pickled; hand over draw.weights(n) or draw.module(n)"
        )

    def __repr__(self) -> str:
        return f"Draw(members={self.members}, estimator={self.estimator}, parameters={[s.name for s in self._sites]})"


def changed_since(module: nn.Module, sites: Sequence[Site]) -> str | None:
    """The name of a parameter that is no longer where it was selected, has another shape, or is tied to others than then."""
    paths = dict(module.named_modules(remove_duplicate=False))
    seen: dict[int, str] = {}
    for site in sites:
        for name, (owner, attribute) in zip(site.names, site.slots, strict=True):
            tensor = held(owner, attribute)
            here = paths.get(name.rpartition(".")[0]) is owner and tensor is not None and tensor.shape == site.shape
            alone = tensor is not None and (tensor.device.type == "meta" or seen.setdefault(id(tensor), site.name) == site.name)
            if not here or not alone or (tensor is not None and tensor is not site.mean and tensor.device.type != "meta"):
                return repr(name)
    return None


def _only(mean: Tensor, terms: Sequence[Term]) -> Tensor:
    """The weight of a single member."""
    for term in terms:
        value = term.dense(mean.dim()) if term.per_member or term.factors else term.base.unsqueeze(0)
        mean = mean + value[0]
    return mean


def _weighted(term: Term, f: Tensor, mean: Tensor) -> Tensor:
    """Σ_n f[n] (B ∘ Π factors[n])."""
    if term.per_member and (term.groups is None or not term.blocks):
        return torch.einsum("n,n...->...", f, term.listed().expand(f.shape[0], *mean.shape))
    bases = term.base.shape[0] if term.per_member else 1
    runs = (bases, f.shape[0] // bases)  # members of a base stand in one run
    operands: list[Any] = [f.unflatten(0, runs), [0, 1]]
    axes = sorted(axis for factor in term.factors for axis in factor.axes)
    for factor in term.factors:
        operands += [factor.shaped(mean.dtype).unflatten(0, runs), [0, 1, *(2 + axis for axis in factor.axes)]]
    total = torch.einsum(*operands, [0, *(2 + axis for axis in axes)])
    shape = [mean.shape[axis] if axis in axes else 1 for axis in range(mean.dim())]
    if not term.per_member:
        return (term.base * total.reshape(shape)).expand(mean.shape)
    return (term.base * total.reshape(bases, *shape)).sum(0).expand(mean.shape)


def _drawing_device(target: Target, site: Site, device: torch.device | None, generator: torch.Generator | None) -> torch.device:
    """Where to draw for a parameter: on its device, unless it was put on ``meta`` until the call that needs it (offloading)."""
    if target.mean.device.type != "meta":
        return target.mean.device
    if device is not None:
        return device
    runs_on = offloaded_to(site)
    if runs_on is not None:
        return runs_on
    return target.mean.device if generator is None else generator.device


def offloaded_to(site: Site) -> torch.device | None:
    """Where the part of an offloaded parameter will run, as accelerate's hook on it says; None of any other parameter."""
    if site.mean.device.type != "meta":
        return None
    hooks = [each for owner, _ in site.slots for each in hooks_on(owner)]
    runs_on = next((hook.execution_device for hook in hooks if getattr(hook, "execution_device", None) is not None), None)
    return None if runs_on is None else torch.device(runs_on)


def _activations(module: nn.Module) -> dict[int, Tensor]:
    """A memo for deepcopy: the tensors with a graph that parts of a module keep as attributes, without it."""
    kept = [value for part in module.modules() for value in tree_leaves(list(part.__dict__.values())) if isinstance(value, Tensor)]
    return {id(value): value.detach().clone() for value in kept if value.grad_fn is not None}
