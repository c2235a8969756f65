"""Evaluate a checkpoint on tasks of EleutherAI's lm-evaluation-harness: MMLU, ARC, PIQA, LAMBADA and all the others.

    pip install lm_eval                                       # optional, hence not in requirements.txt
    python -m tools.eval_lm_harness --checkpoint checkpoints --tasks hellaswag,arc_easy,mmlu --num_fewshot 0,5
    python -m tools.eval_lm_harness --checkpoint checkpoints --tasks core --limit 200 --output_path results
    torchrun --standalone --nproc_per_node=8 -m tools.eval_lm_harness --checkpoint checkpoints --tasks marin

Tasks, metrics, tables and the JSON in --output_path are the harness's own; no export is needed. Questions that share a
context are packed into one row of a batch, as in eval_hellaswag.py, and HellaSwag has the same numbers in both.
--tasks takes tasks and groups of the harness (`lm_eval ls tasks` lists them) and two presets with fixed shots: core
(the 13 settings of Marin's CORE_TASKS) and marin (core, and MMLU with 0 and with 5 shots).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

import torch

from eval_hellaswag import matmul_dtype
from model import Transformer
from nano416 import checkpoint, distributed
from nano416.config import parse_config, run_cli, unknown_name, visible
from nano416.devices import autocast, pick_device
from nano416.generate import Sampling, generate_batch
from nano416.scoring import ScoringConfig, is_bidirectional, max_row_length, pack_context, score_rows
from nano416.tokenizer import Tokenizer

# Shots of each task. Marin's CORE_TASKS, a part of DCLM's core (arXiv:2406.11794, p. 43).
CORE = {
    "agieval_lsat_ar": [3],
    "arc_easy": [10],
    "arc_challenge": [10],
    "boolq": [10],
    "commonsense_qa": [10],
    "copa": [0],
    "hellaswag": [0, 10],
    "lambada_openai": [0],
    "openbookqa": [0],
    "piqa": [10],
    "wsc273": [0],
    "winogrande": [0],
}
PRESETS = {"core": CORE, "marin": {**CORE, "mmlu": [0, 5]}}
GENERATION_BATCH = 32

# One request of the harness as tokens: (anything, context, continuation).
Request = tuple[Any, list[int], list[int]]


@dataclass(frozen=True)
class HarnessConfig:
    """A checkpoint on tasks of lm-evaluation-harness."""

    checkpoint: str | None = None  # file, run directory or Hub id
    tasks: list[str] = field(default_factory=list)  # tasks of the harness, core or marin, separated by commas
    num_fewshot: list[int] | None = None  # shots, one run for each: 0,5; none = the default of each task
    limit: int | None = None  # only the first N questions of each task, for a quick look
    output_path: str | None = None  # folder or .json for the harness's results; none = only print them
    log_samples: bool = False  # also write every question and answer to --output_path
    include_path: str | None = None  # folder with task files of your own
    device: str | None = None  # cpu or cuda; none = cuda if there is one
    dtype: Literal["fp32", "bf16"] | None = None  # precision of matmuls; none = bf16 on a GPU, else fp32

    def __post_init__(self):
        if self.checkpoint is None:
            raise ValueError("--checkpoint is missing; give a run directory, a checkpoint file or a Hub id")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}")
        if self.log_samples and not self.output_path:
            raise ValueError("--log_samples has no effect without --output_path; add it")


def plan_runs(tasks: list[str], num_fewshot: list[int] | None) -> dict[int | None, list[str]]:
    """Return the tasks to run with each number of shots; None = the default of each task.

    Raises ValueError if there are no tasks, or for shots that have no effect.
    """
    names = [name.strip() for name in tasks if name.strip()]
    if not names:
        raise ValueError("--tasks is empty; name some, such as hellaswag,arc_easy")
    if num_fewshot and all(name in PRESETS for name in names):
        raise ValueError(f"--num_fewshot has no effect on {','.join(names)}; leave it out or name the tasks")
    runs: dict[int | None, list[str]] = {}
    for name in names:
        preset = PRESETS.get(name, {name: num_fewshot or [None]})
        for task, shots in preset.items():
            for n in shots:
                runs.setdefault(n, []).append(task)
    # A task may be named twice, once by a preset.
    return {n: list(dict.fromkeys(tasks_of_run)) for n, tasks_of_run in runs.items()}


# ---- The model in the harness ----------------------------------------------------------------------------------------


def harness_lm(model: Transformer, tokenizer: Tokenizer, dtype: torch.dtype | None = None, progress: bool = False):
    """Wrap a model as a language model of the harness. `.n_truncated` counts contexts that lost their beginning."""
    from lm_eval.api.model import TemplateLM

    class Nano416(CheckpointLM, TemplateLM):
        pass

    return Nano416(model, tokenizer, dtype, progress)


class CheckpointLM:
    """The methods that the harness calls. Its base class TemplateLM is optional, so `harness_lm` adds it.

    The harness sees a single process: all ranks receive all requests and split them here.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, dtype: torch.dtype | None, progress: bool):
        super().__init__()
        self.model = model
        # `tokenizer` is an attribute of TemplateLM, which expects one of transformers there.
        self.encoding = tokenizer
        self.dtype = dtype
        self.scoring = ScoringConfig(progress=progress)
        self.max_length = max_row_length(model)
        self.n_truncated = 0

    @property
    def eot_token_id(self) -> int:
        return self.encoding.eot_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.encoding.encode(string)

    def _loglikelihood_tokens(self, requests: list[Request], **kwargs: Any) -> list[tuple[float, bool]]:
        """Return (log-likelihood in nats, is greedy) of each continuation."""
        groups = group_by_context(requests, self.max_length)
        rows = []
        for i, group in enumerate(groups):
            context = requests[group[0]][1]
            rows += pack_context(i, context, [requests[j][2] for j in group], self.max_length)
        answers = [(0.0, True)] * len(requests)
        for row, logprobs, greedy in score_rows(self.model, rows, self.dtype, self.scoring):
            indices = groups[row.item][row.first : row.first + len(logprobs)]
            for j, logprob, is_greedy in zip(indices, logprobs, greedy, strict=True):
                answers[j] = (logprob, is_greedy)
        self.n_truncated += sum(row.truncated_contexts for row in rows)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return log-likelihoods of whole texts, in windows of the model's length that overlap by one token."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows: list[Request] = []
        owners = []
        for i, request in enumerate(requests):
            tokens = self.encoding.encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.eot_token_id, self.max_length, context_len=1):
                context, continuation = make_disjoint_window(window)
                windows.append((None, context, continuation))
                owners.append(i)
        sums = [0.0] * len(requests)
        for i, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[i] += logprob
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts up to a stop string, in batches of the same settings and of similar length."""
        if is_bidirectional(self.model):
            raise ValueError("tasks that generate text need an autoregressive model; choose other --tasks")
        prompts = [self.encoding.encode(request.args[0]) or [self.eot_token_id] for request in requests]
        settings = [repr(request.args[1]) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: (settings[i], -len(prompts[i])))
        # A batch has one setting: the harness may ask for other stop strings in each request.
        batches = []
        for _, group in groupby(order, key=lambda i: settings[i]):
            indices = list(group)
            batches += [indices[i : i + GENERATION_BATCH] for i in range(0, len(indices), GENERATION_BATCH)]
        texts: dict[int, str] = {}
        for batch in batches[distributed.rank() :: distributed.world_size()]:
            continuations = self._generate([prompts[i] for i in batch], requests[batch[0]].args[1])
            texts.update(zip(batch, continuations, strict=True))
        for part in distributed.all_gather_object(texts):
            texts |= part
        return [texts[i] for i in range(len(requests))]

    def _generate(self, prompts: list[list[int]], settings: dict[str, Any]) -> list[str]:
        """Continue prompts by up to max_gen_toks tokens, but at most half the context; long prompts keep their ends."""
        max_new_tokens = min(int(settings.get("max_gen_toks", 256)), max(1, self.max_length // 2))
        max_prompt = max(1, self.max_length - max_new_tokens)
        prompts = [prompt[-max_prompt:] for prompt in prompts]
        temperature = float(settings.get("temperature") or 0) if settings.get("do_sample", True) else 0.0
        # Tasks write top_k = 0 for all tokens, as transformers does.
        sampling = Sampling(temperature, settings.get("top_k") or None, settings.get("top_p"), seed=0)
        stops = settings.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops

        tokens: list[list[int]] = [[] for _ in prompts]
        finished: dict[int, str] = {}
        with autocast(self.model.embed_tokens.weight.device, self.dtype):
            for next_tokens in generate_batch(self.model, prompts, max_new_tokens, sampling):
                for b, token in enumerate(next_tokens):
                    if b in finished:
                        continue
                    if token != self.eot_token_id:
                        tokens[b].append(token)
                    text = self.encoding.decode(tokens[b])
                    ends = [text.find(stop) for stop in stops if stop and stop in text]
                    if ends or token == self.eot_token_id:
                        finished[b] = text[: min(ends, default=len(text))]
                if len(finished) == len(prompts):
                    break
        return [finished.get(b, self.encoding.decode(tokens[b])) for b in range(len(prompts))]


def group_by_context(requests: list[Request], max_length: int) -> list[list[int]]:
    """Group indices of requests that share a context, as many as fit in a row of `max_length` tokens."""
    groups: list[list[int]] = []
    # The last group of each context, and how long its row is.
    last: dict[tuple[int, ...], tuple[list[int], int]] = {}
    for i, (_, context, continuation) in enumerate(requests):
        group, length = last.get(tuple(context), ([], 0))
        if not group or length + len(continuation) - 1 > max_length:
            group = []
            length = len(context)
            groups.append(group)
        group.append(i)
        last[tuple(context)] = (group, length + len(continuation) - 1)
    return groups


# ---- Command line ----------------------------------------------------------------------------------------------------


def run_tasks(lm: Any, tasks: list[str], shots: int | None, cfg: HarnessConfig, manager: Any) -> None:
    """Run the harness once, print its tables and write its files. Raises ValueError if a dataset cannot be loaded."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.utils import make_table

    is_main = distributed.rank() == 0
    tracker = EvaluationTracker(output_path=cfg.output_path if is_main else None)
    evaluate: Callable[..., Any] = simple_evaluate
    try:
        results = evaluate(
            lm,
            model_args={"pretrained": str(cfg.checkpoint)},
            tasks=tasks,
            num_fewshot=shots,
            limit=cfg.limit,
            log_samples=cfg.log_samples,
            evaluation_tracker=tracker,
            task_manager=manager,
        )
    except OSError as error:
        # The harness downloads its datasets from the Hub.
        raise ValueError(f"cannot load the data of {', '.join(tasks)}: {type(error).__name__}: {error}") from error
    if not is_main:
        return
    for key in ("results", "groups"):
        if results.get(key):
            print(visible(make_table(results, key)))
    samples = results.pop("samples", None)
    tracker.save_results_aggregated(results=results, samples=samples)
    for name in samples or {}:
        tracker.save_results_samples(task_name=name, samples=samples[name])


def check_tasks(runs: dict[int | None, list[str]], manager: Any) -> None:
    """Raise ValueError for a task that the harness does not know, suggesting the nearest one."""
    for tasks in runs.values():
        for name in tasks:
            if name not in manager.all_tasks:
                raise ValueError(unknown_name("task", name, manager.all_tasks, "see `lm_eval ls tasks`"))


def main(cfg: HarnessConfig) -> None:
    """Run the harness once per number of shots, after everything that can fail early."""
    assert cfg.checkpoint is not None
    runs = plan_runs(cfg.tasks, cfg.num_fewshot)
    path = checkpoint.resolve(cfg.checkpoint)
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f"lm-evaluation-harness is missing ({error}): pip install lm_eval") from error
    manager = TaskManager(include_path=cfg.include_path)
    check_tasks(runs, manager)
    dist = distributed.init()
    device = pick_device(cfg.device) if cfg.device else dist.device
    model, tokenizer, metadata = checkpoint.load_model_and_tokenizer(path, device)
    lm = harness_lm(model, tokenizer, matmul_dtype(cfg.dtype, device), dist.is_main)
    for shots, tasks in runs.items():
        if dist.is_main:
            shots_text = "default" if shots is None else str(shots)
            print(visible(f"{metadata['path']}, step {metadata['step']}, {shots_text} shots"), flush=True)
        run_tasks(lm, tasks, shots, cfg, manager)
    if dist.is_main and lm.n_truncated:
        print(f"{lm.n_truncated:,} contexts were longer than the model can read and lost their beginning")
    distributed.shutdown()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run_cli(lambda: main(parse_config(HarnessConfig)))
