"""The arguments that all trainers share. A field is a flag. Imports nothing slow."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dataset.jsonl import check_file
from dataset.released import VAL_SHARE, resolve_data_path
from model.command_line import check_values, option, setting
from model.errors import UserError
from model.paths import (
    OUT,
    ROOT,
    check_tokenizer_folder,
    check_weights,
    resolve_weights,
    tokenizer_beside,
)
from model.presets import PRESETS

if TYPE_CHECKING:
    from model.model_lora import LoraConfig

CHECKPOINTS = ROOT / "checkpoints"
LEARNING_RATE_HELP = "peak, for matrices; norms and embedding have multiples of it (optimizers.py)"
BATCH_RAMP_HELP = """batch-size warmup: an optimizer step takes 1/n of the samples trained so far,
at least 1,024 tokens (on a GPU --batch_size sequences), at most a full batch; 0: always a full
batch"""
MINUTES_HELP = """train for about this long: the speed is measured first, and the steps that fit are
made, in pretraining of the model size that does best in that time; 0: off"""
EMPTY_THINK_HELP = """share of the rows without thoughts that get an empty one, if the data has
thoughts: so open_thinking 0 means an answer at once"""
# groups of --help
STAGE, DATA, WEIGHTS, TRAINING = "this stage", "data", "weights and folders", "training"
OPTIMIZER, MODEL, MOE, LORA = "optimizer", "model", "mixture of experts", "LoRA"
ROLLOUT = "rollouts"
MACHINE, LOG = "machine", "log, checkpoints and recipes"


@dataclass
class TrainArgs:
    """The arguments of every trainer. A stage's own class changes defaults and adds its own."""

    batch_size_flag = "batch_size"  # not a flag: names the one that limits a forward pass

    data_path: list[str] = setting(
        [],
        "JSONL file(s) to train on, .jsonl or .jsonl.gz",
        group=DATA,
        check=check_file,
        may_differ=True,
        path=True,
    )
    data_dir: str = option(
        "",
        "folder in which the default of data_path is looked for; default: dataset/",
        group=DATA,
        unless="data_path",
        may_differ=True,
    )
    val_path: list[str] = setting(
        [],
        "held-out file(s); default: NAME_val beside the default data_path, or a share of data_path",
        group=DATA,
        check=check_file,
        may_differ=True,
        path=True,
    )
    val_share: float = setting(
        VAL_SHARE,
        "share of the data held out if there is no val_path",
        group=DATA,
        at_least=0,
        below=1,
        unless="val_path",
    )
    val_documents: int = setting(
        256, "most held-out documents of an evaluation", group=DATA, may_differ=True, at_least=0
    )
    max_seq_len: int = setting(512, "tokens of a packed sequence", group=DATA, at_least=2)
    packing: bool = setting(True, "several documents share a sequence; 0: one, padded", group=DATA)
    skip_bad_rows: bool = option(
        False,
        "leave bad rows out and report them; 0: the first is an error",
        group=DATA,
        may_differ=True,
    )
    num_workers: int = option(
        1, "processes that prepare batches", group=DATA, may_differ=True, at_least=0
    )

    from_weight: str = setting(
        "none",
        "weights to initialise from: a stage, such as pretrain, a .pth or a folder; none: random",
        group=WEIGHTS,
    )
    tokenizer_path: str = setting(
        "",
        "folder of the tokenizer; default: that of the weights, else model/",
        group=WEIGHTS,
        check=check_tokenizer_folder,
        may_differ=True,
        path=True,
    )
    save_weight: str = option(
        "", "name of the saved weights; default: the stage's", group=WEIGHTS, name=True
    )
    save_dir: str = option(
        str(OUT), "folder for weights, logs and plots", group=WEIGHTS, may_differ=True
    )
    checkpoint_dir: str = option(
        str(CHECKPOINTS), "folder for checkpoints", group=WEIGHTS, may_differ=True
    )

    minutes: float = setting(0.0, MINUTES_HELP, group=TRAINING, at_least=0, unless="max_steps")
    epochs: int = setting(1, "passes through the data", group=TRAINING, above=0)
    max_steps: int = setting(0, "most optimizer steps; 0: no limit", group=TRAINING, at_least=0)
    batch_size: int = setting(
        32, "sequences in a forward pass of a device", group=TRAINING, may_differ=True, above=0
    )
    accumulation_steps: int = setting(
        1, "forward passes of an optimizer step", group=TRAINING, may_differ=True, above=0
    )
    batch_ramp: int = setting(0, BATCH_RAMP_HELP, group=TRAINING, at_least=0)
    dropout: float = setting(
        0.0, "share of activations set to 0", group=TRAINING, at_least=0, below=1
    )
    gradient_checkpointing: bool = setting(
        False, "less memory, a third more time", group=TRAINING, may_differ=True
    )
    seed: int = setting(
        42, "of weights, data order and sampling", group=TRAINING, at_least=0, below=2**31
    )

    optimizer: Literal["adamw", "muon"] = setting(
        "muon", "muon: for matrices, AdamW for the rest; needs fewer steps", group=OPTIMIZER
    )
    learning_rate: float = setting(5e-4, LEARNING_RATE_HELP, group=OPTIMIZER, above=0)
    lr_schedule: Literal["linear", "trapezoid", "cosine", "constant"] = setting(
        "linear",
        "after the warmup. linear: to 0; trapezoid: constant, then to 0 over the second half; "
        "cosine: to a tenth",
        group=OPTIMIZER,
    )
    warmup_steps: int = setting(
        10, "steps over which the learning rate rises", group=OPTIMIZER, at_least=0
    )
    weight_decay: float = setting(0.1, "decoupled, on matrices only", group=OPTIMIZER, at_least=0)
    grad_clip: float = setting(
        1.0, "largest norm of the gradient; 0: no limit", group=OPTIMIZER, at_least=0
    )

    preset: str = setting(
        "",
        f"sizes of a released model: {', '.join(PRESETS)}; a flag beside it overrides one",
        group=MODEL,
        may_differ=True,
    )
    hidden_size: int | None = setting(
        None, "width; default: 512, or that of from_weight", group=MODEL
    )
    num_hidden_layers: int | None = setting(
        None, "depth; default: 8, or that of from_weight", group=MODEL
    )
    num_attention_heads: int | None = setting(None, "query heads; default: 8", group=MODEL)
    num_key_value_heads: int | None = setting(None, "key/value heads; default: 2", group=MODEL)
    intermediate_size: int | None = setting(
        None,
        "width of the feed-forward layer; default: 8/3 of hidden_size",
        group=MODEL,
        at_least=1,
    )
    rms_norm_eps: float | None = setting(
        None, "added to the mean square in RMSNorm; default: 1e-5", group=MODEL, above=0
    )
    qk_norm: bool | None = setting(
        None, "normalise queries and keys, as Qwen3 and MiniMind-3", group=MODEL
    )

    use_moe: bool = setting(False, "a mixture of experts in each block", group=MOE)
    n_routed_experts: int | None = setting(
        None, "experts that the router chooses from; default: 4", group=MOE, needs="use_moe"
    )
    n_shared_experts: int | None = setting(
        None, "experts that every token uses; default: 1", group=MOE, needs="use_moe"
    )
    num_experts_per_tok: int | None = setting(
        None, "routed experts of a token; default: 2", group=MOE, needs="use_moe"
    )
    moe_intermediate_size: int | None = setting(
        None, "an expert's; default: as intermediate_size", group=MOE, needs="use_moe"
    )
    scoring_func: Literal["softmax", "sigmoid"] | None = setting(
        None,
        "softmax: a loss balances the experts (default); sigmoid: a bias, as in DeepSeek-V3",
        group=MOE,
        needs="use_moe",
    )
    norm_topk_prob: bool | None = setting(
        None, "the weights of a token's experts sum to 1; default: yes", group=MOE, needs="use_moe"
    )
    aux_loss_alpha: float | None = setting(
        None, "softmax: weight of the load-balancing loss; default: 0.1", group=MOE, needs="use_moe"
    )
    seq_aux: bool | None = setting(
        None, "softmax: balance per sequence (default), or per batch", group=MOE, needs="use_moe"
    )
    bias_update_speed: float | None = setting(
        None,
        "sigmoid: step of the router bias; default: 0.001",
        group=MOE,
        needs="use_moe",
    )

    device: str = option("auto", "auto, cuda, cuda:1, mps or cpu", group=MACHINE, may_differ=True)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto",
        "of the forward pass; auto: bfloat16 on CUDA, and on a CPU that is faster with it",
        group=MACHINE,
    )
    compile: bool | None = option(
        None,
        "fuse each block's operations (torch.compile); default: on CUDA",
        group=MACHINE,
        alias=("use_compile",),
        may_differ=True,
    )

    log_interval: int = setting(
        100, "optimizer steps between log lines", group=LOG, may_differ=True, above=0
    )
    eval_interval: int = setting(
        500, "steps between evaluations; 0: at the end", group=LOG, may_differ=True, at_least=0
    )
    save_interval: int = option(
        100,
        "steps between saves; 0: at the end",
        group=LOG,
        may_differ=True,
        at_least=0,
    )
    resume: bool = option(
        False,
        "go on from the checkpoint, if there is one",
        group=LOG,
        may_differ=True,
    )
    from_resume: bool = option(False, "the same as --resume", group=LOG, may_differ=True)
    force: bool = option(
        False,
        "begin anew where an unfinished run of the same name has its checkpoint",
        group=LOG,
        may_differ=True,
    )
    recipe: str = option(
        "",
        "follow benchmarks/recipes/NAME.json: use its flags, and compare with its run",
        group=LOG,
        may_differ=True,
    )
    use_wandb: bool = option(False, "log to a tracker too", group=LOG, may_differ=True)
    tracker: Literal["wandb", "swanlab", "trackio"] = option(
        "wandb",
        "which, with --use_wandb; trackio: local, without account",
        group=LOG,
        needs="use_wandb",
        habit=True,
    )
    wandb_project: str = option(
        "MiniMind",
        "the tracker's project",
        group=LOG,
        may_differ=True,
        needs="use_wandb",
        habit=True,
    )

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen copy of the model is in memory too."""
        return False

    def __post_init__(self) -> None:
        """UserError for values that make no sense together, before anything is loaded."""
        self.use_preset()
        if not self.tokenizer_path:
            self.tokenizer_path = tokenizer_beside(self.from_weight, self.save_dir)
        check_values(type(self), vars(self))  # for arguments that no command line has checked
        self.resume = self.resume or self.from_resume
        new, given = self.from_weight == "none", self.bias_update_speed is not None
        if new and given and self.scoring_func != "sigmoid":  # loaded weights know their own
            raise UserError("--bias_update_speed has no effect without --scoring_func sigmoid")
        if self.scoring_func == "sigmoid" and (self.aux_loss_alpha or self.seq_aux):
            raise UserError("--scoring_func sigmoid balances by a bias and has no balance loss")

    def check_files(self) -> None:
        """UserError if there is nothing to train on, or to initialise from."""
        resolve_data_path(self)
        if self.from_weight != "none":
            self.initial_weights()

    def initial_weights(self) -> Path:
        """The .pth or folder of --from_weight. UserError if there is none."""
        kind = dict(newest=False, use_moe=self.use_moe)
        found = resolve_weights(self.from_weight, self.hidden_size, self.save_dir, **kind)
        return check_weights(found)

    def use_preset(self) -> None:
        """Set the sizes of --preset that no flag has set."""
        if self.preset and self.preset not in PRESETS:
            raise UserError(f"--preset is one of {', '.join(PRESETS)}, not {self.preset}")
        for name, value in PRESETS.get(self.preset, {}).items():
            if getattr(self, name) is None or name == "use_moe":  # the one without None
                setattr(self, name, value)


@dataclass
class LoraArgs(TrainArgs):
    """The arguments of trainers that can train a LoRA adapter alone."""

    lora_r: int = setting(
        8, "rank: rows of A, columns of B", group=LORA, needs="use_lora", at_least=1
    )
    lora_alpha: float = setting(
        16.0, "the adapter is scaled by alpha/r", group=LORA, needs="use_lora", above=0
    )
    lora_dropout: float = setting(
        0.0,
        "share of A's inputs set to 0 in training",
        group=LORA,
        needs="use_lora",
        at_least=0,
        below=1,
    )
    lora_targets: list[str] = setting(
        ["q_proj", "k_proj", "v_proj", "o_proj"],  # model_lora.py's ATTENTION_MODULES
        "names of the adapted linear layers, such as q_proj gate_proj; experts' too",
        group=LORA,
        needs="use_lora",
    )

    def stage(self, name: str) -> str:
        """Where the adapter is saved below save_dir."""
        return f"lora/{name}"

    def lora_config(self) -> "LoraConfig":
        from model.model_lora import LoraConfig

        return LoraConfig(self.lora_r, self.lora_alpha, self.lora_dropout, self.lora_targets)


@dataclass
class OptionalLoraArgs(LoraArgs):
    """For trainers that train all weights unless --use_lora asks for an adapter."""

    use_lora: bool = setting(False, "train an adapter only", group=LORA)

    def stage(self, name: str) -> str:
        return super().stage(name) if self.use_lora else name


@dataclass
class SampleArgs(TrainArgs):
    """For trainers that show an answer at every evaluation."""

    sample_prompt: str = setting(
        "Who are you?", "asked at every evaluation", group=LOG, may_differ=True
    )


@dataclass
class ConversationArgs(SampleArgs):
    """For trainers whose rows are conversations, of which some may have thoughts."""

    empty_think_ratio: float = setting(
        1.0, EMPTY_THINK_HELP, group=DATA, at_least=0, at_most=1, may_differ=True
    )
