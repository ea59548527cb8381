"""What more ranks would give: a step measured on the ranks of this machine, and a projection to W = 1 ... 1,024.

W ranks, n subjects a step, b a rank. The model (cauc_dist.bench.projection) is fitted to steps of the recipe's batch
and of half of it, on each number of ranks; its error on each of them is printed, and on the largest number of ranks
when that is left out of the fit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cauc_dist import prepare
from cauc_dist.bench.pairs import measured as losses
from cauc_dist.bench.projection import Link, Model, Point, Row, Site, error, fit, project
from cauc_dist.bench.rank import Measured
from cauc_dist.bench.record import keep
from cauc_dist.bench.step import on_ranks, threads_of, without_folder
from cauc_dist.config import RunConfig
from cauc_dist.errors import BadInput
from cauc_dist.store.reader import Store
from cauc_dist.world import World, cores

Say = Callable[[str], None]
WORLDS = tuple(2**k for k in range(11))
HERE = Site()
"""Nodes of one rank, whose network is what an all-reduce finds between the ranks of this machine."""
GOOD = 0.8
"""Efficiency down to which more ranks are called worth it."""


@dataclass(frozen=True)
class Scaled:
    run: str
    scans: int
    """To train on."""
    measured: tuple[Measured, ...]
    model: Model
    errors: tuple[float, ...]
    """Projected over measured step less 1, of each measured."""
    held_out: float | None
    """The largest of those on most ranks, by the model fitted without them; None where ranks are of one number."""
    told: bool
    """The network was given, not measured between ranks of this machine."""
    weak: tuple[Row, ...]
    """The share of a rank stays: n grows with W."""
    strong: tuple[Row, ...]
    """The recipe's batch stays: W up to n."""


def scale(
    run: RunConfig, *, ranks: Sequence[int] = (), site: Site = HERE, quick: bool, out: Path | None, say: Say
) -> Scaled:
    """Measure on local ranks, fit, project, say both tables; the last line says what will limit the run."""
    run = without_folder(run)
    worlds = sorted(set(ranks)) or local(run)
    check(run, worlds, site)
    store = prepare.check(run, max(worlds))
    points: list[Measured] = []
    for world in worlds:  # a rank has the same cores in all of them
        points += on_ranks(run, world, batches(run.batch_size, world), 4 if quick else 15, threads_of(run, worlds[-1]))
        say(f"measured on {world} rank{'s' * (world > 1)}: {_told(points, world)}")
    pair = pair_s(run, store, quick, threads_of(run, worlds[-1]))
    found = scaled(run, points, pair, site, len(prepare.plan_of(run, store).rows))
    for line in table(found, site):
        say(line)
    verdict = limits(found)
    say(verdict)
    keep(found, verdict, out)
    return found


def local(run: RunConfig) -> list[int]:
    """1, 2 and 4 ranks as far as this machine has cores or GPUs for them; 2 on CPUs at least, to have a link."""
    on_gpu = World().device(run.engine.device).type == "cuda"
    most = torch.cuda.device_count() if on_gpu else max(2, cores())
    return [world for world in (1, 2, 4) if world <= min(most, run.batch_size)]


def check(run: RunConfig, worlds: Sequence[int], site: Site) -> None:
    """BadInput for what cannot be measured or projected."""
    if min(worlds) < 1:
        raise BadInput(f"--ranks {min(worlds)}", wanted="1 or more", do="e.g. --ranks 1 2")
    if site.gbits is not None and not site.gbits > 0:
        raise BadInput(f"--gbits {site.gbits:g}", wanted="above 0", do="e.g. --gbits 25")
    if site.latency_us is not None and not site.latency_us >= 0:
        raise BadInput(f"--latency-us {site.latency_us:g}", wanted="0 or more", do="e.g. --latency-us 20")
    if site.ranks_per_node < 1:
        raise BadInput(f"--ranks-per-node {site.ranks_per_node}", wanted="1 or more", do="e.g. --ranks-per-node 4")
    if not 0 <= site.price < float("inf"):
        raise BadInput(f"--price {site.price:g}", wanted="0 or more", do="give that of one rank's hour")
    if max(worlds) == 1 and (site.gbits is None or site.latency_us is None):
        raise BadInput(
            "one rank, which has nobody to send to, and a network that is not told",
            wanted="--gbits and --latency-us, or two ranks to measure between",
            do="e.g. --gbits 25 --latency-us 20",
        )
    if max(worlds) > run.batch_size:
        found = f"{max(worlds)} ranks for batch_size {run.batch_size}"
        raise BadInput(found, wanted="a subject a rank", do="measure on fewer ranks, or raise --batch-size")


def batches(n: int, world: int) -> list[int]:
    """The recipe's batch, and half of it where that is a batch: two shares tell a subject's time from a step's own."""
    half = n // 2
    return [n, half] if half >= max(2, world) else [n]


def pair_s(run: RunConfig, store: Store, quick: bool, threads: int) -> float:
    """Seconds of a pair of subjects in the loss, from batches far larger than the recipe's, if that is small."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)  # as many as a rank has
    try:
        found = losses(run, store, sorted({run.batch_size, max(512, run.batch_size), 2048}), 0.3 if quick else 1.0)
    finally:
        torch.set_num_threads(before)
    return found.pair_s


def scaled(run: RunConfig, points: Sequence[Measured], pair: float, site: Site, scans: int) -> Scaled:
    """The model of what was measured, its errors, and both projections; `scans` to train on."""
    most = points[-1].ranks
    inner = points[-1].link
    network = Link(
        inner.bandwidth if site.gbits is None else site.gbits * 1e9 / 8,
        inner.latency if site.latency_us is None else site.latency_us / 1e6,
    )
    first = points[0]
    model = Model(
        fixed=0.0,
        each=0.0,
        pair=pair,
        gradient_bytes=first.gradient_bytes,
        z_bytes=first.z_bytes,
        zero_stage=run.engine.zero_stage,
        small=points[-1].small,
        ring=first.device == "cpu",
        inner=inner if most > 1 else network,
        network=network,
        ranks_per_node=site.ranks_per_node,
    )
    here = replace(model, ranks_per_node=most)  # what was measured ran on one machine
    few = [point for point in points if point.ranks < most]
    held = [error(fit(here, _points(few)), point) for point in _points(points) if point.world == most] if few else []
    fitted = fit(here, _points(points))
    model = replace(model, fixed=fitted.fixed, each=fitted.each)
    if not (model.fixed or model.each or model.pair):
        raise BadInput(
            "communication alone is longer than the measured steps",
            wanted="steps with work in them",
            do="measure on one rank too, on a quiet machine",
        )
    share, seen = -(-run.batch_size // most), run.epochs * scans
    return Scaled(
        run=run.name,
        scans=scans,
        measured=tuple(points),
        model=model,
        errors=tuple(error(fitted, point) for point in _points(points)),
        held_out=max(held, key=abs) if held else None,
        told=site.gbits is not None and site.latency_us is not None,
        weak=tuple(project(model, world, share * world, seen, site.price) for world in WORLDS),
        strong=tuple(
            project(model, world, run.batch_size, seen, site.price, run.batch_size)
            for world in WORLDS
            if world <= run.batch_size
        ),
    )


def _points(measured: Sequence[Measured]) -> list[Point]:
    return [Point(one.ranks, one.batch, one.median_s) for one in measured]


def _told(points: Sequence[Measured], world: int) -> str:
    return ", ".join(f"{p.batch} subjects in {p.median_s:.3g} s" for p in points if p.ranks == world)


def table(found: Scaled, site: Site) -> list[str]:
    """Measured beside the model, then the projections."""
    lines = [f"  {'measured':<12}{'ranks':>6}{'batch':>8}{'step, s':>10}{'model, s':>10}{'error':>8}"]
    for one, off in zip(found.measured, found.errors, strict=True):
        seconds = one.median_s
        lines.append(f"  {'':<12}{one.ranks:>6}{one.batch:>8}{seconds:>10.4f}{seconds * (1 + off):>10.4f}{off:>+8.0%}")
    if found.held_out is not None:
        most = found.measured[-1].ranks
        lines.append(f"  fitted without the steps on {most} ranks, it is off by {found.held_out:+.0%} there")
    link, how = found.model.network, "as told" if found.told else "measured between ranks of THIS machine"
    lines.append(f"  network: {8e-9 * link.bandwidth:.3g} Gbit/s, {1e6 * link.latency:.3g} us a message, {how}")
    for name, rows in ((f"share of {found.weak[0].share} a rank stays", found.weak), ("batch stays", found.strong)):
        lines += [f"PROJECTION, no measurement: {name}", _head(site), *(_line(row, site, found.scans) for row in rows)]
    return lines


def _head(site: Site) -> str:
    head = f"  {'ranks':>6}{'batch':>8}{'step, s':>10}{'communication':>15}{'subjects/s':>12}{'efficiency':>12}"
    return head + f"{'hours':>9}" + (f"{'cost':>10}" if site.price else "")


def _line(row: Row, site: Site, scans: int) -> str:
    moved, hours = row.communication_s / row.step_s, f"{row.hours:.3g}" if row.hours >= 0.01 else "< .01"
    numbers = f"  {row.world:>6,}{row.batch:>8,}{row.step_s:>10.4f}{moved:>15.0%}{row.samples_per_s:>12,.0f}"
    cost = f"{row.cost:>10,.2f}" if site.price else ""
    beyond = "  more than the store's scans" if row.batch > scans else ""
    return f"{numbers}{row.efficiency:>12.0%}{hours:>9}{cost}{beyond}"


def limits(found: Scaled) -> str:
    """What will limit the run on more ranks and what to change, in plain words."""
    worth = [row.world for row in found.weak if row.efficiency >= GOOD]
    far, kept = found.weak[-1], [row.world for row in found.strong if row.efficiency >= GOOD]
    text = (
        f"What will limit this run, by projection: with the same share a rank, up to {max(worth):,} ranks keep "
        f"{GOOD:.0%} of their speed; with the recipe's batch, up to {max(kept):,}. "
    )
    model = found.model
    link = model.link(far.world)
    parts = {
        "bytes": model.traffic(far.world, far.batch) / link.bandwidth,
        "messages": model.messages(far.world) * link.latency,
        "pairs": model.pair * far.share * far.batch,
        "subjects": model.fixed + model.each * far.share,
    }
    most = max(parts, key=lambda part: parts[part])
    return f"{text}{_trust(found)}At {far.world:,} ranks most of a step is {ADVICE[most]}"


def _trust(found: Scaled) -> str:
    """What the model was worth where it could be tried."""
    if found.held_out is None:
        return ""
    ranks, how = found.measured[-1].ranks, "faster" if found.held_out > 0 else "slower"
    return f"Steps on {ranks} ranks here are {how} than steps on fewer let expect, by {abs(found.held_out):.0%}. "


ADVICE = {
    "bytes": "sending gradients and embeddings: more subjects a rank, a faster network, --engine.zero-stage 0 (a third "
    "fewer bytes) and --engine.wire fp16 help, in this order.",
    "messages": "waiting for small messages: fewer, larger ranks, a network of lower latency, and an encoder without "
    "synchronised norms (--encoder.norm group) help.",
    "pairs": "the loss, whose pairs grow with the batch: a smaller share a rank keeps it in bounds, and a batch this "
    "large may teach nothing more.",
    "subjects": "its own subjects: more ranks pay, as far as the batch may grow.",
}
