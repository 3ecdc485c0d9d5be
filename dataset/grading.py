"""Grading an answer against the truth: one reader of texts, of numbers, and of truths.

Rewards (trainer/rl/rewards.py), episodes with tools (tools/loop.py) and evaluations use these
functions, so that what is right in one place is right in all of them.

    read_truth(row, last)        the right answer of a row of data; None if it has none
    truth.score(answer)          from 0 to 1
    grade(truth, answer)         whether two short texts say the same: **Paris.** and paris,
                                 $1,250.00 and 1250
    read_numbers(text)           the numbers in a text, as people and models write them

An empty answer is never right.
"""

import ast
import json
import re
import unicodedata
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from dataset.reply_parser import tagged_answer
from model.errors import UserError

# -- texts -----------------------------------------------------------------------------------------

SIGNS = str.maketrans({**dict.fromkeys("−–—‐‑‒", "-"), "⁄": "/", "∕": "/"})
VULGAR_FRACTION = re.compile("(?<=[0-9])(?=[¼-¾⅐-⅞])")  # 1½ is 1 1/2, not 11/2
SUPERSCRIPT = re.compile("⁻?[⁰¹²³⁴-⁹]+")  # 10² is 10^2, not 102
NARROW_SPACE = re.compile("(?<=[0-9])[\u00a0\u2009\u202f](?=[0-9]{3}(?![0-9]))")
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:[,'’_]\d{3})+(?!,?\d)")
FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
LATEX_GROUP = re.compile(r"\\(?:boxed|fbox|text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
LATEX_MARK = re.compile(r"\\(?:[()\[\],;!:]|left\b|right\b|(?=[$%]))")
MATH = re.compile(r"\$([^$]*)\$")
STRONG = re.compile(r"(?<!\d)(\*\*|__|~~)(?=\S)(.+?)(?<=\S)\1(?!\d)", re.DOTALL)  # not 2**3
EMPHASIS = re.compile(r"(?<![A-Za-z\d*_])([*_`])(?=[^\s*_])(.+?)(?<=\S)\1(?![A-Za-z\d])", re.DOTALL)
LINE_MARK = re.compile(r"^\s*(?:#+|>|[-*•](?=\s))\s*")
QUOTES = "\"'`*_‘’‚‛“”„‟«»‹›「」『』《》〈〉"
NO_STOPS = "%‰‱&@#/\\†‡§¶"  # "other punctuation" of Unicode that ends no sentence


def fold_text(text: str) -> str:
    """Collapse white space, ignore case, and drop one final full stop."""
    text = " ".join(text.split()).casefold()
    return (text[:-1] if text.endswith((".", "。")) else text).strip()


def plain_text(text: str) -> str:
    """The text without what is form alone: fullwidth characters, kinds of minus, separators of
    thousands, Markdown's emphasis, LaTeX's commands."""
    text = VULGAR_FRACTION.sub(" ", NARROW_SPACE.sub(",", text.replace("{,}", ",")))
    text = SUPERSCRIPT.sub(lambda found: "^" + found[0], text)
    text = unicodedata.normalize("NFKC", text).translate(SIGNS)
    text = THOUSANDS.sub(lambda found: re.sub(r"\D", "", found[0]), text)
    text = FRACTION.sub(r"\1/\2", text).replace("\\times", "×").replace("\\cdot", "·")
    text = LATEX_MARK.sub("", LATEX_GROUP.sub(r"\1", LATEX_GROUP.sub(r"\1", text)))
    return EMPHASIS.sub(r"\2", STRONG.sub(r"\2", MATH.sub(r"\1", text)))


def normalize_text(text: str) -> str:
    """`plain_text` without case, white space at length, marks of a line (# > -), quotes around it,
    and punctuation of any language at its end."""
    text = " ".join(LINE_MARK.sub("", plain_text(text)).split()).casefold()
    end = len(text)
    while end and (text[end - 1] in QUOTES or text[end - 1] == " " or is_stop(text[end - 1])):
        end -= 1
    return text[:end].lstrip(QUOTES + "¿¡ ")


def is_stop(character: str) -> bool:
    return unicodedata.category(character) == "Po" and character not in NO_STOPS


def final_answer(text: str, thinking: bool = False) -> str:
    """What a reply says in the end: behind </think>, and between <answer> and </answer> if it has
    these tags; "" if it never stops thinking.

    Args:
        thinking: the prompt ends with <think>, so that the reply begins within the thought.
    """
    _, closed, rest = text.rpartition("</think>")
    if not closed:
        rest = "" if thinking else text.partition("<think>")[0]
    tagged = tagged_answer(rest)
    return (rest.strip() if closed else rest) if tagged is None else tagged


BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
LAST_LINE = re.compile(r"####\s*(\S[^\n]*)\Z")  # as GSM8K marks its answers


def conclusion(text: str) -> str:
    """What a text marks as its result by \\boxed{…} or a last line with ####; else all of it."""
    boxed = BOXED.findall(text)
    last_line = LAST_LINE.search(text.rstrip())
    return boxed[-1] if boxed else last_line[1] if last_line else text


# -- numbers ---------------------------------------------------------------------------------------


class Number(NamedTuple):
    value: float
    percent: bool = False  # 50% is 50 if the other one has no sign of percent, and 0.5 too
    start: int = 0  # its place in `plain_text`, with sign and currency
    end: int = 0

    def equals(self, other: "Number") -> bool:
        """Whether they differ by less than 1e-6."""
        if abs(self.value - other.value) < 1e-6:
            return True
        if self.percent == other.percent:
            return False
        small, large = (self, other) if other.percent else (other, self)
        return abs(small.value - large.value / 100) < 1e-6


DECIMAL = r"(?:\d+(?:\.\d+)?|\.\d+)"
NUMBER = re.compile(
    # an exponent is no number of its own: m^2
    r"(?<![\d.])(?<!\^)(?<!\^-)(?<!\^\{)(?<!\^\{-)(?:"
    r"(?<!/)(?:(?P<whole>\d+) )?(?P<top>\d+(?:\.\d+)?)/(?P<bottom>\d+(?:\.\d+)?)(?![\d/]|\.\d)"
    rf"|(?P<decimal>{DECIMAL})"
    r"(?:(?:e|\s?[x×*·]\s?10(?:\^|\*\*)\{?)(?P<power>[+-]?\d+)\}?|\^\{?(?P<exponent>-?\d+)\}?)?"
    r")(?:\s?(?P<unit>[%万亿]))?",
    re.IGNORECASE,
)
SIGN = re.compile(r"-(?P<money>[$€£¥₩₹]?\s?)\Z|[$€£¥₩₹]\s?(?P<after>-?)\Z")
# a minus behind a number, a letter or a bracket is a subtraction or a hyphen: 12-5, 12 -5, GPT-4
SUBTRACTION = re.compile(r"[A-Za-z\d)\]}%]\Z|[\d)\]}%]\s+\Z")
UNITS = {"万": 1e4, "亿": 1e8}


def read_numbers(text: str) -> list[Number]:
    """The numbers in a text, in their order: 1,250 $1,250.00 １２５０ 1.25e3 1.25×10³ 3/4 1½ −5 50%
    1.2万. In 12-5 they are 12 and 5."""
    text, found = plain_text(text), []
    for match in NUMBER.finditer(text):
        try:
            value = value_of(match)
        except (OverflowError, ZeroDivisionError):
            continue
        start = match.start()
        before = text[max(0, start - 8) : start]
        if sign := SIGN.search(before):
            start -= len(sign[0])
            minus = "-" in sign[0]
            if minus and SUBTRACTION.search(before[: sign.start()]):
                start, minus = start + sign[0].index("-") + 1, False
            value = -value if minus else value
        found.append(Number(value, match["unit"] == "%", start, match.end()))
    return found


def value_of(match: re.Match) -> float:
    if match["top"]:
        value = float(match["whole"] or 0) + float(match["top"]) / float(match["bottom"])
    elif match["power"]:
        value = float(f"{match['decimal']}e{match['power']}")
    else:
        value = float(match["decimal"]) ** float(match["exponent"] or 1)
    value *= UNITS.get(match["unit"] or "", 1.0)
    if value == float("inf"):
        raise OverflowError
    return value


def whole_number(text: str) -> Number | None:
    """The number that a text is, with nothing else but a currency; None if it is none."""
    text = normalize_text(text)
    if len(text) == 1 and unicodedata.numeric(text, None) is not None:
        return Number(unicodedata.numeric(text))  # 九
    numbers = read_numbers(text)
    if len(numbers) != 1:
        return None
    (number,) = numbers
    text = plain_text(text)
    rest = text[: number.start] + text[number.end :]
    return number if rest.strip(" +=元") == "" else None


REMARK = re.compile(r"(?<=\S)\s+\([^()]*[^\W\d_][^()]*\)\W*\Z")  # 1250 (step 2)


def last_number(text: str) -> Number | None:
    """The number that a text ends with: that of its `conclusion`, without a remark in brackets."""
    text = conclusion(text)
    numbers = read_numbers(REMARK.sub("", text)) or read_numbers(text)
    return numbers[-1] if numbers else None


RATING = re.compile(
    rf"(?:score|rating|grade|mark|评分|得分|分数|打分)[^\d\n-]{{0,12}}(-?{DECIMAL})", re.I
)
OUT_OF = re.compile(rf"(-?{DECIMAL})\s*(?:/|out of|of)\s*({DECIMAL})", re.I)
SCALE = re.compile(r"\b0\s*(?:to|[-~到至])\s*10\b|满分\s*(?:为|是)?\s*10", re.I)  # no grade itself


def read_rating(text: str) -> float | None:
    """A judge's grade from 0 to 10 as a number from 0 to 1: 8, 8/10, Score: 8, **8**, 8 out of 10,
    behind a thought or a sentence too. None if there is none."""
    text = SCALE.sub(" ", plain_text(final_answer(text)))
    if matches := OUT_OF.findall(text):
        rating, best = map(float, matches[-1])
    elif match := RATING.search(text):
        rating, best = float(match[1]), 10.0
    else:
        whole, numbers = whole_number(text), read_numbers(text)
        if not whole and not numbers:
            return None
        begins = bool(numbers) and not text[: numbers[0].start].strip()
        number = whole or numbers[0 if begins else -1]
        rating, best = number.value, 100.0 if number.percent else 10.0
    return rating / best if 0 <= rating <= best > 0 else None


# -- grading ---------------------------------------------------------------------------------------


def grade(truth: str, answer: str) -> bool:
    """Whether the answer says the same as the truth, in whatever form: texts after
    `normalize_text`, numbers by their value. False for an empty one."""
    expected, found = (normalize_text(conclusion(each)) for each in (truth, answer))
    if not expected or not found:  # a truth may be punctuation, such as "!"
        return truth.strip() == answer.strip() != ""
    if expected == found or normalize_text(truth) == normalize_text(answer):
        return True
    number, other = whole_number(expected), whole_number(found)
    return number is not None and other is not None and number.equals(other)


def same_number(truth: str, answer: str) -> bool:
    """Whether the last numbers of both are the same."""
    expected, found = last_number(truth), last_number(answer)
    return expected is not None and found is not None and expected.equals(found)


def contains(answer: str, part: str) -> bool:
    """Whether the part stands in the answer: a number by its value, a text as whole words, up to
    what `normalize_text` ignores."""
    if number := whole_number(part):
        return any(number.equals(each) for each in read_numbers(answer))
    answer, part = normalize_text(answer), normalize_text(part)
    if not part:
        return False
    # letters and digits beside it make it another word: cat is not in category, 5 kg not in 1.5 kg
    before = r"(?<![a-z0-9])(?<!\d\.)" if re.match("[a-z0-9]", part) else ""
    after = r"(?![a-z0-9])(?!\.\d)" if re.search("[a-z0-9]$", part) else ""
    return re.search(before + re.escape(part) + after, answer) is not None


@dataclass(frozen=True)
class Truth:
    """What a final answer is compared with."""

    parts: tuple[str, ...]  # at least one, none of them empty
    anywhere: bool = False  # "gt": the parts may stand anywhere in the answer

    @property
    def text(self) -> str:
        return ", ".join(self.parts)

    def score(self, answer: str) -> float:
        """From 0 to 1: the share of its parts that the answer contains; or whether the answer is
        the one part."""
        if self.anywhere:
            return sum(contains(answer, part) for part in self.parts) / len(self.parts)
        return float(grade(self.parts[0], answer))


def read_truth(row: Mapping[str, Any], last: str | None = None) -> Truth | None:
    """The right answer of a row: its "answer"; its "gt", a text or a list of texts that must stand
    in the answer; or the final answer of `last`, the text of its last message. None if all are
    empty: such a row says nothing about what is right.

    Raises:
        UserError: "answer" or "gt" has another form.
    """
    answer, gt = row.get("answer"), row.get("gt")
    if not isinstance(answer, str | int | float | None):
        raise UserError('has an "answer" that is no text and no number')
    if isinstance(gt, str) and gt.lstrip().startswith("["):  # a list in a column of texts
        gt = read_list(gt)
    gt = [None if is_nothing(part) else part for part in (gt if isinstance(gt, list) else [gt])]
    if not all(isinstance(part, str | int | float | None) for part in gt):
        raise UserError('has a "gt" that is no text and no list of texts')
    answer = "" if is_nothing(answer) else str(answer)
    if "</think>" in answer or "</answer>" in answer:
        answer = final_answer(answer)
    if answer.strip():
        return Truth((answer,))
    parts = tuple(str(part) for part in gt if part is not None and str(part).strip())
    if parts:
        return Truth(parts, anywhere=True)
    found = final_answer(last or "")
    return Truth((found,)) if found.strip() else None


def read_list(text: str) -> Any:
    """A list that is written as JSON, or as Python writes it; else the text itself."""
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return read(text)
    return text


def is_nothing(value: Any) -> bool:
    """Whether a cell of a table is empty: None, NaN, or "null" as text."""
    return value is None or value != value or value == "null"
