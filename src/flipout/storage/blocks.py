"""Finished blocks of a long measurement on disk, so that one that was killed goes on from the last of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flipout.errors import ArgumentError
from flipout.storage.files import read_json, replace_file

__all__ = ["BlockFile"]


class BlockFile:
    """A JSON file of finished blocks and of the question that they answer.

    It is replaced whole after each block: a process killed at any moment, or a full disk, leaves the version before.

    Args:
        path: where; None keeps nothing.
        question: all that the numbers depend on. A file that is there must have the same.

    Raises:
        ArgumentError: if the file answers another question, or cannot be read.
    """

    def __init__(self, path: Path | None, question: Mapping[str, Any]) -> None:
        self.path = path
        self.question = json.loads(json.dumps(question))  # as a file gives it back
        self.blocks: dict[str, list[Any]] = {}
        if path is None or not path.exists():
            return
        found = read_json(path)
        before, blocks = found.get("question"), found.get("blocks")
        if not isinstance(before, dict) or not isinstance(blocks, dict):
            raise ArgumentError(f"checkpoint {path} is no file of finished blocks; name another file, or remove it")
        differing = [key for key in {**before, **self.question} if before.get(key) != self.question.get(key)]
        if differing:
            told = "; ".join(f"{key} was {before.get(key)!r}, is {self.question.get(key)!r}" for key in sorted(differing))
            raise ArgumentError(f"checkpoint {path} is of another measurement ({told}); name another file, or remove it")
        self.blocks = blocks

    def of(self, key: str) -> list[Any]:
        """The finished blocks of one point."""
        return self.blocks.setdefault(key, [])

    def add(self, key: str, block: Any) -> None:
        """Takes in a block, and saves all.

        Raises:
            SaveError: if it cannot be written; the version before is kept.
        """
        self.of(key).append(block)
        if self.path is not None:
            replace_file(self.path, json.dumps({"question": self.question, "blocks": self.blocks}).encode())
