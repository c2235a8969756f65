"""convert_hf.py: what is exported is what transformers computes, and nothing is lost on the way out, in, or over the Hub."""

import base64
import contextlib
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import ROOT, tiny_config, tiny_model
from processes import python

import chat
import checkpoint
import config
import convert_hf
import training
from model import ModelConfig, Transformer, generate
from shards import GPT2, load_tokenizer

BYTES = {"vocab_size": 257, "tie_embeddings": True}
TEXTS = [
    "",
    " ",
    "The sky is blue.",
    "  two  spaces\n\n\nlines\t\t tabs \r\n",
    "don't DON'T we'll 1234567 x2",
    "naïve 日本語 🎉🎉\u3000\xa0",
]
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def checkpoint_of(path: Path, model: Transformer, tokenizer: dict[str, Any] | None = None, **facts: Any) -> str:
    """A checkpoint of `model`, the bytes tokenizer unless another is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "format": checkpoint.FORMAT,
        "step": 7,
        "tokens": 448,
        "config": {"model": config.to_dict(model.config)},
        "tokenizer": tokenizer or load_tokenizer("bytes").info(),
        "model": model.state_dict(),
        "metrics": {},
    }
    checkpoint.write(path, {**state, **facts})
    return str(path)


def exported(tmp_path: Path, model: Transformer, **options: Any) -> Path:
    convert_hf.export(checkpoint_of(tmp_path / "model.pt", model), tmp_path / "hf", **options)
    return tmp_path / "hf"


def theirs(folder: Path) -> Any:
    """The folder as transformers loads it."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def assert_same_logits(ours: Transformer, network: Any, length: int = 32) -> None:
    vocab = ours.config.vocab_size or 0
    tokens = torch.randint(0, vocab, (3, length), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens)[..., :vocab], network(tokens).logits, atol=1e-4, rtol=1e-4)


# ---- Out -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_an_export_has_the_same_logits_and_says_the_same(tied, qk_norm, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = tiny_model(vocab_size=257, tie_embeddings=tied, qk_norm=qk_norm, n_kv_heads=2, rope_theta=500.0)
    folder = exported(tmp_path, model)
    network, tokenizer = theirs(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert type(network).__name__ == ("Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM")
    assert_same_logits(model, network)
    ids = tokenizer("The sky", return_tensors="pt")
    said = network.generate(**ids, max_new_tokens=20, do_sample=False)[0].tolist()
    voice = chat.load(str(tmp_path / "model.pt"), chat.Options(device="cpu"))
    turn = chat.answer(voice, "The sky", chat.Options(temperature=0, max_tokens=20, top_k=None), 0, chat.ignore)
    assert said[:7] == list(b"The sky") and (tied or len(set(turn.tokens)) > 3)
    assert said[7:] == turn.tokens + [256] * (turn.finish == "stop")


def test_stretched_rotary_frequencies_leave_as_they_came(tmp_path):
    model = tiny_model(vocab_size=257, seq_len=128, rope_scaling=LLAMA3)
    assert not torch.equal(model.rope_cos, tiny_model(vocab_size=257, seq_len=128).rope_cos)
    assert_same_logits(model, theirs(exported(tmp_path, model)), length=128)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_out_and_in_again_is_bit_equal(dtype, tmp_path):
    model = tiny_model(vocab_size=257, tie_embeddings=False, qk_norm=True)
    model.to(torch.bfloat16).float() if dtype == "bf16" else model
    folder = exported(tmp_path, model, dtype=dtype, shard_bytes=20_000)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 3
    convert_hf.import_hf(str(folder), tmp_path / "again.pt")
    again, meta = checkpoint.load_model(tmp_path / "again.pt")
    old = checkpoint.read(tmp_path / "model.pt")
    assert (again.config, meta["tokenizer"]) == (model.config, old["tokenizer"])
    assert (meta["step"], meta["tokens"]) == (7, 448)
    for name, tensor in model.state_dict().items():
        real = slice(0, 257 if tensor.shape[0] == 384 and name != "layers.0.mlp" else None)
        assert torch.equal(again.state_dict()[name][real], tensor[real]), name
    convert_hf.export(str(tmp_path / "again.pt"), tmp_path / "hf2", dtype=dtype, shard_bytes=20_000)
    for path in folder.iterdir():
        if path.name != "README.md":
            assert path.read_bytes() == (tmp_path / "hf2" / path.name).read_bytes(), path.name


def test_the_files_are_those_of_the_safetensors_package(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    weights = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.tensor(3), "d": torch.empty(0, 4)}
    convert_hf.write_safetensors(tmp_path / "ours", weights)
    safetensors.save_file(weights, tmp_path / "theirs")
    for read in (lambda path: safetensors.load_file(path), convert_hf.read_safetensors):
        for name in ("ours", "theirs"):
            found = read(tmp_path / name)
            assert found.keys() == weights.keys()
            assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in weights.items())


def test_gpt2_gives_the_same_tokens_with_the_original_merges(tmp_path):
    transformers = pytest.importorskip("transformers")
    try:
        gpt2 = load_tokenizer("gpt2")
    except ValueError as error:
        pytest.skip(str(error))
    model = tiny_model(vocab_size=50257, dim=8, n_heads=1, ffn_dim=8, n_layers=1)
    convert_hf.export(checkpoint_of(tmp_path / "model.pt", model, dict(GPT2)), tmp_path / "hf")
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for sample in [*TEXTS, text]:
        assert fast(sample)["input_ids"] == gpt2.encode(sample)
        assert fast.decode(gpt2.encode(sample)) == sample
    assert (len(fast), fast.eos_token_id) == (50257, 50256)
    merges = json.loads((tmp_path / "hf/tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    assert merges[:3] == [["Ġ", "t"], ["Ġ", "a"], ["h", "e"]] and len(merges) == 50000


def test_any_tiktoken_pattern_cuts_the_same_pieces():
    tiktoken, tokenizers = pytest.importorskip("tiktoken"), pytest.importorskip("tokenizers")
    pattern = (
        r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    )
    ranks = {bytes([i]): i for i in range(256)} | {
        b"  ": 256,
        b"\n\n": 257,
        b"12": 258,
        b"123": 259,
        b" s": 260,
        b"'t": 261,
    }
    encoding = tiktoken.Encoding("mine", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 262})
    fast = tokenizers.Tokenizer.from_str(json.dumps(convert_hf.tokenizer_json(encoding)))
    for text in [*TEXTS, "a \n ", "  \n\n  b", "x   ", "12345 123\n\n\n"]:
        assert fast.encode(text).ids == encoding.encode_ordinary(text)
    assert fast.encode("a<|endoftext|>").ids == [97, 262]


def test_the_card_has_the_numbers_of_this_checkpoint_and_no_others(tmp_path):
    run = tmp_path / "runs/mine"
    path = checkpoint_of(run / "checkpoint_step_7.pt", tiny_model(vocab_size=257))
    (run / "final_metrics.png").write_bytes(b"picture")
    for step, known in ((7, True), (8, False)):
        (run / "final_metrics.json").write_text(json.dumps({"step": step, "val_loss": 1.2345678}))
        convert_hf.export(path, tmp_path / str(step))
        card = (tmp_path / str(step) / "README.md").read_text()
        assert ("| val_loss | 1.23457 |" in card) is known and "| tokens | 448 |" in card and "# mine" in card
        assert (tmp_path / str(step) / "final_metrics.png").read_bytes() == b"picture"


@pytest.mark.parametrize("qk_norm", [False, True])
def test_llama_cpp_finds_every_tensor_and_the_merges(qk_norm, tmp_path):
    """Its converter asks the gguf package for these names; the conversion itself is `convert_hf_to_gguf.py FOLDER`."""
    gguf = pytest.importorskip("gguf")
    folder = exported(tmp_path, tiny_model(vocab_size=257, tie_embeddings=False, qk_norm=qk_norm))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3 if qk_norm else gguf.MODEL_ARCH.LLAMA, 2)
    found = [names.get_name(name, try_suffixes=(".weight",)) for name in convert_hf.read_weights(folder)]
    assert all(found) and len(set(found)) == len(found)
    vocabulary = gguf.SpecialVocab(folder, load_merges=True)
    assert vocabulary.special_token_ids["eos"] == 256


# ---- In --------------------------------------------------------------------------------------------------------------


def foreign(folder: Path, kind: str, **changes: Any) -> Any:
    """A small random model as transformers itself saves it, with the bytes tokenizer."""
    transformers = pytest.importorskip("transformers")
    shape: dict[str, Any] = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "intermediate_size": 96, "vocab_size": 300, "max_position_embeddings": 512, "initializer_range": 0.2,
        "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    torch.manual_seed(3)
    network = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**{**shape, **changes})
    ).eval()
    network.save_pretrained(folder, max_shard_size="50KB")
    convert_hf.write_tokenizer(folder, load_tokenizer("bytes"), 512)
    return network


STRETCHED = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Llama", STRETCHED),
        ("Llama", {"tie_word_embeddings": True, "head_dim": None, "num_key_value_heads": None}),
        ("Qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ("Qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    ],
)
def test_an_import_has_the_same_logits(kind, changes, tmp_path):
    network = foreign(tmp_path / "hf", kind, **changes)
    assert (tmp_path / "hf/model.safetensors.index.json").exists()
    convert_hf.import_hf(str(tmp_path / "hf"), tmp_path / "model.pt")
    model, meta = checkpoint.load_model(tmp_path / "model.pt")
    assert_same_logits(model, network, length=300)
    assert meta["tokenizer"]["vocab_size"] == 257 and model.config.norm_eps == 1e-5
    assert len(list(generate(model, [1, 2, 3], 5))) == 5
    convert_hf.export(str(tmp_path / "model.pt"), tmp_path / "back")
    assert_same_logits(model, theirs(tmp_path / "back"), length=300)
    mine, back = (convert_hf.read_weights(tmp_path / name) for name in ("hf", "back"))
    assert mine.keys() == back.keys() and all(torch.equal(mine[name], back[name]) for name in mine)


def test_the_spellings_of_older_transformers_mean_the_same(tmp_path):
    convert_hf.write_json(tmp_path / "new.json", convert_hf.hf_config(tiny_config(rope_scaling=LLAMA3)))
    described = convert_hf.read_json(tmp_path / "new.json")
    old = {key: value for key, value in described.items() if key != "rope_parameters"}
    older = {**old, "rope_scaling": {**LLAMA3, "type": "llama3"}}
    shapes = [convert_hf.model_config(d, tmp_path) for d in (described, old, older)]
    assert shapes == [tiny_config(rope_scaling=LLAMA3)] * 3


def test_an_import_talks_and_goes_on_learning(tmp_path, capsys):
    foreign(tmp_path / "hf", "Llama", **STRETCHED, tie_word_embeddings=True)
    out, data = tmp_path / "model.pt", tmp_path / "data"
    convert_hf.main(convert_hf.parse(["import", str(tmp_path / "hf"), str(out), "--seq_len=32"]))
    talk, learn = capsys.readouterr().out.splitlines()[-2:]
    assert talk == f"python chat.py {out}"
    session = chat.Session([str(out)], chat.Options(device="cpu", max_tokens=5, seed=1))
    session.ask("The sky")
    assert session.last().tokens
    from data_pipeline import sample

    sample(data)
    steps = ["--batch_size=2", "--batch_tokens=64", "--max_steps=1", "--hellaswag=none", "--eval_tokens=64"]
    given = [*learn.split()[2:], f"--sources={data}", f"--run_dir={tmp_path / 'run'}", *steps]
    training.main(config.parse_config(training.Config, given))
    assert f"weights from {out}" in (tmp_path / "run/train.log").read_text()


def test_a_tokenizer_json_travels_with_the_model(tmp_path):
    foreign(tmp_path / "hf", "Llama")
    convert_hf.import_hf(str(tmp_path / "hf"), tmp_path / "model.pt")
    convert_hf.export(str(tmp_path / "model.pt"), tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (tmp_path / "hf/tokenizer.json").read_bytes()


# ---- What is refused -------------------------------------------------------------------------------------------------


def edit(folder: Path, **changes: Any) -> None:
    described = json.loads((folder / "config.json").read_text())
    convert_hf.write_json(folder / "config.json", {**described, **changes})


def cut(folder: Path, kept: int) -> None:
    path = next(folder.glob("model-00002*"))
    path.write_bytes(path.read_bytes()[:kept])


BROKEN = {
    "another architecture": (
        lambda f: edit(f, architectures=["MixtralForCausalLM"]),
        "holds a MixtralForCausalLM; supp",
    ),
    "no architecture": (lambda f: edit(f, architectures=None), "holds a none"),
    "biases": (lambda f: edit(f, attention_bias=True), "has attention_bias = True"),
    "another activation": (lambda f: edit(f, hidden_act="gelu"), "has hidden_act = gelu"),
    "quantized": (lambda f: edit(f, quantization_config={"bits": 4}), "has quantization_config"),
    "other positions": (lambda f: edit(f, rope_parameters={"rope_type": "yarn"}), "has 'yarn' rotary positions"),
    "an incomplete stretch": (lambda f: edit(f, rope_parameters={"rope_type": "llama3"}), "describes no model"),
    "no width": (lambda f: edit(f, hidden_size=None), "lacks hidden_size"),
    "odd heads": (lambda f: edit(f, num_key_value_heads=3), "must be a multiple of n_kv_heads"),
    "another shape": (lambda f: edit(f, intermediate_size=97), "does not fit the model: .*gate_proj.weight is"),
    "more layers than weights": (lambda f: edit(f, num_hidden_layers=3), "layers.2.* is missing"),
    "a missing part": (lambda f: next(f.glob("model-00002*")).unlink(), "lacks model-00002-of-.* parts"),
    "half a part": (lambda f: cut(f, 20_000), "is no safetensors file, or not all of it"),
    "an empty part": (lambda f: cut(f, 0), "0 bytes. is no safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "cannot read .*config.json"),
    "a config that is no JSON": (lambda f: (f / "config.json").write_text("{"), "is no JSON"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "a tokenizer that is none": (lambda f: (f / "tokenizer.json").write_text("{}"), "cannot load tokenizer"),
    "a tokenizer of another model": (lambda f: edit(f, vocab_size=200), "has 257 tokens, the model 200: not its own"),
    "no weights": (lambda f: [p.unlink() for p in f.glob("model*")], "holds no weights"),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "hf"
    foreign(folder, "Llama")
    return folder


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_one_line_and_leaves_nothing(case, llama, tmp_path, capsys):
    damage, message = BROKEN[case]
    folder = shutil.copytree(llama, tmp_path / "hf")
    if case == "a tokenizer of another model":  # its weights too, or the shapes would speak first
        weights = {k: v[:200] if v.shape[0] == 300 else v for k, v in convert_hf.read_weights(folder).items()}
        (folder / "model.safetensors.index.json").unlink()
        convert_hf.write_weights(folder, weights)
    damage(folder)
    with pytest.raises(SystemExit) as exit:
        config.run(lambda: convert_hf.main(convert_hf.parse(["import", str(folder), str(tmp_path / "out.pt")])))
    error = capsys.readouterr().err
    assert (exit.value.code, error.count("\n")) == (2, 1)
    with pytest.raises(ValueError, match=message):
        raise ValueError(error)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_a_pickle_is_not_opened_beside_safetensors_and_never_runs(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(llama, tmp_path / "hf")
    torch.save({"x": Bomb()}, folder / "pytorch_model.bin")
    convert_hf.import_hf(str(folder), tmp_path / "one.pt")
    weights = convert_hf.read_weights(folder)
    for path in folder.glob("model*"):
        path.unlink()
    with pytest.raises(ValueError, match="holds more than tensors"):
        convert_hf.import_hf(str(folder), tmp_path / "two.pt")
    assert not (tmp_path / "exploded").exists()
    torch.save(weights, folder / "pytorch_model.bin")
    convert_hf.import_hf(str(folder), tmp_path / "two.pt")
    one, two = (checkpoint.load_model(tmp_path / f"{n}.pt")[0].state_dict() for n in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_nothing_is_written_over(llama, tmp_path):
    path = checkpoint_of(tmp_path / "model.pt", tiny_model(vocab_size=257))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for target in (tmp_path / "full", Path(path)):
        with pytest.raises(ValueError, match="is not an empty folder"):
            convert_hf.export(path, target)
    with pytest.raises(ValueError, match="exists; choose another"):
        convert_hf.import_hf(str(llama), path)
    both_sides = checkpoint_of(tmp_path / "both.pt", tiny_model(vocab_size=257, causal=False))
    with pytest.raises(ValueError, match="sees the text on both sides"):
        convert_hf.export(both_sides, tmp_path / "both")
    with pytest.raises(ValueError, match="is longer than the context"):
        convert_hf.import_hf(str(llama), tmp_path / "long.pt", seq_len=513)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["both.pt", "full", "model.pt"]


def test_help_does_not_wait_for_torch():
    code = "import runpy, sys\nsys.argv = ['convert_hf.py', 'import', '--help']\ntry:\n    "
    code += (
        "runpy.run_path('convert_hf.py', run_name='__main__')\nexcept SystemExit:\n    sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--seq_len" in done.stdout


# ---- The Hub ---------------------------------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as creating, committing to, listing and downloading a model repository asks for."""

    commits: ClassVar[dict[str, dict[str, bytes]]] = {}  # id: files; the last one is main
    asked: ClassVar[list[str]] = []
    breaks: ClassVar[list[str]] = []  # files whose download stops halfway, once

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        url, commits = self.path.split("?")[0], self.commits
        sha = next((sha for sha in commits if f"/{sha}" in url), next(reversed(commits), ""))
        files = commits.get(sha, {})
        if "/resolve/" in url and (name := url.rpartition("/")[2]) in files:
            data, start = files[name], 0
            if wanted := self.headers.get("Range"):
                start = int(wanted.split("=")[1].split("-")[0])
            headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": sha}
            if body:
                self.asked.append(f"{name}:{start}")
            half = body and name in self.breaks and (self.breaks.remove(name) or True)
            return self.answer(data[start:], body, 206 if start else 200, half=half, **headers)
        if url.startswith("/api/models/me/mine") and "/tree/" in url and files:
            tree = [
                {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                for n, d in files.items()
            ]
            return self.json(tree)
        if (
            url in ("/api/models/me/mine", f"/api/models/me/mine/revision/{sha}", "/api/models/me/mine/revision/main")
            and files
        ):
            return self.json({"id": "me/mine", "sha": sha, "siblings": [{"rfilename": name} for name in files]})
        self.send_error(404)

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if self.path.startswith("/api/repos/create"):
            return self.json({"url": f"http://{self.headers['Host']}/me/mine", "id": "me/mine"})
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(data)["files"]
            ]
            return self.json({"files": files})
        if "/commit/" in self.path:
            rows = [json.loads(line)["value"] for line in data.splitlines() if b'"file"' in line[:20]]
            sha = hashlib.sha1(data).hexdigest()
            self.commits[sha] = {row["path"]: base64.b64decode(row["content"]) for row in rows}
            host = f"http://{self.headers['Host']}/me/mine/commit/{sha}"
            return self.json({"commitUrl": host, "commitOid": sha, "success": True})
        self.send_error(404)

    def json(self, data: Any) -> None:
        self.answer(json.dumps(data).encode(), self.command != "HEAD")

    def answer(self, data: bytes, body: bool, status: int = 200, half: bool = False, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), "Accept-Ranges": "bytes", **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            with contextlib.suppress(ConnectionError):
                self.wfile.write(data[: len(data) // 2] if half else data)
        self.close_connection = half

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path):
    """(run convert_hf.py against a local server, the server)."""
    Hub.commits, Hub.asked, Hub.breaks = {}, [], []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_x",
        "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"), "no_proxy": "127.0.0.1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip

    def command(*arguments: str) -> tuple[int, str, str]:
        return python("convert_hf.py", *arguments, **env)

    yield command, Hub
    server.shutdown()


def test_to_the_hub_and_back_at_a_pinned_revision(hub, tmp_path):
    command, server = hub
    model = tiny_model(vocab_size=257)
    folder = exported(tmp_path, model)
    code, said, error = command("push", str(folder), "me/mine")
    assert code == 0, error
    (sha,) = server.commits
    assert said == f"pull it as me/mine@{sha}\n"
    assert server.commits[sha] == {path.name: path.read_bytes() for path in folder.iterdir()}
    server.commits["f" * 40] = {**server.commits[sha], "README.md": b"changed", "pytorch_model.bin": b"a pickle"}
    server.breaks += ["model.safetensors"]  # the connection is lost halfway, once
    code, _, error = command("pull", f"me/mine@{sha}", str(tmp_path / "pulled"))
    assert code == 0, error
    for path in folder.iterdir():
        assert (tmp_path / "pulled" / path.name).read_bytes() == path.read_bytes()
    parts = [int(part.split(":")[1]) for part in server.asked if part.startswith("model.safetensors")]
    assert len(parts) == 2  # asked again after the loss
    code, said, error = command("import", "me/mine", str(tmp_path / "again.pt"))
    assert code == 0 and f"me/mine@{'f' * 40}" in said, error
    again = checkpoint.load_model(tmp_path / "again.pt")[0]
    assert torch.equal(again.norm.weight, model.norm.weight) and "pytorch_model.bin:0" not in server.asked


def test_a_silent_hub_is_one_line():
    """Newer clients' network errors are no OSErrors."""
    with pytest.raises(ValueError, match="a/b: the Hub cannot be reached"), convert_hf.reaching("a/b"):
        raise Exception("Name or service not known")


def test_a_hub_that_does_not_have_it_is_one_line(hub, tmp_path):
    command, _ = hub
    code, _, error = command("pull", "me/none", "x")
    assert (code, error.count("\n")) == (2, 1) and "me/none: the Hub says 404" in error
    with pytest.raises(ValueError, match="a/b/c is no name of a Hub repository"):
        convert_hf.import_hf("a/b/c", tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        convert_hf.push(str(tmp_path), "me/mine")


def test_a_published_checkpoint_of_the_seed_loads_by_its_hub_id(hub, tmp_path):
    """dhlak/416m-gpt holds one .pt in the seed's own format; here a small one stands in for it."""
    shape = ModelConfig(dim=16, n_layers=1, n_heads=2, ffn_dim=24, vocab_size=50257, seq_len=16, qk_norm=False)
    weights = Transformer(shape).state_dict()
    weights["embed_tokens.weight"] = weights["embed_tokens.weight"][:50257]
    names = {ours: theirs for theirs, ours in checkpoint.SEED_NAMES.items()}
    old = {}
    for name, tensor in weights.items():
        for ours, seeds in names.items():
            name = name.replace(f"{ours}.", f"{seeds}.")
        old[f"_orig_mod.{name}"] = tensor
    state = {"model_state_dict": old, "config": {"n_heads": 2, "seq_len": 16}, "step": 15258, "total_tokens": 10}
    torch.save(state, tmp_path / "seed.pt")
    command, server = hub
    server.commits["a" * 40] = {"checkpoint_step_15258.pt": (tmp_path / "seed.pt").read_bytes(), "README.md": b"x"}
    code, _, error = command("export", "me/mine", str(tmp_path / "hf"))
    if "cannot fetch the vocabulary" in error:
        pytest.skip("no vocabulary of gpt2")
    assert code == 0, error
    assert json.loads((tmp_path / "hf/config.json").read_text())["nano416"]["step"] == 15258
