"""The KV cache of the engine: one buffer per layer that all running sequences share.

Letters in the shape comments: R rows of the cache   B rows of one forward pass
T new tokens of each row   S length of the longest row   K key/value heads   D size of a head
"""

from torch import Tensor


class KVCache:
    """Keys and values, [R, K, capacity, D] for each layer. The capacity doubles when needed, so
    that growing copies each number about once on average."""

    def __init__(self, rows: int, capacity: int = 256):
        self.rows, self.capacity = rows, capacity
        self.layers: list[tuple[Tensor, Tensor]] = []

    def view(self, first: int, lengths: list[int], new_tokens: int) -> "KVCacheView":
        """The cache of one forward pass over rows first, first + 1, …, with room for that many more
        tokens behind the `lengths` that they have."""
        while self.capacity < max(lengths) + new_tokens:
            self.capacity *= 2
        return KVCacheView(self, first, lengths, new_tokens)

    def layer(self, number: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, grown to the current capacity; `like` has the dtype and sizes
        of what will be written."""
        if number == len(self.layers):
            empty = like.new_empty(self.rows, like.shape[1], 0, like.shape[3])
            self.layers.append((empty, empty))
        stored = self.layers[number]
        if stored[0].shape[2] < self.capacity:
            R, K, length, D = stored[0].shape
            keys, values = (each.new_zeros(R, K, self.capacity, D) for each in stored)
            grown = (keys, values)
            for old, new in zip(stored, grown, strict=True):
                new[:, :, :length] = old
            self.layers[number] = stored = grown
        return stored

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a row to another one."""
        for stored in self.layers:
            for each in stored:
                each[target, :, :length] = each[source, :, :length]


class KVCacheView:
    """Neighbouring rows during one forward pass, with the interface of a transformers cache as far
    as models use it. Each row continues at its own length."""

    def __init__(self, cache: KVCache, first: int, lengths: list[int], new_tokens: int):
        self.cache, self.lengths = cache, lengths
        self.rows = slice(first, first + len(lengths))
        self.equal_lengths = min(lengths) == max(lengths)
        self.end = max(lengths) + new_tokens

    def get_seq_length(self, layer: int = 0) -> int:
        return max(self.lengths)

    def update(
        self, key: Tensor, value: Tensor, layer: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Append [B, K, T, D] to each row; returns the whole rows, [B, K, S, D]."""
        whole = []
        for stored, new in zip(self.cache.layer(layer, key), (key, value), strict=True):
            rows = stored[self.rows]
            if self.equal_lengths:
                rows[:, :, self.lengths[0] : self.end] = new
            else:
                for row, tokens, length in zip(rows, new, self.lengths, strict=True):
                    row[:, length : length + tokens.shape[1]] = tokens
            whole.append(rows[:, :, : self.end])
        return whole[0], whole[1]
