"""9. One forward pass by hand

Question   What exactly happens between token ids and the loss?
Concept    Embedding; in each block norm, queries, keys, values, rotation, attention, residual
           addition, norm, SwiGLU, residual addition; then the last norm, the head, softmax. This
           lesson computes it with matrix products and elementwise operations only, and compares
           each number with the model's own.
Equation   h <- h + W_o softmax(Q K^T / sqrt(D)) V;  h <- h + W_d (SiLU(W_g x) * W_u x)
           loss = mean over t of -log softmax(E h_t)[x_(t+1)]       (Llama, arXiv 2302.13971)
Predict    The input has 13 tokens. How many predictions enter the loss?
"""

import math

import torch
from lesson import Lesson, small_model, teach
from torch import Tensor

from model.model_minimind import MiniMindForCausalLM
from model.weights import load_tokenizer

TEXT = "A token attends to the tokens before it."


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def turn(x: Tensor, theta: float) -> Tensor:
    """RoPE with complex numbers, [heads, T, D]: real part i, imaginary part i + D/2."""
    half = x.shape[-1] // 2
    speed = theta ** (-torch.arange(half) / half)
    angle = torch.arange(x.shape[1])[:, None] * speed
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), dim=-1)


def forward(model: MiniMindForCausalLM, ids: Tensor) -> dict[str, Tensor]:
    """ids [T] -> all intermediate results, by name."""
    c, weights, seen = model.config, model.state_dict(), {}
    T, D, groups = len(ids), c.head_dim, c.num_attention_heads // c.num_key_value_heads
    h = seen["embedding"] = weights["model.embed_tokens.weight"][ids]  # [T, C]: rows of a table
    for n in range(c.num_hidden_layers):
        w = {k.removeprefix(f"model.layers.{n}."): v for k, v in weights.items()}
        x = norm(h, w["input_layernorm.weight"], c.rms_norm_eps)
        q, k, v = (
            (x @ w[f"self_attn.{name}_proj.weight"].T).view(T, -1, D).transpose(0, 1)
            for name in "qkv"
        )  # [heads, T, D]
        q, k = turn(q, c.rope_theta), turn(k, c.rope_theta)
        heads = []
        for head in range(c.num_attention_heads):
            scores = q[head] @ k[head // groups].T / math.sqrt(D)  # [T, T]
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
            share = scores.exp() / scores.exp().sum(-1, keepdim=True)
            seen[f"weights {n}.{head}"] = share
            heads.append(share @ v[head // groups])
        out = torch.cat(heads, dim=-1) @ w["self_attn.o_proj.weight"].T
        seen[f"attention {n}"] = out
        h = h + out
        x = norm(h, w["post_attention_layernorm.weight"], c.rms_norm_eps)
        gate, up = x @ w["mlp.gate_proj.weight"].T, x @ w["mlp.up_proj.weight"].T
        out = gate / (1 + (-gate).exp()) * up @ w["mlp.down_proj.weight"].T
        seen[f"feed-forward {n}"] = out
        h = h + out
    h = seen["last norm"] = norm(h, weights["model.norm.weight"], c.rms_norm_eps)
    seen["logits"] = h @ weights["model.embed_tokens.weight"].T  # the head is the embedding
    return seen


def main(lesson: Lesson) -> None:
    tokenizer = load_tokenizer()
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])
    settings = dict(vocab_size=len(tokenizer), initializer_range=0.1)
    model = small_model(**settings).eval()

    theirs: dict[str, Tensor] = {}

    def watch(name, module):
        module.register_forward_hook(lambda _, args, out: theirs.update({name: out[0]}))

    watch("embedding", model.model.embed_tokens)
    for n, block in enumerate(model.model.layers):
        watch(f"attention {n}", block.self_attn)
        watch(f"feed-forward {n}", block.mlp)
    watch("last norm", model.model.norm)
    watch("logits", model.lm_head)
    with torch.no_grad():
        outputs = model(ids[None], labels=ids[None])
        ours = forward(model, ids)

    lesson.predict(f"{len(ids)} tokens: which shapes do the intermediate results have?")
    rows = []
    for name, value in theirs.items():
        difference = (ours[name] - value).abs().max().item()
        first = f"{ours[name][-1, 0]:+.5f} {ours[name][-1, 1]:+.5f}"
        rows.append((name, str(list(value.shape)), first, f"{difference:.0e}"))
        assert difference < 1e-4 * max(1, value.abs().max().item()), name
    lesson.table("result", "shape", "last token, by hand", "difference", rows=rows)
    lesson.conclude(f"All {len(rows)} agree with the model's own numbers.")

    lesson.predict("For the loss, which rows of the logits are compared with which tokens?")
    logits, targets = ours["logits"][:-1], ids[1:]
    each = logits.exp().sum(-1).log() - logits[torch.arange(len(targets)), targets]
    words = [tokenizer.decode([i]).strip() for i in ids]
    rows = zip(words[:-1], words[1:], each.tolist(), strict=True)
    lesson.table("last token of the input", "token to predict", "-log p", rows=rows)
    loss = each.mean().item()
    assert abs(loss - outputs.loss.item()) < 1e-4
    lesson.conclude(f"Their mean is {loss:.5f}; the model's loss is {outputs.loss.item():.5f}.")

    figure, axes = lesson.figure(model.config.num_attention_heads, figsize=(11, 3.2))
    for head, panel in enumerate(axes):
        panel.imshow(ours[f"weights 0.{head}"], vmin=0, vmax=0.6)
        panel.set_xticks(range(len(words)), words, rotation=90, fontsize=7)
        panel.set_yticks(range(len(words)), words if head == 0 else [""] * len(words), fontsize=7)
        panel.set_xlabel(f"head {head}")
        panel.grid(False)
    figure.suptitle("first block, untrained: attention of each token (row) to those before it")
    lesson.save(figure)

    lesson.exercise("Change the last token. Which rows of the logits change?", solution_1)
    lesson.exercise("Which parts have how many of MiniMind-small's 25.83M parameters?", solution_2)


def solution_1(lesson: Lesson) -> None:
    model = small_model(initializer_range=0.1)
    ids = torch.arange(8)
    changed = torch.cat((ids[:-1], torch.tensor([50])))
    moved = (forward(model, ids)["logits"] - forward(model, changed)["logits"]).abs().amax(-1)
    lesson.print(f"changes: {[f'{m:.0e}' for m in moved.tolist()]}; only its own row changes")
    assert (moved[:-1] == 0).all() and moved[-1] > 0


def solution_2(lesson: Lesson) -> None:
    V, C, L, inner, kv = 6400, 512, 8, 1408, 128
    parts = V * C, L * (2 * C * C + 2 * C * kv), L * 3 * C * inner, (2 * L + 1) * C
    shares = [f"{part / sum(parts):.1%}" for part in parts]
    lesson.print(f"{sum(parts):,}: embedding, attention, feed-forward, norms = {', '.join(shares)}")
    assert round(sum(parts) / 1e6, 2) == 25.83


if __name__ == "__main__":
    teach(main, __file__, __doc__)
