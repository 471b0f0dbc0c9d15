"""Clusters, and the list of sizes.

A cluster is a name with an Azure size, mapped onto this machine. What only Azure's shape has (tags, the
seconds until idle nodes would go) is remembered and shown again; what would need nodes of its own is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tuneloop.core import sizes
from tuneloop.core.errors import AlreadyExists, NotFound
from tuneloop.core.sizes import GIB, SIZES, Size
from tuneloop.core.types import AttemptRecord, Compute, JobRecord
from tuneloop.server.azure.bodies import Body, duration
from tuneloop.server.azure.errors import not_supported
from tuneloop.server.azure.gateway import LOCATION, Gateway
from tuneloop.server.azure.routing import Answer, Request, Routes
from tuneloop.workspace.compute import MOST_INSTANCES

routes = Routes()

COLLECTION = "computes"
"""Of what is remembered beside the compute itself."""
LOCAL_SIZE = "Local"
"""What the compute `local` is called after in the list of sizes."""
USUAL_IDLE_SECONDS = 120.0
_PROVIDER = "/subscriptions/{subscription}/providers/Microsoft.MachineLearningServices"
_NODES = "steps run on this machine, so there are no nodes of a cluster"


class _Wish(NamedTuple):
    """What a body asks for."""

    size: str
    most: int
    least: int
    idle_seconds: float
    tier: str
    description: str
    tags: Mapping[str, str]


# ---------------------------------------------------------------- clusters


@routes.add("GET", "{ws}/computes")
def list_computes(gateway: Gateway, request: Request) -> Answer:
    """Clusters, and this machine"""
    found = [compute_view(gateway, request, one) for one in gateway.parts.computes.list()]
    return Answer({"value": found})


@routes.add("GET", "{ws}/computes/{compute}")
def get_compute(gateway: Gateway, request: Request) -> Answer:
    """One cluster"""
    return Answer(compute_view(gateway, request, gateway.parts.computes.get(request["compute"])))


@routes.add("PUT", "{ws}/computes/{compute}")
def put_compute(gateway: Gateway, request: Request) -> Answer:
    """Create a cluster, or change how many nodes a plan may count on"""
    computes, name = gateway.parts.computes, request["compute"]
    wish = _read(request.body)
    warnings = request.body.finish(is_loose=gateway.is_loose)
    with gateway.lock(f"compute {name.lower()}"):
        found = computes.find(name)
        is_new = found is None
        if found is None:
            found = computes.create(name, size=wish.size, max_instances=wish.most)
            warnings = (_mapped(found), *warnings)
        else:
            _check_same_size(found, wish.size)
            found = computes.resize(name, max_instances=wish.most)
        gateway.remember(
            COLLECTION,
            found.name,
            {
                "of": found.created_at.isoformat(),
                "least": wish.least,
                "idle_seconds": wish.idle_seconds,
                "tier": wish.tier,
                "description": wish.description,
                "tags": dict(wish.tags),
            },
        )
    gateway.warn(f"compute {found.name}", *warnings)
    # Done already. The headers make the SDK read the compute once more: one of a year ago deserialises a body
    # twice that comes without them, and loses the compute's type in it.
    poll = f"{gateway.base_url}{request.workspace_id}/computes/{found.name}/status"
    headers = {"Azure-AsyncOperation": poll, "Retry-After": "1"}
    return Answer(compute_view(gateway, request, found), 201 if is_new else 200, headers)


@routes.add("GET", "{ws}/computes/{compute}/status")
def get_compute_status(gateway: Gateway, request: Request) -> Answer:
    """What became of a PUT: the state of the cluster"""
    compute = gateway.parts.computes.get(request["compute"])
    denied = sizes.why_not_provisioned(compute.name, compute.provisioning_state)
    if denied is None:
        return Answer({"status": "Succeeded"})
    return Answer({"status": "Failed", "error": {"code": "ComputeFailed", "message": denied}})


@routes.add("DELETE", "{ws}/computes/{compute}")
def delete_compute(gateway: Gateway, request: Request) -> Answer:
    """Delete a cluster that no job uses"""
    name = request["compute"]
    if request.query.get("underlyingresourceaction", "Delete").lower() == "detach":
        raise not_supported(
            f"Compute {name!r} cannot be detached: it is a name that only this workspace knows. "
            "Delete it instead: ml_client.compute.begin_delete(name).",
            "underlyingResourceAction",
        )
    gateway.parts.computes.delete(name)
    gateway.forget(COLLECTION, name)
    return Answer()


@routes.add("POST", "{ws}/computes/{compute}/listNodes")
def list_nodes(gateway: Gateway, request: Request) -> Answer:
    """What of a cluster's steps runs now, each as a node"""
    compute = gateway.parts.computes.get(request["compute"])
    return Answer({"nodes": [_node_view(attempt) for attempt in _running(gateway, compute)]})


def _read(body: Body) -> _Wish:
    body.passed_over("id", "name", "type", "systemData", "sku")
    body.without_effect("location", f"everything runs on this machine ({LOCATION}).", LOCATION)
    body.expect("identity", why="a compute here has no identity; steps run as you.")
    tags = body.texts("tags")
    outer = body.object("properties")
    outer.passed_over("provisioningState", "createdOn", "modifiedOn", "computeLocation")
    kind = outer.text("computeType")
    if kind.lower() != "amlcompute":
        raise not_supported(
            f"properties.computeType is {kind!r}: only clusters (AmlCompute) are there. Compute instances, "
            "virtual machines, Kubernetes and Spark are not, and no compute of yours is attached; steps run "
            "on this machine.",
            "properties.computeType",
        )
    outer.expect("disableLocalAuth", True, why="nobody logs in to a node: " + _NODES + ".")
    outer.expect("resourceId", why="no compute of yours is attached; steps run on this machine.")
    description = outer.text("description")
    return _read_cluster(outer.object("properties"), description, tags)


def _read_cluster(body: Body, description: str, tags: Mapping[str, str]) -> _Wish:
    size = body.text("vmSize")
    mistake = _why_not_size(size)
    if mistake is not None:
        body.wrong("vmSize", mistake)
    body.expect("osType", "Linux", why="steps run on this machine, under its own system.")
    no_login = "nobody logs in to a node: " + _NODES + "."
    if "userAccountCredentials" in body:
        # Not shown: it holds a password.
        body.wrong("userAccountCredentials", f"is given: {no_login}", "NotSupported")
    body.passed_over("userAccountCredentials")
    body.expect("remoteLoginPortPublicAccess", "NotSpecified", "Disabled", why=no_login)
    body.expect("subnet", why="there is no virtual network; everything stays on this machine.")
    body.expect("virtualMachineImage", why="steps run in the environment that Tuneloop is installed in.")
    body.expect("isolatedNetwork", False, why="there is no virtual network; nothing listens outside.")
    # The SDK always sends it; nothing here has an address that others could reach, whatever it says.
    body.flag("enableNodePublicIp", True)
    tier = body.text("vmPriority", "Dedicated", choices=("Dedicated", "LowPriority"))
    if tier == "LowPriority":
        body.warn(f"{body.place('vmPriority')} is LowPriority: nothing is ever taken away from a job here.")
    scale = body.object("scaleSettings")
    most = scale.number("maxNodeCount", 4, least=1, most=MOST_INSTANCES)
    least = scale.number("minNodeCount", 0, least=0, most=MOST_INSTANCES)
    if least > most:
        scale.wrong("minNodeCount", f"is {least}, above maxNodeCount, which is {most}.")
    if least:
        scale.warn(
            f"{scale.place('minNodeCount')} is {least}: this machine is always there; nothing is kept warm."
        )
    idle = scale.seconds("nodeIdleTimeBeforeScaleDown", USUAL_IDLE_SECONDS)
    return _Wish(size, most, least, idle or USUAL_IDLE_SECONDS, tier, description, tags)


def _why_not_size(size: str) -> str | None:
    if not size:
        return "is missing; name a size of ml_client.compute.list_sizes()."
    if size.lower() == LOCAL_SIZE.lower():
        return f"is {size!r}: this machine is there already, as the compute 'local'."
    try:
        return sizes.why_not_allowed(sizes.get(size).name, None)
    except NotFound as unknown:
        return f"is {size!r}. {unknown}"


def _check_same_size(found: Compute, size: str) -> None:
    if found.size is not None and found.size.lower() == size.lower():
        return
    raise AlreadyExists(
        f"Compute '{found.name}' is there already, with the size {found.size or LOCAL_SIZE}, which "
        f"cannot be changed to {size}.",
        next_move="Use another name, or delete it first: ml_client.compute.begin_delete(name).",
    )


def _mapped(compute: Compute) -> str:
    gpus = ", ".join(device.name for device in compute.devices) or "no GPU"
    return (
        f"{compute.size} is what the compute is called after: its jobs run on this machine "
        f"({compute.cores} cores, {compute.memory_bytes / 1e9:.1f} GB for jobs, {gpus})."
    )


# ---------------------------------------------------------------- what the SDK is shown


def compute_view(gateway: Gateway, request: Request, compute: Compute) -> dict[str, Any]:
    """A cluster as Azure shows it; this machine as one whose size is `Local`."""
    created = compute.created_at.isoformat()
    known: Mapping[str, Any] = gateway.recall(COLLECTION, compute.name) or {}
    if known.get("of") != created:
        known = {}  # Of one of the same name, which was deleted elsewhere.
    running = len(list(_running(gateway, compute)))
    is_local = compute.type == "local"
    return {
        "id": f"{request.workspace_id}/computes/{compute.name}",
        "name": compute.name,
        "type": "Microsoft.MachineLearningServices/workspaces/computes",
        "location": LOCATION,
        "tags": known.get("tags", {}),
        "properties": {
            "computeType": "AmlCompute",
            "computeLocation": LOCATION,
            "description": known.get("description") or ("This machine." if is_local else None),
            "provisioningState": compute.provisioning_state.capitalize(),
            "provisioningErrors": None,
            "createdOn": created,
            "modifiedOn": created,
            "isAttachedCompute": False,
            "disableLocalAuth": True,
            "properties": {
                "osType": "Linux",
                "vmSize": compute.size or LOCAL_SIZE,
                "vmPriority": known.get("tier", "Dedicated"),
                "remoteLoginPortPublicAccess": "Disabled",
                "scaleSettings": {
                    "minNodeCount": known.get("least", 1 if is_local else 0),
                    "maxNodeCount": compute.max_instances,
                    "nodeIdleTimeBeforeScaleDown": duration(known.get("idle_seconds", USUAL_IDLE_SECONDS)),
                },
                "allocationState": "Steady",
                "currentNodeCount": running,
                "targetNodeCount": running,
                "nodeStateCounts": {"runningNodeCount": running, "idleNodeCount": 0, "unusableNodeCount": 0},
                "errors": None,
            },
        },
    }


def _running(gateway: Gateway, compute: Compute) -> Iterator[AttemptRecord]:
    """The attempts of steps that name this compute; of this machine all."""
    for attempt in gateway.parts.computes.active():
        job = gateway.parts.store.find(JobRecord, attempt.job)
        step = None if job is None else next((s for s in job.job.steps if s.name == attempt.step), None)
        if compute.type == "local" or (step is not None and step.compute.lower() == compute.name.lower()):
            yield attempt


def _node_view(attempt: AttemptRecord) -> dict[str, Any]:
    return {"nodeId": attempt.key, "nodeState": "running", "runId": attempt.job}


# ---------------------------------------------------------------- sizes and usage


@routes.add("GET", _PROVIDER + "/locations/{location}/vmSizes")
def list_sizes(gateway: Gateway, request: Request) -> Answer:
    """Sizes that a cluster may be called after, and this machine's own"""
    local = gateway.parts.computes.find("local")
    found = [_size_view(size) for size in SIZES if not size.is_denied]
    if local is not None:
        found.append(
            {
                "name": LOCAL_SIZE,
                "family": "This machine",
                "vCPUs": local.cores,
                "gpus": local.gpus,
                "memoryGB": round(local.memory_bytes / GIB, 1),
                "lowPriorityCapable": False,
                "premiumIO": False,
                "supportedComputeTypes": ["AmlCompute"],
            }
        )
    return Answer({"value": found})


def _size_view(size: Size) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": size.name,
        "family": size.gpu or "General purpose",
        "vCPUs": size.cores,
        "gpus": size.gpus,
        "memoryGB": size.memory_gib,
        "lowPriorityCapable": False,
        "premiumIO": False,
        "supportedComputeTypes": ["AmlCompute"],
    }
    if size.disk_gib is not None:
        found["maxResourceVolumeMB"] = size.disk_gib * 1024
    return found


@routes.add("GET", _PROVIDER + "/locations/{location}/usages")
def list_usage(gateway: Gateway, request: Request) -> Answer:
    """What of this machine is claimed, and what may be"""
    local = gateway.parts.computes.get("local")
    held = gateway.parts.computes.holdings()
    rows = (
        ("slots", "Steps at once", held["slots_used"], local.slots),
        ("memoryMb", "Claimed memory (MB)", held["memory_claimed_bytes"], local.memory_bytes),
    )
    return Answer(
        {
            "value": [
                {
                    "id": f"/subscriptions/{request['subscription']}/providers/"
                    f"Microsoft.MachineLearningServices/locations/{LOCATION}/usages/{name}",
                    "amlWorkspaceLocation": LOCATION,
                    "type": "Microsoft.MachineLearningServices/workspaces/usages",
                    "unit": "Count",
                    "currentValue": _count(name, used),
                    "limit": _count(name, limit),
                    "name": {"value": name, "localizedValue": words},
                }
                for name, words, used, limit in rows
            ]
        }
    )


def _count(name: str, value: object) -> int:
    whole = int(str(value))
    return whole // 1_000_000 if name == "memoryMb" else whole
