"""nano416/generate.py: every way to decode writes the same text; sampling draws from exactly the tokens it should."""

import itertools
import math

import pytest
import torch
from conftest import tiny_model

from nano416.generate import (
    Sampling,
    apply_repetition_penalty,
    decode_cached,
    decode_uncached,
    generate,
    generate_batch,
    sample,
)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("prompt_length", [1, 7, 31, 32, 33, 80])
def test_generation_is_the_same_without_cache_far_past_the_context(prompt_length, temperature):
    model, prompt = tiny_model(n_kv_heads=2, tie_embeddings=False), [(7 * i + 3) % 97 for i in range(prompt_length)]
    cached, plain = (
        list(generate(model, prompt, 100, Sampling(temperature, seed=5), decode))
        for decode in (decode_cached, decode_uncached)
    )
    assert len(cached) == 100 and cached == plain
    assert len(set(cached)) > 5, "a constant answer would prove nothing"


def test_greedy_decoding_is_the_argmax_of_the_whole_window():
    model, tokens = tiny_model(), [5, 80, 33]
    for token in generate(model, [5, 80, 33], 20, Sampling(temperature=0)):
        assert token == model(torch.tensor([tokens]))[0, -1].argmax()
        tokens.append(token)


def test_of_a_prompt_beyond_the_context_the_last_tokens_count():
    model, prompt = tiny_model(tie_embeddings=False), [(7 * i + 3) % 97 for i in range(80)]
    whole, end = (list(generate(model, text, 40, Sampling(temperature=0))) for text in (prompt, prompt[-32:]))
    assert whole == end


def test_a_context_of_one_token_still_generates():
    model = tiny_model(seq_len=1)
    assert len(list(generate(model, [3, 4], 5, Sampling(temperature=0)))) == 5


def test_the_stop_token_ends_the_text_unseen():
    model = tiny_model()
    text = list(generate(model, [5, 80, 33], 30, Sampling(temperature=0)))
    assert (
        list(generate(model, [5, 80, 33], 30, Sampling(temperature=0, stop_token=text[4])))
        == text[: text.index(text[4])]
    )


def test_a_seed_repeats_a_text_and_another_seed_gives_another():
    model = tiny_model()
    torch.manual_seed(0)
    texts = [list(generate(model, [1], 20, Sampling(temperature=1.0, seed=seed))) for seed in (1, 2, 1)]
    assert texts[0] == texts[2] != texts[1]


def test_generation_leaves_the_global_random_state_alone_when_seeded():
    before = torch.get_rng_state()
    list(generate(tiny_model(), [1], 5, Sampling(temperature=1.0, seed=1)))
    model = tiny_model()
    torch.set_rng_state(before)
    list(generate(model, [1], 5, Sampling(temperature=1.0, seed=1)))
    assert torch.equal(torch.get_rng_state(), before)


PROBABILITIES = torch.tensor([0.15, 0.05, 0.4, 0.3, 0.1])  # by rank: 2, 3, 0, 4, 1


def drawn(**options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return sample(PROBABILITIES.log().repeat(20_000, 1), Sampling(**{"temperature": 1.0, **options}), generator)


@pytest.mark.parametrize(
    ("options", "support"),
    [
        ({"temperature": 0}, {2}),
        ({"top_k": 1}, {2}),
        ({"top_k": 3}, {2, 3, 0}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.0}, {2}),
        ({"top_p": 0.39}, {2}),
        ({"top_p": 0.41}, {2, 3}),  # the token that crosses the line belongs to the nucleus
        ({"top_p": 0.86}, {2, 3, 0, 4}),
        ({"top_p": 1.0}, {0, 1, 2, 3, 4}),
        ({"top_k": 3, "top_p": 0.8}, {2, 3}),  # of the three, renormalised: 0.47 + 0.35 > 0.8
        ({"top_k": 2, "top_p": 0.99}, {2, 3}),
        ({"min_p": 0.5}, {2, 3}),  # half of 0.4 or more
        ({"min_p": 0.3}, {2, 3, 0}),
        ({"min_p": 0.0}, {0, 1, 2, 3, 4}),
        ({"min_p": 1.0}, {2}),
    ],
)
def test_sampling_draws_from_exactly_these_tokens(options, support):
    assert set(drawn(**options).tolist()) == support


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_follows_the_probabilities(temperature):
    expected = PROBABILITIES ** (1 / temperature)
    shares = drawn(temperature=temperature).bincount(minlength=5) / 20_000
    torch.testing.assert_close(shares, expected / expected.sum(), atol=0.015, rtol=0)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-1.0, 1e-320, 1e-7, 1e7, 1e300, math.inf, math.nan]),
        ("repetition_penalty", [0.0, -1.0, 1e-300, 1e300, math.inf, math.nan]),
        ("top_k", [0, -1]),
        ("top_p", [-0.1, 1.1, math.nan]),
        ("min_p", [-0.1, 2.0, math.nan]),
        ("seed", [-1, 2**63]),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"{name} must be"):
            Sampling(**{name: value})


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1e6])
@pytest.mark.parametrize("penalty", [1e-6, 1e6])
def test_the_outermost_settings_still_draw_tokens(temperature, penalty):
    """Of logits far larger than any model's."""
    logits = apply_repetition_penalty(1e15 * torch.tensor([[1.0, -1.0, 0.5]]), torch.tensor([[0, 1]]), penalty)
    assert sample(logits, Sampling(temperature)).item() in (0, 1, 2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_logits_that_are_not_finite_are_an_error_and_not_a_token(options, value):
    logits = torch.zeros(2, 5)
    logits[1, 3] = value
    with pytest.raises(ValueError, match="the model's logits are not finite"):
        sample(logits, Sampling(**options))


def test_sampling_takes_each_row_by_itself():
    logits = torch.full((3, 6), -9.0)
    for row, best in enumerate((4, 0, 2)):
        logits[row, best] = 9.0
    for k, p in itertools.product((None, 1, 3), (None, 0.5)):
        assert sample(logits, Sampling(0.7, k, p)).tolist() == [4, 0, 2]


def test_a_penalty_makes_what_was_said_less_likely_and_nothing_else():
    logits = torch.tensor([[2.0, -2.0, 4.0, -4.0]])
    assert apply_repetition_penalty(logits, torch.tensor([[0, 1, 0]]), 2.0).tolist() == [[1.0, -4.0, 4.0, -4.0]]
    model = tiny_model()
    plain, varied = (list(generate(model, [5], 40, Sampling(temperature=0, repetition_penalty=p))) for p in (1.0, 1e6))
    assert plain == list(generate(model, [5], 40, Sampling(temperature=0)))
    assert len(set(varied[:30])) > len(set(plain[:30]))


def test_a_batch_of_prompts_gives_what_each_prompt_gives_alone():
    model = tiny_model(n_kv_heads=2)
    prompts = [[5, 80, 33], [7], [1, 2, 3, 4, 5, 6, 7, 8]]
    together = zip(*generate_batch(model, prompts, 12, Sampling(temperature=0)))
    for prompt, tokens in zip(prompts, together, strict=True):
        assert list(tokens) == list(generate(model, prompt, 12, Sampling(temperature=0)))


def test_a_batch_that_exceeds_the_context_is_refused():
    with pytest.raises(ValueError, match=r"3 \+ 30 tokens exceed the context of 32"):
        next(generate_batch(tiny_model(), [[1, 2, 3]], 30))
