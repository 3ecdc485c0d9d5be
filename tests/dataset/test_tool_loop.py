"""The loop of tool use against scripted models, and what SFT learns from its conversations."""

import copy
import json
import random

import pytest
import torch
import torch.nn.functional as F
from tool_chats import HALF, ROWS, SUM, TIME, call_text, tool_row
from toy import Trainer, chat_file

from dataset.lm_dataset import encode_chat
from dataset.tools.builtin import TOOLS
from dataset.tools.call import ALL_TOOLS, Result
from dataset.tools.loop import (
    CLOCK,
    Episode,
    call_key,
    describe_unrunnable,
    parse_task,
    read_tasks,
    run_episodes,
    score,
    tokens_of_results,
)
from model.errors import UserError
from model.inference.generation import generate
from model.inference.sampling import SamplingParams
from model.weights import load_model
from trainer import train_full_sft


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
    """The loss of the first step is that of the assistant's words, found by looking for them."""
    chats = [each["conversations"] for each in ROWS if len(each["conversations"]) == 5][:2]
    settings = dict(max_seq_len=512, max_steps=1, from_weight="none", batch_size=2)
    train = Trainer(tmp_path, train_full_sft, (chat_file, chats, settings))
    reported = train()["history"][0]["loss"]

    torch.manual_seed(42)
    args = train_full_sft.Args(**train.settings())
    model = train_full_sft.init_model(args, tokenizer).eval()
    nats, count = 0.0, 0
    for chat in chats:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        call, answer = json.loads(chat[2]["tool_calls"])[0], chat[4]["content"]
        said = [f"{call_text(call)}<|im_end|>", f"{answer}<|im_end|>"]
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
    texts = [m["content"] or call_text(*json.loads(m["tool_calls"])) for m in says]
    episode = played(parse_task(ROWS[number]), *texts)
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
    task = parse_task(tool_row(calls=(SUM, TIME), results=('{"result": 42}', CLOCK)))
    episode = played(task, call_text(SUM, TIME), "It is 42.")
    chat = tool_row(calls=(SUM, TIME), results=('{"result": 42}', CLOCK))["conversations"]
    assert episode.ids == encode_chat(tokenizer, chat).ids[:-1]
    assert score(episode) == {"name": 1, "arguments": 1, "answer": 1} and episode.turns == 2


WRONG = {
    "no JSON": ("malformed", call_text('{"name": "calculator", ')),
    "a list": ("malformed", call_text("[1, 2]")),
    "no name": ("malformed", call_text('{"arguments": {}}')),
    "arguments a text": ("malformed", call_text('{"name": "clock", "arguments": "now"}')),
    "nested beyond all measure": ("malformed", call_text("[" * 3000)),
    "a number beyond all measure": ("malformed", call_text('{"name": ' + "1" * 5000 + "}")),
    "an unknown tool": ("unknown_tool", call_text({"name": "weather", "arguments": {}})),
    "no argument": ("bad_arguments", call_text({"name": "calculator", "arguments": {}})),
    "too many": ("bad_arguments", call_text({"name": "clock", "arguments": {"zone": "UTC"}})),
    "a wrong type": ("bad_arguments", call_text({**SUM, "arguments": {"expression": [1]}})),
    "half a character": ("failed", call_text(HALF)),
    "no sum": ("failed", call_text({**SUM, "arguments": {"expression": "6 ×"}})),
}


@pytest.mark.parametrize("kind, text", WRONG.values(), ids=WRONG)
def test_what_goes_wrong_is_told_to_the_model_and_scored_0(tokenizer, played, kind, text):
    """Even if the model does it right after that: it goes on, but has lost."""
    task = parse_task(tool_row())
    episode = played(task, text, call_text(SUM), "It is 42.")
    assert episode.errors == [kind] and episode.turns == 3 and episode.done
    assert '"error"' in tokenizer.decode(episode.ids[episode.prompt_length :])
    assert score(episode) == {"name": 0, "arguments": 0, "answer": 0}
    assert score(played(task, call_text(SUM), "It is 42.")) == {
        "name": 1,
        "arguments": 1,
        "answer": 1,
    }


def test_a_tool_that_is_not_on_offer_is_unknown(played):
    task = parse_task(tool_row("What is 6 × 7?", calls=(), answer="I cannot.", tools=["clock"]))
    assert played(task, call_text(SUM), "It is 42.").errors == ["unknown_tool"]
    assert score(played(task, "I cannot."))["answer"] == 1


@pytest.mark.parametrize("turns", [1, 2, 5])
def test_endless_calls_end(played, turns):
    episode = played(parse_task(tool_row()), call_text(SUM), max_turns=turns)
    assert episode.turns == len(episode.calls) == turns and episode.errors == ["endless"]
    assert score(episode)["name"] == 0


def test_a_reply_that_does_not_end_calls_nothing(played):
    episode = played(parse_task(tool_row()), call_text(SUM), unfinished=True)
    assert episode.errors == ["unfinished"] and not episode.calls and episode.turns == 1


def test_an_episode_ends_before_the_models_last_position(played):
    task = parse_task(tool_row())
    start = played(task, "It is 42.").prompt_length
    assert played(task, call_text(SUM), token_budget=10).errors == ["too_long"]
    assert played(task, call_text(SUM), token_budget=10).turns == 0
    assert played(task, call_text(SUM), token_budget=start + 20).errors == ["too_long"]


def test_the_clock_tells_what_it_tells_in_the_row(tokenizer, played):
    told = '{"date": "2031-05-06", "weekday": "星期二", "time": "07:08"}'
    task = parse_task(tool_row("几点了？", calls=(TIME,), results=(told,), answer="现在是 07:08。"))
    episode = played(task, call_text(TIME), "现在是 07:08。")
    assert ("tool", told) in episode.transcript and score(episode)["answer"] == 1
    other = played(parse_task(tool_row()), call_text(TIME), "It is 42.")  # nobody asked for it
    assert ("tool", CLOCK) in other.transcript and not other.errors
    assert score(other) == {"name": 0, "arguments": 0, "answer": 1}


def test_a_foreign_tool_is_replayed(played):
    """Data may have tools that cannot be run here: the results of its own calls are known."""
    call = {"name": "weather", "arguments": {"city": "Oslo", "days": 2}}
    task = parse_task(
        tool_row("Rain?", calls=(call,), results=("wet",), answer="Yes.", tools=["clock"])
    )
    same = {"name": "weather", "arguments": {"days": "2", "city": "OSLO"}}
    episode = played(task, call_text(same), "Yes.")
    assert ("tool", "wet") in episode.transcript and score(episode)["arguments"] == 1
    other = played(task, call_text({**call, "arguments": {"city": "Rome", "days": 2}}), "Yes.")
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


def test_a_default_may_be_given_or_not(played):
    """Of the recorded call and of the model's; the result of the row is the same call's."""
    call = {"name": "get_current_time", "arguments": {}}
    row = tool_row("What time is it?", calls=(call,), results=("noon",), answer="Noon.", tools=[])
    row["conversations"][0]["tools"] = [ALL_TOOLS["get_current_time"].schema]
    for arguments, right in ({}, 1), ({"timezone": "asia/shanghai"}, 1), ({"timezone": "UTC"}, 0):
        episode = played(parse_task(row), call_text({**call, "arguments": arguments}), "Noon.")
        assert score(episode) == {"name": 1, "arguments": right, "answer": 1}
        assert (("tool", "noon") in episode.transcript) == right


GT_ROW = {
    "conversations": [
        {"role": "system", "content": "", "tools": [ALL_TOOLS["calculate_math"].schema]},
        {"role": "user", "content": "What are 12*12 and 6*7?"},
        {"role": "assistant", "content": ""},
    ],
    "gt": ["144", "42"],
}


def test_an_empty_last_answer_is_the_place_to_answer(played):
    """ "gt" is the truth, and the row does not say which calls are right."""
    task = parse_task(GT_ROW)
    assert task.calls is None and task.truth.parts == ("144", "42") and task.answer == "144, 42"
    call = call_text({"name": "calculate_math", "arguments": {"expression": "12*12"}})
    assert score(played(task, call, "144 and 42.")) == {"answer": 1}
    assert score(played(task, "It is 144.")) == {"answer": 0.5}
    assert score(played(task, "")) == score(played(task, call, "")) == {"answer": 0}
    assert parse_task({**GT_ROW, "gt": []}).truth is None
    assert parse_task({**GT_ROW, "gt": None}).truth is None
    said = {**GT_ROW["conversations"][2], "content": "144 and 42"}
    row = {"conversations": [*GT_ROW["conversations"][:2], said]}
    assert parse_task(row).truth.parts == ("144 and 42",) and parse_task(row).calls == []


def test_an_episode_that_says_nothing_is_wrong_in_everything(played):
    task = parse_task(tool_row("Hi", calls=(), answer="Hello."))
    assert score(played(task, "")) == {"name": 0, "arguments": 0, "answer": 0}
    assert score(played(task, "Hello!")) == {"name": 1, "arguments": 1, "answer": 1}


def test_tools_that_cannot_be_run_are_told():
    weather = {"name": "weather", "parameters": {}}
    other = {"function": {"name": "get_exchange_rate", "parameters": {"properties": {"a": {}}}}}
    rows = [tool_row(), tool_row(tools=[]), GT_ROW]
    for schemas in ([weather], [weather, other]):
        row = tool_row(tools=[])
        row["conversations"][0]["tools"] = schemas
        rows.append(row)
    tasks = [parse_task(row) for row in rows]
    assert describe_unrunnable(tasks[:3]) == ""
    assert "2 rows offer tools that cannot be run here (get_exchange_rate, weather)" in (
        describe_unrunnable(tasks)
    )


def test_without_tools_it_is_the_same_question(tokenizer, played):
    task = parse_task(tool_row())
    bare = task.without_tools()
    text = tokenizer.decode(Episode(bare, tokenizer).ids)
    assert "What is 6 × 7?" in text and "calculator" not in text and "<tools>" not in text
    assert score(played(bare, "It is 42."))["answer"] == 1
    assert played(bare, call_text(SUM)).errors[0] == "unknown_tool"
    assert task.offered and task.messages[0]["tools"]  # the task itself stays as it is


def test_tasks_ask_the_last_question_and_take_calls_in_every_form():
    chat = tool_row()["conversations"]
    theirs = {"function": {"name": "calculator", "arguments": '{"expression": "6 * 7"}'}}
    chat[2]["tool_calls"] = json.dumps([theirs])
    chat[0]["tools"] = json.dumps(chat[0]["tools"])
    first = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    task = parse_task({"conversations": [chat[0], *first, *chat[1:]]})
    assert task.calls == [SUM] and task.answer == "It is 42." and task.offered == list(TOOLS)
    assert [m["role"] for m in task.messages] == ["system", "user", "assistant", "user"]
    assert task.recorded_results[call_key(SUM)] == "42"
    asked = parse_task({"conversations": chat[:2], "answer": 42})
    assert asked.answer == "42" and not asked.calls


@pytest.mark.parametrize(
    "chat, sentence",
    [
        ([{"role": "assistant", "content": "a"}], "has no question"),
        (tool_row()["conversations"][:2], "does not end with the assistant's answer"),
        (tool_row()["conversations"][:4], "does not end with the assistant's answer"),
        (
            tool_row(calls=({"name": "a", "arguments": "x"},))["conversations"],
            "are no JSON object",
        ),
        (tool_row(calls=({"arguments": {}},))["conversations"], 'a tool call without a "name"'),
        ([], 'has no "conversations"'),
    ],
)
def test_a_row_that_is_no_task_is_named(tmp_path, chat, sentence):
    path = chat_file(tmp_path / "tasks.jsonl", [tool_row()["conversations"], chat])
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
    tasks = [
        parse_task(tool_row()),
        parse_task(tool_row(calls=(), tools=[])),
        parse_task(ROWS[0]).without_tools(),
    ]

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
        call = tokenizer(call_text(SUM)).input_ids  # and most of them then call a tool
        some = zip(found, episodes, strict=True)
        return [ids[: n % 5] + call + [2] if e.turns < n % 4 else ids for ids, e in some for n in [len(e.ids)]]  # fmt: skip # noqa: E501

    tasks = [parse_task(each) for each in ROWS[:6]]
    together = [Episode(task, tokenizer) for task in tasks]
    run_episodes(together, write)
    for task, one in zip(tasks, together, strict=True):
        alone = Episode(task, tokenizer)
        run_episodes([alone], write)
        assert alone.ids == one.ids and alone.action_mask == one.action_mask
    assert len({episode.turns for episode in together}) > 1
