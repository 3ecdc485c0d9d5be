"""How good is a completion: rules, a reward model, a judge, or a weighted sum of several.

    --reward auto                          see below
    --reward answer:1 repetition:0.2       each part with its weight, each logged by its own name

    answer       1 if it is the row's "answer", but for case, space and a full stop; with
                 --reasoning 1 what stands between <answer> and </answer> counts
    number       1 if its last number is that of the row's "answer"
    similarity   how much of it agrees with the row's "answer", from 0 to 1 (difflib's ratio): where
                 whole answers are rare, this tells which of the wrong ones are less so
    format       for <think>…</think><answer>…</answer>: 0.1 for each tag that is there once, 0.6
                 more for the whole form
    language     the share of its letters that are Chinese, or for another question are not
    length       1 for nothing, 0 for --max_gen_len tokens, in between a straight line
    repetition   the share of its sequences of three tokens that come only once
    model        a reward model of this project (out/reward_{size}.pth, train_reward.py)
    transformers a reward model in --reward_model_path
    judge        a language model at --judge_url, which gives marks from 0 to 10

auto takes the first that is there: --reward_model_path, out/reward_{size}.pth, and for rows with an
"answer" that rule; with --reasoning 1 the format counts half as much beside it.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import openai
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from dataset.grading import grade, normalize_text
from dataset.lm_dataset import encode_chat
from dataset.reply_parser import REASONING_TAGS, parse_reasoning, tagged_answer
from model.errors import UserError
from model.weights import find_weights, load_scoring_model
from trainer.rl.rollout import Completion, Prompts, RolloutArgs
from trainer.trainer_utils import Run

Reward = Callable[[list[Completion]], list[float]]


class Rewards:
    """The weighted sum of the parts that --reward names.

    Args:
        prompts: the data, which must have answers if a rule asks for them.
        more: rules of the stage's own, by name.
    """

    def __init__(self, run: Run, prompts: Prompts, more: dict[str, Callable] | None = None):
        self.run, self.more = run, more or {}
        chosen = parse(run.args.reward, [*NAMES, *self.more])
        if "auto" in chosen:
            chosen = automatic(run, prompts)
            run.print("reward: " + " + ".join(f"{weight:g} · {n}" for n, weight in chosen.items()))
        self.weights = chosen
        self.parts: dict[str, Reward] = {name: self.part(name, prompts) for name in chosen}

    def part(self, name: str, prompts: Prompts) -> Reward:
        args = self.run.args
        if name in ("answer", "number", "similarity"):
            lacking = sum(prompt.answer is None for prompt in prompts.prompts)
            if lacking:
                raise UserError(
                    f'the reward {name} needs an "answer" in every row, and {lacking:,} of '
                    f"{len(prompts):,} have none"
                )
        rules = {
            "answer": lambda each: grade(answer_in(each, args), each.prompt.answer),
            "number": lambda each: same_number(answer_in(each, args), each.prompt.answer),
            "similarity": lambda each: similarity(answer_in(each, args), each.prompt.answer),
            "format": lambda each: form(each.text, opened=args.reasoning),
            "language": same_language,
            "length": lambda each: 1 - len(each.tokens) / args.max_gen_len,
            "repetition": unrepeated,
            **self.more,
        }
        if name in rules:
            return lambda answers: [self.survive(rules[name], answer) for answer in answers]
        models = {"model": OwnModel, "transformers": TheirModel, "judge": Judge}
        return models[name](self.run)

    def survive(self, rule: Callable[[Completion], float], completion: Completion) -> float:
        """A rule that fails on a completion tells nothing of it, and ends no training."""
        try:
            return float(rule(completion))
        except Exception:
            return math.nan

    def __call__(self, completions: list[Completion]) -> tuple[Tensor, dict[str, float]]:
        """[N] rewards, NaN where a part failed; and for the log each part's mean and how many
        failed."""
        parts = {name: torch.tensor(part(completions)) for name, part in self.parts.items()}
        total = sum(self.weights[name] * values for name, values in parts.items())
        figures = {f"reward_{name}": mean(values) for name, values in parts.items()}
        failed = float(total.isnan().sum())
        return total, {"reward": mean(total), **figures, "reward_failed": failed}

    @property
    def of_rules(self) -> bool:
        """Whether all parts are between 0 and 1."""
        return not {"model", "transformers"} & self.parts.keys()


def mean(values: Tensor) -> float:
    """Of those that are numbers; NaN if none is."""
    return values[~values.isnan()].mean().item() if len(values) else math.nan


NAMES = (
    "answer number similarity format language length repetition model transformers judge".split()
)


def parse(words: list[str], names: Iterable[str] = NAMES) -> dict[str, float]:
    """["answer:1", "repetition:0.2"] → weights by name."""
    found = {}
    for word in words:
        name, _, weight = word.partition(":")
        if name not in ("auto", *names):
            raise UserError(f"--reward knows {', '.join(names)} and auto, not {name!r}")
        try:
            found[name] = float(weight or 1)
        except ValueError:
            raise UserError(f"--reward {word}: {weight!r} is no number") from None
    if "auto" in found and len(found) > 1:
        raise UserError("--reward auto stands alone; name the parts instead")
    return found


def automatic(run: Run, prompts: Prompts) -> dict[str, float]:
    args = run.args
    form = {"format": 0.5} if args.reasoning else {}
    if Path(args.reward_model_path).is_dir():
        return {"transformers": 1.0, **form}
    if own_model_path(run):
        return {"model": 1.0, **form}
    if all(prompt.answer is not None for prompt in prompts.prompts):
        return {"answer": 1.0, **form}
    raise UserError(
        f"there is no reward: no folder {args.reward_model_path} (--reward_model_path; download "
        "internlm/internlm2-1_8b-reward, for instance), no "
        f"{args.save_dir}/reward_{run.config.hidden_size}.pth (python trainer/train_reward.py "
        'makes it), and not every row has an "answer" for a rule'
    )


# -- rules -----------------------------------------------------------------------------------------


def answer_in(completion: Completion, args: RolloutArgs) -> str:
    """What counts as the answer: the whole text, or with reasoning what the tags hold."""
    if not args.reasoning:
        return completion.text
    return tagged_answer(completion.text) or ""


def similarity(text: str, answer: str) -> float:
    return SequenceMatcher(
        None, normalize_text(text), normalize_text(answer), autojunk=False
    ).ratio()


def same_number(text: str, answer: str) -> bool:
    found, wanted = (re.findall(r"-?\d+(?:\.\d+)?", each) for each in (text, answer))
    return bool(found and wanted) and float(found[-1]) == float(wanted[-1])


def form(text: str, opened: bool) -> float:
    """How well the text keeps to the think/answer form; `opened`: the prompt has the <think>."""
    text = "<think>\n" + text if opened else text
    once = sum(text.count(tag) == 1 for tag in REASONING_TAGS)
    return 0.1 * once + 0.6 * (parse_reasoning(text) is not None)


def same_language(completion: Completion) -> float:
    question, letters = (
        completion.prompt.messages[-1]["content"],
        list(filter(str.isalpha, completion.text)),
    )
    chinese = sum(map(is_chinese, letters)) / max(1, len(letters))
    return chinese if any(map(is_chinese, question)) else float(bool(letters)) * (1 - chinese)


def is_chinese(character: str) -> bool:
    return "一" <= character <= "鿿"


def unrepeated(completion: Completion) -> float:
    triples = Counter(zip(*(completion.tokens[n:] for n in range(3)), strict=False))
    return len(triples) / max(1, triples.total())


# -- models ----------------------------------------------------------------------------------------


def own_model_path(run: Run) -> Path | None:
    path = Path(run.args.save_dir) / f"reward_{run.config.hidden_size}.pth"
    return path if path.exists() else None


class OwnModel:
    """The score of train_reward.py's model, read at the end of the conversation."""

    def __init__(self, run: Run):
        self.run = run
        path = own_model_path(run)
        if path is None:  # of another size, then
            kind = dict(newest=True, use_moe=None)
            path = find_weights("reward", None, run.args.save_dir, **kind)
        self.model = load_scoring_model(path, tokenizer=run.tokenizer).to(run.device).eval()

    @torch.no_grad()
    def __call__(self, completions: list[Completion]) -> list[float]:
        size = self.run.args.update_batch_size
        parts = (completions[at : at + size] for at in range(0, len(completions), size))
        return [score for part in parts for score in self.scores(part)]

    def scores(self, completions: list[Completion]) -> list[float]:
        rows = [
            encode_chat(
                self.run.tokenizer,
                [*each.prompt.messages, {"role": "assistant", "content": each.text}],
            ).ids
            for each in completions
        ]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        scores = self.model(ids.to(self.run.device)).scores.cpu()
        return [own[len(row) - 1].item() for own, row in zip(scores, rows, strict=True)]


class TheirModel:
    """A reward model of transformers: a sequence classifier of one label, or one that brings
    `get_score` along, as internlm2-1_8b-reward does."""

    def __init__(self, run: Run):
        path, trusted = run.args.reward_model_path, run.args.trust_remote_code
        self.device = run.device
        if not Path(path).is_dir():
            raise UserError(f"there is no folder {path}; --reward_model_path names another")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trusted)
            kind = AutoModel if trusted else AutoModelForSequenceClassification
            self.model = kind.from_pretrained(path, trust_remote_code=trusted)
        except (OSError, ValueError, KeyError) as error:
            why = str(error).strip().splitlines()[0]
            if "trust_remote_code" in str(error):
                why = "it brings its own code, which runs only with --trust_remote_code 1"
            raise UserError(f"{path} is no reward model that can be used: {why}") from error
        if not hasattr(self.model, "get_score") and getattr(self.model, "num_labels", 0) != 1:
            raise UserError(f"the model in {path} does not give one score: its head is another")
        self.model.to(self.device).eval()

    @torch.no_grad()
    def __call__(self, completions: list[Completion]) -> list[float]:
        return [self.score(each) for each in completions]

    def score(self, completion: Completion) -> float:
        reply = {"role": "assistant", "content": completion.text}
        messages: list[dict[str, Any]] = [*completion.prompt.messages, reply]
        if hasattr(self.model, "get_score"):
            return float(self.model.get_score(self.tokenizer, messages))
        inputs = self.tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
        return self.model(**inputs.to(self.device)).logits[0, 0].item()


class Judge:
    """Marks from another language model. A reply without a mark tells nothing (NaN)."""

    ASKED = (
        "Rate the answer to the question from 0 (useless or wrong) to 10 (right, helpful, short). "
        "Reply with the number alone.\n\nQuestion:\n{question}\n\nAnswer:\n{answer}"
    )

    def __init__(self, run: Run):
        if not run.args.judge_url:
            raise UserError("the reward judge needs --judge_url, the base URL of an OpenAI API")
        self.url, self.model = run.args.judge_url, run.args.judge_model or "default"
        key = os.environ.get("OPENAI_API_KEY", "none")  # servers of one's own want none
        self.client = openai.OpenAI(base_url=self.url, api_key=key, max_retries=4, timeout=120)

    def __call__(self, completions: list[Completion]) -> list[float]:
        return [self.mark(each) for each in completions]

    def mark(self, completion: Completion) -> float:
        question = completion.prompt.messages[-1]["content"]
        asked = self.ASKED.format(question=question, answer=completion.text)
        try:
            reply = self.client.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": asked}], temperature=0
            )
        except openai.APIConnectionError as error:
            why = f"the judge at {self.url} cannot be reached; --resume goes on"
            raise UserError(why) from error
        except openai.APIError:
            return math.nan
        found = re.search(r"\d+(?:\.\d+)?", reply.choices[0].message.content or "")
        return min(10.0, float(found[0])) / 10 if found else math.nan
