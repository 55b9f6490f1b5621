"""Making the weights of a module random: the wrapper ``Perturbed`` and the context manager ``perturbed``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import flipout.rules  # noqa: F401  (fills the registry)
from flipout.calls import Calls, LateDraw, count_rows, require_blocks, slots_of
from flipout.decay import parameter_groups, watch
from flipout.draw import Draw
from flipout.errors import ArgumentError, BatchError, DrawError
from flipout.estimators import Estimator, Flipout
from flipout.noise import Noise
from flipout.select import Site, check_generator, rows_dim, select
from flipout.slots import Placement
from flipout.weight import PerturbedWeight

__all__ = ["Perturbed", "in_place", "perturbed"]


class Perturbed(nn.Module):
    """Wraps a module so that every example of a batch sees its own random weights.

    In training mode each forward pass draws anew; in evaluation mode the module runs with its mean weights, exactly as if it
    were not wrapped. The module itself is untouched: its parameters are the means, its ``state_dict`` is its own.

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
    ) -> None:
        super().__init__()
        sites = select(module, noise, include, exclude)
        _check_estimator(estimator, sites)
        check_generator(generator, sites)
        if isinstance(batch_dim, bool) or not isinstance(batch_dim, int) or batch_dim < 0:
            raise ArgumentError(f"batch_dim={batch_dim!r}: expected the index of a dimension, 0 or more")
        if fallback not in (None, "loop"):
            raise ArgumentError(f'fallback={fallback!r}: expected None or "loop"')
        self.module = module
        self.estimator = estimator
        self.batch_dim = rows_dim(module, batch_dim)
        self.generator = generator
        self.fallback = fallback
        self.log_std = nn.ParameterDict(
            {_key(site.name): nn.Parameter(site.noise.initial_log_std(site.mean)) for site in sites if site.noise.learnable}
        )
        self._sites = sites
        self._held: Draw | None = None
        self._sampling = False
        watch(self)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The perturbed parameters."""
        return tuple(self._sites)

    @property
    def noises(self) -> dict[str, Noise]:
        """The noise of each perturbed parameter, by name."""
        return {site.name: site.noise for site in self._sites}

    def noise_parameters(self) -> Iterator[nn.Parameter]:
        """The learnable noise scales: one ``log_std`` tensor of the weight's shape for each learnable parameter."""
        yield from self.log_std.parameters()

    @property
    def scales(self) -> Mapping[str, torch.Tensor]:
        """The logarithms of the learnable scales by parameter name, as they stand now."""
        return _Scales(self.log_std)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module. All arguments are its own."""
        draw = self._held
        if draw is None:
            if not (self.training or self._sampling):
                return self.module(*args, **kwargs)
            rows = count_rows(self.module, self.batch_dim, args, kwargs)
            draw = self._draw(rows, self.generator)
        else:
            rows = count_rows(self.module, self.batch_dim, args, kwargs)
            require_blocks(rows, draw, self.batch_dim)
        placed = Placement(slots_of(self._sites), draw.slot_weights(rows, self.batch_dim))
        try:
            output = self.module(*args, **kwargs)
        finally:
            placed.undo()
        if type(output) is PerturbedWeight:
            raise BatchError(
                f"{type(self.module).__name__} returned the perturbed weight {output.origin.name!r} {tuple(output.shape)} itself, "
                "which has no rows; combine it with the input first, or read it with hold() and draw.weights(n)"
            )
        return output

    def _draw(self, members: int, generator: torch.Generator | None) -> Draw:
        return Draw(self.module, self._sites, self.scales, self.estimator, members, generator, self.fallback)

    @contextmanager
    def sampling(self) -> Iterator[Perturbed]:
        """Samples weights in evaluation mode as well.

        Example:
            >>> import torch, flipout
            >>> net = flipout.Perturbed(torch.nn.Linear(4, 3), flipout.Gaussian(0.1)).eval()
            >>> with net.sampling():
            ...     y = net(torch.ones(2, 4))
            >>> torch.equal(*y)
            False
        """
        before, self._sampling = self._sampling, True
        try:
            yield self
        finally:
            self._sampling = before

    @contextmanager
    def using(self, estimator: Estimator) -> Iterator[Perturbed]:
        """Uses another estimator for the same weights and noise.

        Raises:
            UnsupportedNoiseError: if it cannot serve the noise.
            DrawError: while a draw is held, since a draw belongs to its estimator.
        """
        _check_estimator(estimator, self._sites)
        if self._held is not None:
            raise DrawError(f"a draw of {self._held.estimator} is held; switch the estimator outside hold()")
        before, self.estimator = self.estimator, estimator
        try:
            yield self
        finally:
            self.estimator = before

    @contextmanager
    def hold(self, members: int, generator: torch.Generator | None = None) -> Iterator[Draw]:
        """Holds one draw: every call inside sees the same N weights, in training and in evaluation mode.

        Inputs have ``members`` rows, or ``k * members`` in member-major blocks: rows 0 to k-1 are member 0.

        Args:
            members: N, at least 1.
            generator: source of this draw and of its resampling; None for the wrapper's own.

        Yields:
            The :class:`flipout.Draw`.

        Raises:
            ArgumentError: if ``members`` is not a positive integer or the generator is of another device.
            DrawError: if a draw is already held.
            BatchError: from calls whose rows do not divide into the members.
        """
        members = _member_count(members)
        check_generator(generator, self._sites)
        if self._held is not None:
            raise DrawError("a draw is already held; leave the outer hold() first, or resample() its members")
        draw = self._draw(members, self.generator if generator is None else generator)
        self._held = draw
        try:
            yield draw
        finally:
            self._held = None

    def draw(self, members: int, generator: torch.Generator | None = None) -> Draw:
        """TEMP."""
        check_generator(generator, self._sites)
        return self._draw(_member_count(members), self.generator if generator is None else generator)

    @contextmanager
    def under(self, draw: Draw) -> Iterator[Draw]:
        """TEMP."""
        before, self._held = self._held, draw
        try:
            yield draw
        finally:
            self._held = before

    def extra_repr(self) -> str:
        laws = sorted({str(site.noise) for site in self._sites})
        return f"{', '.join(laws)}, {self.estimator}, {len(self._sites)} parameters"

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state["_held"] = None
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


@contextmanager
def perturbed(
    module: nn.Module,
    noise: Noise | Mapping[str, Noise],
    estimator: Estimator = Flipout(),  # noqa: B008  (frozen)
    include: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = (),
    batch_dim: int = 0,
    generator: torch.Generator | None = None,
    fallback: str | None = None,
    members: int | None = None,
) -> Iterator[Draw]:
    """Perturbs a module in place for a while: for loops that own the model and cannot be handed a wrapper.

    One draw is made and held, whatever the module's mode, for every call of the module or of any part of it inside the context.
    Between calls its parameters are its own, so optimisers, clipping and checkpoints see nothing unusual.

    Args:
        module, noise, estimator, include, exclude, batch_dim, generator, fallback: as in :class:`Perturbed`.
        members: N. None takes the number of rows of the first call.

    Yields:
        The :class:`flipout.Draw`; with ``members=None`` its members are known after the first call.

    Raises:
        ArgumentError: for learnable noise, whose scales need a :class:`Perturbed` to live in; else as in ``Perturbed``.

    Example:
        >>> import torch, flipout
        >>> layer = torch.nn.Linear(4, 3)
        >>> with flipout.perturbed(layer, flipout.Gaussian(0.1)) as draw:
        ...     y = layer(torch.ones(2, 4))
        >>> torch.equal(*y), draw.members
        (False, 2)
    """
    net = Perturbed(module, noise, estimator, include, exclude, batch_dim, generator, fallback)
    if any(site.noise.learnable for site in net._sites):
        raise ArgumentError("learnable noise needs flipout.Perturbed: perturbed() has no place to keep its scales")
    draw = LateDraw(net, None if members is None else _member_count(members))
    with in_place(net, draw):
        yield draw


@contextmanager
def in_place(net: Perturbed, draw: Draw) -> Iterator[None]:
    """Perturbs ``net.module`` itself by a draw of it, at every call of the module or of a part of it inside the context.

    Between calls its parameters are its own. While the context lasts, ``draw.module(n)`` takes the hooks off for its copy.
    """
    calls = draw.calls = Calls(net, draw)
    calls.attach()
    try:
        yield
    finally:
        draw.calls = None
        calls.detach()
        calls.restore()


class _Scales(Mapping[str, torch.Tensor]):
    """The learnable scales by parameter name as they stand now, also where ``functional_call`` has put others in their place."""

    def __init__(self, scales: nn.ParameterDict) -> None:
        self._slots = scales._parameters

    def __getitem__(self, name: str) -> torch.Tensor:
        scale = self._slots[_key(name)]
        assert scale is not None
        return scale

    def __iter__(self) -> Iterator[str]:
        return (key.replace("/", ".") for key in self._slots)

    def __len__(self) -> int:
        return len(self._slots)


def _key(name: str) -> str:
    return name.replace(".", "/")


def _check_estimator(estimator: Any, sites: Sequence[Site]) -> None:
    if not isinstance(estimator, Estimator):
        raise ArgumentError(f"estimator={estimator!r}: expected an estimator such as flipout.Flipout() or flipout.Shared()")
    for site in sites:
        estimator.check(site.noise, site.name)


def _member_count(members: Any) -> int:
    if isinstance(members, bool) or not isinstance(members, int) or members < 1:
        raise ArgumentError(f"members={members!r}: expected a positive number of members")
    return members
