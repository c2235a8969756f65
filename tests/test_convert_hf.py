"""tools/convert_hf.py: exports compute what transformers computes; nothing is lost between folder, file and Hub."""

import base64
import contextlib
import hashlib
import http.server
import importlib.util
import json
import math
import os
import re
import shutil
import threading
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import ROOT, tiny_config, tiny_model
from processes import python

import training
from model import ModelConfig, Transformer
from nano416 import checkpoint, seed_checkpoint
from nano416.config import parse_config, to_dict
from nano416.files import write_json
from nano416.generate import Sampling, generate
from nano416.tokenizer import Tokenizer, load_tokenizer
from tools import convert_hf
from tools.convert_hf import ExportConfig, ImportConfig, PushConfig

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")

TEXTS = [
    "",
    " ",
    "The sky is blue.",
    "  two  spaces\n\n\nlines\t\t tabs \r\n",
    "don't DON'T we'll 1234567 x2",
    "naïve 日本語 🎉🎉\u3000\xa0",
]
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
ROPE_LLAMA3 = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}}


def write_checkpoint(path: Path, model: Transformer, tokenizer: dict[str, Any] | None = None) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "format": checkpoint.FORMAT,
        "step": 7,
        "tokens": 448,
        "config": {"model": to_dict(model.config)},
        "tokenizer": tokenizer or load_tokenizer("bytes").info(),
        "model": model.state_dict(),
        "metrics": {},
    }
    checkpoint.write(path, state)
    return str(path)


def export(tmp_path: Path, model: Transformer) -> Path:
    """tmp_path/hf, exported from tmp_path/model.pt."""
    source = write_checkpoint(tmp_path / "model.pt", model)
    convert_hf.export(ExportConfig(source, str(tmp_path / "hf")))
    return tmp_path / "hf"


def import_hf(source: Path, out: Path, **options: Any) -> Transformer:
    convert_hf.import_(ImportConfig(str(source), str(out), **options))
    return checkpoint.load_model(out)[0]


def load_in_transformers(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def save_from_transformers(folder: Path, family: str, **changes: Any) -> Any:
    """A small random Llama or Qwen3 in shards, as transformers saves it, with the bytes tokenizer."""
    transformers = pytest.importorskip("transformers")
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 96,
        "vocab_size": 300,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
    }
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(**{**shape, **changes})
    network = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    network.save_pretrained(folder, max_shard_size="50KB")
    convert_hf.write_tokenizer(folder, load_tokenizer("bytes"), 512)
    return network


def assert_same_logits(model: Transformer, network: Any, length: int = 32) -> None:
    vocab_size = model.config.vocab_size
    tokens = torch.randint(0, vocab_size, (3, length), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[..., :vocab_size], network(tokens).logits, atol=1e-4, rtol=1e-4)


def assert_same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


# ---- Export ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_transformers_computes_the_same_logits_and_generates_the_same_text(tied, qk_norm, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = tiny_model(vocab_size=257, tie_embeddings=tied, qk_norm=qk_norm, n_kv_heads=2, rope_theta=500.0)
    folder = export(tmp_path, model)
    network = load_in_transformers(folder)
    assert type(network).__name__ == ("Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM")
    assert_same_logits(model, network)
    prompt = transformers.AutoTokenizer.from_pretrained(folder)("The sky", return_tensors="pt")
    theirs = network.generate(**prompt, max_new_tokens=20, do_sample=False)[0].tolist()
    ours = list(generate(model, list(b"The sky"), 20, Sampling(temperature=0, stop_token=256)))
    assert tied or len(set(ours)) > 3
    assert theirs == list(b"The sky") + ours + [256] * (len(ours) < 20)


def test_llama3_rope_scaling_is_exported(tmp_path):
    model = tiny_model(vocab_size=257, seq_len=128, rope_scaling=LLAMA3)
    assert not torch.equal(model.rope_cos, tiny_model(vocab_size=257, seq_len=128).rope_cos)
    assert_same_logits(model, load_in_transformers(export(tmp_path, model)), length=128)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_export_and_import_give_back_the_same_bits(dtype, tmp_path):
    model = tiny_model(vocab_size=257, tie_embeddings=False, qk_norm=True)
    if dtype == "bf16":
        model.to(torch.bfloat16).float()
    source = write_checkpoint(tmp_path / "model.pt", model)
    convert_hf.export(ExportConfig(source, str(tmp_path / "hf"), dtype=dtype))
    back = import_hf(tmp_path / "hf", tmp_path / "back.pt")
    assert back.config == model.config
    assert_same_tensors(convert_hf.to_hf_weights(back), convert_hf.to_hf_weights(model))
    old = checkpoint.read(tmp_path / "model.pt")
    new = checkpoint.read(tmp_path / "back.pt")
    assert all(new[key] == old[key] for key in ("step", "tokens", "tokenizer"))
    convert_hf.export(ExportConfig(str(tmp_path / "back.pt"), str(tmp_path / "again")))
    for path in (tmp_path / "hf").iterdir():
        if dtype == "fp32" and path.name != "README.md":
            assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_large_models_are_written_in_shards(tmp_path):
    model = tiny_model(vocab_size=257, tie_embeddings=False)
    folder = export(tmp_path, model)
    convert_hf.write_weights(folder, model, torch.float32, max_shard_bytes=20_000)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 3
    assert not (folder / "model.safetensors").exists()
    assert_same_tensors(convert_hf.read_weights(folder), convert_hf.to_hf_weights(model))
    assert_same_logits(model, load_in_transformers(folder))
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1, "all files are readable by the same people"


def test_gpt2_gives_the_same_tokens_and_has_the_original_merges(tmp_path):
    transformers = pytest.importorskip("transformers")
    try:
        gpt2 = load_tokenizer("gpt2")
    except ValueError as error:
        pytest.skip(str(error))
    convert_hf.write_tokenizer(tmp_path, gpt2, 1024)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, (ROOT / "README.md").read_text(encoding="utf-8")]:
        assert fast(text)["input_ids"] == gpt2.encode(text)
        assert fast.decode(gpt2.encode(text)) == text
    assert (len(fast), fast.eos_token_id) == (50257, 50256)
    merges = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    assert merges[:3] == [["Ġ", "t"], ["Ġ", "a"], ["h", "e"]]
    assert len(merges) == 50000


def test_any_tiktoken_pattern_splits_the_text_the_same():
    import tiktoken

    pattern = (
        r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    )
    tokens = [*(bytes([i]) for i in range(256)), b"  ", b"\n\n", b"12", b"123", b" s", b"'t"]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    encoding = tiktoken.Encoding("mine", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 262})
    backend = convert_hf.convert_tiktoken(Tokenizer("mine", encoding))
    for text in [*TEXTS, "a \n ", "  \n\n  b", "x   ", "12345 123\n\n\n"]:
        assert backend.encode(text).ids == encoding.encode_ordinary(text)
    assert backend.encode("a<|endoftext|>").ids == [97, 262]


def test_the_model_card_has_the_numbers_of_this_checkpoint_only(tmp_path):
    run_dir = tmp_path / "runs/mine"
    source = write_checkpoint(run_dir / "checkpoint_step_7.pt", tiny_model(vocab_size=257))
    (run_dir / "final_metrics.png").write_bytes(b"plot")
    for step, is_this_one in ((7, True), (8, False)):
        summary = {"step": step, "val_loss": 1.2345678, "seconds": {"training": 3.0}, "planned_tokens_per_s": None}
        write_json(run_dir / "final_metrics.json", summary)
        folder = tmp_path / f"mine-{step}"
        convert_hf.export(ExportConfig(source, str(folder)))
        card = (folder / "README.md").read_text()
        assert card.startswith("---\nlibrary_name: transformers\n")
        assert f"# mine-{step}\n" in card
        assert ("| val_loss | 1.23457 |" in card) is is_this_one
        assert "| tokens | 448 |" in card
        assert "seconds" not in card
        assert "None" not in card
        assert (folder / "final_metrics.png").read_bytes() == b"plot"


@pytest.mark.parametrize("qk_norm", [False, True])
def test_llama_cpp_knows_every_tensor_and_the_end_token(qk_norm, tmp_path):
    """Its converter asks the gguf package for these names; the conversion itself is `convert_hf_to_gguf.py FOLDER`."""
    gguf = pytest.importorskip("gguf")
    folder = export(tmp_path, tiny_model(vocab_size=257, tie_embeddings=False, qk_norm=qk_norm))
    name_map = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3 if qk_norm else gguf.MODEL_ARCH.LLAMA, 2)
    names = [name_map.get_name(name, try_suffixes=(".weight",)) for name in convert_hf.read_weights(folder)]
    assert all(names)
    assert len(set(names)) == len(names)
    assert gguf.SpecialVocab(folder, load_merges=True).special_token_ids["eos"] == 256


# ---- Import ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", ROPE_LLAMA3),
        ("Llama", {"tie_word_embeddings": True, "head_dim": None, "num_key_value_heads": None}),
        ("Qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ("Qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    ],
)
def test_an_imported_model_has_the_same_logits_and_exports_the_same_weights(family, changes, tmp_path):
    network = save_from_transformers(tmp_path / "hf", family, **changes)
    assert (tmp_path / "hf/model.safetensors.index.json").exists()
    model = import_hf(tmp_path / "hf", tmp_path / "model.pt")
    assert_same_logits(model, network, length=300)
    assert model.config.norm_eps == 1e-5
    assert checkpoint.read(tmp_path / "model.pt")["tokenizer"]["vocab_size"] == 257
    convert_hf.export(ExportConfig(str(tmp_path / "model.pt"), str(tmp_path / "back")))
    assert_same_logits(model, load_in_transformers(tmp_path / "back"), length=300)
    assert_same_tensors(convert_hf.read_weights(tmp_path / "hf"), convert_hf.read_weights(tmp_path / "back"))
    # A tokenizer.json leaves as it came.
    assert (tmp_path / "back/tokenizer.json").read_bytes() == (tmp_path / "hf/tokenizer.json").read_bytes()


def test_config_files_of_older_transformers_mean_the_same():
    config = tiny_config(rope_scaling=LLAMA3)
    transformers_5 = convert_hf.to_hf_config(config)
    transformers_4 = {key: value for key, value in transformers_5.items() if key != "rope_parameters"}
    first_llama3 = {**transformers_4, "rope_scaling": {**LLAMA3, "type": "llama3"}}
    for hf_config in (transformers_5, transformers_4, first_llama3):
        assert convert_hf.from_hf_config(hf_config) == config


def test_an_imported_model_generates_and_trains_with_the_printed_command(data, tmp_path, capsys):
    save_from_transformers(tmp_path / "hf", "Llama", **ROPE_LLAMA3, tie_word_embeddings=True)
    out = tmp_path / "model.pt"
    model = import_hf(tmp_path / "hf", out, seq_len=32)
    chat_command, train_command = capsys.readouterr().out.splitlines()[-2:]
    assert chat_command == f"python chat.py {out}"
    assert len(list(generate(model, [1, 2, 3], 5))) == 5
    options = ["--batch_size=2", "--batch_tokens=64", "--max_steps=1", "--hellaswag=none", "--eval_tokens=64"]
    # Data of the model's own tokenizer; its vocabulary is the 256 bytes and one more.
    identity = checkpoint.read(out)["tokenizer"]
    own_data = shutil.copytree(data, tmp_path / "data")
    meta = json.loads((own_data / "meta.json").read_text())
    (own_data / "meta.json").write_text(json.dumps(meta | {"tokenizer": identity}))
    folders = [f"--sources={own_data}", f"--run_dir={tmp_path / 'run'}"]
    training.main(parse_config(training.Config, [*train_command.split()[2:], *folders, *options]))
    assert f"weights from {out}" in (tmp_path / "run/train.log").read_text()


# ---- Refusals --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "hf"
    save_from_transformers(folder, "Llama")
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    write_json(path, {**json.loads(path.read_text()), **changes})


def truncate_shard(folder: Path, size: int) -> None:
    os.truncate(next(folder.glob("model-00002*")), size)


def quantize(folder: Path) -> None:
    weights = convert_hf.read_weights(folder)
    weights["lm_head.weight"] = weights["lm_head.weight"].to(torch.int8)
    replace_weights(folder, weights)


def shrink_vocabulary(folder: Path) -> None:
    edit_json(folder / "config.json", vocab_size=200)
    weights = convert_hf.read_weights(folder)
    replace_weights(folder, {k: v[:200].clone() if len(v) == 300 else v for k, v in weights.items()})


def replace_weights(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    remove_weights(folder)
    save_file(weights, folder / "model.safetensors")


def remove_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


def edit_config(**changes: Any) -> Any:
    return lambda folder: edit_json(folder / "config.json", **changes)


def edit_index(weight_map: Any) -> Any:
    return lambda folder: edit_json(folder / "model.safetensors.index.json", weight_map=weight_map)


BROKEN_FOLDERS = {
    "another architecture": (edit_config(architectures=["MixtralForCausalLM"]), "architecture MixtralForCausalLM is"),
    "no architecture": (edit_config(architectures=None), "architecture none is not supported"),
    "nested architectures": (edit_config(architectures=[["LlamaForCausalLM"]]), r"config\.json: "),
    "biases": (edit_config(attention_bias=True), "attention_bias = True is not supported"),
    "another activation": (edit_config(hidden_act="gelu"), "hidden_act = gelu is not supported"),
    "quantization": (edit_config(quantization_config={"bits": 4}), "quantization_config = .* is not supported"),
    "another kind of positions": (edit_config(rope_parameters={"rope_type": "yarn"}), "'yarn' are not supported"),
    "incomplete rope scaling": (edit_config(rope_parameters={"rope_type": "llama3"}), "rope_scaling needs"),
    "positions as a list": (edit_config(rope_parameters=["llama3"]), r"config\.json: "),
    "no hidden size": (edit_config(hidden_size=None), "hidden_size is missing"),
    "heads that do not divide": (edit_config(num_key_value_heads=3), "must be a multiple of n_kv_heads"),
    "another shape": (edit_config(intermediate_size=97), "does not fit the model: .*gate_proj.weight is"),
    "a layer without weights": (edit_config(num_hidden_layers=3), "layers.2.* is missing"),
    "a thousand layers": (edit_config(num_hidden_layers=1000), "too few for 1000 layers"),
    "a step that is text": (
        edit_config(nano416={"step": "many"}),
        r"config\.json: nano416.step expects int, got 'many'",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"cannot read config file .*config\.json"),
    "a config that is not JSON": (lambda folder: (folder / "config.json").write_text("{"), r"config\.json: Expecting"),
    "a missing shard": (lambda folder: next(folder.glob("model-00002*")).unlink(), "lacks model-00002-of-.* shards"),
    "half a shard": (lambda folder: truncate_shard(folder, 20_000), "is not a complete safetensors file"),
    "an empty shard": (lambda folder: truncate_shard(folder, 0), "0 bytes. is not a complete safetensors file"),
    "a shard outside the folder": (edit_index({"norm.weight": "../hf/config.json"}), r"lacks \.\./hf/config\.json"),
    "an index without names": (edit_index(["model.safetensors"]), "has no weight_map"),
    "an index of numbers": (edit_index({"norm.weight": 1}), "has no weight_map"),
    "integer weights": (quantize, "lm_head.weight is not a floating-point tensor"),
    "no weights": (remove_weights, "holds no weights"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), r"has no tokenizer\.json"),
    "a broken tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot load tokenizer"),
    "another model's tokenizer": (shrink_vocabulary, "has 257 tokens, more than the model's 200"),
}


@pytest.mark.parametrize("case", BROKEN_FOLDERS)
def test_a_broken_folder_is_refused_and_nothing_is_written(case, llama, tmp_path):
    damage, message = BROKEN_FOLDERS[case]
    folder = shutil.copytree(llama, tmp_path / "hf")
    damage(folder)
    with pytest.raises(ValueError, match=message):
        import_hf(folder, tmp_path / "out.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


SIZES = [name for name in convert_hf.CONFIG_NAMES.values() if name not in ("rms_norm_eps", "tie_word_embeddings")]


@pytest.mark.parametrize("name", SIZES)
def test_an_absurd_size_is_refused_at_once(name, llama, tmp_path):
    """10**9 layers would take days to build, positions for 10**15 tokens more memory than there is."""
    folder = shutil.copytree(llama, tmp_path / "hf")
    for value in (10**9, 10**15, 10**30):
        edit_config(**{name: value})(folder)
        with pytest.raises(ValueError, match=rf"config\.json: .* must be .*{value:,}"):
            import_hf(folder, tmp_path / "out.pt")


ODD_VALUES = [True, -1, 0, 1.5, math.inf, math.nan, 10**30, "x", "", [], [[]], {}, {"a": 1}, "x" * 100_000]
ODD_KEYS = ["architectures", "rope_parameters", "nano416", "rope_theta", *convert_hf.CONFIG_NAMES.values()]


@pytest.mark.parametrize("key", [*ODD_KEYS, "nano416.step", "nano416.tokenizer", "rope_parameters.factor"])
def test_a_config_of_odd_types_is_read_or_refused_in_one_line(key, llama):
    hf_config = json.loads((llama / "config.json").read_text())
    table, _, name = key.rpartition(".")
    for value in ODD_VALUES:
        changed = {table: {"rope_type": "llama3", **LLAMA3, name: value}} if table else {name: value}
        with contextlib.suppress(ValueError):
            exported = convert_hf.optional({**hf_config, **changed}, "nano416", dict)
            config = convert_hf.from_hf_config({**hf_config, **changed})
            assert isinstance(config, ModelConfig) and isinstance(exported, dict | None)


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def link_to(target: str) -> Any:
    return lambda path: path.symlink_to(target)


@pytest.mark.parametrize("make", [make_pipe, Path.mkdir, link_to("/dev/zero"), link_to("nowhere"), link_to(".")])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"])
def test_what_only_looks_like_a_file_is_refused_and_not_read_forever(name, make, llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "hf")
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with pytest.raises(ValueError, match=f"{name} is not a file; download it again"):
        import_hf(folder, tmp_path / "out.pt")


def test_links_to_files_are_followed_as_in_the_hub_cache(llama, tmp_path):
    (tmp_path / "hf").mkdir()
    for path in llama.iterdir():
        (tmp_path / "hf" / path.name).symlink_to(path)
    import_hf(tmp_path / "hf", tmp_path / "out.pt")


@pytest.mark.parametrize("name", ["..", ".", "", "/etc/passwd", "a\0b", "x" * 1000, "config.json/x"])
def test_an_index_that_names_what_is_no_shard_is_refused(name, llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "hf")
    edit_index({"norm.weight": name})(folder)
    with pytest.raises(ValueError, match=r"lacks .* shards"):
        import_hf(folder, tmp_path / "out.pt")


def in_dtype(dtype: torch.dtype) -> Any:
    return lambda weights: {name: tensor.to(dtype) for name, tensor in weights.items()}


ODD_WEIGHTS = {
    "a list": lambda weights: [1],
    "numbers": lambda weights: {"a": 1},
    "numbered": lambda weights: {1: torch.zeros(1)},
    "nested": lambda weights: {"a": weights},
    "nothing": lambda weights: {},
    "int32": in_dtype(torch.int32),
    "fp8": in_dtype(torch.float8_e4m3fn),
    "complex": in_dtype(torch.complex64),
    "sparse": lambda weights: {name: tensor.to_sparse() for name, tensor in weights.items()},
    "without memory": lambda weights: {name: tensor.to("meta") for name, tensor in weights.items()},
    "one-dimensional": lambda weights: {name: tensor.flatten() for name, tensor in weights.items()},
    "numbers as tensors": lambda weights: dict.fromkeys(weights, torch.tensor(1.0)),
}


@pytest.mark.parametrize("kind", ODD_WEIGHTS)
def test_odd_weights_are_refused(kind, llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "hf")
    weights = ODD_WEIGHTS[kind](convert_hf.read_weights(folder))
    remove_weights(folder)
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"floating-point tensor|does not fit|more than tensors|0 tensors"):
        import_hf(folder, tmp_path / "out.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("key", ["added_tokens", "pre_tokenizer", "decoder", "normalizer"])
def test_a_tokenizer_without_an_optional_part_is_read_or_refused_in_one_line(key, llama, tmp_path):
    tokenizer = json.loads((llama / "tokenizer.json").read_text())
    del tokenizer[key]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tokenizer))
    with contextlib.suppress(ValueError):
        assert load_tokenizer(str(path)).decode(b"abc") == "abc"
    tokenizer["model"]["vocab"]["日"] = 300
    path.write_text(json.dumps({**json.loads((llama / "tokenizer.json").read_text()), "model": tokenizer["model"]}))
    with pytest.raises(ValueError, match="the character '日' stands for no byte"):
        load_tokenizer(str(path))


def test_an_import_into_a_run_directory_leaves_the_files_of_the_run_alone(llama, tmp_path):
    half_written = tmp_path / "run/.checkpoint_step_8.pt.1234.tmp"
    half_written.parent.mkdir()
    half_written.touch()
    import_hf(llama, tmp_path / "run/imported.pt")
    assert half_written.exists()


@pytest.mark.parametrize("name", ["hf", "hf/model-00001-of-00010.safetensors"])
def test_every_command_says_how_to_convert_a_hugging_face_folder(name, llama, tmp_path):
    shutil.copytree(llama, tmp_path / "hf")
    command = f"python -m tools.convert_hf import {tmp_path / 'hf'} hf.pt"
    for read in (checkpoint.resolve, checkpoint.load_model):
        with pytest.raises(ValueError, match=re.escape(command)):
            read(tmp_path / name)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_pickles_are_read_only_without_safetensors_and_run_no_code(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(llama, tmp_path / "hf")
    pickle_file = folder / "pytorch_model.bin"
    torch.save({"x": Bomb()}, pickle_file)
    from_safetensors = import_hf(folder, tmp_path / "one.pt")
    weights = convert_hf.read_weights(folder)
    remove_weights(folder)
    for content in ({"x": Bomb()}, [1, 2]):
        torch.save(content, pickle_file)
        with pytest.raises(ValueError, match="holds more than tensors"):
            import_hf(folder, tmp_path / "two.pt")
    assert not (tmp_path / "exploded").exists()
    torch.save(weights, pickle_file)
    assert_same_tensors(import_hf(folder, tmp_path / "two.pt").state_dict(), from_safetensors.state_dict())


def test_no_existing_file_is_overwritten(llama, tmp_path):
    path = write_checkpoint(tmp_path / "model.pt", tiny_model(vocab_size=257))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    (tmp_path / "other.json").touch()
    for out_dir in (tmp_path / "full", path):
        with pytest.raises(ValueError, match="is not an empty folder"):
            convert_hf.export(ExportConfig(path, str(out_dir)))
    for out in ("model.pt", "other.pt"):
        with pytest.raises(ValueError, match="exists; choose another"):
            import_hf(llama, tmp_path / out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "model.pt", "other.json"]


def test_what_the_other_format_cannot_express_is_refused(llama, tmp_path):
    diffusion_model = write_checkpoint(tmp_path / "mdm.pt", tiny_model(vocab_size=257, causal=False))
    with pytest.raises(ValueError, match="is a masked-diffusion model"):
        convert_hf.export(ExportConfig(diffusion_model, str(tmp_path / "mdm")))
    with pytest.raises(ValueError, match="--seq_len=513 exceeds the model's context"):
        import_hf(llama, tmp_path / "long.pt", seq_len=513)
    with pytest.raises(ValueError, match=r"must end in \.pt"):
        ImportConfig(str(llama), "model.json")
    with pytest.raises(ValueError, match="no folder"):
        import_hf(tmp_path / "hff", tmp_path / "x.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["mdm.pt"]


def test_a_missing_package_is_named(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install safetensors"):
        convert_hf.import_(ImportConfig(str(llama), str(tmp_path / "x.pt")))


# ---- The Hub ---------------------------------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """A Hub with one repository, me/mine: it can be created, committed to, listed and downloaded."""

    commits: ClassVar[dict[str, dict[str, bytes]]] = {}  # commit id -> files; the last one is main
    downloads: ClassVar[list[str]] = []  # NAME:FIRST_BYTE of each download
    interrupt_once: ClassVar[list[str]] = []  # files whose next download stops halfway

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = self.path.split("?")[0]
        sha = next((sha for sha in self.commits if f"/{sha}" in url), next(reversed(self.commits), ""))
        files = self.commits.get(sha, {})
        name = url.rpartition("/")[2]
        api = "/api/models/me/mine"
        if "/resolve/" in url and name in files:
            self.send_file(name, files[name], sha)
        elif files and url.startswith(api) and "/tree/" in url:
            oids = {name: hashlib.sha1(data).hexdigest() for name, data in files.items()}
            self.send_json([{"type": "file", "path": n, "size": len(files[n]), "oid": oid} for n, oid in oids.items()])
        elif files and url in (api, f"{api}/revision/{sha}", f"{api}/revision/main"):
            self.send_json({"id": "me/mine", "sha": sha, "siblings": [{"rfilename": name} for name in files]})
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        url = f"http://{self.headers['Host']}/me/mine"
        if self.path == "/api/validate-yaml":
            self.send_json({"errors": [], "warnings": []})
        elif self.path.startswith("/api/repos/create"):
            self.send_json({"url": url, "id": "me/mine"})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.send_json({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in self.path:
            rows = [json.loads(line)["value"] for line in body.splitlines() if b'"file"' in line[:20]]
            sha = hashlib.sha1(body).hexdigest()
            self.commits[sha] = {row["path"]: base64.b64decode(row["content"]) for row in rows}
            self.send_json({"commitUrl": f"{url}/commit/{sha}", "commitOid": sha, "success": True})
        else:
            self.send_error(404)

    def send_json(self, data: Any) -> None:
        self.send_bytes(json.dumps(data).encode(), 200)

    def send_file(self, name: str, data: bytes, sha: str) -> None:
        wanted = self.headers.get("Range")
        start = int(wanted.split("=")[1].split("-")[0]) if wanted else 0
        interrupt = False
        if self.command == "GET":
            self.downloads.append(f"{name}:{start}")
            interrupt = name in self.interrupt_once
            if interrupt:
                self.interrupt_once.remove(name)
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": sha}
        self.send_bytes(data[start:], 206 if start else 200, interrupt, **headers)

    def send_bytes(self, data: bytes, status: int, interrupt: bool = False, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), "Accept-Ranges": "bytes", **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(ConnectionError):
                self.wfile.write(data[: len(data) // 2] if interrupt else data)
        self.close_connection = interrupt

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path):
    """(run convert_hf with these arguments against a local Hub, the Hub)."""
    Hub.commits, Hub.downloads, Hub.interrupt_once = {}, [], []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_x",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HOME": str(tmp_path / "home"),
        "no_proxy": "127.0.0.1",
    }

    def convert(*args: str) -> tuple[int, str, str]:
        return python("-m", "tools.convert_hf", *args, **env)

    yield convert, Hub
    server.shutdown()


def test_push_pull_and_import_by_hub_id(hub, tmp_path):
    convert, server = hub
    model = tiny_model(vocab_size=257)
    folder = export(tmp_path, model)
    code, out, error = convert("push", str(folder), "me/mine")
    assert code == 0, error
    (sha,) = server.commits
    assert out == f"pull it as me/mine@{sha}\n"
    assert server.commits[sha] == {path.name: path.read_bytes() for path in folder.iterdir()}

    # A pinned revision stays what it was, though main moves on and the connection breaks once.
    server.commits["f" * 40] = {**server.commits[sha], "README.md": b"changed", "pytorch_model.bin": b"a pickle"}
    server.interrupt_once += ["model.safetensors"]
    code, _, error = convert("pull", f"me/mine@{sha}", str(tmp_path / "pulled"))
    assert code == 0, error
    for path in folder.iterdir():
        assert (tmp_path / "pulled" / path.name).read_bytes() == path.read_bytes()
    assert sum(download.startswith("model.safetensors:") for download in server.downloads) == 2

    code, out, error = convert("import", "me/mine", str(tmp_path / "back.pt"))
    assert code == 0, error
    assert f"me/mine@{'f' * 40}" in out
    back = checkpoint.load_model(tmp_path / "back.pt")[0]
    assert_same_tensors(convert_hf.to_hf_weights(back), convert_hf.to_hf_weights(model))
    assert "pytorch_model.bin:0" not in server.downloads


def test_names_are_checked_before_the_hub_is_asked(tmp_path):
    with pytest.raises(ValueError, match="not the name of a Hub repository"):
        convert_hf.download("a/b/c")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        convert_hf.push(PushConfig(str(tmp_path), "me/mine"))


def test_without_network_push_says_that_the_hub_cannot_be_reached(tmp_path):
    folder = export(tmp_path, tiny_model(vocab_size=257))
    # HF_HUB_OFFLINE is set for all tests.
    with pytest.raises(ConnectionError, match="me/mine: the Hub cannot be reached"):
        convert_hf.push(PushConfig(str(folder), "me/mine"))


def test_a_checkpoint_does_not_make_the_machine_that_opens_it_ask_for_a_tokenizer(hub, tmp_path):
    """Whoever made the file would learn of it."""
    convert, server = hub
    server.commits["b" * 40] = {"tokenizer.json": b"{}", "README.md": b"x"}
    info = {**load_tokenizer("bytes").info(), "name": "me/mine"}
    source = write_checkpoint(tmp_path / "model.pt", tiny_model(vocab_size=257), info)
    code, _, error = convert("export", source, str(tmp_path / "hf"))
    assert code == 2
    assert "'me/mine', which the data or checkpoint was made with, is not on this machine" in error
    assert "hf download me/mine tokenizer.json" in error
    assert server.downloads == []


def test_a_published_checkpoint_of_the_original_recipe_exports_by_its_hub_id(hub, tmp_path):
    """dhlak/416m-gpt holds one .pt in the original format; here a small one stands in for it."""
    shape = ModelConfig(dim=16, n_layers=1, n_heads=2, ffn_dim=24, vocab_size=50257, seq_len=16, qk_norm=False)
    original_names = {ours: theirs for theirs, ours in seed_checkpoint.SEED_NAMES.items()}
    weights = {}
    for name, tensor in Transformer(shape).state_dict().items():
        for ours, theirs in original_names.items():
            name = name.replace(f"{ours}.", f"{theirs}.")
        weights[f"_orig_mod.{name}"] = tensor[:50257]
    config = {"n_heads": 2, "seq_len": 16}
    torch.save(
        {"model_state_dict": weights, "config": config, "step": 15258, "total_tokens": 10}, tmp_path / "original.pt"
    )
    convert, server = hub
    checkpoint_bytes = (tmp_path / "original.pt").read_bytes()
    server.commits["a" * 40] = {"checkpoint_step_15258.pt": checkpoint_bytes, "README.md": b"x"}
    code, _, error = convert("export", "me/mine", str(tmp_path / "hf"))
    if "cannot fetch the vocabulary" in error:
        pytest.skip("gpt2's vocabulary is not here")
    assert code == 0, error
    assert json.loads((tmp_path / "hf/config.json").read_text())["nano416"]["step"] == 15258
