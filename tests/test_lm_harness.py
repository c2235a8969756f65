"""tools/eval_lm_harness.py: the same answers as the harness's own model with the same weights."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, changed, shared
from test_hellaswag import (
    BYTES,
    RECORD,
    byte_model,
    gpt2,
    gpt2_fast,
    gpt2_model,
    hugging_face,
    lm_eval_module,
    save,
    score_with_harness,
    write_lines,
)

from eval_hellaswag import evaluate, load_items
from nano416.config import parse_config
from tools import eval_lm_harness
from tools.eval_lm_harness import HarnessConfig, check_tasks, group_by_context, harness_lm, plan_runs

__all__ = ["gpt2"]  # the fixture

TEXTS = ["The quick brown fox", "Water boils at", "", "In 1905 a patent clerk wrote four papers about light, " * 3]


def run(*argv: str) -> None:
    """The command `python -m tools.eval_lm_harness argv`, in this process."""
    eval_lm_harness.main(parse_config(HarnessConfig, argv))


# ---- Tasks and shots -------------------------------------------------------------------------------------------------


def test_each_number_of_shots_is_a_run_of_the_same_tasks():
    assert plan_runs(["piqa", " boolq"], None) == {None: ["piqa", "boolq"]}
    assert plan_runs(["piqa", "boolq"], [0, 5]) == {0: ["piqa", "boolq"], 5: ["piqa", "boolq"]}


def test_presets_have_fixed_shots():
    core = plan_runs(["core"], None)
    marin = plan_runs(["marin"], None)
    assert sum(map(len, core.values())) == 13 and core[3] == ["agieval_lsat_ar"]
    assert "hellaswag" in core[0] and "hellaswag" in core[10] and core.keys() == {0, 3, 10}
    assert marin[5] == ["mmlu"] and marin[0] == [*core[0], "mmlu"] and marin[10] == core[10]
    assert plan_runs(["core", "mmlu"], [5]) == {**core, 5: ["mmlu"]}
    assert plan_runs(["core", "piqa"], [10])[10].count("piqa") == 1


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["--tasks=core", "--num_fewshot=5"], "num_fewshot has no effect on core"),
        (["--tasks=piqa", "--num_fewshot=five"], "num_fewshot expects .*, got 'five'"),
        (["--tasks=,"], "--tasks is empty"),
        (["--tasks=piqa", "--limit=0"], "limit must be at least 1, got 0"),
        (["--tasks=piqa", "--log_samples"], "no effect without --output_path"),
        (["--tasks=piqa", "--checkpoint=none"], "--checkpoint is missing"),
        (["--tasks=piqa", "--checkpoint=absent"], "no checkpoint at absent"),
    ],
)
def test_a_mistake_is_found_before_the_work(argv, hint, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)  # importing the harness would be another error
    with pytest.raises(ValueError, match=hint):
        run(*changed(["--checkpoint=run"], *argv))


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    # Another test may have imported it.
    for name in ["lm_eval", *(n for n in sys.modules if n.startswith("lm_eval."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="pip install lm_eval"):
        run(f"--checkpoint={__file__}", "--tasks=piqa")


def test_requests_are_grouped_by_context_up_to_the_length_of_a_row():
    a, b = [1, 2, 3], [4]
    requests = [(None, a, [7]), (None, b, [7, 8]), (None, a, [9, 9, 9]), (None, a, [5, 5, 5]), (None, b, [6])]
    assert group_by_context(requests, 99) == [[0, 2, 3], [1, 4]]
    assert group_by_context(requests, 5) == [[0, 2], [1, 4], [3]]


# ---- Answers ---------------------------------------------------------------------------------------------------------


def make_requests(kind: str, *args: tuple) -> list[Any]:
    instance = lm_eval_module("api.instance").Instance
    return [instance(kind, {}, arg, i) for i, arg in enumerate(args)]


def test_hellaswag_is_the_same_as_in_our_own_script(gpt2):
    items = load_items(shared("data/hellaswag_val_2000.jsonl"), limit=12)
    model = gpt2_model(60)
    ours = [item["logprob_sums"] for item in evaluate(model, gpt2, items)["items"]]
    for theirs, sums in zip(score_with_harness(harness_lm(model, gpt2), items), ours, strict=True):
        assert theirs == pytest.approx(sums, abs=1e-4)


@pytest.fixture
def pair(gpt2):
    """(our model in the harness, the harness's own model with the same weights), with a context of 48 tokens."""
    lm_eval_module("models")
    model = gpt2_model(48)
    huggingface = lm_eval_module("models.huggingface")
    theirs = huggingface.HFLM(
        pretrained=hugging_face(model), tokenizer=gpt2_fast(), max_length=48, batch_size=2, device="cpu"
    )
    return harness_lm(model, gpt2), theirs


def test_log_likelihoods_are_those_of_the_harness(pair):
    """With shared, empty and far too long contexts, trailing spaces, one-token answers and greedy answers."""
    ours, _ = pair
    pairs = [(text, f" {answer}") for text in TEXTS for answer in ("A", "B", "of course", "it is " * 9)]
    pairs += [("Question: ", "yes"), ("Question: ", "no")]
    greedy = ours.generate_until(make_requests("generate_until", (TEXTS[0], {"max_gen_toks": 2})))[0]
    for a, b in zip(*(lm.loglikelihood(make_requests("loglikelihood", *pairs, (TEXTS[0], greedy))) for lm in pair)):
        assert a[0] == pytest.approx(b[0], abs=1e-3) and a[1] == b[1]
    assert ours.n_truncated > 0


def test_rolling_log_likelihoods_are_those_of_the_harness(pair):
    requests = make_requests("loglikelihood_rolling", *((text,) for text in [*TEXTS, "word " * 150]))
    ours, theirs = (lm.loglikelihood_rolling(requests) for lm in pair)
    assert ours == pytest.approx(theirs, abs=2e-3) and ours[2] == 0


def test_generated_texts_are_those_of_the_harness(pair):
    """With prompts of different lengths in one batch, too long prompts, and stop strings."""
    settings = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
    prompts = [text for text in TEXTS if text]
    ours, theirs = (
        lm.generate_until(make_requests("generate_until", *((p, settings) for p in prompts))) for lm in pair
    )
    assert ours == theirs and all(ours)
    stop = ours[0][5:8]
    (cut,) = pair[0].generate_until(make_requests("generate_until", (prompts[0], {**settings, "until": [stop]})))
    assert cut == ours[0][: ours[0].index(stop)]


# ---- Command line ----------------------------------------------------------------------------------------------------

TASK = """
task: local_hellaswag
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {items}, train: {items}}}, cache_dir: {cache}}}
validation_split: validation
training_split: train
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a run and a task over three items."""
    lm_eval_module("evaluator")
    (tmp_path / "run").mkdir()
    (tmp_path / "tasks").mkdir()
    save(tmp_path / "run", byte_model(), step=7)
    records = [{**RECORD, "label": n, "ctx_a": "A man " * n} for n in range(3)]
    items = load_items(write_lines(tmp_path / "x.jsonl", *records))
    docs = [{"query": i.context, "choices": i.endings, "label": i.label} for i in items]
    path = write_lines(tmp_path / "docs.jsonl", *docs)
    (tmp_path / "tasks/local.yaml").write_text(TASK.format(items=path, cache=tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def launch(*argv: str, processes: int) -> str:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), "-m", "tools.eval_lm_harness", *argv]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def accuracies(folder: Path) -> list[float]:
    (path,) = folder.rglob("results_*.json")
    scores = json.loads(path.read_text())["results"]["local_hellaswag"]
    return [scores["acc,none"], scores["acc_norm,none"]]


def test_the_command_prints_the_table_of_the_harness_and_writes_its_files(folder, capsys, monkeypatch):
    # Without the harness's own 14,000 tasks, which take ten seconds to read.
    tasks = lm_eval_module("tasks")
    monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))
    argv = ["--checkpoint=run", "--include_path=tasks", "--tasks=local_hellaswag", "--num_fewshot=0"]
    run(*argv, "--output_path=out", "--log_samples")
    out = capsys.readouterr().out
    assert "step 7, 0 shots" in out and "|local_hellaswag|" in out.replace(" ", "")
    ours = evaluate(byte_model(), BYTES, load_items("x.jsonl"))
    assert accuracies(folder / "out") == [ours["acc"], ours["acc_norm"]]
    (samples,) = (folder / "out").rglob("samples_*.jsonl")
    answers = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda answer: answer["doc_id"])
    for answer, item in zip(answers, ours["items"], strict=True):
        sums = [float(response[0]) for response in answer["filtered_resps"]]
        assert sums == pytest.approx(item["logprob_sums"], abs=1e-4)


@pytest.mark.slow
def test_two_processes_give_the_tables_of_one(folder):
    argv = ["--checkpoint=run", "--include_path=tasks", "--tasks=local_hellaswag", "--num_fewshot=0,1"]
    one, two = (launch(*argv, processes=n) for n in (1, 2))
    # Only rank 0 prints.
    assert two.count("|local_hellaswag|") == 2 and "1 shots" in two
    assert [r for r in one.splitlines() if r.startswith("|")] == [r for r in two.splitlines() if r.startswith("|")]


@pytest.mark.slow
def test_every_task_of_the_presets_is_known_and_a_typo_gets_a_suggestion():
    manager = lm_eval_module("tasks").TaskManager()
    check_tasks(plan_runs(["marin"], None), manager)
    with pytest.raises(ValueError, match="unknown task hellaswg; did you mean hellaswag"):
        check_tasks(plan_runs(["hellaswg"], None), manager)
