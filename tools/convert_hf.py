"""Convert a checkpoint to a Hugging Face folder and back, and exchange such folders with the Hub.

    python -m tools.convert_hf export runs/mine hf/mine                # from a run directory, a checkpoint or a Hub id
    python -m tools.convert_hf export runs/mine hf/mine --dtype=bf16   # half the size; fp32 comes back bit for bit
    python -m tools.convert_hf import hf/mine mine.pt                  # from a folder or a Hub id: Llama and Qwen3
    python -m tools.convert_hf push hf/mine user/mine                  # needs `hf auth login`
    python -m tools.convert_hf pull user/mine@REVISION hf/mine

`export` writes a LlamaForCausalLM, or with QK-norm a Qwen3ForCausalLM: config.json, model.safetensors (in shards of at
most 5 GB), tokenizer.json, generation_config.json, and a README.md with the run's numbers and plot. transformers
(AutoModelForCausalLM, AutoTokenizer), vLLM and llama.cpp's convert_hf_to_gguf.py read it. `import` writes a checkpoint
for chat, evaluation and --init_from, and its shape as a config file for training.py.
Needs `pip install safetensors tokenizers`.
"""

import importlib.util
import itertools
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model import ROPE_SCALING, VOCAB_MULTIPLE, ModelConfig, Transformer
from nano416 import checkpoint, files
from nano416.config import format_value, from_dict, load_file, parse_value, run_cli, run_subcommand, to_dict, visible
from nano416.files import write_json, write_text
from nano416.hub import hub_errors
from nano416.tokenizer import BYTE_OF, HuggingFaceTokenizer, Tokenizer, load_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MAX_SHARD_BYTES = 5 * 10**9
ARCHITECTURES = {False: "LlamaForCausalLM", True: "Qwen3ForCausalLM"}  # by ModelConfig.qk_norm
# ModelConfig's fields by their names in config.json.
CONFIG_NAMES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
# Options of the two architectures that this network does not have, and the values that leave them unused.
UNUSED_OPTIONS = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "quantization_config": (),
}
MODEL_CARD = """---
{data}
---

# {title}

A base model, trained with nano416: it continues text.

| | |
| --- | --- |
{table}

{plot}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```
"""
# Of weights that are not quantized.
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
VOCAB_WEIGHTS = ("embed_tokens.weight", "lm_head.weight")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
OTHER_FORMATS = ("*.h5", "*.msgpack", "*.onnx", "*.gguf", "original/*")


@dataclass(frozen=True)
class ExportConfig:
    source: str  # run directory, checkpoint file or Hub id
    out_dir: str  # folder to write; must be new or empty
    dtype: Literal["fp32", "bf16"] = "fp32"  # data type of the weights

    def __post_init__(self):
        files.require_local("out_dir", self.out_dir)


@dataclass(frozen=True)
class ImportConfig:
    source: str  # Hugging Face folder, or a Hub id: USER/NAME or USER/NAME@REVISION
    out: str  # checkpoint to write, NAME.pt; NAME.json becomes the config file for training.py
    tokenizer: str | None = None  # gpt2, bytes or a tokenizer.json; none = the model's own
    seq_len: int | None = None  # a shorter context length in tokens; none = the model's

    def __post_init__(self):
        if not self.out.endswith(".pt"):
            raise ValueError(f"out must end in .pt, got {self.out}")


@dataclass(frozen=True)
class PushConfig:
    folder: str  # what `export` wrote
    repo: str  # USER/NAME, created if it does not exist
    private: bool = False  # create the repository as a private one


@dataclass(frozen=True)
class PullConfig:
    repo: str  # USER/NAME or USER/NAME@REVISION
    out_dir: str  # folder to write; a partial download is resumed


# ---- Export ----------------------------------------------------------------------------------------------------------


def export(cfg: ExportConfig) -> None:
    """Write a checkpoint as a Hugging Face folder."""
    require_packages()
    out_dir = Path(cfg.out_dir).absolute()
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ValueError(f"{cfg.out_dir} exists and is not an empty folder; choose another one, or remove it first")
    model, metadata = checkpoint.load_model(cfg.source)
    if not model.config.causal:
        raise ValueError(f"{cfg.source} is a masked-diffusion model; Llama and Qwen3 have causal attention only")
    tokenizer = load_tokenizer(metadata["tokenizer"])
    files.make_folder(out_dir.parent)
    # All or nothing: the folder gets its name once all files are in it.
    with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}.", dir=out_dir.parent) as temporary:
        folder = Path(temporary) / out_dir.name
        folder.mkdir()
        write_configs(folder, model.config, tokenizer, metadata, cfg.dtype)
        write_weights(folder, model, DTYPES[cfg.dtype])
        write_tokenizer(folder, tokenizer, model.config.seq_len)
        write_model_card(folder, model, metadata)
        os.replace(folder, out_dir)
    print(visible(f"{cfg.out_dir} loads with transformers; for llama.cpp: convert_hf_to_gguf.py {cfg.out_dir}"))


def write_weights(folder: Path, model: Transformer, dtype: torch.dtype, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write model.safetensors, or shards of at most `max_shard_bytes` and their index."""
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(to_hf_weights(model, dtype), folder, max_shard_size=max_shard_bytes)
    for path in folder.glob("*.safetensors"):
        # safetensors (0.8) lets only the owner read its files.
        path.chmod(0o666 & folder.stat().st_mode)


def to_hf_weights(model: Transformer, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights by Hugging Face's names, without the padding rows of the vocabulary."""
    weights = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.to(dtype)
        if name in VOCAB_WEIGHTS:
            # A copy: save_torch_state_dict refuses tensors that cover only part of their storage.
            tensor = tensor[: model.config.vocab_size].clone()
        weights[name if name == "lm_head.weight" else f"model.{name}"] = tensor
    return weights


def write_configs(
    folder: Path, config: ModelConfig, tokenizer: Tokenizer, metadata: Mapping[str, Any], dtype: str
) -> None:
    """Write generation_config.json and config.json, where "nano416" holds what only `import` needs."""
    # Documents are separated by the end-of-text token, so to the model it also marks the beginning of one.
    special_tokens = {"bos_token_id": tokenizer.eot_id, "eos_token_id": tokenizer.eot_id}
    for_import = {"tokenizer": tokenizer.info(), "step": metadata["step"], "tokens": metadata["tokens"]}
    torch_dtype = str(DTYPES[dtype]).removeprefix("torch.")
    hf_config = {**to_hf_config(config), **special_tokens, "torch_dtype": torch_dtype, "nano416": for_import}
    write_json(folder / "config.json", hf_config)
    write_json(folder / "generation_config.json", {**special_tokens, "pad_token_id": tokenizer.eot_id})


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """config.json of a ModelConfig: architecture and shape."""
    architecture = ARCHITECTURES[config.qk_norm]
    scaling = None
    if config.rope_scaling:
        # transformers insists on an integer here.
        original = int(config.rope_scaling["original_max_position_embeddings"])
        scaling = {"rope_type": "llama3", **config.rope_scaling, "original_max_position_embeddings": original}
    return {
        "architectures": [architecture],
        "model_type": architecture.removesuffix("ForCausalLM").lower(),
        **{theirs: getattr(config, ours) for ours, theirs in CONFIG_NAMES.items()},
        "hidden_act": "silu",
        "attention_bias": False,
        # transformers < 5, vLLM and llama.cpp read the first two, transformers 5 the third.
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": config.rope_theta},
    }


def write_tokenizer(folder: Path, tokenizer: Tokenizer, seq_len: int) -> None:
    """Write tokenizer.json and tokenizer_config.json that encode text to the same tokens."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        backend = tokenizer.backend
        text = tokenizer.json_text
    else:
        backend = convert_tiktoken(tokenizer)
        text = backend.to_str()
    write_text(folder / "tokenizer.json", text)
    eot = backend.id_to_token(tokenizer.eot_id)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": seq_len,
        "bos_token": eot,
        "eos_token": eot,
        "pad_token": eot,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", tokenizer_config)


def convert_tiktoken(tokenizer: Tokenizer) -> Any:
    """A tiktoken encoding as the byte-level BPE of the package `tokenizers`, which gives the same tokens."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    encoding = tokenizer.encoding
    ranks = {token: rank for rank, token in tokenizer.vocabulary()}
    special_tokens = {text: encoding.encode_single_token(text) for text in encoding.special_tokens_set}
    character_of = {byte: character for character, byte in BYTE_OF.items()}

    def spell(token: bytes) -> str:
        return "".join(character_of[byte] for byte in token)

    merges = []
    for token in ranks:
        if len(token) > 1:
            left, right = last_merge(token, ranks)
            merges.append((spell(left), spell(right)))
    vocab = {spell(token): rank for token, rank in ranks.items()} | special_tokens
    backend = Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if encoding.name in ("gpt2", "r50k_base", "p50k_base"):
        # ByteLevel has GPT-2's pattern built in.
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif merges:
        # $ is the end of the text in tiktoken, but the end of a line in tokenizers. tiktoken (0.14) has no public name
        # for the pattern.
        pattern = re.sub(r"(?<!\\)\$", r"\\z", encoding._pat_str)
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    else:
        # Without merges each byte is a token, however the text is split.
        backend.pre_tokenizer = byte_level
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in sorted(special_tokens)])
    return backend


def last_merge(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """The two tokens whose merge makes `token`: its byte-pair encoding, stopped before the last merge."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        # A pair that is not a token, or is a later one, cannot have been merged on the way.
        pair_ranks = [ranks.get(a + b, ranks[token]) for a, b in itertools.pairwise(parts)]
        i = pair_ranks.index(min(pair_ranks))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def write_model_card(folder: Path, model: Transformer, metadata: Mapping[str, Any]) -> None:
    """Write README.md: a table of what the run recorded, and its plot."""
    from huggingface_hub import ModelCard, ModelCardData

    run_dir = Path(metadata["path"]).parent
    # An imported checkpoint has no training options.
    options = {name: table for name, table in metadata["config"].items() if isinstance(table, dict)}
    sources = parse_value(options.get("data", {}).get("sources", {}), dict[str, float], "sources")
    rows = {
        "parameters": f"{model.config.num_params():,}",
        "context": f"{model.config.seq_len} tokens",
        "tokenizer": metadata["tokenizer"]["name"],
        "step": f"{metadata['step']:,}",
        "tokens": f"{metadata['tokens']:,}",
        "data": format_value({Path(name).name: weight for name, weight in sources.items()}),
        "optimizer": options.get("optim", {}).get("optimizer"),
    }
    summary_file = run_dir / "final_metrics.json"
    summary = load_file(str(summary_file)) if summary_file.exists() else {}
    # The summary describes the run's last checkpoint, which need not be this one.
    if summary.get("step") == metadata["step"]:
        for name, value in summary.items():
            if isinstance(value, int | float | str):
                rows.setdefault(name, f"{value:.6g}" if isinstance(value, float) else value)
    plot = ""
    if (run_dir / "final_metrics.png").exists():
        shutil.copy(run_dir / "final_metrics.png", folder)
        plot = "![training curves](final_metrics.png)\n"
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=["nano416"])
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value not in (None, ""))
    card = MODEL_CARD.format(data=data.to_yaml(), title=folder.name, table=table, plot=plot)
    ModelCard(card).save(folder / "README.md")


# ---- Import ----------------------------------------------------------------------------------------------------------


def import_(cfg: ImportConfig) -> None:
    """Write a Hugging Face model as a checkpoint."""
    require_packages()
    out = Path(cfg.out)
    config_file = out.with_suffix(".json")
    for path in (out, config_file):
        if path.exists():
            raise ValueError(f"{path} exists; choose another name, or remove it first")
    folder = find_folder(cfg.source)
    config_path = find_file(folder, "config.json") or folder / "config.json"
    hf_config = load_file(str(config_path))
    try:
        config = from_hf_config(hf_config, cfg.seq_len)
        exported = optional(hf_config, "nano416", dict) or {}
        step = parse_value(exported.get("step", 0), int, "nano416.step")
        tokens = parse_value(exported.get("tokens", 0), int, "nano416.tokens")
    except ValueError as error:
        raise ValueError(f"{config_path}: {str(error)[:300]}") from error
    weights = from_hf_weights(read_weights(folder), config)
    if config.n_layers > len(weights):
        # A config.json may claim thousands of layers, which take seconds to build even on the meta device.
        raise ValueError(f"{folder} has {len(weights)} tensors, too few for {config.n_layers} layers")
    with torch.device("meta"):
        expected = Transformer(config).state_dict()
    checkpoint.check_shapes(weights, expected, folder)
    state = {
        "format": checkpoint.FORMAT,
        "step": step,
        "tokens": tokens,
        "config": {"model": to_dict(config)},
        "tokenizer": find_tokenizer(cfg, folder, exported.get("tokenizer"), config.vocab_size),
        "model": weights,
        "metrics": {},
    }
    files.make_folder(out.parent)
    checkpoint.write(out, state)
    write_json(config_file, {"model": to_dict(config)})
    print(visible(f"python chat.py {shlex.quote(str(out))}"))
    print(visible(f"python training.py {shlex.quote(str(config_file))} --init_from={shlex.quote(str(out))}"))


def find_folder(source: str) -> Path:
    """The folder `source`, or the download of that name from the Hub."""
    path = Path(source)
    if path.is_dir():
        return path
    # hf/typo is hardly a repository of the user "hf" if a folder hf/ is here.
    if path.parent.exists():
        raise ValueError(f"no folder {source}; give a folder with a config.json, or a Hub id: USER/NAME")
    return download(source)


def find_file(folder: Path, name: str) -> Path | None:
    """A file of a folder; None if it is absent. Raises ValueError for what only looks like a file.

    Reading a pipe or /dev/zero, which a link may lead to, would never end.
    """
    path = folder / name
    if os.path.lexists(path) and not path.is_file():
        raise ValueError(f"{path} is not a file; download it again")
    return path if path.exists() else None


def optional(hf_config: Mapping[str, Any], name: str, kind: type) -> Any:
    """The value of an option, None if it is absent. Raises ValueError if it is not of type `kind`."""
    value = hf_config.get(name)
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{name} expects a {kind.__name__}, got {value!r}")
    return value


def from_hf_config(hf_config: Mapping[str, Any], seq_len: int | None = None) -> ModelConfig:
    """ModelConfig of a config.json. Raises ValueError naming what this network cannot do."""
    architecture = (optional(hf_config, "architectures", list) or ["none"])[0]
    if architecture not in ARCHITECTURES.values():
        supported = " and ".join(ARCHITECTURES.values())
        raise ValueError(f"architecture {architecture} is not supported; supported are {supported}")
    for name, values in UNUSED_OPTIONS.items():
        if hf_config.get(name) is not None and hf_config[name] not in values:
            raise ValueError(f"{name} = {str(hf_config[name])[:60]} is not supported by nano416's network")
    rope = optional(hf_config, "rope_parameters", dict) or optional(hf_config, "rope_scaling", dict) or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise ValueError(f"rotary positions of type {rope_type!r} are not supported; supported are default and llama3")
    shape = {ours: hf_config[theirs] for ours, theirs in CONFIG_NAMES.items() if hf_config.get(theirs) is not None}
    # transformers' default; ours is to tie them.
    shape.setdefault("tie_embeddings", False)
    shape["qk_norm"] = architecture == ARCHITECTURES[True]
    shape["rope_theta"] = rope.get("rope_theta", hf_config.get("rope_theta", 10000.0))
    if rope_type == "llama3":
        shape["rope_scaling"] = {name: rope[name] for name in ROPE_SCALING if name in rope}
    required = ["dim", "n_layers", "n_heads", "ffn_dim", "vocab_size", "seq_len"]
    if shape["qk_norm"]:
        # Llama derives these from the others as we do; Qwen3's defaults are numbers.
        required += ["n_kv_heads", "head_dim"]
    missing = [CONFIG_NAMES[name] for name in required if not shape.get(name)]
    if missing:
        raise ValueError(f"{', '.join(missing)} is missing")
    longest = parse_value(shape["seq_len"], int, CONFIG_NAMES["seq_len"])
    if seq_len is not None and seq_len > longest:
        raise ValueError(f"--seq_len={seq_len} exceeds the model's context, max_position_embeddings {longest}")
    return from_dict(ModelConfig, {**shape, "seq_len": seq_len or longest})


def from_hf_weights(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Weights by our names, in their data type, with the vocabulary padded as `Transformer` pads it."""
    ours = {}
    for name, tensor in weights.items():
        if name.endswith("rotary_emb.inv_freq"):
            # Old files hold the rotary frequencies, which follow from the shape.
            continue
        if name == "lm_head.weight" and config.tie_embeddings:
            continue
        if tensor.dtype not in WEIGHT_DTYPES or tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"{name} is not a floating-point tensor; only unquantized models can be imported")
        name = name.removeprefix("model.")
        # One that is not a matrix has a wrong shape, which check_shapes reports.
        if name in VOCAB_WEIGHTS and tensor.dim() == 2:
            tensor = F.pad(tensor, (0, 0, 0, -len(tensor) % VOCAB_MULTIPLE))
        ours[name] = tensor
    return ours


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, memory mapped. Pickles are read only where there are no safetensors."""
    for name, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_pickle)):
        path = find_file(folder, name)
        if path:
            return read(path)
        index = find_file(folder, f"{name}.index.json")
        if index:
            weights = {}
            for path in shard_paths(index):
                weights.update(read(path))
            return weights
    raise ValueError(
        f"{folder} holds no weights: neither model.safetensors nor pytorch_model.bin, nor an index of them"
    )


def shard_paths(index: Path) -> list[Path]:
    """The files that an index of shards lists, which are in the same folder. Raises ValueError."""
    weight_map = load_file(str(index)).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} has no weight_map of tensor names to file names; download it again")
    names = sorted(set(weight_map.values()))
    # os.path.isfile, since Path.is_file raises OSError for a name that is too long.
    missing = [name for name in names if Path(name).name != name or not os.path.isfile(index.parent / name)]
    if missing:
        raise ValueError(
            f"{index.parent} lacks {missing[0][:100]} ({len(missing)} of {len(names)} shards); download it again"
        )
    return [index.parent / name for name in names]


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, memory mapped. Raises ValueError if the file is damaged."""
    import safetensors.torch

    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, KeyError, RuntimeError) as error:
        # The last two for data types and sizes that torch does not know.
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) is not a complete safetensors file: {error}"
        ) from error


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pytorch_model.bin. No code in it is run: anything but tensors is refused with ValueError."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch.load raises a dozen kinds for a damaged archive.
        raise ValueError(f"{path} is damaged or holds more than tensors; use a safetensors file instead") from error
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in weights.items()
    ):
        raise ValueError(f"{path} holds more than tensors and their names; use a safetensors file instead")
    return weights


def find_tokenizer(cfg: ImportConfig, folder: Path, exported: Any, vocab_size: int) -> dict[str, Any]:
    """info() of the tokenizer: --tokenizer, or the one that our own export names, or tokenizer.json.

    exported: the info() that `export` left in config.json, if any.
    """
    name = exported.get("name") if isinstance(exported, dict) else None
    is_built_in = isinstance(name, str) and "/" not in name and not name.endswith(".json")
    if cfg.tokenizer is None and is_built_in:
        # Not loaded, which may need the network.
        size = parse_value(exported.get("vocab_size"), int, "nano416.tokenizer.vocab_size")
        eot_id = parse_value(exported.get("eot_id"), int, "nano416.tokenizer.eot_id")
        if not 0 <= eot_id < size <= vocab_size:
            raise ValueError(f"{folder / 'config.json'}: nano416.tokenizer does not fit a vocabulary of {vocab_size}")
        return exported
    if cfg.tokenizer is None and not find_file(folder, "tokenizer.json"):
        raise ValueError(f"{folder} has no tokenizer.json, the only kind that is read; give --tokenizer=gpt2 or a path")
    is_local = Path(cfg.source).is_dir()
    own = str((folder / "tokenizer.json").resolve()) if is_local else cfg.source.partition("@")[0]
    info = load_tokenizer(cfg.tokenizer or own).info()
    if info["vocab_size"] > vocab_size:
        raise ValueError(
            f"tokenizer {info['name']} has {info['vocab_size']} tokens, more than the model's {vocab_size}; "
            "give the model's own tokenizer with --tokenizer"
        )
    return info


def require_packages() -> None:
    """Raise ValueError unless the optional packages of this tool are installed."""
    for name in ("safetensors", "tokenizers"):
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"Hugging Face folders need a package that is not installed: pip install {name}")


# ---- The Hub ---------------------------------------------------------------------------------------------------------


def push(cfg: PushConfig) -> None:
    """Upload an exported folder to the Hub as one commit."""
    from huggingface_hub import HfApi

    if not (Path(cfg.folder) / "config.json").exists():
        raise ValueError(f"{cfg.folder} has no config.json; make it with `python -m tools.convert_hf export`")
    with hub_errors(cfg.repo):
        # None leaves the choice to the settings of the user's organization.
        HfApi().create_repo(cfg.repo, private=cfg.private or None, exist_ok=True)
        commit = HfApi().upload_folder(repo_id=cfg.repo, folder_path=cfg.folder, commit_message="nano416")
    print(visible(f"pull it as {cfg.repo}@{commit.oid}"))


def pull(cfg: PullConfig) -> None:
    """Download a model from the Hub."""
    download(cfg.repo, cfg.out_dir)


def download(repo: str, local_dir: str | None = None) -> Path:
    """Folder with the model USER/NAME[@REVISION], at the commit that this name means now."""
    from huggingface_hub import HfApi, snapshot_download

    name, _, revision = repo.partition("@")
    with hub_errors(repo):
        info = HfApi().model_info(name, revision=revision or None)
        ignored = [*OTHER_FORMATS]
        if any(file.rfilename.endswith(".safetensors") for file in info.siblings or []):
            ignored += PICKLES
        folder = snapshot_download(name, revision=info.sha, local_dir=local_dir, ignore_patterns=ignored)
    print(visible(f"{name}@{info.sha} is in {folder}"))
    return Path(folder)


if __name__ == "__main__":
    run_cli(lambda: run_subcommand(export, import_, push, pull))
