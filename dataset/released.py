"""MiniMind's released data files: what each stage trains on, and the sets that are downloaded.

Two generations are in use. The files of 2026 are on the hub's main branch; those of 2025 are only
in its history, and on people's disks. A stage trains on the first file of its list that lies in
dataset/: today's before those of 2025, and a mini file before the full one, which takes days.
Nothing heavy is imported here, so that a command line may ask at once.
"""

from pathlib import Path
from typing import Any

from model.command_line import option, rules_of
from model.errors import UserError

DATASET = Path(__file__).resolve().parent
REVISION = "312afb4f76391145c6902f765bb51691c09a12f5"  # the commit of the hub that SIZES are of
SIZES = {  # in bytes
    "pretrain_t2t_mini.jsonl": 1_241_043_656,
    "pretrain_t2t.jsonl": 8_275_074_893,
    "sft_t2t_mini.jsonl": 1_739_201_170,
    "sft_t2t.jsonl": 14_096_018_369,
    "dpo.jsonl": 53_653_322,
    "rlaif.jsonl": 23_754_740,
    "agent_rl.jsonl": 82_036_930,
    "agent_rl_math.jsonl": 18_372_683,
    "lora_identity.jsonl": 22_789,
    "lora_medical.jsonl": 34_002_385,
    "lora_exam.jsonl": 24_650_716,
}
OLDER = """pretrain_hq.jsonl sft_mini_512.jsonl sft_512.jsonl sft_1024.jsonl sft_2048.jsonl
    rlaif-mini.jsonl r1_mix_1024.jsonl""".split()

PRETRAIN = ["pretrain_t2t_mini.jsonl", "pretrain_t2t.jsonl", "pretrain_hq.jsonl"]
SFT = """sft_t2t_mini.jsonl sft_t2t.jsonl sft_mini_512.jsonl sft_512.jsonl sft_1024.jsonl
    sft_2048.jsonl""".split()
STAGE_FILES = {  # the files that suit a stage, the best default first
    "pretrain": PRETRAIN,
    "full_sft": SFT,
    "distillation": SFT,
    "reason": ["sft_t2t_mini.jsonl", "sft_t2t.jsonl", "r1_mix_1024.jsonl"],
    "lora": ["lora_identity.jsonl"],
    "preferences": ["dpo.jsonl"],
    "rl": ["rlaif.jsonl", "rlaif-mini.jsonl"],
    "agent": ["agent_rl.jsonl", "agent_rl_math.jsonl", "tools.jsonl"],  # the last: the demo's
}

LORA = ["lora_identity.jsonl", "lora_medical.jsonl", "lora_exam.jsonl"]
AGENT = ["agent_rl.jsonl", "agent_rl_math.jsonl"]
TUNING = ["dpo.jsonl", "rlaif.jsonl", *AGENT, *LORA]
SETS = {
    "mini": ["pretrain_t2t_mini.jsonl", "sft_t2t_mini.jsonl", *TUNING],
    "full": ["pretrain_t2t.jsonl", "sft_t2t.jsonl", *TUNING],
    "lora": LORA,
    "dpo": ["dpo.jsonl"],
    "rlaif": ["rlaif.jsonl"],
    "agent": AGENT,
    "2025": ["pretrain_hq.jsonl", "sft_mini_512.jsonl", "rlaif-mini.jsonl", "r1_mix_1024.jsonl"],
}
MODELS = {  # name → the repository on Hugging Face, on ModelScope
    "minimind-3": ("jingyaogong/minimind-3", "gongjy/minimind-3"),
    "minimind-3-moe": ("jingyaogong/minimind-3-moe", "gongjy/minimind-3-moe"),
    "minimind-3-pytorch": ("jingyaogong/minimind-3-pytorch", "gongjy/minimind-3-pytorch"),
    "MiniMind2": ("jingyaogong/MiniMind2", "gongjy/MiniMind2"),
    "MiniMind2-Small": ("jingyaogong/MiniMind2-Small", "gongjy/MiniMind2-Small"),
    "MiniMind2-MoE": ("jingyaogong/MiniMind2-MoE", "gongjy/MiniMind2-MoE"),
    "MiniMind2-R1": ("jingyaogong/MiniMind2-R1", "gongjy/MiniMind2-R1"),
    "MiniMind2-Pytorch": ("jingyaogong/MiniMind2-Pytorch", "gongjy/MiniMind2-PyTorch"),
    "internlm2-1_8b-reward": (
        "internlm/internlm2-1_8b-reward",
        "Shanghai_AI_Laboratory/internlm2-1_8b-reward",
    ),
}


def data_option(stage: str, about: str) -> Any:
    """The --data_path of a stage, whose default is looked for when the program runs."""
    default = f"the first in dataset/ of {', '.join(STAGE_FILES[stage])}"
    return option([], f"{about}; default: {default}", released=stage)


def resolve_data_path(args: Any) -> None:
    """Without --data_path: the stage's default file. UserError if there is none."""
    stage = rules_of(type(args))["data_path"].get("released")
    if stage and not args.data_path:
        args.data_path = [default_data(stage)]


def default_data(stage: str) -> str:
    """The path of the first of the stage's files in dataset/. UserError if there is none."""
    names = STAGE_FILES[stage]
    for name in names:
        if (DATASET / name).is_file():
            return str(DATASET / name)
    raise UserError(
        f"there is no training data: {DATASET} has none of {', '.join(names)}. "
        "`python scripts/prepare_data.py download --set mini` downloads it, and --data_path names "
        "a file of your own"
    )


def files_of_set(name: str) -> list[str]:
    """The files of a set; none for "". UserError for one that does not exist."""
    if name and name not in SETS:
        raise UserError(
            f"there is no set {name}; the sets are {', '.join(SETS)}, and --file takes single "
            f"files: {', '.join([*SIZES, *OLDER])}"
        )
    return SETS[name] if name else []


def size_of(name: str) -> str:
    """What a set of today takes on the disk, such as "3.2 GB"."""
    return f"{sum(SIZES[file] for file in SETS[name]) / 1e9:.1f} GB"


def download_hint(name: str) -> str:
    """How to get a released file that is missing; "" for another one."""
    if name not in {*SIZES, *OLDER}:
        return ""
    return f"`python scripts/prepare_data.py download --file {name}` downloads it, and "
