"""19. Reading a loss curve

Question   A curve is the first thing that a training shows. What does it say is wrong?
Concept    Three lines tell most of it: ln V, where guessing is; the loss of knowing only how
           frequent words are; and the entropy of the language, which no honest model can beat.
           Here each disease is produced on purpose, in a language whose entropy we know.
Equation   entropy <= honest loss <= frequencies only <= ln V                (lesson 10: Gibbs)
Predict    Which mistakes make the loss too high, and which make it too good?
"""

import math
from collections.abc import Callable

import torch
from lesson import Language, Lesson, small_model, teach, train
from torch import Tensor

STEPS, ROWS, LENGTH = 60, 8, 24
Batch = dict[str, Tensor]


def fresh(language: Language) -> list[Batch]:
    return [language.batch(ROWS, LENGTH) for _ in range(STEPS)]


def wrong_pairs(language: Language) -> list[Batch]:
    """Data bug: the labels are those of another row."""
    return [{**batch, "labels": batch["labels"].roll(1, 0)} for batch in fresh(language)]


def shifted_twice(language: Language) -> list[Batch]:
    """Data bug: labels were shifted by one already, and the model shifts them again."""
    return [{**batch, "labels": batch["labels"].roll(-1, 1)} for batch in fresh(language)]


def sees_the_future(language: Language) -> list[Batch]:
    """Mask bug: every token sees every other, the one that it must predict too."""
    everything = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool)
    return [{**batch, "attention_mask": everything} for batch in fresh(language)]


def learns_padding(language: Language) -> list[Batch]:
    """Mask bug: half of each row is padding (token 0), and counts."""
    words = (batch["input_ids"] for batch in fresh(language))
    padded = [ids.masked_fill(torch.arange(LENGTH) >= LENGTH // 2, 0) for ids in words]
    return [{"input_ids": ids, "labels": ids} for ids in padded]


def same_rows(language: Language) -> list[Batch]:
    """Too little data: the same few sentences, again and again."""
    return [language.batch(ROWS, LENGTH)] * STEPS


CASES: dict[str, tuple[Callable[[Language], list[Batch]], float, str]] = {
    "healthy": (fresh, 5e-3, "falls fast, then slowly, towards the entropy"),
    "lr 20 times too high": (fresh, 0.1, "stays up, or jumps"),
    "lr 100 times too low": (fresh, 5e-5, "a slope that has not bent yet"),
    "labels of other rows": (wrong_pairs, 5e-3, "stops at the frequencies"),
    "labels shifted twice": (shifted_twice, 5e-3, "stops between frequencies and entropy"),
    "sees the future": (sees_the_future, 5e-3, "below the entropy: impossible; held out it is bad"),
    "padding counts": (learns_padding, 5e-3, "half as high at once: half of it is easy"),
    "the same rows": (same_rows, 5e-3, "below the entropy; held-out loss is high"),
}


def main(lesson: Lesson) -> None:
    language = Language()
    often = torch.linalg.matrix_power(language.next, 64).mean(0)
    lines = {
        "ln V": math.log(64),
        "frequencies": -(often * often.clamp(min=1e-9).log()).sum().item(),
        "entropy": language.entropy,
    }
    held_out = language.batch(64, LENGTH)

    lesson.predict("Which three lines should be in every plot of a loss, and where are they here?")
    lesson.table("line", "nats per token", rows=lines.items())
    lesson.conclude("Above the first: broken. At the second: no context. Below the last: a leak.")

    lesson.predict(
        "Eight trainings, one of them healthy: " + "; ".join(list(CASES)[1:]) + ". Draw their "
        "curves. Where is each after 60 updates, in training and on held-out text?"
    )
    curves, ends = {}, {}
    for name, (batches, lr, _) in CASES.items():
        model = small_model()
        curves[name] = train(model, batches(language), lr)
        with torch.no_grad():
            honest = model(**held_out).loss.item()
        ends[name] = (sum(curves[name][-10:]) / 10, honest)
    rows = [(name, *ends[name], CASES[name][2]) for name in CASES]
    lesson.table("training", "last loss", "held out", "what to see", rows=rows)
    last = {name: end for name, (end, _) in ends.items()}
    honest = {name: end for name, (_, end) in ends.items()}
    entropy, frequencies = lines["entropy"], lines["frequencies"]
    assert entropy < last["healthy"] < entropy + 0.6
    assert abs(honest["healthy"] - last["healthy"]) < 0.3
    for name in ("lr 20 times too high", "lr 100 times too low", "labels of other rows"):
        assert last[name] > last["healthy"] + 0.5, name
    assert abs(last["labels of other rows"] - frequencies) < 0.3
    for name in ("sees the future", "the same rows"):
        assert last[name] < entropy - 0.2 and honest[name] > last["healthy"] + 0.5, name
    assert last["padding counts"] < 0.7 * last["healthy"] < 0.7 * honest["padding counts"]
    lesson.conclude(
        "Too high: the rates, and labels that do not belong to the text, which end at what "
        f"words' frequencies give ({frequencies:.2f}). Too good to be true: the future "
        f"{last['sees the future']:.2f}, the same rows {last['the same rows']:.2f}, padding "
        f"{last['padding counts']:.2f}, all below the entropy {entropy:.2f}. On honest held-out "
        f"text these have {honest['sees the future']:.1f}, {honest['the same rows']:.1f} and "
        f"{honest['padding counts']:.1f}: a low training loss alone proves nothing."
    )

    figure, panels = lesson.figure(2)
    for panel, chosen in zip(panels, (list(CASES)[:5], ["healthy", *list(CASES)[5:]]), strict=True):
        for name in chosen:
            panel.plot(curves[name], label=name, color="black" if name == "healthy" else None)
        for height in lines.values():
            panel.axhline(height, color="grey", linestyle=":")
        panel.set(ylim=(0, 8), xlabel="update", ylabel="training loss, nats per token")
    panels[0].set_title("too high (dotted: ln V, frequencies, entropy)")
    panels[1].set_title("too good to be true")
    lesson.save(figure)

    lesson.exercise("What is the lowest loss that 'padding counts' can show?", solution_1)
    lesson.exercise("Find out without training whether a model sees the future.", solution_2)


def solution_1(lesson: Lesson) -> None:
    words, padding = LENGTH // 2 - 1, LENGTH // 2  # predicted ones; the first padding is a surprise
    expected = (words * Language().entropy + padding * 0.0) / (words + padding)
    lesson.print(f"{expected:.2f} nats at best, and nothing was learnt better for it")
    assert expected < 0.6 * Language().entropy


def solution_2(lesson: Lesson) -> None:
    model, ids = small_model(initializer_range=0.2).eval(), torch.arange(LENGTH)[None]
    other = ids.clone()
    other[0, -1] = 63  # a change of the last token may change no logits but the last
    moved = {}
    for name, mask in (("causal", None), ("all", torch.ones(1, 1, LENGTH, LENGTH).bool())):
        a, b = (model(x, attention_mask=mask).logits[0, :-1] for x in (ids, other))
        moved[name] = (a - b).abs().max().item()
    lesson.print(f"earlier logits move by {moved}")
    assert moved["causal"] == 0 < moved["all"]


if __name__ == "__main__":
    teach(main, __file__, __doc__)
