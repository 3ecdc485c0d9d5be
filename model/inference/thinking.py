"""Prompts that tell a model not to think.

A model that was trained on empty thoughts (--empty_think_ratio) answers at once after one. So its
prompts without open_thinking end with one, while those of a model that never saw any do not. Which
it is stands in a line of its tokenizer's chat template, which folders for transformers and GGUF
files keep, and in the `.json` of a `.pth`.

Templates other than our own decide this by themselves.
"""

from transformers import PreTrainedTokenizerBase

EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
LINE = "{%- set empty_think = true -%}\n"


def can_close_thoughts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template is our own, with a variable for it."""
    template = tokenizer.chat_template
    return isinstance(template, str) and "empty_think" in template


def closes_thoughts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether prompts without open_thinking end with an empty thought."""
    return isinstance(tokenizer.chat_template, str) and LINE in tokenizer.chat_template


def close_thoughts(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let prompts without open_thinking end with an empty thought from now on."""
    if can_close_thoughts(tokenizer) and not closes_thoughts(tokenizer):
        tokenizer.chat_template = LINE + tokenizer.chat_template
