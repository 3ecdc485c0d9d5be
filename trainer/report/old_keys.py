"""Logs of before: their keys, and how they are read."""

from collections.abc import Iterable
from functools import cache
from typing import Any

# Keys of logs until 2026-11 → today's, which trl and transformers use too.
OLD_KEYS = {
    "lr": "learning_rate",
    "tokens": "num_tokens",
    "changed_share": "changed_fraction",
    "flat_groups": "frac_reward_zero_std",
    "length": "completions/mean_length",
    "empty": "completions/empty_ratio",
    "moved": "approx_kl",
    "clipped": "clip_fraction",
    "calls": "tools/call_frequency",
}
OLD_STAGE_KEYS = {
    "dpo": {
        "accuracy": "rewards/accuracies",
        "margin": "rewards/margins",
        "chosen_reward": "rewards/chosen",
        "rejected_reward": "rewards/rejected",
    },
    "ppo": {"value": "critic_value"},
    "spo": {"value": "tracker_value"},
}


def with_new_keys(records: Iterable[dict[str, Any]], stage: str) -> list[dict[str, Any]]:
    """Records of a stage's log, with today's keys."""
    stage = stage.split("/")[-1]  # lora/dpo
    found = []
    for record in records:
        new = {new_key(key, stage): value for key, value in record.items()}
        for prefix in ("", "eval_"):
            if f"{prefix}finished" in new:  # the share that ended, and now the share that was cut
                new[f"{prefix}completions/clipped_ratio"] = 1 - new.pop(f"{prefix}finished")
        found.append(new)
    return found


@cache
def new_key(key: str, stage: str) -> str:
    """Today's name of a metric: val_loss → eval_loss, recipe_val_bpb → recipe_eval_bpb."""
    for old, new in (("recipe_", "recipe_"), ("val_", "eval_")):
        if key.startswith(old):
            return new + new_key(key.removeprefix(old), stage)
    if key.startswith("reward_") and key != "reward_failed":
        return f"rewards/{key.removeprefix('reward_')}/mean"
    return OLD_STAGE_KEYS.get(stage, {}).get(key) or OLD_KEYS.get(key, key)


# -- checkpoints -----------------------------------------------------------------------------------

# Names of a checkpoint's parts until 2026-11: read for one version more.
OLD_PARTS = {
    "random": "rng_states",
    "records": "history",
    "identity": "fingerprint",
    "rows_per_update": "global_batch_size",
    "beside": "extra_state",
}


def upgrade(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint with today's names."""
    if "identity" not in checkpoint:
        return checkpoint
    new = {OLD_PARTS.get(name, name): part for name, part in checkpoint.items()}
    names = {"rows_seen": "samples_seen", "changed": "changed_fraction"}
    new["progress"] = {names.get(n, n): value for n, value in new["progress"].items()}
    stage = new["fingerprint"].get("stage", "")
    new["history"] = with_new_keys(new["history"], stage)
    (evaluation,) = with_new_keys([new["progress"]["evaluation"]], stage)
    new["progress"]["evaluation"] = evaluation
    pending = new.pop("pending")
    names = ("steps", "tokens", "seconds", "expert_load")
    new["metrics"] = {name: pending[name] for name in names if name in pending}
    # other metrics since the last log line were means, which sums and counts cannot continue
    new["metrics"] |= {"sums": {}, "loss_sum": pending["loss"]}
    for optimizer in new["optimizer"]:
        for state in optimizer["state"].values():
            if "average" in state:
                state["momentum_buffer"] = state.pop("average")
    return new
