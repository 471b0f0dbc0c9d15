"""Attacks on the API: foreign pages, bodies that are too much, paths that lead out, and whatever comes."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from tuneloop import daemon
from tuneloop.core.settings import Settings
from tuneloop.core.types import Artifact, StepRecord
from tuneloop.server.app import create_app
from tuneloop.server.parts import Parts
from tuneloop.server.security import BODY_BYTES, DEEPEST, Guard

RECIPE = """
experiment: tests
model: SmolLM2-135M-Instruct
data: {train: train.jsonl, test: train.jsonl}
finetune: {apply_lora: true}
"""
ROW = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n'


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    made = Settings(home=tmp_path_factory.mktemp("security") / "home")
    daemon.prepare_home(made)
    parts, _ = daemon.assemble(made, daemon.Lifetime())
    yield parts
    parts.store.close()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def api(parts: Parts) -> Iterator[TestClient]:
    headers = {"authorization": f"Bearer {parts.token}"}
    with TestClient(
        create_app(parts), base_url="http://127.0.0.1:1", headers=headers, raise_server_exceptions=False
    ) as client:
        yield client


@pytest.fixture(scope="module")
def folder(parts: Parts) -> Path:
    made = parts.home.parent / "data"
    made.mkdir()
    (made / "train.jsonl").write_text(ROW * 3, encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def job(api: TestClient, folder: Path) -> str:
    body = {"text": RECIPE, "path": "r.yaml", "folder": str(folder)}
    return str(api.post("/api/jobs", json=body).json()["name"])


def refused(answer: Any, *statuses: int) -> dict[str, Any]:
    """The error, in the one shape."""
    assert answer.status_code in statuses, answer.text
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"code", "message", "next", "details"}
    return dict(error)


def get_as_written(api: TestClient, path: str, **headers: str) -> tuple[int, bytes]:
    """Status and body. A client library would tidy the path up first; here it arrives as it stands."""
    raw, _, query = path.encode("utf-8", "surrogatepass").partition(b"?")
    given = {"host": "127.0.0.1", "authorization": api.headers["authorization"], **headers}
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": unquote(raw.decode("utf-8", "replace")),
        "raw_path": raw,
        "query_string": query,
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
        "server": ("127.0.0.1", 1),
        "client": ("127.0.0.1", 2),
    }
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(api.app(scope, receive, send))  # type: ignore[arg-type]
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


# ---------------------------------------------------------------- pages elsewhere


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8000", "localhost", "LocalHost:1", "[::1]:99"])
def test_this_machine_is_known_by_its_three_names(api: TestClient, host: str) -> None:
    assert api.get("/api/status", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        *("localhost.", "127.0.0.1.", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:123456", "127.0.0.1:-1", "::1"),
        *("user@127.0.0.1", "evil.example@127.0.0.1", "127.0.0.1@evil.example", "evil\\@127.0.0.1"),
        *("127.0.0.1#evil", "127.0.0.1/evil", "127.0.0.1?evil", "127.0.0.1,evil.example", "127.0.0.1 evil"),
        *("127.1", "0x7f.0.0.1", "2130706433", "0177.0.0.1", "0.0.0.0", "[::ffff:127.0.0.1]", "[::]", "[::1"),
        *("localhost.evil.example", "127.0.0.1.nip.io", "10.evil.example", "10.0.0.1", "loca\xadlhost"),
    ],
)
def test_a_host_that_only_resembles_this_machine_is_refused(api: TestClient, host: str) -> None:
    answer = api.get("/api/status", headers={"host": host.encode("latin-1")})
    assert refused(answer, 403)["code"] == "foreign_caller"


@pytest.mark.parametrize(
    "origin",
    [
        *(
            "null",
            "http://",
            "127.0.0.1",
            "//127.0.0.1:1",
            "file://",
            "file://localhost",
            "http://localhost:1",
        ),
        *("http://127.0.0.1", "http://127.0.0.1:2", "https://127.0.0.1:1", "chrome-extension://localhost"),
        *("http://evil.example@127.0.0.1:1", "http://127.0.0.1:1@evil.example", "http://127.0.0.1:1.evil"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_no_page_but_our_own_origin_is_answered(api: TestClient, method: str, origin: str) -> None:
    answer = api.request(method, "/api/endpoints", headers={"origin": origin})
    assert refused(answer, 403)["code"] == "foreign_caller"
    assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_our_own_origin_is_answered(api: TestClient) -> None:
    headers = {"origin": "http://127.0.0.1:1", "sec-fetch-site": "same-origin"}
    assert api.get("/api/endpoints", headers=headers).status_code == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site", "Cross-Site", "x"])
def test_what_a_browser_sends_for_another_site_is_refused(api: TestClient, site: str) -> None:
    assert refused(api.get("/api/endpoints", headers={"sec-fetch-site": site}), 403)


@pytest.mark.parametrize("name", ["host", "origin", "authorization", "sec-fetch-site"])
def test_a_header_with_two_meanings_is_refused(api: TestClient, parts: Parts, name: str) -> None:
    right = {
        "host": "127.0.0.1:1",
        "origin": "http://127.0.0.1:1",
        "authorization": f"Bearer {parts.token}",
        "sec-fetch-site": "none",
    }
    request = api.build_request("GET", "/api/status", headers=right)
    assert api.send(request).status_code == 200
    twice = api.build_request("GET", "/api/status", headers=[*right.items(), (name, right[name])])
    assert "more than once" in refused(api.send(twice), 403)["message"]


@pytest.mark.parametrize("method", ["OPTIONS", "TRACE", "HEAD", "CONNECT", "PUT", "PATCH", "FOO"])
def test_no_other_method_is_answered_and_none_allows_another_page(api: TestClient, method: str) -> None:
    asked = {"access-control-request-method": "POST"}
    answer = api.request(method, "/api/jobs", headers=asked)
    assert answer.status_code == 405
    assert answer.headers["allow"]
    assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_a_preflight_without_token_is_refused(api: TestClient) -> None:
    asked = {"origin": "https://evil.example", "access-control-request-method": "POST", "authorization": ""}
    assert refused(api.request("OPTIONS", "/api/shutdown", headers=asked), 403)


@pytest.mark.parametrize("path", ["/api/health", "/api/jobs", "/api/nothing", "/openapi.json", "/"])
def test_every_answer_says_that_it_is_not_to_be_kept_framed_or_guessed_at(api: TestClient, path: str) -> None:
    headers = api.get(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]


def test_a_refused_caller_gets_the_same_headers(api: TestClient) -> None:
    headers = api.get("/api/jobs", headers={"authorization": ""}).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["www-authenticate"] == "Bearer"


# ---------------------------------------------------------------- the token


def test_the_token_counts_in_its_header_only(api: TestClient, parts: Parts) -> None:
    for query in ({"token": parts.token}, {"access_token": parts.token}, {"authorization": parts.token}):
        assert refused(api.get("/api/status", params=query, headers={"authorization": ""}), 401)
    api.cookies.set("token", parts.token)
    try:
        assert refused(api.get("/api/status", headers={"authorization": ""}), 401)
    finally:
        api.cookies.clear()


@pytest.mark.parametrize("change", ["{}x", "x{}", "{} {}", "{}\xe9"])
def test_nearly_the_token_is_not_the_token(api: TestClient, parts: Parts, change: str) -> None:
    given = f"Bearer {change.format(parts.token, parts.token)}".encode("latin-1")
    assert refused(api.get("/api/status", headers={"authorization": given}), 401)


@pytest.mark.parametrize("path", ["//api/health", "/api/health/", "/api/health;/", "/api/health/../status"])
def test_only_the_one_open_path_is_open(api: TestClient, path: str) -> None:
    assert get_as_written(api, path, authorization="")[0] == 401


def test_an_empty_token_lets_nobody_in() -> None:
    async def inner(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("let in")

    client = TestClient(Guard(inner, token=""), base_url="http://127.0.0.1")
    assert client.get("/api/status", headers={"authorization": "Bearer "}).status_code == 401


def test_a_websocket_is_closed_before_it_is_open(api: TestClient) -> None:
    from starlette.websockets import WebSocketDisconnect

    with pytest.raises(WebSocketDisconnect) as closed, api.websocket_connect("/api/status"):
        pass
    assert closed.value.code == 1008


# ---------------------------------------------------------------- bodies


@pytest.mark.parametrize(
    "kind",
    [
        *("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""),
        *("application/zip", "application/x-tar", "application/gzip", "application/octet-stream"),
        *("application/json-patch+json", "text/json"),
    ],
)
def test_a_body_that_is_not_called_json_is_refused_archives_too(api: TestClient, kind: str) -> None:
    answer = api.post("/api/endpoints", content=b'{"name": "chat"}', headers={"content-type": kind})
    assert refused(answer, 415)["code"] == "usage"


def test_a_compressed_body_is_refused_unread(api: TestClient) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    assert (
        "compressed"
        in refused(api.post("/api/endpoints", content=b"\x1f\x8b", headers=headers), 415)["message"]
    )


def test_a_body_that_is_too_large_is_refused_whether_it_says_so_or_not(api: TestClient) -> None:
    kind = {"content-type": "application/json"}
    assert refused(api.post("/api/endpoints", content=b" " * (BODY_BYTES + 1), headers=kind), 413)
    pieces = (b" " * (1 << 20) for _ in range(BODY_BYTES // (1 << 20) + 1))
    assert refused(api.post("/api/endpoints", content=pieces, headers=kind), 413)


@pytest.mark.parametrize(
    "body",
    [
        *(b"\xff\xfe", b'{"name": NaN}', b'{"name": Infinity}', b"{", b"\x00", b'{"name": "a\\u0000"}'),
        *(
            b'{"name": "chat", "description": "\\ud800"}',
            b'{"\\udfff": 1}',
            b'{"name": ' + b"9" * 5000 + b"}",
        ),
        *(b"[" * 100_000, b"[" * (DEEPEST + 1) + b"]" * (DEEPEST + 1), b'{"a":' * 500 + b"1" + b"}" * 500),
        *('{"name": "chat"}'.encode("utf-16"), b'{"name": "chat"} {}', b"name: chat"),
    ],
)
def test_json_that_somebody_later_could_not_handle_is_refused(api: TestClient, body: bytes) -> None:
    answer = api.post("/api/endpoints", content=body, headers={"content-type": "application/json"})
    assert "The body" in refused(answer, 400)["message"]
    assert api.get("/api/endpoints").json() == []


def test_a_variable_that_no_process_can_have_is_refused_before_it_is_recorded(
    api: TestClient, folder: Path
) -> None:
    for name, value in (("HF_A=B", "x"), ("HF_\x00", "x"), ("HF_A", "a\0b"), ("HF_A\nB", "x")):
        body = {"text": RECIPE, "path": "r.yaml", "folder": str(folder), "environment": {name: value}}
        before = api.get("/api/jobs").json()
        assert refused(api.post("/api/jobs", json=body), 400)
        assert api.get("/api/jobs").json() == before


# ---------------------------------------------------------------- paths

OUTSIDE = [
    *("../../../token", "../token", "..", "./", "/etc/passwd", "//etc/passwd", "a/../../../token"),
    *("..%2f..%2ftoken", "%2e%2e/%2e%2e/token", "%252e%252e%252ftoken", "..%c0%af..%c0%aftoken"),
    *(
        "..;/..;/token",
        "....//....//token",
        "..\\..\\token",
        "..%5c..%5ctoken",
        "C:\\x",
        "C:/token",
        "\\\\h\\s",
    ),
    *("file:///etc/passwd", "file:token", "http:///#/../../../etc/passwd", "?/../../token", "#/../../token"),
    *("%00", "weights.bin%00.txt", "%0d%0aSet-Cookie:x=1", "~/token", "$HOME/token", "*", "a" * 5000),
    *(
        "\uff0e\uff0e/token",
        "..\uff0ftoken",
        "\u2025/token",
        "\u202etoken",
        "weights.bin/.",
        "weights.bin/../inner",
        "WEIGHTS.BIN",
    ),
]
"""Shapes that servers of artifacts have fallen for (CVE-2023-6977, CVE-2024-1483, CVE-2024-3848)."""


@pytest.fixture(scope="module")
def served(api: TestClient, parts: Parts, job: str, folder: Path) -> Path:
    """The folder of an output that holds a file, and then, put there by somebody, links that lead out."""
    made = folder / "output"
    (made / "inner").mkdir(parents=True)
    (made / "weights.bin").write_bytes(b"weights")
    (made / "inner" / "more.bin").write_bytes(b"more")
    digest, size = parts.files.ingest(made)
    now = parts.started_at
    parts.store.insert(
        Artifact(created_at=now, digest=digest, type="mlflow_model", size_bytes=size, name="made")
    )
    step = parts.store.get(StepRecord, f"{job}/export")
    parts.store.update(step.model_copy(update={"outputs": {"mlflow_model": digest}}))
    path = parts.files.artifact_path(digest)
    os.symlink("/etc/passwd", path / "passwd")
    os.symlink(parts.home, path / "home")
    os.symlink("../../../../token", path / "inner" / "token")
    os.symlink(path / "weights.bin", path / "again")
    return path


@pytest.mark.parametrize("path", OUTSIDE)
def test_a_path_never_leads_out_of_an_output(
    api: TestClient, parts: Parts, served: Path, job: str, path: str
) -> None:
    status, body = get_as_written(api, f"/api/jobs/{job}/outputs/trained_model/files/{path}")
    assert status in (400, 404, 414), body
    assert parts.token.encode() not in body
    assert b"root:" not in body
    assert body != b"weights"


def test_links_in_an_output_are_neither_listed_nor_sent(api: TestClient, served: Path, job: str) -> None:
    base = f"/api/jobs/{job}/outputs/trained_model/files"
    assert [one["path"] for one in api.get(base).json()] == ["inner/more.bin", "weights.bin"]
    for path in ("passwd", "home/token", "home/secret", "inner/token", "again"):
        assert refused(api.get(f"{base}/{path}"), 404)
    sent = api.get(f"{base}/weights.bin")
    assert sent.content == b"weights"
    assert sent.headers["content-type"] == "application/octet-stream"
    assert sent.headers["content-disposition"].startswith("attachment")


def test_a_folder_with_links_is_not_taken_in(parts: Parts, folder: Path) -> None:
    made = folder / "linked"
    made.mkdir()
    os.symlink("/etc/passwd", made / "data.jsonl")
    with pytest.raises(Exception, match="is a link"):
        parts.files.ingest(made)


def test_an_output_that_is_itself_a_link_is_not_sent(api: TestClient, parts: Parts, job: str) -> None:
    digest = f"sha256:{'ab' * 32}"
    target = parts.files.artifact_path(digest)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.symlink("/etc", target)
    step = parts.store.get(StepRecord, f"{job}/evaluate")
    output = next(iter(parts.jobs.get(job).job.step("evaluate").outputs))
    parts.store.update(step.model_copy(update={"outputs": {output: digest}}))
    name = next(key for key, mapped in parts.jobs.get(job).job.outputs.items() if mapped.step == "evaluate")
    assert api.get(f"/api/jobs/{job}/outputs/{name}/files").json() == []
    assert refused(api.get(f"/api/jobs/{job}/outputs/{name}/files/passwd"), 404)


BAD_NAMES = [
    *("..", ".", "../x", "a/b", "a\\b", ".hidden", "-x", "", " ", "a b", "a\nb", "a\r", "a\x1b[2J", "x:y"),
    *(
        "x#",
        "x?",
        "%2e%2e",
        "a;b",
        "..;",
        "C:",
        "~",
        "$(id)",
        "`id`",
        "\uff41",
        "\u0430bc",
        "\u202eabc",
        "a\u200d",
    ),
    *("a" * 129, "\u00e9", "\u0661"),
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_no_name_is_recorded_that_could_be_more_than_a_name(
    api: TestClient, served: Path, job: str, folder: Path, name: str
) -> None:
    assert refused(api.post("/api/models", json={"job": job, "name": name}), 400)
    assert refused(api.post("/api/models", json={"job": job, "name": "tuned", "version": name}), 400)
    assert refused(api.post("/api/endpoints", json={"name": name}), 400)
    body = {"text": RECIPE, "path": "r.yaml", "folder": str(folder)}
    assert refused(api.post("/api/jobs", json={**body, "experiment": name}), 400)
    card = {"text": f"name: {json.dumps(name)}\nversion: '1'\n", "path": "card"}
    assert refused(api.post("/api/cards", json=card), 400)


@pytest.mark.parametrize(
    "written",
    [
        *(
            "/dev/zero",
            "/dev/stdin",
            "/dev/null",
            "/proc/self/mem",
            "/etc",
            ".",
            "..",
            "~nobody-at-all/x.jsonl",
        ),
        *("samples:../../core/errors.py", "samples:/etc/passwd", "samples:..", "file:///etc/passwd", "a\\0b"),
        *("/" + "a" * 5000, "a" * 300 + ".jsonl", "train.jsonl/x", "train.jsonl#x", "fifo.jsonl"),
    ],
)
def test_a_data_path_that_is_no_readable_file_is_an_error_of_its_writer(
    api: TestClient, folder: Path, written: str
) -> None:
    if not (folder / "fifo.jsonl").exists():
        os.mkfifo(folder / "fifo.jsonl")
    text = RECIPE.replace("train: train.jsonl", f'train: "{written}"')
    body = {"text": text, "path": "r.yaml", "folder": str(folder)}
    assert refused(api.post("/api/recipes/resolve", json=body), 400, 404, 422)


@pytest.mark.parametrize(
    "source", ["relative", "/" + "a" * 3000, "/" + "a/" * 1500, "/proc/self", "/etc/passwd"]
)
def test_the_folder_of_a_base_model_must_be_one(api: TestClient, source: str) -> None:
    answer = api.post("/api/cards/SmolLM2-135M-Instruct/source", json={"folder": source})
    assert refused(answer, 400, 404)


ROWS = ['{"a": ' + "9" * 5000 + "}\n", "[" * 100_000 + "\n", '{"messages": "\\ud800"}\n', "\0\n", "\xff\n"]


@pytest.mark.parametrize("row", ROWS, ids=["digits", "depth", "surrogate", "nul", "bytes"])
def test_a_row_that_no_reader_can_handle_is_a_finding(api: TestClient, folder: Path, row: str) -> None:
    (folder / "bad.jsonl").write_bytes(row.encode("latin-1"))
    text = RECIPE.replace("train.jsonl", "bad.jsonl")
    body = {"text": text, "path": "r.yaml", "folder": str(folder)}
    assert refused(api.post("/api/recipes/resolve", json=body), 422)["details"][0]["line"] == 1


def test_yaml_that_grows_when_it_is_read_is_refused(api: TestClient, folder: Path) -> None:
    bomb = "a: &a [x, x, x]\n" + "".join(
        f"{new}: &{new} [*{old}, *{old}, *{old}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )
    body = {"text": bomb + RECIPE, "path": "r.yaml", "folder": str(folder)}
    assert "anchors and aliases" in refused(api.post("/api/jobs", json=body), 422)["message"]
    assert "anchors and aliases" in refused(api.post("/api/cards", json={"text": bomb}), 400)["message"]


# ---------------------------------------------------------------- offsets


def _cursor(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode()


@pytest.mark.parametrize(
    "offsets", [[], 1, {"x": -1}, {"x": 2**63}, {"x": float("inf")}, {"x": float("nan")}, {"x": None}]
)
def test_a_cursor_that_we_did_not_give_is_refused(api: TestClient, job: str, offsets: object) -> None:
    answer = api.get(f"/api/jobs/{job}/progress", params={"cursor": _cursor(offsets)})
    assert "cursor" in refused(answer, 400)["message"]


@pytest.mark.parametrize("number", ["-1", str(2**63), "1" * 400, "x", "1.5", "nan"])
def test_a_number_that_nothing_counts_to_is_refused(api: TestClient, job: str, number: str) -> None:
    assert refused(api.get("/api/events", params={"after": number}), 400)
    assert refused(api.get(f"/api/jobs/{job}/events", params={"after": number}), 400)
    assert refused(api.get(f"/api/jobs/{job}/logs/finetune", params={"offset": number}), 400)


# ---------------------------------------------------------------- whatever comes


NASTY = [
    *("", " ", "\n", "\x1b[2J", "\u202e", "..", "../../etc/passwd", "/etc/passwd", "%2e%2e", "null", "true"),
    *(
        "latest",
        "0",
        "-1",
        str(2**63),
        "1e400",
        "NaN",
        "a" * 3000,
        "{}",
        "[]",
        "*",
        "'",
        '"',
        "é",
        "💥",
        "x:y",
    ),
]
text = st.one_of(st.sampled_from(NASTY), st.text(string.printable, max_size=20), st.text(max_size=10))
scalar = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(2**62, 2**65), st.floats(allow_nan=False), text
)
# Two levels, written out: what `st.recursive` draws depends on how often it has met its limit.
nested = st.one_of(scalar, st.lists(scalar, max_size=3), st.dictionaries(text, scalar, max_size=3))
anything = st.one_of(scalar, st.lists(nested, max_size=3), st.dictionaries(text, nested, max_size=3))


@pytest.fixture(scope="module")
def described(api: TestClient) -> dict[str, Any]:
    return dict(api.get("/openapi.json").json())


@settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_no_request_that_the_description_allows_or_not_is_a_defect(
    api: TestClient, described: dict[str, Any], job: str, data: st.DataObject
) -> None:
    operations = [(p, m, o) for p, methods in described["paths"].items() for m, o in methods.items()]
    path, method, operation = data.draw(st.sampled_from(operations))
    names = st.one_of(
        st.sampled_from([job, "SmolLM2-135M-Instruct", "finetune", "trained_model", "chat"]), text
    )
    query = {}
    for one in operation.get("parameters", []):
        if one["in"] == "path":
            path = path.replace(f"{{{one['name']}}}", _quoted(data.draw(names)))
        elif data.draw(st.booleans()):
            query[one["name"]] = data.draw(text)
    body = _body(described, operation, data)
    answer = api.request(method.upper(), path, params=query, json=body)
    assert answer.status_code < 500, (method, path, query, body, answer.text)
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"code", "message", "next", "details"}
    elif answer.headers["content-type"] == "application/json":
        assert str(answer.status_code) in operation["responses"]


def _quoted(name: str) -> str:
    return quote(name, safe="") or "%20"


def _body(described: Mapping[str, Any], operation: Mapping[str, Any], data: st.DataObject) -> Any:
    """Nearly what is asked for: some keys missing, some of the wrong kind."""
    content = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if content is None:
        return None
    if data.draw(st.integers(0, 9)) == 0:
        return data.draw(anything)
    reference = content["schema"].get("$ref", "").rpartition("/")[2]
    if not reference:
        return data.draw(st.dictionaries(text, scalar, max_size=3))
    fields = described["components"]["schemas"][reference]["properties"]
    return {
        name: data.draw(text if data.draw(st.booleans()) else anything)
        for name in fields
        if data.draw(st.integers(0, 9)) > 0
    }


def test_the_description_declares_the_token_the_errors_and_the_files(described: dict[str, Any]) -> None:
    assert described["security"] == [{"token": []}]
    assert described["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
    assert described["paths"]["/api/health"]["get"]["security"] == []
    for methods in described["paths"].values():
        for operation in methods.values():
            assert {"4XX", "5XX"} <= set(operation["responses"])
            assert "422" not in operation["responses"]
    sent = described["paths"]["/api/models/{name}/{version}/files/{path}"]["get"]["responses"]["200"]
    assert list(sent["content"]) == ["application/octet-stream"]
