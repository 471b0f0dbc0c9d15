"""Bodies of requests, read so that nothing in them is passed over in silence.

What is read is known; `finish` refuses every other field that says something, by its name. A field that is
null, or an empty object or list, says nothing: the SDK sends many of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from datetime import timedelta
from typing import Any

from tuneloop.server.azure.errors import Mistake, refused

_DURATION = re.compile(
    r"P(?:(?P<days>\d+(?:\.\d+)?)D)?"
    r"(?:T(?:(?P<hours>\d+(?:\.\d+)?)H)?(?:(?P<minutes>\d+(?:\.\d+)?)M)?(?:(?P<seconds>\d+(?:\.\d+)?)S)?)?"
)


class Body:
    """A JSON object of a request. Values of the wrong kind are mistakes too; all are told at once."""

    def __init__(self, value: Any, at: str = "", known: _Known | None = None) -> None:
        self._known = known or _Known()
        self.at = at
        if not isinstance(value, dict):
            self._known.mistakes.append(
                Mistake(at or "body", "is not a JSON object.", "InvalidRequestContent")
            )
            value = {}
        self._value: dict[str, Any] = value
        self._read: set[str] = set()
        self._known.bodies.append(self)

    def __contains__(self, key: str) -> bool:
        return _says(self._value.get(key))

    def place(self, key: str) -> str:
        return f"{self.at}.{key}" if self.at else key

    def names(self) -> list[str]:
        return [key for key, value in self._value.items() if _says(value)]

    # ------------------------------------------------------------ reading

    def raw(self, key: str) -> Any:
        """Whatever is there; whoever reads it answers for all that is inside. None where nothing is."""
        self._read.add(key)
        return self._value.get(key)

    def text(self, key: str, default: str = "", *, choices: Collection[str] = ()) -> str:
        """Choices match whatever their case, and are given back as they are listed."""
        value = self.raw(key)
        if value is None:
            return default
        if not isinstance(value, str):
            self.wrong(key, f"is {_shown(value)}; expected a text.")
            return default
        if not choices:
            return value
        found = next((one for one in choices if one.lower() == value.lower()), None)
        if found is None:
            self.wrong(key, f"is {value!r}; expected one of: {', '.join(choices)}.")
        return found or default

    def number(self, key: str, default: int = 0, *, least: int | None = None, most: int | None = None) -> int:
        value = self.raw(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            self.wrong(key, f"is {_shown(value)}; expected a whole number.")
            return default
        if (least is not None and value < least) or (most is not None and value > most):
            self.wrong(key, f"is {value}; expected {_range(least, most)}.")
            return default
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.raw(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.wrong(key, f"is {_shown(value)}; expected true or false.")
            return default
        return value

    def seconds(self, key: str, default: float | None = None) -> float | None:
        """Of a duration as ISO 8601 writes it: PT1M30S."""
        value = self.raw(key)
        if value is None:
            return default
        found = duration_seconds(value)
        if found is None:
            self.wrong(key, f"is {_shown(value)}; expected an ISO 8601 duration such as PT1M30S.")
            return default
        return found

    def texts(self, key: str) -> dict[str, str]:
        """A mapping of texts to texts, such as tags. Null values are left out."""
        value = self.raw(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.wrong(key, f"is {_shown(value)}; expected an object of texts.")
            return {}
        found = {}
        for name, one in value.items():
            if isinstance(one, str):
                found[name] = one
            elif one is not None:
                self.wrong(f"{key}.{name}", f"is {_shown(one)}; expected a text.")
        return found

    def object(self, key: str) -> Body:
        """The object under `key`; an empty one where there is none."""
        value = self.raw(key)
        return Body({} if value is None else value, self.place(key), self._known)

    def objects(self, key: str) -> Iterator[tuple[str, Body]]:
        """Of an object of objects: name and object."""
        value = self.raw(key)
        if value is None:
            return
        if not isinstance(value, dict):
            self.wrong(key, f"is {_shown(value)}; expected an object.")
            return
        for name, inner in value.items():
            yield name, Body(inner, f"{self.place(key)}.{name}", self._known)

    # ------------------------------------------------------------ telling

    def expect(self, key: str, *allowed: Any, why: str) -> None:
        """The field may be missing or have one of `allowed`; anything else is refused with `why`."""
        value = self.raw(key)
        if not _says(value) or any(_equal(value, one) for one in allowed):
            return
        self.wrong(key, f"is {_shown(value)}: {why}", "NotSupported")

    def without_effect(self, key: str, why: str, *unless: Any) -> Any:
        """Accept the field, and warn that it does nothing here unless its value is one of `unless`."""
        value = self.raw(key)
        if _says(value) and not any(_equal(value, one) for one in unless):
            self._known.warnings.append(f"{self.place(key)} is {_shown(value)}: {why}")
        return value

    def passed_over(self, *keys: str) -> None:
        """Fields that only repeat what is known from elsewhere (ids, system data) or what we answered."""
        self._read.update(keys)

    def wrong(self, key: str, message: str, code: str = "InvalidInput") -> None:
        self._known.mistakes.append(Mistake(self.place(key), message, code))

    def warn(self, text: str) -> None:
        self._known.warnings.append(text)

    def finish(self, *, is_loose: bool) -> tuple[str, ...]:
        """The warnings. Raises `Refusal` with every mistake, and every field that nobody read; with
        `is_loose` the latter are warnings."""
        mistakes = list(self._known.mistakes)
        warnings = list(self._known.warnings)
        for body in self._known.bodies:
            for key in body.names():
                if key in body._read:
                    continue
                place = body.place(key)
                if is_loose:
                    warnings.append(f"{place} has no effect here.")
                else:
                    told = "would be ignored here, so it is refused. Leave it out, or set azure_loose: true."
                    mistakes.append(Mistake(place, told, "NotSupported"))
        if mistakes:
            raise refused(mistakes)
        return tuple(warnings)


class _Known:
    """What one request's bodies share."""

    def __init__(self) -> None:
        self.bodies: list[Body] = []
        self.mistakes: list[Mistake] = []
        self.warnings: list[str] = []


def duration_seconds(value: object) -> float | None:
    """Of `PT1M30S`; None for what is no such text."""
    found = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if found is None or value in ("P", "PT") or str(value).endswith("T"):
        return None
    parts = {name: float(part) for name, part in found.groupdict().items() if part is not None}
    return timedelta(**parts).total_seconds()


def duration(seconds: float) -> str:
    """As ISO 8601 writes it."""
    whole = math.floor(seconds)
    if whole != seconds:
        return f"PT{seconds:g}S"
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    told = (f"{hours}H" if hours else "") + (f"{minutes}M" if minutes else "")
    return "PT" + told + (f"{left}S" if left or not told else "")


def _says(value: Any) -> bool:
    return value is not None and value != {} and value != []


def _equal(value: Any, other: Any) -> bool:
    if isinstance(value, str) and isinstance(other, str):
        return value.lower() == other.lower()
    return type(value) is type(other) and bool(value == other)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _range(least: int | None, most: int | None) -> str:
    if most is None:
        return f"{least} or more"
    return f"{most} or less" if least is None else f"{least} to {most}"


def strings(value: Mapping[str, Any]) -> dict[str, str]:
    """Azure's properties and tags are texts."""
    return {key: one if isinstance(one, str) else str(one) for key, one in value.items() if one is not None}
