"""Bits per byte of a model on text: the figure by which models with other tokenizers compare.

    python benchmarks/bits_per_byte.py --weight pretrain --data_path VAL.jsonl.gz [--json FILE]

The rule: the first 500 characters of each document, each document alone, <|im_start|> before it;
the sum of −log2 p over all tokens after the first, divided by the UTF-8 bytes of the text.
"""

import gzip
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dataset.lm_dataset import check_file, encode_text
from model.command_line import option, parse_arguments
from model.errors import exit_on_user_error
from model.losses import IGNORED, cross_entropy_sum
from model.model_minimind import MiniMindForCausalLM
from model.weights import OUT, TOKENIZER, load_for_chat, write_json

CHARACTERS = 500


@dataclass
class Args:
    data_path: str = option("", 'JSONL of {"text": …}, .jsonl or .jsonl.gz')
    weight: str = option("pretrain", "the stage, or a .pth file")
    save_dir: str = option(str(OUT), "folder of the weights")
    tokenizer_path: str = option(str(TOKENIZER), "folder of the tokenizer")
    documents: int = option(300, "how many documents, from the first")
    json: str = option("", "also write the figures to this file")


def read_texts(path: str | Path, documents: int) -> list[str]:
    """The first CHARACTERS characters of the first documents of a JSONL file."""
    lines = islice(read_lines(path), documents)
    return [json.loads(line)["text"][:CHARACTERS] for line in lines]


def read_lines(path: str | Path) -> Iterator[str]:
    path = check_file(path)
    opened = gzip.open if str(path).endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8") as file:
        yield from file


@torch.inference_mode()
def bits_per_byte(
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    batch_size: int = 16,
) -> float:
    """Bits per byte by the rule above; documents of about the same length share a batch."""
    documents = sorted((encode_text(tokenizer, text).ids[:-1] for text in texts), key=len)
    nats = 0.0
    for at in tqdm(range(0, len(documents), batch_size), desc="bits per byte", leave=False):
        some = documents[at : at + batch_size]
        width = max(map(len, some))
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in some])
        labels = torch.tensor([ids + [IGNORED] * (width - len(ids)) for ids in some])
        # padding stands behind the text, where causal attention does not see it
        hidden = model.model(ids.to(model.device), use_cache=False).last_hidden_state
        labels = labels.to(model.device)
        loss, _ = cross_entropy_sum(hidden[:, :-1], model.lm_head.weight, labels[:, 1:])
        nats += loss.item()
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def main(args: Args) -> dict[str, float]:
    model, tokenizer, _ = load_for_chat(
        TOKENIZER, args.weight, directory=args.save_dir, tokenizer_path=args.tokenizer_path
    )
    texts = read_texts(args.data_path, args.documents)
    result = {"documents": len(texts), "bits_per_byte": bits_per_byte(model, tokenizer, texts)}
    print(f"{result['bits_per_byte']:.4f} bits per byte on {len(texts)} documents")
    if args.json:
        write_json(args.json, result)
    return result


if __name__ == "__main__":
    with exit_on_user_error():
        main(parse_arguments(Args, __doc__))
