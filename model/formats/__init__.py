"""Other formats of weights: transformers folders, GGUF (llama.cpp, ollama), earlier MiniMind."""
