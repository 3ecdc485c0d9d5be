"""instructor: a nested pydantic model in each of its ways to ask for one."""

import pytest

MODES = ["TOOLS", "TOOLS_STRICT", "JSON", "JSON_SCHEMA", "MD_JSON"]


def extract(url, mode):
    import instructor
    import openai
    from pydantic import BaseModel

    class Address(BaseModel):
        street: str
        number: int | None = None

    class Person(BaseModel):
        name: str
        age: int
        addresses: list[Address] = []

    client = instructor.from_openai(
        openai.OpenAI(base_url=url, api_key="none"), mode=getattr(instructor.Mode, mode)
    )
    asked = [{"role": "user", "content": "Ann is 30 years old."}]
    settings = dict(model="minimind", messages=asked, max_retries=0, max_tokens=400)
    person = client.chat.completions.create(response_model=Person, **settings)
    return isinstance(person, Person)


@pytest.mark.parametrize("mode", MODES)
def test_instructor(engine, server, mode):
    assert engine.call(extract, server.url, mode)
