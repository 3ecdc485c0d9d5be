"""Prepare data: download, clean, deduplicate, mix, and measure it.

    python scripts/prepare_data.py download --set mini
    python scripts/prepare_data.py clean --input crawl.txt chats.json.gz --output clean.jsonl
    python scripts/prepare_data.py dedup --input clean.jsonl --output a.jsonl --against ceval.csv
    python scripts/prepare_data.py mix --input a.jsonl b.jsonl --weight 7 3 --output mixed.jsonl
    python scripts/prepare_data.py stats --input mixed.jsonl --output mixed.png

Each may be stopped at any moment: the same command resumes or starts again, and ends with the same
bytes; an output appears only when it is complete. Beside it, OUTPUT.manifest.json has the counts,
sizes and hashes, the settings, and what was dropped and why, with examples.
`prepare_data.py clean --help` lists the flags of clean, and likewise for the other commands.
"""

import json
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from dataset.released import DATASET, MODELS, files_of_set, size_of
from model.command_line import option, parse_command
from model.errors import UserError, exit_on_user_error
from model.paths import OUT, check_input_file, check_tokenizer_folder

# -- the flags -------------------------------------------------------------------------------------


SKIP_BAD_ROWS = "leave bad rows out and report them; 0: the first is an error"


@dataclass
class Download:
    """download MiniMind's data files, released weights and the reward model"""

    set: str = option(
        "",
        f"mini ({size_of('mini')}) or full ({size_of('full')}): a file for each stage; of one "
        "stage: lora, dpo, rlaif, agent; 2025: those that the main branch no longer has",
    )
    file: list[str] = option(
        [], "data files by name or pattern, such as 'sft_*.jsonl'; with --model: files of it"
    )
    model: list[str] = option([], f"released models: {', '.join(MODELS)}, or OWNER/NAME")
    output: str = option(
        "", "folder; default: dataset/; of another --repo dataset/hub/NAME, of a model ./NAME"
    )
    hub: Literal["huggingface", "modelscope"] = option("huggingface", "the hub to download from")
    repo: str = option("", "repository of the data files; default: MiniMind's own")
    revision: str = option(
        "", "branch, tag or commit; default: the newest; of data files: as in dataset/released.py"
    )
    trust_remote_code: bool = option(False, "take the code of a model too", needs="model")
    endpoint: str = option("", "address of a mirror; default: HF_ENDPOINT, or the hub itself")

    def __post_init__(self) -> None:
        files_of_set(self.set)  # checks the name


@dataclass
class Job:
    """Arguments of all commands that write a file."""

    input: list[str] = option([], "the files to read", required=True, check=check_input_file)
    output: str = option("", "the file to write, .jsonl or .jsonl.gz")
    workers: int = option(0, "number of processes; 0: one a core", at_least=0)
    force: bool = option(False, "write over an output that is there")

    def __post_init__(self) -> None:
        self.workers = self.workers or os.cpu_count() or 1


@dataclass
class Clean(Job):
    """text, JSON, CSV, Parquet, ShareGPT, Alpaca, OpenAI messages → MiniMind's formats, filtered"""

    input: list[str] = option([], ".txt .md .jsonl .json .csv .tsv (each also .gz) or .parquet")
    to: Literal["auto", "text", "conversations", "prompts", "preferences", "preference"] = option(
        "auto",
        "kind of the output; auto: that of the first row; text: conversations become text; "
        "prompts: for RL, whose last answer may be empty or lacking",
    )
    drop_keys: list[str] = option([], "keys of rows and messages to leave out, such as weight")
    text_field: str = option("", "field or column of the text; default: text, content, raw_content")
    document: Literal["file", "paragraph", "line"] = option(
        "file", "what is one document of a plain text"
    )
    encoding: str = option("", "of the files; default: detected")
    min_chars: int = option(5, "shorter rows are dropped", at_least=0)
    max_chars: int = option(1_000_000, "longer rows are dropped")
    languages: list[str] = option(["zh", "en"], "to keep: zh, en (Latin letters), other")
    max_repetition: float = option(
        0.5, "largest share of repeated 8-word n-grams, or lines", at_least=0, at_most=1
    )
    max_signs: float = option(
        0.5, "largest share of punctuation among the visible characters", at_least=0, at_most=1
    )
    mask: bool = option(True, "mask mail addresses, phone, identity and card numbers")
    dropped: str = option("", "write the dropped rows too, with the reason, to this file")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.to = "preferences" if self.to == "preference" else self.to  # its former spelling
        if unknown := set(self.languages) - {"zh", "en", "other"}:
            raise UserError(f"--languages knows zh, en and other, not {min(unknown)}")
        if self.max_chars < self.min_chars:
            raise UserError("--max_chars must not be less than --min_chars")


@dataclass
class Dedup(Job):
    """drop exact and near duplicates, and rows with texts of an evaluation file"""

    against: list[str] = option(
        [], "evaluation files of any format, whose texts are removed", check=check_input_file
    )
    near: bool = option(True, "drop near duplicates too; 0: exact ones only")
    overlap: int = option(
        13, "n of the word n-grams that must not be in an evaluation file", at_least=8
    )
    threshold: float = option(
        0.8, "Jaccard similarity of 5-grams that makes near duplicates", above=0, at_most=1
    )
    num_perm: int = option(
        128, "MinHash permutations: more are more exact, and slower", at_least=16, at_most=1024
    )
    skip_bad_rows: bool = option(False, SKIP_BAD_ROWS)
    dropped: str = option("", "write the dropped rows too, with the reason, to this file")

    def __post_init__(self) -> None:
        super().__post_init__()


@dataclass
class Mix(Job):
    """one file out of several: weighted, shuffled, split, or in stages from short to long"""

    weight: list[float] = option(
        [], "share of each input in the output's bytes; default: every row once"
    )
    megabytes: float = option(
        0.0, "size of the output; 0: as large as the weights allow", at_least=0, needs="weight"
    )
    max_repeat: float = option(4.0, "how often a row may be repeated to fill its share", above=0)
    val_share: float = option(
        0.0, "share of the texts that is held out, by hash", at_least=0, at_most=1
    )
    val_output: str = option("", "file of the held-out rows; default: OUTPUT_val.jsonl")
    order: Literal["shuffled", "length", "kept"] = option(
        "shuffled", "length: short rows first; kept: as in the inputs"
    )
    stages: int = option(
        1,
        "n: a curriculum of n files, OUTPUT_1 with the shortest rows, OUTPUT_n with the longest",
        at_least=1,
    )
    skip_bad_rows: bool = option(False, SKIP_BAD_ROWS)
    seed: int = option(42, "of the random order")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight and len(self.weight) != len(self.input):
            raise UserError(f"{len(self.input)} --input files need as many --weight numbers")
        if any(weight < 0 for weight in self.weight) or (self.weight and not sum(self.weight)):
            raise UserError("--weight must not be negative, and not all of them 0")


@dataclass
class Stats(Job):
    """tokens, lengths, languages, compression and the most frequent texts: a table and a plot"""

    output: str = option("", "the picture, .png; default: out/{first input}_stats.png")
    tokenizer_path: str = option(
        "", "folder of the tokenizer; default: model/", check=check_tokenizer_folder
    )
    skip_bad_rows: bool = option(False, SKIP_BAD_ROWS)
    top: int = option(5, "how many of the most frequent texts to show", at_least=0)


FLAGS = {"download": Download, "clean": Clean, "dedup": Dedup, "mix": Mix, "stats": Stats}

if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    with exit_on_user_error():
        command, args = parse_command(FLAGS, __doc__)

import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table

from dataset.jsonl import BadRows
from dataset.prepare import hub, pipeline
from dataset.prepare.cleaning import Filters
from dataset.prepare.job_dir import JobDir, open_job
from dataset.prepare.resumable import stamps_of
from dataset.prepare.sources import check_input
from dataset.text import LANGUAGES
from model.weights import load_tokenizer, tokenizer_hash
from trainer.report.plots import plt, save_figure

console = Console(markup=False)


# -- the commands ----------------------------------------------------------------------------------


def clean(args: Clean) -> dict[str, Any] | None:
    job = open_job("clean", args, args.dropped, reads=("",))
    if job.is_done():
        return print_done(job)
    filters = Filters(**{f.name: getattr(args, f.name) for f in fields(Filters)})
    manifest = pipeline.clean(
        job,
        filters,
        args.to,
        args.text_field,
        dropped=bool(args.dropped),
        encoding=args.encoding,
        per_document=args.document,
        drop_keys=tuple(args.drop_keys),
    )
    print_counts(manifest)
    if manifest["kind"] == "prompts":
        print("these are prompts for RL: an empty last answer is kept, for the policy to write")
    return manifest


def dedup(args: Dedup) -> dict[str, Any] | None:
    job = open_job("dedup", args, args.dropped)
    against = check_input(args.against) if args.against else []
    job.key.append(stamps_of(against))
    if job.is_done():
        return print_done(job)
    manifest = pipeline.deduplicate(
        job,
        against,
        overlap=args.overlap,
        threshold=args.threshold,
        num_perm=args.num_perm,
        near=args.near,
        dropped=bool(args.dropped),
        skip_bad_rows=args.skip_bad_rows,
    )
    print_counts(manifest)
    return manifest


def mix(args: Mix) -> dict[str, Any] | None:
    names = [args.output]
    if args.stages > 1:
        names = [with_suffix(args.output, f"_{n + 1}") for n in range(args.stages)]
    if args.val_share or args.val_output:
        names.append(args.val_output or with_suffix(args.output, "_val"))
    args.output = names[0]
    job = open_job("mix", args, *names[1:])
    if job.is_done():
        return print_done(job)
    manifest = pipeline.mix(
        job,
        weights=args.weight,
        size=args.megabytes * 1e6,
        max_repeat=args.max_repeat,
        val_share=args.val_share,
        stages=args.stages,
        order=args.order,
        seed=args.seed,
        skip_bad_rows=args.skip_bad_rows,
    )
    print_bad_rows(manifest)
    for path, counts in manifest["counts"].items():
        print(f"{path}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))
    return manifest


def with_suffix(name: str, suffix: str) -> str:
    """a.jsonl.gz and _val → a_val.jsonl.gz"""
    path = Path(name)
    stem, dot, endings = path.name.partition(".jsonl")
    return str(path.with_name(f"{stem}{suffix}{dot}{endings}"))


def stats(args: Stats) -> dict[str, Any] | None:
    if args.input and not args.output:
        stem = Path(args.input[0]).name.partition(".")[0]
        args.output = str(OUT / f"{stem}_stats.png")
    job = open_job("stats", args, writes=(".png",))
    tokenizer = load_tokenizer(args.tokenizer_path)
    job.key.append(tokenizer_hash(tokenizer))
    if not job.is_done():
        pipeline.measure(job, tokenizer, args.top, plot_lengths, args.skip_bad_rows)
    manifest = json.loads(job.manifest.read_text(encoding="utf-8"))
    print_statistics(manifest["statistics"])
    print_bad_rows(manifest)
    console.print(f"{job.outputs[0]}: the plot; {job.manifest}: the numbers", highlight=False)
    return manifest


def download(args: Download) -> dict[str, Any]:
    if not (args.set or args.file or args.model or args.repo):
        raise UserError("name what to download: --set mini, --file, --model or --repo")
    downloads: list[tuple[str, str, list[str], Path]] = []  # repository, type, files, folder
    data = args.set or args.repo or not args.model
    if data:
        names = [*files_of_set(args.set), *args.file]
        repo = args.repo or hub.DATASETS[args.hub]
        own = repo in hub.DATASETS.values()
        folder = DATASET if own else DATASET / "hub" / repo.rpartition("/")[2]
        downloads.append((repo, "dataset", names, Path(args.output or folder)))
    for repo in [hub.model_repo(name, args.hub) for name in args.model]:
        folder = Path(args.output or ".") / repo.partition("/")[2]
        downloads.append((repo, "model", [] if data else args.file, folder))
    return {
        repo: pipeline.download(
            *(repo, repo_type, names, folder, args.hub, args.revision, args.endpoint),
            code=args.trust_remote_code,
        )
        for repo, repo_type, names, folder in downloads
    }


# -- printing --------------------------------------------------------------------------------------


def print_done(job: JobDir) -> None:
    print(f"{job.outputs[0]} is there already, of the same inputs and settings")


def print_counts(manifest: dict[str, Any]) -> None:
    """The counts as a table, with the first example of each reason."""
    counts, total = manifest["counts"], manifest["counts"].get("rows read", 0)
    table = Table("what", "rows", "share", "for example", title=manifest["outputs"][0]["file"])
    for name in dict.fromkeys(["rows read", "rows kept", *counts]):
        example = (manifest["examples"].get(name) or [""])[0]
        table.add_row(
            name, f"{counts[name]:,}", f"{counts[name] / max(1, total):.2%}", example[:60]
        )
    console.print(table)
    memory = ", ".join(f"{name} {size} MB" for name, size in manifest["peak_memory_mb"].items())
    print(f"{manifest['seconds']:.1f} s; most memory: {memory}")


def print_bad_rows(manifest: dict[str, Any]) -> None:
    if manifest["bad_rows"]["count"]:
        print(BadRows(**manifest["bad_rows"]))


def print_statistics(summary: dict[str, Any]) -> None:
    table = Table("language", "rows", "tokens", "MB", "characters a token", "bytes a token")
    for language, of in summary["languages"].items():
        numbers = (of["characters_per_token"], of["bytes_per_token"])
        row = (f"{of['rows']:,}", f"{of['tokens']:,}", f"{of['megabytes']:,}", *map(str, numbers))
        table.add_row(language, *row, style="bold" if language == "all" else "")
    console.print(table)
    lengths = ", ".join(f"{name} {count:,}" for name, count in summary["tokens_a_row"].items())
    print(f"tokens a row: {lengths}; trained in all: {summary['tokens_trained']:,}")
    print(
        f"zlib makes it {summary['zlib_ratio']} times smaller; exact duplicates: "
        f"{summary['exact_duplicates']:,} rows, {summary['share_of_duplicates']:.2%}"
    )
    for each in summary["most_frequent"]:
        print(f"  {each['times']} times: {each['text'][:90]!r}")


def plot_lengths(records: np.ndarray, path: Path) -> None:
    """Histograms of the row lengths by language: of rows, and of the tokens in them."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    edges = np.geomspace(1, max(2, records["tokens"].max()) * 1.01, 50)
    for number, language in enumerate(LANGUAGES):
        tokens = records["tokens"][records["language"] == number]
        if len(tokens):
            left.hist(tokens, edges, histtype="step", label=language)
            right.hist(tokens, edges, weights=tokens, histtype="step", label=language)
    left.set(title="rows", ylabel="rows")
    right.set(title="tokens in rows of that length", ylabel="tokens")
    for axes in (left, right):
        axes.set(xscale="log", xlabel="tokens a row")
        axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
        axes.yaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(figure, path)


COMMANDS = {"download": download, "clean": clean, "dedup": dedup, "mix": mix, "stats": stats}


def main(argv: list[str] | None = None) -> Any:
    command, args = parse_command(FLAGS, __doc__, argv)
    return COMMANDS[command](args)


if __name__ == "__main__":
    with exit_on_user_error():
        try:
            COMMANDS[command](args)
        except KeyboardInterrupt:
            print("stopped; the same command goes on", file=sys.stderr)
            sys.exit(130)
