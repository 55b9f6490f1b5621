"""One self-contained HTML page from run folders: figures, tables, settings, and what did and did not reproduce."""

from __future__ import annotations

from flipout_experiments.report.page import write_report

__all__ = ["write_report"]
