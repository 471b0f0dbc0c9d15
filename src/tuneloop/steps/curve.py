"""The picture of a fine-tuning: loss, validation loss and learning rate over the steps, as a PNG.

It is drawn from `metrics.jsonl` of the attempt and of those before it, into `pictures/` beside the outputs:
what is trained does not depend on it. Equal values give equal bytes. Needs no torch.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tuneloop.steps.context import StepContext

FOLDER = "pictures"
NAME = "loss.png"
SMOOTHED_OVER = 0.02
"""Of all points: the span of the moving mean."""
LOSS, VALIDATION, RATE = "#1f77b4", "#d62728", "#6a51a3"

Points = list[tuple[int, float]]


def draw(context: StepContext) -> Path | None:
    """Draws what the attempts have measured so far; None where there is nothing to draw. What goes wrong is a
    warning: no training fails for the sake of its picture."""
    try:
        found = read([*context.previous_attempts, context.folder])
        if not found.get("loss") and not found.get("eval_loss"):
            return None
        path = context.folder / FOLDER / NAME
        path.parent.mkdir(exist_ok=True)
        paint(found, path, title=context.step.attempt.rpartition("/")[0])
    except Exception as error:
        context.warn(f"the loss was not drawn: {type(error).__name__}: {error}")
        return None
    return path


def read(attempts: Iterable[Path]) -> dict[str, Points]:
    """Each metric in the order of its steps. Where an attempt repeats steps of an earlier one, it counts."""
    found: dict[str, dict[int, float]] = {}
    for attempt in attempts:
        lines = list(_lines(attempt / "metrics.jsonl"))
        first = min((step for step, _ in lines), default=0)
        for points in found.values() if lines else ():
            # What an interrupted attempt did behind its last checkpoint was done again.
            for step in [step for step in points if step >= first]:
                del points[step]
        for step, values in lines:
            for name, value in values.items():
                if value is not None and math.isfinite(value):
                    found.setdefault(name, {})[step] = float(value)
    return {name: sorted(points.items()) for name, points in found.items()}


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    for line in text.splitlines():
        try:
            told = json.loads(line)
            yield int(told["step"]), dict(told["values"])
        except (ValueError, TypeError, KeyError):
            continue  # A full disk or a kill cut it off.


def smoothed(values: Sequence[float]) -> list[float]:
    """A moving mean over the points on both sides, fewer at the ends."""
    reach = max(1, round(SMOOTHED_OVER * len(values)))
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    found = []
    for place in range(len(values)):
        begin, end = max(0, place - reach), min(len(values), place + reach + 1)
        found.append((sums[end] - sums[begin]) / (end - begin))
    return found


def paint(found: dict[str, Points], path: Path, *, title: str) -> None:
    """`found`: metrics by name, at least one loss among them."""
    with _matplotlib() as figure_of:
        figure = figure_of(figsize=(8, 5.4), dpi=120, layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        _paint_losses(above, found)
        above.set_title(title, loc="left", fontsize=10)
        _paint(below, found.get("learning_rate", []), color=RATE)
        below.set_ylabel("learning rate")
        below.set_xlabel("step")
        below.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
        for axes in (above, below):
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        staging = path.with_name(f"{path.name}.part")
        # Without the name and version of the program: equal values, equal bytes.
        figure.savefig(staging, format="png", metadata={"Software": None})
        staging.replace(path)


def _paint_losses(axes: Any, found: dict[str, Points]) -> None:
    losses = found.get("loss", [])
    if losses:
        steps, values = zip(*losses, strict=True)
        means = smoothed(values)
        is_smooth = len(values) > 10
        if is_smooth:
            _paint(axes, losses, color=LOSS, alpha=0.3, linewidth=0.8)
        told = f"loss (last {means[-1]:.4g})"
        _paint(axes, list(zip(steps, means if is_smooth else values, strict=True)), color=LOSS, label=told)
    validated = found.get("eval_loss", [])
    if validated:
        step, least = min(validated, key=lambda point: point[1])
        told = f"validation loss (least {least:.4g} at step {step})"
        _paint(axes, validated, color=VALIDATION, label=told, marker="o", markersize=4)
    axes.set_ylabel("loss, nats per token")
    axes.legend(frameon=False)


def _paint(axes: Any, points: Points, **how: Any) -> None:
    if points:
        steps, values = zip(*points, strict=True)
        # A line through one point is nothing to see.
        dots = {"marker": "o", "markersize": 4} if len(points) == 1 else {}
        axes.plot(steps, values, **{**dots, **how})


@contextmanager
def _matplotlib() -> Iterator[Any]:
    """Its `Figure`, without windows and whatever a person's matplotlibrc says. Imported here: it takes half a
    second and is not needed before."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def figure_of(**how: Any) -> Any:
        figure = Figure(**how)
        FigureCanvasAgg(figure)
        return figure

    with warnings.catch_warnings(), matplotlib.rc_context():
        # A glyph that its font lacks, say: nothing that a person could mend.
        warnings.simplefilter("ignore")
        matplotlib.rcdefaults()
        yield figure_of
