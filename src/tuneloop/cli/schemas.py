"""What each command prints with --json, as types: the documentation and the tests are made of them.

No command imports this; a command prints what the API gave it, or a dictionary of the shape that stands here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NotRequired

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from tuneloop.client.views import (
    AzureView,
    AzureWarningView,
    ComputeView,
    DeploymentView,
    EndpointView,
    ErrorView,
    FileEntry,
    JobSummary,
    JobView,
    KeysView,
    LogPage,
    OutputView,
    Resolution,
    StatusView,
)
from tuneloop.core.data.repair import Repaired
from tuneloop.core.data.report import Report
from tuneloop.core.plan import Plan, Recommendation
from tuneloop.core.sizes import Size
from tuneloop.core.types import Card, Dataset, ModelRecord


class Failure(TypedDict):
    """On stderr, instead of what stands below, when a command with --json did not do what it was asked."""

    error: ErrorView


class ShippedRecipe(TypedDict):
    name: str
    headline: str


class RecipeText(TypedDict):
    name: str
    path: str
    text: str


class LeastAndMost(TypedDict):
    least: int
    most: int


class TokenLengths(TypedDict):
    """Estimated from characters."""

    median: int
    p95: int
    most: int


class CharacterCounts(TypedDict):
    most: int
    sum: int


class DataLook(TypedDict):
    """What `init` saw of a file of conversations."""

    path: str
    rows: int
    is_whole: bool
    """False: only the beginning was read, and `rows` is estimated by the size of the file."""
    columns: list[str]
    messages: LeastAndMost
    tokens: TokenLengths
    characters: CharacterCounts
    rows_with_system: int
    repeated_rows: int
    unread_rows: int


class WrittenRecipe(TypedDict):
    path: str | None
    """None when it went to stdout."""
    recipe: str
    model: str
    data: dict[str, DataLook]
    """By role: train, validation, test."""


FileState = Literal["written", "unchanged", "replaced"]
"""`unchanged`: the same content was there already."""


class DownloadedSplit(TypedDict):
    split: str
    file: str
    rows: int
    of_rows: int
    """Rows that the split has."""
    size_bytes: int
    state: FileState
    files_read: int
    of_files: int
    """Files that the split is stored in."""


class DatasetDownload(TypedDict):
    dataset: str
    commit: str | None
    """None: it came from a folder."""
    folder: str
    splits: list[DownloadedSplit]


class WrittenScript(TypedDict):
    path: str | None
    """None when it went to stdout."""
    state: Literal["written", "unchanged", "replaced", "printed"]
    script: str


class BadRow(TypedDict):
    """A finding of a row that could not be used."""

    file: str
    line: int
    row: int
    field: str
    rule: str
    value: str
    fix: str


class ConvertedFile(TypedDict):
    path: str
    state: FileState
    layout: Literal["sharegpt", "alpaca", "prompt-completion", "openai", "csv"]
    found_by: str | None
    """What `auto` told the layout by; None: it was named."""
    rows: int
    converted: int
    bad_rows: int
    notes: dict[str, int]
    """What was done to rows beyond renaming, and how often."""
    findings: list[BadRow]
    """Of the first 100 bad rows."""


class WrittenSplit(TypedDict):
    split: Literal["train", "validation", "test"]
    path: str
    rows: int
    state: FileState


class SplitFile(TypedDict):
    rows: int
    splits: list[WrittenSplit]


class HistogramBin(TypedDict):
    up_to: int
    """Tokens: more than the bin before, at most this."""
    conversations: int


class RowLengths(TypedDict):
    """In tokens."""

    median: int
    p90: int
    p99: int
    max: int
    histogram: list[HistogramBin]


class PolicyLoss(TypedDict):
    """What a policy for long rows takes away."""

    rows: int
    """Of which nothing is left."""
    turns: int
    assistant_tokens: int


class FileTokens(TypedDict):
    """Of the rows that pass every rule but the one about their length."""

    rows: int
    tokens: int
    learned_tokens: int
    turns: int
    lengths: RowLengths
    long_rows: int
    would_lose: dict[str, PolicyLoss]
    """By the policies of `long_rows`; empty when no row is too long."""


class DataCheck(TypedDict):
    report: Report
    tokens: dict[str, FileTokens] | None
    """By file; None without a model."""
    max_seq_length: int | None
    long_rows: str
    """The policy that was asked for."""
    fixed: list[Repaired]
    """With --fix: one for each file."""


class ShownFinding(TypedDict):
    rule: str
    field: str
    value: str
    fix: str


class ShownRow(TypedDict):
    row: int
    line: int
    messages: Any
    """As the file has them; None for a row that cannot be read."""
    tokens: int | None
    """None without a model, or when the row cannot be rendered."""
    learned_tokens: int | None
    spans: list[tuple[str, bool]]
    """The rendered text, cut where what is learned begins and ends; true: it is learned."""
    findings: list[ShownFinding]


class MetricPoint(TypedDict):
    at_ms: int
    """Milliseconds since 1970, UTC."""
    step: int
    values: dict[str, float | None]
    """None: not a number, or beyond all numbers."""


class Download(TypedDict):
    folder: str
    files: list[FileEntry]


class Deleted(TypedDict):
    deleted: str


class LogText(TypedDict):
    text: str


class ServerStatus(StatusView):
    url: str


class ProcessView(TypedDict):
    name: str
    pid: int | None
    memory_bytes: int | None
    peak_memory_bytes: int | None
    port: int | None
    state: str


class Running(TypedDict):
    server: StatusView | None
    """None: no server runs."""
    home: str
    processes: list[ProcessView]


class Stopped(TypedDict):
    stopped: list[str]
    jobs: list[str]
    """Those that go on at the next start."""
    endpoints: list[str]


class CheckView(TypedDict):
    name: str
    state: Literal["ok", "warn", "fail"]
    found: str
    why: str | None
    fix: str | None
    is_fixable: bool
    """Whether --fix does it."""
    fixed: str | None
    """What --fix did."""


class Checks(TypedDict):
    checks: list[CheckView]
    ok: bool
    """No check failed; warnings may be there."""


class CompletionScript(TypedDict):
    shell: str
    script: str
    install: str


class MlflowPages(TypedDict):
    """Printed once the pages answer; the command then stays until Ctrl-C, unless they are elsewhere."""

    url: str
    tracking_uri: str
    is_elsewhere: bool


class DemoStep(TypedDict):
    state: str
    seconds: float | None
    peak_memory_bytes: int | None


class DemoModel(TypedDict):
    name: str
    version: str
    path: str | None


class DemoSummary(TypedDict):
    seconds: dict[str, float]
    steps: dict[str, DemoStep]
    processes: list[ProcessView]
    job: str
    evaluation: dict[str, Any]
    """`evaluation.json` of the evaluate step."""
    quality_note: str | None
    model: DemoModel
    endpoint: EndpointView
    replies: list[dict[str, str]]
    next: dict[str, str]


class Completion(TypedDict):
    """OpenAI's `chat.completion`."""

    id: NotRequired[str]
    object: Literal["chat.completion"]
    created: NotRequired[int]
    model: NotRequired[str]
    choices: list[dict[str, Any]]
    usage: NotRequired[dict[str, Any]]


class Reply(TypedDict):
    """Azure's shape, as the deployment gave it."""

    output: str | list[str]


class AzureRun(TypedDict):
    exit_code: int
    """The script's; 128 and the number of a signal where one ended it."""
    warnings: list[AzureWarningView]
    """Since the script began."""


class AzureEnvironment(TypedDict):
    set: dict[str, str]
    unset: list[str]
    """Variables of the shell that would lead the SDK elsewhere."""


class AzureKernel(TypedDict):
    name: str
    path: str
    is_installed: bool


class AzureCall(TypedDict):
    name: str
    """`jobs.create_or_update`; without a dot: of `MLClient` itself."""
    state: Literal["works", "refused", "not there"]
    tests: list[str]
    """Which show it."""


class AzureOperation(TypedDict):
    module: str
    method: str
    address: str
    state: Literal["works", "refused", "not there"]
    summary: str


class AzureCoverage(TypedDict):
    sdk: str
    calls: list[AzureCall]
    operations: list[AzureOperation]
    """With `--operations`."""


OUTPUTS: Mapping[str, Mapping[str, Any]] = {
    "demo": {"": DemoSummary},
    "recipes list": {"": list[ShippedRecipe]},
    "recipes show": {"": RecipeText},
    "init": {"": WrittenRecipe},
    "run": {"": JobView, "--dry-run": Resolution},
    "jobs list": {"": list[JobSummary]},
    "jobs show": {"": JobView},
    "jobs metrics": {"": list[MetricPoint]},
    "jobs stream": {"": JobView},
    "jobs logs": {"": LogPage},
    "jobs priority": {"": JobView},
    "jobs cancel": {"": JobView},
    "jobs retry": {"": JobView},
    "jobs outputs": {"": dict[str, OutputView], "--download": Download},
    "data check": {"": DataCheck},
    "data stats": {"": DataCheck},
    "data show": {"": ShownRow},
    "data list": {"": list[Dataset]},
    "data register": {"": Dataset},
    "data describe": {"": Dataset},
    "data download": {"": DatasetDownload},
    "data download-script": {"": WrittenScript},
    "data convert": {"": ConvertedFile},
    "data split": {"": SplitFile},
    "compute list": {"": list[ComputeView]},
    "compute show": {"": ComputeView},
    "compute create": {"": ComputeView},
    "compute delete": {"": Deleted},
    "compute sizes": {"": list[Size]},
    "plan": {"": Plan, "--recommend": list[Recommendation]},
    "catalog list": {"": list[Card]},
    "catalog show": {"": Card},
    "catalog add": {"": Card},
    "catalog use": {"": Card},
    "models list": {"": list[ModelRecord]},
    "models show": {"": ModelRecord},
    "models register": {"": ModelRecord},
    "models download": {"": Download},
    "models delete": {"": Deleted},
    "endpoints create": {"": EndpointView},
    "endpoints list": {"": list[EndpointView]},
    "endpoints show": {"": EndpointView},
    "endpoints invoke": {"": Reply},
    "endpoints traffic": {"": EndpointView},
    "endpoints keys": {"": KeysView},
    "endpoints delete": {"": Deleted},
    "deployments create": {"": DeploymentView},
    "deployments list": {"": list[DeploymentView]},
    "deployments logs": {"": LogText},
    "deployments delete": {"": Deleted},
    "chat": {"--message": Completion},
    "azure up": {"": AzureView},
    "azure down": {"": AzureView},
    "azure status": {"": AzureView},
    "azure run": {"": AzureRun},
    "azure env": {"": AzureEnvironment},
    "azure kernel": {"": AzureKernel},
    "azure coverage": {"": AzureCoverage},
    "up": {"": ServerStatus},
    "down": {"": Stopped},
    "status": {"": Running},
    "doctor": {"": Checks},
    "completion": {"": CompletionScript},
    "mlflow": {"": MlflowPages},
}
"""Command to the option that changes its output (empty: without one) to the type of what it prints."""


def schema(kind: Any) -> dict[str, Any]:
    """JSON Schema (2020-12) of a type, with what it refers to under `$defs`."""
    return TypeAdapter(kind).json_schema(mode="serialization")
