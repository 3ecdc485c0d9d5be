"""Data as it is found → data to train on: downloaded, cleaned, deduplicated, mixed, measured.

    python scripts/prepare_data.py download --set mini
    python scripts/prepare_data.py clean --input crawl.txt chats.json.gz --output clean.jsonl
    python scripts/prepare_data.py dedup --input clean.jsonl --output a.jsonl --against ceval.csv
    python scripts/prepare_data.py mix --input a.jsonl b.jsonl --weight 7 3 --output mixed.jsonl
    python scripts/prepare_data.py stats --input mixed.jsonl --output mixed.png

Each may be stopped at any moment: the same command goes on, or begins again, and ends with the same
bytes; nothing half-written has the name of an output. Beside each output, OUTPUT.manifest.json
tells the counts, sizes and hashes, the settings, and what was dropped and why, with examples.
`prepare_data.py clean --help` lists the flags of clean, and likewise the others.
"""

import argparse
import gzip
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import matplotlib
import numpy as np
from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table

from dataset.prepare import hub, mixing, statistics
from dataset.prepare.cleaning import Cleaner, Filters
from dataset.prepare.deduplication import (
    SHORTEST_QUESTION,
    Questions,
    Selected,
    Signed,
    Signer,
    read_questions,
    row_of,
)
from dataset.prepare.resumable import Done, Progress, in_chunks, process, seen, sha256_of
from dataset.prepare.sources import Raw, check_input, kind_of, read_raw, to_row, whole_text
from model.command_line import Parser, option
from model.errors import UserError, exit_on_user_error
from model.weights import OUT, ROOT, load_tokenizer, tokenizer_hash, write_json
from trainer.report.plots import plt, save_figure

CHUNK_ROWS, CHUNK_SIZE = 500, 2_000_000
FORMAT = 1  # raise it whenever the same settings give other rows
console = Console()


# -- the flags -------------------------------------------------------------------------------------


@dataclass
class Download:
    """fetch MiniMind's data files, released weights and the reward model"""

    set: Literal["", "mini", "full"] = option(
        "", "mini: pretrain_hq and sft_mini_512; full: the files of every stage"
    )
    file: list[str] = option([], "data files by name, or a pattern such as 'sft_*.jsonl'")
    model: list[str] = option([], f"folders of models: {', '.join(hub.MODELS)}, or OWNER/NAME")
    output: str = option("", "folder; default: dataset/, for a model ./NAME")
    hub: Literal["huggingface", "modelscope"] = option("huggingface", "where from")
    repo: str = option("", "repository of the data files; default: MiniMind's own")
    revision: str = option("", "branch, tag or commit; default: the newest")
    endpoint: str = option("", "address of a mirror; default: HF_ENDPOINT, or the hub itself")


@dataclass
class Job:
    """What the commands that write a file share."""

    input: list[str] = option([], "the files to read")
    output: str = option("", "the file to write, .jsonl or .jsonl.gz")
    workers: int = option(0, "processes; 0: one a core")
    force: bool = option(False, "write over an output that is there")

    def __post_init__(self) -> None:
        self.workers = self.workers or os.cpu_count() or 1


@dataclass
class Clean(Job):
    """text, JSON, CSV, Parquet, ShareGPT, Alpaca, OpenAI messages → MiniMind's formats, filtered"""

    input: list[str] = option([], ".txt .md .jsonl .json .csv .tsv (each also .gz) or .parquet")
    to: Literal["auto", "text", "conversations", "preference"] = option(
        "auto", "rows to make; auto: as the first row is; text: conversations become text too"
    )
    text_field: str = option("", "field or column of the text; default: text, content, raw_content")
    document: Literal["file", "paragraph", "line"] = option("file", "a document of a plain text")
    encoding: str = option("", "of the files; default: found out")
    min_chars: int = option(5, "shorter rows are dropped")
    max_chars: int = option(1_000_000, "longer rows are dropped")
    languages: list[str] = option(["zh", "en"], "to keep: zh, en (Latin letters), other")
    max_repetition: float = option(0.5, "largest share of repeated 8-word runs, or of lines")
    max_signs: float = option(0.5, "largest share of signs among the visible characters")
    mask: bool = option(True, "mask mail addresses, phone, identity and card numbers")
    dropped: str = option("", "also write the dropped rows, with the reason, to this file")

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := set(self.languages) - {"zh", "en", "other"}:
            raise UserError(f"--languages knows zh, en and other, not {min(unknown)}")
        if self.min_chars < 0 or self.max_chars < self.min_chars:
            raise UserError("--min_chars must be 0 or more, and --max_chars no less than it")
        for name in ("max_repetition", "max_signs"):
            check_share(self, name)


@dataclass
class Dedup(Job):
    """drop rows that were there before, or nearly, or that stand in an evaluation file"""

    against: list[str] = option([], "evaluation files, of any format: their texts must not occur")
    near: bool = option(True, "near duplicates too; 0: exact ones only")
    overlap: int = option(13, "words in a run that must not stand in one of them too")
    threshold: float = option(0.8, "Jaccard similarity of 5-word runs from which rows are the same")
    num_perm: int = option(128, "numbers in a signature: more are more exact, and slower")
    dropped: str = option("", "also write the dropped rows, with the reason, to this file")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "threshold")
        if self.threshold == 0 or not 16 <= self.num_perm <= 1024:
            raise UserError("--threshold must be more than 0, and --num_perm from 16 to 1024")
        if self.overlap < SHORTEST_QUESTION:
            raise UserError(f"--overlap must be at least {SHORTEST_QUESTION} words")


@dataclass
class Mix(Job):
    """one file out of several: weighted, shuffled, split, or in stages from short to long"""

    weight: list[float] = option(
        [], "share of each input in the output's bytes; default: every row once"
    )
    megabytes: float = option(0.0, "size of the output; 0: as large as the weights allow")
    max_repeat: float = option(4.0, "how often a row may be repeated to fill its share")
    val_share: float = option(0.0, "share of the texts held out, by hash")
    val_output: str = option("", "file of the held-out rows; default: OUTPUT_val.jsonl")
    order: Literal["shuffled", "length", "kept"] = option(
        "shuffled", "length: short rows first; kept: as in the inputs"
    )
    stages: int = option(
        1,
        "n: a curriculum of n files, OUTPUT_1 with the shortest rows, OUTPUT_n with the longest",
    )
    seed: int = option(42, "of the order")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "val_share")
        if self.weight and len(self.weight) != len(self.input):
            raise UserError(f"{len(self.input)} --input files need as many --weight numbers")
        if any(weight < 0 for weight in self.weight) or (self.weight and not sum(self.weight)):
            raise UserError("--weight must not be negative, and not all of them 0")
        if self.megabytes and not self.weight:
            raise UserError("--megabytes goes with --weight")
        if self.stages < 1 or self.megabytes < 0 or self.max_repeat <= 0:
            raise UserError("--stages, --max_repeat must be more than 0, --megabytes not negative")


@dataclass
class Stats(Job):
    """tokens, lengths, languages, compression and the most frequent texts: a table and a plot"""

    output: str = option("", "the picture, .png; default: out/{first input}_stats.png")
    tokenizer_path: str = option("", "folder of the tokenizer; default: model/")
    top: int = option(5, "how many of the most frequent texts to show")


def check_share(args: Any, name: str) -> None:
    if not 0 <= getattr(args, name) <= 1:
        raise UserError(f"--{name} must be from 0 to 1, not {getattr(args, name)}")


# -- the place of the work -------------------------------------------------------------------------


@dataclass
class Place:
    """The outputs of a job, and the folder of what it needs to go on, until it is done."""

    command: str
    args: Job
    inputs: list[Path]
    outputs: list[Path]
    started: float = field(default_factory=time.monotonic)
    SECONDARY: ClassVar[tuple[str, ...]] = ("workers", "force")  # change no byte of the output

    def __post_init__(self) -> None:
        first = self.outputs[0]
        self.folder = first.with_name(f".{first.name}.work")
        self.manifest = first.with_name(f"{first.name}.manifest.json")
        settings = {k: v for k, v in asdict(self.args).items() if k not in self.SECONDARY}
        self.key = json.loads(json.dumps([FORMAT, self.command, settings, seen(self.inputs)]))

    def note(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def is_done(self) -> bool:
        """Whether the same command has ended before.

        Raises:
            UserError: something else is where the output is to go.
        """
        for path in self.outputs:
            if path.resolve() in {each.resolve() for each in self.inputs}:
                raise UserError(f"{path} is read and so cannot be written; choose another --output")
            if path.is_dir():
                raise UserError(f"{path} is a folder; --output names a file")
        there = [path for path in self.outputs if path.exists()]
        if not there or self.args.force or self.folder.exists():
            return False
        try:
            done = json.loads(self.manifest.read_text(encoding="utf-8"))["key"] == self.key
        except (OSError, ValueError, KeyError, TypeError):
            done = False
        if done and there == self.outputs:
            return True
        raise UserError(f"{there[0]} exists already; --force writes over it")

    @contextmanager
    def work(self) -> Iterator[None]:
        """Alone in the folder, which is removed when all is done, or nothing was done."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / "lock", timeout=0):
                yield
        except Timeout:
            raise UserError(f"another run is writing {self.outputs[0]} right now") from None
        except UserError:
            if not any(self.folder.glob("*.json")):  # the notes of how far it is
                shutil.rmtree(self.folder)
                for path in self.outputs:
                    path.with_name(f".{path.name}.partial").unlink(missing_ok=True)
            raise
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"cannot write to {self.folder.parent}: {why}") from error
        shutil.rmtree(self.folder)

    def write_manifest(self, progress: dict[str, Any]) -> dict[str, Any]:
        manifest = {
            "command": self.command,
            "arguments": asdict(self.args),
            "inputs": [about(path) for path in self.inputs],
            "outputs": [about(path) for path in self.outputs],
            **progress,
            "seconds": round(time.monotonic() - self.started, 1),
            "peak_memory_mb": peak_memory(),
            "key": self.key,
        }
        write_json(self.manifest, manifest)
        return manifest


def about(path: Path) -> dict[str, Any]:
    return {"file": str(path), "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def peak_memory() -> dict[str, int]:
    """Most memory of this process, and of the largest of its workers, in MB; {} on Windows."""
    try:
        import resource
    except ImportError:
        return {}
    unit = 1e6 if sys.platform == "darwin" else 1e3
    who = {"main": resource.RUSAGE_SELF, "worker": resource.RUSAGE_CHILDREN}
    return {name: round(resource.getrusage(each).ru_maxrss / unit) for name, each in who.items()}


ROWS = (".jsonl", ".jsonl.gz")


def place_of(
    command: str, args: Job, *more: str, reads: tuple[str, ...] = ROWS, writes=ROWS
) -> Place:
    """Check what is to be read and written. UserError if it is not what the command needs."""
    inputs = check_input(args.input)
    for path in inputs:
        if not path.name.endswith(reads):
            raise UserError(f"{path} is no {' or '.join(reads)} file; clean makes one of it")
    if not args.output:
        raise UserError("--output names the file to write")
    outputs = [Path(name) for name in (args.output, *more) if name]
    for path in outputs:
        if not path.name.endswith(writes):
            raise UserError(f"{path} should be a {' or '.join(writes)} file")
    if len(set(outputs)) < len(outputs):
        raise UserError(f"{outputs[0]} is named as two outputs")
    return Place(command, args, inputs, outputs)


@dataclass
class Packed:
    """`work`, its outputs compressed where their file is .gz: a member of the file a chunk."""

    work: Callable[[Any], Done]
    outputs: list[Path]

    def __call__(self, chunk: Any) -> Done:
        done = self.work(chunk)
        done.outputs = [
            gzip.compress(content, mtime=0) if path.suffix == ".gz" and content else content
            for content, path in zip(done.outputs, self.outputs, strict=True)
        ]
        return done


def chunks_of(rows, size_of=Raw.size):
    return in_chunks(rows, size_of, CHUNK_ROWS, CHUNK_SIZE)


# -- the commands ----------------------------------------------------------------------------------


def clean(args: Clean) -> dict[str, Any] | None:
    place = place_of("clean", args, args.dropped, reads=("",))
    if place.is_done():
        return tell_done(place)
    reading = dict(encoding=args.encoding, per_document=args.document)
    kind = first_kind(place.inputs, args, reading) if args.to == "auto" else args.to
    filters = Filters(**{f.name: getattr(args, f.name) for f in fields(Filters)})
    work = Cleaner(filters, kind, args.text_field, with_dropped=bool(args.dropped))
    with place.work():
        rows = read_raw(place.inputs, about="cleaning", **reading)
        progress = process(
            chunks_of(rows),
            Packed(work, place.outputs),
            place.outputs,
            place.note("clean"),
            place.key,
            args.workers,
        )
        manifest = place.write_manifest(counted(progress) | {"kind": kind})
    tell(manifest)
    return manifest


def first_kind(files: list[Path], args: Clean, reading: dict[str, str]) -> str:
    """What the first row that can be read is."""
    reason = "there are no rows"
    for raw in islice(read_raw(files, about="looking", **reading), 1000):
        try:
            return kind_of(to_row(raw, args.text_field))
        except UserError as error:
            reason = f"line {raw.number} of {raw.path} {error}"
    raise UserError(f"none of the first rows can be read: {reason}")


def dedup(args: Dedup) -> dict[str, Any] | None:
    place = place_of("dedup", args, args.dropped)
    against = check_input(args.against) if args.against else []
    place.key.append(seen(against))
    if place.is_done():
        return tell_done(place)
    questions = read_questions(against, args.overlap) if against else Questions()
    signer = Signer(args.threshold, args.num_perm, questions)
    signed = Signed(place.folder, args.threshold, args.num_perm, signer.bands)
    with place.work():
        rows = read_raw(place.inputs, about="signatures")
        note = place.note("signatures")
        process(chunks_of(rows), signer, signed.files(), note, place.key, args.workers)
        verdicts = signed.verdicts(args.near)
        rows = zip(read_raw(place.inputs, about="writing"), verdicts.tolist(), strict=True)
        progress = process(
            chunks_of(rows, lambda pair: pair[0].size()),
            Packed(Selected(bool(args.dropped)), place.outputs),
            place.outputs,
            place.note("writing"),
            place.key,
        )
        manifest = place.write_manifest(
            counted(progress) | {"against": [about(path) for path in against]}
        )
    tell(manifest)
    return manifest


def mix(args: Mix) -> dict[str, Any] | None:
    names = [args.output]
    if args.stages > 1:
        names = [beside(args.output, f"_{n + 1}") for n in range(args.stages)]
    if args.val_share or args.val_output:
        names.append(args.val_output or beside(args.output, "_val"))
    args.output = names[0]
    place = place_of("mix", args, *names[1:])
    if place.is_done():
        return tell_done(place)
    with place.work():
        index = mixing.index_rows(mixing.unpacked(place.inputs, place.folder), place.inputs)
        times = mixing.copies(index, args.weight, args.megabytes * 1e6, args.max_repeat)
        plan = mixing.plan(index, times, args.val_share, args.stages, args.order, args.seed)
        counts: dict[str, Any] = {}
        parts = plan.parts + [plan.val] * (len(names) > args.stages)
        for number, (path, rows) in enumerate(zip(place.outputs, parts, strict=True)):
            work = Packed(mixing.Reader(index.files, index.names), [path])
            chunks = chunks_of(mixing.rows_at(index, rows), lambda row: row[2])
            note = place.note(f"writing {number}")
            done = process(chunks, work, [path], note, place.key, args.workers)
            counts[path.name] = done.counts
        manifest = place.write_manifest({"counts": counts})
    for path, of in counts.items():
        print(f"{path}: " + ", ".join(f"{count:,} {name}" for name, count in of.items()))
    return manifest


def beside(name: str, end: str) -> str:
    """a.jsonl.gz and _val → a_val.jsonl.gz"""
    path = Path(name)
    stem, dot, suffixes = path.name.partition(".jsonl")
    return str(path.with_name(f"{stem}{end}{dot}{suffixes}"))


def stats(args: Stats) -> dict[str, Any] | None:
    if args.input and not args.output:
        stem = Path(args.input[0]).name.partition(".")[0]
        args.output = str(OUT / f"{stem}_stats.png")
    place = place_of("stats", args, writes=(".png",))
    tokenizer = load_tokenizer(args.tokenizer_path)
    place.key.append(tokenizer_hash(tokenizer))
    if not place.is_done():
        with place.work():
            records_file = place.folder / "records"
            progress = process(
                chunks_of(read_raw(place.inputs, about="measuring")),
                statistics.Measure(tokenizer),
                [records_file],
                place.note("measuring"),
                place.key,
                args.workers,
            )
            records = statistics.read_records(records_file)
            if not len(records):
                raise UserError(f"{', '.join(args.input)} hold no rows")
            figures = statistics.summary(records, progress.counts)
            often = statistics.top_duplicates(records, args.top)
            figures["most_frequent"] = [
                {"times": often[number], "text": whole_text(row_of(raw))[:200]}
                for number, raw in enumerate(read_raw(place.inputs, about="duplicates"))
                if number in often
            ]
            figures["most_frequent"].sort(key=lambda each: -each["times"])
            plot_lengths(records, place.outputs[0])
            place.write_manifest({"figures": figures})
    manifest = json.loads(place.manifest.read_text(encoding="utf-8"))
    show_figures(manifest["figures"])
    console.print(
        f"{place.outputs[0]}: the lengths; {place.manifest}: the figures", highlight=False
    )
    return manifest


def download(args: Download) -> dict[str, Any]:
    if not (args.set or args.file or args.model or args.repo):
        raise UserError("name what to download: --set mini, --file, --model or --repo")
    at = hub.HUBS.index(args.hub)
    jobs: list[tuple[str, str, list[str], Path]] = []  # repository, type, files, folder
    if args.set or args.file or (args.repo and not args.model):
        names = [*hub.SETS.get(args.set, []), *args.file]
        repo = args.repo or hub.DATASETS[args.hub]
        jobs.append((repo, "dataset", names, Path(args.output or ROOT / "dataset")))
    for name in args.model:
        if name not in hub.MODELS and "/" not in name:
            raise UserError(
                f"no model {name} is known; known: {', '.join(hub.MODELS)}; or OWNER/NAME"
            )
        repo = hub.MODELS[name][at] if name in hub.MODELS else name
        folder = Path(args.output or ".") / repo.partition("/")[2]
        jobs.append((repo, "model", [], folder))
    found = {}
    for repo_name, repo_type, names, folder in jobs:
        repo = hub.open_repo(args.hub, repo_name, repo_type, args.revision, args.endpoint)
        chosen = hub.choose(repo.files(), names, repo_name)
        files = []
        for remote in chosen:
            path, fetched = hub.download(repo, remote, folder)
            state = "fetched" if fetched else "was there"
            how = remote.checked_by()
            print(f"{path}: {path.stat().st_size:,} bytes, {state}, checked by {how}")
            files.append({**about(path), "checked_by": how})
        found[repo_name] = {"hub": repo.where, "revision": repo.revision, "files": files}
        write_json(folder / "download.manifest.json", {"command": "download", **found[repo_name]})
    return found


# -- telling ---------------------------------------------------------------------------------------


def counted(progress: Progress) -> dict[str, Any]:
    return {"counts": dict(sorted(progress.counts.items())), "examples": progress.examples}


def tell_done(place: Place) -> None:
    print(f"{place.outputs[0]} is there already, of the same inputs and settings")


def tell(manifest: dict[str, Any]) -> None:
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


def show_figures(figures: dict[str, Any]) -> None:
    table = Table("language", "rows", "tokens", "MB", "characters a token", "bytes a token")
    for language, of in figures["languages"].items():
        numbers = (of["characters_per_token"], of["bytes_per_token"])
        row = (f"{of['rows']:,}", f"{of['tokens']:,}", f"{of['megabytes']:,}", *map(str, numbers))
        table.add_row(language, *row, style="bold" if language == "all" else "")
    console.print(table)
    lengths = ", ".join(f"{name} {count:,}" for name, count in figures["tokens_a_row"].items())
    print(f"tokens a row: {lengths}; trained in all: {figures['tokens_trained']:,}")
    print(
        f"zlib makes it {figures['zlib_ratio']} times smaller; exact duplicates: "
        f"{figures['exact_duplicates']:,} rows, {figures['share_of_duplicates']:.2%}"
    )
    for each in figures["most_frequent"]:
        print(f"  {each['times']} times: {each['text'][:90]!r}")


def plot_lengths(records: np.ndarray, path: Path) -> None:
    """How long rows are, and in rows of which length the tokens are, by language."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    edges = np.geomspace(1, max(2, records["tokens"].max()) * 1.01, 50)
    for number, language in enumerate(statistics.LANGUAGES):
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


# -- the command line ------------------------------------------------------------------------------

COMMANDS: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "download": (Download, download),
    "clean": (Clean, clean),
    "dedup": (Dedup, dedup),
    "mix": (Mix, mix),
    "stats": (Stats, stats),
}


def command_line() -> Parser:
    parser = Parser([], description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, (kind, _) in COMMANDS.items():
        commands.add_parser(
            name,
            dataclass_types=kind,
            help=kind.__doc__,
            description=kind.__doc__,
            allow_abbrev=False,
        )
    return parser


def main(words: list[str] | None = None) -> Any:
    given = vars(command_line().parse_args(words))
    kind, run = COMMANDS[given.pop("command")]
    return run(kind(**given))


if __name__ == "__main__":
    with exit_on_user_error():
        try:
            main()
        except KeyboardInterrupt:
            print("stopped; the same command goes on", file=sys.stderr)
            sys.exit(130)
