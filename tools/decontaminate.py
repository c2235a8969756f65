"""Count training documents that have long word sequences in common with evaluation items; --write copies the others.

    python -m tools.decontaminate --out_dir=data/mine                               # against HellaSwag, counts only
    python -m tools.decontaminate --out_dir=data/mine --against=my_items.jsonl --write=data/clean

A document is contaminated if it has 13 words in a row that an item also has (the n-gram test of GPT-3's appendix C,
arXiv:2005.14165), whatever the case, accents, spacing, punctuation and invisible characters. Of scripts without spaces,
two characters of Chinese and Japanese count as a word, and four of Thai, Lao, Burmese and Khmer.
"""

import functools
import hashlib
import html
import itertools
import json
import multiprocessing
import re
import time
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from data_pipeline import DatasetConfig, ShardWriter, info
from nano416.config import parse_config, run_cli, visible
from nano416.dataset import TokenDataset
from nano416.encode import num_cores
from nano416.files import locked
from nano416.tokenizer import load_tokenizer, utf8

HELLASWAG = "data/hellaswag_val.jsonl"
# Lower-case letters, digits, and all bytes of non-ASCII characters, of which fold_words knows more.
WORD = re.compile(rb"[a-z0-9\x80-\xff]+")
# Badly extracted web pages spell an apostrophe &#39; and a space &nbsp;.
ENTITY = re.compile(rb"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});")
# Scripts without spaces, of which every letter is compared as a word: Chinese, Japanese; Thai, Lao, Burmese, Khmer.
CJK = "\u3005-\u3007\u3041-\u3096\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
SOUTHEAST_ASIAN = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\ua9e0-\ua9ff\uaa60-\uaa7f"
UNICODE_WORD = re.compile(rf"(?=[^\W_])[{CJK}{SOUTHEAST_ASIAN}]|[^\W_{CJK}{SOUTHEAST_ASIAN}]+")
# How many letters make up a real word, roughly: Chinese 1.6, Japanese 2.3, Thai 4 without its vowel signs.
LETTERS_PER_WORD = {re.compile(f"[{CJK}]"): 2, re.compile(f"[{SOUTHEAST_ASIAN}]"): 4}
# Combining marks, such as accents and vowel signs, and invisible characters.
IGNORED_CATEGORIES = ("Mn", "Mc", "Me", "Cf")
# What Unicode calls letters and a reader does not: apostrophes, the Arabic stretch of a line, invisible fillers.
NOT_LETTERS = {**dict.fromkeys("ʹʺʻʼʽʾʿˈˮꞋꞌ", " "), "\u0640": "", "\u115f": "", "\u1160": ""}
# Shorter sequences are common phrases.
MIN_WORDS = 8
# Any odd number will do: the hashes of the words are random already.
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class DecontaminateConfig:
    out_dir: str = "data/fineweb_edu"  # folder of the dataset
    against: str = "hellaswag"  # hellaswag, or a JSONL file of evaluation items
    ngram: int = 13  # words in a row that make a document contaminated
    write: str | None = None  # folder for a copy without the contaminated documents (none: only report)
    workers: int | None = None  # processes (one per core)

    def __post_init__(self) -> None:
        if self.ngram < MIN_WORDS:
            raise ValueError(f"ngram={self.ngram} is below {MIN_WORDS}: common phrases would count as copies")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers={self.workers} must be at least 1")


class Match(NamedTuple):
    """A contaminated document: tokens begin ... end - 1, counted from the start of its shard, and the item in it."""

    begin: int
    end: int
    item: int


class NgramIndex:
    """The n-grams of evaluation items as sorted 64-bit hashes. An item of fewer than n words is one shorter n-gram."""

    def __init__(self, items: list[list[bytes]], n: int):
        self.word_hashes = {word: hash_word(word) for words in items for word in words}
        item_of_hash: dict[int, dict[int, int]] = {}
        for item, words in enumerate(items):
            length = ngram_length(words, n)
            if length:
                hashes = hash_ngrams(self._hash_words(words), length).tolist()
                item_of_hash.setdefault(length, {}).update(dict.fromkeys(hashes, item))
        # length -> (sorted hashes, their items)
        self.tables: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for length, table in item_of_hash.items():
            hashes = np.array(list(table), np.uint64)
            order = np.argsort(hashes)
            self.tables[length] = (hashes[order], np.array(list(table.values()))[order])

    def find(self, text: bytes) -> int | None:
        """An item that has an n-gram in common with `text`, or None."""
        word_hashes = self._hash_words(split_words(text))
        for length, (hashes, items) in self.tables.items():
            candidates = hash_ngrams(word_hashes, length)
            indices = np.searchsorted(hashes, candidates).clip(max=len(hashes) - 1)
            matches = np.flatnonzero(hashes[indices] == candidates)
            if len(matches):
                return int(items[indices[matches[0]]])
        return None

    def _hash_words(self, words: list[bytes]) -> np.ndarray:
        """uint64 hashes; 0 for words that no item has."""
        return np.array([self.word_hashes.get(word, 0) for word in words], np.uint64)


def split_words(text: bytes) -> list[bytes]:
    """The words of a text in the form in which they are compared."""
    if b"&" in text:
        text = ENTITY.sub(lambda match: html.unescape(match[0].decode()).encode(), text)
    words = WORD.findall(text.lower())
    if text.isascii():
        return words
    # Word by word: in English text one in a hundred is not ASCII, and to fold all would double the time of the search.
    folded = []
    for word in words:
        if word.isascii():
            folded.append(word)
        else:
            folded += fold_words(word)
    return folded


def fold_words(word: bytes) -> list[bytes]:
    """The words in a run of letters and non-ASCII characters, without what a reader would not call a difference.

    Compatibility forms (ligatures, full-width letters) and capitals become ordinary small letters; accents, vowel signs
    and invisible characters are dropped; dashes, quotes and spaces of all kinds separate words.
    """
    # NFKD: accents become characters of their own, so that composed, decomposed and bare letters are one.
    text = unicodedata.normalize("NFKD", word.decode("utf-8", "replace")).casefold()
    kept = [NOT_LETTERS.get(c, c) for c in text if unicodedata.category(c) not in IGNORED_CATEGORIES]
    # casefold keeps the Turkish ı, whose capital is I.
    return [folded.encode() for folded in UNICODE_WORD.findall("".join(kept).replace("ı", "i"))]


def ngram_length(words: list[bytes], n: int) -> int:
    """The length of an item's n-grams; 0 if the item is too short to be told from common phrases."""
    n_real_words = 0.0
    for word in words:
        n_real_words += 1 / next((n for letter, n in LETTERS_PER_WORD.items() if letter.fullmatch(word.decode())), 1)
    # 1, except for items in scripts without spaces.
    per_word = round(len(words) / max(1, n_real_words))
    length = min(n * per_word, len(words))
    return length if length >= MIN_WORDS * per_word else 0


def hash_word(word: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(word, digest_size=8).digest())


def hash_ngrams(word_hashes: np.ndarray, n: int) -> np.ndarray:
    """One uint64 hash per n consecutive words: a polynomial in their hashes."""
    count = max(0, len(word_hashes) - n + 1)
    # Modulo 2^64: the products are meant to overflow.
    hashes = np.zeros(count, np.uint64)
    for k in range(n):
        hashes = hashes * MULTIPLIER + word_hashes[k : k + count]
    return hashes


def read_items(path: str) -> list[list[bytes]]:
    """The words of each item of a JSONL file: context and right ending of HellaSwag, all strings of other items."""
    items: list[list[bytes]] = []
    try:
        for line in Path(path).read_bytes().splitlines():
            items.append(split_words(utf8(item_text(json.loads(line)))))
    except FileNotFoundError as error:
        advice = "fetch it with: python eval_hellaswag.py --download" if path == HELLASWAG else "check --against"
        raise ValueError(f"{path}: no such file; {advice}") from error
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; check --against") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}:{len(items) + 1}: not an evaluation item ({error})") from error
    if not items:
        raise ValueError(f"{path} holds no evaluation items; check --against")
    return items


def item_text(item: Any) -> str:
    """The text of one item, of which a document must not have a copy. Raises ValueError."""
    if not isinstance(item, dict):
        raise ValueError(f"expected an object of texts, got {type(item).__name__}")
    if "endings" not in item:
        return " ".join(value for value in item.values() if isinstance(value, str))
    context = item.get("ctx")
    endings = item["endings"]
    label = item.get("label")
    # The Hub's copy of HellaSwag has its labels as text.
    if isinstance(label, str) and re.fullmatch("[0-9]+", label):
        label = int(label)
    # Not isinstance: a bool is an int too.
    if not isinstance(context, str) or not isinstance(endings, list) or type(label) is not int:
        raise ValueError("expected ctx as a text, endings as a list and label as an index")
    if not 0 <= label < len(endings) or not isinstance(endings[label], str):
        raise ValueError(f"label {label} is not the index of a text among {len(endings)} endings")
    return f"{context} {endings[label]}"


def read_documents(dataset: TokenDataset, number: int) -> Iterator[tuple[int, np.ndarray]]:
    """(first token, tokens) of the documents that begin in train shard `number`, to their ends in later shards."""
    eot_id = dataset.tokenizer["eot_id"]
    shards = dataset.shards("train")
    tokens = dataset.read(shards[number])
    begins = np.append(0, np.flatnonzero(tokens == eot_id) + 1)
    # The first tokens may belong to a document that began in an earlier shard.
    if number and dataset.read(shards[number - 1])[-1] != eot_id:
        begins = begins[1:]
    for begin, end in itertools.pairwise([*begins.tolist(), len(tokens)]):
        document = tokens[begin:end]
        for shard in shards[number + 1 :]:
            if not len(document) or document[-1] == eot_id:
                break
            continuation = dataset.read(shard)
            is_eot = continuation == eot_id
            length = int(is_eot.argmax()) + 1 if is_eot.any() else len(continuation)
            document = np.concatenate([document, continuation[:length]])
        if len(document):
            yield begin, document


def search_shard(dataset: TokenDataset, index: NgramIndex, number: int) -> tuple[int, list[Match]]:
    """(documents that begin in train shard `number`, the contaminated ones)."""
    tokenizer = load_tokenizer(dataset.tokenizer)
    n_documents = 0
    matches = []
    for begin, document in read_documents(dataset, number):
        n_documents += 1
        item = index.find(tokenizer.decode_bytes(document.tolist()))
        if item is not None:
            matches.append(Match(begin, begin + len(document), item))
    return n_documents, matches


def decontaminate(cfg: DecontaminateConfig) -> None:
    """Print how many documents and items are affected; with cfg.write also copy the dataset without them."""
    items = read_items(HELLASWAG if cfg.against == "hellaswag" else cfg.against)
    index = NgramIndex(items, cfg.ngram)
    dataset = TokenDataset(cfg.out_dir)
    shards = dataset.shards("train")
    workers = cfg.workers or num_cores()
    search = functools.partial(search_shard, dataset, index)
    started = time.perf_counter()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        results = list(tqdm(pool.map(search, range(len(shards))), total=len(shards), desc="search", disable=None))
    seconds = time.perf_counter() - started
    n_documents = sum(count for count, _ in results)
    matches = [matches for _, matches in results]
    n_matches = sum(map(len, matches))
    n_items = len({match.item for match in itertools.chain(*matches)})
    n_short = sum(ngram_length(words, cfg.ngram) == 0 for words in items)
    n_tokens = sum(shard["tokens"] for shard in shards)
    fraction = n_matches / max(1, n_documents)
    report = (
        f"{cfg.out_dir}: {n_matches:,} of {n_documents:,} training documents ({fraction:.4%}) share {cfg.ngram} words\n"
        f"  in a row with at least {n_items:,} of {len(items):,} items of {cfg.against}; {n_short} items too short\n"
        f"  {n_tokens / seconds / 1e6:.2f}M tokens/s with {workers} processes"
    )
    print(visible(report))
    if cfg.write is not None:
        write_copy(dataset, Path(cfg.write), matches, {"against": cfg.against, "ngram": cfg.ngram})


def write_copy(dataset: TokenDataset, folder: Path, matches: list[list[Match]], options: dict[str, Any]) -> None:
    """Copy the dataset without the matches, which are given per train shard. Raises ValueError if none remain."""
    train = dataset.shards("train")
    lengths = [shard["tokens"] for shard in train]
    first = [0, *itertools.accumulate(lengths)]
    # One mask for all train tokens, since a document may continue in later shards.
    keep = np.ones(first[-1], bool)
    for number, shard_matches in enumerate(matches):
        for match in shard_matches:
            keep[first[number] + match.begin : first[number] + match.end] = False
    n_removed = sum(map(len, matches))
    if not keep.any():
        raise ValueError(f"{folder} is not written: none of the training documents would remain; check --against")
    # What is removed depends on the contents of the items' file and on the rules above, not only on its name.
    kept = hashlib.sha256(keep.tobytes()).hexdigest()
    job = {"copy_of": str(dataset.folder), "fingerprint": dataset.fingerprint, **options, "kept": kept}
    with locked(folder):
        shard_tokens = max(shard["tokens"] for shard in dataset.meta["shards"])
        writer = ShardWriter(folder, job, dataset.tokenizer, shard_tokens)
        if not writer.is_finished:
            writer.discard()
            for shard in dataset.shards("val"):
                writer.add("val", np.asarray(dataset.read(shard)))
            for number, shard in enumerate(train):
                writer.add("train", dataset.read(shard)[keep[first[number] : first[number + 1]]])
            source = f"{dataset.meta.get('source')} without {n_removed:,} documents"
            writer.finish({"source": source, "removed": n_removed})
    info(DatasetConfig(str(folder)))


if __name__ == "__main__":
    run_cli(lambda: decontaminate(parse_config(DecontaminateConfig)))
