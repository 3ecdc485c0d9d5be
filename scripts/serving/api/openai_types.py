"""The request bodies of OpenAI's API, as far as this server supports them (pydantic models)."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import models_json_schema

REFERENCE = "#/components/schemas/{model}"
NonEmptyText = Annotated[str, Field(min_length=1)]


class StrictModel(BaseModel):
    """An unknown field is an error, so that a typo is not silently ignored."""

    model_config = ConfigDict(extra="forbid")


class IgnoredFields(StrictModel):
    """Fields that clients send and that have no effect here."""

    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    parallel_tool_calls: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class StreamOptions(StrictModel):
    include_usage: bool = False
    include_obfuscation: bool = False


class BaseRequest(IgnoredFields):
    """What chat completions and text completions share."""

    model: str = ""  # none: the one that is served
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = 1
    stop: NonEmptyText | Annotated[list[NonEmptyText], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    # extensions that vLLM and others have too
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = 1.0

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


# -- tools -----------------------------------------------------------------------------------------


class FunctionDefinition(StrictModel):
    name: Annotated[str, Field(pattern=r"^[\w.:/-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(StrictModel):
    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(StrictModel):
    name: str


class NamedToolChoice(StrictModel):
    type: Literal["function"]
    function: FunctionName


class FunctionCall(BaseModel):
    name: str
    arguments: str = "{}"


class ToolCall(BaseModel):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


# -- messages --------------------------------------------------------------------------------------


class ContentPart(BaseModel):
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    @model_validator(mode="after")
    def check_content(self) -> "ChatMessage":
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError(f"a message of role {self.role} needs content")
        return self


# -- structured output -----------------------------------------------------------------------------


class JsonSchema(StrictModel):
    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = {}
    strict: bool | None = None


class ResponseFormat(StrictModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def check_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type json_schema")
        return self


# -- requests --------------------------------------------------------------------------------------


class ChatTemplateKwargs(StrictModel):
    open_thinking: bool | None = None
    enable_thinking: bool | None = None
    others: dict[str, Any] = {}  # variables of the chat template


class ChatRequest(BaseRequest):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: ChatTemplateKwargs | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None

    @property
    def open_thinking(self) -> bool | None:
        """Whether to think; None: the request does not say."""
        kwargs = self.chat_template_kwargs or ChatTemplateKwargs()
        values = [kwargs.open_thinking, kwargs.enable_thinking]
        return None if values == [None, None] else any(values)

    @property
    def wants_json(self) -> bool:
        return self.response_format is not None and self.response_format.type != "text"

    @property
    def forces_tool_call(self) -> bool:
        return self.tool_choice not in (None, "none", "auto")


class CompletionRequest(BaseRequest):
    prompt: str | Annotated[list[str], Field(min_length=1)] | list[int] | list[list[int]]
    echo: bool | None = False
    add_special_tokens: bool | None = True  # BOS, if the tokenizer has one
    max_tokens: Annotated[int, Field(ge=0)] | None = None  # 0: only what echo asks for
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def check_max_tokens(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 goes with echo only")
        return self


class ResponsesRequest(BaseModel):
    """Of /v1/responses. Its parts are validated as those of a chat (responses_handler.py)."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    input: str | list[Any]
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    max_output_tokens: int | None = None
    stream: bool | None = False
    metadata: dict[str, Any] | None = None
    store: bool | None = True
    temperature: float | None = None
    top_p: float | None = None


# -- use -------------------------------------------------------------------------------------------


def validator(kind: Any) -> Callable[[Any], Any]:
    """A function that validates a body as FastAPI would, which does it in the event loop."""
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
