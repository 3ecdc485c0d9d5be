"""Tokens as they come → text as early as it can be shown."""

from collections.abc import Iterable, Iterator

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


class StreamingDetokenizer:
    """The text of a reply, which grows by tokens and ends before a stop string.

    A Chinese character or an emoji can be several tokens: its bytes are held back until it is
    whole, and so is what may turn out to be the beginning of a stop string. What is incomplete at
    the end comes out as the replacement character.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Iterable[str] = ()):
        self.tokenizer, self.stop = tokenizer, [text for text in stop if text]
        self.decoder = DecodeStream(skip_special_tokens=True)
        self.ids: list[int] = []
        self.decoded = ""  # all characters that are whole
        self.text = ""  # of them, what is sure to be said
        self.taken = 0
        self.stopped = False

    def feed(self, token: int) -> None:
        self.ids.append(token)
        self.grow(self.decoder.step(self.tokenizer.backend_tokenizer, token) or "")

    def end(self) -> None:
        """No more tokens come."""
        if not self.stopped:
            whole = self.tokenizer.decode(self.ids, skip_special_tokens=True)
            self.grow(whole[len(self.decoded) :], last=True)

    def read(self) -> str:
        """What is new since the last time. Another thread may be feeding."""
        text, taken = self.text, self.taken
        self.taken = len(text)
        return text[taken:]

    def grow(self, piece: str, last: bool = False) -> None:
        if self.stopped:
            return
        self.decoded += piece
        start = max(0, len(self.text) - max(map(len, self.stop), default=0))
        found = [at for stop in self.stop if (at := self.decoded.find(stop, start)) >= 0]
        if found:
            self.stopped = True
            self.text = self.decoded[: min(found)]
        else:
            held = 0 if last else self.beginning_of_a_stop()
            self.text = self.decoded[: len(self.decoded) - held]

    def beginning_of_a_stop(self) -> int:
        """How many of the last characters are the beginning of a stop string."""
        lengths = [n for stop in self.stop for n in range(1, len(stop))]
        return max((n for n in lengths if self.ends_like_a_stop(n)), default=0)

    def ends_like_a_stop(self, n: int) -> bool:
        return any(len(stop) > n and self.decoded.endswith(stop[:n]) for stop in self.stop)


def stream_text(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> Iterator[str]:
    """The pieces of a text, as its tokens come."""
    stream = StreamingDetokenizer(tokenizer)
    for token in tokens:
        stream.feed(token)
        if piece := stream.read():
            yield piece
    stream.end()
    if piece := stream.read():
        yield piece
