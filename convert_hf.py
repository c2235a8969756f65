"""Checkpoint to Hugging Face folder and back, to the Hub and back.

    python convert_hf.py export runs/mine hf/mine                  # a run directory, a checkpoint file or a Hub id
    python convert_hf.py export runs/mine hf/mine --dtype=bf16     # half the size; fp32 comes back bit by bit
    python convert_hf.py import hf/mine mine.pt                    # a folder or a Hub id: Llama and Qwen3 models
    python convert_hf.py push hf/mine user/mine                    # needs `hf auth login`
    python convert_hf.py pull user/mine@REVISION hf/mine

What `export` writes loads in transformers (AutoModelForCausalLM, AutoTokenizer); vLLM and llama.cpp's
convert_hf_to_gguf.py read the same layout. It is LlamaForCausalLM, or with QK-norm Qwen3ForCausalLM; config.json, model.safetensors (in parts of
at most 5 GB), tokenizer.json, generation_config.json, and a README.md with the run's numbers and plot. What `import`
writes is a checkpoint: for eval, chat, and --init_from. The files are read and written here, without transformers.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from config import ArgumentParser, differences, from_dict, run, to_dict


def parse(argv: list[str] | None = None) -> Any:
    """The command line. Runs before torch is imported, which takes seconds."""
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="export|import|push|pull")
    for name, source, target in (
        ("export", "CHECKPOINT", "OUT_DIR"),
        ("import", "HF_DIR_OR_ID", "OUT.pt"),
        ("push", "HF_DIR", "USER/NAME"),
        ("pull", "USER/NAME[@REVISION]", "OUT_DIR"),
    ):
        command = commands.add_parser(name)
        command.add_argument("source", metavar=source)
        command.add_argument("target", metavar=target)
        if name == "export":
            command.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights [fp32]")
        elif name == "import":
            command.add_argument("--tokenizer", help="gpt2, bytes, a tokenizer.json [that of the folder]")
            command.add_argument("--seq_len", type=int, help="a shorter context [the model's]")
        elif name == "push":
            command.add_argument("--private", action="store_true", help="create the repository for your eyes only")
    return parser.parse_args(argv)


DTYPES = ("fp32", "bf16")
if __name__ == "__main__":
    ARGS = parse()

import torch
from torch import Tensor

import checkpoint
from model import ROPE_SCALING, VOCAB_MULTIPLE, ModelConfig, Transformer
from shards import BYTE_OF, Tokenizer, load_tokenizer

SHARD_BYTES = 5_000_000_000
TORCH_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
FAMILIES = {"LlamaForCausalLM": False, "Qwen3ForCausalLM": True}  # architecture: has QK-norm
SHAPE = {  # ModelConfig: config.json
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
ABSENT = {"tie_embeddings": False, "norm_eps": 1e-6}  # what a config.json without them means to transformers
HARMLESS = {  # other switches of the two families, and the values that change nothing; anything else is refused
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "quantization_config": (),
}
FORMER = re.compile(r".*rotary_emb\.inv_freq")  # derived from the shape; old files hold it


# ---- Export ----------------------------------------------------------------------------------------------------------


def export(source: str, out_dir: str | Path, dtype: str = "fp32", shard_bytes: int = SHARD_BYTES) -> None:
    """Write a checkpoint as a Hugging Face folder; all or nothing. Raises ValueError."""
    out_dir = Path(out_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ValueError(f"{out_dir} exists and is not an empty folder; choose another OUT_DIR, or remove it first")
    model, meta = checkpoint.load_model(source)
    if not model.config.causal:
        raise ValueError(f"{source} sees the text on both sides (causal = false), which Llama and Qwen3 models do not")
    tokenizer = load_tokenizer(meta["tokenizer"])
    out_dir.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}.", dir=out_dir.absolute().parent) as folder:
        partial = Path(folder) / "hf"
        partial.mkdir()
        write_folder(partial, model, tokenizer, meta, dtype, shard_bytes)
        write_card(partial, model, meta)
        os.replace(partial, out_dir)


def write_folder(
    folder: Path, model: Transformer, tokenizer: Tokenizer, meta: Mapping[str, Any], dtype: str = "fp32",
    shard_bytes: int = SHARD_BYTES,
) -> None:  # fmt: skip
    """Weights, tokenizer and configuration of a model, as transformers reads them."""
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    weights = {name: tensor.to(kind) for name, tensor in to_hf(model).items()}
    write_weights(folder, weights, shard_bytes)
    write_tokenizer(folder, tokenizer, model.config.seq_len)
    ends = {"bos_token_id": tokenizer.eot_id, "eos_token_id": tokenizer.eot_id}  # documents begin after an end
    facts = {"tokenizer": tokenizer.info(), **{key: meta.get(key, 0) for key in ("step", "tokens")}}
    described = {**hf_config(model.config), **ends, "torch_dtype": str(kind).split(".")[1], "nano416": facts}
    write_json(folder / "config.json", described)
    write_json(folder / "generation_config.json", {**ends, "pad_token_id": tokenizer.eot_id})


def to_hf(model: Transformer) -> dict[str, Tensor]:
    """Hugging Face's names to weights, without the padding of the vocabulary."""
    weights = {}
    for name, tensor in model.state_dict().items():
        cut = tensor[: model.config.vocab_size] if name in ("embed_tokens.weight", "lm_head.weight") else tensor
        weights[name if name.startswith("lm_head") else f"model.{name}"] = cut
    return weights


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """config.json of a shape; the rotary settings twice, as transformers 5 and as everything older reads them."""
    architecture = {qk_norm: name for name, qk_norm in FAMILIES.items()}[config.qk_norm]
    scaling = None
    if config.rope_scaling:
        context = int(config.rope_scaling["original_max_position_embeddings"])  # the one that has to be an integer
        scaling = {"rope_type": "llama3", **config.rope_scaling, "original_max_position_embeddings": context}
    return {
        "architectures": [architecture],
        "model_type": architecture.removesuffix("ForCausalLM").lower(),
        **{theirs: getattr(config, ours) for ours, theirs in SHAPE.items()},
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": config.rope_theta},
    }


def write_weights(folder: Path, weights: dict[str, Tensor], shard_bytes: int = SHARD_BYTES) -> None:
    """model.safetensors, or parts of at most `shard_bytes` (one tensor at least) and their index."""
    parts: list[dict[str, Tensor]] = [{}]
    for name, tensor in weights.items():
        if parts[-1] and sum(t.nbytes for t in parts[-1].values()) + tensor.nbytes > shard_bytes:
            parts.append({})
        parts[-1][name] = tensor
    if len(parts) == 1:
        return write_safetensors(folder / "model.safetensors", weights)
    files = [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    for file, part in zip(files, parts, strict=True):
        write_safetensors(folder / file, part)
    where = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    total = sum(tensor.nbytes for tensor in weights.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def write_safetensors(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Eight bytes of header length, a JSON header, the tensors' bytes; github.com/huggingface/safetensors says it all."""
    kinds, at = {kind: name for name, kind in TORCH_TYPES.items()}, 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, tensor in weights.items():
        place = [at, at := at + tensor.nbytes]
        header[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in weights.values():
            tensor.detach().cpu().flatten().view(torch.uint8).numpy().tofile(file)


def write_tokenizer(folder: Path, tokenizer: Tokenizer, seq_len: int) -> None:
    """tokenizer.json and tokenizer_config.json that give the same tokens."""
    encoding = tokenizer._encoding
    text = getattr(encoding, "text", None) or json.dumps(tokenizer_json(encoding), ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    added = json.loads(text)["added_tokens"]
    end = next(token["content"] for token in added if token["id"] == tokenizer.eot_id)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": seq_len}
    ends = {"bos_token": end, "eos_token": end, "pad_token": end}
    write_json(folder / "tokenizer_config.json", {**settings, **ends, "clean_up_tokenization_spaces": False})


def tokenizer_json(encoding: Any) -> dict[str, Any]:
    """A tiktoken encoding as Hugging Face's byte-level BPE."""
    ranks, character = encoding._mergeable_ranks, {byte: c for c, byte in BYTE_OF.items()}

    def spell(token: bytes) -> str:
        return "".join(character[byte] for byte in token)

    merges = [[spell(half) for half in halves(token, ranks)] for token in sorted(ranks, key=ranks.get) if token[1:]]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": i, "content": text, **special} for text, i in encoding._special_tokens.items()]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    pattern = re.sub(r"(?<!\\)\$", r"\\z", encoding._pat_str)  # there $ is the end of a line
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    splits = [split, byte_level] if merges else [byte_level]  # single bytes are what they are, however cut
    if encoding.name in ("gpt2", "r50k_base", "p50k_base"):  # the pattern that ByteLevel itself knows
        splits = [{**byte_level, "use_regex": True}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "normalizer": None,
        "pre_tokenizer": splits[0] if len(splits) == 1 else {"type": "Sequence", "pretokenizers": splits},
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "ignore_merges": True, "merges": merges}
        | {"vocab": {spell(token): rank for token, rank in ranks.items()} | encoding._special_tokens},
    }


def halves(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """The two tokens whose merge makes `token`: byte-pair encoding of it, stopped before the last merge."""
    parts, limit = [token[i : i + 1] for i in range(len(token))], ranks[token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, limit) for a, b in itertools.pairwise(parts)]
        at = min(range(len(pairs)), key=pairs.__getitem__)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def write_card(folder: Path, model: Transformer, meta: Mapping[str, Any]) -> None:
    """README.md: what the run itself recorded, and its plot."""
    run_dir, config = Path(meta["path"]).parent, meta["config"]
    summary, plot = run_dir / "final_metrics.json", run_dir / "final_metrics.png"
    facts: dict[str, Any] = {"parameters": f"{model.num_params():,}", "context": f"{model.config.seq_len} tokens"}
    facts |= {"tokenizer": meta["tokenizer"]["name"], "step": f"{meta['step']:,}", "tokens": f"{meta['tokens']:,}"}
    if sources := config.get("data", {}).get("sources"):
        facts["data"] = ", ".join(f"{Path(name).name} ({weight:g})" for name, weight in sources.items())
    if optim := config.get("optim"):
        rate = "" if optim["max_lr"] is None else f"max_lr {optim['max_lr']:g}, "
        facts["optimizer"] = f"{optim['optimizer']}, {rate}{optim['schedule']}"
    if summary.exists():
        numbers = json.loads(summary.read_text(encoding="utf-8"))
        if numbers.get("step") == meta["step"]:  # of this checkpoint, not of a later one
            facts = {
                key: f"{value:.6g}" if isinstance(value, float) else value for key, value in numbers.items()
            } | facts
    rows = "".join(f"| {key} | {value} |\n" for key, value in facts.items() if value is not None)
    picture = "![the run](final_metrics.png)\n\n" if plot.exists() else ""
    if picture:
        shutil.copy(plot, folder)
    use = "AutoModelForCausalLM.from_pretrained(FOLDER)\ntokenizer = AutoTokenizer.from_pretrained(FOLDER)"
    (folder / "README.md").write_text(
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [nano416]\n---\n\n"
        f"# {run_dir.name}\n\nA base model, trained with nano416: it continues text.\n\n| | |\n| --- | --- |\n{rows}\n"
        f"{picture}```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\nmodel = {use}\n```\n",
        encoding="utf-8",
    )


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


# ---- Import ----------------------------------------------------------------------------------------------------------


def import_hf(source: str, out: str | Path, tokenizer: str | None = None, seq_len: int | None = None) -> ModelConfig:
    """Write a Hugging Face model as a checkpoint, its weights as they are; returns its shape. Raises ValueError."""
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} exists; choose another OUT.pt, or remove it first")
    folder = Path(source) if Path(source).is_dir() else fetch(source)
    described = read_json(folder / "config.json")
    config = model_config(described, folder, seq_len)
    weights = from_hf(read_weights(folder), config)
    with torch.device("meta"):
        checkpoint.check_shapes(weights, Transformer(config).state_dict(), folder)
    facts = described.get("nano416", {})
    state = {
        "format": checkpoint.FORMAT,
        "step": facts.get("step", 0),
        "tokens": facts.get("tokens", 0),
        "config": {"model": to_dict(config)},
        "tokenizer": find_tokenizer(source, folder, tokenizer, facts.get("tokenizer"), config),
        "model": weights,
        "metrics": {},
    }
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write(out, state)
    return config


def model_config(described: Mapping[str, Any], folder: Path, seq_len: int | None = None) -> ModelConfig:
    """Our shape of a config.json. Raises ValueError that names what this network cannot do."""
    architectures = described.get("architectures") or ["none"]
    if architectures[0] not in FAMILIES:
        raise ValueError(f"{folder} holds a {architectures[0]}; supported are {' and '.join(FAMILIES)}")
    for name, allowed in HARMLESS.items():
        if described.get(name) is not None and described[name] not in allowed:
            raise ValueError(f"{folder} has {name} = {str(described[name])[:60]}, which nano416's network cannot do")
    rope = described.get("rope_parameters") or described.get("rope_scaling") or {}
    kind, qk_norm = rope.get("rope_type", rope.get("type", "default")), FAMILIES[architectures[0]]
    if kind not in ("default", "llama3"):
        raise ValueError(f"{folder} has {kind!r} rotary positions; supported are 'default' and 'llama3'")
    shape = {ours: described.get(theirs, ABSENT.get(ours)) for ours, theirs in SHAPE.items()}
    needed = ["dim", "n_layers", "n_heads", "ffn_dim", "vocab_size", "seq_len"]
    needed += ["n_kv_heads", "head_dim"] if qk_norm else []  # Llama derives them, Qwen3 has values of its own
    if missing := [SHAPE[ours] for ours in needed if not shape[ours]]:
        raise ValueError(f"{folder / 'config.json'} lacks {', '.join(missing)}")
    if seq_len is not None and seq_len > shape["seq_len"]:
        raise ValueError(f"seq_len ({seq_len}) is longer than the context of the model, {shape['seq_len']}")
    shape |= {"rope_theta": rope.get("rope_theta", described.get("rope_theta", 10000.0)), "qk_norm": qk_norm}
    try:
        if kind == "llama3":
            shape["rope_scaling"] = {name: rope[name] for name in ROPE_SCALING}
        return from_dict(ModelConfig, {**shape, "seq_len": seq_len or shape["seq_len"]})
    except (KeyError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'} describes no model that nano416 knows: {error}") from error


def from_hf(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our names and padded vocabulary for Hugging Face's weights."""
    ours = {}
    for name, tensor in weights.items():
        if FORMER.fullmatch(name) or (name == "lm_head.weight" and config.tie_embeddings):
            continue
        name = name.removeprefix("model.")
        if name in ("embed_tokens.weight", "lm_head.weight"):
            tensor = torch.nn.functional.pad(tensor, (0, 0, 0, -len(tensor) % VOCAB_MULTIPLE))
        ours[name] = tensor
    return ours


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder. A pickle is opened only where there are no safetensors, and without running its code."""
    for stem, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_pickle)):
        index = folder / f"{stem}.index.json"
        if (folder / stem).exists():
            return read(folder / stem)
        if index.exists():
            files = sorted(set(read_json(index).get("weight_map", {}).values()))
            if missing := [file for file in files if Path(file).name != file or not (folder / file).exists()]:
                raise ValueError(f"{folder} lacks {missing[0]} ({len(missing)} of {len(files)} parts); fetch it again")
            return {name: tensor for file in files for name, tensor in read(folder / file).items()}
    raise ValueError(f"{folder} holds no weights: neither model.safetensors nor its index, nor pytorch_model.bin")


def read_pickle(path: Path) -> dict[str, Tensor]:
    """pytorch_model.bin, tensors only."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive raises a dozen kinds
        raise ValueError(f"{path} is damaged, or holds more than tensors; take safetensors instead") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file. Raises ValueError unless the header describes exactly what is there."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            assert length <= size - 8, f"a header of {length:,} bytes"
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        assert max((place["data_offsets"][1] for place in header.values()), default=0) + 8 + length == size, (
            "its length"
        )
        data = torch.from_file(str(path), size=size, dtype=torch.uint8)[8 + length :]  # memory mapped
        return {name: _tensor(data, **place) for name, place in header.items()}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, AssertionError, RuntimeError) as error:
        raise ValueError(f"{path} ({size:,} bytes) is no safetensors file, or not all of it: {error}") from error


def _tensor(data: Tensor, dtype: str, shape: list[int], data_offsets: list[int]) -> Tensor:
    start, end = data_offsets
    assert 0 <= start <= end <= len(data), f"bytes {start} to {end}"
    return data[start:end].clone().view(TORCH_TYPES[dtype]).view(shape)  # a copy: no view into the whole file


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; give a folder that transformers can load") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} is no JSON object")
    return data


def find_tokenizer(
    source: str, folder: Path, name: str | None, known: Mapping[str, Any] | None, config: ModelConfig
) -> dict[str, Any]:
    """What names the tokenizer in the checkpoint: the one given, that of our own export, or the folder's tokenizer.json."""
    if name is None and known and "/" not in known["name"] and not known["name"].endswith(".json"):
        return dict(known)
    if name is None and not (folder / "tokenizer.json").exists():
        raise ValueError(f"{folder} has no tokenizer.json, the one kind that is read; give --tokenizer=gpt2, or a path")
    own = str((folder / "tokenizer.json").resolve()) if Path(source).is_dir() else source.split("@")[0]
    info = load_tokenizer(name or own).info()
    if config.vocab_size and info["vocab_size"] > config.vocab_size:
        raise ValueError(
            f"the tokenizer {info['name']} has {info['vocab_size']} tokens, the model {config.vocab_size}: not its own; "
            "give the right one with --tokenizer"
        )
    return info


def training_options(config: ModelConfig) -> str:
    """The options of training.py that make this shape, for --init_from."""
    lines = differences(to_dict(ModelConfig()), to_dict(config))
    return " ".join(f"--{line.partition(':')[0]}={line.partition(' -> ')[2]}" for line in lines)


# ---- The Hub ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def reaching(what: str) -> Iterator[None]:
    """What goes wrong with the Hub, as one line."""
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{what} is no name of a Hub repository; write USER/NAME or USER/NAME@REVISION") from error
    except Exception as error:  # the hub client's, its HTTP library's
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is None:
            raise ValueError(f"{what}: the Hub cannot be reached, and no such folder is here ({error})") from error
        raise ValueError(f"{what}: the Hub says {status}; check the name, and `hf auth login` for your own") from error


def push(folder: str, repo: str, private: bool = False) -> str:
    """Upload an exported folder as one commit; returns its id. Parts that an interrupted upload sent are not sent again."""
    from huggingface_hub import HfApi

    if not (Path(folder) / "config.json").exists():
        raise ValueError(f"{folder} has no config.json; make it with `convert_hf.py export`")
    with reaching(repo):
        HfApi().create_repo(repo, private=private or None, exist_ok=True)
        return HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message="nano416").oid


def fetch(repo: str, local_dir: str | None = None) -> Path:
    """The folder of a Hub model, at the commit that USER/NAME or USER/NAME@REVISION names now; goes on where it stopped."""
    from huggingface_hub import HfApi, snapshot_download

    name, _, revision = repo.partition("@")
    with reaching(repo):
        info = HfApi().model_info(name, revision=revision or None)
        files = [file.rfilename for file in info.siblings or []]
        safe = any(file.endswith(".safetensors") for file in files)
        unwanted = ["*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt"] if safe else []  # no pickles beside safetensors
        unwanted += ["*.h5", "*.msgpack", "*.onnx", "*.gguf", "original/*"]
        folder = snapshot_download(name, revision=info.sha, local_dir=local_dir, ignore_patterns=unwanted)
    print(f"{name}@{info.sha} in {folder}")
    return Path(folder)


def main(args: Any) -> None:
    """Command line."""
    if args.command == "export":
        export(args.source, args.target, args.dtype)
        print(f"{args.target} loads with transformers; for llama.cpp: convert_hf_to_gguf.py {args.target}")
    elif args.command == "import":
        config = import_hf(args.source, args.target, args.tokenizer, args.seq_len)
        print(f"python chat.py {args.target}\npython training.py --init_from={args.target} {training_options(config)}")
    elif args.command == "push":
        print(f"pull it as {args.target}@{push(args.source, args.target, args.private)}")
    else:
        fetch(args.source, args.target)


if __name__ == "__main__":
    run(lambda: main(ARGS))
