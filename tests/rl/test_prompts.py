"""The prompts of reinforcement learning: files with bad rows, and of other kinds."""

import json
import re

import pytest

from dataset.tools.loop import read_tasks
from model.errors import UserError
from trainer import train_agent, train_grpo
from trainer.common.context import Context
from trainer.rl.prompts import read_prompts

ROWS = [
    {
        "conversations": [
            {"role": "user", "content": f"{n} + 1 ="},
            {"role": "assistant", "content": str(n + 1)},
        ]
    }
    for n in range(3)
]
STAGES = {train_grpo: None, train_agent: train_agent.parse_task_row}


@pytest.fixture(params=STAGES, ids=lambda stage: stage.__name__)
def read(request, tmp_path, tokenizer):
    stage = request.param

    def read(content: bytes, **settings):
        path = tmp_path / "data.jsonl"
        path.write_bytes(content)
        args = stage.Args(
            from_weight="none",
            data_path=[str(path)],
            device="cpu",
            save_dir=str(tmp_path),
            **{"val_share": 0.0, **settings},
        )
        train, _ = read_prompts(Context.create(args), tokenizer, lambda prompt: True, STAGES[stage])
        return [prompt.messages[-1]["content"] for prompt in train.prompts]

    return read


ASKED = ["0 + 1 =", "1 + 1 =", "2 + 1 ="]


def test_bad_prompts_are_errors_or_left_out(read, capsys):
    lines = [json.dumps(row).encode() for row in ROWS]
    no_question = b'{"conversations": [{"role": "assistant", "content": "a"}]}'
    content = b"\n".join([lines[0], b"{", lines[1], no_question, b"\xff", lines[2]])
    with pytest.raises(UserError, match=r"line 2 of .*data\.jsonl is not JSON"):
        read(content)
    assert read(content, skip_bad_rows=True) == ASKED
    told = capsys.readouterr().out
    assert "3 bad rows are left out" in told
    assert re.findall(r"line (\d) of", told) == ["2", "4", "5"]
    with pytest.raises(UserError, match=r"all 2 rows are bad; line 1 of .* is not JSON"):
        read(b"{]\n" + no_question, skip_bad_rows=True)


def test_prompts_come_from_lists_and_utf_16_too(read):
    assert read(json.dumps(ROWS, indent=1).encode()) == ASKED
    assert read("\r\n".join(map(json.dumps, ROWS)).encode("utf-16")) == ASKED


def test_a_single_prompt_is_called_one(read):
    with pytest.raises(UserError, match=r"all prompts of the data \(1\)"):
        read(json.dumps(ROWS[0]).encode(), val_share=0.1)


def test_tasks_of_a_list(tmp_path):
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps([*ROWS, 5]))
    with pytest.raises(UserError, match="value 4 of .* is no JSON object"):
        read_tasks(path)
