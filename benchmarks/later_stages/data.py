"""Which rows of the data each training of real_stages.py gets, and which are held out from it.

Rows with the same question are always on the same side. The split depends on the rows alone.

    pairs       dpo and dpo_val: five folds, and two halves for two reward models
    tools       the conversations of sft and sft_val that offer tools: five folds
    prompts     rlaif, without answers: most to train on, the rest held out
    answers     rows of sft whose answer has at most 16 characters, with it as the right "answer"
    medical     lora_medical; held out are lora_medical_val and as many of its rows as are missing
    reasoning   r1_mix_1024, likewise
    chats       sft to train on, sft_val held out
"""

import json
import random
from pathlib import Path

from dataset.jsonl import Row, check_file, load_rows, write_rows
from model.errors import UserError

FOLDS = 5
SHORT_ANSWER = 16  # characters


def write_splits(data_dir: Path, out: Path, held_out: int) -> None:
    """Write all files into `out`, unless they are there.

    Args:
        held_out: rows of a held-out file, where the data are not split into folds.
    """
    done = out / f"held_out_{held_out}"
    if done.exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    chats = read(data_dir, "sft")
    for name, rows in (
        ("pairs", [*read(data_dir, "dpo"), *read(data_dir, "dpo_val")]),
        ("tools", [row for row in [*chats, *read(data_dir, "sft_val")] if offers_tools(row)]),
    ):
        folds = deal(rows, FOLDS)
        for n, fold in enumerate(folds):
            rest = [row for other in folds if other is not fold for row in other]
            write_rows(out / f"{name}_train_{n}.jsonl", rest)
            write_rows(out / f"{name}_held_{n}.jsonl", fold)
        if name == "pairs":
            for half, half_rows in zip("ab", deal(rows, 2), strict=True):
                write_rows(out / f"pairs_half_{half}.jsonl", half_rows)
    for name, rows, val_name in (
        ("prompts", read(data_dir, "rlaif"), ""),
        ("answers", list(filter(None, map(with_short_answer, chats))), ""),
        ("medical", read(data_dir, "lora_medical"), "lora_medical_val"),
        ("reasoning", read(data_dir, "r1_mix_1024"), "r1_mix_1024_val"),
    ):
        held = read(data_dir, val_name)[:held_out] if val_name else []
        held_questions = set(map(question_of, held))
        rows = [row for row in rows if question_of(row) not in held_questions]
        train, more = take(rows, held_out - len(held))
        write_rows(out / f"{name}_train.jsonl", train)
        write_rows(out / f"{name}_held.jsonl", held + more)
    write_rows(out / "chats_train.jsonl", chats)
    write_rows(out / "chats_held.jsonl", read(data_dir, "sft_val"))
    done.touch()


def read(data_dir: Path, name: str) -> list[Row]:
    """The rows of NAME.jsonl or NAME.jsonl.gz."""
    for suffix in (".jsonl.gz", ".jsonl"):
        if (path := data_dir / f"{name}{suffix}").exists():
            return load_rows(check_file(path))
    raise UserError(f"--data_dir {data_dir} lacks {name}.jsonl or {name}.jsonl.gz")


# -- splitting -------------------------------------------------------------------------------------


def question_of(row: Row) -> str:
    """What a row asks: rows that ask the same belong together."""
    messages = row["chosen"] if "chosen" in row else row["conversations"]
    asked = [each for each in messages if each["role"] in ("system", "user")]
    return json.dumps(asked or messages, ensure_ascii=False, sort_keys=True)


def shuffled_groups(rows: list[Row]) -> list[list[Row]]:
    """The rows with each question, in a random order that is always the same."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(question_of(row), []).append(row)
    order = list(groups.values())
    random.Random(0).shuffle(order)
    return order


def deal(rows: list[Row], parts: int) -> list[list[Row]]:
    """The rows in parts of about the same size."""
    dealt: list[list[Row]] = [[] for _ in range(parts)]
    for group in shuffled_groups(rows):
        min(dealt, key=len).extend(group)
    return dealt


def take(rows: list[Row], count: int) -> tuple[list[Row], list[Row]]:
    """The other rows, and `count` of them, or a few more."""
    taken: list[Row] = []
    rest: list[Row] = []
    for group in shuffled_groups(rows):
        (taken if len(taken) < min(count, len(rows) // 2) else rest).extend(group)
    return rest, taken


# -- kinds of rows ---------------------------------------------------------------------------------


def offers_tools(row: Row) -> bool:
    return any(message.get("tools", "[]") not in ("[]", [], "") for message in row["conversations"])


def with_short_answer(row: Row) -> Row | None:
    """The row with its answer as the truth of a rule; None if it is long, or says that there is
    none ("<nooutput>")."""
    roles = [message["role"] for message in row["conversations"]]
    answer = row["conversations"][-1]["content"].strip()
    fits = 0 < len(answer) <= SHORT_ANSWER and answer[0] not in "<&"
    return {**row, "answer": answer} if roles == ["user", "assistant"] and fits else None
