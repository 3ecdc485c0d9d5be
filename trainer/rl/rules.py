"""Rewards by rule: functions of one completion. rewards.py weighs them, and says what each is."""

import re
from collections import Counter
from collections.abc import Callable
from difflib import SequenceMatcher
from typing import Any, NamedTuple

from dataset.grading import Truth, final_answer, fold_text, same_number
from dataset.reply_parser import REASONING_TAGS, parse_reasoning, tagged_answer
from dataset.text import is_chinese
from trainer.rl.arguments import RolloutArgs
from trainer.rl.prompts import Prompt
from trainer.rl.rollout import Completion

UNTAGGED_FORMAT = re.compile(r"<think>\n.+?\n</think>\n{1,2}.*\S.*", re.DOTALL)


class Rule(NamedTuple):
    score: Callable[[Any, RolloutArgs], float]  # of a Completion, or of the stage's kind of it
    needs: Callable[[Prompt], bool] | None = None  # whether it can judge a prompt; None: any


def has_truth(prompt: Prompt) -> bool:
    return prompt.truth is not None


def answer_in(completion: Completion, args: RolloutArgs) -> str:
    """The final answer, "" where a thought was opened and has no end. With --reasoning it stands
    between tags, if the tokenizer has them."""
    prompt, text = completion.prompt, completion.text
    if args.reasoning and prompt.answer_tags:
        return tagged_answer(text) or ""
    return final_answer(text, args.reasoning or prompt.thinking)


def truth_of(completion: Completion) -> Truth:
    """The right answer, which every prompt has whose completions a rule that needs it judges."""
    assert completion.prompt.truth is not None
    return completion.prompt.truth


def answer_score(completion: Completion, args: RolloutArgs) -> float:
    return truth_of(completion).score(answer_in(completion, args))


def number_score(completion: Completion, args: RolloutArgs) -> float:
    truth = truth_of(completion)
    if truth.anywhere:
        return answer_score(completion, args)
    return float(same_number(answer_in(completion, args), truth.text))


def similarity_score(completion: Completion, args: RolloutArgs) -> float:
    # how like the truth the reply looks: thoughts that nobody asked for count against it
    asked = args.reasoning or completion.prompt.thinking
    text = answer_in(completion, args) if asked else completion.text
    return similarity(text, truth_of(completion).text)


def similarity(text: str, answer: str) -> float:
    return SequenceMatcher(None, fold_text(text), fold_text(answer), autojunk=False).ratio()


def format_reward(text: str, opened: bool, answer_tags: bool = True) -> float:
    """How far the text keeps to the think/answer format.

    Args:
        opened: the prompt ends with <think>.
        answer_tags: False for a tokenizer without <answer>, whose answer is what follows </think>.
    """
    text = "<think>\n" + text if opened else text
    tags = REASONING_TAGS if answer_tags else REASONING_TAGS[:2]
    once = sum(text.count(tag) == 1 for tag in tags) / len(tags)
    if answer_tags:
        complete = parse_reasoning(text) is not None
    else:
        complete = once == 1 and UNTAGGED_FORMAT.fullmatch(text) is not None
    return 0.4 * once + 0.6 * complete


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
    "answer": Rule(answer_score, has_truth),
    "number": Rule(number_score, has_truth),
    "similarity": Rule(similarity_score, has_truth),
    "format": Rule(
        lambda each, args: format_reward(each.text, args.reasoning, each.prompt.answer_tags)
    ),
    "language": Rule(lambda each, args: same_language(each)),
    "length": Rule(lambda each, args: 1 - len(each.tokens) / args.max_gen_len),
    "repetition": Rule(lambda each, args: distinct_ngrams(each.tokens)),
}
