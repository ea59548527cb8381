"""Whether a store opens, and whether some of its scans read as they were written."""

import time
from collections.abc import Iterator

from cauc_dist.doctor.finding import Finding
from cauc_dist.errors import BadInput

SOME = 8
"""Scans that are read: evenly spread, the first and the last among them."""


def health(where: str) -> Iterator[Finding]:
    """What opening says, and the crc32c of a few scans; `cauc store verify` reads them all."""
    import numpy as np

    from cauc_dist.store.reader import Store

    try:
        store = Store.open(where)
        yield Finding("store", "ok", f"{where}: {len(store)} scans, {store.layout}, fingerprint {store.fingerprint}")
        row, began = np.empty(store.row_shape, store.dtype), time.perf_counter()
        chosen = np.unique(np.linspace(0, len(store) - 1, SOME).astype(int)).tolist() if len(store) else []
        for i in chosen:
            store.read_into(i, row)
    except BadInput as error:
        yield Finding("store", "fail", f"{error.found}; wanted {error.wanted}", error.do)
        return
    except OSError as error:
        yield Finding("store", "fail", f"{where}: {error}", "check the path, its permissions and the network")
        return
    seconds = (time.perf_counter() - began) / max(1, len(chosen))
    found = f"{len(chosen)} of {len(store)} scans read, {1000 * seconds:.3g} ms each, checksums right"
    yield Finding("scans", "ok", f"{found}; all of them: cauc store verify {where}")
