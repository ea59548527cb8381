"""Embedding a store on W ranks: `python -m cauc_dist.embed FROM OUT` on every rank, whatever started it.

FROM is a run folder, or one of `cauc export` with a store. Each rank embeds one run of the store's rows; rank 0 puts
them together in that order, and writes. H width of h, D of z, n scans.
"""

import argparse
import dataclasses
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from cauc_dist import probe, verify
from cauc_dist.embeddings import Embeddings, Floats, refuse_existing
from cauc_dist.errors import BAD_INPUT, BadInput
from cauc_dist.export import FILES, Pretrained, load_encoder
from cauc_dist.prepare import check_store, load, parts
from cauc_dist.store.reader import Store
from cauc_dist.stream.loader import chunks
from cauc_dist.stream.plan import shares
from cauc_dist.stream.values import values
from cauc_dist.train import Elsewhere
from cauc_dist.world import World

Rows = NDArray[np.int64]
Represent = Callable[[Rows], tuple[Floats, Floats | None]]
"""Rows of a store -> (h, z or None) of those scans, in that order."""
Device = Literal["auto", "cpu", "cuda"]
CHUNK = 32


@dataclass(frozen=True)
class Source:
    """An encoder and the store that it is to embed, checked against each other."""

    store: Store
    device: torch.device
    represent: Represent
    trained: NDArray[np.bool_] | None
    method: str
    step: int

    def embeddings(self, h: Floats, z: Floats | None) -> Embeddings:
        """Of all scans of the store: h (N, H), z (N, D) or None."""
        s, y = self.store, self.store.metadata([column.name for column in self.store.columns])
        told = (self.trained, s.fingerprint, self.method, self.step)
        return Embeddings(s.ids, s.subjects, h, z, s.columns, y, *told)


def of_run(run: Path, world: World, device: Device = "auto", say: Callable[[str], None] = lambda line: None) -> Source:
    """The newest sound checkpoint of a run, and the store that it was trained on."""
    config = load(run)
    if device != "auto":
        config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, device=device))
    store = Store.open(config.data.store)
    check_store(run, store)
    saved, (train, _) = probe.newest(config, store, say), parts(config, store)

    def represent(rows: Rows) -> tuple[Floats, Floats]:
        h = probe.embed(config, store, rows, saved, chunk=CHUNK, world=world).astype(np.float32)
        return h, probe.project(config, store, saved, h)

    trained = np.isin(np.arange(len(store)), train)
    return Source(store, world.device(config.engine.device), represent, trained, config.objective.name, saved.step)


def of_export(folder: Path, store: Store, world: World, device: Device = "auto") -> Source:
    """An encoder of `cauc export`, and a store of scans like those that it was trained on."""
    encoder = load_encoder(folder)
    check_like(encoder, store)
    where, card = world.device(device), encoder.card
    encoder.to(where)
    return Source(
        store, where, lambda rows: (represent(encoder, store, rows), None), None, card["objective"], card["step"]
    )


def check_like(encoder: Pretrained, store: Store) -> None:
    """BadInput where the store's scans differ from the encoder's in shape, orientation or voxel size."""
    theirs = (store.shape, store.attributes.get("orientation"), store.attributes.get("voxel_mm"))
    ours = (encoder.shape, encoder.card["orientation"], encoder.card["voxel_mm"])
    for name, found, wanted in zip(("shape", "orientation", "voxel_mm"), theirs, ours, strict=True):
        alike = np.allclose(found, wanted, atol=1e-3) if name == "voxel_mm" and found and wanted else found == wanted
        if not alike and found and wanted:
            raise BadInput(
                f"{store.where} has scans of {name} {found}",
                wanted=f"{wanted}, as in the encoder's training",
                do="ingest them as the encoder's were",
            )


@torch.no_grad()
def represent(encoder: Pretrained, store: Store, rows: Rows) -> Floats:
    """h (len(rows), H) of those scans by an exported encoder, which normalises them itself, where its weights are."""
    device = next(encoder.parameters()).device
    raw = chunks(store, rows, CHUNK, values(store, "none"))
    return np.concatenate([encoder(encoder.prepare(x.to(device))).cpu().numpy() for x in raw])


def open_source(source: Path, store: str | None, world: World, device: Device = "auto") -> Source:
    """`of_export` where the folder is one of `cauc export`, else `of_run`; BadInput where `store` does not belong."""
    exported = (source / FILES[0]).exists()
    if exported and store is None:
        raise BadInput(f"{source} is an encoder alone", wanted="a store to embed", do="give it by --store")
    if exported and store is not None:
        return of_export(source, Store.open(store), world, device)
    if store is not None:
        do = f"leave --store out, or `cauc export {source}` and embed with that"
        raise BadInput(f"--store {store} for the run {source}", wanted="a run on its own store", do=do)
    return of_run(source, world, device, say=_say if world.rank == 0 else _nothing)


def check(source: Path, out: Path, store: str | None, device: Device, ranks: int) -> None:
    """BadInput, once and before any rank starts, for what each of them would refuse."""
    refuse_existing(out)
    if open_source(source, store, World(), device).device.type == "cuda":
        verify.check("cuda", ranks)


def _nothing(line: str) -> None:
    pass


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def over_ranks(represent: Represent, n: int) -> tuple[Floats, Floats | None]:
    """(h, z) of rows 0 ... n - 1: whole on rank 0, empty elsewhere. A collective; each rank takes one run of rows.

    What is wrong on one rank is raised on all: as BadInput on rank 0, as Elsewhere on the others.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    sizes = shares(n, world_size)
    first, complaint, part = sum(sizes[:rank]), None, None
    try:
        part = represent(np.arange(first, first + sizes[rank])) if sizes[rank] else None
    except BadInput as error:
        complaint = (error.found, error.wanted, error.do)
    except OSError as error:
        complaint = (str(error), "a store that can be read", "check its disk, its permissions, or its network")
    complaints: list[Any] = [None] * world_size
    dist.all_gather_object(complaints, complaint)
    for found, wanted, do in filter(None, complaints):
        raise (Elsewhere if rank else BadInput)(found, wanted=wanted, do=do)
    gathered: list[Any] | None = None if rank else [None] * world_size
    dist.gather_object(part, gathered)
    there = [part for part in gathered or [] if part is not None]  # more ranks than scans: some have none
    h = np.concatenate([np.empty((0, 0), np.float32)] if not there else [h for h, _ in there])
    zs = [z for _, z in there if z is not None]
    return h, np.concatenate(zs) if zs else None


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 done, 2 bad input; the same on every rank."""
    parser = argparse.ArgumentParser(prog="python -m cauc_dist.embed", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--store")
    parser.add_argument("--device", choices=get_args(Device), default="auto")
    options = parser.parse_args(arguments)
    world, code = World.from_env(), 1
    try:
        code = _main(options.source, options.out, options.store, options.device, world)
    finally:
        world.end(code)
    return code


def _main(source: Path, out: Path, store: str | None, device: Device, world: World) -> int:
    try:
        refuse_existing(out)
        opened = open_source(source, store, world, device)
        with world.process_group(opened.device):
            h, z = over_ranks(opened.represent, len(opened.store))
        if world.rank == 0:
            opened.embeddings(h, z).save(out)
            _say(f"wrote {out}: {len(h)} scans, h of {h.shape[1]} numbers")
    except Elsewhere:
        return BAD_INPUT
    except (BadInput, OSError) as error:
        _say(f"error: {error}")
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(main())
