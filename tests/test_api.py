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
    "flipout.evolution",
    "flipout.regularize",
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
        for member in sorted(vars(value)):
            found = vars(value)[member]
            plain = found.__func__ if isinstance(found, classmethod | staticmethod) else found
            if member.startswith("_") or not (callable(plain) or isinstance(plain, property)):
                continue
            yield f"  {name}.{member}{': property' if isinstance(plain, property) else signature(plain)}"
    elif callable(value):
        yield f"{name}{signature(value)}"
    else:
        yield f"{name}: {type(value).__name__}"


def api() -> str:
    lines = [line for module in MODULES for name, value in exported(module) for line in described(name, value)]
    return "\n".join(lines) + "\n"


def test_the_contract_is_as_recorded():
    assert api() == RECORD.read_text(encoding="utf-8"), "if this is meant: python tests/test_api.py, and a line in CHANGELOG.md"


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_documented_and_every_function_has_an_example(module):
    missing, bare = [], []
    for name, value in exported(module):
        if isinstance(value, ModuleType) or not callable(value):
            continue
        told = inspect.getdoc(value)
        if not told or told == inspect.getdoc(object):
            missing.append(name)
        elif inspect.isfunction(value) and ">>>" not in told:
            bare.append(name)
    assert not missing
    assert not bare


if __name__ == "__main__":
    RECORD.write_text(api(), encoding="utf-8")
