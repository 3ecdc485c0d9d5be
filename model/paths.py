"""Where things lie; imports nothing slow."""

from pathlib import Path

from model.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out"
TOKENIZER = ROOT / "model"


def check_tokenizer_folder(path: Path | str) -> None:
    """UserError if a folder holds no tokenizer."""
    if not (Path(path) / "tokenizer.json").is_file():
        raise UserError(f"there is no tokenizer.json in {path}; --tokenizer_path names its folder")


def is_hf_folder(folder: Path | str) -> bool:
    """Whether a folder holds a model in the format of transformers."""
    return (Path(folder) / "config.json").is_file()


def check_model_folder(load_from: Path | str) -> None:
    """UserError if --load_from is no folder."""
    if not Path(load_from).is_dir():
        raise UserError(f"--load_from {load_from} is not a folder")
