"""Tool use: what is trained, the loop against scripted models, and the script that scores it."""

import copy
import json
import random
import re

import pytest
import torch
import torch.nn.functional as F
from test_mistakes import complaint
from toy import Trainer, chat_file

from dataset.demo.files import demo_rows
from dataset.lm_dataset import encode_chat
from dataset.tools.builtin import TOOLS, Result
from dataset.tools.loop import (
    CLOCK,
    Episode,
    call_key,
    read_tasks,
    run_episodes,
    score,
    task_of,
    tokens_of_results,
)
from model.command_line import parse_arguments
from model.errors import UserError
from model.inference.generation import generate
from model.inference.sampling import SamplingParams
from model.weights import load_model
from scripts import eval_toolcall
from trainer import train_full_sft

ROWS = demo_rows("tools", held_out=True)
SUM = {"name": "calculator", "arguments": {"expression": "6 * 7"}}
TIME = {"name": "clock", "arguments": {}}


def row(question="What is 6 × 7?", calls=(SUM,), results=("42",), answer="It is 42.", tools=TOOLS):
    """A conversation with tools, as the files have it."""
    chat = [
        {"role": "system", "content": "", "tools": [TOOLS[name].schema for name in tools]},
        {"role": "user", "content": question},
    ]
    if calls:
        chat.append({"role": "assistant", "content": "", "tool_calls": list(calls)})
        chat += [{"role": "tool", "content": result} for result in results]
    return {"conversations": [*chat, {"role": "assistant", "content": answer}]}


def written(*calls) -> str:
    """Calls as the chat template has them."""
    each = (call if isinstance(call, str) else json.dumps(call) for call in calls)
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in each)


HALF = '{"name": "dictionary", "arguments": {"word": "\\ud800"}}'


@pytest.fixture
def played(tokenizer):
    """A function: a task and what a model says in turn → the episode. A text without its end has
    run into the limit."""

    def run(task, *texts, unfinished=False, **settings) -> Episode:
        def write(episodes):
            (episode,) = episodes
            ids = tokenizer(texts[min(episode.turns, len(texts) - 1)]).input_ids
            return [ids + ([] if unfinished else [tokenizer.eos_token_id])]

        episode = Episode(task, tokenizer)
        run_episodes([episode], write, **settings)
        return episode

    return run


# -- what is trained -------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_a_hurry")
def test_fine_tuning_learns_calls_and_answers_and_no_results(tmp_path, tokenizer):
    """The loss of the first update is that of the assistant's words, found by looking for them."""
    chats = [each["conversations"] for each in ROWS if len(each["conversations"]) == 5][:2]
    settings = dict(max_seq_len=512, max_steps=1, from_weight="none", batch_size=2)
    train = Trainer(tmp_path, train_full_sft, (chat_file, chats, settings))
    reported = train()["records"][0]["loss"]

    torch.manual_seed(42)
    args = train_full_sft.Args(**train.settings())
    model = train_full_sft.starting_model(args, tokenizer).eval()
    nats, count = 0.0, 0
    for chat in chats:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        call, answer = json.loads(chat[2]["tool_calls"])[0], chat[4]["content"]
        said = [f"{written(call)}<|im_end|>", f"{answer}<|im_end|>"]
        before, after = text.split(said[0])
        response, rest = after[: after.index("assistant\n") + 10], after[: -len(said[1]) - 1]
        assert "<tool_response>" in response and response == rest
        pieces = [(before, 0), (said[0], 1), (response, 0), (said[1], 1)]
        encoded = [(tokenizer(piece).input_ids, trained) for piece, trained in pieces]
        ids = torch.tensor([[token for piece, _ in encoded for token in piece]])
        mask = torch.tensor([trained for piece, trained in encoded for _ in piece])
        losses = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        nats += losses[mask[1:] == 1].sum().item()
        count += int(mask.sum())
    assert reported == pytest.approx(nats / count, abs=1e-3)


# -- the loop --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(0, 24, 3))
def test_an_episode_has_the_tokens_that_fine_tuning_has(tokenizer, played, number):
    """Of a model that says what the row says: the same ids, and the policy's where SFT trains."""
    chat = ROWS[number]["conversations"]
    says = [m for m in chat if m["role"] == "assistant"]
    texts = [m["content"] or written(*json.loads(m["tool_calls"])) for m in says]
    episode = played(task_of(ROWS[number]), *texts)
    whole = encode_chat(tokenizer, chat)
    assert episode.ids == whole.ids[:-1]  # but for the line break behind its end
    assert [False] * episode.prompt_length + episode.action_mask == whole.loss_mask[:-1]
    assert score(episode) == {"name": 1, "arguments": 1, "answer": 1}


def test_a_template_with_a_system_message_of_its_own_writes_the_same_results(tokenizer):
    other = copy.deepcopy(tokenizer)
    own = "{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}"
    other.chat_template = own + tokenizer.chat_template
    results = [Result("42"), Result("43<|im_end|>")]
    ids = tokens_of_results(tokenizer, results)
    assert tokens_of_results(other, results) == ids
    assert tokenizer.decode(ids) == (
        "\n<|im_start|>user\n<tool_response>\n42\n</tool_response>"
        "\n<tool_response>\n43<|im_end|>\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(tokenizer.eos_token_id) == 1  # what a tool says is text


def test_several_calls_in_one_reply_are_answered_in_one_turn(tokenizer, played):
    task = task_of(row(calls=(SUM, TIME), results=('{"result": 42}', CLOCK)))
    episode = played(task, written(SUM, TIME), "It is 42.")
    chat = row(calls=(SUM, TIME), results=('{"result": 42}', CLOCK))["conversations"]
    assert episode.ids == encode_chat(tokenizer, chat).ids[:-1]
    assert score(episode) == {"name": 1, "arguments": 1, "answer": 1} and episode.turns == 2


WRONG = {
    "no JSON": ("malformed", written('{"name": "calculator", ')),
    "a list": ("malformed", written("[1, 2]")),
    "no name": ("malformed", written('{"arguments": {}}')),
    "arguments a text": ("malformed", written('{"name": "clock", "arguments": "now"}')),
    "nested beyond all measure": ("malformed", written("[" * 3000)),
    "a number beyond all measure": ("malformed", written('{"name": ' + "1" * 5000 + "}")),
    "an unknown tool": ("unknown_tool", written({"name": "weather", "arguments": {}})),
    "no argument": ("bad_arguments", written({"name": "calculator", "arguments": {}})),
    "too many": ("bad_arguments", written({"name": "clock", "arguments": {"zone": "UTC"}})),
    "a wrong type": ("bad_arguments", written({**SUM, "arguments": {"expression": [1]}})),
    "half a character": ("failed", written(HALF)),
    "no sum": ("failed", written({**SUM, "arguments": {"expression": "6 ×"}})),
}


@pytest.mark.parametrize("kind, text", WRONG.values(), ids=WRONG)
def test_what_goes_wrong_is_told_to_the_model_and_scored_0(tokenizer, played, kind, text):
    """Even if the model does it right after that: it goes on, but has lost."""
    task = task_of(row())
    episode = played(task, text, written(SUM), "It is 42.")
    assert episode.errors == [kind] and episode.turns == 3 and episode.done
    assert '"error"' in tokenizer.decode(episode.ids[episode.prompt_length :])
    assert score(episode) == {"name": 0, "arguments": 0, "answer": 0}
    assert score(played(task, written(SUM), "It is 42.")) == {
        "name": 1,
        "arguments": 1,
        "answer": 1,
    }


def test_a_tool_that_is_not_on_offer_is_unknown(played):
    task = task_of(row("What is 6 × 7?", calls=(), answer="I cannot.", tools=["clock"]))
    assert played(task, written(SUM), "It is 42.").errors == ["unknown_tool"]
    assert score(played(task, "I cannot."))["answer"] == 1


@pytest.mark.parametrize("turns", [1, 2, 5])
def test_endless_calls_end(played, turns):
    episode = played(task_of(row()), written(SUM), max_turns=turns)
    assert episode.turns == len(episode.calls) == turns and episode.errors == ["endless"]
    assert score(episode)["name"] == 0


def test_a_reply_that_does_not_end_calls_nothing(played):
    episode = played(task_of(row()), written(SUM), unfinished=True)
    assert episode.errors == ["unfinished"] and not episode.calls and episode.turns == 1


def test_an_episode_ends_before_the_models_last_position(played):
    task = task_of(row())
    start = played(task, "It is 42.").prompt_length
    assert played(task, written(SUM), token_budget=10).errors == ["too_long"]
    assert played(task, written(SUM), token_budget=10).turns == 0
    assert played(task, written(SUM), token_budget=start + 20).errors == ["too_long"]


def test_the_clock_tells_what_it_tells_in_the_row(tokenizer, played):
    told = '{"date": "2031-05-06", "weekday": "星期二", "time": "07:08"}'
    task = task_of(row("几点了？", calls=(TIME,), results=(told,), answer="现在是 07:08。"))
    episode = played(task, written(TIME), "现在是 07:08。")
    assert ("tool", told) in episode.transcript and score(episode)["answer"] == 1
    other = played(task_of(row()), written(TIME), "It is 42.")  # nobody asked for it
    assert ("tool", CLOCK) in other.transcript and not other.errors
    assert score(other) == {"name": 0, "arguments": 0, "answer": 1}


def test_a_foreign_tool_is_replayed(played):
    """Data may have tools that cannot be run here: the results of its own calls are known."""
    call = {"name": "weather", "arguments": {"city": "Oslo", "days": 2}}
    task = task_of(row("Rain?", calls=(call,), results=("wet",), answer="Yes.", tools=["clock"]))
    same = {"name": "weather", "arguments": {"days": "2", "city": "OSLO"}}
    episode = played(task, written(same), "Yes.")
    assert ("tool", "wet") in episode.transcript and score(episode)["arguments"] == 1
    other = played(task, written({**call, "arguments": {"city": "Rome", "days": 2}}), "Yes.")
    assert other.errors == ["failed"]


@pytest.mark.parametrize(
    "one, other, same",
    [
        ({"expression": "6 * 7"}, {"expression": "6*7"}, True),
        ({"value": 12, "from_unit": "Inch"}, {"from_unit": "inch", "value": "12.0"}, True),
        ({"expression": "6 * 7"}, {"expression": "7 * 6"}, False),
        ({"value": 12}, {"value": 13}, False),
        ({"value": 12}, {}, False),
        ({"a": [1, {"b": None}]}, {"a": [1, {"b": None}]}, True),
        ({"a": [1, {"b": None}]}, {"a": [1, {"b": 0}]}, False),
    ],
)
def test_which_calls_are_the_same(one, other, same):
    calls = ({"name": "tool", "arguments": each} for each in (one, other))
    assert (len(set(map(call_key, calls))) == 1) is same


def test_without_tools_it_is_the_same_question(tokenizer, played):
    task = task_of(row())
    bare = task.without_tools()
    text = tokenizer.decode(Episode(bare, tokenizer).ids)
    assert "What is 6 × 7?" in text and "calculator" not in text and "<tools>" not in text
    assert score(played(bare, "It is 42."))["answer"] == 1
    assert played(bare, written(SUM)).errors[0] == "unknown_tool"
    assert task.offered and task.messages[0]["tools"]  # the task itself stays as it is


def test_tasks_ask_the_last_question_and_take_calls_in_every_form():
    chat = row()["conversations"]
    theirs = {"function": {"name": "calculator", "arguments": '{"expression": "6 * 7"}'}}
    chat[2]["tool_calls"] = json.dumps([theirs])
    chat[0]["tools"] = json.dumps(chat[0]["tools"])
    first = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    task = task_of({"conversations": [chat[0], *first, *chat[1:]]})
    assert task.calls == [SUM] and task.answer == "It is 42." and task.offered == list(TOOLS)
    assert [m["role"] for m in task.messages] == ["system", "user", "assistant", "user"]
    assert task.recorded_results[call_key(SUM)] == "42"
    asked = task_of({"conversations": chat[:2], "answer": 42})
    assert asked.answer == "42" and not asked.calls


@pytest.mark.parametrize(
    "chat, sentence",
    [
        ([{"role": "assistant", "content": "a"}], "asks nothing"),
        (row()["conversations"][:2], "does not end with the assistant's answer"),
        (row()["conversations"][:4], "does not end with the assistant's answer"),
        (row(calls=({"name": "a", "arguments": "x"},))["conversations"], "are no JSON object"),
        (row(calls=({"arguments": {}},))["conversations"], 'a tool call without a "name"'),
        ([], 'has no "conversations"'),
    ],
)
def test_a_row_that_is_no_task_is_named(tmp_path, chat, sentence):
    path = chat_file(tmp_path / "tasks.jsonl", [row()["conversations"], chat])
    with pytest.raises(UserError, match=f"line 2 of .*tasks.jsonl .*{sentence}"):
        read_tasks(path)


def test_no_reply_is_a_crash(tokenizer):
    """Hundreds of replies out of pieces of calls, in any order."""
    pieces = ["<tool_call>", "</tool_call>", "\n", "{", "}", '"name": ', '"calculator"', ", "]
    pieces += [
        '"arguments": ',
        "[",
        "]",
        "{}",
        '{"expression": "6 * 7"}',
        "NaN",
        "1e999",
        "\\ud800",
    ]
    pieces += [
        "<think>",
        "</think>",
        "<tool_response>",
        "<|im_end|>",
        "null",
        "\x00",
        "时",
        '"clock"',
    ]
    chance = random.Random(0)
    tasks = [task_of(row()), task_of(row(calls=(), tools=[])), task_of(ROWS[0]).without_tools()]

    def write(episodes):
        texts = ("".join(chance.choices(pieces, k=chance.randint(1, 25))) for _ in episodes)
        return [tokenizer(text).input_ids + [tokenizer.eos_token_id] for text in texts]

    episodes = [Episode(task, tokenizer) for task in tasks * 60]
    run_episodes(episodes, write)
    assert all(episode.done for episode in episodes)
    assert all(len(e.ids) - e.prompt_length == len(e.action_mask) for e in episodes)
    assert sum(bool(episode.errors) for episode in episodes) > 40


def test_tasks_side_by_side_are_played_as_alone(tokenizer, save):
    """A random model, whose replies are of any kind, through the engine."""
    model = load_model(save(max_position_embeddings=2048), tokenizer=tokenizer)
    sampling = SamplingParams(12, temperature=0)

    def write(episodes):
        found = generate(model, [episode.ids for episode in episodes], sampling)
        call = tokenizer(written(SUM)).input_ids  # and most of them then call a tool
        some = zip(found, episodes, strict=True)
        return [ids[: n % 5] + call + [2] if e.turns < n % 4 else ids for ids, e in some for n in [len(e.ids)]]  # fmt: skip # noqa: E501

    tasks = [task_of(each) for each in ROWS[:6]]
    together = [Episode(task, tokenizer) for task in tasks]
    run_episodes(together, write)
    for task, one in zip(tasks, together, strict=True):
        alone = Episode(task, tokenizer)
        run_episodes([alone], write)
        assert alone.ids == one.ids and alone.action_mask == one.action_mask
    assert len({episode.turns for episode in together}) > 1


# -- the script ------------------------------------------------------------------------------------


@pytest.fixture
def evaluate(save, monkeypatch):
    """eval_toolcall on a model; `says` takes the place of its replies."""

    def run(*flags, says=None, **fields) -> dict:
        path = save(max_position_embeddings=2048, num_hidden_layers=1, **fields)
        if says:
            monkeypatch.setattr(eval_toolcall, "generate_replies", says)
        words = ["--weight", str(path), "--device", "cpu"]
        args = parse_arguments(eval_toolcall.Args, arguments=[*words, *map(str, flags)])
        return eval_toolcall.main(args)

    return run


def truth_told(right=lambda task: True):
    """A model that says what the rows say, where `right`; else it asks for the time."""
    said = {json.dumps(task_of(each).messages[-1]): each["conversations"] for each in ROWS}

    def replies(loaded, sampling, episodes):
        found = []
        for episode in episodes:
            chat = said[json.dumps(episode.task.messages[-1])]
            turns = [m for m in chat if m["role"] == "assistant"]
            one = turns[min(episode.turns, len(turns) - 1)]
            text = one["content"] or written(*json.loads(one["tool_calls"]))
            text = text if right(episode.task) else "What?"
            found.append(loaded.tokenizer(text).input_ids + [loaded.tokenizer.eos_token_id])
        return found

    return replies


def test_a_model_that_is_always_right_gets_everything(evaluate, tmp_path, capsys):
    unique = {json.dumps(each["conversations"][1]): each for each in ROWS}
    few = [each["conversations"] for each in unique.values()][:60]
    path = chat_file(tmp_path / "tasks.jsonl", few)
    out = tmp_path / "report.json"
    report = evaluate("--data_path", path, "--json", out, "--compare", 0, says=truth_told())
    for own in report["kinds"].values():
        assert own["name"] == own["arguments"] == own["answer"] == 1 and own["answer_error"] == 0
    assert sum(o["tasks"] for kind, o in report["kinds"].items() if kind != "tools") == 60
    assert not report["errors"] and len(json.loads(out.read_text())["episodes"]) == 60
    shown = capsys.readouterr().out
    assert "calculator" in shown and "100.0 ± 0.0" in shown


def test_figures_by_hand(evaluate, tmp_path):
    """Sums are right, the rest is not: shares and standard errors of each kind."""
    unique = {json.dumps(each["conversations"][1]): each for each in ROWS}
    few = [each["conversations"] for each in unique.values()][:80]
    path = chat_file(tmp_path / "tasks.jsonl", few)
    right = lambda task: task.calls[:1] and task.calls[0]["name"] == "calculator"  # noqa: E731
    kinds = evaluate("--data_path", path, says=truth_told(right))["kinds"]
    sums, days, tools = kinds["calculator"], kinds["clock"], kinds["tools"]
    assert sums["answer"] == 1 and days["answer"] == days["name"] == 0
    share = sums["tasks"] / tools["tasks"]
    assert tools["answer"] == pytest.approx(share)
    assert tools["answer_error"] == pytest.approx((share * (1 - share) / tools["tasks"]) ** 0.5)
    assert sums["bare"] == 0  # without a calculator in sight the script's answer is "What?"


def test_the_command_on_the_demos_tasks(evaluate, capsys):
    report = evaluate("--tasks", 12, "--max_new_tokens", 8, "--examples", 2, "--batch_size", 5)
    assert report["kinds"]["tools"]["answer"] == 0 and report["errors"]["unfinished"] == 12
    assert "truth" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--max_turns", "0"], "--max_turns must be at least 1"),
        (["--temperature", "-1"], "--temperature must be at least 0"),
        (["--data_path", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--weight", "nothing"], "no weights"),
    ],
)
def test_a_mistake_is_one_sentence(command, tmp_path, flags, sentence):
    code, printed = command(eval_toolcall, "--save_dir", str(tmp_path), *flags)
    assert code == 2 and re.search(sentence, complaint(printed))
