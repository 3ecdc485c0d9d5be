"""The API key: everything but /health needs it, where one is set."""

import secrets

from fastapi import FastAPI
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from scripts.serving.api.errors import ApiError


def add_key_check(app: FastAPI, key: str) -> None:
    """Answer requests with the key only, before their bodies are read."""
    if key:
        app.add_middleware(CheckKey, key=key)


class CheckKey:
    def __init__(self, app: ASGIApp, key: str):
        self.app, self.key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health" and not self.is_sent(scope):
            error = ApiError("the API key is missing or wrong", 401, code="invalid_api_key")
            headers = {"www-authenticate": "Bearer"}
            return await JSONResponse(error.body, error.status, headers)(scope, receive, send)
        await self.app(scope, receive, send)

    def is_sent(self, scope: Scope) -> bool:
        """The key comes as OpenAI's bearer token, or in the header that Azure's or Anthropic's
        clients send."""
        headers = dict(scope["headers"])
        scheme, _, key = headers.get(b"authorization", b"").strip().partition(b" ")
        sent = [key.strip()] if scheme.lower() == b"bearer" else []
        sent += [headers[name] for name in (b"api-key", b"x-api-key") if name in headers]
        # compare_digest takes the same time wherever the keys differ
        return any([secrets.compare_digest(each, self.key) for each in sent])
