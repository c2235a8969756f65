"""optimizers.py: the learning rate is a written list of numbers, update rules are ten lines, only matrices decay."""

import copy
import itertools
import math

import pytest
import torch
from conftest import ROOT, tiny_model
from torch import Tensor

from nano416 import config, optimizers
from nano416.optimizers import (
    EMA,
    OPTIMIZERS,
    SCHEDULES,
    OptimConfig,
    ParamStats,
    build_optimizer,
    clip_grad_norm_,
    get_lr,
    newton_schulz,
    optimizer_step,
    set_lr,
)

MLP_WEIGHT = "layers.0.mlp.up_proj.weight"
TAKE = torch.tensor(0.0)
SKIP = torch.tensor(1.0)


# ---- Learning rate ---------------------------------------------------------------------------------------------------


def learning_rates(name: str, steps: int = 10, warmup_frac: float = 0.2) -> list[float]:
    min_lr = 0.0 if name == "constant" else 0.1
    cfg = OptimConfig(schedule=name, max_lr=1.0, min_lr=min_lr, warmup_frac=warmup_frac)  # type: ignore[arg-type]
    return [get_lr(step, steps, cfg) for step in range(steps)]


# Two steps of warmup, the peak at step 2, the end at step 9.
EXPECTED_RATES = {
    "cosine": [0.5, 1.0, 1.0, 0.9554360, 0.8305704, 0.6501344, 0.4498656, 0.2694296, 0.1445640, 0.1],
    "linear": [0.5, 1.0, 1.0, 0.8714286, 0.7428571, 0.6142857, 0.4857143, 0.3571429, 0.2285714, 0.1],
    "wsd": [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.7428571, 0.1],
    "constant": [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
    "inv_sqrt": [0.5, 1.0, 1.0, 0.8179516, 0.7148170, 0.6462793, 0.5965096, 0.5582576, 0.5276719, 0.5024922],
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_learning_rate_of_each_schedule_is_this_list(name):
    assert learning_rates(name) == pytest.approx(EXPECTED_RATES[name], abs=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_warmup_every_schedule_starts_at_the_peak_and_never_rises(name):
    rates = learning_rates(name, steps=100, warmup_frac=0.0)
    assert rates[0] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates))
    assert learning_rates(name, steps=1, warmup_frac=0.0) == [1.0]


def test_the_original_416m_recipe_warms_up_for_305_steps_and_ends_at_a_tenth():
    cfg = config.from_dict(OptimConfig, config.load_file(str(ROOT / "configs" / "416m_seed.toml"))["optim"])
    assert get_lr(0, 15_258, cfg) == pytest.approx(3e-4 / 305)
    assert get_lr(304, 15_258, cfg) == get_lr(305, 15_258, cfg) == 3e-4
    assert get_lr(15_257, 15_258, cfg) == pytest.approx(3e-5)
    assert get_lr(305 + (15_257 - 305) // 2, 15_258, cfg) == pytest.approx((3e-4 + 3e-5) / 2)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 10, 300])
def test_every_step_of_a_schedule_that_ends_at_0_learns(name, steps):
    cfg = OptimConfig(schedule=name, max_lr=1.0)  # type: ignore[arg-type]
    rates = [get_lr(step, steps, cfg) for step in range(steps)]
    assert min(rates) > 0
    if name == "linear":
        assert get_lr(steps, steps, cfg) == 0


def test_after_the_last_step_the_learning_rate_stays():
    cfg = OptimConfig(max_lr=1e-3, min_lr=1e-5)
    assert get_lr(500, 100, cfg) == get_lr(99, 100, cfg) == pytest.approx(1e-5)


def test_set_lr_sets_all_groups_and_returns_the_rate():
    cfg = OptimConfig(max_lr=1e-2)
    optimizer = build_optimizer(tiny_model(), cfg)
    assert set_lr(optimizer, 40, 100, cfg) == get_lr(40, 100, cfg)
    assert [group["lr"] for group in optimizer.param_groups] == [get_lr(40, 100, cfg)] * 3


# ---- Configuration ---------------------------------------------------------------------------------------------------


def test_each_optimizer_has_a_default_learning_rate_that_max_lr_replaces():
    assert OptimConfig().peak_lr == 3e-3
    assert OptimConfig(optimizer="adamw").peak_lr == 3e-4
    assert OptimConfig(optimizer="adamw", max_lr=1e-2).peak_lr == 1e-2
    assert all(OptimConfig(optimizer=name).peak_lr > 0 for name in OPTIMIZERS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adamx"}, "optimizer must be one of muon, adamw, .* got 'adamx'"),
        ({"max_lr": 0.0}, "max_lr must be above 0, got 0.0"),
        ({"min_lr": 1e-2}, r"min_lr must be between 0 and max_lr \(0.003\), got 0.01"),
        ({"schedule": "constant", "min_lr": 1e-4}, r"min_lr \(0.0001\) has no effect with the constant schedule"),
        ({"warmup_frac": 1.0}, r"warmup_frac must be in \[0, 1\), got 1.0"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative, got -0.1"),
        ({"beta1": 1.0}, r"beta1 must be in \[0, 1\), got 1.0"),
        ({"beta2": -1.0}, r"beta2 must be in \[0, 1\), got -1.0"),
        ({"grad_clip": 0.0}, r"grad_clip must be above 0 \(none = no clipping\), got 0.0"),
        ({"z_loss": -1.0}, "z_loss must not be negative, got -1.0"),
        ({"ema": 1.0}, r"ema must be in \(0, 1\) \(none = no averaging\), got 1.0"),
    ],
)
def test_an_impossible_setting_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**changes)


def test_a_config_of_version_0_1_loads_unless_it_used_an_option_that_is_gone():
    version_0_1 = {"optimizer": "adamw", "max_lr": 1e-3, "embed_lr": None, "eps": 1e-8}
    assert config.from_dict(OptimConfig, version_0_1) == OptimConfig(optimizer="adamw", max_lr=1e-3)
    with pytest.raises(ValueError, match="embed_lr is no longer an option"):
        config.from_dict(OptimConfig, {**version_0_1, "embed_lr": 1e-2})


# ---- Optimizers ------------------------------------------------------------------------------------------------------


def test_matrices_decay_and_norms_do_not():
    model = tiny_model(qk_norm=True, tie_embeddings=False)
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.3))
    name_of = {id(p): name for name, p in model.named_parameters()}
    decay = {name_of[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    norms = {name for name in decay if name.endswith("norm.weight")}
    assert decay.keys() == set(name_of.values()), "every parameter is in exactly one group"
    assert len(norms) == 2 * 4 + 1
    assert {name for name, value in decay.items() if value == 0} == norms
    assert {value for name, value in decay.items() if name not in norms} == {0.3}


def test_tied_weights_are_updated_once():
    model = tiny_model()
    optimizer = build_optimizer(model, OptimConfig())
    n_updated = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert n_updated == sum(p.numel() for p in model.parameters())


def step_on_random_gradients(cfg: OptimConfig, steps: int = 3, map_sharded=None):
    """A model after some steps on fixed random gradients, and its optimizer."""
    model = tiny_model()
    optimizer = build_optimizer(model, cfg, map_sharded)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer_step(optimizer, TAKE)
    return model, optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_changes_neither_weights_nor_state(name):
    model, optimizer = step_on_random_gradients(OptimConfig(optimizer=name, max_lr=1e-2, weight_decay=0.1))
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"]])
    for p in model.parameters():
        p.grad = torch.full_like(p, math.nan)
    optimizer_step(optimizer, SKIP)
    torch.testing.assert_close([model.state_dict(), optimizer.state_dict()["state"]], before, rtol=0, atol=0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer_step(optimizer, TAKE)
    assert all((p != before[0][key]).any() for key, p in model.named_parameters()), "the next step is taken"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_loaded_state_continues_bit_for_bit(name):
    cfg = OptimConfig(optimizer=name, max_lr=1e-2)
    model, optimizer = step_on_random_gradients(cfg)
    resumed_model = copy.deepcopy(model)
    resumed_optimizer = build_optimizer(resumed_model, cfg)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group["lr_scale"] = 1.0  # as in files of version 0.1
    resumed_optimizer.load_state_dict(state)
    for one_model, one_optimizer in ((model, optimizer), (resumed_model, resumed_optimizer)):
        for p in one_model.parameters():
            p.grad = torch.ones_like(p)
        set_lr(one_optimizer, 0, 10, cfg)
        optimizer_step(one_optimizer, TAKE)
    torch.testing.assert_close(resumed_model.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(resumed_optimizer.state_dict()["state"], optimizer.state_dict()["state"], rtol=0, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns(name, tokens):
    rates = {"sgd": 0.5, "lion": 1e-3, "rmsprop": 1e-3}
    model = tiny_model()
    optimizer = build_optimizer(model, OptimConfig(optimizer=name, max_lr=rates.get(name, 1e-2), min_lr=0))
    losses = []
    for _ in range(30):
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer_step(optimizer, TAKE)
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_an_optimizer_is_added_with_one_function_and_one_line(monkeypatch):
    def half_step(groups, cfg, map_sharded):
        return torch.optim.SGD(groups, lr=cfg.peak_lr / 2)

    monkeypatch.setitem(optimizers.OPTIMIZERS, "half_step", (half_step, 0.2))
    optimizer = build_optimizer(tiny_model(), OptimConfig(optimizer="half_step"))
    assert [group["lr"] for group in optimizer.param_groups] == [0.1] * 3


def three_steps(cfg: OptimConfig) -> tuple[Tensor, list[Tensor], Tensor]:
    """A matrix before three steps, its gradients in them, and the matrix after them."""
    model = tiny_model()
    optimizer = build_optimizer(model, cfg)
    weight = model.get_parameter(MLP_WEIGHT)
    before = weight.detach().clone()
    grads = [torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    for grad in grads:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        weight.grad = grad.clone()
        optimizer_step(optimizer, TAKE)
    return before, grads, weight.detach()


def test_muon_is_these_lines():
    weight, grads, after = three_steps(OptimConfig(optimizer="muon", max_lr=1e-2, weight_decay=0.3))
    momentum = torch.zeros_like(weight)
    scale = 0.2 * max(weight.shape) ** 0.5
    for g in grads:
        momentum = 0.95 * momentum + 0.05 * g
        direction = newton_schulz((0.05 * g + 0.95 * momentum)[None])[0]
        weight = weight * (1 - 1e-2 * 0.3) - 1e-2 * scale * direction
    torch.testing.assert_close(after, weight, atol=2e-4, rtol=0)
    rms = (scale * direction).square().mean().sqrt()
    assert 0.15 < rms < 0.25, "an update as large as AdamW's"


def test_lion_is_these_lines():
    cfg = OptimConfig(optimizer="lion", max_lr=1e-2, weight_decay=0.3, beta1=0.8, beta2=0.9)
    weight, grads, after = three_steps(cfg)
    momentum = torch.zeros_like(weight)
    for g in grads:
        weight = weight * (1 - 1e-2 * 0.3) - 1e-2 * torch.sign(0.8 * momentum + 0.2 * g)
        momentum = 0.9 * momentum + 0.1 * g
    torch.testing.assert_close(after, weight)


def test_adamw_is_these_lines():
    cfg = OptimConfig(optimizer="adamw", max_lr=1e-2, weight_decay=0.3, beta1=0.8, beta2=0.9)
    weight, grads, after = three_steps(cfg)
    mean = torch.zeros_like(weight)
    square = torch.zeros_like(weight)
    for t, g in enumerate(grads, 1):
        mean = 0.8 * mean + 0.2 * g
        square = 0.9 * square + 0.1 * g * g
        step = (mean / (1 - 0.8**t)) / ((square / (1 - 0.9**t)).sqrt() + 1e-8)
        weight = weight * (1 - 1e-2 * 0.3) - 1e-2 * step
    torch.testing.assert_close(after, weight, atol=1e-6, rtol=1e-5)


def test_muon_updates_embeddings_and_norms_as_adamw_does():
    cfg = OptimConfig(optimizer="muon", max_lr=1e-2)
    by_muon, _ = step_on_random_gradients(cfg)
    by_adamw, _ = step_on_random_gradients(OptimConfig(optimizer="adamw", max_lr=1e-2))
    for name, p in by_muon.named_parameters():
        is_hidden = name.startswith("layers.") and p.dim() == 2
        assert torch.equal(p, by_adamw.get_parameter(name)) != is_hidden, name


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 40), (2, 40, 16)])
def test_newton_schulz_gives_the_orthogonal_factor_of_the_svd(shape):
    matrices = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    ours = newton_schulz(matrices)
    values = torch.linalg.svdvals(ours)
    assert values.min() > 0.6 and values.max() < 1.25, "five iterations leave singular values around one"
    inner = u.mT @ ours @ vh.mT
    torch.testing.assert_close(inner, torch.diag_embed(values.new_ones(values.shape)), atol=0.4, rtol=0)
    assert (inner * (1 - torch.eye(16))).abs().max() < 0.03, "same singular vectors, within bf16"


def test_muon_divided_among_three_ranks_is_muon_in_one_process():
    def three_ranks(work, batch, like):
        return torch.cat([work(part) for part in batch.tensor_split(3) if len(part)])

    cfg = OptimConfig(optimizer="muon", max_lr=1e-2)
    alone, _ = step_on_random_gradients(cfg)
    divided, _ = step_on_random_gradients(cfg, map_sharded=three_ranks)
    for a, b in zip(alone.parameters(), divided.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


# ---- Gradients and weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [0.5, 1e6, None])
def test_clipping_scales_the_whole_gradient_and_returns_its_norm_before(max_norm, tokens):
    model = tiny_model()
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    norm = math.sqrt(sum(grad.double().square().sum().item() for grad in before.values()))
    assert norm > 0.5
    assert clip_grad_norm_(model, max_norm).item() == pytest.approx(norm, rel=1e-4)
    factor = 0.5 / norm if max_norm == 0.5 else 1.0
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, before[name] * factor, atol=1e-6, rtol=1e-4)


def train_norm_weight(model, ema: EMA, steps: range) -> None:
    for _ in steps:
        with torch.no_grad():
            model.norm.weight += 1
        ema.update()


def test_the_average_follows_the_weights_and_is_swapped_in_and_out():
    model = tiny_model()
    ema = EMA(model, decay=0.9)
    weight = model.norm.weight.detach()
    expected = weight.clone()
    for t in range(1, 30):
        train_norm_weight(model, ema, range(1))
        decay = min(0.9, t / (t + 10))
        expected = decay * expected + (1 - decay) * weight
    live = weight.clone()
    with ema.swapped():
        torch.testing.assert_close(weight, expected)
    assert torch.equal(weight, live)
    with pytest.raises(RuntimeError), ema.swapped():
        raise RuntimeError("the live weights come back after a failure too")
    assert torch.equal(weight, live)


def test_a_resumed_average_continues_bit_for_bit_and_a_new_one_starts_from_the_weights():
    model = tiny_model()
    ema = EMA(model, decay=0.9)
    train_norm_weight(model, ema, range(5))
    resumed = EMA(tiny_model(seed=1), decay=0.9)
    resumed.load_state_dict(copy.deepcopy(ema.state_dict()), lambda saved, like: saved)
    torch.testing.assert_close(resumed.state_dict(), ema.state_dict(), rtol=0, atol=0)
    resumed.load_state_dict({}, lambda saved, like: saved)
    assert resumed.state_dict()["ema_updates"] == 0
    torch.testing.assert_close(resumed.state_dict()["ema"], dict(tiny_model(seed=1).named_parameters()), rtol=0, atol=0)


# ---- Statistics ------------------------------------------------------------------------------------------------------


def test_statistics_are_the_norms_and_cosines_they_are_called():
    model = tiny_model(scale=1.0)
    optimizer = build_optimizer(model, OptimConfig(max_lr=1e-2))
    rows = []
    stats = ParamStats(model, every=2, write=rows.append)
    history = []
    for step in range(1, 5):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        with stats.record(step):
            optimizer.step()
        history.append({name: (before[name], p.detach().clone(), p.grad) for name, p in model.named_parameters()})
    assert [row["step"] for row in rows] == [2, 4]
    for row in rows:
        now = history[row["step"] - 1]
        previous = history[row["step"] - 2]
        for name, (before, after, grad) in now.items():
            assert row["weight_norm"][name] == pytest.approx(after.norm().item(), rel=1e-5)
            assert row["grad_norm"][name] == pytest.approx(grad.norm().item(), rel=1e-5)
            assert row["update_norm"][name] == pytest.approx((after - before).norm().item(), rel=1e-4)
            cosine = torch.cosine_similarity(grad.flatten(), previous[name][2].flatten(), dim=0)
            assert row["grad_cosine"][name] == pytest.approx(cosine.item(), abs=1e-5)


def test_statistics_of_every_step_have_no_cosine_in_the_first():
    model = tiny_model()
    rows = []
    stats = ParamStats(model, every=1, write=rows.append)
    for step in (1, 2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        with stats.record(step):
            pass
    assert "grad_cosine" not in rows[0]
    assert list(rows[1]["grad_cosine"].values()) == pytest.approx([1.0] * 20)
    assert set(rows[1]["update_norm"].values()) == {0.0}
