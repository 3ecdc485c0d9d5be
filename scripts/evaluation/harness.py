"""MiniMind in the harness of the field, lm-evaluation-harness: its models, and benchmarks that lie
in a folder. scripts/eval_benchmark.py is the command.
"""

import csv
import json
from collections import defaultdict
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import lm_eval
import lm_eval.tasks
import pyarrow.parquet
import torch
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from model.errors import UserError
from model.inference.engine import Engine, Request
from model.inference.sampling import Sampling
from model.inference.streaming import TextStream

# -- benchmarks ------------------------------------------------------------------------------------


class Benchmark(NamedTuple):
    title: str
    task: str  # the harness's name; of C-Eval and CMMLU that of the group of all subjects
    definitions: str  # the harness's folder that defines it
    folders: tuple[str, ...]  # what its folder in --local may be called
    metric: str  # the figure that is quoted most
    shots: int = 0  # solved examples before each question


ARC = ("ai2_arc", "arc", "ARC-V1-Feb2018-2")
OPENBOOK = ("openbookqa", "OpenBookQA-V1-Sep2018")
BENCHMARKS = {
    "ceval": Benchmark("C-Eval", "ceval-valid", "ceval", ("ceval-exam", "ceval"), "acc"),
    "cmmlu": Benchmark("CMMLU", "cmmlu", "cmmlu", ("cmmlu",), "acc"),
    "openbookqa": Benchmark(
        "OpenBookQA",
        "openbookqa",
        "openbookqa",
        ("openbookqa", "OpenBookQA-V1-Sep2018"),
        "acc_norm",
    ),
    "arc_easy": Benchmark("ARC easy", "arc_easy", "arc", ARC, "acc_norm"),
    "arc_challenge": Benchmark("ARC challenge", "arc_challenge", "arc", ARC, "acc_norm"),
    "hellaswag": Benchmark("HellaSwag", "hellaswag", "hellaswag", ("hellaswag",), "acc_norm"),
    "piqa": Benchmark("PIQA", "piqa", "piqa", ("piqa", "physicaliqa-train-dev"), "acc_norm"),
    "gsm8k": Benchmark("GSM8K", "gsm8k", "gsm8k", ("gsm8k",), "exact_match,strict-match", shots=5),
}


def tasks_of(benchmark: Benchmark, local: str = "") -> TaskManager:
    """The harness's definitions of a benchmark, which fetch its questions from the Hugging Face
    Hub, or have them from the folder `local`.

    Raises:
        UserError: a file is missing there, or is not what it should be.
    """
    folder = Path(lm_eval.tasks.__file__).parent / benchmark.definitions
    manager = TaskManager(include_path=folder, include_defaults=False)
    members = manager.task_index[benchmark.task].cfg["task"]  # of a group; or its own name
    for name in ([members] if isinstance(members, str) else members) if local else ():
        entry = manager.task_index[name]
        config = load_yaml(entry.yaml_path, resolve_func=True)
        entry.cfg = config | local_data(config, Path(local), benchmark)
        entry.yaml_path = None  # or it would be read again
    return manager


# What a split may be called in files. C-Eval and CMMLU have five solved examples of each subject
# as "dev"; others call their validation data so.
ALIASES = {"validation": ("validation", "valid", "val", "dev"), "val": ("val", "validation")}
# Where a split may lie in its benchmark's folder, as the Hub has it or as its authors do.
OF_A_PART = """{part}/{split}-*.parquet {part}/{split}.* {split}/{part}.* {split}/{part}_{split}.*
    {part}_{split}.* {part}/{part}-{split}.* data/{part}/{split}.*""".split()
ALONE = """{split}-*.parquet {split}.* data/{split}-*.parquet data/{split}.*
    plain_text/{split}-*.parquet *_{split}.*""".split()


def local_data(config: dict[str, Any], local: Path, benchmark: Benchmark) -> dict[str, Any]:
    """What in a task's config makes it read the files that lie in a folder, with the columns that
    they have on the Hub."""
    part = config.get("dataset_name") or ""  # the subject; or such as ARC-Easy, or main
    kinds = ("test_split", "validation_split", "training_split", "fewshot_split")
    names = {kind: config[kind] for kind in kinds if config.get(kind)}
    needed = {names.get("test_split") or names["validation_split"], names.get("fewshot_split")}
    data = {}
    for split in set(names.values()):
        files = find_files(local, benchmark, part, ALIASES.get(split, (split,)))
        if files:
            try:
                rows = [as_on_the_hub(row) for file in files for row in read_rows(file)]
                data[split] = Dataset.from_list(rows)
            except (OSError, ValueError, KeyError, TypeError) as error:  # pyarrow's are ValueErrors
                why = f"{files[0]} is not a file of {benchmark.title}: {error}"
                raise UserError(why) from error
        elif split in needed:
            place = local / benchmark.folders[0] / part / f"{split}.jsonl"
            raise UserError(
                f"--local lacks {benchmark.title}: {place} should be a file, or the same as .csv "
                "or .parquet"
            )
    absent = {kind: None for kind, split in names.items() if split not in data}
    return absent | {"custom_dataset": lambda **_: data}


def find_files(local: Path, benchmark: Benchmark, part: str, names: tuple[str, ...]) -> list[Path]:
    """The files of a split, in order; none if it is not there."""
    patterns = (OF_A_PART if part else []) + (ALONE if part in ("", "main") else [])
    for folder in (local / name for name in benchmark.folders):
        files = {
            path.relative_to(folder).as_posix().lower(): path
            for path in sorted(folder.rglob("*.*"))
            if path.suffix in (".parquet", ".jsonl", ".csv")
        }
        for pattern in patterns:
            for name in names:
                wanted = pattern.format(part=part, split=name).lower()
                if found := [path for place, path in files.items() if fnmatch(place, wanted)]:
                    return found
    return []


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    if file.suffix == ".parquet":
        yield from pyarrow.parquet.read_table(file).to_pylist()
        return
    with open(file, encoding="utf-8-sig", newline="") as lines:
        rows = list(csv.DictReader(lines) if file.suffix == ".csv" else map(json.loads, lines))
    labels = file.with_name(f"{file.stem}-labels.lst")  # PIQA's answers
    if labels.exists():
        answers = labels.read_text(encoding="utf-8").split()
        rows = [row | {"label": int(a)} for row, a in zip(rows, answers, strict=True)]
    yield from rows


def as_on_the_hub(row: dict[str, Any]) -> dict[str, Any]:
    """The question of ARC and OpenBookQA in columns; their authors' files nest it."""
    question = row.get("question")
    if not isinstance(question, dict):
        return row
    choices = {what: [each[what] for each in question["choices"]] for what in ("text", "label")}
    stem = question["stem"]
    return row | {"question": stem, "question_stem": stem, "choices": choices}


def evaluate(
    model: "HarnessModel",
    benchmark: Benchmark,
    manager: TaskManager,
    *,
    shots: int | None = None,
    limit: int | None = None,
    chat_template: bool = False,
) -> dict[str, Any]:
    """A model's figures on a benchmark: the one quoted most and its standard error, and all.

    The chance level is what guessing gives: one over the number of answers, averaged over the
    questions; 0 where an answer is to be written.
    """
    found = lm_eval.simple_evaluate(
        model,
        tasks=[benchmark.task],
        task_manager=manager,
        num_fewshot=benchmark.shots if shots is None else shots,
        limit=limit,
        apply_chat_template=chat_template,
    )
    figures = {
        name: float(value)
        for name, value in found["results"][benchmark.task].items()
        if "," in name and value != "N/A"
    }
    metric, _, kind = benchmark.metric.partition(",")
    kind = kind or "none"
    samples = {  # one question may be in several times, filtered in several ways
        (task, sample["doc_id"]): sample
        for task in found["samples"]
        for sample in found["samples"][task]
    }
    written = kind != "none"
    chances = [0.0 if written else 1 / len(sample["arguments"]) for sample in samples.values()]
    return {
        "title": benchmark.title,
        "metric": benchmark.metric,
        "accuracy": figures[f"{metric},{kind}"],
        "standard_error": figures.get(f"{metric}_stderr,{kind}"),
        "chance": sum(chances) / len(chances),
        "questions": len(samples),
        "shots": benchmark.shots if shots is None else shots,
        "figures": figures,
        "subjects": {
            task: found["results"][task][f"{metric},{kind}"]
            for task in found["samples"]
            if task != benchmark.task
        },
    }


# -- models ----------------------------------------------------------------------------------------


class HarnessModel(TemplateLM):
    """A MiniMind or any other causal model, as the harness asks it: how likely is a continuation
    of a context, and what does it write?"""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 16,
        longest: int = 2048,
    ):
        """
        Args:
            longest: tokens of context and continuation at most; what is before them is left out.
        """
        super().__init__()
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        positions = getattr(model.config, "max_position_embeddings", None) or longest
        self.max_length = min(positions, longest)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Control tokens are read as such: a chat template writes them."""
        bos = self.tokenizer.bos_token  # which the template may have written already
        if add_special_tokens is None:
            add_special_tokens = not (bos and string.startswith(bos))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """log p of each continuation, and whether it is what greedy decoding would write.

        What the model reads is everything but the last token, so that the answers A, B, C and D to
        a question are one row. Rows of about the same length share a batch, the longest first.
        """
        rows = defaultdict(list)  # what the model reads → the requests that it answers
        for number, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise UserError(
                    f"an answer has {len(continuation)} tokens, and the model {self.max_length}"
                )
            read = (context + continuation)[:-1][-self.max_length :]
            rows[tuple(read)].append((number, continuation))
        order = sorted(rows, key=len, reverse=True)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        bar = tqdm(total=len(requests), desc="log-likelihoods", disable=disable_tqdm, leave=False)
        for at in range(0, len(order), self.batch_size):
            batch = order[at : at + self.batch_size]
            # padding stands behind the text, where causal attention does not see it
            ids = torch.zeros(len(batch), len(batch[0]), dtype=torch.long)
            for row, read in enumerate(batch):
                ids[row, : len(read)] = torch.tensor(read)
            logits = self.model(ids.to(self.model.device), use_cache=False).logits  # [B, T, V]
            for row, read in enumerate(batch):
                for number, continuation in rows[read]:
                    begin = len(read) - len(continuation)
                    log_probs = logits[row, begin : len(read)].float().log_softmax(-1)  # [n, V]
                    tokens = torch.tensor(continuation, device=log_probs.device)
                    likeliest = bool((log_probs.argmax(-1) == tokens).all())
                    total = log_probs.gather(1, tokens[:, None]).sum().item()
                    answers[number] = total, likeliest
                bar.update(len(rows[read]))
        bar.close()
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        raise NotImplementedError("scripts/eval_ppl.py measures whole texts")

    @torch.inference_mode()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, until a stop string, greedily."""
        engine = Engine(self.model, slots=self.batch_size, prefill_tokens=None)
        texts = []
        for request in requests:
            context, settings = request.args
            most = settings.get("max_gen_toks", 256)
            temperature = settings.get("temperature", 0.0) if settings.get("do_sample") else 0.0
            until = settings.get("until") or []
            texts.append(TextStream(self.tokenizer, [until] if isinstance(until, str) else until))
            prompt = self.tok_encode(context)[-(self.max_length - most) :]
            sampling = Sampling(max_new_tokens=most, temperature=temperature)
            engine.submit(Request(prompt, sampling, len(texts), text=texts[-1]))
        bar = tqdm(total=len(requests), desc="answers", disable=disable_tqdm, leave=False)
        while engine.busy:
            ended = [request for request in engine.step() if request.finish_reason]
            bar.update(len(ended))
        bar.close()
        return [text.text for text in texts]
