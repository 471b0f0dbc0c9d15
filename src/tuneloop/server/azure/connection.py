"""One connection to the HTTPS listener: it may not dawdle, and what is not HTTP gets Azure's error shape."""

from __future__ import annotations

import json

from tuneloop.server.azure.errors import Refusal
from tuneloop.server.connection import Connection


class AzureConnection(Connection):
    def told(self, mistake: str) -> bytes:
        return json.dumps(Refusal(400, "InvalidRequest", mistake).to_json()).encode()
