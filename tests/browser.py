"""A page opened in a real headless Chromium, and what a script appended to it finds there."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ANSWER = "ANSWER"


class Seen(NamedTuple):
    value: Any
    """What the script returned, as JSON."""
    complaints: list[str]
    """Lines of the browser's console: errors, refusals by the content security policy."""


def chromium() -> str:
    """The browser; where there is none the test fails under CI, and is skipped with a reason elsewhere."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        lacking = pytest.fail if "CI" in os.environ else pytest.skip
        lacking("FOR LACK OF A BROWSER the page was not opened in one: apt-get install chromium")
    assert found is not None
    return found


def ask(page: Path, script: str, *, width: int = 1280, dark: bool = False, runs: bool = True) -> Seen:
    """The value of `return ...` in `script`, run after the page's own, in a frame `width` px wide.

    A frame, as the browser opens no window below 500 px. `script` sees the page as `page` (document) and `view`
    (window). `runs` False: without the page's scripts.
    """
    outer = page.with_name(f"asked-{width}.html")
    content = html.escape(page.read_text(encoding="utf-8"))
    sandbox = "" if runs else "sandbox=allow-same-origin "
    outer.write_text(
        f'<meta charset=utf-8><iframe {sandbox}style="border:0;width:{width}px;height:900px" '
        f'srcdoc="{content}">'
        "</iframe><script>onload = () => { const frame = document.querySelector('iframe'), view = frame.contentWindow,"
        f" page = frame.contentDocument; const found = (() => {{ {script} }})();"
        f" document.title = '{ANSWER}' + JSON.stringify(found); }}</script>",
        encoding="utf-8",
    )
    done = opened(outer.as_uri(), page.parent, dark=dark)
    title = re.search(rf"<title>{ANSWER}(.*?)</title>", done.stdout, re.S)
    assert title is not None, done.stderr
    return Seen(json.loads(html.unescape(title[1])), complaints(done.stderr))


def opened(
    url: str, folder: Path, *, dark: bool = False, wait: int = 2000, window: str = "1300,1000"
) -> subprocess.CompletedProcess[str]:
    """stdout: the document after `wait` ms of the page's own time; stderr: the console among other things."""
    command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={window}", "--dump-dom"]
    command += ["--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", f"--virtual-time-budget={wait}"]
    command += ["--blink-settings=preferredColorScheme=0"] if dark else []
    return subprocess.run([*command, url], capture_output=True, text=True, timeout=110, check=True)


def complaints(log: str) -> list[str]:
    return [line for line in log.splitlines() if "CONSOLE" in line]
