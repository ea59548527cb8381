"""What the pages of this package look like without a script, and the extra that draws pictures."""

import importlib.util

from cauc_dist.errors import BadInput

STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
td { font-variant-numeric: tabular-nums; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: 1rem; }
.curves img { width: 100%; background: #fff; border-radius: 4px; }
figure { margin: 0; } figcaption, .note { font-size: .875rem; opacity: .8; }
pre { overflow-x: auto; font-size: .8rem; }
"""


def need_matplotlib() -> None:
    """BadInput where the extra that draws pictures of scans is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BadInput("no matplotlib", wanted="the extra `report`", do="pip install 'cauc-dist[report]'")
