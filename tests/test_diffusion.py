"""Masked diffusion against enumeration: every mask of a short text, every ending, every order."""

import itertools
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pexpect
import pytest
import torch
from conftest import tiny_model
from processes import ranks
from test_chat import end, session_of, terminal, write_checkpoint
from test_training import arguments, losses, run, same_run, same_weights
from torch import Tensor

import chat
import config
import diffusion
import eval_hellaswag
import metrics
import training
from config import parse_config
from diffusion import EPS, DiffusionConfig, corrupt, fill, log_likelihood, mask_tokens, nelbo, ways_to_mask
from eval_hellaswag import Item
from model import IGNORED, ModelConfig, Transformer
from shards import load_tokenizer

pytestmark = pytest.mark.usefixtures("no_plots")
V = 5  # tokens of the models whose texts are enumerated
BOTH_SIDES = ModelConfig(dim=32, n_layers=2, n_heads=2, vocab_size=257, seq_len=64, causal=False)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_model(vocab_size=V, causal=False)


def noisy(
    tokens: Tensor, cfg: DiffusionConfig | None = None, numbers: range | None = None, per_step: int = 8, **changes
):
    cfg = cfg or DiffusionConfig(**changes)
    numbers = range(len(tokens)) if numbers is None else numbers
    return mask_tokens(tokens, numbers, cfg, mask_id=V, seed=3, batch_sequences=per_step)


def costs(model: Transformer, text: list[int]) -> dict[tuple[bool, ...], Tensor]:
    """For every mask of a text: nats [T] of each token, given what the mask leaves."""
    found = {}
    for mask in itertools.product((False, True), repeat=len(text)):
        seen = torch.tensor([[V if hidden else token for token, hidden in zip(text, mask)]])
        chances = model.head(model.hidden(seen))[0, :, :V].float().log_softmax(-1)
        found[mask] = -chances[torch.arange(len(text)), torch.tensor(text)].detach()
    return found


def enumerated(model: Transformer, text: list[int], weight_of_size) -> float:
    """Sum over all masks of weight_of_size(masked tokens, T) x the nats of the masked tokens."""
    return sum(
        weight_of_size(sum(mask), len(text)) * nats[torch.tensor(mask)].sum().item()
        for mask, nats in costs(model, text).items()
        if any(mask)
    )


def exact_bound(size: int, length: int) -> float:
    """The integral over t in (0, 1) of t^size (1-t)^(length-size) / t: a Beta function."""
    return 1 / (size * math.comb(length, size))


def trained_bound(size: int, length: int) -> float:
    """The same for p uniform in [EPS, 1]: what a training loss estimates."""
    p = EPS + (1 - EPS) * (np.arange(200_000) + 0.5) / 200_000
    return float((p ** (size - 1) * (1 - p) ** (length - size)).mean())


# ---- The training loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"stratified": True}], ids=["independent", "stratified"])
def test_the_expected_weight_of_a_token_is_one(options):
    call = noisy(torch.zeros(20_000, 6, dtype=torch.long), per_step=1000, **options)
    weights = call["loss_weights"] * (call["targets"] != IGNORED)  # variance E[1/p] - 1 = 5.9
    assert weights.mean(0).tolist() == pytest.approx([1] * 6, abs=4 * math.sqrt(5.9 / 20_000))


@pytest.mark.parametrize(
    "options", [{"ar_ratio": 1.0}, {"random_length": 1.0}, {"ar_ratio": 0.5, "random_length": 0.5}]
)
def test_a_sequence_masked_at_its_end_or_cut_weighs_as_much_as_any(options):
    call = noisy(torch.zeros(10_000, 6, dtype=torch.long), **options)
    weights = (call["loss_weights"] * (call["targets"] != IGNORED)).sum(1)
    assert weights.mean().item() == pytest.approx(6, abs=4 * weights.std().item() / 100)


def test_stratified_levels_of_a_step_lie_equally_far_apart():
    levels = sorted(diffusion.spread_level(number, seed=3, batch_sequences=8) for number in range(16, 24))
    assert np.diff(levels) == pytest.approx([1 / 8] * 7) and levels[0] < 1 / 8
    p = 1 / noisy(torch.zeros(8, 6, dtype=torch.long), numbers=range(16, 24), stratified=True)["loss_weights"][:, 0]
    assert sorted(p.tolist()) == pytest.approx([EPS + (1 - EPS) * t for t in levels])


def test_unmasked_tokens_carry_no_loss_and_masked_ones_are_hidden(model):
    text = torch.randint(0, V, (8, 32), generator=torch.Generator().manual_seed(0))
    call = noisy(text)
    masked = call["tokens"] == V
    assert 0 < masked.sum() < masked.numel()
    assert torch.equal(call["targets"], torch.where(masked, text, IGNORED))
    assert torch.equal(call["tokens"][~masked], text[~masked])
    logits = model.head(model.hidden(call["tokens"]))
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text.flatten(), reduction="none").view(8, 32)
    expected = (nats * masked * call["loss_weights"]).sum() / text.numel()  # ALL tokens below the line
    assert model(**call).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_mean_training_loss_is_the_sum_over_all_masks(model):
    text, n = [1, 4, 0, 2], 10_000
    call = noisy(torch.tensor([text] * n))
    nats = model(**call, reduction="none").sum(1)
    assert nats.mean().item() == pytest.approx(
        enumerated(model, text, trained_bound), abs=4 * nats.std().item() / math.sqrt(n)
    )


def test_a_step_that_masks_nothing_has_a_loss_of_zero_and_a_gradient(model):
    text = torch.zeros(1, 4, dtype=torch.long)
    loss = model(text, torch.full_like(text, IGNORED), loss_weights=torch.ones(1, 4))
    loss.backward()
    assert loss.item() == 0 and model.norm.weight.grad.abs().sum() == 0
    model.zero_grad()


def test_noise_depends_on_the_seed_and_the_sequence_and_on_nothing_else():
    text = torch.zeros(4, 16, dtype=torch.long)
    whole = noisy(text, numbers=range(8, 12))["tokens"]
    parts = torch.cat(
        [noisy(text[:2], numbers=range(8, 10))["tokens"], noisy(text[2:], numbers=range(10, 12))["tokens"]]
    )
    assert torch.equal(whole, parts) and not torch.equal(whole, noisy(text, numbers=range(9, 13))["tokens"])
    other = mask_tokens(text, range(8, 12), DiffusionConfig(), mask_id=V, seed=4, batch_sequences=8)
    assert not torch.equal(whole, other["tokens"])


def test_the_end_of_a_sequence_is_masked_and_never_all_of_it_for_none():
    text = torch.zeros(400, 6, dtype=torch.long)
    usual, ends = (noisy(text, ar_ratio=ratio)["tokens"] == V for ratio in (0.0, 1.0))
    assert torch.equal(usual.sum(1), ends.sum(1)) and (ends.sum(1) == 0).any()
    assert torch.equal(ends, ends.sort(1).values)  # nothing is masked before something that is not


def test_low_noise_lasts_as_many_steps_as_said():
    text = torch.zeros(32, 6, dtype=torch.long)
    usual, low = (1 / noisy(text, low_noise_start=n)["loss_weights"][:, 0] for n in (0, 2))  # 8 sequences a step
    assert torch.equal(usual[16:], low[16:])
    assert low[:16].tolist() == pytest.approx(((usual[:16] - EPS) / 2 + EPS).tolist(), rel=1e-4)


def test_a_cut_sequence_neither_sees_nor_learns_what_was_cut(model):
    text = torch.randint(0, V, (6, 16), generator=torch.Generator().manual_seed(0))
    call = noisy(text, random_length=1.0, numbers=range(20, 26))
    ends = call["mask"][:, 0, 0].sum(1)
    assert len(set(ends.tolist())) > 2 and all((row[end:] == IGNORED).all() for row, end in zip(call["targets"], ends))
    losses = model(**call, reduction="none")
    for row, length in enumerate(ends.tolist()):
        alone = model(call["tokens"][row : row + 1, :length], call["targets"][row : row + 1, :length], reduction="sum")
        p = 1 / call["loss_weights"][row, 0] * 16 / length
        assert losses[row].sum().item() == pytest.approx((alone / p * 16 / length).item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("vocab_size", [97, 128])
def test_mask_has_a_row_of_its_own_which_is_learned_and_never_predicted(vocab_size):
    model = tiny_model(vocab_size=vocab_size, causal=False)
    text = torch.full((1, 4), vocab_size)
    model(text, torch.zeros_like(text)).backward()
    grad = model.embed_tokens.weight.grad
    assert grad is not None and grad[vocab_size].abs().sum() > 0
    assert (model.head(model.hidden(text))[..., vocab_size:] == -math.inf).all()
    assert model.num_params() == tiny_model(vocab_size=vocab_size).num_params()


# ---- What is tried against overfitting of autoregression ------------------------------------------------------------


def test_without_options_autoregression_gets_its_batch_as_it_is(tokens):
    call = corrupt(tokens, tokens + 1, range(2), "ar", DiffusionConfig(), mask_id=97, seed=0, batch_sequences=2)
    assert call.keys() == {"tokens", "targets"} and call["tokens"] is tokens


def test_token_orders_follow_the_example_of_the_paper(monkeypatch):
    monkeypatch.setattr(diffusion, "token_orders", lambda *_: torch.tensor([[2, 0, 1, 4, 5, 3]]))
    inputs = torch.arange(6)[None]
    call = diffusion.reorder(inputs, inputs + 1, range(1), DiffusionConfig(num_orders=1), seed=0)
    assert call["tokens"].tolist() == call["positions"].tolist() == [[0, 3, 1, 2, 5, 6]]
    assert call["targets"].tolist() == [[3, 1, 2, 5, 6, 4]]


@pytest.mark.parametrize("predefined", [False, True])
def test_the_first_order_is_left_to_right_and_the_others_are_permutations(predefined):
    orders = diffusion.token_orders(200, 8, predefined, 0)
    assert orders[0].tolist() == list(range(200)) and len({tuple(row) for row in orders.tolist()}) == 8
    assert all(sorted(row) == list(range(200)) for row in orders.tolist())
    moved = (orders - torch.arange(200)).abs().float().mean(1)  # |a - b| of two normal deviates: 2 i / sqrt(pi)
    if predefined:
        assert moved[1:].tolist() == pytest.approx([i * math.sqrt(2 / math.pi) for i in range(1, 8)], rel=0.35)
    else:
        assert moved[1:].tolist() == pytest.approx([200 / 3] * 7, rel=0.2)


def test_one_order_is_plain_autoregression_and_each_order_is_read_causally(tokens):
    model = tiny_model()
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    plain = model(inputs, targets)
    call = diffusion.reorder(inputs, targets, range(2), DiffusionConfig(num_orders=1), seed=0)
    assert model(**call).item() == pytest.approx(plain.item(), abs=1e-5)
    call = diffusion.reorder(inputs, targets, range(2), DiffusionConfig(num_orders=16), seed=0)
    assert abs(model(**call) - plain) > 1e-3
    changed = {**call, "tokens": call["tokens"].clone()}
    changed["tokens"][:, 9] += 1
    before, after = (model(**c, reduction="none") for c in (call, changed))
    assert torch.allclose(before[:, :9], after[:, :9], atol=1e-5) and not torch.allclose(before[:, 9:], after[:, 9:])


def test_a_share_of_the_tokens_loses_a_part_of_its_past_and_none_itself():
    causal = torch.ones(64, 64, dtype=torch.bool).tril()
    for ratio, low, high in ((0.0, 0.0, 0.0), (0.3, 0.2, 0.4), (1.0, 0.9, 1.0)):
        mask = diffusion.partly_blind(range(8), 64, ratio, 0, torch.device("cpu"))
        assert mask.shape == (8, 1, 64, 64) and not (mask & ~causal).any()
        assert mask.diagonal(dim1=-2, dim2=-1).all()
        blind = (mask != causal).any(-1)[..., 8:].float().mean()  # of few keys often none is lost
        assert low <= blind <= high
    lost = 1 - (mask & causal).sum() / (8 * causal.sum())
    assert lost.item() == pytest.approx(0.5, abs=0.05)
    parts = [diffusion.partly_blind(range(a, a + 4), 64, 1.0, 0, torch.device("cpu")) for a in (0, 4)]
    assert torch.equal(mask, torch.cat(parts))


def test_attention_dropout_is_random_unbiased_at_first_and_off_by_default(tokens):
    model = tiny_model(n_layers=1)
    torch.manual_seed(0)
    dropped = [model.hidden(tokens, attention_dropout=0.5) for _ in range(2)]
    assert not torch.equal(*dropped) and torch.equal(model.hidden(tokens), model.hidden(tokens))
    torch.testing.assert_close(model.hidden(tokens, attention_dropout=1e-9), model.hidden(tokens))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_orders=4", "--objective=mdm"], "num_orders has no effect with --objective=mdm"),
        (["--num_mc=4"], "num_mc has no effect with --objective=ar; leave it out or train mdm"),
        (["--ar_ratio=0.1"], "ar_ratio has no effect with --objective=ar"),
        (["--causal=false"], "causal=false lets each token see the one that it should predict"),
        (["--objective=mdm", "--ar_ratio=2"], r"ar_ratio must be in [0, 1], got 2.0"),
        (["--predefined_orders"], "predefined_orders has no effect with num_orders=0"),
    ],
)
def test_options_without_effect_are_refused(options, message, capsys):
    with pytest.raises(SystemExit) as exit:
        parse_config(training.Config, options)
    assert exit.value.code == 2 and message in capsys.readouterr().err


# ---- Validation and likelihoods --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [[3], [2, 2], [0, 1, 4, 1]])
def test_the_bound_is_the_mean_over_all_orders_of_the_chain_rule(model, text):
    """A theorem (Uria et al. 2014, arXiv:1310.1757) that `enumerated` has to fulfil before it may judge anything."""
    nats, totals = costs(model, text), []
    for order in itertools.permutations(range(len(text))):
        masks = [tuple(place in order[i:] for place in range(len(text))) for i in range(len(text))]
        totals.append(sum(nats[mask][order[i]].item() for i, mask in enumerate(masks)))
    assert enumerated(model, text, exact_bound) == pytest.approx(sum(totals) / len(totals), rel=1e-5)


def test_validation_estimates_the_sum_over_all_masks(model):
    text, n = [0, 1, 4, 1], 2000
    clean = torch.tensor([text] * n)
    exact = enumerated(model, text, exact_bound)
    single = torch.stack([nelbo(model, clean[i : i + 50], i, 1) / 50 for i in range(0, n, 50)])
    assert single.mean().item() == pytest.approx(exact, abs=4 * single.std().item() / math.sqrt(len(single)))
    many = torch.stack([nelbo(model, clean[i : i + 1], i, 16) for i in range(20)])  # 16 draws a sequence
    one = torch.stack([nelbo(model, clean[i : i + 1], i, 1) for i in range(20)])
    assert many.std() < one.std() / 3 and many.mean().item() == pytest.approx(exact, rel=0.05)


def test_validation_does_not_depend_on_the_batch_nor_on_what_is_beyond_the_data(model):
    clean = torch.randint(0, V, (3, 12), generator=torch.Generator().manual_seed(0))
    clean[1, 7:], clean[2] = IGNORED, IGNORED
    alone = nelbo(model, clean[:1], 5, 2) + nelbo(model, clean[1:2, :7], 6, 2)
    assert nelbo(model, clean, 5, 2).item() == pytest.approx(alone.item(), rel=1e-5)
    assert nelbo(model, clean[2:], 7, 2).item() == 0


@pytest.mark.parametrize("likelihood", ["mc", "counts"])
def test_monte_carlo_estimates_the_sum_over_all_masks_of_the_ending(model, likelihood):
    context, ending, seeds = [1, 3], [0, 2, 2], 300
    drawn = [log_likelihood(model, context, ending, likelihood, num_mc=8, seed=seed)[0].sum() for seed in range(seeds)]
    values = -torch.stack(drawn)
    exact = 0.0
    for mask, nats in costs(model, context + ending).items():
        if any(mask) and not any(mask[:2]):
            exact += exact_bound(sum(mask), 3) * nats[torch.tensor(mask)].sum().item()
    assert values.mean().item() == pytest.approx(exact, abs=4 * values.std().item() / math.sqrt(seeds))


def test_exact_counts_have_the_lower_variance(model):
    spreads = [
        torch.stack(
            [log_likelihood(model, [1], [0, 2, 2, 4], how, num_mc=8, seed=s)[0].sum() for s in range(100)]
        ).std()
        for how in ("counts", "mc")
    ]
    assert spreads[0] < 0.8 * spreads[1]


@pytest.mark.parametrize("likelihood", ["mc", "counts"])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_every_token_of_an_ending_has_the_expected_weight_one(likelihood, n):
    rng = np.random.default_rng(0)
    weights = sum(ways_to_mask(n, likelihood, 100, rng)[1].sum(0) for _ in range(200)) / 200
    assert weights == pytest.approx(np.ones(n), abs=0.15)


def test_the_chain_rule_is_a_distribution_over_all_endings(model):
    """Enumeration: the likelihoods of all endings of three tokens add up to one; so do greedy flags."""
    for batch_tokens in (1, 10, 2048):
        scored = [
            log_likelihood(model, [1, 3], list(e), batch_tokens=batch_tokens)
            for e in itertools.product(range(V), repeat=3)
        ]
        assert sum(values.sum().exp().item() for values, _ in scored) == pytest.approx(1, abs=1e-5)
        assert sum(greedy for _, greedy in scored) == 1


def test_the_chain_rule_hides_the_rest_of_the_ending_and_gives_every_token_its_own_value(model):
    context, ending = [1, 3], [0, 2, 4, 4]
    values, _ = log_likelihood(model, context, ending)
    for i, token in enumerate(ending):
        seen = torch.tensor([context + ending[:i] + [V] * (len(ending) - i)])
        chance = model.head(model.hidden(seen))[0, len(context) + i, :V].float().log_softmax(-1)[token]
        assert values[i].item() == pytest.approx(chance.item(), abs=1e-5)
    long = [token % V for token in range(30)]  # more passes than fit at once: nothing may leak between them
    changed = [*long[:-1], (long[-1] + 1) % V]
    pairs = zip(*(log_likelihood(model, [1], text, batch_tokens=64)[0][:-1] for text in (long, changed)))
    assert all(abs(a - b) < 1e-6 for a, b in pairs)


def test_guidance_moves_away_from_the_text_without_its_context(model):
    without, plain, guided = (log_likelihood(model, [1, 3], [2], guidance=g)[0].item() for g in (-1.0, 0.0, 1.0))
    logits = [model.head(model.hidden(torch.tensor([[*c, V]])))[0, 2, :V].detach() for c in ([1, 3], [V, V])]
    for value, logit in ((without, logits[1]), (plain, logits[0]), (guided, 2 * logits[0] - logits[1])):
        assert value == pytest.approx(logit.log_softmax(-1)[2].item(), abs=1e-4)


ITEMS = [
    Item("Cooking: A man cracks an egg. He", ["flies.", "drops it into a pan.", "sings to it.", "is it."], 1),
    Item("Sun", ["shines", "sings", "sinks", "swims"], 0),
    Item("A long context that no model of 32 tokens can hold as it is, so it is cut.", ["a", "bb", "ccc", "d"], 2),
]


@pytest.mark.parametrize("likelihood", ["chain", "counts"])
def test_hellaswag_scores_masked_diffusion_by_its_own_likelihood(likelihood):
    model, tokenizer = tiny_model(vocab_size=257, causal=False), load_tokenizer("bytes")
    scoring: dict[str, Any] = {"likelihood": likelihood} | ({"num_mc": 4} if likelihood == "counts" else {})
    scores = eval_hellaswag.evaluate(model, tokenizer, ITEMS, scoring=scoring)
    assert scores["truncated_contexts"] == 1 + 1
    for index, item in enumerate(ITEMS):
        for number, ending in enumerate(item.endings):
            tokens = list(f" {ending}".encode())
            context = list(item.context.encode())[-(32 - len(tokens)) :]
            values, _ = log_likelihood(model, context, tokens, **scoring, seed=(index, number))
            assert scores["items"][index]["logprob_sums"][number] == pytest.approx(values.sum().item(), abs=1e-3)


def test_ranks_share_the_items_and_make_as_many_passes(monkeypatch):
    model, tokenizer = tiny_model(vocab_size=257, causal=False), load_tokenizer("bytes")
    whole = eval_hellaswag.evaluate(model, tokenizer, ITEMS)["items"]
    rows = list(eval_hellaswag.rows_of(enumerate(ITEMS), tokenizer, 31))
    passes, found, hidden = [], [], model.hidden
    for rank in range(3):
        monkeypatch.setattr(eval_hellaswag.distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(eval_hellaswag.distributed, "world_size", lambda: 3)
        passes.append(0)

        def count(*args: Any, **options: Any) -> Tensor:
            passes[-1] += 1
            return hidden(*args, **options)

        monkeypatch.setattr(model, "hidden", count)
        found += eval_hellaswag.score_rows(model, rows)
    assert len(set(passes)) == 1 and passes[0] > 0
    sums = {(row.item, row.first + i): value for row, values, _ in found for i, value in enumerate(values)}
    assert sums == {(i, n): value for i, item in enumerate(whole) for n, value in enumerate(item["logprob_sums"])}


# ---- Generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "steps", "block", "passes"),
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
def test_an_answer_fills_in_as_many_steps_as_said_and_what_is_filled_stays(model, n, steps, block, passes, remasking):
    prompt = [1, 2, 3]
    states = [[V] * n, *fill(model, prompt, n, steps=steps, block_length=block, remasking=remasking, seed=0)]
    assert len(states) == passes + 1 and V not in states[-1] and max(states[-1]) < V
    for before, after in itertools.pairwise(states):
        assert all(a == b for a, b in zip(before, after) if a != V) and before.count(V) > after.count(V)
        started = [i for i, token in enumerate(after) if token != V]
        assert before[: max(started) // (block or n) * (block or n)].count(V) == 0  # blocks from left to right
    again = list(fill(model, prompt, n, steps=steps, block_length=block, remasking=remasking, seed=0))
    assert again == states[1:]


def test_greedy_filling_keeps_the_likeliest_token_of_all_places(model):
    (first, *_) = fill(model, [1, 2], 6, temperature=0)
    chances = model.head(model.hidden(torch.tensor([[1, 2] + [V] * 6])))[0, 2:, :V].softmax(-1)
    place = chances.amax(-1).argmax().item()
    assert first == [V if i != place else chances[place].argmax().item() for i in range(6)]


def test_block_length_one_is_left_to_right_sampling_with_the_chain_rule(model):
    (*_, text) = fill(model, [1, 2], 5, block_length=1, temperature=0)
    assert log_likelihood(model, [1, 2], text)[1]


def test_an_answer_ends_at_the_end_of_the_text_and_fits_the_context(model):
    full = diffusion.write(model, [1], 12, stop_token=99, temperature=0)
    stop = full[3]
    assert diffusion.write(model, [1], 12, stop_token=stop, temperature=0) == full[: full.index(stop)]
    assert diffusion.fit(model, [1] * 20, 100) == ([1] * 16, 16) and diffusion.fit(model, [1] * 20, 5) == ([1] * 20, 5)
    assert diffusion.fit(model, [1] * 5, 100) == ([1] * 5, 27) and diffusion.fit(model, [], 100) == ([], 32)


# ---- Runs ------------------------------------------------------------------------------------------------------------

MDM = ["--objective=mdm", "--num_mc=2", "--stratified", "--random_length=0.1", "--ar_ratio=0.1", "--low_noise_start=3"]


@pytest.fixture(scope="module")
def undisturbed(no_plots, data, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "mdm"
    run(data, run_dir, *MDM)
    return run_dir


def test_a_run_learns_and_reports_its_bound_in_bits_per_byte(undisturbed):
    rows = [row for row in metrics.read_metrics(undisturbed) if "val_loss" in row]
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 0.3
    assert rows[-1]["val_bpb"] == pytest.approx(rows[-1]["val_loss"] / math.log(2), rel=2e-3)


def test_a_run_resumes_as_if_nothing_had_happened(undisturbed, data, tmp_path):
    run_dir = tmp_path / "resumed"
    shutil.copytree(undisturbed, run_dir)
    for name in ("checkpoint_step_4.pt", "checkpoint_step_6.pt", "final_metrics.json"):
        (run_dir / name).unlink()
    run(data, run_dir, *MDM)
    assert losses(run_dir) == losses(undisturbed) and same_weights(run_dir, undisturbed)


def test_two_processes_are_the_same_run_as_one(undisturbed, data, tmp_path):
    ranks(2, ["training.py", *arguments(data, tmp_path / "two", *MDM)])
    same_run(tmp_path / "two", undisturbed)


def test_micro_steps_do_not_change_the_noise(undisturbed, data, tmp_path):
    run(data, tmp_path / "large", *MDM, "--batch_size=16")
    assert losses(tmp_path / "large") == pytest.approx(losses(undisturbed), abs=1e-5)


def test_an_ablated_run_is_the_same_in_micro_steps_of_any_size(data, tmp_path):
    options = ["--num_orders=4", "--predefined_orders", "--randmask_ratio=0.5"]
    run(data, tmp_path / "small", *options, "--max_steps=2")
    run(data, tmp_path / "large", *options, "--max_steps=2", "--batch_size=16")
    run(data, tmp_path / "plain", "--max_steps=2")
    small, large, plain = (losses(tmp_path / name) for name in ("small", "large", "plain"))
    assert small == pytest.approx(large, abs=1e-5) and small[1] != pytest.approx(plain[1], abs=1e-5)


def test_attention_dropout_resumes_too(data, tmp_path):
    options = ["--attention_dropout=0.3", "--max_steps=4"]
    run(data, tmp_path / "whole", *options)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for name in ("checkpoint_step_4.pt", "final_metrics.json"):
        (tmp_path / "parts" / name).unlink()
    run(data, tmp_path / "parts", *options)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_eval_only_knows_what_a_checkpoint_is(undisturbed, data, capsys):
    options = [f"--eval_only={undisturbed}", "--eval_tokens=2000", "--dtype=fp32", f"--sources={data}", "--num_mc=2"]
    training.main(parse_config(training.Config, options))
    last = [row["val_loss"] for row in metrics.read_metrics(undisturbed) if "val_loss" in row][-1]
    assert float(capsys.readouterr().out.splitlines()[-1].split()[-3]) == pytest.approx(last, abs=1e-4)


def test_another_objective_cannot_go_on_with_a_run(undisturbed, data, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    with pytest.raises(ValueError, match="causal: false -> true"):
        run(data, tmp_path / "run")


@pytest.mark.slow
def test_the_compiled_model_gives_the_losses_of_the_eager_one(undisturbed, data, tmp_path):
    run(data, tmp_path / "compiled", *MDM, "--compile")
    assert losses(tmp_path / "compiled") == pytest.approx(losses(undisturbed), abs=1e-4)


def test_the_command_line_of_hellaswag(undisturbed, tmp_path):
    record = {"activity_label": "Sun", "ctx_a": "It", "ctx_b": "is", "label": 1, "endings": ["up", "red", "far", "big"]}
    (tmp_path / "items.jsonl").write_text(json.dumps(record) + "\n")
    command = [f"--checkpoint={undisturbed}", f"--data={tmp_path / 'items.jsonl'}", "--num_mc=4"]
    output = f"--output={tmp_path / 'out.json'}"
    eval_hellaswag.main(eval_hellaswag.parse([*command, output, "--likelihood=counts"]))
    saved = json.loads((tmp_path / "out.json").read_text())
    assert saved["settings"]["likelihood"] == "counts" and len(saved["items"][0]["logprob_sums"]) == 4
    with pytest.raises(ValueError, match="--num_mc has no effect with the chain rule"):
        eval_hellaswag.main(eval_hellaswag.parse(command))


# ---- Chat ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("chat")
    torch.manual_seed(0)
    ours = {"config": {"model": config.to_dict(BOTH_SIDES)}, "model": Transformer(BOTH_SIDES).state_dict()}
    return write_checkpoint(folder / "mdm", **ours), write_checkpoint(folder / "ar")


def test_a_pipe_gets_the_finished_answer_alone(paths, capsys):
    texts = []
    for _ in range(2):
        session = session_of(paths[0], seed=5, steps=5, block_length=None)
        session.ask("The sky")
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and not {chat.OPEN, "\r", "\x1b"} & set(texts[0])
    assert session.last().finish == "length" and len(session.last().tokens) == 20
    chat.run_command(session, "/probs")
    assert len(capsys.readouterr().out.splitlines()) == len(session.last().tokens)


def test_bench_measures_and_compare_judges_by_the_autoregressive_one(paths, capsys):
    session = session_of(*paths, max_tokens=16, top_k=None, temperature=1.0)
    chat.run_command(session, "/bench")
    chat.run_command(session, "/compare The sky")
    said, errors = capsys.readouterr()
    assert not errors
    assert len(re.findall(r"^ *(?:1|2|3|median) +16 +\d+\.\d +\d+\.\d$", said, re.MULTILINE)) == 4
    rows = re.findall(r"^ *(\d+) +[\d.]+ +(\d+\.\d{3}|nan)   '", said, re.MULTILINE)
    assert [int(steps) for steps, _ in rows] == [16, 8, 4, 2, 1]
    assert "as " + paths[1] in said  # the autoregressive one judges
    assert re.search(r"^The sky.* \| The sky", said, re.MULTILINE)


@pytest.mark.parametrize(
    ("which", "options", "message"),
    [
        (1, {"steps": 4}, "steps has no effect on autoregressive checkpoints"),
        (0, {"repetition_penalty": 1.2}, "repetition_penalty has no effect on masked-diffusion checkpoints"),
    ],
)
def test_options_that_no_checkpoint_can_follow_are_refused(paths, which, options, message):
    with pytest.raises(ValueError, match=message):
        session_of(paths[which], **options)


def test_an_answer_that_does_not_fit_says_so(paths, capsys):
    session_of(paths[0], max_tokens=500, seed=1, steps=3).ask("The sky")
    assert "(answer of 57 tokens: with the prompt it fills the context of 64)" in capsys.readouterr().err


def test_a_terminal_shows_the_answer_filling_in(paths, tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "TERM", "xterm")
    monkeypatch.setattr(
        "test_chat.environment", lambda home: {**os.environ, "OMP_NUM_THREADS": "1", "XDG_STATE_HOME": home}
    )
    child = terminal(str(tmp_path), paths[0], "--max_tokens=30", "--block_length=none")
    child.send("The sky\r")
    child.expect(r"░+[^░\r\n]")  # open places before a token that is there already
    child.expect(r"\r\x1b\[J")
    child.expect(r"\(\d+ tokens, [\d.]+/s, (max_tokens reached|the model ended its text)\)")
    child.expect("\n> ")
    child.sendeof()
    assert end(child) == (0, None) and isinstance(child, pexpect.spawn)


def test_a_frame_is_as_high_as_what_it_replaces(capsys, monkeypatch):
    monkeypatch.setattr(chat.shutil, "get_terminal_size", lambda: os.terminal_size((11, 4)))
    frame = chat.Frame()
    for text, rows in (("a" * 15, 1), ("b\n\nc", 2), ("1\n2\n3\n4\n5", 2), ("", 0)):
        frame(text)
        assert frame.rows == rows
    shown = capsys.readouterr().out
    assert shown == "\r\x1b[Jaaaaaaaaaa\naaaaa\x1b[1A\r\x1b[Jb\n\nc\x1b[2A\r\x1b[J3\n4\n5\x1b[2A\r\x1b[J"
