"""Bodies of requests: validated outside of FastAPI, which would do it in the event loop, and
described in its OpenAPI schema all the same."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.json_schema import models_json_schema

REFERENCE = "#/components/schemas/{model}"


def validator(kind: Any) -> Callable[[Any], Any]:
    """A function that validates a body, whose errors are those of FastAPI."""
    adapter = TypeAdapter(kind)

    def validate(body: Any) -> Any:
        try:
            return adapter.validate_python(body)
        except ValidationError as error:
            raise invalid(error) from error

    return validate


def invalid(error: ValidationError) -> RequestValidationError:
    found = error.errors(include_url=False, include_context=False, include_input=False)
    return RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in found])


def describe_bodies(app: FastAPI, bodies: dict[str, type[BaseModel]]) -> None:
    """Add the bodies of these paths to the OpenAPI schema."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        description = make()
        kinds = [(kind, "validation") for kind in bodies.values()]
        names, schemas = models_json_schema(kinds, ref_template=REFERENCE)
        described = description.setdefault("components", {}).setdefault("schemas", {})
        described.update(schemas["$defs"])
        for path, kind in bodies.items():
            content = {"application/json": {"schema": names[kind, "validation"]}}
            description["paths"][path]["post"]["requestBody"] = {
                "required": True,
                "content": content,
            }
        return description

    app.openapi = openapi
