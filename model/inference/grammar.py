"""Constrained decoding: replies that follow a grammar, such as the JSON of a schema.

llguidance says which tokens may come next. It does not know max_new_tokens, which would cut a reply
in the middle of its JSON. So after each token a short completion is searched, and a token that does
not leave room for its completion is replaced by the first token of the last one.
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

# Tried in this order, a JSON value ends soonest: close what is open, then the shortest value.
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
MAX_COMPLETION = 2000  # tokens; a longer completion counts as none


class GrammarCompiler:
    """Compiles grammars for a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.tokens: LLTokenizer = from_tokenizer(tokenizer)
        ids = (tokenizer.encode(text, add_special_tokens=False) for text in CLOSING_TEXTS)
        self.closing_tokens = [ids[0] for ids in ids if len(ids) == 1]

    def compile_json_schema(self, schema: dict[str, Any], max_new_tokens: int) -> "Grammar":
        """JSON that follows a schema, without optional white space."""
        compact = {**schema, "x-guidance": {"whitespace_flexible": False}}
        return Grammar(
            self, LLMatcher.grammar_from_json_schema(json.dumps(compact)), max_new_tokens
        )

    def compile_lark(self, grammar: str, max_new_tokens: int) -> "Grammar":
        return Grammar(self, LLMatcher.grammar_from_lark(grammar), max_new_tokens)


class Grammar:
    """The state of a grammar in one reply: a Constraint of the engine.

    Raises:
        UserError: the grammar is not valid, or no reply of max_new_tokens can follow it.
    """

    def __init__(self, compiler: GrammarCompiler, grammar: str, max_new_tokens: int):
        self.compiler, self.tokens_left = compiler, max_new_tokens
        self.eos = compiler.tokens.eos_token
        self.matcher = LLMatcher(compiler.tokens, grammar)
        if self.matcher.is_error():
            reason = self.matcher.get_error().strip().split("\n")[0]
            raise UserError(f"the schema cannot be followed: {reason}")
        self.bitmask = allocate_token_bitmask(1, compiler.tokens.vocab_size)
        completion = self.shortest_completion()
        if completion is None or len(completion) > self.tokens_left:
            raise UserError(f"no reply of {self.tokens_left} tokens can follow the schema")
        self.completion = completion

    def allowed(self) -> Tensor:
        """[V], bool."""
        return self.token_mask()[: self.compiler.tokens.vocab_size]

    def accept(self, token: int) -> int:
        """Accept the token, or replace it if the reply could not be completed in time after it."""
        self.tokens_left -= 1
        self.matcher.consume_token(token)
        completion = self.shortest_completion()
        if completion is None or len(completion) > self.tokens_left:
            self.matcher.rollback(1)
            token, completion = self.completion[0], self.completion[1:]
            self.matcher.consume_token(token)
        self.completion = completion
        return token

    def token_mask(self) -> Tensor:
        fill_next_token_bitmask(self.matcher, self.bitmask, 0)
        return (self.bitmask[0][:, None] >> torch.arange(32)).bitwise_and(1).bool().flatten()

    def shortest_completion(self) -> list[int] | None:
        """Tokens that complete the reply, EOS last; found greedily, so not always the fewest."""
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
        for token in self.compiler.closing_tokens:
            if self.matcher.validate_tokens([token]):
                return token
        return int(self.token_mask().nonzero()[0])
