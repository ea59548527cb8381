"""Text of others made into HTML: escaped, control characters replaced."""

import html
from collections.abc import Sequence


def text(value: object) -> str:
    """Safe between tags and in a quoted attribute."""
    return html.escape("".join(c if c.isprintable() or c == "\n" else "�" for c in str(value)))


def table(head: Sequence[object], rows: Sequence[Sequence[object]], *, caption: str = "") -> str:
    """A table that scrolls in its own box; the first cell of a row names it. Cells are escaped; "" without a row."""
    if not rows:
        return ""
    top = "".join(f"<th scope=col>{text(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr><th scope=row>{text(first)}</th>{''.join(f'<td>{text(cell)}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    )
    title = f"<caption>{text(caption)}</caption>" if caption else ""
    return f"<div class=wide tabindex=0><table>{title}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def note(line: str) -> str:
    return f"<p class=note>{text(line)}</p>"
