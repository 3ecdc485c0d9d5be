"""Runs trainers by their command lines and draws their logs, for the benchmarks that compare what a
model learned."""

from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
from rich.console import Console

from model.command_line import parse_arguments
from model.errors import UserError

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402


def run_trainer(
    console: Console, trainer: ModuleType, argv: list[str], max_steps: int
) -> dict[str, Any]:
    """Print the command and run the trainer; returns what its `main` returns.

    Args:
        max_steps: upper limit of --max_steps, for a quick test; 0: no limit.
    """
    if max_steps and "--max_steps" in argv:
        at = argv.index("--max_steps") + 1
        argv = [*argv[:at], str(min(max_steps, int(argv[at]))), *argv[at + 1 :]]
    elif max_steps:
        argv = [*argv, "--max_steps", str(max_steps)]
    argv = [*argv, "--force", "1"]  # a stopped benchmark is repeated from the beginning
    script = Path(trainer.__file__).name
    console.print(f"$ python trainer/{script} {' '.join(argv)}\n", soft_wrap=True)
    result = trainer.main(parse_arguments(trainer.Args, argv=argv))
    if result["stopped"]:
        raise UserError("stopped; the report has the trainings that were finished")
    return result


Curves = dict[str, dict[int, list[dict[str, Any]]]]  # stage → seed or fold → the log


def plot_curves(curves: Curves, metrics: dict[str, str], path: Path, of: str = "seed") -> None:
    """A picture for each stage of a metric of its log, with a line for each seed."""
    figure, axes = pyplot.subplots(1, len(curves), figsize=(3.4 * len(curves), 3), squeeze=False)
    for axis, (name, seeds) in zip(axes[0], curves.items(), strict=True):
        for seed, records in seeds.items():
            points = [
                (r["step"], r[metrics[name]]) for r in records if r.get(metrics[name]) is not None
            ]
            axis.plot(*zip(*points, strict=True), linewidth=1, label=f"{of} {seed}")
        axis.set(title=name, xlabel="step", ylabel=f"{metrics[name]} in training")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
