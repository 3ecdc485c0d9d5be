"""Rollouts on a server that speaks OpenAI's completions API, such as vLLM or SGLang.

Before each rollout the policy's weights are written to a folder in transformers' format
(--rollout_folder), which the server was started with, and the server is told to reload them and to
forget the keys and values of the old ones (docs/rl.md has the servers' other flags):

    vLLM     VLLM_SERVER_DEV_MODE=1 vllm serve FOLDER       --rollout_reload vllm
    SGLang   python -m sglang.launch_server --model FOLDER  --rollout_reload sglang

Prompts are sent as token ids. New tokens come back as ids where the server gives them
(return_token_ids, vLLM). Where it gives text alone, that is tokenised again, and may then differ
from the tokens that were sampled.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dataset.chat import stop_tokens
from model.errors import UserError
from model.formats.hf_format import save_hf_folder
from trainer.rl.arguments import RolloutArgs
from trainer.rl.prompts import GenerationRequest

MAX_ATTEMPTS, FIRST_DELAY = 5, 1.0  # a failed request is repeated after 1, 2, 4 … seconds
# What is posted after the weights were written. vLLM keeps the prefix cache when it reloads; with
# blocks of old weights, log-probabilities are off by as much as 4. SGLang empties it by itself.
RELOAD: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "vllm": [
        ("collective_rpc", {"method": "reload_weights"}),
        ("reset_prefix_cache?reset_running_requests=true", {}),
    ],
    "sglang": [("update_weights_from_disk", {"model_path": "{folder}"})],
}


def send_weights(
    args: RolloutArgs, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write the weights to --rollout_folder and have the server reload them."""
    folder = Path(args.rollout_folder)
    save_hf_folder(model, tokenizer, folder)
    root = args.rollout_url.rstrip("/").removesuffix("/v1")
    hint = "vLLM has this only if it was started with VLLM_SERVER_DEV_MODE=1"
    for path, body in RELOAD[args.rollout_reload]:
        values = {name: value.format(folder=folder) for name, value in body.items()}
        done = ask(f"{root}/{path}", values, hint if args.rollout_reload == "vllm" else "")
        if done.get("success") is False:
            raise UserError(f"{root}/{path}: the server did not take the weights: {done}")


def generate_on_server(
    args: RolloutArgs, tokenizer: PreTrainedTokenizerBase, requests: list[GenerationRequest]
) -> list[list[int]]:
    """New tokens of each request, a final EOS included.

    Raises:
        UserError: the server cannot be reached, or answers with an error.
    """
    url = args.rollout_url.rstrip("/")
    body = {
        # as the server calls it: that may be the same folder seen from another one
        "model": ask(f"{url}/models")["data"][0]["id"],
        "max_tokens": args.max_gen_len,
        "temperature": args.temperature,
        "top_p": 1.0,
        "return_token_ids": True,
        "skip_special_tokens": True,
    }

    def send(request: GenerationRequest) -> list[int]:
        seed = (request.seed + request.sample) % 2**31
        response = ask(f"{url}/completions", {**body, "prompt": request.ids, "seed": seed})
        return parse_choice(response["choices"][0], tokenizer, args.max_gen_len)

    with ThreadPoolExecutor(args.rollout_batch_size) as pool:
        return list(pool.map(send, requests))


def parse_choice(
    choice: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> list[int]:
    """The tokens of a choice of the response."""
    ids = choice.get("token_ids")
    if ids is None:
        ids = tokenizer(choice["text"], add_special_tokens=False)["input_ids"]
    stops = stop_tokens(tokenizer)
    if choice.get("finish_reason") == "stop" and (not ids or ids[-1] not in stops):
        ids = [*ids, stops[-1]]  # the server leaves it out, but the policy sampled it
    return ids[:max_tokens] or [stops[-1]]


def ask(url: str, body: dict[str, Any] | None = None, not_found: str = "") -> dict[str, Any]:
    """The response to a POST, or without a body to a GET; a failed one is repeated.

    Args:
        not_found: what a user can do where the server does not know the address.
    """
    method = "GET" if body is None else "POST"
    for attempt in range(MAX_ATTEMPTS):
        try:
            response = httpx.request(method, url, json=body, timeout=600)
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
        else:
            if response.status_code < 400:
                return response.json() if response.content else {}
            reason = f"{response.status_code}: {response.text[:200]}"
            if response.status_code == 404 and not_found:
                reason += f"; {not_found}"
            if response.status_code < 500:  # it would fail again
                break
        if attempt < MAX_ATTEMPTS - 1:
            time.sleep(FIRST_DELAY * 2**attempt)
    raise UserError(f"{url}: {reason}; --resume goes on from the last checkpoint")
