"""Checkpoints that are folders: what is saved comes back on any ranks; what is damaged is named; nothing runs code."""

import json
import os
import pickle
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
from conftest import ROOT, changed
from processes import ranks
from test_training import arguments, losses
from torch.distributed.checkpoint.state_dict_saver import save

import chat
import eval_hellaswag
import training
from nano416 import checkpoint, sharded_checkpoint
from nano416.config import parse_config

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("no_plots")]

TOO_LARGE = """
import training
from nano416 import checkpoint
from nano416.config import parse_config
checkpoint.fits_in_host_memory = lambda n_params: False
training.main(parse_config(training.Config))
"""
OPTIONS = ["--sample_tokens=0", "--max_steps=4", "--ema=0.9"]


@pytest.fixture(scope="module")
def two_ranks(data, tmp_path_factory) -> Path:
    """A run of two ranks whose checkpoints of steps 2 and 4 are folders."""
    run_dir = tmp_path_factory.mktemp("runs") / "two"
    ranks(2, ["-c", TOO_LARGE, *arguments(data, run_dir, *OPTIONS, "--parallel=fsdp")])
    return run_dir


@pytest.fixture
def run_dir(two_ranks, tmp_path) -> Path:
    return shutil.copytree(two_ranks, tmp_path / "run")


@pytest.fixture
def folder(run_dir) -> Path:
    """The newest checkpoint, which a test may damage; the one of step 2 is intact."""
    return run_dir / "checkpoint_step_4.pt"


def rewrite_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the index and give it the checksum of what it then holds, as a forger would."""
    index = json.loads((folder / "index.json").read_text())
    del index["crc32"]
    change(index)
    index["crc32"] = zlib.crc32(json.dumps(index).encode())
    (folder / "index.json").write_text(json.dumps(index))


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return sharded_checkpoint.read_weights(folder, "")


def write_dcp(folder: Path) -> None:
    """Turn a folder into what version 0.1 wrote: the same tensors and facts.pt, by torch.distributed.checkpoint."""
    tensors = all_tensors(folder)
    for name in ("index.json", "rank_0.bin", "rank_1.bin"):
        (folder / name).unlink()
    save(tensors, checkpoint_id=folder, no_dist=True)


# ---- What is saved comes back ----------------------------------------------------------------------------------------


def test_the_files_are_plain_bytes_and_an_index_in_json(folder):
    """Ten lines of someone who knows only docs/formats.md."""
    assert sorted(path.name for path in folder.iterdir()) == ["facts.pt", "index.json", "rank_0.bin", "rank_1.bin"]
    index = json.loads((folder / "index.json").read_text())
    tensors = {}
    for name, tensor in index["tensors"].items():
        values = torch.full(tensor["shape"], torch.nan)
        for shard in tensor["shards"]:
            data = bytearray((folder / shard["file"]).read_bytes()[shard["start"] :][: shard["length"]])
            box = tuple(slice(start, start + size) for start, size in zip(shard["offsets"], shard["sizes"]))
            values[box] = torch.frombuffer(data, dtype=getattr(torch, tensor["dtype"])).view(shard["sizes"])
        tensors[name] = values
    assert len(tensors) == 5 * sum(name.startswith("model/") for name in tensors)  # weight, average and AdamW's three
    expected = all_tensors(folder)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)
    for name, part in index["parts"].items():
        assert part == {"length": (folder / name).stat().st_size, "crc32": zlib.crc32((folder / name).read_bytes())}


def test_a_folder_of_version_0_1_loads_alike(folder, run_dir, data):
    expected = all_tensors(folder)
    model, metadata = checkpoint.load_model(folder)
    write_dcp(folder)
    assert (folder / ".metadata").exists()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in all_tensors(folder).items())
    again, metadata_again = checkpoint.load_model(run_dir)
    assert metadata_again["path"] == metadata["path"] and metadata_again["step"] == 4
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    training.main(parse_config(training.Config, arguments(data, run_dir, *changed(OPTIONS, "--max_steps=5"))))
    assert f"resumed {folder} at step 4" in (run_dir / "train.log").read_text()


LAYOUT = """
import sys
from pathlib import Path
import torch
from model import ModelConfig, Transformer
from nano416 import distributed, sharded_checkpoint
from nano416.optimizers import OptimConfig, build_optimizer
folder, strategy, tp_size, name = Path(sys.argv[1]), *sys.argv[2:]
dist = distributed.init(strategy=strategy, tp_size=int(tp_size))

def tensors_of(seed):
    def make():
        torch.manual_seed(seed)
        return Transformer(ModelConfig(dim=32, n_layers=3, n_heads=4, n_kv_heads=2, ffn_dim=40, vocab_size=97, seq_len=32))
    model = distributed.build_model(make, dist)
    optimizer = build_optimizer(model, OptimConfig(optimizer=name, max_lr=1e-2), distributed.map_sharded)
    tokens = torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(seed))
    model(tokens, tokens).backward()
    optimizer.step()
    return sharded_checkpoint.named_tensors(model, optimizer, {}), model

tensors, model = tensors_of(0)
shards = sharded_checkpoint.local_shards(tensors)
sharded_checkpoint.write(folder, shards, {}, distributed.new_cpu_group())
distributed.barrier()
whole = sharded_checkpoint.read_weights(folder, "")
assert whole.keys() == tensors.keys()
for key, tensor in tensors.items():
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    assert torch.equal(whole[key], full), key
others, other_model = tensors_of(1)
sharded_checkpoint.load_into(others, folder)
for key, tensor in others.items():
    assert torch.equal(distributed.local_shard(tensor)[0], distributed.local_shard(tensors[key])[0]), key
for mine, theirs in zip(model.parameters(), other_model.parameters()):
    assert torch.equal(distributed.local_shard(mine)[0], distributed.local_shard(theirs)[0])
print("bytes", sum(shard.values.nbytes for shard in shards.values()), flush=True)
distributed.shutdown()
"""


@pytest.mark.parametrize(
    ("processes", "nodes", "strategy", "tp_size", "optimizer"),
    [
        (2, 1, "fsdp", 2, "adamw"),
        pytest.param(3, 1, "fsdp", 1, "muon", marks=pytest.mark.slow),
        pytest.param(4, 1, "fsdp", 2, "muon", marks=pytest.mark.slow),
        pytest.param(4, 2, "hsdp", 1, "muon", marks=pytest.mark.slow),
        pytest.param(4, 2, "hsdp", 2, "adamw", marks=pytest.mark.slow),
    ],
)
def test_each_value_is_written_once_and_read_into_its_place(processes, nodes, strategy, tp_size, optimizer, tmp_path):
    """Whatever divides the model; replicas and tensor-parallel neighbours share the work."""
    folder = tmp_path / "checkpoint_step_1.pt"
    output = ranks(processes, ["-c", LAYOUT, str(folder), strategy, str(tp_size), optimizer], nodes)
    written = [int(line.split()[1]) for line in output.splitlines()]
    assert sum(written) == sum(tensor.nbytes for tensor in all_tensors(folder).values())
    assert max(written) < 1.3 * sum(written) / processes


def test_tensors_of_other_names_shapes_or_kinds_are_refused(folder):
    name = "model/norm.weight"
    for tensors in ({"model/x": torch.ones(1)}, {name: torch.ones(31)}, {name: torch.ones(32, dtype=torch.int64)}):
        with pytest.raises(ValueError, match=r"does not fit the model: .* differ \(1 diff"):
            sharded_checkpoint.load_into(tensors, folder)


# ---- What is damaged is named, and passed over -----------------------------------------------------------------------


def flip(position: float) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(position * len(data))] ^= 1
        path.write_bytes(data)

    return damage


DAMAGE: dict[str, Callable[[Path], object]] = {
    **{f"a bit flipped at {position:.0%}": flip(position) for position in (0, 0.3, 0.5, 0.8)},
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "missing": lambda path: path.unlink(),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a FIFO": lambda path: (path.unlink(), os.mkfifo(path)),
    "a link": lambda path: path.symlink_to(path.rename(path.parent.parent / "elsewhere")),
    "a link to an endless device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
}


@pytest.mark.parametrize("name", ["facts.pt", "index.json", "rank_0.bin", "rank_1.bin"])
@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file_is_named_and_the_older_checkpoint_taken(what, name, folder, run_dir):
    DAMAGE[what](folder / name)
    with pytest.raises(ValueError, match=name) as error:
        checkpoint.read(folder)
    assert str(folder) in str(error.value)
    warnings: list[str] = []
    newest = checkpoint.read_latest(run_dir, warnings.append)
    assert newest and newest[0] == run_dir / "checkpoint_step_2.pt"
    assert len(warnings) == 1 and name in warnings[0]


def test_a_flipped_bit_anywhere_is_noticed_or_harmless(folder):
    """In the index, and in a part of a folder of version 0.1: an error, or exactly the saved tensors."""
    expected = all_tensors(folder)
    index = folder / "index.json"
    original = index.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for position in torch.randint(0, len(original), (50,), generator=generator).tolist():
        index.write_bytes(original[:position] + bytes([original[position] ^ 1]) + original[position + 1 :])
        with pytest.raises(ValueError, match=r"index\.json"):
            sharded_checkpoint.verify(folder)
    index.write_bytes(original)
    write_dcp(folder)
    part = folder / "__0_0.distcp"
    original = part.read_bytes()
    noticed = 0
    for position in torch.randint(0, len(original), (50,), generator=generator).tolist():
        part.write_bytes(original[:position] + bytes([original[position] ^ 1]) + original[position + 1 :])
        try:
            sharded_checkpoint.verify(folder)
            tensors = all_tensors(folder)
        except ValueError as error:
            assert part.name in str(error)
            noticed += 1
        else:
            assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    assert noticed > 15


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("what", ["truncated", "empty", "missing", "a FIFO", "a link"])
def test_damage_to_a_folder_of_version_0_1_is_named(what, name, folder):
    write_dcp(folder)
    DAMAGE[what](folder / name)
    # Without .metadata nothing tells a folder of 0.1 from one whose index.json is missing.
    with pytest.raises(ValueError, match="index.json" if (what, name) == ("missing", ".metadata") else name):
        checkpoint.read(folder)


def damage_in(folder: Path) -> None:
    flip(0.5)(folder / "rank_1.bin")


def test_the_step_of_a_damaged_folder_is_written_again(folder, run_dir, data, two_ranks):
    """As a folder by two ranks, then as a file by one process."""
    damage_in(folder)
    output = ranks(2, ["-c", TOO_LARGE, *arguments(data, run_dir, *OPTIONS, "--parallel=fsdp")])
    assert "passed over" in output and "checkpoint_step_2.pt at step 2" in output and "NOT written" not in output
    expected = all_tensors(two_ranks / folder.name)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in all_tensors(folder).items())
    assert losses(run_dir) == losses(two_ranks)
    damage_in(folder)
    training.main(parse_config(training.Config, arguments(data, run_dir, *OPTIONS)))
    assert folder.is_file() and checkpoint.read(folder)["step"] == 4
    assert not list(run_dir.glob(".*.tmp"))


# ---- The ranks agree -------------------------------------------------------------------------------------------------

READ_LATEST = """
import sys
from nano416 import checkpoint, distributed
dist = distributed.init()
real = checkpoint._read_file
for broken_rank in (None, 1):
    # Files that one rank cannot read, as on a network file system with a broken client.
    def read_file(path):
        if dist.rank == broken_rank and "step_2" in str(path):
            raise ValueError(f"{path} is unreadable here")
        return real(path)
    checkpoint._read_file = read_file
    warnings = []
    try:
        print(dist.rank, checkpoint.read_latest(sys.argv[1], warnings.append)[0].name, len(warnings), flush=True)
    except ValueError as error:
        print(dist.rank, str(error).split()[0], "readable", len(warnings), flush=True)
distributed.shutdown()
"""


def test_what_one_rank_finds_damaged_or_cannot_read_is_passed_over_by_all(folder, run_dir):
    damage_in(folder)
    output = ranks(2, ["-c", READ_LATEST, str(run_dir)])
    expected = [f"{rank} {said}" for rank in (0, 1) for said in ("checkpoint_step_2.pt 1", "no readable 2")]
    assert sorted(output.splitlines()) == expected


UNEQUAL_HOSTS = """
import os
import training
from nano416 import checkpoint, sharded_checkpoint
from nano416.config import parse_config
checkpoint.fits_in_host_memory = lambda n_params: os.environ["RANK"] == "0"
real = sharded_checkpoint._write_part
def full_disk(path, shards):
    if "step_2" in str(path) and os.environ["RANK"] == "1":
        raise OSError(28, "No space left on device")
    return real(path, shards)
sharded_checkpoint._write_part = full_disk
training.main(parse_config(training.Config))
"""


def test_hosts_of_unequal_memory_agree_on_a_folder_and_a_full_disk_of_one_costs_one_checkpoint(data, tmp_path):
    output = ranks(2, ["-c", UNEQUAL_HOSTS, *arguments(data, tmp_path, *OPTIONS, "--parallel=fsdp", "--timeout=20")])
    assert "checkpoint_step_2.pt NOT written: rank 1: [Errno 28] No space left" in output
    assert sorted(path.name for path in tmp_path.glob("*step*")) == ["checkpoint_step_4.pt"]
    assert (tmp_path / "checkpoint_step_4.pt").is_dir() and not list(tmp_path.glob(".*.tmp"))


# ---- Nothing runs code -----------------------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it creates the file `ran` in the current folder."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def pickle_as_index(folder: Path) -> None:
    write_dcp(folder)
    (folder / ".metadata").write_bytes(pickle.dumps(Bomb()))


def call_through_an_allowed_module(folder: Path) -> None:
    """dataclasses.dataclass compiles what a class's annotations say: here through DCP's module, which imports it."""
    write_dcp(folder)
    code = b"\x80\x04\x8c%torch.distributed.checkpoint.metadata\x8c\x09dataclass\x93"
    (folder / ".metadata").write_bytes(
        code + b"\x8c%torch.distributed.checkpoint.metadata\x8c\x0bStorageMeta\x93\x85R."
    )


def change_a_class(folder: Path) -> None:
    """A state of slots is set on whatever the pickle names: here on a class of torch's."""
    write_dcp(folder)
    target = b"\x80\x04\x8c%torch.distributed.checkpoint.metadata\x8c\x0bStorageMeta\x93"
    (folder / ".metadata").write_bytes(target + b"N}\x8c\x07changed\x88s\x86b.")


def fill_memory_from_ten_bytes(folder: Path) -> None:
    write_dcp(folder)
    (folder / ".metadata").write_bytes(b"\x80\x04Nr\xff\xff\xff\x7f.")


def read_dcp_index(folder: Path) -> Any:
    return pickle.loads((folder / ".metadata").read_bytes())


def entry_that_is_not_a_tensor(folder: Path) -> None:
    """DCP itself unpickles such entries without any restriction; `size` is what 0.1 took for a tensor's."""
    write_dcp(folder)
    index = read_dcp_index(folder)
    name = "model/norm.weight"
    entry = torch.distributed.checkpoint.metadata.BytesStorageMetadata()
    entry.size = index.state_dict_metadata[name].size  # type: ignore[attr-defined]
    index.state_dict_metadata[name] = entry
    (folder / "__0_0.distcp").write_bytes(pickle.dumps(Bomb()))
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def dcp_part_of(contents: Callable[[Path], object]) -> Callable[[Path], None]:
    """A good index whose part holds something else in place of every shard."""

    def forge(folder: Path) -> None:
        write_dcp(folder)
        contents(folder / "forged")
        payload = (folder / "forged").read_bytes()
        index = read_dcp_index(folder)
        data = b""
        for info in index.storage_data.values():
            info.offset = len(data)
            info.length = len(payload)
            data += payload
        (folder / "__0_0.distcp").write_bytes(data)
        (folder / ".metadata").write_bytes(pickle.dumps(index))

    return forge


def dcp_path(path: str) -> Callable[[Path], None]:
    def forge(folder: Path) -> None:
        write_dcp(folder)
        shutil.copy(folder / "__0_0.distcp", folder.parent / "outside")
        index = read_dcp_index(folder)
        for info in index.storage_data.values():
            info.relative_path = path.format(folder.parent)
        (folder / ".metadata").write_bytes(pickle.dumps(index))

    return forge


def json_path(path: str) -> Callable[[Path], None]:
    def forge(folder: Path) -> None:
        shutil.copy(folder / "rank_0.bin", folder.parent / "outside")
        outside = path.format(folder.parent)

        def change(index: dict[str, Any]) -> None:
            index["parts"][outside] = index["parts"].pop("rank_0.bin")
            for tensor in index["tensors"].values():
                for shard in tensor["shards"]:
                    if shard["file"] == "rank_0.bin":
                        shard["file"] = outside

        rewrite_index(folder, change)

    return forge


def link(name: str) -> Callable[[Path], object]:
    return lambda folder: DAMAGE["a link"](folder / name)


# More bytes than any shard has: an archive smaller than its values is refused before it is opened.
LARGE = torch.ones(10**5)
EVIL: dict[str, Callable[[Path], object]] = {
    "a pickle as index": pickle_as_index,
    "an index that calls a function": call_through_an_allowed_module,
    "an index that changes a class": change_a_class,
    "an index that fills the memory": fill_memory_from_ten_bytes,
    "an index with an entry of bytes": entry_that_is_not_a_tensor,
    "a pickle as part of 0.1": dcp_part_of(lambda path: path.write_bytes(pickle.dumps([Bomb(), bytes(10**5)]))),
    "an archive with a pickle as part of 0.1": dcp_part_of(lambda path: torch.save([Bomb(), LARGE], path)),
    "a list as part of 0.1": dcp_part_of(lambda path: torch.save([LARGE], path)),
    "another shape in a part of 0.1": dcp_part_of(lambda path: torch.save(LARGE, path)),
    "a sparse tensor in a part of 0.1": dcp_part_of(lambda path: torch.save(LARGE.to_sparse(), path)),
    "a part of 0.1 above the folder": dcp_path("../outside"),
    "a part of 0.1 anywhere": dcp_path("{}/outside"),
    "a part above the folder": json_path("../outside"),
    "a part anywhere": json_path("{}/outside"),
    "a part of no name": json_path(".."),
    "a linked part": link("rank_0.bin"),
    "a linked index": link("index.json"),
    "linked facts": link("facts.pt"),
    "a pickle as facts": lambda folder: (folder / "facts.pt").write_bytes(pickle.dumps(Bomb())),
    "an archive with a pickle as facts": lambda folder: torch.save(Bomb(), folder / "facts.pt"),
    "a pickle as part": lambda folder: (folder / "rank_0.bin").write_bytes(pickle.dumps(Bomb())),
}


@pytest.mark.parametrize("what", EVIL)
def test_no_folder_runs_code_whatever_reads_it(what, folder, data, tmp_path, monkeypatch, capsys):
    EVIL[what](folder)
    monkeypatch.chdir(tmp_path)
    metadata = torch.distributed.checkpoint.metadata
    before = dict(vars(metadata.StorageMeta))
    start = arguments(data, tmp_path / "new", *OPTIONS)
    readers: dict[str, Callable[[], object]] = {
        "chat": lambda: chat.load(str(folder), chat.ChatConfig([str(folder)])),
        "hellaswag": lambda: eval_hellaswag.load(folder, torch.device("cpu")),
        "resume": lambda: training.main(parse_config(training.Config, [*start, f"--resume={folder}"])),
        "init_from": lambda: training.main(parse_config(training.Config, [*start, f"--init_from={folder}"])),
    }
    for read in readers.values():
        with pytest.raises(ValueError) as error:
            read()
        assert str(folder) in str(error.value) and "weights_only" not in str(error.value)
        assert len(str(error.value).splitlines()) == 1
        assert not (tmp_path / "ran").exists() and not (ROOT / "ran").exists(), "the folder ran code"
    assert dict(vars(metadata.StorageMeta)) == before, "the folder changed a class"


NAME = "model/layers.0.self_attn.q_proj.weight"


def set_in_shard(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda index: index["tensors"][NAME]["shards"][0].update(values)


def set_in_tensor(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda index: index["tensors"][NAME].update(values)


CONTRADICTIONS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a shard outside the file": set_in_shard(start=2**40),
    "a shard at an odd byte": set_in_shard(start=1),
    "a negative place": set_in_shard(start=-4),
    "a fraction": set_in_shard(start=4.5),
    "a truth value": set_in_shard(start=True),
    "text": set_in_shard(sizes="16,32"),
    "nothing": set_in_shard(sizes=None),
    "a shard outside the tensor": set_in_shard(offsets=[32, 0]),
    "a dimension too few": set_in_shard(sizes=[512]),
    "another length": set_in_shard(length=4),
    "no such part": set_in_shard(file="rank_7.bin"),
    "a shard missing": lambda index: index["tensors"][NAME]["shards"].pop(),
    "a shard twice": lambda index: index["tensors"][NAME]["shards"].append(index["tensors"][NAME]["shards"][0]),
    "a huge tensor": set_in_tensor(shape=[10**9, 10**9]),
    "a huge shard": lambda index: (
        set_in_tensor(shape=[10**9, 1])(index),
        set_in_shard(sizes=[10**9, 1], offsets=[0, 0], length=4 * 10**9)(index),
    ),
    "a dtype with code": set_in_tensor(dtype="load"),
    "a complex dtype": set_in_tensor(dtype="complex64"),
    "a dtype that is a list": set_in_tensor(dtype=["float32"]),
    "tensors that share bytes": lambda index: index["tensors"].update(
        {f"model/{n}": index["tensors"][NAME] for n in range(1000)}
    ),
    "tensors in a list": lambda index: index.update(tensors=list(index["tensors"])),
    "no tensors": lambda index: index.pop("tensors"),
    "no parts": lambda index: index.update(parts={}),
    "a part without checksum": lambda index: index["parts"]["rank_0.bin"].update(crc32=None),
    "a newer format": lambda index: index.update(format=99),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_an_index_that_contradicts_itself_is_one_line(what, folder):
    rewrite_index(folder, CONTRADICTIONS[what])
    with pytest.raises(ValueError, match=r"index\.json") as error:
        sharded_checkpoint.read_weights(folder)
    assert str(folder) in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("contents", [b"", b"[]", b"null", b"{}", b"{", b"\xff\xfe", b"[" * 10**5, b'{"crc32": 1e999}'])
def test_an_index_of_other_json_is_one_line(contents, folder):
    (folder / "index.json").write_bytes(contents)
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        checkpoint.read(folder)
