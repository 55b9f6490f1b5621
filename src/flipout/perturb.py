"""Making the weights of a module random: the wrapper ``Perturbed``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import flipout.rules  # noqa: F401  (fills the registry)
from flipout.calls import Call, Ledger
from flipout.compiled import run_eagerly
from flipout.contexts import entered, setting
from flipout.decay import parameter_groups, watch
from flipout.draw import Draw, offloaded_to
from flipout.errors import ArgumentError, BatchError, DrawError
from flipout.estimators import Estimator, Flipout
from flipout.noise import Noise
from flipout.recompute import HIDDEN_CALL, Event, inside_function, note, noted
from flipout.rows import batch_device, count_rows, first_batch, require_blocks, rows_dim
from flipout.select import SCALES, Selection, Site, check_generator, held

__all__ = ["Perturbed"]


class Perturbed(nn.Module):
    """Wraps a module so that every example of a batch sees its own random weights.

    In training mode each forward pass draws anew; in evaluation mode the module runs with its mean weights, exactly as if it
    were not wrapped. The module itself is never touched: its parameters are the means, its ``state_dict`` is its own.

    Args:
        module: any module. Its parameters are the mean weights W̄.
        noise: the law of the perturbations, or a dict from parameter name patterns to laws (the first match wins; parameters
            that match none are not perturbed).
        estimator: how examples share a draw.
        include: name pattern(s) of the parameters to perturb, as in :mod:`fnmatch`.
        exclude: name pattern(s) of parameters to leave alone.
        batch_dim: the dimension of the first tensor argument that counts the examples; recurrent and attention modules wrapped by
            themselves use their own ``batch_first``.
        generator: source of all draws; None for torch's global generator of the parameters' device.
        fallback: None to raise MissingRuleError where a torch operation has no rule; ``"loop"`` to run such an operation once
            per member over materialised weights.
        unmet: what to do where a selected parameter meets no operation in a call: ``"warn"`` once, ``"raise"``, or ``"ignore"``. If
            none of them does, the call raises in either of the first two.
        rows: the name or the position of the argument whose ``batch_dim`` counts the rows; None for the first tensor that is more
            than a number.

    Raises:
        ArgumentError: for a pattern that matches nothing, a parameter that takes no noise, a generator of another device.
        UnsupportedNoiseError: for noise that the estimator cannot serve without bias.

    Example:
        >>> import torch, flipout
        >>> net = flipout.Perturbed(torch.nn.Linear(4, 3), flipout.Gaussian(0.1))
        >>> x = torch.ones(2, 4)
        >>> torch.equal(*net(x))  # two equal examples, two different weights
        False
        >>> torch.equal(net.eval()(x), net.module(x))
        True
    """

    def __init__(
        self,
        module: nn.Module,
        noise: Noise | Mapping[str, Noise],
        estimator: Estimator = Flipout(),  # noqa: B008  (frozen)
        include: str | Iterable[str] = "*",
        exclude: str | Iterable[str] = (),
        batch_dim: int = 0,
        generator: torch.Generator | None = None,
        fallback: str | None = None,
        unmet: str = "warn",
        rows: str | int | None = None,
    ) -> None:
        super().__init__()
        selection = Selection(module, noise, include, exclude)
        sites = selection.sites()
        _check_estimator(estimator, sites)
        check_generator(generator, sites)
        _refuse_overlap(module, sites)
        if isinstance(batch_dim, bool) or not isinstance(batch_dim, int) or batch_dim < 0:
            raise ArgumentError(f"batch_dim={batch_dim!r}: expected the index of a dimension, 0 or more")
        if fallback not in (None, "loop"):
            raise ArgumentError(f'fallback={fallback!r}: expected None or "loop"')
        if unmet not in ("ignore", "warn", "raise"):
            raise ArgumentError(f'unmet={unmet!r}: expected "ignore", "warn" or "raise"')
        if rows is not None and (isinstance(rows, bool) or not isinstance(rows, (str, int))):
            raise ArgumentError(f"rows={rows!r}: expected the name or the position of the argument that counts the rows, or None")
        self.module = module
        self.batch_dim = rows_dim(module, batch_dim)
        self.rows = rows
        self.generator = generator
        self.fallback = fallback
        self.ledger = Ledger(unmet)
        self.log_std = nn.ParameterDict(
            {_key(site.name): nn.Parameter(site.noise.initial_log_std(_like(site))) for site in sites if site.noise.learnable}
        )
        setattr(self.log_std, SCALES, True)
        self._estimator = estimator
        self._selection = selection
        self._first = selection.names
        self._checked: Any = sites
        watch(self)

    @property
    def estimator(self) -> Estimator:
        """How examples share a draw, here: in this thread or async task."""
        estimator: Estimator = setting(self, "estimator", self._estimator)
        return estimator

    @property
    def sites(self) -> tuple[Site, ...]:
        """The perturbed parameters, as the module stands."""
        sites = self._selection.sites()
        if not torch.compiler.is_compiling() and self._checked is not sites:
            self._check_change(sites)
            self._checked = sites
        return sites

    def _check_change(self, sites: Sequence[Site]) -> None:
        """Raises where the module has got parameters that this wrapper has no scales for."""
        _check_estimator(self._estimator, sites)
        _refuse_overlap(self.module, sites)
        learnable = [site for site in sites if site.noise.learnable]
        new = [site.name for site in learnable if _key(site.name) not in self.log_std]
        other = [s.name for s in learnable if s.name not in new and s.shape != getattr(self.scales.get(s.name), "shape", s.shape)]
        if other:
            raise ArgumentError(
                f"{', '.join(map(repr, other))}: the parameter has another shape than when it was wrapped, and its noise has "
                "learnable scales of the shape it had; wrap the module again"
            )
        if new:
            raise ArgumentError(
                f"{', '.join(map(repr, new))}: the module got parameters after it was wrapped, and their noise is learnable; "
                "wrap the module again, so that they get scales of their own"
            )

    @property
    def noises(self) -> dict[str, Noise]:
        """The noise of each perturbed parameter, by name."""
        return {site.name: site.noise for site in self.sites}

    def noise_parameters(self) -> Iterator[nn.Parameter]:
        """The learnable noise scales: one ``log_std`` tensor of the weight's shape for each learnable parameter."""
        yield from self.log_std.parameters()

    @property
    def scales(self) -> Mapping[str, torch.Tensor]:
        """The logarithms of the learnable scales by parameter name, as they stand now."""
        return _Scales(self.log_std)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module. All arguments are its own."""
        draw: Draw | None = setting(self, "draw", None)
        random = draw is not None or self.training or setting(self, "sampling", False)
        if torch.compiler.is_compiling():
            return self._run(draw, None, args, kwargs) if random else self.module(*args, **kwargs)
        again = noted(self.module, "call")
        if again is not None:  # a checkpointed region that runs again: as it ran first, whatever has been set since
            draw = again.repeated()
            random = draw is not None
        if not random:
            note(self.module, "call")
            return self.module(*args, **kwargs)
        return self._run(draw, again, args, kwargs)

    def _run(self, draw: Draw | None, again: Event | None, args: Any, kwargs: Any) -> Any:
        """A call with noise. A compiler that cannot have all of it in one graph leaves all of it to Python."""
        compiling = torch.compiler.is_compiling()
        with contextlib.nullcontext() if compiling else run_eagerly():
            if not compiling and not torch.is_grad_enabled() and inside_function():
                raise DrawError(HIDDEN_CALL)
            made, rows = draw is None, count_rows(self.module, self.batch_dim, args, kwargs, self.rows)
            if draw is None:
                draw = self._draw(rows, self.generator, args, kwargs)
            else:
                if not compiling:
                    draw._require_standing(self.sites)
                self._require_members(draw, rows)
            if not compiling:
                note(self.module, "call", draw, made or again is not None)
                draw.running += 1
            call = Call(self.module, draw, draw.layout(rows, self.batch_dim))
            call.arguments(args, kwargs)
            try:
                with call:
                    output = self.module(*args, **kwargs)
            finally:
                call.close()
                if not compiling:
                    draw.running -= 1
            call.require_rows(output)
            if not compiling:
                self.ledger.settle(call, self._lost())
            return output

    def _require_members(self, draw: Draw, rows: int) -> None:
        """Raises BatchError where the rows of an input are not those of the members of a held draw."""
        if draw.owner is None:
            require_blocks(rows, draw.members, self.batch_dim)
        elif rows != len(draw.owner):
            raise BatchError(f"the input has {rows} rows, and the owner= of the held draw names the members of {len(draw.owner)}")

    def _draw(self, members: int, generator: torch.Generator | None, args: Any = (), kwargs: Any = None) -> Draw:
        first = first_batch(args, kwargs or {})
        device = None if first is None else batch_device(first)
        draw = Draw(self.module, self.sites, self.scales, self.estimator, members, generator, self.fallback, device=device)
        draw.selection = self._selection
        return draw

    def _lost(self) -> list[str]:
        """The parameters that were perturbed when the module was wrapped and are no longer in it."""
        names = self._selection.names
        return [] if names is self._first else [name for name in self._first if name not in names]

    @contextmanager
    def sampling(self) -> Iterator[Perturbed]:
        """Samples weights in evaluation mode as well, in this thread or async task.

        Example:
            >>> import torch, flipout
            >>> net = flipout.Perturbed(torch.nn.Linear(4, 3), flipout.Gaussian(0.1)).eval()
            >>> with net.sampling():
            ...     y = net(torch.ones(2, 4))
            >>> torch.equal(*y)
            False
        """
        with entered(self, "sampling", True):
            yield self

    @contextmanager
    def using(self, estimator: Estimator) -> Iterator[Perturbed]:
        """Uses another estimator for the same weights and noise, in this thread or async task.

        Raises:
            UnsupportedNoiseError: if it cannot serve the noise.
            DrawError: while a draw is held, since a draw belongs to its estimator.
        """
        _check_estimator(estimator, self.sites)
        draw: Draw | None = setting(self, "draw", None)
        if draw is not None:
            raise DrawError(f"a draw of {draw.estimator} is held; switch the estimator outside hold()")
        with entered(self, "estimator", estimator):
            yield self

    @contextmanager
    def hold(self, members: int, generator: torch.Generator | None = None, owner: Tensor | None = None) -> Iterator[Draw]:
        """Holds one draw: every call inside sees the same N weights, in training and in evaluation mode.

        Inputs have ``members`` rows, or ``k * members`` in member-major blocks: rows 0 to k-1 are member 0. Where examples have
        several rows of their own, such as the nodes of graphs, ``owner`` says which member each row has. The draw is held in this
        thread or async task.

        Args:
            members: N, at least 1.
            generator: source of this draw and of its resampling; None for the wrapper's own.
            owner: int64 ``[rows]``, the member of each row of the inputs; None for member-major blocks.

        Yields:
            The :class:`flipout.Draw`.

        Raises:
            ArgumentError: if ``members`` is not a positive integer, the generator is of another device, or ``owner`` does not
                name members.
            DrawError: if a draw is already held.
            BatchError: from calls whose rows do not divide into the members.

        Example:
            >>> import torch, flipout
            >>> net = flipout.Perturbed(torch.nn.Linear(2, 1), flipout.Gaussian(0.1))
            >>> with net.hold(members=2, owner=torch.tensor([0, 0, 1])) as draw:
            ...     y = net(torch.ones(3, 2))
            >>> torch.equal(y[0], y[1]), torch.equal(y[0], y[2])
            (True, False)
        """
        if setting(self, "draw", None) is not None:
            raise DrawError("a draw is already held; leave the outer hold() first, or resample() its members")
        draw = self.draw(members, generator, owner).stays_in_this_thread()
        with entered(self, "draw", draw):
            yield draw

    def draw(self, members: int, generator: torch.Generator | None = None, owner: Tensor | None = None) -> Draw:
        """Makes a draw without holding it; :meth:`under` runs calls under it, as often and in whatever thread it is needed.

        Args, errors: as for :meth:`hold`.

        Example:
            >>> import torch, flipout
            >>> net, x = flipout.Perturbed(torch.nn.Linear(2, 1), flipout.Gaussian(0.1)), torch.ones(3, 2)
            >>> draw = net.draw(members=3)
            >>> with net.under(draw):
            ...     first = net(x)
            >>> with net.under(draw):
            ...     torch.equal(net(x), first)
            True
        """
        members = member_count(members)
        check_generator(generator, self.sites)
        again = noted(self.module, "draw")
        draw = None if again is None else again.repeated()
        if draw is None:
            draw = self._draw(members, self.generator if generator is None else generator)
            if owner is not None:
                draw.owner = checked_owner(owner, members)
        note(self.module, "draw", draw, True)
        return draw

    @contextmanager
    def under(self, draw: Draw) -> Iterator[Draw]:
        """Runs the calls inside under a draw of this net.

        Raises:
            DrawError: if the draw is of another module, or one is already held.
        """
        if draw._module is not self.module:
            raise DrawError("the draw is of another module; make it with the draw() of the same wrapper")
        if setting(self, "draw", None) is not None:
            raise DrawError("a draw is already held; leave the outer context first")
        with entered(self, "draw", draw):
            yield draw

    def extra_repr(self) -> str:
        sites = self.sites
        laws = sorted({str(site.noise) for site in sites})
        return f"{', '.join(laws)}, {self.estimator}, {len(sites)} parameters"

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_checked": None}
        if self.generator is not None:  # generators neither pickle nor deepcopy on every supported torch
            state["generator"] = (self.generator.device, self.generator.get_state())
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["generator"] is not None:
            device, words = state["generator"]
            state = {**state, "generator": torch.Generator(device=device)}
            state["generator"].set_state(words)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        watch(self)

    def parameter_groups(self, weight_decay: float, noise_lr: float | None = None, **options: Any) -> list[dict[str, Any]]:
        """The parameters in groups for an optimiser of ``torch.optim``, with the noise scales kept out of the weight decay.

        Decay would pull ``log_std`` towards 0, which is a standard deviation of 1. :func:`flipout.parameter_groups` does the same
        for a model that contains this net.

        Args:
            weight_decay: of the module's own parameters; the scales have 0.
            noise_lr: learning rate of the scales; None for the optimiser's own.
            options: more options of both groups, such as ``lr``.

        Raises:
            ArgumentError: if ``weight_decay`` or ``noise_lr`` is negative or not finite.

        Example:
            >>> import torch, flipout
            >>> net = flipout.Perturbed(torch.nn.Linear(4, 3), flipout.Gaussian(0.01, learnable=True))
            >>> optimiser = torch.optim.AdamW(net.parameter_groups(weight_decay=0.1), lr=1e-3)
            >>> [(len(group["params"]), group["weight_decay"]) for group in optimiser.param_groups]
            [(2, 0.1), (2, 0.0)]
        """
        return parameter_groups(self, weight_decay, noise_lr, **options)


class _Scales(Mapping[str, torch.Tensor]):
    """The learnable scales by parameter name as they stand now, also where ``functional_call`` or FSDP has put others in their
    place.
    """

    def __init__(self, scales: nn.ParameterDict) -> None:
        self._owner = scales

    def __getitem__(self, name: str) -> torch.Tensor:
        scale = held(self._owner, _key(name))
        if scale is None:
            raise KeyError(name)
        return scale

    def __iter__(self) -> Iterator[str]:
        return (key.replace("/", ".") for key in self._owner)

    def __len__(self) -> int:
        return len(self._owner)


def _like(site: Site) -> Tensor:
    """What the scale of a parameter is made like: with values where only those of the parameter are elsewhere (offloaded)."""
    device = offloaded_to(site)
    return site.mean if device is None else torch.empty((), dtype=site.mean.dtype, device=device).expand(site.mean.shape)


def _key(name: str) -> str:
    return name.replace(".", "/")


def _check_estimator(estimator: Any, sites: Sequence[Site]) -> None:
    if not isinstance(estimator, Estimator):
        raise ArgumentError(f"estimator={estimator!r}: expected an estimator such as flipout.Flipout() or flipout.Shared()")
    for site in sites:
        estimator.check(site.noise, site.name)


def _refuse_overlap(module: Any, sites: Sequence[Site]) -> None:
    """Raises where a wrapper inside the module perturbs some of the same parameters."""
    if not isinstance(module, nn.Module):
        return
    slots = {slot: site.name for site in sites for slot in site.slots}
    for path, part in module.named_modules():
        if isinstance(part, Perturbed):
            both = [slots[slot] for site in part.sites for slot in site.slots if slot in slots]
            if both:
                raise ArgumentError(
                    f"{both[0]!r} and {len(both) - 1} more are perturbed by the Perturbed at {path!r} inside this module "
                    f"already; exclude them here (exclude={(path + '.*').lstrip('.')!r}), or wrap what is in it (its .module)"
                )


def member_count(members: Any) -> int:
    """The value, if it is a number of members.

    Raises:
        ArgumentError: if it is not.
    """
    if isinstance(members, bool) or not isinstance(members, int) or members < 1:
        raise ArgumentError(f"members={members!r}: expected a positive number of members")
    return members


def checked_owner(owner: Any, members: int) -> Tensor:
    """The value, if it names the member of each row.

    Raises:
        ArgumentError: if it does not.
    """
    good = isinstance(owner, Tensor) and owner.dim() == 1 and not owner.is_floating_point() and owner.dtype != torch.bool
    if not good or (owner.numel() and not (int(owner.min()) >= 0 and int(owner.max()) < members)):
        found = f"{owner.dtype} {tuple(owner.shape)}" if isinstance(owner, Tensor) else type(owner).__name__
        raise ArgumentError(f"owner={found}: expected one member index for each row, whole numbers from 0 to {members - 1}")
    members_of: Tensor = owner.long()
    return members_of
