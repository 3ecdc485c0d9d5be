"""Executing the calls of a model: what is offered, with which arguments, and the result as JSON.

`call_tool` never raises: an error is the result of the call, so that the model may try again.
loop.py reads calls from replies and answers them with this.
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from dataset.tools.builtin import TOOLS, ToolError
from dataset.tools.mock import MOCK_TOOLS

MAX_RESULT, MAX_ERROR = 100_000, 1000  # characters: a model is to read it
ALL_TOOLS = TOOLS | MOCK_TOOLS
Schema = dict[str, Any]  # of a tool, in the form of OpenAI's API


class UnknownTool(ToolError):
    kind = "unknown_tool"


class BadArguments(ToolError):
    kind = "bad_arguments"


class Result(NamedTuple):
    """The JSON that the model reads, {"error": "…"} if the call failed, and the kind of error."""

    text: str
    error: str | None = None


def call_tool(
    name: str,
    arguments: dict[str, Any] | str,
    offered: Iterable[str] | None = None,
    schemas: Mapping[str, Schema] | None = None,
) -> Result:
    """The result of a call; it never raises.

    Args:
        arguments: an object, or the JSON text of one, as a model writes it.
        offered: the tools that may be called; default: all.
        schemas: by name, as the model was told: its defaults are filled in, and what it requires
            must be given.
    """
    offered = list(ALL_TOOLS if offered is None else offered)
    try:
        if name not in offered:
            raise UnknownTool(
                f"there is no tool {name!r}; there are {', '.join(offered) or 'none'}"
            )
        result, kind = run_tool(name, arguments, (schemas or {}).get(name)), None
        text = json.dumps(result, ensure_ascii=False, allow_nan=False)
        if len(text) > MAX_RESULT:
            raise ToolError(f"the result has more than {MAX_RESULT:,} characters")
    except ToolError as error:
        told = str(error)
        told = told if len(told) <= MAX_ERROR else f"{told[:MAX_ERROR]}…"
        text, kind = json.dumps({"error": told}, ensure_ascii=False), error.kind
    except (ValueError, TypeError):  # NaN, or what JSON has no form for
        text, kind = json.dumps({"error": "the result is no JSON"}), ToolError.kind
    return Result(text, kind)


def run_tool(
    name: str, arguments: dict[str, Any] | str, schema: Schema | None = None
) -> dict[str, Any]:
    if name not in ALL_TOOLS:  # offered by somebody's data
        raise ToolError(f"{name} cannot be run here")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise BadArguments(f"the arguments are not JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise BadArguments("the arguments must be a JSON object")
    own = ALL_TOOLS[name].schema
    for each in (schema, own) if schema else (own,):
        arguments = with_defaults(name, arguments, each)
    properties, _ = parameters_of(own)
    for key, value in arguments.items():
        if key not in properties:
            raise BadArguments(f"{name} takes no {key!r}")
        if properties[key]["type"] == "number":
            arguments = {**arguments, key: number(value, key)}
        elif not isinstance(value, str):
            raise BadArguments(f"{key!r} must be a text")
    return ALL_TOOLS[name].run(**arguments)


def tool_name(schema: Schema) -> str:
    """The name in a tool's schema, with "type" and "function" or without."""
    return str((schema.get("function") or schema).get("name"))


def parameters_of(schema: Schema) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The properties of a tool's parameters, and which of them are required. Data may lack any
    part of a schema; what is not said is not required."""
    function = schema.get("function") or schema
    parameters = function.get("parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    properties, required = parameters.get("properties"), parameters.get("required")
    properties = properties if isinstance(properties, dict) else {}
    about = {key: each if isinstance(each, dict) else {} for key, each in properties.items()}
    return about, required if isinstance(required, list) else []


def can_run(name: str, schema: Schema | None = None) -> bool:
    """Whether there is such a tool here, with all arguments that the schema has."""
    if name not in ALL_TOOLS:
        return False
    asked = parameters_of(schema or {})[0]
    return asked.keys() <= parameters_of(ALL_TOOLS[name].schema)[0].keys()


def with_defaults(name: str, arguments: dict[str, Any], schema: Schema) -> dict[str, Any]:
    """The arguments with the schema's defaults for those that are not given, or null."""
    properties, required = parameters_of(schema)
    given = {key: about.get("default") for key, about in properties.items()} | {
        key: value for key, value in arguments.items() if value is not None
    }
    given = {key: value for key, value in given.items() if value is not None}
    for key in required:
        if key not in given:
            about = properties.get(key, {}).get("description")
            raise BadArguments(f"{name} needs {key!r}" + (f": {about}" if about else ""))
    return given


def number(value: Any, key: str) -> float:
    """The argument as a number, which small models often write in quotes."""
    try:
        value = float(value)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise BadArguments(f"{key!r} must be a number")
    return value
