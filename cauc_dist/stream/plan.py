"""Which scans a step sees, as a pure function of integers: no state, no files, no torch.

Every rank knows the whole global batch of every step; its own part is a slice. One rank is the slice of length
`batch_size`. Shapes: n training rows (scans) of m subjects; batch_size (GLOBAL), b = batch_size / world_size of it on
a rank; S = steps * batch_size draws an epoch.
"""

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cauc_dist.errors import BadInput

Rows = NDArray[np.int64]
Floats = NDArray[np.float64]

# What a Philox stream of an epoch is for. The numbers are part of the order: never change one.
ORDER, START, SCAN, BATCHES, INSIDE = range(5)


def split(subjects: Sequence[str], folds: int, fold: int) -> tuple[Rows, Rows]:
    """(train rows, held-out rows), ascending: all scans of a subject fall on the same side.

    Subjects are put in the order of the sha256 of their names and dealt like cards, the k-th to part k % folds:
    the same on every machine, in any order of the scans, and parts differ by at most one subject. folds = 1
    trains on everybody and holds nobody out.
    """
    if not 0 <= fold < folds:
        raise BadInput(f"fold {fold} of {folds}", wanted=f"0 to {max(folds, 1) - 1}", do="Count folds from 0")
    names = sorted(set(subjects), key=lambda name: hashlib.sha256(name.encode()).digest())
    if folds > len(names):
        raise BadInput(f"{folds} folds of {len(names)} subjects", wanted="a subject in each", do="Ask for fewer folds")
    out = set(names[fold::folds]) if folds > 1 else set()
    held = np.array([name in out for name in subjects], bool)
    return np.flatnonzero(~held).astype(np.int64), np.flatnonzero(held).astype(np.int64)


def parts(
    subjects: Sequence[str], shares: Mapping[str, float], seed: int, strata: Sequence[object] | None = None
) -> list[str]:
    """The part (train, test, ...) of each scan: all scans of a subject fall in the same one.

    Subjects are dealt in the order of the sha256 of seed and name. `strata` has a label for each scan; subjects of one
    label (of one set of labels, where scans of a subject differ) are dealt apart, so that each part has its share of
    them, rounded down or up. What one label rounds up the next makes good, so that the whole keeps the shares too.
    """
    share = {part: Fraction(str(number)) if 0 <= number <= 1 else Fraction(-1) for part, number in shares.items()}
    if any(number < 0 for number in share.values()) or abs(sum(share.values(), Fraction(-1))) > Fraction(1, 10**9):
        found = f"shares {', '.join(f'{part} {number:g}' for part, number in shares.items()) or '(none)'}"
        raise BadInput(found, wanted="numbers of 0 or more that add up to 1", do="Mend them, e.g. train=.8 test=.2")
    labels: defaultdict[str, set[str]] = defaultdict(set)
    for name, label in zip(subjects, [""] * len(subjects) if strata is None else strata, strict=True):
        labels[name].add(str(label))
    dealt: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in sorted(labels, key=lambda name: hashlib.sha256(f"{seed}\n{name}".encode()).digest()):
        dealt[tuple(sorted(labels[name]))].append(name)
    part_of: dict[str, str] = {}
    owed = dict.fromkeys(share, Fraction(0))
    for _, names in sorted(dealt.items()):
        counts = {part: int(share[part] * len(names)) for part in share}
        for part in share:
            owed[part] += share[part] * len(names) - counts[part]
        uneven = [part for part in share if share[part] * len(names) > counts[part]]
        for part in sorted(uneven, key=lambda part: -owed[part])[: len(names) - sum(counts.values())]:
            counts[part] += 1
            owed[part] -= 1
        part_of |= dict(zip(names, [part for part, count in counts.items() for _ in range(count)], strict=True))
    empty = [part for part in share if share[part] and part not in part_of.values()]
    if empty:
        found = f"{len(part_of)} subjects leave {' and '.join(empty)} without one"
        raise BadInput(found, wanted="a subject in each part", do="Give it a larger share, or ask for fewer parts")
    return [part_of[name] for name in subjects]


def balanced(weights: ArrayLike | None, groups: ArrayLike, subjects: Sequence[Hashable]) -> Floats:
    """(n,) weights under which each group (site) is drawn equally often; inside a group, as `weights` say.

    A scan is drawn in proportion to its weight / scans of its subject: in each group these add up to 1. Scans without
    a group (NaN) are a group. A group whose weights are all 0 stays out.
    """
    _, of = _numbered(subjects)
    w = np.ones(len(of)) if weights is None else np.array(weights, np.float64)
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    often = np.bincount(group, w / np.bincount(of)[of])
    return w / np.where(often > 0, often, 1)[group]


def shares(n: int, parts: int) -> list[int]:
    """How many of n subjects each part holds (ranks of a world, chunks of a rank): n / parts, one more on the first."""
    return [n // parts + (part < n % parts) for part in range(parts)]


def per_rank(batch_size: int, world_size: int) -> list[int]:
    """Subjects a step on each rank; BadInput where one would have none."""
    if batch_size < world_size:
        raise BadInput(
            f"batch_size {batch_size} over {world_size} ranks",
            wanted="a subject a rank",
            do=f"Use {world_size} or more, or fewer ranks",
        )
    return shares(batch_size, world_size)


def raw(n: int, seed: int, epoch: int, stream: int) -> NDArray[np.uint64]:
    """(n,) raw Philox numbers with the address (seed, epoch, stream).

    numpy promises the raw stream of a bit generator for ever, and that of Generator's methods not.
    """
    key, counter = np.array([seed % 2**64, epoch], np.uint64), np.array([0, 0, 0, stream], np.uint64)
    numbers: NDArray[np.uint64] = np.random.Philox(key=key, counter=counter).random_raw(n)
    return numbers


def permutation(n: int, seed: int, epoch: int, stream: int = ORDER) -> Rows:
    """(n,) a permutation of 0..n-1: the order of n raw numbers. Ties (1 in 2**64 a pair) keep their order."""
    return np.argsort(raw(n, seed, epoch, stream), kind="stable")


class Plan:
    """The order of training rows over all epochs: at most one scan of a subject in a batch.

    An epoch has S = (m // batch_size) * batch_size draws, of which a subject of weight w gets S w / sum(w), rounded
    down or up so that the expectation is exact (systematic sampling of the permuted subjects). Without weights that is
    once each, of which the m mod batch_size that are left out differ by epoch. A subject's weight is the mean of its
    scans' weights; each draw of it takes one of its scans, in proportion to the scans' weights.
    """

    def __init__(
        self,
        rows: ArrayLike,
        subjects: Sequence[Hashable],
        batch_size: int,
        seed: int,
        weights: ArrayLike | None = None,
    ) -> None:
        self.rows: Rows = np.array(rows, np.int64)
        self.batch_size, self.seed = batch_size, seed
        n = len(self.rows)
        if len(np.unique(self.rows)) < n:
            raise ValueError(f"{n} rows with repeats; wanted each row once")
        if len(subjects) != n:
            raise ValueError(f"{len(subjects)} subjects for {n} rows; wanted one for each row")
        names, of = _numbered(subjects)
        m = len(names)
        if not 1 <= batch_size <= m:
            found = f"batch_size {batch_size} for {m} training subjects"
            raise BadInput(found, wanted="at least one full batch", do=f"Use 1 to {m}")
        self.steps_per_epoch = m // batch_size
        given = np.ones(n) if weights is None else np.array(weights, np.float64)
        self._refuse_no_weights(given, subjects)
        w, scans = given / given.max(), np.bincount(of)  # (n,), (m,)
        mean = np.bincount(of, w) / scans
        # Integers: sums and products are exact, the order the same on every machine. m * most * S stays below 2**63.
        self._weight = _integers(mean / mean.max(), min(2**30, 2**62 // m**2))  # (m,)
        self._refuse_heavy(names, mean, given.max())
        by_subject = np.argsort(of, kind="stable")  # the scans of subject s side by side, ending at _ends
        first = np.cumsum(scans) - scans
        most = np.maximum.reduceat(w[by_subject], first)
        within = _integers(w[by_subject] / np.where(most > 0, most, 1)[of[by_subject]], 2**30)
        self._scans, self._ends = self.rows[by_subject], np.cumsum(within)
        self._begin = (self._ends - within)[first]  # (m,)
        self._width = np.add.reduceat(within, first)
        facts = [np.array([1, batch_size, seed % 2**64], np.uint64), self.rows, of, self._weight, within]
        self.fingerprint = hashlib.sha256(b"".join(x.astype("<u8").tobytes() for x in facts)).hexdigest()
        """What the order depends on: two plans with the same one give the same batches."""
        self._cached: tuple[tuple[int, Rows], ...] = ()

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def batch(self, step: int) -> Rows:
        """(batch_size,) rows of the global batch, computed without the steps before.

        The first step of an epoch costs the order of all of it: 30 ms for 100,000 rows.
        """
        epoch, k = divmod(step, self.steps_per_epoch)
        rows: Rows = self._order(epoch)[k].copy()
        return rows

    def rank_batch(self, step: int, rank: int, world_size: int) -> Rows:
        """(b,) rows of one rank: its share of the global batch, in order."""
        sizes = per_rank(self.batch_size, world_size)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}; wanted 0 to {world_size - 1}")
        start = sum(sizes[:rank])
        return self.batch(step)[start : start + sizes[rank]]

    def _order(self, epoch: int) -> Rows:
        """(steps, batch_size) rows of an epoch. Two are kept: a loader is ahead of the step that it feeds."""
        cached = self._cached  # one read: another thread may put another epoch there
        for known, order in cached:
            if known == epoch:
                return order
        order = self._compute(epoch)
        self._cached = ((epoch, order), *cached[:1])
        return order

    def _compute(self, epoch: int) -> Rows:
        steps, m, total = self.steps_per_epoch, len(self._weight), int(self._weight.sum())
        draws = steps * self.batch_size
        order = permutation(m, self.seed, epoch)
        start = int.from_bytes(raw(2, self.seed, epoch, START).astype("<u8").tobytes(), "little") % total
        drawn = (np.cumsum(self._weight[order]) * draws + start) // total  # up to and with the k-th subject
        subject = np.repeat(order, np.diff(drawn, prepend=0))  # (S,)
        at = raw(draws, self.seed, epoch, SCAN) % self._width[subject].astype(np.uint64)
        scan = np.searchsorted(self._ends, self._begin[subject] + at.astype(np.int64), side="right")
        # Draws of one subject are neighbours and at most `steps`: dealt over the steps, no two meet in a batch.
        batches = self._scans[scan].reshape(self.batch_size, steps).T[permutation(steps, self.seed, epoch, BATCHES)]
        inside = np.argsort(raw(draws, self.seed, epoch, INSIDE).reshape(steps, -1), axis=1, kind="stable")
        rows: Rows = np.take_along_axis(batches, inside, axis=1)
        return rows

    def _refuse_no_weights(self, weights: Floats, subjects: Sequence[Hashable]) -> None:
        if weights.shape != self.rows.shape:
            raise ValueError(f"weights of shape {weights.shape} for {len(self.rows)} rows; wanted one for each row")
        wrong = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
        if len(wrong):
            named = ", ".join(f"{weights[i]:g} of row {self.rows[i]} (subject {subjects[i]})" for i in wrong[:8])
            more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
            raise BadInput(
                f"weights {named}{more}",
                wanted="finite numbers of 0 or more",
                do="Give each scan a weight, 0 to leave it out",
            )
        if not weights.any():
            found = f"the weights of all {len(weights)} scans are 0"
            raise BadInput(found, wanted="scans to draw", do="Give some a weight above 0")

    def _refuse_heavy(self, names: list[Hashable], mean: Floats, unit: float) -> None:
        """BadInput where a subject's weight, `mean` times `unit`, would draw it more than once a batch."""
        heavy, total, batch = int(self._weight.max()), int(self._weight.sum()), self.batch_size
        if batch * heavy <= total:
            return
        # Cut the j heaviest down to t: batch * t = j * t + the rest, for the first j that leaves nobody above t.
        falling = np.sort(mean)[::-1]
        cuts = (mean.sum() - np.cumsum(falling)[: batch - 1]) / (batch - np.arange(1, batch))
        cut = cuts[np.argmax(falling[1:batch] <= cuts)] * unit
        raise BadInput(
            f"the weight of subject {names[int(self._weight.argmax())]}, {mean.max() * unit:.4g}, wants it "
            f"{batch * heavy / total:.4g} times in a batch of {batch}",
            wanted="no subject twice in a batch",
            do=f"Use a batch_size of {total // heavy} or less" + (f", or weights below {cut:.4g}" if cut > 0 else ""),
        )


def _numbered(subjects: Sequence[Hashable]) -> tuple[list[Hashable], Rows]:
    """(names in the order of first appearance, the place of each scan's subject among them)."""
    numbers: dict[Hashable, int] = {}
    of = [numbers.setdefault(name, len(numbers)) for name in subjects]
    return list(numbers), np.array(of, np.int64)


def _integers(weights: Floats, most: int) -> Rows:
    """weights (0 to 1) in steps of 1 / most, rounded up: none above 0 becomes 0, and the heaviest gains no share."""
    return np.ceil(weights * most).astype(np.int64)
