"""HellaSwag accuracy of a checkpoint (Zellers et al. 2019): which of four endings continues a text?

    python eval_hellaswag.py --checkpoint checkpoints                       # all 10,042 validation items
    python eval_hellaswag.py --checkpoint checkpoints --num_examples 1000 --output scores.json
    torchrun --standalone --nproc_per_node=8 eval_hellaswag.py --checkpoint checkpoints

Items are read from --data, downloaded there once. Text, tokens and scores follow EleutherAI's lm-evaluation-harness:
acc picks the ending of the highest log-likelihood, acc_norm divides it by the ending's length in characters first.
The token mean (log-likelihood / number of tokens) is the rule of the seed and of build-nanogpt.
"""

import contextlib
import json
import math
import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from config import ArgumentParser, run

DATA = "data/hellaswag_val.jsonl"


def parse(argv: list[str] | None = None) -> Any:
    """The command line. Runs before torch is imported, which takes seconds."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", help="file, run directory or Hub id")
    parser.add_argument("--download", action="store_true", help="only fetch the items, score nothing")
    parser.add_argument("--data", default=DATA, help=f"HellaSwag .jsonl, downloaded when it is the default [{DATA}]")
    parser.add_argument("--num_examples", type=int, help="only the first N items [all]")
    parser.add_argument("--output", help="write scores and items as JSON")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to run [cuda if there is one]")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="precision of the matmuls [bf16 on a GPU, else fp32]")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse()

import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint
import distributed
from data_pipeline import Tokenizer, load_tokenizer
from model import Transformer

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
HUB = "Rowan/hellaswag"  # the same items as a data set of the Hub
N_VALIDATION = 10_042
BATCH_TOKENS = {"cpu": 2048, "cuda": 65_536}  # tokens forwarded at once, padding included
REFERENCES = (  # acc, acc_norm in lm-evaluation-harness
    ("chance", 25.0, 25.0),
    ("GPT-2 124M", 28.92, 31.14),
)


class Item(NamedTuple):
    """One question, as lm-evaluation-harness words it."""

    context: str
    endings: list[str]
    label: int


class Row(NamedTuple):
    """One line of a batch: a context and the endings that share it."""

    item: int  # index into the items
    first: int  # number of its first ending
    context: list[int]
    endings: list[list[int]]

    @property
    def length(self) -> int:
        return len(self.context) + sum(len(ending) - 1 for ending in self.endings)


def load_items(path: str | Path, limit: int | None = None) -> list[Item]:
    """Read a HellaSwag .jsonl file. Raises ValueError naming the line that is wrong."""
    items = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if limit is not None and len(items) == limit:
                    break
                items.append(_parse(line, f"{path}:{number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if not items:
        raise ValueError(f"{path} holds no items")
    return items


def _parse(line: str, where: str) -> Item:
    try:
        record = json.loads(line)
        context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
        item = Item(clean(context), [clean(ending) for ending in record["endings"]], int(record["label"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} is no HellaSwag item ({type(error).__name__}: {error})") from error
    if len(item.endings) != 4 or not 0 <= item.label < 4 or not all(item.endings):
        raise ValueError(f"{where} needs 4 endings and a label of 0..3, has {len(item.endings)} and {item.label}")
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
            count = len(load_items(partial))
        except (OSError, ValueError):  # no route, or a proxy's page instead of the items
            count = _from_hub(partial)
        if count != N_VALIDATION:
            raise ValueError(f"{URL} gave {count} items instead of {N_VALIDATION}; give the file with --data")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _from_hub(path: Path) -> int:
    from datasets import load_dataset

    try:
        records = load_dataset(HUB, split="validation")
    except Exception as error:  # datasets raises a dozen kinds when there is no network
        raise ValueError(
            f"cannot download HellaSwag from {URL} or the Hub ({HUB}): {type(error).__name__}; "
            "fetch hellaswag_val.jsonl elsewhere and give it with --data"
        ) from error
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return len(load_items(path))


def rows_of(items: Iterable[tuple[int, Item]], tokenizer: Tokenizer, seq_len: int) -> Iterator[Row]:
    """Tokenise: an ending's tokens are those of context + ' ' + ending after as many as the context alone has.

    Four endings share one row, so the context is computed once. Where the context must be cut from the left to fit
    seq_len, it is cut for each ending by itself, which takes a row each.
    """
    for index, item in items:
        context = tokenizer.encode(item.context.rstrip()) or [tokenizer.eot_id]  # a last space belongs to the ending
        endings = [tokenizer.encode(f"{item.context} {ending}")[len(context) :] for ending in item.endings]
        endings = [ending[-seq_len:] for ending in endings]
        if len(context) + max(map(len, endings)) - 1 <= seq_len:
            yield Row(index, 0, context, endings)
        else:
            for number, ending in enumerate(endings):
                yield Row(index, number, context[-(seq_len + 1 - len(ending)) :], [ending])


def batches_of(rows: list[Row], batch_tokens: int) -> Iterator[list[Row]]:
    """Rows of similar length together, longest first, so that little is padding and memory peaks at once."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: -row.length):
        if batch and (len(batch) + 1) * batch[0].length > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def score(model: Transformer, rows: list[Row], device: torch.device) -> list[tuple[Row, list[float]]]:
    """Log-likelihood (nats) of each ending of each row, in one forward pass; logits only where an ending is scored."""
    B, T = len(rows), max(row.length for row in rows)
    tokens = torch.zeros(B, T, dtype=torch.long)
    positions = torch.zeros(B, T, dtype=torch.long)
    segments = torch.zeros(B, T, dtype=torch.long)  # 0 the context (and padding), 1.. the endings
    at, targets, owner = [], [], []  # flat position, token to predict there, number of the ending among all
    n_endings = 0
    for b, row in enumerate(rows):
        C = len(row.context)
        tokens[b, :C], positions[b, :C] = torch.tensor(row.context), torch.arange(C)
        start = C
        for segment, ending in enumerate(row.endings, 1):
            end = start + len(ending) - 1  # the last token is only predicted
            tokens[b, start:end] = torch.tensor(ending[:-1], dtype=torch.long)
            positions[b, start:end] = torch.arange(C, C + end - start)
            segments[b, start:end] = segment
            at += [b * T + C - 1, *range(b * T + start, b * T + end)]
            targets += ending
            owner += [n_endings] * len(ending)
            start, n_endings = end, n_endings + 1
    tokens, positions, segments = (x.to(device, non_blocking=True) for x in (tokens, positions, segments))
    same = (segments[:, None, :] == segments[:, :, None]) | (segments[:, None, :] == 0)  # [B, T, T]
    mask = same.tril()[:, None]  # [B, 1, T, T]: the context and the ending's own past
    hidden = model.hidden(tokens, positions=positions, mask=mask).flatten(0, 1)  # [B*T, D]
    logprobs = _logprobs(model, hidden[torch.tensor(at, device=device)], torch.tensor(targets, device=device))
    sums = torch.zeros(n_endings, dtype=torch.float64).index_add_(0, torch.tensor(owner), logprobs.cpu().double())
    values = iter(sums.tolist())
    return [(row, [next(values) for _ in row.endings]) for row in rows]


def _logprobs(model: Transformer, hidden: Tensor, targets: Tensor) -> Tensor:
    """log p(target) for hidden states [n, D], in slices so that the fp32 logits stay below 1 GB."""
    slices = zip(hidden.split(4096), targets.split(4096), strict=True)
    return torch.cat([-model.loss(h, t, reduction="none") for h, t in slices])


def evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    items: list[Item],
    *,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Score `items` on all ranks (each takes every world_size-th) and return what --output holds, on every rank.

    dtype: autocast to it; None = the dtype of the weights.
    """
    device = model.embed_tokens.weight.device
    mine = list(enumerate(items))[distributed.rank() :: distributed.world_size()]
    rows = list(rows_of(mine, tokenizer, model.config.seq_len))
    sums = {index: [0.0] * 4 for index, _ in mine}
    cast = torch.autocast(device.type, dtype) if dtype is not None else contextlib.nullcontext()
    was_training = model.training
    model.eval()
    started = time.monotonic()
    with torch.inference_mode(), cast, tqdm(total=len(mine), unit="item", disable=not progress) as bar:
        for batch in batches_of(rows, BATCH_TOKENS[device.type]):
            for row, values in score(model, batch, device):
                sums[row.item][row.first : row.first + len(values)] = values
            bar.update(sum(len(row.endings) for row in batch) / 4)
    model.train(was_training)
    all_sums: dict[int, list[float]] = {}
    for part in distributed.gather(sums):
        all_sums.update(part)
    lengths = {row.item: [] for row in rows}
    for row in rows:
        lengths[row.item] += [len(ending) for ending in row.endings]
    n_tokens: dict[int, list[int]] = {}
    for part in distributed.gather(lengths):
        n_tokens.update(part)
    return {**result(items, all_sums, n_tokens), "items_per_s": len(items) / (time.monotonic() - started)}


def result(items: list[Item], sums: dict[int, list[float]], n_tokens: dict[int, list[int]]) -> dict[str, Any]:
    """Accuracies with standard errors, and every item. Raises ValueError when a score is not finite."""
    records, right = [], {"acc": 0, "acc_norm": 0, "acc_token_mean": 0}
    for index, item in enumerate(items):
        scores = sums[index]
        if not all(map(math.isfinite, scores)):
            raise ValueError(f"HellaSwag item {index}: log-likelihoods {scores} are not finite; the weights are broken")
        norms = [value / len(ending) for value, ending in zip(scores, item.endings, strict=True)]
        means = [value / n for value, n in zip(scores, n_tokens[index], strict=True)]
        for key, values in (("acc", scores), ("acc_norm", norms), ("acc_token_mean", means)):
            right[key] += values.index(max(values)) == item.label
        records.append({"index": index, "label": item.label, "logprob_sums": scores, "logprob_norms": norms})
    n = len(items)
    out: dict[str, Any] = {"num_examples": n}
    for key, count in right.items():
        share = count / n
        out[key] = share
        out[f"{key}_stderr"] = math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else 0.0
    return {**out, "items": records}


def report(scores: dict[str, Any]) -> str:
    """A small table: this model, then the reference rows."""
    lines = [f"HellaSwag, {scores['num_examples']:,} items   acc            acc_norm       token mean"]
    cells = [
        f"{100 * scores[k]:5.2f} ± {100 * scores[k + '_stderr']:4.2f}" for k in ("acc", "acc_norm", "acc_token_mean")
    ]
    lines.append(f"{'this checkpoint':<28}" + "   ".join(f"{cell:<12}" for cell in cells))
    lines += [f"{name:<28}{acc:5.2f}          {acc_norm:5.2f}" for name, acc, acc_norm in REFERENCES]
    return "\n".join(lines)


def main(args: Any) -> None:
    """Command line: score one checkpoint, alone or under torchrun."""
    if args.download:
        return download(args.data)
    if not args.checkpoint:
        raise ValueError("--checkpoint is missing; give a run directory, a checkpoint file or a Hub id")
    if args.num_examples is not None and args.num_examples < 1:
        raise ValueError(f"num_examples must be at least 1, got {args.num_examples}")
    if args.output and (Path(args.output).is_dir() or not os.access(Path(args.output).parent, os.W_OK)):
        raise ValueError(f"cannot write {args.output}: it is a folder, or {Path(args.output).parent} is not writable")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device=cuda, but torch finds no GPU here; leave it out to run on the CPU")
    path = checkpoint.find(args.checkpoint)
    dist = distributed.init()
    device = torch.device(args.device) if args.device else dist.device
    if dist.is_main and args.data == DATA and not Path(DATA).exists():
        download(DATA)
    distributed.barrier()
    items = load_items(args.data, args.num_examples)
    model, meta = checkpoint.load_model(path, device)
    tokenizer = load_tokenizer(meta["tokenizer"]["name"], meta["tokenizer"].get("sha256"))
    dtype = torch.bfloat16 if (args.dtype or ("bf16" if device.type == "cuda" else "fp32")) == "bf16" else None
    scores = evaluate(model, tokenizer, items, dtype=dtype, progress=dist.is_main)
    if dist.is_main:
        print(f"{meta['path']}, step {meta['step']}\n{report(scores)}\n{scores['items_per_s']:.1f} items/s on {device}")
        if args.output:
            partial = Path(f"{args.output}.tmp")
            partial.write_text(json.dumps({"checkpoint": meta["path"], "step": meta["step"], **scores}) + "\n")
            os.replace(partial, args.output)
    distributed.shutdown()


if __name__ == "__main__":
    run(lambda: main(ARGS))
