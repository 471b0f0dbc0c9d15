"""The final value of every parameter, where it came from, and what has to be said about it.

Precedence: built-in, then the model's defaults, then what was written (`model_defaults: fill`). The Azure
document works the other way round: `finetune_parameters.update(model_specific_defaults)` lays the model's
defaults over what was written. `model_defaults: override` does that, and warns of each value it replaced.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import JsonValue, ValidationError

from tuneloop.core import deepspeed
from tuneloop.core.errors import RecipeError, UsageError
from tuneloop.core.names import did_you_mean
from tuneloop.core.recipe.lined import Mistake, explain, refuse
from tuneloop.core.recipe.parameters import (
    EvaluateParameters,
    ExportParameters,
    FinetuneParameters,
    PreprocessParameters,
)
from tuneloop.core.recipe.values import Parameters
from tuneloop.core.recipe.written import ModelImportSection, Recipe
from tuneloop.core.support import cautions, refusals
from tuneloop.core.types import Card, Noun

BUILT_IN, MODEL, RECIPE, SET = "built-in", "model", "recipe", "--set"

OVERRIDE_WARNING = "Warning! Model specific defaults exist. The defaults could be overridden."
"""The Azure document's own words, section 5."""


class Resolved(Noun):
    """Every parameter of every stage, final."""

    recipe: Recipe
    card: Card
    model_import: ModelImportSection
    preprocess: PreprocessParameters
    finetune: FinetuneParameters
    export: ExportParameters
    evaluate: EvaluateParameters | None
    """None: the step is left out."""
    origins: dict[str, str]
    """`finetune.learning_rate` to `built-in`, `model`, `recipe` or `--set`."""
    warnings: tuple[str, ...]

    @property
    def sections(self) -> dict[str, Parameters]:
        """By stage; without `evaluate` when it is left out."""
        found: dict[str, Parameters | None] = {
            "model_import": self.model_import,
            "preprocess": self.preprocess,
            "finetune": self.finetune,
            "export": self.export,
            "evaluate": self.evaluate,
        }
        return {name: section for name, section in found.items() if section is not None}

    @property
    def parameters(self) -> dict[str, JsonValue]:
        """Flat and JSON-ready, without what is not set."""
        return {
            f"{name}.{key}": value
            for name, section in self.sections.items()
            for key, value in section.model_dump(mode="json", exclude_none=True).items()
        }


def resolve(recipe: Recipe, card: Card) -> Resolved:
    """Raises `RecipeError` with all that cannot be obeyed, `UsageError` for wrong defaults of the card."""
    written = {
        "model_import": recipe.model_import,
        "preprocess": recipe.preprocess,
        "finetune": recipe.finetune,
        "export": recipe.export,
    }
    if recipe.evaluate is not None:
        written["evaluate"] = recipe.evaluate
    layers = {name: _layer(recipe, name, section, card) for name, section in written.items()}
    layers["finetune"], staged = _with_own_stage(layers["finetune"])
    origins = {
        f"{name}.{key}": origin
        for name, layer in layers.items()
        for key, origin in layer.origins.items()
        if getattr(layer.section, key) is not None
    }
    resolved = Resolved(
        recipe=recipe,
        card=card,
        **{"evaluate": None, **{name: layer.section for name, layer in layers.items()}},
        origins=origins,
        warnings=(),
    )
    mistakes = _mistakes(resolved)
    if mistakes:
        refuse(RecipeError, recipe.path, mistakes)
    warnings = (*recipe.notes, *staged, *_replaced(recipe, layers), *_warnings(resolved))
    return resolved.model_copy(update={"warnings": warnings})


class _Layer(NamedTuple):
    section: Any
    origins: dict[str, str]
    replaced: dict[str, tuple[object, object]]
    """Key to (written, model's) where the model's default went over what was written."""


def _layer(recipe: Recipe, name: str, written: Parameters, card: Card) -> _Layer:
    defaults = defaults_of(card).get(name, {})
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    replaced: dict[str, tuple[object, object]] = {}
    for key in type(written).model_fields:
        is_written = key in written.model_fields_set
        if key in defaults and (recipe.model_defaults == "override" or not is_written):
            values[key], origins[key] = defaults[key], MODEL
            if is_written and getattr(written, key) != defaults[key]:
                replaced[key] = (getattr(written, key), defaults[key])
        elif is_written:
            values[key] = getattr(written, key)
            origins[key] = SET if f"{name}.{key}" in recipe.overridden else RECIPE
        else:
            origins[key] = BUILT_IN
    return _Layer(type(written).model_validate(values), origins, replaced)


def _with_own_stage(layer: _Layer) -> tuple[_Layer, list[str]]:
    """A DeepSpeed configuration of a person's own decides the stage, and everything else reads it from
    `deepspeed_stage`."""
    section = layer.section
    stage = deepspeed.stage_of(section.deepspeed)
    if stage is None or not section.apply_deepspeed or section.deepspeed_stage == str(stage):
        return layer, []
    is_written = layer.origins["deepspeed_stage"] in (RECIPE, SET)
    said = f"finetune.deepspeed_stage is {section.deepspeed_stage}: deepspeed says {stage}, and it decides."
    changed = layer._replace(
        section=section.model_copy(update={"deepspeed_stage": str(stage)}),
        origins={**layer.origins, "deepspeed_stage": layer.origins["deepspeed"]},
    )
    return changed, [said] if is_written else []


def defaults_of(card: Card) -> dict[str, dict[str, Any]]:
    """The card's defaults as typed values, by stage. Raises `UsageError` that names all that is wrong."""
    stages: Mapping[str, type[Parameters]] = {
        "finetune": FinetuneParameters,
        "preprocess": PreprocessParameters,
    }
    found: dict[str, dict[str, Any]] = {}
    wrong: list[str] = []
    for key, value in card.defaults.items():
        stage = next((name for name, model in stages.items() if key in model.model_fields), None)
        if stage is None:
            hint = did_you_mean(key, [field for model in stages.values() for field in model.model_fields])
            wrong.append(f"{key} is not a parameter of finetune or preprocess. {hint or ''}".rstrip())
            continue
        try:
            found.setdefault(stage, {})[key] = getattr(stages[stage].model_validate({key: value}), key)
        except ValidationError as error:
            wrong.append(f"{key} {explain(error.errors(include_url=False)[0])}")
    if wrong:
        raise UsageError(
            f"The defaults of the card {card.name}:{card.version} cannot be used: {' '.join(wrong)}"
        )
    return found


# ---------------------------------------------------------------- what cannot be obeyed


def _mistakes(resolved: Resolved) -> list[Mistake]:
    found = [_placed(resolved, text) for text in refusals(resolved.finetune.model_dump())]
    found += [
        Mistake(resolved.recipe.lines.get(field), field, message)
        for field, message in _contradictions(resolved).items()
    ]
    return found


def _placed(resolved: Resolved, sentence: str) -> Mistake:
    """A sentence begins with the name of its parameter."""
    name, _, rest = sentence.partition(" ")
    field = f"finetune.{name}"
    if resolved.origins.get(field) == MODEL:
        rest += f" (It is a default of {resolved.card.name}; write finetune.{name} to go over it.)"
    return Mistake(resolved.recipe.lines.get(field), field, rest)


def _contradictions(resolved: Resolved) -> dict[str, str]:
    found: dict[str, str] = {}
    finetune, context = resolved.finetune, resolved.card.context_length
    card = resolved.card
    if resolved.model_import.trust_remote_code and not card.remote_code:
        found["model_import.trust_remote_code"] = (
            f"is true, but the card {card.name} does not say remote_code: the model needs none of its "
            "repository's code, and none is run. Leave it out."
        )
    if card.remote_code and not resolved.model_import.trust_remote_code:
        found["model_import.trust_remote_code"] = (
            f"is false, and {card.name} cannot be loaded without code out of its repository. Read that code "
            "first; it runs with your rights. Then write true."
        )
    if resolved.preprocess.max_seq_length > context:
        found["preprocess.max_seq_length"] = (
            f"is {resolved.preprocess.max_seq_length}, but {resolved.card.name} reads {context} tokens at "
            f"most. Write {context} or less, or -1 for the model's maximum."
        )
    low, high = finetune.learning_rate_min, finetune.learning_rate_max
    if low is not None and high is not None and low > high:
        found["finetune.learning_rate_min"] = f"is {low:g}, more than learning_rate_max, which is {high:g}."
    return found


# ---------------------------------------------------------------- what has to be said


def _replaced(recipe: Recipe, layers: Mapping[str, _Layer]) -> list[str]:
    lines = [
        f"{name}.{key}: the model's {_shown(new)} replaces {_shown(old)}, which was written."
        for name, layer in layers.items()
        for key, (old, new) in layer.replaced.items()
    ]
    return [" ".join([OVERRIDE_WARNING, *lines])] if lines else []


def _warnings(resolved: Resolved) -> list[str]:
    finetune = resolved.finetune
    found = []
    if resolved.model_import.trust_remote_code:
        found.append(
            f"model_import.trust_remote_code is true: code out of the repository of {resolved.card.name} "
            "runs on this machine with your rights."
        )
    low, high = finetune.learning_rate_min, finetune.learning_rate_max
    if (low is not None and finetune.learning_rate < low) or (
        high is not None and finetune.learning_rate > high
    ):
        found.append(
            f"finetune.learning_rate is {finetune.learning_rate:g}, outside of what is advised for "
            f"{resolved.card.name}: {_range(low, high)}."
        )
    found += [f"finetune.{text}" for text in cautions(finetune.model_dump())]
    return found + _without_effect(resolved)


def _range(low: float | None, high: float | None) -> str:
    if low is None:
        return f"at most {high:g}"
    return f"at least {low:g}" if high is None else f"{low:g} to {high:g}"


def _without_effect(resolved: Resolved) -> list[str]:
    """What a person wrote and what another value switches off."""
    finetune = resolved.finetune
    asked = finetune.number_of_gpu_to_use_finetuning * finetune.num_nodes_finetune
    switches = {
        "apply_lora is false": (
            not finetune.apply_lora,
            ("lora_alpha", "lora_r", "lora_dropout", "lora_target_modules", "merge_lora_weights"),
        ),
        "apply_deepspeed is false": (not finetune.apply_deepspeed, ("deepspeed", "deepspeed_stage")),
        "apply_early_stopping is false": (
            not finetune.apply_early_stopping,
            ("early_stopping_patience", "early_stopping_threshold"),
        ),
        f"evaluation_strategy is {finetune.evaluation_strategy}": (
            finetune.evaluation_strategy != "steps",
            ("eval_steps", "evaluation_steps_interval"),
        ),
        "evaluation_steps_interval decides": (
            finetune.evaluation_strategy == "steps" and finetune.evaluation_steps_interval > 0,
            ("eval_steps",),
        ),
        "logging_strategy is epoch": (finetune.logging_strategy == "epoch", ("logging_steps",)),
        "packing is false": (not finetune.packing, ("pack_tokens",)),
        "checkpoint_steps decides": (finetune.checkpoint_steps > 0, ("checkpoint_seconds",)),
        "one process is asked for": (asked == 1, ("cpu_processes", "strategy", "fewer_devices")),
    }
    return [
        f"finetune.{key} has no effect: {reason}."
        for reason, (is_off, keys) in switches.items()
        for key in keys
        if is_off and resolved.origins.get(f"finetune.{key}") in (RECIPE, SET)
    ]


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value) if isinstance(value, bool) else str(value)
