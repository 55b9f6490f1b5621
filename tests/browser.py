"""Chromium by its own protocol, over a pair of pipes: enough to open a page, type, and read what is there and what went wrong."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

#: Chromium reads commands from descriptor 3 and writes to 4.
_LAUNCH = """
import fcntl, os, sys
reads, writes = (fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3])  # out of the way of 3 and 4
os.dup2(reads, 3)
os.dup2(writes, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """A headless Chromium with one page.

    Args:
        profile: a folder of its own.
        width: of the window, in pixels.

    Attributes:
        complaints: what the console and uncaught exceptions said so far, errors and warnings.
    """

    def __init__(self, profile: Path, width: int = 1280) -> None:
        assert CHROMIUM is not None
        child_reads, self._writes = os.pipe()
        self._reads, child_writes = os.pipe()
        flags = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
            f"--user-data-dir={profile}", f"--window-size={width},900", "about:blank",
        ]  # fmt: skip
        command = [sys.executable, "-c", _LAUNCH, str(child_reads), str(child_writes), CHROMIUM, *flags]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(command, pass_fds=(child_reads, child_writes), stdout=quiet, stderr=quiet)
        os.close(child_reads)
        os.close(child_writes)
        self._buffer, self._number, self._session = b"", 0, None
        self.complaints: list[str] = []
        try:
            pages = self.call("Target.getTargets")["targetInfos"]
            page = next(target["targetId"] for target in pages if target["type"] == "page")
            self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def _message(self, timeout: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._reads], [], [], max(0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError("Chromium does not answer")
            part = os.read(self._reads, 1 << 16)
            if not part:
                raise EOFError("Chromium has ended")
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        method, told = message.get("method"), message.get("params", {})
        if method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.complaints.append(told["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(told["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(told["args"]))
        return message

    def call(self, method: str, timeout: float = 120, **arguments: Any) -> dict[str, Any]:
        """One command of the protocol, and its result."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": arguments}
        if self._session is not None:
            command["sessionId"] = self._session
        os.write(self._writes, json.dumps(command).encode() + b"\0")
        while (message := self._message(timeout)).get("id") != self._number:
            pass
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        result: dict[str, Any] = message["result"]
        return result

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression on the page."""
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def wait_for(self, script: str, timeout: float = 60) -> Any:
        """Until the expression is true."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            with contextlib.suppress(RuntimeError):  # a page that is on its way out answers nothing
                if found := self.evaluate(script):
                    return found
            time.sleep(0.05)
        raise AssertionError(f"waited for {script}; {self.complaints}")

    def open(self, url: str) -> None:
        """Opens a page, and waits until it is loaded."""
        self.call("Page.navigate", url=url)
        self.wait_for(f"location.href.startsWith({url!r}) && document.readyState == 'complete'")

    def type(self, text: str, enter: bool = True) -> None:
        """Types into what has the focus."""
        self.call("Input.insertText", text=text)
        if enter:
            for kind in ("keyDown", "keyUp"):
                self.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")

    def close(self) -> None:
        """Ends the browser."""
        with contextlib.suppress(OSError, EOFError, TimeoutError):
            self._session = None
            self.call("Browser.close", timeout=10)
        with contextlib.suppress(OSError):
            os.close(self._writes)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._reads)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
