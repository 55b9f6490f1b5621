"""The report: one page that stands by itself, tells the truth of the run folders, and is readable by anyone."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import flipout
from flipout.intervals import Estimate
from flipout_experiments.commands.app import app
from flipout_experiments.harness import reproduce
from flipout_experiments.harness.claims import Claim
from flipout_experiments.report import write_report
from flipout_experiments.report.html_console import HtmlConsole, html_table

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name in ("variance", "components"):
        reproduce.run_experiment(reproduce.find_entry(name), "smoke", folder / name, net="fc")
    shutil.copytree(folder / "variance", folder / "cut off")
    (folder / "cut off" / "result.json").unlink()
    return folder


@pytest.fixture(scope="module")
def page(runs):
    out = runs / "pages" / "report.html"
    finished, unfinished = write_report([runs], out)
    assert [run.title for run in finished] == ["components", "variance"]
    assert [folder.name for folder in unfinished] == ["cut off"]
    return out


class Elements(HTMLParser):
    """Every element with its attributes, and whether all of them are closed in order."""

    VOID = frozenset({"meta", "link", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def of(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def test_the_page_is_well_formed_and_stands_by_itself(page):
    text = page.read_text()
    elements = Elements(text)
    links = [a.get("href") or a.get("src") for a in elements.of("img") + elements.of("link") + elements.of("a")]
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)
    assert "http" not in re.sub(r"data:[^\"]*", "", text)
    assert not elements.of("script")
    ids = [a["id"] for _, a in elements.found if "id" in a]
    assert len(set(ids)) == len(ids)
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)


def test_it_can_be_read_without_eyes_or_mouse(page):
    elements = Elements(page.read_text())
    assert elements.of("html") == [{"lang": "en"}]
    assert all(len(image["alt"]) > 40 for image in elements.of("img"))
    regions = [a for a in elements.of("div") if a.get("class") == "scroll"]
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in regions)
    assert all(a.get("scope") in ("col", "row") for a in elements.of("th"))
    assert [tag for tag, _ in elements.found if re.fullmatch("h[1-6]", tag)][:2] == ["h1", "h2"]


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("ink", ["ink", "soft", "link"])
@pytest.mark.parametrize("ground", ["paper", "band"])
def test_contrast_is_that_of_wcag_aa(scheme, ink, ground):
    css = files("flipout_experiments.report").joinpath("report.css").read_text()
    palettes = [dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{([^}]*)\}", css)]
    colours = palettes[["light", "dark"].index(scheme)]
    light, dark = sorted((luminance(colours[ink]), luminance(colours[ground])), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_it_shows_numbers_settings_environment_and_what_was_left_out(page, runs):
    text = page.read_text()
    result = json.loads((runs / "variance" / "result.json").read_text())
    for shown in ("Beside the paper", "slope of flipout", "Not finished, and so not on this page: cut off", result["data"]):
        assert shown in text
    assert "<td>smoke</td>" in text
    assert f"torch</th><td>{torch.__version__}" in text
    slope = result["summary"]["FC1"]["slope"]["flipout"]["value"]
    assert f"{slope:.3g} [" in text


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [360, 1280])
def test_chromium_shows_it_without_an_error(page, width, tmp_path):
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", f"--screenshot={tmp_path / 'page.png'}",
        page.as_uri(),
    ]  # fmt: skip
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (tmp_path / "page.png").stat().st_size > 5000, found.stderr
    assert "CONSOLE" not in found.stderr


def test_text_from_a_run_cannot_become_markup(runs, tmp_path):
    folder = shutil.copytree(runs / "variance", tmp_path / "a<b>")
    result = json.loads((folder / "result.json").read_text())
    result["data"] = "<script>alert(1)</script>"
    (folder / "result.json").write_text(json.dumps(result))
    write_report([folder], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    Elements(text)
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_tables_and_lines_as_html():
    console = HtmlConsole()
    console.print("\n[bold]a[/bold] & b\nc", highlight=False)
    console.print("[1, 2]", markup=False)
    assert console.parts == ["<p>a &amp; b</p>", "<p>c</p>", "<p>[1, 2]</p>"]
    assert '<th scope="row">x</th><td class="number">1</td>' in html_table("t", ["", "n"], [["x", "1"]])


@pytest.mark.parametrize(
    ("paper", "seen", "ratio"),
    [(3.0, Estimate(2.7, 2, 3, 0.1, 3), 0.9), ("≫ 1", 5.0, None), (2.0, "seen", None), (0.0, 1.0, None), (1.0, float("inf"), None)],
)
def test_a_claim_has_a_ratio_where_both_are_numbers(paper, seen, ratio):
    found = Claim("x", paper, seen, None).ratio
    assert found == (None if ratio is None else pytest.approx(ratio))


def test_verdicts():
    assert [Claim("", "", "", holds).verdict for holds in (True, False, None)] == ["reproduced", "not reproduced", "cannot tell"]


def test_a_run_of_an_experiment_that_is_not_known_is_still_shown(runs, tmp_path):
    folder = shutil.copytree(runs / "variance", tmp_path / "old")
    for name in ("result", "config"):
        found = json.loads((folder / f"{name}.json").read_text())
        (folder / f"{name}.json").write_text(json.dumps({**found, "experiment": "figure-9"}))
    write_report([folder], tmp_path / "page.html")
    assert "figure-9" in (tmp_path / "page.html").read_text()


def test_the_command(runs, tmp_path):
    found = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["report", str(runs), "--out", str(tmp_path / "r.html")])
    assert found.exit_code == 0, found.output
    assert "2 runs" in found.output
    assert "left out, not finished" in found.output


def test_what_cannot_be_reported(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    broken = shutil.copytree(runs / "variance", tmp_path / "broken")
    (broken / "result.json").write_text("{")
    for place, message in (
        (tmp_path / "nothing", "no such folder"),
        (tmp_path / "empty", "holds no run: make one with"),
        (runs / "cut off", "no run is finished"),
        (broken, "cannot be read"),
    ):
        with pytest.raises(flipout.ArgumentError, match=message):
            write_report([Path(place)], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
