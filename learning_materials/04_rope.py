"""4. RoPE: rotation, relative position, several frequencies

Question   Attention treats tokens as a set. How does it learn their order?
Concept    Rotate each query and key by an angle that grows with its position. The inner product of
           two rotated vectors depends only on the difference of their angles, that is on the
           distance of the tokens. Each pair of numbers rotates at another speed, like the hands of
           a clock, so that both short and long distances can be told apart.
Equation   (R_m q) . (R_n k) = q . (R_(n-m) k),  pair i rotates by theta^(-2i/D) per position
                                                                                 (arXiv 2104.09864)
Predict    Does a rotation change a vector's length? How does q . k change if both move by 1000?
"""

import math

import torch
from lesson import Lesson, small_model, teach
from torch import Tensor

from model.model_minimind import MiniMindConfig
from model.rope import apply_rotary_emb, rope_cos_sin

CONFIG = MiniMindConfig()  # the 26M model: heads of 64, theta 1e6


def rotated(vector: Tensor, position: int, config: MiniMindConfig = CONFIG) -> Tensor:
    """[D] rotated for a position, as in the model."""
    rotation = rope_cos_sin(config, torch.tensor([[position]]))
    return apply_rotary_emb(vector[None, None, None], *rotation)[0, 0, 0]


def score(query: Tensor, at: int, key: Tensor, there: int, config=CONFIG) -> float:
    return (rotated(query, at, config) @ rotated(key, there, config)).item()


def main(lesson: Lesson) -> None:
    D = CONFIG.head_dim
    query, key = torch.randn(D), torch.randn(D)

    lesson.predict("A query at positions 0, 5 and 500. What changes, what stays the same?")
    rows = []
    for position in (0, 5, 500):
        now = rotated(query, position)
        pair = torch.complex(query[0], query[D // 2]) * torch.exp(torch.tensor(1j * position))
        rows.append((position, now[0].item(), pair.real.item(), now.norm().item()))
    lesson.table("position", "x_0", "the same by complex numbers", "length", rows=rows)
    assert all(abs(x - z) < 1e-3 and abs(n - rows[0][3]) < 1e-3 for _, x, z, n in rows)
    lesson.conclude(
        "The direction changes, the length does not. x_0 and x_32 are one complex number, which "
        "is multiplied by e^(i * position): pair 0 rotates by 1 radian per position."
    )

    lesson.predict("q . k at the positions (10, 3), (110, 103), (3, 10): which are the same?")
    places = [(10, 3), (110, 103), (20010, 20003), (3, 10)]
    rows = [(m, n, m - n, score(query, m, key, n)) for m, n in places]
    lesson.table("query at", "key at", "distance", "q . k", rows=rows)
    near, moved, far, swapped = (row[3] for row in rows)
    assert abs(near - moved) < 1e-2 and abs(near - far) < 0.1 and abs(near - swapped) > 0.5
    lesson.conclude(
        f"Equal distances give equal products, up to rounding ({abs(near - far):.0e} at position "
        "20,000 in float32; rope.py avoids half precision, whose rounding is too coarse). The "
        "product for a key before the query differs from that for a key after it."
    )

    lesson.predict("How many positions does each pair need for a full rotation?")
    periods = [2 * math.pi * CONFIG.rope_theta ** (2 * i / D) for i in range(D // 2)]
    chosen = (0, 4, 8, 16, 24, 31)
    rows = [(i, periods[i], 512 / periods[i]) for i in chosen]
    lesson.table("pair", "positions per rotation", "rotations within 512 tokens", rows=rows)
    slow = sum(period > 512 for period in periods)
    assert abs(periods[0] - 2 * math.pi) < 1e-6 and slow > len(periods) / 2
    lesson.conclude(
        f"From 6 positions to {periods[-1] / 1e6:.1f} million. The first pairs tell adjacent "
        f"tokens apart. {slow} of {len(periods)} pairs do not complete a rotation within 512 "
        "tokens, so they carry content rather than position."
    )

    lesson.predict("q = k = (1, 1, ...): how does the score change with the distance?")
    ones, distances = torch.ones(D), torch.arange(0, 2049)
    figure, (left, right) = lesson.figure(2)
    decay = {}
    for theta in (1e4, 1e6):
        cos, sin = rope_cos_sin(MiniMindConfig(rope_theta=theta), distances[None])
        scores = (apply_rotary_emb(ones.expand(1, 1, len(distances), D), cos, sin)[0, 0] @ ones) / D
        decay[theta] = scores
        right.plot(distances, scores, linewidth=0.8, label=f"theta {theta:.0e}")
    rows = [(n, decay[1e4][n].item(), decay[1e6][n].item()) for n in (0, 1, 16, 128, 1024)]
    lesson.table("distance", "theta 1e4", "theta 1e6", rows=rows)
    window = slice(900, 1100)
    assert decay[1e4][0] == 1 and decay[1e4][window].mean() < decay[1e6][window].mean() < 0.6
    lesson.conclude(
        "Equal vectors score highest at short distances, and the score falls more slowly with a "
        f"larger theta: around distance 1,000 its mean is {decay[1e4][window].mean():.2f} for 1e4, "
        f"{decay[1e6][window].mean():.2f} for 1e6."
    )
    cos, _ = rope_cos_sin(CONFIG, torch.arange(128)[None])
    image = left.imshow(cos[0, 0, :, : D // 2].T, aspect="auto", cmap="RdBu", vmin=-1, vmax=1)
    left.set(title="cos of each pair's angle", xlabel="position", ylabel="pair")
    left.grid(False)
    figure.colorbar(image)
    right.set(title="score of two equal vectors", xlabel="distance", ylabel="q . k / D")
    lesson.save(figure)

    lesson.predict("A layer without rotation: does the last token depend on the others' order?")
    model = small_model(num_hidden_layers=1, initializer_range=0.2)
    attention = model.model.layers[0].self_attn
    tokens = torch.randn(1, 8, 64)
    shuffled = tokens[:, [3, 0, 6, 1, 5, 2, 4, 7]]
    steps = torch.arange(8)[None]
    no_rotation = torch.ones(1, 1, 8, 16), torch.zeros(1, 1, 8, 16)
    moved = {}
    for name, rotation in (("none", no_rotation), ("RoPE", rope_cos_sin(model.config, steps))):
        outs = [attention(x, rotation, None, None, 8)[0, -1] for x in (tokens, shuffled)]
        moved[name] = (outs[0] - outs[1]).abs().max().item()
    lesson.table("rotation", "a shuffle changes the output by", rows=moved.items())
    assert moved["none"] < 1e-4 and moved["RoPE"] > 1e-2
    lesson.conclude("Without positions attention sums over a set; RoPE encodes the order.")

    lesson.exercise(
        "Shift a whole text by 1,000 positions. Do the model's logits change?", solution_1
    )
    lesson.exercise(
        "Which theta lets the slowest pair of a head of 64 rotate once within 2,048 tokens?",
        solution_2,
    )


def solution_1(lesson: Lesson) -> None:
    model, ids = small_model(initializer_range=0.2).eval(), torch.randint(64, (1, 20))
    steps = torch.arange(20)[None]
    near, far = (model(ids, position_ids=steps + shift).logits for shift in (1, 1001))
    difference = (near - far).abs().max().item()
    lesson.print(f"logits up to {near.abs().max():.1f} differ by {difference:.0e} at most")
    assert difference < 1e-2


def solution_2(lesson: Lesson) -> None:
    theta = (2048 / (2 * math.pi)) ** (64 / 62)  # 2 pi theta^(62/64) = 2048
    lesson.print(f"theta = {theta:.0f}; with the usual 10,000 or 1e6 that pair is slower still")
    assert abs(2 * math.pi * theta ** (62 / 64) - 2048) < 1e-6


if __name__ == "__main__":
    teach(main, __file__, __doc__)
