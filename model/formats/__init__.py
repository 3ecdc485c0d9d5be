"""Weights in the formats of others: transformers folders, GGUF for llama.cpp and ollama."""
