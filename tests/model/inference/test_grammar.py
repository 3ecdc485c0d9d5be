"""Grammars of JSON schemas: replies of random tokens follow them, whatever wrote the schema."""

import datetime
import enum
import ipaddress
import json
from typing import Annotated, Any, Literal, Optional, Union
from uuid import UUID

import jsonschema
import pytest
import torch
from pydantic import AnyUrl, BaseModel, ConfigDict, Field, SecretStr, StringConstraints

from model.errors import UserError
from model.inference.grammar import Grammar, GrammarCompiler
from model.inference.schemas import enforceable, moved_below


class Colour(enum.Enum):
    red = "red"
    blue = "blue"


class Address(BaseModel):
    street: str = Field(min_length=3, max_length=50, description="with number")
    code: str = Field(pattern=r"^\d{5}$")
    place: tuple[float, float] | None = None


class Plain(BaseModel):
    """What people write: nested models, lists, unions, limits, formats."""

    address: Address
    others: list[Address] = Field(min_length=1, max_length=3)
    price: float = Field(ge=0)
    number: UUID
    at: datetime.datetime
    day: datetime.date
    time: datetime.time
    colour: Colour
    age: Optional[int] = None  # noqa: UP045
    words: dict[str, int]
    size: int = Field(gt=0, le=100, multiple_of=5)
    ip: ipaddress.IPv4Address
    some: Literal[1, "two", True, None]
    anything: Any
    page: AnyUrl
    secret: SecretStr


class Node(BaseModel):
    value: int
    next: "Node | None"


class Tree(BaseModel):
    children: list["Tree"]
    name: str


class Number(BaseModel):
    kind: Literal["num"]
    value: float


class Sum(BaseModel):
    kind: Literal["add"]
    left: "Term"
    right: "Term"


Term = Annotated[Union[Sum, Number], Field(discriminator="kind")]  # noqa: UP007
Sum.model_rebuild()


class Formula(BaseModel):
    term: Term


class Keys(BaseModel):
    by_colour: dict[Colour, int]
    by_word: dict[Annotated[str, StringConstraints(pattern="^[a-z]+$")], int]


class Wide(BaseModel):
    model_config = ConfigDict(extra="allow")
    number: int


MODELS = (Plain, Node, Tree, Formula, Keys, Wide)
ZOD = {  # as z.toJSONSchema of zod 4 writes them
    "object": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {
            "mail": {
                "type": "string",
                "format": "email",
                "pattern": r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@"
                r"([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$",
            },
            "whole": {
                "type": "integer",
                "minimum": -9007199254740991,
                "maximum": 9007199254740991,
            },
            "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "never": {"not": {}},
            "pair": {"type": "array", "prefixItems": [{"type": "string"}, {"type": "number"}]},
            "record": {
                "type": "object",
                "propertyNames": {"type": "string", "enum": ["a", "b"]},
                "additionalProperties": {"type": "number"},
                "required": ["a", "b"],
            },
            "either": {
                "oneOf": [
                    {
                        "type": "object",
                        "properties": {"t": {"type": "string", "const": c}, c: {"type": "number"}},
                        "required": ["t", c],
                        "additionalProperties": False,
                    }
                    for c in ("x", "y")
                ]
            },
            "day": {
                "type": "string",
                "format": "date",
                "pattern": r"^[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9])$",
            },
        },
        "required": ["mail", "whole", "maybe", "pair", "record", "either", "day"],
        "additionalProperties": False,
    },
    "intersection": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
            {"type": "object", "properties": {"b": {"type": "number"}}, "required": ["b"]},
        ]
    },
    "draft 7 tuple": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "array",
        "items": [{"type": "integer"}, {"type": "string"}],
        "minItems": 2,
        "maxItems": 2,
    },
}
SCHEMAS = {model.__name__: model.model_json_schema() for model in MODELS} | ZOD


DRAFT = jsonschema.Draft202012Validator


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(tokenizer)


def random_reply(compiler, schema, most: int, seed: int) -> str:
    """What a model with random weights would say under the grammar."""
    grammar = compiler.compile_json_schema(schema, most)
    generator = torch.Generator().manual_seed(seed)
    ids = []
    for _ in range(most):
        ids.append(
            grammar.accept(int(grammar.allowed().float().multinomial(1, generator=generator)))
        )
        if grammar.is_finished or ids[-1] == grammar.eos:
            break
    assert grammar.is_complete
    return compiler.tokenizer.decode([each for each in ids if each != grammar.eos])


def fewest_tokens(compiler, schema) -> int:
    return len(compiler.compile_json_schema(schema, 4000).completion)


@pytest.mark.parametrize("name", SCHEMAS)
def test_random_tokens_follow_the_schema(compiler, name):
    schema, model = SCHEMAS[name], {each.__name__: each for each in MODELS}.get(name)
    least = fewest_tokens(compiler, schema)
    for most, seed in ((least, 0), (least, 1), (least + 150, 2)):
        said = random_reply(compiler, schema, most, seed)
        jsonschema.validators.validator_for(schema, DRAFT)(schema).validate(json.loads(said))
        if model:
            model.model_validate_json(said)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "array", "uniqueItems": True}, '"uniqueItems"'),
        ({"if": {"type": "string"}, "then": {"minLength": 2}}, '"if"|"then"'),
        ({"not": {"type": "string"}}, '"not"'),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, '"oneOf" may overlap'),
        ({"type": "string", "pattern": "^(?=a)b$"}, "looks ahead"),
        ({"type": "string", "format": "hexagram"}, "hexagram"),
        ({"$ref": "#/$defs/Gone"}, "Gone"),
        ({"$ref": "https://example.com/a"}, "example.com/a"),
        ({"type": "soup"}, "soup"),
    ],
)
def test_what_cannot_be_enforced_is_named(compiler, schema, words):
    with pytest.raises(UserError, match=words):
        compiler.compile_json_schema(
            {"type": "object", "properties": {"x": schema}, "required": ["x"]}
            | ({"$defs": {}} if "$ref" in schema else {}),
            500,
        )


def test_an_alternative_that_cannot_be_enforced_is_left_out(compiler):
    schema = {"anyOf": [{"type": "array", "uniqueItems": True}, {"type": "null"}]}
    assert random_reply(compiler, schema, 20, 0) == "null"


def test_a_schema_without_a_finite_reply_is_refused(compiler):
    endless = {"type": "object", "properties": {"n": {"$ref": "#"}}, "required": ["n"]}
    with pytest.raises(UserError, match="no reply"):
        compiler.compile_json_schema(endless, 300)


def test_objects_are_closed_where_they_list_properties():
    listed = {"type": "object", "properties": {"a": {"type": "object"}}}
    closed = enforceable(listed)
    assert closed["additionalProperties"] is False
    assert "additionalProperties" not in closed["properties"]["a"]
    assert enforceable({**listed, "additionalProperties": True})["additionalProperties"] is True


def test_references_are_found_in_a_schema_that_was_moved(compiler):
    inner = Node.model_json_schema()
    outer = {
        "type": "object",
        "properties": {"node": {"$ref": "#/$defs/0"}},
        "required": ["node"],
        "$defs": {"0": moved_below(inner, "#/$defs/0")},
    }
    said = json.loads(random_reply(compiler, outer, 100, 0))
    Node.model_validate(said["node"])


def test_a_complete_reply_is_finished_without_another_token(compiler):
    grammar: Grammar = compiler.compile_json_schema({"const": "a"}, 10)
    for token in list(grammar.completion):
        assert not grammar.is_finished
        grammar.accept(token)
    assert grammar.is_finished and grammar.is_complete


def test_a_reply_is_completed_where_the_compiler_gives_up(compiler):
    """Some grammars reach one of its limits in the middle of a reply: there it takes no tokens."""
    schema = Plain.model_json_schema()
    for given in range(1, 40, 6):
        grammar, tokens = compiler.compile_json_schema(schema, 600), []
        while len(tokens) < given:
            tokens.append(grammar.accept(int(grammar.allowed().nonzero()[-1])))
        grammar.matcher.consume_token(int((~grammar.allowed()).nonzero()[0]))
        assert grammar.matcher.is_error()
        while not grammar.is_finished:
            tokens.append(grammar.accept(int(grammar.allowed().nonzero()[0])))
        assert grammar.is_complete
        jsonschema.validate(json.loads(compiler.tokenizer.decode(tokens)), schema)


def test_a_copy_is_a_reply_of_its_own(compiler):
    first = compiler.compile_json_schema({"enum": ["left", "right"]}, 20)
    other, replies = first.copy(), []
    for grammar, choice in ((first, 0), (other, -1)):
        tokens = []
        while not grammar.is_finished:
            tokens.append(grammar.accept(int(grammar.allowed().nonzero()[choice])))
        replies.append(json.loads(compiler.tokenizer.decode(tokens)))
    assert sorted(replies) == ["left", "right"]
