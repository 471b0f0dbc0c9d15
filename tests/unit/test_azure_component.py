"""The component that the registry describes has the inputs of Azure's, letter by letter; tags of cards.

The table is that of chat_completion_pipeline 0.0.82 (Azure/azureml-assets 4b41f8cc, in
assets/training/finetune_acft_hf_nlp).
"""

from __future__ import annotations

import ast
import json

import pytest

from tuneloop.core.recipe.component import ADVISED, INPUTS
from tuneloop.core.types import Card
from tuneloop.server.azure import registry
from tuneloop.server.azure.component import OUTPUTS, VERSION, component_inputs, component_spec
from tuneloop.workspace.catalog import shipped_cards

TABLE = """
instance_type_model_import string Standard_d12_v2
instance_type_preprocess string Standard_d12_v2
instance_type_finetune string Standard_nc24rs_v3
instance_type_model_evaluation string Standard_nc24rs_v3
shm_size_finetune string 5g
num_nodes_finetune integer 1
number_of_gpu_to_use_finetuning integer 1
huggingface_id string -
pytorch_model_path custom_model -
mlflow_model_path mlflow_model -
finetune_config_path uri_file -
trust_remote_code string false true|false
task_name string ChatCompletion ChatCompletion
batch_size integer 1000
pad_to_max_length string false true|false
max_seq_length integer -1
train_file_path uri_file -
validation_file_path uri_file -
test_file_path uri_file -
train_mltable_path mltable -
validation_mltable_path mltable -
test_mltable_path mltable -
apply_lora string false true|false
merge_lora_weights string true true|false
lora_alpha integer 128
lora_r integer 8
lora_dropout number 0.0
num_train_epochs integer 1
max_steps integer -1
per_device_train_batch_size integer 1
per_device_eval_batch_size integer 1
auto_find_batch_size string false true|false
optim string adamw_torch adamw_torch|adafactor
learning_rate number 2e-05
warmup_steps integer 0
weight_decay number 0.0
adam_beta1 number 0.9
adam_beta2 number 0.999
adam_epsilon number 1e-8
gradient_accumulation_steps integer 1
eval_accumulation_steps integer -1
lr_scheduler_type string linear linear|cosine|cosine_with_restarts|polynomial|constant|constant_with_warmup
precision string 32 32|16
seed integer 42
enable_full_determinism string false true|false
dataloader_num_workers integer 0
ignore_mismatched_sizes string false true|false
max_grad_norm number 1.0
evaluation_strategy string epoch epoch|steps|disable
evaluation_steps_interval number 0.0
eval_steps integer 500
logging_strategy string steps epoch|steps
logging_steps integer 10
metric_for_best_model string loss loss|f1|exact
resume_from_checkpoint string false true|false
save_total_limit integer -1
apply_early_stopping string false true|false
early_stopping_patience integer 1
early_stopping_threshold number 0.0
apply_deepspeed string false true|false
deepspeed uri_file -
deepspeed_stage string 2 2|3
apply_ort string false true|false
evaluation_config uri_file -
evaluation_config_params string -
compute_model_import string serverless
compute_preprocess string serverless
compute_finetune string serverless
compute_model_evaluation string serverless
"""
ROWS = [line.split() for line in TABLE.strip().splitlines()]


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_an_input_is_that_of_azures_component(row: list[str]) -> None:
    name, kind, default, *choices = row
    found = component_inputs()[name]
    assert found["type"] == kind
    if kind == "number":
        assert float(found["default"]) == float(default)
    else:
        assert found.get("default", "-") == default
    assert found.get("enum", []) == (choices[0].split("|") if choices else [])
    assert found.get("optional", False) is (name != "task_name")


def test_there_are_69_inputs_and_the_two_bounds_of_models_tags() -> None:
    assert list(component_inputs()) == [*INPUTS, *ADVISED]
    assert [row[0] for row in ROWS] == list(INPUTS)
    assert {name: component_inputs()[name]["type"] for name in ADVISED} == {
        "learning_rate_min": "number",
        "learning_rate_max": "number",
    }


def test_only_what_the_component_bounds_is_bounded() -> None:
    assert sorted(name for name, found in component_inputs().items() if "min" in found) == [
        "batch_size",
        "num_nodes_finetune",
        "num_train_epochs",
        "number_of_gpu_to_use_finetuning",
        "per_device_eval_batch_size",
        "per_device_train_batch_size",
    ]


def test_every_input_has_words_and_says_when_it_is_refused_or_does_nothing() -> None:
    for name, found in component_inputs().items():
        assert found["description"].endswith("."), name
        known = INPUTS.get(name)
        assert found["description"].startswith("Refused: ") is (
            known is not None and known.reason is not None
        )
        assert found["description"].startswith("No effect: ") is (
            known is not None and known.note is not None
        )


def test_the_specification_can_be_sent_and_holds_what_the_sdk_reads() -> None:
    spec = json.loads(json.dumps(component_spec()))
    assert (spec["name"], spec["type"], spec["version"]) == ("chat_completion_pipeline", "pipeline", VERSION)
    assert {name: found["type"] for name, found in spec["outputs"].items()} == dict(OUTPUTS)
    assert spec["jobs"] == {}


# ---------------------------------------------------------------- tags of cards

CARDS = shipped_cards()


@pytest.mark.parametrize("card", CARDS, ids=[card.name for card in CARDS])
def test_tags_are_written_as_azures_publisher_writes_them(card: Card) -> None:
    tags = registry.tags(card)
    for name, text in tags.items():
        assert isinstance(text, str)
        if text.startswith("["):
            assert repr(ast.literal_eval(text)) == text, name
        if text.startswith("{"):
            assert json.dumps(json.loads(text)) == text, name
    assert (tags["task"], tags["author"].lower()) == ("chat-completion", card.publisher.lower())


@pytest.mark.parametrize("card", [card for card in CARDS if card.defaults], ids=lambda card: card.name)
def test_the_defaults_of_a_tag_are_those_that_a_recipe_takes(card: Card) -> None:
    written = registry.tags(card)["model_specific_defaults"]
    assert json.loads(written) == ast.literal_eval(written) == card.defaults


@pytest.mark.parametrize(
    ("name", "finetune", "inference"),
    [
        ("Phi-3-mini-4k-instruct", "24|1|220|64", "6|1|112|64"),
        ("Phi-3-medium-4k-instruct", "96|4|880|256", "24|1|220|64"),
        ("Phi-3.5-mini-instruct", "24|1|220|64", None),
    ],
)
def test_the_least_of_the_sizes_is_that_of_azures_properties(
    name: str, finetune: str, inference: str | None
) -> None:
    (card,) = [card for card in CARDS if card.name == name]
    found = registry.properties(card)
    assert found["finetune-min-sku-spec"] == finetune
    if inference is not None:
        assert found["inference-min-sku-spec"] == inference


def test_the_least_is_left_out_where_a_size_is_not_known() -> None:
    assert registry.least_of(["Standard_NC24ads_A100_v4", "Standard_unheard_of"]) is None
    # Its local disk is not published.
    assert registry.least_of(["Standard_ND96isr_H100_v5"]) is None
    assert registry.least_of(["Standard_NC24s_v3", "Standard_NC6s_v3"]) == "6|1|112|736"
