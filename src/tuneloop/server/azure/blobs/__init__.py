"""Azure's blob service, as far as the SDK speaks it: what scripts upload, and what they download.

Addresses are `/blob/store.blob.<anything>/{container}/{blob}`; who asks is proven by a shared access
signature in the query (`sas`), never by a token.
"""

from tuneloop.server.azure.blobs.operations import routes

__all__ = ["routes"]
