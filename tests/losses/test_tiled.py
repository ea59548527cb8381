"""The tiled engine against plain dense autograd in float64: every objective and option, ragged tiles, fp32, memory."""

import math
import subprocess
import sys
from collections.abc import Callable
from itertools import product as combinations
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from cauc_dist import losses
from cauc_dist.kernels import Kernel, cauchy, delta, gaussian, mean, product
from cauc_dist.losses import loss_and_grad, similar, tiled
from cauc_dist.losses.batch import Batch
from tests import oracles
from tests.losses import dense_oracle as dense
from tests.losses.cases import grad, tangent

F64 = torch.float64
N, ROWS = 23, 7  # tiles of 7, 3 or 2 subjects: the last one is ragged whatever the number of views


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiled.ROWS, "cpu", ROWS)
    monkeypatch.setattr(similar, "SMALL", 0)


# ---- tiles = dense ----------------------------------------------------------------------------------------------


class Data(NamedTuple):
    z: Tensor
    y: Tensor
    kernel: Kernel
    labels: Tensor


def metadata(n: int, hidden: float) -> tuple[Tensor, Tensor]:
    """y (n, 3): an age with decimals, a sex, a site; and a training set to fit kernels on."""
    age = 20 + 15 * torch.rand(n, 1, generator=torch.Generator().manual_seed(5), dtype=F64)
    y = torch.cat([age, oracles.cohort(n, seed=2)[:, 1:], torch.arange(n, dtype=F64)[:, None] % 3], 1)
    lost = torch.rand(n, 3, generator=torch.Generator().manual_seed(6)) < hidden
    return y.masked_fill(lost, math.nan), torch.cat([oracles.cohort(11, seed=1), torch.arange(11.0)[:, None] % 3], 1)


def columns(policy: Any) -> dict[str, Kernel]:
    return {"age": gaussian(4.0, policy), "sex": delta(policy), "site": cauchy(0.5, policy)}


def data(case: str, views: int) -> Data:
    n = 48 if case == "few-values" else N
    combine, _, policy = case.partition(" ")
    y, train = metadata(n, 0.25 if policy else 0.0)
    made = columns(policy or "marginal")
    kernel = (mean([1.0, 0.5, 2.0], **made) if combine == "mean" else product(**made)).fit(train)
    if case == "constant":
        y = y[:1].expand(n, 3)
    if case == "few-values":
        y = torch.stack([20 + y[:, 2] * 3, y[:, 1], torch.zeros(n, dtype=F64)], 1)
    if case == "rows-alone":  # four like nobody: no positive with one view; the rest of a label alike: nobody to repel
        y, kernel = torch.arange(n, dtype=F64)[:, None].clamp(max=4), delta()
    labels = torch.tensor([0.0, 1.0, 0.0, 2.0])[torch.arange(n) % 4]
    labels[3] = math.nan
    return Data(oracles.unit(views, n, 6, seed=3), y, kernel, labels)


CASES = [f"{combine} {policy}" for combine in ("product", "mean") for policy in ("marginal", "distinct", "ignore")]
CASES += ["complete", "constant", "few-values", "rows-alone"]

Options = dict[str, Any]
OPTIONS: list[tuple[str, Options]] = [
    *[("y_aware_infonce", {"tau": tau, "normalise": n}) for tau, n in combinations((0.1, 0.02), ("row", "column"))],
    *[
        ("conditional_alignment", {"alpha": alpha, "normalise": n})
        for alpha, n in combinations((1.0, 2.0, 3.0), ("row", "global"))
    ],
    *[
        ("conditional_uniformity", {"t": t, "normalise": n, "views": v, "within": within})
        for t, n, v, within in combinations((2.0, 30.0), ("row", "global"), ("within", "pooled"), (False, True))
    ],
    ("cauc", {}),
    ("cauc", {"t": 30.0, "alpha": 1.0, "normalise_align": "global", "normalise_unif": "row", "views": "pooled"}),
    ("cauc", {"lambda_align": 0.3, "lambda_unif": -2.0, "within": True}),
]
"""Objectives that read metadata; `within`: whether by labels."""


def name_of(option: tuple[str, Options]) -> str:
    return " ".join([option[0], *(f"{k}={v}" for k, v in option[1].items())])


def ours(name: str, options: Options, at: Data) -> Callable[[Tensor], Tensor]:
    given = options | ({"within": at.labels if options["within"] else None} if "within" in options else {})
    return lambda z: getattr(losses, name)(z, at.y, at.kernel, **given)


def theirs(name: str, options: Options, at: Data) -> Callable[[Tensor], Tensor]:
    w, c = at.kernel(at.y), at.kernel.complement(at.y)
    given = dict(options)
    within = at.labels if given.pop("within", False) else None
    match name:
        case "y_aware_infonce":
            return lambda z: dense.info_nce(z, w, **given)
        case "conditional_alignment":
            return lambda z: dense.conditional_alignment(z, w, **given)
        case "conditional_uniformity":
            return lambda z: dense.conditional_uniformity(z, c, within=within, **given)
    t, views = given.get("t", 2.0), given.get("views", "within")
    return lambda z: (
        given.get("lambda_align", t)
        * dense.conditional_alignment(z, w, given.get("alpha", 2.0), given.get("normalise_align", "row"))
        + given.get("lambda_unif", 1.0)
        * dense.conditional_uniformity(z, c, t, given.get("normalise_unif", "global"), views, within)
    )


def same(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], rel: float = 1e-12) -> None:
    """Value and gradient: relative to the value, and to the largest number of the gradient."""
    assert found[0].item() == pytest.approx(wanted[0].item(), rel=rel, abs=rel)
    assert float((found[1] - wanted[1]).abs().max()) <= rel * float(wanted[1].abs().max())


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("small_tiles")
def test_every_option_in_ragged_tiles_has_the_value_and_gradient_of_the_dense_form(case: str, views: int) -> None:
    at = data(case, views)
    for name, options in OPTIONS:
        wanted = grad(theirs(name, options, at), at.z)
        try:
            same(grad(ours(name, options, at), at.z), wanted)
        except AssertionError as wrong:
            raise AssertionError(name_of((name, options))) from wrong


@pytest.mark.parametrize("option", OPTIONS, ids=name_of)
def test_the_whole_matrix_of_weights_gives_the_same(option: tuple[str, Options]) -> None:
    at = data("mean ignore", 3)
    same(grad(ours(*option, at), at.z), grad(theirs(*option, at), at.z))


Loss = Callable[[Tensor], Tensor]
LABELS = torch.tensor([0, 1, 1, 2, 0, 5])[torch.arange(N) % 6]
SAME = (LABELS[:, None] == LABELS[None, :]).double()
METADATA = data("product marginal", 2)
W = METADATA.kernel(METADATA.y)
WITHOUT: dict[str, tuple[Loss, Loss]] = {
    "ntxent": (losses.ntxent, lambda z: dense.info_nce(z, torch.eye(N, dtype=F64), 0.1)),
    "ntxent, tau .02": (lambda z: losses.ntxent(z, 0.02), lambda z: dense.info_nce(z, torch.eye(N, dtype=F64), 0.02)),
    "supcon": (lambda z: losses.supcon(z, LABELS), lambda z: dense.info_nce(z, SAME, 0.1)),
    "uniformity": (losses.uniformity, dense.uniformity),
    "uniformity, t 30": (lambda z: losses.uniformity(z, 30.0), lambda z: dense.uniformity(z, 30.0)),
    "uniformity, pooled": (
        lambda z: losses.uniformity(z, 3.0, "pooled"),
        lambda z: dense.uniformity(z, 3.0, "pooled"),
    ),
    "align_uniform": (losses.align_uniform, lambda z: dense.view_alignment(z) + dense.uniformity(z)),
    "align_uniform, alpha 1": (
        lambda z: losses.align_uniform(z, 1.0, 3.0, 0.5, 2.0),
        lambda z: 0.5 * dense.view_alignment(z, 1.0) + 2 * dense.uniformity(z, 3.0),
    ),
    "align_uniform, alpha 3": (
        lambda z: losses.align_uniform(z, 3.0),
        lambda z: dense.view_alignment(z, 3.0) + dense.uniformity(z),
    ),
    "decoupled": (losses.decoupled_uniformity, dense.decoupled),
    "decoupled, t 30": (lambda z: losses.decoupled_uniformity(z, t=30.0), lambda z: dense.decoupled(z, 30.0)),
    "decoupled, kernel": (
        lambda z: losses.decoupled_uniformity(z, METADATA.y, METADATA.kernel, lam=0.1),
        lambda z: dense.decoupled(z, w=W, lam=0.1),
    ),
}


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("name", WITHOUT)
@pytest.mark.usefixtures("small_tiles")
def test_the_other_objectives_in_ragged_tiles_are_the_dense_ones(name: str, views: int) -> None:
    z = oracles.unit(views, N, 6, seed=3)
    found, wanted = (grad(loss, z) for loss in WITHOUT[name])
    same(found, wanted)


@pytest.mark.parametrize("views", [1, 2, 3])
def test_the_dense_form_equals_the_loop(views: int) -> None:
    z, y = oracles.unit(views, 7, 4), oracles.cohort(7, seed=3)
    kernel = mean(age=gaussian(4.0), sex=delta())
    w, c = kernel(y), kernel.complement(y)
    labels = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 2.0, 1.0])
    loop: list[list[float]] = w.tolist()
    for normalise in ("row", "column"):
        assert dense.info_nce(z, w, 0.2, normalise).item() == pytest.approx(
            oracles.y_aware(z, loop, 0.2, normalise == "column"), rel=1e-13
        )
    for alpha, normalise in combinations((1.0, 2.0, 3.0), ("row", "global")):
        assert dense.conditional_alignment(z, w, alpha, normalise).item() == pytest.approx(
            oracles.conditional_alignment(z, loop, alpha, normalise), rel=1e-13
        )
    for count in ("within", "pooled"):
        assert dense.uniformity(z, 3.0, count).item() == pytest.approx(oracles.uniformity(z, 3.0, count), rel=1e-12)
        for normalise in ("row", "global"):
            assert dense.conditional_uniformity(z, c, 3.0, normalise, count, labels).item() == pytest.approx(
                oracles.conditional_uniformity(z, loop, 3.0, normalise, count, labels.tolist()), rel=1e-12
            )
    assert dense.decoupled(z, 3.0).item() == pytest.approx(oracles.decoupled(z, 3.0), rel=1e-12)


# ---- fp32 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", OPTIONS, ids=name_of)
@pytest.mark.usefixtures("small_tiles")
def test_fp32_embeddings_with_float64_metadata_are_as_exact_as_fp32_can_be(option: tuple[str, Options]) -> None:
    """tau .02 and t 30 are beyond fp32 sums: those tiles are float64, and so is what comes of them, to rounding."""
    at = data("product marginal", 2)
    found = grad(ours(*option, at), at.z.float())
    assert found[0].dtype == found[1].dtype == torch.float32
    same((found[0], found[1].double()), grad(theirs(*option, at), at.z.float().double()), rel=3e-6)


def test_ages_far_from_zero_lose_nothing_in_fp32_tiles() -> None:
    """Days since 1900: a difference of 0.01 days is below the resolution of fp32 at 40,000, and half of sigma here."""
    day = 40_000 + 0.01 * torch.arange(N, dtype=F64)[:, None]
    z, kernel = oracles.unit(2, N, 6).float(), gaussian(0.02)
    wanted = grad(lambda z: dense.conditional_uniformity(z, kernel.complement(day)), z.double())
    found = grad(lambda z: losses.conditional_uniformity(z, day, kernel), z)
    same((found[0], found[1].double()), wanted, rel=3e-6)


LARGE = 1024
AGE = 6 + 80 * torch.rand(LARGE, 1, generator=torch.Generator().manual_seed(1), dtype=F64)
SEX = torch.randint(0, 2, (LARGE, 1), generator=torch.Generator().manual_seed(2)).double()
SITE = torch.randint(0, 9, (LARGE,), generator=torch.Generator().manual_seed(3)).double()
HIDDEN = torch.where(torch.rand(LARGE, 2, generator=torch.Generator().manual_seed(4)) < 0.2, math.nan, 0.0).double()


def large(case: str) -> tuple[Tensor, Kernel, type]:
    """Metadata of 1,024 subjects, and the way to W x that it is meant to take."""
    both = product(age=gaussian(5.0), sex=delta())
    match case:
        case "real ages":
            return torch.cat([AGE, SEX], 1), both, similar.Factored
        case "whole years":
            return AGE.round(), gaussian(5.0), similar.Factored
        case "ignored":
            return torch.cat([AGE, SEX], 1) + HIDDEN, product(**columns("ignore")).only([0, 1]), similar.Exact
    raise KeyError(case)


def at_size(name: str, y: Tensor, kernel: Kernel) -> tuple[Loss, Loss]:
    """The objective, and its dense form."""
    if name == "ntxent":
        return losses.ntxent, lambda z: dense.info_nce(z, torch.eye(LARGE, dtype=F64), 0.1)
    if name == "supcon":
        pairs = (SITE[:, None] == SITE[None, :]).double()
        return lambda z: losses.supcon(z, SITE), lambda z: dense.info_nce(z, pairs, 0.1)
    w, c = kernel(y), kernel.complement(y)
    if name == "y_aware":
        return lambda z: losses.y_aware_infonce(z, y, kernel), lambda z: dense.info_nce(z, w, 0.1)
    views: Any = "pooled" if name == "cauc pooled" else "within"
    return lambda z: losses.cauc(
        z, y, kernel, views=views
    ), lambda z: 2 * dense.conditional_alignment(z, w) + dense.conditional_uniformity(z, c, views=views)


@pytest.mark.parametrize(
    ("name", "case"),
    [
        *combinations(("cauc", "cauc pooled", "y_aware"), ("real ages", "whole years", "ignored")),
        ("ntxent", "real ages"),
        ("supcon", "real ages"),
    ],
)
def test_fp32_gradient_of_2048_embeddings_is_within_3e_6_of_dense_float64(name: str, case: str) -> None:
    y, kernel, way = large(case)
    z = oracles.unit(2, LARGE, 128).float()
    assert isinstance(similar.similar(tiled.Weights(kernel, y, z.dtype), y, Batch(z)), way)
    loss, exact = at_size(name, y, kernel)
    found = grad(loss, z)
    same((found[0], found[1].double()), grad(exact, z.double()), rel=3e-6)


@pytest.mark.parametrize("name", ["cauc", "y_aware"])
def test_the_low_rank_form_is_what_makes_the_difference_to_exact_tiles_and_it_is_below_rounding(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    y, kernel, _ = large("real ages")
    z = oracles.unit(2, LARGE, 32).float()
    loss, _ = at_size(name, y, kernel)
    found = grad(loss, z)
    monkeypatch.setattr(similar, "low_rank", lambda *_: None)
    exact = grad(loss, z)
    assert not torch.equal(found[1], exact[1])
    same(found, exact, rel=2e-6)


# ---- value and gradient alone -----------------------------------------------------------------------------------


@pytest.mark.parametrize("option", OPTIONS, ids=name_of)
@pytest.mark.usefixtures("small_tiles")
def test_loss_and_grad_is_the_value_and_the_tangent_gradient(option: tuple[str, Options]) -> None:
    at = data("product marginal", 2)
    loss = ours(*option, at)
    value, gradient = grad(loss, at.z)
    found = loss_and_grad(loss, at.z)
    assert torch.equal(found[0], value)
    torch.testing.assert_close(found[1], tangent(gradient, at.z), rtol=0, atol=1e-14 * float(1 + gradient.abs().max()))
    assert float((found[1] * at.z).sum(-1).abs().max()) < 1e-13 * float(1 + gradient.abs().max())
    assert (found[1] - gradient).abs().max() > 1e-6  # there was something to take away


def test_loss_and_grad_keeps_no_graph_and_leaves_z_as_it_was() -> None:
    at = data("complete", 2)
    leaf = at.z.clone().requires_grad_()
    for z in (leaf, leaf * 1.0):
        value, gradient = loss_and_grad(ours("cauc", {}, at), z)
        assert not value.requires_grad
        assert value.grad_fn is None
        assert not gradient.requires_grad
    assert leaf.grad is None
    with torch.no_grad():
        again = loss_and_grad(ours("cauc", {}, at), at.z)
    assert torch.equal(again[0], value)
    assert torch.equal(again[1], gradient)


def test_gradient_is_that_of_the_upstream_factor_each_time_it_is_asked_for() -> None:
    at = data("complete", 2)
    z = at.z.requires_grad_()
    value = ours("cauc", {}, at)(z)
    (once,) = torch.autograd.grad(value, z, retain_graph=True)
    (scaled,) = torch.autograd.grad(-3 * value, z)
    assert torch.equal(scaled, -3 * once)


def test_a_second_derivative_is_refused_and_not_silently_wrong() -> None:
    raw = (2 * oracles.unit(2, N, 6)).requires_grad_()
    value = losses.uniformity(torch.nn.functional.normalize(raw, dim=-1))
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(value, raw, create_graph=True)


def test_value_without_a_gradient_is_the_same_value() -> None:
    for case, views in (("complete", 2), ("product marginal", 3)):
        at = data(case, views)
        for name, options in OPTIONS:
            with torch.no_grad():
                value = ours(name, options, at)(at.z)
            assert value.item() == pytest.approx(grad(ours(name, options, at), at.z)[0].item(), rel=1e-13, abs=1e-15)


@pytest.mark.parametrize("with_kernel", [False, True])
@pytest.mark.parametrize("views", [1, 2])
def test_geometry_is_each_loss_on_its_own_without_gradient(views: int, with_kernel: bool) -> None:
    at = data("complete", views)
    z = at.z.requires_grad_()
    wanted = {"uniformity": losses.uniformity(z, 3.0)}
    if views > 1:
        wanted["alignment"] = losses.align_uniform(z, 1.0, lambda_unif=0.0)
    if with_kernel:
        wanted["conditional_alignment"] = losses.conditional_alignment(z, at.y, at.kernel, 1.0)
        wanted["conditional_uniformity"] = losses.conditional_uniformity(z, at.y, at.kernel, 3.0)
    p = torch.linalg.svdvals(z.flatten(0, 1))  # Roy & Vetterli 2007
    p = p / p.sum()
    wanted["effective_rank"] = (-(p * p.log()).sum()).exp()
    y, kernel = (at.y, at.kernel) if with_kernel else (None, None)
    found = losses.geometry(z, y, kernel, t=3.0, alpha=1.0)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert isinstance(value, float)
        # Singular values as roots of eigenvalues lose half of the digits.
        assert value == pytest.approx(wanted[name].item(), rel=1e-6 if name == "effective_rank" else 1e-13), name


# ---- memory -----------------------------------------------------------------------------------------------------

MEASURE = """
import pathlib, torch
from cauc_dist import kernels, losses
def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
torch.manual_seed(0)
n = 8192
z = torch.nn.functional.normalize(torch.randn(2, n, 64), dim=-1).requires_grad_()
y = torch.stack([torch.rand(n) * 80 + 6, torch.randint(0, 2, (n,)).float()], 1)
kernel = kernels.product(age=kernels.gaussian(5.0), sex=kernels.delta())
losses.cauc(z[:, :64], y[:64], kernel).backward()  # what is loaded on first use is no matter of size
z.grad = None
before = peak()
losses.cauc(z, y, kernel).backward()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_cauc_of_16384_embeddings_grows_by_less_than_a_fifth_of_one_matrix() -> None:
    """One M x M fp32 matrix is 1 GiB; dense, several of them are alive at once.

    VmHWM, not ru_maxrss: a child inherits the latter from the process that started it, however large.
    """
    found = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, timeout=100, check=True)
    assert 4 < float(found.stdout) < 200  # MiB; z's gradient alone is 4


# ---- sharp temperatures -----------------------------------------------------------------------------------------


def test_tiles_are_fp32_up_to_a_sharpness_of_40_and_float64_above() -> None:
    batch = Batch(oracles.unit(2, 4, 4).float())
    assert tiled.Sweep(batch, 1, 40.0).dtype == torch.float32
    assert tiled.Sweep(batch, 1, 40.1).dtype == F64


@pytest.mark.parametrize("t", [20.0, 20.1, 150.0])
def test_the_largest_and_the_smallest_sums_there_can_be_are_finite_and_right(t: float) -> None:
    alike, opposite = torch.ones(1, LARGE, 1), torch.tensor([[[1.0], [-1.0]]])
    value, gradient = grad(lambda z: losses.uniformity(z, t), alike)
    assert value.item() == pytest.approx(0.0, abs=1e-5)
    torch.testing.assert_close(gradient, torch.full_like(alike, 4 * t / LARGE), rtol=1e-5, atol=0)
    value, gradient = grad(lambda z: losses.uniformity(z, t), opposite)
    assert value.item() == pytest.approx(-4 * t, rel=1e-6)
    torch.testing.assert_close(gradient, 2 * t * opposite.flip(1), rtol=1e-5, atol=0)
