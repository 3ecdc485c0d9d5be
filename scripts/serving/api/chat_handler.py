"""POST /v1/chat/completions: chat, reasoning, tool calls, JSON."""

import json
import logging
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from dataset.encoding import ends_in_thought
from dataset.lm_dataset import encode_chat
from dataset.reply_parser import Kind, ReplyParser
from model.errors import UserError
from model.inference.grammar import Grammar
from model.inference.schemas import enforceable, moved_below
from model.inference.tokens import decode_token_bytes
from scripts.serving.api.errors import ApiError
from scripts.serving.api.handler import MIN_LOGPROB, Handler
from scripts.serving.api.limits import check_schema
from scripts.serving.api.openai_types import (
    ChatMessage,
    ChatRequest,
    FunctionDefinition,
    NamedToolChoice,
    Tool,
)
from scripts.serving.api.service import Delta, Service

MAX_SHORTEST = 2048  # tokens that replies have to have: each searches for its end all the time
LOG = logging.getLogger("uvicorn.error")


@dataclass
class Choice:
    """One of the `n` replies, as far as it has come."""

    parser: ReplyParser
    started: bool = False  # the chunk with the role has been sent
    content: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None


class PlainText(ReplyParser):
    """Of a reply that is JSON: tags in its texts mean nothing."""

    def feed(self, text: str) -> Iterator[tuple[Kind, Any]]:
        if text:
            yield ("content", text)


class ChatHandler(Handler):
    body: ChatRequest
    id_prefix = "chatcmpl"
    chunk_type = "chat.completion.chunk"

    def __init__(self, service: Service, body: ChatRequest):
        super().__init__(service, body)
        if body.forces_tool_call and not body.tools:
            raise ApiError("tool_choice needs tools", param="tool_choice")
        if body.forces_tool_call and body.wants_json:
            raise ApiError("response_format and a forced tool call exclude each other")
        open_thinking = body.open_thinking
        if open_thinking is None:
            open_thinking = service.args.open_thinking
        # a grammar constrains the reply from its first token on, and has no place for reasoning
        self.max_tokens = body.max_completion_tokens or body.max_tokens
        self.open_thinking = open_thinking and not (body.forces_tool_call or body.wants_json)
        ids = self.encode_prompt()
        self.add_requests(ids, self.max_tokens, (body.top_logprobs or 0) if body.logprobs else None)
        in_thought = ends_in_thought(self.tokenizer, ids)
        self.choices = [
            Choice(PlainText() if body.wants_json else ReplyParser(in_thought))
            for _ in self.requests
        ]
        if body.wants_json or body.forces_tool_call:
            _ = service.grammars  # made here, where the tokenizer is in use by nobody else

    async def prepare(self) -> None:
        """Compile the grammar that all replies must follow."""
        if not (self.body.wants_json or self.body.forces_tool_call):
            return
        make = self.json_grammar if self.body.wants_json else self.tool_call_grammar
        most = self.requests[0].sampling.max_new_tokens
        grammar = await self.service.run(self.service.compiling, partial(make, most))
        n = len(self.requests)
        if grammar.shortest * n > MAX_SHORTEST:
            raise ApiError(
                f"the shortest reply that follows the schema has {grammar.shortest} tokens, and "
                f"all {n} replies may have {MAX_SHORTEST}",
                param="response_format",
            )
        for request in self.requests:
            request.constraint = grammar.copy()

    # -- prompt ------------------------------------------------------------------------------------

    def encode_prompt(self) -> list[int]:
        options: dict[str, Any] = {"open_thinking": True} if self.open_thinking else {}
        if self.body.chat_template_kwargs:
            options |= self.body.chat_template_kwargs.others
        messages = [to_template_message(message) for message in self.body.messages]
        texts = [each["content"] for each in messages]
        texts += [each.get("reasoning_content", "") for each in messages]
        texts += [json.dumps(options, ensure_ascii=False)]
        texts += [
            call["function"]["arguments"] for m in messages for call in m.get("tool_calls", ())
        ]
        self.service.check_characters(texts, "messages")

        def encode(tools: list[Tool]) -> list[int]:
            more = {"tools": [tool.model_dump(exclude_none=True) for tool in tools]}
            self.service.check_characters([json.dumps(more, ensure_ascii=False)], "tools")
            try:
                return encode_chat(
                    self.tokenizer,
                    messages,
                    add_generation_prompt=True,
                    **options,
                    **(more if tools else {}),
                ).ids
            except UserError as error:
                raise ApiError(f"the conversation {error}", param="messages") from error

        tools = self.offered_tools()
        if tools and self.service.args.tools == "fit":
            return self.encode_what_fits(tools, encode)
        return encode(tools)

    def offered_tools(self) -> list[Tool]:
        """The tools that the model is told."""
        ignored = self.service.args.tools == "none" and not self.body.forces_tool_call
        if self.body.tool_choice == "none" or ignored:
            return []
        return self.body.tools or []

    def prompt_room(self) -> int:
        """How long a prompt with tools may be: a reply needs room too, a quarter of everything at
        most."""
        most, asked = self.service.max_length, self.max_tokens or self.service.args.max_new_tokens
        return most - min(asked, most // 4)

    def encode_what_fits(
        self, tools: list[Tool], encode: Callable[[list[Tool]], list[int]]
    ) -> list[int]:
        """The prompt with as many of the first tools as there is room for; the response has the
        names of the others in a header. A tool that is to be called stays."""

        def fitting_prompt(count: int) -> list[int] | None:
            try:
                ids = encode(tools[:count])
            except ApiError as error:
                if error.body["error"]["param"] != "tools":
                    raise
                return None
            return ids if len(ids) <= self.prompt_room() else None

        if (ids := fitting_prompt(len(tools))) is not None:
            return ids
        choice = self.body.tool_choice
        if isinstance(choice, NamedToolChoice):
            tools = sorted(tools, key=lambda tool: tool.function.name != choice.function.name)
        fewest, fitting = (1 if self.body.forces_tool_call else 0), 0
        too_many = len(tools)
        while too_many - fitting > 1:  # a tool more makes a prompt longer
            middle = (fitting + too_many) // 2
            if fitting_prompt(middle) is not None:
                fitting = middle
            else:
                too_many = middle
        kept = max(fitting, fewest)
        left_out = [tool.function.name for tool in tools[kept:]]
        if left_out:
            self.headers["x-minimind-tools-left-out"] = (
                ",".join(left_out)[:4000].encode("ascii", "replace").decode()
            )
            LOG.warning(
                "%d of %d tools were left out of a prompt, for which there is no room in "
                "--max_length %d: %s",
                *(len(left_out), len(tools), self.service.max_length, ", ".join(left_out)),
            )
        self.body.tools = tools[:kept] or None
        return encode(tools[:kept])

    def json_grammar(self, max_tokens: int) -> Grammar:
        """JSON of the schema in response_format, or any JSON object."""
        json_schema = self.body.response_format.json_schema
        schema = json_schema.schema_ if json_schema else {"type": "object"}
        check_schema(schema, self.service.args, "response_format")
        try:
            return self.service.grammars.compile_json_schema(schema, max_tokens)
        except UserError as error:
            raise ApiError(str(error), param="response_format") from error

    def tool_call_grammar(self, max_tokens: int) -> Grammar:
        """A call of the tool that tool_choice names, or of any tool."""
        choice = self.body.tool_choice
        name = choice.function.name if isinstance(choice, NamedToolChoice) else None
        functions = [tool.function for tool in self.body.tools]
        functions = [function for function in functions if name in (None, function.name)]
        if not functions:
            raise ApiError(f"there is no tool {name!r} among tools", param="tool_choice")
        schemas = [function.parameters for function in functions]
        check_schema(schemas, self.service.args, "tools")
        try:
            schema = call_schema(functions)
            text = json.dumps({**schema, "x-guidance": {"whitespace_flexible": False}})
            has = self.service.grammars.has_token  # a model of others may write the tags as text
            begin, end = (t if has(t) else f'"{t}"' for t in ("<tool_call>", "</tool_call>"))
            grammar = f'start: {begin} "\\n" call "\\n" {end}\ncall: %json {text}\n'
            return self.service.grammars.compile_lark(grammar, max_tokens)
        except UserError as error:
            raise ApiError(str(error), param="tool_choice") from error

    # -- reply -------------------------------------------------------------------------------------

    def parse_delta(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """Add a delta to its choice; returns OpenAI's deltas of the message."""
        choice, message_deltas = self.choices[index], []
        parts = list(choice.parser.feed(delta.text))
        if delta.finish_reason:
            parts += choice.parser.end()
        for kind, part in parts:
            if kind == "tool_call":
                arguments = json.dumps(part["arguments"], ensure_ascii=False)
                call = {
                    "id": f"call_{secrets.token_hex(8)}",
                    "type": "function",
                    "function": {"name": part["name"], "arguments": arguments},
                }
                message_deltas.append({"tool_calls": [{"index": len(choice.tool_calls), **call}]})
                choice.tool_calls.append(call)
            elif kind == "reasoning":
                choice.reasoning += part
                message_deltas.append({"reasoning_content": part})
            else:
                choice.content += part
                message_deltas.append({"content": part})
        choice.finish_reason = delta.finish_reason
        if delta.finish_reason == "stop" and choice.tool_calls:
            choice.finish_reason = "tool_calls"
        return message_deltas

    def chunks(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        message_deltas, choice = self.parse_delta(index, delta), self.choices[index]
        if not choice.started:
            choice.started = True
            message_deltas = [{"role": "assistant", "content": ""}, *message_deltas]
        logprobs = self.format_logprobs(delta)
        if logprobs and not message_deltas:  # tokens whose text is held back
            message_deltas = [{}]
        choices = [
            {"index": index, "delta": message_delta, "logprobs": None, "finish_reason": None}
            for message_delta in message_deltas
        ]
        if logprobs:
            choices[-1]["logprobs"] = {"content": logprobs, "refusal": None}
        if choice.finish_reason:
            finish = {"index": index, "delta": {}, "logprobs": None}
            choices.append(finish | {"finish_reason": choice.finish_reason})
        return [self.chunk([each]) for each in choices]

    def add_delta(self, index: int, delta: Delta) -> None:
        self.parse_delta(index, delta)
        self.choices[index].logprobs += self.format_logprobs(delta)

    def response(self) -> dict[str, Any]:
        choices = []
        for index, choice in enumerate(self.choices):
            # as OpenAI: no content beside tool calls is null, otherwise it is an empty text
            content = choice.content or (None if choice.tool_calls else "")
            message: dict[str, Any] = {"role": "assistant", "content": content}
            if choice.reasoning:
                message["reasoning_content"] = choice.reasoning
            if choice.tool_calls:
                message["tool_calls"] = choice.tool_calls
            logprobs = {"content": choice.logprobs, "refusal": None}
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": logprobs if self.body.logprobs else None,
                    "finish_reason": choice.finish_reason,
                }
            )
        return self.envelope("chat.completion", choices) | {"usage": self.usage()}

    def format_logprobs(self, delta: Delta) -> list[dict[str, Any]]:
        if not self.body.logprobs:
            return []

        def entry(token: int, logprob: float) -> dict[str, Any]:
            part = list(decode_token_bytes(self.tokenizer, token))
            logprob = max(logprob, MIN_LOGPROB)
            return {"token": self.token_text(token), "logprob": logprob, "bytes": part}

        return [
            entry(token, logprob.logprob) | {"top_logprobs": [entry(*each) for each in logprob.top]}
            for token, logprob in zip(delta.tokens, delta.logprobs, strict=True)
        ]


def call_schema(functions: list[FunctionDefinition]) -> dict[str, Any]:
    """The schema of a call of any of these functions, as the model writes it.

    Raises:
        UserError: the parameters of one hold what cannot be enforced.
    """
    calls, parameters = [], {}
    for number, function in enumerate(functions):
        given = function.parameters or {"type": "object", "properties": {}}
        kind = given.get("type", "object")
        if "object" not in kind:  # one type, or a list of them
            raise UserError(f"the parameters of {function.name} are no object but {kind}")
        if "$ref" not in given:
            given = {**given, "type": "object"}  # and never null
        parameters[str(number)] = moved_below(enforceable(given), f"#/$defs/{number}")
        call = {"name": {"const": function.name}, "arguments": {"$ref": f"#/$defs/{number}"}}
        calls.append(
            {
                "type": "object",
                "properties": call,
                "required": list(call),
                "additionalProperties": False,
            }
        )
    return {"anyOf": calls, "$defs": parameters}


def to_template_message(message: ChatMessage) -> dict[str, Any]:
    """A message of the API as the chat template takes it."""
    result = message.model_dump(exclude_none=True, exclude={"name", "tool_call_id"})
    if message.role == "developer":  # OpenAI's new name of the system role
        result["role"] = "system"
    result.setdefault("content", "")
    if isinstance(message.content, list):
        result["content"] = "".join(part.text for part in message.content)
    return result
