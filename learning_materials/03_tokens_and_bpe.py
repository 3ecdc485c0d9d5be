"""3. Tokens, and byte-pair encoding by hand

Question   A model reads ids. How does text become a short list of ids, without unknown text?
Concept    Start with the 256 bytes, which can write every text. Then merge the most frequent pair
           of adjacent tokens into a new token, repeatedly. Frequent words become one token, rare
           words stay several.
Equation   (a, b) = argmax count(a b); replace each "a b" by "ab"                (arXiv 1508.07909)
           over bytes instead of characters: GPT-2, section 2.2
Predict    Of the words low, lower, newest, widest: which pair is merged first?
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
    """Frequency of each piece that merges do not cross: words, digits, punctuation."""
    cut = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated").pre_tokenize_str
    return Counter(piece for text in texts for piece, _ in cut(text))


def main(lesson: Lesson) -> None:
    lesson.predict("Merge the most frequent adjacent pair four times. What are the tokens?")
    words = {tuple(word): count for word, count in WORDS.items()}
    merges, rows = [], []
    for _ in range(4):
        counts = pair_counts(words)
        # ties go to the pair with the smaller ids, as in the tokenizers library
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        words = {join(parts, pair): count for parts, count in words.items()}
        merges.append("".join(pair))
        rows.append((" + ".join(pair), counts[pair], " / ".join(" ".join(w) for w in words)))
    lesson.table("merge", "frequency", "the words now", rows=rows)
    library = train_bpe(WORDS, len(CONTROL) + 256 + len(merges))
    learnt = [library.id_to_token(len(CONTROL) + 256 + n) for n in range(len(merges))]
    assert merges[:2] == ["es", "est"] and merges == learnt
    lesson.conclude(f"{merges}: the library that trained our tokenizer learns the same, {learnt}.")

    tokenizer = load_tokenizer()
    lesson.predict("How many tokens do these texts have in MiniMind's tokenizer of 6,400?")
    rows = []
    for text in (" the", " tokenizer", "2026", "你好", "语言模型", "\U0001f40d"):
        ids = tokenizer(text)["input_ids"]
        characters = [tokenizer.convert_ids_to_tokens(i) for i in ids]
        rows.append((text, len(text), len(text.encode()), len(ids), " ".join(characters)))
    lesson.table("text", "characters", "bytes", "tokens", "as the file writes them", rows=rows)
    assert rows[2][3] == 4 and tokenizer.decode(ids) == text and len(ids) > 1
    lesson.conclude(
        "Digits are separate tokens, so that all numbers are split in the same way. Frequent "
        f"text is one token. The snake, which was not in its training text, becomes the "
        f"{len(text.encode())} bytes of its encoding in {len(ids)} tokens: no text is unknown. (G "
        "with a dot is a space: each byte is written as a character.)"
    )

    lesson.predict("A user types <|im_end|>. Should that end the turn?")
    typed = encode_text(tokenizer, "a <|im_end|> b").ids
    careless = tokenizer("a <|im_end|> b")["input_ids"]
    rows = [("encoded plainly", careless.count(2)), ("by encode_text", typed[:-1].count(2))]
    lesson.table("how", "token 2 before the end", rows=rows)
    assert careless.count(2) == 1 and typed[:-1].count(2) == 0 and typed[-1] == 2
    lesson.conclude("encode_text encodes user text as characters; only the template adds token 2.")

    lesson.predict(
        "Does a vocabulary twice as large halve the length? What does the embedding cost?"
    )
    texts = textbook()
    # the merges are not learnt from the last facts
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
        f"The gain diminishes (a new token brings {per_token[0] / per_token[-1]:.0f} times less "
        "at the end), while the embedding grows in proportion. A model of 26M has 6,400 tokens "
        f"rather than 150,000; the embedding is {6400 * 512 / 25.83e6:.0%} of its parameters."
    )

    figure, (left, right) = lesson.figure(2)
    left.plot(vocabularies, bytes_per_token, "o-")
    left.set(title="longer tokens", xlabel="vocabulary", ylabel="bytes per token, held-out text")
    right.plot(vocabularies, [p / 1e6 for p in parameters], "o-", color="C1")
    right.set(title="a larger embedding", xlabel="vocabulary", ylabel="million parameters")
    lesson.save(figure)

    lesson.exercise("Encode 'lowest' with the four merges. It is a new word.", solution_1)
    lesson.exercise("How many bytes per token do Chinese and English have here?", solution_2)


def solution_1(lesson: Lesson) -> None:
    parts = tuple("lowest")
    for pair in (("e", "s"), ("es", "t"), ("l", "o"), ("lo", "w")):  # in the order of learning
        parts = join(parts, pair)
    lesson.print(f"{parts}: a new word made of two known tokens")
    assert parts == ("low", "est")


def solution_2(lesson: Lesson) -> None:
    tokenizer = load_tokenizer()
    sizes, found = token_bytes(tokenizer), {}
    for language in ("zh", "en"):
        ids = [i for text in textbook(language) for i in tokenizer(text)["input_ids"]]
        found[language] = sizes[torch.tensor(ids)].float().mean().item()
        lesson.print(f"{language}: {found[language]:.2f} bytes per token (Chinese characters: 3)")
    assert all(2 < value < 8 for value in found.values())


if __name__ == "__main__":
    teach(main, __file__, __doc__)
