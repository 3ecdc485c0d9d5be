"""5. YaRN: longer texts than those of training

Question   A model was trained on texts of 64 tokens. What happens at 256, and what helps?
Concept    Beyond the trained length the low-frequency pairs of RoPE reach angles that the model
           never saw. Position interpolation compresses all positions, which makes adjacent tokens
           hard to distinguish. YaRN slows down only the low-frequency pairs, keeps the
           high-frequency pairs, and interpolates in between.
Equation   frequency_i <- frequency_i * ((1 - r_i) + r_i / s),  r_i = 0 for pairs that rotate often
           within the trained length, 1 for those that do not rotate once; cos and sin times
           0.1 ln(s) + 1                                  (arXiv 2309.00071; before it: 2306.15595)
Predict    Which pairs of numbers must not be slowed down, and why?
"""

import math

import torch
from lesson import Lesson, small_model, teach, train
from torch import Tensor

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.rope import yarn

TRAINED, LAG = 64, 8


def rotations(config: MiniMindConfig) -> tuple[Tensor, Tensor]:
    """[D/2]: rotations of each pair within the trained length, and its frequency with YaRN divided
    by the one without."""
    pairs = torch.arange(0, config.head_dim, 2) / config.head_dim
    frequencies = config.rope_theta**-pairs
    slowed, _ = yarn(config, frequencies)
    return config.yarn_original_length * frequencies / (2 * math.pi), slowed / frequencies


def echo(rows: int, length: int, noise: torch.Generator) -> dict[str, Tensor]:
    """Nine of ten tokens repeat the token LAG positions earlier, which needs exact positions."""
    ids = torch.randint(32, (rows, length), generator=noise)
    repeats = torch.rand(rows, length, generator=noise) < 0.9
    for t in range(LAG, length):
        ids[:, t] = torch.where(repeats[:, t], ids[:, t - LAG], ids[:, t])
    labels = ids.clone()
    labels[:, :LAG] = -100
    return {"input_ids": ids, "labels": labels}


def loss_at(model: MiniMindForCausalLM, length: int, how: str) -> float:
    """Loss on texts of a length with plain RoPE, position interpolation, or YaRN."""
    factor = length / TRAINED
    model.config.inference_rope_scaling = how == "YaRN"
    model.config.yarn_factor, model.config.yarn_original_length = factor, TRAINED
    steps = torch.arange(length)[None] / (factor if how == "position interpolation" else 1)
    noise, losses = torch.Generator().manual_seed(1), []
    for _ in range(4):
        # positions start at 1, because position 0 would begin another document
        losses.append(model(**echo(8, length, noise), position_ids=steps + 1).loss.item())
    return sum(losses) / len(losses)


def main(lesson: Lesson) -> None:
    lesson.predict("MiniMind trained on 2,048 tokens, YaRN for 8,192: which pairs are slowed down?")
    config = MiniMindConfig(inference_rope_scaling=True)
    often, share = rotations(config)
    rows = [(i, often[i].item(), share[i].item()) for i in (0, 4, 5, 8, 10, 12, 13, 14, 20, 31)]
    lesson.table("pair", "rotations within 2,048 tokens", "frequency, with / without", rows=rows)
    assert (share[often > 33] == 1).all() and (share[often < 0.6] == 0.25).all()
    lesson.conclude(
        f"{(share == 1).sum()} pairs with more than 32 rotations stay as they are. "
        f"{(share == 0.25).sum()} that hardly complete one are 4 times slower, the others are in "
        "between. No pair reaches a new angle, and adjacent tokens stay as distinct as before."
    )

    lesson.predict("How does the largest of n softmax weights shrink with n? What corrects it?")
    rows = []
    for n in (64, 256, 1024, 4096):
        scores = 2 * torch.randn(400, n)
        scale = 0.1 * math.log(n / 64) + 1 if n > 64 else 1.0
        largest = [(scores * s).softmax(-1).amax(-1).mean().item() for s in (1.0, scale**2)]
        rows.append((n, largest[0], scale, largest[1]))
    lesson.table("keys", "largest weight", "0.1 ln(s) + 1", "with it, on q and on k", rows=rows)
    assert rows[-1][1] < rows[0][1] / 3 and 0.5 < rows[-1][3] / rows[0][1] < 1.5
    lesson.conclude(
        "More keys flatten attention; YaRN's factor on cos and sin keeps it about as sharp."
    )

    lesson.predict(
        f"A model learns on {TRAINED} tokens to repeat the token {LAG} positions earlier. What "
        "is the loss at 2 and 4 times the length of plain RoPE, interpolation and YaRN?"
    )
    noise = torch.Generator().manual_seed(0)
    # theta 100: 64 tokens are as short for it as 2,048 are for the usual theta
    sizes = dict(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    model = small_model(vocab_size=32, rope_theta=1e2, **sizes)
    train(model, (echo(16, TRAINED, noise) for _ in range(200)), 1e-2)
    lengths, ways = (64, 128, 256), ("plain RoPE", "position interpolation", "YaRN")
    with torch.no_grad():
        found = {how: [loss_at(model, length, how) for length in lengths] for how in ways}
    rows = [(how, *losses) for how, losses in found.items()]
    lesson.table("how", *(f"loss at {length}" for length in lengths), rows=rows)
    plain, squeezed, ours = (found[how][-1] for how in ways)
    assert ours < plain - 0.15 and ours < squeezed - 0.5
    lesson.conclude(
        f"At 256 plain RoPE has {plain:.2f}, interpolation {squeezed:.2f} (8 positions look like "
        f"2), YaRN {ours:.2f}; guessing has ln 32 = 3.47. None of them was trained further."
    )

    figure, (left, right) = lesson.figure(2)
    left.semilogx(often, share, "o-", markersize=4)
    left.axvline(32, color="grey", linestyle=":")
    left.axvline(1, color="grey", linestyle=":")
    left.set(title="YaRN for 4 times 2,048 tokens", ylim=(0, 1.05))
    left.set(xlabel="rotations within the trained length", ylabel="frequency / RoPE's")
    for how, losses in found.items():
        right.plot(lengths, losses, "o-", label=how)
    right.axhline(math.log(32), color="grey", linestyle=":", label="uniform guess")
    right.set(title=f"trained on {TRAINED} tokens", xlabel="length", ylabel="loss, nats per token")
    right.set_xticks(lengths)
    lesson.save(figure)

    lesson.exercise(
        "From which pair on does YaRN slow down? Compute it from beta_fast = 32.", solution_1
    )
    lesson.exercise("How much does YaRN with factor 4 cost on short texts?", solution_2)


def solution_1(lesson: Lesson) -> None:
    # 2048 / (2 pi theta^(2i/D)) = 32 rotations, solved for i and rounded down
    first = math.floor(64 / 2 * math.log(2048 / (32 * 2 * math.pi)) / math.log(1e6))
    _, share = rotations(MiniMindConfig(inference_rope_scaling=True))
    lesson.print(
        f"pair {first} is the last unchanged one: {[round(s, 3) for s in share[4:8].tolist()]}"
    )
    assert share[first] == 1 and share[first + 1] < 1


def solution_2(lesson: Lesson) -> None:
    noise = torch.Generator().manual_seed(0)
    sizes = dict(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    model = small_model(vocab_size=32, rope_theta=1e2, **sizes)
    train(model, (echo(16, TRAINED, noise) for _ in range(100)), 1e-2)
    text = echo(32, TRAINED, noise)
    with torch.no_grad():
        plain = model(**text).loss.item()
        model.config.inference_rope_scaling, model.config.yarn_original_length = True, TRAINED
        scaled = model(**text).loss.item()
    lesson.print(f"{plain:.3f} without, {scaled:.3f} with it: use YaRN for long texts only")
    assert scaled > plain


if __name__ == "__main__":
    teach(main, __file__, __doc__)
