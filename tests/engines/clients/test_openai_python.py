"""OpenAI's own client for Python: chats, streams, tools, structured output, responses."""

from scripted import CALL, HELLO, WEATHER


def chat(url):
    import openai
    from pydantic import BaseModel

    client = openai.OpenAI(base_url=url, api_key="none")
    hello = dict(model="minimind", messages=[{"role": "user", "content": "Hi"}])
    whole = client.chat.completions.create(**hello).choices[0].message.content
    with client.chat.completions.stream(**hello) as stream:
        streamed = "".join(event.delta for event in stream if event.type == "content.delta")

    class Address(BaseModel):
        street: str
        number: int

    class Person(BaseModel):
        name: str
        addresses: list[Address]

    parsed = client.chat.completions.parse(**hello, response_format=Person, temperature=0)
    person = parsed.choices[0].message.parsed
    tool = openai.pydantic_function_tool(Person)
    forced = client.chat.completions.parse(**hello, tools=[tool], tool_choice="required")
    call = forced.choices[0].message.tool_calls[0].function
    models = [model.id for model in client.models.list()]
    return dict(
        whole=whole,
        streamed=streamed,
        parsed=isinstance(person, Person),
        called=isinstance(call.parsed_arguments, Person),
        reasons=[parsed.choices[0].finish_reason, forced.choices[0].finish_reason],
        models=models,
    )


def test_chat(engine, server):
    said = engine.call(chat, server.url)
    assert said["whole"] == said["streamed"] == HELLO
    assert said["parsed"] and said["called"]
    assert said["reasons"] == ["stop", "tool_calls"]
    assert said["models"] == ["minimind"]


def responses(url):
    import openai
    from pydantic import BaseModel

    class Person(BaseModel):
        name: str
        age: int

    client = openai.OpenAI(base_url=url, api_key="none")
    first = client.responses.create(model="minimind", input="Hi", instructions="Be brief.")
    with client.responses.stream(model="minimind", input="Hi") as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    tool = {
        "type": "function",
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    }
    asked = client.responses.create(model="minimind", input="the weather in Paris?", tools=[tool])
    call = asked.output[0]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    after = client.responses.create(
        model="minimind", input=[result], previous_response_id=asked.id, tools=[tool]
    )
    parsed = client.responses.parse(model="minimind", input="Hi", text_format=Person)
    return dict(
        texts=[first.output_text, final.output_text],
        kinds=kinds,
        usage=first.usage.total_tokens == first.usage.input_tokens + first.usage.output_tokens,
        call=[call.type, call.name, call.arguments],
        after=after.output_text,
        parsed=isinstance(parsed.output_parsed, Person),
    )


def test_responses(engine, server):
    said = engine.call(responses, server.url)
    assert said["texts"] == [HELLO, HELLO]
    assert said["kinds"][0] == "response.created" and said["kinds"][-1] == "response.completed"
    assert said["usage"] and said["parsed"]
    assert said["call"] == ["function_call", CALL["name"], '{"city": "Paris"}']
    assert said["after"] == WEATHER
