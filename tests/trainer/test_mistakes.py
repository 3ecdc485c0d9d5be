"""Mistakes that people make: each ends every trainer with one plain sentence and exit code 2.

A row of the table is a name, what the person did (it prepares files and returns changed flags, None
for a flag that is left out) and what the sentence must say.
"""

import gzip
import json
import math
import os
import pickle
import re
import shlex
import shutil
from pathlib import Path

import pytest
from toy import (
    Trainer,
    chat_file,
    flags,
    pair_file,
    text_file,
)

from model.weights import TOKENIZER

pytestmark = pytest.mark.usefixtures("in_a_hurry")


def given(**changes):
    """Flags and nothing else."""
    return lambda train: changes


def data(content: bytes | str, name: str = "bad.jsonl"):
    def write(train: Trainer) -> dict:
        path = train.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return {"data_path": [str(path)]}

    return write


def first_line(train: Trainer) -> str:
    return Path(train.data).read_text().splitlines()[0]


def third_line(content: bytes | str):
    """Two good lines, then this one."""

    def write(train: Trainer) -> dict:
        good = Path(train.data).read_bytes().splitlines(keepends=True)[:2]
        line = content if isinstance(content, bytes) else content.encode()
        return data(b"".join(good) + line + b"\n")(train)

    return write


def messages(*turns: tuple[str, object]):
    """A third line of messages (role, content)."""
    chat = [{"role": role, "content": content} for role, content in turns]
    return third_line(json.dumps({"conversations": chat}))


def weights(content: bytes | None = None, change=None, **changes):
    """A .pth to start from: these bytes, or a real one whose .json is changed by `change`."""

    def write(train: Trainer) -> dict:
        path = train.folder / "pretrain_32.pth"
        if content is None:
            maker = Trainer(train.folder)
            maker("made", max_steps=1)
            made = maker.folder / "made" / "out" / path.name
            path.write_bytes(made.read_bytes())
            info = json.loads(made.with_suffix(".json").read_text())
            (change or (lambda info: None))(info)
            path.with_suffix(".json").write_text(json.dumps(info))
        else:
            path.write_bytes(content)
        sizes = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"))
        return {"from_weight": str(path), **sizes, **changes}

    return write


class Code:
    """A pickle that would write a file if it were executed."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {shlex.quote(str(self.path))}",)


def pickle_with_code(train: Trainer) -> dict:
    return weights(pickle.dumps(Code(train.folder / "executed")))(train)


def occupied(flag: str):
    """A file where the folder of that flag should be."""

    def write(train: Trainer) -> dict:
        path = train.folder / "file"
        path.touch()
        return {flag: str(path / "folder")}

    return write


def after_a_run(**changes):
    """Resumed with something changed."""

    def write(train: Trainer) -> dict:
        train(max_steps=2)
        return {"max_steps": 2, "resume": True, **changes}

    return write


def damaged_checkpoint(train: Trainer) -> dict:
    changes = after_a_run()(train)
    path = train.checkpoint()
    path.write_bytes(path.read_bytes()[:1000])
    return changes


def broken_tokenizer(train: Trainer) -> dict:
    folder = train.folder / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    return {"tokenizer_path": str(folder)}


def tokenizer_without(key: str):
    def write(train: Trainer) -> dict:
        folder = train.folder / "tokenizer"
        folder.mkdir()
        shutil.copy(TOKENIZER / "tokenizer.json", folder)
        config = json.loads((TOKENIZER / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(
            json.dumps({name: value for name, value in config.items() if name != key})
        )
        return {"tokenizer_path": str(folder)}

    return write


def other_tokenizer(train: Trainer) -> dict:
    folder = train.folder / "tokenizer"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = (TOKENIZER / name).read_text().replace("<tool_call>", "<tool_kall>")
        (folder / name).write_text(content)
    return {**weights()(train), "tokenizer_path": str(folder)}


def two_sizes(train: Trainer) -> dict:
    out = train.folder / "a" / "out"
    out.mkdir(parents=True)
    for size in (32, 64):
        (out / f"pretrain_{size}.pth").touch()
    return {"from_weight": "pretrain", "hidden_size": None}


MISTAKES = {
    # flags
    "an unknown flag": (given(bogus=1), "unknown argument --bogus"),
    "an abbreviated flag": (given(epoch=1), "unknown argument --epoch"),
    "a word for a number": (given(epochs="many"), "--epochs: invalid int value: 'many'"),
    "a flag without its value": (given(log_interval=[]), "--log_interval.*: expected one argument"),
    "an unknown optimizer": (given(optimizer="sgd"), "--optimizer: invalid choice"),
    "an unknown schedule": (given(lr_schedule="square"), "--lr_schedule.*: invalid choice"),
    "an unknown dtype": (given(dtype="int8"), "--dtype: invalid choice"),
    "an unknown tracker": (given(tracker="tensorboard"), "--tracker: invalid choice"),
    "maybe": (given(resume="maybe"), "--resume"),
    # the machine
    "an unknown device": (given(device="gpu"), "--device gpu is unknown; try auto, cuda"),
    "a device of no use": (given(device="meta"), "--device meta is not supported"),
    "a GPU that is not there": (given(device="cuda:99"), "sees no CUDA GPU|there is no GPU 99"),
    # sizes
    "heads that do not divide": (given(hidden_size=30), "do not make a model: hidden_size 30"),
    "groups that do not divide": (given(num_key_value_heads=3), "do not make a model: num_atten"),
    "no heads": (given(num_attention_heads=0), "num_attention_heads must be at least 1"),
    "no layers": (given(num_hidden_layers=0), "num_hidden_layers must be at least 1"),
    "a negative width": (given(hidden_size=-32), "hidden_size must be at least 1"),
    "odd heads": (given(hidden_size=12), "head_dim 3"),
    # data
    "no data": (given(data_path=["nowhere.jsonl"]), "nowhere.jsonl does not exist; --data_path"),
    "no held-out data": (given(val_path=["nowhere.jsonl"]), "nowhere.jsonl does not exist"),
    "a folder": (lambda train: {"data_path": [str(train.folder)]}, "is a folder; name the .jsonl"),
    "an empty file": (data(""), "bad.jsonl holds no documents"),
    "blank lines": (data("\n \n"), "bad.jsonl holds no documents"),
    "not UTF-8": (third_line(b'{"text": "\xff\xfe"}'), "line 3 of .*bad.jsonl is not UTF-8"),
    "broken JSON": (third_line('{"text": "a"'), "line 3 of .*bad.jsonl is not JSON"),
    "a list": (third_line("[1, 2]"), "line 3 of .*bad.jsonl is no JSON object"),
    "half a character": (third_line(r'{"text": "\ud800"}'), "line 3 .* half a character"),
    "other keys": (third_line('{"content": "a"}'), 'line 3 of .*bad.jsonl has no "'),
    "an LFS pointer": (
        data("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"),
        "bad.jsonl is a pointer of Git LFS, not the file; `git lfs pull`",
    ),
    "no gzip file": (data("{}", "bad.jsonl.gz"), "bad.jsonl.gz is damaged, or no gzip file"),
    "half a gzip file": (
        data(gzip.compress(b'{"text": "abc"}\n' * 99)[:-9], "bad.jsonl.gz"),
        "bad.jsonl.gz is damaged",
    ),
    "one document, held out": (
        lambda train: {
            **data(Path(train.data).read_text().split("\n")[0])(train),
            "val_share": 0.5,
        },
        r"all (documents|pairs) of the data \(1\).* hold nothing out with --val_share 0",
    ),
    # weights
    "a stage not trained": (given(from_weight="dpo"), "no weights .*dpo_32.pth; train that stage"),
    "a file not there": (given(from_weight="nowhere.pth"), "nowhere.pth .* does not exist"),
    "several sizes": (  # distillation has a width that it looks for
        two_sizes,
        "several sizes of pretrain .*; choose with --hidden_size|has pretrain_32.pth, pretrain_64",
    ),
    "another width": (weights(hidden_size=64), "has hidden_size 32, as its .json says, and not 64"),
    "another depth": (weights(num_hidden_layers=3), "has num_hidden_layers 2, as its .json says"),
    "a .json of another model": (
        weights(change=lambda info: info["config"].update(num_hidden_layers=4)),
        "does not fit the model: it lacks model.layers.2",
    ),
    "a .json without config": (weights(change=lambda info: info.pop("config")), "json is damaged"),
    "weights in LFS": (
        weights(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"),
        "is a Git LFS pointer and not the weights; fetch them with `git lfs pull`",
    ),
    "no checkpoint": (weights(b"hello, I am no weights"), "is refused|is not a checkpoint"),
    "an empty checkpoint": (weights(b""), r"is not a checkpoint, or only part of one \(0 bytes\)"),
    "a pickle with code": (pickle_with_code, "is refused: .* never executed here"),
    "a safetensors file": (weights(b"\x80\0\0\0\0\0\0\0{}"), "is a safetensors file"),
    "another tokenizer": (other_tokenizer, "was trained with another tokenizer .*--tokenizer_path"),
    # tokenizer
    "no tokenizer": (given(tokenizer_path="nowhere"), "no tokenizer.json in nowhere"),
    "no end": (tokenizer_without("eos_token"), "tokenizer .* has no eos_token"),
    "a broken tokenizer": (broken_tokenizer, "tokenizer .* cannot be read"),
    # places
    "weights to nowhere": (occupied("save_dir"), "cannot write to .*file/folder"),
    "checkpoints to nowhere": (occupied("checkpoint_dir"), "cannot write to .*file/folder"),
    # going on
    "another seed": (after_a_run(seed=7), "was made with seed 42, and this run has 7; give the"),
    "another length": (after_a_run(epochs=9), r"was made with epochs \d+, and this run has 9"),
    "other sizes": (after_a_run(num_key_value_heads=4), "with num_key_value_heads 2, and this"),
    "experts of a dense model": (
        given(n_routed_experts=8),
        "has no effect without --use_moe 1",
    ),
    "two ways to balance": (
        given(use_moe=1, scoring_func="sigmoid", aux_loss_alpha=0.1),
        "sigmoid balances by a bias and has no balance loss",
    ),
    "more experts than there are": (given(use_moe=1, num_experts_per_tok=5), "cannot use 5 of 4"),
    "a damaged checkpoint": (damaged_checkpoint, "checkpoint.pt is damaged; start anew without"),
    # training
    "minutes and steps": (
        given(minutes=5, max_steps=100),
        "--minutes has no effect with --max_steps",
    ),
    "far too fast": (given(learning_rate=1e30, epochs=9), "no finite gradient.*--learning_rate"),
    **{
        f"--{name} {value}": (given(**{name: value}), f"--{name} (must|1)")
        for name, values in {
            "epochs": (0, -1),
            "batch_size": (0, -1),
            "accumulation_steps": (0,),
            "learning_rate": (0.0, -1e-4, math.nan, math.inf),
            "max_seq_len": (0, 1),
            "log_interval": (0, -1),
            "eval_interval": (-1,),
            "save_interval": (-1,),
            "max_steps": (-1,),
            "minutes": (-1.0, math.nan),
            "warmup_steps": (-1,),
            "weight_decay": (-0.1,),
            "grad_clip": (-1.0, math.nan),
            "num_workers": (-1,),
            "batch_ramp": (-1,),
            "val_documents": (-1,),
            "val_share": (-0.1, 1.0),
            "dropout": (-0.1, 1.0),
            "seed": (-1, 2**32, 10**20),
        }.items()
        for value in values
    },
}
# Mistakes in conversations, which trainers of plain text do not read.
IN_CONVERSATIONS = {
    "no template": (tokenizer_without("chat_template"), "tokenizer .* has no chat_template"),
    "text instead": (third_line('{"text": "a"}'), 'has no "conversations"'),
    "no messages": (messages(), 'has no "conversations"'),
    "no assistant turn": (messages(("user", "hi")), "line 3 of .*bad.jsonl has no assistant turn"),
    "an unknown role": (messages(("judge", "hi")), "unknown role 'judge'; known: user, human"),
    "a number as content": (messages(("user", 3.5), ("assistant", "a")), '"content" is no text'),
    "no role": (
        third_line('{"conversations": [{"content": "a"}]}'),
        'has a message without a "role"',
    ),
    "broken tool calls": (
        third_line('{"conversations": [{"role": "assistant", "content": "", "tool_calls": "[{"}]}'),
        'line 3 of .*"tool_calls" whose text is not JSON',
    ),
    "every conversation too long": (
        given(max_seq_len=4),
        r"every conversation is longer than --max_seq_len 4 \(the shortest has \d+ tokens\)",
    ),
}

# And in preferences; test_dpo.py has more of them.
IN_PREFERENCES = {
    "no preferences": (third_line('{"text": "a"}'), 'line 3 .* has no "chosen" and "rejected"'),
    "a conversation instead": (messages(("user", "hi")), 'has no "chosen" and "rejected"'),
    "every pair too long": (
        given(max_seq_len=4),
        r"every pair has a side longer than --max_seq_len 4 \(of the shortest pair it has \d+ tok",
    ),
}
OF_DATA = {text_file: {}, chat_file: IN_CONVERSATIONS, pair_file: IN_PREFERENCES}


def complaint(printed) -> str:
    """The one sentence on stderr."""
    said = re.split(r"[\r\n]", printed.err)
    assert "Traceback" not in printed.err
    (error,) = [line for line in said if line.startswith("error: ")]
    return error


def files(folder: Path) -> dict[Path, bytes]:
    """All files but the cache of tokenised data."""
    paths = (path for path in folder.rglob("*") if path.is_file() and "cache" not in path.parts)
    return {path: path.read_bytes() for path in paths}


@pytest.mark.filterwarnings("ignore")  # weights without a .json warn of that first
@pytest.mark.parametrize("mistake", [*MISTAKES, *IN_CONVERSATIONS, *IN_PREFERENCES])
def test_a_mistake_is_told_in_one_sentence(any_stage, command, monkeypatch, mistake):
    train = any_stage
    known = {**MISTAKES, **OF_DATA[train.write_data]}
    if mistake not in known:
        pytest.skip("this trainer reads other data")
    prepare, sentence = known[mistake]
    changes = prepare(train)
    settings = {name: v for name, v in train.settings(**changes).items() if v is not None}
    before = files(train.folder)
    code, printed = command(train.stage, *flags(settings))
    assert code == 2
    assert re.search(sentence, complaint(printed))
    if mistake != "far too fast":  # it did begin, and its log says so
        assert files(train.folder) == before  # nor has a pickle been executed


def test_the_table_is_long_enough():
    assert len(MISTAKES) + len(IN_CONVERSATIONS) >= 60


# -- help ------------------------------------------------------------------------------------------


def test_help_lists_every_flag_with_a_line(any_stage, command):
    stage = any_stage.stage
    code, printed = command(stage, "--help")
    assert code == 0
    assert stage.__doc__.splitlines()[0] in printed.out
    for name, each in stage.Args.__dataclass_fields__.items():
        assert f"--{name}" in printed.out
        assert len(each.metadata["help"]) > 5
