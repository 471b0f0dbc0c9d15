"""The data plane: one endpoint, as any caller with its key sees it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import httpx

from tuneloop.client.views import EndpointView
from tuneloop.client.wire import error_of
from tuneloop.core.errors import NotAllowed, NotFound, TuneloopError, Unavailable


class EndpointClient:
    """Scores and chats through the router; a deployment given here is pinned for every request.

    Raises `Unavailable` while the endpoint has no address.
    """

    def __init__(
        self,
        endpoint: EndpointView,
        key: str,
        *,
        deployment: str | None = None,
        timeout: float = 300.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.name = endpoint["name"]
        scoring_uri, openai_base_url = endpoint["scoring_uri"], endpoint["openai_base_url"]
        if scoring_uri is None or openai_base_url is None:
            raise Unavailable(
                f"Endpoint {self.name!r} has no address yet: the router is starting.",
                next_move="Wait a moment; if it stays so, tuneloop status says why.",
            )
        self.scoring_uri = scoring_uri
        self.openai_base_url = openai_base_url.rstrip("/")
        headers = {"Authorization": f"Bearer {key}"}
        if deployment:
            headers["azureml-model-deployment"] = deployment
        self._http = httpx.Client(headers=headers, timeout=timeout, trust_env=False, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def score(self, body: bytes) -> str:
        """The raw reply to a request body that is sent as it is."""
        headers = {"Content-Type": "application/json"}
        return self._post(self.scoring_uri, content=body, headers=headers).text

    def models(self) -> list[str]:
        """What a request's `model` may say: the endpoint, its deployments and their models."""
        reply = self._request("GET", f"{self.openai_base_url}/models").json()
        return [str(model["id"]) for model in reply["data"]]

    def complete(self, messages: Sequence[Mapping[str, str]], **options: Any) -> dict[str, Any]:
        """One OpenAI chat completion; `options` are its fields (`max_tokens`, `temperature`, ...)."""
        reply = self._post(f"{self.openai_base_url}/chat/completions", json=self._chat(messages, options))
        return dict(reply.json())

    def stream(self, messages: Sequence[Mapping[str, str]], **options: Any) -> Iterator[str]:
        """The reply's text as it is generated. Raises `Unavailable` when it is cut before its end."""
        body = self._chat(messages, options) | {"stream": True}
        url = f"{self.openai_base_url}/chat/completions"
        try:
            with self._http.stream("POST", url, json=body) as response:
                if response.is_error:
                    raise _refusal(self.name, response.status_code, response.read())
                yield from _deltas(response.iter_lines())
        except httpx.TransportError as error:
            raise _endpoint_unreachable(self.name, url, error) from error

    def _chat(self, messages: Sequence[Mapping[str, str]], options: Mapping[str, Any]) -> dict[str, Any]:
        return {"model": self.name, "messages": [dict(message) for message in messages], **options}

    def _post(self, url: str, **options: Any) -> httpx.Response:
        return self._request("POST", url, **options)

    def _request(self, method: str, url: str, **options: Any) -> httpx.Response:
        try:
            response = self._http.request(method, url, **options)
        except httpx.TransportError as error:
            raise _endpoint_unreachable(self.name, url, error) from error
        if response.is_error:
            raise _refusal(self.name, response.status_code, response.content)
        return response


def _deltas(lines: Iterator[str]) -> Iterator[str]:
    """The text in OpenAI's server-sent events; `[DONE]` proves that the reply is whole."""
    for line in lines:
        if not line.startswith("data:"):
            continue
        data = line[5:].strip()
        if data == "[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise error_of(500, data.encode())
        for choice in event.get("choices", []):
            text = choice.get("delta", {}).get("content")
            if text:
                yield text
    raise Unavailable(
        "The reply was cut off before its end.", next_move="Ask again; see: tuneloop deployments logs"
    )


def _refusal(name: str, status: int, content: bytes) -> TuneloopError:
    """What the router or a replica answered, with a next move: OpenAI's shape of an error has none."""
    error = error_of(status, content)
    if error.next_move is None and isinstance(error, NotAllowed):
        error.next_move = f"Its keys: tuneloop endpoints keys {name}"
    elif error.next_move is None and isinstance(error, NotFound | Unavailable):
        error.next_move = f"Look at it with: tuneloop endpoints show {name}"
    return error


def _endpoint_unreachable(name: str, url: str, error: httpx.TransportError) -> Unavailable:
    if isinstance(error, httpx.TimeoutException):
        return Unavailable(
            f"Endpoint {name!r} did not answer in time at {url}.", next_move="Ask for fewer tokens."
        )
    return Unavailable(
        f"Endpoint {name!r} does not answer at {url} ({error or type(error).__name__}).",
        next_move="Look at it with: tuneloop status",
    )
