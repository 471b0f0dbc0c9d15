"""Outputs: what a job declares, and which of the component's each of them is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tuneloop.core.names import did_you_mean
from tuneloop.server.azure import component
from tuneloop.server.azure.bodies import Body
from tuneloop.server.azure.jobs.facts import ALWAYS_THERE, NODE_OUTPUTS
from tuneloop.server.azure.jobs.inputs import LITERAL, binding

_FOLDERS = ("uri_folder", "custom_model", "mlflow_model")
_TYPES: Mapping[str, tuple[str, ...]] = {
    "mlflow_model_folder": _FOLDERS,
    "pytorch_model_folder": ("uri_folder", "custom_model"),
    "evaluation_result": ("uri_folder",),
}
"""What an output of the job may be declared as."""
_OUTPUT_MODES = ("ReadWriteMount", "rw_mount", "Upload", "Direct")


def read_declared(properties: Body, is_ours: Callable[[str, str], bool]) -> dict[str, dict[str, Any]]:
    """The job's outputs. `is_ours`: whether an output's address is the one that we gave."""
    found = {}
    for name, written in properties.objects("outputs"):
        kind = written.text("jobOutputType") or written.text("job_output_type") or "uri_folder"
        mode = written.text("mode")
        if mode and mode not in _OUTPUT_MODES:
            written.wrong("mode", f"is {mode!r}; expected one of: {', '.join(_OUTPUT_MODES)}.")
        uri = written.text("uri")
        if uri and not is_ours(name, uri):
            written.wrong(
                "uri",
                f"is {uri!r}: where an output lies cannot be chosen, it goes to the artifact store. "
                "Leave the path out, and download it or register it from the job.",
                "NotSupported",
            )
        for key in ("assetName", "assetVersion"):
            written.expect(
                key, why="an output is not registered by itself; register it once the job has completed."
            )
        found[name] = {"type": kind.lower(), "mode": mode, "description": written.text("description")}
    return found


def read_bound(properties: Body, node: Body, declared: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The job's outputs to the component's. `node` is `properties` where the component is the job itself."""
    is_own = node is properties
    mapped = dict(_own(properties, declared) if is_own else _bound(node, declared))
    for name, one in declared.items():
        if name not in mapped and not is_own:
            # What is always there comes back in an update, though nobody bound it.
            if name == ALWAYS_THERE:
                continue
            properties.wrong(f"outputs.{name}", "is bound to no output of the node.")
        elif name in mapped and one["type"] not in _TYPES[mapped[name]]:
            properties.wrong(
                f"outputs.{name}.jobOutputType",
                f"is {one['type']!r}; {mapped[name]} is one of: {', '.join(_TYPES[mapped[name]])}.",
            )
    return mapped


def _bound(node: Body, declared: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    taken: dict[str, str] = {}
    for name, written in node.objects("outputs"):
        if name not in NODE_OUTPUTS:
            written.passed_over(*written.names())
            _unknown(node, name)
            continue
        kind = written.text("type") or written.text("job_output_type") or LITERAL
        if kind.lower() != LITERAL:
            # An output of the node that goes nowhere, with its type and how it is delivered.
            written.passed_over("mode")
            written.expect("uri", why="where an output lies cannot be chosen.")
            continue
        value = written.raw("value")
        target = binding(value, "outputs")
        if target is None or target not in declared:
            hint = did_you_mean(target or "", declared) or "The job declares none."
            written.wrong("value", f"is {value!r}, which is no output of the job. {hint}")
        elif target in taken:
            written.wrong("value", f"is {value!r}, which {taken[target]} is bound to already.")
        else:
            taken[target] = name
            yield target, name


def _own(properties: Body, declared: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in declared:
        if name in NODE_OUTPUTS:
            yield name, name
        else:
            _unknown(properties, name)


def _unknown(body: Body, name: str) -> None:
    hint = did_you_mean(name, NODE_OUTPUTS) or ""
    body.wrong(f"outputs.{name}", f"is not an output of {component.NAME}. {hint}".rstrip())
