"""The arguments that PPO, GRPO, SPO and the agent trainer share."""

from dataclasses import dataclass
from typing import Literal

from model.command_line import option
from model.errors import UserError
from trainer.common.arguments import DATASET, LoraArgs


@dataclass
class RolloutArgs(LoraArgs):
    """What PPO, GRPO and SPO have in common beyond the flags of every trainer."""

    batch_size_flag = "update_batch_size"
    reference_flag = "beta"  # the weight of the KL to the starting model; 0: no reference

    data_path: list[str] = option(
        [str(DATASET / "rlaif-mini.jsonl")],
        'JSONL of {"conversations": [messages]}, the last answer ignored; "answer" for a rule',
    )
    from_weight: str = option("dpo", "stage to start from")
    batch_size: int = option(2, "prompts a device takes at once")
    max_seq_len: int = option(256, "tokens of a prompt at most; longer ones are left out")
    optimizer: Literal["adamw", "muon"] = option(
        "adamw", "muon would walk along the noise of the samples as far as along the signal"
    )
    packing: bool = option(False, "without effect: answers are padded, like lengths side by side")
    max_gen_len: int = option(1024, "tokens of a completion at most")
    rollout_batch_size: int = option(64, "completions decoded side by side")
    update_batch_size: int = option(8, "completions in a forward pass of the update")
    update_epochs: int = option(1, "times to learn from the same completions")
    temperature: float = option(1.0, "of sampling; the policy is this distribution")
    reasoning: bool = option(False, "open with <think>, and reward the think/answer format")
    reward: list[str] = option(
        ["auto"],
        "auto, or parts with weights such as answer:1 repetition:0.2 (rewards.py lists them); "
        "auto: the model of --reward_model_path, else out/reward_*.pth, else answer",
    )
    reward_model_path: str = option(
        "../../internlm2-1_8b-reward", "folder of a transformers reward model"
    )
    trust_remote_code: bool = option(False, "run the code that comes with the reward model")
    judge_url: str = option("", "base URL of an OpenAI-compatible API, for the reward judge")
    judge_model: str = option("", "the judge's model")
    rollout_url: str = option("", "decode on a server: base URL, such as http://localhost:8000/v1")
    rollout_folder: str = option("", "folder for the weights handed over to it")
    rollout_reload: Literal["vllm", "sglang"] = option("vllm", "how it is told to read them anew")
    use_lora: bool = option(False, "train an addition only; the reference is the model without it")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in "max_gen_len rollout_batch_size update_batch_size update_epochs".split():
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.temperature <= 0:
            raise UserError(f"--temperature must be more than 0, not {self.temperature}")
        if self.rollout_url and not self.rollout_folder:
            raise UserError("--rollout_url needs --rollout_folder, where the server reads weights")

    @property
    def needs_reference(self) -> bool:
        return bool(getattr(self, self.reference_flag)) and not self.use_lora

    def stage(self, name: str) -> str:
        return f"lora/{name}" if self.use_lora else name
