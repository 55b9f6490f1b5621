"""Every python block of the README and of docs/ runs, in order, page by page."""

import re
from pathlib import Path

import pytest
import torch
from test_api import MODULES

from flipout import registry

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

#: What a page takes for granted: the reader's own model.
GIVEN = {"models.md": "import torch, flipout\nmodel, batch = torch.nn.Linear(3, 2), {'input': torch.ones(4, 3)}"}


def blocks(page: Path) -> list[tuple[int, str]]:
    """The line and the code of each python block."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)), match.group(1)) for match in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))  # a page may register rules
    torch.manual_seed(0)
    namespace = {"__name__": page.stem}
    exec(GIVEN.get(page.name, ""), namespace)
    try:
        for line, code in blocks(page):
            exec(compile("\n" * line + code, str(page), "exec"), namespace)
    finally:
        torch.set_default_dtype(torch.float32)  # a page may choose float64


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    targets = [t.partition("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in t]
    missing = [target for target in targets if target and not (page.parent / target).exists()]
    assert not missing


def imported(code: str) -> set[str]:
    """The modules of the library that a piece of code imports from, or whose parts it imports."""
    return set(re.findall(r"^\s*(?:from|import) (flipout[\w.]*)", code, re.MULTILINE))


def test_pages_and_examples_teach_what_is_public():
    sources = {page: "\n".join(code for _, code in blocks(page)) for page in PAGES}
    sources |= {path: path.read_text(encoding="utf-8") for path in (ROOT / "examples").glob("*.py")}
    private = {str(path.relative_to(ROOT)): found for path, code in sources.items() if (found := imported(code) - set(MODULES))}
    assert not private


def test_the_pages_have_examples():
    assert {page.name for page in PAGES if blocks(page)} >= {"README.md", "index.md", "start.md", "rules.md", "estimators.md"}
