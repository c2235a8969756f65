"""A checkpoint as a model of EleutherAI's lm-evaluation-harness: MMLU, ARC, PIQA, LAMBADA and all its other tasks.

    pip install lm_eval                                                     # optional, hence not in requirements.txt
    python eval_lm_harness.py --checkpoint checkpoints --tasks hellaswag,arc_easy,mmlu --num_fewshot 0,5
    python eval_lm_harness.py --checkpoint checkpoints --tasks core --limit 200 --output_path results
    torchrun --standalone --nproc_per_node=8 eval_lm_harness.py --checkpoint checkpoints --tasks marin

Tasks, metrics, tables and the JSON in --output_path are the harness's own; nothing is exported. Questions that share a
context are answered in one row of a batch, as in eval_hellaswag.py, so HellaSwag gives the same numbers there and here.
--tasks takes names and groups of the harness (`lm_eval ls tasks` lists them) and two presets with shots of their own:
core (the 13 settings of Marin's CORE_TASKS) and marin (core, and MMLU with 0 and with 5 shots).
"""

# Tensor dimensions: B batch, T tokens, S cached tokens, V vocabulary

import os
from collections.abc import Iterator
from typing import Any

from config import ArgumentParser, run, unknown

CORE = {  # task: shots, Marin's CORE_TASKS, a part of DCLM's core (arXiv:2406.11794, p. 43)
    "agieval_lsat_ar": (3,),
    "arc_easy": (10,),
    "arc_challenge": (10,),
    "boolq": (10,),
    "commonsense_qa": (10,),
    "copa": (0,),
    "hellaswag": (0, 10),
    "lambada_openai": (0,),
    "openbookqa": (0,),
    "piqa": (10,),
    "wsc273": (0,),
    "winogrande": (0,),
}
PRESETS = {"core": CORE, "marin": {**CORE, "mmlu": (0, 5)}}


def parse(argv: list[str] | None = None) -> Any:
    """The command line. Runs before torch is imported, which takes seconds."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", help="file, run directory or Hub id")
    parser.add_argument("--tasks", default="", help="names of the harness, core or marin, separated by commas")
    parser.add_argument("--num_fewshot", help="shots, one run for each: 0,5 [what each task says]")
    parser.add_argument("--limit", type=int, help="only the first N questions of each task, for a quick look [all]")
    parser.add_argument("--output_path", help="folder or .json for the harness's results [only print them]")
    parser.add_argument("--log_samples", action="store_true", help="every question and answer, too, in --output_path")
    parser.add_argument("--include_path", help="a folder of task files of your own")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to run [cuda if there is one]")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="precision of the matmuls [bf16 on a GPU, else fp32]")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse()

import torch

import checkpoint
import distributed
from eval_hellaswag import check_model, load, precision
from model import Transformer, generate_batch
from scoring import cast, fit, longest_row, score_rows, sees_both_sides

GENERATED_AT_ONCE = 32


def plan(tasks: str, num_fewshot: str | None) -> dict[int | None, list[str]]:
    """{shots: tasks}, None = as the task says. Raises ValueError for shots that are no numbers or without effect."""
    try:
        shots = [int(n) for n in num_fewshot.split(",")] if num_fewshot else [None]
    except ValueError as error:
        raise ValueError(f"num_fewshot expects numbers separated by commas, got {num_fewshot!r}") from error
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if num_fewshot and names and all(name in PRESETS for name in names):
        raise ValueError(f"--num_fewshot has no effect on {tasks}, which has its own; leave it out or name the tasks")
    runs: dict[int | None, list[str]] = {}
    for name in names:
        for task, its_shots in PRESETS.get(name, {name: shots}).items():
            for n in its_shots:
                runs.setdefault(n, []).append(task)
    if not runs:
        raise ValueError("--tasks is empty; name some, as hellaswag,arc_easy")
    return {n: list(dict.fromkeys(found)) for n, found in runs.items()}


class Requests:
    """What the harness asks of a language model. `harness_model` joins it with the harness's TemplateLM."""

    def __init__(self, model: Transformer, tokenizer: Any, dtype: torch.dtype | None = None, progress: bool = False):
        super().__init__()  # one process as the harness sees it: all ranks get all requests and share them below
        self.model, self.encoding, self.dtype, self.progress = model, tokenizer, dtype, progress
        self.max_length = longest_row(model)
        self.truncated = 0  # questions whose context lost its beginning, so far

    @property
    def eot_token_id(self) -> int:
        return self.encoding.eot_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.encoding.encode(string)

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], **_: Any) -> list[Any]:
        """(log-likelihood in nats, is greedy) of each (_, context, continuation); tokens."""
        groups, answers = list(self._groups(requests)), [(0.0, True)] * len(requests)
        rows = []
        for number, indices in enumerate(groups):
            rows += fit(number, requests[indices[0]][1], [requests[i][2] for i in indices], self.max_length)
        for row, sums, greedy in score_rows(self.model, rows, self.dtype, self.progress):
            which = groups[row.item][row.first : row.first + len(sums)]
            for i, value, best in zip(which, sums, greedy, strict=True):
                answers[i] = (value, best)
        self.truncated += sum(row.cut_contexts for row in rows)
        return answers

    def _groups(self, requests: list[tuple[Any, list[int], list[int]]]) -> Iterator[list[int]]:
        """Indices of requests that share a context, as many as one row of the model's length holds."""
        groups: dict[tuple[int, ...], tuple[list[int], int]] = {}
        for i, (_, context, ending) in enumerate(requests):
            indices, length = groups.get(tuple(context), ([], len(context)))
            if indices and length + len(ending) - 1 > self.max_length:
                yield indices
                indices, length = [], len(context)
            groups[tuple(context)] = ([*indices, i], length + len(ending) - 1)
        yield from (indices for indices, _ in groups.values())

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the model's length that overlap by one token."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows, owners = [], []
        for i, (text,) in enumerate(request.args for request in requests):
            tokens = self.encoding.encode(text)
            for pair in get_rolling_token_windows(tokens, self.eot_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(i)
        sums = [0.0] * len(requests)
        for i, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[i] += value
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts that continue contexts, up to a stop string: in batches of the same settings and similar length."""
        if sees_both_sides(self.model):
            raise ValueError("tasks that generate text need an autoregressive model; chat.py generates with this one")
        prompts = [self.encoding.encode(request.args[0]) or [self.eot_token_id] for request in requests]
        order = sorted(range(len(requests)), key=lambda i: (repr(requests[i].args[1]), -len(prompts[i])))
        batches: list[list[int]] = []
        for i in order:
            last = batches[-1] if batches else []
            if last and len(last) < GENERATED_AT_ONCE and requests[last[0]].args[1] == requests[i].args[1]:
                last.append(i)
            else:
                batches.append([i])
        texts: dict[int, str] = {}
        for batch in batches[distributed.rank() :: distributed.world_size()]:
            texts |= zip(batch, self._generate([prompts[i] for i in batch], requests[batch[0]].args[1]), strict=True)
        merged = {i: text for part in distributed.gather(texts) for i, text in part.items()}
        return [merged[i] for i in range(len(requests))]

    def _generate(self, prompts: list[list[int]], wishes: dict[str, Any]) -> list[str]:
        """Continue prompts by at most max_gen_toks tokens (and half the model's length), keeping their ends."""
        until = wishes.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        n = min(int(wishes.get("max_gen_toks", 256)), max(1, self.max_length // 2))
        temperature = float(wishes.get("temperature") or 0) if wishes.get("do_sample", True) else 0.0
        draws = {"temperature": temperature, "top_k": wishes.get("top_k"), "top_p": wishes.get("top_p")}
        prompts = [prompt[-max(1, self.max_length - n) :] for prompt in prompts]
        rows: list[list[int]] = [[] for _ in prompts]
        ended: dict[int, str] = {}
        with cast(self.model.embed_tokens.weight.device, self.dtype):
            for drawn in generate_batch(self.model, prompts, n, seed=0, **draws):
                for b in set(range(len(prompts))) - ended.keys():
                    rows[b] += [drawn[b]] if drawn[b] != self.eot_token_id else []
                    text = self.encoding.decode(rows[b])
                    ends = [text.find(stop) for stop in stops if stop and stop in text]
                    if ends or drawn[b] == self.eot_token_id:
                        ended[b] = text[: min(ends, default=len(text))]
                if len(ended) == len(prompts):
                    break
        return [ended[b] if b in ended else self.encoding.decode(row) for b, row in enumerate(rows)]


def harness_model(model: Transformer, tokenizer: Any, dtype: torch.dtype | None = None, progress: bool = False) -> Any:
    """A checkpoint as an lm_eval LM."""
    return type("Nano416", (Requests, harness("api.model").TemplateLM), {})(model, tokenizer, dtype, progress)


def harness(module: str) -> Any:
    """lm_eval.<module>. Raises ValueError when the package is missing."""
    import importlib

    try:
        return importlib.import_module(f"lm_eval.{module}")
    except ImportError as error:
        raise ValueError(f"the harness is missing ({error}): pip install lm_eval") from error


def check(runs: dict[int | None, list[str]], manager: Any) -> None:
    """Raise ValueError for a task that the harness does not know, with the nearest that it does."""
    for name in {name for tasks in runs.values() for name in tasks}:
        if name not in manager.all_tasks:
            raise ValueError(unknown("task", name, manager.all_tasks, "see `lm_eval ls tasks`"))


def evaluate(lm: Any, tasks: list[str], shots: int | None, args: Any, manager: Any, is_main: bool) -> None:
    """One run of the harness; prints its table and writes its files. Raises ValueError when it cannot get the data."""
    tracker = harness("loggers").EvaluationTracker(output_path=args.output_path if is_main else None)
    try:
        results = harness("evaluator").simple_evaluate(
            lm, model_args={"pretrained": str(args.checkpoint)}, tasks=tasks, num_fewshot=shots, limit=args.limit,
            log_samples=args.log_samples, evaluation_tracker=tracker, task_manager=manager,
        )  # fmt: skip
    except OSError as error:  # data sets come from the Hub
        raise ValueError(f"the data of {', '.join(tasks)} cannot be had: {type(error).__name__}: {error}") from error
    if not is_main:
        return
    make_table = harness("utils").make_table
    print(*(make_table(results, key) for key in ("results", "groups") if results.get(key)), sep="\n")
    samples = results.pop("samples", None)
    tracker.save_results_aggregated(results=results, samples=samples)
    for name in samples or {}:
        tracker.save_results_samples(task_name=name, samples=samples[name])


def main(args: Any) -> None:
    """Command line: everything that can fail early does, then one run of the harness per number of shots."""
    check_model(args)
    runs = plan(args.tasks, args.num_fewshot)
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"limit must be at least 1, got {args.limit}")
    if args.log_samples and not args.output_path:
        raise ValueError("--log_samples has no effect without --output_path")
    path = checkpoint.find(args.checkpoint)
    manager = harness("tasks").TaskManager(include_path=args.include_path)
    check(runs, manager)
    dist = distributed.init()
    device, dtype = precision(args, dist)
    model, tokenizer, meta = load(path, device)
    lm = harness_model(model, tokenizer, dtype, progress=dist.is_main)
    for shots, tasks in runs.items():
        if dist.is_main:
            print(f"{meta['path']}, step {meta['step']}, {'default' if shots is None else shots} shots", flush=True)
        evaluate(lm, tasks, shots, args, manager, dist.is_main)
    if dist.is_main and lm.truncated:
        print(f"{lm.truncated:,} contexts were longer than the model can read and lost their beginning")
    distributed.shutdown()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run(lambda: main(ARGS))
