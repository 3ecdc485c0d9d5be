"""The embedded data of `make demo`, a small bilingual world: `python -m dataset.demo`."""
