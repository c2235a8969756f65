"""optimizers.py: the learning rate is a written list of numbers, AdamW is ten lines, only matrices decay."""

import copy
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from conftest import ROOT, tiny_model
from torch import Tensor

from config import parse_config
from optimizers import (
    MAX_LR,
    OPTIMIZERS,
    SCHEDULES,
    Average,
    OptimConfig,
    Statistics,
    apply,
    build_optimizer,
    clip_gradients,
    lr_at,
    orthogonalize,
    set_lr,
    swapped_in,
)
from training import Config


def schedule(name: str, steps: int = 10, **changes) -> list[float]:
    fixed = {"max_lr": 1.0, "min_lr": 0.0 if name == "constant" else 0.1, "warmup_frac": 0.2}
    cfg = OptimConfig(**{"schedule": name, **fixed, **changes})  # type: ignore[arg-type]
    return [lr_at(step, steps, cfg) for step in range(steps)]


# Two steps of warm-up, the peak at step 2, the end at step 9.
LISTS = {
    "cosine": [0.5, 1.0, 1.0, 0.9554360, 0.8305704, 0.6501344, 0.4498656, 0.2694296, 0.1445640, 0.1],
    "linear": [0.5, 1.0, 1.0, 0.8714286, 0.7428571, 0.6142857, 0.4857143, 0.3571429, 0.2285714, 0.1],
    "wsd": [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.7428571, 0.1],
    "constant": [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
    "inv_sqrt": [0.5, 1.0, 1.0, 0.8179516, 0.7148170, 0.6462793, 0.5965096, 0.5582576, 0.5276719, 0.5024922],
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_learning_rate_is_this_list(name):
    assert schedule(name) == pytest.approx(LISTS[name], abs=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_starts_at_the_peak_and_never_rises_without_warmup(name):
    rates = schedule(name, steps=100, warmup_frac=0.0)
    assert rates[0] == 1.0 and all(a >= b for a, b in itertools.pairwise(rates))
    assert schedule(name, steps=1, warmup_frac=0.0) == [1.0]


def test_the_seeds_run_warms_up_for_305_steps_and_ends_at_a_tenth():
    cfg = parse_config(Config, [str(ROOT / "configs" / "416m_seed.toml")]).optim
    assert lr_at(0, 15_258, cfg) == pytest.approx(3e-4 / 305)
    assert lr_at(304, 15_258, cfg) == lr_at(305, 15_258, cfg) == 3e-4
    assert lr_at(15_257, 15_258, cfg) == pytest.approx(3e-5)
    assert lr_at(305 + (15_257 - 305) // 2, 15_258, cfg) == pytest.approx((3e-4 + 3e-5) / 2)


def test_past_the_end_the_learning_rate_stays():
    cfg = OptimConfig(max_lr=1e-3, min_lr=1e-5)
    assert lr_at(500, 100, cfg) == lr_at(99, 100, cfg) == pytest.approx(1e-5)


def test_each_optimizer_has_a_learning_rate_of_its_own_unless_one_is_given():
    assert MAX_LR.keys() == OPTIMIZERS.keys()
    assert OptimConfig().peak_lr == 3e-3 and OptimConfig(optimizer="adamw").peak_lr == 3e-4
    assert OptimConfig(optimizer="adamw", max_lr=1e-2).peak_lr == 1e-2


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"max_lr": 0.0}, "max_lr must be above 0, got 0.0"),
        ({"min_lr": 1e-2}, r"min_lr must be between 0 and max_lr \(0.003\), got 0.01"),
        ({"warmup_frac": 1.0}, r"warmup_frac must be in \[0, 1\), got 1.0"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative"),
        ({"beta1": 1.0}, "beta1"),
        ({"beta2": -1.0}, "beta2"),
        ({"eps": 0.0}, "eps must be above 0"),
        ({"grad_clip": 0.0}, r"grad_clip must be above 0 \(none = no clipping\), got 0.0"),
    ],
)
def test_an_impossible_setting_is_refused_by_name(changes, hint):
    with pytest.raises(ValueError, match=hint):
        OptimConfig(**changes)


def test_matrices_decay_and_gains_do_not():
    model = tiny_model(qk_norm=True, tie_embeddings=False)
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.3))
    name_of = {id(p): name for name, p in model.named_parameters()}
    decay = {name_of[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay.keys() == set(name_of.values()), "every parameter is in exactly one group"
    gains = {name for name in decay if name.endswith(("layernorm.weight", "norm.weight"))}
    assert len(gains) == 2 * 4 + 1
    assert {name for name, value in decay.items() if value == 0} == gains
    assert {value for name, value in decay.items() if name not in gains} == {0.3}


def test_tied_weights_are_updated_once():
    model = tiny_model()
    optimizer = build_optimizer(model, OptimConfig())
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == sum(
        p.numel() for p in model.parameters()
    )


def quadratic(cfg: OptimConfig, steps: int = 3, *shared_out: Callable):
    """A model after some steps on fixed random gradients, and its optimizer."""
    model = tiny_model()
    optimizer = build_optimizer(model, cfg, *shared_out)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        apply(optimizer, torch.tensor(0.0))
    return model, optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_changes_neither_weights_nor_state(name):
    cfg = OptimConfig(optimizer=name, max_lr=1e-2, weight_decay=0.1)
    model, optimizer = quadratic(cfg)
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"]])
    for p in model.parameters():
        p.grad = torch.full_like(p, math.nan)
    apply(optimizer, torch.tensor(1.0))
    torch.testing.assert_close([model.state_dict(), optimizer.state_dict()["state"]], before, rtol=0, atol=0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    apply(optimizer, torch.tensor(0.0))
    assert all((p != before[0][key]).any() for key, p in model.named_parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns(name, tokens):
    rates = {"sgd": 0.5, "lion": 1e-3, "rmsprop": 1e-3}
    model = tiny_model()
    optimizer = build_optimizer(model, OptimConfig(optimizer=name, max_lr=rates.get(name, 1e-2), min_lr=0))
    losses = []
    for _ in range(30):
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        apply(optimizer, torch.tensor(0.0))
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 40), (2, 40, 16)])
def test_muons_direction_is_the_orthogonal_factor_of_the_svd(shape):
    matrices = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    ours = orthogonalize(matrices)
    values = torch.linalg.svdvals(ours)
    assert values.min() > 0.6 and values.max() < 1.25, "five steps leave singular values around one"
    torch.testing.assert_close(u.mT @ ours @ vh.mT, torch.diag_embed(values.new_ones(values.shape)), atol=0.4, rtol=0)
    off = u.mT @ ours @ vh.mT * (1 - torch.eye(16))
    assert off.abs().max() < 0.03, "same singular vectors, within bf16"


def three_steps(cfg: OptimConfig) -> tuple[Tensor, list[Tensor], Tensor]:
    """A matrix before three steps, its gradients in them, and the matrix after them."""
    model, optimizer = quadratic(cfg, 0)
    p, grads = model.get_parameter("layers.0.mlp.up_proj.weight"), []
    before = p.detach().clone()
    for seed in range(3):
        for q in model.parameters():
            q.grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(seed))
        grads.append(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
        apply(optimizer, torch.tensor(0.0))
    return before, grads, p.detach()


def test_muon_is_these_lines():
    weight, grads, after = three_steps(OptimConfig(optimizer="muon", max_lr=1e-2, weight_decay=0.3))
    momentum = torch.zeros_like(weight)
    for g in grads:
        momentum = 0.95 * momentum + 0.05 * g
        direction = orthogonalize((0.05 * g + 0.95 * momentum)[None])[0]
        weight = weight * (1 - 1e-2 * 0.3) - 1e-2 * 0.2 * max(g.shape) ** 0.5 * direction
    torch.testing.assert_close(after, weight, atol=2e-4, rtol=0)
    rms = (direction * 0.2 * max(weight.shape) ** 0.5).square().mean().sqrt()
    assert 0.15 < rms < 0.25, "an update as large as AdamW's"


def test_muon_shared_by_ranks_is_muon_alone():
    """Three ranks, each orthogonalising its share: the same directions as one that does them all."""

    def three_ranks(work, batch, like):
        shares = batch.tensor_split(3)
        return torch.cat([work(share) for share in shares if len(share)])

    alone, _ = quadratic(OptimConfig(optimizer="muon", max_lr=1e-2))
    shared, _ = quadratic(OptimConfig(optimizer="muon", max_lr=1e-2), 3, three_ranks)
    for a, b in zip(alone.parameters(), shared.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_lion_is_these_lines():
    cfg = OptimConfig(optimizer="lion", max_lr=1e-2, weight_decay=0.3, beta1=0.8, beta2=0.9)
    weight, grads, after = three_steps(cfg)
    momentum = torch.zeros_like(weight)
    for g in grads:
        weight = weight * (1 - 1e-2 * 0.3) - 1e-2 * torch.sign(0.8 * momentum + 0.2 * g)
        momentum = 0.9 * momentum + 0.1 * g
    torch.testing.assert_close(after, weight)


def test_embedding_and_head_have_their_own_learning_rate():
    model = tiny_model(tie_embeddings=False)
    optimizer = build_optimizer(model, OptimConfig(max_lr=1e-2, embed_lr=3e-2))
    set_lr(optimizer, 1e-3)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert rates[id(p)] == pytest.approx(3e-3 if name.startswith(("embed_tokens", "lm_head")) else 1e-3), name


def test_the_average_follows_the_weights_and_comes_and_goes():
    model = tiny_model()
    average = Average(model, decay=0.9)
    p, expected = model.norm.weight, model.norm.weight.detach().clone()
    for t in range(1, 30):
        with torch.no_grad():
            p += 1
        average.update()
        decay = min(0.9, t / (t + 10))
        expected = decay * expected + (1 - decay) * p.detach()
    live = p.detach().clone()
    with swapped_in(average):
        torch.testing.assert_close(model.norm.weight.detach(), expected)
    assert torch.equal(model.norm.weight.detach(), live)


def test_adamw_is_these_ten_lines(tokens):
    model = tiny_model()
    cfg = OptimConfig(optimizer="adamw", max_lr=1e-2, beta1=0.8, beta2=0.9, eps=1e-4, weight_decay=0.3)
    optimizer = build_optimizer(model, cfg)
    reference = {name: p.detach().clone().double() for name, p in model.named_parameters()}
    mean = {name: torch.zeros_like(p) for name, p in reference.items()}
    square = {name: torch.zeros_like(p) for name, p in reference.items()}
    for t, lr in enumerate((1e-2, 3e-3, 2e-3), 1):
        set_lr(optimizer, lr)
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            g, w = p.grad.double(), reference[name]
            w *= 1 - lr * (0.3 if p.dim() == 2 else 0.0)
            mean[name] = 0.8 * mean[name] + 0.2 * g
            square[name] = 0.9 * square[name] + 0.1 * g * g
            w -= lr * (mean[name] / (1 - 0.8**t)) / ((square[name] / (1 - 0.9**t)).sqrt() + 1e-4)
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.double(), reference[name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("max_norm", [0.5, 1e6, None])
def test_clipping_scales_the_whole_gradient_and_tells_its_norm_before(max_norm, tokens):
    model = tiny_model()
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    norm = math.sqrt(sum(g.double().square().sum().item() for g in before.values()))
    assert norm > 0.5
    assert clip_gradients(model, max_norm).item() == pytest.approx(norm, rel=1e-4)
    factor = 0.5 / norm if max_norm == 0.5 else 1.0
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, before[name] * factor, atol=1e-6, rtol=1e-4)


# ---- Statistics ------------------------------------------------------------------------------------------------------


def test_statistics_are_the_norms_and_cosines_they_are_called():
    model, rows = tiny_model(scale=1.0), []
    optimizer = build_optimizer(model, OptimConfig(max_lr=1e-2))
    stats = Statistics(model, period=2, write=rows.append)
    history = []
    for step in range(1, 5):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        with stats.around(step):
            optimizer.step()
        history.append({name: (before[name], p.detach().clone(), p.grad) for name, p in model.named_parameters()})
    assert [row["step"] for row in rows] == [2, 4]
    for row in rows:
        now, earlier = history[row["step"] - 1], history[row["step"] - 2]
        for name, (before, after, grad) in now.items():
            assert row["weight_norm"][name] == pytest.approx(after.norm().item(), rel=1e-5)
            assert row["grad_norm"][name] == pytest.approx(grad.norm().item(), rel=1e-5)
            assert row["update_norm"][name] == pytest.approx((after - before).norm().item(), rel=1e-4)
            cosine = torch.cosine_similarity(grad.flatten(), earlier[name][2].flatten(), dim=0)
            assert row["grad_cosine"][name] == pytest.approx(cosine.item(), abs=1e-5)


def test_statistics_of_every_step_have_no_cosine_in_the_first():
    model, rows = tiny_model(), []
    stats = Statistics(model, period=1, write=rows.append)
    for step in 1, 2:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        with stats.around(step):
            pass
    assert "grad_cosine" not in rows[0] and list(rows[1]["grad_cosine"].values()) == pytest.approx([1.0] * 20)
    assert set(rows[1]["update_norm"].values()) == {0.0}
