"""HellaSwag accuracy of a checkpoint (Zellers et al. 2019): which of four endings continues a text?

    python eval_hellaswag.py --checkpoint checkpoints                       # all 10,042 validation items
    python eval_hellaswag.py --checkpoint checkpoints --num_examples 1000 --output scores.json
    python eval_hellaswag.py --checkpoint checkpoints --all                 # every checkpoint of the run, and a plot
    python eval_hellaswag.py --checkpoint hf:openai-community/gpt2          # a model of the Hub, or hf:FOLDER
    python eval_hellaswag.py --checkpoint runs/mdm --likelihood=counts --num_mc=128   # masked diffusion, Monte Carlo
    python eval_hellaswag.py --compare a.json b.json                        # is b better than a?
    torchrun --standalone --nproc_per_node=8 eval_hellaswag.py --checkpoint checkpoints

Items are read from --data, downloaded there once. Text, tokens and scores follow EleutherAI's lm-evaluation-harness:
acc picks the ending of the highest log-likelihood, acc_norm divides it by the ending's length in characters first.
The token mean (log-likelihood / number of tokens) is the rule of the seed and of build-nanogpt.

A masked-diffusion checkpoint scores an ending by the chain rule (each token from those before it, itself and the others
masked: exact, one pass per token), or by Monte Carlo over masks (a lower bound; diffusion.py says how).
"""

# Tensor dimensions: B batch, T tokens, V vocabulary

import hashlib
import json
import math
import os
import platform
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from config import ArgumentParser, run

DATA = "data/hellaswag_val.jsonl"


def parse(argv: list[str] | None = None) -> Any:
    """The command line. Runs before torch is imported, which takes seconds."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", help="file, run directory or Hub id; hf:NAME is a model for transformers")
    parser.add_argument("--all", action="store_true", help="score every checkpoint of the run, plot RUN/hellaswag.png")
    parser.add_argument("--compare", nargs=2, metavar="JSON", help="difference of two --output files, score nothing")
    parser.add_argument("--download", action="store_true", help="only fetch the items, score nothing")
    parser.add_argument("--data", default=DATA, help=f"HellaSwag .jsonl, downloaded when it is the default [{DATA}]")
    parser.add_argument("--num_examples", type=int, help="only the first N items [all]")
    parser.add_argument(
        "--likelihood", choices=("chain", "mc", "counts"), help="masked diffusion: how to score [chain]"
    )
    parser.add_argument("--num_mc", type=int, help="masked diffusion: draws per ending of mc and counts [32]")
    parser.add_argument("--guidance", type=float, help="masked diffusion: away from endings without context [0]")
    parser.add_argument("--output", help="write scores and items as JSON")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to run [cuda if there is one]")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="precision of the matmuls [bf16 on a GPU, else fp32]")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse()

import numpy as np
import torch
from torch import Tensor

import checkpoint
import distributed
from scoring import Row, fit, longest_row, score_rows, sees_both_sides
from shards import load_tokenizer

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
HUB = "Rowan/hellaswag"  # the same items as a data set of the Hub
N_VALIDATION = 10_042
SCORING = ("likelihood", "num_mc", "guidance")
RULES = ("acc", "acc_norm", "acc_token_mean")
REFERENCES = (("chance", 25.0, 25.0), ("GPT-2 124M", 28.92, 31.14))  # acc, acc_norm in lm-evaluation-harness


class Item(NamedTuple):
    """One question, as lm-evaluation-harness words it."""

    context: str
    endings: list[str]
    label: int


def load_items(path: str | Path, limit: int | None = None) -> list[Item]:
    """Read a HellaSwag .jsonl file. Raises ValueError naming the line that is wrong."""
    items = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if limit is not None and len(items) == limit:
                    break
                items.append(_parse(line, f"{path}:{number}"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    if not items:
        raise ValueError(f"{path} holds no items")
    return items


def _parse(line: bytes, where: str) -> Item:
    try:
        record = json.loads(line.decode("utf-8"))
        context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
        item = Item(clean(context), [clean(ending) for ending in record["endings"]], int(record["label"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} is no HellaSwag item ({type(error).__name__}: {error})") from error
    if len(item.endings) != 4 or not 0 <= item.label < 4:
        raise ValueError(f"{where} needs 4 endings and a label of 0..3, has {len(item.endings)} and {item.label}")
    if not all(item.endings):
        raise ValueError(f"{where}: ending {item.endings.index('')} is empty")
    return item


def clean(text: str) -> str:
    """WikiHow's marks out: ' [title]' ends a sentence, other [brackets] go, then double spaces become one (once)."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def download(path: str | Path) -> None:
    """Fetch the validation items to `path`, from their authors or else from the Hub."""
    from urllib.request import urlopen

    partial = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        try:
            with urlopen(URL, timeout=60) as answer:
                partial.write_bytes(answer.read())
            load_items(partial)
        except (OSError, ValueError):  # no route, or a proxy's page instead of the items
            partial.write_text(_from_hub(), encoding="utf-8")
        if (count := len(load_items(partial))) != N_VALIDATION:
            raise ValueError(f"{URL} gave {count} items instead of {N_VALIDATION}; give the file with --data")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _from_hub() -> str:
    from datasets import load_dataset

    try:
        records = load_dataset(HUB, split="validation")
    except Exception as error:  # datasets raises a dozen kinds when there is no network
        raise ValueError(
            f"cannot download HellaSwag from {URL} or the Hub ({HUB}): {type(error).__name__}; "
            "fetch hellaswag_val.jsonl elsewhere and give it with --data"
        ) from error
    return "".join(json.dumps(record) + "\n" for record in records)


def rows_of(items: Iterable[tuple[int, Item]], tokenizer: Any, seq_len: int, share: bool = True) -> Iterator[Row]:
    """Tokenise: an ending's tokens are those of context + ' ' + ending after as many as the context alone has."""
    for index, item in items:
        context = tokenizer.encode(item.context.rstrip()) or [tokenizer.eot_id]  # a last space belongs to the ending
        endings = [tokenizer.encode(f"{item.context} {ending}")[len(context) :] for ending in item.endings]
        yield from fit(index, context, endings, seq_len, share)


def evaluate(
    model: Any,
    tokenizer: Any,
    items: list[Item],
    *,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    scoring: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Score `items` on all ranks and return what --output holds, on every rank.

    model: a Transformer or anything with its `hidden` and `head`. dtype: autocast to it; None = that of the weights.
    scoring: as for `score_rows`.
    """
    started = time.monotonic()
    mine = list(enumerate(items))[distributed.rank() :: distributed.world_size()]
    share = getattr(model, "shares_contexts", True)
    parts = distributed.gather(list(rows_of(mine, tokenizer, longest_row(model), share)))
    rows = [row for part in parts for row in part]
    sums: dict[int, list[float]] = {index: [0.0] * 4 for index in range(len(items))}
    n_tokens = {index: [0] * 4 for index in range(len(items))}
    for row, values, _ in score_rows(model, rows, dtype, progress, scoring):
        which = slice(row.first, row.first + len(values))
        sums[row.item][which], n_tokens[row.item][which] = values, map(len, row.endings)
    return {
        **result(items, sums, n_tokens),
        "truncated_contexts": len({row.item for row in rows if row.cut_contexts}),
        "truncated_endings": sum(row.cut_endings for row in rows),
        "items_per_s": len(items) / (time.monotonic() - started),
    }


def result(items: list[Item], sums: dict[int, list], n_tokens: dict[int, list]) -> dict[str, Any]:
    """Accuracies with standard errors, and every item. Raises ValueError when a score is not finite."""
    records, right = [], dict.fromkeys(RULES, 0)
    for index, item in enumerate(items):
        scores = sums[index]
        if not all(map(math.isfinite, scores)):
            raise ValueError(f"HellaSwag item {index}: log-likelihoods {scores} are not finite; the weights are broken")
        norms = [value / len(ending) for value, ending in zip(scores, item.endings, strict=True)]
        means = [value / n for value, n in zip(scores, n_tokens[index], strict=True)]
        for key, values in zip(RULES, (scores, norms, means), strict=True):
            right[key] += values.index(max(values)) == item.label
        records.append({"index": index, "label": item.label, "logprob_sums": scores, "logprob_norms": norms})
    n = len(items)
    out: dict[str, Any] = {"num_examples": n}
    for key, share in ((key, count / n) for key, count in right.items()):
        out |= {key: share, f"{key}_stderr": math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else 0.0}
    return {**out, "items": records}


def report(scores: dict[str, Any]) -> str:
    """A small table: this model, then the reference rows; below it what had to be cut."""
    lines = [f"HellaSwag, {scores['num_examples']:,} items   acc            acc_norm       token mean"]
    cells = [f"{100 * scores[k]:5.2f} ± {100 * scores[k + '_stderr']:4.2f}" for k in RULES]
    lines.append(f"{'this checkpoint':<28}" + "   ".join(f"{cell:<12}" for cell in cells))
    lines += [f"{name:<28}{acc:5.2f}          {acc_norm:5.2f}" for name, acc, acc_norm in REFERENCES]
    for what in ("contexts", "endings"):
        if n := scores[f"truncated_{what}"]:
            lines.append(f"{n:,} {what} were longer than the model can read and lost their beginning")
    return "\n".join(lines)


# ---- Models ----------------------------------------------------------------------------------------------------------


class HuggingFace(torch.nn.Module):
    """A causal language model of transformers behind the two calls that scoring needs; any architecture."""

    shares_contexts = False  # masks and positions of our own making are not for every architecture

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network
        shape: Any = network.config
        names = ("n_positions", "max_position_embeddings", "n_ctx")  # in the order of lm-evaluation-harness
        self.config = SimpleNamespace(seq_len=next((getattr(shape, n) for n in names if hasattr(shape, n)), 2048))
        self.max_batch_tokens = 2**29 // shape.vocab_size  # logits of all positions are made: 2 GB

    def hidden(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Logits [B, T, V]: one ending per row, padded on the right, is in the usual order."""
        return self.network(tokens, use_cache=False).logits

    def head(self, hidden: Tensor) -> Tensor:
        return hidden


def load_hugging_face(name: str, device: torch.device) -> tuple[HuggingFace, Any, dict[str, Any]]:
    """(model in fp32, tokenizer, meta) of a Hub id or a folder. ValueError says in one line why not."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ValueError("hf: needs a package: pip install transformers") from error
    try:
        theirs: Any = AutoTokenizer.from_pretrained(name)
        network: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except Exception as error:  # a missing repository, file, network, package or architecture: a dozen kinds
        raise ValueError(f"transformers cannot load {name}: {type(error).__name__}: {error}") from error
    start = theirs.bos_token_id if theirs.bos_token_id is not None else theirs.eos_token_id
    tokenizer = SimpleNamespace(encode=theirs.encode, eot_id=start)
    return HuggingFace(network).to(device).eval(), tokenizer, {"path": f"hf:{name}", "step": None}


def load(path: str | Path, device: torch.device) -> tuple[Any, Any, dict[str, Any]]:
    """(model, tokenizer, meta) of what --checkpoint says."""
    if str(path).startswith("hf:"):
        return load_hugging_face(str(path)[3:], device)
    model, meta = checkpoint.load_model(path, device)
    return model, load_tokenizer(meta["tokenizer"]), meta


def weights_sha256(model: torch.nn.Module) -> str:
    """One hash of names and values of all weights: the same for a file and a copy with another optimizer state."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ---- Command line ----------------------------------------------------------------------------------------------------


def compare(old: dict[str, Any], new: dict[str, Any]) -> str:
    """new - old in points with its standard error over the same items (paired: what both get right cancels out)."""
    for key in ("index", "label"):
        if [item[key] for item in old["items"]] != [item[key] for item in new["items"]]:
            raise ValueError(f"the files hold other items (they differ in {key}); score both on the same --data")
    lines = [f"{'':<10}{'first':>8}{'second':>9}   difference      only first right, only second right"]
    for rule, key in (("acc", "logprob_sums"), ("acc_norm", "logprob_norms")):
        a, b = (np.array([i[key].index(max(i[key])) == i["label"] for i in x["items"]], float) for x in (old, new))
        error = (b - a).std(ddof=1) / math.sqrt(len(a)) if len(a) > 1 else 0.0
        lines.append(
            f"{rule:<10}{100 * a.mean():8.2f}{100 * b.mean():9.2f}   {100 * (b - a).mean():+6.2f} ± {100 * error:4.2f}"
            f"   {int((a > b).sum()):6d} {int((b > a).sum()):6d}"
        )
    return "\n".join(lines)


def read_scores(path: str) -> dict[str, Any]:
    """An --output file. Raises ValueError when it is none."""
    try:
        scores = json.loads(Path(path).read_text(encoding="utf-8"))
        assert all({"index", "label", "logprob_sums", "logprob_norms"} <= item.keys() for item in scores["items"])
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no --output file of one checkpoint") from error
    return scores


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Accuracy over steps, with standard errors."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    steps = [scores["step"] for scores in runs]
    for rule in ("acc", "acc_norm"):
        values, errors = ([100 * scores[rule + end] for scores in runs] for end in ("", "_stderr"))
        axes.errorbar(steps, values, yerr=errors, marker="o", markersize=4, capsize=3, label=rule)
    axes.axhline(25, color="grey", linestyle=":", label="chance")
    axes.set(
        xlabel="step", ylabel="HellaSwag accuracy, %", title=f"{path.parent.name}, {runs[0]['num_examples']:,} items"
    )
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def settings(args: Any, device: torch.device, dtype: torch.dtype | None) -> dict[str, Any]:
    """What else decides the scores: kept in --output."""
    return {
        "data": str(args.data),
        "data_sha256": hashlib.sha256(Path(args.data).read_bytes()).hexdigest(),
        "dtype": "bf16" if dtype else "fp32",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processes": distributed.world_size(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }


def scoring_of(args: Any, model: Any) -> dict[str, Any]:
    """The options of masked diffusion that were given. Raises ValueError for one without effect."""
    given = {name: value for name in SCORING if (value := getattr(args, name)) is not None}
    if given and not sees_both_sides(model):
        raise ValueError(f"--{next(iter(given))} has no effect on an autoregressive model; leave it out")
    if "num_mc" in given and given.get("likelihood", "chain") == "chain":
        raise ValueError("--num_mc has no effect with the chain rule; add --likelihood=counts or mc")
    return given


def check(args: Any) -> None:
    """Raise ValueError for what can be known to fail before the work."""
    check_model(args)
    if not args.checkpoint.startswith("hf:"):
        checkpoint.find(args.checkpoint)
    if args.num_examples is not None and args.num_examples < 1:
        raise ValueError(f"num_examples must be at least 1, got {args.num_examples}")
    if args.num_mc is not None and args.num_mc < 1:
        raise ValueError(f"num_mc must be at least 1, got {args.num_mc}")
    if args.output and (Path(args.output).is_dir() or not os.access(Path(args.output).parent, os.W_OK)):
        raise ValueError(f"cannot write {args.output}: it is a folder, or {Path(args.output).parent} is not writable")
    if args.all and not Path(args.checkpoint).is_dir():
        raise ValueError(f"--all needs a run directory as --checkpoint, got {args.checkpoint}")


def check_model(args: Any) -> None:
    """Raise ValueError if --checkpoint or the GPU of --device is missing."""
    if not args.checkpoint:
        raise ValueError("--checkpoint is missing; give a run directory, a checkpoint file or a Hub id")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device=cuda, but torch finds no GPU here; leave it out to run on the CPU")


def precision(args: Any, dist: distributed.Dist) -> tuple[torch.device, torch.dtype | None]:
    """What --device and --dtype mean here; None = fp32."""
    device = torch.device(args.device) if args.device else dist.device
    name = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    return device, torch.bfloat16 if name == "bf16" else None


def score_checkpoint(path: str | Path, items: list[Item], args: Any, dist: distributed.Dist) -> dict[str, Any]:
    """Load, score, print the table; return one entry of --output."""
    device, dtype = precision(args, dist)
    model, tokenizer, meta = load(path, device)
    scoring = scoring_of(args, model)
    scores = evaluate(model, tokenizer, items, dtype=dtype, progress=dist.is_main, scoring=scoring)
    if dist.is_main:
        where = meta["path"] if meta["step"] is None else f"{meta['path']}, step {meta['step']}"
        print(f"{where}\n{report(scores)}\n{scores['items_per_s']:.1f} items/s on {device}", flush=True)
    about = {"checkpoint": meta["path"], "step": meta["step"]}
    if args.output and dist.is_main:
        about |= {"weights_sha256": weights_sha256(model), "settings": settings(args, device, dtype) | scoring}
    return about | scores


def main(args: Any) -> None:
    """Command line: score checkpoints, alone or under torchrun."""
    if args.download:
        return download(args.data)
    if args.compare:
        return print(compare(*map(read_scores, args.compare)))
    check(args)
    paths = [path for _, path in reversed(checkpoint.all_of(args.checkpoint))] if args.all else [args.checkpoint]
    dist = distributed.init()
    if dist.is_main and args.data == DATA and not Path(DATA).exists():
        download(DATA)
    distributed.barrier()
    items = load_items(args.data, args.num_examples)
    runs = [score_checkpoint(path, items, args, dist) for path in paths]
    if dist.is_main and args.all:
        plot(runs, image := Path(args.checkpoint) / "hellaswag.png")
        print(f"wrote {image}")
    if dist.is_main and args.output:
        partial = Path(f"{args.output}.tmp")
        partial.write_text(json.dumps({"checkpoints": runs} if args.all else runs[0]) + "\n")
        os.replace(partial, args.output)
    distributed.shutdown()


if __name__ == "__main__":
    run(lambda: main(ARGS))
