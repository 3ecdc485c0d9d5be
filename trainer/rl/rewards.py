"""Rewards: how good a completion is, by rules, a reward model, an LLM judge, or a weighted sum.

    --reward auto                          see below
    --reward answer:1 repetition:0.2       each part with its weight; each is logged by its own name

    answer       1 if it equals the row's "answer", ignoring case, space and a final full stop; with
                 --reasoning 1 what stands between <answer> and </answer> is compared
    number       1 if its last number is the last one of the row's "answer"
    similarity   its similarity to the row's "answer", from 0 to 1 (difflib's ratio): a graded
                 signal where exact answers are rare
    format       for <think>…</think><answer>…</answer>: 0.1 for each tag that occurs exactly once,
                 0.6 more for the whole format
    language     the share of its letters that are Chinese, if the question has Chinese ones; else
                 the share that are not
    length       falls linearly from 1 for no tokens to 0 for --max_gen_len tokens
    repetition   the share of distinct trigrams of tokens (distinct-3, arXiv 1510.03055)
    model        the score of this project's reward model (out/reward_{size}.pth, train_reward.py)
    transformers the score of the reward model in --reward_model_path
    judge        a language model at --judge_url grades it from 0 to 10; scaled to 0 to 1

auto takes the first that exists: --reward_model_path, out/reward_{size}.pth, and where every row
has an "answer", that rule; with --reasoning 1 plus 0.5 times the format.

To add a rule: a function of a completion, and its name in RULES.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from difflib import SequenceMatcher
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

from dataset.grading import grade, normalize_text
from dataset.lm_dataset import encode_chat
from dataset.reply_parser import REASONING_TAGS, parse_reasoning, tagged_answer
from dataset.text import is_chinese
from model.errors import UserError
from model.formats.native_format import read_config_json
from model.weights import find_weights, load_scoring_model
from trainer.common.context import Context
from trainer.common.metrics import Metric
from trainer.rl.arguments import RolloutArgs
from trainer.rl.prompts import PromptDataset
from trainer.rl.rollout import Completion

Rule = Callable[[Completion, RolloutArgs], float]
Part = Callable[[Sequence[Completion]], list[float]]  # a rule or a model, over all completions


class Rewards:
    """The weighted sum of the parts that --reward names.

    Args:
        hidden_size: of the policy; out/reward_{hidden_size}.pth is the reward model.
        prompts: the data, which must have answers if a rule compares with them.
        extra_rules: rules of the stage's own, by name.
    """

    def __init__(
        self,
        ctx: Context[RolloutArgs],
        tokenizer: PreTrainedTokenizerBase,
        hidden_size: int,
        prompts: PromptDataset,
        extra_rules: dict[str, Rule] | None = None,
    ):
        self.ctx, self.tokenizer = ctx, tokenizer
        self.own_model = Path(ctx.args.save_dir) / f"reward_{hidden_size}.pth"
        self.rules = {**RULES, **(extra_rules or {})}
        self.weights = parse_weights(ctx.args.reward, [*self.rules, *MODELS])
        if "auto" in self.weights:
            self.weights = choose_automatically(ctx.args, self.own_model, prompts)
            terms = (f"{weight:g} · {name}" for name, weight in self.weights.items())
            ctx.print("reward: " + " + ".join(terms))
        self.parts = {name: self.make_part(name, prompts) for name in self.weights}

    def make_part(self, name: str, prompts: PromptDataset) -> Part:
        if name in NEED_ANSWERS:
            lacking = sum(prompt.answer is None for prompt in prompts.prompts)
            if lacking:
                raise UserError(
                    f'the reward {name} needs an "answer" in every row, and {lacking:,} of '
                    f"{len(prompts):,} have none"
                )
        if name in MODELS:
            return MODELS[name](self.ctx, self.tokenizer, self.own_model)
        rule, args = self.rules[name], self.ctx.args
        return lambda completions: [safe_call(rule, each, args) for each in completions]

    def __call__(self, completions: Sequence[Completion]) -> tuple[Tensor, dict[str, Metric]]:
        """[N] rewards, NaN where a part failed; and for the log (sum, count) of the rewards, of
        each part, and of the failures."""
        parts = {name: torch.tensor(part(completions)) for name, part in self.parts.items()}
        weighted = (self.weights[name] * values for name, values in parts.items())
        rewards = sum(weighted, torch.zeros(len(completions)))
        metrics = {"reward": sum_count(rewards)}
        metrics |= {f"rewards/{name}/mean": sum_count(values) for name, values in parts.items()}
        failed = rewards.isnan().sum().item()
        return rewards, {**metrics, "frac_reward_failed": (failed, len(rewards))}

    @property
    def are_bounded(self) -> bool:
        """Whether every part is between 0 and 1; scores of reward models are not."""
        return not {"model", "transformers"} & self.parts.keys()


def safe_call(rule: Rule, completion: Completion, args: RolloutArgs) -> float:
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


def choose_automatically(
    args: RolloutArgs, own_model: Path, prompts: PromptDataset
) -> dict[str, float]:
    """The weights of --reward auto."""
    format_weight = {"format": 0.5} if args.reasoning else {}
    if Path(args.reward_model_path).is_dir():
        return {"transformers": 1.0, **format_weight}
    if own_model.exists():
        return {"model": 1.0, **format_weight}
    if all(prompt.answer is not None for prompt in prompts.prompts):
        return {"answer": 1.0, **format_weight}
    raise UserError(
        f"there is no reward: no folder {args.reward_model_path} (--reward_model_path; download "
        "internlm/internlm2-1_8b-reward, for instance), no "
        f'{own_model} (python trainer/train_reward.py makes it), and not every row has an "answer" '
        "for a rule"
    )


# -- rules -----------------------------------------------------------------------------------------


def answer_in(completion: Completion, args: RolloutArgs) -> str:
    """What counts as the answer: the whole text, or with reasoning what the tags hold."""
    if not args.reasoning:
        return completion.text
    return tagged_answer(completion.text) or ""


def right_answer(completion: Completion) -> str:
    """The row's "answer", which every row has if a rule of NEED_ANSWERS is used."""
    assert completion.prompt.answer is not None
    return completion.prompt.answer


def similarity(text: str, answer: str) -> float:
    return SequenceMatcher(
        None, normalize_text(text), normalize_text(answer), autojunk=False
    ).ratio()


def same_number(text: str, answer: str) -> bool:
    found, expected = (re.findall(r"-?\d+(?:\.\d+)?", each) for each in (text, answer))
    return bool(found and expected) and float(found[-1]) == float(expected[-1])


def format_reward(text: str, opened: bool) -> float:
    """How far the text keeps to the think/answer format; `opened`: the prompt ends with <think>."""
    text = "<think>\n" + text if opened else text
    once = sum(text.count(tag) == 1 for tag in REASONING_TAGS)
    return 0.1 * once + 0.6 * (parse_reasoning(text) is not None)


def same_language(completion: Completion) -> float:
    question = completion.prompt.messages[-1]["content"]
    letters = list(filter(str.isalpha, completion.text))
    chinese = sum(map(is_chinese, letters)) / max(1, len(letters))
    return chinese if is_chinese(question) else float(bool(letters)) * (1 - chinese)


def distinct_ngrams(tokens: list[int], n: int = 3) -> float:
    """Distinct n-grams / all n-grams; 0 if there are none."""
    ngrams = Counter(zip(*(tokens[start:] for start in range(n)), strict=False))
    return len(ngrams) / max(1, ngrams.total())


RULES: dict[str, Rule] = {
    "answer": lambda each, args: grade(answer_in(each, args), right_answer(each)),
    "number": lambda each, args: same_number(answer_in(each, args), right_answer(each)),
    "similarity": lambda each, args: similarity(answer_in(each, args), right_answer(each)),
    "format": lambda each, args: format_reward(each.text, opened=args.reasoning),
    "language": lambda each, args: same_language(each),
    "length": lambda each, args: 1 - len(each.tokens) / args.max_gen_len,
    "repetition": lambda each, args: distinct_ngrams(each.tokens),
}
NEED_ANSWERS = ("answer", "number", "similarity")


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
    return [*completion.prompt.messages, {"role": "assistant", "content": completion.text}]


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
        question = completion.prompt.messages[-1]["content"]
        prompt = self.PROMPT.format(question=question, answer=completion.text)
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
        found = re.search(r"\d+(?:\.\d+)?", response.choices[0].message.content or "")
        return min(10.0, float(found[0])) / 10 if found else math.nan


# Made with the context, the policy's tokenizer and the file of the project's own reward model.
MODELS: dict[str, Callable[[Context[RolloutArgs], PreTrainedTokenizerBase, Path], Part]] = {
    "model": MiniMindRewardModel,
    "transformers": HFRewardModel,
    "judge": LLMJudge,
}
