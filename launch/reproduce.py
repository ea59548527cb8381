"""A study's missing members as one array: the manifest of `cauc reproduce NAME --only check`, swept.

They lie in FOLDER/sweep-K; `cauc reproduce NAME --folder FOLDER` finds them there, scores what is trained, and
makes the tables.
"""

from collections.abc import Sequence
from pathlib import Path

from cauc_dist import studies
from cauc_dist.errors import BadInput
from cauc_dist.reproduce import MANIFEST
from cauc_dist.reproduce import reproduce as locally
from launch import sweep
from launch.site import Resources, Site
from launch.submit import Say


def reproduce(
    name: str,
    folder: Path | None,
    resources: Resources,
    site: Site,
    *,
    methods: Sequence[str] = (),
    seeds: int | None = None,
    store: Path | None = None,
    data: Path | None = None,
    throttle: int | None = None,
    dry_run: bool = False,
    say: Say,
) -> Path:
    """Make the store and the manifest here, queue its members; the sweep's folder.

    Raises BadInput where nothing is missing, or an earlier array of the study may still be at work.
    """
    study = studies.get(name)
    folder = (folder or Path("runs") / name).absolute()
    locally(study, folder, methods=methods, seeds=seeds, store=store, data=data, only="check", say=say)
    number = len(list(folder.glob("sweep-*")))
    if number:
        raise BadInput(
            f"{folder} has an array already (sweep-{number - 1})",
            wanted="one at a time: what is live must not be queued twice",
            do=f"go on with it by `launch sweep --rerun {folder}/sweep-{number - 1}`, or choose another --folder",
        )
    members = sweep.listed(folder / MANIFEST)
    home = folder / f"sweep-{number}"
    sweep.sweep(members, home, resources, site, throttle=throttle, say=say, dry_run=dry_run)
    say(f"when they are done: cauc reproduce {name} --folder {folder}")
    return home
