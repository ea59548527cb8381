import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from cauc_dist import phantoms
from cauc_dist.errors import BadInput
from cauc_dist.store.ingest import ingest
from cauc_dist.store.reader import Store
from cauc_dist.stream.loader import Loader, chunks, read_all
from cauc_dist.stream.plan import Plan

PATIENCE = 20.0  # seconds until a test gives up on an event; reached only when it fails


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loader")
    phantoms.write_cohort(folder / "b", n=24, size=36)  # 46,656 voxels: more than one piece of GRAIN
    ingest(folder / "b", folder / "s.zarr")
    return folder


@pytest.fixture(scope="module")
def store(folder: Path) -> Store:
    return Store.open(folder / "s.zarr")


class Slow:
    """The store, with something to wait for in every read; counts what begins, ends and overlaps."""

    def __init__(self, store: Store) -> None:
        self.inner, self.ids, self.shape, self.stats = store, store.ids, store.shape, store.stats
        self.lock, self.begun, self.ended, self.now, self.most = threading.Condition(), [], [], 0, 0  # type: ignore[var-annotated]

    def affine(self, i: int) -> tuple[float, float]:
        return self.inner.affine(i)

    def stored(self, i: int) -> Any:
        with self.lock:
            self.begun.append(i)
            self.now += 1
            self.most = max(self.most, self.now)
        self.pause(i)
        volume = self.inner.stored(i)
        with self.lock:
            self.now -= 1
            self.ended.append(i)
            self.lock.notify_all()
        return volume

    def pause(self, i: int) -> None:
        time.sleep(0.01)

    def wait_for(self, ended: int) -> bool:
        with self.lock:
            return self.lock.wait_for(lambda: len(self.ended) >= ended, PATIENCE)


def load(
    store: Any, plan: Plan, start: int, stop: int, rank: int = 0, world_size: int = 1, **settings: Any
) -> list[Any]:
    with Loader(store, plan, rank=rank, world_size=world_size, start=start, stop=stop, **settings) as loader:
        return list(loader)


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    assert loader_threads() == []


# ---- values ---------------------------------------------------------------------------------------------------


def test_batches_are_the_plan_s_rows_normalised_as_the_source_says(store: Store, folder: Path) -> None:
    plan = Plan(range(24), 6, seed=3)
    for batch in load(store, plan, 2, 9):
        assert np.array_equal(batch.rows, plan.batch(batch.step))
        assert batch.volumes.shape == (6, 1, 36, 36, 36)
        assert batch.volumes.dtype == torch.float32
        for volume, row in zip(batch.volumes, batch.rows, strict=True):
            name = store.ids[row]
            x = nib.load(folder / f"b/{name}/anat/{name}_T1w.nii.gz").get_fdata(dtype=np.float64)
            step = store.affine(row)[0] if x.max() > 2048 else 0  # f16 keeps integers to 2048
            expected = (x - x.mean()) / x.std()
            np.testing.assert_allclose(volume[0].numpy(), expected, atol=2e-6 + step / x.std(), rtol=0)


def test_normalise_none_gives_the_source_s_values(store: Store, folder: Path) -> None:
    (batch,) = load(store, Plan(range(24), 24, seed=0), 0, 1, normalise="none")
    for volume, row in zip(batch.volumes, batch.rows, strict=True):
        stored, (scale, offset) = store.stored(row), store.affine(row)
        assert np.array_equal(volume.numpy().astype(np.float64), stored.astype(np.float64) * scale + offset)


def test_ranks_together_read_the_batch_of_one_process(store: Store) -> None:
    plan = Plan(range(24), 8, seed=5)
    alone = load(store, plan, 0, 3)
    ranks = [load(store, plan, 0, 3, rank=rank, world_size=4) for rank in range(4)]
    for step, whole in enumerate(alone):
        assert torch.equal(torch.cat([mine[step].volumes for mine in ranks]), whole.volumes)
        assert np.array_equal(np.concatenate([mine[step].rows for mine in ranks]), whole.rows)


def test_resuming_at_a_step_gives_the_same_batches(store: Store) -> None:
    plan = Plan(range(24), 5, seed=1)
    whole, resumed = load(store, plan, 0, 9), load(store, Plan(range(24), 5, seed=1), 6, 9)
    assert [batch.step for batch in whole] == list(range(9))
    assert [batch.step for batch in resumed] == [6, 7, 8]
    for before, after in zip(whole[6:], resumed, strict=True):
        assert torch.equal(before.volumes, after.volumes)
        assert np.array_equal(before.rows, after.rows)


def test_one_and_four_threads_give_equal_bits(store: Store) -> None:
    plan = Plan(range(24), 7, seed=2)
    one, four = load(store, plan, 0, 6, threads=1, prefetch=1), load(Slow(store), plan, 0, 6, threads=4, prefetch=3)
    assert all(torch.equal(a.volumes, b.volumes) for a, b in zip(one, four, strict=True))


def test_read_all_and_chunks_give_the_rows_asked_for(store: Store) -> None:
    rows = [5, 3, 20, 3, 0]
    whole = read_all(store, rows, threads=3)
    assert torch.equal(torch.cat([read_all(store, [row]) for row in rows]), whole)
    pieces = list(chunks(store, rows, 2))
    assert [len(piece) for piece in pieces] == [2, 2, 1]
    assert torch.equal(torch.cat(pieces), whole)
    raw = read_all(store, [3], normalise="none")
    assert raw.min() == 0
    assert raw.max() == store.stats["max"][3]
    assert read_all(store, []).shape == (0, 1, 36, 36, 36)


# ---- order of events ------------------------------------------------------------------------------------------


def test_a_slow_store_is_hidden_while_the_consumer_works(store: Store) -> None:
    slow, plan = Slow(store), Plan(range(24), 4, seed=0)
    with Loader(slow, plan, rank=0, world_size=1, start=0, stop=6, threads=2, prefetch=2) as loader:
        for step in range(6):
            batch = next(loader)
            # The consumer works and asks for nothing, yet the two batches after this one are read to their end.
            assert slow.wait_for(4 * min(6, step + 3))
            assert batch.step == step
        assert slow.ended
        assert sorted(slow.begun) == list(range(24))


def test_reads_run_at_most_prefetch_batches_ahead(store: Store) -> None:
    slow = Slow(store)
    with Loader(slow, Plan(range(24), 4, seed=0), rank=0, world_size=1, start=0, stop=6, prefetch=2) as loader:
        assert slow.wait_for(8)
        time.sleep(0.05)
        assert len(slow.begun) == 8  # before the first step: batches 0 and 1
        next(loader)
        assert slow.wait_for(12)
        time.sleep(0.05)
        assert len(slow.begun) == 12  # while step 0 is at work: 1 and 2


def test_threads_overlap_their_reads(store: Store) -> None:
    class Meeting(Slow):
        barrier = threading.Barrier(4)

        def pause(self, i: int) -> None:
            self.barrier.wait(PATIENCE)  # passes only when four reads are under way at once

    meeting = Meeting(store)
    assert len(load(meeting, Plan(range(24), 4, seed=0), 0, 6, threads=4)) == 6
    assert meeting.most == 4


def test_wait_tells_the_seconds_the_consumer_stood_still(store: Store) -> None:
    class Gate(Slow):
        def pause(self, i: int) -> None:
            time.sleep(0.3)

    slow = Gate(store)
    with Loader(slow, Plan(range(24), 1, seed=0), rank=0, world_size=1, start=0, stop=2, threads=1) as loader:
        assert next(loader).wait > 0.15
        assert slow.wait_for(2)
        time.sleep(0.1)
        assert next(loader).wait < 0.15


# ---- ends -----------------------------------------------------------------------------------------------------


def test_leaving_early_stops_the_readers(store: Store) -> None:
    slow = Slow(store)
    with Loader(slow, Plan(range(24), 6, seed=0), rank=0, world_size=1, start=0, stop=1000, threads=2) as loader:
        next(loader)
    begun = len(slow.begun)
    time.sleep(0.05)
    assert loader_threads() == []
    assert len(slow.begun) == begun == len(slow.ended)
    assert list(loader) == []


def test_an_error_of_the_consumer_stops_the_readers_and_passes(store: Store) -> None:
    loader = Loader(store, Plan(range(24), 6, seed=0), rank=0, world_size=1, start=0, stop=9)

    def step() -> None:
        with loader:
            next(loader)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        step()
    assert loader_threads() == []


def test_dropping_chunks_half_way_stops_the_readers(store: Store) -> None:
    pieces = chunks(store, range(24), 4)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert loader_threads() == []


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError("device gone"), RuntimeError, "step 3: scan {} could not be read: OSError: device gone"),
        (
            BadInput("scan x is damaged", wanted="all of it", do="Copy"),
            BadInput,
            "step 3: scan x is damaged; wanted all of it. Copy.",
        ),
    ],
)
def test_an_error_comes_at_its_step_and_names_the_scan(
    store: Store, error: Exception, kind: type[Exception], words: str
) -> None:
    plan = Plan(range(24), 6, seed=0)
    bad = int(plan.batch(3)[2])

    class Broken(Slow):
        def pause(self, i: int) -> None:
            if i == bad:
                raise error

    loader, got = Loader(Broken(store), plan, rank=0, world_size=1, start=0, stop=4, prefetch=4), []
    with loader, pytest.raises(kind) as raised:
        got.extend(batch.step for batch in loader)
    assert got == [0, 1, 2]
    assert str(raised.value) == words.format(store.ids[bad])
    assert raised.value.__cause__ is error
    assert loader_threads() == []


def test_impossible_settings_are_refused_at_once(store: Store) -> None:
    plan = Plan(range(24), 6, seed=0)
    for settings, words in (
        ({"threads": 0}, "threads 0; wanted at least 1. Set threads to 1 or more"),
        ({"prefetch": 0}, "prefetch 0; wanted at least 1"),
        ({"normalise": "z"}, "normalise 'z'; wanted volume or none. Use one of the two"),
        ({"world_size": 4}, "batch_size 6 does not divide over 4 ranks"),
    ):
        with pytest.raises(BadInput, match=words):
            Loader(store, plan, **{"rank": 0, "world_size": 1, "start": 0, "stop": 1, **settings})  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_lie_in_pinned_memory_where_there_is_a_gpu(store: Store) -> None:
    (batch,) = load(store, Plan(range(24), 6, seed=0), 0, 1)
    assert batch.volumes.is_pinned()
    assert torch.equal(batch.volumes.cuda(non_blocking=True).cpu(), read_all(store, batch.rows))
