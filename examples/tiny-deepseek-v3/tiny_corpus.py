"""The corpus, its split, its chat documents and its tokenizer.

The text is Python's own standard library, pinned to one release so that every run sees the same
bytes. It is about 10 MB of careful code by many hands, it is on every machine that has that
Python, and its licence lets a model and excerpts be passed on. Tests, tables and generated files
are left out: they teach a small model nothing but digits.

A document is either a whole file, under a header line that names it, or a question and its answer:
the summary line of a docstring as the user's words, the function's source as the assistant's.
"""

import ast
import hashlib
import platform
import random
import sysconfig
import textwrap
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

PYTHON_VERSION = "3.11.7"
CORPUS_SHA256 = "041e0ec9ebea53cce9b398f25e1f259a37d1b5b4a9a6459d55a7feb61ff3c39b"

VOCAB_SIZE = 2048
PAD, BOS, EOS, USER, ASSISTANT = "<|pad|>", "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, USER, ASSISTANT)

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'user' %}"
    "{{ '<|user|>' + message['content'] }}"
    "{% else %}"
    "{{ raise_exception('this model knows the roles user and assistant only') }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# Runs of newlines and runs of two or more blanks are words of their own, so that an indentation is
# one token and a prompt may end after a newline. One blank belongs to the word that follows it.
WORDS = r"\n+| {2,}| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s"

SKIPPED_TOP = frozenset({"site-packages", "test", "pydoc_data", "ensurepip", "__phello__"})
SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test"})
# Unicode, HTML, X11 and bytecode tables, and what the build of one machine generated.
SKIPPED_FILES = frozenset(
    {
        "html/entities.py",
        "idlelib/idle.py",
        "re/_casefix.py",
        "stringprep.py",
        "this.py",
        "tkinter/constants.py",
    }
)
KEPT_ENCODINGS = frozenset({"__init__.py", "idna.py", "punycode.py", "utf_8_sig.py", "utf_16.py"})

# Well-written files on many subjects; the first line is what held_out.txt holds.
HELD_OUT_SHIPPED = (
    "csv.py",
    "graphlib.py",
    "heapq.py",
    "json/decoder.py",
    "queue.py",
    "shlex.py",
    "textwrap.py",
)
HELD_OUT = frozenset(HELD_OUT_SHIPPED) | {
    "bdb.py",
    "calendar.py",
    "concurrent/futures/thread.py",
    "configparser.py",
    "dataclasses.py",
    "fractions.py",
    "logging/handlers.py",
    "statistics.py",
}

HEADER = "# file: "
MAX_CHAT_CHARS = 700  # of an answer: about 230 tokens, so that one training window holds it


@dataclass(frozen=True, slots=True)
class Corpus:
    """Texts by path, split by file; `chat` is made from the files in `training` alone."""

    training: dict[str, str]
    held_out: dict[str, str]
    chat: list[str]
    sha256: str


def _is_wanted(path: str) -> bool:
    parts = path.split("/")
    if parts[0] in SKIPPED_TOP or parts[0].startswith(("config-", "_sysconfigdata")):
        return False
    if parts[0] == "encodings":
        return parts[-1] in KEPT_ENCODINGS
    return not SKIPPED_FOLDERS.intersection(parts[:-1]) and path not in SKIPPED_FILES


def file_document(path: str, text: str) -> str:
    """Return one file as the model reads it: a header line, then the text."""
    return f"{HEADER}{path}\n{text}"


def split_documents(text: str) -> list[str]:
    """Split a text at its header lines: the inverse of joining `file_document`s."""
    starts = [0] if text.startswith(HEADER) else []
    position = text.find(f"\n{HEADER}")
    while position >= 0:
        starts.append(position + 1)
        position = text.find(f"\n{HEADER}", position + 1)
    return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]


def _summary(function: ast.FunctionDef) -> str | None:
    """Return the first paragraph of the docstring as one line, or None if it says nothing."""
    docstring = ast.get_docstring(function)
    if docstring is None:
        return None
    line = " ".join(docstring.split("\n\n")[0].split())
    return line if 12 <= len(line) <= 160 else None


def _chat_documents(files: dict[str, str]) -> Iterator[str]:
    """Yield a user's question and the assistant's function for every documented function."""
    for path, text in sorted(files.items()):
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef):
                continue
            summary = _summary(node)
            lines = text.split("\n")[node.lineno - 1 : node.end_lineno]
            source = textwrap.dedent("\n".join(lines))
            # A function that is nothing but its docstring answers nothing.
            if summary is None or len(node.body) < 2 or len(source) > MAX_CHAT_CHARS:
                continue
            # A third of the questions name the function, chosen by the text so that it is fixed.
            named = hashlib.sha256(f"{path}:{node.name}".encode()).digest()[0] < 85
            question = f"{node.name}: {summary}" if named else summary
            yield f"{USER}{question}{ASSISTANT}{source}\n{EOS}"


def read_corpus(*, check: bool = True) -> Corpus:
    """Read the corpus from the standard library of the running Python.

    Raises:
        ValueError: another Python than the pinned one, or files that differ from its release.
    """
    if platform.python_version() != PYTHON_VERSION:
        raise ValueError(
            f"the corpus is the standard library of CPython {PYTHON_VERSION}, and this is "
            f"{platform.python_version()}: run training with that release "
            "(evaluate needs held_out.txt only, and runs with any)"
        )
    root = Path(sysconfig.get_paths()["stdlib"])
    digest = hashlib.sha256()
    training: dict[str, str] = {}
    held_out: dict[str, str] = {}
    for path in sorted(p.relative_to(root).as_posix() for p in root.rglob("*.py")):
        if not _is_wanted(path):
            continue
        with tokenize.open(root / path) as file:
            text = file.read()
        if not text.strip():
            continue
        digest.update(f"{path}\0{text}\0".encode())
        (held_out if path in HELD_OUT else training)[path] = text
    sha256 = digest.hexdigest()
    if check and sha256 != CORPUS_SHA256:
        raise ValueError(
            f"the standard library at {root} differs from CPython {PYTHON_VERSION}'s release: "
            f"sha256 {sha256}, expected {CORPUS_SHA256} (a distribution's patches, perhaps)"
        )
    return Corpus(training, held_out, list(_chat_documents(training)), sha256)


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Train the byte-level BPE of `VOCAB_SIZE` entries, special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode_documents(tokenizer: Tokenizer, documents: Sequence[str]) -> list[list[int]]:
    """Encode documents, each between `BOS` and `EOS`; a chat document brings its own `EOS`."""
    ends = [d if d.endswith(EOS) else d + EOS for d in documents]
    encodings = tokenizer.encode_batch([BOS + d for d in ends], add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def training_documents(corpus: Corpus) -> list[str]:
    """Return all training documents in a fixed order: files, then chat."""
    files = [file_document(path, text) for path, text in sorted(corpus.training.items())]
    return files + corpus.chat


def shuffled(count: int, *, seed: int) -> list[int]:
    """Return a permutation of `range(count)` that depends on the seed alone."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order
