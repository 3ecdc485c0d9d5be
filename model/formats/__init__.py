"""Other formats of weights: transformers folders, GGUF (llama.cpp, ollama), earlier MiniMind; and
how files are written."""
