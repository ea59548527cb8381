"""The served page follows its run, on loopback, and answers nothing else."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cauc_dist.errors import BadInput
from cauc_dist.journal import Journal
from cauc_dist.report import serve
from cauc_dist.report.serve import opened
from tests import browser
from tests.test_report import a_run


@contextmanager
def served(run: Path) -> Iterator[str]:
    """The address of a page without maps."""
    server, _ = opened([run], "127.0.0.1", 0, print, maps=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.url
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def status(url: str, **options: Any) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, **options), timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_the_page_and_its_data_are_answered_and_nothing_else(tmp_path: Path) -> None:
    with served(a_run(tmp_path / "a")) as url:
        assert status(url) == status(url + "data.json") == 200
        for path in (
            "config.json",
            "../a/config.json",
            "%2e%2e/a/journal.jsonl",
            "favicon.ico",
            "data.json?x",
            "/etc/passwd",
        ):
            assert status(url + path) == 404
        assert status(url, data=b"x", method="POST") == 501
        assert status(url, headers={"Host": "evil.example:80"}) == 403


def test_each_load_is_of_the_journal_as_it_is(tmp_path: Path) -> None:
    run = a_run(tmp_path / "a", steps=0)
    with served(run) as url:
        assert "none yet" in urllib.request.urlopen(url, timeout=20).read().decode()
        with Journal(run) as journal:
            journal.write("step", step=0, loss=0.5)
        with urllib.request.urlopen(url + "data.json", timeout=20) as answer:
            assert json.load(answer)["curves"][0]["lines"] == [[[0, 0.5]]]


def test_an_open_page_follows_the_run_and_the_policy_lets_it(tmp_path: Path) -> None:
    """The JSON of the first load stays in the document as it was; the drawn line has steps that came after it."""
    run, over = a_run(tmp_path / "a"), threading.Event()

    def train() -> None:
        with Journal(run) as journal:
            for step in range(3, 1000):
                journal.write("step", step=step, loss=1.0)
                if over.wait(0.05):
                    return

    training = threading.Thread(target=train)
    training.start()
    with served(run) as url:
        answer = urllib.request.urlopen(url, timeout=20)
        assert "connect-src 'self'" in answer.headers["Content-Security-Policy"]
        answer.close()
        done = browser.opened(url, tmp_path, wait=12_000)
        over.set()
        training.join()
    drawn = re.search(r'<polyline points="([^"]*)"', done.stdout)
    first = re.search(r'id="data">(.*?)</script>', done.stdout, re.S)
    assert "live: " in done.stdout
    assert drawn is not None
    assert first is not None
    assert len(drawn[1].split()) > len(json.loads(first[1])["curves"][0]["lines"][0])
    assert browser.complaints(done.stderr) == []


def test_ctrl_c_ends_it_and_the_address_was_said(tmp_path: Path) -> None:
    code = (
        f"from pathlib import Path; from cauc_dist.report import serve; serve([Path({str(a_run(tmp_path / 'a'))!r})], "
    )
    code += "say=lambda line: print(line, flush=True), maps=False)"
    work = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert work.stdout is not None
    line = work.stdout.readline()
    assert line.startswith("report: http://127.0.0.1:")
    assert status(line.split()[1]) == 200
    os.kill(work.pid, signal.SIGINT)
    out, complaints = work.communicate(timeout=30)
    assert (out, complaints, work.returncode) == ("report: ended\n", "", 0)


def test_a_host_that_others_can_reach_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: object, poll_interval: float = 0) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("socketserver.BaseServer.serve_forever", interrupted)
    said: list[str] = []
    serve([a_run(tmp_path / "a")], "0.0.0.0", 0, said.append, maps=False)
    assert said[0].startswith("warning: 0.0.0.0 is not loopback")
    said.clear()
    serve([tmp_path / "a"], "localhost", 0, said.append, maps=False)
    assert not [line for line in said if "warning" in line]


def test_a_port_that_is_taken_and_a_folder_that_is_no_run_are_refused(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(BadInput, match=r"127.0.0.1:\d+ cannot be served .*; wanted an address of this machine"):
            serve([a_run(tmp_path / "a")], "127.0.0.1", taken.getsockname()[1])
    with pytest.raises(BadInput, match=r"b is no run; wanted a run folder of `cauc train`"):
        serve([tmp_path / "b"])
