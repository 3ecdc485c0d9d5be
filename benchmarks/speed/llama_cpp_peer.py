"""llama.cpp for benchmarks: greedy decoding of a batch of prompts.

It uses the low-level interface, since the high-level one of llama-cpp-python runs one prompt after
the other.
"""

import tempfile
from pathlib import Path

import llama_cpp
import numpy as np

from model.formats.gguf_format import save_gguf
from model.model_minimind import MiniMindForCausalLM
from model.weights import load_tokenizer


class LlamaCpp:
    """A model in llama.cpp, for batches of `rows` sequences of up to `context` tokens each."""

    def __init__(
        self, model: MiniMindForCausalLM, dtype: str, rows: int, context: int, threads: int
    ):
        llama_cpp.llama_log_set(silent, None)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            save_gguf(model, load_tokenizer(), path, dtype, "benchmark")
            settings = llama_cpp.llama_model_default_params()
            settings.use_mmap = False  # the file is deleted
            self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = rows * context, rows
        settings.n_batch = settings.n_ubatch = max(512, rows * context)
        settings.n_threads = settings.n_threads_batch = threads
        if dtype == "float32":
            settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
            settings.flash_attn_type = (
                llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
            )  # it computes in float16
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.batch = llama_cpp.llama_batch_init(rows * context, 0, 1)
        self.vocab_size = model.config.vocab_size

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """Greedy continuations of the prompts."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        replies: list[list[int]] = [[] for _ in prompts]
        new, starts = prompts, [0] * len(prompts)
        for _ in range(new_tokens):
            for reply, token in zip(replies, self.step(new, starts), strict=True):
                reply.append(token)
            starts = [start + len(tokens) for start, tokens in zip(starts, new, strict=True)]
            new = [reply[-1:] for reply in replies]
        return replies

    def close(self) -> None:
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)

    def step(self, rows: list[list[int]], starts: list[int]) -> list[int]:
        """Decode more tokens of each row, at positions from its start on; returns the greedy next
        token of each row."""
        batch, n = self.batch, 0
        for row, (tokens, start) in enumerate(zip(rows, starts, strict=True)):
            for position, token in enumerate(tokens, start):
                batch.token[n], batch.pos[n] = token, position
                batch.seq_id[n][0], batch.n_seq_id[n] = row, 1
                batch.logits[n] = position == start + len(tokens) - 1
                n += 1
        batch.n_tokens = n
        if code := llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError(f"llama.cpp could not decode ({code})")
        ends = np.cumsum([len(tokens) for tokens in rows]) - 1
        return [self.argmax(int(end)) for end in ends]

    def argmax(self, index: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.context, index)
        return int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())


@llama_cpp.llama_log_callback
def silent(level, text, data):
    pass
