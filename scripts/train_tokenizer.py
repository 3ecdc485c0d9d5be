r"""Train the tokenizer: byte-level BPE, the control tokens and the chat template.

    python scripts/train_tokenizer.py --data_path dataset/pretrain_hq.jsonl --output_dir mine

BPE (arXiv 1508.07909) starts from the 256 bytes and, again and again, makes a new token of the two
neighbours that stand together most often. So what a vocabulary is good at depends on how often
each text counts, and counting is what this script does itself:

1. The text is cut into pieces (words, single digits, runs of signs, line breaks) that no token
   reaches across. Chinese has no spaces: there a piece is the text between two punctuation marks.
2. A piece counts once in a document, a sentence once in all files: a name that one article repeats,
   or an article that ten rows quote, must not buy tokens that other text has no use for. Of a
   long document only the beginning counts (--max_bytes).
3. A document counts as often as the weights of its file, its language and its content say.
4. `tokenizers` makes the merges from the counted pieces.

Rows may be {"text": …}, {"conversations": […]} or {"chosen": […], "rejected": […]}, in .jsonl or
.jsonl.gz; any other file is plain text.

The tokenizer in model/ was made so, from a permissively licensed corpus (medicine, classical
history, school arithmetic and reading tasks count little, for they are not what a chat is like)
and the demo data:

    python -m dataset.demo --output out/demo/data
    python scripts/train_tokenizer.py --output_dir model \
        --zh_weight 0.8 --file_weight 1 0.2 0.06 0.06 \
        --data_path tokenizer_corpus.jsonl.gz out/demo/data/pretrain_hq.jsonl \
            out/demo/data/sft_mini_512.jsonl out/demo/data/tools.jsonl \
        --row_weight '患者|治疗|症状|疾病=0.1' '太守|将军|皇帝|太子|刺史|朝廷|黄帝=0.1' \
            '[Hh]ow (many|much)=0.1' '[Aa]rticle|[Ss]ummar|[Hh]eadline|passage|Reuters=0.25'
"""

import gzip
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from dataset.lm_dataset import TAGS
from model.command_line import option, parse_arguments
from model.errors import UserError, exit_on_user_error
from model.weights import OUT, ROOT, atomic_write, write_json

TEMPLATE = ROOT / "dataset" / "chat_template.jinja"

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # never shown: ids 0, 1, 2
RESERVED = [f"<|reserved_{number}|>" for number in range(5)]  # for what you may want to add
CONTROL = [*SPECIAL, *TAGS, *RESERVED]  # tags are tokens too, but part of the answer's text
ROLES = ["system", "user", "assistant"]  # every turn begins with one: they count in every document

# How text is cut into pieces: Qwen2's rule, which llama.cpp knows by the name "qwen2".
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # English endings
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"  # letters, with one space or sign before them
    r"|\p{N}"  # one digit
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # signs, with the line breaks behind them
    r"|\s*[\r\n]+"  # line breaks
    r"|\s+(?!\S)|\s+"  # other white space
)
CHINESE = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
SENTENCE = re.compile(r"[^\n.!?。！？；]*[\n.!?。！？；]+|[^\n.!?。！？；]+$")
COPIES = 4  # how finely a weight is resolved: a piece that counts 2.25 is given 9 times
HELD_OUT = 100  # one document in so many is not trained on, and measured instead


@dataclass
class Args:
    data_path: list[str] = option([], "the text: .jsonl, .jsonl.gz or plain text, several files")
    file_weight: list[float] = option([], "how much each of these files counts (default: 1)")
    zh_weight: float = option(1.0, "how much a document counts that has Chinese in it")
    row_weight: list[str] = option(
        [], "'REGEX=NUMBER': how much a document counts in which REGEX is found (first match)"
    )
    max_bytes: int = option(3000, "count no more than this of a document, in UTF-8 bytes")
    vocab_size: int = option(6400, "tokens in all")
    output_dir: str = option(str(OUT / "tokenizer"), "where tokenizer.json is written")
    eval_path: list[str] = option([], "measure on these files too")


def main(args: Args) -> dict[str, dict[str, float]]:
    """Train, write and measure; returns {data: {language: characters per token}}."""
    files = [check_file(path) for path in args.data_path]
    eval_files = [check_file(path) for path in args.eval_path]
    if not files:
        raise UserError("there is no text to train on; name it with --data_path")
    smallest = len(CONTROL) + 256
    if args.vocab_size < smallest:
        raise UserError(
            f"--vocab_size {args.vocab_size} is too small: {smallest} tokens are taken by the "
            f"256 bytes and the {len(CONTROL)} control tokens"
        )

    counts, held_out = count_pieces(files, args)
    tokenizer = train(counts, args.vocab_size)
    save(tokenizer, Path(args.output_dir))

    measured = {"held out": measure(tokenizer, held_out)}
    for file in eval_files:
        measured[file.name] = measure(tokenizer, (row.chat for row in read_rows([file])))
    print(f"{tokenizer.get_vocab_size()} tokens in {args.output_dir}; characters per token:")
    for name, result in measured.items():
        print(f"  {name:24}", *(f"{language} {value:.3f}" for language, value in result.items()))
    return measured


# -- reading ---------------------------------------------------------------------------------------


@dataclass
class Row:
    """A document: its texts (of one text, or of the messages)."""

    file: int  # number of the file
    texts: list[str]  # all of it
    chat: list[str]  # without what neither user nor assistant wrote


def check_file(path: str) -> Path:
    if not Path(path).is_file():
        raise UserError(f"the file {path} does not exist")
    return Path(path)


def read_rows(files: list[Path]) -> Iterator[Row]:
    """The documents of the files, one after the other, with a progress bar in bytes."""
    size = sum(file.stat().st_size for file in files)
    done = 0
    with tqdm(total=size, unit="B", unit_scale=True, desc="reading", leave=False) as bar:
        for number, file in enumerate(files):
            name = file.name.removesuffix(".gz")
            read = read_jsonl if name.endswith((".jsonl", ".json")) else read_plain
            try:
                with open(file, "rb") as raw:
                    lines = gzip.open(raw) if file.suffix == ".gz" else raw
                    for texts, chat in read(file, lines):
                        yield Row(number, texts, chat)
                        bar.update(done + raw.tell() - bar.n)
            except UnicodeDecodeError as error:
                raise UserError(f"{file} is no UTF-8 text: {error.reason}") from error
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(f"{file} cannot be read: {error}") from error
            done += file.stat().st_size


def read_jsonl(file: Path, lines: Iterable[bytes]) -> Iterator[tuple[list[str], list[str]]]:
    """(all texts, those of user and assistant) of each line."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}, line {number} is not valid JSON: {error}") from error
        if isinstance(row, dict) and isinstance(row.get("text"), str):
            yield [row["text"]], [row["text"]]
            continue
        keys = ("conversations", "chosen", "rejected")
        lists = [row[key] for key in keys if key in row] if isinstance(row, dict) else []
        messages = [m for messages in lists if isinstance(messages, list) for m in messages]
        if not messages or not all(isinstance(message, dict) for message in messages):
            raise UserError(
                f'{file}, line {number} has no "text", "conversations", or "chosen" and "rejected"'
            )
        texts = [
            text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
            for message in messages
            for key in ("tools", "reasoning_content", "content", "tool_calls")
            if (text := message.get(key))
        ]
        speakers = [m for m in messages if m.get("role") in ("user", "assistant")]
        yield texts, [m["content"] for m in speakers if isinstance(m.get("content"), str)]


def read_plain(file: Path, lines: Iterable[bytes]) -> Iterator[tuple[list[str], list[str]]]:
    """Plain text in stretches of some thousand characters, cut at line breaks."""
    text = ""
    for line in lines:
        text += line.decode()
        if len(text) > 2000:
            yield [text], [text]
            text = ""
    if text:
        yield [text], [text]


def language(texts: list[str]) -> str:
    """zh: more than half of the visible characters are Chinese; en: none is; else mixed."""
    text = "".join(texts)
    chinese = len(CHINESE.findall(text))
    if not chinese:
        return "en"
    return "zh" if chinese > len("".join(text.split())) / 2 else "mixed"


# -- counting --------------------------------------------------------------------------------------


def count_pieces(files: list[Path], args: Args) -> tuple[Counter[str], list[list[str]]]:
    """How much each piece counts, and the documents that were held out."""
    cut = pre_tokenizers.Split(Regex(PIECES), "isolated").pre_tokenize_str
    weight = weigher(files, args)
    counts: Counter[str] = Counter()
    held_out: list[list[str]] = []
    sentences: set[int] = set()  # hashes of those that were counted
    for number, row in enumerate(read_rows(files), start=1):
        if number % HELD_OUT == 0:
            held_out.append(row.chat)
            continue
        pieces: dict[str, None] = {}  # a set that keeps its order
        room = args.max_bytes
        for text in row.texts:
            text = text.encode(errors="replace")[:room].decode(errors="ignore")
            room -= len(text.encode())
            pieces.update(dict.fromkeys(piece for piece, _ in cut(unseen(text, sentences))))
        worth = weight(row)
        for piece in [*pieces, *ROLES]:
            counts[piece] += worth
    return counts, held_out


def unseen(text: str, sentences: set[int]) -> str:
    """`text` without the sentences that came before (very short ones stay)."""
    new = []
    for sentence in SENTENCE.findall(text):
        key = hash(sentence.strip())
        if len(sentence.encode()) <= 24 or key not in sentences:
            new.append(sentence)
        sentences.add(key)
    return "".join(new)


def weigher(files: list[Path], args: Args) -> Callable[[Row], float]:
    """The function that says how much a document counts."""
    file_weights = args.file_weight or [1.0] * len(files)
    if len(file_weights) != len(files):
        raise UserError(
            f"--file_weight has {len(file_weights)} numbers for {len(files)} files of --data_path"
        )
    rules = []
    for rule in args.row_weight:
        pattern, equals, number = rule.rpartition("=")
        try:
            rules.append((re.compile(pattern), float(number)))
        except (re.error, ValueError) as error:
            raise UserError(
                f"--row_weight {rule!r} is not of the form REGEX=NUMBER: {error}"
            ) from error
    if min([args.zh_weight, *file_weights, *(number for _, number in rules)]) < 0:
        raise UserError("a weight is below 0; 0 leaves the documents out")

    def weight(row: Row) -> float:
        text = "\n".join(row.texts)
        worth = file_weights[row.file] * (args.zh_weight if CHINESE.search(text) else 1)
        return worth * next((number for rule, number in rules if rule.search(text)), 1)

    return weight


# -- training --------------------------------------------------------------------------------------


def train(counts: Counter[str], vocab_size: int) -> Tokenizer:
    """BPE over pieces, each as often as it counts."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes, so that nothing is unknown
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\0", "removed"), to_bytes]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=CONTROL,
        initial_alphabet=alphabet,
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(copies(counts), trainer, length=len(counts))
    if tokenizer.get_vocab_size() < vocab_size:
        raise UserError(
            f"the text yields only {tokenizer.get_vocab_size()} tokens; give more of it, or a "
            f"--vocab_size that is smaller than {vocab_size}"
        )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), "isolated"), to_bytes]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # The trainer marks all of CONTROL as special, and decoding would drop the tags.
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["content"] in SPECIAL
    return Tokenizer.from_str(json.dumps(content))


def copies(counts: Counter[str]) -> Iterator[str]:
    """The trainer counts for itself: give it each piece as often as it counts, with \\0 between."""
    owed = 0.0  # rounding is carried over, so that small weights are kept on average
    for piece, count in counts.items():
        owed += count * COPIES
        times = int(owed)
        owed -= times
        if times and "\0" not in piece:
            yield "\0".join([piece] * times)


def save(tokenizer: Tokenizer, directory: Path) -> None:
    """Write what transformers reads: tokenizer.json and tokenizer_config.json."""
    with atomic_write(directory / "tokenizer.json") as file:
        file.write((tokenizer.to_str(pretty=True) + "\n").encode())
    end_of_text, im_start, im_end = SPECIAL
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 32768,
            "bos_token": im_start,
            "eos_token": im_end,
            "pad_token": end_of_text,
            "unk_token": None,
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "chat_template": TEMPLATE.read_text(encoding="utf-8"),
        },
    )


def measure(tokenizer: Tokenizer, documents: Iterable[list[str]]) -> dict[str, float]:
    """Characters per token, over all documents of a language (see `language`; mixed ones apart)."""
    characters: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for texts in documents:
        texts = [text.encode(errors="replace").decode() for text in texts]  # no lone surrogates
        kind = language(texts)
        characters[kind] += sum(map(len, texts))
        tokens[kind] += sum(len(encoding.ids) for encoding in tokenizer.encode_batch_fast(texts))
    return {kind: characters[kind] / tokens[kind] for kind in ("zh", "en", "mixed") if tokens[kind]}


if __name__ == "__main__":
    with exit_on_user_error():
        main(parse_arguments(Args, __doc__))
