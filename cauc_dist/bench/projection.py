"""From a measured step to one on W ranks: arithmetic, what a network moves, samples a second, and what a run costs.

W ranks, n subjects a step over all of them, b = n / W on each (rounded up), k ranks a node, G bytes of a gradient.

    step = fixed + each b + pair b n + communication
    communication = bytes / bandwidth + messages latency

A rank sends 2 (W - 1) / W G to reduce a gradient in a ring, half of that again at ZeRO 1 to 3 (updated weights are
gathered), and (W - 1) / W n times the bytes of a subject's z. Nothing overlaps; all nodes are alike; a ring through
ranks in order crosses each node's way out once, so that W <= k ranks have the inner link and all others the network.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Link:
    """One way out of a rank: bytes a second, and seconds that a message takes however small it is."""

    bandwidth: float = math.inf
    latency: float = 0.0


@dataclass(frozen=True)
class Site:
    """The machine that is projected to."""

    gbits: float | None = None
    """Gbit/s of a node's way to the others, one direction; default: what an all-reduce gives on this machine."""
    latency_us: float | None = None
    """Microseconds of a message between nodes (some 5 with InfiniBand, 30 with Ethernet); default: as here."""
    ranks_per_node: int = 1
    price: float = 0.0
    """Of an hour of one rank, in any currency; 0: no cost is shown."""


def hops(world: int, ring: bool) -> int:
    """Messages of a collective that wait for each other, one way."""
    return world - 1 if ring else math.ceil(math.log2(world))


@dataclass(frozen=True)
class Model:
    """What a step is made of. Seconds, bytes."""

    fixed: float
    """Whatever the batch."""
    each: float
    """A subject of the rank's share: read, augmented, encoded, both ways."""
    pair: float
    """A pair of subjects in the loss."""
    gradient_bytes: float
    """G."""
    z_bytes: float
    """Of a subject."""
    zero_stage: int
    small: int
    """Collectives a step that send next to nothing: norms that are synchronised, and what ranks tell each other."""
    ring: bool
    """gloo: a collective is W - 1 messages one after the other (twice that to reduce); NCCL: log2 W."""
    inner: Link
    """Between ranks of a node."""
    network: Link
    ranks_per_node: int = 1

    def traffic(self, world: int, batch: int) -> float:
        """Bytes that each rank sends in a step."""
        gradients = (2 if self.zero_stage == 0 else 3) * self.gradient_bytes
        return (world - 1) / world * (gradients + batch * self.z_bytes)

    def messages(self, world: int) -> int:
        """Messages of a step that wait for each other."""
        collectives = 2 * self.small + (2 if self.zero_stage == 0 else 3) + 1  # z's
        return hops(world, self.ring) * collectives

    def link(self, world: int) -> Link:
        """What W ranks meet by: beyond a node, the slower of both."""
        if world <= self.ranks_per_node:
            return self.inner
        if self.ranks_per_node == 1:
            return self.network
        bandwidth = min(self.inner.bandwidth, self.network.bandwidth)
        return Link(bandwidth, max(self.inner.latency, self.network.latency))

    def communication(self, world: int, batch: int) -> float:
        """Seconds of a step."""
        if world == 1:
            return 0.0
        link = self.link(world)
        return self.traffic(world, batch) / link.bandwidth + self.messages(world) * link.latency

    def compute(self, world: int, batch: int) -> float:
        """Seconds of a step of the rank with the largest share."""
        share = -(-batch // world)
        return self.fixed + self.each * share + self.pair * share * batch


@dataclass(frozen=True)
class Row:
    """A projection, no measurement."""

    world: int
    batch: int
    share: int
    compute_s: float
    communication_s: float
    step_s: float
    samples_per_s: float
    efficiency: float
    """Samples a second, over W times those of one rank: with the same share, or as `project` was told."""
    sent_bytes: float
    """A rank and step."""
    hours: float
    """Of the whole run: as many subjects as its epochs see."""
    cost: float
    """hours x W x the price of a rank-hour."""


def project(model: Model, world: int, batch: int, seen: int = 0, price: float = 0.0, alone: int | None = None) -> Row:
    """What a step of `batch` subjects on `world` ranks takes.

    `seen`: subjects of the whole run. `alone`: the batch of the one rank that it is compared with; default: the share.
    """
    share = -(-batch // world)
    compute, communication = model.compute(world, batch), model.communication(world, batch)
    step = compute + communication
    rate, one = batch / step, alone or share
    hours = seen / rate / 3600
    return Row(
        world=world,
        batch=batch,
        share=share,
        compute_s=compute,
        communication_s=communication,
        step_s=step,
        samples_per_s=rate,
        efficiency=rate * model.compute(1, one) / (world * one),
        sent_bytes=model.traffic(world, batch),
        hours=hours,
        cost=hours * world * price,
    )


@dataclass(frozen=True)
class Point:
    """A measured step: its seconds, median."""

    world: int
    batch: int
    seconds: float


def fit(model: Model, points: Sequence[Point]) -> Model:
    """The model with `fixed` and `each` of least relative squares, none negative; the rest stays as it is."""
    import numpy as np  # `cauc --help` reads this file

    shares = np.array([-(-point.batch // point.world) for point in points], np.float64)
    seconds = np.array([point.seconds for point in points])
    known = np.array([p.seconds - model.communication(p.world, p.batch) - _pairs(model, p) for p in points], np.float64)
    table = np.stack([np.ones_like(shares), shares], 1) / seconds[:, None]
    (fixed, each), *_ = np.linalg.lstsq(table, known / seconds, rcond=None)
    if len(set(shares)) < 2 or fixed < 0:
        fixed, each = 0.0, float(table[:, 1] @ (known / seconds) / (table[:, 1] @ table[:, 1]))
    elif each < 0:
        fixed, each = float(table[:, 0] @ (known / seconds) / (table[:, 0] @ table[:, 0])), 0.0
    return replace(model, fixed=max(0.0, float(fixed)), each=max(0.0, float(each)))


def _pairs(model: Model, point: Point) -> float:
    return model.pair * -(-point.batch // point.world) * point.batch


def error(model: Model, point: Point) -> float:
    """What the model says of a measured step, over what was measured, less 1."""
    return project(model, point.world, point.batch).step_s / point.seconds - 1
