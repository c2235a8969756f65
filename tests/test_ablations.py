"""Ablations of autoregressive training: token orders, random attention masks, attention dropout."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from test_training import losses, run
from torch import Tensor

import training
from nano416 import ablations
from nano416.ablations import AblationConfig, random_attention_mask, token_orders
from nano416.config import parse_config
from nano416.dataloader import Batch

CPU = torch.device("cpu")


def make_batch(tokens: Tensor) -> Batch:
    return Batch(tokens[:, :-1], tokens[:, 1:], range(len(tokens)))


def write_toml(folder: Path, text: str) -> str:
    path = folder / "ablation.toml"
    path.write_text(f"[ablation]\n{text}\n")
    return str(path)


def test_without_options_the_batch_stays_as_it_is(tokens):
    assert not AblationConfig().is_active
    batch = make_batch(tokens)
    assert ablations.apply(batch, AblationConfig(), seed=0) == batch


def test_token_orders_follow_the_example_of_the_paper(monkeypatch):
    monkeypatch.setattr(ablations, "token_orders", lambda *_: torch.tensor([[2, 0, 1, 4, 5, 3]]))
    inputs = ablations.apply(make_batch(torch.arange(7)[None]), AblationConfig(num_orders=1), seed=0).inputs
    assert inputs["tokens"].tolist() == inputs["positions"].tolist() == [[0, 3, 1, 2, 5, 6]]
    assert inputs["targets"].tolist() == [[3, 1, 2, 5, 6, 4]]


@pytest.mark.parametrize("predefined", [False, True])
def test_the_first_order_is_left_to_right_and_the_others_are_permutations(predefined):
    orders = token_orders(200, 8, predefined, 0)
    assert orders[0].tolist() == list(range(200))
    assert len({tuple(order) for order in orders.tolist()}) == 8
    assert all(sorted(order) == list(range(200)) for order in orders.tolist())
    distance = (orders - torch.arange(200)).abs().float().mean(1)[1:]
    if predefined:
        # The mean of |a - b| / sqrt(2) for two normal deviates of standard deviation i.
        assert distance.tolist() == pytest.approx([i * math.sqrt(2 / math.pi) for i in range(1, 8)], rel=0.35)
    else:
        assert distance.tolist() == pytest.approx([200 / 3] * 7, rel=0.2)


def test_one_order_is_plain_autoregression(tokens):
    model = tiny_model()
    batch = make_batch(tokens)
    plain = model(**batch.inputs).item()
    one = ablations.apply(batch, AblationConfig(num_orders=1), seed=0)
    many = ablations.apply(batch, AblationConfig(num_orders=16), seed=0)
    assert model(**one.inputs).item() == pytest.approx(plain, abs=1e-5)
    assert abs(model(**many.inputs).item() - plain) > 1e-3


def test_every_order_is_read_causally(tokens):
    model = tiny_model()
    inputs = ablations.apply(make_batch(tokens), AblationConfig(num_orders=16), seed=0).inputs
    changed = inputs["tokens"].clone()
    changed[:, 9] += 1
    before = model(**inputs, reduction="none")
    after = model(**{**inputs, "tokens": changed}, reduction="none")
    assert torch.allclose(before[:, :9], after[:, :9], atol=1e-5)
    assert not torch.allclose(before[:, 9:], after[:, 9:])


@pytest.mark.parametrize(("ratio", "low", "high"), [(0.0, 0.0, 0.0), (0.3, 0.2, 0.4), (1.0, 0.9, 1.0)])
def test_a_random_mask_is_causal_and_takes_keys_from_the_given_fraction_of_tokens(ratio, low, high):
    causal = torch.ones(64, 64, dtype=torch.bool).tril()
    mask = random_attention_mask(range(8), 64, ratio, 0, CPU)
    assert mask.shape == (8, 1, 64, 64)
    assert not (mask & ~causal).any()
    assert mask.diagonal(dim1=-2, dim2=-1).all()
    # Not the first 8: a token with few keys often loses none of them.
    changed = (mask != causal).any(-1)[..., 8:].float().mean()
    assert low <= changed <= high


def test_a_masked_token_loses_half_of_its_keys_on_average():
    causal = torch.ones(64, 64, dtype=torch.bool).tril()
    mask = random_attention_mask(range(8), 64, 1.0, 0, CPU)
    kept = (mask & causal).sum() / (8 * causal.sum())
    assert kept.item() == pytest.approx(0.5, abs=0.05)


def test_noise_depends_only_on_the_seed_and_the_sequence(tokens):
    cfg = AblationConfig(num_orders=4, randmask_ratio=0.5)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], range(8, 10))
    whole = ablations.apply(batch, cfg, seed=3).inputs
    halves = [
        ablations.apply(
            Batch(batch.tokens[i : i + 1], batch.targets[i : i + 1], range(8 + i, 9 + i)), cfg, seed=3
        ).inputs
        for i in range(2)
    ]
    for name in ("tokens", "targets", "positions", "mask"):
        assert torch.equal(whole[name], torch.cat([half[name] for half in halves]))
    assert not torch.equal(whole["mask"], ablations.apply(batch, cfg, seed=4).inputs["mask"])


def test_attention_dropout_is_random_unbiased_at_first_and_off_by_default(tokens):
    model = tiny_model(n_layers=1)
    torch.manual_seed(0)
    dropped = [model.hidden(tokens, attention_dropout=0.5) for _ in range(2)]
    assert not torch.equal(*dropped)
    assert torch.equal(model.hidden(tokens), model.hidden(tokens))
    torch.testing.assert_close(model.hidden(tokens, attention_dropout=1e-9), model.hidden(tokens))


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        (
            "num_orders = 4",
            ["--objective=mdm"],
            "num_orders has no effect with --objective=mdm; leave it out or train ar",
        ),
        ("randmask_ratio = 0.5", ["--objective=mdm"], "randmask_ratio has no effect with --objective=mdm"),
        ("randmask_ratio = 1.5", [], r"randmask_ratio must be in \[0, 1\], got 1.5"),
        ("attention_dropout = 1.0", [], r"attention_dropout must be in \[0, 1\), got 1.0"),
        ("num_orders = -1", [], "num_orders must not be negative, got -1"),
        ("predefined_orders = true", [], "predefined_orders has no effect with num_orders=0; set it to 2 or more"),
    ],
)
def test_a_bad_option_is_refused(table, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        parse_config(training.Config, [write_toml(tmp_path, table), *options])


def test_an_option_on_the_command_line_says_where_it_belongs():
    with pytest.raises(ValueError, match=r"num_orders is set in a config file, below \[ablation\]"):
        parse_config(training.Config, ["--num_orders=4"])


def test_a_run_is_the_same_with_micro_batches_of_any_size(data, tmp_path, no_plots):
    table = write_toml(tmp_path, "num_orders = 4\npredefined_orders = true\nrandmask_ratio = 0.5")
    run(data, tmp_path / "small", table, "--max_steps=2")
    run(data, tmp_path / "large", table, "--max_steps=2", "--batch_size=16")
    run(data, tmp_path / "plain", "--max_steps=2")
    small = losses(tmp_path / "small")
    assert small == pytest.approx(losses(tmp_path / "large"), abs=1e-5)
    assert small[1] != pytest.approx(losses(tmp_path / "plain")[1], abs=1e-5)


def test_a_run_with_attention_dropout_resumes_exactly(data, tmp_path, no_plots):
    options = [write_toml(tmp_path, "attention_dropout = 0.3"), "--max_steps=4"]
    run(data, tmp_path / "whole", *options)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for name in ("checkpoint_step_4.pt", "final_metrics.json"):
        (tmp_path / "resumed" / name).unlink()
    run(data, tmp_path / "resumed", *options)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")
