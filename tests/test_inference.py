"""inference.py and the ways of `generate`: faster, and the same text."""

import copy

import pytest
import torch
from conftest import tiny_model

import inference
from inference import Int8Linear, Int8PackedLinear, PackedLinear, Step, prepare
from model import KVCache, Transformer, generate, generate_batch, look_up, next_logits

LOOP = [5, 80, 33, 7, 9, 11] * 3


def shape(**changes) -> Transformer:
    return tiny_model(n_kv_heads=2, tie_embeddings=False, **changes)


# ---- Guessing ahead --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"temperature": 1.0}, {"temperature": 1, "repetition_penalty": 1.2}]
)
@pytest.mark.parametrize("prompt", [[3], LOOP, LOOP * 4])
def test_guessing_ahead_gives_the_same_text_far_past_the_context(prompt, options):
    for model in (shape(), tiny_model()):
        plain, guessed = (list(generate(model, prompt, 100, **options, seed=5, lookup=n)) for n in (0, 7))
        assert plain == guessed and len(plain) == 100


def test_a_text_that_repeats_itself_takes_fewer_passes(monkeypatch):
    model, passes = tiny_model(seq_len=256), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda *a, **k: passes.append(a[0].shape[1]) or hidden(*a, **k))
    text = list(generate(model, LOOP, 100, temperature=0))
    n_plain = len(passes)
    assert (n_plain, passes[0], set(passes[1:])) == (100, len(LOOP), {1})
    passes.clear()
    assert list(generate(model, LOOP, 100, temperature=0, lookup=8)) == text
    assert len(set(text[-20:])) < 8, "this model loops, or the test would prove nothing"
    assert len(passes) < 40


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_guessed_tokens_have_the_logits_of_one_token_after_another_to_the_last_bit(dtype):
    """In bf16 two tokens often tie: without this, guessing changed 3 of 30 texts of a 10M-parameter model."""
    model = prepared(
        shape(dim=64, ffn_dim=4096, seq_len=128), dtype
    )  # long sums, which are cut differently for one row
    tokens = torch.randint(0, 97, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    alone, together = KVCache(128), KVCache(128)
    expected = [next_logits(model, part, alone) for part in (tokens[:60], *([t] for t in tokens[60:]))]
    sizes, at = [60, 9, 1, 2, 16, 3, 9], 0
    found = []
    for n in sizes:
        found.append(next_logits(model, tokens[at : at + n], together, last=1 if at == 0 else n))
        at += n
    assert torch.equal(torch.cat(found), torch.cat(expected))


@pytest.mark.parametrize(
    ("window", "match", "length", "found"),
    [
        ([1, 2, 3, 4, 1, 2], 2, 3, [3, 4, 1]),
        ([1, 2, 3, 1, 2, 4, 1, 2], 2, 4, [4, 1, 2, 4]),  # the last one counts
        ([1, 2, 3, 4, 1, 2], 3, 3, []),
        ([7, 7, 7, 7], 2, 5, [7, 7, 7, 7, 7]),
        ([1, 2, 1, 2], 2, 0, []),
        ([1], 2, 5, []),
    ],
)
def test_what_followed_before_is_the_guess(window, match, length, found):
    assert look_up(window, match, length) == found


# ---- Many at once ----------------------------------------------------------------------------------------------------


def test_a_batch_writes_what_each_prompt_alone_would():
    model, prompts = shape(seq_len=64), [[3], LOOP, [9, 8, 7, 6]]
    together = list(zip(*generate_batch(model, prompts, 30, temperature=0), strict=True))
    assert together == [tuple(generate(model, prompt, 30, temperature=0)) for prompt in prompts]
    with pytest.raises(ValueError, match=r"18 \+ 47 tokens exceed the context of 64"):
        next(generate_batch(model, prompts, 47))


# ---- One step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("prompt", [[3], LOOP, LOOP * 4])
def test_a_step_at_a_time_gives_the_same_text_far_past_the_context(prompt, temperature):
    model = shape()
    step = Step(model)
    for _ in range(2):  # the second time through a cache that was used
        stepped = list(generate(model, prompt, 80, temperature=temperature, seed=5, step=step))
        assert stepped == list(generate(model, prompt, 80, temperature=temperature, seed=5))
    assert list(generate(model, prompt, 3, temperature=0, step=step, stop_token=stepped[0])) != stepped[:3]


def test_a_step_always_works_on_the_same_memory():
    model = shape()
    step = Step(model)
    step.prefill(LOOP)
    before = [tensor.data_ptr() for pair in step.cache.entries.values() for tensor in pair]
    list(generate(model, LOOP, 50, step=step))
    assert [tensor.data_ptr() for pair in step.cache.entries.values() for tensor in pair] == before


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_a_step_is_one_graph_at_every_position(dtype, monkeypatch):
    """As for a GPU's CUDA graph, with its layers: nothing falls back to Python, nothing is compiled twice."""
    monkeypatch.setattr(inference, "INT8_MATMUL", None)
    monkeypatch.setattr(inference, "can_pack", lambda dtype: False)
    model, graphs = prepared(shape(), dtype), []
    step = Step(model)
    torch._dynamo.reset()
    step.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward, fullgraph=True)
    text = list(generate(model, [3, 5], 80, temperature=0, step=step))
    assert text == list(generate(model, [3, 5], 80, temperature=0)) and len(graphs) == 1


# ---- Weights ---------------------------------------------------------------------------------------------------------


def prepared(model: Transformer, dtype: str) -> Transformer:
    return prepare(copy.deepcopy(model), dtype)


def linears(model: Transformer) -> set[type]:
    return {type(m) for m in model.modules() if "Linear" in type(m).__name__}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_prepared_weights_say_nearly_the_same(dtype, tied, tokens):
    model = tiny_model(scale=3.0, tie_embeddings=tied, dim=64, ffn_dim=128)
    ready = prepared(model, dtype)
    with torch.inference_mode():
        expected, found = model(tokens)[..., :97], ready(tokens).float()
    assert (found[..., 97:] == -torch.inf).all() and not any(isinstance(m, torch.nn.Linear) for m in ready.modules())
    error = (found[..., :97] - expected).norm() / expected.norm()
    assert error < {"fp32": 1e-5, "bf16": 0.03, "int8": 0.03}[dtype]
    assert len(list(generate(ready, [1, 2, 3], 40, lookup=4))) == 40


def test_a_cpu_gets_the_layers_that_it_is_fast_with(monkeypatch):
    model = tiny_model()
    assert linears(prepared(model, "fp32")) == {PackedLinear}
    assert linears(prepared(model, "int8")) == {Int8PackedLinear}
    monkeypatch.setattr(inference, "INT8_MATMUL", None)
    monkeypatch.setattr(inference, "can_pack", lambda dtype: False)
    assert linears(prepared(model, "fp32")) == {torch.nn.Linear} == linears(prepared(model, "bf16"))
    assert linears(prepared(model, "int8")) == {Int8Linear}


@pytest.mark.parametrize("kind", [Int8Linear, Int8PackedLinear])
def test_int8_is_the_rounded_matrix(kind, monkeypatch):
    torch.manual_seed(0)
    weight, x, bias = torch.randn(96, 64) * torch.rand(96, 1), torch.randn(3, 5, 64), torch.randn(96)
    rounded, scale = inference.to_int8(weight)
    assert (rounded.float() * scale[:, None] - weight).abs().max() <= scale.max() / 2 * 1.001
    expected = x @ (rounded.float() * scale[:, None]).T + bias
    error = (kind(weight, bias)(x) - expected).abs().max() / expected.abs().max()
    assert error < (1e-5 if kind is Int8Linear else 0.02)


def test_in_int8_a_token_does_not_depend_on_its_neighbours():
    layer, x = Int8PackedLinear(torch.randn(96, 64)), torch.randn(9, 64)
    x[3] *= 1000
    assert torch.equal(layer(x), torch.cat([layer(row) for row in x.split(1)]))


def test_the_cache_of_a_prepared_model_equals_none(tokens):
    for dtype in ("fp32", "int8"):
        model, cache = prepared(tiny_model(), dtype), KVCache(32)
        rows = [next_logits(model, part.tolist(), cache, last=len(part)) for part in tokens[0].split([5, 1, 10])]
        whole = next_logits(model, tokens[0].tolist(), last=16)
        torch.testing.assert_close(
            torch.cat(rows)[:, :97], whole[:, :97], atol=1e-1 if dtype == "int8" else 1e-4, rtol=1e-2
        )


def test_the_bytes_of_a_token_are_the_weights_it_reads():
    for tied in (True, False):
        model = tiny_model(tie_embeddings=tied)
        read = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and "lm_head" not in name)
        assert inference.bytes_per_token(model, "bf16") == 2 * (read + 97 * 32)


def test_threads_are_chosen_and_no_more_than_there_were():
    torch.set_num_threads(2)
    assert inference.choose_threads(tiny_model()) == torch.get_num_threads() in (1, 2)
    torch.set_num_threads(1)
