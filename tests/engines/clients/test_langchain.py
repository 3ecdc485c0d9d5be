"""LangChain's ChatOpenAI and OpenAI: chats, streams, tools, structured output in its three ways."""

from scripted import CALL, HELLO, WEATHER


def ask(url):
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI, OpenAI
    from pydantic import BaseModel, Field

    class Pet(BaseModel):
        name: str
        kind: str = Field(description="cat, dog …")

    class Person(BaseModel):
        """A person."""

        name: str
        pets: list[Pet]

    @tool
    def get_weather(city: str) -> str:
        """The weather of a city."""
        return "sunny"

    llm = ChatOpenAI(base_url=url, api_key="none", model="minimind", max_tokens=300)
    whole = llm.invoke("Hi")
    pieces = [chunk.content for chunk in llm.stream("Hi")]
    question = HumanMessage("the weather in Paris?")
    called = llm.bind_tools([get_weather]).invoke([question])
    result = ToolMessage("sunny", tool_call_id=called.tool_calls[0]["id"])
    answer = llm.bind_tools([get_weather]).invoke([question, called, result])
    structured = [
        isinstance(llm.with_structured_output(Person, method=method).invoke("Hi"), Person)
        for method in ("json_schema", "function_calling")
    ]
    any_json = llm.with_structured_output(method="json_mode", schema=None).invoke("JSON!")
    responses = ChatOpenAI(base_url=url, api_key="none", model="minimind", use_responses_api=True)
    text = OpenAI(base_url=url, api_key="none", model="minimind", max_tokens=8).invoke("Once")
    return dict(
        whole=whole.content,
        usage=whole.usage_metadata["total_tokens"],
        pieces=pieces,
        calls=[[call["name"], call["args"]] for call in called.tool_calls],
        answer=answer.content,
        structured=[*structured, isinstance(any_json, dict)],
        responses=responses.invoke("Hi").text,
        text=text,
    )


def test_langchain(engine, server):
    said = engine.call(ask, server.url)
    assert said["whole"] == "".join(said["pieces"]) == said["responses"] == HELLO
    assert len(said["pieces"]) > 3 and said["usage"] > 0
    assert said["calls"] == [[CALL["name"], CALL["arguments"]]]
    assert said["answer"] == WEATHER
    assert all(said["structured"])
    assert said["text"]
