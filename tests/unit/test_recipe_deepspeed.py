"""A DeepSpeed configuration of a person's own: what is obeyed, what must agree, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tuneloop.core import deepspeed
from tuneloop.core.errors import RecipeError, UsageError
from tuneloop.core.recipe import FinetuneParameters, attach, compile_job, parse, resolve, step_key
from tuneloop.core.types import ArtifactInput, Job
from tuneloop.workspace.catalog import shipped_cards

AUTO = {
    "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": "auto"},
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": False},
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto"}},
}


def parameters(**changes: Any) -> dict[str, Any]:
    return FinetuneParameters.model_validate({"apply_deepspeed": True, **changes}).model_dump()


def test_auto_is_filled_in_from_the_recipe_and_the_models_size() -> None:
    found = deepspeed.read(AUTO, parameters(max_grad_norm=0.5))
    assert (found.stage, found.gradient_clipping) == (2, 0.5)
    assert found.block(64) == {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 4096}


def test_without_a_file_the_stage_is_the_recipes() -> None:
    assert deepspeed.settings_of(parameters(apply_deepspeed=False)) is None
    found = deepspeed.settings_of(parameters(deepspeed_stage=3))
    assert found is not None
    assert found.block(64)["stage3_param_persistence_threshold"] == 640


def test_stage_3_has_to_gather_on_save() -> None:
    (said,) = deepspeed.mistakes({"zero_optimization": {"stage": 3}}, parameters())
    assert "stage3_gather_16bit_weights_on_model_save is not true" in said
    gathers = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    assert deepspeed.mistakes({"zero_optimization": gathers}, parameters()) == []


@pytest.mark.parametrize("config", [{}, {"zero_optimization": {}}, {"zero_optimization": {"stage": 1}}])
def test_a_stage_is_needed(config: dict[str, Any]) -> None:
    (said,) = deepspeed.mistakes(config, parameters())
    assert said.startswith("zero_optimization.stage is ")


def test_every_key_that_is_not_obeyed_is_named_at_once() -> None:
    config = {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "overlap": True},
        "fp16": {"enabled": True},
        "scheduler": {"type": "WarmupLR"},
        "flops_profiler": {},
    }
    with pytest.raises(UsageError) as caught:
        deepspeed.read(config, parameters())
    names = ("zero_optimization.offload_optimizer", "zero_optimization.overlap", "fp16", "scheduler", "flops")
    assert len(caught.value.details) == len(names)
    assert all(name in str(caught.value) for name in names)


@pytest.mark.parametrize(
    "change",
    [
        {"train_batch_size": 3},
        {"gradient_accumulation_steps": 2},
        {"gradient_clipping": 0.1},
        {"bf16": {"enabled": True}},
        {"optimizer": {"type": "AdamW", "params": {"lr": 1}}},
        {"optimizer": {"type": "SGD"}},
    ],
)
def test_what_the_recipe_says_too_must_agree(change: dict[str, Any]) -> None:
    (said,) = deepspeed.mistakes({**AUTO, **change}, parameters())
    assert said.startswith(next(iter(change)))


# ---------------------------------------------------------------- a file beside a recipe

CARD = next(card for card in shipped_cards() if card.name == "SmolLM2-135M-Instruct")
TEXT = (
    "model: SmolLM2-135M-Instruct\ndata: {train: t}\nfinetune:\n  apply_deepspeed: true\n"
    "  deepspeed: ds.json\n"
)


def compiled(folder: Path, config: object, text: str = TEXT, **overrides: str) -> Job:
    """As when a job is submitted: the file is read, and the recipe resolved and compiled."""
    (folder / "ds.json").write_text(config if isinstance(config, str) else json.dumps(config))
    recipe = attach(parse(text, path="my.yaml", overrides=overrides), folder)
    given = {"train": ArtifactInput(digest="sha256:" + "0" * 64, name="t")}
    return compile_job(
        resolve(recipe, CARD), name="job", card=CARD, inputs=given, dataset_names={"train": "t:1"}
    )


def key_of(job: Job) -> str:
    return step_key(job.step("finetune"), {"model": "sha256:1", "dataset": "sha256:2"})


def refused(folder: Path, config: object, text: str = TEXT) -> list[tuple[int | None, str, str]]:
    """(line, field, message) of each mistake."""
    with pytest.raises(RecipeError) as caught:
        compiled(folder, config, text)
    details: Any = caught.value.details
    return [(item["line"], item["field"], item["message"]) for item in details]


def test_what_stands_in_a_file_becomes_part_of_the_job(tmp_path: Path) -> None:
    job = compiled(tmp_path, AUTO)
    assert job.step("finetune").parameters["deepspeed"] == AUTO
    assert job.parameters["finetune.deepspeed"] == AUTO
    (tmp_path / "ds.json").unlink()
    assert job.recipe is not None
    again = attach(parse(job.recipe), tmp_path)
    assert again.finetune.deepspeed == AUTO


def test_another_content_of_the_same_file_is_another_step(tmp_path: Path) -> None:
    first = key_of(compiled(tmp_path, AUTO))
    assert key_of(compiled(tmp_path, json.dumps(AUTO, indent=4))) == first
    other = {**AUTO, "zero_optimization": {"stage": 2, "overlap_comm": False}}
    assert key_of(compiled(tmp_path, other)) != first


def test_a_file_and_the_same_object_written_out_are_the_same_step(tmp_path: Path) -> None:
    written = TEXT.replace("ds.json", json.dumps(AUTO))
    assert key_of(compiled(tmp_path, "", written)) == key_of(compiled(tmp_path, AUTO))


def test_the_stage_of_a_file_decides_and_goes_over_the_written_one(tmp_path: Path) -> None:
    own = {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}}
    job = compiled(tmp_path, own)
    assert job.parameters["finetune.deepspeed_stage"] == "3"
    assert job.origins["finetune.deepspeed_stage"] == "recipe"
    assert not any("it decides" in text for text in job.warnings)
    assert "-ds3-" in job.display_name
    written = compiled(tmp_path, own, **{"finetune.deepspeed_stage": "2"})
    said = "finetune.deepspeed_stage is 2: deepspeed says 3, and it decides."
    assert said in written.warnings
    assert written.step("finetune").parameters == job.step("finetune").parameters
    assert said not in compiled(tmp_path, own, **{"finetune.deepspeed_stage": "3"}).warnings
    lower = compiled(tmp_path, AUTO, **{"finetune.deepspeed_stage": "3"})
    assert lower.parameters["finetune.deepspeed_stage"] == "2"
    # A file that nothing reads decides nothing.
    off = compiled(tmp_path, own, **{"finetune.apply_deepspeed": "false"})
    assert off.parameters["finetune.deepspeed_stage"] == "2"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is 'ds.json': ds.json is not JSON: "),
        ("[1]", "is 'ds.json': ds.json is not a JSON object."),
        ('{"x": "' + "y" * 1_000_000 + '"}', "is 'ds.json': ds.json is larger than 1,000,000 bytes."),
        ("{}", "zero_optimization.stage is missing: write 2 or 3."),
        ('{"zero_optimization": {"stage": 1}}', "zero_optimization.stage is 1: write 2 or 3."),
    ],
    ids=["broken", "array", "large", "no-stage", "stage-1"],
)
def test_a_file_that_cannot_be_obeyed_is_told_with_its_line(tmp_path: Path, content: str, said: str) -> None:
    ((line, field, message),) = refused(tmp_path, content)
    assert (line, field) == (5, "finetune.deepspeed")
    assert message.startswith(said)


def test_a_file_that_is_no_text_is_told_as_well(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(RecipeError, match=r"line 5: finetune\.deepspeed is 'ds\.json': ds\.json is not JSON"):
        attach(parse(TEXT), tmp_path)


def test_a_file_that_is_not_there_is_told_with_its_line_and_where_it_was_sought(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        attach(parse(TEXT, path="my.yaml"), tmp_path)
    said = f"line 5: finetune.deepspeed is 'ds.json': {tmp_path}/ds.json cannot be read: No such file"
    assert said in str(caught.value)
    with pytest.raises(RecipeError, match="names the home of a user that there is not"):
        attach(parse(TEXT.replace("ds.json", "~nobody-of-that-name/ds.json")), tmp_path)


def test_a_file_from_the_command_line_has_no_line(tmp_path: Path) -> None:
    recipe = parse(TEXT, overrides={"finetune.deepspeed": "other.json"})
    with pytest.raises(RecipeError) as caught:
        attach(recipe, tmp_path)
    details: Any = caught.value.details
    assert [(item["line"], item["field"]) for item in details] == [(None, "finetune.deepspeed")]


def test_a_recipe_that_names_no_file_stays_as_it_is(tmp_path: Path) -> None:
    recipe = parse("model: m\ndata: {train: t}\n")
    assert attach(recipe, tmp_path / "nowhere") is recipe
