"""Benchmarks by the harness: its log-likelihoods of our models, and its metrics, by hand."""

import csv
import json
import shutil
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from peers import peer_with_weights

from model.command_line import parse_arguments
from model.errors import UserError
from model.weights import ROOT, load_model
from scripts import eval_benchmark

harness = pytest.importorskip(
    "scripts.evaluation.harness", reason="pip install -r requirements-eval.txt"
)
from lm_eval.api.instance import Instance  # noqa: E402

PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " London, of all places"),
    ("The capital of France is ", "Rome"),  # the space belongs to what follows
    ("问：一加一等于几？\nA. 1\nB. 2\n答案：", "A"),
    ("问：一加一等于几？\nA. 1\nB. 2\n答案：", "B"),
    ("", "From nothing"),
    ("<|im_start|>user\nhi<|im_end|>\n", "hello"),
    ("one two three four five six seven eight nine " * 40, "ten"),  # longer than 64 tokens
]


def requests(kind: str, pairs) -> list[Instance]:
    return [Instance(kind, {}, pair, n) for n, pair in enumerate(pairs)]


@pytest.mark.parametrize("fields", [{}, {"use_moe": True}], ids=["dense", "moe"])
def test_log_likelihoods_are_those_of_the_exported_model(make_model, tokenizer, fields):
    from lm_eval.models.huggingface import HFLM

    model = make_model(vocab_size=len(tokenizer), **fields)
    peer = peer_with_weights(model).eval()
    theirs = HFLM(peer, tokenizer=tokenizer, device="cpu", batch_size=1, max_length=64)
    expected = theirs.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    for batch_size in (1, 3, 8):
        ours = harness.HarnessModel(model, tokenizer, batch_size, max_length=64)
        found = ours.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
        assert [total for total, _ in found] == pytest.approx([t for t, _ in expected], abs=2e-3)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_answers_with_the_same_context_are_one_row(make_model, tokenizer, monkeypatch):
    model = make_model(vocab_size=len(tokenizer))
    rows, forward = [], model.forward
    monkeypatch.setattr(
        model, "forward", lambda ids, **more: rows.append(len(ids)) or forward(ids, **more)
    )
    ours = harness.HarnessModel(model, tokenizer)
    pairs = [("问：\n答案：", letter) for letter in "ABCD"]
    ours.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    assert rows == [1]


def test_it_writes_what_greedy_decoding_writes_until_a_stop_string(make_model, tokenizer):
    model = make_model(vocab_size=len(tokenizer))
    prompt = "Question: 1 + 1 ="
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.inference_mode():
        reply = peer_with_weights(model).generate(ids, max_new_tokens=20, do_sample=False)
    whole = tokenizer.decode(reply[0, ids.shape[1] :], skip_special_tokens=True)
    stop = whole[10:13]
    ours = harness.HarnessModel(model, tokenizer)
    settings = {"max_gen_toks": 20, "do_sample": False}
    asked = [(prompt, settings | {"until": []}), (prompt, settings | {"until": [stop]})]
    found = ours.generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert found == [whole, whole[: whole.index(stop)]]


# -- benchmarks in a folder ------------------------------------------------------------------------


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_csv(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def subjects(task: str) -> list[str]:
    manager = harness.make_task_manager(harness.BENCHMARKS[task])
    names = manager.task_index[harness.BENCHMARKS[task].task].cfg["task"]
    return [manager.task_index[name].cfg["dataset_name"] for name in names]


WORDS = "apple river seven quickly 春天 blue".split()


@pytest.fixture
def local(tmp_path) -> Path:
    """Stand-ins for all the benchmarks, in the formats in which they are published."""
    folder = tmp_path / "local"
    exam = dict(A="1", B="2", C="3", D="4")
    for subject in subjects("ceval"):  # as its authors' .zip
        row = {"id": "0", "question": f"{subject}？", **exam, "answer": "B"}
        write_csv(folder / f"ceval-exam/val/{subject}_val.csv", [row])
        write_csv(folder / f"ceval-exam/dev/{subject}_dev.csv", [row | {"explanation": ""}] * 5)
    for subject in subjects("cmmlu"):
        row = {"": "0", "Question": f"{subject}？", **exam, "Answer": "C"}
        for split in ("test", "dev"):
            write_csv(folder / f"cmmlu/{split}/{subject}.csv", [row])
    asked = []
    for n in range(12):
        texts = [f"{WORDS[(n + i) % 6]} {WORDS[(n * i) % 6]}" for i in range(3 + n % 2)]
        labels = ["A", "B", "C", "D"][: len(texts)]
        asked.append((f"What is number {n}", texts, labels, "ABC"[n % 3]))
    hub = [
        {"question_stem": q, "choices": {"text": t, "label": which}, "answerKey": a}
        for q, t, which, a in asked
    ]
    (folder / "openbookqa/main").mkdir(parents=True)
    table = pyarrow.Table.from_pylist(hub)
    pyarrow.parquet.write_table(table, folder / "openbookqa/main/test-00000-of-00001.parquet")
    nested = [  # as AI2 publishes ARC
        {
            "question": {
                "stem": q,
                "choices": [{"text": t, "label": w} for t, w in zip(texts, labels, strict=True)],
            },
            "answerKey": a,
        }
        for q, texts, labels, a in asked
    ]
    write_lines(folder / "ai2_arc/ARC-Easy/ARC-Easy-Test.jsonl", nested)
    flat = [{"question": row["question_stem"], **row} for row in hub]
    write_lines(folder / "ai2_arc/ARC-Challenge/test.jsonl", flat)
    endings = [f"{word} [title] it." for word in WORDS[:4]]
    swag = dict(ind=1, activity_label="Cooking", ctx_a="A man", ctx_b="he", endings=endings)
    write_lines(
        folder / "hellaswag/hellaswag_val.jsonl", [swag | {"label": n % 4} for n in range(6)]
    )
    goals = [{"goal": f"To open {w}", "sol1": f"push {w}", "sol2": "pull"} for w in WORDS]
    write_lines(folder / "piqa/valid.jsonl", goals)
    (folder / "piqa/valid-labels.lst").write_text("0\n1\n1\n0\n1\n0\n")
    sums = [{"question": f"{n} + 1?", "answer": f"So.\n#### {n + 1}"} for n in range(8)]
    write_lines(folder / "gsm8k/test.jsonl", sums[:4])
    write_lines(folder / "gsm8k/train.jsonl", sums)
    return folder


def likelihood(model, tokenizer, context: str, answer: str) -> float:
    """log p of an answer, alone and by hand."""
    context = tokenizer.encode(context)
    whole = torch.tensor([context + tokenizer.encode(" " + answer)])
    with torch.inference_mode():
        log_probs = model(whole).logits[0].log_softmax(-1)
    return sum(log_probs[at - 1, whole[0, at]].item() for at in range(len(context), whole.shape[1]))


@pytest.mark.slow
def test_accuracies_are_those_counted_by_hand(local, save, tokenizer, tmp_path, monkeypatch):
    path = save(hidden_size=32)
    replies = ["#### 1", "So 2.\n#### 2", "#### 4", "four"]  # two of four are right
    monkeypatch.setattr(harness.HarnessModel, "generate_until", lambda self, asked: replies)
    args = eval_benchmark.Args(
        weight=[str(path)],
        local=str(local),
        device="cpu",
        json=str(tmp_path / "a.json"),
        plot=str(tmp_path / "a.png"),
        tasks=["ceval", "openbookqa", "arc", "hellaswag", "piqa", "gsm8k"],
    )
    eval_benchmark.main(args)
    report = json.loads((tmp_path / "a.json").read_text())
    (model,) = report["models"]
    results = model["results"]
    own = peer_with_weights(load_model(path, tokenizer=tokenizer)).eval()
    assert model["parameters"] == sum(p.numel() for p in own.parameters())

    right = byte_right = 0
    file = local / "openbookqa/main/test-00000-of-00001.parquet"
    questions = pyarrow.parquet.read_table(file).to_pylist()
    for row in questions:
        texts = row["choices"]["text"]
        scores = [likelihood(own, tokenizer, row["question_stem"], text) for text in texts]
        correct = row["choices"]["label"].index(row["answerKey"])
        right += scores.index(max(scores)) == correct
        per = [score / len(text) for score, text in zip(scores, texts, strict=True)]
        byte_right += per.index(max(per)) == correct
    found = results["openbookqa"]
    assert found["metrics"]["acc,none"] == pytest.approx(right / 12)
    p = byte_right / 12
    assert found["accuracy"] == found["metrics"]["acc_norm,none"] == pytest.approx(p)
    assert found["standard_error"] == pytest.approx((p * (1 - p) / 11) ** 0.5)
    assert found["chance"] == pytest.approx((6 / 3 + 6 / 4) / 12)
    assert results["arc_easy"]["questions"] == results["arc_challenge"]["questions"] == 12
    assert results["arc_easy"]["accuracy"] == results["arc_challenge"]["accuracy"]  # the same

    labels, right = (local / "piqa/valid-labels.lst").read_text().split(), 0
    for line, label in zip((local / "piqa/valid.jsonl").open(), labels, strict=True):
        row = json.loads(line)
        context = f"Question: {row['goal']}\nAnswer:"
        scores = [likelihood(own, tokenizer, context, row[name]) for name in ("sol1", "sol2")]
        right += scores.index(max(scores)) == int(label)
    assert results["piqa"]["metrics"]["acc,none"] == pytest.approx(right / 6)

    assert results["gsm8k"]["accuracy"] == 2 / 4 and results["gsm8k"]["chance"] == 0
    assert len(results["ceval"]["subjects"]) == results["ceval"]["questions"] == 52
    assert results["ceval"]["accuracy"] == sum(results["ceval"]["subjects"].values()) / 52
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")

    again = eval_benchmark.main(
        eval_benchmark.Args(**{**vars(args), "tasks": ["piqa"], "compare": [args.json], "json": ""})
    )
    assert again["models"][0]["results"]["piqa"] == results["piqa"]


def test_cmmlu_in_a_folder(local):
    tasks = harness.make_task_manager(harness.BENCHMARKS["cmmlu"], str(local)).load(["cmmlu"])[
        "tasks"
    ]
    asked = {task.config.dataset_name: [*task.test_docs()["Question"]] for task in tasks.values()}
    assert asked == {subject: [f"{subject}？"] for subject in subjects("cmmlu")}
    assert len(asked) == 67


# -- mistakes --------------------------------------------------------------------------------------


def test_a_benchmark_that_is_not_there(tmp_path):
    args = eval_benchmark.Args(tasks=["piqa"], local=str(tmp_path))
    with pytest.raises(UserError, match="--local lacks PIQA: .*piqa/validation.jsonl should exist"):
        eval_benchmark.main(args)


def test_what_cannot_be_had_is_left_out_if_asked(local, save, tmp_path, capsys):
    shutil.rmtree(local / "openbookqa")
    usual = dict(weight=[str(save(hidden_size=32))], device="cpu", plot=str(tmp_path / "a.png"))
    tasks = dict(tasks=["openbookqa", "piqa"], skip_missing=True)
    report = eval_benchmark.main(eval_benchmark.Args(local=str(local), **usual, **tasks))
    assert list(report["models"][0]["results"]) == ["piqa"]
    assert "left out: --local lacks OpenBookQA" in capsys.readouterr().out
    with pytest.raises(UserError, match="none of these benchmarks can be had"):
        eval_benchmark.main(eval_benchmark.Args(local=str(tmp_path), **usual, **tasks))


def test_a_benchmark_that_is_something_else(local):
    (local / "gsm8k/test.jsonl").write_text("no json\n")
    args = eval_benchmark.Args(tasks=["gsm8k"], local=str(local))
    with pytest.raises(UserError, match="line 1 of .*test.jsonl is not JSON"):
        eval_benchmark.main(args)


def test_without_the_harness_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "scripts.evaluation.harness")
    monkeypatch.delattr("scripts.evaluation.harness", raising=False)
    with pytest.raises(UserError, match="pip install -r requirements-eval.txt"):
        eval_benchmark.main(eval_benchmark.Args(tasks=["piqa"]))
    assert (ROOT / "requirements-eval.txt").exists()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"tasks": ["mmlu"]}, "--tasks mmlu is unknown; known are ceval"),
        ({"limit": -1}, "--limit must not be negative"),
        ({"compare": ["/none.json"]}, "is not a file written by --json"),
    ],
)
def test_mistakes_are_told(settings, told):
    def listed(value) -> list[str]:
        return list(map(str, value if isinstance(value, list) else [value]))

    with pytest.raises(UserError, match=told):
        argv = [word for name, value in settings.items() for word in (f"--{name}", *listed(value))]
        eval_benchmark.main(parse_arguments(eval_benchmark.Args, argv=argv))
