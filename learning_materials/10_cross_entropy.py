"""10. Cross-entropy, perplexity, bits per byte

Question   The loss says 2.1. Is that good? And may it be compared with somebody else's 2.1?
Concept    The loss is how surprised the model is by the token that really came, in nats. e to the
           loss is among how many equally likely tokens it seems to choose. Tokens differ between
           tokenizers, bytes do not: divided by the bytes, losses can be compared.
Equation   L = -1/N sum ln p(x_t | x_<t);  perplexity = e^L;  bits per byte = sum / (ln 2 * bytes)
           cross-entropy(p, q) = entropy(p) + KL(p || q) >= entropy(p)
                                   (Shannon 1948; bits per byte as in The Pile, arXiv 2101.00027)
Predict    What is the loss of guessing among 6,400 tokens? Can a perfect model reach 0?
"""

import math
import zlib
from collections import Counter

import torch
import torch.nn.functional as F
from lesson import Language, Lesson, crops, small_model, teach, textbook, train

from model.losses import cross_entropy_sum
from scripts.train_tokenizer import train as train_bpe

# facts to learn from, and others that are held out
TEXTS = textbook()
SEEN, HELD_OUT = "\n".join(TEXTS[:-120]), "\n".join(TEXTS[-120:])


def main(lesson: Lesson) -> None:
    lesson.predict("The model gave the token that came p = 1, 1/2, 1/10, 1/6400. The loss of each?")
    chances = (1.0, 0.5, 0.1, 1 / 6400)
    rows = [(p, -math.log(p) + 0.0, -math.log2(p) + 0.0, 1 / p) for p in chances]
    lesson.table("p", "nats", "bits", "perplexity", rows=rows)
    guess = F.cross_entropy(torch.zeros(1, 6400), torch.tensor([7])).item()
    assert abs(guess - math.log(6400)) < 1e-4 and abs(math.exp(guess) - 6400) < 1
    lesson.conclude(f"Guessing costs ln 6400 = {guess:.2f} nats, what every training begins with.")

    language = Language()
    lesson.predict(
        "A language in which each word is followed by one of four. Its best model knows the true "
        "chances p. What if it is more sure than that, or less (temperature 0.5, 2)?"
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
        f"The truth is the best, and even it pays {best[1]:.2f} nats: the entropy, "
        f"{language.entropy:.2f}, for a word has {best[3]:.1f} likely followers. No model can pay "
        "less on new text."
    )

    lesson.predict("Two batches: 10 tokens of loss 4, 90 tokens of loss 2. The loss of all?")
    head, labels = torch.eye(8), torch.zeros(1, 100, dtype=torch.long)
    wanted = torch.tensor([4.0] * 10 + [2.0] * 90)  # what token 0 shall cost
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
        "0.1 * 4 + 0.9 * 2 = 2.2, not 3. A trainer must divide by the tokens of the whole update "
        "(num_items_in_batch), or accumulation changes what is learnt."
    )

    lesson.predict("The same text in 300 and in 1,200 kinds of tokens. Which model has less loss?")
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
        f"Longer tokens are harder to guess ({many_loss / few_loss:.2f} times the loss), but "
        f"there are fewer of them: in bits per byte it is {many_bits / few_bits:.2f} times. "
        "Losses of other tokenizers say nothing; bits per byte do."
    )

    figure, (left, right) = lesson.figure(2)
    p = torch.linspace(0.001, 1, 500)
    left.plot(p, -p.log())
    left.set(title="the price of a token", xlabel="p of the token that came", ylabel="nats")
    for vocabulary, curve in curves.items():
        right.plot(curve, label=f"{vocabulary} tokens")
        right.axhline(math.log(vocabulary), color="grey", linestyle=":")
    right.set(title="training loss (dotted: ln V)", xlabel="update", ylabel="nats per token")
    right.set_ylim(0)
    lesson.save(figure)

    lesson.exercise(
        "What perplexity has a fair die, and one that shows 6 in half of all throws?", solution_1
    )
    lesson.exercise("How many bits per byte does zlib need for the held-out text?", solution_2)


def solution_1(lesson: Lesson) -> None:
    dice = {"fair": [1 / 6] * 6, "loaded": [0.1] * 5 + [0.5]}
    values = {name: math.exp(-sum(p * math.log(p) for p in die)) for name, die in dice.items()}
    lesson.print(f"{values}: the loaded one is like a fair one of {values['loaded']:.1f} sides")
    assert abs(values["fair"] - 6) < 1e-9 > values["loaded"] - 6


def solution_2(lesson: Lesson) -> None:
    alone = len(zlib.compress(HELD_OUT.encode(), 9))
    after = len(zlib.compress((SEEN + HELD_OUT).encode(), 9)) - len(zlib.compress(SEEN.encode(), 9))
    bits = [8 * size / len(HELD_OUT.encode()) for size in (alone, after)]
    lesson.print(f"alone {bits[0]:.2f}, after the training text {bits[1]:.2f} bits per byte")
    assert 0.5 < bits[1] <= bits[0] + 0.05 < 4


if __name__ == "__main__":
    teach(main, __file__, __doc__)
