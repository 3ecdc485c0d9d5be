"""15. Sampling: temperature, top-k, top-p

Question   The model gives a distribution over the next token. Which token is chosen?
Concept    Greedy decoding takes the most likely token, and its texts are repetitive and loop.
           Sampling sometimes takes a token from the long tail of bad ones. Temperature sharpens or
           flattens the distribution; top-k and top-p cut off its tail.
Equation   p_i ~ exp(logit_i / T);  top-p: the fewest most likely tokens whose sum reaches p
                                                             (nucleus sampling: arXiv 1904.09751)
Predict    How do temperature 0.5 and top-p 0.8 change probabilities 0.5, 0.2, 0.15, 0.1, 0.05?
"""

import torch
from lesson import Language, Lesson, small_model, teach, train
from torch import Tensor

from model.inference.generation import generate
from model.inference.sampling import SamplingParams, filter_logits, sample

CHANCES = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])


def after(**settings) -> Tensor:
    """CHANCES after temperature, top-k or top-p."""
    return filter_logits(CHANCES.log()[None], SamplingParams(**settings)).softmax(-1)[0]


def entropy(p: Tensor) -> float:
    return -torch.special.xlogy(p, p).sum().item()


def main(lesson: Lesson) -> None:
    lesson.predict("What are the probabilities at temperature 0.25, 0.5, 1 and 2?")
    rows = []
    for T in (0.25, 0.5, 1.0, 2.0):
        p = CHANCES ** (1 / T) / (CHANCES ** (1 / T)).sum()
        assert torch.allclose(p, after(temperature=T), atol=1e-5)
        rows.append((T, *p.tolist(), entropy(p)))
    lesson.table("T", *(f"p{n}" for n in range(5)), "entropy", rows=rows)
    assert rows[0][-1] < rows[1][-1] < rows[2][-1] < rows[3][-1]
    lesson.conclude("exp(logit / T) is p^(1/T): the order stays, the ratios grow or shrink.")

    lesson.predict("Which tokens do top-k 2, top-p 0.8 and top-p 0.4 keep? How likely are they?")
    cuts = {"top-k 2": dict(top_k=2), "top-p 0.8": dict(top_p=0.8), "top-p 0.4": dict(top_p=0.4)}
    rows = [(name, *after(**cut).tolist()) for name, cut in cuts.items()]
    lesson.table("cut", *(f"p{n}" for n in range(5)), rows=rows)
    left_over = [sum(p > 0 for p in row[1:]) for row in rows]
    assert left_over == [2, 3, 1] and abs(rows[1][1] - 0.5 / 0.85) < 1e-5
    lesson.conclude(
        "0.5 + 0.2 + 0.15 is the first sum to reach 0.8; the kept tokens are renormalised. At 0.4 "
        "only the most likely token remains: top-p keeps few tokens if the model is confident, "
        "many if it is not."
    )

    lesson.predict(
        "20,000 draws of sample(), the argmax of p / E, E ~ Exp(1). How often is each token drawn?"
    )
    noise, draws = torch.Generator().manual_seed(0), 20_000
    logits = CHANCES.log().expand(draws, -1)
    taken = sample(logits, SamplingParams(), [], [], [noise] * draws)
    often = taken.bincount(minlength=5) / draws
    rows = zip(CHANCES.tolist(), often.tolist(), strict=True)
    lesson.table("p", "share of the draws", rows=rows)
    assert (often - CHANCES).abs().max() < 0.015
    lesson.conclude(
        "With probability p_i: of exponential variables with rates p_i, number i is the smallest "
        "with probability p_i. Each sequence can have its own generator, so that its sample does "
        "not depend on the rest of the batch."
    )

    language, model = Language(), small_model()
    train(model, (language.batch(8) for _ in range(100)))
    lesson.predict("A trained model at rising temperature: what share of word pairs is possible?")
    prompts = [[word] for word in range(24)]
    settings = {
        "greedy": dict(temperature=0.0),
        "T 0.5": dict(temperature=0.5),
        "T 1": dict(temperature=1.0),
        "T 1, top-p 0.9": dict(temperature=1.0, top_p=0.9),
        "T 2": dict(temperature=2.0),
        "T 2, top-p 0.9": dict(temperature=2.0, top_p=0.9),
        "T 2, top-k 4": dict(temperature=2.0, top_k=4),
    }
    rows = []
    for name, setting in settings.items():
        fixed = dict(max_new_tokens=24, seed=0, stop_ids=())
        replies = torch.tensor(generate(model, prompts, SamplingParams(**setting, **fixed)))
        text = torch.cat((torch.tensor(prompts), replies), dim=1)
        pairs = torch.stack((text[:, :-1], text[:, 1:]), dim=-1).reshape(-1, 2)
        legal = (language.next[pairs[:, 0], pairs[:, 1]] > 0).float().mean().item()
        rows.append((name, legal, len(pairs.unique(dim=0)) / len(pairs)))
    lesson.table("setting", "share of possible pairs", "share of distinct pairs", rows=rows)
    legal = {name: share for name, share, _ in rows}
    different = {name: share for name, _, share in rows}
    assert legal["greedy"] > legal["T 1"] > legal["T 2"] + 0.1
    assert different["greedy"] < different["T 1"] < different["T 2"]
    assert legal["T 1, top-p 0.9"] > legal["T 1"] and legal["T 2, top-k 4"] > legal["T 2"] + 0.1
    lesson.conclude(
        f"A higher temperature gives more variety and more errors: {legal['T 1']:.0%} possible at "
        f"1, {legal['T 2']:.0%} at 2. Top-k 4 restores {legal['T 2, top-k 4']:.0%}, with "
        f"{different['T 2, top-k 4'] / different['greedy']:.1f} times the variety of greedy."
    )

    figure, (left, right) = lesson.figure(2)
    for offset, T in zip((-0.25, 0, 0.25), (0.5, 1.0, 2.0), strict=True):
        left.bar(torch.arange(5) + offset, after(temperature=T), 0.22, label=f"T = {T}")
    left.set(title="temperature", xlabel="token", ylabel="probability")
    for name, share, variety in rows:
        right.plot(variety, share, "o", label=name)
    right.set(title="a trained model", xlabel="distinct word pairs", ylabel="possible word pairs")
    lesson.save(figure)

    lesson.exercise("After how many words does greedy decoding of this model loop?", solution_1)
    lesson.exercise("Is temperature before top-p the same as after it?", solution_2)


def solution_1(lesson: Lesson) -> None:
    language, model = Language(), small_model()
    train(model, (language.batch(8) for _ in range(40)))
    greedy = SamplingParams(max_new_tokens=200, temperature=0.0, stop_ids=())
    text = generate(model, [[0]], greedy)[0]
    last = text[-1]
    circle = next(
        n for n in range(1, 200) if text[-1 - n] == last and text[-2 * n :][:n] == text[-n:]
    )
    lesson.print(f"{len(set(text))} different words in 200; at the end a loop of {circle} words")
    assert circle < 64


def solution_2(lesson: Lesson) -> None:
    def kept(p: Tensor) -> int:
        return int((p.cumsum(0) - p < 0.8).sum())

    hot = after(temperature=2.0)
    lesson.print(
        f"of 5 tokens top-p 0.8 keeps {kept(hot)} after temperature 2, {kept(CHANCES)} before it"
    )
    assert kept(hot) > kept(CHANCES)  # here, in transformers and in vLLM: temperature first


if __name__ == "__main__":
    teach(main, __file__, __doc__)
