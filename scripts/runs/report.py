"""The page of a whole run: one self-contained HTML file of all stages, to look at and to pass on.

    python scripts/runs/report.py --save_dir out/minimind

What was run and on what, how long it took and what it cost, each stage's curves, how good each
stage is on data that none was trained on, and the fixed page of questions with the answers of all
stages side by side. It is made from the files that the trainers, evaluate.py, questions.py and
eval_benchmark.py leave in the folder; what is not there is left out.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from model.command_line import option, parse_command_line
from model.errors import UserError, exit_on_user_error
from model.paths import OUT
from scripts.runs.stages import (
    DEFAULT,
    STAGES,
    finished_stages,
    in_hours,
    log_of,
    read_json,
    read_plan,
    stopped_quietly,
    weights_of,
)


@dataclass
class Args:
    save_dir: str = option(str(OUT / "minimind"), "folder of the run")
    output: str = option("", "file of the page; default: report.html in save_dir")


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_command_line(Args, __doc__)


import importlib
import json
import shlex
from collections.abc import Iterable
from dataclasses import fields
from datetime import date
from html import escape

import torch

from model.command_line import default_of
from model.weights import read_info
from scripts.runs.cards import CARD_STYLE, COLORS, benchmark_cards, dot, measures
from trainer.report.forecast import duration
from trainer.report.log import read_log
from trainer.report.pages import data, shown
from trainer.report.parts import (
    Records,
    anchor,
    charts,
    folded,
    points,
    section,
    table,
    tile_grid,
    write_page,
)

# what a stage's chart is worth at first sight; the others are folded
MAIN = ("loss", "eval_bpb", "reward", "eval_reward", "accuracy", "eval_accuracy", "kl")
MAIN += ("rewards/accuracies", "eval_rewards/accuracies", "eval_rewards/margins", "approx_kl")
PLACES = ("save_dir", "checkpoint_dir", "resume", "from_resume", "force")  # flags of every command


class Trained(NamedTuple):
    """A finished stage."""

    name: str
    info: dict[str, Any]  # the .json beside its weights
    history: Records

    @property
    def origin(self) -> dict[str, Any]:
        return self.info.get("origin", {})

    @property
    def title(self) -> str:
        return STAGES[self.name].title

    @property
    def seconds(self) -> float:
        return self.origin.get("seconds", 0)


def main(args: Args) -> Path:
    folder = Path(args.save_dir)
    stages = [trained(name, folder) for name in finished_stages(folder)]
    if not stages:
        raise UserError(f"{folder} has no finished stage to report on")
    plan, results = read_plan(folder), read_json(folder / "results.json")
    benchmarks, page = read_json(folder / "benchmarks.json"), read_json(folder / "questions.json")
    origins = {stage.name: stage.origin for stage in stages}
    contents = {
        "The stages": stage_table(stages, plan),
        "How good is it?": measures(origins, results) + benchmark_cards(benchmarks),
        "Questions and answers": answers(page),
        "Curves": "".join(map(curves, stages)),
        "How it was made": commands(stages, plan),
        "Data": "".join(f"<h3>{dot(s.name)}{s.title}</h3>{data(s.origin)}" for s in stages),
    }
    links = (f'<a href="#{anchor(title)}">{title}</a>' for title in contents if contents[title])
    parts = [
        f"<nav>{''.join(links)}</nav>",
        overview(stages, plan, results),
        timeline(stages),
        *(section(title, content) for title, content in contents.items()),
    ]
    machine = stages[0].origin.get("machine", "")
    about = f"{machine}, {date.today()}, torch {torch.__version__}"
    path = Path(args.output or folder / "report.html")
    write_page(path, "MiniMind, trained from nothing", about, parts, CARD_STYLE + STYLE)
    print(f"the page of the run: {path}")
    return path


def trained(stage: str, folder: Path) -> Trained:
    weights = weights_of(stage, folder)
    assert weights is not None  # of a finished stage
    return Trained(stage, read_info(weights) or {}, read_log(log_of(weights), stage))


# -- what was done ---------------------------------------------------------------------------------


def overview(stages: list[Trained], plan: dict[str, Any], results: dict[str, Any]) -> str:
    """The numbers that one would tell first."""
    seconds, tokens = (sum(s.origin.get(n, 0) for s in stages) for n in ("seconds", "tokens"))
    bits = results.get("pretrain", {}).get("text", {}).get("bits_per_byte")
    price = plan.get("price", "")
    return tile_grid(
        [
            ("parameters", millions(stages[0].info.get("parameters", 0))),
            ("training time", duration(seconds)),
            ("tokens trained", millions(tokens)),
            ("cost of the training", in_hours(price, seconds) if price else ""),
            ("bits per byte after pretraining", f"{bits:.3f}" if bits else ""),
            ("stages", " → ".join(s.name for s in stages)),
        ]
    )


def timeline(stages: list[Trained]) -> str:
    """A bar of the training time, divided by stage."""
    total = sum(s.seconds for s in stages) or 1
    pieces, legend = [], []
    for stage in stages:
        share, color = max(0.4, 100 * stage.seconds / total), COLORS[stage.name]
        pieces.append(f'<i style="width:{share:.2f}%;background:{color}"></i>')
        legend.append(f"<span>{dot(stage.name)}{stage.title}, {duration(stage.seconds)}</span>")
    return f'<div class="timeline">{"".join(pieces)}</div><p class="legend">{" ".join(legend)}</p>'


def stage_table(stages: list[Trained], plan: dict[str, Any]) -> str:
    price = plan.get("price", "")
    head = ("stage", "from", "data", "steps", "tokens", "time", "tokens/s", "held out")
    rows = []
    for stage in stages:
        origin, seconds = stage.origin, stage.seconds
        files = origin.get("manifest", {}).get("files", [])
        start = origin.get("from_weight", "")
        row = (
            stage.title,
            "random weights" if start == "none" else start,
            ", ".join(file["file"] for file in files),
            f"{origin.get('steps', 0):,}",
            millions(origin.get("tokens", 0)),
            duration(seconds),
            f"{origin.get('tokens', 0) / max(1, seconds):,.0f}",
            ", ".join(f"{name} {value:.3f}" for name, value in held_out(stage).items()),
        )
        rows.append(row + ((in_hours(price, seconds),) if price else ()))
    return f'<div class="stages">{table(rows, head + (("cost",) if price else ()))}</div>'


def held_out(stage: Trained) -> dict[str, float]:
    """What the trainer measured at last, in a word each."""
    names = {
        "eval_bpb": "bits per byte",
        "eval_rewards/accuracies": "pairs right",
        "eval_accuracy": "pairs right",
        "eval_reward": "reward",
    }
    return {names[n]: v for n, v in stage.origin.items() if n in names and v is not None}


def commands(stages: list[Trained], plan: dict[str, Any]) -> str:
    """The command of the run, and what each stage's trainer was given beside its places."""
    names = [stage.name for stage in stages]
    minutes = plan.get("minutes", 0)
    given = {"DATA": plan.get("data_dir"), "MINUTES": f"{minutes:g}" if minutes else ""}
    given |= {"STAGES": " ".join(names) if names != DEFAULT else "", "PRICE": plan.get("price")}
    settings = [f"{name}={shlex.quote(value)}" for name, value in given.items() if value]
    whole = " ".join([*settings, "bash scripts/runs/minimind.sh", plan.get("flags", "")]).strip()
    lines = [f"python trainer/{STAGES[s.name].trainer}.py {flags(s)}".strip() for s in stages]
    sizes = [
        folded(f"all settings of {s.title}", json.dumps(s.origin.get("args", {}), indent=1))
        for s in stages
    ]
    return (
        f"<p>All of it:</p><pre>{escape(whole)}</pre><p>Each stage, with the folder of the run as "
        f"--save_dir and the settings that were chosen:</p><pre>{escape(chr(10).join(lines))}</pre>"
        + "".join(sizes)
    )


def flags(stage: Trained) -> str:
    """What differs from the trainer's defaults."""
    args_class = importlib.import_module(f"trainer.{STAGES[stage.name].trainer}").Args
    given, words = stage.origin.get("args", {}), []
    for field in fields(args_class):
        value = given.get(field.name, default_of(field))
        if field.name not in PLACES and value != default_of(field) and value not in ("", []):
            listed = value if isinstance(value, list) else [shown(value)]
            words.append(shlex.join([f"--{field.name}", *map(str, listed)]))
    return " ".join(words)


def millions(count: float) -> str:
    """5.9M, 1.2B"""
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.2f}M" if count else ""


# -- questions and curves --------------------------------------------------------------------------


def answers(page: dict[str, Any]) -> str:
    """Every question with what each stage answered, side by side."""
    if not page:
        return ""
    sampling = page["sampling"]
    about = (
        "The same questions to every stage, and every answer, none chosen. In sight are the "
        f"likeliest tokens (greedy); folded a sample at temperature {sampling['temperature']:g}, "
        f"top_p {sampling['top_p']:g}, seed {sampling['seed']}. An answer ends after "
        f"{sampling['max_new_tokens']} tokens at the latest. A pretrained model does not answer: "
        "it goes on with the text."
    )
    shown = [question(row, page["stages"]) for row in page["questions"]]
    return f"<p>{about}</p>{''.join(shown)}"


def question(row: dict[str, Any], stages: dict[str, Any]) -> str:
    turns = "".join(f"<h3>{escape(turn)}</h3>" for turn in row["turns"])
    columns = []
    for stage, about in stages.items():
        said = about["answers"][row["id"]]
        columns.append(
            f"<div><h4>{dot(stage)}{STAGES[stage].title}</h4>"
            f'<div class="answer">{paragraphs(said["greedy"])}</div>'
            "<details><summary>sampled</summary>"
            f'<div class="answer">{paragraphs(said["sampled"])}</div></details></div>'
        )
    kind = f'<span class="kind">{escape(row["kind"])}</span>'
    grid = f'<div class="answers">{"".join(columns)}</div>'
    return f'<article class="question">{kind}{turns}{grid}</article>'


def paragraphs(turns: Iterable[str]) -> str:
    return "".join(f"<p>{escape(turn) or '<em>nothing</em>'}</p>" for turn in turns)


def curves(stage: Trained) -> str:
    """What one looks at first, and the rest folded."""
    runs, color = {stage.name: stage.history}, COLORS[stage.name]
    lines = {metric for record in stage.history for metric in record}
    lines = {metric for metric in lines if len(points(stage.history, metric)) > 1}
    first = charts(runs, lambda metric: metric in MAIN and metric in lines, color)
    others = charts(runs, lambda metric: metric not in MAIN and metric in lines, color)
    more = f"<details><summary>all other curves</summary>{others}</details>" if others else ""
    return f"<h3>{dot(stage.name)}{stage.title}</h3>{first}{more}"


STYLE = """
html { scroll-behavior: smooth; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin: 0 0 1.2rem; font-size: .92rem; }
nav a { color: inherit; text-decoration-color: var(--line); text-underline-offset: .25em; }
nav a:hover { text-decoration-color: currentColor; }
.stages table { min-width: 44rem; }
.stages td, .stages th { white-space: nowrap; }
h3 { margin: 1.4rem 0 .5rem; font-size: 1rem; }
.tiles div:last-child { grid-column: span 2; }
.dot { display: inline-block; width: .7em; height: .7em; margin-right: .45em; border-radius: 50%; }
.timeline { display: flex; gap: 2px; height: 1.1rem; margin: 1.4rem 0 .4rem; overflow: hidden;
  border-radius: 8px; }
.timeline i { display: block; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; margin: 0; color: var(--soft);
  font-size: .9rem; }
.question { margin: 1rem 0; padding: .9rem 1.1rem 1.1rem; border: 1px solid var(--line);
  border-radius: 12px; }
.question h3 { margin: 0 5.5rem .2rem 0; font-size: 1.05rem; }
.kind { float: right; padding: .05rem .6rem; border-radius: 1rem; background: var(--card);
  color: var(--soft); font-size: .8rem; }
.answers { display: grid; gap: .8rem; margin-top: .7rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); }
.answers > div { min-width: 0; }
.answers h4 { margin: 0 0 .3rem; color: var(--soft); font-size: .82rem; font-weight: 500; }
.answer { max-height: 11rem; overflow: auto; padding: .5rem .7rem; font-size: .92rem;
  background: var(--card); border-radius: 8px; }
.answer p { margin: 0; white-space: pre-wrap; }
.answer p + p { margin-top: .4rem; padding-top: .4rem; border-top: 1px solid var(--line); }
.answers summary { margin: .35rem 0; font-size: .82rem; }
pre { overflow-x: auto; padding: .7rem .9rem; background: var(--card); border-radius: 8px; }
@media (min-width: 50rem) { body { padding: 2rem; } h1 { font-size: 2rem; } }
"""


if __name__ == "__main__":
    with exit_on_user_error(), stopped_quietly():
        main(args)
