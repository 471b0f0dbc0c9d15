"""A pipeline job's request, turned into a recipe: what is obeyed, and what is refused where it stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import FakeClock, FakeExecutor, FakeFiles, FakeStore
from tuneloop.core import recipe as recipes
from tuneloop.core.recipe.component import ADVISED, INPUTS
from tuneloop.core.recipe.resolve import Resolved
from tuneloop.core.settings import Settings
from tuneloop.core.types import JobOutput
from tuneloop.server.azure.bodies import Body
from tuneloop.server.azure.containers import uploads_folder
from tuneloop.server.azure.errors import Mistake, Refusal
from tuneloop.server.azure.gateway import Gateway
from tuneloop.server.azure.jobs.definition import as_yaml, differences
from tuneloop.server.azure.jobs.submission import Order, read
from tuneloop.server.azure.tokens import Tokens
from tuneloop.server.parts import Parts
from tuneloop.workspace.catalog import Catalog
from tuneloop.workspace.compute import Computes
from tuneloop.workspace.jobs import Jobs

NODE = "properties.jobs.chat_completion_pipeline"
COMPONENT = "azureml://registries/azureml/components/chat_completion_pipeline/versions/0.0.82"
MODEL = "azureml://registries/azureml/models/Phi-3-mini-4k-instruct/labels/latest"
TRAIN = "azureml://datastores/workspaceblobstore/paths/LocalUpload/0123/train_sft.jsonl"


def made_gateway(home: Path, *, is_loose: bool = False) -> Gateway:
    """On fakes, with one cluster of Azure's beside this machine."""
    store, files, clock = FakeStore(), FakeFiles(home), FakeClock()
    computes, catalog = Computes(store, clock), Catalog(store, clock)
    computes.declare_local(slots=1, cores=2, memory_bytes=1 << 34)
    computes.create("gpu-cluster", size="Standard_NC24ads_A100_v4")
    parts = Parts(
        settings=Settings(home=home),
        home_id="home",
        token="token",
        started_at=clock.now(),
        store=store,
        files=files,  # type: ignore[arg-type]
        executor=FakeExecutor(),
        catalog=catalog,
        computes=computes,
        data=None,  # type: ignore[arg-type]
        jobs=Jobs(store, files, clock, catalog, None),  # type: ignore[arg-type]
        models=None,  # type: ignore[arg-type]
        endpoints=None,  # type: ignore[arg-type]
        wake=lambda: None,
        shut_down=lambda how: None,
    )
    url = "https://127.0.0.1:8443"
    return Gateway(
        parts, url, home / "azure", b"secret", Tokens(b"secret", "home", url), "identity", is_loose
    )


@pytest.fixture
def gateway(tmp_path: Path) -> Gateway:
    return with_train(made_gateway(tmp_path))


def with_train(gateway: Gateway) -> Gateway:
    folder = uploads_folder(gateway) / "LocalUpload" / "0123"
    folder.mkdir(parents=True)
    (folder / "train_sft.jsonl").write_text("{}\n")
    return gateway


def node(**inputs: Any) -> dict[str, Any]:
    """The component's call; a literal is written for every value that is no mapping."""
    given: dict[str, Any] = {
        "mlflow_model_path": {"job_input_type": "mlflow_model", "uri": MODEL},
        "train_file_path": {"job_input_type": "uri_file", "uri": TRAIN},
        **inputs,
    }
    return {
        "name": "chat_completion_pipeline",
        "type": "pipeline",
        "componentId": COMPONENT,
        "inputs": {
            name: value if isinstance(value, dict) else {"job_input_type": "literal", "value": value}
            for name, value in given.items()
            if value is not None
        },
        "outputs": {"mlflow_model_folder": {"value": "${{parent.outputs.trained_model}}", "type": "literal"}},
        "_source": "REGISTRY",
    }


def body(one: Mapping[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    properties = {
        "jobType": "Pipeline",
        "displayName": "a run",
        "experimentName": "tests",
        "isArchived": False,
        "inputs": {},
        "outputs": {"trained_model": {"jobOutputType": "mlflow_model", "uri": None}},
        "settings": {"force_rerun": False, "continue_on_step_failure": False, "_source": "DSL"},
        "jobs": {"chat_completion_pipeline": node() if one is None else one},
    }
    return {"properties": {**properties, **changes}}


def ordered(gateway: Gateway, request: Mapping[str, Any]) -> Order:
    return read(gateway, Body(dict(request)), "calm_fox_1")


def resolved(gateway: Gateway, order: Order) -> Resolved:
    assert order.submission is not None
    return gateway.parts.jobs.resolve(order.submission)[0]


def mistakes(gateway: Gateway, request: Mapping[str, Any]) -> dict[str, Mistake]:
    with pytest.raises(Refusal) as refused:
        ordered(gateway, request)
    assert refused.value.status == 400
    return {mistake.target: mistake for mistake in refused.value.mistakes}


# ---------------------------------------------------------------- what is obeyed


def test_the_call_becomes_a_recipe_with_the_rules_of_the_component(gateway: Gateway) -> None:
    order = ordered(
        gateway,
        body(
            node(learning_rate="5e-06", num_train_epochs="3", apply_lora="true", precision=16),
            tags={"team": "a"},
            properties={"mlflow.source.git.commit": "0123"},
            description="about",
        ),
    )
    found = resolved(gateway, order)
    assert found.finetune.learning_rate == 5e-6
    assert (found.finetune.num_train_epochs, found.finetune.apply_lora) == (3, True)
    assert found.finetune.precision == "16"
    assert (found.preprocess.long_rows, found.preprocess.split) == ("cut", "contiguous")
    assert (found.recipe.display_name, found.recipe.experiment) == ("a run", "tests")
    assert order.submission is not None
    assert order.submission.name == "calm_fox_1"
    assert order.submission.shown == {"train": "train_sft.jsonl"}
    assert order.submission.outputs == {"trained_model": JobOutput(step="export", output="mlflow_model")}
    assert order.submission.tags == order.tags == {"team": "a"}
    assert (order.description, order.properties) == ("about", {"mlflow.source.git.commit": "0123"})


def test_what_a_script_does_not_send_is_the_components_default_not_the_models(gateway: Gateway) -> None:
    card = gateway.parts.catalog.get(MODEL)
    assert card.defaults["apply_lora"] == "true"
    found = resolved(gateway, ordered(gateway, body()))
    assert found.finetune.apply_lora is False
    assert found.origins["finetune.apply_lora"] == "built-in"


@pytest.mark.parametrize("value", ["true", True, "True"])
def test_booleans_come_as_texts_or_as_themselves(gateway: Gateway, value: object) -> None:
    assert resolved(gateway, ordered(gateway, body(node(apply_lora=value)))).finetune.apply_lora is True


def test_every_input_of_the_component_is_taken_or_refused_by_its_name(gateway: Gateway) -> None:
    values: dict[str, Any] = {name: _default_of(name) for name in {**INPUTS, **ADVISED}}
    taken = {name: value for name, value in values.items() if value is not None}
    order = ordered(gateway, body(node(**taken)))
    assert resolved(gateway, order).finetune.learning_rate_max == 1e-3
    refused = [name for name, known in INPUTS.items() if known.reason]
    found = mistakes(gateway, body(node(**dict.fromkeys(refused, "x"))))
    assert set(found) == {f"{NODE}.inputs.{name}" for name in refused}
    assert all(mistake.code == "NotSupported" for mistake in found.values())


def _default_of(name: str) -> Any:
    """A value that says little; None for inputs that are files, models, or refused."""
    known = {**INPUTS, **ADVISED}[name]
    if known.only is not None:
        return known.only
    if known.note is not None:
        return "some"
    place = known.place or ""
    section, _, key = place.partition(".")
    if section == "compute":
        return "gpu-cluster"
    if name in ADVISED:
        return {"learning_rate_min": "1e-06", "learning_rate_max": "1e-3"}[name]
    kinds = {"preprocess": "preprocess", "finetune": "finetune"}
    if section not in kinds or name == "deepspeed":
        return None
    field = recipes.PARAMETERS[kinds[section]].model_fields[key]  # type: ignore[index]
    return field.default if not isinstance(field.default, bool) else str(field.default).lower()


def test_inputs_of_the_job_are_put_where_they_are_bound(gateway: Gateway) -> None:
    request = body(
        node(
            learning_rate="${{parent.inputs.rate}}",
            train_file_path={"job_input_type": "literal", "value": "${{parent.inputs.train}}"},
        ),
        inputs={
            "rate": {"jobInputType": "literal", "value": "0.001"},
            "train": {"jobInputType": "uri_file", "uri": TRAIN, "mode": "ReadOnlyMount"},
        },
    )
    order = ordered(gateway, request)
    assert resolved(gateway, order).finetune.learning_rate == 1e-3
    assert order.submission is not None
    assert order.submission.shown == {"train": "train_sft.jsonl"}


def test_a_steps_own_compute_goes_before_the_nodes_the_jobs_and_the_settings(gateway: Gateway) -> None:
    arm = (
        "/subscriptions/s/resourceGroups/g/providers/Microsoft.MachineLearningServices/workspaces/w/computes/"
    )
    request = body(node(compute_finetune="gpu-cluster"), computeId=f"{arm}local")
    found = resolved(gateway, ordered(gateway, request)).recipe.compute
    assert (found.finetune, found.export, found.preprocess) == ("gpu-cluster", "gpu-cluster", "local")
    one = {**node(compute_preprocess="serverless"), "computeId": f"{arm}gpu-cluster"}
    found = resolved(gateway, ordered(gateway, body(one, computeId="local"))).recipe.compute
    assert (found.model_import, found.preprocess, found.export) == ("gpu-cluster", "local", "gpu-cluster")
    request = body(settings={"default_compute": "gpu-cluster"})
    assert resolved(gateway, ordered(gateway, request)).recipe.compute.evaluate == "gpu-cluster"


def test_settings_mean_what_they_say(gateway: Gateway) -> None:
    request = body(settings={"force_rerun": True, "continue_on_step_failure": True, "_source": "DSL"})
    settings = resolved(gateway, ordered(gateway, request)).recipe.settings
    assert settings.force_rerun
    assert settings.continue_on_step_failure


def test_a_deepspeed_file_becomes_part_of_the_recipe(gateway: Gateway) -> None:
    folder = uploads_folder(gateway) / "LocalUpload" / "0123"
    stage = '{"stage": 3, "stage3_gather_16bit_weights_on_model_save": true}'
    (folder / "ds.json").write_text(f'{{"zero_optimization": {stage}}}')
    uri = TRAIN.replace("train_sft.jsonl", "ds.json")
    call = node(apply_deepspeed="true", deepspeed={"job_input_type": "uri_file", "uri": uri})
    assert resolved(gateway, ordered(gateway, body(call))).finetune.deepspeed_stage == "3"
    (folder / "ds.json").write_text("{")
    found = mistakes(gateway, body(call))[f"{NODE}.inputs.deepspeed"]
    assert "ds.json" in found.message
    assert str(gateway.folder) not in found.message


def test_outputs_of_the_job_are_mapped_by_their_names(gateway: Gateway) -> None:
    one = node()
    one["outputs"]["pytorch_model_folder"] = {"value": "${{parent.outputs.weights}}", "type": "literal"}
    one["outputs"]["evaluation_result"] = {"value": "${{parent.outputs.scores}}", "type": "literal"}
    request = body(
        one,
        outputs={
            "trained_model": {"jobOutputType": "mlflow_model"},
            "weights": {"jobOutputType": "uri_folder", "mode": "ReadWriteMount"},
            "scores": {"jobOutputType": "uri_folder"},
        },
    )
    order = ordered(gateway, request)
    assert order.submission is not None
    assert order.submission.outputs == {
        "trained_model": JobOutput(step="export", output="mlflow_model"),
        "weights": JobOutput(step="finetune", output="trained"),
        "scores": JobOutput(step="evaluate", output="evaluation"),
    }


def test_the_component_may_be_the_job_itself(gateway: Gateway) -> None:
    request = body(
        componentId=COMPONENT,
        jobs={},
        inputs={
            "mlflow_model_path": {"jobInputType": "mlflow_model", "uri": MODEL},
            "train_file_path": {"jobInputType": "uri_file", "uri": TRAIN},
            "num_train_epochs": {"jobInputType": "literal", "value": "2"},
        },
        outputs={"mlflow_model_folder": {"jobOutputType": "mlflow_model"}},
    )
    order = ordered(gateway, request)
    assert resolved(gateway, order).finetune.num_train_epochs == 2
    assert order.submission is not None
    assert list(order.submission.outputs) == ["mlflow_model_folder"]


# ---------------------------------------------------------------- what is refused


def test_all_mistakes_are_told_at_once_where_they_stand(gateway: Gateway) -> None:
    one = node(learning_rate="fast", batch_size="0", learning_rat="1", compute_finetune="gpu-clustr")
    one["comments"] = "x"
    found = mistakes(gateway, body(one, priority=3, settings={"retry": True}))
    assert set(found) == {
        f"{NODE}.inputs.learning_rate",
        f"{NODE}.inputs.batch_size",
        f"{NODE}.inputs.learning_rat",
        f"{NODE}.inputs.compute_finetune",
        f"{NODE}.comments",
        "properties.priority",
        "properties.settings.retry",
    }
    assert "expected a number" in found[f"{NODE}.inputs.learning_rate"].message
    assert "Did you mean 'learning_rate'" in found[f"{NODE}.inputs.learning_rat"].message
    assert "Did you mean 'gpu-cluster'" in found[f"{NODE}.inputs.compute_finetune"].message
    assert found["properties.priority"].code == "NotSupported"


def test_what_contradicts_itself_is_told_at_its_input(gateway: Gateway) -> None:
    found = mistakes(gateway, body(node(max_seq_length="100000")))
    assert "reads 4096 tokens" in found[f"{NODE}.inputs.max_seq_length"].message


@pytest.mark.parametrize(
    ("change", "target", "told"),
    [
        ({"learning_rate": "${{parent.inputs.rate}}"}, "inputs.learning_rate.value", "'rate'"),
        (
            {"learning_rate": "${{parent.jobs.other.outputs.rate}}"},
            "inputs.learning_rate.value",
            "expression",
        ),
        ({"learning_rate": "1${{parent.inputs.rate}}"}, "inputs.learning_rate.value", "whole value"),
        ({"learning_rate": float("inf")}, "inputs.learning_rate.value", "finite"),
        ({"learning_rate": "nan"}, "inputs.learning_rate", "expected a number"),
        ({"learning_rate": "x" * 20_000}, "inputs.learning_rate.value", "longer than"),
        (
            {"learning_rate": {"job_input_type": "literal", "value": [1]}},
            "inputs.learning_rate.value",
            "no text",
        ),
        ({"learning_rate": {"job_input_type": "uri_file", "uri": TRAIN}}, "inputs.learning_rate", "literal"),
        ({"train_file_path": None}, "inputs.train_file_path", "is missing"),
        ({"mlflow_model_path": None}, "inputs.mlflow_model_path", "is missing"),
        ({"train_file_path": TRAIN + "x"}, "inputs.train_file_path", "nothing there"),
        ({"train_file_path": TRAIN.rsplit("/", 1)[0]}, "inputs.train_file_path", "a folder"),
        ({"mlflow_model_path": "azureml:mine:1"}, "inputs.mlflow_model_path", "registry azureml"),
        ({"mlflow_model_path": MODEL.replace("mini", "maxi")}, "inputs.mlflow_model_path", "no base model"),
        ({"task_name": "Summarization"}, "inputs.task_name", "must be 'ChatCompletion'"),
    ],
)
def test_a_wrong_input_is_refused_at_its_place(
    gateway: Gateway, change: dict[str, Any], target: str, told: str
) -> None:
    found = mistakes(gateway, body(node(**change)))
    assert list(found) == [f"{NODE}.{target}"], found
    assert told in found[f"{NODE}.{target}"].message


def _without(key: str) -> dict[str, Any]:
    return {name: value for name, value in node().items() if name != key}


def _graphs() -> Iterator[Any]:
    one = node()
    two = {"a": one, "b": one}
    yield pytest.param(body(jobs=two), "properties.jobs", "one node", id="several nodes")
    yield pytest.param(body(jobs={}), "properties.jobs", "one node", id="no node")
    yield pytest.param(body(_without("componentId")), f"{NODE}.componentId", "is missing", id="no component")
    own = "/subscriptions/s/resourceGroups/g/providers/x/workspaces/w/components/mine/versions/1"
    yield pytest.param(
        body({**one, "componentId": own}), f"{NODE}.componentId", "of your own", id="own component"
    )
    other = COMPONENT.replace("chat_completion", "text_generation")
    yield pytest.param(
        body({**one, "componentId": other}), f"{NODE}.componentId", "text_generation", id="other component"
    )
    yield pytest.param(body({**one, "type": "command"}), f"{NODE}.type", "one node", id="command node")
    cycle = {"rate": {"jobInputType": "literal", "value": "${{parent.inputs.rate}}"}}
    yield pytest.param(body(node(), inputs=cycle), "properties.inputs.rate.value", "bindings end", id="cycle")
    unused = {"rate": {"jobInputType": "literal", "value": "1"}}
    yield pytest.param(body(inputs=unused), "properties.inputs.rate", "would be ignored", id="unused input")
    outputs = {**body()["properties"]["outputs"], "other": {"jobOutputType": "uri_folder"}}
    yield pytest.param(body(outputs=outputs), "properties.outputs.other", "bound to no", id="unbound output")
    bound = {**one, "outputs": {"mlflow_model_folder": {"value": "${{parent.outputs.x}}", "type": "literal"}}}
    yield pytest.param(
        body(bound, outputs={}), f"{NODE}.outputs.mlflow_model_folder.value", "no output", id="unknown output"
    )
    elsewhere = {"trained_model": {"jobOutputType": "mlflow_model", "uri": "azureml://datastores/x/paths/y"}}
    yield pytest.param(
        body(outputs=elsewhere), "properties.outputs.trained_model.uri", "cannot be chosen", id="own path"
    )
    registered = {"trained_model": {"jobOutputType": "mlflow_model", "assetName": "mine"}}
    yield pytest.param(
        body(outputs=registered), "properties.outputs.trained_model.assetName", "by itself", id="asset name"
    )
    wrong = {"trained_model": {"jobOutputType": "uri_file"}}
    yield pytest.param(
        body(outputs=wrong), "properties.outputs.trained_model.jobOutputType", "one of", id="output type"
    )
    yield pytest.param(
        body(experimentName="a b"), "properties.experimentName", "not allowed", id="experiment name"
    )
    yield pytest.param(
        body(settings={"on_init": "x"}), "properties.settings.on_init", "before or after", id="on_init"
    )


@pytest.mark.parametrize(("request_body", "target", "told"), list(_graphs()))
def test_a_malformed_graph_is_refused_at_its_place(
    gateway: Gateway, request_body: dict[str, Any], target: str, told: str
) -> None:
    found = mistakes(gateway, request_body)
    assert list(found) == [target], found
    assert told in found[target].message


@pytest.mark.parametrize("kind", ["Command", "Sweep", "AutoML", "Spark", "FineTuning", "Quantum"])
def test_other_jobs_are_refused_by_their_type(gateway: Gateway, kind: str) -> None:
    with pytest.raises(Refusal) as refused:
        ordered(gateway, {"properties": {"jobType": kind, "command": "rm"}})
    assert (refused.value.code, refused.value.target) == ("NotSupported", "properties.jobType")
    assert "chat_completion_pipeline" in refused.value.message


def test_a_huge_graph_is_refused(gateway: Gateway) -> None:
    with pytest.raises(Refusal) as refused:
        ordered(gateway, body(tags={"x": "y" * 300_000}))
    assert (refused.value.status, refused.value.target) == (400, "properties")


def test_loose_settings_make_warnings_of_what_would_be_ignored(tmp_path: Path) -> None:
    gateway = with_train(made_gateway(tmp_path, is_loose=True))
    unused = {"rate": {"jobInputType": "literal", "value": "1"}}
    order = ordered(gateway, body(node(evaluation_config_params="{}"), priority=3, inputs=unused))
    assert len(order.warnings) == 3
    assert order.submission is not None
    assert tuple(order.submission.warnings) == order.warnings


def test_without_a_name_for_people_the_file_names_the_data_and_not_the_folder_of_its_upload(
    gateway: Gateway,
) -> None:
    found = resolved(gateway, ordered(gateway, body(displayName=None)))
    assert recipes.display_name(found).startswith("Phi-3-mini-4k-instruct-train_sft-bs1-")


# ---------------------------------------------------------------- the same job again


def test_the_same_call_is_the_same_job_however_its_values_are_written(gateway: Gateway) -> None:
    one = ordered(gateway, body(node(learning_rate=5e-6, apply_lora=True, precision=16)))
    other = ordered(
        gateway,
        body(
            node(learning_rate="0.000005", apply_lora="true", precision="16"),
            displayName="b",
            tags={"a": "b"},
        ),
    )
    assert list(differences(one.definition, other.definition)) == []


def test_another_value_is_another_job(gateway: Gateway) -> None:
    one, other = ordered(gateway, body()), ordered(gateway, body(node(num_train_epochs=2)))
    told = list(differences(one.definition, other.definition))
    assert told == ["component.num_train_epochs is left out there and 2.0 here"]


@pytest.mark.parametrize(
    "text", ["plain", "ü", "\U0001f98a", "a\nb\tc", "\x7f\x85\u2028", '"{}: #', "${{x}}"]
)
def test_a_recipes_text_holds_any_characters(text: str) -> None:
    from tuneloop.core.recipe.lined import read as read_yaml

    assert read_yaml(as_yaml({"a": text}), "a recipe").values == {"a": text}
