"""Raw rows → rows to train on, or the reason why one is dropped.

In this order, each by rules written out below:

1. repair: mojibake and broken Unicode (ftfy), control and invisible characters, white space;
2. boilerplate: lines such as "All rights reserved" are removed, and the text if little else stays;
3. filters on length, language, repetition and the share of punctuation;
4. personal data masked: mail addresses, phone, identity and card numbers;
5. control tokens such as <|im_end|> escaped.

On 5: dataset/encoding.py already encodes such names, wherever a person wrote them, as characters;
for other programs that read the file they are also spelt with spaces here, <| im_end |>. Tags such
as <think> stay, since they are part of what an assistant says.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ftfy
import numpy as np

from dataset.forms.messages import Message, says_nothing
from dataset.jsonl import as_line
from dataset.prepare.resumable import ChunkResult
from dataset.prepare.sources import MESSAGES, RawRow, kind_of, to_row
from dataset.prepare.words import hash_ngrams, hash_words, words_of
from dataset.text import language_of
from model.errors import UserError, reading

REPAIR = ftfy.TextFixerConfig(
    uncurl_quotes=False,  # ” is right in Chinese
    fix_character_width=False,  # and so is ，
    unescape_html="auto",
)
REPLACEMENT = "\ufffd"
MAX_DAMAGED = 1e-3  # share of characters that could not be decoded
INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u2060\ufeff\ufff9-\ufffc\ufffe\uffff]")
SPACES = re.compile("[\u00a0\u2000-\u200a\u202f\u205f]")
END_OF_LINE = re.compile(r"[ \t\u3000]+$", re.MULTILINE)
EMPTY_LINES = re.compile(r"\n{3,}")
SIGN = re.compile(r"[^\w\s]|_")
REPEATED_WORDS = 8  # words in the n-grams by which repetition is measured
MAX_BOILERPLATE_LINE = 120  # characters
BOILERPLATE = re.compile(
    r"""(?ix)
    \ball\ rights\ reserved\b | ^\W*(copyright|\(c\)|©) | \b(uses?|accept)\ (all\ )?cookies\b
    | ^\W*(privacy\ policy|terms\ of\ (use|service)|skip\ to\ (main\ )?content)\b
    | \b(subscribe\ to\ our|sign\ up\ for\ our)\b | ^\W*(share|follow\ us)\ on\b
    | \b(enable|requires)\ javascript\b | javascript\ is\ (disabled|required) | ^lorem\ ipsum\b
    | ^\W*(read\ more|advertisement|log\ in|sign\ in|click\ here|back\ to\ top|home)\W*$
    | ^\W*page\ \d+\ of\ \d+\W*$
    | 版权所有 | (未经|不得).{0,12}转载 | 转载请(注明|保留) | ICP\s*(备|证) | 关注.{0,12}公众号
    | 扫.{0,8}二维码 | ^\W*(责任编辑|上一篇|下一篇|相关(阅读|推荐|文章)|来源|分享到)\s*[:：]
    | ^\W*(点击(这里|查看|下载|进入|阅读)|返回(首页|顶部)|友情链接|网站地图|阅读原文|广告)
    """
)
CHATS = ("conversations", "prompts")  # kinds whose rows have "conversations"
CONTROL = re.compile(r"<([|｜])\s*([\w▁ .-]{1,40}?)\s*\1>")


@dataclass
class Filters:
    """The limits within which a row is kept."""

    min_chars: int
    max_chars: int
    languages: list[str]
    max_repetition: float
    max_signs: float
    mask: bool  # personal data


class Dropped(UserError):
    """Why a row is not kept."""


# -- repair ----------------------------------------------------------------------------------------


def repair(text: str) -> str:
    """Undo mojibake, remove invisible characters. Dropped if too much was lost in decoding."""
    if text.isascii() and "&" not in text and text.isprintable():
        return text.strip()
    text = ftfy.fix_text(text, REPAIR)
    if text.count(REPLACEMENT) > max(1, MAX_DAMAGED * len(text)):  # one: where a text was cut off
        raise Dropped("encoding: characters lost")
    text = SPACES.sub(" ", INVISIBLE.sub("", text).replace(REPLACEMENT, ""))
    return EMPTY_LINES.sub("\n\n", END_OF_LINE.sub("", text)).strip("\n ")


def escape_control_tokens(text: str) -> str:
    """Spell control tokens with spaces, <| im_end |>, so that no tokenizer recognises them."""
    return CONTROL.sub(r"<\1 \2 \1>", text)


def without_boilerplate(text: str) -> str:
    """Remove the lines of a web page that are about the page, not its content.

    Only from texts of at least three lines: a single line may be about copyright. Dropped if less
    than half of the text stays.
    """
    lines = text.split("\n")
    if len(lines) < 3:
        return text
    kept = [
        line for line in lines if len(line) > MAX_BOILERPLATE_LINE or not BOILERPLATE.search(line)
    ]
    if len(kept) == len(lines):
        return text
    rest = EMPTY_LINES.sub("\n\n", "\n".join(kept)).strip("\n")
    if len(rest) < len(text) / 2:
        raise Dropped("boilerplate")
    return rest


# -- measures --------------------------------------------------------------------------------------


def repetition(text: str) -> float:
    """Share of a text that is repeated: of its 8-word n-grams, or of the characters of its lines.

    Texts of fewer than 16 words have 0, those of fewer than 4 lines are measured by words only.
    """
    words = words_of(text)
    if len(words) < 2 * REPEATED_WORDS:
        return 0.0
    ngrams = hash_ngrams(hash_words(words), REPEATED_WORDS)
    share = 1 - len(np.unique(ngrams)) / len(ngrams)
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if len(lines) >= 4:
        again = sum(map(len, lines)) - sum(map(len, set(lines)))
        share = max(share, again / sum(map(len, lines)))
    return share


def punctuation_share(text: str) -> float:
    """Share of the visible characters that are neither letters nor digits."""
    visible = len(text) - sum(map(str.isspace, text))
    return len(SIGN.findall(text)) / max(1, visible)


def check(text: str, filters: Filters) -> None:
    """Dropped, with the reason, unless the text passes all filters."""
    if len(text) < filters.min_chars:
        raise Dropped("too short")
    if len(text) > filters.max_chars:
        raise Dropped("too long")
    language = language_of(text)
    if language != "none" and language not in filters.languages:
        raise Dropped("language")
    if repetition(text) > filters.max_repetition:
        raise Dropped("repetition")
    if punctuation_share(text) > filters.max_signs:
        raise Dropped("signs")


# -- personal data ---------------------------------------------------------------------------------


def is_identity_number(number: str) -> bool:
    """A Chinese resident's: 17 digits and the check character of GB 11643 (ISO 7064 MOD 11-2)."""
    total = sum(int(digit) * 2 ** (17 - place) for place, digit in enumerate(number[:17]))
    month, day = int(number[10:12]), int(number[12:14])
    return 1 <= month <= 12 and 1 <= day <= 31 and "10X98765432"[total % 11] == number[17].upper()


def is_card_number(number: str) -> bool:
    """A bank card's: the sum of Luhn (ISO/IEC 7812)."""
    digits = [int(digit) for digit in number if digit.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0 and len(set(digits)) > 1


# In ASCII, so that a Chinese character may stand right beside them.
MAIL = re.compile(
    r"(?<![\w.+-])[\w.%+-]+@(?:[a-z0-9-]+\.)+[a-z]{2,}(?![a-z])", re.ASCII | re.IGNORECASE
)
IDENTITY = re.compile(r"(?<!\w)[1-9]\d{16}[\dXx](?!\w)", re.ASCII)
SOCIAL_SECURITY = re.compile(
    r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])", re.ASCII
)
CARD = re.compile(r"(?<![\w.-])[3-6]\d{3}(?:[ -]?\d{4}){2}[ -]?\d{3,4}(?![\w-]|\.\d)", re.ASCII)
PHONE = re.compile(
    r"""(?xa)
    (?<![\w.])(?:\+?86[ -]?)?1[3-9]\d(?:\d{8}|[ -]\d{4}[ -]\d{4})(?!\w|\.\d)  # a Chinese mobile
    | (?<![\w.-])0\d{2,3}-\d{7,8}(?![\w-])  # in a Chinese city
    | (?<![\w.])(?:\+?1[ .-])?(?:\([2-9]\d\d\)\ ?|[2-9]\d\d[.-])[2-9]\d\d[.-]\d{4}(?![\w-])  # USA
    | (?<![\w.])\+[1-9]\d{0,2}(?:[ -]?\d){7,12}(?!\w)  # any other, with its country's number
    """
)
PERSONAL: list[tuple[str, re.Pattern, Callable[[str], bool]]] = [
    ("email", MAIL, bool),
    ("id number", IDENTITY, is_identity_number),
    ("id number", SOCIAL_SECURITY, bool),
    ("card number", CARD, is_card_number),
    ("phone", PHONE, bool),
]


def mask_personal(text: str, counts: Counter) -> str:
    """Replace them by [email], [phone], [id number] and [card number], and count them.

    Check digits are verified: an identity or card number whose check digit is wrong is some other
    number. Names and addresses of people stay, since no rule finds them.
    """
    if not any(map(str.isdigit, text)) and "@" not in text:
        return text
    for name, pattern, is_real in PERSONAL:
        text = pattern.sub(partial(masked, name, is_real, counts), text)
    return text


def masked(name: str, is_real: Callable[[str], bool], counts: Counter, found: re.Match) -> str:
    if not is_real(found[0]):
        return found[0]
    counts[f"masked: {name}"] += 1
    return f"[{name}]"


# -- rows ------------------------------------------------------------------------------------------


def clean_row(
    row: dict[str, Any], filters: Filters, counts: Counter, prompts: bool = False
) -> dict[str, Any]:
    """The cleaned row; changes are added to `counts`. Raises Dropped if it is not kept.

    Args:
        prompts: for reinforcement learning: the last answer may be empty or lacking.
    """

    def clean(text: str) -> str:
        repaired = repair(text)
        counts["changed: repaired"] += repaired != text
        return mask_and_escape(repaired)

    def mask_and_escape(text: str) -> str:
        masked = mask_personal(text, counts) if filters.mask else text
        escaped = escape_control_tokens(masked)
        counts["changed: control tokens made harmless"] += escaped != masked
        return escaped

    def clean_message(message: Message) -> Message:
        cleaned = dict(message)
        for name in ("content", "reasoning_content"):
            if isinstance(message.get(name), str):
                cleaned[name] = clean(message[name])
        for name in ("tools", "tool_calls"):  # JSON, perhaps in a string: only masked
            if message.get(name):
                cleaned[name] = each_text(message[name], mask_and_escape)
        return cleaned

    if "text" in row:
        repaired = repair(row["text"])
        counts["changed: repaired"] += repaired != row["text"]
        plain = without_boilerplate(repaired)
        counts["changed: boilerplate removed"] += plain != repaired
        check(plain, filters)
        return {**row, "text": mask_and_escape(plain)}
    names = [name for name in MESSAGES if name in row]
    cleaned: dict[str, Any] = {
        **row,
        **{name: [clean_message(m) for m in row[name]] for name in names},
    }
    for name in names:
        check_turns(cleaned[name], prompts)
    if "chosen" in row and cleaned["chosen"] == cleaned["rejected"]:
        raise Dropped("chosen is rejected")
    said = "\n".join(m.get("content") or "" for name in names for m in cleaned[name])
    if "chosen" not in row:
        if prompts:  # a question may be as short as 1+1=?
            filters = replace(filters, min_chars=1, max_signs=1.0)
        elif any(m.get("tool_calls") for m in cleaned["conversations"]):  # they are no content
            filters = replace(filters, min_chars=0)
        check(said, filters)
    else:
        for name in names:
            # each side alone: both together say the prompt twice, which would count as repetition
            check("\n".join(m.get("content") or "" for m in cleaned[name]), filters)
    return cleaned


def check_turns(messages: list[Message], prompts: bool) -> None:
    """Dropped, with the reason, if a question or an answer is lacking."""
    if prompts:
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]  # the policy writes its own
        if not messages or messages[-1]["role"] not in ("user", "tool"):
            raise Dropped("no question")
        if not messages[-1]["content"]:
            raise Dropped("empty question")
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers and not prompts:
        raise Dropped("no answer")
    if any(map(says_nothing, answers)):
        raise Dropped("empty answer")


def each_text(value: Any, change: Callable[[str], str]) -> Any:
    """Apply `change` to every string in a JSON value."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [each_text(item, change) for item in value]
    if isinstance(value, dict):
        return {name: each_text(item, change) for name, item in value.items()}
    return value


def flattened(row: dict[str, Any]) -> dict[str, Any]:
    """A conversation as a text for pretraining, a paragraph a turn."""
    if "text" in row:
        return row
    said = [m.get("content") or "" for m in row.get("conversations") or row["chosen"]]
    return {"text": "\n\n".join(text for text in said if text.strip())}


@dataclass
class Cleaner:
    """A chunk of raw rows → JSON lines of the rows that are kept, and of those that are dropped."""

    filters: Filters
    kind: str  # text, conversations, prompts or preferences
    text_field: str = ""
    with_dropped: bool = False
    drop_keys: tuple[str, ...] = ()

    def __call__(self, chunk: list[RawRow]) -> ChunkResult:
        kept, dropped, counts, examples = [], [], Counter(), {}
        for raw in chunk:
            counts["rows read"] += 1
            changes = Counter()
            try:
                with reading(""):
                    row = clean_row(self.read(raw), self.filters, changes, self.kind == "prompts")
                    line = as_line(row)
            except UserError as reason:
                known = isinstance(reason, Dropped)
                name = f"dropped: {reason}" if known else "dropped: unreadable: cannot be used"
                counts[name] += 1
                examples.setdefault(name, []).append(f"{raw.place()}: {shown(raw)}")
                if self.with_dropped:
                    about = {"file": raw.path, "number": raw.number, "reason": str(reason)}
                    dropped.append(as_line({**about, "row": raw.content}))
                continue
            counts += changes
            kept.append(line)
        counts["rows kept"] += len(kept)
        files = [kept, dropped] if self.with_dropped else [kept]
        return ChunkResult(["".join(lines).encode() for lines in files], counts, examples)

    def read(self, raw: RawRow) -> dict[str, Any]:
        try:
            row = to_row(raw, self.text_field, self.kind, self.drop_keys)
        except UserError as error:
            what = re.split(r" ?[(:;]| '", str(error))[0]  # one reason for all that are alike
            raise Dropped(f"unreadable: {what}") from None
        if self.kind == "text":
            row = flattened(row)
        if kind_of(row) != self.kind and not ("conversations" in row and self.kind in CHATS):
            raise Dropped(f"no {self.kind}")
        return row


def shown(raw: RawRow) -> str:
    text = raw.content if isinstance(raw.content, str) else json.dumps(raw.content, default=str)
    return text[:100].strip()
