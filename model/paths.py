"""Where things lie: folders, weight files by stage, tokenizers. Imports nothing slow."""

import re
from pathlib import Path

from model.errors import UserError, tell_once

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out"
TOKENIZER = ROOT / "model"
MAX_NAME = 180  # bytes; file systems allow 255, with the endings and marks that we add


# -- weights ---------------------------------------------------------------------------------------


def weight_name(stage: str, hidden_size: int, use_moe: bool = False) -> str:
    """{stage}_{hidden_size}[_moe]"""
    return f"{stage}_{hidden_size}" + "_moe" * use_moe


def weight_path(
    stage: str, hidden_size: int, directory: Path | str = OUT, use_moe: bool = False
) -> Path:
    """out/{stage}_{hidden_size}[_moe].pth"""
    return Path(directory) / f"{weight_name(stage, hidden_size, use_moe)}.pth"


def list_weights(
    stage: str,
    hidden_size: int | None = None,
    directory: Path | str = OUT,
    use_moe: bool | None = None,
) -> list[Path]:
    """All weight files of a stage, the newest first. Arguments as in `find_weights`."""
    beginning = Path(directory) / stage  # a stage may contain a folder, such as lora/medical
    moe = {None: "(_moe)?", True: "_moe", False: ""}[use_moe]
    pattern = re.compile(rf"{re.escape(beginning.name)}_{hidden_size or '[0-9]+'}{moe}[.]pth")
    found = [path for path in beginning.parent.glob("*.pth") if pattern.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def find_weights(
    stage: str,
    hidden_size: int | None = None,
    directory: Path | str = OUT,
    newest: bool = True,
    use_moe: bool | None = None,
) -> Path:
    """The weight file of a stage. Where there are several, a line on stderr tells the choice.

    Args:
        hidden_size: its size; None: any.
        newest: of several sizes take the newest file; False: they are an error.
        use_moe: with experts, without, or (None) either.

    Raises:
        UserError: there is no such file, or several and not `newest`.
    """
    found = list_weights(stage, hidden_size, directory, use_moe)
    if not found:
        beginning = Path(directory) / stage
        size = f"_{hidden_size or '*'}" + "_moe" * bool(use_moe)
        there = sorted(path.name for path in beginning.parent.glob("*.pth"))
        raise UserError(
            f"there are no weights {beginning}{size}.pth; "
            + (f"that folder has {', '.join(there)}" if there else "train that stage first")
        )
    if len(found) > 1 and not newest:
        names = ", ".join(sorted(path.name for path in found))
        raise UserError(f"there are several sizes of {stage} ({names}); choose with --hidden_size")
    others = [each for each in list_weights(stage, hidden_size, directory) if each != found[0]]
    if others:
        names = ", ".join(sorted(path.name for path in others))
        flags = "--use_moe" if hidden_size else "--hidden_size or --use_moe"
        tell_once(f"weights: {found[0].name}, and not {names}; choose with {flags}")
    return found[0]


def is_stage(name: Path | str) -> bool:
    """Whether a flag names weights by their stage, and not by a file or a folder."""
    path = Path(name)
    return not (path.suffix == ".pth" or path.is_file() or is_hf_folder(path))


def resolve_weights(
    name: Path | str,
    hidden_size: int | None = None,
    directory: Path | str = OUT,
    newest: bool = True,
    use_moe: bool | None = None,
) -> Path:
    """The weights that a flag names: a file, a folder with a config.json, or else a stage.

    Arguments and errors as in `find_weights`, for a stage.
    """
    path = Path(name)
    if not is_stage(name):
        return path
    if path.is_dir() and not list_weights(str(name), hidden_size, directory):
        raise UserError(
            f"{path} is a folder without config.json, so it holds no model of transformers; name "
            "the .pth file itself"
        )
    return find_weights(str(name), hidden_size, directory, newest, use_moe)


def check_weights(path: Path) -> Path:
    """The path. UserError unless it is a weight file, or a folder with a model."""
    if not (path.is_file() or is_hf_folder(path)):
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise UserError(f"the weights {path} cannot be read: that {what}")
    return path


def check_exists(path: Path) -> None:
    if not path.exists():
        raise UserError(f"{path} does not exist")


def check_input_file(path: Path | str) -> None:
    path = Path(path)
    if not path.exists():
        raise UserError(f"the file {path} does not exist")
    if not path.is_file():
        raise UserError(f"{path} is a folder; name the files in it")


# -- folders ---------------------------------------------------------------------------------------


def is_hf_folder(folder: Path | str) -> bool:
    """Whether a folder holds a model in the format of transformers."""
    return (Path(folder) / "config.json").is_file()


def check_model_folder(load_from: Path | str) -> None:
    """UserError if --load_from is no folder."""
    if not Path(load_from).is_dir():
        raise UserError(f"--load_from {load_from} is not a folder")


def check_tokenizer_folder(path: Path | str) -> None:
    """UserError if a folder holds no tokenizer."""
    if not (Path(path) / "tokenizer.json").is_file():
        raise UserError(f"there is no tokenizer.json in {path}; --tokenizer_path names its folder")


def tokenizer_beside(name: Path | str, directory: Path | str = OUT) -> str:
    """The folder with the tokenizer of weights that a flag names: their own, or where their `.pth`
    lies. "" where there is none."""
    path = Path(name)
    if str(name) == "none":
        return ""
    if not is_hf_folder(path):
        path = Path(directory) if is_stage(path) else path.parent
    return str(path) if (path / "tokenizer.json").is_file() else ""


def check_name(flag: str, name: str) -> None:
    """UserError unless files can be called so, in the folder that is meant."""
    if name.startswith(".") or "/" in name or "\\" in name or not name.isprintable():
        raise UserError(
            f"--{flag} {name!r} is no name: it must not have / or \\, begin with a dot, or "
            "hold what cannot be printed; folders have flags of their own"
        )
    if len(name.encode()) > MAX_NAME:
        raise UserError(f"--{flag} is longer than {MAX_NAME} bytes: no file can be called so")
