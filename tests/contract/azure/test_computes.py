"""Clusters as the SDK makes them: names with a size, mapped onto this machine; what is refused of them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.contract.azure.direct import WORKSPACE, refusal, speaking_to, warnings_of
from tests.contract.azure.sdk import AzureWorld, Sdk
from tests.loop.world import RECIPE, SLOW, wait_for
from tuneloop.core.errors import NotFound

SIZE = "Standard_NC24ads_A100_v4"


@pytest.fixture(scope="module")
def wire(azure: AzureWorld) -> Iterator[httpx.Client]:
    with speaking_to(azure) as client:
        yield client


@pytest.mark.verbs("compute.get", "compute.begin_create_or_update", "compute.begin_delete", "compute.list")
def test_reuse_or_create_as_the_document_does(sdk: Sdk) -> None:
    code = f"""
        name = 'Doc-{sdk.which}'
        try:
            cluster = ml.compute.get(name)
            made = False
        except Exception as missing:
            told = str(missing)
            cluster = ml.compute.begin_create_or_update(
                AmlCompute(name=name, size={SIZE.upper()!r}, tier='dedicated', max_instances=2,
                           idle_time_before_scale_down=180, tags={{'team': 'a'}}, description='d')
            ).result()
            made = True
        again = ml.compute.get(name.upper())
        listed = {{c.name: [c.type, c.size] for c in ml.compute.list(compute_type='AmlCompute')}}
        shown = ['name', 'size', 'type', 'provisioning_state', 'min_instances', 'max_instances', 'tier',
                 'tags', 'idle_time_before_scale_down', 'description', 'location']
        result = [made, told, [[getattr(c, one) for one in shown] for c in (cluster, again)], listed]
        ml.compute.begin_delete(name.lower()).wait()
    """
    made, told, (first, again), listed = sdk.run(code).ok()
    assert made
    assert f"There is no compute 'Doc-{sdk.which}'." in told
    assert first == [
        f"Doc-{sdk.which}",
        SIZE,
        "amlcompute",
        "Succeeded",
        0,
        2,
        "dedicated",
        {"team": "a"},
        180,
        "d",
        "local",
    ]
    assert again == first
    assert listed[f"Doc-{sdk.which}"] == ["amlcompute", SIZE]
    assert listed["local"] == ["amlcompute", "Local"]
    error = sdk.run(f"ml.compute.get('doc-{sdk.which}')").failed()
    assert (error["type"], error["code"]) == ("ResourceNotFoundError", "ResourceNotFound")


@pytest.mark.verbs("compute.begin_update", "begin_create_or_update")
def test_put_again_is_an_update_and_another_size_is_not(azure: AzureWorld, sdk: Sdk) -> None:
    name = f"again-{sdk.which}"
    code = f"""
        ml.begin_create_or_update(AmlCompute(name={name!r}, size={SIZE!r}, max_instances=1)).result()
        found = ml.compute.begin_update(
            AmlCompute(name={name!r}, size={SIZE!r}, max_instances=3, location='local')).result()
        result = [found.type, found.max_instances]
    """
    assert sdk.run(code).ok() == ["amlcompute", 3]
    assert azure.client.compute(name)["max_instances"] == 3
    other = f"AmlCompute(name={name.upper()!r}, size='Standard_NC6s_v3')"
    error = sdk.run(f"ml.compute.begin_create_or_update({other}).result()").failed()
    assert (error["type"], error["code"], error["status"]) == (
        "ResourceExistsError",
        "ResourceAlreadyExists",
        409,
    )
    assert f"Compute '{name}' is there already, with the size {SIZE}" in error["message"]
    assert azure.client.compute(name)["max_instances"] == 3


def test_a_new_cluster_of_an_old_name_does_not_remember(azure: AzureWorld, wire: httpx.Client) -> None:
    body = {"properties": {"computeType": "AmlCompute", "properties": {"vmSize": SIZE}}, "tags": {"old": "1"}}
    assert wire.put(f"{WORKSPACE}/computes/renewed", json=body).status_code == 201
    azure.client.delete_compute("renewed")
    azure.client.create_compute("renewed", SIZE)
    found = wire.get(f"{WORKSPACE}/computes/renewed").json()
    assert (found["tags"], found["properties"]["properties"]["vmSize"]) == ({}, SIZE)


def test_what_is_done_in_another_way_is_warned_of(azure: AzureWorld, sdk: Sdk) -> None:
    name = f"warned-{sdk.which}"
    code = f"""
        ml.compute.begin_create_or_update(AmlCompute(name={name!r}, size={SIZE!r}, min_instances=1,
            tier='low_priority', location='westeurope', enable_node_public_ip=False)).wait()
        found = ml.compute.get({name!r})
        result = [found.tier, found.min_instances]
    """
    assert sdk.run(code).ok() == ["low_priority", 1]
    said = warnings_of(azure, f"compute {name}")
    for words in (
        f"{SIZE} is what the compute is called after: its jobs run on this machine",
        "location is 'westeurope': everything runs on this machine",
        "vmPriority is LowPriority: nothing is ever taken away",
        "minNodeCount is 1: this machine is always there",
    ):
        assert any(words in one for one in said), said
    assert len(said) == 4


REFUSED_FIELDS = {
    "properties.properties.userAccountCredentials": (
        "ssh_settings=AmlComputeSshSettings(admin_username='a', admin_password='sesame')",
        "nobody logs in to a node",
    ),
    "properties.properties.remoteLoginPortPublicAccess": (
        "ssh_public_access_enabled=True",
        "nobody logs in to a node",
    ),
    "properties.properties.subnet": (
        "network_settings=NetworkSettings(vnet_name='v', subnet='s')",
        "there is no virtual network",
    ),
    "identity": ("identity=IdentityConfiguration(type='SystemAssigned')", "steps run as you"),
}


@pytest.mark.parametrize("field", REFUSED_FIELDS)
def test_what_needs_a_network_of_nodes_is_refused_by_name(sdk: Sdk, field: str) -> None:
    written, told = REFUSED_FIELDS[field]
    error = sdk.run(
        f"ml.compute.begin_create_or_update(AmlCompute(name='refused-field', size={SIZE!r}, {written}))"
    ).failed()
    assert (error["code"], error["status"]) == ("NotSupported", 400), error["trace"]
    assert f"{field} is" in error["message"]
    assert told in error["message"]
    assert "sesame" not in error["message"]
    error = sdk.run("ml.compute.get('refused-field')").failed()
    assert error["code"] == "ResourceNotFound"


@pytest.mark.parametrize(
    ("written", "code", "target", "told"),
    [
        ("size='Standard_NC6'", "InvalidInput", "properties.properties.vmSize", "K80s"),
        ("size='Standard_NC24ads_A100_v5'", "InvalidInput", "properties.properties.vmSize", "Did you mean"),
        ("size='local'", "InvalidInput", "properties.properties.vmSize", "as the compute 'local'"),
        (
            f"size={SIZE!r}, max_instances=0",
            "InvalidInput",
            "properties.properties.scaleSettings.maxNodeCount",
            "expected 1 to 1000",
        ),
        (
            f"size={SIZE!r}, min_instances=3, max_instances=2",
            "InvalidInput",
            "properties.properties.scaleSettings.minNodeCount",
            "above maxNodeCount, which is 2",
        ),
    ],
)
def test_a_value_that_cannot_be_is_refused(sdk: Sdk, written: str, code: str, target: str, told: str) -> None:
    error = sdk.run(f"ml.compute.begin_create_or_update(AmlCompute(name='wrong-value', {written}))").failed()
    assert (error["code"], error["target"], error["status"]) == (code, target, 400)
    assert told in error["message"]


def test_a_name_that_cannot_be_is_refused(sdk: Sdk) -> None:
    error = sdk.run(f"ml.compute.begin_create_or_update(AmlCompute(name='a b', size={SIZE!r}))").failed()
    assert (error["code"], error["status"]) == ("InvalidResourceName", 400)


@pytest.mark.refuses("compute.begin_attach")
@pytest.mark.parametrize(
    "code",
    [
        "ml.compute.begin_create_or_update(ComputeInstance(name='ci', size='Standard_DS3_v2'))",
        "ml.compute.begin_create_or_update(SynapseSparkCompute(name='sp', resource_id='/subscriptions/x'))",
        "ml.compute.begin_attach(KubernetesCompute(name='k', resource_id='/subscriptions/x'))",
        "ml.compute.begin_attach(VirtualMachineCompute(name='vm', resource_id='/subscriptions/x', "
        "ssh_settings=VirtualMachineSshSettings(admin_username='x', admin_password='sesame')))",
    ],
)
def test_only_clusters_are_there(sdk: Sdk, code: str) -> None:
    error = sdk.run(code).failed()
    assert (error["code"], error["target"]) == ("NotSupported", "properties.computeType"), error["trace"]
    assert "only clusters (AmlCompute) are there" in error["message"]
    assert "sesame" not in error["message"]


@pytest.mark.refuses(
    "compute.begin_start", "compute.begin_stop", "compute.begin_restart", "compute.enable_sso"
)
@pytest.mark.parametrize(
    "call",
    ["begin_start('local')", "begin_stop('local')", "begin_restart('local')", "enable_sso(name='local')"],
)
def test_a_compute_is_not_started_or_stopped(sdk: Sdk, call: str) -> None:
    error = sdk.run(f"ml.compute.{call}").failed()
    assert (error["code"], error["target"]) == ("NotSupported", "computeInstances")
    assert "Compute instances are not there" in error["message"]


@pytest.mark.verbs("compute.list_sizes")
def test_the_gpus_of_a_size_are_read_as_the_document_does(azure: AzureWorld, sdk: Sdk) -> None:
    code = """
        every = {one.name: one.gpus for one in ml.compute.list_sizes()}
        elsewhere = {one.name for one in ml.compute.list_sizes(location='westeurope')}
        result = [every, elsewhere == set(every)]
    """
    sizes, is_same = sdk.run(code).ok()
    assert is_same
    assert (sizes["Standard_ND40rs_v2"], sizes[SIZE], sizes["Standard_D12_v2"]) == (8, 1, 0)
    assert "Standard_NC6" not in sizes
    assert sizes["Local"] == azure.client.compute("local")["gpus"]


@pytest.mark.verbs("compute.list_usage")
def test_the_usage_is_this_machines(azure: AzureWorld, sdk: Sdk) -> None:
    code = "result = [[one.name['value'], one.unit, one.limit] for one in ml.compute.list_usage()]"
    local = azure.client.compute("local")
    assert sdk.run(code).ok() == [
        ["slots", "Count", local["slots"]],
        ["memoryMb", "Count", local["memory_bytes"] // 1_000_000],
    ]


@pytest.mark.verbs("compute.list_nodes")
def test_a_cluster_that_a_job_uses_is_busy_and_shows_its_step_as_a_node(azure: AzureWorld) -> None:
    sdk = azure.sdk("new")
    sdk.run(f"ml.compute.begin_create_or_update(AmlCompute(name='busy', size={SIZE!r})).wait()").ok()
    assert sdk.run("result = list(ml.compute.list_nodes('busy'))").ok() == []
    job = azure.submit(RECIPE + "compute: busy\n", force_rerun=True, **SLOW)
    # The newest SDK keeps the fields of a node as the wire spells them.
    code = "result = [[n.nodeState, n.runId] for n in ml.compute.list_nodes('busy')]"
    nodes = wait_for(lambda: sdk.run(code).ok(), "a node")
    assert nodes == [["running", job]]
    error = sdk.run("ml.compute.begin_delete('busy')").failed()
    assert (error["code"], error["status"]) == ("ResourceNotReady", 409)
    assert f"Compute 'busy' is used by 1 job(s) that have not ended: {job}." in error["message"]
    azure.client.cancel(job)
    azure.wait_until_ended(job)
    sdk.run("ml.compute.begin_delete('busy').wait()").ok()
    with pytest.raises(NotFound):
        azure.client.compute("busy")


def test_a_cluster_is_deleted_not_detached_and_this_machine_is_neither(sdk: Sdk) -> None:
    error = sdk.run("ml.compute.begin_delete('local', action='Detach')").failed()
    assert (error["code"], error["target"]) == ("NotSupported", "underlyingResourceAction")
    error = sdk.run("ml.compute.begin_delete('local')").failed()
    assert (error["code"], error["status"]) == ("ResourceNotReady", 409)
    assert "'local' is this machine: it cannot be deleted." in error["message"]


def test_two_puts_at_once_are_one_cluster(azure: AzureWorld) -> None:
    body = {"properties": {"computeType": "AmlCompute", "properties": {"vmSize": SIZE}}}

    def put(_: int) -> int:
        with speaking_to(azure) as client:
            return client.put(f"{WORKSPACE}/computes/at-once", json=body).status_code

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(put, range(4))) == [200, 200, 200, 201]


def test_the_state_of_a_put_can_be_asked_by_anyone_at_any_time(wire: httpx.Client) -> None:
    answer = wire.get(f"{WORKSPACE}/computes/local/status")
    assert (answer.status_code, answer.json()) == (200, {"status": "Succeeded"})
    refusal(wire.get(f"{WORKSPACE}/computes/never/status"), 404, "ResourceNotFound")
