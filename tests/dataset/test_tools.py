"""dataset/tools/builtin.py: right results, and for everything else an error text, never a crash."""

import json
from datetime import datetime

import pytest

from dataset.tools.builtin import call_tool


def called(name, arguments):
    return json.loads(call_tool(name, arguments).text)


@pytest.mark.parametrize(
    "expression, result",
    [
        ("348 * 27", 9396),
        ("2 + 3 × 4", 14),
        ("（1 + 2）÷ 4", 0.75),
        ("-7 // 2", -4),
        ("2 ^ 10", 1024),
        ("2 ** -1", 0.5),
        ("0.1 + 0.2", 0.3),
        ("sqrt(16) + abs(-2)", 6),
        ("2 * pi", 6.283185307),
        ("10 ** 20", 10**20),
    ],
)
def test_the_calculator_is_right(expression, result):
    assert called("calculator", {"expression": expression}) == {"result": result}


@pytest.mark.parametrize(
    "expression",
    [
        "1 / 0",
        "1 +",
        "",
        "9 ** 9 ** 9",
        "(-8) ** 0.5",
        "2 ** 1e9",
        "1" * 201,
        "1e999",
        "'a' * 3",
        "True + 1",
        "__import__('os').getcwd()",
        "(1).__class__",
        "[1][0]",
        "sqrt(-1)",
        "round(1, 2, 3)",
        "log(2, base=3)",
        "a\0b",
        "(" * 100 + "1" + ")" * 99,
    ],
)
def test_what_is_no_sum_is_an_error(expression):
    assert called("calculator", {"expression": expression}).keys() == {"error"}


@pytest.mark.parametrize(
    "value, source, target, result",
    [
        (3, "km", "m", 3000),
        ("5", "Mile", "km", 8.04672),
        (212, "fahrenheit", "celsius", 100),
        (0, "celsius", "kelvin", 273.15),
        (2, "week", "hour", 336),
        (1, "pound", "g", 453.59237),
    ],
)
def test_units_are_converted(value, source, target, result):
    arguments = {"value": value, "from_unit": source, "to_unit": target}
    assert called("convert_units", arguments) == {"result": result, "unit": target}


def test_the_clock_tells_the_time():
    before = datetime.now().replace(second=0, microsecond=0)
    told = called("clock", {})
    now = datetime.strptime(f"{told['date']} {told['time']}", "%Y-%m-%d %H:%M")
    assert before <= now <= datetime.now()
    assert told["weekday"] == now.strftime("%A")


def test_a_word_is_looked_up():
    assert "text" in called("dictionary", {"word": " Token "})["meaning"]


@pytest.mark.parametrize(
    "name, arguments, told",
    [
        ("calculater", {}, "there is no tool 'calculater'; there are calculator"),
        ("calculator", {}, "calculator needs 'expression': such as 348 * 27"),
        ("calculator", {"expression": 3}, "'expression' must be a text"),
        ("calculator", {"expression": "1", "x": 2}, "calculator takes no 'x'"),
        ("calculator", '{"expression": ', "the arguments are not JSON"),
        ("calculator", "[1]", "the arguments must be a JSON object"),
        ("calculator", "[" * 100_000, "the arguments are not JSON"),
        ("calculator", None, "the arguments must be a JSON object"),
        ("convert_units", {"value": "x", "from_unit": "m", "to_unit": "m"}, "'value' must be a nu"),
        ("convert_units", {"value": 1, "from_unit": "m", "to_unit": "g"}, "different things"),
        ("convert_units", {"value": 1, "from_unit": "ell", "to_unit": "m"}, "'ell' is unknown"),
        ("dictionary", {"word": "cow"}, "'cow' is not in the dictionary"),
    ],
)
def test_a_mistake_is_told_to_the_model(name, arguments, told):
    assert told in called(name, arguments)["error"]


def test_arguments_may_come_as_text():
    assert called("calculator", '{"expression": "6 * 7"}') == {"result": 42}


def test_only_tools_on_offer_can_be_called():
    told, kind = call_tool("clock", {}, offered=["calculator"])
    assert json.loads(told) == {"error": "there is no tool 'clock'; there are calculator"}
    assert kind == "unknown_tool"


@pytest.mark.parametrize(
    "name, arguments, kind",
    [
        ("calculator", {"expression": "1 + 1"}, None),
        ("calculator", {"expression": "1 / 0"}, "failed"),
        ("calculator", {}, "bad_arguments"),
        ("calculator", "{", "bad_arguments"),
        ("convert_units", {"value": "x", "from_unit": "m", "to_unit": "m"}, "bad_arguments"),
        ("weather", {}, "unknown_tool"),
    ],
)
def test_what_went_wrong_has_a_kind(name, arguments, kind):
    assert call_tool(name, arguments).error == kind


def test_a_tool_of_somebodys_data_cannot_be_run():
    assert call_tool("weather", {}, offered=["weather"]).error == "failed"
