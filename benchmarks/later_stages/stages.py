"""The trainings of real_stages.py: each stage by its default flags, and what is measured after it.

Nothing is given but paths, sizes and a number of steps that takes about 15 minutes of one thread
for a base of 7M parameters.
"""

import time
from functools import partial

import numpy as np
from filelock import FileLock
from learning.held_out import evaluate_reasoning

from dataset.jsonl import load_rows
from later_stages.metrics import (
    document_losses,
    loss_metrics,
    pair_metrics,
    pair_values,
    tool_metrics,
)
from later_stages.world import (
    ANSWER_TOKENS,
    REWARDS,
    Job,
    Stage,
    World,
    changed_defaults,
    defaults_of,
    read_json,
)
from model.errors import UserError
from model.formats.lora_format import load_lora
from model.weights import load_model, load_scoring_model, write_json
from trainer.common.evaluation import completion_log_probs
from trainer.train_reward import end_scores

# -- preferences -----------------------------------------------------------------------------------


def preferences(trainer: str, count: int, world: World, job: Job) -> tuple[dict, dict]:
    """DPO and the reward model: trained on four folds, measured on the fifth."""
    flags = f"--data_path {{data}}/pairs_train_{job.part}.jsonl --from_weight {{base}}"
    steps = world.steps(count)
    result = world.train(trainer, f"{flags} {job.variant}", job.name, steps=steps)
    held, path = world.data / f"pairs_held_{job.part}.jsonl", world.weights(job.name)
    if trainer == "reward":
        scores, lengths = pair_values(load_scoring_model(path), held, end_scores)
        return pair_metrics(scores, lengths) | pair_loss(scores, 1.0), result
    model = load_model(path)
    values, lengths = pair_values(model, held, completion_log_probs)
    values = values - pair_values(world.start, held, completion_log_probs)[0]
    after = document_losses(model, world.data / "chats_held.jsonl", world.held_out)
    chats = loss_metrics("chats", world.chat_losses, after)
    return pair_metrics(values, lengths) | pair_loss(values, 0.1) | chats, result


def pair_loss(values: np.ndarray, beta: float) -> dict[str, float]:
    """−Σ log σ(β · margin), which says more of a few pairs than how many are right."""
    return {"loss_sum": float(np.logaddexp(0, -beta * (values[:, 0] - values[:, 1])).sum())}


def make_judges(world: World) -> None:
    """Two reward models, each from one half of the pairs and measured on the other: RL's reward,
    and a judge that it was not trained on. judges.json says how good they are."""
    report, result = world.out / "judges.json", {"defaults": defaults_of("reward")}
    with FileLock(world.out / "judges.lock"):  # several processes may need them
        if report.exists():
            if changed := changed_defaults(read_json(report)["defaults"]):
                raise UserError(
                    f"the reward models in {world.out} were trained with other defaults "
                    f"({', '.join(changed)}): give another --output"
                )
            return
        for half, other in ("ab", "ba"):
            flags = f"--data_path {{data}}/pairs_half_{half}.jsonl --from_weight {{base}}"
            steps = min(60, world.most_steps or 60)
            world.train("reward", flags, "reward", steps=steps, folder=world.judge(half))
            model = load_scoring_model(world.weights("reward", world.judge(half)))
            held = world.data / f"pairs_half_{other}.jsonl"
            result[half] = pair_metrics(*pair_values(model, held, end_scores))
        write_json(report, result)


# -- reinforcement learning ------------------------------------------------------------------------


def policy(trainer: str, kind: str, count: int, world: World, job: Job) -> tuple[dict, dict]:
    """PPO, GRPO, SPO against the reward model, or against a rule."""
    file = "answers" if kind else "prompts"
    flags = f"--data_path {{data}}/{file}_train.jsonl --from_weight {{base}}"
    flags += f" --max_gen_len {ANSWER_TOKENS} --epochs 99"
    if kind:
        flags += f" --reward {' '.join(REWARDS[kind])}"
    else:
        make_judges(world)
    given = dict(seed=job.part, steps=world.steps(count), folder=world.policy_folder(kind))
    result = world.train(trainer, f"{flags} {job.variant}", job.name, **given)
    model = load_model(world.weights(job.name, world.policy_folder(kind)))
    return world.policies[kind].compare(model), result


# -- fine-tuning -----------------------------------------------------------------------------------


def medical(world: World, job: Job) -> tuple[dict, dict]:
    """LoRA on medical answers; does the model keep what it knew?"""
    flags = "--data_path {data}/medical_train.jsonl --from_weight {base}"
    name = job.name
    given = dict(seed=job.part, steps=world.steps(60))
    result = world.train("lora", f"{flags} {job.variant}", name, **given)
    metrics = {}
    held = {"medical": world.data / "medical_held.jsonl", "chats": world.data / "chats_held.jsonl"}
    before = {
        name: document_losses(world.start, path, world.held_out) for name, path in held.items()
    }
    model = load_model(world.base)
    load_lora(model, world.weights(name, world.out / "weights" / "lora"))
    for name, path in held.items():
        after = document_losses(model.eval(), path, world.held_out)
        metrics |= loss_metrics(name, before[name], after)
    return metrics, result


def distillation(world: World, job: Job) -> tuple[dict, dict]:
    """A student from random weights, by its teacher (the base) and by cross-entropy alone: on the
    same tokens, and on as many as take the same CPU time."""
    width, depth = world.student
    sizes = f"--hidden_size {width} --num_hidden_layers {depth} --batch_size 32"
    common = f"--data_path {{data}}/chats_train.jsonl --from_weight none {sizes}"
    taught = f"{common} --teacher_weight {{base}} {job.variant}"
    steps, ratio = world.steps(80), cost_ratio(world, taught, common)
    losses, result = {}, {}
    for name, trainer, flags, count in (
        ("taught", "distillation", taught, steps),
        ("alone", "full_sft", common, steps),
        ("alone_longer", "full_sft", common, round(steps * ratio)),
    ):
        weights = f"{job.name}_{name}"
        done = world.train(trainer, flags, weights, seed=job.part, steps=count)
        result = result or done
        model = load_model(world.weights(weights, size=width))
        losses[name] = document_losses(model, world.data / "chats_held.jsonl", world.held_out)
    metrics = {"cost_ratio": ratio, "steps": steps, "steps_longer": round(steps * ratio)}
    for name in ("alone", "alone_longer"):
        found = loss_metrics("student", losses[name], losses["taught"])
        metrics |= {f"{name}_loss": found["student_loss_before"], "loss": found["student_loss"]}
        metrics |= {f"gain_{name}": -found["student_change"]}
        metrics |= {f"gain_{name}_se": found["student_change_se"]}
    return metrics, result


def cost_ratio(world: World, taught: str, alone: str) -> float:
    """CPU seconds of a step with the teacher, in steps without. Of two short trainings each, so
    that what both do once does not count."""
    seconds = {}
    for trainer, flags in (("distillation", taught), ("full_sft", alone)):
        for count in (2, 14):
            started = time.process_time()
            world.train(trainer, flags, f"probe_{trainer}", steps=count, resume=False)
            seconds[trainer, count] = time.process_time() - started
    steps = [seconds[name, 14] - seconds[name, 2] for name in ("distillation", "full_sft")]
    return max(1.0, steps[0] / max(1e-9, steps[1]))


def reasoning(world: World, job: Job) -> tuple[dict, dict]:
    """Grade-school problems in the think/answer form, read greedily."""
    flags = "--data_path {data}/reasoning_train.jsonl --from_weight {base}"
    given = dict(seed=job.part, steps=world.steps(110))
    result = world.train("distill_reason", f"{flags} {job.variant}", job.name, **given)
    questions = load_rows(world.data / "reasoning_held.jsonl")[: world.held_out]
    found = evaluate_reasoning(world.weights(job.name), questions, False, max_new_tokens=512)
    error = (found["format"] * (1 - found["format"]) / len(questions)) ** 0.5
    return {**found, "format_se": error, "questions": len(questions)}, result


def tool_calls(world: World, job: Job) -> tuple[dict, dict]:
    """SFT on conversations with tools: trained on four folds, measured on the fifth."""
    train = world.data / f"tools_train_{job.part}.jsonl"
    # a third of the conversations have more than 512 tokens, the calls at the end
    flags = f"--data_path {train} --from_weight {{base}} --epochs 6 --max_seq_len 1024"
    steps = world.steps(50)
    result = world.train("full_sft", f"{flags} {job.variant}", job.name, steps=steps)
    held = world.data / f"tools_held_{job.part}.jsonl"
    before = tool_metrics(world.start, held, None)
    metrics = tool_metrics(load_model(world.weights(job.name)), held, train)
    metrics |= {f"{name}_before": before[name] for name in ("well_formed", "right_name")}
    return metrics, result


# -- all -------------------------------------------------------------------------------------------

REWARD_TARGETS = {
    "gain_sd": (">=", 0.5),
    "kl": ("<=", 0.2),
    "length_fold": ("<=", 2),
    "distinct_ratio": (">=", 0.8),
    "distinct_overall_ratio": (">=", 0.5),
}
POLICIES = {"ppo": 400, "grpo": 200, "spo": 300}  # steps


def rates(*values: str, more: str = "") -> tuple[str, ...]:
    return tuple(f"--learning_rate {value}{more.format(value)}" for value in values)


SWEEPS = {
    "ppo": rates("8e-8", "3e-6", "1e-5", "3e-5", "1e-4", more=" --critic_learning_rate {}"),
    "grpo": rates("8e-8", "1e-6", "3e-6", "1e-5", "3e-5", "1e-4"),
    "spo": rates("1e-7", "3e-6", "1e-5", "3e-5", "1e-4"),
}
STAGES = {
    "reward": Stage(
        ("reward",),
        partial(preferences, "reward", 90),
        "accuracy",
        {"accuracy": (">=", 0.62)},
        rates("3e-5", "1e-4", "3e-4", "6e-4"),
        folds=True,
    ),
    "dpo": Stage(
        ("dpo",),
        partial(preferences, "dpo", 180),
        "rewards/accuracies",
        {"accuracy": (">=", 0.6), "accuracy_sigmas": (">=", 3), "chats_change": ("<=", 0.02)},
        rates("3e-6", "1e-5", "3e-5", "1e-4"),
        folds=True,
    ),
    **{
        f"{name}{kind}": Stage(
            (name,),
            partial(policy, name, kind, steps),
            "reward",
            REWARD_TARGETS | ({} if kind else {"judge_gain_sd_sigmas": (">=", 2)}),
            SWEEPS[name],
        )
        for kind in REWARDS
        for name, steps in POLICIES.items()
    },
    "lora": Stage(
        ("lora",),
        medical,
        "loss",
        {"medical_change": ("<=", -0.15), "chats_change": ("<=", 0.05)},
        rates("3e-4", "1e-3", "3e-3"),
    ),
    "distillation": Stage(
        ("distillation", "full_sft"),
        distillation,
        "loss",
        {"gain_alone_sigmas": (">=", 3), "gain_alone_longer_sigmas": (">=", 3)},
        ("--alpha 0.5", "--alpha 0.1", "--temperature 1"),
    ),
    "reason": Stage(
        ("distill_reason",),
        reasoning,
        "loss",
        {"format": (">=", 0.95)},
        rates("2e-4", "5e-4", "1e-3"),
    ),
    "tools": Stage(
        ("full_sft",),
        tool_calls,
        "loss",
        {"well_formed": (">=", 0.8), "right_name": (">=", 0.8)},
        rates("2e-4", "5e-4", "1e-3"),
        folds=True,
    ),
}
