from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cauc_dist.errors import BadInput
from cauc_dist.store.reader import Store
from cauc_dist.stream.loader import readers
from cauc_dist.stream.values import Expand, values
from tests.stream.cases import CASES, Case

WAYS = [
    (name, normalise)
    for name in CASES
    for normalise in ("volume", "dataset", "none")
    if (name, normalise) != ("table", "volume")
]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Store]:
    folder = tmp_path_factory.mktemp("values")
    return {name: case.store(folder, name) for name, case in CASES.items()}


def as_stored(store: Store, rows: Any) -> np.ndarray:
    raw = np.empty((len(rows), *store.row_shape), store.dtype)
    for out, row in zip(raw, rows, strict=True):
        store.read_into(int(row), out)
    return raw


@pytest.mark.parametrize(("name", "normalise"), WAYS)
def test_a_batch_on_the_device_has_the_values_of_the_sources(
    stores: dict[str, Store], name: str, normalise: str
) -> None:
    case, store, rows, train = CASES[name], stores[name], np.array([7, 0, 7, 11, 4]), np.array([0, 3, 4, 5, 9])
    expand = Expand(store, values(store, normalise, train))  # type: ignore[arg-type]
    out = expand.batch(torch.from_numpy(as_stored(store, rows)), rows)
    expected, off = case.expected(rows, normalise, train)
    assert out.shape == expected.shape
    assert out.dtype == torch.float32
    assert (np.abs(out.numpy() - expected) <= off).all()


@pytest.mark.parametrize(("name", "normalise"), WAYS)
def test_a_row_in_a_reader_s_thread_has_the_bits_of_a_batch_on_the_device(
    stores: dict[str, Store], name: str, normalise: str
) -> None:
    """Two ways of the same arithmetic; on a CPU they agree to the bit."""
    store, rows = stores[name], np.arange(12)
    expand, raw = Expand(store, values(store, normalise)), as_stored(store, rows)  # type: ignore[arg-type]
    whole = expand.batch(torch.from_numpy(raw), rows)
    assert np.array_equal(raw, as_stored(store, rows))  # and are left as they were
    packed = 0 if store.mask is None else store.row_shape[0]
    for i in rows:
        out = torch.full(store.shape, torch.nan)
        expand.background(i, out.numpy())
        expand.row(raw[i], i, out, torch.empty(packed))
        assert torch.equal(out, whole[i])


LARGE = 32768  # elements from which on ATen shares an operation out to a team of threads


def test_reader_threads_have_no_teams_and_the_caller_keeps_its_own(stores: dict[str, Store]) -> None:
    store = stores["packed_f16"]
    assert store.row_shape[0] > LARGE
    expand, raw = Expand(store, values(store, "volume")), as_stored(store, [0])

    def made() -> int:
        """Threads that come with `row`: each thread has a team of its own."""
        before = threads()
        expand.row(raw[0], 0, torch.empty(store.shape), torch.empty(store.row_shape))
        return len(threads() - before)

    torch.set_num_threads(4)
    try:
        with readers(2) as pool:
            assert list(pool.map(lambda _: made(), range(4))) == [0] * 4
        with ThreadPoolExecutor(1) as pool:  # as a thread is without that
            assert pool.submit(made).result() == 3
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(1)


def threads() -> set[Path]:
    """Of this process, as the kernel names them."""
    return set(Path("/proc/self/task").iterdir())


def test_what_does_not_vary_over_the_training_scans_becomes_0(tmp_path: Path) -> None:
    table = np.array([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0], [9.0, 6.0]])
    store = Case(table, "f32", "none").store(tmp_path, "t")
    out = Expand(store, values(store, "dataset", np.arange(3))).batch(torch.from_numpy(table).float(), np.arange(4))
    spread = np.sqrt(2 / 3)
    np.testing.assert_allclose(out.numpy(), (table - [2, 5]) / [spread, 1], atol=1e-6)
    assert out[:3, 1].tolist() == [0, 0, 0]


def test_dataset_is_of_the_training_scans_and_not_of_the_others(stores: dict[str, Store]) -> None:
    store, case, train = stores["images"], CASES["images"], np.arange(6)
    out = Expand(store, values(store, "dataset", train)).batch(torch.from_numpy(as_stored(store, train)), train)
    np.testing.assert_allclose(out.double().mean((0, 2, 3)), np.zeros(3), atol=1e-5)
    np.testing.assert_allclose(out.double().std((0, 2, 3), correction=0), np.ones(3), rtol=1e-5)
    assert not np.allclose(case.sources.mean((0, 2, 3)), case.sources[train].mean((0, 2, 3)), rtol=1e-3)


def test_what_cannot_be_normalised_is_refused(stores: dict[str, Store]) -> None:
    with pytest.raises(
        BadInput, match=r"normalise volume for tables; wanted dataset or none. Use dataset: each feature"
    ):
        values(stores["table"], "volume")
    with pytest.raises(BadInput, match=r"normalise 'z'; wanted volume, dataset or none. Use one of the three"):
        values(stores["images"], "z")  # type: ignore[arg-type]
