"""Talk to a model in the terminal.

python eval_llm.py --weight full_sft                    weights of your own, from out/
python eval_llm.py --weight pretrain full_sft           several, side by side
python eval_llm.py --load_from ./MiniMind2              any transformers folder
python eval_llm.py --weight reason --open_thinking 1    let it think first
echo "Who are you?" | python eval_llm.py                prompts from a pipe, one a line

While you talk: /clear, /save [FILE], /quit, /help.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dataset.lm_dataset import Message, encode_chat, encode_text
from dataset.reply_parser import parse_reply
from model.command_line import option, parse_arguments
from model.errors import UserError, exit_on_user_error
from model.inference.generation import decode
from model.inference.sampling import Sampling
from model.inference.streaming import stream_text
from model.weights import write_json
from scripts.serving.chat_model import ChatModel, TalkArgs, load_chat_model

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


COMMANDS = """/clear        forget the conversation
/save [FILE]  keep it as JSON, by default in chat.json
/quit         end, as Ctrl-D does; Ctrl-C stops an answer"""


@dataclass
class Args(TalkArgs):
    weight: list[str] = option(
        ["full_sft"], "own weights: stages, such as pretrain, or .pth files; several answer in turn"
    )
    prompts: Literal["ask", "auto", "type"] = option(
        "ask", "auto: a list of examples; type: your own; ask: choose at the start"
    )
    show_speed: bool = option(True, "tokens a second after each answer")


def main(args: Args) -> None:
    chats = [Chat(load_chat_model(args, weight), args) for weight in args.weight]
    examples = CHAT_PROMPTS if any(not chat.continues for chat in chats) else TEXT_PROMPTS
    for prompt in prompts(args.prompts, examples):
        word, _, rest = prompt.partition(" ")
        if word == "/quit":
            return
        if word == "/clear":
            for chat in chats:
                chat.history.clear()
        elif word == "/save":
            save(chats, Path(rest.strip() or "chat.json"))
        elif word in ("/help", "/?"):
            print(COMMANDS)
        else:
            for chat in chats:
                if len(chats) > 1:
                    print(f"[{chat.name}]")
                chat.answer(prompt)


class Chat:
    """A model, and what was said between it and the person."""

    def __init__(self, loaded: ChatModel, args: Args):
        self.model, self.tokenizer, stage, self.name, parameters = loaded
        self.args = args
        print(f"{self.name}: {parameters / 1e6:.2f}M parameters, {self.model.device}")
        self.sampling = Sampling(
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            repetition_penalty=args.repetition_penalty,
            seed=args.seed,
        )
        self.room = self.model.config.max_position_embeddings - args.max_new_tokens
        if self.room < 1:
            raise UserError(
                f"--max_new_tokens {args.max_new_tokens} leaves no room for a prompt: the model "
                f"has {self.model.config.max_position_embeddings} positions"
            )
        self.history: list[Message] = []
        # What only learnt to go on writing has no idea of a conversation.
        self.continues = stage == "pretrain" or not self.tokenizer.chat_template

    def answer(self, prompt: str) -> None:
        """Print what the model says to a prompt, as it comes."""
        self.history.append({"role": "user", "content": prompt})
        thinking = self.args.open_thinking and not self.continues
        if self.continues:
            ids = encode_text(self.tokenizer, prompt).ids[:-1]
        else:
            recent = self.history[-1 - self.args.historys // 2 * 2 :]  # whole exchanges
            ids = encode_chat(
                self.tokenizer, recent, add_generation_prompt=True, open_thinking=thinking
            ).ids
        if len(ids) > self.room:
            print(f"that is {len(ids)} tokens, and there is room for {self.room}; say it shorter\n")
            self.history.clear()
            return
        started, tokens, text = time.perf_counter(), 0, ""

        def counted() -> Iterator[int]:
            nonlocal tokens
            for step in decode(self.model, [ids], self.sampling):
                tokens += 1
                yield step[0]

        print("<think>\n" if thinking else "", end="")  # stands in the prompt already
        try:
            for piece in stream_text(self.tokenizer, counted()):
                print(piece, end="", flush=True)
                text += piece
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        self.history.append({"role": "assistant", **self.said(text, thinking)})
        speed = f"[{tokens / (time.perf_counter() - started):.1f} tokens/s]"
        print(f"\n{speed}\n" if self.args.show_speed else "\n")

    def said(self, text: str, thinking: bool) -> Message:
        """What a reply says, its thoughts apart, as the chat template takes them."""
        if self.continues:
            return {"content": text}
        reply = parse_reply(text, thinking)
        more = {"reasoning_content": reply.reasoning, "tool_calls": reply.tool_calls}
        return {"content": reply.content, **{key: each for key, each in more.items() if each}}


def save(chats: list[Chat], path: Path) -> None:
    try:
        write_json(path, {chat.name: chat.history for chat in chats})
        print(f"saved as {path}")
    except UserError as error:  # no reason to end a conversation
        print(error)


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
