"""The pair sums of `cauc_dist.losses.tiled` in one launch each (Triton): a tile lives and dies in registers.

m rows, n columns of embeddings     D width of x, padded in registers to a power of two     K columns of metadata u
w_ij = [cat_i = cat_j] 2^(-sum_k (u_ik - u_jk)^2), 1 within a subject     c = 1 - w     a scale of an embedding

A program owns BM rows and one run of the columns, of which it takes BN at a time. There is one run where the rows fill
the device, and more where they do not. Memory: what is returned, once a run. No atomics: the same input, device and
version give the same bits. Indices into x are 64-bit.

Precision: fp32 in and out. A product is six of bf16 parts ("bf16x6", on Hopper) or three of TF32 parts ("tf32x3"), fp32
to about an ulp either way; plain TF32 has errors of 1e-3 in a cosine and is not offered. Sums by row are compensated
(Kahan). G and the sums of `pull` are plain fp32 sums of tiles, each of which is summed by itself first.

On the CPU only in Triton's interpreter, for tests: TRITON_INTERPRET=1 in the environment before this is imported.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

Precision = Literal["tf32x3", "bf16x6", "ieee"]
LOG2E = 1.0 / math.log(2.0)
WIDEST = 256  # of x
MOST = 4  # columns of u
OLDEST = (3, 3)  # Triton; 3.2 (of torch 2.6) aborts the process where it compiles `pull`
LARGEST = 40.0  # kappa: with it n e^kappa, its inverse and the sums of them are far inside fp32


@dataclass(frozen=True, eq=False)
class Side:
    """Embeddings that stand on one side of the pairs, and what is known of each. All contiguous, on one device."""

    x: Tensor
    """(m, D) fp32."""
    id: Tensor
    """(m,) int32, the number of the embedding: a pair of equal numbers never counts."""
    u: Tensor | None = None
    """(m, K) fp32, finite: metadata in which a pair is alike by 2^(-sum_k (u_ik - u_jk)^2)."""
    cat: Tensor | None = None
    """(m,) int32, one code of all categories: pairs of unlike codes have w = 0."""
    subject: Tensor | None = None
    """(m,) int32: pairs of one subject have w = 1."""
    site: Tensor | None = None
    """(m,) int32: pairs of unlike sites do not count in `exp_sums`."""
    scale: Tensor | None = None
    """(m,) fp32, a: the weight of a pair is multiplied by a_i + a_j."""


@dataclass(frozen=True)
class Tile:
    """Rows BM and columns BN of a tile; cosines are summed over `depth` of the D coordinates at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# By padded D. tf32x3: of the tiles tried, large ones that spill no register on sm_80 and sm_90 where D is a multiple of
# 4, whatever is known of the sides (tests/losses/test_fused.py holds it), and of which no part is computed by two
# warps; not tuned for time. bf16x6: the fastest of those tried on an H200 (docs/log.md, 2026-11-27).
EXP_SUMS: dict[Precision, dict[int, Tile]] = {
    "tf32x3": {
        16: Tile(64, 32, 16, 4, 2),
        32: Tile(64, 32, 16, 4, 2),
        64: Tile(64, 32, 32, 4, 2),
        128: Tile(32, 64, 32, 8, 2),
        256: Tile(16, 64, 32, 8, 2),
    },
    "bf16x6": {
        16: Tile(128, 64, 16, 4, 2),
        32: Tile(128, 64, 16, 8, 1),
        64: Tile(64, 64, 64, 4, 1),
        128: Tile(128, 64, 128, 8, 1),
        256: Tile(128, 64, 128, 8, 1),
    },
}
PULL: dict[Precision, dict[int, Tile]] = {
    "tf32x3": {width: replace(tile, columns=tile.columns // 2) for width, tile in EXP_SUMS["tf32x3"].items()},
    "bf16x6": {
        16: Tile(128, 32, 16, 4, 1),
        32: Tile(128, 32, 32, 4, 1),
        64: Tile(128, 32, 64, 4, 1),
        128: Tile(64, 32, 128, 4, 1),
        256: Tile(64, 32, 128, 4, 1),
    },
}


def exp_sums(
    rows: Side, cols: Side, kappa: float, grad: bool, precision: Precision | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """S_i = sum_j v_ij e^{kappa x_i.x_j} (m,), the mass sum_j v_ij (m,), G_i = sum_j v_ij e^{kappa x_i.x_j} x_j (m, D).

    v_ij = [id_i != id_j] [site_i = site_j] c_ij (a_i + a_j); c = 1 where neither u nor cat is known (whatever `subject`
    says); no last factor without scale. No G without `grad`. x of unit norm; kappa at most 40.
    """
    if not 0 < kappa <= LARGEST:
        raise ValueError(f"kappa is {kappa}; fp32 sums carry 0 < kappa <= {LARGEST:g}: use float64 tiles")
    out = [(), (), rows.x.shape[1:] if grad else None]
    S, mass, G = _launch(_exp_sums, EXP_SUMS, rows, cols, out, precision, kappa * LOG2E)
    return S, mass, G


def pull(rows: Side, cols: Side, precision: Precision | None = None) -> tuple[Tensor, Tensor]:
    """sum_j w_ij (a_i + a_j) x_j (m, D) and sum_j w_ij (m,), over the embeddings j of other subjects.

    Without `subject`: over the other embeddings. No factor of a without scale. `site` plays no part.
    """
    P, W = _launch(_pull, PULL, rows, cols, [rows.x.shape[1:], ()], precision)
    return P, W


def usable(z: Tensor) -> bool:
    """Whether these kernels take z (..., D): fp32, D <= 256, an NVIDIA GPU from Ampere on (or the interpreter)."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST or z.dtype != torch.float32 or z.shape[-1] > WIDEST:
        return False
    if not isinstance(_exp_sums, triton.JITFunction):
        return z.device.type == "cpu"
    return z.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(z.device) >= (8, 0)


def _launch(
    kernel: Any,
    tiles: dict[Precision, dict[int, Tile]],
    rows: Side,
    cols: Side,
    out: Sequence[tuple[int, ...] | None],
    precision: Precision | None,
    *numbers: float,
) -> list[Any]:
    """What the kernel sums for each row, of the shapes `out` a row; None for None."""
    _check(rows, cols)
    (m, D), n = rows.x.shape, len(cols.x)
    width = max(16, triton.next_power_of_2(D))
    precision = precision or _precision(rows.x.device)
    tile = tiles["bf16x6" if precision == "bf16x6" else "tf32x3"][width]
    runs, span = _cut(m, n, tile, _processors(rows.x.device))
    parts = [None if shape is None else rows.x.new_zeros((runs, m, *shape)) for shape in out]
    if m and n:
        with torch.cuda.device(rows.x.get_device()):  # Triton launches on the current device; of a CPU: -1, no effect
            kernel[-(-m // tile.rows), runs](
                *_known(rows),
                *_known(cols),
                *parts,
                m,
                n,
                span,
                *numbers,
                K=0 if rows.u is None else rows.u.shape[1],
                D=D,
                DP=width,
                BM=tile.rows,
                BN=tile.columns,
                DEPTH=tile.depth,
                PRECISION=precision,
                num_warps=tile.warps,
                num_stages=tile.stages,
                enable_fp_fusion=True,  # Triton 3.9 warns where it is left to a default that will change
            )
    return [p if p is None else p[0] if runs == 1 else p.sum(0) for p in parts]


def _cut(m: int, n: int, tile: Tile, processors: int) -> tuple[int, int]:
    """(runs, columns in each): four programs a processor where the rows alone are fewer; a run has 8 tiles or more."""
    wanted = -(-4 * processors // max(1, -(-m // tile.rows)))
    runs = max(1, min(wanted, n // (8 * tile.columns)))
    span = max(1, -(-n // (runs * tile.columns))) * tile.columns
    return max(1, -(-n // span)), span


def _precision(device: torch.device) -> Precision:
    """The faster of those that keep fp32, as far as that was measured."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return "tf32x3"
    from triton.backends.nvidia.compiler import CUDAOptions

    return "bf16x6" if "bf16x6" in CUDAOptions.allowed_dot_input_precisions else "tf32x3"


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _known(side: Side) -> tuple[Tensor | None, ...]:
    return side.x, side.id, side.u, side.cat, side.subject, side.site, side.scale


def _check(rows: Side, cols: Side) -> None:
    """A kernel reads what it is given as if it were of this shape and type."""
    for f in fields(Side):
        a, b = getattr(rows, f.name), getattr(cols, f.name)
        if (a is None) != (b is None):
            raise ValueError(f"{f.name} is known of one side of the pairs only")
        dtype = torch.float32 if f.name in ("x", "u", "scale") else torch.int32
        dim = 2 if f.name in ("x", "u") else 1
        for side, value in ((rows, a), (cols, b)):
            if value is None:
                continue
            found = (value.dtype, value.dim(), len(value), value.device, value.is_contiguous())
            if found != (dtype, dim, len(side.x), rows.x.device, True):
                raise ValueError(
                    f"{f.name} is {value.dtype} {tuple(value.shape)} on {value.device}, contiguous: {found[-1]}; "
                    f"wanted {dtype}, {dim}-D, {len(side.x)} long, on {rows.x.device}, contiguous"
                )
        if dim == 2 and a is not None and a.shape[1] != b.shape[1]:
            raise ValueError(f"{f.name} has {a.shape[1]} columns on one side and {b.shape[1]} on the other")
    if not 1 <= rows.x.shape[1] <= WIDEST:
        raise ValueError(f"x has {rows.x.shape[1]} columns; the kernels hold 1 to {WIDEST}")
    if rows.u is not None and rows.u.shape[1] > MOST:
        raise ValueError(f"u has {rows.u.shape[1]} columns; the kernels hold at most {MOST}")


# The kernels. Names without a 2 are of the rows, names with it of the columns; what is not known is None, a constant at
# compilation. What a tile needs of its rows is read again for each tile, from the nearest cache: registers are dearer.


@triton.jit  # type: ignore[untyped-decorator]
def _numbers(P: tl.tensor, at: tl.tensor, end: tl.tensor, STRIDE: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """P[at], P[at + 1], ... (BLOCK,), 0 from `end` on."""
    i = at + tl.arange(0, BLOCK)
    return tl.load(P + i * STRIDE, mask=i < end, other=0)


@triton.jit  # type: ignore[untyped-decorator]
def _vectors(
    X: tl.tensor, at: tl.tensor, end: tl.tensor, d0: tl.tensor,
    D: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Coordinates d0, d0 + 1, ... of x[at], x[at + 1], ... (BLOCK, WIDTH), 0 outside."""
    i = tl.arange(0, BLOCK)[:, None]
    d = d0 + tl.arange(0, WIDTH)[None, :]
    base = X + tl.cast(at, tl.int64) * D  # 64 bits once a tile, 32 within it
    return tl.load(base + (i * D + d), mask=(at + i < end) & (d < D), other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _distance(
    U: tl.tensor, U2: tl.tensor, row: tl.tensor, m: tl.tensor, at: tl.tensor, end: tl.tensor,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """sum_k (u_ik - u_jk)^2 (BM, BN): by differences, which are exact where the metadata are near."""
    q = tl.zeros([BM, BN], tl.float32)
    for k in tl.static_range(K):
        u = _numbers(U + k, row, m, K, BM)[:, None] - _numbers(U2 + k, at, end, K, BN)[None, :]
        q += u * u
    return q


@triton.jit  # type: ignore[untyped-decorator]
def _one_minus_exp2(q: tl.tensor) -> tl.tensor:
    """1 - 2^-q for q >= 0, to about 2 units of 2^-24 of itself: 1 - w would keep nothing of it where metadata are near.

    Below q = 1 q times a polynomial, the best of its degree in relative error (9e-9), computed for this.
    """
    p = 0.0012907797 - q * 0.00011458044
    p = 0.05549895 + q * (-0.009596275 + q * p)
    p = 0.69314718 + q * (-0.24022606 + q * p)
    return tl.where(q < 1.0, q * p, 1.0 - tl.exp2(-q))


@triton.jit  # type: ignore[untyped-decorator]
def _add(total: tl.tensor, lost: tl.tensor, new: tl.tensor) -> tl.tensor:
    """(total + new, what rounding has lost of it so far)   (Kahan 1965)."""
    new = new - lost
    grown = total + new
    return grown, (grown - total) - new


@triton.jit(do_not_specialize=["m", "n", "span"])  # type: ignore[untyped-decorator]
def _exp_sums(
    X: tl.tensor, ID: tl.tensor, U: tl.tensor, CAT: tl.tensor, SUBJECT: tl.tensor, SITE: tl.tensor, SCALE: tl.tensor,
    X2: tl.tensor, ID2: tl.tensor, U2: tl.tensor, CAT2: tl.tensor,
    SUBJECT2: tl.tensor, SITE2: tl.tensor, SCALE2: tl.tensor,
    S: tl.tensor, MASS: tl.tensor, G: tl.tensor, m: tl.tensor, n: tl.tensor, span: tl.tensor, kappa: tl.tensor,
    K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0) * BM
    begin = tl.program_id(1) * span
    end = min(begin + span, n)
    s = tl.zeros([BM], tl.float32)
    s_lost = tl.zeros([BM], tl.float32)
    mass = tl.zeros([BM], tl.float32)
    mass_lost = tl.zeros([BM], tl.float32)
    if G is not None:
        g = tl.zeros([BM, DP], tl.float32)
    for at in range(begin, end, BN):
        e = tl.zeros([BM, BN], tl.float32)
        # By parts of the coordinates: operands of the whole D at once, each in its two TF32 parts, would spill.
        for d in range(0, DP, DEPTH):
            x = _vectors(X, row, m, d, D, BM, DEPTH)
            y = _vectors(X2, at, end, d, D, BN, DEPTH)
            e = tl.dot(x, tl.trans(y), e, input_precision=PRECISION)
        e = tl.exp2(e * kappa)

        v = tl.full([BM, BN], 1.0, tl.float32)
        keep = _numbers(ID, row, m, 1, BM)[:, None] != _numbers(ID2, at, end, 1, BN)[None, :]
        keep = keep & (at + tl.arange(0, BN) < end)[None, :]
        if U is not None:
            v = _one_minus_exp2(_distance(U, U2, row, m, at, end, K, BM, BN))
        if CAT is not None:
            unlike = _numbers(CAT, row, m, 1, BM)[:, None] != _numbers(CAT2, at, end, 1, BN)[None, :]
            if U is not None:
                v = tl.where(unlike, 1.0, v)
            else:
                keep = keep & unlike
        if SUBJECT is not None and (U is not None or CAT is not None):
            keep = keep & (_numbers(SUBJECT, row, m, 1, BM)[:, None] != _numbers(SUBJECT2, at, end, 1, BN)[None, :])
        if SITE is not None:
            keep = keep & (_numbers(SITE, row, m, 1, BM)[:, None] == _numbers(SITE2, at, end, 1, BN)[None, :])
        v = tl.where(keep, v, 0.0)
        if SCALE is not None:
            v = v * (_numbers(SCALE, row, m, 1, BM)[:, None] + _numbers(SCALE2, at, end, 1, BN)[None, :])
        # v + 0 e: the compiler then lays v out over the threads as e is. It computed all of v twice, once for each sum.
        v = tl.fma(e, 0.0, v)
        p = v * e
        s, s_lost = _add(s, s_lost, tl.sum(p, 1))
        mass, mass_lost = _add(mass, mass_lost, tl.sum(v, 1))
        if G is not None:
            # Triton sums the three products of a tile from zero and adds that to g outside of the tensor cores, which
            # truncate what they add to: over n columns it would show.
            g += tl.dot(p, _vectors(X2, at, end, 0, D, BN, DP), input_precision=PRECISION)

    i = row + tl.arange(0, BM)
    to = tl.program_id(1).to(tl.int64) * m
    tl.store(S + to + i, s, mask=i < m)
    tl.store(MASS + to + i, mass, mask=i < m)
    if G is not None:
        _store(G, to + row, to + m, g, D, BM, DP)


@triton.jit  # type: ignore[untyped-decorator]
def _store(
    X: tl.tensor, at: tl.tensor, end: tl.tensor, x: tl.tensor,
    D: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
) -> None:  # fmt: skip
    """The counterpart of `_vectors`."""
    i = tl.arange(0, BLOCK)[:, None]
    d = tl.arange(0, WIDTH)[None, :]
    tl.store(X + tl.cast(at, tl.int64) * D + (i * D + d), x, mask=(at + i < end) & (d < D))


@triton.jit(do_not_specialize=["m", "n", "span"])  # type: ignore[untyped-decorator]
def _pull(
    X: tl.tensor, ID: tl.tensor, U: tl.tensor, CAT: tl.tensor, SUBJECT: tl.tensor, SITE: tl.tensor, SCALE: tl.tensor,
    X2: tl.tensor, ID2: tl.tensor, U2: tl.tensor, CAT2: tl.tensor,
    SUBJECT2: tl.tensor, SITE2: tl.tensor, SCALE2: tl.tensor,
    P: tl.tensor, W: tl.tensor, m: tl.tensor, n: tl.tensor, span: tl.tensor,
    K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0) * BM
    begin = tl.program_id(1) * span
    end = min(begin + span, n)
    p = tl.zeros([BM, DP], tl.float32)
    s = tl.zeros([BM], tl.float32)
    s_lost = tl.zeros([BM], tl.float32)
    for at in range(begin, end, BN):
        w = tl.full([BM, BN], 1.0, tl.float32)
        keep = _numbers(ID, row, m, 1, BM)[:, None] != _numbers(ID2, at, end, 1, BN)[None, :]
        keep = keep & (at + tl.arange(0, BN) < end)[None, :]
        if SUBJECT is not None:
            keep = keep & (_numbers(SUBJECT, row, m, 1, BM)[:, None] != _numbers(SUBJECT2, at, end, 1, BN)[None, :])
        if CAT is not None:
            keep = keep & (_numbers(CAT, row, m, 1, BM)[:, None] == _numbers(CAT2, at, end, 1, BN)[None, :])
        if U is not None:
            w = tl.exp2(-_distance(U, U2, row, m, at, end, K, BM, BN))
        w = tl.where(keep, w, 0.0)
        s, s_lost = _add(s, s_lost, tl.sum(w, 1))
        if SCALE is not None:
            w = w * (_numbers(SCALE, row, m, 1, BM)[:, None] + _numbers(SCALE2, at, end, 1, BN)[None, :])
        p += tl.dot(w, _vectors(X2, at, end, 0, D, BN, DP), input_precision=PRECISION)

    i = row + tl.arange(0, BM)
    to = tl.program_id(1).to(tl.int64) * m
    tl.store(W + to + i, s, mask=i < m)
    _store(P, to + row, to + m, p, D, BM, DP)
