"""One thread in every process of the tests (more than the cores only fight), and a small cohort that they share."""

import os
import signal
from pathlib import Path
from types import ModuleType

import pytest

from tests import ranks
from tests.faults import ledger as ledger

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background job; what tests start would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 synthetic heads of 16^3 as a BIDS folder."""
    from cauc_dist.phantoms import write_cohort

    folder = tmp_path_factory.mktemp("cohort") / "bids"
    write_cohort(folder, n=24, size=16, seed=3)
    return folder


@pytest.fixture(scope="session")
def store(cohort: Path) -> Path:
    """The cohort, ingested: a Zarr store that tests read and never change."""
    from cauc_dist.store.ingest import ingest

    path = cohort.parent / "store.zarr"
    ingest(cohort, path)
    return path


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 40 subjects with 24 features and an age, all at random."""
    import numpy as np

    from cauc_dist.store.ingest import from_arrays
    from cauc_dist.store.layout import Column

    draw, where = np.random.default_rng(0), tmp_path_factory.mktemp("store") / "table.zarr"
    from_arrays(
        where,
        list(draw.standard_normal((40, 24)).astype(np.float32)),
        [f"sub-{i:02}" for i in range(40)],
        shape=(24,),
        columns=(Column("age", "number"),),
        metadata=(draw.uniform(20, 80, 40),),
    )
    return where


def pytest_collection_finish(session: pytest.Session) -> None:
    modules = {id(item.module): item.module for item in session.items if isinstance(item, pytest.Function)}
    if any(_forks(module) for module in modules.values()):
        ranks.preload()


def _forks(module: ModuleType) -> bool:
    return any(value is ranks or getattr(value, "__module__", "") == ranks.__name__ for value in vars(module).values())
