"""19. Reading a loss curve

Question   Which mistake does a loss curve point to?
Concept    Compare the loss with three lines: ln V, a uniform guess; the loss of word frequencies
           (unigrams); and the entropy of the language, the lowest loss without a leak. This lesson
           makes each mistake on purpose, in a language with known entropy.
Equation   entropy <= loss without a leak <= frequencies only <= ln V        (lesson 10: Gibbs)
Predict    Which mistakes make the loss too high, and which make it too low?
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
    """Data bug: the labels are those of another sequence."""
    return [{**batch, "labels": batch["labels"].roll(1, 0)} for batch in fresh(language)]


def shifted_twice(language: Language) -> list[Batch]:
    """Data bug: the labels are already shifted by one, and the model shifts them again."""
    return [{**batch, "labels": batch["labels"].roll(-1, 1)} for batch in fresh(language)]


def sees_the_future(language: Language) -> list[Batch]:
    """Mask bug: every token attends to all others, including the one it must predict."""
    everything = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool)
    return [{**batch, "attention_mask": everything} for batch in fresh(language)]


def learns_padding(language: Language) -> list[Batch]:
    """Mask bug: half of each sequence is padding (token 0), and it carries loss."""
    words = (batch["input_ids"] for batch in fresh(language))
    padded = [ids.masked_fill(torch.arange(LENGTH) >= LENGTH // 2, 0) for ids in words]
    return [{"input_ids": ids, "labels": ids} for ids in padded]


def same_rows(language: Language) -> list[Batch]:
    """Too little data: the same few sentences in every step."""
    return [language.batch(ROWS, LENGTH)] * STEPS


CASES: dict[str, tuple[Callable[[Language], list[Batch]], float, str]] = {
    "healthy": (fresh, 5e-3, "falls fast, then slowly, towards the entropy"),
    "lr 20 times too high": (fresh, 0.1, "stays high, or has spikes"),
    "lr 100 times too low": (fresh, 5e-5, "a straight line that does not bend"),
    "labels of other sequences": (wrong_pairs, 5e-3, "plateau at the frequencies"),
    "labels shifted twice": (shifted_twice, 5e-3, "plateau between frequencies and entropy"),
    "sees the future": (sees_the_future, 5e-3, "below the entropy; high held-out loss"),
    "padding counts": (learns_padding, 5e-3, "half as high at once: padding is easy"),
    "the same sequences": (same_rows, 5e-3, "below the entropy; high held-out loss"),
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

    lesson.predict("Which three lines should every loss plot have, and where are they here?")
    lesson.table("line", "nats per token", rows=lines.items())
    lesson.conclude(
        "Above ln V: broken. At the frequencies: no context used. Below entropy: a leak."
    )

    lesson.predict(
        "Eight trainings, one of them healthy: " + "; ".join(list(CASES)[1:]) + ". Draw their "
        "curves. What is the training loss and the held-out loss of each after 60 steps?"
    )
    curves, ends = {}, {}
    for name, (batches, lr, _) in CASES.items():
        model = small_model()
        curves[name] = train(model, batches(language), lr)
        with torch.no_grad():
            honest = model(**held_out).loss.item()
        ends[name] = (sum(curves[name][-10:]) / 10, honest)
    rows = [(name, *ends[name], CASES[name][2]) for name in CASES]
    lesson.table("training", "last loss", "held out", "shape", rows=rows)
    last = {name: end for name, (end, _) in ends.items()}
    honest = {name: end for name, (_, end) in ends.items()}
    entropy, frequencies = lines["entropy"], lines["frequencies"]
    assert entropy < last["healthy"] < entropy + 0.6
    assert abs(honest["healthy"] - last["healthy"]) < 0.3
    for name in ("lr 20 times too high", "lr 100 times too low", "labels of other sequences"):
        assert last[name] > last["healthy"] + 0.5, name
    assert abs(last["labels of other sequences"] - frequencies) < 0.3
    for name in ("sees the future", "the same sequences"):
        assert last[name] < entropy - 0.2 and honest[name] > last["healthy"] + 0.5, name
    assert last["padding counts"] < 0.7 * last["healthy"] < 0.7 * honest["padding counts"]
    lesson.conclude(
        "Too high: the wrong learning rates, and labels that do not match the text, which end at "
        f"the loss of word frequencies ({frequencies:.2f}). Too low: attention to the future "
        f"{last['sees the future']:.2f}, the same data {last['the same sequences']:.2f}, loss on "
        f"padding {last['padding counts']:.2f}, all below the entropy {entropy:.2f}. On held-out "
        f"text these have {honest['sees the future']:.1f}, {honest['the same sequences']:.1f} and "
        f"{honest['padding counts']:.1f}: a low training loss alone proves nothing."
    )

    figure, panels = lesson.figure(2)
    for panel, chosen in zip(panels, (list(CASES)[:5], ["healthy", *list(CASES)[5:]]), strict=True):
        for name in chosen:
            panel.plot(curves[name], label=name, color="black" if name == "healthy" else None)
        for height in lines.values():
            panel.axhline(height, color="grey", linestyle=":")
        panel.set(ylim=(0, 8), xlabel="step", ylabel="training loss, nats per token")
    panels[0].set_title("loss too high (dotted: ln V, frequencies, entropy)")
    panels[1].set_title("loss too low")
    lesson.save(figure)

    lesson.exercise("What is the lowest loss that 'padding counts' can reach?", solution_1)
    lesson.exercise("Test without training whether a model attends to the future.", solution_2)


def solution_1(lesson: Lesson) -> None:
    words, padding = LENGTH // 2 - 1, LENGTH // 2  # label tokens; the first padding included
    expected = (words * Language().entropy + padding * 0.0) / (words + padding)
    lesson.print(f"{expected:.2f} nats at best, without a better model of the language")
    assert expected < 0.6 * Language().entropy


def solution_2(lesson: Lesson) -> None:
    model, ids = small_model(initializer_range=0.2).eval(), torch.arange(LENGTH)[None]
    other = ids.clone()
    other[0, -1] = 63  # the last token must not change earlier logits
    moved = {}
    for name, mask in (("causal", None), ("all", torch.ones(1, 1, LENGTH, LENGTH).bool())):
        a, b = (model(x, attention_mask=mask).logits[0, :-1] for x in (ids, other))
        moved[name] = (a - b).abs().max().item()
    lesson.print(f"earlier logits change by {moved}")
    assert moved["causal"] == 0 < moved["all"]


if __name__ == "__main__":
    teach(main, __file__, __doc__)
