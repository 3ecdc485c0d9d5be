"""pydantic-ai, by chats and by /v1/responses: tools, streams, output by tool and by schema."""

import pytest
from scripted import HELLO, WEATHER


def run(url, kind):
    from pydantic import BaseModel
    from pydantic_ai import Agent, NativeOutput, ToolOutput
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    kinds = {"responses": OpenAIResponsesModel, "chat": OpenAIChatModel}
    provider = OpenAIProvider(base_url=url, api_key="none")
    model = kinds[kind]("minimind", provider=provider)

    class Address(BaseModel):
        street: str

    class Person(BaseModel):
        name: str
        addresses: list[Address]

    cities = []
    agent = Agent(model)

    @agent.tool_plain
    def get_weather(city: str) -> str:
        """The weather of a city."""
        cities.append(city)
        return "sunny"

    hello = Agent(model, instructions="Be brief.").run_sync("Hi")
    answer = agent.run_sync("the weather in Paris?")
    again = agent.run_sync("and the weather now?", message_history=answer.all_messages())
    streamed = Agent(model).run_stream_sync("Hi")
    pieces = list(streamed.stream_text(delta=True, debounce_by=None))
    outputs = [
        isinstance(Agent(model, output_type=way(Person)).run_sync("Hi").output, Person)
        for way in (ToolOutput, NativeOutput)
    ]
    return dict(
        hello=hello.output,
        weather=[answer.output, again.output],
        cities=cities,
        pieces=pieces,
        outputs=outputs,
    )


@pytest.mark.parametrize("kind", ["chat", "responses"])
def test_pydantic_ai(engine, server, kind):
    said = engine.call(run, server.url, kind)
    assert said["hello"] == "".join(said["pieces"]) == HELLO
    assert said["weather"] == [WEATHER, WEATHER] and said["cities"] == ["Paris", "Paris"]
    assert all(said["outputs"])
