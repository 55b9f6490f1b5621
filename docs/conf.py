"""Builds the pages of this folder into a site: ``make docs``, or ``python -m sphinx -W docs site``."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import flipout

project = "flipout"
author = "the authors of flipout"
release = flipout.__version__
html_title = f"flipout {release}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["*.py", "_build"]
source_suffix = {".md": "markdown"}
nitpicky = True  # a name in a docstring that leads nowhere is an error
nitpick_ignore_regex = [
    (r"py:meth", r"flipout\.rows\..*"),
    # Other people's names: their documentation is on the network, and this site needs none.
    (
        r"py:.*",
        r"(torch|transformers|collections|dataclasses|concurrent|abc|pathlib|fnmatch|sklearn|gymnasium|numpy|nn|gym|typing|types|contextlib)(\..*)?",
    ),
    (r"py:class", r"Axes|Tensor|ABC|NamedTuple"),
    # What estimators and rules hand to one another: nothing that a user makes or keeps.
    (
        r"py:class",
        r"flipout\.(samples\.(Target|Sample)|terms\.\w+|weight\.\w+|rows\.\w+|select\.(Site|Selection)|registry\._R|noise\.Source)",
    ),
    (
        r"py:class",
        r"flipout\.(storage\.parts\.Stateful|evolution\.(noise\.Directions|statistics\.BatchGuard)|sklearn\._BayesianNet)",
    ),
]

myst_enable_extensions = ["attrs_inline"]
myst_heading_anchors = 3
myst_links_external_new_tab = False

autodoc_member_order = "groupwise"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 100

html_theme = "furo"
html_show_search_summary = False  # summaries are fetched, which a browser forbids to a page opened as a file
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_static_path: list[str] = []

#: Where users import from; a name that is in two of them is documented in the later one.
PUBLIC = (
    "flipout", "flipout.bayes", "flipout.data", "flipout.errors", "flipout.evolution", "flipout.reference", "flipout.regularize",
    "flipout.storage", "flipout.variance",
)  # fmt: skip


def public_names() -> dict[str, str]:
    """From each way to write a name to the one it is documented by: ``flipout.perturb.Perturbed`` to ``flipout.Perturbed``."""
    documented, ways = {}, {}
    for module in map(importlib.import_module, PUBLIC):
        for name in module.__all__:
            value = getattr(module, name)
            if not isinstance(value, ModuleType) and hasattr(value, "__qualname__"):
                defined = ways[f"{module.__name__}.{name}"] = f"{value.__module__}.{value.__qualname__}"
                documented[defined] = f"{module.__name__}.{name}"
    return documented | {way: documented[defined] for way, defined in ways.items()}


def resolve(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """Leads a reference by the defining module, or by the bare name, to where the name is documented."""
    target, domain = node.get("reftarget", ""), env.get_domain("py")
    found = names.get(target) or names.get(f"{node.get('py:module')}.{target}")
    if found is None and "." not in target:
        found = next((name for name in domain.objects if name.rpartition(".")[2] == target), None)
    if node.get("refdomain") != "py" or found is None:
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", found, node, contnode)


def set_equations(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Equations stand indented in docstrings, and become literal blocks."""
    told, before = [], ""
    for i, line in enumerate(lines):
        starts = line.startswith("    ") and i > 0 and not lines[i - 1].strip()
        if starts and before and not before.startswith((" ", "*", ">>>")) and not re.fullmatch(r"[A-Z]\w+:|.*::", before):
            told += ["::", ""]
        told.append(line)
        before = line or before
    lines[:] = told


def keep_sentences(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """What stands before a colon in a property's docstring is no type, as napoleon takes it to be.

    An attribute of a class's list that is a property has an entry of its own, which is the one that references lead to.
    """
    if what == "class":
        for i, line in reversed(list(enumerate(lines))):
            attribute = line.strip().removeprefix(".. attribute:: ")
            found = getattr(value, attribute, None) if attribute != line.strip() else None
            if isinstance(found, property) and found.__doc__:
                lines.insert(i + 1, "   :no-index:")
    for i, line in enumerate(lines):
        if what in ("property", "attribute", "data") and line.startswith(":type: "):
            lines[0] = f"{line.removeprefix(':type: ')}: {lines[0]}"
            del lines[i]
            return


def name_folders(app: Any, docname: str, source: list[str]) -> None:
    """A link to a folder of the repository has no page to lead to: its words remain."""
    here = (Path(app.srcdir) / docname).parent

    def words(link: re.Match[str]) -> str:
        return link[1] if (here / link[2]).is_dir() else link[0]

    source[0] = re.sub(r"\[([^\]\n]+)\]\((\.\./[^)\s]+)\)", words, source[0])


names = public_names()


def setup(app: Any) -> None:
    app.connect("source-read", name_folders)
    app.connect("missing-reference", resolve)
    app.connect("autodoc-process-docstring", set_equations, priority=400)  # before napoleon reads the sections
    app.connect("autodoc-process-docstring", keep_sentences, priority=600)
