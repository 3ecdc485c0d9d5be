"""Downloads from Hugging Face and ModelScope: resumed, and checked by size and hash.

A file is downloaded as `.{name}.partial` and renamed when its size and hash are what the hub says,
so that a file with its final name is complete. A partial download is resumed.

MiniMind's own files of 2026 are taken at the commit that dataset/released.py has the sizes of, and
those of 2025, which the main branch no longer has, at the newest commit that still has them.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

from dataset.released import MODELS, OLDER, REVISION, SETS, SIZES
from model.errors import UserError, reading
from model.paths import ROOT

PROJECT = ("model", "trainer", "scripts", "tests", "benchmarks", "docs", "learning_materials")
# What is downloaded by its ending: data and weights, and nothing that an interpreter reads.
DATA_FILES = (".jsonl", ".json", ".jsonl.gz", ".ndjson", ".parquet", ".arrow", ".csv", ".tsv")
DATA_FILES += (".txt", ".md", ".gz", ".zst", ".zip")
MODEL_FILES = (".safetensors", ".pth", ".bin", ".json", ".txt", ".model", ".jinja", ".md", ".gguf")
DATASETS = {"huggingface": "jingyaogong/minimind_dataset", "modelscope": "gongjy/minimind_dataset"}
HUBS = ("huggingface", "modelscope")


@dataclass
class Remote:
    """A file on a hub, with the size and hash that the download must have."""

    name: str
    size: int | None
    sha256: str = ""
    git_hash: str = ""  # of a small file, which is in git itself and not in LFS

    def __post_init__(self) -> None:
        """TypeError if a hub answers with something else."""
        texts = isinstance(self.name, str) and isinstance(self.sha256 + self.git_hash, str)
        if not texts or not isinstance(self.size, int | None) or (self.size or 0) < 0:
            raise TypeError(f"a file with the name {self.name!r} and the size {self.size!r}")

    def checked_by(self) -> str:
        return "sha256" if self.sha256 else "git hash" if self.git_hash else "size"

    def hash_of(self, path: Path) -> str:
        """The hash of a local file, of the type that the hub gives."""
        digest = hashlib.sha256() if self.sha256 else hashlib.sha1()
        if not self.sha256:
            digest.update(f"blob {path.stat().st_size}\0".encode())  # as git hashes a file
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        return digest.hexdigest()

    def check(self, path: Path) -> str:
        """What is wrong with a local file, or ""."""
        if self.size is not None and path.stat().st_size != self.size:
            return f"has {path.stat().st_size:,} bytes instead of {self.size:,}"
        known = self.sha256 or self.git_hash
        if known and self.hash_of(path) != known:
            return "has another hash than the hub says"
        return ""


@contextmanager
def plain_errors(where: str, repo: str) -> Iterator[None]:
    """Errors of a hub and of the network as one sentence."""
    try:
        yield
    except RevisionNotFoundError as error:
        raise UserError(f"{repo} on {where} has no such --revision") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{where} has no {repo}, or wants a login (hf auth login); --repo names another"
        ) from error
    except EntryNotFoundError as error:
        raise UserError(f"{repo} on {where} has lost a file that it lists; try again") from error
    except HfHubHTTPError as error:
        raise UserError(f"{where} answers for {repo}: {str(error).splitlines()[0]}") from error
    except HFValidationError as error:
        raise UserError(f"{repo} is no name of a repository: {error}") from error
    except OfflineModeIsEnabled as error:
        raise UserError("HF_HUB_OFFLINE is set, so nothing is downloaded; unset it") from error
    except (HTTPError, ConnectionError, TimeoutError) as error:
        raise UserError(
            f"{where} cannot be reached ({error}); without a network nothing can be downloaded. "
            "Try again, name a mirror with --endpoint, or another hub with --hub"
        ) from error


@contextmanager
def plain_answers(where: str) -> Iterator[None]:
    """An answer that is not what a hub answers, as one sentence."""
    try:
        with reading(f"the answer of {where}", "is --endpoint the address of a hub?"):
            yield
    except OSError as error:
        raise UserError(f"{where} cannot be reached ({error}); try again") from error


class HuggingFaceRepo:
    """A repository on Hugging Face, or on a mirror with its API at `endpoint`."""

    def __init__(self, repo: str, repo_type: str, revision: str, endpoint: str):
        self.api = HfApi(endpoint=endpoint or None)
        self.repo, self.repo_type, self.revision = repo, repo_type, revision or "main"
        self.where, self.chosen = self.api.endpoint, bool(revision)  # by --revision

    def files(self, revision: str = "") -> list[Remote]:
        """The files at a revision, at which `fetch` has them from now on."""
        revision = revision or self.revision
        with plain_answers(self.where), plain_errors(self.where, self.repo):
            about: Any = self.api.repo_info(  # of another class for each repo_type
                self.repo, repo_type=self.repo_type, revision=revision, files_metadata=True
            )
            self.revision = about.sha or revision  # the same commit for all files
            return [
                Remote(
                    file.rfilename,
                    file.lfs.size if file.lfs else file.size,
                    file.lfs.sha256 if file.lfs else "",
                    "" if file.lfs else file.blob_id or "",
                )
                for file in about.siblings or []
            ]

    def find(self, names: list[str]) -> list[Remote]:
        """The files with these names or patterns, at the revision that the module's text tells."""
        revision = self.revision
        known = any(fnmatch(file, name) for name in names for file in SIZES)
        if known and self.repo == DATASETS["huggingface"] and not self.chosen:
            with suppress(UserError):  # a mirror may lack the commit, or have newer files
                return choose(self.files(REVISION), names, self.repo)
        remotes = self.files(revision)
        gone = [name for name in lacking(remotes, names) if name in OLDER]
        if gone and not self.chosen:
            print(f"{', '.join(gone)}: no longer on the main branch, looked for in its history")
            with suppress(UserError):  # a mirror may not have the history
                for commit in self.history():
                    if not lacking(older := self.files(commit), names):
                        return choose(older, names, self.repo)
        return choose(remotes, names, self.repo)

    def history(self) -> list[str]:
        """The commits, the newest first."""
        with plain_answers(self.where), plain_errors(self.where, self.repo):
            commits = self.api.list_repo_commits(self.repo, repo_type=self.repo_type)
            return [commit.commit_id for commit in commits]

    def fetch(self, remote: Remote, partial: Path) -> None:
        """Append the rest of the file to `partial`."""
        url = hf_hub_url(
            self.repo,
            remote.name,
            repo_type=self.repo_type,
            revision=self.revision,
            endpoint=self.where,
        )
        there = partial.stat().st_size if partial.exists() else 0
        # a range of a compressed response would not be a range of the file
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        with (
            plain_answers(self.where),
            plain_errors(self.where, self.repo),
            open(partial, "ab") as file,
        ):
            http_get(
                url,
                file,
                resume_size=there,
                headers=headers,
                expected_size=remote.size,
                displayed_filename=remote.name,
            )


class ModelScopeRepo:
    """A repository on ModelScope, through its own package, which resumes by itself."""

    def __init__(self, repo: str, repo_type: str, revision: str, endpoint: str):
        if endpoint:
            os.environ["MODELSCOPE_ENDPOINT"] = endpoint  # before the import, which reads it
        try:
            from modelscope.hub.api import HubApi
            from modelscope.hub.file_download import dataset_file_download, model_file_download
        except ImportError as error:
            raise UserError("--hub modelscope needs a package: pip install modelscope") from error
        self.api, self.repo, self.revision = HubApi(), repo, revision or "master"
        self.is_data = repo_type == "dataset"
        self.download = dataset_file_download if self.is_data else model_file_download
        self.where = "modelscope.cn"

    def files(self) -> list[Remote]:
        with self.errors():
            if self.is_data:
                found = self.api.get_dataset_files(self.repo, revision=self.revision)
            else:
                found = self.api.get_model_files(self.repo, revision=self.revision, recursive=True)
        return [
            Remote(file["Path"], file.get("Size"), file.get("Sha256") or "")
            for file in found
            if file.get("Type") != "tree"
        ]

    def find(self, names: list[str]) -> list[Remote]:
        return choose(self.files(), names, self.repo)

    def fetch(self, remote: Remote, partial: Path) -> None:
        folder = partial.parent / ".modelscope"  # its own partial downloads
        with self.errors():
            path = self.download(
                self.repo, remote.name, revision=self.revision, local_dir=str(folder)
            )
            os.replace(path, partial)
            shutil.rmtree(folder)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Its errors have many types, and those of the network are OSErrors."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            why = str(error).splitlines()[:1] or [type(error).__name__]
            raise UserError(
                f"{self.repo} cannot be had from {self.where}: {why[0]}; --repo names another, "
                "and --hub another hub"
            ) from error


def model_repo(name: str, hub: str) -> str:
    """The repository of a model of MODELS, in any case, or OWNER/NAME itself."""
    known = {each.lower(): repos for each, repos in MODELS.items()}
    if name.lower() in known:
        return known[name.lower()][HUBS.index(hub)]
    if "/" not in name:
        raise UserError(f"no model {name} is known; known: {', '.join(MODELS)}; or OWNER/NAME")
    return name


def open_repo(
    hub: str, repo: str, repo_type: str, revision: str = "", endpoint: str = ""
) -> HuggingFaceRepo | ModelScopeRepo:
    kind = ModelScopeRepo if hub == "modelscope" else HuggingFaceRepo
    return kind(repo, repo_type, revision, endpoint)


def lacking(remotes: list[Remote], names: list[str]) -> list[str]:
    """The names (or patterns such as *.json) that no file has."""
    return [name for name in names if not any(fnmatch(file.name, name) for file in remotes)]


def choose(remotes: list[Remote], names: list[str], repo: str) -> list[Remote]:
    """The files with these names or patterns; all if there are none.

    Raises:
        UserError: one does not exist; the message lists those that do, and the sets.
    """
    if not names:
        return [file for file in remotes if not file.name.startswith(".git")]
    if missing := lacking(remotes, names):
        there = ", ".join(sorted(file.name for file in remotes)) or "nothing"
        told = f"{repo} has no {', '.join(missing)}; it has {there}"
        if repo in DATASETS.values():
            told += f"; the sets are {', '.join(SETS)}"
        if set(missing) & set(OLDER):
            told += "; the files of 2025 are no longer there, --revision may name an older commit"
        raise UserError(told)
    found = [file for name in names for file in remotes if fnmatch(file.name, name)]
    return list({file.name: file for file in found}.values())


def only_data(
    remotes: list[Remote], repo_type: str, repo: str, named: bool, folder: Path, code: bool = False
) -> list[Remote]:
    """The files with data or weights; the others, such as code, are left out, which is told.

    Args:
        named: the user has named the files, so that one of another kind is an error.
        folder: where they are to go.
        code: the user trusts the code too.

    Raises:
        UserError: also for a file that would replace one of this project.
    """
    endings = MODEL_FILES if repo_type == "model" else DATA_FILES
    endings += (".py",) * code
    kept = [each for each in remotes if each.name.lower().endswith(endings)]
    others = ", ".join(sorted(each.name for each in remotes if each not in kept))
    if others and (named or not kept):
        raise UserError(
            f"{repo} has {others}, and files with {' '.join(endings)} are downloaded alone: code "
            "only with --trust_remote_code"
        )
    if others:
        print(f"left out, since it is neither data nor weights: {others}")
    for each in kept:
        target = (folder / each.name).resolve()
        if is_own_file(target):
            raise UserError(
                f"{each.name} of {repo} would replace the project's own {target}; name another "
                "folder with --output"
            )
    return kept


def is_own_file(target: Path) -> bool:
    """Whether a path belongs to this project, as opposed to the data and weights of its user."""
    if not target.is_relative_to(ROOT):
        return False
    folder, *rest = target.relative_to(ROOT).parts
    if not rest:
        return target.exists()
    if folder == "dataset":
        data_file = len(rest) == 1 and target.name.lower().endswith(DATA_FILES)
        return not data_file and rest[0] != "hub"
    return folder in PROJECT or folder.startswith(".")


def check_space(remotes: list[Remote], folder: Path) -> None:
    """UserError if the disk of the folder has no room for the files that are not there yet."""
    needed = 0
    for remote in remotes:
        target = folder / remote.name
        parts = (target, target.with_name(f".{target.name}.partial"))
        there = max(path.stat().st_size if path.exists() else 0 for path in parts)
        needed += max(0, (remote.size or 0) - there)
    disk = next(place for place in [folder, *folder.parents] if place.exists())
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise UserError(
            f"{needed / 1e9:.1f} GB are to be downloaded, and the disk of {folder} has "
            f"{free / 1e9:.1f} GB left; make room, or name another folder with --output"
        )


def download(
    repo: HuggingFaceRepo | ModelScopeRepo, remote: Remote, folder: Path
) -> tuple[Path, bool]:
    """Path of the file in `folder`, and whether it was downloaded now.

    Raises:
        UserError: the network fails, or the file is damaged and was removed.
    """
    target = (folder / remote.name).resolve()
    if not target.is_relative_to(folder.resolve()):
        raise UserError(f"{repo.repo} has a file that would be outside {folder}: {remote.name}")
    try:
        if target.exists() and not remote.check(target):
            return target, False
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        if partial.exists() and remote.size is not None and partial.stat().st_size > remote.size:
            partial.unlink()  # of another version
        repo.fetch(remote, partial)
        if wrong := remote.check(partial):
            with suppress(OSError):
                partial.unlink()
            raise UserError(f"{remote.name} {wrong}; it was removed, so download it again")
        os.replace(partial, target)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"cannot download {remote.name} to {folder}: {why}; try again") from error
    return target, True
