"""The Triton kernels without a GPU: their arithmetic in Triton's interpreter, their machine code from ahead of time."""

import contextlib
import dataclasses
import io
import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

try:
    import triton

    from cauc_dist.losses import fused
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    TRITON = False
else:
    TRITON = True

KNOWN = ("u", "cat", "subject", "site", "scale")
WIDTHS = (16, 32, 64, 128, 256)
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may use


@pytest.fixture(autouse=True)
def _triton_is_there() -> None:
    if not TRITON:
        pytest.fail("triton is not installed: pip install triton. The GPU path is tested here or nowhere: no skip")


# The oracle: the formulas, dense, in float64.


def weights(rows: "fused.Side", cols: "fused.Side") -> tuple[Tensor, Tensor, Tensor]:
    """(v of exp_sums, w of pull, w times a) (m, n)."""

    def same(name: str) -> Tensor | None:
        a, b = getattr(rows, name), getattr(cols, name)
        return None if a is None else a[:, None] == b[None, :]

    q = torch.zeros(len(rows.x), len(cols.x), dtype=torch.float64, device=rows.x.device)
    if rows.u is not None and cols.u is not None:
        q = (rows.u.double()[:, None] - cols.u.double()[None]).square().sum(2)
    w, c = torch.exp2(-q), -torch.expm1(-q * math.log(2))
    cat, subject, site, one = same("cat"), same("subject"), same("site"), same("id")
    assert one is not None
    if cat is not None:
        w, c = w * cat, torch.where(cat, c, 1.0)
    if subject is not None:
        c = torch.where(subject, 0.0, c)
    if rows.u is None and cat is None:
        c = torch.ones_like(c)
    v, w = c * ~one, w * ~(one if subject is None else one | subject)
    if site is not None:
        v = v * site
    a = torch.ones(())
    if rows.scale is not None and cols.scale is not None:
        a = rows.scale.double()[:, None] + cols.scale.double()[None]
    return v * a, w, w * a


def relative(found: Tensor, wanted: Tensor) -> float:
    """The largest error of a row relative to that row; a row of 0 must be exactly 0."""
    found, wanted = found.double().reshape(len(found), -1), wanted.reshape(len(wanted), -1)
    assert found.shape == wanted.shape
    off, size = (found - wanted).norm(dim=1), wanted.norm(dim=1)
    return float(torch.where(size > 0, off / size.clamp_min(1e-300), torch.where(off > 0, torch.inf, 0.0)).max())


def side(
    m: int, D: int, K: int = 2, known: tuple[str, ...] = KNOWN, first: int = 0, near: float = 1.0, device: str = "cpu"
) -> "fused.Side":
    """Numbers first ... first + m - 1 of embeddings that are the same whatever the side (two of each subject)."""
    g = torch.Generator().manual_seed(7)
    N = first + m
    x = torch.nn.functional.normalize(torch.randn(D, N, generator=g).T, dim=1)
    fields = {
        "x": x,
        "id": torch.arange(N, dtype=torch.int32),
        "u": 3.0 + near * torch.randn(N, K, generator=g),
        "cat": torch.randint(2, (N,), generator=g, dtype=torch.int32),
        "subject": torch.arange(N, dtype=torch.int32) // 2,
        "site": torch.randint(3, (N,), generator=g, dtype=torch.int32),
        "scale": torch.rand(N, generator=g),
    }
    kept = {k: v[first:].contiguous().to(device) for k, v in fields.items() if k in ("x", "id", *known)}
    return fused.Side(**kept)


def errors(rows: "fused.Side", cols: "fused.Side", kappa: float) -> dict[str, float]:
    """The relative errors of what both functions return, against the oracle."""
    v, w, wa = weights(rows, cols)
    x = cols.x.double()
    e = v * torch.exp(kappa * rows.x.double() @ x.T)
    S, mass, G = fused.exp_sums(rows, cols, kappa, grad=True)
    P, W = fused.pull(rows, cols)
    assert G is not None
    assert {t.dtype for t in (S, mass, G, P, W)} == {torch.float32}
    return {
        "S": relative(S, e.sum(1)) / (1 + kappa / 4),  # an ulp of a cosine is kappa ulps of its exponential
        "mass": relative(mass, v.sum(1)),
        "G": relative(G, e @ x) / (1 + kappa / 4),
        "P": relative(P, wa @ x),
        "W": relative(W, w.sum(1)),
    }


TOLERANCE = 2e-6


# In the process that interprets. Each returns numbers.


def of_every_combination(K: int | None) -> dict[str, dict[str, float]]:
    combinations = [c for r in range(5) for c in itertools.combinations(KNOWN[1:], r)]
    known = [(*(() if K is None else ("u",)), *c) for c in combinations]
    return {f"{k}": errors(side(67, 5, K or 0, k, first=3), side(35, 5, K or 0, k), 10.0) for k in known}


def of_shapes(m: int, n: int, D: int, kappa: float) -> dict[str, float]:
    rows, cols = side(m, D, first=2), side(n, D)
    S, mass, _ = fused.exp_sums(rows, cols, kappa, grad=True)
    alone, mass_alone, none = fused.exp_sums(rows, cols, kappa, grad=False)
    assert none is None
    assert torch.equal(alone, S)
    assert torch.equal(mass_alone, mass)
    return errors(rows, cols, kappa)


def of_near_metadata(near: float) -> dict[str, float]:
    return errors(side(67, 16, 1, ("u",), near=near), side(67, 16, 1, ("u",), near=near), 4.0)


def of_single_pairs() -> float:
    """The error of c itself, in units of 2^-24: one column, so that the mass of a row is the c of one pair."""
    u = torch.logspace(-6, 0.7, 3000)[:, None]
    rows = fused.Side(torch.ones(3000, 1), torch.arange(1, 3001, dtype=torch.int32), u)
    cols = fused.Side(torch.ones(1, 1), torch.zeros(1, dtype=torch.int32), torch.zeros(1, 1))
    mass = fused.exp_sums(rows, cols, 4.0, grad=False)[1]
    return relative(mass, -torch.expm1(-(u.double() ** 2) * math.log(2)).sum(1)) * 2**24


def of_constant_metadata() -> float:
    s = side(67, 16)
    ones = torch.ones(67, dtype=torch.int32)
    s = dataclasses.replace(s, u=torch.full((67, 2), 0.3), cat=ones, site=ones)
    S, mass, G = fused.exp_sums(s, s, 10.0, grad=True)
    bare = dataclasses.replace(s, u=torch.empty(67, 0))
    no_columns = fused.exp_sums(bare, bare, 10.0, grad=True)
    return max(float(t.abs().max()) for t in (S, mass, G, *no_columns) if t is not None)


def of_runs() -> tuple[int, dict[str, float]]:
    """As on a device with many processors: the columns in several runs, whose sums are added."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_processors", lambda device: 100)
        cut = fused._cut(5, 700, fused.EXP_SUMS["tf32x3"][16], 100)
        return cut[0], errors(side(5, 16), side(700, 16), 4.0)


def of_small_after_large() -> tuple[float, float]:
    """(error of the mass, of a plain fp32 sum by tiles): 1e8 in the first column, then numbers below its rounding."""
    rows, cols = side(260, 5, 0, ("scale",), first=2000), side(1000, 5, 0, ("scale",))
    a = torch.full((1000,), 0.1)
    a[0] = 1e8
    rows, cols = dataclasses.replace(rows, scale=torch.zeros(260)), dataclasses.replace(cols, scale=a)
    plain = torch.zeros(())
    for part in a.split(32):
        plain += part.sum()
    wanted = a.double().sum()
    mass = fused.exp_sums(rows, cols, 4.0, grad=False)[1]
    return relative(mass, wanted.expand(260)), float(abs(plain - wanted) / wanted)


def of_nothing() -> list[float]:
    none, some = side(0, 16), side(5, 16)
    found = [*fused.exp_sums(some, none, 4.0, grad=True), *fused.pull(some, none)]
    assert [tuple(t.shape) for t in fused.exp_sums(none, some, 4.0, grad=True) if t is not None] == [
        (0,),
        (0,),
        (0, 16),
    ]
    return [float(t.abs().sum()) for t in found if t is not None]


def of_usable() -> list[bool]:
    sizes = [(torch.float32, 256), (torch.float32, 257), (torch.float64, 16)]
    return [fused.usable(torch.zeros(2, 3, D, dtype=dtype)) for dtype, D in sizes]


@pytest.mark.parametrize("K", [None, 0, 1, 2])
def test_the_sums_are_those_of_the_formulas_whatever_is_known(interpreted: Callable[..., Any], K: int | None) -> None:
    found = interpreted(of_every_combination, K)
    assert len(found) == 16
    assert {k: e for k, e in found.items() if max(e.values()) > TOLERANCE} == {}


@pytest.mark.parametrize(
    ("m", "n", "D", "kappa"),
    [
        (1, 3, 5, 4.0),
        (3, 1, 16, 10.0),
        (203, 67, 16, 40.0),
        (67, 203, 64, 4.0),
        (67, 67, 100, 10.0),
        (67, 203, 128, 40.0),
        (3, 203, 256, 10.0),
        (67, 3, 250, 10.0),
    ],
)
def test_the_sums_are_those_of_the_formulas_at_ragged_sizes(
    interpreted: Callable[..., Any], m: int, n: int, D: int, kappa: float
) -> None:
    found = interpreted(of_shapes, m, n, D, kappa)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("near", [1e-1, 1e-3, 1e-5])
def test_the_sums_keep_their_relative_precision_where_all_metadata_are_near(
    interpreted: Callable[..., Any], near: float
) -> None:
    found = interpreted(of_near_metadata, near)
    assert max(found.values()) < TOLERANCE, found


def test_the_weight_of_a_pair_is_right_to_four_units_in_the_last_place(interpreted: Callable[..., Any]) -> None:
    assert interpreted(of_single_pairs) < 4.0


def test_constant_metadata_give_sums_of_exactly_zero(interpreted: Callable[..., Any]) -> None:
    assert interpreted(of_constant_metadata) == 0.0


def test_the_sums_of_a_few_rows_do_not_depend_on_the_runs_of_columns(interpreted: Callable[..., Any]) -> None:
    runs, found = interpreted(of_runs)
    assert runs == 2
    assert max(found.values()) < TOLERANCE, found


def test_sums_by_row_keep_what_is_below_the_rounding_of_their_total(interpreted: Callable[..., Any]) -> None:
    compensated, plain = interpreted(of_small_after_large)
    assert compensated < 6e-8
    assert plain > 5e-7  # the case would show it


def test_no_columns_sum_to_zero_and_no_rows_to_nothing(interpreted: Callable[..., Any]) -> None:
    assert interpreted(of_nothing) == [0.0] * 5


def test_the_interpreter_takes_fp32_of_up_to_256_columns(interpreted: Callable[..., Any]) -> None:
    assert interpreted(of_usable) == [True, False, False]


def test_a_triton_that_aborts_on_these_kernels_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    z: Any = SimpleNamespace(dtype=torch.float32, shape=(2, 16), is_cuda=True, device="cuda:0")
    assert fused.usable(z)
    monkeypatch.setattr(triton, "__version__", "3.2.0")
    assert not fused.usable(z)


def test_outside_of_the_interpreter_cpu_tensors_are_not_usable(interpreted: Callable[..., Any]) -> None:
    assert interpreted(of_usable)[0]  # and it has left this process alone
    assert isinstance(fused._exp_sums, triton.JITFunction)
    assert not fused.usable(torch.zeros(2, 16))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda s: {"scale": None}, "scale is known of one side"),
        (lambda s: {"x": s.x.double()}, "x is torch.float64"),
        (lambda s: {"x": s.x.T.contiguous().T}, "x is .* contiguous: False"),
        (lambda s: {"site": s.site.long()}, "site is torch.int64"),
        (lambda s: {"cat": s.cat[1:]}, r"cat is torch.int32 \(4,\)"),
        (lambda s: {"u": s.u[:, :1].contiguous()}, "u has 1 columns on one side and 2 on the other"),
    ],
)
def test_a_side_that_a_kernel_would_misread_is_refused(
    change: Callable[["fused.Side"], dict[str, Any]], complaint: str
) -> None:
    s = side(5, 16)
    with pytest.raises(ValueError, match=complaint):
        fused.exp_sums(dataclasses.replace(s, **change(s)), s, 4.0, grad=True)
    with pytest.raises(ValueError, match=complaint):
        fused.pull(dataclasses.replace(s, **change(s)), s)


def test_too_wide_too_many_columns_and_too_large_a_kappa_are_refused() -> None:
    with pytest.raises(ValueError, match="x has 257 columns"):
        fused.pull(side(5, 257), side(5, 257))
    with pytest.raises(ValueError, match="u has 5 columns"):
        fused.pull(side(5, 16, 5), side(5, 16, 5))
    for kappa in (0.0, 41.0, math.nan):
        with pytest.raises(ValueError, match="kappa"):
            fused.exp_sums(side(5, 16), side(5, 16), kappa, grad=False)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (128, 65_536), (512, 4096), (1 << 20, 1 << 20), (3, 100_001)])
def test_runs_of_columns_cover_them_and_fill_the_device(m: int, n: int) -> None:
    tile = fused.EXP_SUMS["tf32x3"][128]
    runs, span = fused._cut(m, n, tile, processors=132)
    assert (runs - 1) * span < n <= runs * span
    assert span % tile.columns == 0
    assert runs == 1 or span >= 8 * tile.columns
    assert runs * math.ceil(m / tile.rows) < 4 * 132 + math.ceil(m / tile.rows)


# Ahead of time: PTX and ptxas need no GPU.


@dataclasses.dataclass(frozen=True)
class Built:
    """What the compiler says of a kernel."""

    products: str  # on tensor cores
    spilled: int  # bytes
    shared: int  # bytes


def build(
    cache: Path,
    arch: int,
    name: str,
    D: int,
    known: tuple[str, ...],
    grad: bool = True,
    tile: Any = None,
    precision: Any = "tf32x3",
) -> Built:
    """Compile a kernel as `fused` launches it; spills are read from the log of that very ptxas run."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(fused, name)
    width = max(16, triton.next_power_of_2(D))
    tile = tile or {"_exp_sums": fused.EXP_SUMS, "_pull": fused.PULL}[name][precision][width]
    constants = {"K": 2 if "u" in known else 0, "D": D, "DP": width, "BM": tile.rows, "BN": tile.columns}
    constants |= {"DEPTH": tile.depth, "PRECISION": precision}
    constants |= {f.upper() + two: None for f in KNOWN if f not in known for two in ("", "2")}
    constants |= {} if grad else {"G": None}
    integers = ("ID", "CAT", "SUBJECT", "SITE")

    def kind(arg: str) -> str:
        if arg in constants:
            return "constexpr"
        if arg in ("m", "n", "span", "kappa"):
            return "fp32" if arg == "kappa" else "i32"
        return "*i32" if arg.removesuffix("2") in integers else "*fp32"

    names = kernel.arg_names
    source = ASTSource(
        kernel,
        signature={a: kind(a) for a in names},
        constexprs={(names.index(a),): c for a, c in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, a in enumerate(names) if kind(a).startswith("*")},
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    log = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(log):
        patch.setenv("TRITON_CACHE_DIR", str(cache))  # an empty one: what comes from a cache has no log
        patch.setenv("TRITON_DUMP_PTXAS_LOG", "1")
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
    assert len(spills) == 1, f"ptxas said:\n{log.getvalue()}"
    products = re.search(r"wgmma\.mma_async|mma\.sync", compiled.asm["ptx"])
    return Built(products[0] if products else "none", sum(map(int, spills[0])), compiled.metadata.shared)


of_each_kernel = pytest.mark.parametrize(
    ("name", "known", "grad"),
    [
        pytest.param("_exp_sums", ("subject", "scale"), True, id="InfoNCE"),
        pytest.param("_exp_sums", KNOWN, True, id="conditional uniformity"),
        pytest.param("_pull", ("u", "cat", "subject", "scale"), True, id="pull"),
    ],
)


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("D", WIDTHS)
@of_each_kernel
def test_default_tiles_use_tensor_cores_fit_and_do_not_spill(
    tmp_path: Path, arch: int, D: int, name: str, known: tuple[str, ...], grad: bool
) -> None:
    built = build(tmp_path, arch, name, D, known, grad)
    assert built.products != "none"
    assert built.spilled == 0
    assert built.shared <= SHARED[arch]


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("known", [(), ("u", "cat", "subject")], ids=["InfoNCE", "conditional uniformity"])
def test_sums_without_a_gradient_compile_as_well(tmp_path: Path, arch: int, known: tuple[str, ...]) -> None:
    built = build(tmp_path, arch, "_exp_sums", 128, known, grad=False)
    assert built.products != "none"
    assert built.spilled == 0


@pytest.mark.parametrize("D", WIDTHS)
@of_each_kernel
def test_the_tiles_of_hopper_fit_it_and_multiply_in_bf16(
    tmp_path: Path, D: int, name: str, known: tuple[str, ...], grad: bool
) -> None:
    built = build(tmp_path, 90, name, D, known, grad, precision="bf16x6")
    assert built.products != "none"
    assert built.shared <= SHARED[90]
    assert built.spilled <= 4096  # bytes of a program: what the fastest tiles tried do


def test_every_width_has_a_tile() -> None:
    for tiles in (fused.EXP_SUMS, fused.PULL):
        assert all(tuple(by_width) == WIDTHS for by_width in tiles.values())
        assert all(t.depth <= max(16, width) for by_width in tiles.values() for width, t in by_width.items())


def test_a_tile_that_is_too_large_is_seen_to_spill(tmp_path: Path) -> None:
    assert build(tmp_path, 80, "_exp_sums", 64, KNOWN, tile=fused.Tile(64, 64, 32, 4, 2)).spilled > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_sums_are_those_of_the_formulas() -> None:
    for D, kappa in itertools.product((5, 32, 64, 100, 128, 256), (4.0, 10.0, 40.0)):
        found = errors(side(1003, D, device="cuda"), side(5000, D, device="cuda"), kappa)
        # Looser than the interpreter: the fourth TF32 product is dropped, tensor cores truncate, ex2 is approximate.
        assert max(found.values()) < 2 * TOLERANCE, (D, kappa, found)
