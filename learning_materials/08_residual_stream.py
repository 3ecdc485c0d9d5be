"""8. The residual stream and initialisation

Question   Every block adds its output to one vector per token, the residual stream. How large may
           the initial weights be, so that the stream of a deep model keeps its scale?
Concept    The final state is the embedding plus the outputs of all layers. A sum of random outputs
           of equal size grows like the root of their number, so the matrices that write to the
           stream are initialised smaller by that root. Small logits at the start give every token
           the same probability, and a loss of ln V.
Equation   h_L = h_0 + sum of all 2L layer outputs                              (arXiv 1512.03385)
           std 0.02, of o_proj and down_proj 0.02 / sqrt(2L)        (GPT-2, section 2.3)
Predict    What is the loss of an untrained model with a vocabulary of 6,400 tokens?
"""

import math

import torch
from lesson import Lesson, small_model, teach
from torch import Tensor, nn

from model.model_minimind import MiniMindForCausalLM

DEPTHS = (2, 8, 32)


def unscaled(model: MiniMindForCausalLM) -> MiniMindForCausalLM:
    """The same model with the matrices that write to the stream as large as all others."""
    for module in model.modules():
        if getattr(module, "writes_to_residual", False):
            module.weight.data *= math.sqrt(2 * model.config.num_hidden_layers)
    return model


def stream(model: MiniMindForCausalLM, ids: Tensor) -> list[float]:
    """RMS of the residual stream before each block and after the last."""
    sizes: list[float] = []
    size = lambda h: sizes.append(h.pow(2).mean().sqrt().item())  # noqa: E731
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda _, args: size(args[0]))
    model.model.norm.register_forward_pre_hook(lambda _, args: size(args[0]))
    with torch.no_grad():
        model(ids)
    return sizes


def main(lesson: Lesson) -> None:
    ids = torch.randint(64, (4, 32))

    lesson.predict("What is the sum of the embedding and the outputs of all layers?")
    model, written = small_model(num_hidden_layers=8).eval(), []
    keep = lambda *call: written.append(call[-1])  # noqa: E731
    names = [("embedding", model.model.embed_tokens)]
    for n, block in enumerate(model.model.layers):
        names += [(f"attention {n}", block.self_attn), (f"feed-forward {n}", block.mlp)]
    for _, module in names:
        module.register_forward_hook(keep)
    ends: list[Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, args: ends.append(args[0]))
    with torch.no_grad():
        model(ids)
    difference = (sum(written) - ends[0]).abs().max().item()
    shown = [(n, w.pow(2).mean().sqrt().item()) for (n, _), w in zip(names, written, strict=True)]
    lesson.table("layer", "rms of its output", rows=[*shown[:3], *shown[-2:]])
    assert difference < 1e-6
    lesson.conclude(
        f"It is the input of the last norm (largest difference {difference:.0e}). The stream is a "
        "plain sum, so the gradient reaches each term without passing through the others."
    )

    lesson.predict("By what factor does the stream grow through 2, 8 and 32 blocks?")
    figure, (left, right) = lesson.figure(2)
    rows = []
    for depth, colour in zip(DEPTHS, ("C0", "C1", "C2"), strict=True):
        settings = dict(num_hidden_layers=depth, initializer_range=0.1)
        scaled = stream(small_model(**settings), ids)
        raw = stream(unscaled(small_model(**settings)), ids)
        rows.append((depth, scaled[-1] / scaled[0], raw[-1] / raw[0]))
        share = torch.linspace(0, 1, depth + 1)
        left.plot(share, [s / scaled[0] for s in scaled], color=colour, label=f"{depth} blocks")
        left.plot(share, [s / raw[0] for s in raw], color=colour, linestyle=":")
    lesson.table("blocks", "growth in MiniMind", "with all weights of the same std", rows=rows)
    (_, scaled_2, raw_2), *_, (_, scaled_32, raw_32) = rows
    assert scaled_32 / scaled_2 < 1.5 and raw_32 / raw_2 > 2.5
    lesson.conclude(
        f"From 2 to 32 blocks the growth increases {scaled_32 / scaled_2:.1f}-fold with the factor "
        f"1/sqrt(2L), and {raw_32 / raw_2:.1f}-fold without (the root of 16 is 4)."
    )

    lesson.predict("What is the first loss for initial std 0.02, 0.1, 0.3 and 1, with V = 6400?")
    rows, ids = [], torch.randint(6400, (8, 32))
    for std in (0.02, 0.1, 0.3, 1.0):
        model = small_model(vocab_size=6400, initializer_range=std)
        with torch.no_grad():
            outputs = model(ids, labels=ids)
        rows.append((std, outputs.logits.std().item(), outputs.loss.item(), math.log(6400)))
    lesson.table("std", "std of the logits", "loss", "ln 6400", rows=rows)
    assert abs(rows[0][2] - rows[0][3]) < 0.1 and rows[-1][2] > 2 * rows[-1][3]
    lesson.conclude(
        f"With 0.02 it is ln V = {math.log(6400):.2f}: every token is equally likely. With large "
        "weights the model is confidently wrong, and training first has to undo this."
    )
    stds, _, losses, _ = zip(*rows, strict=True)
    right.loglog(stds, losses, "o-", label="loss")
    right.axhline(math.log(6400), color="grey", linestyle="--", label="ln 6400")
    left.set(title="residual stream (dotted: equal std)", xlabel="depth, 1: after all blocks")
    left.set(ylabel="rms, relative to the embedding")
    right.set(
        title="loss before training", xlabel="std of the initial weights", ylabel="nats per token"
    )
    lesson.save(figure)

    lesson.exercise("Check the std of every kind of matrix in a new 8-layer model.", solution_1)
    lesson.exercise(
        "How similar is the stream after 32 blocks to the embedding (cosine), with the factor "
        "1/sqrt(2L) and without?",
        solution_2,
    )


def solution_1(lesson: Lesson) -> None:
    block = small_model(num_hidden_layers=8).model.layers[0]
    linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    lesson.table("matrix", "std", rows=[(n, m.weight.std().item()) for n, m in linears.items()])
    for module in linears.values():
        wanted = 0.02 / 4 if getattr(module, "writes_to_residual", False) else 0.02
        assert abs(module.weight.std() / wanted - 1) < 0.1  # sqrt(2 * 8) = 4


def solution_2(lesson: Lesson) -> None:
    ids, found = torch.randint(64, (4, 32)), {}
    for name, change in (("with", lambda model: model), ("without", unscaled)):
        model, ends = change(small_model(num_hidden_layers=32, initializer_range=0.1)), []
        model.model.norm.register_forward_pre_hook(lambda _, args, ends=ends: ends.append(args[0]))
        with torch.no_grad():
            model(ids)
            start = model.model.embed_tokens(ids)
        found[name] = torch.cosine_similarity(start, ends[0], dim=-1).mean().item()
    lesson.table("factor 1/sqrt(2L)", "cosine of h_0 and h_32", rows=found.items())
    assert found["with"] > 3 * found["without"]


if __name__ == "__main__":
    teach(main, __file__, __doc__)
