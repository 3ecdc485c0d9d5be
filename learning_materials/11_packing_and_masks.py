"""11. Packing and masks

Question   Documents differ in length, but a batch is a rectangle. What fills it, and which tokens
           may attend to which?
Concept    Padding every document to the longest wastes most of the computation. Packing puts
           several documents into one sequence, each into the fullest sequence with room for it.
           Then the attention mask must separate documents, positions must restart with each
           document, and the loss mask says which tokens carry loss.
Equation   query i attends to key j if j <= i and both are of the same document
           token t carries loss if loss_mask_t = 1 and t is not the first token of its document
                                                             (best-fit packing: arXiv 2404.10830)
Predict    What share of a padded batch of this textbook is padding?
"""

import torch
from datasets import Dataset
from lesson import Lesson, small_model, teach, textbook
from torch import Tensor

from dataset.lm_dataset import Encoded, encode_chat, encode_text
from dataset.packing import PackedDataset, collate
from model.attention import make_attention_mask
from model.config import MiniMindConfig
from model.losses import IGNORE_INDEX
from model.weights import load_tokenizer

ROW = 256


def dataset_of(encoded: list[Encoded]) -> Dataset:
    columns = {"input_ids": [e.ids for e in encoded], "loss_mask": [e.loss_mask for e in encoded]}
    return Dataset.from_dict(columns).with_format("numpy")


def documents(count: int) -> list[Encoded]:
    """Documents of one to five lines of the textbook."""
    tokenizer, lines = load_tokenizer(), textbook()
    texts = (lines[7 * n % 900 :][: 1 + n * n % 5] for n in range(count))
    return [encode_text(tokenizer, "\n".join(text)) for text in texts]


def mask_of(position_ids: Tensor) -> Tensor:
    """[T, T]: the attention mask that the model computes from a sequence's positions."""
    hidden = torch.zeros(1, position_ids.shape[1], 1)
    return make_attention_mask(MiniMindConfig(), hidden, 0, None, position_ids)[0, 0]


def main(lesson: Lesson) -> None:
    tokenizer = load_tokenizer()
    some = dataset_of(documents(300))

    lesson.predict(f"How many sequences of {ROW} tokens do 300 documents need, padded or packed?")
    rows = {how: PackedDataset(some, ROW, packing=how == "packed") for how in ("padded", "packed")}
    sizes = [(how, len(some), some.packing_efficiency) for how, some in rows.items()]
    lesson.table("how", "sequences", "share of real tokens", rows=sizes)
    padded, packed = rows["padded"], rows["packed"]
    assert packed.num_tokens == padded.num_tokens
    assert packed.packing_efficiency > 0.95 > 0.5 > padded.packing_efficiency
    lesson.conclude(f"The same tokens in {len(padded) / len(packed):.1f} times fewer sequences.")

    lesson.predict("Documents of 4, 3 and 5 tokens in a sequence: which keys does a token see?")
    row = [{"input_ids": list(range(size)), "loss_mask": [True] * size} for size in (4, 3, 5)]
    batch = collate([row])
    mask = mask_of(batch.position_ids)
    shown = ["".join("#" if seen else "." for seen in line) for line in mask]
    columns = batch.position_ids[0].tolist(), batch.labels[0].tolist(), shown
    lesson.table("position", "label", "visible keys", rows=zip(*columns, strict=True))
    assert mask.sum() == sum(size * (size + 1) // 2 for size in (4, 3, 5))
    assert (batch.labels[0] == IGNORE_INDEX).nonzero().flatten().tolist() == [0, 4, 7]
    lesson.conclude(
        "Triangles along the diagonal. The model derives the mask from the positions, which "
        "restart with each document. The first token of a document has no label, because nothing "
        "in its document comes before it."
    )

    lesson.predict("Change the first document. Do the logits of the third change?")
    model, moved = small_model(initializer_range=0.2).eval(), {}
    other = batch.input_ids.clone()
    other[0, :4] += 30
    for name, positions in (("with position_ids", batch.position_ids), ("without", None)):
        with torch.no_grad():
            a, b = (model(x, position_ids=positions).logits for x in (batch.input_ids, other))
        moved[name] = (a - b)[0, 7:].abs().max().item()
    lesson.table("how", "change of the third document's logits", rows=moved.items())
    assert moved["with position_ids"] == 0.0 and moved["without"] > 0.01
    lesson.conclude("Not by a bit. Without position_ids the documents attend to each other.")

    lesson.predict("Is the loss of a packed sequence the loss of its separate documents?")
    with torch.no_grad():
        together = model(**batch.inputs, labels=batch.labels).loss.item()
        each = [collate([[piece]]) for piece in row]
        alone = [model(**one.inputs, labels=one.labels).loss * one.num_label_tokens for one in each]
    separate = sum(alone).item() / batch.num_label_tokens
    assert abs(together - separate) < 1e-5
    lesson.conclude(
        f"Yes: packed {together:.6f}, separate {separate:.6f}. Packing changes only the speed."
    )

    lesson.predict("Which tokens of a chat carry loss?")
    turns = (("user", "Who are you?"), ("assistant", "MiniMind."))
    chat = encode_chat(tokenizer, [{"role": role, "content": text} for role, text in turns])
    words = [tokenizer.decode([i]).replace("\n", "\\n") for i in chat.ids]
    lesson.print(" ".join(f"[{w}]" if t else w for w, t in zip(words, chat.loss_mask, strict=True)))
    trained = [word for word, t in zip(words, chat.loss_mask, strict=True) if t]
    assert "".join(trained).startswith("MiniMind.<|im_end|>") and "Who" not in trained
    lesson.conclude(
        f"Those in brackets, {len(trained)} of {len(words)}: the assistant's text and the "
        "<|im_end|> after it. Without loss on that token the model would never learn to stop."
    )

    figure, (left, right) = lesson.figure(2)
    most = max((packed[n] for n in range(len(packed))), key=len)  # with most documents
    real = collate([most], tokenizer.pad_token_id)
    left.imshow(mask_of(real.position_ids), cmap="Blues")
    left.set(title="mask of a packed sequence", xlabel="key", ylabel="query")
    left.grid(False)
    right.barh(list(rows), [len(r) for r in rows.values()], color="lightgrey", label="padding")
    filled = [len(r) * r.packing_efficiency for r in rows.values()]
    right.barh(list(rows), filled, label="real tokens")
    right.set(title="the same 300 documents", xlabel=f"sequences of {ROW} tokens")
    lesson.save(figure)

    lesson.exercise(
        "What share of the products q . k does the mask of a real sequence remove?", solution_1
    )
    lesson.exercise(
        "Split a document of 1,000 tokens into sequences. Is every token predicted once?",
        solution_2,
    )


def solution_1(lesson: Lesson) -> None:
    rows = PackedDataset(dataset_of(documents(300)), ROW)
    shares = [
        mask_of(collate([rows[n]]).position_ids).float().mean().item() for n in range(len(rows))
    ]
    needed = sum(shares) / len(shares)
    lesson.print(f"{1 - needed:.0%} of all pairs; the causal mask alone removes half")
    assert needed < 0.5


def solution_2(lesson: Lesson) -> None:
    rows = PackedDataset(dataset_of([Encoded(list(range(1000)), [True] * 1000)]), ROW)
    batches = [collate([rows[n]]) for n in range(len(rows))]
    labels = torch.cat([b.labels[b.labels != IGNORE_INDEX] for b in batches]).sort().values
    lesson.print(f"{len(rows)} sequences, {len(labels)} labels: tokens 1 to {labels[-1]}")
    assert torch.equal(labels, torch.arange(1, 1000))  # pieces overlap by one token


if __name__ == "__main__":
    teach(main, __file__, __doc__)
