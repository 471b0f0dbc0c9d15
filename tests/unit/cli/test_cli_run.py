"""`tuneloop run`, `jobs` and the progress that they show."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.cli.conftest import FakeDaemon, Ran
from tests.unit.cli.fake_api import FakeApi, job, line, page, step
from tuneloop.cli import live, output, shipped
from tuneloop.core.errors import RecipeError, ServerUnreachable

NAME = "swift_heron_1"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "my.yaml"
    path.write_text("model: SmolLM2-135M-Instruct\n")
    return path


def _running(**changes: object) -> dict[str, object]:
    return job(state="running", steps=[step("finetune", "running", **changes), step("evaluate", "pending")])


def test_run_submits_with_overrides_streams_and_sums_up(
    tuneloop_command: Callable[..., Ran], api: FakeApi, recipe: Path
) -> None:
    progress = line(
        "finetune",
        "training",
        done=120,
        total=600,
        unit="steps",
        values={"loss": 2.3104, "tokens_per_second": 412.3},
        remaining_seconds=70,
    )
    api.pages[NAME] = [page(_running(), progress), page(job()), page(job())]
    ran = tuneloop_command("run", str(recipe), "--set", "finetune.learning_rate=1e-4", "--experiment", "mine")
    assert ran.code == 0
    sent = api.body("POST", "/api/jobs")
    assert sent["overrides"] == {"finetune.learning_rate": "1e-4"}
    assert sent["experiment"] == "mine"
    assert sent["folder"] == str(recipe.parent)
    assert "training  120/600 steps  loss 2.31  412 tokens/s  1:10 left" in ran.out
    assert "finetune      succeeded in 2:05" in ran.out
    assert "loss               3.25 -> 1.5  (base -> tuned)" in ran.out
    assert f"tuneloop models register {NAME}:trained_model" in ran.out


def test_a_running_finetune_tells_its_share_of_the_machine_and_its_memory_against_the_plan(
    tuneloop_command: Callable[..., Ran], api: FakeApi, recipe: Path
) -> None:
    values = {
        "loss": 2.3104,
        "tokens_per_second": 412.3,
        "gemm_share": 0.4149,
        "memory_bytes": 3.1e9,
        "planned_memory_bytes": 3.4e9,
    }
    progress = line(
        "finetune", "training", done=1, total=6, unit="steps", values=values, remaining_seconds=70
    )
    api.pages[NAME] = [page(_running(), progress), page(job()), page(job())]
    ran = tuneloop_command("run", str(recipe))
    told = "loss 2.31  412 tokens/s  41 % of GEMM peak  3.1 of 3.4 GB planned  1:10 left"
    assert f"training  1/6 steps  {told}" in ran.out


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"memory_bytes": 8.12e8, "planned_memory_bytes": 1.2e9}, ["812.0 MB of 1.2 GB planned"]),
        ({"memory_bytes": 8.12e8}, ["memory 812.0 MB"]),
        ({"planned_memory_bytes": 1.2e9}, ["planned memory 1.2 GB"]),
        ({"gemm_share": 0.0174, "planned_steps": 3.0}, ["1.7 % of GEMM peak", "planned steps 3"]),
    ],
)
def test_figures_are_told_with_what_was_planned_of_them(values: dict[str, float], told: list[str]) -> None:
    assert list(output.figures(values)) == told


def test_pictures_of_a_step_are_named_also_where_it_was_reused_or_failed(
    tuneloop_command: Callable[..., Ran], api: FakeApi, recipe: Path, tmp_path: Path
) -> None:
    jobs = tmp_path / "home" / "jobs"
    mine, theirs = (
        jobs / NAME / "finetune" / "1" / "pictures",
        jobs / "old_owl" / "finetune" / "2" / "pictures",
    )
    for folder in (mine, theirs):
        folder.mkdir(parents=True)
        (folder / "loss.png").write_bytes(b"drawn")
    api.jobs[NAME] = job(steps=[step("finetune")])
    assert f"finetune: picture {mine / 'loss.png'}" in tuneloop_command("jobs", "show", NAME).out
    reused = step("finetune", "reused", reused_from="old_owl/finetune/2", attempts=0)
    api.jobs[NAME] = job(steps=[reused])
    assert f"finetune: picture {theirs / 'loss.png'}" in tuneloop_command("jobs", "show", NAME).out
    error = {"code": "diverged", "message": "the loss has blown up", "next": None, "details": None}
    failed = job(state="failed", steps=[step("finetune", "failed", error=error)])
    api.pages[NAME] = [page(failed)]
    assert f"picture:    {mine / 'loss.png'}" in tuneloop_command("run", str(recipe)).err


def test_run_prints_parameters_by_origin_and_built_in_ones_only_when_asked(
    tuneloop_command: Callable[..., Ran], recipe: Path
) -> None:
    short = tuneloop_command("run", str(recipe), "--dry-run").out
    assert "SmolLM2-135M-Instruct-guide-bs2-cosine-lora" in short
    assert "from --set:\n    finetune.learning_rate = 0.0001" in short
    assert "from recipe:\n    finetune.lora_r = 16" in short
    assert "finetune.seed" not in short
    assert (
        "from built-in:\n    finetune.seed = 42"
        in tuneloop_command("run", str(recipe), "--dry-run", "-v").out
    )


def test_a_dry_run_submits_nothing(tuneloop_command: Callable[..., Ran], api: FakeApi, recipe: Path) -> None:
    ran = tuneloop_command("run", str(recipe), "--dry-run", "--json")
    assert json.loads(ran.out)["origins"]["finetune.lora_r"] == "recipe"
    assert api.paths("POST") == ["/api/recipes/resolve"]


def test_plain_progress_has_no_control_characters(
    tuneloop_command: Callable[..., Ran], api: FakeApi, recipe: Path
) -> None:
    api.pages[NAME] = [page(_running(), line("finetune", "train\x1b[2Jing")), page(job())]
    ran = tuneloop_command("run", str(recipe))
    assert all(letter.isprintable() or letter == "\n" for letter in ran.out)


def test_detach_says_how_to_come_back(
    tuneloop_command: Callable[..., Ran], api: FakeApi, recipe: Path
) -> None:
    ran = tuneloop_command("run", str(recipe), "--detach")
    assert ran.code == 0
    assert f"tuneloop jobs stream {NAME}" in ran.out
    assert not [path for path in api.paths("GET") if path.endswith("/progress")]


def test_ctrl_c_leaves_the_job_and_says_how_to_come_back(
    tuneloop_command: Callable[..., Ran], recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(live, "pages", interrupted)
    ran = tuneloop_command("run", str(recipe))
    assert ran.code == 130
    assert f"tuneloop jobs stream {NAME}" in ran.err
    assert f"tuneloop jobs cancel {NAME}" in ran.err


def test_a_failed_job_gives_the_steps_error_the_next_move_and_the_log(
    tuneloop_command: Callable[..., Ran], api: FakeApi, recipe: Path, tmp_path: Path
) -> None:
    log = tmp_path / "home" / "jobs" / NAME / "finetune" / "1" / "log.txt"
    log.parent.mkdir(parents=True)
    log.write_text("boom")
    error = {
        "code": "diverged",
        "message": "loss is NaN at step 3",
        "next": "lower the rate",
        "details": None,
    }
    api.pages[NAME] = [page(job(state="failed", steps=[step("finetune", "failed", error=error)]))]
    ran = tuneloop_command("run", str(recipe))
    assert ran.code == 1
    assert "error: step finetune: loss is NaN at step 3\n  next: lower the rate" in ran.err
    assert str(log) in ran.err
    assert f"tuneloop jobs retry {NAME}" in ran.err


def test_a_cancelled_job_exits_with_130(tuneloop_command: Callable[..., Ran], api: FakeApi) -> None:
    api.pages[NAME] = [page(job(state="canceled"))]
    assert tuneloop_command("jobs", "stream", NAME).code == 130


def test_with_json_the_job_is_on_stdout_and_progress_on_stderr(
    tuneloop_command: Callable[..., Ran], api: FakeApi, recipe: Path
) -> None:
    api.pages[NAME] = [page(_running(), line("finetune", "training")), page(job())]
    ran = tuneloop_command("run", str(recipe), "--json")
    assert json.loads(ran.out)["state"] == "completed"
    assert "training" in ran.err


def test_mistakes_of_a_recipe_are_told_before_anything_runs(
    tuneloop_command: Callable[..., Ran], api: FakeApi, recipe: Path
) -> None:
    api.errors["POST", "/api/jobs"] = RecipeError(
        "my.yaml has 1 mistake.", details=[{"line": 1, "field": "modl", "message": "did you mean 'model'?"}]
    )
    ran = tuneloop_command("run", str(recipe))
    assert ran.code == 2
    assert "line 1: modl did you mean 'model'?" in ran.err


def test_a_bare_name_is_a_shipped_recipe(
    tuneloop_command: Callable[..., Ran], api: FakeApi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tuneloop_command("run", "demo.yaml", "--dry-run").code == 0
    sent = api.body("POST", "/api/recipes/resolve")
    assert sent["text"] == (shipped.folder() / "demo.yaml").read_text(encoding="utf-8")
    assert sent["folder"] == str(shipped.folder())


def test_a_file_of_the_same_name_comes_before_the_shipped_recipe(
    tuneloop_command: Callable[..., Ran], api: FakeApi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.yaml").write_text("model: mine\n")
    tuneloop_command("run", "demo.yaml", "--dry-run")
    assert api.body("POST", "/api/recipes/resolve")["text"] == "model: mine\n"


def test_an_unknown_recipe_is_not_found_with_the_nearest_name(tuneloop_command: Callable[..., Ran]) -> None:
    ran = tuneloop_command("run", "dem.yaml")
    assert ran.code == 3
    assert "Did you mean 'demo'?" in ran.err


def test_a_recipe_that_is_not_text_is_refused(tuneloop_command: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe")
    ran = tuneloop_command("run", str(tmp_path / "r.yaml"))
    assert ran.code == 2
    assert "not a text file" in ran.err


def test_a_change_without_a_value_is_a_usage_error(
    tuneloop_command: Callable[..., Ran], recipe: Path
) -> None:
    ran = tuneloop_command("run", str(recipe), "--set", "learning_rate")
    assert ran.code == 2
    assert "--set 'learning_rate' is not NAME=VALUE" in ran.err


def test_the_stream_survives_the_death_of_the_server(
    tuneloop_command: Callable[..., Ran], api: FakeApi, daemon: FakeDaemon
) -> None:
    api.jobs[NAME] = job()
    api.errors["GET", f"/api/jobs/{NAME}/progress"] = ServerUnreachable("gone")
    original = daemon.ensure

    def ensure(settings: object) -> object:
        api.errors.clear()
        return original(settings)

    daemon.ensure = ensure  # type: ignore[method-assign,assignment]
    ran = tuneloop_command("jobs", "stream", NAME)
    assert (ran.code, daemon.starts) == (0, 1)
    assert "Starting the server again" in ran.out


def test_the_stream_gives_up_on_a_server_that_stays_dead(
    tuneloop_command: Callable[..., Ran], api: FakeApi, daemon: FakeDaemon
) -> None:
    api.jobs[NAME] = job()
    api.errors["GET", f"/api/jobs/{NAME}/progress"] = ServerUnreachable("gone")
    assert tuneloop_command("jobs", "stream", NAME).code == 6
    assert daemon.starts == live.MOST_RECONNECTS


def test_plain_lines_come_at_most_every_few_seconds_within_a_stage() -> None:
    stream, now = io.StringIO(), [0.0]
    view = live.PlainView(stream, clock=lambda: now[0])
    for second in range(20):
        now[0] = float(second)
        view.show(page(_running(), line("finetune", "training", done=second, total=20)))  # type: ignore[arg-type]
    lines = [text for text in stream.getvalue().splitlines() if "training" in text]
    assert [text.split()[0] for text in lines] == ["00:00", "00:05", "00:10", "00:15"]


def test_plain_lines_tell_each_stage_state_and_warning_once() -> None:
    stream = io.StringIO()
    view = live.PlainView(stream, clock=lambda: 0.0)
    warned = _running(warnings=["2 rows were cut"])
    for _ in range(3):
        view.show(page(warned, line("finetune", "loading"), line("finetune", "training")))  # type: ignore[arg-type]
    text = stream.getvalue()
    assert text.count("warning: 2 rows were cut") == 1
    assert text.count("running") == 1
    assert text.index("loading") < text.index("training")


def test_a_second_attempt_is_told() -> None:
    stream = io.StringIO()
    view = live.PlainView(stream, clock=lambda: 0.0)
    view.show(page(_running()))  # type: ignore[arg-type]
    view.show(page(_running(attempts=2)))  # type: ignore[arg-type]
    assert "running (attempt 2)" in stream.getvalue()


def test_a_terminal_gets_a_table_with_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    monkeypatch.setattr("sys.stdout", stream)
    with live.view_for(stream) as view:
        view.show(page(_running(), line("finetune", "training", done=30, total=60, unit="steps")))  # type: ignore[arg-type]
    assert "training  30/60 steps   50 %" in stream.getvalue()


def test_jobs_list_shows_names_and_says_how_to_start_when_empty(
    tuneloop_command: Callable[..., Ran], api: FakeApi
) -> None:
    assert "tuneloop run demo" in tuneloop_command("jobs", "list").err
    api.jobs[NAME] = job()
    ran = tuneloop_command("jobs", "list")
    assert NAME in ran.out
    assert "completed" in ran.out
    assert json.loads(tuneloop_command("jobs", "list", "--json").out)[0]["name"] == NAME


def test_jobs_show_tells_steps_outputs_and_warnings(
    tuneloop_command: Callable[..., Ran], api: FakeApi
) -> None:
    api.jobs[NAME] = job(steps=[step("finetune", "reused"), step("evaluate")])
    ran = tuneloop_command("jobs", "show", NAME)
    assert "reused from calm_fern_1/finetune/1" in ran.out
    assert "output trained_model: /h/artifacts/ab" in ran.out
    assert "warning: precision 16 runs as 32" in ran.err


def test_jobs_logs_takes_the_failed_step_and_cleans_its_text(
    tuneloop_command: Callable[..., Ran], api: FakeApi
) -> None:
    api.jobs[NAME] = job(steps=[step("finetune", "failed"), step("evaluate", "skipped")])
    assert tuneloop_command("jobs", "logs", NAME).out == "log of finetune[2J\n"


def test_jobs_logs_refuses_an_unknown_step_by_name(
    tuneloop_command: Callable[..., Ran], api: FakeApi
) -> None:
    api.jobs[NAME] = job()
    ran = tuneloop_command("jobs", "logs", NAME, "--step", "finetun")
    assert ran.code == 3
    assert "Did you mean 'finetune'?" in ran.err


def test_jobs_outputs_downloads_into_a_folder_of_the_outputs_name(
    tuneloop_command: Callable[..., Ran], api: FakeApi, tmp_path: Path
) -> None:
    api.jobs[NAME] = job()
    ran = tuneloop_command("jobs", "outputs", NAME, "--download", "evaluation_result", "--to", str(tmp_path))
    assert ran.code == 0
    assert (tmp_path / "evaluation_result" / "evaluation.json").exists()
    again = tuneloop_command(
        "jobs", "outputs", NAME, "--download", "evaluation_result", "--to", str(tmp_path)
    )
    assert again.code == 4
    assert "--force" in again.err


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.96, "60.0 s"), (65, "1:05"), (3725, "1:02:05")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert output.duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(812, "812 B"), (4_200_000, "4.2 MB"), (1.3e9, "1.3 GB")])
def test_sizes_read_well(count: float, text: str) -> None:
    assert output.size(count) == text


def test_a_warning_is_told_once_by_the_command_that_submits_and_the_step_that_repeats_it(
    tuneloop_command: Callable[..., Ran], api: FakeApi, recipe: Path
) -> None:
    said = "max_steps is 3: it decides."
    ended = job(warnings=[f"finetune.{said}"], steps=[step("finetune", warnings=[said, "2 rows were cut"])])
    api.submitted = ended | {"state": "queued"}
    api.pages[NAME] = [page(ended)]
    for words in (("run", str(recipe)), ("run", str(recipe), "--json"), ("jobs", "stream", NAME)):
        ran = tuneloop_command(*words)
        told = ran.err + (ran.out if "--json" not in words else "")
        assert told.count(said) == 1, words
        assert told.count("2 rows were cut") == 1
    shown = tuneloop_command("jobs", "show", NAME)
    assert (shown.out + shown.err).count(said) == 1
    assert "finetune: warning: 2 rows were cut" in shown.out


def test_jobs_show_draws_the_graph_with_time_memory_and_where_outputs_come_from(
    tuneloop_command: Callable[..., Ran], api: FakeApi
) -> None:
    steps = [
        step("finetune", "reused"),
        step("export", "failed", depends_on=["finetune"], attempts=3, error=_error("no space")),
        step("evaluate", "skipped", depends_on=["export"], reason="export failed", started_at=None),
    ]
    api.jobs[NAME] = job(state="failed", steps=steps)
    rows = [row.split() for row in tuneloop_command("jobs", "show", NAME).out.splitlines()]
    drawn = {
        row[0]: " ".join(row[1:]) for row in rows if row and row[0] in ("finetune", "export", "evaluate")
    }
    assert drawn == {
        "finetune": "reused 1.5 GB reused from calm_fern_1/finetune/1",
        "export": "finetune failed 2:05 3",
        "evaluate": "export skipped 1 export failed",
    }
    assert ["export:", "no", "space"] in rows


def _error(message: str) -> dict[str, object]:
    return {"code": "step_failed", "message": message, "next": None, "details": None}


def test_a_folder_in_place_of_a_recipe_is_told_with_the_recipes_in_it(
    tuneloop_command: Callable[..., Ran], tmp_path: Path
) -> None:
    empty = tuneloop_command("run", str(tmp_path))
    assert empty.code == 2
    assert "is a folder; a recipe is a YAML file" in empty.err
    assert "recipes show demo" in empty.err
    (tmp_path / "mine.yaml").write_text("model: x\n")
    assert f"In it there is: {tmp_path / 'mine.yaml'}." in tuneloop_command("run", str(tmp_path)).err


def test_ctrl_c_during_the_submission_says_that_the_job_may_exist(
    tuneloop_command: Callable[..., Ran], recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tuneloop.client.Client.submit", interrupted)
    ran = tuneloop_command("run", str(recipe))
    assert ran.code == 130
    assert "may have been made" in ran.err
    assert "tuneloop jobs list" in ran.err


def test_an_empty_list_says_what_was_asked_for(tuneloop_command: Callable[..., Ran], api: FakeApi) -> None:
    assert "No jobs in experiment 'mine'" in tuneloop_command("jobs", "list", "--experiment", "mine").err
    assert "No model 'mine'" in tuneloop_command("models", "list", "mine").err
    assert tuneloop_command("jobs", "list", "--limit", "9" * 30).code == 2


@pytest.mark.parametrize("name", ["", " ", ".", ".."])
def test_a_name_that_would_be_another_address_is_refused(
    tuneloop_command: Callable[..., Ran], api: FakeApi, name: str
) -> None:
    for words in (("jobs", "show"), ("catalog", "show"), ("endpoints", "show"), ("jobs", "cancel")):
        ran = tuneloop_command(*words, name)
        assert (ran.code, "is not a name" in ran.err) == (2, True)
    assert api.calls == []


def test_a_long_time_is_told_in_days() -> None:
    assert output.duration(86_400 * 12) == "12 days"
    assert output.duration(1e30) == "years"


def test_without_an_evaluation_the_summary_tells_the_training(
    tuneloop_command: Callable[..., Ran], api: FakeApi
) -> None:
    steps = [
        step("model_import", metrics={"parameters": 134_515_008}),
        step("finetune", metrics={"loss": 1.5}),
        step("export", metrics={"merged_logits_difference": 1e-6}),
    ]
    api.pages[NAME] = [page(job(steps=steps))]
    out = tuneloop_command("jobs", "stream", NAME).out
    assert "completed in 2:05.\n  loss 1.5\n" in out
