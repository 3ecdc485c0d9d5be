"""Request bodies as clients send them → the form that openai_types.py validates.

Clients send more than OpenAI documents, and the same thing in several ways: null for "not set",
content as a list of parts, a call's arguments as an object, fields of vLLM, llama.cpp and ollama.
What means nothing here is dropped, and what can be done is put in OpenAI's form. All else is
refused, here or by the types; an unknown field too, so that no typo is silently ignored.
`--strict_requests 1` leaves all this out.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from scripts.serving.api.errors import ApiError

Json = dict[str, Any]

# Nothing depends on them here, whatever they say.
WITHOUT_EFFECT = {
    *("user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "verbosity"),
    *("prediction", "keep_alive", "options", "priority", "request_id", "cache_salt"),
    *("cache_prompt", "id_slot", "timings_per_token", "reasoning_format", "chat_id", "session_id"),
    *("include_reasoning", "return_progress", "cache_control", "add_special_tokens", "provider"),
}
# Sampling and the like that is not implemented: the values with which they do nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "modalities": (["text"], []),
    "audio": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "typical_p": (0, 1),
    "tfs_z": (0, 1),
    "top_a": (0,),
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "use_beam_search": (False,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (0,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "functions": ([],),
    "function_call": ("auto", "none"),
    "plugins": ([],),
    "transforms": ([],),
    "tool_resources": ({},),
    "web_search_options": (),
    "echo": (False,),  # of a chat
}
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
MALFORMED = (AttributeError, KeyError, TypeError, ValueError)  # a text where a list belongs …
HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair
RESERVED = {"messages", "conversations", "tools", "add_generation_prompt", "chat_template"}


def clean(value: Any) -> Any:
    """The value with U+FFFD for each half of an emoji: half of a surrogate pair is no character,
    and neither a tokenizer nor UTF-8 can write it. Two halves that belong together become one."""
    if isinstance(value, str):
        if value.isascii():
            return value
        whole = value.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
        return HALF.sub("\ufffd", whole)
    if isinstance(value, list):
        return [clean(each) for each in value]
    if isinstance(value, dict):
        return {clean(key): clean(each) for key, each in value.items()}
    return value


def normalize_chat(body: Any) -> Any:
    """The body of /v1/chat/completions."""
    if not isinstance(body, dict):
        return body
    body = common_fields(body)
    refuse_or_drop(body, NEUTRAL)
    messages = body.get("messages")
    if isinstance(messages, list):
        body["messages"] = [normalize_message(message) for message in messages]
    normalize_tools(body)
    normalize_thinking(body)
    if isinstance(body.get("response_format"), dict):
        body["response_format"] = normalize_format(body["response_format"])
    return body


def normalize_completion(body: Any) -> Any:
    """The body of /v1/completions."""
    if not isinstance(body, dict):
        return body
    with_bos = body.get("add_special_tokens")
    body = common_fields(body)
    if with_bos is not None:
        body["add_special_tokens"] = with_bos
    own = {"echo", "max_completion_tokens"}
    refuse_or_drop(body, {name: values for name, values in NEUTRAL.items() if name not in own})
    if "max_completion_tokens" in body:
        body.setdefault("max_tokens", body.pop("max_completion_tokens"))
    return body


def common_fields(body: Json) -> Json:
    body = {
        key: value for key, value in body.items() if value is not None and key not in WITHOUT_EFFECT
    }
    stop = body.get("stop")
    if isinstance(stop, str | list):
        kept = [each for each in ([stop] if isinstance(stop, str) else stop) if each != ""]
        body["stop"] = kept or None
    for name in ("max_tokens", "max_completion_tokens"):
        if body.get(name) == -1:  # llama.cpp, LM Studio: as many as there is room for
            body[name] = 2**31
    if body.get("top_k") == -1:  # vLLM: off
        body["top_k"] = 0
    if "n_predict" in body:
        body.setdefault("max_tokens", body.pop("n_predict"))
    if isinstance(body.get("stream_options"), dict):
        known = ("include_usage", "include_obfuscation")
        options = body["stream_options"]
        body["stream_options"] = {k: options[k] for k in known if options.get(k) is not None}
    return body


def refuse_or_drop(body: Json, neutral: dict[str, tuple[Any, ...]]) -> None:
    """Drop what does nothing; ApiError for a value that would do something."""
    for name in neutral.keys() & body.keys():
        value = body.pop(name)
        if value not in neutral[name]:
            either = " or ".join(json.dumps(each) for each in neutral[name])
            instead = "send tools and tool_choice instead" if name == "functions" else ""
            told = instead or (f"leave it out, or send {either}" if either else "leave it out")
            raise ApiError(f"{name} is not supported here; {told}", param=name)


# -- messages --------------------------------------------------------------------------------------


def normalize_message(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    message = {key: value for key, value in message.items() if value is not None}
    if message.get("role") == "function":  # before there were tools
        message["role"] = "tool"
    if call := message.pop("function_call", None):
        message.setdefault("tool_calls", [{"type": "function", "function": call}])
    for name in ("reasoning", "thinking"):  # as OpenRouter, vLLM and ollama call it
        if isinstance(text := message.pop(name, None), str):
            message.setdefault("reasoning_content", text)
    if not message.get("tool_calls", True):
        del message["tool_calls"]
    if isinstance(message.get("tool_calls"), list):
        message["tool_calls"] = [normalize_call(call) for call in message["tool_calls"]]
    if "content" in message:
        message["content"] = text_of(message["content"])
    elif message.get("role") in ("assistant", "tool"):  # an empty reply, or a tool without result
        message["content"] = message.get("refusal") or ""
    return message


def normalize_call(call: Any) -> Any:
    if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
        return call
    function = dict(call["function"])
    arguments = function.get("arguments")
    if arguments in (None, ""):
        function["arguments"] = "{}"
    elif not isinstance(arguments, str):
        function["arguments"] = json.dumps(arguments, ensure_ascii=False)
    return {**call, "type": "function", "function": function}


def text_of(content: Any) -> Any:
    """The text of a list of parts; ApiError for an image, a sound or a file."""
    parts = [content] if isinstance(content, dict) else content
    if not isinstance(parts, list):
        return content
    texts = []
    for part in parts:
        kind = "text" if isinstance(part, str) else part.get("type", "text")
        if kind not in TEXT_PARTS:
            raise ApiError(f"this model reads text only, and not {kind}", param="messages")
        texts.append(part if isinstance(part, str) else part.get(TEXT_PARTS[kind]) or "")
    return "".join(each if isinstance(each, str) else json.dumps(each) for each in texts)


# -- tools, thinking, structured output ------------------------------------------------------------


def normalize_tools(body: Json) -> None:
    if isinstance(body.get("tools"), list):
        body["tools"] = [normalize_tool(tool) for tool in body["tools"]]
    choice = body.get("tool_choice")
    if choice == "any":  # Mistral's and Anthropic's word for it
        body["tool_choice"] = "required"
    elif isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools") or choice
        names = {name_of(tool) for tool in allowed.get("tools") or ()}
        body["tools"] = [tool for tool in body.get("tools") or () if name_of(tool) in names]
        body["tool_choice"] = allowed.get("mode", "auto")
    elif isinstance(choice, dict) and choice.get("type") == "function":
        body["tool_choice"] = {"type": "function", "function": {"name": name_of(choice)}}
    if not body.get("tools"):
        body.pop("tools", None)
        if body.get("tool_choice") in ("auto", "none"):
            del body["tool_choice"]


def name_of(tool: Any) -> Any:
    """The name of a tool, in the form of chats or in that of /v1/responses."""
    function = tool.get("function") if isinstance(tool, dict) else None
    return (function if isinstance(function, dict) else tool).get("name")


def normalize_tool(tool: Any) -> Any:
    if not isinstance(tool, dict):
        return tool
    if tool.get("type", "function") != "function":
        raise ApiError(f"tools of type {tool['type']!r} do not exist here", param="tools")
    function = tool.get("function", tool)
    if not isinstance(function, dict):
        return tool
    known = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {k: function[k] for k in known if k in function}}


def normalize_thinking(body: Json) -> None:
    """One way to ask for thoughts: chat_template_kwargs. What else stands there is the chat
    template's business."""
    given = body.get("chat_template_kwargs")
    if given is not None and not isinstance(given, dict):
        return
    kwargs = {key: value for key, value in (given or {}).items() if value is not None}
    if found := RESERVED & kwargs.keys():
        name = f"chat_template_kwargs.{min(found)}"
        raise ApiError(f"{name} cannot be set by a request", param=name)
    for name in ("open_thinking", "enable_thinking", "think"):
        if isinstance(body.get(name), bool):
            kwargs.setdefault("open_thinking", body.pop(name))
    reasoning = body.pop("reasoning", None)  # OpenRouter
    effort = body.pop("reasoning_effort", None)
    if isinstance(reasoning, dict):
        effort = effort or reasoning.get("effort")
    if effort in ("none", "minimal"):
        kwargs.setdefault("open_thinking", False)
    body.pop("chat_template_kwargs", None)
    thinking = {k: kwargs.pop(k) for k in ("open_thinking", "enable_thinking") if k in kwargs}
    if thinking or kwargs:
        body["chat_template_kwargs"] = {**thinking, "others": kwargs}


def normalize_format(form: Json) -> Json:
    form = {key: value for key, value in form.items() if value is not None}
    schema = form.pop("schema", None)  # llama.cpp, Together
    if isinstance(schema, dict) and form.get("type") in ("json_object", "json_schema"):
        form = {"type": "json_schema", "json_schema": {"name": "schema", "schema": schema}}
    inner = form.get("json_schema")
    if isinstance(inner, dict):
        known = ("name", "description", "schema", "strict")
        inner = {key: inner[key] for key in known if inner.get(key) is not None}
        form["json_schema"] = {"name": "schema", **inner}
    return {key: form[key] for key in ("type", "json_schema") if key in form}


def lenient(normalize: Callable[[Any], Any], strict: bool) -> Callable[[Any], Any]:
    """What a request passes before it is validated."""

    def tidy(body: Any) -> Any:
        body = clean(body)
        try:
            return normalize(body)
        except MALFORMED:  # the types say what is wrong with it, and where
            return body

    return clean if strict else tidy
