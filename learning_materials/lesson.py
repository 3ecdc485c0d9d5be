"""What the lessons share: flags, questions, tables, the picture, exercises, and a toy language and
model that train within seconds."""

import inspect
import io
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot as plt
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dataset.demo.files import load_tables
from model.command_line import option, parse_arguments
from model.errors import exit_on_user_error
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import atomic_write
from trainer.common.optimizers import learning_rate_factor, make_optimizer, set_learning_rates

matplotlib.use("Agg")  # no window: the picture goes to a file
FIGURES = Path(__file__).with_name("figures")
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10.5,
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


@dataclass
class Args:
    ask: bool = option(False, "wait for Enter after each question, so that you can predict first")
    solutions: bool = option(False, "show and run the solutions of the exercises")
    out: str = option(str(FIGURES), "folder for the picture")


class Lesson:
    """One run of a lesson: its output, questions and picture."""

    def __init__(self, args: Args, name: str):
        self.args, self.name = args, name
        # a fixed width, so that the output is the same on every terminal
        self.console = Console(width=100, highlight=False, markup=False, emoji=False)
        self.questions = self.tasks = 0

    def print(self, text: str = "") -> None:
        self.console.print(text)

    def predict(self, question: str) -> None:
        """Ask for a prediction before the result is shown."""
        self.questions += 1
        self.print(f"\n{self.questions}. Predict: {question}")
        if self.args.ask and sys.stdin.isatty():
            input("   (Enter shows the answer) ")

    def table(self, *headers: str, rows: Iterable[Sequence[Any]]) -> None:
        """Numeric columns are right-aligned; floats have four significant digits."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        rows = [list(row) for row in rows]
        for column, header in enumerate(headers):
            numeric = all(isinstance(row[column], int | float) for row in rows)
            table.add_column(header, justify="right" if numeric else "left")
        for row in rows:
            table.add_row(*(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row))
        self.console.print(table)

    def conclude(self, text: str) -> None:
        self.print(f"=> {text}")

    def figure(self, columns: int = 1, **settings: Any) -> tuple[Any, Any]:
        """A figure and its axes in the style of all lessons."""
        plt.rcParams.update(STYLE)
        size = settings.pop("figsize", (4 * columns + 0.6, 3.5))
        return plt.subplots(1, columns, figsize=size, layout="constrained", **settings)

    def save(self, figure: Any) -> None:
        """Write the picture, with a legend on each axes object that has labels."""
        for axes in figure.axes:
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=7)
        path, drawn = Path(self.args.out) / f"{self.name}.png", io.BytesIO()
        figure.savefig(drawn, format="png", dpi=110)
        plt.close(figure)
        few_colours = Image.open(drawn).convert("RGB").quantize(128)  # a third of the size
        with atomic_write(path) as file:
            few_colours.save(file, "PNG", optimize=True)
        self.print(f"\nLook at {path}")

    def exercise(self, task: str, solution: Callable[["Lesson"], None]) -> None:
        """A task; with --solutions also the code of its solution and its output."""
        self.tasks += 1
        self.print(f"\nExercise {self.tasks}: {task}")
        if self.args.solutions:
            self.print("\n" + inspect.getsource(solution).rstrip())
            solution(self)
        elif self.tasks == 2:
            self.print("\n(--solutions shows and runs the solutions)")


def teach(main: Callable[[Lesson], None], file: str, about: str) -> None:
    """Run a lesson from the command line."""
    with exit_on_user_error():
        args = parse_arguments(Args, about)
        torch.manual_seed(0)
        torch.set_num_threads(1)  # reproducible, and faster for small models
        lesson = Lesson(args, Path(file).stem)
        lesson.print(about.strip())
        main(lesson)


# -- a toy model and a toy language ----------------------------------------------------------------


def small_model(seed: int = 0, **fields: Any) -> MiniMindForCausalLM:
    """The project's model with 2 layers of width 64; `fields` override those of the config."""
    small = dict(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(seed)
    return MiniMindForCausalLM(MiniMindConfig(**{**small, **fields}))


def train(
    model: MiniMindForCausalLM,
    batches: Iterable[dict[str, Tensor]],
    learning_rate: float = 5e-3,
    optimizer: str = "muon",
    loss_of: Callable[[MiniMindForCausalLM, dict[str, Tensor]], Tensor] | None = None,
) -> list[float]:
    """One optimizer step per batch (the model's arguments, with labels), with a warmup of ten steps
    and linear decay to 0. Returns the loss (default: the model's own) before each step."""
    optimizers = make_optimizer(model.train(), optimizer, learning_rate, weight_decay=0.0)
    batches, losses = list(batches), []
    for step, batch in enumerate(batches):
        factor = learning_rate_factor("linear", step, step / len(batches), warmup_steps=10)
        set_learning_rates(optimizers, factor)
        loss = loss_of(model, batch) if loss_of else model(**batch, return_logits=False).loss
        loss.backward()
        optimizers.step()
        optimizers.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


class Language:
    """A random bigram language: each word is followed by one of `choices` words with unequal
    probabilities. Unlike for real text, the loss of the best possible model is known."""

    def __init__(self, words: int = 64, choices: int = 4, seed: int = 0):
        self.noise = torch.Generator().manual_seed(seed)
        chances = torch.rand(words, choices, generator=self.noise) + 0.1
        followers = torch.rand(words, words, generator=self.noise).argsort(-1)[:, :choices]
        self.next = torch.zeros(words, words).scatter(1, followers, chances)
        self.next /= self.next.sum(-1, keepdim=True)  # [V, V]: p(word | word before)
        entropies = -torch.special.xlogy(self.next, self.next).sum(-1)
        often = torch.linalg.matrix_power(self.next, 64).mean(0)  # how often each word comes
        self.entropy = (often * entropies).sum().item()  # nats per token: the lowest loss

    def batch(self, rows: int = 16, length: int = 32) -> dict[str, Tensor]:
        """New sentences: input_ids and labels, [rows, length]."""
        words = [torch.randint(len(self.next), (rows,), generator=self.noise)]
        for _ in range(length - 1):
            words.append(self.next[words[-1]].multinomial(1, generator=self.noise)[:, 0])
        ids = torch.stack(words, dim=1)
        return {"input_ids": ids, "labels": ids}


def textbook(language: str = "en") -> list[str]:
    """The facts of the demo's textbook as lines of a question and its answer."""
    facts = load_tables()["textbook"]
    return [
        f"{question} {fact[language]['answers'][0]}"
        for fact in facts
        for question in fact[language]["questions"]
    ]


def crops(
    ids: list[int], number: int, rows: int = 16, length: int = 32, seed: int = 0
) -> Iterable[dict[str, Tensor]]:
    """`number` batches of random stretches of a text."""
    text, noise = torch.tensor(ids), torch.Generator().manual_seed(seed)
    for _ in range(number):
        starts = torch.randint(len(text) - length + 1, (rows,), generator=noise)
        cut = torch.stack([text[start : start + length] for start in starts])
        yield {"input_ids": cut, "labels": cut}
