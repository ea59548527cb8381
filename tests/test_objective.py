"""The settings name the loss: each equals the pure function called by hand."""

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from cauc_dist import kernels, losses
from cauc_dist.config import Objective as Settings
from cauc_dist.config import Objectives
from cauc_dist.errors import BadInput
from cauc_dist.losses.batch import Batch, Exchange
from cauc_dist.objective import Objective
from cauc_dist.stream.plan import shares
from tests.ranks import run_ranks

torch.manual_seed(0)
Z = torch.nn.functional.normalize(torch.randn(2, 9, 6, dtype=torch.float64), dim=-1)
AGE = torch.rand(9, 1, dtype=torch.float64) * 50 + 20
SITE = torch.tensor([[0.0], [0], [1], [1], [2], [2], [0], [1], [2]], dtype=torch.float64)
KERNEL = kernels.product(age=kernels.gaussian(5.0))

CODES = torch.tensor([0.0, 0, 1, 1, 2, 2, 0, 1, 2], dtype=torch.float64)
BOTH: dict[str, Any] = {"t": 3.0, "alpha": 1.0, "lambda_align": 0.5, "lambda_unif": 2.0, "views": "pooled"}

BY_HAND = {
    "simclr": lambda: losses.ntxent(Z, 0.2),
    "y_aware": lambda: losses.y_aware_infonce(Z, AGE, KERNEL, 0.2, "column"),
    "cauc": lambda: losses.cauc(Z, AGE, KERNEL, normalise_align="global", normalise_unif="row", **BOTH),
    "calign_unif": lambda: losses.calign_unif(Z, AGE, KERNEL, normalise_align="global", **BOTH),
    "align_cunif": lambda: losses.align_cunif(Z, AGE, KERNEL, normalise_unif="row", **BOTH),
    "align_uniform": lambda: losses.align_uniform(Z, **BOTH),
    "supcon": lambda: losses.supcon(Z, SITE[:, 0], 0.2),
    "decoupled_uniformity": lambda: losses.decoupled_uniformity(Z, AGE, KERNEL, 3.0),
    "threshold": lambda: losses.threshold(Z, AGE, KERNEL, 0.2),
    "expw": lambda: losses.expw(Z, AGE, KERNEL, 0.2),
    "rank_n_contrast": lambda: losses.rank_n_contrast(Z, AGE, 0.2),
    "cross_entropy": lambda: losses.cross_entropy(Z, CODES),
    "squared_error": lambda: losses.squared_error(Z, (AGE - AGE.mean()) / AGE.std(correction=0)),
}
OF_CLASSES = ("supcon", "cross_entropy")


@pytest.mark.parametrize("name", get_args(Objectives))
def test_each_name_is_its_function_with_the_settings_passed_on(name: Objectives) -> None:
    settings = Settings(
        name=name,
        kernel=("site:delta",) if name in OF_CLASSES else ("age:gaussian:5",),
        tau=0.2,
        t=3.0,
        alpha=1.0,
        lambda_align=0.5,
        lambda_unif=2.0,
        normalise="column" if name == "y_aware" else "row",
        normalise_align="global" if name in ("cauc", "calign_unif") else "row",
        normalise_unif="row" if name in ("cauc", "align_cunif") else "global",
        views="pooled" if name in ("cauc", "calign_unif", "align_cunif", "align_uniform") else "within",
    )
    y = 10 * SITE + 3 if name == "cross_entropy" else SITE if name in OF_CLASSES else AGE
    assert Objective(settings, y).loss(Z, y).item() == pytest.approx(BY_HAND[name]().item(), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "field", "value", "readers"),
    [
        ("cauc", "normalise", "column", "y_aware, which alone reads it"),
        ("align_cunif", "normalise_align", "global", "cauc or calign_unif, which alone read it"),
        ("calign_unif", "normalise_unif", "row", "cauc or align_cunif, which alone read it"),
        ("y_aware", "views", "pooled", "cauc or calign_unif or align_cunif or align_uniform, which alone read it"),
        ("calign_unif", "within", "site", "cauc or align_cunif, which alone read it"),
    ],
)
def test_a_setting_that_the_loss_does_not_read_is_refused(name: str, field: str, value: str, readers: str) -> None:
    settings: Any = {"name": name, "kernel": ("age:gaussian:5",), field: value}
    with pytest.raises(
        BadInput, match=rf"^objective.{field} {value} with objective {name}; wanted objective {readers}"
    ):
        Objective(Settings(**settings), torch.cat([AGE, SITE], 1))


@pytest.mark.parametrize("name", OF_CLASSES)
@pytest.mark.parametrize("kernel", [("age:gaussian:5",), ("site:delta", "sex:delta")], ids=" ".join)
def test_losses_of_classes_want_one_column_of_them(name: Objectives, kernel: tuple[str, ...]) -> None:
    with pytest.raises(BadInput, match=f"objective {name} with the kernel {' '.join(kernel)}; wanted one column of cl"):
        Objective(Settings(name=name, kernel=kernel), torch.cat([AGE, SITE], 1))


def test_squared_error_wants_numbers() -> None:
    with pytest.raises(
        BadInput, match=r"squared_error with the kernel age:gaussian:5 site:delta; wanted columns of nu"
    ):
        Objective(Settings(name="squared_error", kernel=("age:gaussian:5", "site:delta")), torch.cat([AGE, SITE], 1))


def test_a_loss_that_the_metadata_does_not_allow_is_refused_before_training() -> None:
    missing = AGE.clone()
    missing[3] = torch.nan
    objective = Objective(Settings(name="rank_n_contrast", kernel=("age:gaussian:5",)), missing)
    with pytest.raises(BadInput, match=r"objective rank_n_contrast: .*; wanted a loss that this metadata allows"):
        objective.try_out(missing)


@pytest.mark.parametrize("name", ["cauc", "align_cunif"])
def test_within_is_the_last_column_and_no_part_of_the_kernel(name: Objectives) -> None:
    settings = Settings(name=name, kernel=("age:gaussian:5",), within="site")
    y = torch.cat([AGE, SITE], 1)
    wanted = getattr(losses, name)(Z, AGE, KERNEL, within=SITE[:, 0])
    assert Objective(settings, y).loss(Z, y).item() == pytest.approx(wanted.item(), rel=1e-12)


def test_geometry_is_wangs_alignment_and_uniformity_and_their_conditional_forms() -> None:
    terms = Objective(Settings(name="simclr", kernel=("age:gaussian:5",)), AGE).geometry(Z, AGE)
    assert terms["alignment"] == pytest.approx(((Z[0] - Z[1]) ** 2).sum(-1).mean().item(), rel=1e-6)
    watched = {"alignment", "uniformity", "effective_rank"}
    assert set(terms) == {*watched, "conditional_alignment", "conditional_uniformity"}
    without = Objective(Settings(name="simclr"), torch.zeros(9, 0)).geometry(Z, torch.zeros(9, 0))
    assert set(without) == watched


def test_a_loss_on_metadata_without_a_kernel_is_refused() -> None:
    with pytest.raises(BadInput, match=r"objective cauc without a kernel.*--objective.kernel age:gaussian:5"):
        Objective(Settings(name="cauc"), torch.zeros(9, 0))


# ---- supervised ---------------------------------------------------------------------------------------------------


def test_classes_are_those_of_training_in_ascending_order_and_one_that_is_not_among_them_is_refused() -> None:
    """Codes 3, 13, 23 of a store become 0, 1, 2: a batch without the first one does not move the others."""
    objective = Objective(Settings(name="cross_entropy", kernel=("site:delta",)), 10 * SITE + 3)
    assert objective.outputs == 3
    found = objective.loss(Z[:, 2:6], 10 * SITE[2:6] + 3)
    assert found.item() == losses.cross_entropy(Z[:, 2:6], CODES[2:6]).item()
    with pytest.raises(ValueError, match="class 33 is none of the 3 of the training metadata"):
        objective.loss(Z, torch.full_like(SITE, 33.0))


def test_numbers_are_standardised_by_training_and_not_by_the_batch() -> None:
    y = torch.cat([AGE, 100 * AGE.flip(0)], 1)
    y[0, 0] = y[3, 1] = math.nan
    known = [y[~y[:, k].isnan(), k] for k in (0, 1)]
    z = torch.stack([(y[:, k] - known[k].mean()) / known[k].std(correction=0) for k in (0, 1)], 1).nan_to_num(7.0)
    objective = Objective(Settings(name="squared_error", kernel=("age:gaussian:5", "tiv:gaussian:50")), y)
    assert objective.outputs == 2
    assert objective.loss(z[None, :4], y[:4]).item() == pytest.approx(0.0, abs=1e-20)
    assert objective.loss(z[None, :4] + 2, y[:4]).item() == pytest.approx(4.0, abs=1e-12)


@pytest.mark.parametrize(("name", "kernel"), [("cross_entropy", "site:delta"), ("squared_error", "site:gaussian:1")])
def test_missing_values_are_left_out_and_counted(name: Objectives, kernel: str) -> None:
    y = SITE.clone()
    y[[1, 4]] = math.nan
    objective, rest = Objective(Settings(name=name, kernel=(kernel,)), y), [0, 2, 3, 5, 6, 7, 8]
    assert objective.loss(Z, y).item() == pytest.approx(objective.loss(Z[:, rest], y[rest]).item(), rel=1e-12)
    assert objective.geometry(Z, y)["labelled"] == 7
    assert objective.geometry(5 * Z, y) == pytest.approx(objective.geometry(Z, y), rel=1e-9)  # watched on the sphere


def test_embeddings_narrower_than_the_answers_are_refused() -> None:
    message = r"cross_entropy of 9 outputs with embeddings of width 8; wanted projector.out of at least 9"
    y = torch.arange(9, dtype=torch.float64)[:, None]
    objective = Objective(Settings(name="cross_entropy", kernel=("site:delta",)), y)
    objective.try_out(y)
    objective.try_out(y, width=9)
    with pytest.raises(BadInput, match=message):
        objective.try_out(y, width=8)
    with pytest.raises(BadInput, match=message):
        objective.loss(torch.zeros(2, 9, 8), y)


@pytest.mark.parametrize(("name", "kernel"), [("cross_entropy", "site:delta"), ("squared_error", "site:gaussian:1")])
def test_a_column_that_teaches_nothing_is_refused(name: Objectives, kernel: str) -> None:
    for y in (torch.ones_like(SITE), torch.full_like(SITE, math.nan)):
        with pytest.raises(BadInput, match=f"objective {name} of column site, without two different values in traini"):
            Objective(Settings(name=name, kernel=(kernel,)), y)


# ---- over ranks ---------------------------------------------------------------------------------------------------

N = 13  # divides over neither 2, 3 nor 4 ranks
SETTINGS: dict[str, dict[str, Any]] = {
    "align_uniform": {"views": "pooled"},
    "calign_unif": {},
    "calign_unif, other": {"normalise_align": "global", "views": "pooled"},
    "align_cunif": {},
    "align_cunif, other": {"normalise_unif": "row", "within": "sex"},
    "cauc, other": {"normalise_align": "global", "normalise_unif": "row"},
    "cross_entropy": {"kernel": ("sex:delta",)},
    "squared_error": {"kernel": ("age:gaussian:5", "sex:gaussian:1")},
}


def problem(n: int) -> tuple[torch.nn.Module, Tensor, Tensor]:
    """A float64 model, views (2, n, 5), and y (n, 2): age and sex, with values missing."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.Tanh(), torch.nn.Linear(16, 6)).double()
    y = torch.stack([torch.rand(n, dtype=torch.float64) * 60 + 20, torch.arange(n).double() % 2], 1)
    y[1, 0] = y[n - 1, 1] = math.nan
    return model, torch.randn(2, n, 5, dtype=torch.float64), y


def value_and_gradient(name: str, n: int, own: slice, exchange: Exchange) -> tuple[float, list[Tensor]]:
    options = {"kernel": ("age:gaussian:5",), "lambda_align": 0.7, **SETTINGS[name]}
    settings = Settings(name=name.split(",")[0], **options)  # type: ignore[arg-type]
    model, x, y = problem(n)
    y = y[:, [("age", "sex").index(column) for column in settings.columns]]
    z = model(x[:, own])
    z = torch.nn.functional.normalize(z, dim=-1) if settings.on_sphere else z
    loss = Objective(settings, y).loss(z, y, exchange)
    return loss.item(), list(torch.autograd.grad(loss, list(model.parameters())))


def on_this_rank(exchange: str, n: int) -> dict[str, tuple[float, list[Tensor]]]:
    """Parameter gradients averaged over ranks, as the trainer does."""
    import torch.distributed as dist

    from cauc_dist import gather

    rank, world = dist.get_rank(), dist.get_world_size()
    starts = [sum(shares(n, world)[:r]) for r in range(world + 1)]
    found = {}
    for name in SETTINGS:
        own = slice(starts[rank], starts[rank + 1])
        value, grads = value_and_gradient(name, n, own, getattr(gather, exchange)(n))
        for g in grads:
            dist.all_reduce(g)
        found[name] = (value, [g / world for g in grads])
    return found


@pytest.mark.parametrize("exchange", ["AllGather", "Ring"])
@pytest.mark.parametrize(("world", "n"), [(1, N), (2, N), (3, N), (4, N), (4, 3)])
def test_the_square_and_the_supervised_arms_on_w_ranks_equal_one_process(world: int, n: int, exchange: str) -> None:
    """Uneven shares, values missing; of 3 subjects on 4 ranks one rank has none, and another only unlabelled ones."""
    wanted = {name: value_and_gradient(name, n, slice(0, n), Batch) for name in SETTINGS}
    for found in run_ranks(world, on_this_rank, exchange, n):
        for name, (value, grads) in wanted.items():
            assert found[name][0] == pytest.approx(value, rel=1e-12, abs=1e-12), name
            for ours, theirs in zip(found[name][1], grads, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=name)
