"""Data as it is found → data to train on: download, clean, deduplicate, mix, count."""
