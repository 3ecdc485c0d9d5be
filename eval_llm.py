"""Chat with a model in the terminal.

python eval_llm.py --weight full_sft                    your own weights, from out/
python eval_llm.py --weight pretrain full_sft           several models, side by side
python eval_llm.py --load_from ./MiniMind2              any transformers folder
python eval_llm.py --weight reason --open_thinking 1    with a chain of thought
echo "Who are you?" | python eval_llm.py                prompts from a pipe, one per line

Commands during a chat: /clear, /save [FILE], /quit, /help.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from model.command_line import option, parse_command_line
from model.errors import UserError, exit_on_user_error
from scripts.serving.arguments import ChatArgs


@dataclass
class Args(ChatArgs):
    weight: list[str] = option(
        ["full_sft"], "own weights: stages, such as pretrain, or .pth files; each answers in turn"
    )
    prompts: Literal["ask", "auto", "type"] = option(
        "ask", "auto: example prompts; type: your own; ask: choose at the start"
    )
    show_speed: bool = option(True, "print tokens per second after each answer")


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_command_line(Args, __doc__)


from dataset.encoding import ends_in_thought
from dataset.lm_dataset import Message, encode_chat, encode_text
from dataset.reply_parser import parse_reply
from model.inference.generation import decode
from model.inference.streaming import stream_text
from model.weights import write_json
from scripts.serving.loading import ChatModel, load_chat_model
from scripts.serving.prompts import CHAT_EXAMPLES, TEXT_EXAMPLES, last_exchanges, read_prompts

HELP = """/clear        forget the conversation
/save [FILE]  save it as JSON, by default to chat.json
/quit         quit, as Ctrl-D does; Ctrl-C stops an answer"""


def main(args: Args) -> None:
    conversations = [Conversation(load_chat_model(args, weight), args) for weight in args.weight]
    all_base = all(conversation.is_base_model for conversation in conversations)
    for prompt in read_prompts(args.prompts, TEXT_EXAMPLES if all_base else CHAT_EXAMPLES):
        command, _, argument = prompt.partition(" ")
        if command == "/quit":
            return
        if command == "/clear":
            for conversation in conversations:
                conversation.history.clear()
        elif command == "/save":
            save(conversations, Path(argument.strip() or "chat.json"))
        elif command in ("/help", "/?"):
            print(HELP)
        else:
            for conversation in conversations:
                if len(conversations) > 1:
                    print(f"[{conversation.name}]")
                conversation.answer(prompt)


class Conversation:
    """A model and its chat history."""

    def __init__(self, loaded: ChatModel, args: Args):
        self.model, self.tokenizer, self.name = loaded.model, loaded.tokenizer, loaded.name
        self.is_base_model = loaded.is_base_model
        self.args, self.sampling = args, args.sampling()
        print(f"{self.name}: {loaded.num_parameters / 1e6:.2f}M parameters, {self.model.device}")
        self.max_prompt_tokens = loaded.max_positions - args.max_new_tokens
        if self.max_prompt_tokens < 1:
            raise UserError(
                f"--max_new_tokens {args.max_new_tokens} leaves no room for a prompt: the model "
                f"has {loaded.max_positions} positions"
            )
        self.history: list[Message] = []

    def answer(self, prompt: str) -> None:
        """Print the model's answer to a prompt as it is generated."""
        self.history.append({"role": "user", "content": prompt})
        if self.is_base_model:
            ids = encode_text(self.tokenizer, prompt).ids[:-1]  # without EOS: the text goes on
        else:
            messages = last_exchanges(self.history, self.args.historys)
            options = dict(add_generation_prompt=True, open_thinking=self.args.open_thinking)
            try:
                ids = encode_chat(self.tokenizer, messages, **options).ids
            except UserError as error:
                raise UserError(f"the conversation {error}") from None
        if len(ids) > self.max_prompt_tokens:
            print(
                f"the prompt has {len(ids)} tokens, and at most {self.max_prompt_tokens} fit; the "
                "conversation is cleared\n"
            )
            self.history.clear()
            return
        start, num_tokens, text = time.perf_counter(), 0, ""

        def generated_tokens() -> Iterator[int]:
            nonlocal num_tokens
            for step in decode(self.model, [ids], self.sampling):
                num_tokens += 1
                yield step[0]

        # Where the prompt ends with <think>, the model does not write it.
        thinking = not self.is_base_model and ends_in_thought(self.tokenizer, ids)
        print("<think>\n" if thinking else "", end="")
        try:
            for piece in stream_text(self.tokenizer, generated_tokens()):
                print(piece, end="", flush=True)
                text += piece
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        self.history.append(self.to_message(text, thinking))
        speed = f"[{num_tokens / (time.perf_counter() - start):.1f} tokens/s]"
        print(f"\n{speed}\n" if self.args.show_speed else "\n")

    def to_message(self, text: str, thinking: bool) -> Message:
        """An answer as a message of the chat template, with reasoning and tool calls apart."""
        if self.is_base_model:
            return {"role": "assistant", "content": text}
        reply = parse_reply(text, thinking)
        message = {"role": "assistant", "content": reply.content}
        if reply.reasoning:
            message["reasoning_content"] = reply.reasoning
        if reply.tool_calls:
            message["tool_calls"] = reply.tool_calls
        return message


def save(conversations: list[Conversation], path: Path) -> None:
    try:
        write_json(path, {each.name: each.history for each in conversations})
        print(f"saved as {path}")
    except UserError as error:  # not worth losing the conversation
        print(error)


if __name__ == "__main__":
    with exit_on_user_error():
        main(args)
