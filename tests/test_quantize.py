"""quantize.py: faster, and the same text."""

import copy

import pytest
import torch
from conftest import tiny_model
from torch import Tensor

from model import KVCache, Transformer
from nano416 import cpu_ops, quantize
from nano416.cpu_ops import Int8PackedLinear, PackedLinear
from nano416.generate import Sampling, decode_uncached, generate, next_logits
from nano416.quantize import CompiledDecoder, Int8Linear, quantize_, quantize_int8

GREEDY = Sampling(temperature=0)
LOOP = [5, 80, 33, 7, 9, 11] * 3

needs_bf16 = pytest.mark.skipif(
    not PackedLinear.is_supported(torch.bfloat16), reason="this CPU has no bf16 instructions"
)
needs_fbgemm = pytest.mark.skipif(not Int8PackedLinear.is_supported(), reason="this CPU has no int8 kernel")


def grouped_query_model() -> Transformer:
    return tiny_model(n_kv_heads=2, tie_embeddings=False)


def converted(model: Transformer, dtype: str) -> Transformer:
    return quantize_(copy.deepcopy(model), dtype)


def linear_layers(model: Transformer) -> set[type]:
    return {type(module) for module in model.modules() if "Linear" in type(module).__name__}


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without fast kernels, so that models get the layers that a GPU has."""
    monkeypatch.setattr(Int8PackedLinear, "is_supported", lambda: False)
    monkeypatch.setattr(PackedLinear, "is_supported", lambda dtype: False)


# ---- The compiled decoder --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [GREEDY, Sampling(temperature=1.0, seed=5), Sampling(temperature=1.0, seed=5, repetition_penalty=1.2)],
    ids=["greedy", "sampled", "penalized"],
)
@pytest.mark.parametrize("prompt", [[3], LOOP, LOOP * 4], ids=len)
def test_all_decoders_give_the_same_text_far_past_the_context(prompt: list[int], sampling: Sampling) -> None:
    model = grouped_query_model()
    expected = list(generate(model, prompt, 80, sampling))
    assert expected == list(generate(model, prompt, 80, sampling, decode_uncached))
    decoder = CompiledDecoder(model)
    for _ in range(2):  # the second time with a used cache
        assert expected == list(generate(model, prompt, 80, sampling, decoder.decode))


def test_the_decoder_always_works_on_the_same_memory() -> None:
    model = grouped_query_model()
    decoder = CompiledDecoder(model)
    before = [tensor.data_ptr() for tensor in decoder.buffers()]
    list(generate(model, LOOP, 50, GREEDY, decoder.decode))
    assert [tensor.data_ptr() for tensor in decoder.buffers()] == before


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_a_decoding_step_is_one_graph_at_every_position(dtype: str, without_kernels: None) -> None:
    """As a CUDA graph needs it, with a GPU's layers: nothing falls back to Python, nothing is compiled twice."""
    model = converted(grouped_query_model(), dtype)
    decoder = CompiledDecoder(model)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    decoder.compile(backend=backend, fullgraph=True)
    text = list(generate(model, [3, 5], 80, GREEDY, decoder.decode))
    assert text == list(generate(model, [3, 5], 80, GREEDY))
    assert len(graphs) == 1


@pytest.mark.slow
def test_an_int8_layer_compiles_for_bf16_activations() -> None:
    """torch's compiler fails on a scale that is cast inside the layer."""
    layer = Int8Linear(*quantize_int8(torch.randn(64, 32))).to(torch.bfloat16)
    x = torch.randn(1, 32, dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = layer(x)
        layer.compile(fullgraph=True)
        torch.testing.assert_close(layer(x), expected, atol=0.1, rtol=0.02)


# ---- Weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_converted_weights_give_nearly_the_same_logits(dtype: str, tied: bool, tokens: Tensor) -> None:
    model = tiny_model(scale=3.0, tie_embeddings=tied, dim=64, ffn_dim=128)
    model_2 = converted(model, dtype)
    with torch.inference_mode():
        expected = model(tokens)[..., :97]
        logits = model_2(tokens).float()
    assert (logits[..., 97:] == -torch.inf).all()
    error = (logits[..., :97] - expected).norm() / expected.norm()
    assert error <= {"fp32": 0, "bf16": 0.03, "int8": 0.03}[dtype]
    assert len(list(generate(model_2, [1, 2, 3], 40, Sampling()))) == 40


@needs_bf16
@needs_fbgemm
def test_a_cpu_gets_the_layers_that_its_processor_is_fast_with() -> None:
    model = tiny_model()
    assert linear_layers(converted(model, "fp32")) == {PackedLinear}
    assert linear_layers(converted(model, "bf16")) == {PackedLinear}
    assert linear_layers(converted(model, "int8")) == {Int8PackedLinear}


def test_without_such_kernels_layers_are_plain(without_kernels: None) -> None:
    model = tiny_model()
    assert linear_layers(converted(model, "bf16")) == {torch.nn.Linear}
    assert linear_layers(converted(model, "int8")) == {Int8Linear}


@pytest.mark.parametrize("layer", [Int8Linear, pytest.param(Int8PackedLinear, marks=needs_fbgemm)])
def test_an_int8_layer_multiplies_by_the_rounded_matrix(layer: type) -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 64) * torch.rand(96, 1)
    x = torch.randn(3, 5, 64)
    bias = torch.randn(96)
    rounded, scale = quantize_int8(weight)
    assert (rounded * scale[:, None] - weight).abs().max() <= scale.max() / 2 * 1.001
    expected = x @ (rounded * scale[:, None]).T + bias
    error = (layer(rounded, scale, bias)(x) - expected).abs().max() / expected.abs().max()
    assert error < (1e-5 if layer is Int8Linear else 0.02)


@needs_bf16
def test_a_packed_layer_multiplies_by_its_matrix() -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 64, dtype=torch.bfloat16)
    x = torch.randn(3, 5, 64, dtype=torch.bfloat16)
    bias = torch.randn(96)
    expected = x.float() @ weight.float().T + bias
    torch.testing.assert_close(PackedLinear(weight, bias)(x).float(), expected, atol=0.1, rtol=0.02)


@needs_fbgemm
def test_the_int8_result_of_a_token_does_not_depend_on_its_neighbours() -> None:
    layer = Int8PackedLinear(*quantize_int8(torch.randn(96, 64)))
    x = torch.randn(9, 64)
    x[3] *= 1000
    assert torch.equal(layer(x), torch.cat([layer(row) for row in x.split(1)]))


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-4), ("int8", 1e-1)])
def test_logits_with_a_cache_equal_those_without(dtype: str, tolerance: float, tokens: Tensor) -> None:
    model = converted(tiny_model(), dtype)
    text = tokens[0].tolist()
    cache = KVCache(32)
    end = 0
    for n in (5, 1, 10):
        cached = next_logits(model, text[end : end + n], cache)
        end += n
        uncached = next_logits(model, text[:end])
        torch.testing.assert_close(cached[:, :97], uncached[:, :97], atol=tolerance, rtol=1e-2)


@pytest.mark.parametrize("tied", [True, False])
def test_a_token_reads_every_weight_except_a_separate_embedding(tied: bool) -> None:
    model = tiny_model(tie_embeddings=tied)
    blocks = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and "lm_head" not in name)
    assert quantize.bytes_per_token(model, "bf16") == 2 * (blocks + 97 * 32)


def test_the_fastest_number_of_threads_is_at_most_the_number_before() -> None:
    model = tiny_model()
    torch.set_num_threads(2)
    try:
        n_threads = cpu_ops.choose_threads(lambda: next_logits(model, [0]))
        assert n_threads == torch.get_num_threads()
        assert n_threads in (1, 2)
    finally:
        torch.set_num_threads(1)
