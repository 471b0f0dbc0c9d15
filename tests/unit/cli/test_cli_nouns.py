"""`catalog`, `models`, `endpoints`, `deployments`, `chat`, `recipes`: arguments to requests to text."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.cli.conftest import Ran
from tests.unit.cli.fake_api import FakeApi, model
from tuneloop.cli import deployments, endpoints
from tuneloop.client import endpoint

Command = Callable[..., Ran]


def test_catalog_list_asks_for_the_task(tuneloop_command: Command) -> None:
    ran = tuneloop_command("catalog", "list", "--task", "chat-completion")
    assert "SmolLM2-135M-Instruct" in ran.out
    assert "135 M" in ran.out


def test_catalog_show_tells_the_id_and_the_note_of_the_weights(tuneloop_command: Command) -> None:
    ran = tuneloop_command("catalog", "show", "smollm2-135m-instruct")
    assert "azureml://registries/azureml/models/SmolLM2-135M-Instruct/versions/1" in ran.out
    assert "dequantised from 4 bits" in ran.out


def test_catalog_add_sends_the_text(tuneloop_command: Command, api: FakeApi, tmp_path: Path) -> None:
    (tmp_path / "card.yaml").write_text("name: x\n")
    assert tuneloop_command("catalog", "add", str(tmp_path / "card.yaml")).code == 0
    assert api.body("POST", "/api/cards") == {
        "text": "name: x\n",
        "path": str(tmp_path / "card.yaml"),
    }


def test_catalog_use_sends_an_absolute_folder(
    tuneloop_command: Command, api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    assert tuneloop_command("catalog", "use", "Phi-3", "--source", "weights").code == 0
    assert api.body("POST", "/api/cards/Phi-3/source") == {"folder": str(tmp_path / "weights")}


def test_models_register_takes_a_job_output_version_description_and_tags(
    tuneloop_command: Command, api: FakeApi
) -> None:
    words = ["--name", "support", "--version", "v1", "--description", "D", "--tag", "a=b", "--tag", "c=d"]
    ran = tuneloop_command("models", "register", "j:trained_model", *words)
    assert ran.code == 0
    assert api.body("POST", "/api/models") == {
        "job": "j",
        "output": "trained_model",
        "name": "support",
        "version": "v1",
        "description": "D",
        "tags": {"a": "b", "c": "d"},
    }
    assert "--model support:v1 --traffic 100" in ran.out


def test_a_job_alone_means_its_trained_model(tuneloop_command: Command, api: FakeApi) -> None:
    tuneloop_command("models", "register", "j", "--name", "support")
    assert api.body("POST", "/api/models")["output"] == "trained_model"


def test_models_delete_wants_a_version(tuneloop_command: Command, api: FakeApi) -> None:
    ran = tuneloop_command("models", "delete", "support")
    assert ran.code == 2
    assert "not NAME:VERSION" in ran.err
    assert tuneloop_command("models", "delete", "support:1").code == 0
    assert api.paths("DELETE") == ["/api/models/support/1"]


def test_models_download_names_the_folder_after_the_version(
    tuneloop_command: Command, api: FakeApi, tmp_path: Path
) -> None:
    api.models = [model("3")]
    ran = tuneloop_command("models", "download", "tuneloop-guide", "--to", str(tmp_path))
    assert ran.code == 0
    assert (tmp_path / "tuneloop-guide-3" / "deep" / "er" / "report.md").exists()


def test_models_show_json_is_the_record(tuneloop_command: Command, api: FakeApi) -> None:
    api.models = [model("3")]
    assert json.loads(tuneloop_command("models", "show", "tuneloop-guide:3", "--json").out) == json.loads(
        api.models[0].model_dump_json()
    )


def test_a_deployment_is_created_waited_for_and_given_the_traffic(
    tuneloop_command: Command, api: FakeApi
) -> None:
    api.make_endpoint("support")["traffic"] = {"old": 100}
    api.deployment_states = ["creating", "ready"]
    words = ["--endpoint", "support", "--model", "m:1", "--replicas", "2", "--traffic", "100"]
    ran = tuneloop_command("deployments", "create", "blue", *words)
    assert ran.code == 0
    assert "support/blue of m:1 is ready" in ran.out
    assert api.body("POST", "/api/endpoints/support/deployments") == {
        "name": "blue",
        "model": "m:1",
        "replicas": 2,
        "request_timeout_seconds": 90.0,
    }
    assert api.body("POST", "/api/endpoints/support/traffic") == {"old": 0, "blue": 100}


def test_a_share_that_does_not_fit_is_refused_before_anything_is_created(
    tuneloop_command: Command, api: FakeApi
) -> None:
    api.make_endpoint("support")["traffic"] = {"old": 100}
    words = ["--endpoint", "support", "--model", "m:1", "--traffic", "20"]
    ran = tuneloop_command("deployments", "create", "blue", *words)
    assert ran.code == 2
    assert "--traffic 20 does not fit beside old=100" in ran.err
    assert api.paths("POST") == []


def test_no_wait_returns_at_once(tuneloop_command: Command, api: FakeApi) -> None:
    api.make_endpoint("support")
    words = ["--endpoint", "support", "--model", "m:1", "--no-wait"]
    assert "is creating" in tuneloop_command("deployments", "create", "blue", *words).out


def test_a_deployment_that_fails_gives_its_log(tuneloop_command: Command, api: FakeApi) -> None:
    api.make_endpoint("support")
    api.deployment_states = ["failed"]
    ran = tuneloop_command("deployments", "create", "blue", "--endpoint", "support", "--model", "m:1")
    assert ran.code == 1
    assert "out of memory" in ran.err
    assert "tuneloop deployments logs blue --endpoint support" in ran.err


def test_delete_waits_until_nothing_is_left(tuneloop_command: Command, api: FakeApi) -> None:
    api.make_endpoint("support")
    api.make_deployment("support", {"name": "blue", "model": "m:1", "replicas": 1})
    assert tuneloop_command("deployments", "delete", "blue", "--endpoint", "support").code == 0
    assert tuneloop_command("endpoints", "delete", "support").code == 0
    assert api.endpoints == {}


def test_delete_says_when_something_is_left(
    tuneloop_command: Command, api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.make_endpoint("support")
    made = api.make_deployment("support", {"name": "blue", "model": "m:1", "replicas": 1})
    monkeypatch.setattr(deployments, "GONE_SECONDS", 0.0)
    monkeypatch.setattr(type(api), "get_deployment", lambda *_: made)
    ran = tuneloop_command("deployments", "delete", "blue", "--endpoint", "support")
    assert ran.code == 6
    assert "still being deleted" in ran.err


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("endpoints delete support", "tuneloop endpoints list"),
        ("deployments delete blue --endpoint support", "tuneloop deployments list --endpoint support"),
    ],
)
def test_ctrl_c_while_something_is_deleted_says_that_it_goes_on(
    tuneloop_command: Command, api: FakeApi, monkeypatch: pytest.MonkeyPatch, typed: str, told: str
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    api.make_endpoint("support")
    api.make_deployment("support", {"name": "blue", "model": "m:1", "replicas": 1})
    monkeypatch.setattr(endpoints, "wait_gone", interrupt)
    monkeypatch.setattr(deployments, "wait_gone", interrupt)
    ran = tuneloop_command(*typed.split())
    assert ran.code == 130
    assert "goes on being deleted" in ran.err
    assert told in ran.err


def test_a_recipe_that_is_not_there_is_told_with_the_nearest_file(
    tuneloop_command: Command, tmp_path: Path
) -> None:
    (tmp_path / "support.yaml").write_text("model: m")
    ran = tuneloop_command("run", str(tmp_path / "suport.yaml"))
    assert ran.code == 3
    assert f"next: Did you mean '{tmp_path / 'support.yaml'}'?" in ran.err


def test_invoke_sends_the_file_as_it_is_to_the_pinned_deployment(
    tuneloop_command: Command, api: FakeApi, tmp_path: Path
) -> None:
    api.make_endpoint("demo")
    request = {
        "input_data": {"input_string": [[{"role": "user", "content": "Hi"}]], "parameters": {}},
        "params": {},
    }
    (tmp_path / "sample_score.json").write_text(json.dumps(request))
    ran = tuneloop_command(
        "endpoints",
        "invoke",
        "demo",
        "--deployment",
        "base",
        "--request-file",
        str(tmp_path / "sample_score.json"),
    )
    assert json.loads(ran.out) == {"output": "from base"}
    assert api.body("POST", "/endpoints/demo/score") == request | {"pinned": "base"}


def test_traffic_takes_shares_and_refuses_what_is_none(tuneloop_command: Command, api: FakeApi) -> None:
    api.make_endpoint("demo")
    ran = tuneloop_command("endpoints", "traffic", "demo", "tuned=90", "base=10%")
    assert ran.out == "Traffic of demo: tuned 90 %, base 10 %\n"
    assert tuneloop_command("endpoints", "traffic", "demo", "tuned=most").code == 2


def test_traffic_is_mirrored_and_the_mirror_ended(tuneloop_command: Command, api: FakeApi) -> None:
    api.make_endpoint("demo")
    ran = tuneloop_command("endpoints", "traffic", "demo", "tuned=100", "--mirror", "next=20")
    assert ran.out == "Traffic of demo: tuned 100 %\nMirrored: next 20 %\n"
    assert api.body("POST", "/api/endpoints/demo/mirror") == {"next": 20}
    assert "mirrored" in tuneloop_command("endpoints", "show", "demo").out
    api.endpoints["demo"]["mirror"] = {}
    assert "Mirrored" not in tuneloop_command("endpoints", "traffic", "demo", "tuned=100").out
    assert tuneloop_command("endpoints", "traffic", "demo", "--mirror", "next=some").code == 2
    assert tuneloop_command("endpoints", "traffic", "demo").code == 2


def test_an_instance_type_is_sent_only_when_it_is_said(tuneloop_command: Command, api: FakeApi) -> None:
    api.make_endpoint("support")
    words = ["--endpoint", "support", "--model", "m:1", "--no-wait", "--instance-type", "Standard_NC6s_v3"]
    assert tuneloop_command("deployments", "create", "blue", *words).code == 0
    sent = api.body("POST", "/api/endpoints/support/deployments")
    assert sent["instance_type"] == "Standard_NC6s_v3"


def test_the_primary_key_alone_fits_into_a_command_line(tuneloop_command: Command, api: FakeApi) -> None:
    api.make_endpoint("demo")
    assert tuneloop_command("endpoints", "keys", "demo", "--primary").out == "the-token\n"
    assert tuneloop_command("endpoints", "keys", "demo", "--regenerate", "secondary").code == 0
    assert api.body("POST", "/api/endpoints/demo/keys/regenerate") == {"slot": "secondary"}


def test_endpoints_without_an_address_are_told_and_not_called(
    tuneloop_command: Command, api: FakeApi
) -> None:
    api.make_endpoint("demo") | {}
    api.endpoints["demo"] |= {"scoring_uri": None, "openai_base_url": None}
    assert tuneloop_command("endpoints", "show", "demo").code == 0
    ran = tuneloop_command("chat", "demo", "--message", "Hi")
    assert ran.code == 6
    assert "has no address yet" in ran.err


def test_chat_once_streams_the_reply_without_control_characters(
    tuneloop_command: Command, api: FakeApi
) -> None:
    api.make_endpoint("demo")
    ran = tuneloop_command("chat", "demo", "--message", "Hi", "--system", "Be kind.", "--deployment", "base")
    assert ran.out == "Hello[31m #2\n"
    sent = api.body("POST", "/endpoints/demo/v1/chat/completions")
    assert sent["pinned"] == "base"
    assert sent["messages"][0] == {"role": "system", "content": "Be kind."}


def test_chat_keeps_the_history_until_reset(
    tuneloop_command: Command, api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.make_endpoint("demo")
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n/help\n/reset\nthree\n/quit\nnever\n"))
    ran = tuneloop_command("chat", "demo")
    assert [line[-2:] for line in ran.out.splitlines()] == ["#1", "#3", "#1"]


def test_chat_ends_with_the_input(
    tuneloop_command: Command, api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.make_endpoint("demo")
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n"))
    assert tuneloop_command("chat", "demo").code == 0


def test_chat_json_prints_the_completion(tuneloop_command: Command, api: FakeApi) -> None:
    api.make_endpoint("demo")
    ran = tuneloop_command("chat", "demo", "--message", "Hi", "--json")
    assert json.loads(ran.out)["choices"][0]["message"]["content"] == "I am tuned."
    assert tuneloop_command("chat", "demo", "--json").code == 2


def test_a_shipped_recipe_is_printed_to_copy(tuneloop_command: Command) -> None:
    listed = tuneloop_command("recipes", "list").out
    assert "demo" in listed
    assert tuneloop_command("recipes", "show", "demo").out.startswith("# Teach")


def test_creating_waits_until_the_endpoint_has_its_address(
    tuneloop_command: Command, api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    whole = api.get_endpoint

    def late(name: str) -> dict[str, Any]:
        looks.append(name)
        unknown = {"scoring_uri": None, "openai_base_url": None}
        return whole(name) | (unknown if len(looks) < 3 else {})

    monkeypatch.setattr(api, "get_endpoint", late)
    ran = tuneloop_command("endpoints", "create", "support")
    assert f"Created endpoint support at {api.url}/endpoints/support/v1" in ran.out
    assert len(looks) == 3


def test_an_endpoint_that_stays_without_an_address_says_why(
    tuneloop_command: Command, api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = {"scoring_uri": None, "openai_base_url": None}
    whole = api.get_endpoint
    monkeypatch.setattr(api, "get_endpoint", lambda name: whole(name) | unknown)
    monkeypatch.setattr(endpoints, "ADDRESS_SECONDS", 0.0)
    api.services[0]["error"] = {"message": "Port 4321 is taken."}
    ran = tuneloop_command("endpoints", "create", "support")
    assert ran.code == 0
    assert "no address yet: Port 4321 is taken." in ran.out
    assert "tuneloop endpoints show support" in ran.out
    assert "Port 4321 is taken." in tuneloop_command("endpoints", "show", "support").out


def test_a_deployment_is_ready_for_people_when_the_router_knows_it(
    tuneloop_command: Command, api: FakeApi
) -> None:
    api.make_endpoint("support")
    api.unrouted = 2
    ran = tuneloop_command("deployments", "create", "blue", "--endpoint", "support", "--model", "m:1")
    assert ran.code == 0
    assert f"its address: {api.url}/endpoints/support/v1" in ran.out
    assert api.paths("GET").count("/endpoints/support/v1/models") == 3


def test_ctrl_c_while_a_deployment_loads_says_that_it_goes_on(
    tuneloop_command: Command, api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(deployments, "wait_ready", interrupted)
    api.make_endpoint("support")
    words = ["deployments", "create", "blue", "--endpoint", "support", "--model", "m:1", "--traffic", "100"]
    ran = tuneloop_command(*words)
    assert ran.code == 130
    assert "goes on loading" in ran.err
    assert "tuneloop endpoints traffic support blue=100" in ran.err


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_what_is_no_number_is_a_usage_error(tuneloop_command: Command, api: FakeApi, number: str) -> None:
    api.make_endpoint("demo")
    assert tuneloop_command("chat", "demo", "--message", "Hi", "--temperature", number).code == 2
    words = [
        "deployments",
        "create",
        "b",
        "--endpoint",
        "demo",
        "--model",
        "m:1",
        "--request-timeout",
        number,
    ]
    assert tuneloop_command(*words).code == 2


def test_what_the_router_refuses_comes_with_a_next_move() -> None:
    found = endpoint._refusal("demo", 404, b'{"error": {"message": "no deployment yet", "code": "x"}}')
    assert (found.message, found.next_move) == (
        "no deployment yet",
        "Look at it with: tuneloop endpoints show demo",
    )
    key = endpoint._refusal("demo", 401, b'{"error": {"message": "wrong key", "code": "invalid_key"}}')
    assert key.next_move == "Its keys: tuneloop endpoints keys demo"
