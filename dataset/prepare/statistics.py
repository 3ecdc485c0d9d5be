"""Statistics of a data file: tokens, lengths, languages, compression, most frequent texts."""

import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dataset.encoding import SEGMENTERS, Segments, chat_segments, encode_segments
from dataset.jsonl import BadRows, error_at
from dataset.prepare.deduplication import exact_key, row_of
from dataset.prepare.resumable import ChunkResult
from dataset.prepare.sources import RawRow, kind_of, whole_text
from dataset.text import LANGUAGES, language_of

BAD = 255  # the language of a row that is left out
RECORD = np.dtype([("key", "<u8"), ("tokens", "<u4"), ("label_tokens", "<u4"), ("language", "u1")])


@dataclass
class RowMeasurer:
    """A chunk of rows → a record of each row, and sums."""

    tokenizer: PreTrainedTokenizerBase
    skip_bad_rows: bool = False

    def __call__(self, chunk: list[RawRow]) -> ChunkResult:
        rows: dict[int, dict[str, Any]] = {}
        segments, owner = [], []
        bad_rows = BadRows() if self.skip_bad_rows else None
        for number, raw in enumerate(chunk):
            with error_at(raw.path, raw.number, bad_rows):
                row = row_of(raw)
                sides = documents_of(self.tokenizer, row)
                rows[number] = row
                segments += sides
                owner += [number] * len(sides)
        texts = [whole_text(row) for row in rows.values()]
        records = np.zeros(len(chunk), RECORD)
        records["language"] = BAD
        for number, encoded in zip(owner, encode_segments(self.tokenizer, segments), strict=True):
            records["tokens"][number] += len(encoded.ids)
            records["label_tokens"][number] += sum(encoded.loss_mask)
        counts = Counter({"rows": len(rows)})
        for (number, row), text in zip(rows.items(), texts, strict=True):
            records["key"][number] = int.from_bytes(exact_key(text)[:8], "little")
            language = language_of(text)
            records["language"][number] = LANGUAGES.index(language)
            sums = {"characters": len(text), "bytes": len(text.encode())}
            sums["tokens"] = int(records["tokens"][number])
            for name, amount in sums.items():
                counts[name] += amount
                counts[f"{name}: {language}"] += amount
            counts[f"rows: {language}"] += 1
            counts[f"kind: {kind_of(row)}"] += 1
        counts["bytes compressed"] = len(zlib.compress("\n".join(texts).encode()))
        counts["bad rows"] = len(chunk) - len(rows)
        examples = {"bad rows": bad_rows.examples} if bad_rows and bad_rows.count else {}
        return ChunkResult([records.tobytes()], counts, examples)


def documents_of(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> list[Segments]:
    """The documents that the trainers make of a row: one, or two of a preference pair; of a prompt,
    what the policy is given."""
    kind = kind_of(row)
    if kind == "text":
        found = [SEGMENTERS["text"](tokenizer, row)]
    elif kind == "prompts":
        messages = row["conversations"]
        asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        found = [chat_segments(tokenizer, asked, True, {})]
    else:
        sides = [row[n] for n in ("conversations", "chosen", "rejected") if n in row]
        found = [SEGMENTERS["conversations"](tokenizer, {"conversations": side}) for side in sides]
    return [segments for segments in found if segments]


def summary(records: np.ndarray, counts: dict[str, int]) -> dict[str, Any]:
    """The statistics, by language and in total."""
    tokens = records["tokens"]
    percent = (5, 25, 50, 75, 95, 99)
    by_language = {}
    for language in (*LANGUAGES, ""):
        end = f": {language}" if language else ""
        if rows := counts.get(f"rows{end}", 0):
            characters, size = counts[f"characters{end}"], counts[f"bytes{end}"]
            by_language[language or "all"] = {
                "rows": rows,
                "tokens": counts[f"tokens{end}"],
                "megabytes": round(size / 1e6, 3),
                "characters_per_token": round(characters / max(1, counts[f"tokens{end}"]), 3),
                "bytes_per_token": round(size / max(1, counts[f"tokens{end}"]), 3),
            }
    keys, times = np.unique(records["key"], return_counts=True)
    return {
        "kinds": {n.removeprefix("kind: "): c for n, c in counts.items() if n.startswith("kind: ")},
        "languages": by_language,
        "tokens_trained": int(records["label_tokens"].sum()),
        "tokens_a_row": {
            "mean": round(float(tokens.mean()), 1),
            **{f"p{p}": int(np.percentile(tokens, p)) for p in percent},
            "longest": int(tokens.max()),
        },
        "zlib_ratio": round(counts["bytes"] / max(1, counts["bytes compressed"]), 3),
        "exact_duplicates": int((times - 1).sum()),
        "share_of_duplicates": round(float((times - 1).sum() / len(records)), 4),
    }


def top_duplicates(records: np.ndarray, most: int) -> dict[int, int]:
    """{number of the first row: number of copies} of the most frequent texts."""
    _, first, times = np.unique(records["key"], return_index=True, return_counts=True)
    order = np.lexsort((first, -times))[:most]
    return {int(first[i]): int(times[i]) for i in order if times[i] > 1}


def read_records(path: Path) -> np.ndarray:
    return np.fromfile(path, RECORD)
