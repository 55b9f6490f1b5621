"""Which parameters of a module are perturbed, under which noise, and along which axes signs vary."""

from __future__ import annotations

import difflib
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from flipout.arguments import broadcasts
from flipout.distributions import FromDistribution
from flipout.errors import ArgumentError
from flipout.noise import Noise, scale_of_mean
from flipout.sharded import in_flat_pieces, whole

__all__ = ["SCALES", "Selection", "Site", "check_generator", "held", "hooks_on", "select"]


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A selected parameter.

    Attributes:
        name: its first name in the module.
        noise: the law of its perturbation.
        axes: the axes along which signs vary.
        slots: every place that holds it, as (owning module, attribute); more than one for a tied parameter.
        matrix: for the bias of a selected matrix or kernel, that one's name: both are perturbed along one output axis and
            share its signs.
        names: all its names, one for each of ``slots``.
        padding: the row of a table that is padding in one of its uses, and has no noise in any.
        shape: of the parameter when it was selected.
    """

    name: str
    noise: Noise
    axes: tuple[int, ...]
    slots: tuple[tuple[nn.Module, str], ...]
    matrix: str | None = None
    names: tuple[str, ...] = ()
    padding: int | None = None
    shape: torch.Size = torch.Size()  # noqa: RUF009  (immutable)

    @property
    def mean(self) -> Tensor:
        """The parameter as it stands now."""
        parameter = held(*self.slots[0])
        assert parameter is not None
        return parameter


#: An attribute that marks the scales of a wrapper, which are parameters of nobody else's.
SCALES = "_flipout_scales"


def held(owner: nn.Module, attribute: str) -> Tensor | None:
    """What stands at a slot: a parameter, or the tensor that something (FSDP, for one) has put in its place."""
    parameter = owner._parameters.get(attribute)
    if parameter is None:
        parameter = owner.__dict__.get(attribute)
    return parameter if isinstance(parameter, Tensor) else None


class Selection:
    """The selected parameters of a module, as the module stands.

    Parts may be replaced, parameters tied or put elsewhere after the selection was made: :meth:`sites` looks again where the
    tree of
    modules, the names of parameters or what is tied to what has changed.

    Args:
        module, noise, include, exclude: as for :func:`select`.
    """

    def __init__(
        self, module: nn.Module, noise: Noise | Mapping[str, Noise], include: str | Iterable[str], exclude: str | Iterable[str]
    ) -> None:
        kept = (include if isinstance(include, str) else list(include), exclude if isinstance(exclude, str) else list(exclude))
        self._arguments = (module, noise, *kept)
        self._tied: dict[tuple[nn.Module, str], Any] = {}
        self._look()

    def sites(self) -> tuple[Site, ...]:
        """The selected parameters as they stand now; the same tuple as long as nothing has changed.

        Raises:
            ArgumentError: as :func:`select`, for a module that has become another.
        """
        if not torch.compiler.is_compiling() and not self._stands():
            self._look()
        return self._sites

    def _look(self) -> None:
        self._sites = tuple(select(*self._arguments, ties=self._tied))
        self.names = tuple(site.name for site in self._sites)
        modules = list(self._arguments[0].modules())
        self._parts = [(part._modules, tuple(part._modules.items())) for part in modules if part._modules]
        self._names = [(part._parameters, frozenset(part._parameters)) for part in modules if part._parameters]
        self._slots = [(part, name) for part in modules for name, value in part._parameters.items() if value is not None]
        self._seen: list[Any] = []
        self._index = {slot: i for i, site in enumerate(self._sites) for slot in site.slots}
        self._shape = self._ties()

    def known(self, sites: tuple[Site, ...]) -> dict[int, tuple[Any, int]] | None:
        """What stood in the slots when they were last looked at: by id, a reference to each tensor and the number of its site.

        None where ``sites`` are not those of :meth:`sites`.
        """
        return self._known if sites is self._sites else None

    def _ties(self) -> list[Any]:
        """The shape of each parameter, and the first slot that holds the same one."""
        held_now = [held(*slot) for slot in self._slots]
        self._seen = [None if tensor is None else weakref.ref(tensor) for tensor in held_now]
        self._known = {
            id(tensor): (seen, self._index[slot])
            for slot, tensor, seen in zip(self._slots, held_now, self._seen, strict=True)
            if tensor is not None and slot in self._index
        }
        first: dict[int, int] = {}
        keys = [_identity(*slot, tensor, self._tied) for slot, tensor in zip(self._slots, held_now, strict=True)]
        groups: dict[Any, list[tuple[nn.Module, str]]] = {}
        for slot, key in zip(self._slots, keys, strict=True):
            groups.setdefault(key, []).append(slot)
        self._tied = {slot: ("tied", id(slots[0][0]), slots[0][1]) for slots in groups.values() if len(slots) > 1 for slot in slots}
        return [
            (first.setdefault(key, i), None if t is None else t.shape)
            for i, (key, t) in enumerate(zip(keys, held_now, strict=True))
        ]

    def _stands(self) -> bool:
        for modules, items in self._parts:
            if len(modules) != len(items) or any(modules.get(name) is not part for name, part in items):
                return False
        if any(not known.issuperset(parameters) for parameters, known in self._names):
            return False
        for (owner, name), seen in zip(self._slots, self._seen, strict=True):
            now = owner._parameters.get(name)
            if now is None or seen is None or seen() is not now:
                return self._ties() == self._shape
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {"_arguments": self._arguments}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tied = {}
        try:
            self._look()
        except AttributeError:  # the module is being rebuilt, and is looked at when it stands
            self.names, self._slots, self._parts, self._names = (), [], [({}, (("", None),))], []
            self._sites = ()


def select(
    module: nn.Module,
    noise: Noise | Mapping[str, Noise],
    include: str | Iterable[str],
    exclude: str | Iterable[str],
    ties: Mapping[tuple[nn.Module, str], Any] | None = None,
) -> list[Site]:
    """The parameters that match ``include``, not ``exclude``, and a pattern of ``noise``; the first pattern wins.

    ``ties`` tells of slots that held one parameter before it was offloaded: see :func:`_identity`.

    A tied parameter has several names and is selected if any of them matches; it is left out if any is excluded.

    Raises:
        ArgumentError: if a pattern matches no parameter, nothing is left to perturb, or a parameter holds no real numbers.
    """
    if not isinstance(module, nn.Module):
        raise ArgumentError(f"expected a torch.nn.Module, got {type(module).__name__}")
    flat = in_flat_pieces(module)
    if flat is not None:
        raise ArgumentError(
            f"{flat!r} is a FullyShardedDataParallel (FSDP1), whose parameters lie in flat pieces between calls, so that no "
            "noise can be drawn for them; use torch.distributed.fsdp.fully_shard, or put one FullyShardedDataParallel without "
            "auto_wrap_policy around the wrapper"
        )
    laws = dict(noise) if isinstance(noise, Mapping) else {"*": noise}
    for pattern, law in laws.items():
        if not isinstance(law, Noise):
            raise ArgumentError(f"the noise for {pattern!r} is {law!r}; expected a flipout noise such as flipout.Gaussian(0.1)")
    places = _places(module, ties or {})
    names = [name for found in places.values() for name, _, _ in found]
    included, excluded = _patterns(include, "include"), _patterns(exclude, "exclude")
    for kind, patterns in {"include": included, "exclude": excluded, "noise": list(laws)}.items():
        for pattern in patterns:
            _require_match(pattern, names, kind)
    sites = []
    for found in places.values():
        own = [name for name, _, _ in found]
        if not _any_match(own, included) or _any_match(own, excluded):
            continue
        chosen = next((law for pattern, law in laws.items() if _any_match(own, [pattern])), None)
        if chosen is None:
            continue
        slots = tuple((owner, attribute) for _, owner, attribute in found)
        _require_python(own[0], slots)
        parameter = held(*slots[0])
        _require_real(own[0], parameter)
        _require_shape(own[0], chosen, parameter)
        assert parameter is not None
        sites.append(Site(own[0], chosen, _sign_axes(slots), slots, None, tuple(own), _padding(slots), parameter.shape))
    if not sites:
        raise ArgumentError(
            f"nothing to perturb: include={included}, exclude={excluded} and the noise patterns {list(laws)} leave none of "
            f"the {len(names)} parameters of {type(module).__name__}"
        )
    _require_dispatch(sites)
    return _with_matrices(sites)


def _require_dispatch(sites: Iterable[Site]) -> None:
    """Raises where torch would not hand a projection of an attention module to the attention rule."""
    slots = [(site.name, owner, attribute) for site in sites for owner, attribute in site.slots]
    owners = {id(owner): owner for _, owner, _ in slots if isinstance(owner, nn.MultiheadAttention)}
    for owner in owners.values():
        own = {attribute: name for name, other, attribute in slots if other is owner}
        separate = [name for attribute, name in own.items() if attribute in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]
        if separate and len(separate) == len(own) and not any(other is owner.out_proj for _, other, _ in slots):
            raise ArgumentError(
                f"{', '.join(map(repr, separate))}: torch does not show these projections of an nn.MultiheadAttention to a rule "
                "unless another parameter of the module is perturbed as well; include its out_proj.weight or in_proj_bias"
            )


def _with_matrices(sites: list[Site]) -> list[Site]:
    """The sites, each bias with the name of its matrix.

    Perturbations ΔW ∘ (r sᵀ) and Δb ∘ r with one r are as independent as with two: ΔW and Δb are independent and symmetric.
    Sharing r saves the bias its own signs, and lets it enter the perturbed product.
    """
    by_slot = {slot: site for site in sites for slot in site.slots}

    def matrix_of(site: Site) -> str | None:
        owner, attribute = site.slots[0]
        other = by_slot.get((owner, attribute.replace("bias", "weight")))
        if other is None or site.axes != (0,) or 0 not in other.axes or len(other.axes) < 2:
            return None
        transposed = isinstance(owner, nn.modules.conv._ConvTransposeNd)  # its kernel has the inputs on axis 0
        return None if transposed or other.mean.shape[0] != site.mean.shape[0] else other.name

    return [replace(site, matrix=matrix_of(site)) for site in sites]


def _identity(owner: nn.Module, attribute: str, tensor: Tensor | None, ties: Mapping[tuple[nn.Module, str], Any]) -> Any:
    """What two slots have in common that hold one parameter.

    That is the parameter itself, except while it is offloaded: each of its slots then has a placeholder of its own on the device
    meta. Those belong together that did before, or whose values lie at one address of accelerate's map of weights.
    """
    if tensor is None or tensor.device.type != "meta":
        return id(tensor)
    before = ties.get((owner, attribute))
    if before is not None:
        return before
    for each in hooks_on(owner):
        weights: Any = getattr(each, "weights_map", None)
        kept = getattr(weights, "dataset", weights)
        if isinstance(kept, dict):
            value = kept.get(getattr(weights, "prefix", "") + attribute)
            if isinstance(value, Tensor):
                return ("kept", value.data_ptr(), value.shape)
    return id(tensor)


def hooks_on(owner: nn.Module) -> list[Any]:
    """The hooks that accelerate has put on a part, which bring its parameters and take them away."""
    hook: Any = getattr(owner, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", (hook,)))


def _places(module: nn.Module, ties: Mapping[tuple[nn.Module, str], Any]) -> dict[Any, list[tuple[str, nn.Module, str]]]:
    """Every parameter, by identity, with all its names and owners."""
    places: dict[Any, list[tuple[str, nn.Module, str]]] = {}
    for path, owner in module.named_modules():
        for attribute, parameter in owner._parameters.items():
            if parameter is not None and not getattr(owner, SCALES, False):
                name = f"{path}.{attribute}" if path else attribute
                places.setdefault(_identity(owner, attribute, parameter, ties), []).append((name, owner, attribute))
    return places


def _patterns(patterns: str | Iterable[str], kind: str) -> list[str]:
    found = [patterns] if isinstance(patterns, str) else list(patterns)
    if not all(isinstance(pattern, str) for pattern in found):
        raise ArgumentError(f"{kind}={patterns!r}: expected a name pattern such as 'head.*', or several")
    return found


def _any_match(names: Iterable[str], patterns: Iterable[str]) -> bool:
    patterns = list(patterns)
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _require_match(pattern: str, names: list[str], kind: str) -> None:
    if pattern == "*" or _any_match(names, [pattern]):
        return
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
    raise ArgumentError(
        f"{kind} pattern {pattern!r} matches no parameter; the nearest names are {', '.join(map(repr, near)) or 'none'} "
        "(patterns are those of fnmatch: * and ?)"
    )


def _require_real(name: str, parameter: Tensor | None) -> None:
    if isinstance(parameter, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        raise ArgumentError(f"parameter {name!r} is not initialised yet; run the module once on a batch before wrapping it")
    if parameter is None or not parameter.is_floating_point():
        dtype = None if parameter is None else parameter.dtype
        raise ArgumentError(f"parameter {name!r} has dtype {dtype}, which takes no noise; pass exclude={name!r}")


def _require_shape(name: str, noise: Noise, parameter: Tensor | None) -> None:
    """Raises where a noise has numbers of its own for each entry, and not of entries such as these."""
    assert parameter is not None
    shapes = [noise.std.shape] if isinstance(noise.std, Tensor) else []
    shapes += [noise.dist.batch_shape] if isinstance(noise, FromDistribution) else []
    if callable(noise.std):
        _require_scale(name, noise.std, parameter)
    for shape in shapes:
        if not broadcasts(shape, parameter.shape):
            raise ArgumentError(
                f"the noise of {name!r} has numbers of shape {tuple(shape)}, which do not broadcast to the parameter's "
                f"{tuple(parameter.shape)}; give one number, one for each entry, or another noise to each parameter by its name"
            )


def _require_scale(name: str, function: Callable[[Tensor], Tensor], parameter: Tensor) -> None:
    """Raises where the scale that a function gives a parameter is none."""
    try:
        scale_of_mean(function, whole(parameter))
    except ArgumentError as error:
        raise ArgumentError(f"the noise of {name!r}: {error}") from error


def _require_python(name: str, slots: Iterable[tuple[nn.Module, str]]) -> None:
    for owner, _ in slots:
        if isinstance(owner, torch.jit.ScriptModule):
            raise ArgumentError(
                f"parameter {name!r} belongs to TorchScript ({owner.original_name}), which runs compiled operations that no rule "
                f"can serve; perturb the Python module that it was compiled from, or pass exclude={name!r}"
            )


def _sign_axes(slots: Iterable[tuple[nn.Module, str]]) -> tuple[int, ...]:
    """Axes of independent signs: output and input of a matrix or kernel, the columns of a table, the axis of a vector."""
    axes: set[int] | None = None
    for owner, attribute in slots:
        parameter = owner._parameters[attribute]
        assert parameter is not None
        shape = parameter.shape
        if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)) and attribute == "weight":
            found = {1}
        elif len(shape) < 2:
            found = set(range(len(shape)))
        elif tuple(shape[:2]) == (1, 1) and not isinstance(owner, nn.modules.conv._ConvNd):
            found = {len(shape) - 1}  # a token or a position [1, 1, d] is a vector
        else:
            found = {0, 1}
        axes = found if axes is None else axes & found
    return tuple(sorted(axes or ()))


def _padding(slots: Iterable[tuple[nn.Module, str]]) -> int | None:
    """The padding row of a table; None without one."""
    tables = (owner for owner, attribute in slots if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)) and attribute == "weight")
    return next((table.padding_idx for table in tables if table.padding_idx is not None), None)


def check_generator(generator: torch.Generator | None, sites: Iterable[Site]) -> None:
    """Raises ArgumentError for what is no generator, or one of another device than the parameters'."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise ArgumentError(f"generator={generator!r}: expected a torch.Generator or None, not a {type(generator).__name__}")
    for site in sites:
        if site.mean.device.type not in (generator.device.type, "meta"):  # meta: offloaded, or not materialised yet
            raise ArgumentError(
                f"the generator lives on {generator.device}, parameter {site.name!r} on {site.mean.device}; make it with "
                f"torch.Generator(device={str(site.mean.device)!r})"
            )
