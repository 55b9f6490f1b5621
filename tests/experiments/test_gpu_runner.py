"""The runner for a machine with a GPU, rehearsed on a CPU: laws, time that runs out, a kill, sections that fail, the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flipout_experiments.report import write_report

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.gpu import __main__

    return __main__


def test_the_laws_hold_on_a_cpu_and_the_report_shows_them(runner: Any, tmp_path: Path) -> None:
    out = tmp_path / "gpu"
    assert runner.main(["--device", "cpu", "--quick", "--out", str(out), "--only", "laws"]) == 0
    write_report([out], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Laws on the device" in page
    assert "not asked for" in page


def test_it_goes_on_after_a_kill_and_names_what_was_left_out(
    runner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []
    state = {"killed": False}

    def section(name: str) -> Any:
        def run() -> list[dict[str, Any]]:
            calls.append(name)
            if name == "second" and not state["killed"]:
                state["killed"] = True
                raise KeyboardInterrupt
            if name == "third":
                raise RuntimeError("no such kernel")
            return [runner.table(name, ["seen"], [["well"]])]

        return run

    monkeypatch.setattr(runner, "_sections", lambda settings, run: {name: section(name) for name in ("first", "second", "third")})
    command = ["--device", "cpu", "--quick", "--out", str(tmp_path / "gpu")]
    with pytest.raises(KeyboardInterrupt):
        runner.main(command)
    assert runner.main(command) == 1
    assert calls == ["first", "second", "second", "third"]
    assert "no such kernel" in capsys.readouterr().out
    assert runner.main([*command[:-1], str(tmp_path / "late"), "--minutes", "0"]) == 0
    assert "no time was left" in capsys.readouterr().out
