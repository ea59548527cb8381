"""Which source a folder or file is, and one way to read them all."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from cauc_dist.errors import BadInput
from cauc_dist.store.sources import cifar, features, folders, scans
from cauc_dist.store.sources.cohort import Cohort, Header, Item, Spacing, Unusable
from cauc_dist.store.sources.tables import TABLES, Rules, participants, read_table

DEFAULT = ("T1w",)


def open_cohort(
    source: Path,
    *,
    suffix: Sequence[str] = DEFAULT,
    table: Path | None = None,
    features: Path | None = None,
    missing: Sequence[str] = (),
    ranges: Sequence[str] = (),
) -> Cohort:
    """The scans of a source with their metadata; what cannot be taken for its name or row is set aside with a reason.

    missing: `column=code`, ranges: `column=low:high`; what they say is missing is counted.
    """
    rules = Rules.parse(missing, ranges)
    if not source.exists():
        raise BadInput(f"no folder {source}", wanted="a folder or table of scans", do="Check the path")
    if not suffix or len(set(suffix)) < len(suffix):
        raise BadInput(f"suffix {' '.join(suffix)!r}", wanted="one or more, all different", do="Name e.g. T1w")
    return _opened(source, tuple(suffix), table, features, rules)


def _opened(source: Path, suffix: tuple[str, ...], table: Path | None, rois: Path | None, rules: Rules) -> Cohort:
    if rois is not None or features.is_source(source):
        _needless("a table of features", suffix=suffix != DEFAULT)
        return features.cohort(source, table, rois, rules)
    if not source.is_dir():
        do = "Give a folder, or a .csv or .tsv table of features"
        raise BadInput(f"{source} is a file", wanted="a folder of scans", do=do)
    if cifar.is_source(source):
        given = {"suffix": suffix != DEFAULT, "table": table is not None}
        _needless("CIFAR-100", **given, missing=bool(rules.codes), ranges=bool(rules.ranges))
        return cifar.cohort(source)
    path = participants(source, table)
    if folders.OPENBHB.keys() & set(suffix) or "siteXacq" in read_table(path).names:
        if paths := features.of_openbhb(source, suffix):
            return features.join(source, paths, [path] * len(paths), rules, "OpenBHB")
        return folders.openbhb(source, suffix, table, rules)
    if any(source.glob("*.npy")) and not any(below.is_dir() for below in source.glob("sub-*")):
        _needless("a folder of .npy files", suffix=suffix != DEFAULT)
        return folders.npy(source, table, rules)
    return folders.bids(source, suffix, table, rules)


def _needless(kind: str, **given: bool) -> None:
    """A setting that would do nothing is refused: its user expects something of it."""
    if names := [name for name, there in given.items() if there]:
        raise BadInput(f"{' and '.join(names)} for {kind}", wanted="none: it has no use there", do="Leave it out")


def header(item: Item, resample: Spacing | None = None) -> Header:
    """What `read` will give, without reading voxels where the format allows; raises Unusable."""
    if item.index is None:
        return scans.header(item.paths, resample)
    made: Header = _rows(item, resample).header(item)
    return made


def read(item: Item, resample: Spacing | None = None) -> NDArray[Any]:
    """(c, *spatial) in RAS, the values exactly as the file means them; raises Unusable."""
    if item.index is None:
        return scans.read(item.paths, resample)
    row: NDArray[Any] = _rows(item, resample).read(item)
    return row


def checksum(item: Item) -> bytes:
    """sha256 (32 bytes) of the file as it is, of the digests of several files, or of a row's own bytes."""
    if item.index is not None:
        return hashlib.sha256(_rows(item).row_bytes(item)).digest()
    digests = []
    for path in item.paths:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").digest())
    return digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(digests)).digest()


def _rows(item: Item, resample: Spacing | None = None) -> Any:
    """The module that reads rows of such a file."""
    if resample is not None:
        raise Unusable("a row of a table or an image has no voxel size: it cannot be resampled")
    return features if item.paths[0].suffix in TABLES else cifar
