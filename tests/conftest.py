"""Shared by all tests: small shapes, the byte tokenizer, and where the shared data lie."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from model import ModelConfig, Transformer

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"  # real data beside the repository; tests that need it skip where it is absent

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a network
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # the suite may itself run under torchrun
    os.environ.pop(name, None)
torch.set_num_threads(1)  # tiny shapes; and equalities to the last bit need one count everywhere
os.environ["OMP_NUM_THREADS"] = "1"


def tiny_config(**changes) -> ModelConfig:
    """A network of two layers that runs in a millisecond; 97 tokens are no multiple of 128, so padding is in play."""
    shape: dict[str, Any] = {"dim": 32, "n_layers": 2, "n_heads": 4, "ffn_dim": 48, "vocab_size": 97, "seq_len": 32}
    shape["qk_norm"] = False  # a Llama, unless a test wants Qwen3
    return ModelConfig(**(shape | changes))


def tiny_model(seed: int = 0, scale: float = 5.0, **changes) -> Transformer:
    """Random weights `scale` times the usual, so that attention is far from uniform and errors show."""
    torch.manual_seed(seed)
    model = Transformer(tiny_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale) if parameter.dim() >= 2 else parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def tokens() -> torch.Tensor:
    """[2, 16] token ids of `tiny_config`."""
    return torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(1))


def shared(name: str) -> Path:
    """A file beside the repository; skips the test where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is absent")
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """The sample corpus, prepared. Who damages it damages a copy."""
    from data_pipeline import SampleConfig, sample

    folder = tmp_path_factory.mktemp("data") / "sample"
    sample(SampleConfig(out_dir=str(folder)))
    return folder


@pytest.fixture(scope="session")
def items(tmp_path_factory) -> Path:
    """A file of three HellaSwag items."""
    item = {"activity_label": "Cooking", "ctx_a": "A man cracks an egg.", "ctx_b": "he", "label": 1}
    endings = ["flies away.", "drops it into a pan.", "sings to the hen.", "is the pan."]
    path = tmp_path_factory.mktemp("items") / "items.jsonl"
    path.write_text("".join(json.dumps({**item, "endings": endings}) + "\n" for _ in range(3)))
    return path


@pytest.fixture(scope="module")
def no_plots() -> Iterator[None]:
    """Runs draw no pictures, which take a second each."""
    from nano416 import metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "plot", lambda *_: None)
        yield
