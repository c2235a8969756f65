"""eval_lm_harness.py: the harness's own model on the same weights gives the same answers; HellaSwag equals ours."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, shared
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
    theirs_of,
    write_lines,
)

import eval_lm_harness
from eval_hellaswag import evaluate, load_items
from eval_lm_harness import harness_model, parse, plan

__all__ = ["gpt2"]  # the fixture

TEXTS = ["The quick brown fox", "Water boils at", "", "In 1905 a patent clerk wrote four papers about light, " * 3]


# ---- Tasks and shots -------------------------------------------------------------------------------------------------


def test_shots_are_runs_of_the_same_tasks():
    assert plan("piqa, boolq", None) == {None: ["piqa", "boolq"]}
    assert plan("piqa,boolq", "0,5") == {0: ["piqa", "boolq"], 5: ["piqa", "boolq"]}
    assert plan("copa,hellaswag", "10") == {10: ["copa", "hellaswag"]}


def test_presets_have_shots_of_their_own():
    core, marin = plan("core", None), plan("marin", None)
    assert sum(map(len, core.values())) == 13 and core[3] == ["agieval_lsat_ar"]
    assert "hellaswag" in core[0] and "hellaswag" in core[10] and core.keys() == {0, 3, 10}
    assert marin[5] == ["mmlu"] and marin[0] == [*core[0], "mmlu"] and marin[10] == core[10]
    assert plan("core,mmlu", "5") == {**core, 5: ["mmlu"]}


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["--tasks=core", "--num_fewshot=5"], "num_fewshot has no effect on core"),
        (["--tasks=piqa", "--num_fewshot=five"], "num_fewshot expects numbers separated by commas, got 'five'"),
        (["--tasks=,"], "--tasks is empty"),
        (["--tasks=piqa", "--limit=0"], "limit must be at least 1, got 0"),
        (["--tasks=piqa", "--log_samples"], "no effect without --output_path"),
    ],
)
def test_a_mistake_is_found_before_the_work(argv, hint, monkeypatch):
    monkeypatch.setattr(eval_lm_harness, "harness", lambda _: pytest.fail("the harness was loaded first"))
    with pytest.raises(ValueError, match=hint):
        eval_lm_harness.main(parse(["--checkpoint=run", *argv]))


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    for name in ["lm_eval", *(n for n in sys.modules if n.startswith("lm_eval."))]:  # another test may have imported it
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="pip install lm_eval"):
        eval_lm_harness.main(parse([f"--checkpoint={__file__}", "--tasks=piqa"]))


# ---- Answers ---------------------------------------------------------------------------------------------------------


def requests_of(kind: str, *args: tuple) -> list[Any]:
    instance = lm_eval_module("api.instance").Instance
    return [instance(kind, {}, arg, i) for i, arg in enumerate(args)]


def test_hellaswag_is_that_of_our_own_script(gpt2):
    items, model = load_items(shared("data/hellaswag_val_2000.jsonl"), limit=12), gpt2_model(60)
    lm = harness_model(model, gpt2)
    ours = [item["logprob_sums"] for item in evaluate(model, gpt2, items)["items"]]
    for theirs, sums in zip(theirs_of(lm, items), ours, strict=True):
        assert theirs == pytest.approx(sums, abs=1e-4)


@pytest.fixture
def pair(gpt2):
    """(our model in the harness, the harness's own model of the same weights), 48 tokens long."""
    lm_eval_module("models")
    model = gpt2_model(48)
    huggingface = lm_eval_module("models.huggingface")
    theirs = huggingface.HFLM(
        pretrained=hugging_face(model), tokenizer=gpt2_fast(), max_length=48, batch_size=2, device="cpu"
    )
    return harness_model(model, gpt2), theirs


def test_log_likelihoods_are_those_of_the_harness(pair):
    """Shared, empty and far too long contexts, trailing spaces, one-token answers, and whether the answer is greedy."""
    ours, _ = pair
    pairs = [(text, f" {answer}") for text in TEXTS for answer in ("A", "B", "of course", "it is " * 9)]
    pairs += [("Question: ", "yes"), ("Question: ", "no")]
    greedy = ours.generate_until(requests_of("generate_until", (TEXTS[0], {"max_gen_toks": 2})))[0]
    for a, b in zip(*(lm.loglikelihood(requests_of("loglikelihood", *pairs, (TEXTS[0], greedy))) for lm in pair)):
        assert a[0] == pytest.approx(b[0], abs=1e-3) and a[1] == b[1]
    assert ours.truncated > 0


def test_rolling_log_likelihoods_are_those_of_the_harness(pair):
    requests = requests_of("loglikelihood_rolling", *((text,) for text in [*TEXTS, "word " * 150]))
    ours, theirs = (lm.loglikelihood_rolling(requests) for lm in pair)
    assert ours == pytest.approx(theirs, abs=2e-3) and ours[2] == 0


def test_generated_texts_are_those_of_the_harness(pair):
    """Prompts of unequal length in one batch, cut from the left where they are too long; stop strings."""
    wishes = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
    prompts = [text for text in TEXTS if text]
    ours, theirs = (lm.generate_until(requests_of("generate_until", *((p, wishes) for p in prompts))) for lm in pair)
    assert ours == theirs and all(ours)
    stop = ours[0][5:8]
    (cut,) = pair[0].generate_until(requests_of("generate_until", (prompts[0], {**wishes, "until": [stop]})))
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
    """A run and a task of our own over three items, as the current folder."""
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


def launch(*argv: str, processes: int = 1) -> str:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(ROOT / "eval_lm_harness.py"), *argv]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def accuracies(folder: Path) -> list[float]:
    (path,) = folder.rglob("results_*.json")
    scores = json.loads(path.read_text())["results"]["local_hellaswag"]
    return [scores["acc,none"], scores["acc_norm,none"]]


def test_the_command_prints_the_harness_s_table_and_writes_its_files(folder, capsys, monkeypatch):
    tasks = lm_eval_module("tasks")  # without its own 14,000, which take ten seconds to read
    monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))
    argv = ["--checkpoint=run", "--include_path=tasks", "--tasks=local_hellaswag", "--num_fewshot=0"]
    eval_lm_harness.main(parse([*argv, "--output_path=out", "--log_samples"]))
    said = capsys.readouterr().out
    assert "step 7, 0 shots" in said and "|local_hellaswag|" in said.replace(" ", "")
    ours = evaluate(byte_model(), BYTES, load_items("x.jsonl"))
    assert accuracies(folder / "out") == [ours["acc"], ours["acc_norm"]]
    (samples,) = (folder / "out").rglob("samples_*.jsonl")
    answers = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda answer: answer["doc_id"])
    for answer, item in zip(answers, ours["items"], strict=True):
        sums = [float(response[0]) for response in answer["filtered_resps"]]
        assert sums == pytest.approx(item["logprob_sums"], abs=1e-4)


@pytest.mark.slow
def test_two_processes_share_the_work(folder):
    argv = ["--checkpoint=run", "--include_path=tasks", "--tasks=local_hellaswag", "--num_fewshot=0,1"]
    one, two = (launch(*argv, processes=n) for n in (1, 2))
    assert two.count("|local_hellaswag|") == 2 and "1 shots" in two  # rank 0 alone prints
    assert [r for r in one.splitlines() if r.startswith("|")] == [r for r in two.splitlines() if r.startswith("|")]


@pytest.mark.slow
def test_every_task_of_the_presets_is_known_and_an_unknown_one_has_a_neighbour():
    manager = lm_eval_module("tasks").TaskManager()
    eval_lm_harness.check(plan("marin", None), manager)
    with pytest.raises(ValueError, match="unknown task hellaswg; did you mean hellaswag"):
        eval_lm_harness.check(plan("hellaswg", None), manager)
