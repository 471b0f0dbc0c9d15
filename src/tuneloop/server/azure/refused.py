"""What Azure Machine Learning has and this workspace has not: refused by name, with what to do instead.

Whole families of addresses, whatever the method: the SDK shows the sentence as the message of its
`HttpResponseError`. A status of 400, which the SDK does not try again.
"""

from __future__ import annotations

from typing import NamedTuple, NoReturn

from tuneloop.server.azure.errors import not_supported
from tuneloop.server.azure.gateway import Gateway
from tuneloop.server.azure.routing import ANY, ML, Request, Routes

routes = Routes()

_GROUP = "/subscriptions/{subscription}/resourceGroups/{group}"
_PROVIDER = "/providers/Microsoft.MachineLearningServices"


class _Family(NamedTuple):
    what: str
    """What is not there, as a sentence."""
    instead: str
    patterns: tuple[str, ...]
    """With everything below them, where they end in `{rest:path}`."""
    audience: str = "arm"


_PIPELINE = "submit a pipeline with the registry's component chat_completion_pipeline"
_READ_ONLY = (
    "the registry azureml is this workspace's catalogue and is only read here. Add a base model of yours "
    "with: tuneloop catalog add card.yaml"
)
_ONE_WORKSPACE = (
    "A Tuneloop home is one workspace, and every workspace name leads to it; for another one start a server "
    "with another folder in TUNELOOP_HOME."
)
_CODE = (
    "No code of yours is run: command jobs, sweeps and components of your own are not there. Instead, "
    + _PIPELINE
)

FAMILIES: dict[str, _Family] = {
    "batchEndpoints": _Family(
        "Batch endpoints are not there.",
        "Deploy the model to an online endpoint (ml_client.online_endpoints) and send it your rows.",
        ("{ws}/batchEndpoints{rest:path}", "/mferp/managementfrontend{ws}/batchEndpoints{rest:path}"),
        ML,
    ),
    "codes": _Family("Code cannot be uploaded.", f"{_CODE}.", ("{ws}/codes{rest:path}",)),
    "environments": _Family(
        "Environments are not there.",
        f"Steps run in the environment that Tuneloop is installed in, and a deployment needs none. {_CODE}.",
        ("{ws}/environments{rest:path}",),
    ),
    "components": _Family(
        "Components of a workspace are not there.",
        f"{_CODE}.",
        ("{ws}/components{rest:path}",),
    ),
    "modelPackages": _Family(
        "Models are not packed into images.",
        "Deploy the model as it is (ml_client.online_deployments), or download it (ml_client.models).",
        ("{ws}/models/{model}/versions/{version}/package",),
    ),
    "schedules": _Family(
        "Schedules are not there.",
        "Let cron or a timer of your system run the script that submits the job.",
        ("{ws}/schedules{rest:path}",),
    ),
    "connections": _Family(
        "Connections are not there.",
        "Set what a job needs in the environment it is submitted from, such as HF_TOKEN.",
        ("{ws}/connections{rest:path}",),
    ),
    "featurestores": _Family(
        "Feature stores, feature sets and their entities are not there.",
        "Prepare the columns beforehand and upload the rows as a file (ml_client.data).",
        (
            "{ws}/featuresets{rest:path}",
            "{ws}/featurestoreEntities{rest:path}",
            "{ws}/featurestores{rest:path}",
        ),
    ),
    "serverlessEndpoints": _Family(
        "Serverless endpoints are not there.",
        "Deploy to an online endpoint of this machine (ml_client.online_endpoints).",
        ("{ws}/serverlessEndpoints{rest:path}",),
    ),
    "marketplaceSubscriptions": _Family(
        "Marketplace subscriptions are not there.",
        "Nothing is sold here: base models come from the catalogue (the registry azureml).",
        ("{ws}/marketplaceSubscriptions{rest:path}",),
    ),
    "capabilityHosts": _Family(
        "Capability hosts are not there.",
        "Agents are not run here; call an online endpoint from your own.",
        ("{ws}/capabilityHosts{rest:path}",),
    ),
    "indexes": _Family(
        "Indexes and other generic assets are not there.",
        "There is no retrieval here; bring the passages into the conversations that you send.",
        ("/genericasset{ws}{rest:path}", "{ws}/indexes{rest:path}"),
        ML,
    ),
    "outboundRules": _Family(
        "Managed networks and their outbound rules are not there.",
        "Nothing here listens outside this machine, and what goes out is your system's to allow.",
        ("{ws}/outboundRules{rest:path}", "{ws}/provisionManagedNetwork"),
    ),
    "privateEndpoints": _Family(
        "Private endpoints and private links are not there.",
        "Nothing here listens outside this machine.",
        ("{ws}/privateEndpointConnections{rest:path}", "{ws}/privateLinkResources{rest:path}"),
    ),
    "inferencePools": _Family(
        "Inference pools and endpoint groups are not there.",
        "Deploy to an online endpoint of this machine (ml_client.online_endpoints).",
        ("{ws}/inferencePools{rest:path}", "{ws}/endpoints{rest:path}"),
    ),
    "labelingJobs": _Family(
        "Labelling jobs are not there.",
        "Label elsewhere and upload the rows as a file (ml_client.data).",
        ("{ws}/labelingJobs{rest:path}",),
    ),
    "computeInstances": _Family(
        "Compute instances are not there, and no compute is started, stopped, restarted or resized.",
        "Work on this machine as you do now; clusters (AmlCompute) need no starting.",
        ("{ws}/computes/{compute}/{verb:path}",),
    ),
    "workspaces": _Family(
        "A workspace is not created, changed or deleted here.",
        _ONE_WORKSPACE,
        ("{ws}",),
    ),
    "workspaceKeys": _Family(
        "A workspace has no keys, notebooks or diagnosis here.",
        "It has no storage account or key vault of its own; tuneloop doctor looks at its health.",
        (
            "{ws}/listKeys",
            "{ws}/resyncKeys",
            "{ws}/diagnose",
            "{ws}/listNotebookKeys",
            "{ws}/listNotebookAccessToken",
            "{ws}/prepareNotebook",
            "{ws}/listStorageAccountKeys",
        ),
    ),
    "registries": _Family(
        "Registries of your own are not there.",
        f"There is one: {_READ_ONLY}",
        (
            f"{_GROUP}{_PROVIDER}/registries/{{registry}}{{rest:path}}",
            f"/subscriptions/{{subscription}}{_PROVIDER}/registries{{rest:path}}",
        ),
    ),
    "resourceGroups": _Family(
        "Resource groups, deployments of templates and other resources of Azure are not there.",
        f"Only Azure Machine Learning is answered. {_ONE_WORKSPACE}",
        (
            _GROUP,
            f"{_GROUP}/providers/Microsoft.Resources{{rest:path}}",
            "/subscriptions/{subscription}/providers/Microsoft.Resources{rest:path}",
        ),
    ),
    "registryEnvironments": _Family(
        "Environments of the registry are not there.",
        "Every step runs in the environment that Tuneloop is installed in.",
        ("{reg}/environments{rest:path}",),
        ML,
    ),
    "registryWeights": _Family(
        "The weights of a base model are not handed out.",
        "A job fetches them itself, from the source that tuneloop catalog show NAME names.",
        # Before `data`, which begins in the same way.
        ("{reg}/datarefs{rest:path}",),
        ML,
    ),
    "registryData": _Family(
        "Data of the registry are not there.",
        "Register data in the workspace (ml_client.data), or give the pipeline a file.",
        ("{reg}/data{rest:path}",),
        ML,
    ),
    "registryWrites": _Family(
        "Nothing is written to the registry.",
        f"{_READ_ONLY[0].upper()}{_READ_ONLY[1:]}",
        (
            "{reg}/import",
            "{reg}/tempdatarefs{rest:path}",
            "{reg}/models{rest:path}",
            "{reg}/components{rest:path}",
            "{reg}/codes{rest:path}",
        ),
        ML,
    ),
}
"""Target of the error to the family."""


def _refuse(target: str, family: _Family) -> None:
    def answer(gateway: Gateway, request: Request) -> NoReturn:
        raise not_supported(f"{family.what} {family.instead}", target)

    answer.__doc__ = f"Refused. {family.what}"
    for number, pattern in enumerate(family.patterns):
        name = f"refuse {target}" + (f" {number + 1}" if number else "")
        routes.add(ANY, pattern, name=name, audience=family.audience)(answer)


for _target, _one in FAMILIES.items():
    _refuse(_target, _one)
