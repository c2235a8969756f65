"""nano416/dataloader.py: every sequence once per epoch, the same order for any number of ranks, exact mixtures."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from processes import python
from shards import llm_c_reader, write_dataset

from nano416 import dataloader
from nano416.dataloader import BatchLayout, DataConfig, Mixture, Sampler, TokenLoader, permute, validation_batches
from nano416.dataset import TokenDataset, write_shard


def open_loader(sources: dict[str, float], layout: BatchLayout, seed: int = 0, **data_options) -> TokenLoader:
    """A loader of sequences of 16 tokens."""
    return TokenLoader(Mixture(DataConfig(sources, **data_options), seq_len=16), layout, seed)


def windows_of(folder: Path, seq_len: int) -> list[tuple[int, ...]]:
    shards = [llm_c_reader(path) for path in sorted(folder.glob("train_*.bin"))]
    starts = [(s, i) for s in shards for i in range(0, len(s) - seq_len, seq_len)]
    return sorted(tuple(s[i : i + seq_len + 1].tolist()) for s, i in starts)


def run_ranks(
    sources: dict[str, float], batches: int, layout: BatchLayout, skip: int = 0, **data_options
) -> list[tuple[int, ...]]:
    """Sequences in run order, as the loaders of all ranks see them together."""
    loaders = [open_loader(sources, replace(layout, dp_rank=rank), **data_options) for rank in range(layout.dp_size)]
    rows: list[tuple[int, ...]] = []
    for loader in loaders:
        loader.load_state_dict({"sequences": skip, "fingerprint": loader.fingerprint})
    for _ in range(batches):
        for loader in loaders:
            batch = loader.next_batch()
            assert batch.tokens.is_contiguous()
            assert (batch.tokens[:, 1:] == batch.targets[:, :-1]).all()
            rows += [(*row.tolist(), int(last)) for row, last in zip(batch.tokens, batch.targets[:, -1])]
    for loader in loaders:
        loader.close()
    return rows


@pytest.fixture
def data(tmp_path) -> Path:
    """Three shards of unlike length, 61 windows of 16 + 1 tokens: a prime number, so nothing divides."""
    tokens = np.arange(1200) % 50000
    return write_dataset(tmp_path / "data", [tokens[:400], tokens[400:405], tokens[405:1000]], [tokens[1000:1200]])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_window_once_per_epoch(data, world_size):
    assert Mixture(DataConfig({str(data): 1.0}), seq_len=16).tokens_per_epoch == 16 * 61
    rows = run_ranks({str(data): 1.0}, 3 * 61, BatchLayout(24, 1, dp_size=world_size))
    epochs = [rows[start : start + 61] for start in range(0, 3 * 61, 61)]
    assert all(sorted(epoch) == windows_of(data, 16) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_order_is_the_same_for_any_number_of_ranks(data):
    layouts = [(1, 24, 10), (2, 6, 20), (4, 2, 30), (1, 1, 240)]
    orders = [run_ranks({str(data): 1.0}, n, BatchLayout(24, size, dp_size=world)) for world, size, n in layouts]
    assert all(order[:240] == orders[0] for order in orders)


def test_where_ranks_do_not_divide_the_batch_each_sequence_is_still_seen_once(data):
    """24 sequences in micro-batches of 4 on 4 ranks: two rounds, half of the second is filler of weight 0."""
    whole = open_loader({str(data): 1.0}, BatchLayout(24, 4))
    wanted = [row for _ in range(12) for row in whole.next_batch().tokens.tolist()]
    loaders = [open_loader({str(data): 1.0}, BatchLayout(24, 4, rank, dp_size=4)) for rank in range(4)]
    seen, weights = [], []
    for _ in range(2 * 2):
        for loader in loaders:
            batch = loader.next_batch()
            weights.append(batch.weight)
            if batch.weight:
                seen += batch.tokens.tolist()
    assert seen == wanted and weights == [4 / 3] * 6 + [0] * 2 + [4 / 3] * 6 + [0] * 2
    assert loaders[3].state_dict() == whole.state_dict()
    for loader in (whole, *loaders):
        loader.close()


def test_resuming_is_going_on(data):
    layout = BatchLayout(24, 3, dp_size=2)
    whole = run_ranks({str(data): 1.0}, 30, layout)
    assert run_ranks({str(data): 1.0}, 20, layout, skip=60) == whole[60:]
    loader = open_loader({str(data): 1.0}, layout)
    for _ in range(4):
        loader.next_batch()
    state = loader.state_dict()
    assert (state["sequences"], state["fingerprint"]) == (24, loader.fingerprint)
    ahead = {"sequences": 24 * 10**9, "fingerprint": loader.fingerprint}
    loader.load_state_dict(ahead)  # O(1): a run of 24 billion sequences goes on at once
    loader.next_batch()
    loader.close()


def test_other_data_are_not_resumed(data, tmp_path):
    state = open_loader({str(data): 1.0}, BatchLayout(1, 1)).state_dict()
    with pytest.raises(ValueError, match="data changed"):
        open_loader({str(data): 1.0}, BatchLayout(1, 1), seed=1).load_state_dict(state)


def test_other_text_of_the_same_length_in_a_shard_is_not_resumed(data):
    loader = open_loader({str(data): 1.0}, BatchLayout(1, 1))
    state = json.loads(json.dumps(loader.state_dict()))
    loader.load_state_dict(state)
    # As 0.1 wrote it.
    old_state = {"sequences": 0, "fingerprint": loader.fingerprint}
    tokens = llm_c_reader(data / "train_000002.bin").copy()
    tokens[-1] += 1
    write_shard(data / "train_000002.bin", tokens)
    changed = open_loader({str(data): 1.0}, BatchLayout(1, 1))
    assert changed.fingerprint == loader.fingerprint
    with pytest.raises(ValueError, match=r"train_000002\.bin holds other text"):
        changed.load_state_dict(state)
    changed.load_state_dict(old_state)


def test_more_shards_than_open_files_can_be_trained_on(tmp_path):
    code = f"""
import resource
import numpy as np
from nano416.dataloader import BatchLayout, DataConfig, Mixture, TokenLoader
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
mixture = Mixture(DataConfig({{"{tmp_path}/a": 0.5, "{tmp_path}/b": 0.5}}), seq_len=16)
loader = TokenLoader(mixture, BatchLayout(100, 100))
for _ in range(20):
    loader.next_batch()
loader.close()
"""
    for name in "ab":
        write_dataset(tmp_path / name, [np.zeros(40)] * 60)
    assert python("-c", code)[::2] == (0, "")


def test_tokens_that_no_sequence_reaches_are_counted_at_the_start(tmp_path, data, capsys):
    small = write_dataset(tmp_path / "small", [np.zeros(500)] * 3)
    Mixture(DataConfig({str(small): 0.5, str(data): 0.5}), seq_len=256).warn_about_shards()
    warnings = [line for line in capsys.readouterr().err.splitlines() if "never trained on" in line]
    assert warnings[0].startswith(f"{small}: 48.8% of the tokens") and "--shard_tokens" in warnings[0]
    one = write_dataset(tmp_path / "one", [np.zeros(50_000)])
    Mixture(DataConfig({str(one): 1.0}), seq_len=256).warn_about_shards()
    assert "never trained on" not in capsys.readouterr().err


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_mixtures_are_exact_in_every_block(tmp_path, world_size):
    a = write_dataset(tmp_path / "a", [np.zeros(400)])
    b = write_dataset(tmp_path / "b", [np.ones(9000)])
    layout = BatchLayout(1024, 8, dp_size=world_size)
    rows = run_ranks({str(a): 0.7, str(b): 0.3}, 3 * layout.grad_accum_steps, layout)
    counts = [sum(row[0] == 0 for row in rows[start : start + 1024]) for start in range(0, 3072, 1024)]
    assert counts == [717, 717, 717]  # 0.7 of 1024, by largest remainder
    assert len({tuple(row[0] for row in rows[s : s + 1024]) for s in (0, 1024)}) == 2


def test_stages_change_the_weights_at_a_step(tmp_path):
    a, b, c = (str(write_dataset(tmp_path / n, [np.full(3000, i)])) for i, n in enumerate("abc"))
    weights = {a: 0.75, b: 0.25, c: 0.0}
    stages = f"2: {b}=1; 4: {a}=0.5,{c}=0.5"
    rows = run_ranks(weights, 24, BatchLayout(1024, 256), stages=stages)
    counts = [[sum(row[0] == i for row in rows[s : s + 1024]) for i in range(3)] for s in range(0, 6 * 1024, 1024)]
    assert counts == [[768, 256, 0]] * 2 + [[0, 1024, 0]] * 2 + [[512, 0, 512]] * 2
    two_ranks = BatchLayout(1024, 128, dp_size=2)
    later = run_ranks(weights, 6, two_ranks, skip=3 * 1024, stages=stages)
    assert later == rows[3 * 1024 : 3 * 1024 + 1536]


def test_stages_that_make_no_sense():
    for stages in "x", "5: a=1; 5: a=1", "5: b=1", "5: a=-1", "5: a=0", "5: a=x", "0: a=1":
        with pytest.raises(ValueError, match=r"stages|sources"):
            dataloader.DataConfig(sources={"a": 1.0}, stages=stages)


def test_unique_tokens_are_the_first_ones_every_epoch(data):
    windows = [tuple(range(i, i + 17)) for i in range(0, 20 * 16, 16)]
    rows = run_ranks({str(data): 1.0}, 60, BatchLayout(24, 1), unique_tokens=20 * 16 + 5)
    epochs = [rows[i : i + 20] for i in (0, 20, 40)]
    assert all(sorted(epoch) == windows for epoch in epochs)
    assert epochs[0] != epochs[1]
    with pytest.raises(ValueError, match=r"unique_tokens=9,999 means 624 sequences.* has 61"):
        Mixture(DataConfig({str(data): 1.0}, unique_tokens=9999), seq_len=16)


def test_each_source_of_a_mixture_has_exact_epochs():
    sampler = Sampler([np.array([0, 61]), np.array([0, 7])], [(0, [0.8, 0.2])], seed=3)
    located = sampler.locate(0, 5000)
    sources, sequences = np.array(located).T
    for source, count in enumerate((61, 7)):
        dealt = sequences[sources == source]
        epochs = dealt[: len(dealt) // count * count].reshape(-1, count)
        assert (np.sort(epochs, axis=1) == np.arange(count)).all()
    assert [place for p in range(0, 5000, 100) for place in sampler.locate(p, 100)] == located


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 1000, 1025, 65537])
def test_a_permutation_deals_every_number_once(n):
    key = dataloader.derive_key(1, 2, n)
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


def test_permutation_is_as_random_as_numpy():
    """Serial correlation of 20 keys over 10,000 numbers; an affine round function gives |z| up to 10."""
    scores = []
    for key in range(20):
        x = permute(np.arange(10_000), 10_000, dataloader.derive_key(key)).astype(float)
        scores.append(np.corrcoef(x[:-1], x[1:])[0, 1] * 100)
    assert max(map(abs, scores)) < 4


def test_weight_zero_only_validates(data, tmp_path):
    other = write_dataset(tmp_path / "other", [np.full(100, 7)], [np.full(33, 9)])
    sources = {str(data): 1.0, str(other): 0.0}
    rows = run_ranks(sources, 61, BatchLayout(24, 1))
    assert sorted(rows) == windows_of(data, 16)
    assert len(list(validation_batches(TokenDataset(other), 16, BatchLayout(1, 1)))) == 2


def test_tokens_outside_the_vocabulary_are_named(data):
    write_shard(data / "train_000000.bin", np.full(400, 60000, np.uint16))
    loader = open_loader({str(data): 1.0}, BatchLayout(61, 61))
    for _ in range(2):  # and again
        with pytest.raises(ValueError, match=r"train_000000\.bin, token \d+: token id 60000, .*=50257"):
            loader.next_batch()
    loader.close()


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 4), (2, 3), (4, 1), (1, 100)])
def test_validation_sees_every_token_once(data, world_size, batch_size):
    layouts = [BatchLayout(24, batch_size, rank, world_size) for rank in range(world_size)]
    ranks = [list(validation_batches(TokenDataset(data), 16, layout)) for layout in layouts]
    assert len({len(batches) for batches in ranks}) == 1
    targets = [t for batches in zip(*ranks) for _, batch in batches for t in batch.flatten().tolist() if t != -100]
    assert targets == list(range(1001, 1200))  # 12 windows and 7 tokens more: the last one is padded
    assert all(batch.shape == (batch_size, 16) for batches in ranks for pair in batches for batch in pair)


def test_validation_stops_at_max_tokens(data):
    batches = list(validation_batches(TokenDataset(data), 16, BatchLayout(24, 2), max_tokens=64))
    assert sum(int((targets != -100).sum()) for _, targets in batches) == 64


def test_tokenizers_of_two_sources_must_agree(data, tmp_path):
    other = write_dataset(tmp_path / "other", [np.zeros(100)])
    tokenizer = {"name": "bytes", "vocab_size": 257, "eot_id": 256, "sha256": "0" * 64}
    meta = {"tokenizer": tokenizer, "shards": [{"file": "train_000000.bin", "split": "train", "tokens": 100}]}
    (other / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=r"gpt2 .*bytes"):
        Mixture(DataConfig({str(data): 1.0, str(other): 1.0}), seq_len=16)


def test_weights_that_make_no_sense(data):
    for weights in {}, {str(data): -1.0}, {str(data): 0.0}, {str(data): 1.0, "other": 1e-9}:
        with pytest.raises(ValueError, match="sources"):
            dataloader.DataConfig(sources=weights)


def test_seq_len_longer_than_any_shard(data):
    with pytest.raises(ValueError, match=r"seq_len \+ 1 = 1001"):
        Mixture(DataConfig({str(data): 1.0}), seq_len=1000)


def test_no_val_shard_says_how_to_make_one(tmp_path):
    folder = write_dataset(tmp_path / "d", [np.zeros(100)])
    with pytest.raises(ValueError, match="--val_tokens"):
        next(validation_batches(TokenDataset(folder), 16, BatchLayout(1, 1)))


def test_a_changed_batch_size_continues_with_the_next_sequence(data):
    """30 sequences were consumed in steps of 10; steps of 24 continue with sequence 30, each sequence once."""
    before = run_ranks({str(data): 1.0}, 30, BatchLayout(10, 1))
    after = run_ranks({str(data): 1.0}, 48, BatchLayout(24, 1), skip=30)
    assert before + after == run_ranks({str(data): 1.0}, 78, BatchLayout(78, 1))


def test_a_batch_says_where_its_text_is(data):
    loader = open_loader({str(data): 1.0}, BatchLayout(2, 2))
    batch = loader.next_batch()
    starts = [int(row[0]) for row in batch.tokens]
    loader.close()
    # Tokens count up from 0 over three shards of 400, 5 and 595 tokens.
    shard_starts = {0: 0, 1: 400, 2: 405}
    described = [place.rsplit("train_00000", 1)[1] for place in loader.describe(batch).split("; ")]
    for place, start in zip(described, starts, strict=True):
        shard, token = int(place[0]), int(place.rsplit(" ", 1)[1].replace(",", ""))
        assert shard_starts[shard] + token == start
