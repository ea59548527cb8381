"""One self-contained HTML page for a run or a comparison: what was run, curves, faults, maps, probes.

docs/report.md shows it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cauc_dist import durable, journal
from cauc_dist.errors import BadInput
from cauc_dist.report.hidden import Hidden
from cauc_dist.report.page import Maps, Told, html
from cauc_dist.report.serve import serve
from cauc_dist.report.style import STYLE, need_matplotlib

__all__ = ["STYLE", "need_matplotlib", "report", "serve"]


def report(
    runs: Sequence[Path],
    out: Path,
    table: Path | None = None,
    *,
    maps: bool = True,
    show_ids: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Write the page `out`, whole or not at all. Runs may be at work: it is of what their journals hold.

    `table`: the JSON of a probe; default: probe.json of each run that has one. `maps`: what needs the encoder too, from
    the newest sound checkpoint; a run without one, or whose store was moved, says so on the page. `show_ids`: subjects
    by their ids, else by salted hashes.
    """
    for run in runs:
        _check(run)
    if table is not None and not table.exists():
        raise BadInput(f"no table {table}", wanted="a file that `cauc probe --out` wrote", do="check the path")
    told = Told(tuple(runs), _of_runs(say) if maps else _left_out, table, hidden=Hidden(show_ids))
    durable.replace(out, html(told.gather()).encode())


def _check(run: Path) -> None:
    if not any(event["event"] == "step" for event in journal.read(run)):
        raise BadInput(
            f"no step in {run / journal.FILE}", wanted="a run that was trained", do="give a run folder of `cauc train`"
        )


def _of_runs(say: Callable[[str], None]) -> Maps:
    def made(run: Path, hidden: Hidden) -> dict[str, Any]:
        from cauc_dist.report.maps import maps

        return maps(run, hidden, say)

    return made


def _left_out(run: Path, hidden: Hidden) -> dict[str, Any]:
    raise BadInput("the page was made without maps", wanted="maps", do="make it again, without --no-maps")
