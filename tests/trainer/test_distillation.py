"""Distillation: against trl, by hand and the slow way; its teachers; the student's own answers."""

import ctypes
import math
import re
import resource
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from ranks import together
from test_mistakes import complaint
from torch.testing import assert_close
from toy import CHATS, Trainer, chat_file, ended, everything, flags, fork, same, saved_teacher

from dataset.lm_dataset import load_documents
from dataset.packing import IGNORE_INDEX, PackedDataset, collate
from model import losses
from model.errors import UserError
from model.formats.hf_format import save_hf_folder
from model.losses import divergence_sum
from model.weights import TOKENIZER, load_model, load_tokenizer
from trainer import train_distillation, train_full_sft
from trainer.common.context import Context
from trainer.rl.batches import micro_batches
from trainer.rl.prompts import Prompt
from trainer.rl.rollout import Completion
from trainer.train_distillation import (
    distillation_loss,
    divergence,
    extract_prompts,
    is_on_policy_step,
    kl,
)

pytestmark = pytest.mark.usefixtures("in_a_hurry")
KINDS = ("forward", "reverse", "jsd", "skew")
V = 40  # of the vocabulary in tests of the equations


@pytest.fixture
def train(tmp_path) -> Trainer:
    return Trainer(tmp_path, train_distillation)


@pytest.fixture
def make_context(train, tokenizer):
    """A function that makes the context of some settings, and the teacher."""

    def make(**settings):
        args = train_distillation.Args(**train.settings(**settings))
        teacher = load_model(args.teacher_weight, tokenizer=tokenizer)
        return Context.create(args), teacher

    return make


def some_logits(count: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(count, V, generator=torch.Generator().manual_seed(seed))


# -- the divergences -------------------------------------------------------------------------------


def test_numbers_computed_by_hand():
    """Teacher (3/4, 1/4), student (1/2, 1/2); the mixture is (5/8, 3/8)."""
    teacher, student = (torch.tensor([p]).log() for p in ([0.75, 0.25], [0.5, 0.5]))
    found = {kind: divergence(teacher, student, kind, 0.5).item() for kind in KINDS}
    skew = 0.75 * math.log(6 / 5) + 0.25 * math.log(2 / 3)
    other = 0.5 * math.log(4 / 5) + 0.5 * math.log(4 / 3)
    assert found == pytest.approx(
        {
            "forward": 0.75 * math.log(1.5) + 0.25 * math.log(0.5),
            "reverse": 0.5 * math.log(2 / 3) + 0.5 * math.log(2),
            "jsd": (skew + other) / 2,
            "skew": skew,
        },
        abs=1e-6,
    )


@pytest.mark.parametrize(("kind", "mixture"), [(kind, 0.5) for kind in KINDS] + [("jsd", 0.1)])
def test_the_same_as_trl(monkeypatch, kind, mixture):
    """Loss and gradients of hidden states and head, in chunks of 5 positions; trl has no skewed
    one, but it is the first half of its mixture."""
    gkd = pytest.importorskip("trl.experimental.gkd")
    monkeypatch.setattr(losses, "CHUNK_SIZE", 5)
    g = torch.Generator().manual_seed(1)
    hidden, head = torch.randn(2, 9, 8, generator=g), torch.randn(V, 8, generator=g)
    taught, teacher_head = torch.randn(2, 9, 12, generator=g), torch.randn(V, 12, generator=g)
    labels = torch.randint(V, (2, 9), generator=g)
    labels[0, :4] = labels[1, 7:] = IGNORE_INDEX
    hidden.requires_grad_(), head.requires_grad_()
    how = partial(divergence, kind=kind, mixture=mixture)
    ours = divergence_sum(hidden, head, taught, teacher_head, labels, 1.5, how)
    gradients = torch.autograd.grad(ours, (hidden, head))

    trl = partial(gkd.GKDTrainer.generalized_jsd_loss, labels=labels, num_items_in_batch=1)
    student, teacher = hidden @ head.T, taught @ teacher_head.T
    beta = {"forward": 0.0, "reverse": 1.0}.get(kind, mixture)
    theirs = trl(student, teacher, beta=beta, temperature=1.5)
    if kind == "skew":  # JSD(T ‖ S) = ½ skew(T ‖ S) + ½ skew(S ‖ T)
        chosen = labels != IGNORE_INDEX
        p, q = ((z[chosen] / 1.5).log_softmax(-1) for z in (student, teacher))
        theirs = 2 * theirs - kl(p, ((p.exp() + q.exp()) / 2).log())
    expected = torch.autograd.grad(theirs, (hidden, head))
    count = (labels != IGNORE_INDEX).sum()
    assert_close(ours / count, theirs / count, atol=1e-5, rtol=0)
    for mine, other in zip(gradients, expected, strict=True):
        assert_close(mine / count, other / count, atol=1e-5, rtol=0)


def test_when_hot_it_is_matching_logits():
    """Hinton's eq. 4: τ² times the gradient nears (z_S − z_T) / V, for logits of mean 0."""
    student, teacher = (z - z.mean(-1, keepdim=True) for z in (some_logits(3), some_logits(3, 1)))
    student.requires_grad_()
    hot = 1e3
    loss = hot**2 * kl((teacher / hot).log_softmax(-1), (student / hot).log_softmax(-1))
    (gradient,) = torch.autograd.grad(loss, student)
    assert_close(gradient, (student - teacher) / V, atol=2e-3, rtol=1e-2)


def test_in_chunks_it_takes_less_memory(tmp_path):
    """Measured: what the process has more at its peak than before."""
    hidden, labels = torch.randn(1, 4096, 64), torch.zeros(1, 4096, dtype=torch.long)
    head = torch.randn(6400, 64, requires_grad=True)
    hidden.requires_grad_()

    def peak(name: str, loss) -> int:
        def measure():
            with suppress(AttributeError):  # only glibc keeps what is freed unless told otherwise
                ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            loss().backward()
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            (tmp_path / name).write_text(str(after - before))

        assert ended(fork(measure, tmp_path / "log")) == 0
        return int((tmp_path / name).read_text())

    def whole():
        student, teacher = ((hidden[0] @ w.T).log_softmax(-1) for w in (head, head.detach() + 1))
        return kl(teacher, student)

    chunked = peak("chunked", lambda: divergence_sum(hidden, head, hidden, head + 1, labels, 1, kl))
    assert 4 * chunked < peak("whole", whole)


# -- a batch ---------------------------------------------------------------------------------------


def test_padding_and_neighbours_do_not_matter(make_context, make_model):
    """Answers padded to a batch: the sum over each of them alone, with all logits in memory."""
    ctx, teacher = make_context()
    student = make_model(seed=3, vocab_size=6400)
    prompts = [Prompt(0, [], [1, 5, 6], None), Prompt(1, [], [1, 7, 8, 9, 10], None)]
    answers = [Completion(prompts[0], [11, 12, 2], "", True), Completion(prompts[1], [13], "", 0)]
    (batch,) = micro_batches(answers, 8, 0, ctx.device)
    inputs = dict(**batch.inputs, return_logits=False, output_hidden_states=True)
    how = dict(temperature=2.0, divergence=kl)
    together = distillation_loss(student, student(**inputs), teacher, batch, **how)
    alone = 0.0
    for each in answers:
        ids = torch.tensor([each.prompt.ids + each.tokens])
        p, q = (
            (model(ids).logits[0, len(each.prompt.ids) - 1 : -1] / 2).softmax(-1)
            for model in (teacher, student)
        )
        alone += (p * (p / q).log()).sum()
    assert_close(together, alone, atol=1e-4, rtol=1e-5)


def test_what_a_batch_asks(tmp_path, tokenizer):
    """Packed documents, one of two turns, are asked up to the last answer."""
    two_turns = [*CHATS[0], {"role": "user", "content": "more"}, *CHATS[1][1:]]
    chats = [two_turns, *CHATS[2:5]]
    documents = load_documents(chat_file(tmp_path / "a.jsonl", chats), "conversations", tokenizer)
    rows = PackedDataset(documents, 64)
    assert len(rows) < len(chats)
    batch = collate([rows[n] for n in range(len(rows))] + [[]])
    asked = {tokenizer.decode(prompt.ids) for prompt in extract_prompts(batch)}
    expected = {
        tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
        for chat in chats
    }
    assert asked == expected


def test_turns_are_evenly_spread():
    assert [is_on_policy_step(step, 0.25) for step in range(1, 9)] == [
        False,
        False,
        False,
        True,
    ] * 2
    assert all(is_on_policy_step(step, 1.0) for step in range(1, 9))
    assert not any(is_on_policy_step(step, 0.0) for step in range(1, 9))


# -- whole trainings -------------------------------------------------------------------------------


def test_with_alpha_1_it_is_fine_tuning_bit_for_bit(tmp_path, train):
    settings = dict(max_steps=4, dropout=0.1, learning_rate=1e-3)
    train("a", alpha=1.0, **settings)
    tuned = Trainer(tmp_path, train_full_sft)
    tuned("b", **settings)
    assert same(train.saved("a")["model"], tuned.saved("b")["model"])
    losses = [[record["loss"] for record in each] for each in (train.log("a"), tuned.log("b"))]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("on_policy", "use_moe"), [(0.0, False), (0.5, False), (0.0, True)])
def test_the_student_comes_closer_and_the_teacher_stays(train, monkeypatch, on_policy, use_moe):
    monkeypatch.setattr(
        train_distillation, "sample_answer", lambda *args: ""
    )  # which takes the time
    path = saved_teacher(train.folder, "other", use_moe=use_moe)
    before = load_model(path, tokenizer=load_tokenizer()).state_dict()
    settings = dict(alpha=0.0, learning_rate=1e-3, epochs=8, batch_size=4)
    settings |= dict(max_gen_len=8) if on_policy else {}
    settings |= dict(teacher_weight=path, student_use_moe=use_moe, on_policy=on_policy)
    metrics = train(val_path=[train.data], eval_interval=1, **settings)
    values = [record["eval_kl"] for record in train.log(kind="eval_kl")]
    assert values[-1] < 0.5 * values[0]
    assert metrics["name"] == "full_dist_32" + "_moe" * use_moe
    assert same(load_model(path, tokenizer=load_tokenizer()).state_dict(), before)


def test_the_teacher_gets_no_gradient(train, monkeypatch):
    kept = []
    load = train_distillation.load_teacher
    monkeypatch.setattr(
        train_distillation, "load_teacher", lambda *args: kept.append(load(*args)) or kept[-1]
    )
    train(max_steps=2)
    assert all(p.grad is None and not p.requires_grad for p in kept[0].parameters())
    assert not kept[0].training


@pytest.mark.parametrize("use_moe", [False, True])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(train, use_moe):
    sizes = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"))
    path = saved_teacher(train.folder, "other", use_moe=use_moe)
    more = dict(from_weight=path, teacher_weight=path, hidden_size=None, **sizes)
    train(**more, alpha=0.0, max_steps=1)
    assert train.log()[0]["loss"] == pytest.approx(0.0, abs=1e-5)


def test_a_transformers_folder_teaches_the_same(train, tmp_path, tokenizer):
    teacher = load_model(train.more["teacher_weight"], tokenizer=tokenizer)
    save_hf_folder(teacher, tokenizer, tmp_path / "folder")
    train("a", max_steps=3)
    train("b", max_steps=3, teacher_weight=str(tmp_path / "folder"))
    assert_close(train.saved("a")["model"], train.saved("b")["model"], atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_own_answers_are_resumed_and_shared_out(train, killed, ranks):
    """Stopped after two of four steps, or by two processes: the same as at one go."""
    more = dict(on_policy=0.5, max_gen_len=8, epochs=1, max_steps=4, save_interval=1, dropout=0.0)
    train("one", batch_size=2, **more)
    if ranks == 2:
        together(train, 2, batch_size=1, **more)
        ours, theirs = (train.saved(name)["model"] for name in ("a", "one"))
        assert_close(ours, theirs, atol=1e-4, rtol=0)
        return
    killed(2, train, batch_size=2, **more)
    train(batch_size=2, resume=True, **more)
    assert same(everything(train), everything(train, "one"))
    assert "completions/mean_length" in train.log()[1] and "ce" not in train.log()[1]


# -- mistakes --------------------------------------------------------------------------------------


def other_vocabulary(folder, tokenizer) -> dict:
    return {"teacher_weight": saved_teacher(folder, "other", vocab_size=6500)}


def other_words(folder, tokenizer) -> dict:
    """A folder whose tokenizer has another token in the place of one of ours."""
    path = folder / "words"
    teacher = load_model(saved_teacher(folder), tokenizer=tokenizer)
    save_hf_folder(teacher, tokenizer, path)
    words = (TOKENIZER / "tokenizer.json").read_text().replace("<tool_call>", "<tool_kall>")
    (path / "tokenizer.json").write_text(words)
    return {"teacher_weight": str(path), "tokenizer_path": str(TOKENIZER)}


def without_json(folder, tokenizer) -> dict:
    path = Path(saved_teacher(folder, "bare", num_attention_heads=8))
    path.with_suffix(".json").unlink()
    return {"teacher_weight": str(path)}


MISTAKES = {
    "an unknown tokenizer": (without_json, "bare.pth does not say which tokenizer .*--tokenizer_p"),
    "a larger vocabulary": (other_vocabulary, "knows 6500 tokens and the student 6400"),
    "other words": (other_words, "words was trained with another tokenizer"),
    "no teacher": (dict(teacher_weight="nowhere.pth"), "nowhere.pth .* does not exist"),
    "no such stage": (dict(teacher_weight="full_sft"), "no weights .*full_sft_768.pth"),
    "a deeper teacher": (dict(teacher_num_hidden_layers=9), "num_hidden_layers 2, and not 9"),
    "too much of the data": (dict(alpha=1.5), "--alpha must be from 0 to 1"),
    "more than all": (dict(on_policy=2.0), "--on_policy must be from 0 to 1"),
    "frozen": (dict(temperature=0.0), "--temperature must be more than 0"),
    "no mixture": (dict(mixture=1.0), "--mixture must be more than 0 and less than 1"),
    "no folder": (
        dict(rollout_url="http://localhost:9/v1", on_policy=0.5),
        "--rollout_url needs --rollout_fol",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_sentence(train, command, tokenizer, mistake):
    changes, sentence = MISTAKES[mistake]
    changes = changes(train.folder, tokenizer) if callable(changes) else changes
    code, printed = command(train.stage, *flags(train.settings(**changes)))
    assert code == 2
    said = complaint(printed)
    assert re.search(sentence, said), said


def test_another_teacher_is_not_resumed(train, tmp_path):
    train(max_steps=1)
    saved_teacher(tmp_path, seed=5)
    with pytest.raises(UserError, match="was made with teacher '[0-9a-f]{16}'"):
        train(max_steps=1, resume=True)
