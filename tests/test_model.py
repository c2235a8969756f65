"""model.py: the network equals Hugging Face's, the cache changes nothing, the padding is never seen."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config, tiny_model

from model import IGNORE_INDEX, MAX_SIZES, KVCache, ModelConfig, Transformer
from nano416 import cpu_ops
from nano416.generate import Sampling, sample


def on_meta(**shape) -> Transformer:
    with torch.device("meta"):
        return Transformer(ModelConfig(**shape))


# ---- Size ------------------------------------------------------------------------------------------------------------


def test_the_default_shape_has_the_416417792_parameters_of_the_original_recipe_and_the_gains_of_qk_norm():
    assert ModelConfig(vocab_size=50257, qk_norm=False).num_params() == 416_417_792
    assert ModelConfig(vocab_size=50257).num_params() == 416_417_792 + 24 * 2 * 64


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_parameters_and_flops_follow_the_formulas(tied, qk_norm):
    D, L, N, K, H, ffn, V, T = 64, 3, 4, 2, 24, 96, 300, 128
    model = on_meta(dim=D, n_layers=L, n_heads=N, n_kv_heads=K, head_dim=H, ffn_dim=ffn, vocab_size=V, seq_len=T,
                    tie_embeddings=tied, qk_norm=qk_norm)  # fmt: skip
    matmuls = L * (D * N * H + 2 * D * K * H + N * H * D + 3 * D * ffn) + V * D
    gains = L * (2 * D + 2 * H * qk_norm) + D
    assert model.config.num_params() == matmuls + gains + (not tied) * V * D
    assert model.config.flops_per_token() == 6 * (matmuls + gains) + 12 * L * N * H * T
    tables = 1 if tied else 2
    padding = tables * (model.embed_tokens.num_embeddings - V) * D
    assert sum(p.numel() for p in model.parameters()) == model.config.num_params() + padding


def test_the_default_shape_costs_2_8_gflop_per_token():
    assert ModelConfig(vocab_size=50257, qk_norm=False).flops_per_token() == 6 * 416_417_792 + 12 * 24 * 16 * 64 * 1024


def test_layers_that_write_to_the_residual_stream_start_smaller():
    model = tiny_model(scale=1.0, dim=128, ffn_dim=256, n_layers=8)
    std = {name: p.std().item() for name, p in model.named_parameters() if p.dim() == 2}
    for name, value in std.items():
        expected = 0.02 / math.sqrt(16) if "o_proj" in name or "down_proj" in name else 0.02
        assert value == pytest.approx(expected, rel=0.05), name


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"dim": 30}, r"dim \(30\) must be a multiple of n_heads \(4\)"),
        ({"n_kv_heads": 3}, r"n_heads \(4\) must be a multiple of n_kv_heads \(3\)"),
        ({"n_kv_heads": 0}, "n_kv_heads"),
        ({"dim": 12}, "head_dim must be even.*got 3"),
        ({"head_dim": 0}, "head_dim must be even.*got 0"),
        ({"ffn_dim": 0}, "ffn_dim must be at least 1"),
        ({"n_layers": 0}, "n_layers must be at least 1"),
        ({"n_heads": 0}, "n_heads must be at least 1"),
        ({"seq_len": -1}, "seq_len must be at least 1, got -1"),
        ({"vocab_size": 1}, "vocab_size must be at least 2"),
        *(({size: 10**9}, f"{size} must be at most .*, got 1,000,000,000") for size in MAX_SIZES),
        ({"rope_theta": 0.0}, "rope_theta must be above 1"),
    ],
)
def test_an_impossible_shape_is_refused_by_name(changes, hint):
    with pytest.raises(ValueError, match=hint):
        tiny_config(**changes)


# ---- Equal to Hugging Face's -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_logits_equal_transformers(qk_norm, n_kv_heads, tied, tokens):
    transformers = pytest.importorskip("transformers")
    model = tiny_model(qk_norm=qk_norm, n_kv_heads=n_kv_heads, tie_embeddings=tied, rope_theta=500.0)
    kind = "Qwen3" if qk_norm else "Llama"
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=n_kv_heads, head_dim=8,
        intermediate_size=48, vocab_size=128, max_position_embeddings=32, rms_norm_eps=1e-6, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    weights = {k if k.startswith("lm_head") else f"model.{k}": v for k, v in model.state_dict().items()}
    left_out, unknown = theirs.load_state_dict(weights, strict=False)
    assert (left_out, unknown) == (["lm_head.weight"] if tied else [], [])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[..., :97], theirs(tokens).logits[..., :97], atol=1e-4, rtol=1e-4)


def test_grouped_heads_equal_full_heads_with_repeated_weights(tokens):
    grouped, full = tiny_model(n_kv_heads=2), tiny_model()
    weights = grouped.state_dict()
    for name in weights:
        if "k_proj" in name or "v_proj" in name:
            weights[name] = weights[name].view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)
    full.load_state_dict(weights)
    torch.testing.assert_close(grouped(tokens), full(tokens))


# ---- Who sees whom ---------------------------------------------------------------------------------------------------


def test_a_later_token_never_changes_an_earlier_logit(tokens):
    model, changed = tiny_model(), tokens.clone()
    changed[:, 9] = (tokens[:, 9] + 1) % 97
    before, after = model(tokens)[..., :97], model(changed)[..., :97]
    torch.testing.assert_close(before[:, :9], after[:, :9], atol=1e-6, rtol=1e-6)
    assert all((before[:, t] - after[:, t]).abs().max() > 1e-3 for t in range(9, 16))


def test_without_causal_every_token_sees_every_token(tokens):
    model = tiny_model(causal=False)
    embedded = model.embed_tokens(tokens).detach().requires_grad_()
    model.embed_tokens.forward = lambda _: embedded  # type: ignore[method-assign]
    for t in (0, 7, 15):
        (gradient,) = torch.autograd.grad(model(tokens)[0, t, :97].sum(), embedded)
        assert (gradient[0].abs().sum(-1) > 0).all() and (gradient[1] == 0).all()


def test_only_the_distance_of_positions_matters(tokens):
    model = tiny_model()
    causal = torch.ones(16, 16, dtype=torch.bool).tril()
    at = torch.arange(16).expand(2, 16)
    torch.testing.assert_close(model.hidden(tokens, positions=at, mask=causal), model.hidden(tokens))
    shifted = model.hidden(tokens, positions=at + 13, mask=causal)
    torch.testing.assert_close(shifted, model.hidden(tokens), atol=1e-4, rtol=1e-4)
    assert (model.hidden(tokens, positions=at * 2, mask=causal) - shifted).abs().max() > 1e-2


def test_sequences_packed_in_one_row_equal_separate_forwards():
    model, parts = tiny_model(n_kv_heads=2), [torch.randint(0, 97, (1, n)) for n in (5, 12, 3, 16)]
    of = torch.cat([torch.full((p.shape[1],), i) for i, p in enumerate(parts)])  # 36 tokens, more than seq_len
    mask = (of[:, None] == of[None, :]).tril()
    positions = torch.cat([torch.arange(p.shape[1]) for p in parts])[None]
    packed = model.hidden(torch.cat(parts, dim=1), positions=positions, mask=mask)
    separate = torch.cat([model.hidden(p) for p in parts], dim=1)
    torch.testing.assert_close(packed, separate, atol=1e-5, rtol=1e-4)


def test_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match="33 tokens exceed the context of 32"):
        tiny_model()(torch.zeros(1, 33, dtype=torch.long))
    model, cache = tiny_model(), KVCache(32)
    model(torch.zeros(1, 30, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="33 tokens exceed the context of 32"):
        model(torch.zeros(1, 3, dtype=torch.long), cache=cache)


# ---- Loss and padding ------------------------------------------------------------------------------------------------


def by_hand(model: Transformer, tokens, targets) -> torch.Tensor:
    """-log softmax over the real vocabulary at each target, [B, T]."""
    logits = model(tokens)[..., :97].double()
    return logits.exp().sum(-1).log() - logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]


def test_the_loss_is_the_cross_entropy_of_the_targets(tokens):
    model, inputs, targets = tiny_model(), tokens[:, :-1], tokens[:, 1:]
    losses = by_hand(model, inputs, targets)
    for reduction, expected in (("mean", losses.mean()), ("sum", losses.sum()), ("none", losses)):
        loss = model(inputs, targets, reduction=reduction)
        torch.testing.assert_close(loss.double(), expected, atol=1e-4, rtol=1e-5)


def test_ignored_targets_carry_no_loss_and_are_not_counted(tokens):
    model, inputs, targets = tiny_model(), tokens[:, :-1], tokens[:, 1:].clone()
    targets[0, 3], targets[1, :7] = IGNORE_INDEX, IGNORE_INDEX
    losses = by_hand(model, inputs, targets)[targets >= 0]
    torch.testing.assert_close(model(inputs, targets).double(), losses.mean(), atol=1e-4, rtol=1e-5)
    none = model(inputs, targets, reduction="none")
    assert none.shape == targets.shape and (none[targets < 0] == 0).all()


def test_loss_weights_multiply_and_the_mean_divides_by_all(tokens):
    model, inputs, targets = tiny_model(), tokens[:, :-1], tokens[:, 1:].clone()
    targets[0, 3] = IGNORE_INDEX
    weights = torch.rand(2, 15)
    losses = model(inputs, targets, reduction="none") * weights
    torch.testing.assert_close(model(inputs, targets, loss_weights=weights, reduction="none"), losses)
    torch.testing.assert_close(model(inputs, targets, loss_weights=weights, reduction="sum"), losses.sum())
    torch.testing.assert_close(model(inputs, targets, loss_weights=weights), losses.sum() / 30)


@pytest.mark.parametrize("tied", [True, False])
def test_padded_tokens_are_never_seen(tied, tokens):
    model = tiny_model(tie_embeddings=tied)
    head = model.embed_tokens if model.lm_head is None else model.lm_head
    with torch.no_grad():
        head.weight[97:] = 100 * model.hidden(tokens)[0, -1]  # what would win by far
    logits = model(tokens)
    assert logits.shape[-1] == 128 and (logits[..., 97:] == -math.inf).all()
    torch.testing.assert_close(logits[..., :97], F.linear(model.hidden(tokens), head.weight[:97]))
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    assert head.weight.grad is not None and head.weight.grad.isfinite().all()
    assert (head.weight.grad[97:] == 0).all() and (head.weight.grad[:97] != 0).any()
    for temperature, top_k, top_p in ((0, None, None), (5.0, None, None), (5.0, 128, None), (5.0, 110, 0.9999)):
        drawn = sample(logits.flatten(0, 1).repeat(20, 1), Sampling(temperature, top_k, top_p))
        assert drawn.max() < 97


def test_a_vocabulary_that_is_a_multiple_of_128_is_not_padded():
    model = tiny_model(vocab_size=256)
    assert model.embed_tokens.num_embeddings == 256 and model.padding_bias is None


# ---- Decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("chunks", [(16,), (1,) * 16, (3, 1, 5, 7), (15, 1), (1, 15), (2, 9, 5)])
def test_cached_equals_uncached_in_any_chunks(chunks, n_kv_heads, tokens):
    model, cache = tiny_model(n_kv_heads=n_kv_heads, qk_norm=True), KVCache(32)
    parts = [model(part, cache=cache) for part in tokens.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1)[..., :97], model(tokens)[..., :97], atol=1e-4, rtol=1e-4)


def test_the_cache_takes_the_dtype_of_the_model(tokens):
    model, cache = tiny_model().to(torch.bfloat16), KVCache(32)
    model(tokens, cache=cache)
    assert cache.entries[0][0].dtype == torch.bfloat16


# ---- The loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_the_loss_in_chunks_is_the_loss_of_all_logits(dtype, z_loss, tokens, monkeypatch):
    """Neither eager training nor a CPU ever holds all logits; a GPU's compiler fuses them. Same loss, same gradients."""
    monkeypatch.setattr(cpu_ops, "CHUNK_ELEMENTS", 64 * 128)
    monkeypatch.setattr(cpu_ops, "BLOCK_ELEMENTS", 24 * 128)
    inputs = tokens[:, :-1].repeat(7, 1)  # 210 rows in chunks of 64 and blocks of 24
    targets = tokens[:, 1:].repeat(7, 1).clone()
    targets[0, 3] = IGNORE_INDEX
    weights = torch.rand(targets.shape, generator=torch.Generator().manual_seed(0))
    values = []
    for reduce in ("in chunks", "all logits"):
        model = tiny_model()
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            if reduce == "in chunks":
                loss = model(inputs, targets, z_loss=z_loss)
                loss = loss + model(inputs, targets, loss_weights=weights, reduction="sum")
            else:
                loss = model(inputs, targets, z_loss=z_loss, reduction="none").sum() / (targets != IGNORE_INDEX).sum()
                loss = loss + model(inputs, targets, loss_weights=weights, reduction="none").sum()
        (loss / 3).backward()
        values.append([loss.detach(), *(p.grad for p in model.parameters())])
    if dtype == torch.float32:
        torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*values, rtol=0.05, atol=0.05)


def test_z_loss_bends_the_gradient_and_not_the_value(tokens):
    model, inputs, targets = tiny_model(), tokens[:, :-1], tokens[:, 1:]
    plain, bent = model(inputs, targets), model(inputs, targets, z_loss=0.1)
    assert plain.item() == bent.item()
    weight = model.embed_tokens.weight
    difference = torch.autograd.grad(bent, weight)[0] - torch.autograd.grad(plain, weight, retain_graph=True)[0]
    z = 0.1 * model(inputs).logsumexp(-1).square().mean()
    torch.testing.assert_close(difference, torch.autograd.grad(z, weight)[0], atol=1e-6, rtol=1e-4)


def test_an_eager_step_never_holds_all_logits(monkeypatch):
    """The largest tensor made on the way to the gradients is a chunk, not the [rows, vocabulary] of all logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.size = max(self.size, out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    monkeypatch.setattr(cpu_ops, "CHUNK_ELEMENTS", 64 * 128)
    model, tokens = tiny_model(), torch.randint(0, 97, (40, 16))
    with Largest() as seen:
        model(tokens, tokens).backward()
    rows = tokens.numel()
    assert 64 * 128 <= seen.size < rows * 128 // 2


def test_the_graph_of_a_loss_may_be_walked_twice(tokens):
    model = tiny_model()
    loss = model(tokens[:, :-1], tokens[:, 1:])
    table = model.embed_tokens.weight
    once, again = (torch.autograd.grad(3 * loss, table, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(once, again, rtol=0, atol=0)
