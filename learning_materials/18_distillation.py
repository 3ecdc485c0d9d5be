"""18. Distillation from a softened teacher

Question   A small model can learn from the data, or from a large model trained on them. What does
           the large model know that the data do not contain?
Concept    The data contain one next word. The teacher gives the probability of every word, also
           of those that are not in the data, so one sentence of the teacher tells as much as many
           sentences of data. A temperature raises the teacher's small probabilities, so that they
           contribute to the loss.
Equation   p = softmax(z / T);  loss = T^2 * KL(p_teacher || p_student)
                                                                   (Hinton 2015: arXiv 1503.02531)
Predict    A teacher gives 0.90, 0.09 and 0.01 to three words. What does it give at temperature 2?
"""

import torch
from lesson import Language, Lesson, small_model, teach, train
from torch import Tensor

from model.losses import divergence_sum
from model.model_minimind import MiniMindForCausalLM
from trainer.train_distillation import divergence, kl

STUDENT = dict(hidden_size=32, num_hidden_layers=1)


def soft_loss(teacher: MiniMindForCausalLM, temperature: float):
    """The distillation loss alone, without cross-entropy, as a mean over the words."""

    def loss_of(student: MiniMindForCausalLM, batch: dict[str, Tensor]) -> Tensor:
        states = [student.model(batch["input_ids"]).last_hidden_state, student.lm_head.weight]
        with torch.no_grad():
            states += [teacher.model(batch["input_ids"]).last_hidden_state, teacher.lm_head.weight]
        total = divergence_sum(*states, batch["labels"], temperature, kl)
        return temperature**2 * total / batch["labels"].numel()

    return loss_of


@torch.no_grad()
def above_best(model: MiniMindForCausalLM, language: Language) -> float:
    """Loss minus the lowest possible loss, in nats per word."""
    ids = language.batch(rows=64)["input_ids"]
    truth = language.next[ids]
    wrong = model(ids).logits.log_softmax(-1)
    return (torch.special.xlogy(truth, truth) - truth * wrong).sum(-1).mean().item()


def main(lesson: Lesson) -> None:
    lesson.predict("A teacher gives 0.90, 0.09, 0.01. What does it give at temperature 0.5, 2, 4?")
    logits = torch.tensor([0.90, 0.09, 0.01]).log()
    rows = [(T, *(logits / T).softmax(-1).tolist()) for T in (0.5, 1.0, 2.0, 4.0)]
    lesson.table("T", "p0", "p1", "p2", rows=rows)
    ratios = [p1 / p2 for _, _, p1, p2 in rows]
    assert abs(ratios[1] - 9) < 1e-3 and abs(ratios[2] - 3) < 1e-3  # 9^(1/T)
    lesson.conclude(
        f"At 2 the last word has {rows[2][3]:.3f} instead of 0.01. The order stays (the second "
        "word is 9 times as likely at 1, 3 times at 2), and both now contribute to the loss."
    )

    language = Language()
    teacher = small_model()
    train(teacher, (language.batch() for _ in range(150)))
    good = above_best(teacher, language)
    lesson.predict(
        "Two small students train on the same 60 batches of 4 sentences. One learns the data's "
        f"words, the other the distribution of a teacher ({good:.2f} nats above the best possible "
        "loss). How far above the best possible loss are they?"
    )
    few = [language.batch(rows=4) for _ in range(60)]
    alone = small_model(1, **STUDENT)
    train(alone, few)
    students = {"the data": above_best(alone, language)}
    for T in (1.0, 2.0, 4.0):
        student = small_model(1, **STUDENT)
        train(student, few, loss_of=soft_loss(teacher, T))
        students[f"the teacher, T = {T:.0f}"] = above_best(student, language)
    rows = [("(the teacher itself)", good), *students.items()]
    lesson.table("student trained on", "nats above the best", rows=rows)
    alone, taught = students["the data"], students["the teacher, T = 1"]
    assert taught < 0.8 * alone
    lesson.conclude(
        f"{alone:.2f} against {taught:.2f}, from the same sentences in the same number of steps: "
        "a word is one sample of the distribution; the teacher gives the whole distribution."
    )

    lesson.predict("How does the gradient of KL change with T = 1, 2, 4, 8? And that of T^2 * KL?")
    mine, theirs = (3 * torch.randn(64, 64, generator=language.noise) for _ in range(2))
    mine.requires_grad_()
    norms = {}
    for T in (1.0, 2.0, 4.0, 8.0):
        loss = kl((theirs / T).log_softmax(-1), (mine / T).log_softmax(-1)) / 64
        norms[T] = torch.autograd.grad(loss, mine)[0].norm().item()
    rows = [(T, norm, T**2 * norm) for T, norm in norms.items()]
    lesson.table("T", "gradient", "T^2 * gradient", rows=rows)
    assert norms[8.0] < 0.1 * norms[1.0] and max(r[2] for r in rows) < 6 * min(r[2] for r in rows)
    lesson.conclude(
        f"From T = 4 to 8 it falls {norms[4.0] / norms[8.0]:.1f}-fold, nearly as 1/T^2: one factor "
        "comes from dividing the logits, the other from flatter distributions that differ less. "
        "With T^2, the same learning rate and the same alpha suit every temperature."
    )

    lesson.predict(
        "The teacher has two peaks, the student can have only one. Where does forward KL put it, "
        "where reverse KL?"
    )
    words = torch.linspace(-1, 1, 64)
    peaks = torch.logaddexp(-60 * (words - 0.5) ** 2, -60 * (words + 0.5) ** 2 - 0.3)
    peaks = peaks.log_softmax(-1)[None]
    hills = {kind: hill(words, peaks, kind) for kind in ("forward", "jsd", "reverse")}
    valley = words.abs() < 0.2
    rows = [("(the teacher)", *shares(peaks, words, valley))]
    rows += [(kind, *shares(log_p, words, valley)) for kind, log_p in hills.items()]
    lesson.table("KL", "left of the valley", "in it", "right of it", rows=rows)
    share = {name: each for name, *each in rows}
    assert share["forward"][1] > 0.2 > 10 * share["reverse"][1]
    assert max(share["reverse"]) > 0.95 and min(share["forward"][0], share["forward"][2]) > 0.25
    lesson.conclude(
        "Forward KL is infinite if the student has probability 0 where the teacher has not. The "
        f"student covers both peaks, with {share['forward'][1]:.0%} in the valley, where the "
        "teacher has almost nothing. Reverse KL penalises exactly that: the student keeps one "
        "peak, and so does JS here. `--divergence` sets it."
    )

    figure, (left, middle, right) = lesson.figure(3)
    for T in (1.0, 2.0, 4.0):
        with torch.no_grad():
            row = teacher(torch.tensor([[5]])).logits[0, -1]
        left.plot(
            (row / T).softmax(-1).sort(descending=True).values[:16], ".-", label=f"T = {T:.0f}"
        )
    left.set(title="a teacher's distribution", xlabel="word, likeliest first", ylabel="probability")
    middle.barh(list(students), list(students.values()), height=0.5)
    middle.axvline(good, color="k", linestyle=":", label="the teacher")
    middle.invert_yaxis()
    middle.set(title="students trained on", xlabel="nats above the best loss")
    right.fill_between(words, peaks[0].exp(), alpha=0.2, label="teacher")
    for (kind, log_p), style in zip(hills.items(), ("-", "-", "--"), strict=True):
        right.plot(words, log_p[0].exp(), style, label=kind)
    right.set(title="one mode fitted to two", xlabel="words", ylabel="probability")
    lesson.save(figure)

    lesson.exercise(
        "Both students train on the same 8 sentences repeatedly. How good are they?", solution_1
    )
    lesson.exercise("What does KL make the student match at a very high temperature?", solution_2)


def hill(words: Tensor, target: Tensor, kind: str) -> Tensor:
    """Log-probabilities [1, V] of the single peak that is closest to the target."""
    place, log_width = (torch.tensor(x, requires_grad=True) for x in (0.2, -1.5))
    optimizer = torch.optim.Adam([place, log_width], lr=0.05)
    for _ in range(200):
        log_p = (-(((words - place) / log_width.exp()) ** 2)).log_softmax(-1)[None]
        loss = divergence(target, log_p, kind, mixture=0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return log_p.detach()


def shares(log_p: Tensor, words: Tensor, valley: Tensor) -> list[float]:
    """Probability left of the valley, in it, and right of it."""
    p = log_p[0].exp()
    return [p[part].sum().item() for part in (~valley & (words < 0), valley, ~valley & (words > 0))]


def solution_1(lesson: Lesson) -> None:
    language, teacher = Language(), small_model()
    train(teacher, (language.batch() for _ in range(150)))
    again = [language.batch(rows=8)] * 80
    alone, taught = small_model(1, **STUDENT), small_model(1, **STUDENT)
    train(alone, again)
    train(taught, again, loss_of=soft_loss(teacher, 2.0))
    alone, taught = above_best(alone, language), above_best(taught, language)
    lesson.print(f"nats above the best: from the words {alone:.2f}, from the teacher {taught:.2f}")
    assert taught < 0.5 * alone  # the first memorises the sentences and overfits


def solution_2(lesson: Lesson) -> None:
    noise, T = torch.Generator().manual_seed(0), 1000.0
    mine, theirs = (torch.randn(64, generator=noise) for _ in range(2))
    mine, theirs = (z - z.mean() for z in (mine, theirs))
    mine.requires_grad_()
    loss = T**2 * kl((theirs / T).log_softmax(-1), (mine / T).log_softmax(-1))
    (gradient,) = torch.autograd.grad(loss, mine)
    difference = (mine - theirs).detach() / 64
    error = ((gradient - difference).norm() / difference.norm()).item()
    lesson.print(f"the logits: the gradient is (z_student - z_teacher) / V, up to {error:.1%}")
    assert error < 0.05


if __name__ == "__main__":
    teach(main, __file__, __doc__)
