"""Adapters to lm-evaluation-harness: MiniMind as its model, and benchmarks from a local folder.
The command is scripts/eval_benchmark.py.
"""

import csv
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

from dataset.jsonl import load_rows
from model.errors import UserError
from model.inference.engine import Engine, Request
from model.inference.sampling import SamplingParams
from model.inference.streaming import StreamingDetokenizer

# -- benchmarks ------------------------------------------------------------------------------------


class Benchmark(NamedTuple):
    title: str
    task: str  # name in the harness; of C-Eval and CMMLU the group of all subjects
    definitions: str  # folder of its definition in the harness
    folders: tuple[str, ...]  # accepted names of its folder in --local
    metric: str  # the metric that is usually reported
    num_fewshot: int = 0  # default number of examples before each question


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
    "gsm8k": Benchmark("GSM8K", "gsm8k", "gsm8k", ("gsm8k",), "exact_match,strict-match", 5),
}


def make_task_manager(benchmark: Benchmark, local: str = "") -> TaskManager:
    """The harness's tasks of a benchmark, with questions from the Hugging Face Hub, or from the
    folder `local`.

    Raises:
        UserError: a file is missing there, or has the wrong content.
    """
    folder = Path(lm_eval.tasks.__file__).parent / benchmark.definitions
    manager = TaskManager(include_path=folder, include_defaults=False)
    members = manager.task_index[benchmark.task].cfg["task"]  # of a group; otherwise its own name
    for name in ([members] if isinstance(members, str) else members) if local else ():
        entry = manager.task_index[name]
        config = load_yaml(entry.yaml_path, resolve_func=True)
        entry.cfg = config | local_data(config, Path(local), benchmark)
        entry.yaml_path = None  # otherwise the harness reads the file again
    return manager


# Accepted names of a split in files. In C-Eval and CMMLU "dev" is a split of its own, with five
# examples of each subject; elsewhere it is another name of the validation split.
SPLIT_ALIASES = {"validation": ("validation", "valid", "val", "dev"), "val": ("val", "validation")}
# Where the file of a split may be in the folder of its benchmark: as on the Hub, or as published.
PART_PATTERNS = """{part}/{split}-*.parquet {part}/{split}.* {split}/{part}.*
    {split}/{part}_{split}.* {part}_{split}.* {part}/{part}-{split}.*
    data/{part}/{split}.*""".split()
PLAIN_PATTERNS = """{split}-*.parquet {split}.* data/{split}-*.parquet data/{split}.*
    plain_text/{split}-*.parquet *_{split}.*""".split()


def local_data(config: dict[str, Any], local: Path, benchmark: Benchmark) -> dict[str, Any]:
    """Changes of a task's config that make it read local files, with the columns that they have on
    the Hub."""
    part = config.get("dataset_name") or ""  # a subject, or a configuration such as ARC-Easy, main
    kinds = ("test_split", "validation_split", "training_split", "fewshot_split")
    names = {kind: config[kind] for kind in kinds if config.get(kind)}
    needed = {names.get("test_split") or names["validation_split"], names.get("fewshot_split")}
    data = {}
    for split in set(names.values()):
        files = find_files(local, benchmark, part, SPLIT_ALIASES.get(split, (split,)))
        if files:
            try:
                rows = [to_hub_columns(row) for file in files for row in read_rows(file)]
                data[split] = Dataset.from_list(rows)
            except (
                OSError,
                ValueError,
                KeyError,
                TypeError,
            ) as error:  # pyarrow's errors are ValueErrors
                raise UserError(
                    f"{files[0]} is not a file of {benchmark.title}: {error}"
                ) from error
        elif split in needed:
            path = local / benchmark.folders[0] / part / f"{split}.jsonl"
            raise UserError(
                f"--local lacks {benchmark.title}: {path} should exist, or the same file as .csv "
                "or .parquet"
            )
    absent = {kind: None for kind, split in names.items() if split not in data}
    return absent | {"custom_dataset": lambda **_: data}


def find_files(local: Path, benchmark: Benchmark, part: str, splits: tuple[str, ...]) -> list[Path]:
    """The files of a split, in order; none if there are none."""
    patterns = (PART_PATTERNS if part else []) + (PLAIN_PATTERNS if part in ("", "main") else [])
    for folder in (local / name for name in benchmark.folders):
        files = {
            path.relative_to(folder).as_posix().lower(): path
            for path in sorted(folder.rglob("*.*"))
            if path.suffix in (".parquet", ".jsonl", ".csv")
        }
        for pattern in patterns:
            for split in splits:
                wanted = pattern.format(part=part, split=split).lower()
                if found := [path for name, path in files.items() if fnmatch(name, wanted)]:
                    return found
    return []


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    if file.suffix == ".parquet":
        yield from pyarrow.parquet.read_table(file).to_pylist()
        return
    if file.suffix == ".csv":
        with open(file, encoding="utf-8-sig", newline="") as lines:
            rows = list(csv.DictReader(lines))
    else:
        rows = load_rows(file)
    labels = file.with_name(f"{file.stem}-labels.lst")  # PIQA's answers
    if labels.exists():
        answers = labels.read_text(encoding="utf-8").split()
        rows = [row | {"label": int(a)} for row, a in zip(rows, answers, strict=True)]
    yield from rows


def to_hub_columns(row: dict[str, Any]) -> dict[str, Any]:
    """A row of ARC or OpenBookQA with the Hub's columns; the published files nest the question."""
    question = row.get("question")
    if not isinstance(question, dict):
        return row
    choices = {key: [choice[key] for choice in question["choices"]] for key in ("text", "label")}
    stem = question["stem"]
    return row | {"question": stem, "question_stem": stem, "choices": choices}


def evaluate(
    model: "HarnessModel",
    benchmark: Benchmark,
    manager: TaskManager,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    chat_template: bool = False,
) -> dict[str, Any]:
    """Evaluate a model on a benchmark.

    Returns:
        accuracy (the benchmark's usual metric) with standard error, all "metrics", and the accuracy
        of guessing as "chance": one over the number of answers, averaged over the questions; 0
        where the model writes the answer.
    """
    if num_fewshot is None:
        num_fewshot = benchmark.num_fewshot
    output = lm_eval.simple_evaluate(
        model,
        tasks=[benchmark.task],
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=chat_template,
    )
    metrics = {
        name: float(value)
        for name, value in output["results"][benchmark.task].items()
        if "," in name and value != "N/A"
    }
    metric, _, filter_name = benchmark.metric.partition(",")
    filter_name = filter_name or "none"
    samples = {  # a question is in once for each filter of its answer
        (task, sample["doc_id"]): sample
        for task in output["samples"]
        for sample in output["samples"][task]
    }
    is_generated = filter_name != "none"
    chances = [0.0 if is_generated else 1 / len(sample["arguments"]) for sample in samples.values()]
    return {
        "title": benchmark.title,
        "metric": benchmark.metric,
        "accuracy": metrics[f"{metric},{filter_name}"],
        "standard_error": metrics.get(f"{metric}_stderr,{filter_name}"),
        "chance": sum(chances) / len(chances),
        "questions": len(samples),
        "shots": num_fewshot,
        "metrics": metrics,
        "subjects": {
            task: output["results"][task][f"{metric},{filter_name}"]
            for task in output["samples"]
            if task != benchmark.task
        },
    }


# -- models ----------------------------------------------------------------------------------------


class HarnessModel(TemplateLM):
    """A causal model for the harness: log-likelihoods of continuations, and greedy generation."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 16,
        max_length: int = 2048,
    ):
        """
        Args:
            max_length: of context and continuation, in tokens; the context is cut from the left.
        """
        super().__init__()
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        positions = getattr(model.config, "max_position_embeddings", None) or max_length
        self.max_length = min(positions, max_length)

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
        """Special tokens in the text are encoded as such: chat templates write them."""
        bos = self.tokenizer.bos_token
        if add_special_tokens is None:  # the template may have written BOS already
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
            open_thinking=False,  # the answer is compared from its first token on
            enable_thinking=False,
        )

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """log p of each continuation, and whether it is what greedy decoding would generate.

        The last token is predicted, but not an input, so that the answers A, B, C and D to a
        question share one input. Inputs of about the same length share a batch, the longest first.
        """
        requests_of = defaultdict(list)  # input → its (index, continuation)s
        for number, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise UserError(
                    f"an answer has {len(continuation)} tokens, more than the {self.max_length} "
                    "of the model"
                )
            inputs = (context + continuation)[:-1][-self.max_length :]
            requests_of[tuple(inputs)].append((number, continuation))
        order = sorted(requests_of, key=len, reverse=True)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        bar = tqdm(total=len(requests), desc="log-likelihoods", disable=disable_tqdm, leave=False)
        for at in range(0, len(order), self.batch_size):
            batch = order[at : at + self.batch_size]
            # padding on the right: with causal attention no token sees it
            ids = torch.zeros(len(batch), len(batch[0]), dtype=torch.long)
            for row, inputs in enumerate(batch):
                ids[row, : len(inputs)] = torch.tensor(inputs)
            logits = self.model(ids.to(self.model.device), use_cache=False).logits  # [B, T, V]
            for row, inputs in enumerate(batch):
                for number, continuation in requests_of[inputs]:
                    # logits at t predict t + 1: the last inputs predict the continuation
                    start = len(inputs) - len(continuation)
                    log_probs = logits[row, start : len(inputs)].float().log_softmax(-1)  # [n, V]
                    tokens = torch.tensor(continuation, device=log_probs.device)
                    is_greedy = bool((log_probs.argmax(-1) == tokens).all())
                    total = log_probs.gather(1, tokens[:, None]).sum().item()
                    answers[number] = total, is_greedy
                bar.update(len(requests_of[inputs]))
        bar.close()
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        raise NotImplementedError("scripts/eval_ppl.py evaluates whole texts")

    @torch.inference_mode()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The generated text after each context, up to a stop string; greedy unless do_sample."""
        engine = Engine(self.model, slots=self.batch_size, prefill_tokens=None)
        texts = []
        for request in requests:
            context, settings = request.args
            max_new_tokens = settings.get("max_gen_toks", 256)
            temperature = settings.get("temperature", 0.0) if settings.get("do_sample") else 0.0
            until = settings.get("until") or []
            texts.append(
                StreamingDetokenizer(self.tokenizer, [until] if isinstance(until, str) else until)
            )
            prompt = self.tok_encode(context)[-(self.max_length - max_new_tokens) :]
            sampling = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature)
            engine.submit(Request(prompt, sampling, len(texts), detokenizer=texts[-1]))
        bar = tqdm(total=len(requests), desc="answers", disable=disable_tqdm, leave=False)
        while engine.busy:
            ended = [request for request in engine.step() if request.finish_reason]
            bar.update(len(ended))
        bar.close()
        return [text.text for text in texts]
