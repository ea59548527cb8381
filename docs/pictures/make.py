"""The figures of docs/mathematics.md, from the library's own functions: `python docs/pictures/make.py [FOLDER]`.

The same bytes each time (of one matplotlib): no date, fixed ids, fixed seeds.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from torch import Tensor
from torch.nn.functional import normalize

from cauc_dist import kernels, losses

INK, BLUE, RED, GREY = "#1a1a2e", "#2f5fb3", "#c0392b", "#8a8a99"
STYLE = {"svg.hashsalt": "cauc-dist", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def kernel(axes: Axes) -> None:
    """w of two ages by their difference: what attracts (w) and what repels (1 - w)."""
    d = torch.linspace(0, 30, 301, dtype=torch.float64)[:, None]
    for sigma, style in ((2.0, ":"), (5.0, "-"), (10.0, "--")):
        w = kernels.gaussian(sigma)(d[:1], d)[0]
        axes.plot(d, w, style, color=BLUE, label=f"w, sigma {sigma:g}")
    axes.plot(d, kernels.gaussian(5.0).complement(d[:1], d)[0], color=RED, label="1 - w, sigma 5")
    axes.plot(d, kernels.cauchy(1 / 25)(d[:1], d)[0], color=GREY, lw=1, label="w, Cauchy, gamma 1/25")
    axes.set(xlabel="difference of ages, years", ylabel="weight of the pair", ylim=(0, 1.03), xlim=(0, 30))
    axes.legend(frameon=False)


def circle(axes: Axes) -> None:
    """Eight subjects on a circle: lines attract as wide as w, dashed lines repel as wide as 1 - w."""
    ages = torch.tensor([20.0, 23, 27, 40, 44, 61, 66, 70], dtype=torch.float64)[:, None]
    turn = 2 * math.pi * torch.tensor([0.02, 0.3, 0.09, 0.42, 0.55, 0.71, 0.62, 0.86], dtype=torch.float64)
    x, y, w = turn.cos(), turn.sin(), kernels.gaussian(5.0)(ages)
    for j in range(1, len(ages)):
        axes.plot(x[[0, j]], y[[0, j]], "-", color=BLUE, lw=4 * float(w[0, j]), alpha=0.8)
        axes.plot(x[[0, j]], y[[0, j]], "--", color=RED, lw=1.2 * float(1 - w[0, j]), alpha=0.8)
    points = axes.scatter(x, y, c=ages[:, 0], cmap="viridis", s=130, zorder=3, edgecolors=INK)
    for age, a, b in zip(ages[:, 0].tolist(), x.tolist(), y.tolist(), strict=True):
        axes.annotate(f"{age:g}", (1.2 * a, 1.2 * b), ha="center", va="center")
    axes.set(aspect="equal", xlim=(-1.4, 1.4), ylim=(-1.4, 1.4))
    axes.axis("off")
    axes.figure.colorbar(points, ax=axes, label="age, years", shrink=0.7)


def repulsion(axes: Axes) -> None:
    """How hard a pair repels by its distance: 2 t d e^(-t d^2), the slope of e^(-t d^2) turned round."""
    d = torch.linspace(0, 2, 201)
    for t, style in ((0.5, ":"), (2.0, "-"), (5.0, "--")):
        axes.plot(d, 2 * t * d * torch.exp(-t * d * d), style, color=RED, label=f"t {t:g}")
    axes.set(
        xlabel="distance of two embeddings on the unit sphere", ylabel="push of a pair, before the log", xlim=(0, 2)
    )
    axes.legend(frameon=False)


def trained(objective: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """80 free points on the circle, two views each, after 400 steps; (angles, ages)."""
    torch.manual_seed(0)
    ages = (20 + 60 * torch.rand(80, 1)).double()
    z = torch.randn(80, 2, dtype=torch.float64).requires_grad_()
    noise = 0.15 * torch.randn(2, 80, 2, dtype=torch.float64)
    optimiser = torch.optim.Adam([z], lr=0.05)
    for _ in range(400):
        optimiser.zero_grad()
        objective(normalize(z + noise, dim=-1), ages).backward()
        optimiser.step()
    return torch.atan2(z[:, 1], z[:, 0]).detach(), ages[:, 0]


def four() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The 2x2 of one t and one weight."""
    k, same = kernels.gaussian(5.0), {"t": 2.0, "lambda_align": 1.5}
    return {
        "plain alignment,\nall repel": lambda z, y: losses.align_uniform(z, **same),
        "conditional alignment,\nall repel": lambda z, y: losses.calign_unif(z, y, k, **same),
        "plain alignment,\nonly the unlike repel": lambda z, y: losses.align_cunif(z, y, k, **same),
        "cauc": lambda z, y: losses.cauc(z, y, k, **same),
    }


def circles(figure: Figure) -> None:
    """Where the four objectives put the same 80 subjects on a circle."""
    for i, (name, objective) in enumerate(four().items()):
        axes = figure.add_subplot(1, 4, i + 1)
        angles, ages = trained(objective)
        axes.add_patch(Circle((0, 0), 1, fill=False, color=GREY, lw=0.6))
        lift = 1 + 0.004 * (ages - 50)  # older ones a little further out, so that points do not hide each other
        axes.scatter(lift * angles.cos(), lift * angles.sin(), c=ages, cmap="viridis", s=9)
        axes.set(aspect="equal", xlim=(-1.3, 1.3), ylim=(-1.3, 1.3))
        axes.set_title(name, fontsize=8)
        axes.axis("off")


def main(folder: Path) -> None:
    """Write the four figures."""
    with plt.rc_context(STYLE):
        for name, draw in (("kernel", kernel), ("circle", circle), ("repulsion", repulsion)):
            figure, axes = plt.subplots(figsize=(4.6, 3.1), layout="constrained")
            draw(axes)
            save(figure, folder / f"{name}.svg")
        figure = plt.figure(figsize=(7.4, 2.3), layout="constrained")
        circles(figure)
        save(figure, folder / "four.svg")


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None}, facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
