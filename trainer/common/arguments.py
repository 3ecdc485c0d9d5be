"""The arguments that all trainers share; a field is a flag."""

import math
from dataclasses import dataclass
from typing import Literal

from model.command_line import option
from model.errors import UserError
from model.model_lora import ATTENTION, LoraSettings
from model.weights import OUT, ROOT

CHECKPOINTS = ROOT / "checkpoints"
DATASET = ROOT / "dataset"
LEARNING_RATE_HELP = "the peak, for matrices; others have multiples of it (optimizers.py)"
EXPERTS = (
    "n_routed_experts n_shared_experts num_experts_per_tok moe_intermediate_size scoring_func "
    "norm_topk_prob aux_loss_alpha seq_aux bias_update_speed".split()
)
BATCH_RAMP_HELP = """n: an update has an n-th of the rows trained so far, at least 1,024 tokens (on
a GPU --batch_size rows), at most a full batch: while much is to learn, few rows tell where to go;
0: always a full batch"""


@dataclass
class TrainArgs:
    """The arguments of every trainer. A stage's own class changes defaults and adds its own."""

    batch_size_flag = "batch_size"  # not a flag: names the one that limits a forward pass

    data_path: list[str] = option([], "JSONL file(s) to train on, .jsonl or .jsonl.gz")
    val_path: list[str] = option([], "held-out file(s); default: a share of data_path")
    val_share: float = option(0.01, "share of the documents held out where val_path is not given")
    val_documents: int = option(256, "how many held-out documents an evaluation uses at most")
    from_weight: str = option("none", "stage to start from, such as pretrain; none: from nothing")
    save_weight: str = option("", "name of the weights that are made; default: the stage's")
    save_dir: str = option(str(OUT), "folder for weights, metrics and plots")
    checkpoint_dir: str = option(str(CHECKPOINTS), "folder for what --resume needs")
    tokenizer_path: str = option("", "folder of the tokenizer; default: model/")

    epochs: int = option(1, "times to go through the data")
    max_steps: int = option(0, "updates to make at most; 0: all that the epochs hold")
    batch_size: int = option(32, "rows a device takes at once")
    accumulation_steps: int = option(1, "batches added up for one update")
    batch_ramp: int = option(0, BATCH_RAMP_HELP)
    max_seq_len: int = option(512, "tokens in a row")
    packing: bool = option(True, "several documents a row; 0: one, padded")
    optimizer: Literal["adamw", "muon"] = option(
        "muon", "muon: for the matrices, AdamW for the rest; learns more from each update"
    )
    learning_rate: float = option(5e-4, LEARNING_RATE_HELP)
    lr_schedule: Literal["linear", "trapezoid", "cosine", "constant"] = option(
        "linear",
        "after the warm-up. linear: straight to 0, which averages most noise out; trapezoid: the "
        "same over the 2nd half only; cosine: to a tenth, the custom",
    )
    warmup_steps: int = option(10, "updates over which the learning rate rises")
    weight_decay: float = option(0.1, "on matrices only, decoupled")
    grad_clip: float = option(1.0, "largest norm of the gradient; 0: no limit")

    hidden_size: int | None = option(None, "width; default: 512, or that of from_weight")
    num_hidden_layers: int | None = option(None, "depth; default: 8, or that of from_weight")
    num_attention_heads: int | None = option(None, "query heads; default: 8")
    num_key_value_heads: int | None = option(None, "key/value heads; default: 2")
    qk_norm: bool | None = option(None, "normalise queries and keys, as Qwen3 and MiniMind-3")
    dropout: float = option(0.0, "share of activations set to 0 while training")
    use_moe: bool = option(False, "a mixture of experts in each block")
    n_routed_experts: int | None = option(None, "experts that a gate chooses from; default: 4")
    n_shared_experts: int | None = option(None, "experts that every token uses; default: 1")
    num_experts_per_tok: int | None = option(None, "experts chosen for a token; default: 2")
    moe_intermediate_size: int | None = option(None, "size of an expert; default: as without")
    scoring_func: Literal["softmax", "sigmoid"] | None = option(
        None, "softmax: a loss balances the experts (default); sigmoid: a bias, as in DeepSeek-V3"
    )
    norm_topk_prob: bool | None = option(None, "chosen experts' weights add up to 1; default: yes")
    aux_loss_alpha: float | None = option(None, "softmax: weight of the loss; default: 0.1")
    seq_aux: bool | None = option(None, "softmax: balance within each row (default), or a batch")
    bias_update_speed: float | None = option(None, "sigmoid: step of a bias; default: 0.001")
    gradient_checkpointing: bool = option(False, "less memory for a third more time")

    device: str = option("auto", "auto, cuda, cuda:1, mps or cpu")
    dtype: Literal["bfloat16", "float16", "float32"] = option(
        "bfloat16", "to compute in on CUDA; elsewhere float32, which is faster there"
    )
    compile: bool | None = option(
        None, "join each block's many small operations (torch.compile); default: on CUDA"
    )
    num_workers: int = option(1, "processes that make batches ahead")
    seed: int = option(42, "of weights, order and sampling")

    recipe: str = option("", "follow benchmarks/recipes/NAME.json: its flags, and is it on track?")
    log_interval: int = option(100, "updates between lines of the log")
    eval_interval: int = option(500, "updates between evaluations on held-out data; 0: at the end")
    save_interval: int = option(100, "updates between saves; 0: at the end")
    resume: bool = option(False, "go on from the checkpoint of this run, if there is one")
    from_resume: bool = option(False, "the same as --resume")
    use_wandb: bool = option(False, "log to a tracker too")
    tracker: Literal["wandb", "swanlab"] = option("wandb", "which, with --use_wandb")
    wandb_project: str = option("MiniMind", "the tracker's project")

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen copy of the model stands in memory beside it."""
        return False

    def __post_init__(self) -> None:
        """UserError for values that make no sense, before anything is loaded."""
        positive = "epochs batch_size accumulation_steps max_seq_len learning_rate log_interval"
        not_negative = "max_steps warmup_steps weight_decay grad_clip eval_interval save_interval"
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"--{name} must be a finite number, not {value}")
        for name in positive.split():
            if getattr(self, name) <= 0:
                raise UserError(f"--{name} must be more than 0, not {getattr(self, name)}")
        for name in f"{not_negative} batch_ramp val_documents num_workers seed".split():
            if getattr(self, name) < 0:
                raise UserError(f"--{name} must not be negative, as {getattr(self, name)} is")
        if not 0 <= self.val_share < 1:
            raise UserError(f"--val_share must be at least 0 and less than 1, not {self.val_share}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout must be at least 0 and less than 1, not {self.dropout}")
        if self.seed >= 2**31:
            raise UserError(f"--seed must be less than 2^31, not {self.seed}")
        if self.max_seq_len < 2:
            raise UserError("--max_seq_len must be at least 2: a token and the one it predicts")
        self.resume = self.resume or self.from_resume
        for name in EXPERTS:
            if getattr(self, name) is not None and not self.use_moe:
                raise UserError(f"--{name} is for a mixture of experts: --use_moe 1")
        if self.scoring_func == "sigmoid" and (self.aux_loss_alpha or self.seq_aux):
            raise UserError("--scoring_func sigmoid balances by a bias and has no balance loss")


@dataclass
class LoraArgs(TrainArgs):
    """The arguments of trainers that can train an addition to the weights alone."""

    lora_r: int = option(8, "rank: rows of A, columns of B")
    lora_alpha: float = option(16.0, "the addition is scaled by alpha/r")
    lora_dropout: float = option(0.0, "share of A's inputs set to 0 while training")
    lora_targets: list[str] = option(
        list(ATTENTION), "names of the linear layers, such as q_proj gate_proj; experts' too"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.settings()  # checks them

    def settings(self) -> LoraSettings:
        return LoraSettings(self.lora_r, self.lora_alpha, self.lora_dropout, self.lora_targets)
