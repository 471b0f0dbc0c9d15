"""How records look from outside."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tuneloop.core.states import STEP_ENDED
from tuneloop.core.types import (
    Compute,
    DeploymentRecord,
    EndpointRecord,
    JobRecord,
    StepRecord,
    dump,
)
from tuneloop.server.parts import Parts
from tuneloop.workspace.compute import Waiting


def job_summary(record: JobRecord) -> dict[str, Any]:
    shown = record.model_dump(
        mode="json", include={"state", "created_at", "started_at", "finished_at", "error"}
    )
    return {
        "name": record.key,
        "display_name": record.job.display_name,
        "experiment": record.job.experiment,
        "base_model": record.job.base_model,
        "priority": record.priority,
        **shown,
    }


def job(parts: Parts, name: str) -> dict[str, Any]:
    record = parts.jobs.get(name)
    queue = parts.computes.places(record)
    return {
        **job_summary(record),
        **record.job.model_dump(
            mode="json",
            include={"parameters", "origins", "datasets", "tags", "warnings", "recipe", "recipe_digest"},
        ),
        "outputs": _outputs(parts, record),
        "steps": [_step(parts, record, step, queue.get(step.step)) for step in parts.jobs.steps(name)],
    }


def _outputs(parts: Parts, record: JobRecord) -> dict[str, Any]:
    made = parts.jobs.output_digests(record.key)
    return {
        name: {
            "step": mapped.step,
            "output": mapped.output,
            "digest": made.get(name),
            "path": str(parts.files.artifact_path(made[name])) if name in made else None,
        }
        for name, mapped in record.job.outputs.items()
    }


def _step(parts: Parts, record: JobRecord, step: StepRecord, waiting: Waiting | None) -> dict[str, Any]:
    spec = record.job.step(step.step)
    attempt = parts.jobs.source_attempt(record.key, step.step)
    return {
        "name": step.step,
        "kind": spec.kind,
        "compute": spec.compute,
        "deterministic": spec.deterministic,
        "depends_on": sorted(spec.needs),
        "memory_bytes": spec.memory_bytes,
        "queue": waiting and {"position": waiting.position, "expected_seconds": waiting.expected_seconds},
        "progress": _last_progress(parts, step),
        "peak_memory_bytes": attempt.peak_memory_bytes if attempt else None,
        **step.model_dump(
            mode="json", exclude={"version", "created_at", "job", "step", "cache_key", "counted_from"}
        ),
    }


def _last_progress(parts: Parts, step: StepRecord) -> dict[str, Any] | None:
    if step.state in STEP_ENDED or step.attempts == 0:
        return None
    path = parts.files.folder(f"jobs/{step.job}/{step.step}/{step.attempts}") / "progress.jsonl"
    return _last_line(path)


def _last_line(path: Path, look_back_bytes: int = 4096) -> dict[str, Any] | None:
    try:
        with open(path, "rb") as handle:
            handle.seek(0, os.SEEK_END)
            handle.seek(max(0, handle.tell() - look_back_bytes))
            lines = handle.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return None
    if not lines:
        return None
    read: dict[str, Any] = json.loads(lines[-1])
    return read


def compute(parts: Parts, record: Compute) -> dict[str, Any]:
    """With who holds it and who waits for it."""
    return {
        **dump(record),
        **parts.computes.holdings(),
        "queue": [asdict(waiting) for waiting in parts.computes.queue(record.name)],
    }


def endpoint(parts: Parts, record: EndpointRecord) -> dict[str, Any]:
    url = parts.endpoints.router_url()
    address = None if url is None else f"{url}/endpoints/{record.name}"
    return {
        **record.model_dump(mode="json", exclude={"key_hashes", "id", "version", "key_generations"}),
        "scoring_uri": address and f"{address}/score",
        "openai_base_url": address and f"{address}/v1",
        "deployments": [deployment(parts, found) for found in parts.endpoints.deployments(record.name)],
    }


def deployment(parts: Parts, record: DeploymentRecord) -> dict[str, Any]:
    replicas = parts.endpoints.replicas(record.endpoint, record.name)
    return {
        **dump(record),
        "replica_states": [
            {
                "number": replica.number,
                "state": str(replica.state),
                "address": replica.address,
                "pid": replica.process.pid if replica.process else None,
                "error": replica.error and dump(replica.error),
            }
            for replica in replicas
        ],
    }
