"""The site of docs/: builds without a warning, has every page and public name, leads nowhere wrong, can be searched as files."""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest
from browser import CHROMIUM, Browser
from test_api import MODULES, described, exported

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
MISSING = [name for name in ("sphinx", "furo", "myst_parser") if importlib.util.find_spec(name) is None]
needs_site = pytest.mark.skipif(bool(MISSING), reason=f"needs the extra docs, of which {', '.join(MISSING)} are missing")


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built once for all workers of a test run, with warnings as errors."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    out = shared / "site"
    with (shared / "site.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            doctrees = shared / "doctrees"
            command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "-d", str(doctrees)]
            found = subprocess.run(
                [*command, str(DOCS), str(out)], capture_output=True, text=True, check=False, timeout=600,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            (shared / "site.log").write_text(f"{found.returncode}\n{found.stderr}", encoding="utf-8")
        status, _, said = (shared / "site.log").read_text(encoding="utf-8").partition("\n")
    assert status == "0", said
    return out


class Page(HTMLParser):
    """What a page points to, what it loads, and what can be pointed to on it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.alone: list[dict[str, str | None]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids |= {value for key, value in attrs if key == "id" and value}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"] or "")
        if tag == "link" and found.get("rel") in ("stylesheet", "icon", "preload"):
            self.loaded.append(found["href"] or "")
        if tag in ("img", "script", "iframe", "source") and found.get("src"):
            self.loaded.append(found["src"] or "")
        if tag == "img" and not found.get("alt"):
            self.alone.append(found)


@functools.cache
def read(path: Path) -> Page:
    return Page(path)


def pages(site: Path) -> list[Path]:
    return sorted(path for path in site.rglob("*.html") if "_static" not in path.parts)


@needs_site
def test_every_page_is_in_the_navigation(site: Path) -> None:
    sources = {str(path.relative_to(DOCS).with_suffix(".html")) for path in DOCS.rglob("*.md")}
    assert {str(path.relative_to(site)) for path in pages(site)} >= sources
    listed = {link.partition("#")[0] for link in read(site / "index.html").links}
    assert sources - {"index.html"} <= listed


@needs_site
def test_links_and_anchors_lead_somewhere(site: Path) -> None:
    wrong = []
    for path in pages(site):
        for link in [*read(path).links, *read(path).loaded]:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https", "mailto", "data"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                wrong.append(f"{path.name}: {link}")
            elif parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in read(target).ids:
                wrong.append(f"{path.name}: {link} (no such anchor)")
    assert not wrong


@needs_site
def test_links_to_other_sites_are_well_formed(site: Path) -> None:
    outside = {link for path in pages(site) for link in read(path).links if urlsplit(link).scheme in ("http", "https")}
    assert outside
    assert all(re.fullmatch(r"https?://[\w.-]+\.[a-z]{2,}(:\d+)?(/[^\s<>\"]*)?", link) for link in outside), outside


@needs_site
def test_nothing_is_loaded_from_the_network_and_pictures_have_words(site: Path) -> None:
    for path in pages(site):
        assert not [link for link in read(path).loaded if urlsplit(link).netloc], path
        assert not read(path).alone, path


def public_names() -> dict[str, object]:
    """Every name of the contract that can be documented: what tests/api.txt lists, without modules."""
    found: dict[str, object] = {}
    for module in sorted({*MODULES, "flipout.errors"}):
        for name, value in exported(module):
            if isinstance(value, ModuleType):
                continue
            for line in described(name, value):
                each = re.sub(r"^class ", "", line.strip()).partition("(")[0].partition(":")[0]
                member = each.removeprefix(name).lstrip(".")
                found[each] = getattr(value, member) if member else value
    return found


@needs_site
def test_every_public_name_is_in_the_reference(site: Path) -> None:
    ids = set().union(*(read(path).ids for path in (site / "api").glob("*.html")))
    names = public_names()
    assert len(names) > 200
    documented = {id(value) for name, value in names.items() if name in ids}  # one entry serves all names of a thing
    assert sorted(name for name, value in names.items() if name not in ids and id(value) not in documented) == []


@needs_site
def test_every_entry_of_the_reference_says_something(site: Path) -> None:
    silent = []
    for path in (site / "api").glob("*.html"):
        text = path.read_text(encoding="utf-8")
        for name, body in re.findall(r'(?s)<dt class="sig[^>]*? id="([^"]+)">.*?</dt>\s*<dd>(.{0,400})', text):
            if len(re.sub(r"<[^>]+>|\s", "", body)) < 10:
                silent.append(name)
    assert not silent


@needs_site
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize(("words", "page"), [("conv variance", "traps.html"), ("kl_divergence", "api/bayes.html")])
def test_search_works_on_files_without_a_server(site: Path, tmp_path: Path, words: str, page: str) -> None:
    with Browser(tmp_path / "profile") as browser:
        browser.open((site / "index.html").as_uri())
        browser.evaluate("document.querySelector('input.sidebar-search').focus()")
        browser.type(words)
        browser.wait_for("location.pathname.endsWith('/search.html')")
        url = (site / page).as_uri()  # results come one by one
        browser.wait_for(f"[...document.querySelectorAll('#search-results li a')].some(a => a.href.split('#')[0] == {url!r})")
        assert browser.complaints == []


@needs_site
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_pages_complain_of_nothing_and_fit_a_telephone(site: Path, tmp_path: Path) -> None:
    with Browser(tmp_path / "profile") as browser:
        # a window cannot be made as narrow
        browser.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
        for path in pages(site):
            browser.open(path.as_uri())
            assert browser.evaluate("document.documentElement.scrollWidth") <= 360, path
        assert browser.complaints == []


def module_at(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_costs_are_those_of_the_benchmarks() -> None:
    costs = module_at(DOCS / "generate_costs.py")
    assert costs.PAGE.read_text(encoding="utf-8") == costs.page(), "run: python docs/generate_costs.py"
    assert "| 1" in costs.section()


def test_the_picture_is_the_one_that_is_drawn() -> None:
    idea = module_at(DOCS / "draw_idea.py")
    assert idea.FIGURE.read_text(encoding="utf-8") == idea.picture(), "run: python docs/draw_idea.py"
