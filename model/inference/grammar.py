"""Constrained decoding: replies that follow a grammar, such as the JSON of a schema.

llguidance says which tokens may come next. It does not know max_new_tokens, which would cut a reply
in the middle of its JSON. So after each token a short completion is searched, and a token that does
not leave room for its completion is replaced by the first token of the last one.

The search follows the first of a few likely tokens after which something else may come than
before: so it leaves repetitions, such as those of a text with a pattern. Where that does not end,
as in some recursive schemas, it tries again with some choices made at random.
"""

import json
import random
from copy import copy
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from llguidance.torch import allocate_token_bitmask, fill_next_token_bitmask
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from model.errors import UserError
from model.inference.schemas import enforceable

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
    "1",
    "true",
    "null",
    "{",
    "[",
    ",",
    ',"',
)
MAX_COMPLETION = 2000  # tokens; a longer completion counts as none
MAX_BY_CHANCE = 256  # tokens of one that is searched with random choices
MAX_CANDIDATES = 100  # of the next token; a byte-level vocabulary begins with the single bytes
FEW_CANDIDATES = 12  # with more of them, as in a text, one letter and one digit stand for all
ATTEMPTS = 40  # of a search at the start
LATER_ATTEMPTS = 3  # and after each token
LOOK_BACK = 8  # tokens; shorter loops are left


class GrammarCompiler:
    """Compiles grammars for a tokenizer.

    Args:
        vocab_size: of the model, if it is another than the tokenizer's.
        eos: ends a reply, if the tokenizer has no token for that.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None, eos: int = 0
    ):
        self.tokenizer = tokenizer
        eos = eos if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        num_tokens = max(len(tokenizer), vocab_size or 0)
        try:
            self.tokens: LLTokenizer = from_tokenizer(tokenizer, num_tokens, eos)
        except Exception as error:  # an unusual kind of tokenizer
            reason = " ".join(str(error).split())
            raise UserError(
                f"this model's tokenizer allows no structured output: {reason}"
            ) from None
        self.vocab_size = vocab_size or num_tokens
        ids = (tokenizer.encode(text, add_special_tokens=False) for text in CLOSING_TEXTS)
        self.closing_tokens = [ids[0] for ids in ids if len(ids) == 1]
        self.texts = [self.tokens.decode_str([token]) for token in range(self.tokens.vocab_size)]

    def compile_json_schema(self, schema: dict[str, Any], max_new_tokens: int) -> "Grammar":
        """JSON that follows a schema, without optional white space."""
        compact = {**enforceable(schema), "x-guidance": {"whitespace_flexible": False}}
        return Grammar(
            self, LLMatcher.grammar_from_json_schema(json.dumps(compact)), max_new_tokens
        )

    def has_token(self, text: str) -> bool:
        """Whether a grammar can name a token by its text, in angle brackets."""
        return text in {token.content for token in self.tokenizer.added_tokens_decoder.values()}

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
        self.completion: list[int] | None = None
        completion = self.short_completion(ATTEMPTS)
        if completion is None or len(completion) > self.tokens_left:
            raise UserError(f"no reply of {self.tokens_left} tokens can follow the schema")
        self.completion, self.shortest = completion, len(completion)

    def copy(self) -> "Grammar":
        """The same grammar for another reply; its search at the start is not done again."""
        other = copy(self)
        other.matcher = self.matcher.deep_copy()
        other.bitmask = self.bitmask.clone()
        other.completion = list(self.completion or ())
        return other

    @property
    def is_lost(self) -> bool:
        """llguidance reached one of its limits: what is left of the last completion follows."""
        return self.matcher.is_error()

    @property
    def is_complete(self) -> bool:
        """The reply follows the grammar, if it ends here."""
        if self.is_lost:
            return not self.completion
        return self.matcher.is_accepting() or self.matcher.is_stopped()

    @property
    def is_finished(self) -> bool:
        """Nothing but the end can follow."""
        if self.is_lost:
            return not self.completion
        if self.matcher.is_stopped():
            return True
        return self.matcher.is_accepting() and int(self.token_mask().sum()) == 1

    def allowed(self) -> Tensor:
        """[V], bool."""
        if self.is_lost:
            mask = torch.zeros(self.compiler.vocab_size, dtype=torch.bool)
            mask[self.completion[0] if self.completion else self.eos] = True
            return mask
        return self.token_mask()[: self.compiler.vocab_size]

    def accept(self, token: int) -> int:
        """Accept the token, or replace it if the reply could not be completed in time after it."""
        self.tokens_left -= 1
        if self.is_lost:
            return self.completion.pop(0) if self.completion else self.eos
        if self.completion and token == self.completion[0]:
            self.matcher.consume_token(token)
            del self.completion[0]
            return token
        self.matcher.consume_token(token)
        completion = self.rest_of_last() or self.short_completion(LATER_ATTEMPTS)
        if completion is None or len(completion) > self.tokens_left:
            self.matcher.rollback(1)
            # a completion that is empty: the reply may end here, and has to
            token, *completion = self.completion or [self.eos]
            if not self.is_lost:
                self.matcher.consume_token(token)
        self.completion = completion
        return token

    def rest_of_last(self) -> list[int] | None:
        """The last completion, or the rest of it, if it completes the reply after another token
        too: so it is in the middle of a text. That saves a search."""
        last = self.completion or []
        for rest in (last[1:], last, last[2:]):
            if rest and len(rest) <= self.tokens_left and self.completes(rest):
                return rest
        return None

    def completes(self, tokens: list[int]) -> bool:
        if self.matcher.validate_tokens(tokens) < len(tokens):
            return False
        self.matcher.consume_tokens(tokens)
        complete = self.is_complete
        self.matcher.rollback(len(tokens))
        return complete

    def token_mask(self) -> Tensor:
        fill_next_token_bitmask(self.matcher, self.bitmask, 0)
        return (self.bitmask[0][:, None] >> torch.arange(32)).bitwise_and(1).bool().flatten()

    def short_completion(self, attempts: int) -> list[int] | None:
        """Tokens that complete the reply, not always the fewest; None: none was found."""
        most = min(MAX_COMPLETION, self.tokens_left)
        if self.completion is not None:
            most = min(most, 256 + 2 * len(self.completion))
        found = (
            self.search(min(most, MAX_BY_CHANCE) if seed else most, random.Random(seed), seed > 0)
            for seed in range(attempts)
        )
        return next((completion for completion in found if completion is not None), None)

    def search(self, most: int, chance: random.Random, by_chance: bool) -> list[int] | None:
        """A completion of at most `most` tokens.

        Args:
            by_chance: every other choice is made at random.
        """
        path: list[int] = []
        states = [self.next_tokens()]
        try:
            while not (self.matcher.is_stopped() or self.matcher.is_accepting()):
                if len(path) == most:
                    return None
                if forced := self.matcher.compute_ff_tokens():
                    if len(path) + len(forced) > most:
                        return None
                    self.matcher.consume_tokens(forced)
                    path += forced
                    states.append(b"")  # where there is no choice there is nothing to compare
                    continue
                choices = self.candidates()
                if by_chance and len(choices) > 1 and chance.random() < 0.5:
                    path.append(chance.choice(choices))
                    self.matcher.consume_token(path[-1])
                else:
                    path.append(self.choose(choices, set(states[-LOOK_BACK:]), chance))
                states.append(self.next_tokens() if len(choices) > 1 else b"")
            return None if self.matcher.is_error() else list(path)
        finally:
            self.matcher.rollback(len(path))

    def choose(self, choices: list[int], seen: set[bytes], chance: random.Random) -> int:
        """Consume the first token after which something new may come, or else any of them."""
        if len(choices) > 1:
            for token in choices:
                self.matcher.consume_token(token)
                if self.next_tokens() not in seen:
                    return token
                self.matcher.rollback(1)
        token = chance.choice(choices)
        self.matcher.consume_token(token)
        return token

    def next_tokens(self) -> bytes:
        if self.matcher.is_stopped():
            return b"end"
        fill_next_token_bitmask(self.matcher, self.bitmask, 0)
        return self.bitmask.numpy().tobytes()

    def candidates(self) -> list[int]:
        """Tokens that may come next, those first that end a JSON value soonest."""
        likely = [t for t in self.compiler.closing_tokens if self.matcher.validate_tokens([t])]
        others = self.token_mask().nonzero()[:MAX_CANDIDATES, 0].tolist()
        others = [t for t in others if t not in likely and t != self.eos]
        if len(others) > FEW_CANDIDATES:
            kinds = {}
            for token in others:
                kinds.setdefault(kind_of(self.compiler.texts[token]), token)
            others = list(kinds.values())
        return likely + others


def kind_of(text: str) -> str:
    """The same for all texts of letters, and for all of digits."""
    if text.isdigit():
        return "0"
    return ("A" if text.isupper() else "a") if text.isalpha() else text
