"""Trainings by their own command lines, for the benchmarks that compare what was learnt."""

from pathlib import Path
from typing import Any

from rich.console import Console

from model.command_line import parse_arguments
from model.errors import UserError


def run_trainer(console: Console, trainer: Any, words: list[str], max_steps: int) -> dict[str, Any]:
    """What a trainer's `main` returns; the command is printed. `max_steps` bounds its updates for a
    quick look; 0: as many as the words say."""
    if max_steps and "--max_steps" in words:
        at = words.index("--max_steps") + 1
        words = [*words[:at], str(min(max_steps, int(words[at]))), *words[at + 1 :]]
    elif max_steps:
        words = [*words, "--max_steps", str(max_steps)]
    script = Path(trainer.__file__).name
    console.print(f"$ python trainer/{script} {' '.join(words)}\n", soft_wrap=True)
    result = trainer.main(parse_arguments(trainer.Args, arguments=words))
    if result["stopped"]:
        raise UserError("stopped; what was finished is in the report")
    return result
