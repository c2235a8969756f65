"""The house of the project: who imports whom, nothing at import, few dependencies, one place for each danger."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

# A file imports only from files above its own.
IMPORTS = {
    "config": set(),
    "model": set(),
    "distributed": set(),
    "optimizers": set(),
    "trackers": set(),
    "metrics": {"config"},
    "diffusion": {"model"},
    "inference": {"model"},
    "shards": {"config"},
    "data_pipeline": {"config", "shards"},
    "checkpoint": {"config", "model", "distributed"},
    "safety": {"distributed"},
    "preflight": {"config", "shards", "distributed"},
    "scoring": {"distributed", "diffusion"},
    "eval_hellaswag": {"config", "model", "shards", "checkpoint", "distributed", "scoring"},
    "terminal": set(),
    "chat": {"config", "model", "inference", "shards", "checkpoint", "diffusion", "terminal"},
}
IMPORTS["plan"] = {"model", "shards", "distributed", "optimizers", "metrics", "diffusion"}
IMPORTS["training"] = IMPORTS.keys() - {"chat", "terminal", "data_pipeline", "inference"}
EXTRAS = (
    "convert_hf",
    "eval_lm_harness",
    "scaling_laws",
    "benchmark_train",
    "benchmark",
)  # import anything above, imported by nothing
IMPORTS |= {name: set(IMPORTS) for name in EXTRAS}
IMPORTS["benchmark_train"] |= {"convert_hf"}  # measures transformers with the same weights
IMPORTS["benchmark"] |= {"convert_hf", "benchmark_train"}
# Imported inside the branch that needs it, but for the config of a run, which has diffusion's options.
LAZY = {"diffusion", "trackers", "preflight"}

REQUIREMENTS = {"torch", "numpy", "tiktoken", "datasets", "huggingface-hub", "tqdm", "matplotlib"}
AT_THE_TOP = {"torch", "numpy", "tiktoken", "tqdm"}  # the others only inside the function that needs them
OPTIONAL = {
    "transformers",
    "safetensors",
    "lm_eval",
    "wandb",
    "tensorboard",
    "trackio",
    "tokenizers",
    "gigatoken",
    "isal",
    "orjson",
}
INDIRECT = {"requests": "tiktoken", "pyarrow": "datasets", "fsspec": "datasets"}  # comes with

FILES = sorted(path for path in ROOT.glob("*.py"))
TREES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
each_file = pytest.mark.parametrize("name", TREES)


def imported(node: ast.AST) -> list[str]:
    """Dotted names that an import statement imports from; [] for any other node."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []


def all_imports(name: str) -> set[str]:
    """First names of all imports of a file, inside functions too."""
    return {module.split(".")[0] for node in ast.walk(TREES[name]) for module in imported(node)}


def top_imports(name: str) -> set[str]:
    """First names of what is imported as soon as the file is."""
    return {module.split(".")[0] for node in TREES[name].body for module in imported(node)}


@each_file
def test_a_file_imports_only_from_the_files_above(name):
    assert name in IMPORTS, f"{name}.py has no line in the import graph"
    assert all_imports(name) & TREES.keys() <= IMPORTS[name]
    assert not top_imports(name) & LAZY or name in ("plan", "training", *EXTRAS)


@each_file
def test_the_top_of_a_file_imports_few_packages(name):
    foreign = top_imports(name) - set(sys.stdlib_module_names) - TREES.keys()
    assert foreign <= AT_THE_TOP
    known = {package.replace("-", "_") for package in REQUIREMENTS} | OPTIONAL | INDIRECT.keys()
    assert all_imports(name) - set(sys.stdlib_module_names) - TREES.keys() <= known


def test_config_needs_the_standard_library_alone_and_model_only_torch():
    assert all_imports("config") <= set(sys.stdlib_module_names)
    assert all_imports("model") - set(sys.stdlib_module_names) == {"torch"}


def test_requirements_are_the_seven_packages():
    path = ROOT / "requirements.txt"
    if not path.exists():
        pytest.skip("requirements.txt is not written yet")
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    names = [re.split(r"[<>=!~\[; ]", line)[0].replace("_", "-").lower() for line in lines if line]
    assert sorted(names) == sorted(REQUIREMENTS)


def test_importing_the_files_says_and_does_nothing(tmp_path):
    """No output, no file, no process group, no random number drawn, no setting of torch or the environment changed."""
    code = f"""
import importlib, os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
def state():
    return torch.get_rng_state().tolist(), torch.get_default_dtype(), torch.get_num_threads(), dict(os.environ)
before = state()
for name in {list(TREES)}:
    importlib.import_module(name)
    assert state() == before and not torch.distributed.is_initialized(), name
"""
    command = [sys.executable, "-c", code, "--no-such-option"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@each_file
def test_a_file_begins_with_what_it_is(name):
    assert len(ast.get_docstring(TREES[name]) or "") > 50


@each_file
def test_pickles_are_never_trusted(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.keyword) and node.arg == "weights_only":
            assert isinstance(node.value, ast.Constant) and node.value.value is True, f"{name}.py:{node.value.lineno}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads"):
            assert "weights_only" in {k.arg for k in node.keywords}, f"{name}.py:{node.lineno} loads a pickle"


@each_file
def test_torch_distributed_is_used_in_one_file(name):
    """checkpoint.py may use torch.distributed.checkpoint.state_dict, which works without a process group."""
    used = {m for node in ast.walk(TREES[name]) for m in imported(node) if m.startswith("torch.distributed")}
    used |= {ast.unparse(n) for n in ast.walk(TREES[name]) if isinstance(n, ast.Attribute)} & {"torch.distributed"}
    if name == "checkpoint":
        used = {m for m in used if not m.startswith("torch.distributed.checkpoint.state_dict.")}
    assert name == "distributed" or not used


@each_file
def test_no_file_wraps_the_model_in_torch_compile(name):
    """`model = torch.compile(model)` would put _orig_mod. into names; compile in place: raw_model.compile()."""
    calls = {ast.unparse(n.func) for n in ast.walk(TREES[name]) if isinstance(n, ast.Call)}
    assert "torch.compile" not in calls


@each_file
def test_no_error_is_swallowed_unseen(name):
    """No bare except, and no `except Exception: pass`."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{name}.py:{node.lineno}: bare except"
            silent = all(isinstance(statement, ast.Pass) for statement in node.body)
            assert not (silent and "Exception" in ast.unparse(node.type).split()), f"{name}.py:{node.lineno}"
