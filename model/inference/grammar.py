"""Replies that follow a grammar, such as JSON of a schema, whatever the model would rather say.

llguidance tells which tokens may come next. Here is what it does not know: that the reply must also
be whole when its tokens run out. After each token the shortest way to an end is sought, and a token
after which there would be no more room for it is not taken.
"""

import json
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from llguidance.torch import allocate_token_bitmask, fill_next_token_bitmask
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from model.errors import UserError

# In this order a JSON value ends soonest: close what is open, then the shortest of what must come.
CLOSING_TEXTS = (
    '"',
    "}",
    "]",
    '"}',
    '"]',
    "}}",
    "0",
    ":",
    '":',
    "{",
    "[",
    "1",
    "true",
    "null",
    ",",
    ',"',
)
MAX_COMPLETION = 2000  # tokens; an end farther away is taken for none


class GrammarCompiler:
    """What a tokenizer's tokens are to llguidance."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.tokens: LLTokenizer = from_tokenizer(tokenizer)
        ids = (tokenizer.encode(text, add_special_tokens=False) for text in CLOSING_TEXTS)
        self.closers = [ids[0] for ids in ids if len(ids) == 1]

    def compile_json_schema(self, schema: dict[str, Any], max_new_tokens: int) -> "Grammar":
        """JSON of a schema, without superfluous white space."""
        compact = {**schema, "x-guidance": {"whitespace_flexible": False}}
        return Grammar(
            self, LLMatcher.grammar_from_json_schema(json.dumps(compact)), max_new_tokens
        )

    def compile_lark(self, grammar: str, max_new_tokens: int) -> "Grammar":
        return Grammar(self, LLMatcher.grammar_from_lark(grammar), max_new_tokens)


class Grammar:
    """A constraint of the engine (engine.py): what may come next in one reply.

    Raises:
        UserError: the grammar is wrong, or no reply of so few tokens follows it.
    """

    def __init__(self, grammars: GrammarCompiler, grammar: str, max_new_tokens: int):
        self.grammars, self.left = grammars, max_new_tokens
        self.eos = grammars.tokens.eos_token
        self.matcher = LLMatcher(grammars.tokens, grammar)
        if self.matcher.is_error():
            reason = self.matcher.get_error().strip().split("\n")[0]
            raise UserError(f"the schema cannot be followed: {reason}")
        self.bits = allocate_token_bitmask(1, grammars.tokens.vocab_size)
        end = self.shortest_completion()
        if end is None or len(end) > self.left:
            raise UserError(f"no reply of {self.left} tokens can follow the schema")
        self.end = end

    def allowed(self) -> Tensor:
        """[V], bool."""
        return self.mask()[: self.grammars.tokens.vocab_size]

    def accept(self, token: int) -> int:
        """The token, or another one if after it the reply could not be whole in time."""
        self.left -= 1
        self.matcher.consume_token(token)
        end = self.shortest_completion()
        if end is None or len(end) > self.left:
            self.matcher.rollback(1)
            token, end = self.end[0], self.end[1:]
            self.matcher.consume_token(token)
        self.end = end
        return token

    def mask(self) -> Tensor:
        fill_next_token_bitmask(self.matcher, self.bits, 0)
        return (self.bits[0][:, None] >> torch.arange(32)).bitwise_and(1).bool().flatten()

    def shortest_completion(self) -> list[int] | None:
        """Tokens after which the reply is whole, EOS the last; not always the fewest there are."""
        path: list[int] = []
        try:
            while not self.matcher.is_stopped() and len(path) < MAX_COMPLETION:
                token = self.next_completion_token()
                self.matcher.consume_token(token)
                path.append(token)
                if token == self.eos:
                    return path
            return path if self.matcher.is_stopped() else None
        finally:
            self.matcher.rollback(len(path))

    def next_completion_token(self) -> int:
        if self.matcher.is_accepting():
            return self.eos
        if forced := self.matcher.compute_ff_tokens():
            return forced[0]
        for token in self.grammars.closers:
            if self.matcher.validate_tokens([token]):
                return token
        return int(self.mask().nonzero()[0])
