"""`tuneloop deployments`: models behind an endpoint, as replica processes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from tuneloop.cli import completion, endpoints, output, session, words
from tuneloop.core.errors import NotFound, StepFailed, Unavailable, UsageError
from tuneloop.core.states import DeploymentState

if TYPE_CHECKING:
    from tuneloop.cli.session import Session
    from tuneloop.client.views import DeploymentView

READY_SECONDS = 900.0
"""A large model may take minutes to load; after this `create` stops waiting, the deployment goes on."""

ROUTED_SECONDS = 30.0
"""The router reads new routes within moments."""

GONE_SECONDS = 60.0
"""Replicas get this long to end before `delete` says that they have not."""

endpoint_option = click.option(
    "--endpoint",
    required=True,
    metavar="E",
    shell_complete=completion.endpoints,
    help="The endpoint it stands behind.",
)


@click.group("deployments")
def deployments_() -> None:
    """Models behind an endpoint: create, list, logs, delete.

    A deployment is a model at a number of replicas, each a process of its own. What share of the
    endpoint's requests it gets is said by the endpoint's traffic.

    \b
    Examples:
      tuneloop deployments create blue --endpoint support --model support:1 --traffic 100
      tuneloop deployments logs blue --endpoint support
    """


@deployments_.command("create")
@click.argument("name")
@endpoint_option
@click.option(
    "--model",
    required=True,
    metavar="N:V",
    shell_complete=completion.served_models,
    help="A registered model, or base:NAME for a base model that a job imported.",
)
@click.option(
    "--replicas", type=click.IntRange(1, 64), default=1, show_default=True, help="Processes that serve it."
)
@click.option(
    "--request-timeout",
    type=words.FiniteRange(0, 3600, min_open=True),
    default=90.0,
    show_default=True,
    metavar="SECONDS",
    help="A request that takes longer is given up.",
)
@click.option(
    "--traffic", type=click.IntRange(0, 100), help="Share of the requests in per cent, once it is ready."
)
@click.option(
    "--instance-type",
    metavar="SIZE",
    help="Refuse a size of Azure's that the base model must not be served on; replicas run here.",
)
@click.option("--no-wait", is_flag=True, help="Return at once, without waiting until it is ready.")
@output.json_option
def create_(
    name: str,
    endpoint: str,
    model: str,
    replicas: int,
    request_timeout: float,
    traffic: int | None,
    instance_type: str | None,
    no_wait: bool,
    as_json: bool,
) -> int:
    """Deploy a model behind an endpoint, and wait until it answers.

    With --traffic 100 the other deployments get nothing any more; a smaller share must fit beside theirs.
    Ctrl-C stops the waiting; the deployment goes on.

    \b
    Examples:
      tuneloop deployments create blue --endpoint support --model support:1 --traffic 100
      tuneloop deployments create plain --endpoint support --model base:SmolLM2-135M-Instruct --replicas 2
    """
    if no_wait and traffic is not None:
        raise click.UsageError(
            "--traffic is set when the deployment is ready, so it does not go with --no-wait."
        )
    connection = session.connect()
    shares = _shares(connection, endpoint, name, traffic)
    made = connection.client.create_deployment(
        endpoint, name, model, replicas, request_timeout, instance_type
    )
    try:
        if not no_wait:
            made = wait_ready(connection, endpoint, name)
        if shares is not None:
            connection.client.set_traffic(endpoint, shares)
        if not no_wait:
            wait_until_routed(connection, endpoint, name)
    except KeyboardInterrupt:
        _tell_interrupted(endpoint, name, traffic)
        return endpoints.INTERRUPTED
    if as_json:
        output.print_json(made)
        return 0
    output.say(f"Deployment {endpoint}/{name} of {model} is {made['state']}.")
    if not no_wait:
        output.say(f"  its address: {connection.client.endpoint(endpoint)['openai_base_url']}")
    if traffic:
        output.say(f"  talk to it:  {session.program()} chat {endpoint}")
    else:
        output.say(f"  talk to it:  {session.program()} chat {endpoint} --deployment {name}")
    return 0


def _tell_interrupted(endpoint: str, name: str, traffic: int | None) -> None:
    output.note(f"\nStopped waiting: deployment {endpoint}/{name} goes on loading.")
    output.note(f"  look at it:   {session.program()} deployments list --endpoint {endpoint}")
    if traffic is not None:
        share = f"endpoints traffic {endpoint} {name}={traffic}"
        output.note(f"  its traffic was not set; when it is ready:  {session.program()} {share}")
    output.note(f"  take it down: {session.program()} deployments delete {name} --endpoint {endpoint}")


def _shares(connection: Session, endpoint: str, name: str, traffic: int | None) -> dict[str, int] | None:
    """The endpoint's traffic with the new share in it. Raises `UsageError` when it does not fit."""
    if traffic is None:
        return None
    others = connection.client.endpoint(endpoint)["traffic"]
    if traffic == 100:
        others = dict.fromkeys(others, 0)
    shares = others | {name: traffic}
    if sum(shares.values()) > 100:
        now = ", ".join(f"{one}={share}" for one, share in others.items())
        share_out = f"{session.program()} endpoints traffic {endpoint} {name}={traffic} ..."
        raise UsageError(
            f"--traffic {traffic} does not fit beside {now}.",
            next_move=f"Leave it out, then share out by hand: {share_out}",
        )
    return shares


def wait_ready(connection: Session, endpoint: str, name: str, *, quiet: bool = False) -> DeploymentView:
    """The deployment once it is ready. Raises `StepFailed` with the end of its log when it failed."""
    began = time.monotonic()
    told = ""
    while time.monotonic() - began < READY_SECONDS:
        found = connection.client.deployment(endpoint, name)
        if found["state"] == DeploymentState.READY:
            return found
        if found["state"] == DeploymentState.FAILED:
            raise _failure(connection, found)
        text = _replica_text(found)
        if text != told and not quiet:
            output.note(f"  {endpoint}/{name}: {text}")
            told = text
        time.sleep(0.25)
    raise Unavailable(
        f"Deployment {endpoint}/{name} is not ready after {READY_SECONDS:.0f} s; it goes on loading.",
        next_move=f"Look at it with: {session.program()} deployments logs {name} --endpoint {endpoint}",
    )


def wait_until_routed(connection: Session, endpoint: str, name: str) -> None:
    """Until the router knows the deployment. Raises `Unavailable` when it does not come to know it."""
    endpoints.wait_for_address(connection, endpoint)
    give_up = time.monotonic() + ROUTED_SECONDS
    while True:
        try:
            if name in session.endpoint_client(connection, endpoint).models():
                return
            problem = None
        except (Unavailable, NotFound) as error:
            problem = error
        if time.monotonic() > give_up:
            raise problem or Unavailable(
                f"Deployment {endpoint}/{name} is ready, but the router does not know it yet.",
                next_move=f"Look at it with: {session.program()} status",
            )
        time.sleep(0.1)


def _replica_text(deployment: DeploymentView) -> str:
    states = [one["state"] for one in deployment["replica_states"]]
    ready = states.count("ready")
    text = f"{ready} of {deployment['replicas']} replicas ready"
    others = sorted({state for state in states if state not in ("ready", "stopped", "failed")})
    crashes = f", {deployment['crashes']} crashed" if deployment["crashes"] else ""
    return text + (f" ({', '.join(others)})" if others else "") + crashes


def _failure(connection: Session, deployment: DeploymentView) -> StepFailed:
    endpoint, name = deployment["endpoint"], deployment["name"]
    error = deployment.get("error")
    why = error["message"] if error else "its replicas ended without saying why"
    log = connection.client.deployment_logs(endpoint, name, lines=15).rstrip()
    return StepFailed(
        f"Deployment {endpoint}/{name} failed: {why}" + (f"\n{output.clean(log)}" if log else ""),
        next_move=(error["next"] if error else None)
        or f"{session.program()} deployments logs {name} --endpoint {endpoint}; delete it, create it again",
        details=error["details"] if error else None,
    )


@deployments_.command("list")
@endpoint_option
@output.json_option
def list_(endpoint: str, as_json: bool) -> None:
    """List an endpoint's deployments.

    \b
    Example:
      tuneloop deployments list --endpoint demo
    """
    client = session.connect().client
    found = client.deployments(endpoint)
    if as_json:
        output.print_json(found)
        return
    traffic = client.endpoint(endpoint)["traffic"]
    rows = [
        (
            one["name"],
            one["state"],
            one["model"],
            _replica_text(one),
            f"{traffic.get(one['name'], 0)} %",
            one["error"]["message"] if one.get("error") else "",
        )
        for one in found
    ]
    output.table(("NAME", "STATE", "MODEL", "REPLICAS", "TRAFFIC", "ERROR"), rows, empty="No deployments.")


@deployments_.command("logs")
@click.argument("name", shell_complete=completion.deployments)
@endpoint_option
@click.option(
    "--lines", type=click.IntRange(1), default=100, show_default=True, help="The last so many lines."
)
@output.json_option
def logs_(name: str, endpoint: str, lines: int, as_json: bool) -> None:
    """Print the end of a deployment's log.

    \b
    Example:
      tuneloop deployments logs tuned --endpoint demo --lines 20
    """
    text = session.connect().client.deployment_logs(endpoint, name, lines)
    if as_json:
        output.print_json({"text": text})
    else:
        output.say(output.clean(text.rstrip("\n")))


@deployments_.command("delete")
@click.argument("name", shell_complete=completion.deployments)
@endpoint_option
@output.json_option
def delete_(name: str, endpoint: str, as_json: bool) -> int:
    """Delete a deployment; waits until its replicas have ended. Ctrl-C stops the waiting, not the deletion.

    \b
    Example:
      tuneloop deployments delete base --endpoint demo
    """
    connection = session.connect()
    connection.client.delete_deployment(endpoint, name)
    try:
        wait_gone(connection, endpoint, name)
    except KeyboardInterrupt:
        output.note(f"\nStopped waiting: deployment {endpoint}/{name} goes on being deleted.")
        output.note(f"  is it gone?  {session.program()} deployments list --endpoint {endpoint}")
        return endpoints.INTERRUPTED
    if as_json:
        output.print_json({"deleted": f"{endpoint}/{name}"})
    else:
        output.say(f"Deleted deployment {endpoint}/{name}.")
    return 0


def delete_and_wait(connection: Session, endpoint: str, name: str) -> None:
    """As `wait_gone`."""
    connection.client.delete_deployment(endpoint, name)
    wait_gone(connection, endpoint, name)


def wait_gone(connection: Session, endpoint: str, name: str) -> None:
    """Raises `Unavailable` when the replicas do not end in time."""
    give_up = time.monotonic() + GONE_SECONDS
    while time.monotonic() < give_up:
        try:
            connection.client.deployment(endpoint, name)
        except NotFound:
            return
        time.sleep(0.2)
    raise Unavailable(
        f"Deployment {endpoint}/{name} is still being deleted after {GONE_SECONDS:.0f} s.",
        next_move=f"Look at it with: {session.program()} status",
    )
