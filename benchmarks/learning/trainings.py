"""Runs trainers by their command lines, for the benchmarks that compare what a model learned."""

from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console

from model.command_line import parse_arguments
from model.errors import UserError


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
