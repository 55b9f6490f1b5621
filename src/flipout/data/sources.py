"""Where the files of a data set come from: a folder of the user's, or a download that is checked and kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from flipout.errors import ArgumentError, DownloadError

__all__ = ["Remote", "fetch", "find_file", "load"]

T = TypeVar("T")

#: Seconds to wait for a server to answer: without a network the embedded data should not be long in coming.
_TIMEOUT = 10.0


@dataclass(frozen=True)
class Remote:
    """A data set's files on the network.

    Attributes:
        folder: in the cache, and under ``data_dir``.
        urls: folders that hold the files, tried in order.
        hashes: of each file, as pooch has them (``"md5:..."``, ``"sha256:..."``).

    Example:
        >>> mirror = Remote("digits", ("https://example.org/",), {"images.gz": "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873"})
        >>> mirror.folder
        'digits'
    """

    folder: str
    urls: tuple[str, ...]
    hashes: Mapping[str, str]


def find_file(folder: Path, subfolder: str, names: Sequence[str]) -> Path:
    """The first of the names that is in the folder or in its subfolder.

    Raises:
        ArgumentError: if none is; says what was looked for.
    """
    for parent in (folder / subfolder, folder):
        for name in names:
            if (parent / name).is_file():
                return parent / name
    raise ArgumentError(f"neither {folder / subfolder} nor {folder} has {' or '.join(names)}; check the data folder")


def fetch(remote: Remote, name: str, cache: Path | None = None) -> Path:
    """A file of a data set, downloaded into the cache unless it is there with the right hash.

    A download goes to a temporary file and takes its name when its hash is right, so one that was cut off is never used.

    Args:
        remote: the data set.
        name: of the file.
        cache: a folder; None is the user's cache folder.

    Raises:
        DownloadError: if no server can be reached, or each broke off.
        ArgumentError: if pooch is not installed, or what came has another hash than the file is known by and no other server has
            the right one.
    """
    try:
        import pooch
    except ModuleNotFoundError as error:
        raise ArgumentError(
            "downloads need pooch, which is not installed: pip install 'flipout[experiments]', or name a folder with --data-dir"
        ) from error
    import requests

    folder = (Path(pooch.os_cache("flipout")) if cache is None else cache) / remote.folder
    pooch.get_logger().setLevel("ERROR")
    failures, wrong = [], False
    for url in remote.urls:
        try:
            path = pooch.retrieve(
                f"{url.rstrip('/')}/{name}",
                remote.hashes[name],
                fname=name,
                path=folder,
                downloader=pooch.HTTPDownloader(timeout=_TIMEOUT),  # pyright: ignore[reportArgumentType]
            )
            return Path(path)
        except (requests.exceptions.RequestException, OSError) as error:
            reason = f", {error.strerror}" if error.strerror else ""
            failures.append(f"{url}: {type(error).__name__}{reason}")
        except ValueError:  # pooch's for another hash
            wrong = True
            failures.append(f"{url}: not the file it should be, its hash is another")
    told = f"{name} could not be downloaded ({'; '.join(failures)})"
    if wrong:
        raise ArgumentError(f"{told}; nothing was kept. Try again later, or name a folder that has it with --data-dir")
    raise DownloadError(told)


def load(
    what: str,
    read: Callable[[Callable[[Sequence[str]], Path]], T],
    remote: Remote,
    data_dir: Path | str | None,
    cache: Path | str | None,
    download: bool,
    embedded: Callable[[], T] | None,
) -> tuple[T, str]:
    """Reads a data set from the first source that has it.

    Args:
        what: the data set's name, for messages.
        read: reads it, given a function from the names that a file may have to its path.
        remote: its files on the network.
        data_dir: a folder that must have it; nothing else is tried then.
        cache: for downloads.
        download: whether to try the network.
        embedded: the data that needs no network, if there is any.

    Returns:
        The data, and where they come from.

    Raises:
        ArgumentError: if a file is missing from ``data_dir``, is damaged, or nothing is left to try.
    """
    if data_dir is not None:
        folder = Path(data_dir)
        return read(lambda names: find_file(folder, remote.folder, names)), str(folder)
    why = "downloads are off"
    if download:
        try:
            known: Any = remote.hashes
            place = None if cache is None else Path(cache)
            found = read(lambda names: fetch(remote, next(name for name in names if name in known), place))
            return found, f"downloaded from {remote.urls[0]}"
        except DownloadError as error:
            why = str(error)
    if embedded is None:
        raise ArgumentError(f"{what}: {why}, and no package ships it; name a folder that has it with --data-dir (data_dir=)")
    return embedded(), f"embedded, since {why}"
