"""The house: imports only go down, nothing happens at import, each tool can be deleted, one place for each danger."""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable

import pytest
from conftest import ROOT

# What each file may import of the project. A file imports only from lower floors.
FLOORS = [
    {"config", "devices", "cpu_ops", "files", "hub", "trackers"},
    {"model", "tokenizer", "distributed", "text_files", "launcher"},
    {
        "dataset",
        "sources",
        "generate",
        "optimizers",
        "metrics",
        "fault_tolerance",
        "seed_checkpoint",
        "dcp_checkpoint",
    },
    {"sharded_checkpoint", "dataloader", "estimate", "quantize", "encode"},
    {"checkpoint", "diffusion"},
    {"ablations", "scoring", "evaluate", "branches"},
    {"data_pipeline", "eval_hellaswag", "chat"},
    {"training"},
]
# Optional features are imported inside the branch that needs them. training's config has their options.
LAZY = {"diffusion", "ablations", "trackers"}

REQUIREMENTS = {"torch", "numpy", "tiktoken", "datasets", "huggingface-hub", "tqdm", "matplotlib"}
# The other packages are imported only inside the function that needs them.
AT_THE_TOP = {"torch", "numpy", "tiktoken", "tqdm"}
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
# Packages that the seven bring along.
INDIRECT = {"requests", "pyarrow", "fsspec"}
SCRIPTS = ("model.py", "training.py", "data_pipeline.py", "eval_hellaswag.py", "chat.py")

FILES = [*ROOT.glob("*.py"), *ROOT.glob("nano416/*.py"), *ROOT.glob("tools/*.py")]
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(FILES)}
MODULES = [name for name in TREES if not name.endswith("__init__.py")]
CORE = [name for name in MODULES if not name.startswith("tools/")]
TOOLS = [name for name in MODULES if name.startswith("tools/")]
each_module = pytest.mark.parametrize("name", MODULES)


def imported(node: ast.AST) -> list[str]:
    """Dotted names that an import statement imports; [] for any other node."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []


def stem(name: str) -> str:
    return name.rpartition("/")[2].removesuffix(".py")


def project_imports(nodes: Iterable[ast.AST]) -> set[str]:
    """Files of the project that import statements name, without folder and ending."""
    stems = {stem(name) for name in MODULES}
    names = [
        module.removeprefix("nano416.").removeprefix("tools.").split(".")[0] for n in nodes for module in imported(n)
    ]
    return set(names) & stems


def packages(nodes: Iterable[ast.AST]) -> set[str]:
    """Foreign packages that import statements name."""
    first = {module.split(".")[0] for node in nodes for module in imported(node)}
    return first - set(sys.stdlib_module_names) - {stem(name) for name in MODULES} - {"nano416", "tools"}


def test_the_root_holds_the_five_scripts():
    assert [name for name in MODULES if "/" not in name] == sorted(SCRIPTS)


@pytest.mark.parametrize("name", CORE)
def test_imports_only_go_down(name):
    floor = next(n for n, files in enumerate(FLOORS) if stem(name) in files)
    below = set().union(*FLOORS[:floor])
    assert project_imports(list(ast.walk(TREES[name]))) <= below


@pytest.mark.parametrize("name", CORE)
def test_optional_features_are_imported_where_they_are_used(name):
    if stem(name) not in ("training", "ablations"):
        assert not project_imports(TREES[name].body) & LAZY


@pytest.mark.parametrize("name", TOOLS)
def test_no_file_imports_a_tool(name):
    for other, tree in TREES.items():
        modules = {module for node in ast.walk(tree) for module in imported(node)}
        assert not {m for m in modules if m.startswith(f"tools.{stem(name)}")}, f"{other} imports {name}"


@pytest.mark.slow
@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_can_be_deleted(name, tmp_path):
    """Everything else still imports and answers --help in a copy without it."""
    for folder in ("nano416", "tools"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for script in SCRIPTS:
        shutil.copy(ROOT / script, tmp_path)
    (tmp_path / name).unlink()
    modules = [other.removesuffix(".py").replace("/", ".") for other in MODULES if other != name]
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code, *modules], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@each_module
def test_the_top_of_a_file_imports_few_packages(name):
    tree = TREES[name]
    assert packages(tree.body) <= AT_THE_TOP
    assert packages(list(ast.walk(tree))) <= {p.replace("-", "_") for p in REQUIREMENTS} | OPTIONAL | INDIRECT


def test_config_and_files_need_the_standard_library_alone_and_model_only_torch():
    for name, allowed in {"nano416/config.py": set(), "nano416/files.py": set(), "model.py": {"torch"}}.items():
        assert packages(list(ast.walk(TREES[name]))) == allowed


def test_requirements_are_the_seven_packages():
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    names = [re.split(r"[<>=!~\[; ]", line)[0].replace("_", "-").lower() for line in lines if line]
    assert sorted(names) == sorted(REQUIREMENTS)


def test_importing_a_file_says_and_does_nothing(tmp_path):
    """No output, no file, no process group, no random number drawn, no setting of torch or the environment changed."""
    modules = [name.removesuffix(".py").replace("/", ".") for name in MODULES]
    code = f"""
import importlib, os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
def state():
    return torch.get_rng_state().tolist(), torch.get_default_dtype(), torch.get_num_threads(), dict(os.environ)
before = state()
for name in {modules}:
    importlib.import_module(name)
    assert state() == before and not torch.distributed.is_initialized(), name
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "--no-such-option"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@each_module
def test_a_file_begins_with_what_it_is(name):
    assert len(ast.get_docstring(TREES[name]) or "") > 50


@each_module
def test_pickles_are_never_trusted(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.keyword) and node.arg == "weights_only":
            assert isinstance(node.value, ast.Constant) and node.value.value is True, f"{name}:{node.value.lineno}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads"):
            assert "weights_only" in {k.arg for k in node.keywords}, f"{name}:{node.lineno} loads a pickle"


@each_module
def test_torch_distributed_is_used_in_one_file(name):
    """The checkpoint files may use torch.distributed.checkpoint, which reads and writes without a process group too.

    The launcher, which is none of the processes, uses torchrun's agent.
    """
    used = {m for node in ast.walk(TREES[name]) for m in imported(node) if m.startswith("torch.distributed")}
    used |= {ast.unparse(n) for n in ast.walk(TREES[name]) if isinstance(n, ast.Attribute)} & {"torch.distributed"}
    if name in ("nano416/checkpoint.py", "nano416/sharded_checkpoint.py"):
        used = {m for m in used if not m.startswith("torch.distributed.checkpoint.")}
    if name == "nano416/launcher.py":
        used = {m for m in used if not m.startswith("torch.distributed.elastic.")}
    assert name == "nano416/distributed.py" or not used


@each_module
def test_no_file_wraps_the_model_in_torch_compile(name):
    """`model = torch.compile(model)` would put _orig_mod. into names; compile in place: raw_model.compile()."""
    calls = {ast.unparse(n.func) for n in ast.walk(TREES[name]) if isinstance(n, ast.Call)}
    assert "torch.compile" not in calls


@each_module
def test_no_error_is_swallowed_unseen(name):
    """No bare except, and no `except Exception: pass`."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{name}:{node.lineno}: bare except"
            silent = all(isinstance(statement, ast.Pass) for statement in node.body)
            assert not (silent and "Exception" in ast.unparse(node.type).split()), f"{name}:{node.lineno}"


@each_module
def test_functions_have_few_parameters_and_no_function_is_long(name):
    """At most five parameters or a small dataclass; the training loop is the one long function."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef):
            parameters = [a.arg for a in [*node.args.args, *node.args.kwonlyargs] if a.arg not in ("self", "cls")]
            if node.name in ("_linear_cross_entropy", "_"):
                continue  # a torch operator takes tensors and numbers, no dataclass
            assert len(parameters) <= 6, f"{name}:{node.lineno}: {node.name} has {len(parameters)} parameters"
            lines = (node.end_lineno or 0) - node.lineno
            assert lines <= 60 or (name, node.name) == ("training.py", "train"), (
                f"{name}: {node.name} has {lines} lines"
            )
