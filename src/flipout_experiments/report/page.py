"""The page: a summary of all runs, then a section for each."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from html import escape
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import flipout
from flipout.errors import ArgumentError, FlipoutError
from flipout.intervals import Estimate
from flipout.storage.files import make_folder, replace_file
from flipout_experiments.harness.claims import Claim
from flipout_experiments.harness.console import interval
from flipout_experiments.report.html_console import HtmlConsole, html_table
from flipout_experiments.report.runs import FinishedRun, find_runs

__all__ = ["write_report"]


def write_report(places: Sequence[Path], out: Path) -> tuple[list[FinishedRun], list[Path]]:
    """Writes one self-contained HTML page from run folders. It has no script, and nothing in it loads from the network.

    Args:
        places: run folders, or folders of them.
        out: the file, replaced whole.

    Returns:
        The runs on the page, and the folders of runs that are not finished and so are not on it.

    Raises:
        ArgumentError: if a place has no run, none is finished, or a result cannot be read or shown.
        SaveError: if the page cannot be written.
    """
    finished, unfinished = find_runs(places)
    if not finished:
        raise ArgumentError(
            f"no run is finished, so there is nothing to report: {', '.join(map(str, unfinished))} can go on by --resume"
        )
    make_folder(out.parent)
    replace_file(out, "".join(_page(finished, unfinished)).encode())
    return finished, unfinished


def _page(runs: Sequence[FinishedRun], unfinished: Sequence[Path]) -> Iterator[str]:
    style = resources("flipout_experiments.report").joinpath("report.css").read_text(encoding="utf-8")
    told = [_claims(run) for run in runs]
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    yield (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f'<link rel="icon" href="data:,"><title>flipout: report</title><style>{style}</style></head>\n<body>'
        '<a class="skip" href="#summary">Skip to the summary</a><header><h1>flipout: report</h1>'
        f"<p>{len(runs)} run{'s' * (len(runs) != 1)}, written {now} by flipout {escape(flipout.__version__)}</p></header>\n<main>"
    )
    yield '<section id="summary" aria-labelledby="summary-title"><h2 id="summary-title">Summary</h2>'
    yield _contents(runs)
    yield _verdicts(runs, told)
    if unfinished:
        names = ", ".join(escape(folder.name) for folder in unfinished)
        yield f"<p>Not finished, and so not on this page: {names}. A run goes on with <code>--resume</code>.</p>"
    yield "</section>\n"
    for i, (run, claims) in enumerate(zip(runs, told, strict=True)):
        yield from _section(i, run, claims)
    yield "</main></body></html>\n"


def _contents(runs: Sequence[FinishedRun]) -> str:
    links = []
    for i, run in enumerate(runs):
        what = run.entry.title if run.entry is not None else run.result.get("experiment", "unknown experiment")
        links.append(f'<li><a href="#run-{i}">{escape(run.title)}</a>: {escape(what)}</li>')
    return f'<nav aria-label="Runs"><ul>{"".join(links)}</ul></nav>'


def _verdicts(runs: Sequence[FinishedRun], told: Sequence[Sequence[Claim]]) -> str:
    rows = []
    for run, claims in zip(runs, told, strict=True):
        counts = [str(sum(claim.holds is holds for claim in claims)) for holds in (True, False, None)]
        preset = str(run.result.get("preset") or "")
        rows.append([run.title, preset, _duration(run.seconds), *counts])
    header = ["run", "preset", "wall time", "reproduced", "not reproduced", "cannot tell"]
    return html_table("The paper's statements, by run", header, rows, 2)


def _section(index: int, run: FinishedRun, claims: Sequence[Claim]) -> Iterator[str]:
    paper = f"<p>{escape(run.entry.title)} ({escape(run.entry.paper)})</p>" if run.entry is not None else ""
    title = f"run-{index}-title"
    yield f'<section id="run-{index}" aria-labelledby="{title}"><h2 id="{title}">{escape(run.title)}</h2>{paper}'
    if claims:
        yield _claims_table(claims)
    for path in run.figures:
        yield _figure(run, path)
    if run.entry is not None:
        console = HtmlConsole()
        with _intact(run):
            run.entry.load().show(run.result, console)
        yield f"<h3>Numbers</h3>{''.join(console.parts)}"
    for each in run.result.get("tables", ()):
        with _intact(run):
            yield html_table(each["title"], each["header"], each["rows"])
    yield _details("Settings", {"preset": run.result.get("preset"), **_flat(run.result.get("settings", {}))})
    seconds = {name: _duration(float(value)) for name, value in run.result.get("seconds", {}).items()}
    yield _details("Wall time", {**seconds, "in all": _duration(run.seconds)})
    yield _details("Environment", _flat(run.environment))
    yield "</section>\n"


def _claims(run: FinishedRun) -> Sequence[Claim]:
    if run.entry is None:
        return []
    with _intact(run):
        return run.entry.load().claims(run.result)


@contextmanager
def _intact(run: FinishedRun) -> Iterator[None]:
    """Raises ArgumentError instead of what a result raises that lacks numbers."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, FlipoutError):
            raise
        raise ArgumentError(
            f"{run.folder / 'result.json'} cannot be shown ({type(error).__name__}: {error}): it was changed after it was written, "
            "or is of another version; leave it out, or run the experiment anew in another folder"
        ) from error


def _claims_table(claims: Sequence[Claim]) -> str:
    rows = []
    for claim in claims:
        ratio = "" if claim.ratio is None else f"{claim.ratio:.3g}"
        rows.append([claim.what, _said(claim.paper), _said(claim.seen), ratio, claim.verdict])
    return html_table("Beside the paper", ["", "paper", "here", "here / paper", "verdict"], rows)


def _figure(run: FinishedRun, path: Path) -> str:
    """The figure as an image of its own, so that names inside it meet nobody else's."""
    image = base64.b64encode(path.read_bytes()).decode()
    told = run.entry.title if run.entry is not None else run.title
    alt = f"Figure {path.stem} of {run.title}: {told}. The numbers are in the tables of this section."
    return f'<figure><img alt="{escape(alt, quote=True)}" src="data:image/svg+xml;base64,{image}"></figure>'


def _details(title: str, values: Mapping[str, Any]) -> str:
    rows = [[name, _said(value)] for name, value in values.items()]
    return f"<details><summary>{escape(title)}</summary>{html_table('', ['', ''], rows, 9)}</details>" if rows else ""


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, item in value.items():
        found |= _flat(item, f"{prefix}{name}.") if isinstance(item, Mapping) else {f"{prefix}{name}": item}
    return found


def _said(value: Any) -> str:
    if isinstance(value, Estimate):
        return interval(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(_said(item) for item in value)
    return "" if value is None else str(value)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
