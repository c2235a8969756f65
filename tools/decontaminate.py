"""Count training documents that have long word sequences in common with evaluation items; --write copies the others.

    python -m tools.decontaminate --out_dir=data/mine                               # against HellaSwag, counts only
    python -m tools.decontaminate --out_dir=data/mine --against=my_items.jsonl --write=data/clean

A document is contaminated if it has 13 words in a row that an item also has (the n-gram test of GPT-3's appendix C,
arXiv:2005.14165), whatever the case, spacing and punctuation.
"""

import functools
import hashlib
import itertools
import json
import multiprocessing
import re
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from data_pipeline import DatasetConfig, ShardWriter, info
from nano416.config import parse_config, run_cli
from nano416.dataset import TokenDataset
from nano416.encode import num_cores
from nano416.files import locked
from nano416.tokenizer import load_tokenizer

HELLASWAG = "data/hellaswag_val.jsonl"
# Lower-case letters, digits, and all bytes of non-ASCII characters.
WORD = re.compile(rb"[a-z0-9\x80-\xff]+")
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
            length = min(n, len(words))
            if length >= MIN_WORDS:
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
        word_hashes = self._hash_words(WORD.findall(text.lower()))
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
            item = json.loads(line)
            if "endings" in item:
                texts = [item["ctx"], item["endings"][int(item["label"])]]
            else:
                texts = [value for value in item.values() if isinstance(value, str)]
            items.append(WORD.findall(" ".join(texts).lower().encode()))
    except FileNotFoundError as error:
        advice = "fetch it with: python eval_hellaswag.py --download" if path == HELLASWAG else "check --against"
        raise ValueError(f"{path}: no such file; {advice}") from error
    except (ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}:{len(items) + 1}: not an evaluation item ({error})") from error
    return items


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
    n_short = sum(len(words) < MIN_WORDS for words in items)
    n_tokens = sum(shard["tokens"] for shard in shards)
    fraction = n_matches / max(1, n_documents)
    print(
        f"{cfg.out_dir}: {n_matches:,} of {n_documents:,} training documents ({fraction:.4%}) share {cfg.ngram} words\n"
        f"  in a row with at least {n_items:,} of {len(items):,} items of {cfg.against}; {n_short} items too short\n"
        f"  {n_tokens / seconds / 1e6:.2f}M tokens/s with {workers} processes"
    )
    if cfg.write is not None:
        write_copy(dataset, Path(cfg.write), matches, {"against": cfg.against, "ngram": cfg.ngram})


def write_copy(dataset: TokenDataset, folder: Path, matches: list[list[Match]], options: dict[str, Any]) -> None:
    """Copy the dataset without the matches, which are given per train shard."""
    train = dataset.shards("train")
    lengths = [shard["tokens"] for shard in train]
    first = [0, *itertools.accumulate(lengths)]
    # One mask for all train tokens, since a document may continue in later shards.
    keep = np.ones(first[-1], bool)
    for number, shard_matches in enumerate(matches):
        for match in shard_matches:
            keep[first[number] + match.begin : first[number] + match.end] = False
    n_removed = sum(map(len, matches))
    job = {"copy_of": str(dataset.folder), "fingerprint": dataset.fingerprint, **options}
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
