"""How arguments are written: `k=v`, `NAME:VERSION`, `JOB:OUTPUT`. What does not parse is a usage error."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import click


class FiniteRange(click.FloatRange):
    """A number within bounds; `nan`, which no comparison refuses, is none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a number.", param, ctx)
        return number


def assignments(written: Iterable[str], option: str) -> dict[str, str]:
    """`("a=1", "b=x=y")` as `{"a": "1", "b": "x=y"}`."""
    found: dict[str, str] = {}
    for text in written:
        name, sign, value = text.partition("=")
        if not sign or not name.strip():
            raise click.UsageError(f"{option} {text!r} is not NAME=VALUE.")
        found[name.strip()] = value
    return found


def shares(written: Iterable[str]) -> dict[str, int]:
    """`("demo=90", "blue=10")` as whole per cents, `%` allowed."""
    found: dict[str, int] = {}
    for name, value in assignments(written, "traffic").items():
        try:
            found[name] = int(value.removesuffix("%"))
        except ValueError:
            raise click.UsageError(f"traffic {name}={value!r} is not a whole number of per cent.") from None
    return found


def versioned(text: str, default: str | None = None) -> tuple[str, str]:
    """`NAME:VERSION`; without a version `default`, or a usage error when there is no default."""
    name, _, version = text.partition(":")
    chosen = version or default
    if not name or chosen is None:
        raise click.UsageError(f"{text!r} is not NAME:VERSION.")
    return name, chosen


def job_output(text: str, default: str = "trained_model") -> tuple[str, str]:
    """`JOB:OUTPUT`; without an output the trained model."""
    job, _, output = text.partition(":")
    if not job:
        raise click.UsageError(f"{text!r} is not JOB:OUTPUT.")
    return job, output or default
