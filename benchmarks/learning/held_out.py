"""Held-out questions and preference pairs of the demo, by which stages.py evaluates every model;
and the format of reasoning."""

import math
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dataset.chat import stop_tokens
from dataset.demo.files import load_tests
from dataset.grading import grade
from dataset.lm_dataset import encode_chat, load_documents
from dataset.pairs import PreferenceDataset, collate_pairs
from dataset.reply_parser import parse_reasoning, tagged_answer
from model.inference.generation import generate, pack_for_cpu_decoding
from model.inference.sampling import SamplingParams
from model.model_minimind import MiniMindForCausalLM
from model.weights import load_model, load_tokenizer
from scripts.evaluation.exact_match import encode_questions
from scripts.serving.arguments import ModelArgs
from scripts.serving.loading import load_chat_model
from trainer.common.evaluation import completion_log_probs
from trainer.rl.rules import similarity

GENERATION_BATCH, PAIR_BATCH = 128, 32
KL_SAMPLES = 256


class HeldOutEvaluation:
    """The same held-out questions and pairs for every model, compared with a base model.

    Args:
        data: folder of the demo's data.
        base: weights of the base model.
        questions: maximum number of questions of each skill.
    """

    def __init__(self, data: Path, base: Path, questions: int):
        self.base, self.tokenizer = load_model(base), load_tokenizer()
        self.questions = []
        counts: dict[str, int] = {}
        for row in load_tests(data)["skills"]:
            counts[row["skill"]] = counts.get(row["skill"], 0) + 1
            if counts[row["skill"]] <= questions:
                self.questions.append(row)
        self.prompts = encode_questions(self.tokenizer, [row["prompt"] for row in self.questions])
        documents = load_documents(data / "dpo_val.jsonl", "preferences", self.tokenizer)
        self.pairs = PreferenceDataset(documents, 256)
        self.ref_log_probs = self.pair_log_probs(self.base)

    @property
    def counts(self) -> dict[str, int]:
        return {"questions": len(self.questions), "pairs": len(self.pairs)}

    def evaluate_policy(self, model: MiniMindForCausalLM) -> dict[str, float]:
        """The metrics of a language model."""
        sampling = SamplingParams(max_new_tokens=64, temperature=0)
        # packing makes a model unfit for other forward passes, so that it needs a copy
        decoder = pack_for_cpu_decoding(copy_model(model))
        tokens = [
            reply
            for start in range(0, len(self.prompts), GENERATION_BATCH)
            for reply in generate(decoder, self.prompts[start : start + GENERATION_BATCH], sampling)
        ]
        replies = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        answered = list(zip(self.questions, replies, strict=True))
        correct = [grade(row["answer"], reply) for row, reply in answered]
        skill_accuracy = sum(correct) / len(correct)
        rewards = [similarity(reply, row["answer"]) for row, reply in answered]
        # DPO's implicit reward, up to β: log π(y|x) − log π_ref(y|x)
        log_ratios = self.pair_log_probs(model) - self.ref_log_probs
        preferred = (log_ratios[:, 0] > log_ratios[:, 1]).float()
        preference_accuracy = preferred.mean().item()
        return {
            "skill_accuracy": skill_accuracy,
            "skill_accuracy_error": standard_error(skill_accuracy, len(correct)),
            "rule_reward": sum(rewards) / len(rewards),
            "preference_accuracy": preference_accuracy,
            "preference_accuracy_error": standard_error(preference_accuracy, len(preferred)),
            "kl": self.estimate_kl(model, decoder),
            "length": sum(map(len, tokens)) / len(tokens),
        }

    def evaluate_reward_model(self, result: dict[str, Any]) -> dict[str, float]:
        """The metrics of a reward model, from the result of its training."""
        accuracy = result["eval_accuracy"]
        return {
            "pair_accuracy": accuracy,
            "pair_accuracy_error": standard_error(accuracy, len(self.pairs)),
        }

    @torch.no_grad()
    def pair_log_probs(self, model: MiniMindForCausalLM) -> torch.Tensor:
        """[pairs, 2]: log-probabilities of chosen and rejected answers."""
        batches = []
        for start in range(0, len(self.pairs), PAIR_BATCH):
            end = min(start + PAIR_BATCH, len(self.pairs))
            pairs = [self.pairs[n] for n in range(start, end)]
            batches.append(completion_log_probs(model, collate_pairs(pairs)))
        return torch.cat(batches)

    @torch.no_grad()
    def estimate_kl(self, model: MiniMindForCausalLM, decoder: MiniMindForCausalLM) -> float:
        """KL(model ‖ base) per answer, the mean log-ratio of sampled answers (k1 estimator)."""
        prompts = self.prompts[:: max(1, len(self.prompts) // KL_SAMPLES)]
        replies = generate(decoder, prompts, SamplingParams(64, seed=0))
        total = 0.0
        for prompt, reply in zip(prompts, replies, strict=True):
            ids = torch.tensor([prompt + reply])
            labels = ids.clone()
            labels[:, : len(prompt)] = -100
            log_prob, base_log_prob = (
                each(ids, labels=labels, return_log_probs=True).log_probs.sum().item()
                for each in (model, self.base)
            )
            total += log_prob - base_log_prob
        return total / len(prompts)


held_out_evaluation = cache(HeldOutEvaluation)  # one for all models of a process


def evaluate_reasoning(
    path: Path, questions: list[dict[str, Any]], direct: bool, max_new_tokens: int = 192
) -> dict[str, float]:
    """Accuracy on held-out questions with its standard error, the share of replies in the format
    that was trained, and their length."""
    loaded = load_chat_model(ModelArgs(weight=str(path), device="cpu"))
    model, tokenizer = loaded.model, loaded.tokenizer
    prompts, answers = [], []
    for row in questions:
        *context, last = row["conversations"]
        prompts.append(encode_chat(tokenizer, context, add_generation_prompt=True).ids)
        answers.append(tagged_answer(last["content"]))
    sampling = SamplingParams(max_new_tokens, temperature=0)
    replies = []
    for at in range(0, len(prompts), 100):
        replies += generate(model, prompts[at : at + 100], sampling)
    num_formatted = num_correct = 0
    for reply, answer in zip(replies, answers, strict=True):
        text = tokenizer.decode(reply, skip_special_tokens=True)
        _, final_answer = (("", text) if direct else parse_reasoning(text)) or ("", None)
        complete = reply[-1] in stop_tokens(tokenizer) and final_answer is not None
        num_formatted += complete
        num_correct += complete and grade(final_answer, answer)
    accuracy = num_correct / len(questions)
    return {
        "accuracy": accuracy,
        "accuracy_error": standard_error(accuracy, len(questions)),
        "format": num_formatted / len(questions),
        "length": sum(map(len, replies)) / len(replies),
    }


def copy_model(model: MiniMindForCausalLM) -> MiniMindForCausalLM:
    copied = MiniMindForCausalLM(model.config)
    copied.load_state_dict(model.state_dict())
    return copied.eval()


def standard_error(accuracy: float, count: int) -> float:
    return math.sqrt(accuracy * (1 - accuracy) / count)
