"""What the float16 weight file keeps of a training, and an early warning if it keeps nothing.

Near 0.05, neighbouring float16 numbers are 3e-5 apart: a training that moves a weight by less
leaves the file as it was, whatever its loss says.
"""

import math

from torch import Tensor, nn

from model.weights import to_fp16_cpu
from trainer.common.context import Context
from trainer.common.optimizers import learning_rate_factor

SMALL_CHANGE = 0.5  # a training that changes a smaller share of the float16 weights gets a warning
EARLY_STEPS = 20  # after so many it is estimated whether that will be so


def trainable_fp16(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters as a weight file holds them; of PPO's two models the policy's,
    which alone is saved."""
    parameters = getattr(model, "actor", model).named_parameters()
    return to_fp16_cpu({name: each for name, each in parameters if each.requires_grad})


def changed_fraction(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """The share of float16 values that differ."""
    changed = sum(int((after[name] != old).sum()) for name, old in before.items())
    return changed / max(1, sum(old.numel() for old in before.values()))


def fp16_report(fraction: float) -> list[str]:
    """Lines on how much of the training the float16 weights keep."""
    lines = [f"{fraction:.1%} of the values stored in float16 differ from the start's"]
    if fraction < SMALL_CHANGE:
        lines.append(
            "warning: most weights changed too little for float16, so the saved file does not "
            "have the change; "
            "raise --learning_rate, or train longer"
        )
    return lines


def warn_early(
    ctx: Context, before: dict[str, Tensor], model: nn.Module, step: int, total_steps: int
) -> None:
    """After EARLY_STEPS steps, print a warning if most float16 weights may not change by the end.

    Steps that all point the same way add up as their learning rates do, and independent ones as
    the root of the sum of their squares; trainings lie between the two.
    """
    if not ctx.is_main or step != EARLY_STEPS or step == total_steps:
        return
    rates = [
        learning_rate_factor(ctx.args.lr_schedule, n, n / total_steps, ctx.args.warmup_steps)
        for n in range(total_steps)
    ]
    now = changed_fraction(before, trainable_fp16(model))
    squares = [rate**2 for rate in rates]
    least = min(1.0, now * math.sqrt(sum(squares) / sum(squares[:step])))
    most = min(1.0, now * sum(rates) / sum(rates[:step]))
    if least < SMALL_CHANGE:
        ctx.print(
            f"warning: after {step} steps {now:.1%} of the values stored in float16 differ from "
            f"the start's, and {least:.1%} to {most:.1%} will after {total_steps:,}: the steps may "
            "be too small for the saved file to have the change; raise --learning_rate"
        )
