"""A fixed page of questions, in English and Chinese, to every stage of a run.

    python scripts/runs/questions.py --save_dir out/minimind
    python scripts/runs/questions.py --save_dir out --stages full_sft dpo --output answers.json

The questions are those of questions.jsonl: facts, explanations, advice, writing, translation, sums,
identity, conversations of two turns, a thought, a tool. Each is answered twice, greedily and
sampled with a fixed seed, and every answer is kept, as JSON and as Markdown to read. A pretrained
model continues the question as a text. What a stage has answered is not asked again, unless its
weights have changed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.command_line import option, parse_command_line
from model.errors import UserError, exit_on_user_error
from model.paths import OUT
from scripts.runs.stages import (
    STAGES,
    finished_stages,
    read_json,
    stopped_quietly,
    weights_of,
)


@dataclass
class Args:
    save_dir: str = option(str(OUT / "minimind"), "folder of the weights")
    stages: list[str] = option([], "stages to ask; default: those that are finished")
    output: str = option("", "JSON of the answers; default: questions.json in save_dir")
    max_new_tokens: int = option(160, "maximum length of an answer, in tokens", at_least=1)
    temperature: float = option(0.85, "of the sampled answer", above=0)
    top_p: float = option(0.85, "of the sampled answer", above=0, at_most=1)
    seed: int = option(42, "of the sampled answer", at_least=0, below=2**31)
    device: str = option("auto", "auto, cuda, cuda:1, mps or cpu")


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_command_line(Args, __doc__)


import hashlib

from dataset.encoding import encode_chat, encode_text
from dataset.jsonl import load_rows
from dataset.reply_parser import parse_reply
from dataset.tools.builtin import TOOLS
from model.inference.generation import generate
from model.inference.sampling import SamplingParams
from model.weights import atomic_write, write_json
from scripts.serving.arguments import ModelArgs
from scripts.serving.loading import ChatModel, load_chat_model

QUESTIONS = Path(__file__).with_suffix(".jsonl")


def main(args: Args) -> dict[str, Any]:
    """{"questions": rows, "sampling": settings, "stages": {stage: {weights, answers}}}"""
    questions, folder = load_rows(QUESTIONS), Path(args.save_dir)
    output = Path(args.output or folder / "questions.json")
    sampling = dict(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    )
    page = read_json(output)
    if (page.get("questions"), page.get("sampling")) != (questions, sampling):
        page = {"questions": questions, "sampling": sampling, "stages": {}}
    stages = [name for name in args.stages or finished_stages(folder) if name != "reward"]
    if not stages:
        raise UserError(f"{folder} has no finished stage to ask; --stages names others")
    for stage in stages:
        weights = weights_of(stage, folder)
        if weights is None:
            raise UserError(f"{folder} has no weights of {stage}")
        known = page["stages"].get(stage, {})
        if known.get("fingerprint") != (now := fingerprint(weights)):
            print(f"asking {STAGES[stage].title}: {weights.name}")
            loaded = load_stage(stage, folder, args.device)
            answers = ask_all(loaded, questions, sampling, thinks=stage == "reason")
            page["stages"][stage] = dict(
                weights=weights.name, fingerprint=now, continues=loaded.is_base_model
            )
            page["stages"][stage]["answers"] = answers
            write_json(output, page)
    page["stages"] = {name: page["stages"][name] for name in STAGES if name in page["stages"]}
    write_json(output, page)
    with atomic_write(output.with_suffix(".md")) as file:
        file.write(as_markdown(page).encode())
    print(f"{len(questions)} questions to {', '.join(stages)}: {output.with_suffix('.md')}")
    return page


def fingerprint(weights: Path) -> str:
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:16]


def load_stage(stage: str, folder: Path, device: str, decode_only: bool = True) -> ChatModel:
    """The model of a stage; LoRA's adapter is merged into the fine-tuned model."""
    weights = str(weights_of(stage, folder))
    args = ModelArgs(weight=weights, save_dir=str(folder), device=device)
    if stage == "lora":
        args.weight, args.lora_weight = str(weights_of("full_sft", folder)), weights
    return load_chat_model(args, decode_only=decode_only)


def ask_all(
    loaded: ChatModel, questions: list[dict], sampling: dict[str, Any], thinks: bool
) -> dict[str, dict[str, list[str]]]:
    """{id of a question: {"greedy": the answer to each turn, "sampled": likewise}}

    Args:
        thinks: the model was trained to write thoughts: then questions for a thought open one.
    """
    greedy = SamplingParams(max_new_tokens=sampling["max_new_tokens"], temperature=0)
    ways = {"greedy": greedy, "sampled": SamplingParams(**sampling)}
    answers = {row["id"]: {way: [] for way in ways} for row in questions}
    for way, params in ways.items():
        for turn in range(max(len(row["turns"]) for row in questions)):
            rows = [row for row in questions if turn < len(row["turns"])]
            said = [answers[row["id"]][way] for row in rows]
            prompts = [prompt_of(loaded, *each, thinks) for each in zip(rows, said, strict=True)]
            replies = generate(loaded.model, prompts, params)
            for before, reply in zip(said, replies, strict=True):
                before.append(loaded.tokenizer.decode(reply, skip_special_tokens=True).strip())
    return answers


def prompt_of(loaded: ChatModel, row: dict, said: list[str], thinks: bool) -> list[int]:
    """The tokens of a question, after the turns that were answered already."""
    if loaded.is_base_model:
        turns = [text for pair in zip(row["turns"], said, strict=False) for text in pair]
        text = "\n".join([*turns, row["turns"][len(said)]])
        return encode_text(loaded.tokenizer, text).ids[:-1]  # without EOS: the text goes on
    messages: list[dict] = []
    for question, answer in zip(row["turns"], said, strict=False):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": parse_reply(answer).content})
    messages.append({"role": "user", "content": row["turns"][len(said)]})
    options: dict[str, Any] = {"open_thinking": thinks and row.get("open_thinking", False)}
    if "tools" in row:
        options["tools"] = [TOOLS[name].schema for name in row["tools"]]
    return encode_chat(loaded.tokenizer, messages, add_generation_prompt=True, **options).ids


def as_markdown(page: dict[str, Any]) -> str:
    """All questions and answers, to read."""
    sampling = page["sampling"]
    lines = [
        "# Questions and answers",
        "",
        "The same questions to each stage. All answers are here, none was chosen. *Greedy* takes "
        f"the likeliest token; *sampled* has temperature {sampling['temperature']:g}, top_p "
        f"{sampling['top_p']:g} and seed {sampling['seed']}. An answer is cut after "
        f"{sampling['max_new_tokens']} tokens.",
    ]
    for row in page["questions"]:
        lines += ["", f"## {row['turns'][0]}"]
        for stage, about in page["stages"].items():
            for way, answers in about["answers"][row["id"]].items():
                lines += ["", f"**{STAGES[stage].title}, {way}**", ""]
                for number, answer in enumerate(answers):
                    if number:
                        lines += [row["turns"][number], ""]
                    lines += [f"> {line}" for line in (answer or "(nothing)").splitlines()] + [""]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    with exit_on_user_error(), stopped_quietly():
        main(args)
