r"""Train the tokenizer: byte-level BPE, the control tokens and the chat template.

    python scripts/train_tokenizer.py --data_path dataset/pretrain_t2t_mini.jsonl --output_dir mine

BPE (arXiv 1508.07909) starts from the 256 bytes and repeatedly merges the pair of neighbouring
tokens that is most frequent. So the vocabulary depends on how often each text counts, and the
counting is what this script does itself:

1. The text is split into pre-tokens (words, single digits, runs of punctuation, line breaks), and
   no token crosses their borders. Chinese has no spaces: there a pre-token is the text between two
   punctuation marks.
2. A pre-token counts once per document and a sentence once in all files: a name that one article
   repeats, or an article that ten rows quote, should not get tokens that other text has no use for.
   Of a long document only the first --max_bytes count.
3. A document counts as often as the weights of its file, its language and its content say.
4. `tokenizers` learns the merges from the counted pre-tokens.

Rows may be {"text": …}, {"conversations": […]} or {"chosen": […], "rejected": […]}, in .jsonl,
.jsonl.gz or .json; any other file is plain text.

The tokenizer in model/ was trained by this command, on a permissively licensed corpus (medicine,
classical history, school arithmetic and reading tasks count little, since a chat is not like them)
and the demo data:

    python -m dataset.demo --output out/demo/data
    python scripts/train_tokenizer.py --output_dir model \
        --zh_weight 0.8 --file_weight 1 0.2 0.06 0.06 \
        --data_path tokenizer_corpus.jsonl.gz out/demo/data/pretrain_hq.jsonl \
            out/demo/data/sft_mini_512.jsonl out/demo/data/tools.jsonl \
        --row_weight '患者|治疗|症状|疾病=0.1' '太守|将军|皇帝|太子|刺史|朝廷|黄帝=0.1' \
            '[Hh]ow (many|much)=0.1' '[Aa]rticle|[Ss]ummar|[Hh]eadline|passage|Reuters=0.25'
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dataset.jsonl import check_file
from dataset.released import data_option, resolve_data_path
from model.command_line import option, parse_command_line
from model.errors import UserError, exit_on_user_error
from model.paths import OUT, ROOT


@dataclass
class Args:
    data_path: list[str] = data_option("pretrain", ".jsonl, .jsonl.gz or plain text")
    data_dir: str = option("", "folder of the default data file; default: dataset/")
    file_weight: list[float] = option([], "weight of each of these files (default: 1)")
    zh_weight: float = option(1.0, "weight of documents that contain Chinese", at_least=0)
    row_weight: list[str] = option(
        [], "'REGEX=NUMBER': weight of documents in which REGEX is found (first match)"
    )
    max_bytes: int = option(
        3000, "UTF-8 bytes of a document that count, from its beginning", at_least=1
    )
    vocab_size: int = option(6400, "size of the vocabulary")
    output_dir: str = option(str(OUT / "tokenizer"), "folder that tokenizer.json is written to")
    eval_path: list[str] = option([], "files to measure the compression on too", check=check_file)
    skip_bad_rows: bool = option(False, "leave bad rows out; 0: the first is an error")

    def check_files(self) -> None:
        resolve_data_path(self)
        for path in self.data_path:
            check_file(path)


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_command_line(Args, __doc__)


from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from dataset.chat import TAGS
from dataset.encoding import check_messages
from dataset.forms.files import open_lines, open_text
from dataset.forms.rows import as_pair, as_prompt, is_pair
from dataset.jsonl import BadRows, Row, error_at, parse_row
from dataset.text import LANGUAGES, is_chinese, language_of
from model.weights import atomic_write, write_json

TEMPLATE = ROOT / "dataset" / "chat_template.jinja"

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # never shown: ids 0, 1, 2
RESERVED = [f"<|reserved_{number}|>" for number in range(5)]  # for your own extensions
CONTROL = [*SPECIAL, *TAGS, *RESERVED]  # tags are tokens too, but part of the answer's text
ROLES = ["system", "user", "assistant"]  # every turn begins with one: they count in every document

# Pre-tokenization: Qwen2's regular expression, which llama.cpp knows as "qwen2".
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # English endings
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"  # letters, with one space or sign before them
    r"|\p{N}"  # one digit
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # signs, with the line breaks behind them
    r"|\s*[\r\n]+"  # line breaks
    r"|\s+(?!\S)|\s+"  # other white space
)
SENTENCE = re.compile(r"[^\n.!?。！？；]*[\n.!?。！？；]+|[^\n.!?。！？；]+$")
COPIES = 4  # resolution of the weights: a pre-token that counts 2.25 is repeated 9 times
HELD_OUT = 100  # every 100th document is held out, to measure on


def main(args: Args) -> dict[str, dict[str, float]]:
    """Train, write and measure; returns {data: {language: characters per token}}."""
    resolve_data_path(args)
    files = [check_file(path) for path in args.data_path]
    eval_files = [check_file(path) for path in args.eval_path]
    smallest = len(CONTROL) + 256
    if args.vocab_size < smallest:
        raise UserError(
            f"--vocab_size {args.vocab_size} is too small: {smallest} tokens are taken by the "
            f"256 bytes and the {len(CONTROL)} control tokens"
        )

    bad_rows = BadRows() if args.skip_bad_rows else None
    counts, held_out = count_pretokens(files, args, bad_rows)
    tokenizer = train(counts, args.vocab_size)
    save(tokenizer, Path(args.output_dir))

    measured = {"held out": measure(tokenizer, held_out)}
    for file in eval_files:
        documents = read_documents([file], bad_rows)
        measured[file.name] = measure(tokenizer, (document.chat for document in documents))
    if bad_rows and bad_rows.count:
        print(bad_rows)
    print(f"{tokenizer.get_vocab_size()} tokens in {args.output_dir}; characters per token:")
    for name, result in measured.items():
        print(f"  {name:24}", *(f"{language} {value:.3f}" for language, value in result.items()))
    return measured


# -- reading ---------------------------------------------------------------------------------------


@dataclass
class Document:
    """The texts of a document, or of the messages of a conversation."""

    file: int  # index of its file in --data_path
    texts: list[str]  # all of them
    chat: list[str]  # those of user and assistant


def read_documents(files: list[Path], bad_rows: BadRows | None = None) -> Iterator[Document]:
    """The documents of all files, with a progress bar in bytes. `bad_rows` counts the rows that are
    none, which are then left out."""
    size = sum(file.stat().st_size for file in files)
    done = 0
    with tqdm(total=size, unit="B", unit_scale=True, desc="reading", leave=False) as bar:
        for number, file in enumerate(files):
            is_json = file.name.removesuffix(".gz").endswith((".jsonl", ".json", ".ndjson"))
            if is_json:
                with open_lines(file) as (raw, lines):
                    for texts, chat in read_json_lines(file, lines, bad_rows):
                        yield Document(number, texts, chat)
                        bar.update(done + raw.tell() - bar.n)
            else:
                with open_text(file, newline="\n") as (raw, lines):
                    for texts, chat in read_plain_text(lines):
                        yield Document(number, texts, chat)
                        bar.update(done + raw.tell() - bar.n)
            done += file.stat().st_size


def read_json_lines(
    file: Path, lines: Iterable[bytes], bad_rows: BadRows | None
) -> Iterator[tuple[list[str], list[str]]]:
    """(all texts, those of user and assistant) of each line."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            with error_at(file, number, bad_rows):
                yield texts_of(parse_row(line))


def texts_of(row: Row) -> tuple[list[str], list[str]]:
    """All texts of a row, and those of user and assistant."""
    if isinstance(row.get("text"), str):
        return [row["text"]], [row["text"]]
    if is_pair(row):
        pair = as_pair(row)
        messages = check_messages([*pair["chosen"], *pair["rejected"]])
    else:
        messages = check_messages(as_prompt(row)["conversations"])
    texts = [
        text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
        for message in messages
        for key in ("tools", "reasoning_content", "content", "tool_calls")
        if (text := message.get(key))
    ]
    speakers = [m for m in messages if m.get("role") in ("user", "assistant")]
    return texts, [m["content"] for m in speakers if isinstance(m.get("content"), str)]


def read_plain_text(lines: Iterable[str]) -> Iterator[tuple[list[str], list[str]]]:
    """Plain text in documents of some thousand characters, split at line breaks."""
    text = ""
    for line in lines:
        text += line
        if len(text) > 2000:
            yield [text], [text]
            text = ""
    if text:
        yield [text], [text]


# -- counting --------------------------------------------------------------------------------------


def count_pretokens(
    files: list[Path], args: Args, bad_rows: BadRows | None = None
) -> tuple[Counter[str], list[list[str]]]:
    """The weighted count of each pre-token, and the held-out documents."""
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated").pre_tokenize_str
    weight = document_weights(files, args)
    counts: Counter[str] = Counter()
    held_out: list[list[str]] = []
    sentences: set[int] = set()  # hashes of those that were counted
    for number, document in enumerate(read_documents(files, bad_rows), start=1):
        if number % HELD_OUT == 0:
            held_out.append(document.chat)
            continue
        found: dict[str, None] = {}  # the document's pre-tokens: a set that keeps its order
        bytes_left = args.max_bytes
        for text in document.texts:
            text = text.encode(errors="replace")[:bytes_left].decode(errors="ignore")
            bytes_left -= len(text.encode())
            found.update(dict.fromkeys(part for part, _ in split(unseen(text, sentences))))
        document_weight = weight(document)
        for pretoken in [*found, *ROLES]:
            counts[pretoken] += document_weight
    return counts, held_out


def unseen(text: str, sentences: set[int]) -> str:
    """`text` without the sentences that were counted before (very short ones stay)."""
    new = []
    for sentence in SENTENCE.findall(text):
        key = hash(sentence.strip())
        if len(sentence.encode()) <= 24 or key not in sentences:
            new.append(sentence)
        sentences.add(key)
    return "".join(new)


def document_weights(files: list[Path], args: Args) -> Callable[[Document], float]:
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

    def weight(document: Document) -> float:
        text = "\n".join(document.texts)
        base = file_weights[document.file] * (args.zh_weight if is_chinese(text) else 1)
        return base * next((number for rule, number in rules if rule.search(text)), 1)

    return weight


# -- training --------------------------------------------------------------------------------------


def train(counts: Counter[str], vocab_size: int) -> Tokenizer:
    """BPE over the weighted pre-tokens."""
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
        [pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"), to_bytes]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # The trainer marks all of CONTROL as special, and decoding would drop the tags.
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["content"] in SPECIAL
    return Tokenizer.from_str(json.dumps(content))


def copies(counts: Counter[str]) -> Iterator[str]:
    """Each pre-token as often as it counts, joined by \\0: the trainer does its own counting."""
    remainder = 0.0  # rounding is carried over, so that small weights are kept on average
    for pretoken, count in counts.items():
        remainder += count * COPIES
        times = int(remainder)
        remainder -= times
        if times and "\0" not in pretoken:
            yield "\0".join([pretoken] * times)


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
    """Characters per token, by the documents' language."""
    characters: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for texts in documents:
        texts = [text.encode(errors="replace").decode() for text in texts]  # no lone surrogates
        kind = language_of("\n".join(texts))
        characters[kind] += sum(map(len, texts))
        tokens[kind] += sum(len(encoding.ids) for encoding in tokenizer.encode_batch_fast(texts))
    return {kind: characters[kind] / tokens[kind] for kind in LANGUAGES if tokens[kind]}


if __name__ == "__main__":
    with exit_on_user_error():
        main(args)
