"""The client of Tuneloop's server and of its endpoints: plain HTTP, core types and plain JSON in and out.

Who uses it: `cli`, scripts and tests. It never imports the server, the workspace or an adapter.

    client = Client("http://127.0.0.1:7777", token)
    job = client.submit(Submission(text, path="recipe.yaml", folder="/data"))
    client.progress(job["name"])

Errors that the server answers come back as the same classes of `core.errors` that it raised; a server that
cannot be reached is `ServerUnreachable`. What the API composes out of several records (`JobView`,
`EndpointView`, ...) stays JSON and is described by the typed dictionaries of `client.views`.
"""

from tuneloop.client.control import Client, Submission
from tuneloop.client.endpoint import EndpointClient

__all__ = ["Client", "EndpointClient", "Submission"]
