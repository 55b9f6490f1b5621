"""The public names and their signatures, as they were when somebody last looked: ``python tests/test_api.py`` writes them anew.

A change of this file is a change of the contract: it wants a line in CHANGELOG.md.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import flipout

RECORD = Path(__file__).with_name("api.txt")
MODULES = (
    "flipout",
    "flipout.bayes",
    "flipout.data",
    "flipout.errors",
    "flipout.evolution",
    "flipout.reference",
    "flipout.regularize",
    "flipout.sklearn",
    "flipout.storage",
    "flipout.variance",
)

#: Classes whose objects the library hands out: how they are made is its own affair.
HANDED_OUT = {"flipout.Draw", "flipout.PerturbedWeight", "flipout.evolution.Members"}

#: What one room of the library asks of another's objects: no promise, though the names have no underscore.
INTERNAL = {
    "flipout.Draw": {"as_it_was", "carrier", "carriers", "layout", "samples", "sites", "slot_weights", "stays_in_this_thread"},
    "flipout.Estimator": {"check", "resample", "sample"},
    "flipout.Flipout": {"groups"},
    "flipout.Noise": {"sourced"},
    "flipout.Perturbed": {"sites"},
    "flipout.PerturbedWeight": {"at", "for_tokens", "map", "moved", "replace", "require_drawn", "rows_in", "with_rows"},
    "flipout.evolution.EvolutionStrategy": {"evaluated_elsewhere"},
    "flipout.regularize.Regularized": {"drawing"},
}


def internal(owner: type, member: str) -> bool:
    """Whether a member is internal for its class, or for one that the class derives from."""
    kin = {f"{name}.{each.__name__}" for each in owner.__mro__ for name in MODULES}
    return any(member in members for name, members in INTERNAL.items() if name in kin)


def exported(name: str) -> Iterator[tuple[str, Any]]:
    module = importlib.import_module(name)
    for each in sorted(module.__all__):
        yield f"{name}.{each}", getattr(module, each)


def signature(value: Any) -> str:
    try:
        found = str(inspect.signature(value))
    except (TypeError, ValueError):
        return ""
    return re.sub(r" at 0x[0-9a-f]+", "", found)


def described(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, ModuleType):
        yield f"{name}: module"
    elif inspect.isclass(value):
        yield f"class {name}{'' if name in HANDED_OUT else signature(value)}"
        for member, found in members(name, value):
            yield f"  {member}{': property' if isinstance(found, property) else signature(found)}"
    elif callable(value):
        yield f"{name}{signature(value)}"
    else:
        yield f"{name}: {type(value).__name__}"


def api() -> str:
    lines = [line for module in MODULES for name, value in exported(module) for line in described(name, value)]
    return "\n".join(lines) + "\n"


def test_the_contract_is_as_recorded():
    assert api() == RECORD.read_text(encoding="utf-8"), "if this is meant: python tests/test_api.py, and a line in CHANGELOG.md"


def test_the_contract_names_only_public_classes():
    """A signature that asks for a class, or gives one, which users cannot import is no contract."""
    public = {name.rpartition(".")[2] for module in MODULES for name, _ in exported(module)}
    private = set()
    for found in pkgutil.walk_packages(flipout.__path__, "flipout."):
        if found.name not in {"flipout.__main__", "flipout.evolution.ray", "flipout.evolution.rollouts"}:
            module = importlib.import_module(found.name)
            own = {name for name, value in vars(module).items() if inspect.isclass(value) and value.__module__ == found.name}
            private |= {name for name in own if not getattr(vars(module)[name], "_is_protocol", False)} - public
    named = {word: line for line in api().splitlines() for word in re.findall(r"\w+", line.partition("(")[2])}
    assert not {word: named[word] for word in private & named.keys()}


def members(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that a class defines."""
    for member in sorted(vars(value)):
        found = vars(value)[member]
        plain = found.__func__ if isinstance(found, classmethod | staticmethod) else found
        if not member.startswith("_") and not internal(value, member) and (callable(plain) or isinstance(plain, property)):
            yield f"{name}.{member}", plain


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_documented_and_has_an_example(module):
    """A method may have its docstring from the class that first named it; an example is the name's own."""
    undocumented, bare = [], []
    for name, value in exported(module):
        if isinstance(value, ModuleType):
            undocumented += [] if value.__doc__ else [name]
        elif callable(value):
            undocumented += [] if value.__doc__ else [name]
            bare += [] if ">>>" in (value.__doc__ or "") else [name]
        if inspect.isclass(value):
            undocumented += [each for each, found in members(name, value) if not told(value, each.rpartition(".")[2])]
    assert not undocumented
    assert not bare


def told(owner: type, member: str) -> str | None:
    """The docstring of a method or property, or that of the class that it overrides."""
    return inspect.getdoc(getattr(owner, member))


if __name__ == "__main__":
    RECORD.write_text(api(), encoding="utf-8")
