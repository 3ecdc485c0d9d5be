"""Exact-match accuracy of a chat model on questions with one right answer."""

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dataset.grading import grade
from dataset.lm_dataset import encode_chat
from model.inference.generation import generate_text
from model.inference.sampling import SamplingParams

BATCH_SIZE = 128
MAX_NEW_TOKENS = 64


def encode_questions(tokenizer: PreTrainedTokenizerBase, questions: list[str]) -> list[list[int]]:
    """Each question as the prompt of a chat of its own."""
    chats = ([{"role": "user", "content": question}] for question in questions)
    return [encode_chat(tokenizer, chat, add_generation_prompt=True).ids for chat in chats]


def greedy_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[str]
) -> list[str]:
    """The model's answer to each question, decoded greedily."""
    sampling = SamplingParams(max_new_tokens=MAX_NEW_TOKENS, temperature=0)
    prompts = encode_questions(tokenizer, questions)
    return list(generate_text(model, tokenizer, prompts, sampling, batch_size=BATCH_SIZE))


def exact_match(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, rows: list[dict]
) -> float:
    """The share of rows ("prompt", "answer") that are answered right.

    Args:
        name: label of the progress bar.
    """
    num_correct = 0
    with tqdm(rows, desc=f"{name:20}", unit="question", leave=False) as bar:
        for start in range(0, len(rows), BATCH_SIZE):
            batch = rows[start : start + BATCH_SIZE]
            replies = greedy_answers(model, tokenizer, [row["prompt"] for row in batch])
            pairs = zip(batch, replies, strict=True)
            num_correct += sum(grade(row["answer"], reply) for row, reply in pairs)
            bar.update(len(batch))
    return num_correct / len(rows)
