"""LlamaIndex's OpenAILike: completions of chats, streams, tools, structured output."""

from scripted import CALL, HELLO


def ask(url):
    from llama_index.core.llms import ChatMessage
    from llama_index.core.tools import FunctionTool
    from llama_index.llms.openai_like import OpenAILike
    from pydantic import BaseModel

    class Address(BaseModel):
        street: str

    class Person(BaseModel):
        name: str
        address: Address

    def get_weather(city: str) -> str:
        """The weather of a city."""
        return "sunny"

    llm = OpenAILike(
        model="minimind",
        api_base=url,
        api_key="none",
        context_window=4096,
        max_tokens=200,
        is_chat_model=True,
        is_function_calling_model=True,
    )
    hello = [ChatMessage(role="user", content="Hi")]
    whole = llm.chat(hello).message.content
    pieces = [part.delta or "" for part in llm.stream_chat(hello)]
    tool = FunctionTool.from_defaults(get_weather)
    asked = llm.chat_with_tools([tool], "the weather in Paris?")
    calls = llm.get_tool_calls_from_response(asked)
    person = llm.as_structured_llm(Person).complete("Hi").raw
    text = (
        OpenAILike(
            model="minimind", api_base=url, api_key="none", max_tokens=5, is_chat_model=False
        )
        .complete("Once")
        .text
    )
    return dict(
        whole=whole,
        pieces=pieces,
        calls=[[call.tool_name, call.tool_kwargs] for call in calls],
        person=isinstance(person, Person),
        text=text,
    )


def test_llama_index(engine, server):
    said = engine.call(ask, server.url)
    assert said["whole"] == "".join(said["pieces"]) == HELLO
    assert said["calls"] == [[CALL["name"], CALL["arguments"]]]
    assert said["person"] and said["text"]
