"""Rewards: how good a completion is, by rules, a reward model, an LLM judge, or a weighted sum.

    --reward auto                          see below
    --reward answer:1 repetition:0.2       each part with its weight; each is logged by its own name

    answer       1 if it says the same as the row's "answer", up to case, space, punctuation around
                 it, Markdown, and the form of a number; for a "gt" the share of it that it contains
    number       1 if its last number is the last one of the row's "answer"; for a "gt" as answer
    similarity   its similarity to the row's "answer", from 0 to 1 (difflib's ratio): a graded
                 signal where exact answers are rare
    format       for <think>…</think><answer>…</answer>: 0.1 for each tag that occurs exactly once,
                 0.6 more for the whole format (0.2 for each of two, without <answer> in the
                 tokenizer)
    language     the share of its letters that are Chinese, if the question has Chinese ones; else
                 the share that are not
    length       falls linearly from 1 for no tokens to 0 for --max_gen_len tokens
    repetition   the share of distinct trigrams of tokens (distinct-3, arXiv 1510.03055)
    model        the score of this project's reward model (out/reward_{size}.pth, train_reward.py)
    transformers the score of the reward model in --reward_model_path
    judge        a language model at --judge_url grades it from 0 to 10; scaled to 0 to 1

The first three compare the final answer: what is behind a thought, and between <answer> and
</answer> if it has these tags. Prompts without a right answer (dataset/grading.py::read_truth) are
scored by the reward model that is there, and left out if there is none.

auto takes the first that exists: --reward_model_path, out/reward_{size}.pth, and the rule answer;
with --reasoning 1 plus 0.5 times the format.

To add a rule: a function of a completion in rules.py, its name in RULES.
"""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import openai
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from dataset.grading import final_answer, read_rating
from dataset.lm_dataset import encode_chat
from model.errors import UserError
from model.formats.native_format import read_config_json
from model.weights import find_weights, load_scoring_model
from trainer.common.context import Context
from trainer.common.metrics import Metric
from trainer.rl.arguments import RolloutArgs
from trainer.rl.prompts import Prompt
from trainer.rl.rollout import Completion
from trainer.rl.rules import RULES, Rule

Part = Callable[[Sequence[Completion]], list[float]]  # a rule or a model, over all completions


class Rewards:
    """The weighted sum of the parts that --reward names.

    For a prompt that some parts cannot judge, the others have their weight.

    Args:
        hidden_size: of the policy; out/reward_{hidden_size}.pth is the reward model.
        extra_rules: rules of the stage's own, by name.
    """

    def __init__(
        self,
        ctx: Context[RolloutArgs],
        tokenizer: PreTrainedTokenizerBase,
        hidden_size: int,
        extra_rules: dict[str, Rule] | None = None,
    ):
        self.ctx, self.tokenizer = ctx, tokenizer
        self.own_model = Path(ctx.args.save_dir) / f"reward_{hidden_size}.pth"
        self.rules = {**RULES, **(extra_rules or {})}
        self.weights = parse_weights(ctx.args.reward, [*self.rules, *MODELS])
        if "auto" in self.weights:
            format_weight = {"format": 0.5} if ctx.args.reasoning else {}
            self.weights = {self.find_model() or "answer": 1.0, **format_weight}
            terms = (f"{weight:g} · {name}" for name, weight in self.weights.items())
            ctx.print("reward: " + " + ".join(terms))
        self.parts = {name: self.make_part(name) for name in self.weights}
        self.total = sum(map(abs, self.weights.values()))
        self.fallback = ""  # the model that scores prompts which no rule can judge

    def find_model(self) -> str:
        """The name of the reward model that exists, or ""."""
        if Path(self.ctx.args.reward_model_path).is_dir():
            return "transformers"
        return "model" if self.own_model.exists() else ""

    def make_part(self, name: str) -> Part:
        if name in MODELS:
            return MODELS[name](self.ctx, self.tokenizer, self.own_model)
        rule, args = self.rules[name].score, self.ctx.args
        return lambda completions: [safe_call(rule, each, args) for each in completions]

    # -- which parts judge a prompt

    def can_score(self, prompt: Prompt) -> bool:
        """Whether completions of the prompt can be judged, if need be by the reward model that
        exists."""
        if not self.lacks_truth(prompt) or MODELS.keys() & self.weights.keys():
            return True
        if not (name := self.find_model()):
            return False
        self.fallback, self.parts[name] = name, self.make_part(name)
        needing = (weight for part, weight in self.weights.items() if self.needs_of(part))
        self.weights[name] = sum(map(abs, needing))
        self.ctx.print(f"prompts without a right answer are scored by the reward {name}")
        return True

    def needs_of(self, part: str) -> Callable[[Prompt], bool] | None:
        return self.rules[part].needs if part in self.rules else None

    def lacks_truth(self, prompt: Prompt) -> bool:
        """Whether there are parts that need a right answer, and none of them has one."""
        needs = [need for part in self.weights if (need := self.needs_of(part))]
        return bool(needs) and not any(need(prompt) for need in needs)

    def judges(self, part: str, prompt: Prompt) -> bool:
        """Whether this part counts for completions of the prompt."""
        if part == self.fallback:
            return self.lacks_truth(prompt)
        needs = self.needs_of(part)
        return needs is None or needs(prompt)

    # -- rewards

    def __call__(self, completions: Sequence[Completion]) -> tuple[Tensor, dict[str, Metric]]:
        """[N] rewards, NaN where a part failed; and for the log (sum, count) of the rewards, of
        each part, and of the failures."""
        count = len(completions)
        rewards, used, metrics = torch.zeros(count), [0.0] * count, {}
        for name, part in self.parts.items():
            judged = [n for n in range(count) if self.judges(name, completions[n].prompt)]
            values = torch.tensor(part([completions[n] for n in judged]))
            rewards[judged] += self.weights[name] * values
            for n in judged:
                used[n] += abs(self.weights[name])
            metrics[f"rewards/{name}/mean"] = sum_count(values)
        rewards *= torch.tensor([self.total / each if each else 1.0 for each in used])
        metrics = {"reward": sum_count(rewards), **metrics}
        if self.ctx.args.thinking_ratio:
            thinking = sum(each.prompt.thinking for each in completions)
            metrics["completions/thinking_ratio"] = (thinking, count)
        failed = rewards.isnan().sum().item()
        return rewards, {**metrics, "frac_reward_failed": (failed, count)}

    @property
    def are_bounded(self) -> bool:
        """Whether every part is between 0 and 1; scores of reward models are not."""
        return not {"model", "transformers"} & self.parts.keys()


def safe_call(rule: Callable, completion: Completion, args: RolloutArgs) -> float:
    """NaN if the rule fails on this completion, which says nothing about the completion and should
    not end the training."""
    try:
        return float(rule(completion, args))
    except Exception:
        return math.nan


def sum_count(values: Tensor) -> Metric:
    """Sum and number of the values that are not NaN."""
    values = values[~values.isnan()]
    return values.sum().item(), len(values)


def parse_weights(words: list[str], names: Iterable[str]) -> dict[str, float]:
    """["answer:1", "repetition:0.2"] → weights by name."""
    weights = {}
    for word in words:
        name, _, weight = word.partition(":")
        if name not in ("auto", *names):
            raise UserError(f"--reward knows {', '.join(names)} and auto, not {name!r}")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise UserError(f"--reward {word}: {weight!r} is no number") from None
    if "auto" in weights and len(weights) > 1:
        raise UserError("--reward auto stands alone; name the parts instead")
    return weights


# -- models ----------------------------------------------------------------------------------------


class MiniMindRewardModel:
    """The score of train_reward.py's model at the end of the conversation."""

    def __init__(self, ctx: Context[RolloutArgs], tokenizer: PreTrainedTokenizerBase, path: Path):
        self.tokenizer, self.device = tokenizer, ctx.device
        self.batch_size = ctx.args.update_batch_size
        if not path.exists():  # one of another width than the policy, then
            path = find_weights("reward", None, ctx.args.save_dir, newest=True, use_moe=None)
        model = load_scoring_model(path, tokenizer=tokenizer)
        self.model = model.to(self.device).eval()

    @torch.no_grad()
    def __call__(self, completions: Sequence[Completion]) -> list[float]:
        scores = []
        for start in range(0, len(completions), self.batch_size):
            scores += self.score_batch(completions[start : start + self.batch_size])
        return scores

    def score_batch(self, completions: Sequence[Completion]) -> list[float]:
        rows = [encode_chat(self.tokenizer, conversation(each)).ids for each in completions]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        scores = self.model(ids.to(self.device)).scores.cpu()
        # at each row's last token; attention is causal, so padding on the right changes nothing
        return [own[len(row) - 1].item() for own, row in zip(scores, rows, strict=True)]


class HFRewardModel:
    """A reward model of transformers: a sequence classifier with one label, or a model with its own
    `get_score`, as internlm2-1_8b-reward has."""

    def __init__(
        self, ctx: Context[RolloutArgs], tokenizer: PreTrainedTokenizerBase, own_model: Path
    ):
        path, trusted = ctx.args.reward_model_path, ctx.args.trust_remote_code
        self.device = ctx.device
        if not Path(path).is_dir():
            raise UserError(f"there is no folder {path}; --reward_model_path names another")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trusted)
            model_class = AutoModel if trusted else AutoModelForSequenceClassification
            config = AutoConfig.from_pretrained(path, trust_remote_code=trusted)
            if trusted and "rope_parameters" not in read_config_json(Path(path)):
                # Saved before transformers 5, with code that tests `config.rope_scaling is None`:
                # transformers 5 fills that field even where nothing is scaled.
                if (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "default":
                    config.rope_parameters = None
            code = dict(config=config, trust_remote_code=trusted)
            self.model = model_class.from_pretrained(path, **code)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if "trust_remote_code" in str(error):
                reason = "it brings its own code, which runs only with --trust_remote_code 1"
            raise UserError(f"{path} is no reward model that can be used: {reason}") from error
        if not hasattr(self.model, "get_score") and getattr(self.model, "num_labels", 0) != 1:
            raise UserError(
                f"the model in {path} does not give one score: it has another head than a reward "
                "model's"
            )
        self.model.to(self.device).eval()

    @torch.no_grad()
    def __call__(self, completions: Sequence[Completion]) -> list[float]:
        return [self.score(each) for each in completions]

    def score(self, completion: Completion) -> float:
        messages = conversation(completion)
        if hasattr(self.model, "get_score"):
            return float(self.model.get_score(self.tokenizer, messages))
        inputs = self.tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
        return self.model(**inputs.to(self.device)).logits[0, 0].item()


def conversation(completion: Completion) -> list[dict[str, Any]]:
    """The prompt's messages and the completion as the assistant's."""
    content: dict[str, Any] = {"content": completion.text}
    if completion.prompt.thinking:  # whose thought the prompt has opened
        thought, _, _ = completion.text.rpartition("</think>")
        answer = final_answer(completion.text, thinking=True)
        content = {"content": answer, "reasoning_content": thought.strip()}
    return [*completion.prompt.messages, {"role": "assistant", **content}]


class LLMJudge:
    """Grades by another language model. NaN for a reply without a grade."""

    PROMPT = (
        "Rate the answer to the question from 0 (useless or wrong) to 10 (right, helpful, short). "
        "Reply with the number alone.\n\nQuestion:\n{question}\n\nAnswer:\n{answer}"
    )

    def __init__(
        self, ctx: Context[RolloutArgs], tokenizer: PreTrainedTokenizerBase, own_model: Path
    ):
        if not ctx.args.judge_url:
            raise UserError("the reward judge needs --judge_url, the base URL of an OpenAI API")
        self.url, self.model = ctx.args.judge_url, ctx.args.judge_model or "default"
        key = os.environ.get("OPENAI_API_KEY", "none")  # local servers need none
        self.client = openai.OpenAI(base_url=self.url, api_key=key, max_retries=4, timeout=120)

    def __call__(self, completions: Sequence[Completion]) -> list[float]:
        return [self.grade(each) for each in completions]

    def grade(self, completion: Completion) -> float:
        *_, question, reply = (message["content"] for message in conversation(completion))
        if not reply.strip():
            return 0.0
        prompt = self.PROMPT.format(question=question, answer=reply)
        try:
            response = self.client.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": prompt}], temperature=0
            )
        except openai.APIConnectionError as error:
            raise UserError(
                f"the judge at {self.url} cannot be reached; --resume goes on"
            ) from error
        except openai.APIError:
            return math.nan
        rating = read_rating(response.choices[0].message.content or "")
        return math.nan if rating is None else rating


# Made with the context, the policy's tokenizer and the file of the project's own reward model.
MODELS: dict[str, Callable[[Context[RolloutArgs], PreTrainedTokenizerBase, Path], Part]] = {
    "model": MiniMindRewardModel,
    "transformers": HFRewardModel,
    "judge": LLMJudge,
}
