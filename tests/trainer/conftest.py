"""What tests of several processes share."""

import pytest

# 7 or more rows in windows of 4: the last window of an epoch has too few rows for every rank
WINDOWS = dict(epochs=2, eval_interval=2, save_interval=1)


@pytest.fixture
def windows(any_stage) -> dict:
    """Settings, with a file to evaluate on."""
    any_stage.data = any_stage.write_data(any_stage.folder / "data.jsonl", any_stage.examples[:7])
    held_out = any_stage.write_data(any_stage.folder / "val.jsonl", any_stage.examples[7:10])
    return {**WINDOWS, "val_path": [held_out]}
