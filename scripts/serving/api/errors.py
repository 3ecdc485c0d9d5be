"""Errors of the API, as OpenAI's error object."""

import re

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from model.errors import UserError

# Parts of a place that name no field but the kind of a union: "str", "list[str]", "NamedToolChoice"
OF_PYDANTIC = re.compile(r"^(str|int|float|bool|constrained-\w+)$|\[|^[A-Z]")
SENTENCES = {
    "extra_forbidden": "there is no such field here",
    "missing": "this field is required",
    "dict_type": "it must be a JSON object",
    "model_type": "it must be a JSON object",
    "model_attributes_type": "it must be a JSON object",
    "list_type": "it must be a list",
    "string_type": "it must be a text",
}


class ApiError(Exception):
    """An error for the client: an HTTP status and OpenAI's error object as the body."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def server_error() -> ApiError:
    """A 500 that does not leak the exception; the log has it."""
    return ApiError("the server failed; its log has the reason", 500, "server_error")


def add_error_handlers(app: FastAPI) -> None:
    """Have every error answered with OpenAI's error object, those of FastAPI too."""

    @app.exception_handler(ApiError)
    def api_error(http: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status)

    @app.exception_handler(UserError)
    def cannot_be_done(http: Request, error: UserError) -> JSONResponse:
        return api_error(http, ApiError(str(error)))

    @app.exception_handler(RequestValidationError)
    def invalid_request(http: Request, error: RequestValidationError) -> JSONResponse:
        # of a union the error that lies deepest: it belongs to the kind that was meant
        found = error.errors()[:1000]
        first = max(found, key=lambda each: len(each["loc"]))
        parts = map(str, first["loc"][1:])  # without "body"
        field = ".".join(part for part in parts if not OF_PYDANTIC.search(part))
        said = SENTENCES.get(first["type"], first["msg"]).removeprefix("Value error, ")
        message = f"{field}: {said}" if field else said
        return api_error(http, ApiError(message, param=field or None))

    @app.exception_handler(HTTPException)
    def unknown_route(http: Request, error: HTTPException) -> JSONResponse:
        message = f"{http.method} {http.url.path}: {error.detail}"
        response = api_error(http, ApiError(message, error.status_code))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    def unexpected_error(http: Request, error: Exception) -> JSONResponse:
        return api_error(http, server_error())
