"""JSON schemas as people's libraries write them → what the grammar compiler can enforce.

pydantic, zod and OpenAI's SDK write more than llguidance knows. What a grammar can express is
rewritten, so that every reply follows the schema as it was given; the rest is refused by name.
A rewritten schema may allow less than the given one, and never more.

An object that lists its properties and says nothing about others is closed, as in OpenAI's strict
mode: a small model would go on inventing properties until its last token.
"""

import re
from typing import Any

from model.errors import UserError

Schema = dict[str, Any]

WITH_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")  # name → schema
WITH_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
WITH_SCHEMA = ("items", "additionalProperties", "propertyNames", "not")
OPEN_KEYS = ("additionalProperties", "unevaluatedProperties")
ANNOTATIONS = {  # they demand nothing, and the compiler stumbles over some of them beside a $ref
    *("title", "description", "default", "example", "examples", "deprecated", "readOnly"),
    *("writeOnly", "discriminator", "xml", "externalDocs", "$comment", "contentEncoding"),
    *("contentMediaType", "markdownDescription", "enumDescriptions", "$schema"),
}
# They say something about a text that its schema does not demand: any text is valid.
ANNOTATING_FORMATS = {
    *("binary", "byte", "password", "path", "file-path", "directory-path", "textarea", "color"),
    *("int32", "int64", "uint32", "uint64", "float", "double", "float32", "float64"),
    *("decimal", "phone", "markdown", "html", "emoji", "base64", "base64url", "jwt", "unknown"),
}
OCTET = r"(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
IPV4, SIZE4 = rf"{OCTET}(\.{OCTET}){{3}}", r"/(3[0-2]|[12]?[0-9])"
DAY = (
    r"([12][0-9]{3}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)"
    r"|02-(0[1-9]|1[0-9]|2[0-8]))|[12][0-9](0[48]|[2468][048]|[13579][26])-02-29)"
)
TIME = (
    r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?"
    r"(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
)
# Of formats that the compiler does not know, or for which it takes what other programs refuse (the
# year 0000, a 60th second).
PATTERNS = {
    "date": f"^{DAY}$",
    "time": f"^{TIME}$",
    "date-time": f"^{DAY}T{TIME}$",
    "uuid4": r"^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$",
    "ipv4network": r"^0\.0\.0\.0/(3[0-2]|[12]?[0-9])$",  # no bits may be set behind the prefix
    "ipv4interface": rf"^{IPV4}{SIZE4}$",
    "cidrv4": rf"^{IPV4}{SIZE4}$",
    "ipvanyaddress": rf"^{IPV4}$",
    "ipvanyinterface": rf"^{IPV4}{SIZE4}$",
    "ipvanynetwork": r"^0\.0\.0\.0/(3[0-2]|[12]?[0-9])$",
    "multi-host-uri": r"^[a-z][a-z0-9+]*://[a-z0-9]+(\.[a-z0-9]+)*(:[1-9][0-9]{0,3})?(/[a-z0-9]*)?$",
    "url": r"^https?://[a-z0-9]+(\.[a-z0-9]+)*\.[a-z]{2,}(/[A-Za-z0-9._~-]*)*$",
    "json-string": r'^(-?(0|[1-9][0-9]*)|true|false|null|"[A-Za-z0-9 .,_-]*")$',
    "uri-reference": r"^[A-Za-z0-9._~/-]*$",
    "e164": r"^\+[1-9][0-9]{6,14}$",
    "cuid": r"^c[a-z0-9]{8,30}$",
    "cuid2": r"^[a-z][0-9a-z]*$",
    "ulid": r"^[0-7][0-9A-HJKMNP-TV-Z]{25}$",
    "nanoid": r"^[A-Za-z0-9_-]{21}$",
}
# Patterns that look ahead, which no grammar can, as the libraries write them → one without that.
LOOKING_AHEAD = {
    # pydantic's Decimal
    r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$": r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)$",
    # zod's e-mail
    r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@"
    r"([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$": (
        r"^[A-Za-z0-9_+-]+(\.[A-Za-z0-9_+-]+)*@([A-Za-z0-9][A-Za-z0-9-]*\.)+[A-Za-z]{2,}$"
    ),
}
LOOKAROUND = re.compile(r"\(\?<?[=!]|\\[1-9]")
UNSUPPORTED = {  # keywords that no grammar can express, or that llguidance does not enforce
    *("if", "then", "else", "contains", "dependentRequired", "dependentSchemas", "dependencies"),
    *("unevaluatedItems", "$dynamicRef", "$recursiveRef", "contentSchema"),
}


def enforceable(schema: Schema) -> Schema:
    """The schema in what the grammar compiler knows.

    Raises:
        UserError: it holds something that cannot be enforced, which the message names.
    """
    if not isinstance(schema, dict):
        raise UserError("the schema cannot be followed: it is no JSON object")
    try:
        return Rewriter(schema).rewrite(schema)
    except RecursionError:
        raise refused("it is nested too deeply") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # a text for a list …
        raise refused("it is not in the form of JSON Schema") from error


def moved_below(schema: Schema, place: str) -> Schema:
    """A whole schema as a part of another one, at the JSON pointer `place`: references to its own
    parts ("#/$defs/…") still find them there."""

    def move(value: Any, names: bool = False) -> Any:
        if isinstance(value, list):
            return [move(each) for each in value]
        if not isinstance(value, dict):
            return value
        moved = {}
        for key, each in value.items():
            if key == "$ref" and not names and isinstance(each, str) and each.startswith("#"):
                moved[key] = place + each[1:]
            elif key in ("const", "enum", "default", "examples") and not names:
                moved[key] = each
            else:
                moved[key] = move(each, names=key in WITH_SCHEMAS and not names)
        return moved

    return {key: each for key, each in move(schema).items() if key not in ("$id", "$schema")}


class Rewriter:
    def __init__(self, root: Schema):
        self.root = root
        self.open: set[str] = set()  # references to what allOf extends: it cannot be closed
        self.find_extended(root)

    def find_extended(self, value: Any, extended: bool = False) -> None:
        """Remember the references that stand beside others in an allOf."""
        if isinstance(value, list):
            for each in value:
                self.find_extended(each)
        elif isinstance(value, dict):
            reference = value.get("$ref")
            if isinstance(reference, str) and (extended or "properties" in value):
                if reference not in self.open:
                    self.open.add(reference)
                    self.find_extended(self.resolve(reference), extended=True)
            parts = value.get("allOf")
            several = isinstance(parts, list) and (len(parts) > 1 or "properties" in value)
            for key, each in value.items():
                if key in WITH_LISTS and isinstance(each, list):
                    for part in each:
                        self.find_extended(part, extended or (key == "allOf" and several))
                else:
                    self.find_extended(each)

    def resolve(self, reference: str) -> Any:
        """What a reference within this schema names; UserError if that is nothing."""
        value: Any = self.root
        if not reference.startswith("#"):
            raise refused(f"$ref {reference!r} names another document")
        if not reference.startswith("#/"):
            return value if reference == "#" else {}  # an anchor: the compiler finds it
        for part in reference[2:].split("/"):
            part = part.replace("~1", "/").replace("~0", "~").replace("%24", "$")
            if isinstance(value, list) and part.isdigit() and int(part) < len(value):
                value = value[int(part)]
            elif isinstance(value, dict) and part in value:
                value = value[part]
            else:
                raise refused(f"$ref {reference!r} names nothing")
        return value

    def rewrite(self, schema: Any, close: bool = True) -> Any:
        """A schema with all its parts.

        Args:
            close: objects that list their properties have no others.
        """
        if not isinstance(schema, dict):
            return schema
        is_root = schema is self.root
        for key in UNSUPPORTED & schema.keys():
            raise refused(f'"{key}" is not supported')
        if schema.get("contentMediaType") == "application/json":
            schema = {"format": "json-string", **schema}
        schema = {
            key: value
            for key, value in schema.items()
            if key not in ANNOTATIONS and not key.startswith("x-")
        }
        if isinstance(schema.get("oneOf"), list) and "anyOf" not in schema:
            if not self.exclude_each_other(schema["oneOf"]):
                raise refused('the alternatives of a "oneOf" may overlap; "anyOf" allows that')
            schema["anyOf"] = schema.pop("oneOf")
        self.simplify_lists(schema)
        self.simplify_objects(schema)
        self.simplify_texts(schema)
        if schema.pop("nullable", None) is True and "anyOf" not in schema:  # OpenAPI 3.0
            rest = {k: v for k, v in schema.items() if k not in ("$defs", "definitions")}
            kept = {k: v for k, v in schema.items() if k in ("$defs", "definitions")}
            return self.rewrite({**kept, "anyOf": [rest, {"type": "null"}]}, close)
        if "not" in schema:
            if schema["not"] not in ({}, True):
                raise refused('"not" is not supported')
            return False  # nothing is valid: zod's never
        if schema.get("uniqueItems") is False:
            del schema["uniqueItems"]
        elif "uniqueItems" in schema:
            raise refused('"uniqueItems" is not supported (a list may repeat its items)')
        combined = any(key in schema for key in ("allOf", "anyOf", "oneOf", "$ref"))
        if close and not combined and {"properties", "patternProperties"} & schema.keys():
            schema.setdefault("type", "object")
            if not any(key in schema for key in OPEN_KEYS):
                schema["additionalProperties"] = False
        if schema.get("unevaluatedProperties") is False and not combined:
            del schema["unevaluatedProperties"]
            schema.setdefault("additionalProperties", False)
        several = len(schema.get("allOf") or ()) > 1 or "properties" in schema
        result: dict[str, Any] = {}
        for key, value in schema.items():
            if is_root and key in ("$defs", "definitions") and isinstance(value, dict):
                result[key] = {
                    name: self.rewrite_definition(each, f"#/{key}/{name}")
                    for name, each in value.items()
                }
            elif key in WITH_SCHEMAS and isinstance(value, dict):
                result[key] = {name: self.rewrite(each) for name, each in value.items()}
            elif key in ("anyOf", "oneOf") and isinstance(value, list):
                result[key] = self.rewrite_alternatives(value, close and "properties" not in schema)
            elif key == "allOf" and isinstance(value, list):
                result[key] = [self.rewrite(each, close and not several) for each in value]
            elif key in WITH_LISTS and isinstance(value, list):
                result[key] = [self.rewrite(each) for each in value]
            elif key in WITH_SCHEMA:
                result[key] = self.rewrite(value)
            else:
                result[key] = value
        return result

    def rewrite_definition(self, schema: Any, pointer: str) -> Any:
        """A definition; one that nothing asks for may hold what cannot be enforced."""
        try:
            return self.rewrite(schema, close=pointer not in self.open)
        except UserError as error:
            if f"'{pointer}'" in repr(self.root) or f'"{pointer}"' in repr(self.root):
                raise error
            return False

    def rewrite_alternatives(self, schemas: list[Any], close: bool) -> list[Any]:
        """Those of the alternatives that can be enforced: a reply may be any one of them."""
        kept, refusal = [], None
        for each in schemas:
            try:
                kept.append(self.rewrite(each, close))
            except UserError as error:
                refusal = error
        if refusal and not kept:
            raise refusal
        return kept

    def exclude_each_other(self, schemas: list[Any]) -> bool:
        """Whether no value can follow two of the schemas: their types differ, or objects tell
        themselves apart by a required property."""
        parts = [self.without_references(each) for each in schemas]
        for number, one in enumerate(parts):
            for other in parts[:number]:
                pairs: list[tuple[dict[str, Any], ...]] = [(one, other)]
                for name in set(one.get("required") or ()) & set(other.get("required") or ()):
                    properties = (each.get("properties") or {} for each in (one, other))
                    pairs.append(tuple(self.without_references(p.get(name)) for p in properties))
                same_type = types_of(one) & types_of(other)
                if same_type and not any(differ(*pair) for pair in pairs):
                    return False
        return True

    def without_references(self, schema: Any) -> Schema:
        for _ in range(20):
            if not (isinstance(schema, dict) and isinstance(schema.get("$ref"), str)):
                break
            schema = self.resolve(schema["$ref"])
        return schema if isinstance(schema, dict) else {}

    def simplify_lists(self, schema: Schema) -> None:
        if isinstance(schema.get("items"), list):  # how drafts before 2020 write tuples
            schema["prefixItems"] = schema["items"]
            schema["items"] = schema.pop("additionalItems", True)
        schema.pop("additionalItems", None)

    def simplify_objects(self, schema: Schema) -> None:
        names = schema.pop("propertyNames", None)
        if not isinstance(names, dict):
            return
        names = self.without_references(names)
        values = schema.pop("additionalProperties", True)
        enum = names.get("enum", [names["const"]] if "const" in names else None)
        if enum is not None:
            listed = {str(name): values for name in enum}
            schema["properties"] = {**listed, **(schema.get("properties") or {})}
            schema["additionalProperties"] = False
            return
        rest = names.keys() - {"type", "title", "description", "minLength", "maxLength", "pattern"}
        if rest:
            raise refused(f'"propertyNames" with "{min(rest)}" is not supported')
        least, most = names.get("minLength", 0), names.get("maxLength", "")
        pattern = names.get("pattern")
        if pattern is None and (least or most != ""):
            pattern = f"^[A-Za-z0-9_ -]{{{least},{most}}}$"
        elif pattern is not None and (least or most != ""):
            raise refused('"propertyNames" with both "pattern" and a length is not supported')
        if pattern is None:
            schema["additionalProperties"] = values
        else:
            schema["patternProperties"] = {self.plain_pattern(pattern): values}
            schema["additionalProperties"] = False

    def simplify_texts(self, schema: Schema) -> None:
        form = schema.get("format")
        if isinstance(form, str):
            if form in ANNOTATING_FORMATS:
                del schema["format"]
            elif form in PATTERNS and "pattern" not in schema:
                schema["pattern"] = PATTERNS[schema.pop("format")]
            elif form in PATTERNS and form not in ("date", "time", "date-time"):
                del schema["format"]  # zod writes both, and the pattern says more
        if isinstance(schema.get("pattern"), str):
            if LOOKAROUND.search(schema["pattern"]) and schema.get("format") == "email":
                del schema["format"]  # as narrow as what the pattern becomes
            schema["pattern"] = self.plain_pattern(schema["pattern"])

    def plain_pattern(self, pattern: str) -> str:
        pattern = LOOKING_AHEAD.get(pattern, pattern)
        if LOOKAROUND.search(pattern):
            raise refused(f'the "pattern" {pattern!r} looks ahead or back, which is not supported')
        return pattern


def values_of(schema: Schema) -> list[Any] | None:
    return [schema["const"]] if "const" in schema else schema.get("enum")


def differ(one: Schema, other: Schema) -> bool:
    """Whether the schemas list their values, and have none in common."""
    ours, theirs = values_of(one), values_of(other)
    return ours is not None and theirs is not None and not any(each in theirs for each in ours)


def types_of(schema: Schema) -> set[str]:
    """The types of a schema's values; integers are numbers too."""
    values = values_of(schema)
    if values is not None:
        names = {bool: "boolean", int: "number", float: "number", str: "string", list: "array"}
        return {names.get(type(v), "null" if v is None else "object") for v in values}
    types = schema.get("type", ["object", "array", "string", "number", "boolean", "null"])
    types = [types] if isinstance(types, str) else types
    return {"number" if each == "integer" else each for each in types}


def refused(reason: str) -> UserError:
    return UserError(f"the schema cannot be followed: {reason}")
