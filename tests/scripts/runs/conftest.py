"""A folder as scripts/runs/minimind.sh leaves it, with models that were hardly trained."""

import json

import pytest
import torch
from toy import chat_file, pair_file, text_file

from dataset.jsonl import as_line
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import save_weights

TEXTS = [f"Held out number {n}: " + "tea and bread " * (n % 7) for n in range(30)]
CHINESE = [f"第{n}句：" + "今天天气很好。" * (1 + n % 5) for n in range(30)]


@pytest.fixture
def data_dir(tmp_path):
    """Files with plain names, and held-out ones beside them."""
    folder = tmp_path / "some data"
    folder.mkdir()
    for part in ("", "_val"):
        text_file(folder / f"pretrain{part}.jsonl", TEXTS + CHINESE)
        chat_file(folder / f"sft{part}.jsonl")
        pair_file(folder / f"dpo{part}.jsonl")
    return folder


@pytest.fixture
def finish(tmp_path, tokenizer):
    """A function that puts a finished stage into the folder of a run; the folder."""
    folder = tmp_path / "run"
    folder.mkdir()

    def make(stage: str, seed: int = 0, last: str = "changed_fraction", **origin):
        torch.manual_seed(seed)
        config = MiniMindConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
        about = {"steps": 40, "tokens": 2_000_000, "seconds": 1800, "from_weight": "none"}
        model, path = MiniMindForCausalLM(config), folder / f"{stage}_32.pth"
        save_weights(model, path, stage=stage, tokenizer=tokenizer, origin=about | origin)
        log = [{"step": n, "num_tokens": 1000 * n, "loss": 9 - n / 10} for n in (1, 20, 40)]
        log.append({"step": 40, last: 0.9})
        path.with_suffix(".metrics.jsonl").write_text("".join(map(as_line, log)))
        return folder

    return make


@pytest.fixture
def planned():
    """A function that writes plan.json into a folder."""

    def write(folder, stages=("pretrain", "full_sft"), **more):
        row = dict(data="a.jsonl", minutes=4.5, tokens=1e6, seconds=270, memory=1e9, disk=1e8)
        plan = dict(data_dir="", minutes=10.0, flags="", price="", device="cpu", machine="cpu")
        plan |= dict(cut={}, parameters=5_900_000, download=0, reading=10, evaluation=60, speed={})
        plan |= {"stages": {stage: row for stage in stages}} | more
        (folder / "plan.json").write_text(json.dumps(plan))
        return folder

    return write
