"""One training of small_models.py: its data, their order, the averages of its weights, and what it
has learnt."""

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from dataset.lm_dataset import load_documents
from dataset.packing import PackedDataset, best_fit_pack, document_lengths, split_documents
from dataset.text import language_of
from model.attention import sdpa_attention
from model.errors import UserError
from model.model_minimind import Attention, MiniMindForCausalLM
from model.weights import load_model, load_tokenizer
from scripts.eval_ppl import document_bits, encode, read_texts, summarize_by
from trainer import train_full_sft, train_pretrain
from trainer.common.context import Context
from trainer.common.optimizers import MultiOptimizer, make_optimizer
from trainer.common.setup import init_model
from trainer.trainer_utils import Run

PIECE = 128  # tokens of a piece, for `cut_first`
LONG_CHARACTERS, LONG_DOCUMENTS = 2000, 40


@dataclass(frozen=True)
class Variant:
    """What a training does differently from the default recipe."""

    about: str
    flags: dict[str, Any] = field(default_factory=dict)  # of train_pretrain.py
    epochs: int = 1  # of a part of the data, so that the number of tokens stays
    short_first: float = 0.0  # share of the training that takes the sequences with more documents
    cut_first: float = 0.0  # share of the training that takes documents in pieces of PIECE tokens
    mix_last: float = 0.0  # share of the training, its end, that has conversations in it
    mix_share: float = 0.5  # of the tokens of that part, how many are conversations
    mix_loss_mask: bool = False  # conversations carry loss on the assistant's tokens only
    embedding_from_counts: float = 0.0  # standard deviation of an embedding made of counts
    last_momentum: float | None = None  # Muon's momentum rises to this
    residual_dropout: bool = False  # dropout without that of the attention weights
    averages: bool = False  # average the weights too
    then_sft: bool = False  # fine-tune afterwards
    same_speed: bool = False  # a step costs what a step of the default recipe costs


# -- data ------------------------------------------------------------------------------------------


class CutDataset(PackedDataset):
    """Sequences of seq_len tokens, of pieces of at most PIECE tokens in random order: pieces of
    more documents are in a sequence."""

    def __init__(self, documents: Dataset, seq_len: int, indices: np.ndarray, seed: int):
        super().__init__(documents, seq_len, indices)
        chunks = split_documents(document_lengths(documents)[indices], PIECE)
        order = np.random.default_rng([seed, 2]).permutation(len(chunks.length))
        for name in ("document", "start", "length"):
            setattr(chunks, name, getattr(chunks, name)[order])
        self.chunks = chunks
        sequence_of = best_fit_pack(chunks.length, seq_len)
        self.chunk_order = np.argsort(sequence_of, kind="stable").astype(np.int32)
        self.offsets = np.concatenate(([0], np.cumsum(np.bincount(sequence_of)))).astype(np.int64)


class JoinedDataset(PackedDataset):
    """The sequences of two datasets, one after the other."""

    def __init__(self, first: PackedDataset, second: PackedDataset):
        self.parts = (first, second)
        self.documents, self.seq_len = first.documents, first.seq_len
        self.max_sample_tokens = first.max_sample_tokens
        self.indices = np.concatenate([part.indices for part in self.parts])
        self.chunks = first.chunks

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: int | None) -> list[dict[str, np.ndarray]]:
        first, second = self.parts
        if index is None or index < len(first):
            return first[index]
        return second[index - len(first)]

    @property
    def num_tokens(self) -> int:
        return sum(part.num_tokens for part in self.parts)


def take(documents: Dataset, tokens: int, seed: int) -> np.ndarray:
    """The indices of random documents with this number of tokens, as good as exactly: where the
    next document is too long, shorter ones after it fill what is left."""
    order = np.random.default_rng([seed, 1]).permutation(len(documents))
    lengths = document_lengths(documents)[order]
    end = int(np.searchsorted(np.cumsum(lengths, dtype=np.int64), tokens, side="right"))
    chosen, left = [*range(end)], tokens - int(lengths[:end].sum())
    for at in range(end, min(end + 1000, len(lengths))):
        if lengths[at] <= left:
            chosen.append(at)
            left -= int(lengths[at])
    return np.sort(order[chosen])


def make_data(
    variant: Variant, args: train_pretrain.Args, tokens: int, sft_path: str
) -> tuple[PackedDataset, np.ndarray | None]:
    """The sequences that a variant trains, and their order in the only epoch; None: random."""
    tokenizer, seq_len, seed = load_tokenizer(), args.max_seq_len, args.seed
    documents = load_documents(args.data_path, "text", tokenizer)
    pack = partial(PackedDataset, documents, seq_len)
    rng = np.random.default_rng([seed, 3])
    if variant.cut_first:
        first = take(documents, int(variant.cut_first * tokens), seed)
        cut = CutDataset(documents, seq_len, first, seed)
        data = JoinedDataset(cut, pack(np.setdiff1d(take(documents, tokens, seed), first)))
        rest = len(cut) + rng.permutation(len(data) - len(cut))
        return data, np.concatenate([rng.permutation(len(cut)), rest])
    if variant.mix_last:
        num_chats = int(tokens * variant.mix_last * variant.mix_share)
        chats = load_documents(sft_path, "conversations", tokenizer)
        if not variant.mix_loss_mask:
            chats = WholeLoss(chats)
        text = pack(take(documents, tokens - num_chats, seed))
        data = JoinedDataset(text, PackedDataset(chats, seq_len, take(chats, num_chats, seed)))
        begin = int(len(data) * (1 - variant.mix_last))
        order = rng.permutation(len(text))
        last = np.concatenate([order[begin:], np.arange(len(text), len(data))])
        return data, np.concatenate([order[:begin], rng.permutation(last)])
    data = pack(take(documents, tokens // variant.epochs, seed))
    if variant.short_first:
        by_documents = np.argsort(-np.diff(data.offsets), kind="stable")
        half = rng.permutation(by_documents[: len(data) // 2])
        first = half[: int(variant.short_first * len(data))]
        rest = rng.permutation(np.setdiff1d(np.arange(len(data)), first))
        return data, np.concatenate([first, rest])
    return data, None


class WholeLoss:
    """Conversations as text: each token carries loss."""

    def __init__(self, documents: Dataset):
        self.documents = documents

    def __len__(self) -> int:
        return len(self.documents)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.documents, name)

    def __getitem__(self, indices: list[int]) -> dict[str, Any]:
        ids = self.documents[indices]["input_ids"]
        return {"input_ids": ids, "loss_mask": [np.ones(len(each), bool) for each in ids]}


# -- weights ---------------------------------------------------------------------------------------


def embedding_from_counts(documents: Dataset, vocab_size: int, width: int, std: float) -> Tensor:
    """[V, C] the best factors of rank C of the positive pointwise mutual information of tokens at
    most 4 apart (Levy and Goldberg, NeurIPS 2014), weighted by 1/distance as in GloVe, rotated at
    random so that each element has the same size."""
    column = documents.data.column("input_ids").combine_chunks()
    ids = np.asarray(column.values).astype(np.int64)
    document = np.repeat(np.arange(len(column)), np.diff(np.asarray(column.offsets)))
    counts = np.zeros(vocab_size * vocab_size)
    for distance in (1, 2, 3, 4):
        same = document[distance:] == document[:-distance]
        pairs = ids[:-distance][same] * vocab_size + ids[distance:][same]
        counts += np.bincount(pairs, minlength=len(counts)) / distance
    joint = torch.from_numpy(counts.reshape(vocab_size, vocab_size)).float()
    joint = joint + joint.T
    of_token = joint.sum(0)
    context = of_token**0.75  # as in word2vec: rare contexts count less
    expected = of_token[:, None] * (context / context.sum())
    pmi = torch.log((joint / expected.clamp(min=1e-9)).clamp(min=1.0))
    left, values, _ = torch.svd_lowrank(pmi, q=min(vocab_size, width + 32), niter=2)
    rotation, _ = torch.linalg.qr(torch.randn(width, width))
    factors = (left * values.sqrt())[:, :width] @ rotation
    return factors * std / factors.std()


class Extra:
    """What a resumed training must know besides: the averages, and the CPU seconds so far.

    An exponential average forgets with its decay (of a step); "last 0.2" is the mean of the weights
    after each step of the last fifth (as LAWA, arXiv 2306.03241).
    """

    decays = {"ema 0.95": 0.95, "ema 0.98": 0.98, "ema 0.99": 0.99}
    shares = {"last 0.1": 0.1, "last 0.2": 0.2}

    def __init__(self, averages: bool):
        names = [*self.decays, *self.shares] if averages else []
        self.averages: dict[str, list[Tensor]] = {name: [] for name in names}
        self.counts = dict.fromkeys(names, 0)
        self.seconds, self.since = 0.0, time.process_time()

    @torch.no_grad()
    def update(self, model: nn.Module, fraction_done: float) -> None:
        now = time.process_time()
        self.seconds, self.since = self.seconds + now - self.since, now
        weights: list[Tensor] = list(model.parameters())
        for name, average in self.averages.items():
            if name in self.shares and fraction_done < 1 - self.shares[name]:
                continue
            self.counts[name] += 1
            rate = 1 / self.counts[name]  # a plain mean
            if name in self.decays:
                rate = max(rate, 1 - self.decays[name])
            if average:
                torch._foreach_lerp_(average, weights, rate)
            else:
                average += [weight.detach().clone() for weight in weights]

    def state_dict(self) -> dict[str, Any]:
        return {"averages": self.averages, "counts": self.counts, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.averages, self.counts = state["averages"], state["counts"]
        self.seconds = state["seconds"]


# -- training and evaluation -----------------------------------------------------------------------


def make_model(variant: Variant, args: train_pretrain.Args) -> MiniMindForCausalLM:
    model = init_model(args, load_tokenizer())
    if variant.residual_dropout:
        for module in model.modules():
            if isinstance(module, Attention):
                module.attention_fn = without_dropout
    return model


def without_dropout(query: Tensor, key: Tensor, value: Tensor, mask: Any, _: float) -> Tensor:
    """With dropout of its weights, PyTorch's attention has no fast kernel on a CPU."""
    return sdpa_attention(query, key, value, mask, 0.0)


def train(
    variant: Variant, args: train_pretrain.Args, tokens: int, sft_path: str
) -> tuple[Path, Extra, MiniMindForCausalLM, Run]:
    """Pretrain; returns the file of the weights, and the state at the end. UserError if stopped."""
    ctx, tokenizer = Context.create(args), load_tokenizer()
    model = make_model(variant, args)
    if variant.embedding_from_counts:
        documents = load_documents(args.data_path, "text", tokenizer)
        sizes = (model.config.vocab_size, model.config.hidden_size)
        values = embedding_from_counts(documents, *sizes, variant.embedding_from_counts)
        model.model.embed_tokens.weight.data.copy_(values)
    data, order = make_data(variant, args, tokens, sft_path)
    run = Run(ctx, "pretrain", model, tokenizer, data)
    if order is not None:
        # the sampler of the loader: nothing but the order changes
        run.sampler.order = lambda epoch: order  # type: ignore[method-assign]
    optimizer = make_optimizer(model, args.optimizer, args.learning_rate, args.weight_decay)
    extra = Extra(variant.averages)
    run.resume(model, optimizer, extra)
    for global_batch in run.steps():
        for batch in global_batch:
            with run.forward(model, sync=True):
                outputs = model(
                    **batch.inputs,
                    labels=batch.labels,
                    num_items_in_batch=global_batch.num_label_tokens,
                    return_logits=False,
                )
            run.backward(outputs.loss)
        if variant.last_momentum is not None:
            set_momentum(optimizer, 0.8, variant.last_momentum, run.fraction_done)
        run.update(model, optimizer)
        extra.update(model, run.fraction_done)
        run.log()
        run.save_every(model, optimizer, extra_state=extra)
    if run.stop.agreed:
        raise UserError("stopped; the same command goes on")
    return run.file(".pth"), extra, model, run


def set_momentum(optimizer: MultiOptimizer, first: float, last: float, progress: float) -> None:
    for group in optimizer.param_groups:
        if "momentum" in group:
            group["momentum"] = first + (last - first) * progress


@dataclass
class HeldOut:
    """Bits per byte as scripts/eval_ppl.py measures them, and of the beginnings of long texts."""

    path: str
    documents: int

    def __post_init__(self) -> None:
        self.texts = read_texts(self.path, self.documents)
        texts = read_texts(self.path, 0, LONG_CHARACTERS)
        self.long = [text for text in texts if len(text) == LONG_CHARACTERS][:LONG_DOCUMENTS]

    def bits_per_byte(self, model: MiniMindForCausalLM) -> float:
        return round(sum(self.bits(model)) / sum(len(text.encode()) for text in self.texts), 4)

    def bits(self, model: MiniMindForCausalLM) -> list[float]:
        return document_bits(model.eval(), encode(load_tokenizer(), self.texts))

    def evaluate(self, model: MiniMindForCausalLM) -> dict[str, Any]:
        bits = self.bits(model)
        long_bits = document_bits(model, encode(load_tokenizer(), self.long), 4)
        languages = summarize_by(language_of, self.texts, bits)
        return {
            "bits_per_byte": round(sum(bits) / sum(len(t.encode()) for t in self.texts), 4),
            "languages": {
                name: round(languages[name]["bits_per_byte"], 4)
                for name in ("zh", "en")
                if name in languages
            },
            "long": round(sum(long_bits) / max(1, sum(len(t.encode()) for t in self.long)), 4),
        }

    def evaluate_averages(self, model: MiniMindForCausalLM, extra: Extra) -> dict[str, float]:
        results = {}
        for name, average in extra.averages.items():
            for weight, mean in zip(model.parameters(), average, strict=True):
                weight.data.copy_(mean)
            results[name] = self.bits_per_byte(model)
        return results


def fine_tune(weights: Path, data_dir: str, tokens: int, seed: int, held_out: HeldOut) -> dict:
    """The default fine-tuning: its held-out loss, and bits per byte after it."""
    out = str(weights.parent)
    run = train_full_sft.main(
        train_full_sft.Args(
            data_path=[f"{data_dir}/sft.jsonl.gz"],
            val_path=[f"{data_dir}/sft_val.jsonl.gz"],
            val_documents=300,
            from_weight=str(weights),
            save_dir=out,
            checkpoint_dir=out,
            max_steps=max(1, round(tokens / (16 * 512))),
            eval_interval=0,
            log_interval=5,
            num_workers=0,
            seed=seed,
            resume=True,
        )
    )
    if run["stopped"]:
        raise UserError("stopped; the same command goes on")
    tuned = load_model(weights.with_name(weights.name.replace("pretrain", "full_sft")))
    after = held_out.bits_per_byte(tuned)
    return {"loss": round(run["eval_loss"], 4), "bits_per_byte": after}
