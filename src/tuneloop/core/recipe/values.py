"""How a single value may be written: the component's habits, made into Python types.

The component's boolean-like inputs are the strings "true" and "false", its number enums are strings, and the
same values arrive as Python booleans and numbers from a model's tags, or as text from a wire.
All of them are accepted, and one form is kept: `bool`, `int`, `float`, `str`.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from tuneloop.core.types import Noun


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    raise PydanticCustomError("flag", "expected true or false")


def _integer(value: object) -> int:
    if isinstance(value, str):
        value = _from_text(value, "expected a whole number")
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise PydanticCustomError("integer", "expected a whole number")
    return int(value)


def _number(value: object) -> float:
    if isinstance(value, str):
        value = _from_text(value, "expected a number")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise PydanticCustomError("number", "expected a number")
    return float(value)


def _from_text(text: str, expected: str) -> int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise PydanticCustomError("number", expected)


def _length(value: int) -> int:
    if value == 0 or value < -1:
        raise PydanticCustomError("length", "must be 1 or more, or -1 for the model's maximum")
    return value


def _digit_text(value: object) -> object:
    """16 and "16" are the same choice."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value.strip() if isinstance(value, str) else value


Flag = Annotated[bool, BeforeValidator(_flag)]
Integer = Annotated[int, BeforeValidator(_integer)]
Number = Annotated[float, BeforeValidator(_number)]
GREATEST = 2**31 - 1
"""More than any count can mean; a slip of the keyboard should not train for ever."""
Count = Annotated[int, BeforeValidator(_integer), Field(ge=1, le=GREATEST)]
CountOrZero = Annotated[int, BeforeValidator(_integer), Field(ge=0, le=GREATEST)]
CountOrOff = Annotated[int, BeforeValidator(_integer), Field(ge=-1, le=GREATEST)]
"""-1 stands for "no limit" or "not set"."""
Length = Annotated[int, BeforeValidator(_integer), AfterValidator(_length)]
PositiveNumber = Annotated[float, BeforeValidator(_number), Field(gt=0)]
NumberOrZero = Annotated[float, BeforeValidator(_number), Field(ge=0)]
Fraction = Annotated[float, BeforeValidator(_number), Field(ge=0, le=1)]
FractionBelowOne = Annotated[float, BeforeValidator(_number), Field(ge=0, lt=1)]
Precision = Annotated[Literal["32", "16"], BeforeValidator(_digit_text)]
ZeroStage = Annotated[Literal["2", "3"], BeforeValidator(_digit_text)]


class Parameters(Noun):
    """What one kind of step can be told. Every field has a default, so a part of them is valid too."""
