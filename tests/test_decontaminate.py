"""tools/decontaminate.py: every planted copy of an evaluation item is found, and nothing else."""

import gzip
import itertools
import json

import pytest
from conftest import shared
from processes import python
from shards import prepare, texts_of, write_jsonl

from tools.decontaminate import DecontaminateConfig, decontaminate


def test_planted_items_are_found_and_removed(tmp_path, capsys):
    """All of 500 real HellaSwag items, re-spaced, re-cased and cut across shards, and nothing of 1,000 documents."""
    items = [json.loads(line) for line in shared("data/hellaswag_val_2000.jsonl").read_text().splitlines()[::4]]
    files = [shared(f"data/textbooks/train-0{i}.jsonl.gz") for i in range(4)]
    lines = [line for file in files for line in gzip.decompress(file.read_bytes()).splitlines()]
    clean = [json.loads(line)["text"][:6000] for line in lines[:1000]]
    planted = [
        f"{clean[i][:300]}\n\n{item['ctx'].upper()}\n  {item['endings'][int(item['label'])]} -- {clean[-i][:300]}"
        for i, item in enumerate(items)
    ]
    mixed = [text for pair in itertools.zip_longest(clean, planted) for text in pair if text is not None]
    source = write_jsonl(tmp_path / "x.jsonl", mixed)
    val_source = write_jsonl(tmp_path / "val.jsonl", planted[:5])
    prepare(source, tmp_path / "d", val_source=str(val_source), shard_tokens=700_000)
    against = str(shared("data/hellaswag_val_2000.jsonl"))
    decontaminate(DecontaminateConfig(str(tmp_path / "d"), against, write=str(tmp_path / "e"), workers=2))
    assert "500 of 1,500 training documents" in capsys.readouterr().out
    assert texts_of(tmp_path / "e", "train") == clean
    assert texts_of(tmp_path / "e", "val") == planted[:5]
    assert python("data_pipeline.py", "verify", f"--out_dir={tmp_path}/e")[0] == 0


def test_a_document_longer_than_a_shard_is_found_and_removed(tmp_path):
    item = "one two three four five six seven eight nine ten eleven twelve thirteen"
    documents = ["before", f"{'x ' * 200} {item} {'y ' * 200}", "after"]
    source = write_jsonl(tmp_path / "x.jsonl", documents)
    write_jsonl(tmp_path / "items.jsonl", [item])
    prepare(source, tmp_path / "d", val_tokens=0, shard_tokens=300)
    cfg = DecontaminateConfig(str(tmp_path / "d"), str(tmp_path / "items.jsonl"), write=str(tmp_path / "e"), workers=1)
    decontaminate(cfg)
    assert texts_of(tmp_path / "e", "train") == ["before", "after"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"against": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"against": "{}/x.jsonl"}, "x.jsonl:1: not an evaluation item"),
        ({"ngram": 3}, "ngram=3 is below 8"),
        ({"workers": 0}, "workers=0 must be at least 1"),
    ],
)
def test_bad_options_are_named(data, tmp_path, options, message):
    (tmp_path / "x.jsonl").write_text('{"ctx": "a", "endings": ["b"], "label": "3"}')
    if "against" in options:
        options = {"against": options["against"].format(tmp_path)}
    with pytest.raises(ValueError, match=message):
        decontaminate(DecontaminateConfig(str(data), **options))


def test_the_command_is_run_from_the_root(data):
    code, _, error = python("-m", "tools.decontaminate", f"--out_dir={data}", "--ngram=3")
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith("python -m tools.decontaminate: error: ngram=3 is below 8")
