"""The arguments that the trainers with rollouts share. Imports nothing slow."""

from dataclasses import dataclass, fields
from typing import Literal

from dataset.released import data_option
from model.command_line import Ignored, default_of, option, setting, tell
from model.errors import UserError
from trainer.common.arguments import (
    LEARNING_RATE_HELP,
    LOG,
    ROLLOUT,
    STAGE,
    OptionalLoraArgs,
    TrainArgs,
)

REWARD = "rewards"  # a group of --help
RL_RATE_HELP = f"{LEARNING_RATE_HELP}; swept in benchmarks/RECIPE_LOG.md, series 15"


@dataclass
class RolloutServerArgs(TrainArgs):
    """Where completions are generated: by the project's engine, or on a server."""

    # MiniMind's own trainers of 2026 name them after SGLang
    legacy_flags = {
        "rollout_engine": {
            "torch": Ignored(
                "the project's engine generates unless --rollout_url names a server",
                also=("sglang_base_url", "sglang_shared_path"),
            ),
            "sglang": "--rollout_reload sglang",
        },
        "sglang_base_url": "--rollout_url {} --rollout_reload sglang",
        "sglang_shared_path": "--rollout_folder {}",
        "sglang_model_path": Ignored("the server is started with the model in --rollout_folder"),
    }

    rollout_url: str = option(
        "",
        "generate on a server: base URL, such as http://localhost:8000/v1",
        group=ROLLOUT,
        may_differ=True,
    )
    rollout_folder: str = option(
        "", "folder for the server's weights", group=ROLLOUT, needs="rollout_url", may_differ=True
    )
    rollout_reload: Literal["vllm", "sglang"] = option(
        "vllm", "how it reloads them", group=ROLLOUT, needs="rollout_url", may_differ=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rollout_url and not self.rollout_folder:
            raise UserError("--rollout_url needs --rollout_folder, where the server reads weights")


@dataclass
class RolloutArgs(RolloutServerArgs, OptionalLoraArgs):
    """What the reinforcement-learning trainers add to the flags of every trainer."""

    batch_size_flag = "update_batch_size"
    reference_flag = "beta"  # the weight of the KL to the reference; 0: no reference model

    data_path: list[str] = data_option(
        "rl",
        'JSONL of {"conversations": [messages]}, the last answer ignored; "answer" or "gt" for a '
        "rule",
    )
    from_weight: str = option("dpo", "stage to initialise from; also the reference")
    batch_size: int = option(2, "prompts that a device rolls out at once")
    max_seq_len: int = option(256, "most tokens of a prompt; longer ones are left out")
    optimizer: Literal["adamw", "muon"] = option(
        "adamw", "AdamW by default: Muon amplifies the noise of RL gradients"
    )
    packing: bool = option(
        False, "", no_effect="completions of similar length are padded side by side"
    )

    max_gen_len: int = setting(1024, "most tokens of a completion", group=ROLLOUT, at_least=1)
    temperature: float = setting(
        1.0, "of sampling; the policy is this distribution", group=ROLLOUT, above=0
    )
    rollout_batch_size: int = setting(
        64, "completions decoded at once", group=ROLLOUT, may_differ=True, at_least=1
    )
    update_batch_size: int = setting(
        8, "completions in a forward and backward pass", group=ROLLOUT, may_differ=True, at_least=1
    )
    update_epochs: int = setting(
        1, "passes through the same completions", group=ROLLOUT, at_least=1
    )
    reward: list[str] = setting(
        ["auto"],
        "auto, or parts with weights such as answer:1 repetition:0.2 (rewards.py lists them); "
        "auto: the model of --reward_model_path, else out/reward_*.pth, else answer",
        group=REWARD,
    )
    reasoning: bool = setting(
        False, "open with <think>, and reward the think/answer format", group=REWARD
    )
    thinking_ratio: float = setting(
        0.0,
        "share of the prompts that open with <think>; the answer is then what follows </think>",
        group=ROLLOUT,
        at_least=0,
        at_most=1,
    )
    reward_model_path: str = option(
        "../../internlm2-1_8b-reward",
        "folder of a transformers reward model",
        group=REWARD,
        may_differ=True,
    )
    trust_remote_code: bool = option(
        False, "run the code that comes with the reward model", group=REWARD
    )
    judge_url: str = option(
        "", "base URL of an OpenAI API, for the reward judge", group=REWARD, may_differ=True
    )
    judge_model: str = option("", "the LLM judge's model", group=REWARD, needs="judge_url")

    debug_mode: bool = option(
        False,
        "print a sampled completion with its reward every --debug_interval steps",
        group=LOG,
        may_differ=True,
    )
    debug_interval: int = option(
        20, "see --debug_mode", group=LOG, needs="debug_mode", may_differ=True, above=0
    )

    use_lora: bool = option(False, "train an adapter only; the reference is the model without it")

    def __post_init__(self) -> None:
        super().__post_init__()
        parts = {part.partition(":")[0] for part in self.reward}
        if self.judge_url and "judge" not in parts:
            raise UserError("--judge_url has no effect without --reward judge")
        if not {"auto", "transformers"} & parts:
            defaults = {each.name: default_of(each) for each in fields(self)}
            for name in ("reward_model_path", "trust_remote_code"):
                if getattr(self, name) != defaults[name]:
                    tell(f"--{name} has no effect without --reward transformers")
        if self.thinking_ratio and self.reasoning:
            raise UserError("--thinking_ratio has no effect with --reasoning 1, which opens all")

    @property
    def max_prompt_len(self) -> int:
        """Tokens; longer prompts are left out."""
        return self.max_seq_len

    @property
    def max_prompt_flag(self) -> str:
        """The flag that sets it, for a message."""
        return f"--max_seq_len {self.max_seq_len}"

    @property
    def needs_reference(self) -> bool:
        return bool(getattr(self, self.reference_flag)) and not self.use_lora


@dataclass
class GroupArgs(RolloutArgs):
    """What GRPO's trainer and the agent trainer, which has the same loss, add."""

    learning_rate: float = option(1e-5, RL_RATE_HELP)
    num_generations: int = setting(8, "completions of each prompt: a group", group=ROLLOUT)
    beta: float = setting(
        0.02, "weight of the KL to the reference; 0: no reference", group=STAGE, at_least=0
    )
    loss_type: Literal["grpo", "dr_grpo", "bnpo", "dapo", "cispo"] = setting(
        "grpo", "see above; dapo and cispo weigh all tokens equally", group=STAGE
    )
    epsilon: float = setting(
        0.2,
        "range of the ratio's clip around 1",
        group=STAGE,
        needs="loss_type=grpo|dr_grpo|bnpo|dapo",
        at_least=0,
    )
    epsilon_high: float | None = setting(
        None,
        "its upper side; default: epsilon; dapo: 0.28; cispo: the largest weight, 5",
        group=STAGE,
        at_least=0,
    )
    resample: int = setting(
        2,
        "most times that groups without signal are replaced by other prompts'",
        group=STAGE,
        needs="loss_type=dapo",
        at_least=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_generations < 2:
            raise UserError("--num_generations must be at least 2: a group is its own baseline")
        if self.epsilon_high is None:
            self.epsilon_high = {"dapo": 0.28, "cispo": 5.0}.get(self.loss_type, self.epsilon)

    @property
    def clip_range(self) -> tuple[float, float]:
        """How far below and above 1 the ratio is clipped."""
        assert self.epsilon_high is not None  # __post_init__ has set it
        return self.epsilon, self.epsilon_high
