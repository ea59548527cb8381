"""The page of runs at work, on loopback: made anew from their journals at each load, its maps in the background."""

import ipaddress
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cauc_dist import journal
from cauc_dist.errors import BadInput
from cauc_dist.report.hidden import Hidden
from cauc_dist.report.page import POLICY, Told, block, html

LOOK = 5.0
"""Seconds between two looks for a newer checkpoint."""


@dataclass
class Background:
    """Maps of each run's newest checkpoint, made by a thread of its own and kept until there is a newer one."""

    runs: Sequence[Path]
    hidden: Hidden
    say: Callable[[str], None]
    _found: dict[Path, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    _over: threading.Event = field(default_factory=threading.Event)

    def __call__(self, run: Path, hidden: Hidden) -> dict[str, Any]:
        """What is there of a run now."""
        return dict(self._found[run][1]) if run in self._found else {"why": "Being made: this takes some seconds."}

    def start(self) -> None:
        threading.Thread(target=self._work, daemon=True, name="maps").start()

    def stop(self) -> None:
        self._over.set()

    def _work(self) -> None:
        while not self._over.is_set():
            for run in self.runs:
                self._look(run)
            self._over.wait(LOOK)

    def _look(self, run: Path) -> None:
        """Make the maps of a run that has a newer checkpoint, or whose last ones failed."""
        newest = ""
        try:
            from cauc_dist.report import maps

            newest = maps.newest(run)
            if run not in self._found or self._found[run][0] != newest or "why" in self._found[run][1]:
                self._found[run] = newest, maps.maps(run, self.hidden, self.say)
        except Exception as error:  # told on the page, tried again: the thread is to live as long as the server
            self._found[run] = newest, {"why": self.hidden.scrub(str(error))}


def _left_out(run: Path, hidden: Hidden) -> dict[str, Any]:
    return {"why": "The page is served without maps."}


class Server(ThreadingHTTPServer):
    """Answers GET / and GET /data.json, and nothing else."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], told: Told) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Handler)
        self.told = told
        self.loopback = is_loopback(address[0])
        self.reading = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away while it was answered is no news."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        host = host.decode() if isinstance(host, bytes) else host
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 30

    def do_GET(self) -> None:
        if self.server.loopback and not _is_local(self.headers.get("Host", "")):
            self.send_error(HTTPStatus.FORBIDDEN)  # a page of others whose name was made to point here
        elif self.path in ("/", "/data.json"):
            self._answer(page=self.path == "/")
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _answer(self, *, page: bool) -> None:
        told = self.server.told
        try:
            with self.server.reading:
                found = told.gather()
        except Exception as error:
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, explain=told.hidden.scrub(str(error)))
            return
        body = html(found).encode() if page else block(found)
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", f"{'text/html' if page else 'application/json'}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", f"{POLICY}; connect-src 'self'; frame-ancestors 'none'")
        for name, value in (("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff")):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Nothing: a poll every five seconds is no news."""


def serve(
    runs: Sequence[Path],
    host: str = "127.0.0.1",
    port: int = 0,
    say: Callable[[str], None] = lambda line: None,
    *,
    table: Path | None = None,
    maps: bool = True,
    show_ids: bool = False,
) -> None:
    """Serve the page until ctrl-C; `port` 0: one that is free, told by `say`. Runs need no step yet.

    A host that is not loopback shows the page to whoever can reach it: no password, no encryption. `say` warns.
    """
    for run in runs:
        if not (run / journal.FILE).exists() and not (run / "config.json").exists():
            raise BadInput(f"{run} is no run", wanted="a run folder of `cauc train`", do="check the path")
    server, background = opened(runs, host, port, say, table=table, maps=maps, show_ids=show_ids)
    if not server.loopback:
        say(f"warning: {host} is not loopback: whoever reaches this machine's port sees the page, unencrypted")
    say(f"report: {server.url} (ctrl-C ends it)")
    with server:
        background.start() if maps else None
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            say("report: ended")
        finally:
            background.stop()


def opened(
    runs: Sequence[Path],
    host: str,
    port: int,
    say: Callable[[str], None],
    *,
    table: Path | None = None,
    maps: bool = True,
    show_ids: bool = False,
) -> tuple[Server, Background]:
    """The server, bound and not yet answering, and the thread's work, not yet begun."""
    hidden = Hidden(show_ids)
    background = Background(runs, hidden, say)
    told = Told(tuple(runs), background if maps else _left_out, table, live=True, hidden=hidden)
    try:
        return Server((host, port), told), background
    except (OSError, OverflowError) as error:
        raise BadInput(
            f"{host}:{port} cannot be served ({error})",
            wanted="an address of this machine and a free port",
            do="choose another --port",
        ) from None


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_local(header: str) -> bool:
    """Whether a Host header names loopback."""
    return is_loopback(header.rsplit(":", 1)[0].strip("[]") if header.count(":") != 0 else header)
