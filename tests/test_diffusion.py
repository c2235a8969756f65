"""Masked diffusion against enumeration: every mask of a short text, every ending."""

import itertools
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model
from processes import ranks
from test_training import arguments, losses, run, same_run, same_weights
from torch import Tensor

import chat
import eval_hellaswag
import training
from eval_hellaswag import Item
from model import IGNORE_INDEX, Transformer
from nano416 import diffusion, metrics
from nano416.config import from_dict, parse_config
from nano416.dataloader import Batch
from nano416.diffusion import (
    EPS,
    DenoiseConfig,
    DiffusionConfig,
    LikelihoodConfig,
    denoise,
    log_likelihood,
    mask_batch,
    nelbo,
    num_forward_passes,
    sample_masks,
)
from nano416.generate import Sampling
from nano416.scoring import ScoringConfig, score_rows
from nano416.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("no_plots")
# Tokens of the models whose texts are enumerated; also the id of their mask token.
V = 5


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_model(vocab_size=V, causal=False)


def masked_inputs(tokens: Tensor, sequence_ids: range | None = None, seed: int = 3, **options: Any) -> dict[str, Any]:
    """What the model is called with for `tokens`, with 8 sequences per step."""
    batch = Batch(tokens, torch.zeros_like(tokens), sequence_ids or range(len(tokens)))
    return mask_batch(batch, DiffusionConfig(**options), V, seed, 8).inputs


def nats_by_mask(model: Transformer, text: list[int]) -> dict[tuple[bool, ...], Tensor]:
    """For every mask of a text the cross entropy [T] of each token, given the tokens that are not masked."""
    nats = {}
    for mask in itertools.product((False, True), repeat=len(text)):
        noisy = torch.tensor([[V if is_masked else token for token, is_masked in zip(text, mask)]])
        logprobs = model.head(model.hidden(noisy))[0, :, :V].float().log_softmax(-1)
        nats[mask] = -logprobs[torch.arange(len(text)), torch.tensor(text)].detach()
    return nats


def enumerate_masks(model: Transformer, text: list[int], weight: Callable[[int, int], float]) -> float:
    """The sum over all masks of weight(masked tokens, T) x the cross entropy of the masked tokens."""
    return sum(
        weight(sum(mask), len(text)) * nats[torch.tensor(mask)].sum().item()
        for mask, nats in nats_by_mask(model, text).items()
        if any(mask)
    )


def exact_weight(n_masked: int, length: int) -> float:
    """The integral over t in (0, 1) of t^n (1 - t)^(length - n) / t: a Beta function."""
    return 1 / (n_masked * math.comb(length, n_masked))


def training_weight(n_masked: int, length: int) -> float:
    """The same for p uniform in [EPS, 1], which is what the training loss estimates."""
    p = EPS + (1 - EPS) * (np.arange(200_000) + 0.5) / 200_000
    return float((p ** (n_masked - 1) * (1 - p) ** (length - n_masked)).mean())


# ---- The training loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"stratified": True}], ids=["independent", "stratified"])
def test_the_expected_loss_weight_of_a_token_is_one(options):
    inputs = masked_inputs(torch.zeros(20_000, 6, dtype=torch.long), **options)
    weights = inputs["loss_weights"] * (inputs["targets"] != IGNORE_INDEX)
    # The variance of a weight is E[1/p] - 1 = 5.9.
    assert weights.mean(0).tolist() == pytest.approx([1] * 6, abs=4 * math.sqrt(5.9 / 20_000))


@pytest.mark.parametrize(
    "options", [{"ar_ratio": 1.0}, {"random_length": 1.0}, {"ar_ratio": 0.5, "random_length": 0.5}]
)
def test_a_sequence_counts_the_same_however_it_is_masked_or_cut(options):
    inputs = masked_inputs(torch.zeros(10_000, 6, dtype=torch.long), **options)
    weights = (inputs["loss_weights"] * (inputs["targets"] != IGNORE_INDEX)).sum(1)
    assert weights.mean().item() == pytest.approx(6, abs=4 * weights.std().item() / 100)


def test_stratified_noise_levels_of_a_step_are_equally_spaced():
    levels = sorted(diffusion.stratified_noise_level(i, seed=3, batch_sequences=8) for i in range(16, 24))
    assert np.diff(levels) == pytest.approx([1 / 8] * 7)
    assert levels[0] < 1 / 8
    inputs = masked_inputs(torch.zeros(8, 6, dtype=torch.long), range(16, 24), stratified=True)
    p = 1 / inputs["loss_weights"][:, 0]
    assert sorted(p.tolist()) == pytest.approx([EPS + (1 - EPS) * t for t in levels])


def test_only_masked_tokens_carry_loss_and_only_unmasked_ones_are_visible(model):
    text = torch.randint(0, V, (8, 32), generator=torch.Generator().manual_seed(0))
    inputs = masked_inputs(text)
    masked = inputs["tokens"] == V
    assert 0 < masked.sum() < masked.numel()
    assert torch.equal(inputs["targets"], torch.where(masked, text, IGNORE_INDEX))
    assert torch.equal(inputs["tokens"][~masked], text[~masked])
    logits = model.head(model.hidden(inputs["tokens"]))
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text.flatten(), reduction="none").view(8, 32)
    # Divided by the number of all tokens, not of the masked ones.
    expected = (nats * masked * inputs["loss_weights"]).sum() / text.numel()
    assert model(**inputs).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_mean_training_loss_is_the_sum_over_all_masks(model):
    text = [1, 4, 0, 2]
    n = 10_000
    nats = model(**masked_inputs(torch.tensor([text] * n)), reduction="none").sum(1)
    expected = enumerate_masks(model, text, training_weight)
    assert nats.mean().item() == pytest.approx(expected, abs=4 * nats.std().item() / math.sqrt(n))


def test_a_batch_without_masked_tokens_has_loss_zero_and_a_gradient(model):
    text = torch.zeros(1, 4, dtype=torch.long)
    loss = model(text, torch.full_like(text, IGNORE_INDEX), loss_weights=torch.ones(1, 4))
    loss.backward()
    assert loss.item() == 0
    assert model.norm.weight.grad.abs().sum() == 0
    model.zero_grad()


def test_noise_depends_only_on_the_seed_and_the_sequence():
    text = torch.zeros(4, 16, dtype=torch.long)
    whole = masked_inputs(text, range(8, 12))["tokens"]
    halves = [masked_inputs(text[:2], range(8, 10))["tokens"], masked_inputs(text[2:], range(10, 12))["tokens"]]
    assert torch.equal(whole, torch.cat(halves))
    assert not torch.equal(whole, masked_inputs(text, range(9, 13))["tokens"])
    assert not torch.equal(whole, masked_inputs(text, range(8, 12), seed=4)["tokens"])


def test_ar_ratio_masks_as_many_tokens_at_the_end():
    text = torch.zeros(400, 6, dtype=torch.long)
    random = masked_inputs(text)["tokens"] == V
    suffix = masked_inputs(text, ar_ratio=1.0)["tokens"] == V
    assert torch.equal(random.sum(1), suffix.sum(1))
    # Nothing is masked before something that is not; and where nothing is to be masked, nothing is.
    assert torch.equal(suffix, suffix.sort(1).values)
    assert (suffix.sum(1) == 0).any()


def test_low_noise_start_halves_the_noise_level_of_the_first_steps():
    text = torch.zeros(32, 6, dtype=torch.long)
    usual = 1 / masked_inputs(text)["loss_weights"][:, 0]
    low = 1 / masked_inputs(text, low_noise_start=2)["loss_weights"][:, 0]
    assert torch.equal(usual[16:], low[16:])
    assert low[:16].tolist() == pytest.approx(((usual[:16] - EPS) / 2 + EPS).tolist(), rel=1e-4)


def test_a_cut_sequence_neither_reads_nor_learns_what_was_cut_off(model):
    text = torch.randint(0, V, (6, 16), generator=torch.Generator().manual_seed(0))
    inputs = masked_inputs(text, range(20, 26), random_length=1.0)
    lengths = inputs["mask"][:, 0, 0].sum(1).tolist()
    assert len(set(lengths)) > 2
    nats = model(**inputs, reduction="none")
    for row, length in enumerate(lengths):
        assert (inputs["targets"][row, length:] == IGNORE_INDEX).all()
        cut = model(
            inputs["tokens"][row : row + 1, :length], inputs["targets"][row : row + 1, :length], reduction="sum"
        )
        expected = cut * inputs["loss_weights"][row, 0]
        assert nats[row].sum().item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("vocab_size", [97, 128])
def test_the_mask_token_has_a_learned_embedding_and_is_never_predicted(vocab_size):
    model = tiny_model(vocab_size=vocab_size, causal=False)
    text = torch.full((1, 4), vocab_size)
    model(text, torch.zeros_like(text)).backward()
    grad = model.embed_tokens.weight.grad
    assert grad is not None and grad[vocab_size].abs().sum() > 0
    assert (model.head(model.hidden(text))[..., vocab_size:] == -math.inf).all()
    assert model.config.num_params() == tiny_model(vocab_size=vocab_size).config.num_params()


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        ("", ["--num_mc=4"], "num_mc has no effect with --objective=ar; leave it out or train mdm"),
        ("ar_ratio = 0.1", [], "ar_ratio has no effect with --objective=ar"),
        ("ar_ratio = 2.0", ["--objective=mdm"], r"ar_ratio must be in \[0, 1\], got 2.0"),
        ("low_noise_start = -1", ["--objective=mdm"], "low_noise_start must not be negative, got -1"),
        ("", ["--objective=mdm", "--num_mc=0"], "num_mc must be at least 1, got 0"),
        ("[model]\ncausal = false", [], r"a bidirectional model \(causal = false\) is trained with --objective=mdm"),
    ],
)
def test_a_bad_option_is_refused(table, options, message, tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(f"[diffusion]\n{table}\n")
    with pytest.raises(ValueError, match=message):
        parse_config(training.Config, [str(path), *options])


def test_config_files_of_version_0_1_are_read_if_they_have_no_ablations():
    old = {"num_mc": 2, "num_orders": 0, "predefined_orders": False, "randmask_ratio": 0.0, "attention_dropout": 0.0}
    assert from_dict(DiffusionConfig, old) == DiffusionConfig(num_mc=2)
    with pytest.raises(ValueError, match="num_orders is no longer an option"):
        from_dict(DiffusionConfig, {**old, "num_orders": 4})


# ---- Validation and likelihoods --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [[3], [2, 2], [0, 1, 4, 1]])
def test_the_bound_is_the_mean_over_all_orders_of_the_chain_rule(model, text):
    """A theorem (Uria et al. 2014, arXiv:1310.1757); it checks `enumerate_masks`, by which the other tests judge."""
    nats = nats_by_mask(model, text)
    totals = []
    for order in itertools.permutations(range(len(text))):
        masks = [tuple(i in order[n:] for i in range(len(text))) for n in range(len(text))]
        totals.append(sum(nats[mask][i].item() for i, mask in zip(order, masks)))
    assert enumerate_masks(model, text, exact_weight) == pytest.approx(sum(totals) / len(totals), rel=1e-5)


def test_the_validation_loss_estimates_the_sum_over_all_masks(model):
    text = [0, 1, 4, 1]
    n = 2000
    rows = torch.tensor([text] * n)
    exact = enumerate_masks(model, text, exact_weight)
    means = torch.stack([nelbo(model, rows[i : i + 50], i, 1) / 50 for i in range(0, n, 50)])
    assert means.mean().item() == pytest.approx(exact, abs=4 * means.std().item() / math.sqrt(len(means)))
    one_draw = torch.stack([nelbo(model, rows[:1], i, 1) for i in range(20)])
    sixteen_draws = torch.stack([nelbo(model, rows[:1], i, 16) for i in range(20)])
    assert sixteen_draws.std() < one_draw.std() / 3
    assert sixteen_draws.mean().item() == pytest.approx(exact, rel=0.05)


def test_the_validation_loss_does_not_depend_on_the_batch_or_on_padding(model):
    text = torch.randint(0, V, (3, 12), generator=torch.Generator().manual_seed(0))
    text[1, 7:] = IGNORE_INDEX
    text[2] = IGNORE_INDEX
    one_by_one = nelbo(model, text[:1], 5, 2) + nelbo(model, text[1:2, :7], 6, 2)
    assert nelbo(model, text, 5, 2).item() == pytest.approx(one_by_one.item(), rel=1e-5)
    assert nelbo(model, text[2:], 7, 2).item() == 0


@pytest.mark.parametrize("likelihood", ["mc", "counts"])
def test_monte_carlo_estimates_the_sum_over_all_masks_of_the_ending(model, likelihood):
    context = [1, 3]
    ending = [0, 2, 2]
    cfg = LikelihoodConfig(likelihood, num_mc=8)
    nats = -torch.stack([log_likelihood(model, context, ending, cfg, seed)[0].sum() for seed in range(300)])
    exact = 0.0
    for mask, values in nats_by_mask(model, context + ending).items():
        if any(mask) and not any(mask[:2]):
            exact += exact_weight(sum(mask), 3) * values[torch.tensor(mask)].sum().item()
    assert nats.mean().item() == pytest.approx(exact, abs=4 * nats.std().item() / math.sqrt(300))


def test_exact_counts_have_the_lower_variance(model):
    def spread(likelihood: Any) -> Tensor:
        cfg = LikelihoodConfig(likelihood, num_mc=8)
        return torch.stack([log_likelihood(model, [1], [0, 2, 2, 4], cfg, seed)[0].sum() for seed in range(100)]).std()

    assert spread("counts") < 0.8 * spread("mc")


@pytest.mark.parametrize("likelihood", ["mc", "counts"])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_the_expected_weight_of_a_token_of_an_ending_is_one(likelihood, n):
    rng = np.random.default_rng(0)
    cfg = LikelihoodConfig(likelihood, num_mc=100)
    weights = sum(sample_masks(n, cfg, rng)[1].sum(0) for _ in range(200)) / 200
    assert weights == pytest.approx(np.ones(n), abs=0.15)


@pytest.mark.parametrize("batch_tokens", [1, 10, 2048])
def test_the_chain_rule_is_a_distribution_over_all_endings(model, batch_tokens):
    """The likelihoods of all endings of three tokens add up to one, and exactly one of them is greedy."""
    cfg = LikelihoodConfig(batch_tokens=batch_tokens)
    scores = [log_likelihood(model, [1, 3], list(e), cfg) for e in itertools.product(range(V), repeat=3)]
    assert sum(values.sum().exp().item() for values, _ in scores) == pytest.approx(1, abs=1e-5)
    assert sum(is_greedy for _, is_greedy in scores) == 1


def test_the_chain_rule_predicts_each_token_from_those_before_it(model):
    context = [1, 3]
    ending = [0, 2, 4, 4]
    values, _ = log_likelihood(model, context, ending)
    for i, token in enumerate(ending):
        noisy = torch.tensor([context + ending[:i] + [V] * (len(ending) - i)])
        logprob = model.head(model.hidden(noisy))[0, len(context) + i, :V].float().log_softmax(-1)[token]
        assert values[i].item() == pytest.approx(logprob.item(), abs=1e-5)


def test_nothing_leaks_between_the_forward_passes_of_a_long_ending(model):
    cfg = LikelihoodConfig(batch_tokens=64)
    ending = [token % V for token in range(30)]
    other = [*ending[:-1], (ending[-1] + 1) % V]
    a = log_likelihood(model, [1], ending, cfg)[0][:-1]
    b = log_likelihood(model, [1], other, cfg)[0][:-1]
    assert torch.allclose(a, b, rtol=0, atol=1e-6)


def test_guidance_moves_the_logits_away_from_those_without_a_context(model):
    logits = model.head(model.hidden(torch.tensor([[1, 3, V], [V, V, V]])))[:, 2, :V].detach()
    expected = {-1.0: logits[1], 0.0: logits[0], 1.0: 2 * logits[0] - logits[1]}
    for guidance, logit in expected.items():
        value = log_likelihood(model, [1, 3], [2], LikelihoodConfig(guidance=guidance))[0].item()
        assert value == pytest.approx(logit.log_softmax(-1)[2].item(), abs=1e-4)


@pytest.mark.parametrize("likelihood", ["chain", "mc", "counts"])
@pytest.mark.parametrize("guidance", [0.0, 0.5])
def test_the_number_of_forward_passes_is_known_in_advance(model, likelihood, guidance, monkeypatch):
    cfg = LikelihoodConfig(likelihood, num_mc=7, guidance=guidance, batch_tokens=20)
    passes = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda *args, **options: passes.append(1) or hidden(*args, **options))
    log_likelihood(model, [1, 2], [3, 4, 0], cfg)
    assert len(passes) == num_forward_passes(2, 3, cfg)


ITEMS = [
    Item("Cooking: A man cracks an egg. He", ["flies.", "drops it into a pan.", "sings to it.", "is it."], 1),
    Item("Sun", ["shines", "sings", "sinks", "swims"], 0),
    Item("A long context that no model of 32 tokens can hold as it is, so it is cut.", ["a", "bb", "ccc", "d"], 2),
]


@pytest.mark.parametrize(
    "cfg", [LikelihoodConfig(), LikelihoodConfig("counts", num_mc=4)], ids=lambda cfg: cfg.likelihood
)
def test_hellaswag_scores_masked_diffusion_by_its_own_likelihood(cfg):
    model = tiny_model(vocab_size=257, causal=False)
    scoring = ScoringConfig(likelihood=cfg.likelihood, num_mc=cfg.num_mc)
    scores = eval_hellaswag.evaluate(model, load_tokenizer("bytes"), ITEMS, scoring=scoring)
    assert scores["truncated_contexts"] == 2
    for item_id, item in enumerate(ITEMS):
        for i, ending in enumerate(item.endings):
            tokens = list(f" {ending}".encode())
            context = list(item.context.encode())[-(32 - len(tokens)) :]
            values, _ = log_likelihood(model, context, tokens, cfg, (item_id, i))
            assert scores["items"][item_id]["logprob_sums"][i] == pytest.approx(values.sum().item(), abs=1e-3)


def test_ranks_split_the_items_and_make_equally_many_forward_passes(monkeypatch):
    model = tiny_model(vocab_size=257, causal=False)
    tokenizer = load_tokenizer("bytes")
    expected = eval_hellaswag.evaluate(model, tokenizer, ITEMS)["items"]
    rows = list(eval_hellaswag.pack_items(enumerate(ITEMS), tokenizer, 31))
    passes = []
    scores = []
    announced = []
    hidden = model.hidden

    def all_reduce_max(values: list[int]) -> list[int]:
        announced.extend(values)
        return [max(announced)]

    monkeypatch.setattr(eval_hellaswag.distributed, "all_reduce_max", all_reduce_max)
    # The ranks run one after another. In the second round all have announced their number of passes.
    for rank in (0, 1, 2, 0, 1, 2):
        monkeypatch.setattr(eval_hellaswag.distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(eval_hellaswag.distributed, "world_size", lambda: 3)
        passes.append(0)

        def count(*args: Any, **options: Any) -> Tensor:
            passes[-1] += 1
            return hidden(*args, **options)

        monkeypatch.setattr(model, "hidden", count)
        scores.append(score_rows(model, rows))
    assert len(set(passes[3:])) == 1 and passes[3] > 0
    sums = {
        (row.item, row.first + i): value
        for part in scores[3:]
        for row, values, _ in part
        for i, value in enumerate(values)
    }
    assert sums == {(n, i): value for n, item in enumerate(expected) for i, value in enumerate(item["logprob_sums"])}


# ---- Generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "steps", "block", "expected_steps"),
    [
        (12, None, None, 12),
        (12, 4, None, 4),
        (12, 4, 5, 4),
        (12, 1, 4, 3),
        (10, 99, 3, 10),
        (1, 1, 1, 1),
        (12, 5, 100, 5),
    ],
)
@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_an_answer_is_filled_in_block_by_block_in_the_given_number_of_steps(
    model, n, steps, block, expected_steps, remasking
):
    cfg = DenoiseConfig(steps=steps, block_length=block, remasking=remasking)
    sampling = Sampling(temperature=1.0, seed=0)
    states = [[V] * n, *denoise(model, [1, 2, 3], n, sampling, cfg)]
    assert len(states) == expected_steps + 1
    assert max(states[-1]) < V
    for before, after in itertools.pairwise(states):
        # What is filled in stays, and every step fills in something.
        assert all(a == b for a, b in zip(before, after) if a != V)
        assert before.count(V) > after.count(V)
        last = max(i for i, token in enumerate(after) if token != V)
        finished = last // (block or n) * (block or n)
        assert V not in before[:finished]
    assert list(denoise(model, [1, 2, 3], n, sampling, cfg)) == states[1:]


def test_greedy_denoising_keeps_the_likeliest_token_of_all_positions(model):
    first, *_ = denoise(model, [1, 2], 6, Sampling(temperature=0))
    probs = model.head(model.hidden(torch.tensor([[1, 2] + [V] * 6])))[0, 2:, :V].softmax(-1)
    best = probs.amax(-1).argmax().item()
    assert first == [probs[i].argmax().item() if i == best else V for i in range(6)]


def test_blocks_of_one_token_are_left_to_right_decoding_by_the_chain_rule(model):
    *_, tokens = denoise(model, [1, 2], 5, Sampling(temperature=0), DenoiseConfig(block_length=1))
    assert log_likelihood(model, [1, 2], tokens)[1]


def test_an_answer_ends_at_the_stop_token(model):
    full = diffusion.generate(model, [1], 12, Sampling(temperature=0))
    stop = full[3]
    stopped = diffusion.generate(model, [1], 12, Sampling(temperature=0, stop_token=stop))
    assert stopped == full[: full.index(stop)]


def test_no_block_follows_one_with_the_stop_token(model):
    cfg = DenoiseConfig(block_length=2)
    *_, full = denoise(model, [1], 8, Sampling(temperature=0), cfg)
    *_, stopped = denoise(model, [1], 8, Sampling(temperature=0, stop_token=full[1]), cfg)
    assert stopped == full[:2] + [V] * 6


@pytest.mark.parametrize(
    ("prompt_len", "n_tokens", "expected"),
    [(20, 100, (16, 16)), (20, 5, (20, 5)), (5, 100, (5, 27)), (0, 100, (0, 32)), (40, 8, (24, 8))],
)
def test_prompt_and_answer_fit_the_context_of_32(model, prompt_len, n_tokens, expected):
    prompt = list(range(prompt_len))
    kept, n = diffusion.fit_to_context(model, prompt, n_tokens)
    assert (len(kept), n) == expected
    assert kept == prompt[prompt_len - len(kept) :]


# ---- Runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mdm(tmp_path_factory) -> list[str]:
    """Arguments of a run with every option of masked diffusion."""
    path = tmp_path_factory.mktemp("config") / "mdm.toml"
    path.write_text("[diffusion]\nstratified = true\nrandom_length = 0.1\nar_ratio = 0.1\nlow_noise_start = 3\n")
    return [str(path), "--objective=mdm", "--num_mc=2"]


@pytest.fixture(scope="module")
def undisturbed(no_plots, data, mdm, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "mdm"
    run(data, run_dir, *mdm)
    return run_dir


def test_a_run_learns_and_reports_its_bound_in_bits_per_byte(undisturbed):
    rows = [row for row in metrics.read_metrics(undisturbed) if "val_loss" in row]
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 0.3
    assert rows[-1]["val_bpb"] == pytest.approx(rows[-1]["val_loss"] / math.log(2), rel=2e-3)


def test_a_run_resumes_exactly(undisturbed, data, mdm, tmp_path):
    run_dir = tmp_path / "resumed"
    shutil.copytree(undisturbed, run_dir)
    for name in ("checkpoint_step_4.pt", "checkpoint_step_6.pt", "final_metrics.json"):
        (run_dir / name).unlink()
    run(data, run_dir, *mdm)
    assert losses(run_dir) == losses(undisturbed)
    assert same_weights(run_dir, undisturbed)


def test_two_processes_make_the_same_run_as_one(undisturbed, data, mdm, tmp_path):
    ranks(2, ["training.py", *arguments(data, tmp_path / "two", *mdm)])
    same_run(tmp_path / "two", undisturbed)


def test_the_size_of_the_micro_batch_does_not_change_the_noise(undisturbed, data, mdm, tmp_path):
    run(data, tmp_path / "large", *mdm, "--batch_size=16")
    assert losses(tmp_path / "large") == pytest.approx(losses(undisturbed), abs=1e-5)


def test_a_run_cannot_be_resumed_with_another_objective(undisturbed, data, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    with pytest.raises(ValueError, match="causal: false -> true"):
        run(data, tmp_path / "run")


@pytest.mark.slow
def test_the_compiled_model_gives_the_losses_of_the_eager_one(undisturbed, data, mdm, tmp_path):
    run(data, tmp_path / "compiled", *mdm, "--compile")
    assert losses(tmp_path / "compiled") == pytest.approx(losses(undisturbed), abs=1e-4)


def test_the_command_line_of_hellaswag_scores_a_masked_diffusion_run(undisturbed, tmp_path):
    record = {"activity_label": "Sun", "ctx_a": "It", "ctx_b": "is", "label": 1, "endings": ["up", "red", "far", "big"]}
    items = tmp_path / "items.jsonl"
    items.write_text(json.dumps(record) + "\n")
    output = tmp_path / "out.json"
    options = [f"--checkpoint={undisturbed}", f"--data={items}", f"--output={output}", "--dtype=fp32"]
    options += ["--likelihood=counts", "--num_mc=4"]
    eval_hellaswag.main(parse_config(eval_hellaswag.EvalConfig, options))
    saved = json.loads(output.read_text())
    assert saved["settings"]["likelihood"] == "counts"
    assert len(saved["items"][0]["logprob_sums"]) == 4


# ---- Chat ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def autoregressive(no_plots, data, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "ar"
    run(data, run_dir, "--max_steps=1")
    return run_dir


def chat_with(*arguments: str | Path) -> None:
    chat.main(parse_config(chat.ChatConfig, [str(argument) for argument in arguments]))


def test_chat_completes_a_prompt_with_the_answer_alone(undisturbed, capsys):
    texts = []
    for _ in range(2):
        chat_with(undisturbed, "--prompt=The sky", "--seed=5", "--steps=5", "--block_length=none", "--max_tokens=12")
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert len(texts[0]) >= 2


def test_chat_says_that_an_answer_was_shortened_to_fit_the_context(undisturbed, capsys):
    chat_with(undisturbed, "--prompt=The sky", "--seed=1", "--steps=3", "--max_tokens=500")
    assert "25 new tokens" in capsys.readouterr().err


def test_bench_and_compare_measure_steps_and_the_autoregressive_model_judges(undisturbed, autoregressive, capsys):
    options = [str(undisturbed), str(autoregressive), "--max_tokens=16", "--top_k=none", "--temperature=1"]
    session = chat.Session(parse_config(chat.ChatConfig, options))
    chat.run_command(session, "/bench")
    chat.run_command(session, "/compare The sky")
    output, errors = capsys.readouterr()
    assert not errors
    assert len(re.findall(r"^ *(?:1|2|3|median) +16(?:\.0)? +\d+\.\d +\d+\.\d$", output, re.MULTILINE)) == 4
    rows = re.findall(r"^ *(\d+) +[\d.]+ +(\d+\.\d{3}|nan)   ['\"]", output, re.MULTILINE)
    assert [int(steps) for steps, _ in rows] == [16, 8, 4, 2, 1]
    assert f"loss of {session.models[1].name}" in output


def test_chat_refuses_options_that_no_checkpoint_can_follow(undisturbed, autoregressive):
    with pytest.raises(ValueError, match="steps has no effect on autoregressive checkpoints"):
        chat_with(autoregressive, "--prompt=x", "--steps=4")
    with pytest.raises(ValueError, match="repetition_penalty has no effect on masked-diffusion checkpoints"):
        chat_with(undisturbed, "--prompt=x", "--repetition_penalty=1.2")
