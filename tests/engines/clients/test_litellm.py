"""litellm: chats, streams, tools, structured output and text, as openai/minimind."""

from scripted import CALL, HELLO


def ask(url):
    import litellm
    from pydantic import BaseModel

    class Person(BaseModel):
        name: str
        age: int

    litellm.drop_params = False
    base = dict(model="openai/minimind", api_base=url, api_key="none", max_tokens=200)
    hello = dict(**base, messages=[{"role": "user", "content": "Hi"}])
    whole = litellm.completion(**hello)
    pieces = [c.choices[0].delta.content or "" for c in litellm.completion(**hello, stream=True)]
    parsed = litellm.completion(**hello, response_format=Person).choices[0]
    tool = {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
    question = [{"role": "user", "content": "the weather in Paris?"}]
    called = litellm.completion(**base, messages=question, tools=[tool]).choices[0]
    call = called.message.tool_calls[0].function
    everything = litellm.completion(
        **hello, n=1, seed=1, stop=["§"], user="me", logit_bias={}, top_p=1, presence_penalty=0
    )
    responses = litellm.responses(model="openai/minimind", input="Hi", api_base=url, api_key="none")
    text = litellm.text_completion(
        model="text-completion-openai/minimind", prompt="Once", api_base=url, api_key="none"
    )
    return dict(
        whole=whole.choices[0].message.content,
        pieces=pieces,
        person=bool(Person.model_validate_json(parsed.message.content)),
        call=[call.name, json.loads(call.arguments), called.finish_reason],  # noqa: F821
        everything=everything.choices[0].message.content,
        responses=responses.output[0].content[0].text,
        text=text.choices[0].text,
    )


def test_litellm(engine, server):
    said = engine.call(ask, server.url)
    assert said["whole"] == "".join(said["pieces"]) == said["everything"] == HELLO
    assert said["responses"] == HELLO and said["text"] and said["person"]
    assert said["call"] == [CALL["name"], CALL["arguments"], "tool_calls"]
