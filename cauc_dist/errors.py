"""What a user did wrong, in one paragraph: found, wanted, what to do."""

import difflib
from collections.abc import Iterable

# Exit codes: input that cannot be worked on; a loss or gradient that is not a number; done, some scans set aside;
# stopped by a signal, after a checkpoint; another rank is gone.
BAD_INPUT, NON_FINITE, SET_ASIDE, STOPPED, LOST = 2, 3, 4, 5, 6


class BadInput(ValueError):
    """Data or settings a run cannot start from; the command line prints it and exits 2.

    `found` is what is there, `wanted` what would be right, `do` the next thing to type or mend.
    """

    def __init__(self, found: str, *, wanted: str, do: str) -> None:
        self.found, self.wanted, self.do = found, wanted, do
        super().__init__(
            f"{found}; wanted {wanted}. {do[:1].upper()}{do[1:]}" + ("" if do.endswith((".", "?")) else ".")
        )


def nearest(name: str, valid: Iterable[str]) -> str:
    """'did you mean ...' for a mistyped name, or the valid names where none is near."""
    valid = sorted(valid)
    near = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(near)}?" if near else f"Valid: {', '.join(valid) or '(none)'}"
