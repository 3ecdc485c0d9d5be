"""Rows as other tools write them, and rows that carry what the training cannot express."""

import json
import random

import pytest

from dataset.encoding import check_messages
from dataset.forms.rows import (
    LISTS,
    MEANINGFUL,
    SYSTEMS,
    TOOLS,
    as_conversation,
    as_pair,
    as_prompt,
    as_text,
)
from dataset.grading import read_truth
from dataset.lm_dataset import encode_chat, load_documents
from dataset.tools.loop import parse_task
from model.errors import UserError
from trainer.rl.prompts import parse_prompt_row


def said(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


ASK, REPLY, SYSTEM = said("user", "2+5?"), said("assistant", "7"), said("system", "Be brief.")
TOOL = {"type": "function", "function": {"name": "thermo", "parameters": {"type": "object"}}}
CALL = {"name": "thermo", "arguments": {"town": "Oslo"}}
NESTED = {"id": "c1", "type": "function", "function": {**CALL, "arguments": '{"town": "Oslo"}'}}
OFFER = said("system", "", tools=[TOOL])
CALLED = [ASK, said("assistant", "", tool_calls=[CALL]), said("tool", '{"c": 4}'), REPLY]
SHAREGPT = [{"from": "human", "value": "2+5?"}, {"from": "gpt", "value": "7"}]

# name: (row of another tool, the messages that it means)
CONVERSATIONS = {
    "own": ({"conversations": [ASK, REPLY]}, [ASK, REPLY]),
    "OpenAI": ({"messages": [ASK, REPLY]}, [ASK, REPLY]),
    "a table's column": ({"messages": json.dumps([ASK, REPLY])}, [ASK, REPLY]),
    "ShareGPT": ({"conversations": SHAREGPT}, [ASK, REPLY]),
    "ShareGPT with system and tools": (
        {"conversations": SHAREGPT, "system": "Be brief.", "tools": json.dumps([TOOL])},
        [said("system", "Be brief.", tools=[TOOL]), ASK, REPLY],
    ),
    "LLaMA-Factory's calls": (
        {
            "conversations": [
                SHAREGPT[0],
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": '{"c": 4}'},
                SHAREGPT[1],
            ]
        },
        CALLED,
    ),
    "trl: tools beside": ({"messages": CALLED, "tools": [TOOL]}, [OFFER, *CALLED]),
    "tools beside as text": ({"messages": CALLED, "tools": json.dumps([TOOL])}, [OFFER, *CALLED]),
    "tools twice, the same": (
        {"messages": [OFFER, ASK, REPLY], "tools": [TOOL]},
        [OFFER, ASK, REPLY],
    ),
    "OpenAI's functions": (
        {
            "messages": [
                ASK,
                {"role": "assistant", "content": None, "function_call": CALL},
                {"role": "function", "name": "thermo", "content": '{"c": 4}'},
                REPLY,
            ],
            "functions": [TOOL["function"]],
        },
        [OFFER, *CALLED[:2], said("tool", '{"c": 4}', name="thermo"), REPLY],
    ),
    "results in another order": (
        {
            "messages": [
                ASK,
                said("assistant", "", tool_calls=[{**NESTED, "id": n} for n in ("a", "b")]),
                said("tool", "second", tool_call_id="b"),
                said("tool", "first", tool_call_id="a"),
                REPLY,
            ]
        },
        [
            ASK,
            said("assistant", "", tool_calls=[{**NESTED, "id": n} for n in ("a", "b")]),
            said("tool", "first", tool_call_id="a"),
            said("tool", "second", tool_call_id="b"),
            REPLY,
        ],
    ),
    "developer": ({"messages": [said("developer", "Be brief."), ASK, REPLY]}, [SYSTEM, ASK, REPLY]),
    "parts": (
        {"messages": [said("user", [{"type": "text", "text": "2+"}, "5?"]), REPLY]},
        [ASK, REPLY],
    ),
    "a part that thinks": (
        {
            "messages": [
                ASK,
                said(
                    "assistant",
                    [{"type": "thinking", "thinking": "easy"}, {"type": "text", "text": "7"}],
                ),
            ]
        },
        [ASK, said("assistant", "7", reasoning_content="easy")],
    ),
    "numbers": ({"messages": [ASK, said("assistant", 7)]}, [ASK, REPLY]),
    "a result that is JSON": (
        {"messages": [*CALLED[:2], said("tool", {"c": 4}), REPLY]},
        CALLED,
    ),
    "a thought and no answer": (
        {"messages": [ASK, said("assistant", None, reasoning="easy")]},
        [ASK, said("assistant", "", reasoning_content="easy")],
    ),
    "thinking": (
        {"messages": [ASK, said("assistant", "7", thinking="easy", reasoning_content=None)]},
        [ASK, said("assistant", "7", reasoning_content="easy")],
    ),
    "weights that change nothing": (
        {"messages": [{**ASK, "weight": 0, "train": False}, {**REPLY, "weight": 1.0}]},
        [{**ASK, "weight": 0, "train": False}, {**REPLY, "weight": 1.0}],
    ),
    "Alpaca": (
        {"instruction": "Add.", "input": "2 and 5", "output": "7", "history": [["Hi", "Hello"]]},
        [said("user", "Hi"), said("assistant", "Hello"), said("user", "Add.\n2 and 5"), REPLY],
    ),
    "trl: prompt and completion": ({"prompt": [ASK], "completion": [REPLY]}, [ASK, REPLY]),
    "prompt and completion as text": ({"prompt": "2+5?", "completion": "7"}, [ASK, REPLY]),
    "Dolly": (
        {"instruction": "2+5?", "context": "", "response": "7", "category": "x"},
        [ASK, REPLY],
    ),
    "OpenOrca": (
        {"system_prompt": "Be brief.", "question": "2+5?", "response": "7", "id": "x"},
        [SYSTEM, ASK, REPLY],
    ),
    "a thought beside": (
        {"question": "2+5?", "reasoning": "easy", "answer": "7"},
        [ASK, said("assistant", "7", reasoning_content="easy")],
    ),
    "an answer that reads None": (
        {"question": "2+5?", "answer": "None"},
        [ASK, said("assistant", "None")],
    ),
    "UltraChat's prompt again": (
        {"prompt": "2+5?", "prompt_id": "x", "messages": [ASK, REPLY]},
        [ASK, REPLY],
    ),
    "xLAM": (
        {"query": "2+5?", "answers": json.dumps([CALL]), "tools": json.dumps([TOOL]), "id": 1},
        [OFFER, *CALLED[:2]],
    ),
    "a number as the answer": ({"question": "2+5?", "answer": 7}, [ASK, REPLY]),
    "an empty cell": ({"instruction": "2+5?", "input": float("nan"), "output": "7"}, [ASK, REPLY]),
    "an empty cell as text": (
        {"instruction": "2+5?", "input": "None", "output": "7"},
        [ASK, REPLY],
    ),
    "a thought in a column": (
        {"question": "2+5?", "cot": "easy", "answer": "7"},
        [ASK, said("assistant", "7", reasoning_content="easy")],
    ),
    "XTuner": (
        {"conversation": [{"system": "Be brief.", "input": "2+5?", "output": "7"}]},
        [SYSTEM, ASK, REPLY],
    ),
    "Firefly": ({"conversation": [{"human": "2+5?", "assistant": "7"}]}, [ASK, REPLY]),
    "capitals": (
        {"messages": [{"role": "User", "content": "2+5?"}, {"role": "Assistant", "content": "7"}]},
        [ASK, REPLY],
    ),
    "ms-swift's calls, a message each": (
        {
            "tools": json.dumps([TOOL]),
            "messages": [
                ASK,
                {"role": "tool_call", "content": json.dumps(CALL)},
                {"role": "tool_call", "content": json.dumps(CALL)},
                {"role": "tool_response", "content": "4"},
                {"role": "tool_response", "content": "5"},
                REPLY,
            ],
        },
        [
            OFFER,
            ASK,
            said("assistant", "", tool_calls=[CALL, CALL]),
            said("tool", "4"),
            said("tool", "5"),
            REPLY,
        ],
    ),
    "system message beside": (
        {"messages": [ASK, REPLY], "system_message": "Be brief."},
        [SYSTEM, ASK, REPLY],
    ),
    "other keys": (
        {
            "id": 3,
            "source": "web",
            "score": 0.5,
            "lang": "en",
            "label": 2,
            "messages": [ASK, REPLY],
        },
        [ASK, REPLY],
    ),
}


@pytest.mark.parametrize(("row", "expected"), CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_conversations_of_other_tools(tmp_path, tokenizer, row, expected):
    assert check_messages(as_conversation(row)["conversations"]) == expected
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row]))
    (document,) = load_documents(path, "conversations", tokenizer)
    assert document["input_ids"].tolist() == encode_chat(tokenizer, expected).ids


@pytest.mark.parametrize("nothing", ["null", "None", "[]", "", "{}", None, [], {}, "NaN"])
def test_text_that_says_nothing_is_absence(nothing):
    lists = {"tools": nothing, "tool_calls": nothing}
    messages = [
        said("system", "Be brief.", **lists),
        said("user", "2+5?", **lists, reasoning_content=nothing),
        said("assistant", "7", **lists, reasoning_content=nothing, function_call=nothing),
    ]
    row = {"conversations": messages, "tools": nothing, "images": nothing, "system": nothing or ""}
    if nothing not in ("null", "None", "[]", "{}", "NaN"):  # a system prompt may be any text
        assert as_conversation(row)["conversations"] == [SYSTEM, ASK, REPLY]
    del row["system"]
    assert as_conversation(row)["conversations"] == [SYSTEM, ASK, REPLY]


def with_reply(**more) -> dict:
    return {"messages": [ASK, {**REPLY, **more}]}


REFUSED = {
    "image": ({**with_reply(), "images": ["a.png"]}, '"images", and the model reads text alone'),
    "image in a part": (
        {"messages": [said("user", [{"type": "image_url", "image_url": {}}]), REPLY]},
        "'image_url'; the model reads text alone",
    ),
    "audio in a message": (with_reply(audio={"id": 1}), '"audio", and the model'),
    "another part": ({"messages": [ASK, said("assistant", [{"type": "tool_use"}])]}, "'tool_use'"),
    "weight": (with_reply(weight=0), '"weight": 0 in a message of the assistant.*drop_keys weight'),
    "train": (with_reply(train=False), '"train": false'),
    "loss on the user": (
        {"messages": [{**ASK, "loss": True}, REPLY]},
        '"loss": true in a message of the user',
    ),
    "weight of a row": ({**with_reply(), "weight": 0.3}, '"weight", which the training cannot use'),
    "weights of messages": ({**with_reply(), "weights": [0, 1]}, '"weights", which'),
    "loss mask": ({**with_reply(), "loss_mask": [0, 1]}, '"loss_mask", which'),
    "ms-swift's pair": ({**with_reply(), "rejected_response": "8"}, '"rejected_response", which'),
    "no answer": ({"instruction": "2+5?", "input": "", "output": ""}, "no answer to it"),
    "KTO": ({"prompt": "2+5?", "completion": "8", "label": False}, '"label"'),
    "template options": (
        {**with_reply(), "chat_template_kwargs": {"x": 1}},
        "chat_template_kwargs",
    ),
    "thinking off": ({**with_reply(), "enable_thinking": False}, '"enable_thinking", which'),
    "loss on inputs": ({**with_reply(), "train_on_input": True}, '"train_on_input", which'),
    "tools by another name": ({**with_reply(), "tool_schemas": [TOOL]}, '"tool_schemas", which'),
    "refusal": (with_reply(refusal="No."), '"refusal"'),
    "two systems": ({"messages": [SYSTEM, ASK, REPLY], "system": "Be long."}, "another system"),
    "two tool lists": (
        {"messages": [OFFER, ASK, REPLY], "tools": [{**TOOL, "x": 1}]},
        "other tools",
    ),
    "tools of a user": (
        {"messages": [{**ASK, "tools": [TOOL]}, REPLY]},
        '"tools" in a message of the user',
    ),
    "calls of a user": (
        {"messages": [{**ASK, "tool_calls": [CALL]}, REPLY]},
        '"tool_calls" in a message of the user',
    ),
    "thought of a user": ({"messages": [{**ASK, "reasoning": "hm"}, REPLY]}, "only answers"),
    "two thoughts": (with_reply(reasoning="a", thinking="b"), "which differ"),
    "two lists": ({**with_reply(), "conversations": [ASK, said("assistant", "8")]}, "which differ"),
    "another prompt": ({**with_reply(), "prompt": "3+3?"}, '"prompt", which'),
    "a name": ({"messages": [{**ASK, "name": "Ann"}, REPLY]}, '"name" in a message of the user'),
    "a call that is no JSON": (
        {"conversations": [SHAREGPT[0], {"from": "function_call", "value": "add(2, 5)"}]},
        "function_call.* not JSON",
    ),
    "a pair": (
        {"prompt": "2+5?", "chosen": "7", "rejected": "8"},
        "preference pair, for train_dpo",
    ),
    "a text": ({"text": "2+5"}, "it is a text, for train_pretrain.py"),
    "segments": ({"segments": [{"label": True, "text": "a"}]}, '"segments" are not read'),
    "unknown": ({"foo": 1}, r"its keys \(foo\) are of no known form"),
}


@pytest.mark.parametrize(("row", "complaint"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_expressed_is_refused(row, complaint):
    with pytest.raises(UserError, match=complaint):
        check_messages(as_conversation(row)["conversations"])


WRONG = said("assistant", "8")
PAIRS = {
    "own": {"chosen": [ASK, REPLY], "rejected": [ASK, WRONG]},
    "trl": {"prompt": [ASK], "chosen": [REPLY], "rejected": [WRONG]},
    "trl as text": {"prompt": "2+5?", "chosen": "7", "rejected": "8"},
    "UltraFeedback": {
        "prompt": "2+5?",
        "chosen": [ASK, REPLY],
        "rejected": [ASK, WRONG],
        "messages": [ASK, REPLY],
        "score_chosen": 3.0,
    },
    "LLaMA-Factory": {
        "conversations": SHAREGPT[:1],
        "chosen": SHAREGPT[1],
        "rejected": {"from": "gpt", "value": "8"},
    },
    "ms-swift": {"messages": [ASK, REPLY], "rejected_response": "8"},
    "ms-swift's messages": {"messages": [ASK, REPLY], "rejected_messages": [ASK, WRONG]},
    "Alpaca": {"instruction": "2+5?", "input": "", "chosen": "7", "rejected": "8"},
    "OpenAI": {
        "input": {"messages": [ASK], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [REPLY],
        "non_preferred_output": [WRONG],
    },
}


@pytest.mark.parametrize("row", PAIRS.values(), ids=PAIRS.keys())
def test_pairs_of_other_tools(row):
    assert as_pair(row) == PAIRS["own"]


def test_a_pair_has_its_system_prompt_and_tools_on_both_sides():
    row = {**PAIRS["trl as text"], "system": "Be brief.", "tools": [TOOL]}
    head = {**SYSTEM, "tools": [TOOL]}
    assert as_pair(row) == {"chosen": [head, ASK, REPLY], "rejected": [head, ASK, WRONG]}


BAD_PAIRS = {
    "one side": ({"chosen": [ASK, REPLY]}, 'has no "rejected"'),
    "no prompt": ({"chosen": "\n\nHuman: 2+5?", "rejected": "b"}, 'no "prompt" that it answers'),
    "another prompt": ({"prompt": "3+3?", **PAIRS["own"]}, "a prompt that its"),
    "margin": ({**PAIRS["trl"], "margin": 0.5}, '"margin", which'),
    "image": ({**PAIRS["trl"], "images": ["a.png"]}, "reads text alone"),
}


@pytest.mark.parametrize(("row", "complaint"), BAD_PAIRS.values(), ids=BAD_PAIRS.keys())
def test_bad_pairs(row, complaint):
    with pytest.raises(UserError, match=complaint):
        as_pair(row)


PROMPTS = {
    "own": ({"conversations": [ASK, REPLY], "answer": 7}, "7"),
    "the last answer is empty": (
        {"conversations": [ASK, said("assistant", "")], "answer": "7"},
        "7",
    ),
    "null, after an export": (
        {"conversations": [ASK, said("assistant", None)], "answer": "7"},
        "7",
    ),
    "trl": ({"prompt": [ASK], "solution": "7"}, "7"),
    "GSM8K": ({"question": "2+5?", "answer": "7"}, "7"),
    "verl": ({"prompt": [ASK], "reward_model": {"style": "rule", "ground_truth": "7"}}, "7"),
    "verl in a table": (
        {"prompt": json.dumps([ASK]), "reward_model": json.dumps({"ground_truth": "7"})},
        "7",
    ),
    "expected answer": ({"problem": "2+5?", "expected_answer": "7"}, "7"),
    "no truth": ({"prompt": "2+5?"}, None),
}


@pytest.mark.parametrize(("row", "answer"), PROMPTS.values(), ids=PROMPTS.keys())
def test_prompts_of_other_tools(row, answer):
    messages, truth, *_ = parse_prompt_row(row)
    assert messages == [ASK] and truth == read_truth({"answer": answer})


def test_a_prompt_keeps_its_list_of_truths():
    row = {"conversations": [ASK, said("assistant", "")], "gt": ["7"], "id": 3}
    assert as_prompt(row) == {key: row[key] for key in ("conversations", "gt")}


@pytest.mark.parametrize("beside", [{"messages": CALLED}, {"conversations": CALLED}])
def test_tools_beside_the_messages_are_offered(beside):
    task = parse_task({**beside, "tools": json.dumps([TOOL])})
    assert task.tools == [TOOL] and task.offered == ["thermo"]
    assert task.calls == [CALL] and task.answer == "7"


KEYS = [*sorted(MEANINGFUL), *LISTS, *SYSTEMS, *TOOLS, "answer", "gt", "role", "content", "from"]
KEYS += ["value", "tool_calls", "function_call", "name", "arguments", "type", "reward_model"]
VALUES = [None, "", "a", "null", "[{", '[{"role": "user"}]', 0, 1, 1.5, True, "user", "assistant"]
VALUES += ["tool", "function_call", "text", "thinking", '{"name": "f"}', 10**400, [], {}]


def random_value(dice: random.Random, depth: int):
    kind = dice.random() if depth else 0
    if kind < 0.4:
        return dice.choice(VALUES)
    if kind < 0.7:
        return [random_value(dice, depth - 1) for _ in range(dice.randrange(4))]
    return {dice.choice(KEYS): random_value(dice, depth - 1) for _ in range(dice.randrange(5))}


@pytest.mark.parametrize("read", [as_conversation, as_prompt, as_pair])
def test_any_row_is_read_or_refused(read):
    dice, outcomes = random.Random(0), {True: 0, False: 0}
    for _ in range(3000):
        row = {key: random_value(dice, 3) for key in dice.sample(KEYS, dice.randrange(5))}
        try:
            row = read(row)
            for name in row.keys() & {"conversations", "chosen", "rejected"}:
                check_messages(row[name])
            outcomes[True] += 1
        except UserError as error:
            assert "\n" not in str(error)
            outcomes[False] += 1
    assert outcomes[False] > 1000


def test_a_text_with_a_picture_is_no_text():
    assert as_text({"text": "a", "image": None, "url": "x"}) == "a"
    with pytest.raises(UserError, match='"image", and the model reads text alone'):
        as_text({"text": "a", "image": "a.png"})
