"""The picture of a fine-tuning: what is read for it, what is drawn, and that it never stops a step."""

from __future__ import annotations

import json
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from tests.steps import step_context
from tuneloop.core.errors import Diverged
from tuneloop.steps import curve, finetune
from tuneloop.steps.context import StepContext


@pytest.fixture
def context(tmp_path: Path) -> Iterator[StepContext]:
    made = step_context(tmp_path / "2", "finetune")
    made.previous_attempts = [tmp_path / "1"]
    yield made
    made.close()


def write(folder: Path, points: dict[int, dict[str, Any]], tail: str = "") -> None:
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"at_ms": 1, "step": step, "values": values}) for step, values in points.items()]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n" + tail)


def falling(first: int, last: int) -> dict[int, dict[str, Any]]:
    return {step: {"loss": 3.0 / step, "learning_rate": 1e-4} for step in range(first, last + 1)}


def colours_of(png: bytes) -> set[tuple[int, int, int]]:
    """Of an 8-bit RGBA picture as Agg writes it."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    place, packed, wide, high = 8, b"", 0, 0
    while place < len(png):
        (size,), kind = struct.unpack(">I", png[place : place + 4]), png[place + 4 : place + 8]
        body = png[place + 8 : place + 8 + size]
        if kind == b"IHDR":
            wide, high, depth, form = struct.unpack(">IIBB", body[:10])
            assert (depth, form) == (8, 6)
        packed += body if kind == b"IDAT" else b""
        place += 12 + size
    rows = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(high, 1 + 4 * wide)
    return {tuple(map(int, pixel[:3])) for pixel in unfiltered(rows, wide).reshape(-1, 4)}


def unfiltered(rows: np.ndarray, wide: int) -> np.ndarray:
    """PNG (RFC 2083, section 6): each row says how it was written."""
    found = np.zeros((len(rows), wide, 4), np.int64)
    for y, row in enumerate(rows):
        kind, values = row[0], row[1:].reshape(wide, 4).astype(np.int64)
        above = found[y - 1] if y else np.zeros((wide, 4), np.int64)
        for x in range(wide):
            left = found[y, x - 1] if x else np.zeros(4, np.int64)
            corner = above[x - 1] if x else np.zeros(4, np.int64)
            found[y, x] = (values[x] + predicted(kind, left, above[x], corner)) % 256
    return found


def predicted(kind: int, left: np.ndarray, above: np.ndarray, corner: np.ndarray) -> Any:
    if kind < 4:
        return (0, left, above, (left + above) // 2)[kind]
    guess = left + above - corner
    far = [abs(guess - each) for each in (left, above, corner)]
    is_left = (far[0] <= far[1]) & (far[0] <= far[2])
    return np.where(is_left, left, np.where(far[1] <= far[2], above, corner))


def test_an_attempt_goes_on_where_the_one_before_was_resumed(context: StepContext, tmp_path: Path) -> None:
    write(tmp_path / "1", {1: {"loss": 5.0}, 2: {"loss": 4.0}, 3: {"loss": 9.0}}, tail='{"at_ms": 1, "st')
    write(tmp_path / "2", {3: {"loss": 3.0, "eval_loss": 2.0}, 4: {"loss": None}})
    found = curve.read([tmp_path / "1", tmp_path / "2"])
    assert found == {"loss": [(1, 5.0), (2, 4.0), (3, 3.0)], "eval_loss": [(3, 2.0)]}


def test_an_attempt_without_metrics_takes_nothing_away(context: StepContext, tmp_path: Path) -> None:
    write(tmp_path / "1", falling(1, 4))
    assert len(curve.read([tmp_path / "1", tmp_path / "2", tmp_path / "3"])["loss"]) == 4


def test_equal_values_give_equal_bytes_and_other_values_others(context: StepContext, tmp_path: Path) -> None:
    write(tmp_path / "2", falling(1, 30))
    first = curve.draw(context)
    assert first == tmp_path / "2" / "pictures" / "loss.png"
    drawn = first.read_bytes()
    first.unlink()
    assert curve.draw(context).read_bytes() == drawn  # type: ignore[union-attr]
    write(tmp_path / "2", falling(1, 31))
    assert curve.draw(context).read_bytes() != drawn  # type: ignore[union-attr]
    assert [path.name for path in first.parent.iterdir()] == ["loss.png"]


def test_loss_validation_and_rate_have_lines_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib.figure

    real = matplotlib.figure.Figure.__init__
    small = lambda self, *_, **how: real(self, **{**how, "figsize": (3, 2.5), "dpi": 60})  # noqa: E731
    monkeypatch.setattr(matplotlib.figure.Figure, "__init__", small)
    points = [(step, 3.0 / step) for step in range(1, 20)]

    def seen(**found: Any) -> set[str]:
        curve.paint(found, tmp_path / "a.png", title="job/finetune")
        colours = colours_of((tmp_path / "a.png").read_bytes())
        names = {"loss": curve.LOSS, "eval_loss": curve.VALIDATION, "learning_rate": curve.RATE}
        return {name for name, colour in names.items() if tuple(bytes.fromhex(colour[1:])) in colours}

    assert seen(loss=points) == {"loss"}
    assert seen(loss=points, eval_loss=points[::5], learning_rate=points) == {
        "loss",
        "eval_loss",
        "learning_rate",
    }
    assert seen(eval_loss=points[:1]) == {"eval_loss"}


def test_the_strong_line_is_a_mean_of_neighbours() -> None:
    values = [1.0, 3.0] * 100
    means = curve.smoothed(values)
    assert len(means) == 200
    assert all(abs(mean - 2.0) < 0.2 for mean in means[4:-4])
    assert curve.smoothed([5.0]) == [5.0]


def test_nothing_measured_is_no_picture(context: StepContext) -> None:
    assert curve.draw(context) is None
    assert not (context.folder / "pictures").exists()
    assert context.warnings == []


def test_what_a_person_set_for_matplotlib_changes_nothing_and_is_left_alone(
    context: StepContext, tmp_path: Path
) -> None:
    import matplotlib

    write(tmp_path / "2", falling(1, 30))
    drawn = curve.draw(context).read_bytes()  # type: ignore[union-attr]
    with matplotlib.rc_context({"lines.linewidth": 9}):
        assert curve.draw(context).read_bytes() == drawn  # type: ignore[union-attr]
        assert matplotlib.rcParams["lines.linewidth"] == 9


def test_a_picture_that_cannot_be_drawn_is_a_warning(
    context: StepContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "2", falling(1, 3))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert curve.draw(context) is None
    assert context.warnings[0].startswith("the loss was not drawn: ")


@pytest.mark.parametrize("mistake", [None, Diverged("the loss has blown up")])
def test_the_finetune_step_draws_when_it_ends_and_when_it_fails(
    context: StepContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: Exception | None
) -> None:
    def train(context: StepContext) -> None:
        context.metrics(1, loss=2.0)
        if mistake is not None:
            raise mistake

    monkeypatch.setattr(finetune, "_train", train)
    if mistake is None:
        finetune.run(context)
    else:
        with pytest.raises(Diverged):
            finetune.run(context)
    assert (tmp_path / "2" / "pictures" / "loss.png").stat().st_size > 1000
