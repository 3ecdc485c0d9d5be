"""Talk to a model in the terminal.

python eval_llm.py --weight full_sft                    weights of your own, from out/
python eval_llm.py --load_from ./MiniMind2              any transformers folder
echo "Who are you?" | python eval_llm.py                prompts from a pipe, one a line
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel

from dataset.lm_dataset import Message, encode_chat, encode_text
from model.command_line import option, parse_arguments
from model.errors import UserError, exit_on_user_error
from model.generation import Sampling, decode, prepare_to_decode, stream_text
from model.model_lora import load_lora, merged_for_good
from model.weights import (
    OUT,
    TOKENIZER,
    count_parameters,
    find_weights,
    load_for_chat,
    yarn_settings,
)
from trainer.hardware import resolve_device, resolve_dtype

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
class Args:
    load_from: str = option(
        str(TOKENIZER), "./model: own weights from save_dir; else a transformers folder"
    )
    weight: str = option("full_sft", "own weights: the stage, such as pretrain, or a .pth file")
    lora_weight: str = option("", "own weights: what train_lora.py made, as lora_identity")
    hidden_size: int | None = option(None, "own weights: which size; default: the newest")
    save_dir: str = option(str(OUT), "folder of own weights")
    tokenizer_path: str = option("", "folder of the tokenizer; default: that of load_from")
    prompts: Literal["ask", "auto", "type"] = option(
        "ask", "auto: a list of examples; type: your own; ask: choose at the start"
    )
    historys: int = option(0, "how many earlier messages the model sees; 0: each prompt alone")
    max_new_tokens: int = option(512, "longest answer")
    temperature: float = option(0.85, "how freely it chooses; 0: always the likeliest token")
    top_p: float = option(0.85, "choose among the likeliest tokens that make up this share")
    top_k: int = option(0, "choose among this many of the likeliest tokens; 0: all")
    repetition_penalty: float = option(1.0, "more than 1 discourages repetition")
    inference_rope_scaling: bool = option(False, "YaRN, for texts longer than in training")
    yarn_factor: float | None = option(None, "with it: how many times longer; default: 4")
    yarn_original_length: int | None = option(None, "the length in training; default: 2048")
    yarn_beta_fast: float | None = option(None, "pairs that turn more often stay; default: 32")
    yarn_beta_slow: float | None = option(None, "pairs that turn less are slowed; default: 1")
    yarn_attention_factor: float | None = option(None, "default: 0.1 · ln(factor) + 1")
    seed: int | None = option(None, "the same seed gives the same answers")
    device: str = option("auto", "auto, cuda, cuda:1, mps or cpu")
    dtype: Literal["bfloat16", "float16", "float32"] = option("bfloat16", "on CUDA")
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


def add_weights_of_lora(model: PreTrainedModel, args: Args) -> None:
    """Merge an addition into the model; a stage's name or a .pth file says which."""
    path = Path(args.lora_weight)
    if path.suffix != ".pth":
        sizes = dict(hidden_size=model.config.hidden_size, use_moe=model.config.use_moe)
        path = find_weights(f"lora/{args.lora_weight}", directory=args.save_dir, **sizes)
    load_lora(model, path)
    merged_for_good(model)


def main(args: Args) -> None:
    device = resolve_device(args.device)
    model, tokenizer, stage = load_for_chat(
        args.load_from,
        args.weight,
        hidden_size=args.hidden_size,
        directory=args.save_dir,
        tokenizer_path=args.tokenizer_path,
        device=device,
        dtype=resolve_dtype(args.dtype, device),
        yarn=yarn_settings(args),
    )
    parameters = count_parameters(model)
    foreign = (Path(args.load_from) / "config.json").exists()
    if args.lora_weight:
        if foreign:
            raise UserError("--lora_weight is for own weights, and --load_from is another model")
        add_weights_of_lora(model, args)
    name = args.load_from if foreign else args.weight
    model = prepare_to_decode(model)
    print(f"{name}: {parameters / 1e6:.2f}M parameters, {device}")
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
