"""Reasoning: the weighted loss, the form and what is asked of held-out questions, RL on top."""

from pathlib import Path

import pytest
import torch
from toy import CHATS, REASONED, Trainer, assert_close, chat_file, logged, same

import eval_llm
from dataset.lm_dataset import encode_chat, load_documents
from dataset.packing import IGNORE_INDEX, PackedDataset, collate
from dataset.reply_parser import parse_reasoning, tagged_answer
from model.command_line import parse_arguments
from model.errors import UserError
from model.losses import cross_entropy_sum
from trainer import train_distill_reason, train_full_sft, train_grpo
from trainer.common.context import Context
from trainer.common.setup import init_model, load_packed
from trainer.rl.prompts import parse_prompt_row, read_prompts
from trainer.train_distill_reason import answer_questions, held_out_questions, make_label_weights

pytestmark = pytest.mark.usefixtures("in_a_hurry")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
GOOD = "<think>\n1 + 1\n= 2\n</think>\n<answer>\n2\n</answer>"


@pytest.fixture
def train(tmp_path) -> Trainer:
    return Trainer(tmp_path, train_distill_reason)


def batch_of(folder: Path, tokenizer, chats):
    documents = load_documents(chat_file(folder / "chats.jsonl", chats), "conversations", tokenizer)
    rows = PackedDataset(documents, 64)
    return collate([rows[n] for n in range(len(rows))])


def by_hand(model, batch, tokenizer, weight: float) -> tuple[torch.Tensor, float]:
    """Σ w · −log p and Σ w, token by token."""
    tags = {tokenizer.encode(tag)[0] for tag in TAGS}
    loss, total = torch.zeros(()), 0.0
    log_p = model(**batch.inputs).logits.log_softmax(-1)
    for row, labels in enumerate(batch.labels.tolist()):
        for place, label in enumerate(labels[1:]):
            if label != IGNORE_INDEX:
                w = weight if label in tags else 1.0
                loss, total = loss - w * log_p[row, place, label], total + w
    return loss, total


# -- the loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 12])  # few labels, and so many that they go in chunks
def test_the_weighted_loss_is_the_sum_by_hand_with_its_gradients(
    tmp_path, tokenizer, make_model, rows
):
    model = make_model(vocab_size=len(tokenizer), hidden_size=32, initializer_range=0.05)
    batch = batch_of(tmp_path, tokenizer, REASONED[:rows])
    assert (batch.num_label_tokens > 32) == (rows > 1)
    expected, total = by_hand(model, batch, tokenizer, 10.0)
    (expected / total).backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    weights = make_label_weights(tokenizer, len(tokenizer), 10.0)
    loss = model(**batch.inputs, labels=batch.labels, label_weights=weights).loss
    loss.backward()
    assert total == batch.num_label_tokens + 9 * 4 * rows
    assert loss.item() == pytest.approx(expected.item() / total, rel=1e-6)
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        assert_close(parameter.grad, gradient, 1e-6)


def test_an_update_divides_by_the_weights_of_all_its_batches(train, tokenizer):
    """Which differ in how many of their tokens are tags: row by row the mean would be another."""
    args = train_distill_reason.Args(
        **train.settings(batch_size=1, accumulation_steps=12, tag_weight=7.0, epochs=1)
    )
    model = init_model(args, tokenizer)
    batch = batch_of(train.folder, tokenizer, REASONED)
    loss, total = by_hand(model, batch, tokenizer, 7.0)
    (record,) = logged(train_distill_reason.main(args))
    assert record["loss"] == pytest.approx(loss.item() / total, abs=1e-4)


def test_how_a_window_is_cut_into_batches_changes_nothing(train, trajectory):
    seen = []
    for batch_size, steps in ((8, 1), (4, 2), (1, 8)):
        window = dict(batch_size=batch_size, accumulation_steps=steps, max_steps=3, epochs=3)
        norms = [record["grad_norm"] for record in logged(train(**window))]
        seen.append((torch.tensor(norms), trajectory[-1]))
    for other in seen[1:]:
        assert_close(other[0], seen[0][0], 2e-4)
        assert_close(other[1], seen[0][1])


def test_with_weight_1_it_is_fine_tuning_bit_for_bit(train, tmp_path):
    sft = Trainer(tmp_path, train_full_sft, (chat_file, REASONED, {"from_weight": "none"}))
    settings = dict(epochs=2, packing=True, accumulation_steps=2)
    train(**settings, tag_weight=1.0)
    sft("sft", **settings)
    for what in ("model", "optimizer"):
        assert same(train.saved()[what], sft.saved("sft")[what])
    train("other", **settings, tag_weight=2.0)
    assert not same(train.saved("other")["model"], sft.saved("sft")["model"])


def test_tags_outside_the_trained_span_have_no_weight(tokenizer, make_model):
    weights = make_label_weights(tokenizer, len(tokenizer), 10.0)
    ids = tokenizer.encode(GOOD + "yes")
    trained = torch.tensor([False] * (len(ids) - 1) + [True])
    ids = torch.tensor([ids])
    labels = ids.masked_fill(~trained, IGNORE_INDEX)
    model = make_model(vocab_size=len(tokenizer))
    hidden = model.model(ids).last_hidden_state[:, :-1]
    args = (hidden, model.lm_head.weight, labels[:, 1:])
    (plain, one), (weighted, same_one) = cross_entropy_sum(*args), cross_entropy_sum(*args, weights)
    assert (one, same_one) == (1, 1) and torch.equal(plain, weighted)


def test_tags_that_a_user_types_are_no_tags(tmp_path, tokenizer):
    chat = [{"role": "user", "content": GOOD}, {"role": "assistant", "content": "yes"}]
    batch = batch_of(tmp_path, tokenizer, [chat])
    tags = torch.tensor(tokenizer.convert_tokens_to_ids(list(TAGS)))
    assert not torch.isin(batch.input_ids, tags).any()


# -- held-out questions ----------------------------------------------------------------------------

FORMS = {
    "right": (GOOD, ("1 + 1\n= 2", "2")),
    "more_behind": (GOOD + "\n", None),
    "more_before": ("So: " + GOOD, None),
    "no_thought": ("<think>\n\n</think>\n<answer>\n2\n</answer>", None),
    "no_answer": ("<think>\n1\n</think>\n<answer>\n\n</answer>", None),
    "one_line": ("<think>1</think><answer>2</answer>", None),
    "twice": (GOOD.replace("= 2", "</think>\n<answer>\n3"), None),
    "again": (f"{GOOD}\n{GOOD}", None),
    "open": (GOOD.removesuffix("</answer>"), None),
    "order": ("<answer>\n2\n</answer>\n<think>\n1\n</think>", None),
    "plain": ("2", None),
}


@pytest.mark.parametrize(("text", "expected"), FORMS.values(), ids=FORMS)
def test_the_form_is_exact(text, expected):
    assert parse_reasoning(text) == expected


def test_without_answer_tags_the_answer_follows_the_thought():
    text = "<think>\n1 + 1\n= 2\n</think>\n\n2"
    assert parse_reasoning(text, answer_tags=False) == ("1 + 1\n= 2", "2")
    assert parse_reasoning(text.replace("\n\n2", "\n2\n3"), answer_tags=False)[1] == "2\n3"
    assert parse_reasoning(text) is None
    for wrong in (text[:-1], text + "</think>", text[1:], "2", text.replace("\n\n2", "2")):
        assert parse_reasoning(wrong, answer_tags=False) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [(GOOD, "2"), ("<answer>2</answer> so", "2"), ("2", None), ("<answer>2", None)],
)
def test_an_answer_is_found_between_its_tags(text, expected):
    assert tagged_answer(text) == expected


def test_what_is_asked_are_the_last_turns_that_have_the_form(train, tokenizer, tmp_path):
    several = [*CHATS[0], *REASONED[5]]
    path = chat_file(tmp_path / "val.jsonl", [CHATS[1], REASONED[3], several])
    args = train_distill_reason.Args(**train.settings(val_path=[path]))
    _, val_data = load_packed(Context.create(args), tokenizer, "conversations")
    assert held_out_questions(tokenizer, val_data) == [
        (encode_chat(tokenizer, chat[:-1], add_generation_prompt=True).ids, answer)
        for chat, answer in ((REASONED[3], "4"), (several, "6"))
    ]


def test_a_reply_counts_if_it_has_the_form_and_ends(train, tokenizer, monkeypatch):
    args = train_distill_reason.Args(**train.settings())
    model = init_model(args, tokenizer)
    ctx = Context.create(args)
    end = [tokenizer.eos_token_id]
    replies = [
        tokenizer.encode(GOOD) + end,  # right
        tokenizer.encode(GOOD.replace("\n2\n<", "\n3\n<")) + end,  # in form, wrong
        tokenizer.encode(GOOD),  # never ends
        tokenizer.encode("2") + end,  # right without thinking does not count
    ]
    monkeypatch.setattr(train_distill_reason, "generate", lambda model, prompts, how: replies)
    sample, metrics = answer_questions(ctx, model, tokenizer, [([1], "2")] * 4)
    assert metrics == {"eval_format": 0.5, "eval_answer": 0.25}
    assert sample.endswith(GOOD)
    assert answer_questions(ctx, model, tokenizer, []) == ("", {})


@pytest.mark.slow
def test_what_was_learnt_is_seen_in_the_log(train):
    """A few conversations by heart: their form and answers, as the trainer itself sees them."""
    path = chat_file(train.folder / "val.jsonl", REASONED[:4])
    settings = dict(epochs=100, eval_interval=60, max_gen_len=24, batch_size=12)
    metrics = train(**settings, val_path=[path], learning_rate=8e-3)
    first, last = train.log(kind="eval_format")[0], train.log(kind="eval_format")[-1]
    assert (metrics["eval_format"], metrics["eval_answer"]) == (1, 1)
    assert last["eval_loss"] < first["eval_loss"] and "<think>" in last["sample"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [("--tag_weight 0", "--tag_weight must"), ("--max_gen_len 0", "--max_gen_len must")],
)
def test_a_setting_without_sense_is_refused(change, complaint):
    with pytest.raises(UserError, match=complaint):
        parse_arguments(train_distill_reason.Args, argv=change.split())


def test_a_tokenizer_without_the_tags_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(train_distill_reason, "REASONING_TAGS", ("<think>", "<ponder>"))
    with pytest.raises(UserError, match="no token <ponder>"):
        make_label_weights(tokenizer, len(tokenizer), 10.0)


# -- rewards on top --------------------------------------------------------------------------------


def test_the_truth_of_a_row_may_stand_in_its_last_answer():
    def truth(reply: str, **more) -> str | None:
        turns = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": reply}]
        found = parse_prompt_row({"conversations": turns, **more})[1]
        return found and found.text

    assert truth(GOOD) == "2"
    assert truth("<answer>\n2\n</answer>") == "2"  # its thought in "reasoning_content"
    assert truth(GOOD, answer="two") == "two"
    assert truth("2") is truth("<think>\n1 + 1\n</think>\n\n2") is truth("") is None
    assert truth("", gt=["2", "two"]) == "2, two"


def test_grpo_takes_reasoning_data_as_they_are(tmp_path, tokenizer):
    """The prompt opens the thought; format and answer are rewarded without a word of --reward."""
    rl = Trainer(tmp_path, train_grpo, (chat_file, REASONED, {"from_weight": "none"}))
    settings = dict(reasoning=True, max_gen_len=4, num_generations=2, max_steps=1, val_share=0.2)
    rl(**settings, max_seq_len=64)
    (line,) = rl.log(kind="rewards/format/mean")
    assert {"rewards/answer/mean", "reward"} <= line.keys()
    assert line["reward"] == pytest.approx(
        line["rewards/answer/mean"] + line["rewards/format/mean"] / 2, abs=2e-4
    )
    assert rl.log(kind="eval_rewards/format/mean")
    run_args = train_grpo.Args(**rl.settings(**settings))
    prompts, _ = read_prompts(Context.create(run_args), tokenizer)
    assert all(tokenizer.decode(prompt.ids).endswith("<think>\n") for prompt in prompts.prompts)
    assert all(prompt.truth.text.isdigit() for prompt in prompts.prompts)


# -- thinking in a conversation --------------------------------------------------------------------


@pytest.mark.parametrize("thinking", [False, True])
def test_thoughts_are_opened_shown_and_kept_apart(save, tokenizer, monkeypatch, capsys, thinking):
    args = eval_llm.Args(
        weight=[str(save())], device="cpu", open_thinking=thinking, historys=4, max_new_tokens=99
    )
    chat = eval_llm.Conversation(eval_llm.load_chat_model(args, args.weight[0]), args)
    prompts = []

    def reply(model, ids, sampling):
        prompts.append(ids[0])
        written = GOOD.removeprefix("<think>\n") if thinking else GOOD
        yield from ({0: token} for token in tokenizer.encode(written))

    monkeypatch.setattr(eval_llm, "decode", reply)
    asked = {"role": "user", "content": "1 + 1?"}
    for _ in range(2):
        chat.answer(asked["content"])
    told = {"role": "assistant", "content": "<answer>\n2\n</answer>"}
    told["reasoning_content"] = "1 + 1\n= 2"
    assert chat.history == [asked, told] * 2
    for said, ids in zip(([asked], [asked, told, asked]), prompts, strict=True):
        how = dict(add_generation_prompt=True, open_thinking=thinking)
        assert ids == encode_chat(tokenizer, said, **how).ids
    assert capsys.readouterr().out.count(GOOD) == 2
