"""`tuneloop endpoints`: stable addresses with keys and traffic shares."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tuneloop.cli import completion, output, session, words
from tuneloop.core.errors import NotFound, Unavailable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tuneloop.cli.session import Session
    from tuneloop.client.views import EndpointView, ReplicaView

_NO_REPLICA: ReplicaView = {"number": 0, "state": "", "address": None, "error": None}

ADDRESS_SECONDS = 15.0
"""The router starts with the first endpoint and takes a second or two."""

INTERRUPTED = 130
"""Exit code after Ctrl-C."""

GONE_SECONDS = 60.0
"""Replicas get this long to end before `delete` says that they have not."""


@click.group("endpoints")
def endpoints_() -> None:
    """Addresses that answer: create, show, list, invoke, traffic, keys, delete.

    An endpoint is a stable address with two keys; deployments behind it share its traffic. It speaks
    OpenAI's chat completions, and Azure's request format at /score.

    \b
    Examples:
      tuneloop endpoints create support
      tuneloop endpoints invoke support --deployment blue --request-file sample_score.json
      tuneloop endpoints traffic support blue=90 green=10
    """


@endpoints_.command("create")
@click.argument("name")
@click.option("--description", default="", metavar="D", help="What it is, for people.")
@click.option("--tag", "tags", multiple=True, metavar="K=V", help="May be given several times.")
@output.json_option
def create_(name: str, description: str, tags: Sequence[str], as_json: bool) -> None:
    """Create an endpoint. It answers once a deployment behind it is ready and has traffic.

    \b
    Example:
      tuneloop endpoints create support --description "answers about orders"
    """
    marks = words.assignments(tags, "--tag")
    connection = session.connect()
    connection.client.create_endpoint(name, description, marks)
    endpoint = wait_for_address(connection, name)
    if as_json:
        output.print_json(endpoint)
        return
    if endpoint["openai_base_url"]:
        output.say(f"Created endpoint {name} at {endpoint['openai_base_url']}")
    else:
        output.say(f"Created endpoint {name}; it has no address yet: {_why_no_address(connection)}")
        output.say(f"  its address:  {session.program()} endpoints show {name}")
    command = f"deployments create blue --endpoint {name} --model NAME:VERSION --traffic 100"
    output.say(f"  next:  {session.program()} {command}")


@endpoints_.command("list")
@output.json_option
def list_(as_json: bool) -> None:
    """List the endpoints with their deployments and traffic.

    \b
    Example:
      tuneloop endpoints list
    """
    found = session.connect().client.endpoints()
    if as_json:
        output.print_json(found)
        return
    rows = [
        (
            endpoint["name"],
            endpoint["state"],
            ", ".join(f"{one['name']} ({one['state']})" for one in endpoint["deployments"]),
            _shares(endpoint["traffic"]),
            endpoint["openai_base_url"],
        )
        for endpoint in found
    ]
    output.table(
        ("NAME", "STATE", "DEPLOYMENTS", "TRAFFIC", "ADDRESS"),
        rows,
        empty=f"No endpoints yet. Create one with: {session.program()} endpoints create NAME",
    )


@endpoints_.command("show")
@click.argument("name", shell_complete=completion.endpoints)
@output.json_option
def show_(name: str, as_json: bool) -> None:
    """Show an endpoint: addresses, traffic, deployments and their replicas.

    \b
    Example:
      tuneloop endpoints show demo
    """
    connection = session.connect()
    endpoint = connection.client.endpoint(name)
    if as_json:
        output.print_json(endpoint)
        return
    has_address = endpoint["openai_base_url"] is not None
    output.pairs(
        {
            "endpoint": endpoint["name"],
            "state": endpoint["state"],
            "no address yet": None if has_address else _why_no_address(connection),
            "description": endpoint["description"],
            "tags": endpoint["tags"],
            "OpenAI base URL": endpoint["openai_base_url"],
            "scoring URI": endpoint["scoring_uri"],
            "traffic": _shares(endpoint["traffic"]),
            "mirrored": _shares(endpoint["mirror"]) or None,
        }
    )
    output.say()
    rows = [
        (
            one["name"],
            one["state"],
            one["model"],
            replica["number"] or "",
            replica["state"],
            replica["address"],
        )
        for one in endpoint["deployments"]
        for replica in one["replica_states"] or [_NO_REPLICA]
    ]
    columns = ("DEPLOYMENT", "STATE", "MODEL", "REPLICA", "STATE", "ADDRESS")
    output.table(columns, rows, empty="No deployments.")


@endpoints_.command("invoke")
@click.argument("name", shell_complete=completion.endpoints)
@click.option(
    "--deployment",
    metavar="D",
    shell_complete=completion.deployments,
    help="Ask this deployment, whatever the traffic shares say.",
)
@click.option(
    "--request-file",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path, allow_dash=True),
    metavar="F",
    help='JSON: {"input_data": {"input_string": [{"role": "user", "content": "Hi"}], ...}}; - for stdin.',
)
@output.json_option
def invoke_(name: str, deployment: str | None, request_file: Path, as_json: bool) -> None:
    """Send a request file to an endpoint's /score and print the raw reply, which is JSON.

    \b
    Examples:
      tuneloop endpoints invoke demo --deployment tuned --request-file sample_score.json
      echo '{"input_data": {"input_string": [{"role": "user", "content": "Hi"}],
             "parameters": {"max_new_tokens": 40}}}' | tuneloop endpoints invoke demo --request-file -
    """
    body = sys.stdin.buffer.read() if request_file == Path("-") else request_file.read_bytes()
    caller = session.endpoint_client(session.connect(), name, deployment)
    output.say(caller.score(body))


@endpoints_.command("traffic")
@click.argument("name", shell_complete=completion.endpoints)
@click.argument("shares", nargs=-1, metavar="DEPLOYMENT=PERCENT...", shell_complete=completion.shares)
@click.option(
    "--mirror",
    metavar="D=P",
    shell_complete=completion.shares,
    help="Send P per cent of the requests to D as well, and compare; its replies go to nobody. D=0 ends it.",
)
@output.json_option
def traffic_(name: str, shares: Sequence[str], mirror: str | None, as_json: bool) -> None:
    """Share an endpoint's traffic out between its deployments, in per cent.

    A mirrored request is answered by the deployment that has the traffic. What became of the copy is in
    the mirror's log: tuneloop deployments logs D --endpoint NAME.

    \b
    Examples:
      tuneloop endpoints traffic demo tuned=100
      tuneloop endpoints traffic demo tuned=90 base=10
      tuneloop endpoints traffic demo --mirror next=20
    """
    if not shares and mirror is None:
        raise click.UsageError("Say DEPLOYMENT=PERCENT, --mirror DEPLOYMENT=PERCENT, or both.")
    weights = words.shares(shares)
    copies = None if mirror is None else words.shares([mirror])
    client = session.connect().client
    if shares:
        endpoint = client.set_traffic(name, weights)
    if copies is not None:
        endpoint = client.set_mirror(name, copies)
    if as_json:
        output.print_json(endpoint)
        return
    output.say(f"Traffic of {name}: {_shares(endpoint['traffic']) or 'none'}")
    if endpoint["mirror"] or copies is not None:
        output.say(f"Mirrored: {_shares(endpoint['mirror']) or 'none'}")


@endpoints_.command("keys")
@click.argument("name", shell_complete=completion.endpoints)
@click.option(
    "--regenerate", type=click.Choice(["primary", "secondary"]), help="Replace this key by a new one."
)
@click.option("--primary", is_flag=True, help="Print the primary key alone, for $(...).")
@output.json_option
def keys_(name: str, regenerate: str | None, primary: bool, as_json: bool) -> None:
    """Print an endpoint's two keys, or replace one of them.

    Both keys are good at any time: move callers to the secondary, regenerate the primary, move back.

    \b
    Examples:
      tuneloop endpoints keys demo
      curl -H "Authorization: Bearer $(tuneloop endpoints keys demo --primary)" ...
      tuneloop endpoints keys demo --regenerate primary
    """
    client = session.connect().client
    keys = client.regenerate_key(name, regenerate) if regenerate else client.keys(name)
    if as_json:
        output.print_json(keys)
    elif primary:
        output.say(keys["primary"])
    else:
        output.pairs({"primary": keys["primary"], "secondary": keys["secondary"]})


@endpoints_.command("delete")
@click.argument("name", shell_complete=completion.endpoints)
@output.json_option
def delete_(name: str, as_json: bool) -> int:
    """Delete an endpoint with its deployments; waits until no process of it is left.

    Ctrl-C stops the waiting; the deletion goes on.

    \b
    Example:
      tuneloop endpoints delete demo
    """
    connection = session.connect()
    connection.client.delete_endpoint(name)
    try:
        wait_gone(connection, name)
    except KeyboardInterrupt:
        output.note(f"\nStopped waiting: endpoint {name} goes on being deleted.")
        output.note(f"  is it gone?  {session.program()} endpoints list")
        return INTERRUPTED
    if as_json:
        output.print_json({"deleted": name})
    else:
        output.say(f"Deleted endpoint {name}.")
    return 0


def wait_for_address(connection: Session, endpoint: str) -> EndpointView:
    """The endpoint, with its address unless the router has none after `ADDRESS_SECONDS`."""
    give_up = time.monotonic() + ADDRESS_SECONDS
    found = connection.client.endpoint(endpoint)
    while found["openai_base_url"] is None and time.monotonic() < give_up:
        time.sleep(0.1)
        found = connection.client.endpoint(endpoint)
    return found


def _why_no_address(connection: Session) -> str:
    """What keeps the router, which has the endpoints' port."""
    for service in connection.client.status()["services"]:
        if service["name"] == "router" and service.get("error"):
            return str(output.clean(service["error"]["message"]))
    return "the router is starting."


def wait_gone(connection: Session, name: str) -> None:
    """Raises `Unavailable` when the endpoint's replicas do not end in time."""
    give_up = time.monotonic() + GONE_SECONDS
    while time.monotonic() < give_up:
        try:
            connection.client.endpoint(name)
        except NotFound:
            return
        time.sleep(0.2)
    raise Unavailable(
        f"Endpoint {name!r} is still being deleted after {GONE_SECONDS:.0f} s.",
        next_move=f"Look at it with: {session.program()} status",
    )


def _shares(weights: Mapping[str, int]) -> str:
    return ", ".join(f"{deployment} {share} %" for deployment, share in weights.items())
