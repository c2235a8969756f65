"""benchmark.py decode: every way writes the same text, and the table has a row for each."""

import json

import pytest
import torch
from conftest import tiny_model
from test_convert_hf import checkpoint_of

import benchmark
import data_pipeline
from model import generate

SHAPE = {"dim": 32, "n_layers": 2, "n_heads": 4, "ffn_dim": 48, "seq_len": 64}


def test_each_way_to_decode_writes_the_same_tokens():
    model, prompt = tiny_model(tie_embeddings=True, vocab_size=257, seq_len=64), [5, 80, 33]
    expected = list(generate(model, prompt, 20, temperature=0))
    assert (
        benchmark._seed_way_to_decode(model, prompt, 20) == expected == benchmark._our_way_to_decode(model, prompt, 20)
    )
    assert benchmark._our_batch(model, prompt, 20) == [token for token in expected for _ in range(8)]
    pytest.importorskip("transformers")
    for cache in ("dynamic", "static"):
        assert benchmark._transformers_way(model, prompt, cache)(20) == expected


def test_the_table_of_decoding_has_every_way(tmp_path):
    (tmp_path / "peers.py").write_text("def another_way(model, prompt, n_tokens):\n    return [0] * n_tokens\n")
    rates = benchmark.decode_benchmark(1, 8, "cpu", str(tmp_path / "peers.py"), **SHAPE)
    report = benchmark.decode_report(json.loads(json.dumps(rates)))
    for name, way in rates["ways"].items():
        assert name in report and way["tokens_per_s"] > 0
    assert "int8 / our bf16 (1.6):" in report and rates["memory_gb_per_s"] > 0 and "another_way, bf16" in rates["ways"]


def test_bf16_and_int8_cost_little_loss(tmp_path):
    data_pipeline.sample(tmp_path / "data")
    torch.manual_seed(0)
    path = checkpoint_of(tmp_path / "model.pt", tiny_model(vocab_size=257, scale=2.0))
    losses = benchmark.loss_benchmark(path, str(tmp_path / "data"), 200, "cpu")
    assert len(set(losses.values())) == 3
    assert all(loss == pytest.approx(losses["fp32"], abs=0.05) for loss in losses.values())
    assert benchmark.loss_report(losses).splitlines()[0] == f"fp32  validation loss {losses['fp32']:.5f} (+0.00000)"
