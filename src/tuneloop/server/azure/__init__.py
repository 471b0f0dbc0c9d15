"""The dialect of Azure Machine Learning: what the official SDK says over HTTPS, answered by this workspace.

A listener of the same server: it holds no state of its own but what only the dialect knows (see `gateway`).
What the SDK sends and needs was measured against azure-ai-ml; `docs/reference/azure-coverage.md` says of
every call of the SDK whether it works, is refused, or is not there.
"""

from tuneloop.server.azure.app import create_gateway

__all__ = ["create_gateway"]
