"""MLflow's REST API on a database, as MLflow's own server has it: its handlers, without its pages, its jobs
and its workers. A process of its own serves it, and only while somebody asks for it.

For the gateway alone: it listens on a free port of 127.0.0.1, and every request needs the token in
`x-tuneloop-service`.
"""

from __future__ import annotations

import hmac
import logging
import threading
from collections.abc import Callable
from pathlib import Path

from tuneloop.adapters.mlflow import open_server

# isort: split
# After the adapter, which says in the environment that nothing is reported to anybody.
from flask import Flask, Response, request
from mlflow.server import handlers
from werkzeug.serving import WSGIRequestHandler, make_server

TOKEN_HEADER = "x-tuneloop-service"  # noqa: S105
_PREFIXES = ("/api/2.0/mlflow/", "/api/3.0/mlflow/")


def serve(
    tracking_uri: str,
    artifact_folder: Path,
    token: str,
    is_ready: Callable[[int], None],
    stop: threading.Event,
) -> None:
    """Until `stop` is set; `is_ready` is told the port. Raises `Unavailable` when the database cannot be
    opened."""
    # Makes a database that is not there yet, whole or not at all, as the tracker does.
    open_server(tracking_uri, artifact_folder).open()
    root = (artifact_folder / "runs").absolute().as_uri()
    handlers.initialize_backend_stores(tracking_uri, tracking_uri, root)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, application(token), threaded=True, request_handler=_Kept)
    thread = threading.Thread(target=server.serve_forever, name="mlflow", daemon=True)
    thread.start()
    is_ready(server.server_port)
    stop.wait()
    server.shutdown()
    server.server_close()


def application(token: str) -> Flask:
    """The operations of MLflow's clients; who has not the token gets none of them."""
    app = Flask(__name__, static_folder=None)

    @app.before_request
    def check_token() -> Response | None:
        given = request.headers.get(TOKEN_HEADER, "")
        if hmac.compare_digest(given.encode(), token.encode()):
            return None
        return Response("This port answers the gateway alone.", status=401, mimetype="text/plain")

    for path, handler, methods in handlers.get_endpoints():
        if path.startswith(_PREFIXES):
            app.add_url_rule(path, f"{'-'.join(methods)} {path}", handler, methods=methods)
    return app


class _Kept(WSGIRequestHandler):
    """Connections stay open between requests."""

    protocol_version = "HTTP/1.1"
