"""A check in a process of its own: what crashes there, or hangs, is one line here."""

import atexit
import json
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import IO

from cauc_dist.doctor.finding import REPORT, Finding

MARK = "cauc-doctor "
"""Before each finding, since libraries print as well."""


def findings(name: str, *arguments: str, seconds: float, do: str = REPORT) -> Iterator[Finding]:
    """What `python ARGUMENTS` tells by `tell`; and, where it does not end well, how it ended, with what to `do`."""
    late = threading.Event()
    with tempfile.TemporaryFile("w+", errors="replace") as errors, _started(arguments, errors) as process:

        def end() -> None:
            late.set()
            process.kill()

        limit = threading.Timer(seconds, end)
        limit.start()
        atexit.register(process.kill)  # ctrl-C leaves this thread where it is
        try:
            for line in process.stdout or ():
                if line.startswith(MARK):
                    yield Finding(**json.loads(line.removeprefix(MARK)))
            code = process.wait()
        finally:
            limit.cancel()
            process.kill()  # where nobody wants the rest
            atexit.unregister(process.kill)
        if late.is_set():
            yield Finding(name, "fail", f"no end in {seconds:g} s", do)
        elif code:
            errors.seek(0)
            yield Finding(name, "fail", _ended(code, errors.read()), do)


def _started(arguments: Sequence[str], errors: IO[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        errors="replace",
    )


def tell(findings: Iterable[Finding]) -> None:
    """To be called in the child, for each as soon as it is known."""
    for found in findings:
        print(MARK + json.dumps(asdict(found)), flush=True)


def each(checks: Mapping[str, Callable[[], Iterable[Finding]]]) -> None:
    """Tell what each check finds, in the child; what it raises is a finding."""
    for name, check in checks.items():
        try:
            tell(check())
        except Exception as error:
            tell([Finding(name, "fail", f"{type(error).__name__}: {error}".splitlines()[0], REPORT)])


def _ended(code: int, said: str) -> str:
    """How, and the line of its last words that names an error."""
    how = f"exit code {code}" if code > 0 else f"ended by signal {-code}"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|error)\b: ", line)]
    return f"{how}: {(named or lines or ['without a word'])[-1]}"
