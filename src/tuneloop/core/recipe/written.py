"""The recipe as it is written: what a person may put into the file, and nothing else.

display_name: my first run          # left out: built from the parameters, as the Azure document does
experiment: guide
model: SmolLM2-135M-Instruct        # or Name:version
model_defaults: fill                # or override: the model's defaults go over what is written here
data:
  train: train_sft.jsonl            # relative to the recipe's folder; samples:guide/... ships with Tuneloop
  validation: ...                   # left out: the end of train
  test: test_sft.jsonl
  questions: questions.jsonl        # questions with listed facts, asked of base and tuned model
  name: guide                       # the data's label in the display name
compute: local                      # or one per stage: {finetune: gpu-box}
model_import: {trust_remote_code: false}
preprocess: {max_seq_length: 512}   # parameters.PreprocessParameters
finetune: {learning_rate: 1e-4}     # parameters.FinetuneParameters
export: {}                          # parameters.ExportParameters
evaluate: {samples: 5}              # parameters.EvaluateParameters; false leaves the step out
settings: {force_rerun: false, continue_on_step_failure: false, priority: medium}

A section `component` may hold inputs of Azure's component by their own names; `pasted` moves each to its
place before a recipe is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr
from pydantic_core import PydanticCustomError

from tuneloop.core.errors import InvalidName
from tuneloop.core.names import check_name
from tuneloop.core.recipe.parameters import (
    EvaluateParameters,
    ExportParameters,
    FinetuneParameters,
    PreprocessParameters,
)
from tuneloop.core.recipe.values import Flag, Parameters
from tuneloop.core.types import Noun, Priority

STAGES = ("model_import", "preprocess", "finetune", "export", "evaluate")
DATA_ROLES = ("train", "validation", "test", "questions")

Text = Annotated[str, Field(min_length=1)]


def _name(value: object) -> object:
    if isinstance(value, str):
        try:
            return check_name(value)
        except InvalidName:
            rule = "use 1 to 128 letters, digits, '-', '_' or '.', beginning with a letter or digit"
            raise PydanticCustomError("name", rule) from None
    return value


Name = Annotated[str, BeforeValidator(_name)]


def _section(value: object) -> object:
    """`finetune:` with nothing under it is an empty section."""
    return {} if value is None else value


def _compute(value: object) -> object:
    """One name stands for every stage."""
    return dict.fromkeys(STAGES, value) if isinstance(value, str) else _section(value)


def _evaluation(value: object) -> object:
    """`false` leaves the step out (None); `true` or nothing is an empty section."""
    if value is False:
        return None
    return {} if value is True or value is None else value


class DataSection(Noun):
    train: Text
    validation: Text | None = None
    test: Text | None = None
    questions: Text | None = None
    name: Name | None = None

    def files(self) -> dict[str, str]:
        """Role to path as written, for the roles that are."""
        written = {role: getattr(self, role) for role in DATA_ROLES}
        return {role: path for role, path in written.items() if path is not None}


class ComputeSection(Noun):
    """The compute of each stage."""

    model_import: Name = "local"
    preprocess: Name = "local"
    finetune: Name = "local"
    export: Name = "local"
    evaluate: Name = "local"

    def of(self, stage: str) -> str:
        return str(getattr(self, stage))


class ModelImportSection(Parameters):
    trust_remote_code: Flag = Field(
        default=False, description="Run code out of the model's repository; only for a card that says so."
    )


class SettingsSection(Noun):
    force_rerun: Flag = False
    continue_on_step_failure: Flag = False
    priority: Priority = "medium"


class Recipe(Noun):
    """What was written, typed. `section.model_fields_set` tells what was written from what is a default."""

    display_name: Text | None = None
    experiment: Name = "default"
    model: Text
    model_defaults: Literal["fill", "override"] = "fill"
    data: DataSection
    compute: Annotated[ComputeSection, BeforeValidator(_compute)] = ComputeSection()
    model_import: Annotated[ModelImportSection, BeforeValidator(_section)] = ModelImportSection()
    preprocess: Annotated[PreprocessParameters, BeforeValidator(_section)] = PreprocessParameters()
    finetune: Annotated[FinetuneParameters, BeforeValidator(_section)] = FinetuneParameters()
    export: Annotated[ExportParameters, BeforeValidator(_section)] = ExportParameters()
    evaluate: Annotated[EvaluateParameters | None, BeforeValidator(_evaluation)] = EvaluateParameters()
    """None: the step is left out."""
    settings: Annotated[SettingsSection, BeforeValidator(_section)] = SettingsSection()

    _path: str = PrivateAttr(default="recipe")
    _lines: dict[str, int] = PrivateAttr(default_factory=dict)
    _overridden: frozenset[str] = PrivateAttr(default=frozenset())
    _notes: tuple[str, ...] = PrivateAttr(default=())

    @property
    def path(self) -> str:
        """The file, as it is called in messages."""
        return self._path

    @property
    def lines(self) -> Mapping[str, int]:
        """Dotted key to line; what came from `--set` has none."""
        return self._lines

    @property
    def overridden(self) -> frozenset[str]:
        """Dotted keys that came from `--set`."""
        return self._overridden

    @property
    def notes(self) -> tuple[str, ...]:
        """What has to be said about pasted inputs of the component."""
        return self._notes

    @classmethod
    def read(
        cls,
        values: Mapping[str, Any],
        *,
        path: str,
        lines: Mapping[str, int],
        overridden: frozenset[str],
        notes: Sequence[str] = (),
    ) -> Recipe:
        """Raises pydantic's `ValidationError`; `parse` words it."""
        recipe = cls.model_validate(values)
        recipe._path, recipe._lines, recipe._overridden = path, dict(lines), overridden
        recipe._notes = tuple(notes)
        return recipe


SECTIONS: Mapping[str, type[Noun]] = {
    "data": DataSection,
    "compute": ComputeSection,
    "model_import": ModelImportSection,
    "preprocess": PreprocessParameters,
    "finetune": FinetuneParameters,
    "export": ExportParameters,
    "evaluate": EvaluateParameters,
    "settings": SettingsSection,
}


def all_keys() -> list[str]:
    """Every dotted key of a recipe, sections included, in the order of the file."""
    keys: list[str] = []
    for name in Recipe.model_fields:
        keys.append(name)
        if name in SECTIONS:
            keys.extend(f"{name}.{field}" for field in SECTIONS[name].model_fields)
    return keys
