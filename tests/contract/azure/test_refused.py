"""What is not there is refused with a sentence that a person at the SDK sees, at once and by name."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.contract.azure.direct import WORKSPACE, refusal, speaking_to
from tests.contract.azure.sdk import AzureWorld, Sdk
from tuneloop.server.azure.refused import FAMILIES

REFUSALS: dict[str, tuple[str, str]] = {
    "batch_endpoints.list": ("list(ml.batch_endpoints.list())", "batchEndpoints"),
    "batch_endpoints.get": ("ml.batch_endpoints.get('b')", "batchEndpoints"),
    "batch_endpoints.begin_create_or_update": (
        "ml.batch_endpoints.begin_create_or_update(BatchEndpoint(name='bbb'))",
        "batchEndpoints",
    ),
    "batch_endpoints.begin_delete": ("ml.batch_endpoints.begin_delete('b')", "batchEndpoints"),
    "batch_endpoints.invoke": (
        "ml.batch_endpoints.invoke('b', input=Input(type='uri_file', "
        "path='azureml://datastores/workspaceblobstore/paths/rows.jsonl'))",
        "batchEndpoints",
    ),
    "batch_endpoints.list_jobs": ("list(ml.batch_endpoints.list_jobs('b'))", "batchEndpoints"),
    "batch_deployments.list": ("list(ml.batch_deployments.list('b'))", "batchEndpoints"),
    "batch_deployments.get": ("ml.batch_deployments.get('d', 'b')", "batchEndpoints"),
    "batch_deployments.begin_create_or_update": (
        "ml.batch_deployments.begin_create_or_update("
        "BatchDeployment(name='d', endpoint_name='b', model='azureml:x:1', compute='c'))",
        "batchEndpoints",
    ),
    "batch_deployments.begin_delete": ("ml.batch_deployments.begin_delete('d', 'b')", "batchEndpoints"),
    "batch_deployments.list_jobs": (
        "list(ml.batch_deployments.list_jobs(endpoint_name='b', name='d'))",
        "batchEndpoints",
    ),
    "schedules.list": ("list(ml.schedules.list())", "schedules"),
    "schedules.get": ("ml.schedules.get('s')", "schedules"),
    "schedules.begin_create_or_update": (
        "ml.schedules.begin_create_or_update(JobSchedule(name='s', create_job='azureml:j', "
        "trigger=RecurrenceTrigger(frequency='day', interval=1)))",
        "schedules",
    ),
    "schedules.begin_enable": ("ml.schedules.begin_enable('s')", "schedules"),
    "schedules.begin_disable": ("ml.schedules.begin_disable('s')", "schedules"),
    "schedules.begin_delete": ("ml.schedules.begin_delete('s')", "schedules"),
    "schedules.trigger": ("ml.schedules.trigger('s')", "schedules"),
    "environments.list": ("list(ml.environments.list())", "environments"),
    "environments.get": ("ml.environments.get('e', label='latest')", "environments"),
    "environments.create_or_update": (
        "ml.environments.create_or_update(Environment(name='e', image='python:3.11'))",
        "environments",
    ),
    "environments.archive": ("ml.environments.archive('e', version='1')", "environments"),
    "environments.restore": ("ml.environments.restore('e')", "environments"),
    "components.list": ("list(ml.components.list())", "components"),
    "components.get": ("ml.components.get('c')", "components"),
    "components.archive": ("ml.components.archive('c', version='1')", "components"),
    "components.restore": ("ml.components.restore('c', version='1')", "components"),
    "components.download": ("ml.components.download('c', 'nowhere', version='1')", "components"),
    "models.package": (
        "ml.models.package('m', '1', ModelPackage(target_environment='azureml:e:1', "
        "inferencing_server=AzureMLOnlineInferencingServer()))",
        "modelPackages",
    ),
    "connections.list": ("list(ml.connections.list())", "connections"),
    "connections.get": ("ml.connections.get('c')", "connections"),
    "connections.create_or_update": (
        "ml.connections.create_or_update(WorkspaceConnection(name='c', type='git', target='https://x', "
        "credentials=None))",
        "connections",
    ),
    "connections.delete": ("ml.connections.delete('c')", "connections"),
    "azure_openai_deployments.list": ("list(ml.azure_openai_deployments.list('c'))", "connections"),
    "workspaces.get_keys": ("ml.workspaces.get_keys('local')", "workspaceKeys"),
    "workspaces.begin_diagnose": ("ml.workspaces.begin_diagnose('local')", "workspaceKeys"),
    "workspaces.begin_sync_keys": ("ml.workspaces.begin_sync_keys('local')", "workspaceKeys"),
    "workspaces.begin_create": (
        "ml.workspaces.begin_create(Workspace(name='local', description='x', container_registry='y'), "
        "update_dependent_resources=True)",
        "workspaces",
    ),
    "workspaces.begin_update": (
        "ml.workspaces.begin_update(Workspace(name='local', description='x'))",
        "workspaces",
    ),
    "workspaces.begin_delete": (
        "ml.workspaces.begin_delete('local', delete_dependent_resources=False)",
        "workspaces",
    ),
    "workspaces.begin_provision_network": (
        "ml.workspaces.begin_provision_network(workspace_name='local')",
        "outboundRules",
    ),
    "workspace_outbound_rules.list": ("list(ml.workspace_outbound_rules.list('local'))", "outboundRules"),
    "workspace_outbound_rules.get": ("ml.workspace_outbound_rules.get('local', 'r')", "outboundRules"),
    "workspace_outbound_rules.begin_create": (
        "ml.workspace_outbound_rules.begin_create('local', FqdnDestination(name='r', destination='x'))",
        "outboundRules",
    ),
    "workspace_outbound_rules.begin_update": (
        "ml.workspace_outbound_rules.begin_update('local', FqdnDestination(name='r', destination='x'))",
        "outboundRules",
    ),
    "workspace_outbound_rules.begin_remove": (
        "ml.workspace_outbound_rules.begin_remove('local', 'r')",
        "outboundRules",
    ),
    "feature_stores.begin_create": (
        "ml.feature_stores.begin_create(FeatureStore(name='f'))",
        "resourceGroups",
    ),
    "feature_stores.begin_provision_network": (
        "ml.feature_stores.begin_provision_network(feature_store_name='f')",
        "outboundRules",
    ),
    "feature_sets.list": ("list(ml.feature_sets.list())", "featurestores"),
    "feature_sets.get": ("ml.feature_sets.get('f', version='1')", "featurestores"),
    "feature_sets.archive": ("ml.feature_sets.archive('f', version='1')", "featurestores"),
    "feature_sets.restore": ("ml.feature_sets.restore('f', version='1')", "featurestores"),
    "feature_sets.list_features": ("list(ml.feature_sets.list_features('f', version='1'))", "featurestores"),
    "feature_sets.get_feature": (
        "ml.feature_sets.get_feature('f', version='1', feature_name='x')",
        "featurestores",
    ),
    "feature_sets.begin_backfill": (
        "from datetime import datetime\nml.feature_sets.begin_backfill(name='f', version='1', "
        "data_status=['None'], feature_window_start_time=datetime(2024, 1, 1), "
        "feature_window_end_time=datetime(2024, 1, 2))",
        "featurestores",
    ),
    "feature_store_entities.list": ("list(ml.feature_store_entities.list())", "featurestores"),
    "feature_store_entities.get": ("ml.feature_store_entities.get('f', version='1')", "featurestores"),
    "feature_store_entities.begin_create_or_update": (
        "ml.feature_store_entities.begin_create_or_update(FeatureStoreEntity(name='f', version='1', "
        "index_columns=[DataColumn(name='a', type='string')]))",
        "featurestores",
    ),
    "feature_store_entities.archive": (
        "ml.feature_store_entities.archive('f', version='1')",
        "featurestores",
    ),
    "feature_store_entities.restore": (
        "ml.feature_store_entities.restore('f', version='1')",
        "featurestores",
    ),
    "serverless_endpoints.list": ("list(ml.serverless_endpoints.list())", "serverlessEndpoints"),
    "serverless_endpoints.get": ("ml.serverless_endpoints.get('s')", "serverlessEndpoints"),
    "serverless_endpoints.get_keys": ("ml.serverless_endpoints.get_keys('s')", "serverlessEndpoints"),
    "serverless_endpoints.begin_regenerate_keys": (
        "ml.serverless_endpoints.begin_regenerate_keys('s')",
        "serverlessEndpoints",
    ),
    "serverless_endpoints.begin_create_or_update": (
        "ml.serverless_endpoints.begin_create_or_update("
        "ServerlessEndpoint(name='s', model_id='azureml://registries/azureml/models/Phi-3-mini-4k-instruct'))",
        "serverlessEndpoints",
    ),
    "serverless_endpoints.begin_delete": ("ml.serverless_endpoints.begin_delete('s')", "serverlessEndpoints"),
    "marketplace_subscriptions.list": (
        "list(ml.marketplace_subscriptions.list())",
        "marketplaceSubscriptions",
    ),
    "marketplace_subscriptions.get": ("ml.marketplace_subscriptions.get('s')", "marketplaceSubscriptions"),
    "marketplace_subscriptions.begin_create_or_update": (
        "ml.marketplace_subscriptions.begin_create_or_update("
        "MarketplaceSubscription(name='s', model_id='azureml://registries/azureml/models/x'))",
        "marketplaceSubscriptions",
    ),
    "marketplace_subscriptions.begin_delete": (
        "ml.marketplace_subscriptions.begin_delete('s')",
        "marketplaceSubscriptions",
    ),
    "capability_hosts.get": ("ml.capability_hosts.get('s')", "capabilityHosts"),
    "capability_hosts.begin_delete": ("ml.capability_hosts.begin_delete('s')", "capabilityHosts"),
    "indexes.list": ("list(ml.indexes.list())", "indexes"),
    "indexes.get": ("ml.indexes.get('s', version='1')", "indexes"),
    "indexes.create_or_update": (
        "ml.indexes.create_or_update(Index(name='s', version='1', "
        "path='azureml://datastores/workspaceblobstore/paths/index'))",
        "indexes",
    ),
    "registries.begin_create": (
        "ml.registries.begin_create(Registry(name='r', location='local', replication_locations=[]))",
        "registries",
    ),
    "registries.begin_delete": ("ml.registries.begin_delete(name='azureml')", "registries"),
    "registry.environments.list": ("list(registry.environments.list())", "registryEnvironments"),
    "registry.environments.get": ("registry.environments.get('e', version='1')", "registryEnvironments"),
    "registry.data.list": ("list(registry.data.list())", "registryData"),
    "registry.data.get": ("registry.data.get('d', version='1')", "registryData"),
    "registry.models.archive": (
        "registry.models.archive('Phi-3-mini-4k-instruct', version='15')",
        "registryWrites",
    ),
    "registry.models.download": (
        "registry.models.download('Phi-3-mini-4k-instruct', version='15')",
        "registryWeights",
    ),
    "registry.components.archive": (
        "registry.components.archive('chat_completion_pipeline', version='0.0.82')",
        "registryWrites",
    ),
}
"""Call to what a script writes, and the target of the error."""


@pytest.mark.refuses(*REFUSALS)
@pytest.mark.parametrize("call", REFUSALS)
def test_a_call_that_is_not_there_says_what_to_do_instead(sdk: Sdk, call: str) -> None:
    code, target = REFUSALS[call]
    error = sdk.run(code).failed()
    assert (error["type"], error["status"]) == ("HttpResponseError", 400), error["trace"]
    assert (error["code"], error["target"]) == ("NotSupported", target)
    assert FAMILIES[target].what in error["message"]
    assert FAMILIES[target].instead in error["message"]


@pytest.mark.refuses("models.share", "data.share", "environments.share")
def test_nothing_is_shared_with_the_registry_nor_sent_elsewhere(azure: AzureWorld) -> None:
    """The newest SDK looks for the registry at the real Azure, and gets no token for it here."""
    targets = {"models": "registryWrites", "data": "registryData", "environments": "registryEnvironments"}
    for group, target in targets.items():
        named = "share_with_name='a', share_with_version='1', registry_name='azureml'"
        code = f"ml.{group}.share('x', '1', {named})"
        error = azure.sdk("older").run(code).failed()
        assert (error["code"], error["target"]) == ("NotSupported", target), error["trace"]
        error = azure.sdk("new").run(code).failed()
        assert error["type"] == "CredentialUnavailableError"
        assert "invalid_scope" in error["message"]


@pytest.mark.refuses("data.import_data")
def test_data_are_not_imported_by_a_job(sdk: Sdk) -> None:
    code = """
        from azure.ai.ml.data_transfer import Database
        ml.data.import_data(DataImport(
            name='x', path='azureml://datastores/workspaceblobstore/paths/x',
            source=Database(query='select 1', connection='azureml:c')))
    """
    error = sdk.run(code).failed()
    assert (error["code"], error["status"]) == ("NotSupported", 400)
    assert "'data_transfer': a pipeline here is one node" in error["message"]


@pytest.mark.refuses("feature_sets.begin_create_or_update")
def test_a_feature_set_is_refused_though_its_specification_is_uploaded(sdk: Sdk) -> None:
    code = """
        import os
        os.makedirs('feature_set', exist_ok=True)
        open('feature_set/FeatureSetSpec.yaml', 'w').write(
            'source: {type: parquet, path: "azureml://datastores/workspaceblobstore/paths/x", '
            'timestamp_column: {name: t}}\\n'
            'features: [{name: a, type: string}]\\nindex_columns: [{name: b, type: string}]\\n')
        ml.feature_sets.begin_create_or_update(FeatureSet(
            name='f', version='1', entities=['azureml:e:1'],
            specification=FeatureSetSpecification(path='feature_set')))
    """
    error = sdk.run(code).failed()
    assert (error["code"], error["target"]) == ("NotSupported", "featurestores"), error["trace"]


@pytest.mark.refuses("components.create_or_update")
def test_code_is_refused_before_anything_is_uploaded(sdk: Sdk) -> None:
    """A command job uploads its folder first: the refusal of that has to say why."""
    setup = """
        import os
        from azure.ai.ml import command
        os.makedirs('refused_code', exist_ok=True)
        open('refused_code/train.py', 'w').write('print(1)')
        job = command(code='refused_code', command='python train.py', environment='azureml:e:1', compute='c')
    """
    sdk.run(setup).ok()
    for code in ("ml.jobs.create_or_update(job)", "ml.components.create_or_update(job.component)"):
        error = sdk.run(code).failed()
        assert (error["code"], error["target"]) == ("NotSupported", "codes"), error["trace"]
        assert "command jobs, sweeps and components of your own are not there" in error["message"]
        assert "chat_completion_pipeline" in error["message"]


def test_an_environment_of_a_command_job_is_refused_with_the_job_in_mind(sdk: Sdk) -> None:
    code = """
        from azure.ai.ml import command
        ml.jobs.create_or_update(command(command='true', environment=Environment(name='zz', image='x')))
    """
    error = sdk.run(code).failed()
    assert (error["code"], error["target"]) == ("NotSupported", "environments")
    assert "command jobs" in error["message"]


@pytest.fixture(scope="module")
def wire(azure: AzureWorld) -> Iterator[httpx.Client]:
    with speaking_to(azure) as client:
        yield client


@pytest.mark.parametrize("method", ["GET", "PUT", "POST", "PATCH", "DELETE"])
def test_a_family_is_refused_whatever_the_method_and_the_case(wire: httpx.Client, method: str) -> None:
    answer = wire.request(method, f"{WORKSPACE.upper()}/SCHEDULES/x/anything?api-version=nonsense")
    error = refusal(answer, 400, "NotSupported")
    assert (error["target"], error["details"]) == ("schedules", [])


@pytest.mark.parametrize(
    ("method", "address", "target"),
    [
        ("POST", f"{WORKSPACE}/models/m/versions/1/package", "modelPackages"),
        ("GET", f"{WORKSPACE}/privateEndpointConnections", "privateEndpoints"),
        ("GET", f"{WORKSPACE}/inferencePools/p", "inferencePools"),
        ("GET", f"{WORKSPACE}/labelingJobs", "labelingJobs"),
        ("GET", "/subscriptions/s/resourceGroups/g", "resourceGroups"),
    ],
)
def test_a_family_that_the_sdk_has_no_call_for(
    wire: httpx.Client, method: str, address: str, target: str
) -> None:
    assert refusal(wire.request(method, address), 400, "NotSupported")["target"] == target


def test_what_is_refused_needs_a_token_as_well(wire: httpx.Client) -> None:
    answer = wire.get(f"{WORKSPACE}/schedules", headers={"Authorization": "Bearer x"})
    refusal(answer, 401, "InvalidAuthenticationToken")
