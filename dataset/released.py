"""MiniMind's released data files: what each stage trains on, and the sets that are downloaded.

Two generations are in use. The files of 2026 are on the hub's main branch; those of 2025 are only
in its history, and on people's disks. A stage trains on the first file of its list that lies in
--data_dir: today's before those of 2025, a mini file before the full one, which takes days, and
plain names last. Nothing heavy is imported here, so that a command line may ask at once.
"""

from pathlib import Path
from typing import Any

from model.command_line import option, rules_of
from model.errors import UserError

DATASET = Path(__file__).resolve().parent
VAL_SHARE = 0.01  # of the data is held out where there is no file for it
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
PLAIN = {  # names that people give their own files, after those of the table above
    "pretrain": ["pretrain.jsonl"],
    "full_sft": ["sft.jsonl"],
    "distillation": ["sft.jsonl"],
    "lora": ["lora_medical.jsonl"],
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
    default = f"the first in --data_dir of {', '.join(names_of(stage))}"
    return option([], f"{about}; default: {default}", released=stage)


def names_of(stage: str) -> list[str]:
    """The files that suit a stage, the best default first; each may end with .gz too."""
    return STAGE_FILES[stage] + PLAIN.get(stage, [])


def resolve_data_path(args: Any) -> None:
    """Without --data_path: the stage's default file in --data_dir, and as --val_path the NAME_val
    beside it, if it is there and no flag says what to hold out. UserError if there is no file."""
    rules = rules_of(type(args))
    stage = rules["data_path"].get("released")
    if not stage or args.data_path:
        return
    folder = getattr(args, "data_dir", "")
    args.data_path = [default_data(stage, folder)]
    if folder:
        args.data_dir = ""  # beside a --data_path it would be refused where args are copied
    held_out = validation_file(args.data_path[0])
    if held_out and "val_path" in rules and not args.val_path and args.val_share == VAL_SHARE:
        args.val_path = [held_out]


def default_data(stage: str, folder: Path | str = "") -> str:
    """The path of the first of the stage's files in a folder, by default dataset/. UserError if
    there is none."""
    folder, names = Path(folder or DATASET), names_of(stage)
    if found := first_file(folder, names):
        return found
    what = f"has none of {', '.join(names)}" if folder.is_dir() else "is no folder"
    raise UserError(
        f"there is no training data: {folder} {what}. `python scripts/prepare_data.py download "
        "--set mini` downloads it into dataset/, --data_dir names another folder, and --data_path "
        "a file of your own"
    )


def validation_file(path: str) -> str:
    """The NAME_val.jsonl or NAME_val.jsonl.gz beside a data file; "" if there is none."""
    file = Path(path)
    return first_file(file.parent, [f"{file.name.partition('.jsonl')[0]}_val.jsonl"])


def first_file(folder: Path, names: list[str]) -> str:
    """The path of the first that is there, as it is or with .gz; "" if none is."""
    paths = (folder / f"{name}{packed}" for name in names for packed in ("", ".gz"))
    return next((str(path) for path in paths if path.is_file()), "")


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
