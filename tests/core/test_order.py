"""Every file imports only from files that stand before it in the table of CONTRIBUTING.md, and there are no circles.

All imports count: those inside functions, and those that only type checkers see.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
PACKAGES = ("flipout", "flipout_experiments")

#: What stands over the order: the name that hands on the public ones, and ``python -m``, which starts the command line.
OVER = {"flipout", "flipout.__main__"}


@cache
def modules() -> dict[str, Path]:
    """Every module of the two packages by its dotted name."""
    found = {}
    for path in (path for package in PACKAGES for path in (SOURCE / package).rglob("*.py")):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        found[name] = path
    return found


@cache
def imports(module: str) -> frozenset[str]:
    """The modules of the two packages that one of them imports, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: write imports with the whole name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            while name and name not in modules():
                name = name.rpartition(".")[0]
            found.add(name)
    return frozenset(found - {"", module})


def rooms(package: str) -> list[str]:
    """The modules and folders that the package's table names, in the order of reading."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text[text.index(f"| `{package}` |") :].partition("\n\n")[0]
    return [f"{package}.{name.removesuffix('/').removesuffix('.py')}" for name in re.findall(r"`(\w+(?:\.py|/))`", table)]


def room_of(module: str) -> str:
    """The file or folder that a module belongs to: the part of its name that a table can have."""
    return ".".join(module.split(".")[:2])


def circles(among: dict[str, frozenset[str]]) -> Iterator[list[str]]:
    """The modules that are left when those which import none of the others are taken away again and again."""
    left = dict(among)
    while True:
        free = {name for name, uses in left.items() if not uses & left.keys()}
        if not free:
            break
        left = {name: uses for name, uses in left.items() if name not in free}
    if left:
        yield sorted(left)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_room_is_in_the_table_once(package):
    listed = rooms(package)
    there = {room_of(name) for name in modules() if name.startswith(f"{package}.")} - OVER
    assert len(listed) == len(set(listed))
    assert sorted(listed) == sorted(there), "a new file has its place in the table of CONTRIBUTING.md"


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_to_what_stands_before(package):
    place = {name: i for i, name in enumerate(rooms(package))}
    wrong = []
    for module in modules():
        room = room_of(module)
        if module in OVER or room not in place:
            continue
        for used in map(room_of, imports(module)):
            if used in place and place[used] > place[room]:
                wrong.append(f"{module} imports {used}, which stands after it")
    assert not wrong, "\n".join(wrong)


def test_there_are_no_circles():
    among = {name: imports(name) for name in modules() if name not in OVER}
    assert not list(circles(among))


def test_the_library_knows_nothing_of_the_experiments():
    own = [name for name in modules() if room_of(name).partition(".")[0] == "flipout" and name != "flipout.__main__"]
    assert not [name for name in own if any(used.startswith("flipout_experiments") for used in imports(name))]


def test_applications_know_nothing_of_rules():
    uses = (
        "flipout.variance",
        "flipout.bayes",
        "flipout.evolution",
        "flipout.regularize",
        "flipout.sklearn",
        "flipout_experiments",
    )
    assert not [name for name in modules() if name.startswith(uses) and any(u.startswith("flipout.rules") for u in imports(name))]


def test_the_law_sees_a_circle():
    assert list(circles({"a": frozenset({"b"}), "b": frozenset({"a"}), "c": frozenset()})) == [["a", "b"]]
