"""Texts made fit for a model: fewer words, fewer tokens, and a file of the user's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from flipout.data import Text
from flipout.errors import ArgumentError

__all__ = ["UNKNOWN", "cut", "encode", "limit_vocabulary", "own_text", "read_text", "split_tokens"]

#: Stands for a token that the vocabulary lacks.
UNKNOWN = "<unk>"


def cut(text: Text, train: int | None, held: int | None = None) -> Text:
    """The text with the first so many tokens of its training split, and of each other split; None for all of them.

    Example:
        >>> splits = {"train": torch.arange(9), "valid": torch.arange(5), "test": torch.arange(5)}
        >>> {name: len(split) for name, split in cut(Text("t", "", "char", (), splits), 4).splits.items()}
        {'train': 4, 'valid': 5, 'test': 5}
    """
    limits = {name: train if name == "train" else held for name in text.splits}
    return replace(text, splits={name: split[: limits[name]] for name, split in text.splits.items()})


def limit_vocabulary(text: Text, size: int | None) -> Text:
    """The text with its ``size`` - 1 most frequent training tokens, and ``<unk>`` for every other in all splits.

    Example:
        >>> words = Text("t", "", "word", ("a", "b", "c", "d"), {"train": torch.tensor([0, 3, 0, 1, 1, 0, 2])})
        >>> small = limit_vocabulary(words, 3)
        >>> small.vocabulary, small.train.tolist()
        (('<unk>', 'a', 'b'), [1, 0, 1, 2, 2, 1, 0])
    """
    if size is None or size >= len(text.vocabulary):
        return text
    counts = torch.bincount(text.train, minlength=len(text.vocabulary))
    order = [i for i in counts.argsort(descending=True, stable=True).tolist() if text.vocabulary[i] != UNKNOWN][: size - 1]
    number = torch.zeros(len(text.vocabulary), dtype=torch.int64)
    number[order] = torch.arange(1, size)
    names = (UNKNOWN, *(text.vocabulary[i] for i in order))
    source = f"{text.source}; the {size - 1:,} most frequent {text.level}s, {UNKNOWN} for the others"
    return replace(text, vocabulary=names, source=source, splits={name: number[split] for name, split in text.splits.items()})


def split_tokens(text: str, level: str) -> list[str]:
    """A text as its characters, or as its words with a line feed at each end of a line.

    Raises:
        ArgumentError: for another level.

    Example:
        >>> split_tokens("To be,\\nor not", "word")
        ['To', 'be,', '\\n', 'or', 'not']
    """
    if level == "char":
        return list(text)
    if level == "word":
        return [word for line in text.splitlines(keepends=True) for word in (*line.split(), *["\n"] * line.endswith("\n"))]
    raise ArgumentError(f"level {level!r}: choose 'char' or 'word'")


def encode(tokens: Sequence[str], vocabulary: Sequence[str]) -> Tensor:
    """The numbers of tokens, ``[n]``; those that the vocabulary lacks become ``<unk>``.

    Raises:
        ArgumentError: if there are such tokens and the vocabulary has no ``<unk>``; names some of them.

    Example:
        >>> encode(list("abca"), ("a", "b", "<unk>")).tolist()
        [0, 1, 2, 0]
    """
    numbers = {token: i for i, token in enumerate(vocabulary)}
    other = numbers.get(UNKNOWN)
    if other is None and (unknown := [token for token in dict.fromkeys(tokens) if token not in numbers]):
        some = ", ".join(map(repr, unknown[:5]))
        raise ArgumentError(
            f"the model does not know {len(unknown)} of the text's tokens ({some}{', ...' if len(unknown) > 5 else ''}), and its "
            f"vocabulary of {len(vocabulary):,} has no {UNKNOWN}: take them out, or train on a text that has them"
        )
    return torch.tensor([numbers.get(token, other) for token in tokens], dtype=torch.int64)


def read_text(path: Path) -> str:
    """A file's text.

    Raises:
        ArgumentError: if the file cannot be read, is not UTF-8, or is empty.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ArgumentError(
            f"{path} is no text in UTF-8: byte {error.start:,} is {error.object[error.start]:#04x}. Convert it first, for example "
            "with iconv -f latin1 -t utf-8"
        ) from error
    except OSError as error:
        raise ArgumentError(f"{path} cannot be read ({error.strerror or error}); name a text file") from error
    if not content.strip():
        raise ArgumentError(f"{path} is empty; name a file with some text")
    return content


def own_text(path: Path, level: str) -> Text:
    """A file of the user's own: the first nine tenths to train on, a twentieth each to validate and to test.

    A token that training has but once, and every one that it has not at all, is ``<unk>``.

    Args:
        path: of a text in UTF-8.
        level: ``"char"`` or ``"word"``.

    Raises:
        ArgumentError: as :func:`read_text`; for another level; if training has no token twice, so that none would be known.
    """
    tokens = split_tokens(read_text(path), level)
    first, second = len(tokens) * 9 // 10, len(tokens) * 19 // 20
    parts = {"train": tokens[:first], "valid": tokens[first:second], "test": tokens[second:]}
    vocabulary = (UNKNOWN, *_frequent(parts["train"]))
    if len(vocabulary) == 1:
        raise ArgumentError(
            f"{path} has no {level} twice in its first nine tenths, so there is nothing to learn: name a longer text"
        )
    splits = {name: encode(part, vocabulary) for name, part in parts.items()}
    counts = " / ".join(f"{len(split):,}" for split in splits.values())
    unknown = sum(int((split == 0).sum()) for name, split in splits.items() if name != "train")
    source = (
        f"{path}: {counts} {level}s to train, validate and test on; {len(vocabulary):,} different, {UNKNOWN} among them; "
        f"{unknown:,} of those to validate and test on are not known from training"
    )
    return Text(path.name, source, level, vocabulary, splits)


def _frequent(tokens: Iterable[str]) -> list[str]:
    return [token for token, count in Counter(tokens).items() if count > 1 and token != UNKNOWN]
