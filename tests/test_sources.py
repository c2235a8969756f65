"""nano416/sources.py: which file goes where, and why one is left out; what is missing is named, nothing is read twice."""

import contextlib
import http.server
import json
import os
import re
import shutil
import threading
from pathlib import Path
from typing import Any, ClassVar

import pytest
from processes import python
from shards import DOCUMENTS, hashes, prepare, texts_of, write_jsonl

from nano416 import sources
from nano416.sources import assign_splits, find_files, split_of


def write(folder: Path, *names: str) -> Path:
    """A folder of files whose one document is their name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(folder / name, [name])
    return folder


def divided(source: object, val_source: object = None, val_tokens: bool = False) -> tuple[list[str], list[str]]:
    """Names of the files (val, train)."""
    val_listing = find_files(str(val_source)) if val_source else None
    option = "val_source" if val_source else "val_tokens" if val_tokens else ""
    files = assign_splits(find_files(str(source)), val_listing, option)
    return [file.name for file in files.val], [file.name for file in files.train]


# ---- Splits


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("train", ["train/a.txt", "train-00000-of-00010.parquet", "data/training.jsonl", "TRAIN/a.txt"]),
        ("val", ["validation/a.txt", "valid/a.txt", "val/a.txt", "dev/x/a.txt", "validation-00000-of-00001.parquet"]),
        ("val", ["val-00.jsonl.gz", "dev.jsonl", "my_val.txt", "web.valid.jsonl", "val0.txt", "Validation.json"]),
        ("test", ["test/a.txt", "test-00000-of-00001.parquet", "eval.jsonl", "Test/val.txt", "my testing.txt"]),
        (None, ["valley_of_fear.txt", "value_investing.txt", "developer.txt", "testament.txt", "evaluations.txt"]),
        (None, ["a/contest.txt", "latest.txt", "retrain.jsonl", "trainspotting.txt", "interval.txt", "a.txt"]),
    ],
)
def test_a_whole_word_marks_a_split(split, names):
    assert [split_of(name) for name in names] == [split] * len(names)


def test_hugging_face_datasets_finds_the_same_splits(tmp_path, monkeypatch):
    data_files = pytest.importorskip("datasets.data_files")
    names = ["train-00000-of-00002.jsonl", "validation-0.jsonl", "dev.jsonl", "test_1.jsonl", "my-val.jsonl"]
    write(tmp_path, *names, "valley.jsonl", "developer.jsonl")
    patterns = data_files.get_data_patterns(str(tmp_path))
    found = {}
    for split, globs in patterns.items():
        for path in data_files.DataFilesList.from_patterns(globs, base_path=str(tmp_path)):
            found[os.path.basename(path)] = {"validation": "val"}.get(str(split), str(split))
    assert found == {name: split_of(name) for name in names}


def test_prepare_says_and_records_which_file_went_where(tmp_path, capsys):
    source = write(tmp_path / "s", "train/a.jsonl", "valid/a.jsonl", "test/a.jsonl", "b.jsonl", ".cache/c.jsonl")
    (source / "README.md").write_text("# A dataset card")
    (source / "load.py").write_text("import this")
    prepare(source, tmp_path / "d")
    assert texts_of(tmp_path / "d", "val") == ["valid/a.jsonl"]
    assert texts_of(tmp_path / "d", "train") == ["b.jsonl", "train/a.jsonl"]
    record = json.loads((tmp_path / "d/meta.json").read_text())["files"]
    assert record["val"] == {"files": 1, "bytes": 26, "first": ["valid/a.jsonl"]}
    assert record["train"]["first"] == ["b.jsonl", "train/a.jsonl"]
    left_out = {name: reason for reason, group in record["left_out"].items() for name in group["first"]}
    assert set(left_out) == {"test/a.jsonl", ".cache", "README.md", "load.py"}
    said = capsys.readouterr().out
    for name, reason in left_out.items():
        assert re.search(f"left out, {re.escape(reason)}: .*{re.escape(name)}", said)
    assert "val   1 file, 0.0 MB: valid/a.jsonl" in said


def test_a_thousand_files_are_a_few_lines(tmp_path, capsys):
    source = write(tmp_path / "s", *(f"{i:04}.jsonl" for i in range(1000)))
    for i in range(1000):
        (source / f"{i:04}.csv").touch()
    prepare(source, tmp_path / "d", val_tokens=0)
    text = (tmp_path / "d/meta.json").read_text()
    record = json.loads(text)["files"]
    assert record["train"]["files"] == 1000
    assert [group["files"] for group in record["left_out"].values()] == [1000]
    assert len(text) < 5000
    assert len(capsys.readouterr().out) < 1000


def test_marks_are_read_below_what_the_user_has_written(tmp_path):
    write(tmp_path / "dev", "a.jsonl", "b.jsonl", "val-0.jsonl", "x/train/a.jsonl", "x/val/a.jsonl")
    dev = tmp_path / "dev"
    assert divided(f"{dev}/*.jsonl") == (["val-0.jsonl"], ["a.jsonl", "b.jsonl"])
    assert divided(f"{dev}/val-*.jsonl") == ([], ["val-0.jsonl"])
    assert divided(f"{dev}/x/{{train,val}}/a.jsonl") == (["val/a.jsonl"], ["train/a.jsonl"])
    assert divided(f"{dev}/x/train/*.jsonl, {dev}/x/val") == (["val/a.jsonl"], ["train/a.jsonl"])
    assert divided(f"{dev}/x/*/a.jsonl") == (["val/a.jsonl"], ["train/a.jsonl"])
    with pytest.raises(ValueError, match="leaves nothing to train on, its files are for validation or test: val/a"):
        shutil.rmtree(dev / "x/train")
        prepare(dev / "x", tmp_path / "d")


# ---- No validation file is trained on


def symlink(target: Path, link: Path) -> None:
    link.symlink_to(target)


@pytest.mark.parametrize("again", [symlink, os.link, shutil.copy])
@pytest.mark.parametrize("split", ["val", "test"])
def test_a_held_out_file_is_not_trained_on_under_another_name(tmp_path, again, split):
    write(tmp_path / "s", "a.jsonl", f"{split}.jsonl", "z.jsonl")
    for name in ("0.jsonl", "train.jsonl"):
        again(tmp_path / "s" / f"{split}.jsonl", tmp_path / "s" / name)
    assert divided(tmp_path / "s") == (["val.jsonl"] * (split == "val"), ["a.jsonl", "z.jsonl"])


def test_val_source_inside_source_is_not_trained_on(tmp_path):
    write(tmp_path / "s", "a.jsonl", "held/b.jsonl", "val-0.jsonl")
    (tmp_path / "link").symlink_to("s/held")
    for val_source in (tmp_path / "s/held", tmp_path / "s/held/b.jsonl", tmp_path / "link", f"{tmp_path}/s/*/b.jsonl"):
        # Nor is the file that the name marks as validation, though another one is used.
        assert divided(tmp_path / "s", val_source) == (
            ["b.jsonl"] if "*" not in str(val_source) else ["held/b.jsonl"],
            ["a.jsonl"],
        )
    shutil.copy(tmp_path / "s/held/b.jsonl", tmp_path / "c.jsonl")
    assert divided(tmp_path / "s", tmp_path / "c.jsonl") == (["c.jsonl"], ["a.jsonl"])
    assert divided(tmp_path / "s", val_tokens=True) == ([], ["a.jsonl", "held/b.jsonl"])


def test_a_link_that_marks_a_split_counts(tmp_path):
    write(tmp_path / "s", "parts/0/a.jsonl", "parts/1/b.jsonl")
    (tmp_path / "s/val").symlink_to("parts/1")
    assert divided(tmp_path / "s") == (["val/b.jsonl"], ["parts/0/a.jsonl"])


# ---- Files that are no data


def test_descriptions_of_data_are_left_out_unless_there_is_nothing_else(tmp_path):
    names = [
        "README.md",
        "readme_zh.md",
        "LICENSE.txt",
        "dataset_info.json",
        "sha256sums.txt",
        "cache-0123456789ab.arrow",
    ]
    for name in names:
        (tmp_path / name).write_text("text")
    assert [file.name for file in find_files(str(tmp_path)).files] == sorted(names)
    write(tmp_path, "a.jsonl")
    for source in (tmp_path, f"{tmp_path}/*"):
        assert [file.name for file in find_files(str(source)).files] == ["a.jsonl"]
    assert [file.name for file in find_files(f"{tmp_path}/README.md,{tmp_path}/a.jsonl").files] == [
        "README.md",
        "a.jsonl",
    ]
    for name in ("license_to_kill.txt", "notice_of_arrival.md", "the_state.json"):
        (tmp_path / name).write_text("text")
    assert len(find_files(str(tmp_path)).files) == 4


def test_a_folder_of_save_to_disk_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": DOCUMENTS}).shuffle(seed=1)
    rows.select(range(150)).save_to_disk(tmp_path / "one", num_shards=3)
    prepare(tmp_path / "one", tmp_path / "d", val_tokens=0)
    assert texts_of(tmp_path / "d", "train") == rows["text"][:150]
    parts = datasets.DatasetDict(train=rows.select(range(150)), validation=rows.select(range(150, 200)))
    parts.save_to_disk(tmp_path / "dict")
    prepare(tmp_path / "dict", tmp_path / "e")
    assert texts_of(tmp_path / "e", "train") == rows["text"][:150]
    assert texts_of(tmp_path / "e", "val") == rows["text"][150:]


# ---- Patterns and lists


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("{}/web.{1..4}.jsonl", "web.4.jsonl: no such file"),
        ("{}/web.{1,2,4}.jsonl", "web.4.jsonl: no such file"),
        ("{}/web.{1..3}.jsonl, {}/books-*.jsonl", "books-*.jsonl: no such file"),
        ("{}/web.1.jsonl,{}/nowhere", "nowhere: no such file"),
        ("memory://m/web.{1..4}.jsonl", "memory:///m/web.4.jsonl: no such file"),
        ("memory://m/books-*.jsonl", "memory:///m/books-*.jsonl: no such file"),
        ("{}/web.{4..1}.jsonl", "{4..1} has -2 members"),
        ("{}/web.{1..99999999999}.jsonl", "{1..99999999999} has 99,999,999,999 members"),
    ],
)
def test_what_a_pattern_lacks_is_named(tmp_path, source, missing):
    import fsspec

    for i in (1, 2, 3):
        write(tmp_path, f"web.{i}.jsonl")
        fsspec.filesystem("memory").pipe(f"m/web.{i}.jsonl", b'{"text": "a"}\n')
    with pytest.raises(ValueError, match=re.escape(missing)):
        find_files(source.replace("{}", str(tmp_path)))


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{}/my[1].jsonl", ["my[1].jsonl"]),
        ("{}/d[2]/*.jsonl", ["a,b.jsonl", "x.jsonl"]),
        ("{}/d[2]/a,b.jsonl", ["a,b.jsonl"]),
        ("{}/{my[1],b, c}.jsonl", ["my[1].jsonl", "b.jsonl", "c.jsonl"]),
        ("{}/c.jsonl, {}/b.jsonl,", ["c.jsonl", "b.jsonl"]),
        ("{}/[bc].jsonl", ["b.jsonl", "c.jsonl"]),
        ("{}/d[2], {}/b.jsonl", ["a,b.jsonl", "x.jsonl", "b.jsonl"]),
        ("{}/b.jsonl, {}/b.jsonl, {}/?.jsonl", ["b.jsonl", "c.jsonl"]),
    ],
)
def test_odd_names_and_lists(tmp_path, pattern, names):
    write(tmp_path, "my[1].jsonl", "b.jsonl", "c.jsonl", "d[2]/x.jsonl", "d[2]/a,b.jsonl", ".hidden.jsonl")
    found = divided(pattern.replace("{}", str(tmp_path)))[1]
    assert [name.rpartition("/")[2] for name in found] == names


def test_a_folder_behind_a_url(tmp_path):
    import fsspec

    for name in ("README.md", "train/b.jsonl", "train/a.jsonl", "val/a.jsonl", "x.csv"):
        fsspec.filesystem("memory").pipe(f"folder/{name}", b'{"text": "a"}\n')
    expected = ["val/a.jsonl"], ["train/a.jsonl", "train/b.jsonl"]
    assert divided("memory://folder") == divided("memory://folder/train, memory://folder/val") == expected


# ---- Folders and links


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    names = ["a.jsonl", "a/z.jsonl", "a-b/y.jsonl", "B/x.jsonl", "a/b/c.jsonl", "a0.jsonl", "é/1.jsonl", "a/b.jsonl"]
    write(tmp_path, *names)
    expected = [str(path) for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    assert [file.path for file in find_files(str(tmp_path)).files] == expected


def test_linked_folders_are_read_each_file_once(tmp_path):
    write(tmp_path / "outside", "b.jsonl")
    write(tmp_path / "s", "a.jsonl", "z/c.jsonl")
    for name, target in {
        "link": "../outside",
        "again": "../outside",
        "loop": ".",
        "z/up": "..",
        "0": "z",
        "1": "1",
    }.items():
        (tmp_path / "s" / name).symlink_to(target)
    listing = find_files(str(tmp_path / "s"))
    assert [file.name for file in listing.files] == ["a.jsonl", "again/b.jsonl", "z/c.jsonl"]
    assert set(listing.left_out[sources.OTHER_NAME]) == {"0/", "link/", "loop/", "z/up/"}


def test_what_is_not_a_file_is_refused(tmp_path):
    write(tmp_path, "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to("/nowhere")
    for source in (tmp_path, tmp_path / "b.jsonl", f"{tmp_path}/*"):
        with pytest.raises(ValueError, match=r"b\.jsonl: a link that leads nowhere"):
            find_files(str(source))
    (tmp_path / "b.jsonl").unlink()
    os.mkfifo(tmp_path / "b.jsonl")
    for source in (tmp_path, tmp_path / "b.jsonl"):
        with pytest.raises(ValueError, match=r"b\.jsonl: neither a file nor a folder"):
            find_files(str(source))


@pytest.mark.parametrize("out_dir", ["source/tokens", "source"])
def test_out_dir_may_lie_in_the_source(tmp_path, out_dir):
    write_jsonl(write(tmp_path / "source", "x.jsonl") / "x.jsonl", DOCUMENTS)
    options = {"shard_tokens": 5000, "val_tokens": 7000}
    prepare(tmp_path / "source/x.jsonl", tmp_path / "whole", **options)
    folder = tmp_path / out_dir
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
    prepare(tmp_path / "source", folder, **options)
    # As a run leaves it that was killed after the second shard, the last one of the val split.
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").unlink()
    n_tokens = sum(shard["tokens"] for shard in meta["shards"][:2])
    progress = {"job": meta["job"], "shards": meta["shards"][:2], "position": [0, 0, n_tokens], "val_full": True}
    (folder / "progress.json").write_text(json.dumps(progress))
    (folder / ".train_000000.bin.1.tmp").write_bytes(b"")
    for _ in range(2):
        prepare(tmp_path / "source", folder, **options)
        assert hashes(folder) == hashes(tmp_path / "whole")
        assert json.loads((folder / "meta.json").read_text())["files"] == meta["files"]


# ---- URLs


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("gs://bucket/train.{1..3}.jsonl.gz", "pip install gcsfs"),
        ("s3://bucket/a.jsonl", "pip install s3fs"),
        ("nosuch://bucket/a.jsonl", "nosuch://bucket/a.jsonl: Protocol not known: nosuch"),
    ],
)
def test_a_url_without_driver_names_the_package(url, message):
    if "pip install" in message:
        with contextlib.suppress(ImportError):
            __import__(message.split()[-1])
            pytest.skip("the driver is installed")
    with pytest.raises(ValueError, match=message) as error:
        find_files(url)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("command", ["prepare", "download", "sample", "verify", "info"])
@pytest.mark.parametrize("out_dir", ["gs://bucket/x", "s3:/bucket/x"])
def test_out_dir_is_a_local_folder(tmp_path, monkeypatch, command, out_dir):
    import data_pipeline
    from nano416.config import run_subcommand

    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"out_dir must be a path on this machine, got {out_dir}"):
        run_subcommand(getattr(data_pipeline, command), argv=[command, f"--out_dir={out_dir}"])
    assert list(tmp_path.iterdir()) == []


class Server(http.server.BaseHTTPRequestHandler):
    """One file under any name. `fault` is what happens to requests for its later parts."""

    data: ClassVar[bytes] = b""
    fault: ClassVar[str] = ""

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        if "absent" in self.path or self.fault == "503":
            return self.send_error(404 if "absent" in self.path else 503)
        wanted = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = (int(wanted[1]), int(wanted[2])) if wanted and self.fault != "no ranges" else (0, len(self.data))
        if first and self.fault == "500 later":
            return self.send_error(500)
        part = self.data[first : last + 1]
        self.send_response(206 if first or last < len(self.data) else 200)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if body:
            with contextlib.suppress(ConnectionError):
                self.wfile.write(part[:1000] if first and self.fault == "cut later" else part)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server():
    # Two blocks of fsspec's 5 MB.
    Server.data = "".join(json.dumps({"text": f"document {i} " + "word " * 1000}) + "\n" for i in range(2000)).encode()
    Server.fault = ""
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("no ranges", 2, "a.jsonl: the server sends whole files only; download it"),
        ("500 later", 1, "a.jsonl: cannot be read (500, message='Internal Server Error'"),
        ("cut later", 1, "a.jsonl: cannot be read (Response payload is not completed"),
        ("503", 1, "a.jsonl: cannot be read (503"),
    ],
)
def test_a_failing_server_is_one_line_and_the_same_command_continues(server, tmp_path, fault, code, message):
    options = [f"--out_dir={tmp_path}/d", "--tokenizer=bytes", "--workers=1", "--shard_tokens=1M"]
    command = ["data_pipeline.py", "prepare", f"--source={server}/a.jsonl", *options]
    Server.fault = fault
    exit_code, _, error = python(*command)
    assert (exit_code, error.count("\n")) == (code, 1), error
    assert f"{server}/{message}" in error
    if fault == "503":
        return
    assert len(hashes(tmp_path / "d")) > 2
    Server.fault = ""
    assert python(*command)[0] == 0
    (tmp_path / "a.jsonl").write_bytes(Server.data)
    prepare(tmp_path / "a.jsonl", tmp_path / "whole", shard_tokens=10**6)
    assert hashes(tmp_path / "d") == hashes(tmp_path / "whole")


def test_missing_and_unreachable_urls_are_told_apart(server):
    with pytest.raises(ValueError, match=r"/absent\.2\.jsonl: no such file \(404"):
        find_files(f"{server}/{{a.1,absent.2}}.jsonl")
    with pytest.raises(ConnectionError, match=r"http://127\.0\.0\.1:9/a\.jsonl: cannot be read"):
        find_files("http://127.0.0.1:9/a.jsonl")
