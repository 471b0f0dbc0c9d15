"""A pipeline job of one node, the chat-completion component of the registry, turned into our recipe.

Everything is read; what is wrong or would be ignored is said in one refusal, at the place where it stands in
the request. The 69 inputs go into the recipe's section `component`, which knows each of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tuneloop.core import deepspeed
from tuneloop.core.errors import InvalidName, NotFound, RecipeError, UsageError
from tuneloop.core.names import check_name, did_you_mean
from tuneloop.core.recipe.component import ADVISED, INPUTS, NO_COMPUTE
from tuneloop.core.types import JobOutput
from tuneloop.server.azure import component, uris
from tuneloop.server.azure.bodies import Body
from tuneloop.server.azure.errors import Refusal, not_supported
from tuneloop.server.azure.gateway import REGISTRY, Gateway
from tuneloop.server.azure.jobs.definition import as_yaml, comparable
from tuneloop.server.azure.jobs.facts import NODE_OUTPUTS
from tuneloop.server.azure.jobs.inputs import LITERAL, Given, job_inputs, node_inputs
from tuneloop.server.azure.jobs.outputs import read_bound, read_declared
from tuneloop.workspace.jobs import Submission

FILES: Mapping[str, str] = {
    "train_file_path": "train",
    "validation_file_path": "validation",
    "test_file_path": "test",
}
"""Input to the role of its file."""
COMPUTES: Mapping[str, str] = {
    "compute_model_import": "model_import",
    "compute_preprocess": "preprocess",
    "compute_finetune": "finetune",
    "compute_model_evaluation": "evaluate",
}
MODEL = "mlflow_model_path"
LARGEST_BYTES = 256 * 1024
"""Of a graph; what is larger is no single call of the component."""
_COMPONENT = re.compile(
    r"azureml://registries/(?P<registry>[^/]+)/components/(?P<name>[^/]+)(?:/(?:versions|labels)/[^/]+)?",
    re.IGNORECASE,
)
_ONE_NODE = f"a pipeline here is one node, the component {component.NAME} of the registry {REGISTRY}"
_OTHER_JOBS: Mapping[str, str] = {
    "command": "A command job",
    "sweep": "A sweep",
    "automl": "An AutoML job",
    "spark": "A Spark job",
    "finetuning": "A fine-tuning job",
    "labeling": "A labeling job",
    "base": "A job without a type",
}


@dataclass(frozen=True)
class Order:
    """What a request asks for."""

    display_name: str | None
    description: str
    tags: dict[str, str]
    properties: dict[str, str]
    is_archived: bool
    definition: dict[str, Any] | None
    """What may not change once the job is there; None: the request holds no graph."""
    graph: dict[str, Any]
    """Inputs, nodes, outputs, settings and compute as they were sent, to be given back."""
    outputs: dict[str, dict[str, Any]]
    submission: Submission | None
    warnings: tuple[str, ...]


@dataclass
class _Draft:
    """The recipe on its way."""

    component: dict[str, Any] = field(default_factory=dict)
    compute: dict[str, str] = field(default_factory=dict)
    shown: dict[str, str] = field(default_factory=dict)
    model: str | None = None


def read(gateway: Gateway, body: Body, name: str, *, made: Mapping[str, str] | None = None) -> Order:
    """`made`: the outputs of the job of that name with their addresses, where there is one; None: it is new.
    Raises `Refusal` that says all that is wrong."""
    body.passed_over("id", "name", "type", "systemData")
    properties = body.object("properties")
    _refuse_other_jobs(properties)
    if len(json.dumps(body.raw("properties"))) > LARGEST_BYTES:
        told = f"The job is described in more than {LARGEST_BYTES // 1024} KiB; {_ONE_NODE}."
        raise Refusal(400, "InvalidInput", told, target="properties")
    return _Reader(gateway, body, properties, name, made).read()


class _Reader:
    def __init__(
        self, gateway: Gateway, body: Body, properties: Body, name: str, made: Mapping[str, str] | None
    ) -> None:
        self._gateway = gateway
        self._parts = gateway.parts
        self._body = body
        self._properties = properties
        self._name = name
        self._made = made
        self._draft = _Draft()
        self._settings: dict[str, Any] = {}
        self._default_compute = ""

    def read(self) -> Order:
        properties = self._properties
        graph = {
            key: properties.raw(key)
            for key in ("inputs", "jobs", "outputs", "settings", "computeId", "componentId")
        }
        display_name = properties.text("displayName") or None
        experiment = self._experiment()
        description, tags = properties.text("description"), properties.texts("tags")
        said, is_archived = properties.texts("properties"), properties.flag("isArchived")
        properties.passed_over("status", "services", "jobType")
        properties.without_effect("identity", "steps run as the person whose server this is.")
        self._read_settings()
        declared = read_declared(properties, self._is_ours)
        node, own = self._node()
        definition = submission = None
        if node is not None:
            self._read_inputs(node, own)
            outputs = read_bound(properties, node, declared)
            self._tell_of_adapter(outputs)
            recipe = self._recipe(display_name, experiment)
            definition = comparable({**recipe, "data": None, "outputs": outputs})
            submission = self._submission(recipe, display_name, outputs, tags)
            self._rehearse(submission, node)
            declared = {name: {**declared[name], "node": made} for name, made in outputs.items()}
        warnings = self._body.finish(is_loose=self._gateway.is_loose)
        return Order(
            display_name=display_name,
            description=description,
            tags=tags,
            properties=said,
            is_archived=is_archived,
            definition=definition,
            graph=graph,
            outputs=declared,
            submission=submission and replace(submission, warnings=warnings),
            warnings=warnings,
        )

    # ------------------------------------------------------------ the job

    def _experiment(self) -> str:
        name = self._properties.text("experimentName") or "Default"
        try:
            return check_name(name, "experiment")
        except InvalidName as mistake:
            self._properties.wrong("experimentName", f"is not allowed: {mistake}", "InvalidResourceName")
            return "Default"

    def _read_settings(self) -> None:
        settings = self._properties.object("settings")
        for key in ("force_rerun", "continue_on_step_failure"):
            self._settings[key] = settings.flag(key)
        self._default_compute = self._compute(settings, "default_compute")
        store = str(settings.text("default_datastore")).rsplit("/", 1)[-1].removeprefix("azureml:")
        if store not in ("", "workspaceblobstore"):
            settings.wrong("default_datastore", f"is {store!r}: outputs lie in the artifact store.")
        settings.passed_over("_source")
        for key in ("on_init", "on_finalize"):
            settings.expect(key, why=f"nothing runs before or after: {_ONE_NODE}.")
        self._default_compute = self._compute(self._properties, "computeId") or self._default_compute

    def _compute(self, body: Body, key: str) -> str:
        """The name of a compute that there is; empty: none was named."""
        name = _last_part(body.text(key))
        if not name or self._is_compute(name):
            return name
        if name.lower() == NO_COMPUTE:
            body.warn(f"{body.place(key)} is {NO_COMPUTE!r}: steps run on this machine.")
            return ""
        body.wrong(key, self._why_no_compute(name), "ResourceNotFound")
        return ""

    def _is_compute(self, name: str) -> bool:
        try:
            self._parts.computes.get(name)
        except NotFound:
            return False
        return True

    def _why_no_compute(self, name: str) -> str:
        known = [one.name for one in self._parts.computes.list()]
        hint = did_you_mean(name, known) or f"There is: {', '.join(sorted(known))}."
        return f"is {name!r}, which is no compute of the workspace. {hint}"

    def _is_ours(self, name: str, uri: str) -> bool:
        return self._made is not None and self._made.get(name, "").lower() == uri.lower()

    # ------------------------------------------------------------ the node

    def _node(self) -> tuple[Body | None, bool]:
        """The one that is there, and whether it is the job itself (a component as a job)."""
        properties = self._properties
        nodes = list(properties.objects("jobs"))
        whole = properties.text("componentId")
        if len(nodes) > 1:
            names = ", ".join(name for name, _ in nodes)
            properties.wrong("jobs", f"has {len(nodes)} nodes ({names}): {_ONE_NODE}.", "NotSupported")
        elif nodes:
            if whole:
                properties.wrong("componentId", "is given beside jobs; one of them says what runs.")
            return (nodes[0][1], False) if self._is_the_component(nodes[0][1]) else (None, False)
        elif whole:
            return (properties, True) if self._is_known("componentId", properties) else (None, True)
        elif self._made is None:
            properties.wrong("jobs", f"is missing: {_ONE_NODE}.")
        for _, node in nodes:
            node.passed_over(*node.names())
        return None, False

    def _is_the_component(self, node: Body) -> bool:
        node.passed_over("name", "display_name", "description", "tags", "properties", "comment", "_source")
        kind = node.text("type") or "pipeline"
        if kind.lower() != "pipeline":
            node.wrong("type", f"is {kind!r}: {_ONE_NODE}.", "NotSupported")
            node.passed_over(*node.names())
            return False
        if self._is_known("componentId", node):
            self._default_compute = self._compute(node, "computeId") or self._default_compute
            return True
        node.passed_over(*node.names())
        return False

    def _is_known(self, key: str, body: Body) -> bool:
        written = body.text(key)
        found = _COMPONENT.fullmatch(written)
        if found is None or found["registry"].lower() != REGISTRY or found["name"].lower() != component.NAME:
            told = f"is {written!r}" if written else "is missing"
            body.wrong(key, f"{told}: {_ONE_NODE}; components of your own are not run.", "NotSupported")
            return False
        return True

    def _read_inputs(self, node: Body, is_own: bool) -> None:
        own = job_inputs(self._properties)
        used: set[str] = set()
        given = own if is_own else node_inputs(node, own, used)
        for name, one in given.items():
            self._take(node, name, one)
        for name in () if is_own else [name for name in own if name not in used]:
            self._unused(name)
        if "train_file_path" not in given and "train_mltable_path" not in given:
            node.wrong("inputs.train_file_path", "is missing: the component learns from it.")
        if not {MODEL, "huggingface_id", "pytorch_model_path"} & set(given):
            told = f"is missing: give the id of a model of the registry {REGISTRY}."
            node.wrong(f"inputs.{MODEL}", told)
        self._place_steps(node)

    def _unused(self, name: str) -> None:
        told = "is bound to no input of the node, so it would be ignored."
        if self._gateway.is_loose:
            self._properties.warn(f"properties.inputs.{name} {told}")
        else:
            self._properties.wrong(f"inputs.{name}", f"{told} Leave it out.", "NotSupported")

    def _take(self, node: Body, name: str, given: Given) -> None:
        known = ADVISED.get(name) or INPUTS.get(name)
        if known is None:
            hint = did_you_mean(name, INPUTS) or ""
            node.wrong(
                f"inputs.{name}", f"is not an input of {component.NAME}. {hint}".rstrip(), "NotSupported"
            )
        elif known.reason is not None and name.startswith("evaluation_config") and self._gateway.is_loose:
            node.warn(f"{node.place(f'inputs.{name}')} {known.reason}")
        elif known.reason is not None:
            node.wrong(f"inputs.{name}", known.reason, "NotSupported")
        elif name in FILES or name == "deepspeed":
            self._take_file(node, name, given)
        elif name in (MODEL, "huggingface_id"):
            self._take_model(node, name, given)
        elif given.kind != LITERAL:
            node.wrong(f"inputs.{name}", f"is a {given.kind}; expected a literal.")
        else:
            self._draft.component[name] = given.value

    def _take_file(self, node: Body, name: str, given: Given) -> None:
        if given.kind not in ("uri_file", LITERAL):
            node.wrong(f"inputs.{name}", f"is a {given.kind}; expected a uri_file.")
            return
        try:
            found = uris.locate(self._gateway, str(given.value))
        except Refusal as refusal:
            node.wrong(f"inputs.{name}", f"is {given.value!r}: {refusal.message}", refusal.code)
            return
        if found.kind != "file":
            node.wrong(f"inputs.{name}", f"is {given.value!r}, a folder; expected a file.")
        elif name == "deepspeed":
            self._take_deepspeed(node, found.path, found.name)
        else:
            self._draft.component[name] = str(found.path)
            self._draft.shown[FILES[name]] = found.name

    def _take_deepspeed(self, node: Body, path: Path, shown: str) -> None:
        try:
            self._draft.component["deepspeed"] = deepspeed.load(path)
        except UsageError as mistake:
            node.wrong("inputs.deepspeed", f"is {shown}: {str(mistake).replace(str(path), shown)}")

    def _take_model(self, node: Body, name: str, given: Given) -> None:
        text = str(given.value)
        if given.kind not in (LITERAL, "mlflow_model", "custom_model", "uri_folder"):
            node.wrong(f"inputs.{name}", f"is a {given.kind}; expected an mlflow_model.")
            return
        registry = re.match(r"azureml://registries/([^/]+)/", text, re.IGNORECASE)
        is_asset = text.lower().startswith(("azureml:", "/subscriptions/", "/"))
        if is_asset and (registry is None or registry[1].lower() != REGISTRY):
            node.wrong(
                f"inputs.{name}",
                f"is {text!r}: a base model comes from the registry {REGISTRY} "
                f"(azureml://registries/{REGISTRY}/models/NAME/versions/VERSION).",
                "NotSupported",
            )
            return
        try:
            card = self._parts.catalog.get(text)
        except (NotFound, UsageError) as mistake:
            node.wrong(f"inputs.{name}", f"is {text!r}: {mistake}", "ResourceNotFound")
            return
        self._draft.component[name] = f"{card.name}:{card.version}"
        self._draft.model = self._draft.model or name

    def _place_steps(self, node: Body) -> None:
        """Each step's own compute, then the node's, the job's, and the settings' default."""
        draft = self._draft
        for name, stage in COMPUTES.items():
            written = draft.component.get(name)
            if written is None:
                draft.compute[stage] = self._default_compute
            elif str(written).lower() == NO_COMPUTE:
                draft.component[name] = NO_COMPUTE
            elif self._is_compute(_last_part(str(written))):
                draft.component[name] = _last_part(str(written))
            else:
                node.wrong(
                    f"inputs.{name}", self._why_no_compute(_last_part(str(written))), "ResourceNotFound"
                )
                del draft.component[name]
        # The component converts the model where it was trained.
        draft.compute["export"] = str(draft.component.get("compute_finetune", self._default_compute))
        draft.compute = {stage: name for stage, name in draft.compute.items() if name not in ("", NO_COMPUTE)}

    # ------------------------------------------------------------ the recipe

    def _tell_of_adapter(self, outputs: Mapping[str, str]) -> None:
        has_lora = str(self._draft.component.get("apply_lora", "")).lower() == "true"
        if has_lora and "pytorch_model_folder" in outputs.values():
            self._properties.warn(
                "pytorch_model_folder holds the adapter, since apply_lora is true; mlflow_model_folder holds "
                "the merged weights."
            )

    def _recipe(self, display_name: str | None, experiment: str) -> dict[str, Any]:
        recipe: dict[str, Any] = {
            "experiment": experiment,
            "compute": self._draft.compute,
            "preprocess": {"long_rows": "cut", "split": "contiguous"},
            "component": self._draft.component,
            "settings": self._settings,
        }
        if display_name is not None:
            return {"display_name": display_name, **recipe}
        # Not the folder of the upload, which is a checksum.
        label = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(self._draft.shown.get("train", "data")).stem)
        return {**recipe, "data": {"name": label.strip("-._") or "data"}}

    def _submission(
        self,
        recipe: Mapping[str, Any],
        display_name: str | None,
        outputs: Mapping[str, str],
        tags: Mapping[str, str],
    ) -> Submission:
        return Submission(
            text=as_yaml(recipe),
            path="the pipeline",
            folder=Path("/"),
            name=self._name,
            takes_model_defaults=False,
            shown=self._draft.shown,
            outputs={
                name: JobOutput(step=NODE_OUTPUTS[made][0], output=NODE_OUTPUTS[made][1])
                for name, made in outputs.items()
            },
            tags=tags,
        )

    def _rehearse(self, submission: Submission, node: Body) -> None:
        """What the recipe finds wrong, at the inputs that it came from."""
        try:
            self._parts.jobs.resolve(submission)
        except RecipeError as error:
            for one in error.details or ():
                if isinstance(one, dict) and not self._is_told(one):
                    where, told = self._placed(str(one.get("field") or ""), str(one["message"]))
                    (self._properties if where in _OF_THE_JOB else node).wrong(where, told)
        except (NotFound, UsageError) as error:
            node.wrong("inputs", str(error))

    def _is_told(self, mistake: Mapping[str, Any]) -> bool:
        """What is missing because it was refused."""
        return "is missing" in str(mistake["message"]) and mistake.get("field") in (
            "model",
            "data",
            "data.train",
        )

    def _placed(self, place: str, message: str) -> tuple[str, str]:
        if place in _PLACES_OF_THE_JOB:
            return _PLACES_OF_THE_JOB[place], message
        if place == "model":
            return f"inputs.{self._draft.model or MODEL}", message
        return f"inputs.{_BY_PLACE.get(place, place.removeprefix('component.'))}", message


_BY_PLACE: Mapping[str, str] = {
    known.place: name for name, known in {**INPUTS, **ADVISED}.items() if known.place is not None
}
_PLACES_OF_THE_JOB: Mapping[str, str] = {
    "experiment": "experimentName",
    "display_name": "displayName",
    "data.name": "displayName",
}
_OF_THE_JOB = frozenset(_PLACES_OF_THE_JOB.values())


def _refuse_other_jobs(properties: Body) -> None:
    kind = properties.text("jobType")
    if kind.lower() == "pipeline":
        return
    what = _OTHER_JOBS.get(kind.lower(), f"A job of the type {kind!r}")
    raise not_supported(f"{what} is not run here: {_ONE_NODE}.", "properties.jobType")


def _last_part(name: str) -> str:
    """Of an id or of `azureml:name`."""
    return name.rstrip("/").rsplit("/", 1)[-1].removeprefix("azureml:").strip()
