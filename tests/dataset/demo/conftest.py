"""The demo data, made once for each file of tests."""

from pathlib import Path

import pytest
from demo_problems import read

from dataset.demo.files import write_demo_data


class Data(dict):
    """The rows of each file, by its name without .jsonl."""

    folder: Path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Data:
    folder = tmp_path_factory.mktemp("demo")
    counts = write_demo_data(folder, seed=42)
    rows = Data({path.stem: read(path) for path in sorted(folder.iterdir())})
    assert counts == {f"{name}.jsonl": len(some) for name, some in rows.items()}
    rows.folder = folder
    return rows
