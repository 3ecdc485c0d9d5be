"""Talk to a model in the terminal.

python eval_llm.py --weight full_sft                    weights of your own, from out/
python eval_llm.py --load_from ./MiniMind2              any transformers folder
echo "Who are you?" | python eval_llm.py                prompts from a pipe, one a line
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dataset.lm_dataset import Message, encode_chat, encode_text
from model.command_line import option, parse_arguments
from model.errors import UserError, exit_on_user_error
from model.generation import decode
from model.sampling import Sampling
from model.text_stream import stream_text
from scripts.chat_model import ModelArgs, load_chat_model

CHAT_PROMPTS = [
    "Who are you?",
    "你是谁？",
    "What is 23 + 45?",
    "把 3、1、4、2 从小到大排序。",
    "What is attention in a Transformer?",
    "什么是学习率？",
    "Tell me something nice.",
    "明天会下雨吗？",
]
TEXT_PROMPTS = ["The Transformer is", "人工智能是", "The weather today", "学习的方法是"]


@dataclass
class Args(ModelArgs):
    prompts: Literal["ask", "auto", "type"] = option(
        "ask", "auto: a list of examples; type: your own; ask: choose at the start"
    )
    historys: int = option(0, "how many earlier messages the model sees; 0: each prompt alone")
    max_new_tokens: int = option(512, "longest answer")
    temperature: float = option(0.85, "how freely it chooses; 0: always the likeliest token")
    top_p: float = option(0.85, "choose among the likeliest tokens that make up this share")
    top_k: int = option(0, "choose among this many of the likeliest tokens; 0: all")
    repetition_penalty: float = option(1.0, "more than 1 discourages repetition")
    seed: int | None = option(None, "the same seed gives the same answers")
    show_speed: bool = option(True, "tokens a second after each answer")

    def __post_init__(self) -> None:
        if not self.temperature >= 0:  # nor is NaN
            raise UserError(f"--temperature must not be negative, as {self.temperature} is")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p must be more than 0 and at most 1, not {self.top_p}")
        if self.max_new_tokens < 1:
            raise UserError(f"--max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not 0 <= (self.seed or 0) < 2**31:
            raise UserError(f"--seed must be at least 0 and less than 2^31, not {self.seed}")
        if self.historys < 0:
            raise UserError(f"--historys must not be negative, as {self.historys} is")


def main(args: Args) -> None:
    model, tokenizer, stage, name, parameters = load_chat_model(args)
    print(f"{name}: {parameters / 1e6:.2f}M parameters, {model.device}")
    sampling = Sampling(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
    )
    room = model.config.max_position_embeddings - args.max_new_tokens
    if room < 1:
        raise UserError(
            f"--max_new_tokens {args.max_new_tokens} leaves no room for a prompt: the model has "
            f"{model.config.max_position_embeddings} positions"
        )
    history: list[Message] = []
    # What only learnt to go on writing has no idea of a conversation.
    continues = stage == "pretrain" or not tokenizer.chat_template
    for prompt in prompts(args.prompts, TEXT_PROMPTS if continues else CHAT_PROMPTS):
        if continues:
            ids = encode_text(tokenizer, prompt).ids[:-1]
        else:
            history.append({"role": "user", "content": prompt})
            recent = history[-1 - args.historys // 2 * 2 :]  # whole exchanges
            ids = encode_chat(tokenizer, recent, add_generation_prompt=True).ids
        if len(ids) > room:
            print(f"that is {len(ids)} tokens, and there is room for {room}; say it shorter\n")
            history.clear()
            continue
        started, tokens, text = time.perf_counter(), 0, ""

        def counted() -> Iterator[int]:
            nonlocal tokens
            for step in decode(model, [ids], sampling):  # noqa: B023
                tokens += 1
                yield step[0]

        try:
            for piece in stream_text(tokenizer, counted()):
                print(piece, end="", flush=True)
                text += piece
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        history.append({"role": "assistant", "content": text})
        speed = f"[{tokens / (time.perf_counter() - started):.1f} tokens/s]"
        print(f"\n{speed}\n" if args.show_speed else "\n")


def prompts(source: str, examples: list[str]) -> Iterator[str]:
    """The prompts, one at a time: examples, or what is typed or piped in until it ends."""
    typed = sys.stdin.isatty()
    sys.stdin.reconfigure(errors="replace")  # a pipe may bring anything
    if source == "ask" and typed:
        try:
            choice = input("[0] examples  [1] type your own: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        source = "auto" if choice == "0" else "type"
    if source == "auto":
        for example in examples:
            print(f"> {example}")
            yield example
        return
    while True:
        try:
            line = input("> " if typed else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line:
            if not typed:
                print(f"> {line}")
            yield line


if __name__ == "__main__":
    with exit_on_user_error():
        main(parse_arguments(Args, __doc__))
