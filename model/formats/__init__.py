"""Formats of weights: our own, transformers folders, GGUF; and how files are written."""
