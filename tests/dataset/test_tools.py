"""dataset/tools: right results, and for everything else an error text, never a crash."""

import json
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import pytest

from dataset.grading import contains
from dataset.tools import mock
from dataset.tools.call import call_tool, can_run


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


# -- the tools of agent data -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, arguments, result",
    [
        ("calculate_math", {"expression": "93 * 16"}, {"result": 1488}),
        (
            "unit_converter",
            {"value": "26", "from_unit": "Miles", "to_unit": "公里"},
            {"result": 41.8429},
        ),
        ("unit_converter", {"value": 212, "from_unit": "°F", "to_unit": "C"}, {"result": 100}),
        (
            "get_current_time",
            {},
            {"datetime": "2025-01-01 14:30:00", "timezone": "Asia/Shanghai"},
        ),
        (
            "get_current_time",
            {"timezone": "America/New_York"},
            {"datetime": "2025-01-01 01:30:00", "timezone": "America/New_York"},
        ),
        (
            "get_exchange_rate",
            {"from_currency": "eur", "to_currency": "美元"},
            {"from": "EUR", "to": "USD", "rate": 1.087},
        ),
        (
            "translate_text",
            {"text": "谢谢！", "target_language": "English"},
            {"translated_text": "Thank you"},
        ),
        (
            "translate_text",
            {"text": "good morning", "target_language": "中文"},
            {"translated_text": "早上好"},
        ),
        (
            "translate_text",
            {"text": "a boat", "target_language": "French"},
            {"translated_text": "[French] a boat"},
        ),
        ("text_length", {"text": "床前明月光"}, {"length": 5}),
    ],
)
def test_results_of_the_mock_tools(name, arguments, result):
    assert called(name, arguments) == result


@pytest.mark.parametrize(
    "name, arguments, gt",
    [
        ("calculate_math", {"expression": "12*12"}, "144"),
        ("unit_converter", {"value": 100, "from_unit": "km", "to_unit": "miles"}, "62.1371"),
        ("get_current_weather", {"location": "北京"}, "28"),
        ("get_current_time", {}, "14:30"),
        ("get_exchange_rate", {"from_currency": "USD", "to_currency": "CNY"}, "7.21"),
        ("translate_text", {"text": "你好世界", "target_language": "english"}, "Hello World"),
    ],
)
def test_results_are_those_that_the_data_expect(name, arguments, gt):
    """A reply that repeats the result contains the "gt" of agent_rl.jsonl."""
    assert contains(call_tool(name, arguments).text, gt)


def test_made_up_results_are_the_same_everywhere():
    for city in ("Paris", "北京", "\ud800", ""):
        weather = called("get_current_weather", {"location": city})
        assert list(weather) == ["city", "temperature", "humidity", "condition"]
        assert weather == called("get_current_weather", {"location": city})
    paris = {"city": "Paris", "temperature": "8°C", "humidity": "37%", "condition": "cloudy"}
    assert called("get_current_weather", {"location": "Paris"}) == paris
    drawn = {called("random_number", {"min": 1, "max": n})["result"] for n in range(1, 50)}
    assert len(drawn) > 10 and min(drawn) >= 1
    assert called("random_number", {"min": 7, "max": "7"}) == {"result": 7}


@pytest.mark.parametrize(
    "zone", ["", "Mars", "Asia", "../etc/passwd", "/etc/passwd", "a\0", "\ud800"]
)
def test_an_unknown_time_zone_is_an_error(zone):
    assert "is unknown" in called("get_current_time", {"timezone": zone})["error"]


def test_times_without_a_database_of_zones(monkeypatch):
    def missing(name):
        raise ZoneInfoNotFoundError(name)

    monkeypatch.setattr(mock, "ZoneInfo", missing)
    assert (
        called("get_current_time", {"timezone": "Asia/Tokyo"})["datetime"] == "2025-01-01 15:30:00"
    )
    for zone, hours in mock.OFFSETS.items():  # the table agrees with the database
        assert mock.MOMENT.astimezone(ZoneInfo(zone)).utcoffset() == timedelta(hours=hours)


@pytest.mark.parametrize(
    "schema, arguments, kind",
    [
        ({"name": "get_current_time"}, {}, None),
        ({"name": "get_current_time", "parameters": {}}, {}, None),
        ({"name": "get_current_time", "parameters": {"required": []}}, {"timezone": None}, None),
        (
            {"name": "get_current_time", "parameters": {"required": ["timezone"]}},
            {},
            "bad_arguments",
        ),
        ({"name": "get_current_time", "parameters": {"properties": {"timezone": "?"}}}, {}, None),
        ({"function": {"name": "get_current_time"}}, {"zone": "UTC"}, "bad_arguments"),
    ],
)
def test_schemas_are_meant_as_they_are_written(schema, arguments, kind):
    name = "get_current_time"
    assert call_tool(name, arguments, [name], {name: schema}).error == kind


def test_a_default_of_the_data_fills_in():
    timezone = {"type": "string", "default": "Asia/Tokyo"}
    schema = {"name": "get_current_time", "parameters": {"properties": {"timezone": timezone}}}
    told = call_tool("get_current_time", "{}", schemas={"get_current_time": schema}).text
    assert json.loads(told)["timezone"] == "Asia/Tokyo"


def test_which_tools_can_be_run():
    assert can_run("get_exchange_rate") and not can_run("weather")
    for properties, able in ({"from_currency": {}}, True), ({"source": {}}, False), (None, True):
        schema = {"name": "get_exchange_rate", "parameters": {"properties": properties}}
        assert can_run("get_exchange_rate", schema) is able
