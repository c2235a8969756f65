"""HellaSwag accuracy of a checkpoint (Zellers et al. 2019, arXiv:1905.07830): which of four endings continues a text?

    python eval_hellaswag.py --checkpoint checkpoints                       # all 10,042 validation items
    python eval_hellaswag.py --checkpoint checkpoints --num_examples 1000 --output scores.json
    python eval_hellaswag.py --checkpoint checkpoints --all                 # every checkpoint of the run, and a plot
    python eval_hellaswag.py --checkpoint hf:openai-community/gpt2          # a model of the Hub, or hf:FOLDER
    python eval_hellaswag.py --checkpoint runs/mdm --likelihood=counts --num_mc=128   # masked diffusion, Monte Carlo
    python eval_hellaswag.py --compare=a.json,b.json                        # is b better than a?
    torchrun --standalone --nproc_per_node=8 eval_hellaswag.py --checkpoint checkpoints

Reads the items from --data; the default file is downloaded first if it is missing. Text, tokens and scores are exactly
those of EleutherAI's lm-evaluation-harness: acc picks the ending with the highest log-likelihood, acc_norm divides it
by the ending's length in characters first. The token mean (log-likelihood per token) is the rule of build-nanogpt and
of the original 416M recipe.

A masked-diffusion checkpoint scores an ending by the chain rule (each token given those before it, with the rest
masked: exact, one forward pass per token), or by Monte Carlo over masks (a lower bound; see nano416/diffusion.py).
"""

# Tensor dimensions: B batch, T tokens, V vocabulary

import hashlib
import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple
from urllib.request import urlopen

import numpy as np
import torch
from torch import Tensor, nn

from model import Transformer
from nano416 import checkpoint, distributed, files, metrics
from nano416.config import parse_config, run_cli, visible
from nano416.devices import device_name, pick_device
from nano416.hub import hub_errors
from nano416.scoring import Row, ScoringConfig, is_bidirectional, max_row_length, pack_context, score_rows
from nano416.tokenizer import Tokenizer

DATA = "data/hellaswag_val.jsonl"
URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
# The same items as a dataset of the Hub, for networks that block GitHub.
HUB = "Rowan/hellaswag"
N_VALIDATION = 10_042
RULES = ("acc", "acc_norm", "acc_token_mean")
# acc and acc_norm as lm-evaluation-harness reports them.
REFERENCES = (("chance", 25.0, 25.0), ("GPT-2 124M", 28.92, 31.14))


@dataclass(frozen=True)
class EvalConfig:
    """HellaSwag of a checkpoint."""

    checkpoint: str | None = None  # file, run directory or Hub id; hf:NAME is a model for transformers
    all: bool = False  # score every checkpoint of the run and plot RUN/hellaswag.png
    compare: list[str] | None = None  # A.json,B.json: compare two --output files, score nothing
    download: bool = False  # only download the items, score nothing
    data: str = DATA  # HellaSwag .jsonl; the default is downloaded if absent
    num_examples: int | None = None  # only the first N items
    likelihood: Literal["chain", "mc", "counts"] | None = None  # masked diffusion: how to score; none = chain
    num_mc: int | None = None  # masked diffusion: Monte Carlo samples per ending of mc and counts; none = 32
    guidance: float | None = None  # masked diffusion: guidance away from the ending without its context; none = 0
    output: str | None = None  # write scores and items as JSON
    device: str | None = None  # cpu or cuda; none = cuda if there is one
    dtype: Literal["fp32", "bf16"] | None = None  # precision of matmuls; none = bf16 on a GPU, else fp32

    def __post_init__(self):
        if self.compare is not None and len(self.compare) != 2:
            raise ValueError(f"--compare expects two --output files, A.json,B.json, got {','.join(self.compare)}")
        if self.checkpoint is None and not self.compare and not self.download:
            raise ValueError("--checkpoint is missing; give a run directory, a checkpoint file or a Hub id")
        for name in ("num_examples", "num_mc"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.num_mc is not None and self.likelihood in (None, "chain"):
            raise ValueError("--num_mc has no effect with the chain rule; add --likelihood=counts or mc")


# ---- Items -----------------------------------------------------------------------------------------------------------


class Item(NamedTuple):
    """One question in the words of lm-evaluation-harness."""

    context: str
    endings: list[str]
    label: int  # index of the right ending


def load_items(path: str | Path, limit: int | None = None) -> list[Item]:
    """Read the first `limit` items of a HellaSwag .jsonl file. Raises ValueError naming the first bad line."""
    try:
        with files.open_regular(Path(path)) as file:
            items = parse_items(islice(file, limit), path)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    if not items:
        raise ValueError(f"{path} holds no items; download them with: python eval_hellaswag.py --download")
    return items


def parse_items(lines: Iterable[bytes], path: str | Path) -> list[Item]:
    """Parse lines of JSON. Raises ValueError naming `path` and the first bad line."""
    return [_parse_item(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def _parse_item(line: bytes, where: str) -> Item:
    try:
        record = json.loads(line.decode("utf-8"))
        if not isinstance(record, dict):
            raise ValueError(f"expected an object, got a {type(record).__name__}")
        for key in ("activity_label", "ctx_a", "ctx_b"):
            if not isinstance(record.get(key), str):
                raise ValueError(f"{key} is not a text")
        endings = record.get("endings")
        if not isinstance(endings, list) or not all(isinstance(ending, str) for ending in endings):
            raise ValueError("endings is not a list of texts")
        label = _parse_label(record.get("label"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not a HellaSwag item ({error})") from error
    context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    item = Item(clean(context), [clean(ending) for ending in endings], label)
    if len(item.endings) != 4 or not 0 <= item.label < 4:
        raise ValueError(f"{where} needs 4 endings and a label of 0..3, has {len(item.endings)} and {item.label}")
    if not all(item.endings):
        raise ValueError(f"{where}: ending {item.endings.index('')} is empty")
    return item


def _parse_label(value: Any) -> int:
    """The label of an item, which the Hub's copy of HellaSwag has as text. Raises ValueError."""
    if isinstance(value, str) and re.fullmatch("[0-9]", value):
        return int(value)
    # Not isinstance: a bool is an int too.
    if type(value) is not int:
        raise ValueError(f"label {str(value)[:20]!r} is not an integer")
    return value


def clean(text: str) -> str:
    """Remove WikiHow's [marks] exactly as lm-evaluation-harness does, leftovers included."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def download(path: str | Path) -> None:
    """Download the validation items to `path`, from GitHub or else from the Hub."""
    try:
        with urlopen(URL, timeout=60) as response:
            data = response.read()
        items = parse_items(data.splitlines(), URL)
    except (OSError, ValueError):
        # GitHub cannot be reached, or a proxy sent a page instead of the items.
        data = _download_from_hub()
        items = parse_items(data.splitlines(), HUB)
    if len(items) != N_VALIDATION:
        raise ValueError(f"downloaded {len(items)} items instead of {N_VALIDATION}; pass a complete file as --data")
    files.make_folder(Path(path).parent)
    with files.atomic_write(path) as file:
        file.write(data)


def _download_from_hub() -> bytes:
    from datasets import load_dataset

    try:
        with hub_errors(HUB):
            records = load_dataset(HUB, split="validation")
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}; download {URL} elsewhere and pass it as --data") from error
    return "".join(json.dumps(record) + "\n" for record in records).encode()


# ---- Scores ----------------------------------------------------------------------------------------------------------


def pack_items(
    items: Iterable[tuple[int, Item]], tokenizer: Tokenizer, seq_len: int, share_context: bool = True
) -> Iterator[Row]:
    """Tokenize numbered items into rows for scoring.

    As in lm-evaluation-harness, an ending's tokens are what context + " " + ending has beyond the number of tokens of
    the context alone, and a space at the end of the context belongs to the ending.
    """
    for index, item in items:
        context = tokenizer.encode(item.context.rstrip()) or [tokenizer.eot_id]
        endings = [tokenizer.encode(f"{item.context} {ending}")[len(context) :] for ending in item.endings]
        yield from pack_context(index, context, endings, seq_len, share_context)


def evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    items: list[Item],
    dtype: torch.dtype | None = None,
    scoring: ScoringConfig | None = None,
) -> dict[str, Any]:
    """Score `items` on all ranks. Returns what --output holds of one checkpoint, on every rank.

    dtype: precision of matmuls; None = as the weights.
    """
    start_time = time.monotonic()
    # Each rank tokenizes a part of the items, which takes longer than exchanging the rows.
    my_items = list(enumerate(items))[distributed.rank() :: distributed.world_size()]
    share_context = getattr(model, "supports_packing", True)
    my_rows = list(pack_items(my_items, tokenizer, max_row_length(model), share_context))
    rows = [row for part in distributed.all_gather_object(my_rows) for row in part]
    logprobs = [[0.0] * 4 for _ in items]
    n_tokens = [[0] * 4 for _ in items]
    for row, row_logprobs, _ in score_rows(model, rows, dtype, scoring):
        for i, (logprob, ending) in enumerate(zip(row_logprobs, row.endings), row.first):
            logprobs[row.item][i] = logprob
            n_tokens[row.item][i] = len(ending)
    return {
        **accuracies(items, logprobs, n_tokens),
        "truncated_contexts": len({row.item for row in rows if row.truncated_contexts}),
        "truncated_endings": sum(row.truncated_endings for row in rows),
        "items_per_s": len(items) / (time.monotonic() - start_time),
    }


def accuracies(items: list[Item], logprobs: list[list[float]], n_tokens: list[list[int]]) -> dict[str, Any]:
    """Return accuracies in [0, 1], their standard errors, and the scores of each item.

    logprobs, n_tokens: [items][4 endings], nats and tokens. Raises ValueError if a score is not finite.
    """
    records = []
    n_right = dict.fromkeys(RULES, 0)
    for index, item in enumerate(items):
        sums = logprobs[index]
        if not all(math.isfinite(value) for value in sums):
            raise ValueError(f"HellaSwag item {index}: log-likelihoods {sums} are not finite; the weights are broken")
        norms = [value / len(ending) for value, ending in zip(sums, item.endings)]
        means = [value / n for value, n in zip(sums, n_tokens[index])]
        for rule, values in zip(RULES, (sums, norms, means)):
            n_right[rule] += values.index(max(values)) == item.label
        records.append({"index": index, "label": item.label, "logprob_sums": sums, "logprob_norms": norms})
    n = len(items)
    # Standard error of the mean with n - 1 degrees of freedom, as in lm-evaluation-harness.
    scores: dict[str, Any] = {"num_examples": n}
    for rule in RULES:
        accuracy = n_right[rule] / n
        scores[rule] = accuracy
        scores[f"{rule}_stderr"] = math.sqrt(accuracy * (1 - accuracy) / (n - 1)) if n > 1 else 0.0
    return {**scores, "items": records}


def format_scores(scores: dict[str, Any]) -> str:
    """A table of this checkpoint and the reference models, and how much had to be truncated."""
    lines = [f"HellaSwag, {scores['num_examples']:,} items   acc            acc_norm       token mean"]
    cells = [f"{100 * scores[rule]:5.2f} ± {100 * scores[rule + '_stderr']:4.2f}" for rule in RULES]
    lines.append(f"{'this checkpoint':<28}" + "   ".join(f"{cell:<12}" for cell in cells))
    for name, acc, acc_norm in REFERENCES:
        lines.append(f"{name:<28}{acc:5.2f}          {acc_norm:5.2f}")
    for part in ("contexts", "endings"):
        n_truncated = scores[f"truncated_{part}"]
        if n_truncated:
            lines.append(f"{n_truncated:,} {part} were longer than the model can read and lost their beginning")
    return "\n".join(lines)


def compare(old: dict[str, Any], new: dict[str, Any]) -> str:
    """A table of new - old in points. The standard error is paired: items that both get right cancel out."""
    for key in ("index", "label"):
        if [item[key] for item in old["items"]] != [item[key] for item in new["items"]]:
            raise ValueError(f"the files hold different items (they differ in {key}); score both on the same --data")
    lines = [f"{'':<10}{'first':>8}{'second':>9}   difference      only first right, only second right"]
    for rule, key in (("acc", "logprob_sums"), ("acc_norm", "logprob_norms")):
        a = _is_right(old["items"], key)
        b = _is_right(new["items"], key)
        stderr = (b - a).std(ddof=1) / math.sqrt(len(a)) if len(a) > 1 else 0.0
        lines.append(
            f"{rule:<10}{100 * a.mean():8.2f}{100 * b.mean():9.2f}   {100 * (b - a).mean():+6.2f} ± {100 * stderr:4.2f}"
            f"   {(a > b).sum():6d} {(b > a).sum():6d}"
        )
    return "\n".join(lines)


def _is_right(items: list[dict[str, Any]], key: str) -> np.ndarray:
    """[items]: 1 if the right ending has the highest score, else 0."""
    return np.array([item[key].index(max(item[key])) == item["label"] for item in items], dtype=float)


def read_scores(path: str) -> dict[str, Any]:
    """Read an --output file of one checkpoint. Raises ValueError for anything else."""
    try:
        scores = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError):
        scores = None
    # The files of --all hold a list of checkpoints and no items.
    if isinstance(scores, dict):
        items = scores.get("items")
        if isinstance(items, list) and items and all(map(_is_score, items)):
            return scores
    raise ValueError(f"{path} is not an --output file of one checkpoint; write one with --checkpoint and --output")


def _is_score(item: Any) -> bool:
    """Whether an entry of "items" is one that `accuracies` writes."""
    if not isinstance(item, dict) or not all(type(item.get(key)) is int for key in ("index", "label")):
        return False
    for key in ("logprob_sums", "logprob_norms"):
        values = item.get(key)
        if not isinstance(values, list) or len(values) != 4 or not all(map(_is_finite, values)):
            return False
    return 0 <= item["label"] < 4


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < math.inf


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw accuracy over steps, with standard errors."""
    figure, axes = metrics.new_figure(1, 1, figsize=(8, 5))
    steps = [scores["step"] for scores in runs]
    for rule in ("acc", "acc_norm"):
        values = [100 * scores[rule] for scores in runs]
        errors = [100 * scores[f"{rule}_stderr"] for scores in runs]
        axes.errorbar(steps, values, yerr=errors, marker="o", markersize=4, capsize=3, label=rule)
    axes.axhline(25, color="grey", linestyle=":", label="chance")
    title = f"{metrics.plain_label(path.parent.name)}, {runs[0]['num_examples']:,} items"
    axes.set(xlabel="step", ylabel="HellaSwag accuracy, %", title=title)
    axes.legend()
    metrics.save_figure(figure, path)


# ---- Models ----------------------------------------------------------------------------------------------------------


class HuggingFaceModel(nn.Module):
    """A causal language model of transformers, of any architecture, with the two calls that scoring needs."""

    # Not every architecture of transformers accepts our masks and positions.
    supports_packing = False

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        config: Any = network.config
        # The names that lm-evaluation-harness tries, in the same order, so that both truncate alike;
        # 2048 is its default as well.
        names = ("n_positions", "max_position_embeddings", "n_ctx")
        seq_len = next((getattr(config, name) for name in names if hasattr(config, name)), 2048)
        self.config = SimpleNamespace(seq_len=seq_len)
        # transformers computes the logits of all positions: at most 2 GB in fp32.
        self.max_batch_tokens = 2**29 // config.vocab_size

    def hidden(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Return logits [B, T, V]. One ending per row, padded on the right, needs no special mask or positions."""
        return self.network(tokens, use_cache=False).logits

    def head(self, hidden: Tensor) -> Tensor:
        return hidden


def load_hugging_face(name: str, device: torch.device) -> tuple[HuggingFaceModel, Any, dict[str, Any]]:
    """Load (model in fp32, tokenizer, metadata) of a Hub id or a folder. Raises ValueError if that fails."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ValueError("hf: models need a package: pip install transformers") from error
    try:
        hf_tokenizer: Any = AutoTokenizer.from_pretrained(name)
        network: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except Exception as error:
        # A dozen kinds: a missing repository, file, network, package or architecture.
        raise ValueError(f"transformers cannot load {name}: {type(error).__name__}: {error}") from error
    bos_id = hf_tokenizer.bos_token_id
    tokenizer = SimpleNamespace(
        encode=hf_tokenizer.encode, eot_id=bos_id if bos_id is not None else hf_tokenizer.eos_token_id
    )
    return HuggingFaceModel(network).to(device).eval(), tokenizer, {"path": f"hf:{name}", "step": None}


def load(path: str | Path, device: torch.device) -> tuple[Any, Any, dict[str, Any]]:
    """Load (model, tokenizer, metadata) of a checkpoint or of an hf: model."""
    if str(path).startswith("hf:"):
        return load_hugging_face(str(path)[3:], device)
    return checkpoint.load_model_and_tokenizer(path, device)


def weights_sha256(model: nn.Module) -> str:
    """Hash the names and values of all weights: a copy with another optimizer state has the same hash."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ---- Command line ----------------------------------------------------------------------------------------------------


def check_paths(cfg: EvalConfig) -> list[str | Path]:
    """Return the checkpoints to score. Raises ValueError, before the work, for files that cannot be read or written."""
    assert cfg.checkpoint is not None
    if cfg.output:
        folder = Path(cfg.output).parent
        if Path(cfg.output).is_dir() or not os.access(folder, os.W_OK):
            raise ValueError(f"cannot write {cfg.output}: it is a folder, or {folder} is not writable; choose another")
    if cfg.all and not Path(cfg.checkpoint).is_dir():
        raise ValueError(f"--all needs a run directory as --checkpoint, got {cfg.checkpoint}")
    if not cfg.checkpoint.startswith("hf:"):
        checkpoint.resolve(cfg.checkpoint)
    if cfg.all:
        return [path for _, path in reversed(checkpoint.list_checkpoints(cfg.checkpoint))]
    return [cfg.checkpoint]


def matmul_dtype(name: Literal["fp32", "bf16"] | None, device: torch.device) -> torch.dtype | None:
    """Return the dtype to autocast to: bf16 if `name` says so, or by default on a GPU; None = fp32."""
    use_bf16 = device.type != "cpu" if name is None else name == "bf16"
    return torch.bfloat16 if use_bf16 else None


def diffusion_options(cfg: EvalConfig, model: Transformer) -> dict[str, Any]:
    """Return the options of masked diffusion that were given. Raises ValueError if they have no effect on the model."""
    options = {"likelihood": cfg.likelihood, "num_mc": cfg.num_mc, "guidance": cfg.guidance}
    given = {name: value for name, value in options.items() if value is not None}
    if given and not is_bidirectional(model):
        raise ValueError(f"--{next(iter(given))} has no effect on an autoregressive model; leave it out")
    return given


def score_checkpoint(path: str | Path, items: list[Item], cfg: EvalConfig, dist: distributed.Dist) -> dict[str, Any]:
    """Load a checkpoint, score it, print the table. Returns one entry of --output."""
    device = pick_device(cfg.device) if cfg.device else dist.device
    dtype = matmul_dtype(cfg.dtype, device)
    model, tokenizer, metadata = load(path, device)
    options = diffusion_options(cfg, model)
    scores = evaluate(model, tokenizer, items, dtype, ScoringConfig(**options, progress=dist.is_main))
    entry: dict[str, Any] = {"checkpoint": metadata["path"], "step": metadata["step"]}
    if dist.is_main:
        step = "" if metadata["step"] is None else f", step {metadata['step']}"
        print(visible(f"{metadata['path']}{step}\n{format_scores(scores)}"))
        print(f"{scores['items_per_s']:.1f} items/s on {device}", flush=True)
    if dist.is_main and cfg.output:
        entry["weights_sha256"] = weights_sha256(model)
        # Everything else that the scores depend on.
        entry["settings"] = {
            "data": cfg.data,
            "data_sha256": hashlib.sha256(Path(cfg.data).read_bytes()).hexdigest(),
            "dtype": "bf16" if dtype else "fp32",
            "device": device_name(device),
            "processes": dist.world_size,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
            **options,
        }
    return entry | scores


def main(cfg: EvalConfig) -> None:
    """Score checkpoints, in one process or under torchrun; or compare two results, or download the items."""
    if cfg.download:
        download(cfg.data)
        return
    if cfg.compare:
        print(compare(*[read_scores(path) for path in cfg.compare]))
        return
    paths = check_paths(cfg)
    dist = distributed.init()
    if dist.is_main and cfg.data == DATA and not Path(DATA).exists():
        download(DATA)
    # The other ranks wait for rank 0's download.
    distributed.barrier()
    items = load_items(cfg.data, cfg.num_examples)
    runs = []
    failures = []
    for path in paths:
        try:
            runs.append(score_checkpoint(path, items, cfg, dist))
        except ValueError as error:
            failures.append(str(error))
            if not cfg.all:
                raise
            # One damaged checkpoint must not cost the scores of the others.
            if dist.is_main:
                print(visible(f"not scored: {error}"), file=sys.stderr, flush=True)
    if dist.is_main and cfg.all and runs:
        image = Path(paths[0]).parent / "hellaswag.png"
        plot(runs, image)
        print(visible(f"wrote {image}"))
    if dist.is_main and cfg.output and runs:
        files.write_text(cfg.output, json.dumps({"checkpoints": runs} if cfg.all else runs[0]) + "\n")
    distributed.shutdown()
    if failures:
        raise ValueError(f"{len(failures)} of {len(paths)} checkpoints could not be scored: {failures[0]}")


if __name__ == "__main__":
    run_cli(lambda: main(parse_config(EvalConfig)))
