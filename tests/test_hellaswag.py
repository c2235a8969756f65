"""eval_hellaswag.py: text, tokens and scores are those of lm-evaluation-harness, item by item."""

import dataclasses
import functools
import hashlib
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, changed, shared, tiny_model

import eval_hellaswag
from eval_hellaswag import EvalConfig, Item, accuracies, clean, evaluate, load_items, pack_items
from model import Transformer
from nano416 import checkpoint, scoring
from nano416.config import parse_config
from nano416.scoring import make_batches
from nano416.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")
ITEMS = [
    Item("Baking: A man stirs a bowl. he", ["adds two eggs.", "leaves.", "flies to the moon, then back.", "x"], 0),
    Item("Running: She runs", ["home.", "a very long way through the forest and over the hills.", "off.", "in."], 1),
    Item("Tea: Pour water. Then wait. Then", ["drink.", "sip.", "throw the cup at the wall.", "sleep."], 3),
    # A context that ends in a space.
    Item("Sport: ", ["one.", "two.", "three.", "four."], 2),
]


def byte_model(**changes) -> Transformer:
    return tiny_model(vocab_size=257, seq_len=96, **changes)


def run(*argv: str) -> None:
    """The command `python eval_hellaswag.py argv`, in this process."""
    eval_hellaswag.main(parse_config(EvalConfig, argv))


@torch.no_grad()
def score_alone(model: Transformer, tokenizer: Any, item: Item) -> list[float]:
    """Log-likelihood of each ending by a forward pass over its own text, truncated on the left."""
    sums = []
    for ending in item.endings:
        tokens = tokenizer.encode(f"{item.context} {ending}")
        n_ending = len(tokens) - len(tokenizer.encode(item.context.rstrip()))
        tokens = tokens[-(model.config.seq_len + 1) :]
        logprobs = model(torch.tensor([tokens[:-1]]))[0].log_softmax(-1)
        sums.append(sum(logprobs[i - 1, tokens[i]].item() for i in range(len(tokens) - n_ending, len(tokens))))
    return sums


# ---- Text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  a b \n", "a b"),
        ("Cook [title] Boil water", "Cook. Boil water"),
        ("[title] Boil", " Boil"),  # no space before it
        ("a [step] b [substeps] c", "a b c"),
        ("a [x] [y] b", "a  b"),  # double spaces become one, once
        ("a    b", "a  b"),
        ("a [not closed", "a [not closed"),
        ("end [step]", "end "),  # stripped before, not after
    ],
)
def test_text_is_cleaned_by_the_rules_of_lm_eval(text, cleaned):
    assert clean(text) == cleaned


def write_lines(path: Path, *records) -> Path:
    lines = (
        r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() + b"\n" for r in records
    )
    path.write_bytes(b"".join(lines))
    return path


RECORD = {
    "activity_label": "Washing",
    "ctx_a": "A man [step] washes.",
    "ctx_b": "the MAN",
    "endings": ["a.", "b [x].", " c.", "d. [title] e."],
    "label": "2",
}


def test_an_item_has_the_text_of_lm_eval(tmp_path):
    (item,) = load_items(write_lines(tmp_path / "x.jsonl", RECORD))
    assert item == Item("Washing: A man washes. The man", ["a.", "b .", "c.", "d.. e."], 2)


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ('{"ctx_a": ', "not a HellaSwag item"),
        ("[1]", "not a HellaSwag item"),
        ({**RECORD, "label": ""}, "not a HellaSwag item"),
        ({k: v for k, v in RECORD.items() if k != "endings"}, "endings"),
        ({**RECORD, "ctx_b": None}, "not a HellaSwag item"),
        ({**RECORD, "label": 4}, "a label of 0..3, has 4 and 4"),
        ({**RECORD, "endings": ["a", "b", "c"]}, "needs 4 endings"),
        ({**RECORD, "endings": ["a", "b", "c", "[x]"]}, "ending 3 is empty"),
        (b"\xff{}\n", "not a HellaSwag item .*utf-8"),
    ],
)
def test_a_bad_line_is_named_with_its_number(line, hint, tmp_path):
    path = write_lines(tmp_path / "x.jsonl", RECORD, RECORD, line)
    with pytest.raises(ValueError, match=r"x\.jsonl:3\b.*" + hint):
        load_items(path)
    assert len(load_items(path, limit=2)) == 2


@pytest.mark.parametrize(
    "changes",
    [
        *(
            {"label": label}
            for label in (1.9, 1.0, True, None, [1], {"1": 1}, "one", "1.0", "-1", "", math.inf, math.nan)
        ),
        *({"label": label} for label in (-1, 4, 10**30)),
        *(
            {"endings": endings}
            for endings in ("abcd", {"a": 1, "b": 2, "c": 3, "d": 4}, [1, 2, 3, 4], None, 5, [["a"]])
        ),
        *({key: value} for key in ("ctx_a", "ctx_b", "activity_label") for value in (None, 5, ["a"], {"a": 1})),
    ],
)
def test_an_item_of_odd_types_is_refused_with_its_line(changes, tmp_path):
    path = write_lines(tmp_path / "x.jsonl", RECORD, {**RECORD, **changes})
    with pytest.raises(ValueError, match=r"x\.jsonl:2\b"):
        load_items(path)


def test_a_line_of_deep_nesting_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"x\.jsonl:1 is not a HellaSwag item"):
        load_items(write_lines(tmp_path / "x.jsonl", "[" * 100_000))


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.write_text(""), lambda p: p.write_bytes(b"\xff\xfe")])
def test_a_missing_empty_or_binary_file_is_named(make, tmp_path):
    make(tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match=r"x\.jsonl"):
        load_items(tmp_path / "x.jsonl")


# ---- Scores ----------------------------------------------------------------------------------------------------------


def test_an_ending_includes_the_space_before_it():
    rows = list(pack_items(enumerate(ITEMS), BYTES, seq_len=96))
    assert [BYTES.decode(row.context) for row in rows] == [item.context.rstrip() for item in ITEMS]
    assert [BYTES.decode(row.endings[0]) for row in rows[:3]] == [f" {item.endings[0]}" for item in ITEMS[:3]]
    assert BYTES.decode(rows[3].endings[0]) == "  one."


@pytest.mark.parametrize("seq_len", [96, 64, 56])
def test_items_score_as_one_forward_pass_per_ending(seq_len):
    model = tiny_model(vocab_size=257, seq_len=seq_len)
    for item, record in zip(ITEMS, evaluate(model, BYTES, ITEMS)["items"], strict=True):
        assert record["logprob_sums"] == pytest.approx(score_alone(model, BYTES, item), abs=1e-4)


def test_truncated_texts_are_counted_and_reported():
    longest = 1 + max(len(ending) for ending in ITEMS[1].endings)  # with the space before it
    scores = evaluate(tiny_model(vocab_size=257, seq_len=longest), BYTES, ITEMS)
    table = eval_hellaswag.format_scores(scores)
    assert (scores["truncated_contexts"], scores["truncated_endings"]) == (3, 0)  # "Sport:" still fits
    assert "3 contexts were longer" in table and "endings" not in table
    scores = evaluate(tiny_model(vocab_size=257, seq_len=longest - 1), BYTES, ITEMS)
    assert (scores["truncated_contexts"], scores["truncated_endings"]) == (3, 1)
    scores = evaluate(byte_model(), BYTES, ITEMS)
    assert (scores["truncated_contexts"], scores["truncated_endings"]) == (0, 0)
    assert "longer" not in eval_hellaswag.format_scores(scores)


def test_acc_takes_the_likeliest_ending_and_acc_norm_the_likeliest_per_character():
    items = [Item("", ["ué", "bbbb", "c", "d"], 1), Item("", ["aa", "bbbb", "c", "d"], 2), Item("", ["a"] * 4, 0)]
    sums = [[-3.0, -4.0, -9.0, -9.0], [-3.0, -4.0, -1.0, -9.0], [-1.0, -1.0, -1.0, -1.0]]
    n_tokens = [[1, 1, 1, 1], [3, 4, 1, 10], [1, 1, 1, 1]]
    scores = accuracies(items, sums, n_tokens)
    # acc: item 0 is wrong (-3 beats -4), 1 right, 2 a tie that the first ending wins, as in numpy's argmax.
    # acc_norm: item 0 is right (-4/4 beats -3/2: characters, not bytes).
    # Item 1 (-1.5 -1 -1 -9) is a tie that ending 1 wins: wrong.
    # Token mean: item 0 is wrong, and so is 1 (-1 -1 -1 -0.9).
    assert [scores[key] for key in ("acc", "acc_norm", "acc_token_mean")] == pytest.approx([2 / 3, 2 / 3, 1 / 3])
    assert scores["acc_stderr"] == pytest.approx(math.sqrt(2 / 3 * 1 / 3 / 2))
    assert scores["items"][0] == {"index": 0, "label": 1, "logprob_sums": sums[0], "logprob_norms": [-1.5, -1, -9, -9]}
    assert scores["num_examples"] == 3


def test_one_item_has_no_standard_error():
    assert accuracies(ITEMS[:1], [[-1.0] * 4], [[1] * 4])["acc_stderr"] == 0


def test_broken_weights_are_an_error_and_not_a_score_of_one_quarter():
    model = byte_model()
    torch.nn.init.constant_(model.norm.weight, math.nan)
    with pytest.raises(ValueError, match=r"item 0: .* not finite"):
        evaluate(model, BYTES, ITEMS)


# ---- Real items, real tokens -----------------------------------------------------------------------------------------


@pytest.fixture
def gpt2(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared("tiktoken_cache")))
    return load_tokenizer("gpt2")


def gpt2_model(seq_len: int) -> Transformer:
    return tiny_model(vocab_size=50257, dim=16, n_heads=2, ffn_dim=24, seq_len=seq_len, scale=20.0)


def test_real_items_score_as_one_forward_pass_per_ending(gpt2):
    items = load_items(shared("data/hellaswag_val_2000.jsonl"), limit=12)
    model = gpt2_model(60)
    scores = evaluate(model, gpt2, items)
    assert 0 < scores["truncated_contexts"] < len(items)
    for item, record in zip(items, scores["items"]):
        assert record["logprob_sums"] == pytest.approx(score_alone(model, gpt2, item), abs=1e-3, rel=1e-5)


def test_all_real_items_are_read():
    items = load_items(shared("data/hellaswag_val_2000.jsonl"))
    assert len(items) == 2000 and all("[" not in item.context for item in items)
    assert items[0].context == "Roof shingle removal: A man is sitting on a roof. he"


def hugging_face(model: Transformer):
    """The same network as a LlamaForCausalLM."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c: Any = model.config
    config = LlamaConfig(
        hidden_size=c.dim, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads, intermediate_size=c.ffn_dim,
        num_key_value_heads=c.n_kv_heads, vocab_size=c.vocab_size, max_position_embeddings=c.seq_len,
        rms_norm_eps=1e-6, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).eval()
    weights = {f"model.{k}": v[: c.vocab_size] if "embed" in k else v for k, v in model.state_dict().items()}
    theirs.load_state_dict(weights, strict=False)
    theirs.tie_weights()
    return theirs


def test_every_item_scores_as_in_lm_eval(gpt2, tmp_path):
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")  # which HFLM imports
    import lm_eval.api.task
    import lm_eval.evaluator
    import lm_eval.models.huggingface
    from lm_eval.tasks.hellaswag.utils import process_docs

    trailing = {**RECORD, "ctx_b": "wipes it [step]"}  # worded as a context that ends in a space
    lines = shared("data/hellaswag_val_2000.jsonl").read_text().splitlines()[:24]
    records = [json.loads(line) for line in lines]
    keys = ("activity_label", "ctx_a", "ctx_b", "endings", "label")
    records = [{key: record[key] for key in keys} for record in [*records, trailing]]
    # The Hub's dataset stores labels as strings.
    path = write_lines(tmp_path / "x.jsonl", *(record | {"label": str(record["label"])} for record in records))
    model = gpt2_model(60)
    ours = evaluate(model, gpt2, load_items(path))
    assert 0 < ours["truncated_contexts"] < 25  # some contexts must be cut, others not

    harness: Any = lm_eval  # its annotations do not fit its own examples
    task = harness.api.task.ConfigurableTask(
        config={
            "task": "hellaswag", "dataset_path": "json", "output_type": "multiple_choice", "doc_to_text": "{{query}}",
            "dataset_kwargs": {"data_files": {"validation": str(path)}, "cache_dir": str(tmp_path / "cache")},
            "validation_split": "validation", "process_docs": process_docs, "doc_to_target": "{{label}}",
            "doc_to_choice": "choices", "metadata": {"version": 1.0},
            "metric_list": [
                {"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")
            ],
        }
    )  # fmt: skip
    network = hugging_face(model)
    lm = harness.models.huggingface.HFLM(
        pretrained=network, tokenizer=gpt2_fast(), max_length=60, batch_size=8, device="cpu"
    )
    theirs = harness.evaluator.evaluate(lm, {"hellaswag": task}, bootstrap_iters=0, log_samples=True)
    samples = sorted(theirs["samples"]["hellaswag"], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(ours["items"]) == 25
    for sample, record in zip(samples, ours["items"]):
        sums = [float(answer[0]) for answer in sample["filtered_resps"]]
        assert record["logprob_sums"] == pytest.approx(sums, abs=1e-3), sample["doc_id"]
    for metric in ("acc", "acc_norm"):
        assert ours[metric] == pytest.approx(theirs["results"]["hellaswag"][f"{metric},none"])


# ---- Command line ----------------------------------------------------------------------------------------------------


def save(run_dir: Path, model: Transformer, step: int) -> None:
    metadata = {"config": {"model": dataclasses.asdict(model.config)}, "tokenizer": BYTES.info(), "metrics": {}}
    path = checkpoint.checkpoint_path(run_dir, step)
    checkpoint.write(path, {"format": 1, "step": step, "tokens": 0, "model": model.state_dict(), **metadata})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with three items and a run, as the current one."""
    (tmp_path / "run").mkdir()
    save(tmp_path / "run", byte_model(), step=7)
    write_lines(tmp_path / "x.jsonl", RECORD, RECORD, RECORD)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_prints_a_table_and_writes_every_item_and_its_settings(folder, capsys):
    run("--checkpoint", "run", "--data", "x.jsonl", "--num_examples", "2", "--output", "s.json")
    out = capsys.readouterr().out
    for word in ("step 7", "this checkpoint", "±", "chance", "25.00", "GPT-2 124M", "28.92", "31.14", "items/s"):
        assert word in out, out
    scores = json.loads((folder / "s.json").read_text())
    assert {"acc", "acc_norm", "acc_stderr", "acc_norm_stderr"} <= scores.keys() and len(scores["items"]) == 2
    assert scores["items"][1].keys() == {"index", "label", "logprob_sums", "logprob_norms"}
    assert scores["step"] == 7 and scores["checkpoint"] == "run/checkpoint_step_7.pt"
    assert scores["settings"]["data_sha256"] == hashlib.sha256((folder / "x.jsonl").read_bytes()).hexdigest()
    assert scores["settings"]["dtype"] == "fp32" and scores["settings"]["versions"]["torch"] == torch.__version__
    model = byte_model()
    assert scores["weights_sha256"] == eval_hellaswag.weights_sha256(model)
    with torch.no_grad():
        model.norm.weight[3] += 1e-6
    assert scores["weights_sha256"] != eval_hellaswag.weights_sha256(model)


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["--num_examples=0"], "num_examples must be at least 1, got 0"),
        (["--data=absent.jsonl"], "cannot read absent.jsonl"),
        (["--output=no/such/folder/s.json"], "cannot write no/such/folder/s.json"),
        (["--output=run"], "cannot write run"),
        (["--checkpoint=absent"], "no checkpoint at absent"),
        (["--all", "--checkpoint=run/checkpoint_step_7.pt"], "--all needs a run directory"),
        (["--num_mc=4"], "--num_mc has no effect with the chain rule"),
        (["--likelihood=counts"], "--likelihood has no effect on an autoregressive model"),
        (["--device=nonsense"], "device 'nonsense' cannot be used here"),
    ],
)
def test_a_mistake_is_found_before_the_work(argv, hint, folder, monkeypatch):
    monkeypatch.setattr(eval_hellaswag, "evaluate", lambda *_: pytest.fail("it was scored first"))
    before = sorted(os.listdir(folder))
    with pytest.raises(ValueError, match=hint):
        run(*changed(["--checkpoint=run", "--data=x.jsonl"], *argv))
    assert sorted(os.listdir(folder)) == before


COUNT_FORWARD_PASSES = """
import os, sys
from pathlib import Path
import torch
import eval_hellaswag
from nano416 import scoring
from nano416.config import parse_config
torch.set_num_threads(1)
scoring.CPU_BATCH_TOKENS = 150
calls = []
score_batch = scoring.score_batch
scoring.score_batch = lambda *args: calls.append(1) or score_batch(*args)
eval_hellaswag.main(parse_config(eval_hellaswag.EvalConfig, ["--checkpoint=run", "--data=x.jsonl", "--output=two"]))
Path("passes" + os.environ["RANK"]).write_text(str(len(calls)))
"""


def test_two_processes_give_the_same_scores_with_equally_many_forward_passes(folder, monkeypatch):
    """Scores are equal to the last bit. The number of batches is odd, so that one rank has to fill up with a dummy."""
    records = [{**RECORD, "ctx_a": "A man " + "washes and " * n, "label": n % 4} for n in range(5)]
    items = load_items(write_lines(folder / "x.jsonl", *records))
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = str(listener.getsockname()[1])
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    processes = []
    for rank in "01":
        env = os.environ | common | {"RANK": rank, "LOCAL_RANK": rank}
        command = [sys.executable, "-c", COUNT_FORWARD_PASSES]
        processes.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
    two = json.loads((folder / "two").read_text())
    monkeypatch.setattr(scoring, "CPU_BATCH_TOKENS", 150)
    assert two["items"] == evaluate(byte_model(), BYTES, items)["items"] and two["settings"]["processes"] == 2
    n_batches = len(list(make_batches(list(pack_items(enumerate(items), BYTES, seq_len=96)), 150)))
    assert n_batches % 2 == 1
    assert [(folder / f"passes{rank}").read_text() for rank in "01"] == [str((n_batches + 1) // 2)] * 2


def test_all_checkpoints_of_a_run_are_scored_and_plotted(folder, capsys):
    save(folder / "run", byte_model(seed=1), step=100)
    run("--checkpoint=run", "--data=x.jsonl", "--all", "--output=s.json")
    runs = json.loads((folder / "s.json").read_text())["checkpoints"]
    assert [scores["step"] for scores in runs] == [7, 100] and len(runs[1]["items"]) == 3
    assert (folder / "run/hellaswag.png").read_bytes().startswith(b"\x89PNG")
    assert "wrote run/hellaswag.png" in capsys.readouterr().out


def fake_scores(*predictions: int) -> dict[str, Any]:
    """An --output file of items with label 0 and these predicted endings."""
    items = []
    for index, prediction in enumerate(predictions):
        logprobs = [float(i == prediction) for i in range(4)]
        items.append({"index": index, "label": 0, "logprob_sums": logprobs, "logprob_norms": logprobs})
    return {"items": items}


def test_a_comparison_is_paired(folder, capsys):
    (folder / "a.json").write_text(json.dumps(fake_scores(0, 0, 1, 1)))
    (folder / "b.json").write_text(json.dumps(fake_scores(0, 1, 0, 0)))
    run("--compare=a.json,b.json")
    row = capsys.readouterr().out.splitlines()[1].split()
    # The differences are 0, -1, 1, 1: mean 1/4, standard deviation 0.957, / sqrt(4).
    assert row == ["acc", "50.00", "75.00", "+25.00", "±", "47.87", "1", "2"]


def scores_with(**changes) -> Any:
    scores = fake_scores(0, 1)
    scores["items"][1] |= changes
    return scores


ODD_SCORES = [
    "",
    [],
    {},
    {"items": []},
    {"items": {}},
    {"items": 5},
    {"items": [5]},
    {"items": [{}]},
    {"checkpoints": [fake_scores(0)]},
    *(
        scores_with(logprob_sums=values)
        for values in ([], [1.0], None, "abcd", 5, ["a"] * 4, [math.nan] * 4, [math.inf] * 4)
    ),
    *(scores_with(logprob_norms=values) for values in ([], [None] * 4, [[0]] * 4, {"0": 1})),
    *(scores_with(label=label) for label in (None, "1", 1.0, True, -1, 4, [1])),
    *(scores_with(index=index) for index in (None, "1", 1.5, [])),
]


@pytest.mark.parametrize("scores", ODD_SCORES)
def test_an_odd_file_of_scores_is_named(scores, folder):
    (folder / "a.json").write_text(json.dumps(fake_scores(0, 1)))
    (folder / "b.json").write_text(json.dumps(scores) if scores != "" else "")
    for pair in ("a.json,b.json", "b.json,a.json"):
        with pytest.raises(ValueError, match=r"b\.json is not an --output file of one checkpoint"):
            run(f"--compare={pair}")


def test_a_damaged_checkpoint_does_not_cost_the_scores_of_the_others(folder, capsys):
    save(folder / "run", byte_model(), step=100)
    (folder / "run/checkpoint_step_50.pt").write_bytes(b"damaged")
    broken = byte_model()
    torch.nn.init.constant_(broken.norm.weight, math.nan)
    save(folder / "run", broken, step=60)
    with pytest.raises(ValueError, match=r"2 of 4 checkpoints could not be scored: .*checkpoint_step_50\.pt"):
        run("--checkpoint=run", "--all", "--data=x.jsonl", "--output=all.json")
    out, error = capsys.readouterr()
    assert [line.split(":")[0] for line in error.splitlines()] == ["not scored"] * 2
    assert "wrote run/hellaswag.png" in out
    runs = json.loads((folder / "all.json").read_text())["checkpoints"]
    assert [scores["step"] for scores in runs] == [7, 100]


def test_if_no_checkpoint_can_be_scored_nothing_is_written(folder):
    (folder / "run/checkpoint_step_7.pt").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"1 of 1 checkpoints could not be scored: .*step_7\.pt"):
        run("--checkpoint=run", "--all", "--data=x.jsonl", "--output=all.json")
    assert not (folder / "all.json").exists()


def test_escape_sequences_in_names_do_not_reach_the_terminal(folder, capsys):
    (folder / "run").rename(folder / "run\x1b[2J$x$")
    run("--checkpoint=run\x1b[2J$x$", "--all", "--data=x.jsonl")
    out, error = capsys.readouterr()
    assert "run\\x1b[2J$x$/checkpoint_step_7.pt" in out
    assert "\x1b" not in out + error


def test_results_that_cannot_be_compared_are_refused(folder):
    other = fake_scores(0, 0, 0, 0)
    other["items"][2]["label"] = 3
    with pytest.raises(ValueError, match="differ in label"):
        eval_hellaswag.compare(fake_scores(0, 0, 0, 0), other)
    (folder / "a.json").write_text(json.dumps(fake_scores(0)))
    (folder / "b.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"b\.json is not an --output file"):
        run("--compare=a.json,b.json")
    with pytest.raises(ValueError, match="--compare expects two --output files"):
        run("--compare=a.json")


# ---- Download --------------------------------------------------------------------------------------------------------


class Response:
    """What urlopen returns."""

    def __init__(self, data: bytes):
        self.data = data

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def read(self) -> bytes:
        return self.data


def test_items_are_downloaded_once_and_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = (json.dumps(RECORD) + "\n").encode() * 2
    monkeypatch.setattr(eval_hellaswag, "urlopen", lambda *_, **__: Response(data))
    with pytest.raises(ValueError, match="downloaded 2 items instead of 10042"):
        run("--download")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(eval_hellaswag, "N_VALIDATION", 2)
    run("--download")
    assert (tmp_path / "data/hellaswag_val.jsonl").read_bytes() == data


def test_without_github_the_items_come_from_the_hub(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(eval_hellaswag, "N_VALIDATION", 3)
    monkeypatch.setattr(eval_hellaswag, "urlopen", lambda *_, **__: Response(b"<html>Log in</html>"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [RECORD] * 3)
    run("--download", f"--data={tmp_path / 'x.jsonl'}")
    assert len(load_items(tmp_path / "x.jsonl")) == 3


def test_without_any_network_the_error_says_what_to_do(tmp_path, monkeypatch):
    import datasets

    def fail(*_, **__):
        raise ConnectionError("offline")

    monkeypatch.setattr(eval_hellaswag, "urlopen", fail)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match=r"Rowan/hellaswag.* pass it as --data"):
        run("--download", f"--data={tmp_path / 'x.jsonl'}")
    assert list(tmp_path.iterdir()) == []


# ---- Models of transformers ------------------------------------------------------------------------------------------


def hugging_face_folder(path: Path, kind: str, seq_len: int) -> Path:
    """A tiny random model of this kind with GPT-2's tokenizer, as transformers saves them."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=seq_len, initializer_range=0.5)
        network = transformers.GPT2LMHeadModel(config)
    else:
        network = hugging_face(gpt2_model(seq_len))
    network.save_pretrained(path)
    gpt2_fast().save_pretrained(path)
    return path


@functools.cache
def gpt2_fast() -> Any:
    """GPT-2's tokenizer of transformers, from tiktoken's files."""
    from tokenizers import Tokenizer as HuggingFaceTokenizer
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def cached(url: str) -> str:
        # tiktoken names its files by the hash of their address.
        name = hashlib.sha1(f"https://openaipublic.blob.core.windows.net/gpt-2/{url}".encode()).hexdigest()
        return str(shared(f"tiktoken_cache/{name}"))

    bpe = models.BPE.from_file(cached("encodings/main/encoder.json"), cached("encodings/main/vocab.bpe"))
    tokens: Any = HuggingFaceTokenizer(bpe)
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<|endoftext|>")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_hugging_face_model_scores_as_in_lm_eval_and_as_our_own_network_with_its_weights(kind, gpt2, tmp_path):
    folder = hugging_face_folder(tmp_path / "model", kind, seq_len=40)
    items = load_items(shared("data/hellaswag_val_2000.jsonl"), limit=12)
    model, tokenizer, metadata = eval_hellaswag.load(f"hf:{folder}", torch.device("cpu"))
    scores = evaluate(model, tokenizer, items)
    assert 0 < scores["truncated_contexts"] < len(items) and metadata["path"] == f"hf:{folder}"
    if kind == "llama":
        expected = [item["logprob_sums"] for item in evaluate(gpt2_model(40), gpt2, items)["items"]]
    else:
        huggingface = lm_eval_module("models.huggingface")
        lm = huggingface.HFLM(pretrained=str(folder), batch_size=8, device="cpu", dtype="float32")
        expected = score_with_harness(lm, items)
    for item, sums in zip(scores["items"], expected, strict=True):
        assert item["logprob_sums"] == pytest.approx(sums, abs=1e-3)


def lm_eval_module(name: str) -> Any:
    """lm_eval.<name>, or skip."""
    import importlib

    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")  # which HFLM imports
    return importlib.import_module(f"lm_eval.{name}")


def score_with_harness(lm: Any, items: list[Item]) -> list[list[float]]:
    """[item][ending] log-likelihoods that an lm_eval model gives."""
    instance = lm_eval_module("api.instance").Instance
    requests = [
        instance("loglikelihood", {}, (item.context, f" {ending}"), n)
        for item in items
        for n, ending in enumerate(item.endings)
    ]
    answers = [float(answer[0]) for answer in lm.loglikelihood(requests)]
    return [answers[i : i + 4] for i in range(0, len(answers), 4)]


def test_a_missing_hugging_face_model_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=f"transformers cannot load {tmp_path}"):
        eval_hellaswag.load(f"hf:{tmp_path}", torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="hf: models need a package: pip install transformers"):
        eval_hellaswag.load(f"hf:{tmp_path}", torch.device("cpu"))
