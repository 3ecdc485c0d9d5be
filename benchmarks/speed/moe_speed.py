"""Cost of a mixture of experts: a training step against a dense model with the same active size.

    python benchmarks/speed/moe_speed.py [--rounds 5] [--json FILE]

The MoE model has --n_routed_experts, of which a token uses --num_experts_per_tok, and one shared
expert. "dense" is a model whose feed-forward size is that of all experts that a token uses, so that
both compute the same per token. "loop" runs the experts one after the other, "grouped" in one
grouped matrix product, which is the default.

Timed are forward, backward, clipping and the trainers' optimizer, on --batch_size rows of random
tokens, in turn in every round. The ratio is the median of the ratios of each round.
"""

import statistics
import time
from dataclasses import dataclass
from datetime import date
from typing import Any

from model.command_line import option, parse_command_line
from model.errors import UserError, exit_on_user_error


@dataclass
class Args:
    hidden_size: int = option(512, "hidden size")
    num_hidden_layers: int = option(8, "number of layers")
    n_routed_experts: int = option(4, "number of routed experts")
    num_experts_per_tok: int = option(2, "routed experts per token")
    moe_intermediate_size: int = option(
        0, "intermediate size of an expert; 0: that of a dense model"
    )
    batch_size: int = option(8, "rows per step")
    max_seq_len: int = option(512, "length of a row, in tokens")
    rounds: int = option(5, "number of timed rounds")
    device: str = option("auto", "auto, cuda, mps or cpu")
    json: str = option("", "also write the results to this file")


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_command_line(Args, __doc__)


import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm import tqdm

from model.feed_forward import moe_layers
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import count_parameters, write_json
from trainer.common.hardware import autocast, describe_machine, resolve_device, resolve_dtype
from trainer.common.optimizers import make_optimizer


def main(args: Args) -> dict[str, Any]:
    device = resolve_device(args.device)
    sizes = dict(hidden_size=args.hidden_size, num_hidden_layers=args.num_hidden_layers)
    try:
        moe = MiniMindConfig(
            **sizes,
            use_moe=True,
            n_routed_experts=args.n_routed_experts,
            num_experts_per_tok=args.num_experts_per_tok,
            moe_intermediate_size=args.moe_intermediate_size or None,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    dense = MiniMindConfig(**sizes, intermediate_size=moe.active_intermediate_size)
    steps = {
        "dense": Step(dense, args, device),
        "grouped": Step(moe, args, device),
        "loop": Step(moe, args, device, loop=True),
    }
    for step in steps.values():  # warm-up
        step.seconds()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in tqdm(range(args.rounds), desc="rounds"):
        for name, step in steps.items():
            times[name].append(step.seconds())
    report: dict[str, Any] = {
        "date": str(date.today()),
        "machine": describe_machine(device),
        "torch": torch.__version__,
        "arguments": vars(args),
        "ways": {},
    }
    table = Table(title=f"{args.batch_size} rows of {args.max_seq_len}", title_justify="left")
    for column in ("", "parameters", "ms a step", "of it optimizer", "against dense"):
        table.add_column(column, justify="right" if column else "left")
    for name, each in times.items():
        whole, optimizer = (1000 * statistics.median(x) for x in zip(*each, strict=True))
        ratios = [ours[0] / theirs[0] for ours, theirs in zip(each, times["dense"], strict=True)]
        parameters = count_parameters(steps[name].model)
        report["ways"][name] = {
            "parameters": parameters,
            "milliseconds": round(whole, 1),
            "of it optimizer": round(optimizer, 1),
            "ratio": round(statistics.median(ratios), 3),
        }
        millions = f"{parameters / 1e6:.1f}M"
        row = (name, millions, f"{whole:,.0f}", f"{optimizer:,.0f}")
        table.add_row(*row, f"{statistics.median(ratios):.2f}×")
    Console().print(table)
    print(f"{report['machine']}, torch {report['torch']}, {report['date']}")
    if args.json:
        write_json(args.json, report)
    return report


class Step:
    """Training steps of a model with random weights on random tokens."""

    def __init__(self, config: MiniMindConfig, args: Args, device: torch.device, loop=False):
        torch.manual_seed(0)
        self.model = MiniMindForCausalLM(config).to(device).train()
        self.optimizer = make_optimizer(self.model, "muon", 5e-4, 0.1)
        size = (args.batch_size, args.max_seq_len)
        self.ids = torch.randint(3, config.vocab_size, size).to(device)
        for mixture in moe_layers(self.model):
            mixture.use_grouped_mm = not loop

    def seconds(self) -> tuple[float, float]:
        """Seconds of a whole step, and of its optimizer part."""
        device = self.model.device
        start = now(device)
        with autocast(device, resolve_dtype("auto", device)):
            outputs = self.model(self.ids, labels=self.ids, return_logits=False)
        (outputs.loss + (0.0 if outputs.aux_loss is None else outputs.aux_loss)).backward()
        middle = now(device)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        end = now(device)
        return end - start, end - middle


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    with exit_on_user_error():
        main(args)
