"""Completions from a server that speaks OpenAI's completions API, such as vLLM or SGLang.

The policy's weights are written to a folder of transformers' format (--rollout_folder), which the
server must have been started with, and the server is told to read them anew before each rollout:

    vLLM     VLLM_SERVER_DEV_MODE=1 vllm serve FOLDER       --rollout_reload vllm
    SGLang   python -m sglang.launch_server --model FOLDER  --rollout_reload sglang

Prompts are sent as token ids. New tokens come back as ids where the server gives them
(return_token_ids, vLLM); else the text is tokenised again.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from model.errors import UserError
from model.formats.hf_format import save_folder

if TYPE_CHECKING:
    from trainer.rl.rollout import Prompt, RolloutArgs

TRIES, PAUSE = 5, 1.0  # a request that fails is made again after 1, 2, 4 … seconds
RELOAD = {
    "vllm": lambda folder: ("collective_rpc", {"method": "reload_weights"}),
    "sglang": lambda folder: ("update_weights_from_disk", {"model_path": folder}),
}


def hand_over(
    args: "RolloutArgs", model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write the weights where the server reads them, and tell it to."""
    folder = Path(args.rollout_folder)
    save_folder(model, tokenizer, folder)
    path, body = RELOAD[args.rollout_reload](str(folder))
    root = args.rollout_url.rstrip("/").removesuffix("/v1")
    post(f"{root}/{path}", body)


def complete_by_server(
    args: "RolloutArgs",
    tokenizer: PreTrainedTokenizerBase,
    chosen: list[tuple["Prompt", int, int]],
) -> list[list[int]]:
    """New tokens of each (prompt, seed, copy); a final EOS included.

    Raises:
        UserError: the server cannot be reached, or answers with an error.
    """
    body = {
        "model": args.rollout_folder,
        "max_tokens": args.max_gen_len,
        "temperature": args.temperature,
        "top_p": 1.0,
        "return_token_ids": True,
        "skip_special_tokens": True,
    }
    url = f"{args.rollout_url.rstrip('/')}/completions"

    def ask(one: tuple["Prompt", int, int]) -> list[int]:
        prompt, seed, copy = one
        answer = post(url, {**body, "prompt": prompt.ids, "seed": (seed + copy) % 2**31})
        return tokens_of(answer["choices"][0], tokenizer, args.max_gen_len)

    with ThreadPoolExecutor(args.rollout_batch_size) as pool:
        return list(pool.map(ask, chosen))


def tokens_of(choice: dict[str, Any], tokenizer: PreTrainedTokenizerBase, most: int) -> list[int]:
    """A choice of the reply as token ids."""
    ids = choice.get("token_ids")
    if ids is None:
        ids = tokenizer(choice["text"], add_special_tokens=False)["input_ids"]
    eos = tokenizer.eos_token_id
    if choice.get("finish_reason") == "stop" and ids[-1:] != [eos]:
        ids = [*ids, eos]
    return ids[:most] or [eos]


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request, which is made several times if need be."""
    for attempt in range(TRIES):
        try:
            response = httpx.post(url, json=body, timeout=600)
        except httpx.HTTPError as error:
            why = str(error) or type(error).__name__
        else:
            if response.status_code < 400:
                return response.json() if response.content else {}
            why = f"{response.status_code}: {response.text[:200]}"
            if response.status_code < 500:
                break
        if attempt < TRIES - 1:
            time.sleep(PAUSE * 2**attempt)
    raise UserError(f"{url}: {why}; --resume goes on from the last checkpoint")
