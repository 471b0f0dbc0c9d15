"""The listener itself: whom it answers, what it does with requests that nobody should send, its files, and
that it is there again after whatever happens to its server."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import stat
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.contract.azure.sdk import AzureWorld
from tests.contract.azure.test_identity import WORKSPACE, refused, secret
from tests.loop.world import LoopWorld, wait_for
from tuneloop.core.azure import Remembered, remember, remembered
from tuneloop.core.errors import PortTaken
from tuneloop.core.settings import Settings
from tuneloop.daemon import azure as listener_module
from tuneloop.daemon import server as server_module
from tuneloop.daemon.azure import AzureListener
from tuneloop.server import connection
from tuneloop.server.azure.app import BODY_BYTES
from tuneloop.server.azure.certificates import Certificates

OPEN = "/metadata/endpoints"
WITH_A_BODY = f"{WORKSPACE}/computes/safety"


def trusting(folder: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(folder / "bundle.pem"))


@pytest.fixture(scope="module")
def wire(azure: AzureWorld) -> Iterator[httpx.Client]:
    """With a token for everything."""
    with httpx.Client(base_url=azure.url, verify=trusting(azure.azure_folder), trust_env=False) as client:
        client.headers["Authorization"] = f"Bearer {token(client, azure)}"
        yield client


def token(client: httpx.Client, world: Any) -> str:
    headers = {"X-IDENTITY-HEADER": secret(world)}
    answer = client.get("/msi/token", params={"resource": str(client.base_url)}, headers=headers)
    return str(answer.json()["access_token"])


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


# ---------------------------------------------------------------- who is answered


def test_it_listens_on_loopback_only(azure: AzureWorld) -> None:
    server = psutil.Process(azure.server_pid())
    listening = [one.laddr for one in server.net_connections() if one.status == psutil.CONN_LISTEN]
    assert port_of(azure.url) in {one.port for one in listening}
    assert {one.ip for one in listening} == {"127.0.0.1"}


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "10.0.0.1:8443", "127.1", "0.0.0.0"]
)
def test_a_foreign_host_is_refused_even_with_a_token(wire: httpx.Client, host: str) -> None:
    refused(wire.get(WORKSPACE, headers={"Host": host}), 403, "AuthorizationFailed")
    refused(wire.get(OPEN, headers={"Host": host}), 403, "AuthorizationFailed")


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "https://127.0.0.1:8443"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_no_page_in_a_browser_is_answered(wire: httpx.Client, headers: dict[str, str]) -> None:
    refused(wire.get(OPEN, headers=headers), 403, "AuthorizationFailed")


@pytest.mark.parametrize("name", ["Origin", "Authorization", "Sec-Fetch-Site"])
def test_a_header_with_two_meanings_is_refused(wire: httpx.Client, name: str) -> None:
    answer = wire.get(OPEN, headers=[(name, "127.0.0.1"), (name, "127.0.0.1")])
    assert answer.status_code == 400


def test_answers_are_not_kept_framed_or_sniffed(wire: httpx.Client) -> None:
    for answer in (wire.get(OPEN), wire.get("/nothing")):
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert "server" not in answer.headers


def test_plain_http_and_old_tls_get_no_answer(azure: AzureWorld) -> None:
    port = port_of(azure.url)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
        plain.sendall(b"GET /metadata/endpoints HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            assert b"HTTP" not in plain.recv(1000)
    old = trusting(azure.azure_folder)
    old.set_ciphers("DEFAULT:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    raw = socket.create_connection(("127.0.0.1", port), timeout=10)
    with raw, pytest.raises(ssl.SSLError):
        old.wrap_socket(raw, server_hostname="127.0.0.1")


def test_no_file_of_the_listener_is_open_to_others(azure: AzureWorld) -> None:
    files = [azure.azure_folder, *azure.azure_folder.rglob("*")]
    assert {path.name for path in files} >= {"ca.key", "server.key", "identity", "bundle.pem", "config.json"}
    assert [str(path) for path in files if stat.S_IMODE(os.lstat(path).st_mode) & 0o077] == []
    assert stat.S_IMODE(os.lstat(azure.azure_folder / "ca.key").st_mode) == 0o600


def test_config_json_is_what_from_config_reads(azure: AzureWorld) -> None:
    found = json.loads((azure.azure_folder / "config.json").read_text())
    assert set(found) == {"subscription_id", "resource_group", "workspace_name"}


def test_the_secret_is_in_its_own_file_and_in_no_log_and_no_answer_of_the_api(azure: AzureWorld) -> None:
    hidden = secret(azure)
    assert len(hidden) >= 32
    shown = [json.dumps(azure.client.azure()), json.dumps(azure.client.status())]
    logs = [path.read_text("utf-8", "replace") for path in (azure.home / "logs").glob("*")]
    assert [text for text in (*shown, *logs) if hidden in text] == []


# ---------------------------------------------------------------- what nobody should send


@pytest.mark.parametrize(
    ("body", "kind", "status", "code"),
    [
        (b"{", "application/json", 400, "InvalidRequestContent"),
        (b"\xff\xfe", "application/json", 400, "InvalidRequestContent"),
        (b'{"a": NaN}', "application/json", 400, "InvalidRequestContent"),
        (b'{"a": "\\u0000"}', "application/json", 400, "InvalidRequestContent"),
        (b'{"a": "\\ud800"}', "application/json", 400, "InvalidRequestContent"),
        (b"[" * 100_000, "application/json", 400, "InvalidRequestContent"),
        (b"[" * 80 + b"]" * 80, "application/json", 400, "InvalidRequestContent"),
        (b"[]", "application/json", 400, "InvalidRequestContent"),
        (b'"x"', "application/json", 400, "InvalidRequestContent"),
        (b"<a/>", "application/xml", 415, "UnsupportedMediaType"),
        (b"a=1", "application/x-www-form-urlencoded", 415, "UnsupportedMediaType"),
    ],
)
def test_a_body_that_is_no_object_of_json_is_refused(
    wire: httpx.Client, body: bytes, kind: str, status: int, code: str
) -> None:
    refused(wire.put(WITH_A_BODY, content=body, headers={"Content-Type": kind}), status, code)


def test_a_compressed_body_is_refused(wire: httpx.Client) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    refused(wire.put(WITH_A_BODY, content=b"{}", headers=headers), 415, "UnsupportedMediaType")


def test_a_body_that_is_too_large_is_refused_and_the_answer_arrives(wire: httpx.Client) -> None:
    body = b'{"a": "' + b"x" * (2 * BODY_BYTES) + b'"}'
    answer = wire.put(WITH_A_BODY, content=body, headers={"Content-Type": "application/json"})
    error = refused(answer, 413, "RequestBodyTooLarge")
    assert str(BODY_BYTES) in error["message"]
    assert answer.headers["connection"] == "close"


def test_without_a_token_no_body_is_read(wire: httpx.Client) -> None:
    answer = wire.put(WITH_A_BODY, content=b"{", headers={"Authorization": "Bearer x"})
    refused(answer, 401, "InvalidAuthenticationToken")


def test_an_address_that_is_too_long_is_refused(wire: httpx.Client) -> None:
    refused(wire.get(WORKSPACE, params={"a": "x" * 20_000}), 414, "UriTooLong")


@pytest.mark.parametrize("name", ["%00", "%ff", "a%00b"])
def test_an_address_that_holds_no_text_is_refused(wire: httpx.Client, name: str) -> None:
    refused(wire.get(f"{WORKSPACE}/computes/{name}"), 400, "InvalidUri")


@pytest.mark.parametrize(
    "path", ["/", "/nothing", "/%2e%2e/token", "/api/health", "/openapi.json", "/subscriptions"]
)
def test_what_is_not_there_says_so_in_azures_shape(wire: httpx.Client, path: str) -> None:
    error = refused(wire.get(path), 404, "NotFound")
    assert "tuneloop azure coverage" in error["message"]


def test_a_method_that_an_address_does_not_have_names_those_that_it_has(wire: httpx.Client) -> None:
    assert "takes GET, not DELETE" in refused(wire.delete(OPEN), 405, "MethodNotAllowed")["message"]
    assert "takes POST" in refused(wire.get("/adfs/oauth2/token"), 405, "MethodNotAllowed")["message"]


@pytest.mark.parametrize(
    "request_",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -1\r\n\r\n",
    ],
)
def test_what_is_no_http_is_answered_in_azures_shape(azure: AzureWorld, request_: bytes) -> None:
    raw = socket.create_connection(("127.0.0.1", port_of(azure.url)), timeout=10)
    with trusting(azure.azure_folder).wrap_socket(raw, server_hostname="127.0.0.1") as secure:
        secure.sendall(request_)
        answer = b""
        while piece := secure.recv(65_536):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert b"nosniff" in head
    assert json.loads(body)["error"]["code"] == "InvalidRequest"


def test_a_head_that_does_not_end_is_cut_and_hinders_nobody(azure: AzureWorld, wire: httpx.Client) -> None:
    """What is said about it may get lost: it is said to somebody who goes on sending."""
    raw = socket.create_connection(("127.0.0.1", port_of(azure.url)), timeout=10)
    with (
        trusting(azure.azure_folder).wrap_socket(raw, server_hostname="127.0.0.1") as secure,
        pytest.raises(OSError),
    ):
        secure.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X: a\r\n" * 5_000_000)
    assert wire.get(OPEN).status_code == 200


# ---------------------------------------------------------------- who dawdles


@pytest.fixture
def quick_to_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, Certificates]]:
    """A listener that gives a handshake, and then a head, 0.3 seconds each."""
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(listener_module, "HANDSHAKE_SECONDS", 0.3)

    async def app(scope: object, receive: object, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    certificates = Certificates(tmp_path / "azure")
    certificates.ensure()
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(256)
    running = listener_module._serve(app, certificates, listener)
    yield running.port, certificates
    running.server.should_exit = True
    running.thread.join(10)
    assert not running.thread.is_alive()


def is_closed(wire: socket.socket) -> bool:
    try:
        return wire.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def test_who_says_nothing_is_cut_before_and_after_the_handshake_and_others_are_served(
    quick_to_cut: tuple[int, Certificates],
) -> None:
    port, certificates = quick_to_cut
    silent = [socket.create_connection(("127.0.0.1", port), timeout=0.05) for _ in range(50)]
    trusted = ssl.create_default_context(cafile=str(certificates.bundle))
    agreed = trusted.wrap_socket(
        socket.create_connection(("127.0.0.1", port), timeout=5), server_hostname="127.0.0.1"
    )
    agreed.settimeout(0.05)
    assert httpx.get(f"https://127.0.0.1:{port}/", verify=trusted, trust_env=False).text == "ok"
    # A head that drips in: each byte in time, the whole too late.
    begun = time.monotonic()
    while not is_closed(agreed):
        agreed.sendall(b"G")
        assert time.monotonic() - begun < 5
    for wire in silent:
        wait_for(lambda wire=wire: is_closed(wire), "a silent connection to be cut", seconds=5)
        wire.close()
    agreed.close()


# ---------------------------------------------------------------- up, down, and up again


@pytest.fixture(scope="module")
def port() -> int:
    """Free now, and set for the listener of `world`."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, port: int) -> Iterator[LoopWorld]:
    """A workspace of its own, for tests that end its server."""
    folder = tmp_path_factory.mktemp("listener") / "world"
    (folder / "home").mkdir(parents=True)
    (folder / "home" / "settings.yaml").write_text(f"azure_port: {port}\n")
    made = LoopWorld(folder)
    yield made
    made.take_down()


def restart(world: LoopWorld) -> None:
    pid = world.server_pid()
    world.client.shutdown("server")
    wait_for(lambda: not psutil.pid_exists(pid) or is_zombie(pid), "the server to end")
    world.restart_server()


def is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def listening(world: LoopWorld) -> list[int]:
    server = psutil.Process(world.server_pid())
    return sorted(one.laddr.port for one in server.net_connections() if one.status == psutil.CONN_LISTEN)


def test_a_taken_port_is_told_and_hinders_no_server(world: LoopWorld, port: int) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(PortTaken, match=f"Port {port} on 127.0.0.1 is taken") as caught:
            world.client.azure_up()
        assert "TUNELOOP_AZURE_PORT" in str(caught.value.next_move)
        remember(world.home / "azure", Remembered(port=port, is_up=True))
        restart(world)
        assert world.client.azure()["url"] is None
        assert "the Azure listener stays closed" in (world.home / "logs" / "server.log").read_text()
    with ThreadPoolExecutor(8) as pool:
        urls = {one["url"] for one in pool.map(lambda _: world.client.azure_up(), range(8))}
    assert urls == {f"https://127.0.0.1:{port}"}
    assert len(listening(world)) == 2


def test_it_is_opened_again_by_the_next_server_until_it_is_taken_down(world: LoopWorld) -> None:
    url = str(world.client.azure_up()["url"])
    folder = world.home / "azure"
    with httpx.Client(base_url=url, verify=trusting(folder), trust_env=False) as before:
        headers = {"X-IDENTITY-HEADER": (folder / "identity").read_text().strip()}
        granted = before.get("/msi/token", params={"resource": url}, headers=headers).json()["access_token"]
    restart(world)
    assert world.client.azure()["url"] == url
    with httpx.Client(base_url=url, verify=trusting(folder), trust_env=False) as after:
        answer = after.get(WORKSPACE, headers={"Authorization": f"Bearer {granted}"})
        assert answer.status_code == 200, answer.text
    assert [world.client.azure_down()["url"], world.client.azure_down()["url"]] == [None, None]
    with pytest.raises(ConnectionError):
        socket.create_connection(("127.0.0.1", port_of(url)), timeout=5)
    restart(world)
    assert world.client.azure()["url"] is None
    assert world.client.azure_up()["url"] == url


def test_a_port_that_nobody_asked_for_stays_the_same_and_gives_way_to_a_free_one(tmp_path: Path) -> None:
    listener = AzureListener(tmp_path, b"s" * 32, port=0, is_loose=False)
    first = listener._listen()
    remember(tmp_path / "azure", Remembered(port=first.getsockname()[1], is_up=True))
    second = listener._listen()
    assert second.getsockname()[1] != first.getsockname()[1]
    first.close()
    third = listener._listen()
    assert third.getsockname()[1] == remembered(tmp_path / "azure").port
    second.close()
    third.close()


def test_no_answer_waits_for_the_acknowledgement_of_its_first_half(tmp_path: Path) -> None:
    """Without TCP_NODELAY each takes 40 ms. asyncio sets it on sockets that say that they are TCP; what a
    socket accepts says what the socket says."""
    for listener in (
        AzureListener(tmp_path, b"s" * 32, port=0, is_loose=False)._listen(),
        server_module._listen(Settings(home=tmp_path), tmp_path),
    ):
        with listener:
            assert listener.proto == socket.IPPROTO_TCP


def test_a_secret_that_others_could_read_is_closed_and_told_and_a_link_is_refused(
    world: LoopWorld, tmp_path: Path
) -> None:
    folder = Path(world.client.azure_up()["folder"])
    world.client.azure_down()
    os.chmod(folder / "identity", 0o644)
    os.chmod(folder, 0o755)
    world.client.azure_up()
    assert stat.S_IMODE(os.lstat(folder / "identity").st_mode) == 0o600
    assert stat.S_IMODE(os.lstat(folder).st_mode) == 0o700
    log = (world.home / "logs" / "server.log").read_text()
    assert f"{folder / 'identity'} was open to other users (mode 0644)" in log
    world.client.azure_down()
    (folder / "identity").rename(tmp_path / "elsewhere")
    (folder / "identity").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Exception, match="not a file of yours"):
        world.client.azure_up()
