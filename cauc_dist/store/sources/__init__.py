"""What can be ingested: a folder or file -> scans with their metadata. docs/sources.md says how each is recognised.

Where things are: `cohort` the types, `opened` which source it is, `folders` BIDS, OpenBHB and .npy, `features` tables
of features, `cifar` CIFAR-100, `tables` metadata, `scans` the voxels.
"""

from cauc_dist.store.sources.cohort import NAMED, Cohort, Header, Item, Refused, Unusable, by, some
from cauc_dist.store.sources.opened import checksum, header, open_cohort, read

__all__ = [
    "NAMED",
    "Cohort",
    "Header",
    "Item",
    "Refused",
    "Unusable",
    "by",
    "checksum",
    "header",
    "open_cohort",
    "read",
    "some",
]
