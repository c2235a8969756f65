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


def changed(common: list[str], *own: str) -> list[str]:
    """A command line of common options, without those that `own` sets anew: an option may be given only once."""
    names = {argument.split("=")[0] for argument in own}
    return [argument for argument in common if argument.split("=")[0] not in names] + [*own]


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


@pytest.fixture(scope="session")
def sentencepiece_bpe(tmp_path_factory):
    """Files of tokenizers in the manner of Llama 2: spaces are U+2581, unknown characters are bytes.

    "llama2" puts a space before every text, "first space" unless there is one, "no space" never.
    """
    tokenizers = pytest.importorskip("tokenizers")
    words = ["\u2581Call", "\u2581me", "\u2581Some", "\u2581years", "\u2581little", "\u2581long", "\u2581\u2581"]
    alphabet = sorted({letter for word in words for letter in word})
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *alphabet]
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    model = tokenizers.models.BPE({token: i for i, token in enumerate(vocab)}, merges, byte_fallback=True)
    folder = tmp_path_factory.mktemp("sentencepiece")

    def write(name: str) -> Path:
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.add_special_tokens(["<s>", "</s>"])
        if name == "llama2":
            space = tokenizers.normalizers.Replace(" ", "\u2581")
            tokenizer.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend("\u2581"), space])
        else:
            scheme = "first" if name == "first space" else "never"
            tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        tokenizer.save(str(folder / f"{name}.json"))
        return folder / f"{name}.json"

    return write
