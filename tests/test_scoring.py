"""scoring.py: endings packed behind their context score as one plain forward pass per ending."""

import pytest
import torch
from conftest import tiny_model

from model import Transformer
from nano416 import scoring
from nano416.scoring import Row, make_batches, max_row_length, pack_context, score_rows

CONTEXTS = [[5, 1, 7], list(range(40)), [3], [9, 8, 7, 6, 5, 4, 3, 2, 1]]
ENDINGS = [[[1], [2, 3], [4, 5, 6]], [[7, 7, 7, 7], [8]], [[9, 1]], [[1, 2, 3, 4, 5, 6], [6, 5], [1], [0, 0, 0]]]


def pack(seq_len: int) -> list[Row]:
    rows = []
    for i, (context, endings) in enumerate(zip(CONTEXTS, ENDINGS, strict=True)):
        rows += pack_context(i, context, endings, seq_len)
    return rows


@torch.no_grad()
def score_alone(model: Transformer, context: list[int], ending: list[int]) -> float:
    """Log-likelihood of an ending by a forward pass over its own text, truncated on the left."""
    tokens = [*context, *ending][-(model.config.seq_len + 1) :]
    logprobs = model(torch.tensor([tokens[:-1]]))[0].log_softmax(-1)
    return sum(logprobs[i - 1, tokens[i]].item() for i in range(len(tokens) - len(ending), len(tokens)))


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
@pytest.mark.parametrize("seq_len", [96, 43, 12])
@pytest.mark.parametrize("shape", [{}, {"n_kv_heads": 2, "qk_norm": True, "tie_embeddings": False}])
def test_packed_endings_score_as_one_forward_pass_per_ending(shape, seq_len, batch_tokens, monkeypatch):
    monkeypatch.setattr(scoring, "CPU_BATCH_TOKENS", batch_tokens)
    model = tiny_model(seq_len=seq_len, **shape)
    scored = 0
    for row, logprobs, _ in score_rows(model, pack(max_row_length(model))):
        for i, logprob in enumerate(logprobs, row.first):
            alone = score_alone(model, CONTEXTS[row.item], ENDINGS[row.item][i])
            assert logprob == pytest.approx(alone, abs=1e-4)
            scored += 1
    assert scored == sum(map(len, ENDINGS))


def test_a_question_is_one_row_while_its_longest_ending_fits():
    # An ending's last token is predicted, not read: 9 + 6 - 1 tokens.
    (row,) = pack_context(3, CONTEXTS[3], ENDINGS[3], seq_len=14)
    assert row == Row(3, 0, CONTEXTS[3], ENDINGS[3])
    rows = list(pack_context(3, CONTEXTS[3], ENDINGS[3], seq_len=13))
    assert [row.endings for row in rows] == [[ending] for ending in ENDINGS[3]]
    assert [row.first for row in rows] == [0, 1, 2, 3]
    assert len(list(pack_context(3, CONTEXTS[3], ENDINGS[3], seq_len=99, share_context=False))) == 4


def test_contexts_are_truncated_on_the_left_and_endings_only_if_nothing_else_is_left():
    long, short, *_ = pack_context(3, CONTEXTS[3], ENDINGS[3], seq_len=8)
    assert long.context == [3, 2, 1] and long.endings == [[1, 2, 3, 4, 5, 6]] and long.length == 8
    assert short.context == CONTEXTS[3][-7:] and short.length == 8
    assert (long.truncated_contexts, long.truncated_endings) == (1, 0)
    (row,) = pack_context(0, [1, 2], [[3, 4, 5, 6]], seq_len=3)
    assert row.context == [2] and row.endings == [[4, 5, 6]]
    assert (row.truncated_contexts, row.truncated_endings) == (1, 1)


def test_an_ending_without_tokens_is_named():
    with pytest.raises(ValueError, match="item 5: ending 1 adds no token"):
        list(pack_context(5, [1, 2], [[3], []], seq_len=8))


def test_batches_hold_every_row_once_within_the_limit():
    rows = pack(96) * 5
    batches = list(make_batches(rows, 100))
    assert sorted(map(id, (row for batch in batches for row in batch))) == sorted(map(id, rows))
    assert all(len(batch) * max(row.length for row in batch) <= 100 for batch in batches)
    assert all(len(batch) == 1 for batch in make_batches(rows, 1))


def test_greedy_endings_are_known():
    """Only an ending whose every token is the argmax is greedy."""
    model = tiny_model()
    context = [1, 2, 3]

    def argmax(tokens: list[int]) -> int:
        return int(model(torch.tensor([tokens]))[0, -1].argmax())

    first = argmax(context)
    second = argmax([*context, first])
    rows = list(pack_context(0, context, [[first, second], [first, second ^ 1], [first ^ 1, 0]], seq_len=8))
    ((_, _, greedy),) = score_rows(model, rows)
    assert greedy == [True, False, False]


@pytest.mark.parametrize("training", [True, False])
def test_scoring_leaves_the_model_in_its_mode(training):
    model = tiny_model().train(training)
    score_rows(model, pack(32))
    assert model.training is training


def test_no_rows_have_no_scores():
    assert score_rows(tiny_model(), []) == []
