"""docs/situations.md names, for each situation, tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "situations.md"


def rows() -> list[tuple[str, ...]]:
    """The cells of each row: id, situation, what happens, tests."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    return [tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]) for line in lines]


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0].strip("`"))
def test_each_situation_has_a_test(row: tuple[str, ...]) -> None:
    assert len(row) == 4, row
    assert all(row)
    named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", row[3])
    assert named, f"{row[0]} names no test"
    for file, function in named:
        path = ROOT / "tests" / "situations" / file
        assert path.exists(), f"{row[0]} names {file}, which is not in tests/situations"
        assert not function or function in functions(path), f"{row[0]} names {function}, which {file} has not"
        assert function or any(name.startswith("test_") for name in functions(path)), f"{file} has no tests"


def test_ids_are_unique() -> None:
    ids = [row[0] for row in rows()]
    assert len(ids) > 30
    assert len(set(ids)) == len(ids)


def test_every_file_of_the_room_is_named() -> None:
    named = set(re.findall(r"`(test_\w+\.py)", PAGE.read_text(encoding="utf-8")))
    here = {path.name for path in Path(__file__).parent.glob("test_*.py")} - {Path(__file__).name}
    assert here <= named, sorted(here - named)
