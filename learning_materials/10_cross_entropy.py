"""10. Cross-entropy, perplexity, bits per byte

Question   The loss is 2.1. Is that good? Can it be compared with the loss of another model?
Concept    The loss is the mean negative log-probability of the correct token, in nats. Perplexity,
           e to the loss, is the number of equally likely tokens with that loss. Tokens differ
           between tokenizers, bytes do not: losses per byte can be compared.
Equation   L = -1/N sum ln p(x_t | x_<t);  perplexity = e^L;  bits per byte = sum / (ln 2 * bytes)
           cross-entropy(p, q) = entropy(p) + KL(p || q) >= entropy(p)
                                   (Shannon 1948; bits per byte as in The Pile, arXiv 2101.00027)
Predict    What is the loss of a uniform guess among 6,400 tokens? Can a perfect model reach 0?
"""

import math
import zlib
from collections import Counter

import torch
import torch.nn.functional as F
from lesson import Language, Lesson, crops, small_model, teach, textbook, train

from model.losses import cross_entropy_sum
from scripts.train_tokenizer import train as train_bpe

# training facts and held-out facts
TEXTS = textbook()
SEEN, HELD_OUT = "\n".join(TEXTS[:-120]), "\n".join(TEXTS[-120:])


def main(lesson: Lesson) -> None:
    lesson.predict("The correct token has p = 1, 1/2, 1/10, 1/6400. What is the loss of each?")
    chances = (1.0, 0.5, 0.1, 1 / 6400)
    rows = [(p, -math.log(p) + 0.0, -math.log2(p) + 0.0, 1 / p) for p in chances]
    lesson.table("p", "nats", "bits", "perplexity", rows=rows)
    guess = F.cross_entropy(torch.zeros(1, 6400), torch.tensor([7])).item()
    assert abs(guess - math.log(6400)) < 1e-4 and abs(math.exp(guess) - 6400) < 1
    lesson.conclude(f"A uniform guess has ln 6400 = {guess:.2f} nats, the loss before training.")

    language = Language()
    lesson.predict(
        "In a language each word is followed by one of four others. The best model knows their "
        "true probabilities p. What is the loss of a sharper or flatter model (temperature 0.5, 2)?"
    )
    ids = language.batch(64, 128)["input_ids"]
    true = language.next[ids[:, :-1]].log()  # [rows, T, V]: log p(next word)
    rows = []
    for temperature in (0.5, 0.8, 1.0, 1.25, 2.0):
        q = (true / temperature).log_softmax(-1)
        loss = -q.gather(-1, ids[:, 1:, None]).mean().item()
        rows.append((temperature, loss, loss - language.entropy, math.exp(loss)))
    lesson.table("temperature", "loss", "above the entropy", "perplexity", rows=rows)
    best = min(rows, key=lambda row: row[1])
    assert best[0] == 1.0 and abs(best[2]) < 0.03
    lesson.conclude(
        f"The true distribution is the best, with {best[1]:.2f} nats: about the entropy, "
        f"{language.entropy:.2f}, because each word has {best[3]:.1f} likely successors. No model "
        "has a lower loss on new text."
    )

    lesson.predict("Two batches: 10 tokens of loss 4, 90 tokens of loss 2. What is the total loss?")
    head, labels = torch.eye(8), torch.zeros(1, 100, dtype=torch.long)
    wanted = torch.tensor([4.0] * 10 + [2.0] * 90)  # the loss of token 0
    p = (-wanted).exp()[:, None]
    hidden = torch.cat((p, (1 - p).expand(-1, 7) / 7), dim=1).log()[None]  # [1, 100, 8]: logits
    parts = [(hidden[:, :10], labels[:, :10]), (hidden[:, 10:], labels[:, 10:])]
    sums, counts = zip(*(cross_entropy_sum(h, head, y) for h, y in parts), strict=True)
    by_sums = (sum(sums) / sum(counts)).item()
    by_means = sum((s / n).item() for s, n in zip(sums, counts, strict=True)) / 2
    rows = [("sum of sums / number of tokens", by_sums), ("mean of the two means", by_means)]
    lesson.table("how", "loss", rows=rows)
    assert abs(by_sums - 2.2) < 1e-4 and abs(by_means - 3.0) < 1e-4
    lesson.conclude(
        "0.1 * 4 + 0.9 * 2 = 2.2, not 3. A trainer must divide by the tokens of the global batch "
        "(num_items_in_batch), or gradient accumulation changes the result."
    )

    lesson.predict("The same text with vocabularies of 300 and 1,200. Which model has less loss?")
    rows, curves, size = [], {}, len(HELD_OUT.encode())
    for vocabulary in (300, 1200):
        bpe = train_bpe(Counter(SEEN.replace(" ", "\0 ").split("\0")), vocabulary)
        seen, held_out = bpe.encode(SEEN).ids, bpe.encode(HELD_OUT).ids
        model = small_model(vocab_size=vocabulary)
        curves[vocabulary] = train(model, crops(seen, 100, rows=8, length=48))
        text = torch.tensor(held_out[: len(held_out) // 48 * 48]).view(-1, 48)
        with torch.no_grad():
            loss = model(text, labels=text).loss.item()
        rows.append((vocabulary, loss, math.exp(loss), loss * len(held_out) / math.log(2) / size))
    lesson.table("tokens", "nats per token", "perplexity", "bits per byte", rows=rows)
    (_, few_loss, _, few_bits), (_, many_loss, _, many_bits) = rows
    assert many_loss > 1.3 * few_loss and many_bits < 1.2 * few_bits
    lesson.conclude(
        f"Longer tokens are harder to predict ({many_loss / few_loss:.2f} times the loss), but "
        f"there are fewer of them: {many_bits / few_bits:.2f} times the bits per byte. Losses of "
        "different tokenizers cannot be compared; bits per byte can."
    )

    figure, (left, right) = lesson.figure(2)
    p = torch.linspace(0.001, 1, 500)
    left.plot(p, -p.log())
    left.set(title="cross-entropy of one token", xlabel="p of the correct token", ylabel="nats")
    for vocabulary, curve in curves.items():
        right.plot(curve, label=f"{vocabulary} tokens")
        right.axhline(math.log(vocabulary), color="grey", linestyle=":")
    right.set(title="training loss (dotted: ln V)", xlabel="step", ylabel="nats per token")
    right.set_ylim(0)
    lesson.save(figure)

    lesson.exercise(
        "What is the perplexity of a fair die, and of one that shows 6 half of the time?",
        solution_1,
    )
    lesson.exercise("How many bits per byte does zlib need for the held-out text?", solution_2)


def solution_1(lesson: Lesson) -> None:
    dice = {"fair": [1 / 6] * 6, "loaded": [0.1] * 5 + [0.5]}
    values = {name: math.exp(-sum(p * math.log(p) for p in die)) for name, die in dice.items()}
    lesson.print(f"{values}: the loaded die is like a fair die with {values['loaded']:.1f} sides")
    assert abs(values["fair"] - 6) < 1e-9 > values["loaded"] - 6


def solution_2(lesson: Lesson) -> None:
    alone = len(zlib.compress(HELD_OUT.encode(), 9))
    after = len(zlib.compress((SEEN + HELD_OUT).encode(), 9)) - len(zlib.compress(SEEN.encode(), 9))
    bits = [8 * size / len(HELD_OUT.encode()) for size in (alone, after)]
    lesson.print(f"alone {bits[0]:.2f}, after the training text {bits[1]:.2f} bits per byte")
    assert 0.5 < bits[1] <= bits[0] + 0.05 < 4


if __name__ == "__main__":
    teach(main, __file__, __doc__)
