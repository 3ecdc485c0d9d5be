"""The tools that MiniMind's agent data offers (agent_rl.jsonl, agent_rl_math.jsonl), as mocks: the
same call has the same result on every machine and on every day, so that rewards can be repeated.

calculate_math and unit_converter are right: they share the calculator and the units of builtin.py.
Weather, time and rates are made up, and beyond a few phrases a translation is marked and not made.
Where the published data say what such a tool answers, the tables below say the same: it is 14:30 in
Shanghai and 28 °C in Beijing, and a dollar costs 7.21 yuan.
"""

import zlib
from datetime import datetime, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

from dataset.text import is_chinese
from dataset.tools.builtin import (
    TEMPERATURE,
    UNITS,
    ToolError,
    by_name,
    calculator,
    convert_units,
    plain,
    tool,
)

MOMENT = datetime(2025, 1, 1, 6, 30, tzinfo=timezone.utc)
# hours from UTC at that moment, for machines without a database of time zones
OFFSETS = {
    **{"UTC": 0, "GMT": 0, "Europe/London": 0, "Europe/Berlin": 1, "Europe/Paris": 1},
    **{"Europe/Moscow": 3, "Asia/Dubai": 4, "Asia/Shanghai": 8, "Asia/Hong_Kong": 8},
    **{"Asia/Singapore": 8, "Asia/Tokyo": 9, "Asia/Seoul": 9, "Australia/Sydney": 11},
    **{"America/New_York": -5, "America/Chicago": -6, "America/Los_Angeles": -8},
}
CONDITIONS = {"en": ("sunny", "cloudy", "rainy", "windy"), "zh": ("晴", "多云", "小雨", "大风")}
TEMPERATURES = {"北京": 28, "beijing": 28}  # °C; elsewhere they follow from the name
YUAN = {  # what a unit of the currency costs
    **{"CNY": 1.0, "USD": 7.21, "EUR": 7.84, "GBP": 9.15, "CHF": 8.2, "JPY": 0.048, "HKD": 0.93},
    **{"TWD": 0.22, "KRW": 0.0053, "SGD": 5.4, "AUD": 4.7, "CAD": 5.2, "NZD": 4.3, "INR": 0.086},
    **{"RUB": 0.08, "BRL": 1.25, "THB": 0.21, "SEK": 0.69},
}
CURRENCY_NAMES = {"RMB": "CNY", "人民币": "CNY", "美元": "USD", "欧元": "EUR", "英镑": "GBP"}
CURRENCY_NAMES |= {"日元": "JPY", "港币": "HKD", "韩元": "KRW"}
PHRASES = (
    *(("你好世界", "Hello World"), ("你好", "Hello"), ("谢谢", "Thank you"), ("再见", "Goodbye")),
    *(("早上好", "Good morning"), ("晚安", "Good night"), ("欢迎", "Welcome"), ("猫", "cat")),
    *(
        ("今天天气很好", "The weather is good today"),
        ("我喜欢读书", "I like reading"),
        ("狗", "dog"),
    ),
)
ENGLISH, CHINESE = ("english", "en", "英文", "英语"), ("chinese", "zh", "中文", "汉语")
UNIT_NAMES = {
    **dict(millimeter="mm", millimetre="mm", centimeter="cm", centimetre="cm", meter="m"),
    **dict(metre="m", kilometer="km", kilometre="km", inches="inch", feet="foot", ft="foot"),
    **dict(mi="mile", milligram="mg", gram="g", kilogram="kg", kilo="kg", ton="t", tonne="t"),
    **dict(oz="ounce", lb="pound", lbs="pound", milliliter="ml", millilitre="ml", liter="l"),
    **dict(litre="l", gal="gallon", sec="second", s="second", min="minute", hr="hour", h="hour"),
    **dict(c="celsius", f="fahrenheit", k="kelvin", centigrade="celsius"),
    **{"in": "inch", "°c": "celsius", "°f": "fahrenheit", "℃": "celsius", "℉": "fahrenheit"},
    **{"毫米": "mm", "厘米": "cm", "米": "m", "公里": "km", "千米": "km", "英寸": "inch"},
    **{"英尺": "foot", "英里": "mile", "毫克": "mg", "克": "g", "千克": "kg", "公斤": "kg"},
    **{"吨": "t", "盎司": "ounce", "磅": "pound", "毫升": "ml", "升": "l", "加仑": "gallon"},
    **{"秒": "second", "分钟": "minute", "小时": "hour", "天": "day", "周": "week"},
    **{"摄氏度": "celsius", "华氏度": "fahrenheit", "开尔文": "kelvin"},
}


def mock_number(*of: Any) -> int:
    """A number that looks random, and is the same for the same values."""
    return zlib.crc32(repr(of).encode(errors="surrogatepass"))


def unit_converter(value: float, from_unit: str, to_unit: str) -> dict[str, Any]:
    converted = convert_units(value, unit_name(from_unit), unit_name(to_unit))["result"]
    return {"result": plain(round(converted, 4))}


def unit_name(unit: str) -> str:
    """The name that `convert_units` knows: mile for miles, MI and 英里."""
    unit = unit.strip().lower()
    known = {name for units in (*UNITS, TEMPERATURE) for name in units}
    for name in (unit, unit.removesuffix("s")):
        if name in known or name in UNIT_NAMES:
            return UNIT_NAMES.get(name, name)
    return unit


def weather(location: str) -> dict[str, Any]:
    name = location.strip().casefold()
    number = mock_number(name)
    conditions = CONDITIONS["zh" if is_chinese(location) else "en"]
    return {
        "city": location,
        "temperature": f"{TEMPERATURES.get(name, number % 36 - 2)}°C",
        "humidity": f"{number // 36 % 61 + 30}%",
        "condition": conditions[number // 2196 % len(conditions)],
    }


def time_in(timezone: str) -> dict[str, Any]:
    name = timezone.strip()
    try:
        local = MOMENT.astimezone(ZoneInfo(name))
    except (ValueError, KeyError, OSError):  # no such zone, or no database of them
        if name not in OFFSETS:
            raise ToolError(f"the time zone {name!r} is unknown; such as Asia/Shanghai") from None
        local = MOMENT + timedelta(hours=OFFSETS[name])
    return {"datetime": f"{local:%Y-%m-%d %H:%M:%S}", "timezone": name}


def exchange_rate(from_currency: str, to_currency: str) -> dict[str, Any]:
    codes = [each.strip().upper() for each in (from_currency, to_currency)]
    source, target = (CURRENCY_NAMES.get(code, code) for code in codes)
    for code in (source, target):
        if code not in YUAN:
            raise ToolError(f"the currency {code!r} is unknown; known are {', '.join(YUAN)}")
    rate = plain(float(f"{YUAN[source] / YUAN[target]:.4g}"))
    return {"from": source, "to": target, "rate": rate}


def translate(text: str, target_language: str) -> dict[str, Any]:
    target, source = target_language.strip(), text.strip(" .!。！").casefold()
    for chinese, english in PHRASES:
        if source == chinese and target.casefold() in ENGLISH:
            return {"translated_text": english}
        if source == english.casefold() and target.casefold() in CHINESE:
            return {"translated_text": chinese}
    return {"translated_text": f"[{target}] {text}"}


def random_number(min: float, max: float) -> dict[str, Any]:
    low, high = int(min), int(max)
    if low > high:
        raise ToolError("min must not be larger than max")
    return {"result": low + mock_number(low, high) % (high - low + 1)}


def text_length(text: str) -> dict[str, Any]:
    return {"length": len(text)}


MOCK_TOOLS = by_name(
    tool(
        "calculate_math",
        "Work out a mathematical expression",
        calculator,
        expression=("string", "such as (12 + 5) * 3"),
    ),
    tool(
        "unit_converter",
        "Convert a length, mass, volume, time or temperature",
        unit_converter,
        value=("number", "how many of from_unit"),
        from_unit=("string", "such as km or celsius"),
        to_unit=("string", "such as mile or fahrenheit"),
    ),
    tool(
        "get_current_weather",
        "Weather of a city",
        weather,
        location=("string", "the city, such as Beijing"),
    ),
    tool(
        "get_current_time",
        "Date and time in a time zone",
        time_in,
        timezone=("string", "such as Asia/Shanghai", "Asia/Shanghai"),
    ),
    tool(
        "get_exchange_rate",
        "What a unit of a currency costs in another one",
        exchange_rate,
        from_currency=("string", "such as USD"),
        to_currency=("string", "such as CNY"),
    ),
    tool(
        "translate_text",
        "Translate a text",
        translate,
        text=("string", "what to translate"),
        target_language=("string", "such as English"),
    ),
    tool(
        "random_number",
        "A whole number between two others",
        random_number,
        min=("number", "the smallest"),
        max=("number", "the largest"),
    ),
    tool("text_length", "Number of characters of a text", text_length, text=("string", "any text")),
)
