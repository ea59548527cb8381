"""Figures of a study's results as SVG: few labels, the plane of alignment and uniformity, sensitivity."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Results = Mapping[str, Any]


def draw(results: Results, folder: Path) -> list[Path]:
    """The figures that these results allow; nothing where matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        return []
    mpl.use("svg")
    wanted: list[tuple[str, bool, Callable[[Axes, Results], None]]] = [
        ("few", bool(results["few"]), _few),
        ("plane", any("alignment" in row for row in results["features"]), _plane),
        ("sensitivity", any("=" in row["method"] for row in results["rows"]), _sensitivity),
    ]
    return [_figure(folder / f"{name}.svg", results, paint) for name, there, paint in wanted if there]


def _figure(path: Path, results: Results, paint: Callable[["Axes", Results], None]) -> Path:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "cauc", "svg.fonttype": "none"}):
        figure = Figure(figsize=(8, 5), layout="constrained")
        paint(figure.add_subplot(), results)
        figure.savefig(path, metadata={"Date": None})
    return path


def _few(axes: "Axes", results: Results) -> None:
    """The endpoint's target by number of labels, in the first evaluation that has few-label probes of it."""
    asked = results["contrasts"][0]["target"] if results["contrasts"] else None
    first = next((row for row in results["few"] if row["target"] == asked), results["few"][0])
    curves: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in results["few"]:
        if (row["target"], row["evaluation"]) == (first["target"], first["evaluation"]):
            curves[row["method"]].append((row["labels"], row["value"]))
    for method, points in curves.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=method)
    axes.set(xlabel="labels that the probe was fitted on", ylabel=f"{first['target']} ({first['evaluation']})")
    axes.legend(fontsize=7, ncols=2)


def _plane(axes: "Axes", results: Results) -> None:
    """Alignment against uniformity of training batches (Wang and Isola 2020, figure 5); lower is better on both."""
    for row in results["features"]:
        if "alignment" in row:
            axes.scatter(row["uniformity"], row["alignment"], s=20)
            axes.annotate(row["method"], (row["uniformity"], row["alignment"]), fontsize=7)
    axes.set(xlabel="uniformity of z (log mean e^(-t d))", ylabel="alignment of two views")


def _sensitivity(axes: "Axes", results: Results) -> None:
    """Methods named LOSS_SETTING=VALUE: gain of the linear probe along each setting, for the endpoint's target."""
    target = next(row["target"] for row in reversed(results["rows"]))
    curves: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in results["rows"]:
        if "=" in row["method"] and (row["target"], row["probe"]) == (target, "linear"):
            curve, _, value = row["method"].partition("=")
            curves[curve].append((float(value), row["value"]))
    for curve, points in curves.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=curve)
    axes.set(xscale="log", xlabel="the setting's value", ylabel=f"{target}, linear probe")
    axes.legend(fontsize=7)
