"""A real HTTP server on the loopback address, whose answers can be cut short or broken off."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """Serves ``files`` (path to bytes). ``faults`` says for a path how often, and how, an answer fails before it is right.

    * ``"broken off"``: half of the bytes promised, then the connection is closed;
    * ``"truncated"``: half of the file, and no word of the rest;
    * ``"other bytes"``: a file of the same length;
    * ``"missing"``: 404.
    """

    def __init__(self, url: str, files: Mapping[str, bytes]) -> None:
        self.url, self.files = url, dict(files)
        self.faults: dict[str, list[str]] = {}
        self.requests: list[str] = []


@contextmanager
def serve(files: Mapping[str, bytes]) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.requests.append(self.path)
            content = state.files.get(self.path)
            pending = state.faults.get(self.path, [])
            fault = pending.pop(0) if pending else None
            if content is None or fault == "missing":
                self.send_error(404)
                return
            whole = len(content)
            if fault == "other bytes":
                content = bytes(whole)
            elif fault in ("truncated", "broken off"):
                content = content[: whole // 2]
            self.send_response(200)
            self.send_header("Content-Length", str(whole if fault == "broken off" else len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state = Server(f"http://127.0.0.1:{server.server_port}", files)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()
