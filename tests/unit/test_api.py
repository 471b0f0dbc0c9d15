"""The API over HTTP: who may speak, what comes back, and the shape of every error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from tuneloop import daemon
from tuneloop.core.settings import Settings
from tuneloop.core.types import Lineage, ModelRecord, StepRecord
from tuneloop.server.app import create_app
from tuneloop.server.parts import Parts

RECIPE = """
experiment: tests
model: SmolLM2-135M-Instruct
data:
  train: train.jsonl
  test: train.jsonl
finetune:
  apply_lora: true
"""
GOOD_ROW = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n'


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    settings = Settings(home=tmp_path / "home")
    daemon.prepare_home(settings)
    parts, _ = daemon.assemble(settings, daemon.Lifetime())
    yield parts
    parts.store.close()  # type: ignore[attr-defined]


@pytest.fixture
def api(parts: Parts) -> Iterator[TestClient]:
    headers = {"authorization": f"Bearer {parts.token}"}
    with TestClient(
        create_app(parts), base_url="http://127.0.0.1:1", headers=headers, raise_server_exceptions=False
    ) as client:
        yield client


def submission(
    folder: Path, text: str = RECIPE, rows: str = GOOD_ROW * 3, **more: object
) -> dict[str, object]:
    (folder / "train.jsonl").write_text(rows, encoding="utf-8")
    return {"text": text, "path": "recipe.yaml", "folder": str(folder), **more}


def test_health_needs_no_token_and_everything_else_does(api: TestClient) -> None:
    assert api.get("/api/health", headers={"authorization": ""}).status_code == 200
    for header in ("", "Bearer wrong", "Basic abc"):
        answer = api.get("/api/status", headers={"authorization": header})
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "not_allowed"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[::1"])
def test_a_foreign_host_is_refused_even_with_the_token(api: TestClient, host: str) -> None:
    answer = api.get("/api/status", headers={"host": host})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "foreign_caller"


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1.evil.example"])
def test_a_foreign_origin_is_refused(api: TestClient, origin: str) -> None:
    assert api.post("/api/shutdown", headers={"origin": origin}, json={}).status_code == 403


def test_a_job_is_recorded_with_its_final_parameters_and_their_origins(
    api: TestClient, tmp_path: Path
) -> None:
    answer = api.post("/api/jobs", json=submission(tmp_path, overrides={"finetune.learning_rate": "1e-4"}))
    assert answer.status_code == 201, answer.text
    job = answer.json()
    assert job["state"] == "queued"
    assert job["parameters"]["finetune.learning_rate"] == 1e-4
    assert job["origins"]["finetune.learning_rate"] == "--set"
    assert job["origins"]["finetune.apply_lora"] == "recipe"
    assert job["steps"][0]["name"] == "model_import"
    assert [found["name"] for found in api.get("/api/jobs").json()] == [job["name"]]
    assert api.get(f"/api/jobs/{job['name']}/events").json()[0]["what"] == "submitted"


def test_resolving_records_nothing(api: TestClient, tmp_path: Path) -> None:
    answer = api.post("/api/recipes/resolve", json=submission(tmp_path)).json()
    assert answer["parameters"]["finetune.apply_lora"] is True
    assert api.get("/api/jobs").json() == []


def test_resolving_refuses_what_submitting_would(api: TestClient, tmp_path: Path) -> None:
    body = submission(tmp_path, rows=GOOD_ROW + "{not json\n")
    tried, submitted = (api.post(path, json=body) for path in ("/api/recipes/resolve", "/api/jobs"))
    assert tried.status_code == submitted.status_code == 422
    assert tried.json() == submitted.json()
    (tmp_path / "train.jsonl").unlink()
    assert api.post("/api/recipes/resolve", json=body).status_code == 404


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ("{not json\n", "json"),
        ("[1, 2]\n", "row_is_object"),
        ('{"prompt": "x", "completion": "y"}\n', "messages"),
        ('{"messages": [{"role": "robot", "content": "x"}]}\n', "role"),
        (
            '{"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "x"}]}\n',
            "content",
        ),
        ('{"messages": [{"role": "user", "content": "x"}]}\n', "assistant"),
    ],
)
def test_a_bad_row_is_named_by_file_line_field_rule_and_fix_and_nothing_starts(
    api: TestClient, tmp_path: Path, row: str, rule: str
) -> None:
    answer = api.post("/api/jobs", json=submission(tmp_path, rows=GOOD_ROW * 2 + row + GOOD_ROW))
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert error["code"] == "data"
    finding = error["details"][0]
    assert (finding["file"], finding["line"]) == ("train.jsonl", 3)
    assert rule in finding["rule"]
    assert finding["fix"]
    assert "train.jsonl line 3" in error["message"]
    assert api.get("/api/jobs").json() == []


def test_bytes_that_are_not_utf8_are_a_finding_not_a_crash(api: TestClient, tmp_path: Path) -> None:
    body = submission(tmp_path)
    (tmp_path / "train.jsonl").write_bytes(GOOD_ROW.encode() + b'{"messages": "\xff\xfe"}\n')
    error = api.post("/api/jobs", json=body).json()["error"]
    assert (error["details"][0]["line"], error["details"][0]["rule"]) == (2, "encoding")


def test_all_mistakes_of_a_recipe_come_at_once_with_their_lines(api: TestClient, tmp_path: Path) -> None:
    text = RECIPE + "  lerning_rate: 1\n  num_train_epochs: many\nevaluat: {}\n"
    error = api.post("/api/jobs", json=submission(tmp_path, text=text)).json()["error"]
    assert error["code"] == "recipe"
    lines = {found["line"] for found in error["details"]}
    assert len(error["details"]) >= 3
    assert all(isinstance(line, int) for line in lines)
    assert "learning_rate" in str(error["details"])


def test_an_unknown_model_is_named_with_the_nearest(api: TestClient, tmp_path: Path) -> None:
    text = RECIPE.replace("SmolLM2-135M-Instruct", "SmolLM-135M-Instruct")
    answer = api.post("/api/jobs", json=submission(tmp_path, text=text))
    assert answer.status_code == 404
    assert "SmolLM2-135M-Instruct" in str(answer.json()["error"])


@pytest.mark.parametrize(
    "change",
    [
        {"folder": "relative"},
        {"environment": {"LD_PRELOAD": "/tmp/x.so"}},
        {"surprise": 1},
        {"experiment": "../../x"},
        {"overrides": {"finetune.lerning_rate": "1"}},
    ],
)
def test_what_would_be_ignored_or_unsafe_in_a_submission_is_refused(
    api: TestClient, tmp_path: Path, change: dict[str, object]
) -> None:
    answer = api.post("/api/jobs", json={**submission(tmp_path), **change})
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]["message"]
    assert api.get("/api/jobs").json() == []


@pytest.mark.parametrize("address", ["/api/recipes/resolve", "/api/jobs"])
def test_a_compute_or_an_experiment_that_cannot_be_is_refused_by_a_dry_run_too(
    api: TestClient, tmp_path: Path, address: str
) -> None:
    elsewhere = api.post(address, json=submission(tmp_path, overrides={"compute": "gpu"}))
    assert elsewhere.status_code == 404
    assert elsewhere.json()["error"]["message"] == "There is no compute 'gpu'."
    assert api.post(address, json=submission(tmp_path, experiment="a b")).status_code == 400
    assert api.get("/api/jobs").json() == []


def test_a_question_without_facts_is_refused_before_anything_starts(api: TestClient, tmp_path: Path) -> None:
    (tmp_path / "asked.jsonl").write_text('{"id": "a", "question": "Why?"}\n')
    body = submission(tmp_path, overrides={"data.questions": "asked.jsonl"})
    answer = api.post("/api/jobs", json=body)
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert "asked.jsonl line 1: facts: found nothing (rule question)." in error["message"]
    assert error["details"][0]["field"] == "facts"
    assert api.get("/api/jobs").json() == []


@pytest.mark.parametrize("limit", ["0", "9" * 30, "x"])
def test_a_limit_that_makes_no_sense_is_a_usage_error(api: TestClient, limit: str) -> None:
    assert api.get("/api/jobs", params={"limit": limit}).status_code == 400


def test_a_mistake_in_a_card_is_told_with_its_file(api: TestClient) -> None:
    error = api.post("/api/cards", json={"text": "words", "path": "mine.yaml"}).json()["error"]
    assert error["message"].startswith("mine.yaml line 1: ")


def test_a_file_that_is_not_there_is_named_with_where_it_was_looked_for(
    api: TestClient, tmp_path: Path
) -> None:
    body = submission(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    error = api.post("/api/jobs", json=body).json()["error"]
    assert str(tmp_path / "train.jsonl") in error["message"]


@pytest.mark.parametrize(
    "path",
    ["/api/jobs/none", "/api/models/none/1", "/api/endpoints/none", "/api/cards/none", "/api/nothing/here"],
)
def test_what_is_not_there_is_404_in_the_one_shape(api: TestClient, path: str) -> None:
    answer = api.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


def test_a_cancelled_job_that_ended_cannot_be_cancelled_again(api: TestClient, tmp_path: Path) -> None:
    name = api.post("/api/jobs", json=submission(tmp_path)).json()["name"]
    assert api.post(f"/api/jobs/{name}/cancel").json()["state"] == "canceling"
    assert api.post(f"/api/jobs/{name}/cancel").status_code == 200
    assert api.post(f"/api/jobs/{name}/retry").status_code == 409


def test_an_output_that_is_not_made_yet_says_which_step_makes_it(api: TestClient, tmp_path: Path) -> None:
    name = api.post("/api/jobs", json=submission(tmp_path)).json()["name"]
    answer = api.post("/api/models", json={"job": name, "name": "tuned"})
    assert answer.status_code == 409
    assert "export" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "path", ["../../../token", "..%2f..%2ftoken", "/etc/passwd", "%00", "a/../../../token"]
)
def test_a_path_never_leaves_its_artifact(api: TestClient, parts: Parts, tmp_path: Path, path: str) -> None:
    name = api.post("/api/jobs", json=submission(tmp_path)).json()["name"]
    digest, _ = parts.files.ingest(tmp_path / "train.jsonl")
    step = parts.store.get(StepRecord, f"{name}/export")
    parts.store.update(step.model_copy(update={"outputs": {"mlflow_model": digest}}))
    answer = api.get(f"/api/jobs/{name}/outputs/trained_model/files/{path}")
    assert answer.status_code == 404
    assert parts.token not in answer.text


def test_an_endpoint_shows_keys_only_when_asked_for_them(api: TestClient) -> None:
    assert api.post("/api/endpoints", json={"name": "chat"}).status_code == 201
    keys = api.get("/api/endpoints/chat/keys").json()
    shown = api.get("/api/endpoints/chat").text
    assert not any(key in shown for key in keys.values())


def test_the_home_is_private(parts: Parts) -> None:
    for name in ("token", "secret", "tuneloop.db"):
        assert (parts.home / name).stat().st_mode & 0o077 == 0
    assert parts.home.stat().st_mode & 0o077 == 0


def test_the_api_describes_itself(api: TestClient) -> None:
    paths = api.get("/openapi.json").json()["paths"]
    assert "/api/jobs" in paths
    assert "/api/endpoints/{name}/keys" in paths


def test_a_cluster_is_created_shown_and_deleted(api: TestClient) -> None:
    body = {"name": "gpu-cluster-big", "size": "STANDARD_NC24ADS_A100_V4", "max_instances": 2}
    made = api.post("/api/computes", json=body)
    assert made.status_code == 201
    assert made.json()["size"] == "Standard_NC24ads_A100_v4"
    assert made.json()["memory_bytes"] == api.get("/api/computes/local").json()["memory_bytes"]
    assert [one["name"] for one in api.get("/api/computes").json()] == ["local", "gpu-cluster-big"]
    assert api.post("/api/computes", json=body).json()["error"]["code"] == "already_exists"
    assert api.delete("/api/computes/gpu-cluster-big").status_code == 204
    assert api.get("/api/computes/gpu-cluster-big").status_code == 404
    assert api.delete("/api/computes/local").json()["error"]["code"] == "invalid_state"


def test_a_job_that_is_expected_to_take_more_than_there_is_is_warned_of(
    api: TestClient, tmp_path: Path
) -> None:
    overrides = {
        "finetune.per_device_train_batch_size": "100000",
        "finetune.pack_tokens": "100000000",
        "finetune.activation_checkpointing": "never",
    }
    big = submission(tmp_path, rows=GOOD_ROW * 3000, overrides=overrides)
    warnings = api.post("/api/jobs", json=big).json()["warnings"]
    assert any("step finetune is expected to take" in one and "tuneloop plan" in one for one in warnings)
    plain = api.post("/api/jobs", json=submission(tmp_path)).json()["warnings"]
    assert not any("expected to take" in one for one in plain)


def test_one_file_for_two_splits_is_told_once_and_not_for_every_row(api: TestClient, tmp_path: Path) -> None:
    warnings = api.post("/api/jobs", json=submission(tmp_path)).json()["warnings"]
    told = [one for one in warnings if "same file" in one]
    assert told == [
        "test and train are the same file, train.jsonl: its scores are of rows that were learned."
    ]
    assert not any("leak" in one for one in warnings)
    text = RECIPE.replace("test: train.jsonl", "test: test.jsonl\n  validation: test.jsonl")
    (tmp_path / "test.jsonl").write_text(GOOD_ROW.replace("Hi", "Bye"), encoding="utf-8")
    warnings = api.post("/api/recipes/resolve", json=submission(tmp_path, text)).json()["warnings"]
    assert [one for one in warnings if "same file" in one] == [
        "test and validation are the same file, test.jsonl: what one of them helps to choose, the other does "
        "not judge independently."
    ]


def test_a_conversation_in_two_different_files_is_warned_of_with_its_line(
    api: TestClient, tmp_path: Path
) -> None:
    (tmp_path / "test.jsonl").write_text(GOOD_ROW, encoding="utf-8")
    text = RECIPE.replace("test: train.jsonl", "test: test.jsonl")
    warnings = api.post("/api/jobs", json=submission(tmp_path, text)).json()["warnings"]
    assert any("test.jsonl line 1" in one and "rule leak" in one for one in warnings)


@pytest.mark.parametrize(
    "name",
    [
        "HuggingFaceTB%2FSmolLM2-135M-Instruct",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "azureml:%2F%2Fregistries%2Fazureml%2Fmodels%2FSmolLM2-135M-Instruct%2Flabels%2Flatest",
    ],
)
def test_a_base_model_is_found_by_a_name_with_slashes(api: TestClient, tmp_path: Path, name: str) -> None:
    assert api.get(f"/api/cards/{name}").json()["name"] == "SmolLM2-135M-Instruct"
    (tmp_path / "config.json").write_text("{}")
    used = api.post(f"/api/cards/{name}/source", json={"folder": str(tmp_path)})
    assert used.json()["sources"][0]["path"] == str(tmp_path)


def test_an_unknown_repository_of_a_base_model_is_told_as_such(api: TestClient) -> None:
    answer = api.get("/api/cards/nobody%2Fnothing")
    assert answer.status_code == 404
    assert "comes from the repository 'nobody/nothing'" in answer.json()["error"]["message"]


def test_a_deepspeed_file_of_a_recipe_is_read_from_the_recipes_folder(
    api: TestClient, tmp_path: Path
) -> None:
    text = RECIPE + "  apply_deepspeed: true\n  deepspeed: ds.json\n"
    error = api.post("/api/jobs", json=submission(tmp_path, text)).json()["error"]
    assert [(item["line"], item["field"]) for item in error["details"]] == [(10, "finetune.deepspeed")]
    assert f"{tmp_path}/ds.json cannot be read" in error["message"]
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2, "overlap_comm": false}}')
    name = api.post("/api/jobs", json=submission(tmp_path, text)).json()["name"]
    (tmp_path / "ds.json").unlink()
    kept = api.get(f"/api/jobs/{name}").json()["parameters"]["finetune.deepspeed"]
    assert kept == {"zero_optimization": {"stage": 2, "overlap_comm": False}}


def test_traffic_is_mirrored_to_a_deployment_without_traffic_and_a_denied_size_refused(
    api: TestClient, parts: Parts
) -> None:
    lineage = Lineage(base_model="Phi-3-mini-4k-instruct")
    at, digest = parts.started_at, "sha256:" + "0" * 64
    parts.files.artifact_path(digest).mkdir(parents=True)
    for version in ("1", "2"):
        parts.store.insert(
            ModelRecord(created_at=at, name="m", model_version=version, artifact=digest, lineage=lineage)
        )
    api.post("/api/endpoints", json={"name": "chat"})
    for name, version in (("blue", "1"), ("green", "2")):
        body = {"name": name, "model": f"m:{version}", "instance_type": "Standard_NC6s_v3"}
        made = api.post("/api/endpoints/chat/deployments", json=body)
        assert (made.status_code, made.json()["instance_type"]) == (201, "Standard_NC6s_v3")
    denied = {"name": "grey", "model": "m:1", "instance_type": "Standard_D12_v2"}
    refused = api.post("/api/endpoints/chat/deployments", json=denied)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "usage")
    assert "inference_compute_allow_list" in refused.json()["error"]["message"]
    api.post("/api/endpoints/chat/traffic", json={"blue": 100})
    mirrored = api.post("/api/endpoints/chat/mirror", json={"green": 20})
    assert (mirrored.status_code, mirrored.json()["mirror"]) == (200, {"green": 20})
    assert api.post("/api/endpoints/chat/mirror", json={"blue": 20}).status_code == 400
    assert api.post("/api/endpoints/chat/mirror", json={}).json()["mirror"] == {}
