"""Figures of a study's results as SVG: few labels, the plane of alignment and uniformity, sensitivity."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
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
        *((f"sensitivity-{name}", True, partial(_sensitivity, setting=name)) for name in settings(results)),
    ]
    return [_figure(folder / f"{name}.svg", results, paint) for name, there, paint in wanted if there]


def settings(results: Results) -> list[str]:
    """Of methods named LOSS_SETTING=VALUE."""
    names = [row["method"].partition("=")[0] for row in results["rows"] if "=" in row["method"]]
    return list(dict.fromkeys(name.rpartition("_")[2] for name in names))


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


def _sensitivity(axes: "Axes", results: Results, setting: str) -> None:
    """The linear probe of the endpoint's target along one setting, a curve a loss, with its intervals."""
    target = results["contrasts"][0]["target"] if results["contrasts"] else results["rows"][0]["target"]
    curves: defaultdict[str, list[tuple[float, float, float, float]]] = defaultdict(list)
    for row in results["rows"]:
        curve, _, value = row["method"].partition("=")
        if value and curve.endswith(f"_{setting}") and (row["target"], row["probe"]) == (target, "linear"):
            told = row["value"]
            curves[curve].append((float(value), told, told - row["low"], row["high"] - told))
    for k, (curve, points) in enumerate(curves.items()):
        at, told, below, above = zip(*sorted(points), strict=True)
        shifted = [x * (1 + 0.02 * k) for x in at]  # side by side: the intervals would hide each other
        axes.errorbar(shifted, told, yerr=(below, above), marker="o", capsize=2, label=curve)
    axes.set(xscale="log", xlabel=setting, ylabel=f"{target}, linear probe")
    axes.legend(fontsize=7)
