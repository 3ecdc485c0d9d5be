"""Incremental detokenization: text is shown as soon as its tokens allow."""

from collections.abc import Iterable, Iterator

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


class StreamingDetokenizer:
    """The text of a reply that grows by tokens and ends before a stop string.

    Two things are held back: the bytes of an incomplete character (a Chinese character or an emoji
    can be several tokens), and a suffix that may turn out to be the beginning of a stop string.
    What is incomplete at the end becomes the replacement character.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Iterable[str] = ()):
        self.tokenizer, self.stop = tokenizer, [text for text in stop if text]
        self.decoder = DecodeStream(skip_special_tokens=True)
        self.ids: list[int] = []
        self.decoded = ""  # all complete characters
        self.text = ""  # the part of it that may be shown
        self.read_chars = 0
        self.stopped = False

    def feed(self, token: int) -> None:
        """Append a token."""
        self.ids.append(token)
        self.append(self.decoder.step(self.tokenizer.backend_tokenizer, token) or "")

    def end(self) -> None:
        """Release what is held back: no more tokens come."""
        if not self.stopped:
            whole = self.tokenizer.decode(self.ids, skip_special_tokens=True)
            self.append(whole[len(self.decoded) :], last=True)

    def read(self) -> str:
        """The text since the last call. Another thread may call `feed` meanwhile."""
        text, start = self.text, self.read_chars
        self.read_chars = len(text)
        return text[start:]

    def append(self, piece: str, last: bool = False) -> None:
        if self.stopped:
            return
        self.decoded += piece
        # a stop string that ends in the new piece may begin before it
        start = max(0, len(self.text) - max(map(len, self.stop), default=0))
        found = [at for stop in self.stop if (at := self.decoded.find(stop, start)) >= 0]
        if found:
            self.stopped = True
            self.text = self.decoded[: min(found)]
        else:
            held = 0 if last else self.partial_stop()
            self.text = self.decoded[: len(self.decoded) - held]

    def partial_stop(self) -> int:
        """The length of the longest suffix that is a proper prefix of a stop string."""
        longest = 0
        for stop in self.stop:
            # the longest first, and none that would not be longer than what was found
            for length in range(min(len(stop) - 1, len(self.decoded)), longest, -1):
                if stop.startswith(self.decoded[-length:]):
                    longest = length
                    break
        return longest


def stream_text(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens, in pieces, as they come."""
    stream = StreamingDetokenizer(tokenizer)
    for token in tokens:
        stream.feed(token)
        if piece := stream.read():
            yield piece
    stream.end()
    if piece := stream.read():
        yield piece
