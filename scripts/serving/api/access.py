"""Who may use the server: clients with its key, and web pages, which of them and by which names.

A browser lets a page of another origin read a reply only where the server allows that origin
(CORS). And a page whose own name its owner suddenly lets point to 127.0.0.1 (DNS rebinding) counts
as of the same origin; it is known by the name in its Host header, which nobody gave to this server.
"""

import ipaddress
import re
import secrets
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from scripts.serving.api.errors import ApiError
from scripts.serving.arguments import ServerArgs

LOCALHOST = r"https?://(localhost|[\w.-]+\.localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?"
LOCAL_NAMES = {"localhost", "testserver", "host.docker.internal", "host.containers.internal"}
WITHOUT_PREFIX = {"/models", "/completions", "/chat/completions", "/responses"}  # of /v1


def add_access_rules(app: FastAPI, args: ServerArgs) -> None:
    """Answer clients with the key only, pages of --allow_origins only, and requests to the server's
    own names only."""
    if args.api_key:
        app.add_middleware(CheckKey, key=args.api_key)
    origins = set(args.allow_origins) - {"localhost", "none"}
    rules: dict[str, Any] = {
        "allow_origins": ["*"] if "*" in origins else sorted(each.rstrip("/") for each in origins),
        "allow_origin_regex": LOCALHOST if "localhost" in args.allow_origins else None,
    }
    app.add_middleware(
        CORSMiddleware,
        **rules,
        allow_methods=["GET", "POST", "OPTIONS"],
        allow_headers=["*"],
        expose_headers=["x-minimind-tools-left-out"],
        max_age=600,
    )
    # a Host that is a page's own name is of an origin that is allowed to ask
    named = {urlsplit(each).hostname or "" for each in origins} | {args.host, *args.allow_hosts}
    app.add_middleware(
        CheckHost,
        names={name.lower() for name in named if name},
        is_allowed=CORSMiddleware(app, **rules).is_allowed_origin,
    )


class CheckHost:
    """Refuses requests to a name that is not the server's, and those of a page that may not use it:
    a browser keeps their replies from the page, but not their effects. Also tidies the path:
    clients join a base URL with or without /v1 and "/" to it."""

    def __init__(self, app: ASGIApp, names: set[str], is_allowed: Callable[[str], bool]):
        self.app, self.names, self.is_allowed = app, names, is_allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            host = headers.get(b"host", b"localhost").decode("latin-1")
            if not self.is_known(host):
                error = ApiError(
                    f"this server is not known as {host!r}; name it with --allow_hosts", 403
                )
                return await JSONResponse(error.body, error.status)(scope, receive, send)
            origin = headers.get(b"origin", b"").decode("latin-1")
            of_its_own = origin in (f"http://{host}", f"https://{host}")
            asks = scope["method"] not in ("GET", "HEAD", "OPTIONS")
            if origin and asks and not (of_its_own or self.is_allowed(origin)):
                error = ApiError(
                    f"pages of {origin!r} may not use this server; --allow_origins allows them", 403
                )
                return await JSONResponse(error.body, error.status)(scope, receive, send)
            path = re.sub("/+", "/", scope["path"])
            path = path.rstrip("/") or "/"
            scope = {**scope, "path": f"/v1{path}" if path in WITHOUT_PREFIX else path}
        await self.app(scope, receive, send)

    def is_known(self, host: str) -> bool:
        """Plain addresses are: only names can be made to point elsewhere."""
        name = re.sub(r":\d*$", "", host.lower())
        if "*" in self.names or name in self.names | LOCAL_NAMES or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name.strip("[]"))
            return True
        except ValueError:
            # names of a local network, as a compose file or a router gives them, have no dot
            return bool(name) and "." not in name


class CheckKey:
    """Refuses requests without the API key, before their bodies are read; /health needs none."""

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
