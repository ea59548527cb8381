"""A projection holds where it can be tried: on two hosts whose link is limited; and its tables follow from its rows."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from cauc_dist import config, recipes
from cauc_dist.bench import scale, step
from cauc_dist.bench.clock import PARTS
from cauc_dist.bench.projection import Link, Model, Point, Site, error, project
from cauc_dist.bench.rank import Measured
from cauc_dist.config import RunConfig
from cauc_dist.errors import BadInput

FEATURES, N = 24, 16
MBIT = 1e6 / 8


@pytest.fixture(scope="module")
def run(table: Path) -> RunConfig:
    """A wide MLP for a table of 40 subjects: little arithmetic, 2 MB of gradient."""
    run = recipes.get("demo_cauc")
    return replace(
        run,
        name="table",
        batch_size=N,
        data=config.Data(store=str(table), folds=1, normalise="dataset", threads=1),
        augment=config.Augment(p_intensity=0.0, p_blur=0.0),
        encoder=config.Encoder(name="mlp", width=384),
        engine=replace(run.engine, device="cpu"),
    )


# ---- two hosts --------------------------------------------------------------------------------------------------

Act = Callable[..., subprocess.CompletedProcess[str]]


def act(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)


@contextmanager
def two_hosts(rate: str) -> Iterator[list[int]]:
    """Processes in two network namespaces whose one link is limited, each way; ranks enter them by `nsenter`."""
    if os.geteuid() or not all(map(shutil.which, ("unshare", "nsenter", "ip", "tc"))):
        pytest.skip("needs root, iproute2 and util-linux: a link is limited by the kernel")
    holders = [subprocess.Popen(["unshare", "-n", "sh", "-c", "echo; exec sleep 300"], stdout=-1) for _ in range(2)]
    try:
        pids = [holder.pid for holder in holders]
        for holder in holders:
            assert holder.stdout is not None
            if not holder.stdout.readline():
                pytest.skip("no network namespaces here")
        link = ["ip", "link", "add", "e0", "netns", str(pids[0]), "type", "veth", "peer", "name", "e1"]
        act(*link, "netns", str(pids[1]))
        for k, pid in enumerate(pids):
            inside = ["nsenter", "-t", str(pid), "-n"]
            act(*inside, "ip", "addr", "add", f"10.78.0.{k + 1}/24", "dev", f"e{k}")
            act(*inside, "ip", "link", "set", f"e{k}", "up")
            act(*inside, "ip", "link", "set", "lo", "up")
            bucket = ["root", "tbf", "rate", rate, "burst", "32kb", "latency", "100ms"]
            act(*inside, "tc", "qdisc", "add", "dev", f"e{k}", *bucket)
        yield pids
    finally:
        for holder in holders:
            holder.kill()
            holder.communicate()


def on_hosts(pids: list[int], run: RunConfig, folder: Path) -> Measured:
    """A step on one rank a host."""
    step.ask(folder, run, [run.batch_size], 3, 1)
    command = [sys.executable, "-m", "cauc_dist.bench.rank", str(folder)]
    ranks = []
    for rank, pid in enumerate(pids):
        place = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
        meet = {"MASTER_ADDR": "10.78.0.1", "MASTER_PORT": "29517"}
        env = {k: v for k, v in os.environ.items() if k != "GLOO_SOCKET_IFNAME"} | place | meet
        inside = ["nsenter", "-t", str(pid), "-n", *command]
        ranks.append(subprocess.Popen(inside, env=env, stderr=subprocess.PIPE, text=True))
    told = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], told
    (found,) = step.answer(folder)
    return found


@pytest.mark.alone
def test_a_projection_from_one_rank_holds_on_two_hosts_with_a_limited_link(run: RunConfig, tmp_path: Path) -> None:
    """Told the rate of the link, and measured where there is none."""
    alone = step.on_ranks(run, 1, [N, N // 2], 4, 1)
    site = Site(gbits=0.01, latency_us=100)
    found = scale.scaled(run, alone, 0.0, site, 40)
    with two_hosts("10mbit") as pids:
        real = on_hosts(pids, run, tmp_path)
    row = project(found.model, 2, N)
    assert real.ranks == 2
    assert row.communication_s > 0.7 * row.step_s  # what is claimed is about the link
    assert error(found.model, Point(2, N, min(real.step_s))) == pytest.approx(0, abs=0.25)  # others' work only adds
    assert real.link.bandwidth == pytest.approx(10 * MBIT, rel=0.15)  # an all-reduce finds the rate, less headers
    assert real.sent_bytes is not None
    assert 1 < real.sent_bytes / row.sent_bytes < 1.1  # headers and acknowledgements beside them


# ---- on this machine --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scaled(run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[scale.Scaled, list[str], Path]:
    said: list[str] = []
    out = tmp_path_factory.mktemp("out") / "scale.json"
    site = Site(ranks_per_node=4, price=2.0)
    return scale.scale(run, ranks=(1, 2), site=site, quick=True, out=out, say=said.append), said, out


def test_it_measures_two_shares_on_each_number_of_ranks(scaled: tuple[scale.Scaled, list[str], Path]) -> None:
    found, _, out = scaled
    assert [(m.ranks, m.batch) for m in found.measured] == [(1, N), (1, N // 2), (2, N), (2, N // 2)]
    assert len(found.errors) == 4
    assert found.held_out is not None
    assert found.model.inner == found.model.network == found.measured[-1].link
    record = json.loads(out.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert len(record["found"]["measured"]) == 4
    assert record["found"]["measured"][0]["link"]["bandwidth"] is None


def test_both_projections_are_rows_of_the_model_and_say_that_they_are_none_measured(
    scaled: tuple[scale.Scaled, list[str], Path], run: RunConfig
) -> None:
    found, said, _ = scaled
    assert [row.world for row in found.weak] == [2**k for k in range(11)]
    assert {row.batch // row.world for row in found.weak} == {N // 2}
    assert [row.world for row in found.strong] == [1, 2, 4, 8, 16]
    assert {row.batch for row in found.strong} == {N}
    assert found.weak[3] == project(found.model, 8, 8 * N // 2, 40 * run.epochs, 2.0)
    assert sum(line.startswith("PROJECTION, no measurement") for line in said) == 2
    assert any("measured between ranks of THIS machine" in line for line in said)
    assert sum("more than the store's scans" in line for line in said) == sum(row.batch > 40 for row in found.weak)
    assert said[-1].startswith("What will limit this run, by projection: ")


# ---- from numbers alone -----------------------------------------------------------------------------------------


def measured(ranks: int, batch: int, seconds: float) -> Measured:
    return Measured(
        run="made",
        ranks=ranks,
        batch=batch,
        share=batch // ranks,
        chunks=1,
        device="cpu",
        precision="fp32",
        zero_stage=1,
        step_s=(seconds,),
        seconds=dict.fromkeys(PARTS, 0.0),
        parameters=10**6,
        gradient_bytes=4 * 10**6,
        z_bytes=1024,
        flop=1.0,
        gemm=1.0,
        peak_bytes=1,
        small=3,
        link=Link(1e9, 1e-5) if ranks > 1 else Link(),
        sent_bytes=None,
    )


def test_what_was_measured_is_of_one_machine_and_what_is_projected_of_the_site(run: RunConfig) -> None:
    """The fit takes the inner link for all that was measured, however few ranks a node of the site has."""
    true = Model(0.01, 0.02, 0.0, 4e6, 1024, 1, 3, True, Link(1e9, 1e-5), Link(1e6, 0.0), ranks_per_node=2)
    points = [measured(w, n, project(true, w, n).step_s) for w in (1, 2) for n in (16, 8)]
    found = scale.scaled(run, points, 0.0, Site(gbits=8e-3, latency_us=0.0), 40)
    assert found.held_out == pytest.approx(0, abs=1e-9)
    assert (found.model.fixed, found.model.each) == (pytest.approx(0.01), pytest.approx(0.02))
    assert found.weak[1].communication_s == pytest.approx(found.model.traffic(2, 16) / 1e6)  # the site's link alone
    assert found.told


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"network": Link(1e5, 0.0)}, "is sending gradients and embeddings"),
        ({"network": Link(1e12, 1.0)}, "is waiting for small messages"),
        ({"pair": 1.0}, "is the loss, whose pairs grow"),
        ({"each": 10.0}, "is its own subjects"),
    ],
)
def test_the_largest_part_at_1024_ranks_is_what_will_limit(
    scaled: tuple[scale.Scaled, list[str], Path], change: dict[str, object], says: str
) -> None:
    found = replace(scaled[0], model=replace(scaled[0].model, ranks_per_node=1, **change))  # type: ignore[arg-type]
    assert says in scale.limits(found)


def test_cost_is_shown_where_a_price_is_given(scaled: tuple[scale.Scaled, list[str], Path]) -> None:
    assert any("cost" in line for line in scale.table(scaled[0], Site(price=2.0)))
    assert not any("cost" in line for line in scale.table(scaled[0], Site()))


@pytest.mark.parametrize(
    ("worlds", "site", "says"),
    [
        ([0, 1], Site(), r"--ranks 0; wanted 1 or more"),
        ([2], Site(gbits=0.0), r"--gbits 0; wanted above 0"),
        ([2], Site(gbits=float("nan")), r"--gbits nan; wanted above 0"),
        ([2], Site(latency_us=-1.0), r"--latency-us -1; wanted 0 or more"),
        ([2], Site(ranks_per_node=0), r"--ranks-per-node 0; wanted 1 or more"),
        ([2], Site(price=-2.0), r"--price -2; wanted 0 or more"),
        ([2], Site(price=float("inf")), r"--price inf; wanted 0 or more"),
        ([1], Site(gbits=10.0), r"one rank, which has nobody to send to, .* wanted --gbits and --latency-us"),
        ([32], Site(), r"32 ranks for batch_size 16; wanted a subject a rank"),
    ],
)
def test_what_cannot_be_measured_or_projected_is_refused(
    run: RunConfig, worlds: list[int], site: Site, says: str
) -> None:
    with pytest.raises(BadInput, match=says):
        scale.scale(run, ranks=worlds, site=site, quick=True, out=None, say=print)


def test_half_a_batch_is_measured_where_it_is_one() -> None:
    assert [scale.batches(n, w) for n, w in ((32, 2), (4, 2), (3, 1), (7, 4))] == [[32, 16], [4, 2], [3], [7]]


def test_ranks_that_this_machine_has_are_chosen(run: RunConfig) -> None:
    chosen = scale.local(run)
    assert chosen[:2] == [1, 2]
    assert max(chosen) <= max(2, len(os.sched_getaffinity(0)))
    assert scale.local(replace(run, batch_size=1)) == [1]
