"""`make demo` from end to end, with a few steps only."""

import json
from types import SimpleNamespace

import pytest

from model.errors import UserError
from scripts.runs import demo, demo_lora
from trainer import train_pretrain


@pytest.mark.slow
def test_the_demo_leaves_a_model_curves_and_a_report(tmp_path, capsys):
    args = demo.Args(
        output=str(tmp_path / "demo"),
        report=str(tmp_path / "report.json"),
        device="cpu",
        max_steps=2,
        questions=3,
    )
    demo.main(args)
    report = json.loads((tmp_path / "report.json").read_text())
    assert {"seconds", "parameters", "eval_bpb", "skills", "skills_mean"} <= report.keys()
    assert len(report["skills"]) == 13
    assert report["skills_mean"] == pytest.approx(sum(report["skills"].values()) / 13)
    assert 0 <= report["textbook_accuracy"] <= 1 and report["eval_bpb"] > 1
    made = {path.name for path in (tmp_path / "demo").iterdir()}
    assert {"pretrain_192.pth", "full_sft_192.pth", "demo_losses.png", "data"} <= made
    printed = capsys.readouterr().out
    assert "$ python trainer/train_pretrain.py --data_path" in printed
    assert "held-out questions, exactly right" in printed

    more = demo_lora.Args(output=args.output, device="cpu", max_steps=2, questions=3)
    demo_lora.main(more)
    report = json.loads((tmp_path / "demo" / "lora_report.json").read_text())
    for side in ("without", "with"):
        assert set(report[side]) == {"persona", "persona_trained", "skills_mean", "textbook"}
        assert all(0 <= share <= 1 for share in report[side].values())
    assert (tmp_path / "demo" / "lora" / "lora_identity_192.pth").exists()


def test_the_persona_needs_the_demo(tmp_path):
    with pytest.raises(UserError, match="full_sft_192.pth"):
        demo_lora.main(demo_lora.Args(output=str(tmp_path), device="cpu"))


def test_tests_are_grouped_by_skill(tmp_path):
    rows = [{"skill": skill, "prompt": "p", "answer": "a"} for skill in ("x", "y", "x")]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "skills_test.jsonl").write_text(lines)
    (tmp_path / "textbook_test.jsonl").write_text(lines)
    counts = {name: len(rows) for name, rows in demo.held_out_tests(tmp_path).items()}
    assert counts == {"x": 2, "y": 1, "textbook": 3}
    assert len(demo.held_out_tests(tmp_path, limit=1)["x"]) == 1


def test_a_training_gets_its_share_of_the_time_that_is_left(tmp_path, monkeypatch):
    asked = []

    def main(args):
        asked.append((args.minutes, args.max_steps))
        return {"stopped": False}

    stage = SimpleNamespace(Args=train_pretrain.Args, main=main, __file__="train_toy.py")
    monkeypatch.setattr(demo.time, "time", lambda: 1000.0)
    args = demo.Args(output=str(tmp_path))
    for until, share in ((1240.0, 1.0), (1240.0, 0.3), (900.0, 1.0), (None, 1.0)):
        demo.train(demo.Console(), "toy", stage, "--data_path x", until, share, args)
    args.max_steps = 5
    demo.train(demo.Console(), "toy", stage, "--data_path x", 1240.0, 1.0, args)
    assert asked == [(4.0, 0), (1.2, 0), (0.2, 0), (0.0, 0), (0.0, 5)]
