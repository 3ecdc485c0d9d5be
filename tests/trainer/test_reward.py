"""The reward model: against transformers, by hand, its file, and training it."""

import json
import math

import numpy as np
import pytest
import torch
from toy import PAIRS, Trainer, logged
from transformers import LlamaForSequenceClassification

from dataset.lm_dataset import load_documents
from dataset.pairs import PreferenceDataset, collate_pairs
from model.errors import UserError
from model.formats.hf_format import to_hf_config
from model.model_minimind import MiniMindForScoring
from model.weights import load_model, load_scoring_model, save_weights
from trainer import train_reward
from trainer.train_reward import bradley_terry_loss, end_scores

pytestmark = pytest.mark.usefixtures("in_a_hurry")
IDS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def train(tmp_path):
    return Trainer(tmp_path, train_reward)


@pytest.fixture
def make_scoring(make_model):
    """A function that makes a tiny model with a random head."""

    def make(**fields) -> MiniMindForScoring:
        model = MiniMindForScoring.from_language_model(make_model(**fields))
        torch.nn.init.normal_(model.score.weight, std=0.5)
        return model

    return make


# -- the model -------------------------------------------------------------------------------------


@torch.no_grad()
def test_scores_equal_a_sequence_classifier_of_transformers(make_scoring):
    """LlamaForSequenceClassification with one label takes the weights as they are."""
    model = make_scoring()
    config = to_hf_config(model.config)
    config.num_labels, config.pad_token_id = 1, 0
    theirs = LlamaForSequenceClassification(config).eval()
    theirs.load_state_dict(model.state_dict(), strict=True)
    scores = model(IDS).scores
    assert scores.shape == (2, 12)
    torch.testing.assert_close(scores[:, -1:], theirs(IDS).logits, atol=1e-5, rtol=1e-5)
    padded = torch.cat([IDS[:1, :7], torch.zeros(1, 5, dtype=torch.long)], dim=1)
    shorter = theirs(padded, attention_mask=(padded != 0).long()).logits
    torch.testing.assert_close(scores[:1, 6:7], shorter, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_side_is_read_at_its_last_token_whatever_shares_its_row(train, tokenizer, make_scoring):
    pairs = PreferenceDataset(load_documents(train.data, "preferences", tokenizer), 64)
    model = make_scoring(vocab_size=6400)
    together = end_scores(model, collate_pairs([pairs[n] for n in range(len(pairs))]))
    for number in range(len(pairs)):
        for side in range(2):
            ids = pairs[number]["input_ids"][side].astype(int)
            assert ids[-1] == tokenizer.eos_token_id
            alone = model(torch.from_numpy(ids)[None]).scores[0, -1]
            torch.testing.assert_close(together[number, side], alone, atol=1e-4, rtol=1e-4)


def test_the_loss_by_hand():
    """Scores 2 and 1: log(1 + e^−1); equal ones: ln 2; the wrong way round by 3: log(1 + e^3)."""
    scores = torch.tensor([[2.0, 1.0], [0.5, 0.5], [-1.0, 2.0]])
    expected = [math.log1p(math.exp(-1)), math.log(2), math.log1p(math.exp(3))]
    torch.testing.assert_close(bradley_terry_loss(scores), torch.tensor(expected))


# -- its file --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, dict(use_moe=True), dict(qk_norm=True)], ids=str)
@pytest.mark.parametrize("with_json", [True, False])
@pytest.mark.filterwarnings("ignore:.*does not say which tokenizer")
@torch.no_grad()
def test_a_file_gives_the_scores_back(make_scoring, tokenizer, tmp_path, fields, with_json):
    sizes = dict(vocab_size=len(tokenizer), num_attention_heads=8)  # as a bare file is taken for
    model = make_scoring(**sizes, **fields).half().float()
    path = tmp_path / "reward_64.pth"
    save_weights(model, path, stage="reward", tokenizer=tokenizer, origin={})
    assert set(torch.load(path)) == set(model.state_dict())
    if not with_json:
        path.with_suffix(".json").unlink()
    loaded = load_scoring_model(path, tokenizer=tokenizer)
    tolerance = 1e-6 if with_json else 1e-3  # rms_norm_eps follows the generation
    torch.testing.assert_close(loaded(IDS).scores, model(IDS).scores, atol=tolerance, rtol=1e-4)


def test_the_wrong_head_is_told(make_scoring, save, tokenizer, tmp_path):
    reward = tmp_path / "reward_64.pth"
    scoring = make_scoring(vocab_size=len(tokenizer))
    save_weights(scoring, reward, stage="reward", tokenizer=tokenizer, origin={})
    with pytest.raises(UserError, match="reward_64.pth is a reward model, which scores texts"):
        load_model(reward)
    with pytest.raises(UserError, match="full_sft_64.pth is not a reward model: it has no score"):
        load_scoring_model(save())
    state = torch.load(reward)
    del state["model.norm.weight"]
    torch.save(state, reward)
    with pytest.raises(UserError, match="does not fit the model: it lacks model.norm.weight"):
        load_scoring_model(reward)


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "target"), [({}, 0.3), (dict(packing=True), 0.3), (dict(use_moe=True), 0.65)]
)
def test_it_begins_with_ln_2_and_learns_to_tell_the_better_answer(train, changes, target):
    metrics = train(val_share=0.3, epochs=10, learning_rate=1e-3, **changes)
    assert metrics["history"][0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert metrics["eval_accuracy"] == 1 and metrics["eval_loss"] < target
    assert logged(metrics)[-1]["accuracy"] == 1


def test_the_saved_model_scores_as_the_trained_one_did(train, tokenizer):
    """Its held-out metrics, from the file; the .json says how the scores are spread."""
    metrics = train(val_share=0.3, epochs=10, learning_rate=1e-3)
    path = train.folder / "a" / "out" / "reward_32.pth"
    model = load_scoring_model(path, tokenizer=tokenizer)
    documents = load_documents(train.data, "preferences", tokenizer)
    held_out = np.random.default_rng(0).permutation(len(PAIRS))[:3]
    pairs = PreferenceDataset(documents, 32, np.sort(held_out))
    with torch.no_grad():
        scores = end_scores(model, collate_pairs([pairs[n] for n in range(3)]))
    assert (scores[:, 0] - scores[:, 1]).mean().item() == pytest.approx(
        metrics["eval_margin"], abs=0.05
    )
    origin = json.loads(path.with_suffix(".json").read_text())["origin"]
    assert origin["score_mean"] == pytest.approx(scores.mean().item(), abs=0.05)
    assert origin["score_std"] == pytest.approx(scores.std(correction=0).item(), abs=0.05)


def test_it_starts_from_the_stack_of_a_language_model(train, save, monkeypatch):
    """The first scores are 0; the stack is that of the weights it starts from."""
    path = save(hidden_size=32)
    sizes = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"))
    train(from_weight=str(path), max_steps=1, learning_rate=1e-9, **sizes)
    model = load_scoring_model(train.folder / "a" / "out" / "reward_32.pth")
    start = load_model(path)
    for name, weight in start.model.state_dict().items():
        torch.testing.assert_close(model.model.state_dict()[name], weight, atol=1e-4, rtol=1e-3)
    assert model.score.weight.abs().max() < 1e-6
