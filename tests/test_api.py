"""The public names and their signatures, as they were when somebody last looked: ``python tests/test_api.py`` writes them anew.

A change of this file is a change of the contract: it wants a line in CHANGELOG.md.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

RECORD = Path(__file__).with_name("api.txt")
MODULES = (
    "flipout",
    "flipout.bayes",
    "flipout.data",
    "flipout.errors",
    "flipout.evolution",
    "flipout.regularize",
    "flipout.sklearn",
    "flipout.variance",
)


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
        yield f"class {name}{signature(value)}"
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


def members(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that a class defines."""
    for member in sorted(vars(value)):
        found = vars(value)[member]
        plain = found.__func__ if isinstance(found, classmethod | staticmethod) else found
        if not member.startswith("_") and (callable(plain) or isinstance(plain, property)):
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
