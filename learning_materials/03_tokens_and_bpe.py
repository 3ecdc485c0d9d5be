"""3. Tokens, and byte-pair encoding by hand

Question   A model reads numbers. How does text become few of them without any text being unknown?
Concept    Begin with bytes, of which there are 256, so that every text can be written. Then join
           the most frequent pair of neighbours into a new token, again and again: frequent words
           become one token, rare ones stay in parts.
Equation   (a, b) = argmax count(a b); replace each "a b" by "ab"                (arXiv 1508.07909)
           over bytes instead of characters: GPT-2, section 2.2
Predict    Of the words low, lower, newest, widest: which pair is joined first?
"""

from collections import Counter

import torch
from lesson import Lesson, teach, textbook
from tokenizers import Regex, pre_tokenizers

from dataset.lm_dataset import encode_text, token_bytes
from model.weights import load_tokenizer
from scripts.train_tokenizer import CONTROL, SPLIT_PATTERN
from scripts.train_tokenizer import train as train_bpe

WORDS = Counter({"low": 5, "lower": 2, "newest": 6, "widest": 3})


def pair_counts(words: dict[tuple[str, ...], int]) -> Counter[tuple[str, str]]:
    pairs: Counter[tuple[str, str]] = Counter()
    for parts, count in words.items():
        for pair in zip(parts, parts[1:], strict=False):
            pairs[pair] += count
    return pairs


def join(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    joined: list[str] = []
    for part in parts:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return tuple(joined)


def count_pieces(texts: list[str]) -> Counter[str]:
    """How often each piece of text comes that merges do not cross: words, digits, signs."""
    cut = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated").pre_tokenize_str
    return Counter(piece for text in texts for piece, _ in cut(text))


def main(lesson: Lesson) -> None:
    lesson.predict("Join the most frequent pair of neighbours four times. What are the tokens?")
    words = {tuple(word): count for word, count in WORDS.items()}
    merges, rows = [], []
    for _ in range(4):
        counts = pair_counts(words)
        # of equally frequent pairs the one with the smaller ids, as in the tokenizers library
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        words = {join(parts, pair): count for parts, count in words.items()}
        merges.append("".join(pair))
        rows.append((" + ".join(pair), counts[pair], " / ".join(" ".join(w) for w in words)))
    lesson.table("joined", "times", "the words now", rows=rows)
    library = train_bpe(WORDS, len(CONTROL) + 256 + len(merges))
    learnt = [library.id_to_token(len(CONTROL) + 256 + n) for n in range(len(merges))]
    assert merges[:2] == ["es", "est"] and merges == learnt
    lesson.conclude(f"{merges}: the library that made our tokenizer learns the same, {learnt}.")

    tokenizer = load_tokenizer()
    lesson.predict("How many tokens have these texts in MiniMind's tokenizer of 6,400?")
    rows = []
    for text in (" the", " tokenizer", "2026", "你好", "语言模型", "\U0001f40d"):
        ids = tokenizer(text)["input_ids"]
        characters = [tokenizer.convert_ids_to_tokens(i) for i in ids]
        rows.append((text, len(text), len(text.encode()), len(ids), " ".join(characters)))
    lesson.table("text", "characters", "bytes", "tokens", "as the file writes them", rows=rows)
    assert rows[2][3] == 4 and tokenizer.decode(ids) == text and len(ids) > 1
    lesson.conclude(
        "Digits stay apart, so that numbers are always cut alike; what is frequent in training "
        f"text is one token; and a snake, which it was never taught, is its {len(text.encode())} "
        f"bytes in {len(ids)} tokens: nothing is unknown. (G with a dot is a space: each byte is "
        "written as a character.)"
    )

    lesson.predict("Somebody types <|im_end|>. May that end the turn?")
    typed = encode_text(tokenizer, "a <|im_end|> b").ids
    careless = tokenizer("a <|im_end|> b")["input_ids"]
    rows = [("encoded plainly", careless.count(2)), ("by encode_text", typed[:-1].count(2))]
    lesson.table("how", "token 2 before the end", rows=rows)
    assert careless.count(2) == 1 and typed[:-1].count(2) == 0 and typed[-1] == 2
    lesson.conclude("encode_text keeps what a person types as characters; only we write token 2.")

    lesson.predict(
        "A vocabulary twice as large: are texts half as long? What does the embedding cost?"
    )
    texts = textbook()
    # the last facts are not among those that the merges are learnt from
    held_out, counts = texts[-120:], count_pieces(texts[:-120])
    size = sum(len(text.encode()) for text in held_out)
    rows = []
    for vocabulary in (280, 400, 600, 900, 1300):
        bpe = train_bpe(counts, vocabulary)
        tokens = sum(len(bpe.encode(text).ids) for text in held_out)
        rows.append((vocabulary, size / tokens, vocabulary * 512))
    lesson.table("vocabulary", "bytes per token", "parameters at width 512", rows=rows)
    vocabularies, bytes_per_token, parameters = zip(*rows, strict=True)
    gains = [b - a for a, b in zip(bytes_per_token, bytes_per_token[1:], strict=False)]
    per_token = [
        g / (b - a) for g, a, b in zip(gains, vocabularies, vocabularies[1:], strict=False)
    ]
    assert min(gains) > 0 and per_token[0] > 3 * per_token[-1]
    lesson.conclude(
        f"Text shrinks ever more slowly (a new token brings {per_token[0] / per_token[-1]:.0f} "
        "times less at the end), while the embedding grows in proportion: 6,400 rather than "
        f"150,000 for a model of 26M, where it is {6400 * 512 / 25.83e6:.0%} of all parameters."
    )

    figure, (left, right) = lesson.figure(2)
    left.plot(vocabularies, bytes_per_token, "o-")
    left.set(title="longer tokens", xlabel="vocabulary", ylabel="bytes per token, held-out text")
    right.plot(vocabularies, [p / 1e6 for p in parameters], "o-", color="C1")
    right.set(title="a larger embedding", xlabel="vocabulary", ylabel="million parameters")
    lesson.save(figure)

    lesson.exercise("Encode 'lowest' by the four merges. It was never seen.", solution_1)
    lesson.exercise("How many bytes of Chinese and of English does a token hold here?", solution_2)


def solution_1(lesson: Lesson) -> None:
    parts = tuple("lowest")
    for pair in (("e", "s"), ("es", "t"), ("l", "o"), ("lo", "w")):  # in the order of learning
        parts = join(parts, pair)
    lesson.print(f"{parts}: two known parts of a new word")
    assert parts == ("low", "est")


def solution_2(lesson: Lesson) -> None:
    tokenizer = load_tokenizer()
    sizes, found = token_bytes(tokenizer), {}
    for language in ("zh", "en"):
        ids = [i for text in textbook(language) for i in tokenizer(text)["input_ids"]]
        found[language] = sizes[torch.tensor(ids)].float().mean().item()
        lesson.print(f"{language}: {found[language]:.2f} bytes a token (a Chinese character has 3)")
    assert all(2 < value < 8 for value in found.values())


if __name__ == "__main__":
    teach(main, __file__, __doc__)
