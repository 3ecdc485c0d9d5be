"""What real_stages.py measures on held-out data. Keys that end with `_se` are standard errors."""

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataset.chat import stop_tokens
from dataset.jsonl import Row, load_rows
from dataset.lm_dataset import check_messages, encode_chat, load_documents
from dataset.packing import IGNORE_INDEX, PackedDataset, collate
from dataset.pairs import PreferenceDataset
from dataset.reply_parser import parse_reply
from model.inference.generation import generate, pack_for_cpu_decoding
from model.inference.sampling import SamplingParams
from model.model_minimind import MiniMindForCausalLM
from model.weights import load_tokenizer
from trainer import train_grpo
from trainer.common.arguments import TrainArgs
from trainer.common.context import Context
from trainer.common.evaluation import map_pairs
from trainer.rl.batches import micro_batches
from trainer.rl.policy import policy_inputs
from trainer.rl.prompts import Prompt, read_prompts
from trainer.rl.rewards import Rewards
from trainer.rl.rollout import Completion, generate_completions
from trainer.rl.rules import distinct_ngrams

PAIR_TOKENS = 1024  # of a side, as in the trainers: longer pairs are left out
DOCUMENT_TOKENS = 512  # of a conversation; what is longer is cut
BATCH = 16
CALL_TOKENS = 128  # of a reply with a tool call
TOOL_COUNTS = """calls well_formed right_name right_arguments seen_name right_seen_name other_turns
    needless""".split()


def binomial_se(share: float, count: int) -> float:
    return math.sqrt(share * (1 - share) / count) if count else math.nan


def ratio_and_se(totals: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Σ totals / Σ counts, with its standard error over independent documents (delta method):
    tokens of a document are alike, so that they do not count one by one."""
    ratio = totals.sum() / counts.sum()
    residuals = totals - ratio * counts
    n = len(counts)
    error = math.sqrt(n / max(1, n - 1) * np.square(residuals).sum()) / counts.sum()
    return float(ratio), float(error)


def mean_and_se(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    array = np.asarray(values, dtype=float)
    error = array.std(ddof=1) / math.sqrt(len(array)) if len(array) > 1 else math.nan
    return float(array.mean()), float(error)


# -- loss ------------------------------------------------------------------------------------------


@torch.no_grad()
def document_losses(
    model: MiniMindForCausalLM, path: Path, limit: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """[documents] the loss of each conversation, summed over the tokens of its answers, and the
    number of these tokens."""
    tokenizer = load_tokenizer()
    documents = load_documents(path, "conversations", tokenizer)
    count = min(limit or len(documents), len(documents))
    data = PackedDataset(documents, DOCUMENT_TOKENS, np.arange(count), packing=False)
    order = sorted(range(len(data)), key=lambda n: len(data[n][0]["input_ids"]))
    losses, counts = np.zeros(len(data)), np.zeros(len(data))
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        batch = collate([data[n] for n in rows], tokenizer.pad_token_id)
        outputs = model(**batch.inputs, labels=batch.labels, return_log_probs=True)
        losses[rows] = -outputs.log_probs.sum(1).numpy()
        counts[rows] = (batch.labels[:, 1:] != IGNORE_INDEX).sum(1).numpy()
    return losses, counts


def loss_metrics(name: str, before: tuple, after: tuple) -> dict[str, float]:
    """NAME_loss before and after, and the paired difference with its standard error."""
    change, error = ratio_and_se(after[0] - before[0], before[1])
    return {
        f"{name}_loss_before": before[0].sum() / before[1].sum(),
        f"{name}_loss": after[0].sum() / after[1].sum(),
        f"{name}_change": change,
        f"{name}_change_se": error,
    }


# -- pairs -----------------------------------------------------------------------------------------


def pair_values(model: Any, path: Path, function: Callable) -> tuple[np.ndarray, np.ndarray]:
    """[pairs, 2] `function(model, batch)` of both sides, and the numbers of their answers'
    tokens."""
    tokenizer = load_tokenizer()
    pairs = PreferenceDataset(load_documents(path, "preferences", tokenizer), PAIR_TOKENS)
    ctx = Context.create(TrainArgs(device="cpu", batch_size=4))
    with torch.no_grad():
        values = map_pairs(ctx, model.eval(), tokenizer, pairs, function)
    return values.numpy(), pairs.completion_lengths


def pair_metrics(values: np.ndarray, lengths: np.ndarray) -> dict[str, float]:
    """How many pairs have the chosen side higher; and, since the longer answer is chosen more
    often, how many the rule "the longer one" gets right (a tie is half right)."""
    longer = np.sign(lengths[:, 0] - lengths[:, 1]) / 2 + 0.5
    return {
        "pairs": len(values),
        "right": int((values[:, 0] > values[:, 1]).sum()),
        "right_by_length": float(longer.sum()),
    }


# -- policies --------------------------------------------------------------------------------------


@dataclass
class Policies:
    """Sampled answers to held-out prompts, by the start and by what was trained from it.

    Args:
        start: the policy before training.
        flags: of train_grpo.Args: data_path of the held-out prompts, reward, save_dir of the
            reward model, max_gen_len.
        judge_dir: folder of the reward model that was not trained on; "": none.
    """

    start: MiniMindForCausalLM
    flags: dict[str, Any]
    judge_dir: str = ""

    @cached_property
    def ctx(self) -> Context[train_grpo.Args]:
        common = dict(device="cpu", val_share=0.0, from_weight="none", rollout_batch_size=64)
        return Context.create(train_grpo.Args(**common, **self.flags))

    def rewards_from(self, folder: str) -> Rewards:
        flags = {**vars(self.ctx.args), "save_dir": folder, "reward": ["model"]}
        names = train_grpo.Args.__dataclass_fields__
        args = train_grpo.Args(**{name: flags[name] for name in names})
        return Rewards(Context.create(args), load_tokenizer(), self.start.config.hidden_size)

    @cached_property
    def rewards(self) -> Rewards:
        return Rewards(self.ctx, load_tokenizer(), self.start.config.hidden_size)

    @cached_property
    def judge(self) -> Rewards | None:
        return self.rewards_from(self.judge_dir) if self.judge_dir else None

    @cached_property
    def prompts(self) -> list[Prompt]:
        return read_prompts(self.ctx, load_tokenizer(), self.rewards.can_score)[0].prompts

    @cached_property
    def before(self) -> dict[str, Any]:
        return self.answer(self.start)

    def answer(self, model: MiniMindForCausalLM) -> dict[str, Any]:
        """One sampled answer to each prompt with its rewards. The same random numbers for every
        model."""
        decoder = pack_for_cpu_decoding(copy.deepcopy(model))
        answers = generate_completions(self.ctx, decoder, load_tokenizer(), self.prompts, step=0)
        scores = self.rewards(answers)[0].numpy()
        judged = self.judge(answers)[0].numpy() if self.judge else None
        return {"answers": answers, "rewards": scores, "judged": judged}

    def compare(self, model: MiniMindForCausalLM) -> dict[str, float]:
        before, after = self.before, self.answer(model)
        spread = before["rewards"].std(ddof=1)
        gain, gain_se = mean_and_se(after["rewards"] - before["rewards"])
        kl, kl_se = self.kl(model, after["answers"])
        metrics = {
            "prompts": len(self.prompts),
            "reward_before": before["rewards"].mean(),
            "reward": after["rewards"].mean(),
            "reward_sd_before": spread,
            "gain_sd": gain / spread,
            "gain_sd_se": gain_se / spread,
            "kl": kl,
            "kl_se": kl_se,
        }
        if before["judged"] is not None:
            judged = mean_and_se(after["judged"] - before["judged"])
            judge_spread = before["judged"].std(ddof=1)
            metrics["judge_gain_sd"], metrics["judge_gain_sd_se"] = np.array(judged) / judge_spread
            both = np.corrcoef(before["rewards"], before["judged"])
            metrics["reward_judge_correlation"] = both[0, 1]
        texts = [[each.tokens for each in side["answers"]] for side in (before, after)]
        metrics |= collapse_metrics(*texts)
        return {name: float(value) for name, value in metrics.items()}

    @torch.no_grad()
    def kl(self, model: MiniMindForCausalLM, answers: list[Completion]) -> tuple[float, float]:
        """KL(model ‖ start) in nats a token: the mean log-ratio of sampled tokens (k1)."""
        totals, counts = np.zeros(len(answers)), np.zeros(len(answers))
        for batch in micro_batches(answers, BATCH, load_tokenizer().pad_token_id, self.ctx.device):
            inputs, rows = policy_inputs(batch, 1.0), batch.indices.numpy()
            ratio: Tensor = model(**inputs).log_probs - self.start(**inputs).log_probs
            totals[rows] = (ratio * batch.completion_mask).sum(1).numpy()
            counts[rows] = batch.completion_mask.sum(1).numpy()
        return ratio_and_se(totals, counts)


def collapse_metrics(before: list[list[int]], after: list[list[int]]) -> dict[str, float]:
    """How much longer answers are, and how many of their trigrams are distinct, compared with
    before: within an answer, and over as many tokens of all answers together."""
    lengths = [np.mean([len(tokens) for tokens in side]) for side in (before, after)]
    total = min(sum(map(len, side)) for side in (before, after))
    within = [np.mean([distinct_ngrams(tokens) for tokens in side]) for side in (before, after)]
    joined = [[token for tokens in side for token in tokens] for side in (before, after)]
    over_all = [distinct_ngrams(tokens[:total]) for tokens in joined]
    return {
        "length_before": lengths[0],
        "length": lengths[1],
        "length_ratio": lengths[1] / lengths[0],
        "length_fold": max(lengths) / min(lengths),
        "distinct_ratio": within[1] / max(1e-9, within[0]),
        "distinct_overall_ratio": over_all[1] / max(1e-9, over_all[0]),
    }


# -- tool calls ------------------------------------------------------------------------------------


def tool_metrics(model: MiniMindForCausalLM, held: Path, train: Path | None) -> dict[str, int]:
    """At each turn of held-out conversations in which the data call a tool: does the model, read
    greedily, write one well-formed call, and of the right tool? And does it call where, before any
    call, the data do not?

    Args:
        train: the training's rows, to count the calls whose tool occurs in them.
    """
    tokenizer, sampling = load_tokenizer(), SamplingParams(CALL_TOKENS, temperature=0)
    known = {call["name"] for row in load_rows(train) for call in row_calls(row)} if train else ()
    turns = [turn for row in load_rows(held) for turn in assistant_turns(row)]
    prompts = [
        encode_chat(tokenizer, context, add_generation_prompt=True).ids for context, _ in turns
    ]
    decoder, counts = pack_for_cpu_decoding(copy.deepcopy(model)), dict.fromkeys(TOOL_COUNTS, 0)
    for start in range(0, len(prompts), 32):
        replies = generate(decoder, prompts[start : start + 32], sampling)
        for (_, expected), tokens in zip(turns[start : start + 32], replies, strict=True):
            reply = parse_reply(tokenizer.decode(tokens, skip_special_tokens=True))
            ended = tokens[-1] in stop_tokens(tokenizer)
            well_formed = bool(ended and reply.tool_calls and "<tool_call>" not in reply.content)
            if not expected:
                counts["other_turns"] += 1
                counts["needless"] += bool(reply.tool_calls)
                continue
            names = [call["name"] for call in reply.tool_calls]
            right = well_formed and names == [call["name"] for call in expected]
            counts["calls"] += 1
            counts["well_formed"] += well_formed
            counts["right_name"] += right
            counts["right_arguments"] += right and reply.tool_calls == expected
            seen = all(call["name"] in known for call in expected)
            counts["seen_name"] += seen
            counts["right_seen_name"] += right and seen
    return counts


def calls_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    calls = message.get("tool_calls") or []
    calls = json.loads(calls) if isinstance(calls, str) else calls
    calls = [call.get("function", call) for call in calls]
    return [{"name": call["name"], "arguments": call.get("arguments", {})} for call in calls]


def row_calls(row: Row) -> list[dict[str, Any]]:
    return [call for message in row["conversations"] for call in calls_of(message)]


def assistant_turns(row: Row) -> list[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """(messages before, expected calls) of each turn that calls, and of the first one that does
    not if nothing is called before it."""
    messages, turns, quiet = check_messages(row["conversations"]), [], True
    for n, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        calls = calls_of(message)
        if calls or quiet:
            turns.append((messages[:n], calls))
        quiet = False
    return turns
