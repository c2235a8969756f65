"""optimizers.py: the learning rate is a written list of numbers, AdamW is ten lines, only matrices decay."""

import itertools
import math

import pytest
import torch
from conftest import tiny_model

from optimizers import SCHEDULES, OptimConfig, build_optimizer, clip_gradients, lr_at, set_lr


def schedule(name: str, steps: int = 10, **changes) -> list[float]:
    cfg = OptimConfig(**{"schedule": name, "max_lr": 1.0, "min_lr": 0.1, "warmup_frac": 0.2, **changes})  # type: ignore[arg-type]
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
    cfg = OptimConfig()
    assert lr_at(0, 15_258, cfg) == pytest.approx(3e-4 / 305)
    assert lr_at(304, 15_258, cfg) == lr_at(305, 15_258, cfg) == 3e-4
    assert lr_at(15_257, 15_258, cfg) == pytest.approx(3e-5)
    assert lr_at(305 + (15_257 - 305) // 2, 15_258, cfg) == pytest.approx((3e-4 + 3e-5) / 2)


def test_past_the_end_the_learning_rate_stays():
    assert lr_at(500, 100, OptimConfig()) == lr_at(99, 100, OptimConfig()) == pytest.approx(3e-5)


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"max_lr": 0.0}, "max_lr must be above 0, got 0.0"),
        ({"min_lr": 1e-3}, r"min_lr must be between 0 and max_lr \(0.0003\), got 0.001"),
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


def test_adamw_is_these_ten_lines(tokens):
    model = tiny_model()
    cfg = OptimConfig(max_lr=1e-2, beta1=0.8, beta2=0.9, eps=1e-4, weight_decay=0.3)
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
