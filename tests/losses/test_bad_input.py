"""What cannot be meant is refused before anything is computed: each message says what was found and what was wanted."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cauc_dist.kernels import cauchy, delta, gaussian, product
from cauc_dist.losses import (
    align_cunif,
    align_uniform,
    calign_unif,
    cauc,
    conditional_alignment,
    conditional_uniformity,
    cross_entropy,
    decoupled_uniformity,
    expw,
    geometry,
    loss_and_grad,
    ntxent,
    rank_n_contrast,
    squared_error,
    supcon,
    threshold,
    uniformity,
    y_aware_infonce,
)
from cauc_dist.losses.batch import NonFinite
from cauc_dist.stream.plan import shares
from tests import oracles
from tests.losses.cases import EVERY, WITH_KERNEL
from tests.ranks import run_ranks

Z = oracles.unit(2, 6, 4)
IDS = torch.arange(6, dtype=torch.float64)[:, None]
WRONG: Any = "wrong"
Call = Callable[[], object]
FREE_Y = [name for name in WITH_KERNEL if name != "conditional_uniformity_of_a_sex"]  # that one takes a column of y


def refused(call: Call, message: str) -> None:
    """With exactly this message."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


# ---- shapes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_z_of_another_shape_or_of_fewer_than_two_subjects_is_refused(name: str) -> None:
    y, kernel = torch.zeros(6, 2), product(a=delta(), b=delta())
    for shape in ((6, 4), (1, 2, 6, 4)):
        wanted = f"z has shape {shape}; wanted (V, n, D): views, subjects, width"
        refused(lambda shape=shape: EVERY[name](torch.zeros(shape), y, kernel), wanted)  # type: ignore[misc]
    for n in (0, 1):
        wanted = f"z has {n} subject(s); wanted at least 2: a pair needs two"
        refused(lambda n=n: EVERY[name](torch.zeros(2, n, 4), y[:n], kernel), wanted)  # type: ignore[misc]


@pytest.mark.parametrize("loss", [ntxent, align_uniform, lambda z: align_cunif(z, IDS, delta())])
def test_objectives_whose_only_positive_is_the_other_view_want_two(loss: Callable[[Tensor], Tensor]) -> None:
    refused(lambda: loss(oracles.unit(1, 6, 4)), "z has 1 view(s); wanted at least 2 of each subject")


def test_z_without_a_view_is_refused() -> None:
    refused(lambda: uniformity(torch.zeros(0, 6, 4)), "z has 0 view(s); wanted at least 1 of each subject")


@pytest.mark.parametrize("name", [*FREE_Y, "rank_n_contrast", "squared_error"])
def test_y_of_another_number_of_subjects_is_refused(name: str) -> None:
    for y in (torch.zeros(5, 2), torch.zeros(12, 2), torch.tensor(1.0)):
        message = f"y has shape {tuple(y.shape)}; wanted one row for each of 6 subjects"
        refused(lambda y=y: EVERY[name](Z, y, product(a=delta(), b=delta())), message)  # type: ignore[misc]


@pytest.mark.parametrize("name", FREE_Y)
def test_y_that_does_not_fit_the_kernel_is_refused(name: str) -> None:
    two, one_column = product(age=gaussian(5.0), sex=delta()), "one column for each of age, sex"
    refused(lambda: EVERY[name](Z, torch.zeros(6, 1), two), f"y has shape (6, 1); wanted (n, 2): {one_column}")
    refused(lambda: EVERY[name](Z, torch.zeros(6, 3), two), f"y has shape (6, 3); wanted (n, 2): {one_column}")
    with pytest.raises(ValueError, match="column y has a missing value and the kernel was not fitted"):
        EVERY[name](Z, torch.full((6, 1), math.nan), delta())


OTHER: dict[str, tuple[Call, str]] = {
    "labels of supcon": (
        lambda: supcon(Z, torch.zeros(5)),
        "labels have shape (5,); wanted (6,): one label a subject",
    ),
    "labels of conditional_uniformity": (
        lambda: conditional_uniformity(Z, IDS, delta(), within=IDS),
        "labels have shape (6, 1); wanted (6,): one label a subject",
    ),
    "labels of cauc": (
        lambda: cauc(Z, IDS, delta(), within=IDS[:3, 0]),
        "labels have shape (3,); wanted (6,): one label a subject",
    ),
    "labels of align_cunif": (
        lambda: align_cunif(Z, IDS, delta(), within=IDS[:3, 0]),
        "labels have shape (3,); wanted (6,): one label a subject",
    ),
    "labels of cross_entropy": (
        lambda: cross_entropy(Z, IDS),
        "labels have shape (6, 1); wanted (6,): one label a subject",
    ),
    "more classes than columns": (
        lambda: cross_entropy(Z, IDS[:, 0]),
        "label 4; wanted a class code of 0 to 3, a column of z each",
    ),
    "half a class": (
        lambda: cross_entropy(Z, IDS[:, 0] / 2),
        "label 0.5; wanted a class code of 0 to 3, a column of z each",
    ),
    "a class below 0": (
        lambda: cross_entropy(Z, -IDS[:, 0]),
        "label -1; wanted a class code of 0 to 3, a column of z each",
    ),
    "more numbers than columns": (
        lambda: squared_error(Z, IDS.expand(6, 5)),
        "y has shape (6, 5); wanted (n, k) with k at most 4, the width of z",
    ),
    "flat y to answer": (
        lambda: squared_error(Z, IDS[:, 0]),
        "y has shape (6,); wanted (n, k) with k at most 4, the width of z",
    ),
    "kernel without y": (
        lambda: decoupled_uniformity(Z, kernel=delta()),
        "a kernel is given without y; wanted y (n, k) with it",
    ),
    "kernel not positive": (
        lambda: decoupled_uniformity(Z, IDS, delta("ignore")),
        "the kernel has a column with missing='ignore', so it is not positive semi-definite; "
        "wanted 'marginal' or 'distinct' for the kernel form of decoupled_uniformity",
    ),
    "missing values to rank": (
        lambda: rank_n_contrast(Z, IDS.masked_fill(IDS < 2, math.nan)),
        "y has 2 missing value(s); wanted none: rank_n_contrast ranks all pairs",
    ),
    "flat y": (lambda: rank_n_contrast(Z, IDS[:, 0]), "y has shape (6,); wanted (n, k)"),
}


@pytest.mark.parametrize("name", OTHER)
def test_labels_and_kernels_that_do_not_fit_are_refused(name: str) -> None:
    refused(*OTHER[name])


# ---- numbers and words ------------------------------------------------------------------------------------------

POSITIVE: list[tuple[str, Callable[[float], object]]] = [
    ("tau", lambda x: y_aware_infonce(Z, IDS, delta(), x)),
    ("tau", lambda x: ntxent(Z, x)),
    ("tau", lambda x: supcon(Z, IDS[:, 0], x)),
    ("tau", lambda x: threshold(Z, IDS, delta(), x)),
    ("tau", lambda x: expw(Z, IDS, delta(), x)),
    ("tau", lambda x: rank_n_contrast(Z, IDS, x)),
    ("t", lambda x: uniformity(Z, x)),
    ("t", lambda x: conditional_uniformity(Z, IDS, delta(), x)),
    ("t", lambda x: cauc(Z, IDS, delta(), x)),
    ("t", lambda x: align_uniform(Z, t=x)),
    ("t", lambda x: calign_unif(Z, IDS, delta(), x)),
    ("t", lambda x: align_cunif(Z, IDS, delta(), x)),
    ("t", lambda x: decoupled_uniformity(Z, t=x)),
    ("alpha", lambda x: conditional_alignment(Z, IDS, delta(), x)),
    ("alpha", lambda x: cauc(Z, IDS, delta(), alpha=x)),
    ("alpha", lambda x: align_uniform(Z, x)),
    ("alpha", lambda x: calign_unif(Z, IDS, delta(), alpha=x)),
    ("alpha", lambda x: align_cunif(Z, IDS, delta(), alpha=x)),
    ("lam", lambda x: decoupled_uniformity(Z, IDS, delta(), lam=x)),
    ("sigma", gaussian),
    ("gamma", cauchy),
]


@pytest.mark.parametrize("place", range(len(POSITIVE)))
def test_a_number_that_has_to_be_positive_is_refused_by_name(place: int) -> None:
    letter, call = POSITIVE[place]
    for number in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=rf"^{letter} is {number:g}(\.0)?; wanted a number above 0$"):
            call(number)


def test_an_infinite_power_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^alpha is inf; wanted a .*number"):
        align_uniform(Z, math.inf)
    with pytest.raises(ValueError, match=r"^alpha is inf; wanted a .*number"):
        conditional_alignment(Z, IDS, delta(), math.inf)


def test_temperatures_beyond_float64_are_refused_with_the_limit_and_those_at_it_are_not() -> None:
    sharp: list[Callable[[float], Tensor]] = [
        lambda x: ntxent(Z, x),
        lambda x: supcon(Z, IDS[:, 0], x),
        lambda x: y_aware_infonce(Z, IDS, delta(), x),
    ]
    for loss in sharp:
        message = "tau is 0.003; wanted at least 0.0034: e^(1/tau) must fit in float64"
        refused(lambda loss=loss: loss(0.003), message)  # type: ignore[misc]
        assert loss(1 / 300).isfinite()
    spread: list[Callable[[float], Tensor]] = [
        lambda x: uniformity(Z, x),
        lambda x: conditional_uniformity(Z, IDS, delta(), x),
        lambda x: cauc(Z, IDS, delta(), x),
        lambda x: align_uniform(Z, t=x),
        lambda x: calign_unif(Z, IDS, delta(), x),
        lambda x: align_cunif(Z, IDS, delta(), x),
        lambda x: decoupled_uniformity(Z, t=x),
    ]
    for loss in spread:
        message = "t is 151.0; wanted at most 150: e^(2t) must fit in float64"
        refused(lambda loss=loss: loss(151.0), message)  # type: ignore[misc]
        assert loss(150.0).isfinite()


WORDS: list[tuple[Call, str]] = [
    (lambda: y_aware_infonce(Z, IDS, delta(), normalise=WRONG), "normalise is 'wrong'; wanted row or column"),
    (lambda: conditional_alignment(Z, IDS, delta(), normalise=WRONG), "normalise is 'wrong'; wanted row or global"),
    (lambda: conditional_uniformity(Z, IDS, delta(), normalise=WRONG), "normalise is 'wrong'; wanted global or row"),
    (lambda: cauc(Z, IDS, delta(), normalise_align=WRONG), "normalise is 'wrong'; wanted row or global"),
    (lambda: cauc(Z, IDS, delta(), normalise_unif=WRONG), "normalise is 'wrong'; wanted global or row"),
    (lambda: uniformity(Z, views=WRONG), "views is 'wrong'; wanted within or pooled"),
    (lambda: conditional_uniformity(Z, IDS, delta(), views=WRONG), "views is 'wrong'; wanted within or pooled"),
    (lambda: cauc(Z, IDS, delta(), views=WRONG), "views is 'wrong'; wanted within or pooled"),
    (lambda: align_uniform(Z, views=WRONG), "views is 'wrong'; wanted within or pooled"),
    (lambda: calign_unif(Z, IDS, delta(), views=WRONG), "views is 'wrong'; wanted within or pooled"),
    (lambda: align_cunif(Z, IDS, delta(), views=WRONG), "views is 'wrong'; wanted within or pooled"),
    (lambda: calign_unif(Z, IDS, delta(), normalise_align=WRONG), "normalise is 'wrong'; wanted row or global"),
    (lambda: align_cunif(Z, IDS, delta(), normalise_unif=WRONG), "normalise is 'wrong'; wanted global or row"),
]


@pytest.mark.parametrize("place", range(len(WORDS)))
def test_a_word_that_is_not_offered_is_refused_with_those_that_are(place: int) -> None:
    refused(*WORDS[place])


# ---- embeddings that are not finite -----------------------------------------------------------------------------

BY_ROWS = [name for name in EVERY if not name.endswith("decoupled")]
ADVICE = "wanted finite rows of unit norm. Lower the learning rate, or look at these scans"


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", BY_ROWS)
def test_rows_that_are_not_finite_are_named_by_view_and_subject(name: str, number: float) -> None:
    z = Z.clone()
    z[1, 2, 0] = z[0, 5, 3] = z[1, 5, 1] = number
    y, kernel = oracles.cohort(6), product(age=gaussian(5.0), sex=delta())
    found = "z is not finite in 3 of 12 embeddings, at (view, subject) (1, 2), (0, 5), (1, 5)"
    with pytest.raises(NonFinite, match=f"^{re.escape(f'{found}; {ADVICE}')}$") as error:
        EVERY[name](z, y, kernel)
    assert error.value.subjects == [2, 5]


def test_of_many_rows_that_are_not_finite_eight_are_named() -> None:
    with pytest.raises(NonFinite, match=r"in 12 of 12 embeddings, .*\(0, 3\), \(1, 3\) and 4 more; wanted"):
        uniformity(Z * math.nan)


def test_a_row_that_is_not_finite_is_found_where_its_sums_are() -> None:
    """e^{-inf} = 0: the loss would be a number, and its gradient not."""
    z = torch.tensor([[[1.0], [1.0], [-math.inf]]])
    with pytest.raises(NonFinite, match=r"at \(view, subject\) \(0, 2\);"):
        uniformity(z)


def test_rows_too_long_for_their_sums_are_not_called_non_finite() -> None:
    """Norm 3 at tau .025: e^{360} is beyond fp32."""
    with pytest.raises(NonFinite, match=r"^every z is finite, but sums over its pairs are not; wanted finite rows of"):
        ntxent(3 * Z.float(), tau=0.025)


@pytest.mark.parametrize("kernel", [None, delta()], ids=["plain", "kernel"])
def test_decoupled_uniformity_names_the_rows_of_z_that_are_not_finite(kernel: Any) -> None:
    z = Z.clone()
    z[1, 2, 0] = math.nan
    with pytest.raises(NonFinite, match=r"in 1 of 12 embeddings, at \(view, subject\) \(1, 2\)"):
        decoupled_uniformity(z, IDS, kernel)


def test_geometry_refuses_what_the_losses_refuse() -> None:
    refused(lambda: geometry(Z, t=-1.0), "t is -1.0; wanted a number above 0")
    refused(lambda: geometry(Z, alpha=-1.0), "alpha is -1.0; wanted a number above 0")


# ---- on ranks ---------------------------------------------------------------------------------------------------

SUBJECTS = 7  # of two ranks: 4 and 3; of three: 3, 2 and 2


def not_finite_on_the_last_rank(exchange: str) -> list[tuple[str, list[int]]]:
    """(message, subjects) of each objective; the first and the last row of the last rank are not finite."""
    import torch.distributed as dist

    from cauc_dist import gather

    rank, world = dist.get_rank(), dist.get_world_size()
    z = torch.split(oracles.unit(2, SUBJECTS, 4), shares(SUBJECTS, world), 1)[rank].clone()
    if rank == world - 1:
        z[0, 0, 1], z[1, -1, 0] = math.nan, math.inf
    e, y, found = getattr(gather, exchange)(SUBJECTS), oracles.cohort(SUBJECTS), []
    kernel = product(age=gaussian(5.0), sex=delta())
    for loss in (
        lambda: cauc(z, y, kernel, normalise_unif="row", exchange=e),
        lambda: y_aware_infonce(z, y, kernel, exchange=e),
        lambda: ntxent(z, exchange=e),
        lambda: align_uniform(z, exchange=e),
        lambda: geometry(z, y, kernel, exchange=e),
    ):
        try:
            loss()
        except NonFinite as error:
            found.append((str(error), error.subjects))
    return found


@pytest.mark.parametrize(("exchange", "world", "first"), [("AllGather", 2, 4), ("Ring", 2, 4), ("Ring", 3, 5)])
def test_rows_of_one_rank_that_are_not_finite_are_named_alike_on_every_rank(
    exchange: str, world: int, first: int
) -> None:
    """In a ring of three the last rank's rows are in no sum of rank 0: it has to be told."""
    message = f"z is not finite in 2 of 14 embeddings, at (view, subject) (0, {first}), (1, 6); {ADVICE}"
    for found in run_ranks(world, not_finite_on_the_last_rank, exchange):
        assert found == [(message, [first, 6])] * 5


def wrong_share(exchange: str, shapes: list[tuple[int, ...]]) -> list[str]:
    import torch.distributed as dist

    from cauc_dist import gather

    found = []
    for loss in (uniformity, threshold):
        z = torch.zeros(shapes[dist.get_rank()])
        try:
            if loss is uniformity:
                uniformity(z, exchange=getattr(gather, exchange)(SUBJECTS))
            else:
                threshold(z, torch.zeros(SUBJECTS, 1), delta(), exchange=getattr(gather, exchange)(SUBJECTS))
        except ValueError as error:
            found.append(str(error))
    return found


def fewer_rows_later(exchange: str) -> str:
    import torch.distributed as dist

    from cauc_dist import gather

    over = getattr(gather, exchange)(SUBJECTS)
    rank = dist.get_rank()
    z = oracles.unit(2, SUBJECTS, 4)[:, :4] if rank == 0 else oracles.unit(2, SUBJECTS, 4)[:, 4:]
    uniformity(z, exchange=over)
    if rank == 0:
        return ""
    try:
        uniformity(z[:, 1:], exchange=over)
    except ValueError as error:
        return str(error)
    return "taken"


@pytest.mark.parametrize("exchange", ["AllGather", "Ring"])
def test_a_rank_that_later_comes_with_fewer_rows_is_refused_and_not_padded(exchange: str) -> None:
    assert run_ranks(2, fewer_rows_later, exchange)[1] == (
        "z has 2 subjects on rank 1; wanted 3: 7 over 2 ranks are [4, 3]"
    )


def test_an_infinite_value_of_metadata_is_refused_by_the_name_of_its_column() -> None:
    kernel, y = product(age=gaussian(5.0), sex=delta()), oracles.cohort(6)
    y[3, 0] = -math.inf
    message = "column age of y has an infinite value; wanted finite ones, NaN where missing"
    refused(lambda: y_aware_infonce(Z, y, kernel), message)


def test_loss_and_grad_refuses_rows_that_are_not_of_unit_norm() -> None:
    message = "norms of z are up to 1 away from 1; wanted unit rows: dz is tangent to the sphere"
    refused(lambda: loss_and_grad(uniformity, 2 * Z), message)


@pytest.mark.parametrize("exchange", ["AllGather", "Ring"])
@pytest.mark.parametrize(
    ("first", "second"), [((2, 4, 4), (2, 4, 4)), ((2, 4, 4), (2, 3, 5)), ((1, 4, 4), (2, 3, 4)), ((2, 4, 4), (3, 4))]
)
def test_a_rank_whose_rows_are_not_its_share_of_the_batch_is_refused_on_every_rank(
    exchange: str, first: tuple[int, ...], second: tuple[int, ...]
) -> None:
    wanted = (
        f"z has shapes {first}, {second} on ranks 0 to 1; wanted (V, b, D) of one V, D and dtype, with 7 subjects "
        "shared as b = 4, 3"
    )
    assert run_ranks(2, wrong_share, exchange, [first, second]) == [[wanted] * 2] * 2


def wrong_metadata() -> list[str]:
    from cauc_dist.gather import AllGather

    z, found = torch.zeros(2, 3, 4), []
    for call in (
        lambda: cauc(z, IDS[:3], delta(), exchange=AllGather(6)),
        lambda: supcon(z, IDS[:3, 0], exchange=AllGather(6)),
        lambda: uniformity(z[:, :0], exchange=AllGather(0)),
    ):
        try:
            call()  # type: ignore[no-untyped-call]
        except ValueError as error:
            found.append(str(error))
    return found


def test_metadata_of_the_rank_alone_is_refused_for_that_of_the_whole_batch_is_wanted() -> None:
    for found in run_ranks(2, wrong_metadata):
        assert found == [
            "y has shape (3, 1); wanted one row for each of 6 subjects",
            "labels have shape (3,); wanted (6,): one label a subject",
            "z has 0 subject(s); wanted at least 2: a pair needs two",
        ]
