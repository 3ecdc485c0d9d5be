"""scripts/eval_toolcall.py: metrics by hand, the command, mistakes."""

import json
import re

import pytest
from test_mistakes import complaint
from tool_chats import ROWS, call_text
from toy import chat_file

from dataset.tools.loop import parse_task
from model.command_line import parse_arguments
from model.errors import UserError
from scripts import eval_toolcall


@pytest.fixture
def evaluate(save, monkeypatch):
    """eval_toolcall on a model; `says` takes the place of its replies."""

    def run(*flags, says=None, **fields) -> dict:
        path = save(max_position_embeddings=2048, num_hidden_layers=1, **fields)
        if says:
            monkeypatch.setattr(eval_toolcall, "generate_replies", says)
        words = ["--weight", str(path), "--device", "cpu"]
        args = parse_arguments(eval_toolcall.Args, argv=[*words, *map(str, flags)])
        return eval_toolcall.main(args)

    return run


def perfect_replies(right=lambda task: True):
    """A model that says what the rows say, where `right`; else it asks for the time."""
    said = {json.dumps(parse_task(each).messages[-1]): each["conversations"] for each in ROWS}

    def replies(loaded, sampling, episodes):
        found = []
        for episode in episodes:
            chat = said[json.dumps(episode.task.messages[-1])]
            turns = [m for m in chat if m["role"] == "assistant"]
            one = turns[min(episode.turns, len(turns) - 1)]
            text = one["content"] or call_text(*json.loads(one["tool_calls"]))
            text = text if right(episode.task) else "What?"
            found.append(loaded.tokenizer(text).input_ids + [loaded.tokenizer.eos_token_id])
        return found

    return replies


def test_perfect_replies_have_full_scores(evaluate, tmp_path, capsys):
    unique = {json.dumps(each["conversations"][1]): each for each in ROWS}
    few = [each["conversations"] for each in unique.values()][:60]
    path = chat_file(tmp_path / "tasks.jsonl", few)
    out = tmp_path / "report.json"
    report = evaluate("--data_path", path, "--json", out, "--compare", 0, says=perfect_replies())
    for own in report["kinds"].values():
        assert own["name"] == own["arguments"] == own["answer"] == 1 and own["answer_error"] == 0
    assert sum(o["tasks"] for kind, o in report["kinds"].items() if kind != "tools") == 60
    assert not report["errors"] and len(json.loads(out.read_text())["episodes"]) == 60
    shown = capsys.readouterr().out
    assert "calculator" in shown and "100.0 ± 0.0" in shown


def test_metrics_by_hand(evaluate, tmp_path):
    """Sums are right, the rest is not: shares and standard errors of each kind."""
    unique = {json.dumps(each["conversations"][1]): each for each in ROWS}
    few = [each["conversations"] for each in unique.values()][:80]
    path = chat_file(tmp_path / "tasks.jsonl", few)
    right = lambda task: task.calls[:1] and task.calls[0]["name"] == "calculator"  # noqa: E731
    kinds = evaluate("--data_path", path, says=perfect_replies(right))["kinds"]
    sums, days, tools = kinds["calculator"], kinds["clock"], kinds["tools"]
    assert sums["answer"] == 1 and days["answer"] == days["name"] == 0
    share = sums["tasks"] / tools["tasks"]
    assert tools["answer"] == pytest.approx(share)
    assert tools["answer_error"] == pytest.approx((share * (1 - share) / tools["tasks"]) ** 0.5)
    assert (
        sums["answer_without_tools"] == 0
    )  # without a calculator in sight the script's answer is "What?"


def test_rows_without_a_right_answer_are_left_out(evaluate, tmp_path, capsys):
    """Of "gt" the share that is said counts, and calls do not."""
    chat = [{"role": "user", "content": "6 * 7 and 5 * 5?"}, {"role": "assistant", "content": ""}]
    path = tmp_path / "tasks.jsonl"
    rows = [{"conversations": chat, "gt": gt} for gt in (["42", "25"], [], [""])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def says(loaded, sampling, episodes):
        return [loaded.tokenizer("It is 42.").input_ids + [loaded.tokenizer.eos_token_id]]

    report = evaluate("--data_path", path, says=says)
    kind = report["kinds"]["calls not recorded"]
    assert kind["tasks"] == 1 and kind["answer"] == kind["answer_without_tools"] == 0.5
    assert "name" not in kind and "2 of 3 rows have no right answer" in capsys.readouterr().out
    path.write_text(json.dumps(rows[1]))
    with pytest.raises(UserError, match="no row of .*tasks.jsonl has a right answer"):
        evaluate("--data_path", path)


def test_the_command_on_its_own_tasks(evaluate, capsys):
    report = evaluate("--tasks", 12, "--max_new_tokens", 8, "--examples", 2, "--batch_size", 5)
    assert report["kinds"]["tools"]["answer"] == 0 and report["errors"]["unfinished"] == 12
    assert "truth" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--max_turns", "0"], "--max_turns must be at least 1"),
        (["--temperature", "-1"], "--temperature must not be negative"),
        (["--data_path", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--weight", "nothing"], "no weights"),
    ],
)
def test_a_mistake_is_one_sentence(command, tmp_path, flags, sentence):
    code, printed = command(eval_toolcall, "--save_dir", str(tmp_path), *flags)
    assert code == 2 and re.search(sentence, complaint(printed))
