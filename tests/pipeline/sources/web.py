"""What servers on loopback have in common."""

from __future__ import annotations

import http.server


class Handler(http.server.BaseHTTPRequestHandler):
    """One that says nothing, and to HEAD and GET answers alike, the former without the body."""

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def answer(self, body: bool) -> None:
        raise NotImplementedError
