"""A picture of a terminal in which a command was run, as it looks when it has ended.

    python docs/pictures/terminal.py docs/pictures/terminal.svg COMMAND ...      # wants pyte, a terminal emulator

The command runs in a terminal of 110 columns; the last ROWS rows of its screen become an SVG without web fonts.
"""

import io
import itertools
import os
import pty
import re
import sys
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

COLUMNS, ROWS = 110, 48
NAMED = {"brown": "yellow", "brightbrown": "bright_yellow"}


def screen(command: list[str]) -> pyte.Screen:
    """What stands on the terminal at the end."""
    shown = pyte.Screen(COLUMNS, 400)
    stream = pyte.ByteStream(shown)
    pid, ours = pty.fork()
    if pid == 0:
        os.environ |= {"COLUMNS": str(COLUMNS), "LINES": "40", "TERM": "xterm-256color"}
        os.execvp(command[0], command)
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:
            break
        if not data:
            break
        stream.feed(data)
    os.waitpid(pid, 0)
    return shown


def colour(name: str) -> str | None:
    if name == "default":
        return None
    return f"#{name}" if re.fullmatch(r"[0-9a-f]{6}", name) else NAMED.get(name, name)


def lines(shown: pyte.Screen) -> list[Text]:
    found = []
    for row in range(shown.lines):
        line, cells = Text(), [shown.buffer[row][column] for column in range(COLUMNS)]
        for (fg, bold), run in itertools.groupby(cells, lambda cell: (cell.fg, cell.bold)):
            line.append("".join(cell.data for cell in run), Style(color=colour(fg), bold=bold))
        line.rstrip()
        found.append(line)
    while found and not found[-1].plain:
        found.pop()
    return found


def main() -> None:
    out, command = Path(sys.argv[1]), sys.argv[2:]
    rows = lines(screen(command))
    nowhere = io.StringIO()
    console = Console(record=True, width=COLUMNS, file=nowhere, color_system="truecolor", force_terminal=True)
    console.print(Text("$ " + " ".join(command), style="bold green"))
    for line in rows[-ROWS:]:
        console.print(line)
    svg = console.export_svg(title="cauc")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.S)
    out.write_text(svg.replace("Fira Code, ", ""), encoding="utf-8")


if __name__ == "__main__":
    main()
