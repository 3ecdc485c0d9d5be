"""openai-agents, by /v1/responses (its default) and by chats: tools, streams, output types."""

import pytest
from scripted import HELLO, WEATHER


def run(url, kind):
    import asyncio

    import openai
    from agents import (
        Agent,
        ModelSettings,
        OpenAIChatCompletionsModel,
        OpenAIResponsesModel,
        Runner,
        function_tool,
        set_tracing_disabled,
    )
    from pydantic import BaseModel

    set_tracing_disabled(True)
    kinds = {"responses": OpenAIResponsesModel, "chat": OpenAIChatCompletionsModel}
    client = openai.AsyncOpenAI(base_url=url, api_key="none")
    model = kinds[kind](model="minimind", openai_client=client)
    cities = []

    @function_tool
    def get_weather(city: str) -> str:
        """The weather of a city."""
        cities.append(city)
        return "sunny"

    class Address(BaseModel):
        street: str

    class Person(BaseModel):
        name: str
        address: Address | None

    async def all_of_it():
        plain = Agent(name="A", instructions="Be brief.", model=model)
        hello = (await Runner.run(plain, "Hi")).final_output
        pieces = []
        streamed = Runner.run_streamed(plain, "Hi")
        async for event in streamed.stream_events():
            if (
                event.type == "raw_response_event"
                and event.data.type == "response.output_text.delta"
            ):
                pieces.append(event.data.delta)
        agent = Agent(name="B", model=model, tools=[get_weather])
        first = await Runner.run(agent, "the weather in Paris?")
        again = Runner.run_streamed(
            agent, first.to_input_list() + [{"role": "user", "content": "and the weather now?"}]
        )
        async for _ in again.stream_events():
            pass
        settings = ModelSettings(max_tokens=200)
        typed = Agent(name="C", model=model, output_type=Person, model_settings=settings)
        person = (await Runner.run(typed, "Hi")).final_output
        return dict(
            hello=hello,
            pieces=pieces,
            weather=[first.final_output, again.final_output],
            cities=cities,
            person=isinstance(person, Person),
        )

    return asyncio.run(all_of_it())


@pytest.mark.parametrize("kind", ["responses", "chat"])
def test_openai_agents(engine, server, kind):
    said = engine.call(run, server.url, kind)
    assert said["hello"] == "".join(said["pieces"]) == HELLO
    assert len(said["pieces"]) > 3
    assert said["weather"] == [WEATHER, WEATHER] and said["cities"] == ["Paris", "Paris"]
    assert said["person"]
