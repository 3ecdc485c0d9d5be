"""6. Attention, from the dot product to grouped queries and the KV cache

Question   How does a token collect what it needs from the tokens before it, at what cost?
Concept    A query is compared with all keys by dot products. Softmax turns these into weights, and
           the output is the weighted mean of the values. Several heads look for different things;
           groups of heads share keys and values, so that the KV cache is smaller.
Equation   softmax(Q K^T / sqrt(D)) V                                            (arXiv 1706.03762)
           query head h reads key/value head floor(h / (H / K))                  (arXiv 2305.13245)
Predict    Why divide by the root of D? What happens without it, at D = 64?
"""

import torch
from lesson import Lesson, small_model, teach
from transformers import DynamicCache

from model.attention import eager_attention, repeat_kv, sdpa_attention
from model.model_minimind import CACHE_ARGUMENT, MiniMindConfig


def main(lesson: Lesson) -> None:
    lesson.predict(
        "Keys (1,0), (0,1), (1,1), values 10, 20, 40, query (4,0). Which values does the output "
        "mix?"
    )
    query, keys = torch.tensor([4.0, 0.0]), torch.tensor([[1.0, 0], [0, 1], [1, 1]])
    values = torch.tensor([[10.0], [20], [40]])
    scores = keys @ query / 2**0.5
    weights = scores.exp() / scores.exp().sum()
    answer = (weights @ values).item()
    shaped = query[None, None, None], keys[None, None], values[None, None]
    ours = sdpa_attention(*shaped, None, 0)
    rows = zip(*(x.flatten().tolist() for x in (scores, weights, values)), strict=True)
    headers = ("q . k / sqrt(2)", "weight", "value")
    lesson.table(*headers, rows=rows)
    assert abs(answer - ours.item()) < 1e-4 and weights[0] == weights[2] > 10 * weights[1]
    lesson.conclude(
        f"By hand {answer:.3f}, by the model's function {ours.item():.3f}. The first and third "
        "key have the same product with the query and share the weight; the second is orthogonal."
    )

    lesson.predict("Random q and k of D numbers, 64 keys. How does the largest weight grow with D?")
    sharp = []
    for D in (4, 16, 64, 256, 1024):
        scores = torch.randn(200, 1, D) @ torch.randn(200, D, 64)
        largest = [s.softmax(-1).amax(-1).mean().item() for s in (scores, scores / D**0.5)]
        sharp.append((D, scores.std().item(), D**0.5, *largest))
    lesson.table("D", "std of q . k", "sqrt(D)", "largest weight", "with / sqrt(D)", rows=sharp)
    assert all(abs(std / root - 1) < 0.1 for _, std, root, *_ in sharp)
    assert sharp[-1][3] > 0.9 and max(row[4] for row in sharp) < 0.2
    lesson.conclude(
        "A sum of D random products has a std of sqrt(D). Without the division, one key takes "
        f"{sharp[-1][3]:.0%} at D = 1024 before training, and a saturated softmax has no gradient."
    )

    lesson.predict("8 query heads, 2 key/value heads. Which query heads read which?")
    query, key, value = torch.randn(1, 8, 5, 16), torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16)
    number = torch.arange(2.0).view(1, 2, 1, 1)
    shares = repeat_kv(number, query.shape[1] // number.shape[1]).flatten().int().tolist()
    by_hand = eager_attention(query, key, value, None, 0)
    fused = sdpa_attention(query, key, value, None, 0)
    difference = (by_hand - fused).abs().max().item()
    lesson.table("query head", "reads head", rows=enumerate(shares))
    assert shares == [0, 0, 0, 0, 1, 1, 1, 1] and difference < 1e-5
    lesson.conclude(
        f"Four each. The fused and the eager implementation differ by {difference:.0e}."
    )

    lesson.predict("Are the logits the same token by token with a KV cache and all at once?")
    model, ids = small_model(initializer_range=0.2).eval(), torch.randint(64, (1, 24))
    cache, parts = DynamicCache(config=model.config), []
    with torch.no_grad():
        whole = model(ids).logits
        for t in range(24):
            parts.append(model(ids[:, t : t + 1], **{CACHE_ARGUMENT: cache}, use_cache=True).logits)
    difference = (torch.cat(parts, 1) - whole).abs().max().item()
    again = sum(range(1, 25))  # without a cache each new token recomputes all tokens before it
    rows = [("with a cache", 24, difference), ("without", again, 0.0)]
    lesson.table("24 tokens", "positions computed", "largest difference of logits", rows=rows)
    assert difference < 1e-3 and cache.get_seq_length() == 24
    lesson.conclude(
        f"Yes, with {again / 24:.1f} times fewer positions. The causal mask makes this possible: "
        "keys and values of earlier tokens do not depend on later ones."
    )

    lesson.predict("How large is the KV cache of the 26M model at 32,768 tokens, in float16?")
    config, rows = MiniMindConfig(), []
    figure, (left, middle, right) = lesson.figure(3)
    lengths = torch.arange(0, 32769, 1024)
    for heads in (8, 2, 1):
        a_token = 2 * config.num_hidden_layers * heads * config.head_dim * 2  # keys and values
        rows.append((heads, a_token, a_token * 32768 / 2**20))
        middle.plot(lengths, a_token * lengths / 2**20, label=f"{heads} KV heads")
    lesson.table("KV heads", "bytes per token", "MiB for 32,768 tokens", rows=rows)
    assert rows[0][2] == 4 * rows[1][2] == 512
    lesson.conclude("512 MiB with 8 KV heads, ten times the size of the model; 128 MiB with our 2.")

    sizes, _, _, raw, divided = zip(*sharp, strict=True)
    left.semilogx(sizes, raw, "o-", base=2, label="q . k")
    left.semilogx(sizes, divided, "o-", base=2, label="q . k / sqrt(D)")
    left.set(title="random queries and keys", xlabel="D", ylabel="largest of 64 weights")
    middle.set(title="KV cache of the 26M model", xlabel="tokens", ylabel="MiB")
    # with the identity matrix as values, the output is the attention weights
    query, key, one = torch.randn(1, 1, 16, 16), torch.randn(1, 1, 16, 16), torch.eye(16)
    weights = eager_attention(query, key, one[None, None], None, 0)[0, 0]
    assert torch.allclose(weights.sum(-1), torch.ones(16)) and weights.triu(1).abs().max() == 0
    figure.colorbar(right.imshow(weights))
    right.set(title="causal attention weights", xlabel="key", ylabel="query")
    right.set(xticks=range(0, 16, 5), yticks=range(0, 16, 5))
    right.grid(False)
    lesson.save(figure)

    lesson.exercise(
        "Show that a query in the mean direction of two keys mixes both values.", solution_1
    )
    lesson.exercise(
        "How many times more multiplications does decoding 1,000 tokens take without a cache?",
        solution_2,
    )


def solution_1(lesson: Lesson) -> None:
    keys = 8 * torch.eye(4)  # four orthogonal keys, far apart
    query = (keys[0] + keys[1]) / 2
    weights = (keys @ query / 4**0.5).softmax(-1)
    lesson.print(f"weights {[round(w, 4) for w in weights.tolist()]}")
    assert torch.allclose(weights[:2], torch.tensor(0.5), atol=1e-3)


def solution_2(lesson: Lesson) -> None:
    config = MiniMindConfig()
    C, inner = config.hidden_size, config.intermediate_size
    matrices = config.num_hidden_layers * (2 * C * C + 2 * C * 128 + 3 * C * inner)

    def work(new: int, seen: int) -> int:
        """Multiplications for `new` positions with `seen` keys each: matrices, q . k, w . v."""
        return new * (matrices + 2 * config.num_hidden_layers * C * seen)

    cached = sum(work(1, t) for t in range(1, 1001))
    plain = sum(work(t, t) for t in range(1, 1001))
    lesson.print(f"{plain / cached:.0f} times")
    assert 400 < plain / cached < 1000


if __name__ == "__main__":
    teach(main, __file__, __doc__)
