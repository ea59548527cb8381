"""Columns that hold a study's splits, dealt by subject from a seed: the same on every machine."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from cauc_dist.stream.plan import parts

if TYPE_CHECKING:
    from cauc_dist.store.reader import Store


def cross_validation(
    store: "Store",
    name: str,
    repeats: int,
    folds: int,
    *,
    by: Sequence[object] | None = None,
    person: Callable[[str], str] | None = None,
) -> dict[str, list[str]]:
    """`name` with {seed} and {fold} filled in: in each repeat every subject is held out once (entry `test`).

    `by`: a label of each scan, of which every fold has its share. A scan whose label is None is on neither side.
    `person`: whose a scan is, by its id; default: as the store's subjects say.
    """
    people = store.subjects if person is None else [person(id) for id in store.ids]
    among = [i for i in range(len(store)) if by is None or by[i] is not None]
    subjects = [people[i] for i in among]
    strata = None if by is None else [by[i] for i in among]
    shares = {f"{k}": round(1 / folds, 10) for k in range(folds - 1)}
    shares[f"{folds - 1}"] = 1 - sum(shares.values())
    columns = {}
    for seed in range(repeats):
        dealt = dict(zip(among, parts(subjects, shares, seed, strata), strict=True))
        for fold in range(folds):
            told = {i: "test" if part == f"{fold}" else "train" for i, part in dealt.items()}
            columns[name.format(seed=seed, fold=fold)] = [told.get(i, "") for i in range(len(store))]
    return columns
