"""Token shards to training batches: the order of training, mixtures, the loader.

    mixture = Mixture(DataConfig({"data/edu": 0.7, "data/code": 0.3}), seq_len=1024)
    loader = TokenLoader(mixture, BatchLayout(batch_sequences=640, batch_size=40), seed=42)
    batch = loader.next_batch()                     # batch.tokens and batch.targets, [40, 1024] each
    for tokens, targets in validation_batches(mixture.datasets["data/edu"], 1024, layout): ...

The order of training is a function of (seed, data, position): it is the same for any number of ranks, and a checkpoint
needs one number to continue it.
"""

# Tensor dimensions: B batch, T tokens

import bisect
import hashlib
import itertools
import json
import math
import queue
import resource
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nano416.dataset import Sequences, TokenDataset

# One micro-batch: tokens and targets [2, B, T], position of its first sequence, weight. Or what reading it raised.
Prefetched = tuple[Tensor, int, float] | BaseException


# ---- The order of training: position -> (source, sequence), by arithmetic --------------------------------------------

# Every block of so many positions has the exact counts of a mixture: a weight is off by at most 1/1024.
BLOCK = 1024
U64 = np.uint64


def splitmix64(x: np.ndarray, key: np.ndarray | np.uint64) -> np.ndarray:
    """The splitmix64 finalizer, a hash of 64-bit integers: every input bit changes every output bit."""
    # With an affine function instead, neighbours in the order stay correlated: z up to 9.8 over 20 keys and 10,000
    # positions, where this and numpy's shuffle have 0.5 and 1.0.
    x = x + key
    x = (x ^ (x >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> U64(27))) * U64(0x94D049BB133111EB)
    return x ^ (x >> U64(31))


def derive_key(*parts: int | np.ndarray) -> np.ndarray:
    """One 64-bit key per element from integers such as (seed, source, epoch)."""
    key = np.zeros(1, U64)
    for part in parts:
        # Splitmix64's own increment, 2**64 / golden ratio, so that a part of 0 changes the key too.
        key = splitmix64(key, np.asarray(part).astype(U64) + U64(0x9E3779B97F4A7C15))
    return key


def permute(i: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """Map each element of i by a permutation of [0, n) that `key` chooses, without a table of n entries.

    A 4-round Feistel network permutes the integers of an even number of bits; an element that lands outside [0, n) is
    mapped again until it lands inside. `key` has one element, or one per element of i.
    """
    # An even number of bits means at most 4 n integers, so an element is mapped at most 4 times on average.
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    shift = U64(half_bits)
    low_mask = U64((1 << half_bits) - 1)
    out = np.array(i, U64)
    keys = np.broadcast_to(key, np.shape(i))
    todo = np.arange(len(out))
    while len(todo):
        left = out[todo] >> shift
        right = out[todo] & low_mask
        round_key = keys[todo]
        # Four rounds of a random function are a random permutation to any observer (Luby and Rackoff, 1988).
        for _ in range(4):
            round_key = splitmix64(round_key, U64(0x9E3779B97F4A7C15))
            left, right = right, left ^ (splitmix64(right, round_key) & low_mask)
        out[todo] = left << shift | right
        todo = todo[out[todo] >= n]
    return out.astype(np.int64)


def mixture_counts(weights: list[float]) -> np.ndarray:
    """Sequences of each source per BLOCK, by largest remainder, so that they sum to BLOCK exactly."""
    exact = np.array(weights, dtype=np.float64)
    exact *= BLOCK / exact.sum()
    counts = np.floor(exact).astype(np.int64)
    # Stable, so that equal weights are ranked alike by every version of numpy.
    largest_remainders = np.argsort(counts - exact, kind="stable")[: BLOCK - counts.sum()]
    counts[largest_remainders] += 1
    return counts


class Sampler:
    """The order of training: which sequence of which source is read at each position of a run.

    Within a block of 1024 positions each source has its exact count, in random order. A source goes through its
    sequences in a new random permutation per epoch, each once per epoch. Any position can be computed directly.

    groups: per source, bounds [0, ..., count] within which its first epoch is shuffled (Sequences.shuffle_groups).
    stages: (first block, weights of the sources), the first from block 0.
    """

    def __init__(self, groups: list[np.ndarray], stages: list[tuple[int, list[float]]], seed: int):
        self.groups = groups
        self.seed = seed
        self.stage_starts = [start for start, _ in stages]
        self.per_block = [mixture_counts(weights) for _, weights in stages]
        # Sequences read from each source before each stage.
        self.read_before = [np.zeros_like(self.per_block[0])]
        for n_blocks, counts in zip(np.diff(self.stage_starts), self.per_block):
            self.read_before.append(self.read_before[-1] + n_blocks * counts)
        # Neighbouring micro-batches are in the same block.
        self._cached_block: tuple[int, list[tuple[int, int]]] = (-1, [])

    def locate(self, first: int, count: int) -> list[tuple[int, int]]:
        """(source, sequence) of the positions first ... first + count - 1."""
        located: list[tuple[int, int]] = []
        while len(located) < count:
            number, start = divmod(first + len(located), BLOCK)
            if self._cached_block[0] != number:
                self._cached_block = (number, self._block(number))
            located += self._cached_block[1][start : start + count - len(located)]
        return located

    def _block(self, number: int) -> list[tuple[int, int]]:
        """(source, sequence) of the 1024 positions of a block."""
        stage = bisect.bisect_right(self.stage_starts, number) - 1
        per_block = self.per_block[stage]
        already_read = self.read_before[stage] + (number - self.stage_starts[stage]) * per_block
        # The 1 here and the 2 below keep the keys of blocks and of epochs apart.
        slots = permute(np.arange(BLOCK), BLOCK, derive_key(self.seed, 1, number))
        # With counts [700, 324], slots below 700 belong to source 0 and the others to source 1.
        source = np.searchsorted(np.cumsum(per_block), slots, side="right")
        sequence = np.zeros(BLOCK, np.int64)
        for s in np.flatnonzero(per_block):
            sequence[source == s] = self._shuffled(int(s), already_read[s] + np.arange(int(per_block[s])))
        return list(zip(source.tolist(), sequence.tolist()))

    def _shuffled(self, source: int, index: np.ndarray) -> np.ndarray:
        """The sequences that a source contributes as its index-th, counted over all epochs."""
        groups = self.groups[source]
        count = groups[-1]
        epoch, i = np.divmod(index, count)
        group_start = np.zeros_like(i)
        group_size = np.full_like(i, count)
        if len(groups) > 2:
            # A download, which may still be running: its first epoch is shuffled group by group.
            group = np.searchsorted(groups, i, side="right") - 1
            group_start = np.where(epoch == 0, groups[group], 0)
            group_size = np.where(epoch == 0, groups[group + 1] - groups[group], count)
        sequences = np.empty_like(i)
        for size, start in set(zip(group_size.tolist(), group_start.tolist())):
            members = np.flatnonzero((group_size == size) & (group_start == start))
            key = derive_key(self.seed, 2, source, epoch[members], start)
            sequences[members] = start + permute(i[members] - start, size, key)
        return sequences


# ---- Mixtures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataConfig:
    """Where the training tokens come from."""

    sources: dict[str, float] = field(default_factory=lambda: {"data/fineweb_edu": 1.0})  # shard folders, a=0.7,b=0.3
    stages: str = ""  # other weights from a step on, "2000: a=0.5,b=0.5; 9000: b=1", rounded to 1024 sequences
    unique_tokens: int | None = None  # train on only the first N tokens, split by weight, over and over

    def __post_init__(self) -> None:
        parse_stages(self.stages, self.sources)
        if self.unique_tokens is not None and self.unique_tokens < 1:
            raise ValueError(f"unique_tokens={self.unique_tokens} must be at least 1, or none")


def parse_stages(text: str, sources: Mapping[str, float]) -> list[tuple[int, dict[str, float]]]:
    """(step, weight of every source) of every stage; the first begins at step 0 with the weights of `sources`."""
    stages = [(0, dict(sources))]
    for part in filter(str.strip, text.split(";")):
        step, _, mixture = part.partition(":")
        try:
            # The last "=", since a folder's name may hold one.
            pairs = [pair.rpartition("=") for pair in mixture.split(",")]
            stages.append((int(step), {name.strip(): float(weight) for name, _, weight in pairs}))
        except ValueError as error:
            raise ValueError(f'stages: cannot read {part.strip()!r}; write "STEP: FOLDER=WEIGHT,..."') from error
        if stages[-1][0] <= stages[-2][0] or not stages[-1][1].keys() <= sources.keys():
            known = ", ".join(sources)
            raise ValueError(f"stages: {part.strip()!r} needs a later step than the one before, and only {known}")
    for _, weights in stages:
        _check_weights(weights)
    return [(step, {name: weights.get(name, 0.0) for name in sources}) for step, weights in stages]


def _check_weights(sources: Mapping[str, float]) -> None:
    """Raise ValueError for weights that are no mixture, or too small to appear in a block."""
    # A sum below 1e-300 would overflow when the weights are divided by it.
    if not sources or min(sources.values()) < 0 or not 1e-300 < sum(sources.values()) < np.inf:
        raise ValueError(f"sources={dict(sources)} needs one folder or more, with weights >= 0 and one above 1e-300")
    for (name, weight), count in zip(sources.items(), mixture_counts(list(sources.values()))):
        if weight and not count:
            raise ValueError(f"sources: weight {weight:g} of {name} gives it not one sequence in {BLOCK}; raise it")


def _check_distinct(folders: Iterable[str]) -> None:
    """Raise ValueError if two names mean one folder, which would be trained on twice."""
    name_of: dict[Path, str] = {}
    for name in folders:
        other = name_of.setdefault(Path(name).resolve(), name)
        if other != name:
            raise ValueError(f"sources: {other} and {name} are the same folder; name it once, with the sum of weights")


class Mixture:
    """The datasets of a DataConfig, divided into sequences. Raises ValueError if they do not share one tokenizer.

    It needs no batch size and comes first in a run: vocabulary and number of steps follow from it.
    """

    def __init__(self, cfg: DataConfig, seq_len: int):
        self.seq_len = seq_len
        self.unique_tokens = cfg.unique_tokens
        self.datasets = {name: TokenDataset(name) for name in cfg.sources}
        first = next(iter(self.datasets.values()))
        self.tokenizer = first.tokenizer
        _check_distinct(cfg.sources)
        for other in self.datasets.values():
            if other.tokenizer != first.tokenizer:
                raise ValueError(
                    f"{first.folder} was made with tokenizer {_describe_tokenizer(first)}, {other.folder} with "
                    f"{_describe_tokenizer(other)}; prepare them with the same one"
                )
        stages = parse_stages(cfg.stages, cfg.sources)
        # Sources whose weight is 0 in every stage are for validation only.
        names = [name for name in cfg.sources if any(weights[name] for _, weights in stages)]
        self.trained = [self.datasets[name] for name in names]
        self.stages = [(step, [weights[name] for name in names]) for step, weights in stages]
        # A quarter of the files that this process may have open, at most 256, for all sources together.
        soft_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        max_open = 1024 if soft_limit == resource.RLIM_INFINITY else min(soft_limit, 1024)
        max_open_shards = max(1, max_open // 4 // len(self.trained))
        self.sequences = [
            Sequences(dataset, "train", seq_len, max_open_shards=max_open_shards) for dataset in self.trained
        ]
        for sequences in self.sequences:
            if not sequences.count:
                tokens = sum(shard["tokens"] for shard in sequences.shards)
                raise ValueError(
                    f"{sequences.dataset.folder}: no train shard holds a sequence of seq_len + 1 = {seq_len + 1} "
                    f"tokens ({tokens:,} in all); lower seq_len or add data"
                )
        self.groups = [sequences.shuffle_groups() for sequences in self.sequences]
        if cfg.unique_tokens is not None:
            self.groups = self._limit_groups(cfg.unique_tokens)
        self.tokens_per_epoch = seq_len * sum(int(groups[-1]) for groups in self.groups)

    def _limit_groups(self, unique_tokens: int) -> list[np.ndarray]:
        """The groups cut off after each source's part of the first `unique_tokens`."""
        weights = self.stages[0][1]
        if min(weights) == 0:
            raise ValueError("unique_tokens is split by the first stage's weights: give each source one above 0")
        limited = []
        for sequences, groups, weight in zip(self.sequences, self.groups, weights):
            count = int(unique_tokens * weight / sum(weights)) // self.seq_len
            if not 0 < count <= sequences.count:
                raise ValueError(
                    f"unique_tokens={unique_tokens:,} means {count:,} sequences of {sequences.dataset.folder}, "
                    f"which has {sequences.count:,}; choose another number"
                )
            limited.append(np.append(groups[groups < count], count))
        return limited

    def require_validation(self) -> None:
        """Raise ValueError if a dataset has nothing to validate on: before a run rather than at its end."""
        for dataset in self.datasets.values():
            _val_sequences(dataset, self.seq_len)

    def warn_about_shards(self) -> None:
        """Say on stderr which datasets are shards of unknown origin, and which lose tokens at the ends of shards."""
        for sequences in self.sequences:
            dataset = sequences.dataset
            if sequences.lost_frac > 0.01:
                advice = "prepare it with larger --shard_tokens or lower --seq_len"
                lost = f"{sequences.lost_frac:.1%} of the tokens are at ends of shards that do not fill a sequence"
                print(f"{dataset.folder}: {lost} and are never trained on; {advice}", file=sys.stderr)
            if not {"sha256", "origin"} & dataset.meta["shards"][0].keys():
                print(f"{dataset.folder}: {dataset.meta.get('source')}", file=sys.stderr)


def _describe_tokenizer(dataset: TokenDataset) -> str:
    return f"{dataset.tokenizer['name']} ({dataset.tokenizer['sha256'][:12]})"


# ---- Batches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchLayout:
    """How the sequences of an optimizer step are split over ranks and micro-steps."""

    batch_sequences: int  # per optimizer step, all ranks
    batch_size: int  # per rank and micro-step
    dp_rank: int = 0
    dp_size: int = 1

    @property
    def grad_accum_steps(self) -> int:
        """Micro-steps per optimizer step. Rounded up: the last one may be partly filler, see TokenLoader."""
        return math.ceil(self.batch_sequences / (self.batch_size * self.dp_size))


@dataclass(frozen=True)
class Batch:
    """One micro-batch of this rank, on its device: all that the model is called with."""

    tokens: Tensor  # [B, T] int64
    targets: Tensor  # [B, T] int64, the next tokens; -100 carries no loss
    sequence_ids: range  # positions of the B sequences in the run
    weight: float = 1.0  # factor of the batch's loss: 0 for filler, see TokenLoader
    loss_weights: Tensor | None = None  # [B, T]
    mask: Tensor | None = None  # bool, broadcast to [B, N, T, T]
    positions: Tensor | None = None  # [B, T]
    attention_dropout: float = 0.0

    @property
    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of Transformer.forward, without those that are not set."""
        inputs: dict[str, Any] = {"tokens": self.tokens, "targets": self.targets}
        for name in ("loss_weights", "mask", "positions"):
            if getattr(self, name) is not None:
                inputs[name] = getattr(self, name)
        if self.attention_dropout:
            inputs["attention_dropout"] = self.attention_dropout
        return inputs


class TokenLoader:
    """Endless micro-batches of one rank, prefetched by a thread.

    A row of micro-step m of a step that begins at position s has position
    s + (m * dp_size + dp_rank) * batch_size + row, so the data of a step are the same for any number of ranks.

    Where the ranks do not divide the micro-batches of a step, some get filler in its last micro-step. Their batch has
    weight 0 and the others' weights are above 1, so that the mean of weight * loss over ranks and micro-steps is the
    mean over the batch.
    """

    def __init__(self, mixture: Mixture, layout: BatchLayout, seed: int = 0, device: torch.device | str = "cpu"):
        self.mixture = mixture
        self.layout = layout
        self.device = torch.device(device)
        self.stride = layout.batch_size * layout.dp_size  # sequences of all ranks per micro-step
        # A stage begins with the first block after its step.
        stages = [(math.ceil(step * layout.batch_sequences / BLOCK), weights) for step, weights in mixture.stages]
        self.sampler = Sampler(mixture.groups, stages, seed)
        # Everything that the order of training depends on.
        fingerprints = [dataset.fingerprint for dataset in mixture.trained]
        identity = [mixture.seq_len, seed, stages, mixture.unique_tokens, fingerprints]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        self.stage_starts = [start * BLOCK for start, _ in stages]  # in sequences
        self.consumed = 0  # sequences of all ranks in finished steps
        self.micro_step = 0
        self._thread: threading.Thread | None = None
        self._queue: queue.Queue[Prefetched] = queue.Queue()
        self._stop = threading.Event()

    def next_batch(self) -> Batch:
        """The next micro-batch. Raises what reading it raised: ValueError for a token outside the vocabulary, say."""
        if self._thread is None:
            # Started by the first call, since load_state_dict may come before it. Four batches bridge a slow read.
            self._queue = queue.Queue(maxsize=4)
            self._stop = threading.Event()
            arguments = (self.consumed, self._queue, self._stop)
            # A daemon, or an exception in the training loop would not end the process.
            self._thread = threading.Thread(target=self._prefetch, args=arguments, daemon=True, name="TokenLoader")
            self._thread.start()
        item = self._queue.get()
        if isinstance(item, BaseException):
            # The thread has ended: without this, another call would wait for ever.
            self._queue.put(item)
            raise item
        pair, first, weight = item
        # Only whole steps count as consumed: checkpoints are written between them.
        self.micro_step += 1
        if self.micro_step == self.layout.grad_accum_steps:
            self.micro_step = 0
            self.consumed += self.layout.batch_sequences
        # From pinned memory this returns at once, and the GPU copies while it computes.
        tokens, targets = pair.to(self.device, non_blocking=True)
        return Batch(tokens, targets, range(first, first + self.layout.batch_size), weight)

    def _prefetch(self, position: int, batches: queue.Queue[Prefetched], stop: threading.Event) -> None:
        """Fill the queue with micro-batches from the step that begins at `position` on, until `stop` is set."""
        layout = self.layout
        full_weight = layout.grad_accum_steps * self.stride / layout.batch_sequences
        for number in itertools.count():
            step, micro_step = divmod(number, layout.grad_accum_steps)
            step_start = position + step * layout.batch_sequences
            offset = micro_step * self.stride + layout.dp_rank * layout.batch_size
            is_filler = offset >= layout.batch_sequences
            if is_filler:
                # Filler is real data, whose loss is finite: weight 0 removes it.
                offset = micro_step * self.stride
            first = step_start + offset
            item: Prefetched
            try:
                item = (self._read(first), first, 0.0 if is_filler else full_weight)
            except BaseException as error:
                # next_batch raises it in the training loop's thread, where it ends the run.
                item = error
            # The timeout lets close() end a thread whose queue is full.
            while not stop.is_set():
                try:
                    batches.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if stop.is_set() or isinstance(item, BaseException):
                return

    def _read(self, first: int) -> Tensor:
        """Tokens and targets [2, B, T] of the sequences from position `first` on."""
        pair = np.empty((2, self.layout.batch_size, self.mixture.seq_len), np.int64)
        located = self.sampler.locate(first, self.layout.batch_size)
        for row, (source, index) in enumerate(located):
            tokens = self.mixture.sequences[source].read(index)
            pair[0, row] = tokens[:-1]
            pair[1, row] = tokens[1:]
        if pair.max() >= self.mixture.tokenizer["vocab_size"]:
            # check raises ValueError for the wrong one. On a GPU the embedding would abort without naming it.
            for source, index in located:
                self.mixture.sequences[source].check(index)
        tensor = torch.from_numpy(pair)
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    @property
    def tokens(self) -> int:
        """Tokens of all ranks in finished steps: the position of the run in its data."""
        return self.consumed * self.mixture.seq_len

    def check_stages(self, end: int) -> None:
        """Raise ValueError for a stage that does not begin within the first `end` sequences."""
        for (step, _), start in zip(self.mixture.stages, self.stage_starts):
            if start >= end:
                raise ValueError(
                    f"stages: the one of step {step:,} would begin with sequence {start:,} (rounded up to {BLOCK}), "
                    f"but the run ends after {end:,}; let it begin earlier, or train for longer"
                )

    def describe(self, batch: Batch) -> str:
        """Where the first sequences of a batch begin, for a message about it."""
        located = self.sampler.locate(batch.sequence_ids.start, min(4, len(batch.sequence_ids)))
        return "; ".join(self.mixture.sequences[source].describe(index) for source, index in located)

    def state_dict(self) -> dict[str, Any]:
        """Sequences that all ranks together have consumed, and the identity and samples of the data."""
        # Sequences and not steps: a resumed run may have another batch_tokens.
        samples = [dict(dataset.samples) for dataset in self.mixture.trained]
        return {
            "sequences": self.consumed,
            "fingerprint": self.fingerprint,
            "batch_sequences": self.layout.batch_sequences,
            "samples": samples,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after `state`. Raises ValueError if it counts sequences of other data."""
        old_batch = state.get("batch_sequences", self.layout.batch_sequences)
        if len(self.mixture.stages) > 1 and old_batch != self.layout.batch_sequences:
            raise ValueError(
                f"stages begin at steps, which another batch_tokens moves: keep {old_batch * self.mixture.seq_len}, or "
                "start a new run from the weights with --init_from"
            )
        if state["fingerprint"] != self.fingerprint:
            raise ValueError(
                "the data changed since the checkpoint (sources, weights, seed, seq_len or the shards themselves): "
                "put them back, or start a new run from its weights with --init_from"
            )
        # Checkpoints of 0.1 have none, and a shard that was not downloaded yet has none.
        for dataset, samples in zip(self.mixture.trained, state.get("samples", [])):
            for name, sample in samples.items():
                if dataset.samples.get(name, sample) != sample:
                    raise ValueError(
                        f"{dataset.folder / name} holds other text than when the checkpoint was written: put the old "
                        "shard back, or start a new run from its weights with --init_from"
                    )
        # The thread may have read ahead from another position.
        self.close()
        self.consumed = int(state["sequences"])
        self.micro_step = 0

    def close(self) -> None:
        """Stop the prefetching thread; next_batch starts it again."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def validation_batches(
    dataset: TokenDataset, seq_len: int, layout: BatchLayout, max_tokens: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The val split once, in order: tokens and targets, int64 [batch_size, seq_len].

    Every rank gets the same number of batches, so some may be empty. Targets beyond the data are -100, so a mean over
    the others is exact.
    """
    sequences = _val_sequences(dataset, seq_len)
    count = sequences.count
    if max_tokens is not None:
        count = min(count, max(1, max_tokens // seq_len))
    batch_size = layout.batch_size
    for start in range(0, count, batch_size * layout.dp_size):
        tokens = np.zeros((batch_size, seq_len), np.int64)
        targets = np.full((batch_size, seq_len), -100, np.int64)
        first = start + layout.dp_rank * batch_size
        for row, index in enumerate(range(first, min(first + batch_size, count))):
            sequences.check(index)
            sequence = sequences.read(index)
            tokens[row, : len(sequence) - 1] = sequence[:-1]
            targets[row, : len(sequence) - 1] = sequence[1:]
        yield torch.from_numpy(tokens), torch.from_numpy(targets)


def _val_sequences(dataset: TokenDataset, seq_len: int) -> Sequences:
    """The sequences of the val split, the last of a shard perhaps shorter. Raises ValueError if there are none."""
    sequences = Sequences(dataset, "val", seq_len, keep_partial=True)
    if not sequences.count:
        raise ValueError(f"{dataset.folder} has no val shard; prepare it with --val_tokens or --val_source")
    return sequences
