"""Help that teaches, and completion of the shells: laws over every command there is."""

import os
import shlex
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from flipout_experiments.commands.app import app

ROOT = typer.main.get_command(app)


def walk(command, *names):
    """Every command and group, with the words that lead to it."""
    yield names, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from walk(inner, *names, name)


COMMANDS = {" ".join(("flipout", *names)): command for names, command in walk(ROOT)}


def examples(command):
    return [line for line in command.epilog.split("\n\n") if line.startswith("flipout ")]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_does_and_shows_an_example_of_itself_and_its_exit_codes(name):
    command = COMMANDS[name]
    assert command.help[0].isupper()
    assert command.help.endswith(".")
    assert examples(command)
    assert all(line == name or line.startswith(f"{name} ") for line in examples(command))
    for code in ("0 done", "1 refused", "2 wrong usage", "130 stopped"):
        assert code in command.epilog


@pytest.mark.parametrize("name", COMMANDS)
def test_every_parameter_says_what_it_is_and_what_holds_without_it(name):
    for each in COMMANDS[name].params:
        assert each.help, each.name
        assert each.help.endswith((".", "...")), each.name
        told = each.required or each.default is not None or getattr(each, "is_flag", False) or "by default" in each.help
        assert told, f"{each.name}: not required and without a default, so its help says 'by default ...'"
        assert each.default is None or isinstance(each.default, bool) or getattr(each, "show_default", True), each.name


@pytest.mark.parametrize("line", [line for command in COMMANDS.values() for line in examples(command)])
def test_every_example_parses(line, monkeypatch):
    called = []
    for words, command in COMMANDS.items():
        if not hasattr(command, "commands"):
            monkeypatch.setattr(command, "callback", lambda words=words, **given: called.append(words))
    assert not ROOT.main(shlex.split(line)[1:], prog_name="flipout", standalone_mode=False)
    assert line.endswith("--help") or [words for words in called if line.startswith(words)]


def complete(shell, line):
    """What a shell is told when a line is to be completed, in the words of each shell's own protocol."""
    words = line.split(" ")
    asked = {
        "_FLIPOUT_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": "\n".join(words),
        "COMP_CWORD": str(len(words) - 1),
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    found = CliRunner().invoke(app, [], env=asked, prog_name="flipout")
    assert found.exit_code == 0
    return found.output


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completes_commands(shell):
    found = complete(shell, "flipout re")
    assert "report" in found
    assert "reproduce" in found
    assert "demo" not in found


def test_completes_options_and_choices():
    assert complete("bash", "flipout reproduce variance --net conv").split() == ["convle", "convgg"]
    assert complete("bash", "flipout train-es --gen").split() == ["--generations"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_installs_itself_where_the_shell_looks(shell, tmp_path, monkeypatch):
    """In a home of its own; the name of the shell is given, since the shell that runs the tests is nobody's."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    found = CliRunner().invoke(app, ["--install-completion", shell], prog_name="flipout")
    assert found.exit_code == 0
    assert f"{shell} completion installed in {tmp_path}" in found.output
    assert any("_FLIPOUT_COMPLETE" in path.read_text() for path in tmp_path.rglob("*") if path.is_file())


def test_bash_itself_completes(tmp_path):
    """The script that --show-completion prints, run by bash, on a command that is this very installation."""
    (tmp_path / "flipout").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m flipout "$@"\n')
    (tmp_path / "flipout").chmod(0o755)
    script = """
        eval "$(flipout --show-completion bash)"
        COMP_WORDS=(flipout reproduce lar) COMP_CWORD=2
        _flipout_completion flipout
        echo "${COMPREPLY[@]}"
    """
    environment = {
        **os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
        "HOME": str(tmp_path),
    }  # fmt: skip
    command = ["bash", "--noprofile", "--norc", "-c", script]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "large-batch"
