"""The recipe: one YAML for people, and how it becomes a job.

text --parse--> Recipe --resolve(card)--> Resolved --compile_job--> Job, whose steps have a step_key

values       how one value may be written
parameters   what each kind of step can be told
component    the 69 inputs of Azure's chat-completion component, and where each stands in a recipe
written      the recipe as it is written
pasted       the section `component`, unfolded to where its inputs stand in a recipe
attached     files that a recipe names beside its data
lined        YAML with line numbers; cards are read with it too
parse, resolve, compile, key    the way from text to a step's key
"""

from tuneloop.core.recipe.attached import attach
from tuneloop.core.recipe.compile import (
    compile_job,
    dataset_label,
    display_name,
    dump_resolved,
)
from tuneloop.core.recipe.component import INPUTS
from tuneloop.core.recipe.key import STEP_VERSIONS, step_key
from tuneloop.core.recipe.parameters import (
    PARAMETERS,
    EvaluateParameters,
    ExportParameters,
    FinetuneParameters,
    ImportedCard,
    ModelImportParameters,
    PreprocessParameters,
)
from tuneloop.core.recipe.parse import parse
from tuneloop.core.recipe.resolve import Resolved, defaults_of, resolve
from tuneloop.core.recipe.written import STAGES, Recipe

__all__ = [
    "INPUTS",
    "PARAMETERS",
    "STAGES",
    "STEP_VERSIONS",
    "EvaluateParameters",
    "ExportParameters",
    "FinetuneParameters",
    "ImportedCard",
    "ModelImportParameters",
    "PreprocessParameters",
    "Recipe",
    "Resolved",
    "attach",
    "compile_job",
    "dataset_label",
    "defaults_of",
    "display_name",
    "dump_resolved",
    "parse",
    "resolve",
    "step_key",
]
