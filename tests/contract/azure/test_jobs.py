"""Pipeline jobs through the SDK: submitted, followed, looked at, described, cancelled, downloaded."""

from __future__ import annotations

import html
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.contract.azure.direct import WORKSPACE, refusal, speaking_to, warnings_of
from tests.contract.azure.pipelines import Streamed, request, submit, try_to_submit
from tests.contract.azure.sdk import BASE, AzureWorld, Sdk
from tests.loop.world import wait_for

HISTORY = f"/history/v1.0{WORKSPACE}"


@pytest.fixture
def wire(azure: AzureWorld) -> Iterator[httpx.Client]:
    with speaking_to(azure) as client:
        yield client


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_with(folder: Path, name: str) -> Path:
    """The folder below `folder` that holds the file `name`."""
    (found,) = folder.rglob(name)
    return found.parent


# ---------------------------------------------------------------- following


@pytest.mark.verbs("jobs.create_or_update", "jobs.stream")
def test_a_stream_shows_what_was_submitted_each_step_the_losses_and_the_end(streamed: Streamed) -> None:
    printed = streamed.printed
    assert printed.count("Streaming user_logs/std_log.txt") == 1
    assert f"RunId: {streamed.name}" in printed
    assert f"{streamed.name} was submitted: completed, experiment contract" in printed
    assert "data: train train.jsonl, stored as train:" in printed
    assert "effective batch 1 (1 per device x 1 accumulation x 1 devices x 1 nodes)" in printed
    assert "warning: train.jsonl: 8 findings of the rule duplicate" in printed
    for step in ("model_import", "preprocess", "finetune", "export", "evaluate"):
        assert printed.count(f"{step:<12}  started on local") == 1
        assert printed.count(f"{step:<12}  succeeded in") == 1
    assert "finetune      step 1  loss " in printed
    assert "  eval_loss " in printed
    assert "learning_rate" in printed
    assert printed.count("job           completed in") == 1
    log, summary = printed.split("Execution Summary")
    assert log.strip().splitlines()[-1].split("  ", 1)[1].startswith("job           completed in")
    assert "Error" not in summary


@pytest.mark.verbs("jobs.stream")
def test_a_job_that_has_ended_is_streamed_with_its_whole_log_again_and_again(
    sdk: Sdk, streamed: Streamed
) -> None:
    for _ in range(2):
        said = sdk.run(f"ml.jobs.stream({streamed.name!r})")
        said.ok()
        assert said.printed == streamed.printed


@pytest.mark.verbs("jobs.get")
def test_a_job_is_what_was_submitted(sdk: Sdk, completed: str) -> None:
    found = sdk.run(
        f"""
        job = ml.jobs.get({completed!r})
        result = {{
            "type": job.type, "status": job.status, "name": job.name, "id": job.id,
            "display_name": job.display_name, "experiment": job.experiment_name, "tags": job.tags,
            "force_rerun": job.settings.force_rerun, "go_on": job.settings.continue_on_step_failure,
            "outputs": {{name: one.type for name, one in job.outputs.items()}},
            "nodes": list(job.jobs), "url": job.studio_url, "yaml": str(job),
        }}
        """
    ).ok()
    yaml, url = found.pop("yaml"), found.pop("url")
    assert found.pop("id").endswith(f"/workspaces/local/jobs/{completed}")
    assert found == {
        "type": "pipeline",
        "status": "Completed",
        "name": completed,
        "display_name": "completed",
        "experiment": "contract",
        "tags": {"team": "blue"},
        "force_rerun": False,
        "go_on": False,
        "outputs": {"trained_model": "mlflow_model", "evaluation_result": "uri_folder"},
        "nodes": ["node"],
    }
    assert "component: azureml://registries/azureml/components/chat_completion_pipeline/versions/" in yaml
    assert f"/models/{BASE}/versions/" in yaml
    assert f"/logs/{completed}/" in url
    assert "&tid=" in url


@pytest.mark.verbs("jobs.get")
def test_a_job_that_there_is_not_is_not_found(sdk: Sdk) -> None:
    error = sdk.run("ml.jobs.get('no_such_job')").failed()
    assert (error["type"], error["code"], error["status"]) == (
        "ResourceNotFoundError",
        "ResourceNotFound",
        404,
    )
    assert "no_such_job" in error["message"]


@pytest.mark.verbs("jobs.list", "jobs.get")
def test_steps_are_the_jobs_children(sdk: Sdk, completed: str) -> None:
    children = sdk.run(
        f"result = [(c.name, c.display_name, c.status) for c in ml.jobs.list(parent_job_name={completed!r})]"
    ).ok()
    steps = ["model_import", "preprocess", "finetune", "export", "evaluate"]
    assert children == [[f"{completed}.{step}", step, "Completed"] for step in steps]
    child = sdk.run(
        f"c = ml.jobs.get({completed + '.finetune'!r}); result = [c.name, c.status, c.compute, c.properties]"
    ).ok()
    assert child[:3] == [f"{completed}.finetune", "Completed", "local"]
    assert float(child[3]["metric.loss"]) > 0
    error = sdk.run(f"ml.jobs.stream({completed + '.finetune'!r})").failed()
    assert error["type"] == "PipelineChildJobError"


@pytest.mark.verbs("jobs.download")
def test_an_output_of_a_step_is_downloaded_from_its_own_run(
    azure: AzureWorld, completed: str, tmp_path: Path
) -> None:
    step = f"{completed}.preprocess"
    azure.sdk("new").run(
        f"ml.jobs.download({step!r}, output_name='dataset', download_path={str(tmp_path)!r})"
    ).ok()
    made = (azure.home / "jobs" / completed / "preprocess" / "1" / "outputs" / "dataset").resolve()
    assert files_in(made)
    assert files_in(tmp_path / "named-outputs" / "dataset") == files_in(made)


@pytest.mark.verbs("jobs.validate")
def test_a_job_is_validated_before_it_is_submitted(sdk: Sdk) -> None:
    found = sdk.run(VALIDATE.format(compute="local")).ok()
    assert found == [True, {}]
    passed, messages = sdk.run(VALIDATE.format(compute="gpu-clustr")).ok()
    assert not passed
    assert "gpu-clustr" in messages["jobs.node.compute"]


VALIDATE = """
component = registry.components.get(name="chat_completion_pipeline", label="latest")

@dsl.pipeline(name="validated")
def create():
    node = component(train_file_path=Input(type="uri_file", path="./train.jsonl"))
    node.compute = {compute!r}

found = ml.jobs.validate(create())
result = [found.passed, found.error_messages]
"""


@pytest.mark.verbs("jobs.show_services")
def test_a_job_has_no_services_beside_it(sdk: Sdk, completed: str) -> None:
    assert sdk.run(f"result = ml.jobs.show_services({completed!r})").ok() is None


@pytest.mark.verbs("jobs.list", "jobs.archive", "jobs.restore")
def test_an_archived_job_is_listed_among_the_archived_until_it_is_restored(sdk: Sdk, completed: str) -> None:
    def listed(which: str) -> bool:
        return completed in sdk.run(f"result = [j.name for j in ml.jobs.list(list_view_type={which!r})]").ok()

    sdk.run(f"ml.jobs.archive({completed!r})").ok()
    assert (listed("ActiveOnly"), listed("ArchivedOnly"), listed("All")) == (False, True, True)
    sdk.run(f"ml.jobs.restore({completed!r})").ok()
    assert (listed("ActiveOnly"), listed("ArchivedOnly"), listed("All")) == (True, False, True)


@pytest.mark.verbs("jobs.create_or_update")
def test_a_fetched_job_is_described_anew_by_putting_it_back(sdk: Sdk, completed: str) -> None:
    changed = sdk.run(
        f"""
        job = ml.jobs.get({completed!r})
        job.tags["seen_by"], job.description = {sdk.which!r}, "what it is"
        ml.jobs.create_or_update(job)
        job = ml.jobs.get({completed!r})
        result = [job.tags, job.description, job.status]
        """
    ).ok()
    assert changed == [{"team": "blue", "seen_by": sdk.which}, "what it is", "Completed"]


@pytest.mark.verbs("jobs.update")
def test_an_update_adds_tags_and_changes_the_name_for_people(azure: AzureWorld, completed: str) -> None:
    sdk = azure.sdk("new")
    changed = sdk.run(
        f"""
        job = ml.jobs.update({completed!r}, tags={{"checked": "yes"}}, display_name="checked")
        result = [job.tags["checked"], job.tags["team"], job.display_name]
        ml.jobs.update({completed!r}, display_name="completed")
        """
    ).ok()
    assert changed == ["yes", "blue", "checked"]
    assert azure.client.job(completed)["tags"]["checked"] == "yes"


# ---------------------------------------------------------------- files


@pytest.mark.verbs("jobs.download")
def test_a_named_output_arrives_as_it_was_made(
    sdk: Sdk, azure: AzureWorld, completed: str, tmp_path: Path
) -> None:
    sdk.run(
        f"ml.jobs.download({completed!r}, output_name='trained_model', download_path={str(tmp_path)!r})"
    ).ok()
    made = Path(azure.client.job(completed)["outputs"]["trained_model"]["path"])
    assert files_in(one_with(tmp_path / "named-outputs" / "trained_model", "MLmodel")) == files_in(made)


@pytest.mark.verbs("jobs.download")
def test_everything_is_downloaded_logs_and_every_output(
    sdk: Sdk, azure: AzureWorld, streamed: Streamed, tmp_path: Path
) -> None:
    sdk.run(f"ml.jobs.download({streamed.name!r}, all=True, download_path={str(tmp_path)!r})").ok()
    outputs = azure.client.job(streamed.name)["outputs"]
    made = Path(outputs["evaluation_result"]["path"])
    name = next(iter(files_in(made)))
    found = one_with(tmp_path / "named-outputs" / "evaluation_result", name.rsplit("/", 1)[-1])
    assert (found / name.rsplit("/", 1)[-1]).read_bytes() == (made / name).read_bytes()
    assert list((tmp_path / "named-outputs" / "trained_model").rglob("MLmodel"))
    _assert_logs(tmp_path / "artifacts", streamed)


@pytest.mark.verbs("jobs.download")
def test_without_a_name_the_logs_are_downloaded(sdk: Sdk, streamed: Streamed, tmp_path: Path) -> None:
    sdk.run(f"ml.jobs.download({streamed.name!r}, download_path={str(tmp_path)!r})").ok()
    _assert_logs(tmp_path / "artifacts", streamed)
    assert not (tmp_path / "named-outputs").exists()


def _assert_logs(folder: Path, streamed: Streamed) -> None:
    (log,) = folder.rglob("std_log.txt")
    assert log.read_text(encoding="utf-8") in streamed.printed
    names = {path.name for path in folder.rglob("*.txt")}
    assert {
        f"{step}.txt" for step in ("model_import", "preprocess", "finetune", "export", "evaluate")
    } < names


def test_a_log_is_read_with_its_secret_and_not_without(
    azure: AzureWorld, wire: httpx.Client, completed: str
) -> None:
    details = wire.get(f"{HISTORY}/runs/{completed}/details").json()
    link = details["logFiles"]["user_logs/std_log.txt"]
    del wire.headers["Authorization"]
    answer = wire.get(link)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert f"{completed} was submitted" in answer.text
    secret = link.split("/")[5]
    for wrong in (
        link.replace(secret, "0" * 64),
        link.replace(secret, "é"),
        link.replace(completed, "another_job"),
    ):
        error = refusal(wire.get(wrong), 404, "ResourceNotFound")
        assert error["message"] == "There is nothing at this address."
    for path in ("..%2f..%2fhome.json", "logs/%2e%2e/%2e%2e/home.json", "logs/nothing.txt"):
        refusal(wire.get(link.replace("user_logs/std_log.txt", path)), 404, "ResourceNotFound")


def test_the_web_view_is_a_page_of_plain_text(azure: AzureWorld, wire: httpx.Client, completed: str) -> None:
    azure.sdk("new").run(f"ml.jobs.update({completed!r}, display_name='<script>alert(1)</script>')").ok()
    job = wire.get(f"{WORKSPACE}/jobs/{completed}").json()
    link = job["properties"]["services"]["Studio"]["endpoint"]
    azure.sdk("new").run(f"ml.jobs.update({completed!r}, display_name='completed')").ok()
    page = wire.get(f"{link}&tid=x")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "script" not in page.headers["content-security-policy"]
    assert "<script" not in page.text
    assert f"{completed} was submitted" in html.unescape(page.text)
    for step in ("model_import", "finetune", "evaluate"):
        assert f"<td>{step}<td>succeeded" in page.text
    # A link in a notebook is followed; a page that fetches it gets nothing.
    click = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert wire.get(link, headers=click).status_code == 200
    for change in ({"sec-fetch-mode": "cors"}, {"sec-fetch-dest": "iframe"}, {"origin": "https://x.example"}):
        assert wire.get(link, headers={**click, **change}).status_code == 403
    child = wire.get(
        wire.get(f"{HISTORY}/runs/{completed}.finetune/details").json()["logFiles"]["user_logs/std_log.txt"]
    )
    assert child.status_code == 200


# ---------------------------------------------------------------- names, once and again


def test_a_name_that_the_client_gives_is_taken_once(
    azure: AzureWorld, wire: httpx.Client, train: str
) -> None:
    address = f"{WORKSPACE}/jobs/test_jobs_once"
    body = request(train, num_train_epochs="100", properties={"displayName": "once"})
    first = wire.put(address, json=body)
    assert first.status_code == 201, first.text
    with ThreadPoolExecutor(4) as together:
        same = list(together.map(lambda _: wire.put(f"{address}_more", json=body).status_code, range(4)))
    assert sorted(same) == [200, 200, 200, 201]
    wire.post(f"{address}_more/cancel")
    again = wire.put(address.replace("resourceGroups", "RESOURCEGROUPS").replace("once", "Once"), json=body)
    assert again.status_code == 200
    assert again.json()["name"] == "test_jobs_once"
    assert again.json()["systemData"] == first.json()["systemData"]
    error = refusal(
        wire.put(address, json=request(train, num_train_epochs="2")), 409, "ResourceAlreadyExists"
    )
    assert "component.num_train_epochs is 100.0 there and 2.0 here" in error["message"]
    assert any("duplicate" in told for told in warnings_of(azure, "job test_jobs_once"))
    # Killed between the PUT and the first look, nothing is lost: not the job, and not the log.
    details = wire.get(f"{HISTORY}/runs/test_jobs_once/details").json()
    given = wire.get(details["logFiles"]["user_logs/std_log.txt"]).text
    os.kill(azure.server_pid(), signal.SIGKILL)
    azure.restart_server()
    with speaking_to(azure) as later:
        assert later.get(address).json()["properties"]["status"] in ("Queued", "Running")
        assert later.get(details["logFiles"]["user_logs/std_log.txt"]).text.startswith(given)
    said = azure.sdk("new").run(
        """
        ml.jobs.begin_cancel("test_jobs_once").result()
        result = ml.jobs.get("test_jobs_once").status
        ml.jobs.begin_cancel("test_jobs_once").result()
        ml.jobs.stream("test_jobs_once")
        """
    )
    assert said.ok() == "Canceled"
    assert "job           it was asked to end" in said.printed
    assert "job           canceled in" in said.printed


@pytest.mark.verbs("jobs.begin_cancel")
def test_a_job_that_has_ended_cannot_be_cancelled(sdk: Sdk, completed: str) -> None:
    error = sdk.run(f"ml.jobs.begin_cancel({completed!r}).result()").failed()
    assert (error["code"], error["status"]) == ("JobHasEnded", 400)
    assert f"Job {completed} has ended already: it is completed." in error["message"]


@pytest.mark.verbs("jobs.begin_cancel", "jobs.create_or_update")
def test_equal_steps_are_reused_unless_force_rerun_says_otherwise(azure: AzureWorld, completed: str) -> None:
    sdk = azure.sdk("older")
    for force in (False, True):
        name = submit(sdk, "completed", force_rerun=force, logging_steps=1, compute_finetune="local")
        wait_for(lambda name=name: azure.step(name, "preprocess")["state"] != "pending", "preprocess")
        assert azure.step(name, "preprocess")["state"] == ("running" if force else "reused")
        if not force:
            assert azure.wait_until_ended(name)["state"] == "completed"
            reused = sdk.run(f"result = ml.jobs.get({name + '.finetune'!r}).properties").ok()
            assert reused == {
                **reused,
                "azureml.isreused": "true",
                "azureml.reusedrunid": f"{completed}.finetune",
            }
    cancelled = sdk.run(
        f"""
        ml.jobs.begin_cancel({name!r}).result()
        result = ml.jobs.get({name!r}).status
        """
    )
    assert cancelled.ok() == "Canceled"


# ---------------------------------------------------------------- failures


@pytest.mark.verbs("jobs.stream")
def test_a_failed_step_reaches_the_script_as_an_exception_that_says_why_and_where(azure: AzureWorld) -> None:
    sdk = azure.sdk("new")
    name = submit(sdk, "failing", max_seq_length=2, go_on=True)
    said = sdk.run(f"ml.jobs.stream({name!r})")
    error = said.failed()
    assert error["type"] == "JobException"
    assert "step preprocess" in error["message"]
    assert "train.jsonl" in error["message"]
    assert str(azure.home) not in error["message"].replace(f"{azure.home}/jobs", "")
    assert "preprocess    failed in" in said.printed
    assert "finetune      skipped: step preprocess is failed" in said.printed
    found = sdk.run(
        f"j = ml.jobs.get({name!r}); result = [j.status, j.settings.continue_on_step_failure]"
    ).ok()
    assert found == ["Failed", True]


def test_rows_that_cannot_be_learned_from_are_refused_with_the_files_name_and_line(azure: AzureWorld) -> None:
    (azure.folder / "test_jobs_bad.jsonl").write_text(
        (azure.folder / "train.jsonl").read_text(encoding="utf-8") + '{"prompt": "no messages"}\n',
        encoding="utf-8",
    )
    error = try_to_submit(azure.sdk("new"), "bad", train="./test_jobs_bad.jsonl").failed()
    assert (error["code"], error["status"]) == ("InvalidData", 400)
    assert "test_jobs_bad.jsonl line 17" in error["message"]
    assert str(azure.home) not in error["message"]


def test_a_token_for_somebody_else_does_not_submit(azure: AzureWorld, wire: httpx.Client, train: str) -> None:
    address = f"{WORKSPACE}/jobs/test_jobs_token"
    ours = wire.headers["Authorization"].removeprefix("Bearer ")
    for token in (ours, "nonsense"):
        answer = wire.put(address, json=request(train), headers={"x-azureml-token": token})
        assert answer.status_code == 401
    refusal(wire.get(address), 404, "ResourceNotFound")


def test_a_step_cannot_be_described_and_a_run_that_there_is_not_is_not_found(
    wire: httpx.Client, completed: str
) -> None:
    answer = wire.patch(f"{HISTORY}/runs/{completed}.finetune", json={"hidden": True})
    refusal(answer, 400, "NotSupported")
    refusal(wire.get(f"{HISTORY}/runs/no_such_run/details"), 404, "ResourceNotFound")
    refusal(wire.patch(f"{HISTORY}/runs/{completed}", json={"duration": "1"}), 400, "NotSupported")
