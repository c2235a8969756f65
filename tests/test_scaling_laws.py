"""scaling_laws.py: published numbers come out, planted constants are found again, and what it writes training.py accepts."""

import json
import math
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import config
import data_pipeline
import metrics
import scaling_laws as laws
import training
from model import Transformer
from scaling_laws import LAWS, SHAPES, Choice, Law, Network, Point, Question

# arXiv:2507.15857, table 5: dim, ffn_dim, head_dim, heads, layers, parameters in millions.
TABLE = {
    "7M": (128, 320, 32, 4, 3, 7.0),
    "14M": (224, 576, 32, 7, 4, 13.6),
    "20M": (288, 768, 32, 7, 5, 19.5),
    "35M": (448, 1152, 32, 7, 6, 36.6),
    "44M": (512, 1344, 64, 8, 8, 50.7),
    "57M": (576, 1536, 64, 9, 9, 64.8),
    "74M": (640, 1664, 64, 10, 10, 80.5),
    "90M": (640, 1664, 64, 10, 13, 95.0),
    "106M": (640, 1664, 64, 10, 16, 109.6),
    "117M": (768, 2048, 64, 12, 12, 123.6),
    "140M": (768, 2048, 64, 12, 15, 144.8),
    "163M": (768, 2048, 64, 12, 18, 166.1),
    "175M": (896, 2368, 64, 14, 14, 179.2),
    "196M": (896, 2368, 64, 14, 16, 198.3),
    "217M": (896, 2368, 64, 14, 18, 217.5),
    "251M": (1024, 2688, 64, 16, 16, 250.8),
    "278M": (1024, 2688, 64, 16, 18, 275.7),
    "306M": (1024, 2688, 64, 16, 20, 300.6),
    "425M": (1280, 3392, 128, 10, 18, 416.9),
    "489M": (1280, 3392, 128, 10, 21, 475.6),
    "509M": (1408, 3712, 128, 11, 18, 495.9),
    "587M": (1408, 3712, 128, 11, 21, 566.7),
    "724M": (1536, 4096, 128, 12, 22, 700.3),
    "1018M": (1792, 4736, 128, 14, 23, 971.3),
    "1429M": (2048, 5440, 128, 16, 25, 1358.2),
    "2298M": (2560, 6784, 128, 20, 26, 2165.3),
    "4516M": (3072, 8192, 128, 24, 36, 4231.9),
    "16183M": (5120, 13632, 128, 40, 47, 15028.3),
}


# ---- shapes and presets ----------------------------------------------------------------------------------------------


def test_the_family_has_the_published_shapes_and_counts():
    assert len(SHAPES) == 54
    for name, (*shape, millions) in TABLE.items():
        ours = SHAPES[name]
        assert [ours.dim, ours.ffn_dim, ours.head_dim, ours.n_heads, ours.n_layers] == shape, name
        assert ours.published_params / 1e6 == pytest.approx(millions, abs=0.0501), name


def model_of(text: str) -> Transformer:
    """The network that a TOML file describes, without memory for weights."""
    cfg = training.with_vocabulary(parse(text), None)
    with torch.device("meta"):
        return Transformer(cfg.model)


def parse(text: str) -> training.Config:
    return config.from_dict(training.Config, tomllib.loads(text))


@pytest.mark.parametrize("name", ["7M", "425M", "12569M"])  # the last has heads x head_dim != dim
def test_a_preset_is_the_network_that_training_builds(name):
    """Parameters and FLOPs equal model.py's; the published formula counts 4 dim more per layer and no last norm."""
    choice = Choice(name, SHAPES[name], 1e9, "ar", 2048)
    network = model_of(laws.toml(choice, "data/x", Path("runs/x"), "test"))
    shape = SHAPES[name]
    assert network.num_params() == shape.params
    assert network.flops_per_token() == shape.flops_per_token(2048)
    if shape.n_heads * shape.head_dim == shape.dim:
        assert shape.published_params - shape.params == 4 * shape.n_layers * shape.dim - shape.dim


GPT2_POSITIONS_AND_BIASES = lambda dim, layers: 1024 * dim + layers * 11 * dim + dim
PRESETS = {  # published parameters, what ours has more
    "dclm_411m": (411_616_256, 24 * 2 * 128),  # gains of QK-norm
    "dclm_1b": (1_439_795_200, 24 * 2 * 128),
    "dclm_7b": (6_889_410_560, 32 * 2 * 128),
    "gpt2_124m": (124_439_808, -GPT2_POSITIONS_AND_BIASES(768, 12)),
    "gpt2_1.4b": (1_438_683_648, -GPT2_POSITIONS_AND_BIASES(1536, 48)),
    "llama_150m": (154_146_816, 512),  # Marin's compute_num_parameters leaves the last norm out
    "llama_300m": (299_649_024, 768),
    "llama_600m": (602_456_064, 1024),
    "llama_1.4b": (1_431_371_776, 2048),
    "llama_8b": (8_030_261_248, 0),  # Llama 3's own count
    "ar_140m": (SHAPES["140M"].params, 0),
    "diffusion_425m": (SHAPES["425M"].params, 0),
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_file_passes_the_dry_run_with_the_published_count(name, capsys, monkeypatch):
    monkeypatch.chdir("/")  # without data
    training.main(config.parse_config(training.Config, [str(ROOT / f"configs/{name}.toml"), "--dry_run"]))
    said = capsys.readouterr().out
    published, more = PRESETS[name]
    assert f"{published + more:,} parameters" in said
    comment = (ROOT / f"configs/{name}.toml").read_text()
    if not name.startswith(("ar_", "diffusion")):
        assert f"{published:,}" in comment or f"{published + more:,}" in comment


@pytest.mark.parametrize(
    ("name", "steps", "warmup"),
    [("dclm_411m", 7_850, 2_000), ("dclm_1b", 54_923, 5_000), ("dclm_7b", 32_851, 5_000), ("llama_8b", 40_000, 400)],
)
def test_a_preset_file_makes_the_published_steps(name, steps, warmup):
    cfg = parse((ROOT / f"configs/{name}.toml").read_text())
    assert training.make_plan(training.with_vocabulary(cfg, None), 1).steps == steps
    assert round(cfg.optim.warmup_frac * steps) == warmup


def test_the_quick_start_pair_sees_what_the_paper_says():
    for name, epochs, flops in ("ar_140m", 50, 4.3e18), ("diffusion_425m", 500, 1.25e20):
        cfg = training.with_vocabulary(parse((ROOT / f"configs/{name}.toml").read_text()), None)
        plan = training.make_plan(cfg, 8, cfg.data.unique_tokens)
        assert plan.steps * cfg.train.batch_tokens == pytest.approx(epochs * 100e6, rel=1e-3)
        assert 6 * plan.params * epochs * 100e6 == pytest.approx(flops, rel=0.02)


def test_the_dial_keeps_its_promises():
    shape, tokens, batch = laws.dial(12)
    assert (shape.dim, shape.n_heads, shape.n_layers, batch) == (768, 6, 12, 2**19)
    matrices = 12 * (4 * 768**2 + 3 * 768 * shape.ffn_dim) + 50257 * 768
    assert tokens == 12 * matrices
    assert laws.dial(20)[0].dim == 1280 and laws.dial(26)[2] == 2**20  # nanochat's d26 trains with 1M tokens


# ---- laws ------------------------------------------------------------------------------------------------------------


def test_muennighoffs_published_values():
    law = LAWS["muennighoff"]
    assert law.loss(6.34e9, 242e9, 25e9) == pytest.approx(2.2256440889984477, abs=1e-9)
    assert law.loss(8.67e9, 178e9, 25e9) == pytest.approx(2.2269634075087867, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "flops", "params", "tokens", "loss"),
    [
        ("hoffmann", 1e18, 80.6e6, 2.07e9, 3.535),
        ("hoffmann", 1e20, 645e6, 25.8e9, 2.600),
        ("epoch", 1e19, 262e6, 6.36e9, 2.927),
        ("epoch", 1e20, 853e6, 19.5e9, 2.553),
    ],
)
def test_the_optimum_is_the_published_one(name, flops, params, tokens, loss):
    N, D = LAWS[name].optimum(flops)
    assert (pytest.approx(params, rel=0.01), pytest.approx(tokens, rel=0.01)) == (N, D)
    assert pytest.approx(flops) == 6 * N * D
    assert LAWS[name].loss(N, D) == pytest.approx(loss, abs=1e-3)
    around = [LAWS[name].loss(N * f, D / f) for f in (0.8, 0.99, 1.01, 1.25)]
    assert min(around) > LAWS[name].loss(N, D), "not the minimum along equal compute"
    assert LAWS[name].best_params(D) == pytest.approx(N)


def test_repeats_are_worth_less_and_less():
    law = LAWS["muennighoff"]
    worth = [law.worth(1e6, epochs * 1e9, 1e9)[1] / 1e9 for epochs in (1, 2, 4, 40, 4000)]
    assert worth[0] == 1 and worth == sorted(worth)
    assert worth[2] == pytest.approx(4, rel=0.1), "four epochs are about as good as new"
    assert worth[-1] == pytest.approx(1 + 15.387756), "the limit is 1 + R_D* epochs"
    assert LAWS["diffusion"].worth(1e6, 100e9, 1e9)[1] / 1e9 == pytest.approx(100, rel=0.1)


@pytest.mark.parametrize(("unique", "flops"), [(10e6, 3.2e17), (100e6, 4.7e19), (500e6, 1.6e21), (10e9, 1.05e24)])
def test_critical_compute(unique, flops):
    assert laws.critical_flops(unique) == pytest.approx(flops, rel=0.03)
    stated = 0.460 * math.log10(flops) - 7.052  # the same curve as the paper's text has it: log10 of U in millions
    assert math.log10(unique / 1e6) == pytest.approx(stated, abs=0.02)


# ---- plan ------------------------------------------------------------------------------------------------------------


def ask(unique: int | None = None, law: str | None = None, **budget: float) -> Question:
    return Question(budget, unique, None, 2048, laws.GPT2_VOCAB, 989e12 * 0.45 * 3600, law)


def test_a_plan_spends_its_budget_and_no_other_shape_does_better():
    for question in ask(flops=1e19), ask(gpu_hours=20), ask(unique=100_000_000, flops=4.3e18):
        choice = question.answer("ar")
        law = question.law_for("ar")
        best = law.loss(choice.shape.params, choice.tokens, choice.unique_tokens)
        for shape in SHAPES.values():
            assert law.loss(shape.params, question.tokens_for(shape), choice.unique_tokens) >= best
    assert ask(flops=1e19).answer("ar").flops == pytest.approx(1e19)
    hours = ask(gpu_hours=20).answer("ar")
    assert hours.tokens * hours.shape.flops_per_token(2048) == pytest.approx(20 * 3600 * 989e12 * 0.45)


def test_plans_for_100m_unique_tokens_are_near_the_papers_best_runs():
    """Table 4: AR 144.8M for 50 epochs, masked diffusion 416.9M for 500; a factor of 1.5 is the family's grain."""
    ar = ask(unique=100_000_000, flops=4.3e18).answer("ar")
    mdm = ask(unique=100_000_000, flops=1.25e20).answer("mdm")
    assert 1 / 1.5 < ar.epochs / 50 < 1.5 and 1 / 1.5 < ar.shape.params / 144.8e6 < 1.5
    assert 1 / 1.5 < mdm.epochs / 500 < 1.5 and 1 / 1.5 < mdm.shape.params / 416.9e6 < 1.5


@pytest.mark.parametrize(
    ("question", "objective", "verdict"),
    [
        (ask(flops=1e21), "ar", "all tokens are new"),
        (ask(unique=100_000_000, flops=1e18), "ar", "of it: ar"),
        (ask(unique=100_000_000, flops=3e19), "ar", "either"),
        (ask(unique=100_000_000, flops=7e19), "mdm", "either"),
        (ask(unique=100_000_000, flops=1e21), "mdm", "of it: mdm"),
        (ask(unique=10_000_000_000, flops=2.5e19), "ar", "all tokens are new"),
    ],
)
def test_the_objective_follows_the_critical_compute(question, objective, verdict):
    choice, reason = laws.decide(question, "auto")
    assert choice.objective == objective and verdict in reason and reason.startswith(objective)


def test_saturation_is_where_more_compute_stops_helping():
    question = ask(unique=100_000_000, flops=1e21)
    choice, law = question.answer("ar"), question.law_for("ar")
    enough = laws.saturation(question, law, choice)
    gap = lambda C: (c := ask(unique=100_000_000, flops=C).answer("ar")) and law.gap(c.shape.params, c.tokens, 100e6)
    assert 1e18 < enough < 1e20
    assert gap(1.01 * enough) - gap(1e21) < 0.0101 < gap(0.8 * enough) - gap(1e21) + 0.001


@pytest.mark.parametrize(
    "budget",
    [
        ["--gpu_hours=62", "--gpu=a100"],
        ["--unique_tokens=100M", "--flops=4.3e18"],
        ["--preset=20M", "--tokens=400M"],
        ["--depth=12"],
        ["--unique_tokens=100M", "--flops=1.25e20"],
    ],
    ids=" ".join,
)
def test_what_plan_writes_training_accepts(budget, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    laws.config.call([laws.plan], ["plan", *budget, "--output=mine.toml"])
    said = capsys.readouterr().out
    model, tokens = re.search(r": ([\d,]+) parameters", said), re.search(r"tokens +([\d,]+) ", said)
    assert model and tokens
    training.main(config.parse_config(training.Config, ["mine.toml", "--dry_run"]))
    planned = capsys.readouterr().out
    assert f"{model[1]} parameters" in planned
    seen = re.search(r"steps, ([\d,]+) tokens", planned)
    assert seen and int(seen[1].replace(",", "")) == pytest.approx(int(tokens[1].replace(",", "")), rel=1e-3)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["plan"], "give one of --flops"),
        (["plan", "--flops=1e19", "--tokens=1B"], "give one of --flops"),
        (["plan", "--flops=0"], "flops must be above 0, got 0"),
        (["plan", "--flops=much"], "flops expects float or none, got 'much'"),
        (["plan", "--gpu_hours=1", "--gpu=abacus"], "unknown gpu 'abacus'; known are H200"),
        (["plan", "--flops=1e19", "--preset=426M"], "unknown preset '426M'"),
        (["plan", "--flops=1e19", "--law=mine"], "unknown law 'mine'"),
        (["plan", "--flops=1e19", "--law=no.json"], "cannot read config file no.json"),
        (["plan", "--flops=1e19", "--unique_tokens=1M", "--law=epoch"], "knows nothing of repeated tokens"),
        (["plan", "--epochs=3"], "--epochs counts passes over --unique_tokens"),
        (["plan", "--flops=1e19", "--unique_tokens=0"], "unique_tokens must be above 0, got 0"),
        (["plan", "--flops=1e19", "--output=/no/such/x.toml"], "cannot write /no/such/x.toml"),
        (["plan", "--flops=1e19", "--mfu=0"], "mfu must be above 0, got 0"),
        (["plan", "--flop=1e19"], "unknown option --flop; did you mean --flops?"),
        (["fit", "/no/such"], "/no/such is no finished run"),
        (["fit"], "the following arguments are required: runs"),
        (["sweep", "chinchilla"], "sweep needs --flops (6e18,1e19)"),
        (["sweep", "learning_rate", "--flops=1e18,2e18"], "takes one compute"),
        (["sweep", "chinchilla", "--flops=1e18", "--sizes=2"], "sizes must be at least 3"),
        (["sweep", "chinchilla", "--flops=1e18", "--batch_tokens=1000"], "must be a multiple of seq_len (2048)"),
        (["sweep", "weather", "--flops=1e18"], "experiment expects {chinchilla,data_value,learning_rate}"),
        (["cluster", "--gpus=12"], "gpus must be up to 8 or a multiple of it"),
        (["shape"], "invalid choice"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(args, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["scaling_laws.py"])
    with pytest.raises(SystemExit) as stopped:
        config.run(lambda: config.call(laws.COMMANDS, args))
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.err.count("\n") == 1 and message in said.err, said.err
    assert list(tmp_path.iterdir()) == []


def test_planning_comes_without_torch():
    code = (
        "import sys, scaling_laws as s; s.plan(flops=1e18); s.cluster(); s.shapes(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, timeout=60)


# ---- fit -------------------------------------------------------------------------------------------------------------

PLANTED = Law(1.8, 480.0, 2000.0, 0.35, 0.366, 20.0, 30.0)


def planted_points(noise: float, repeats: bool) -> list[Point]:
    """36 runs of one epoch, and with `repeats` 24 of more, whose losses are PLANTED's times log-normal noise."""
    torch.manual_seed(0)
    grid = [(N, N * ratio, N * ratio) for N in (1e7, 3e7, 1e8, 3e8, 1e9, 3e9) for ratio in (2, 5, 10, 20, 50, 200)]
    if repeats:
        grid += [(N, U * E, U) for N in (1e7, 1e8, 1e9) for U in (1e8, 1e9) for E in (3, 8, 30, 100)]
    errors = (noise * torch.randn(len(grid), dtype=torch.float64)).exp().tolist()
    return [Point(N, D, U, PLANTED.loss(N, D, U) * e) for (N, D, U), e in zip(grid, errors, strict=True)]


def test_without_noise_the_fit_finds_the_planted_constants():
    found = laws.constants(laws.fit_law(planted_points(0.0, repeats=True)))
    for name, value in laws.constants(PLANTED).items():
        assert found[name] == pytest.approx(value, rel=2e-3), name


def test_with_noise_the_planted_constants_lie_in_the_intervals():
    points = planted_points(0.002, repeats=True)
    law = laws.fit_law(points)
    spread = laws.intervals(points, law, rounds=40)
    for name, value in laws.constants(PLANTED).items():
        low, high = spread[name]
        assert low < value < high, f"{name}: planted {value}, interval {low} to {high}"
        assert low < laws.constants(law)[name] < high
        assert high / low < 4, f"{name}: an interval this wide says nothing"


def test_one_outlier_moves_nothing():
    """What the Huber loss is for: a run that went wrong, 20% above its neighbours."""
    points = planted_points(0.0, repeats=False)
    points[17] = points[17]._replace(loss=1.2 * points[17].loss)
    found = laws.fit_law(points)
    assert found.optimum(1e20)[0] == pytest.approx(PLANTED.optimum(1e20)[0], rel=0.05)


def write_points(path: Path, points: list[Point]) -> str:
    names = ("params", "tokens", "unique_tokens", "loss")
    path.write_text("".join(json.dumps(dict(zip(names, point, strict=True))) + "\n" for point in points))
    return str(path)


def test_fit_writes_a_law_that_plan_reads_and_a_picture(tmp_path, capsys):
    points = planted_points(0.001, repeats=True)
    equal = [(N, 2e18 / N) for N in (5e7, 1e8, 2e8)]  # compute, so that every panel is drawn
    points += [Point(N, D, D, PLANTED.loss(N, D)) for N, D in equal]
    assert len(laws.budgets(points)) == 1
    file = write_points(tmp_path / "points.jsonl", points)
    law, picture = tmp_path / "law.json", tmp_path / "law.png"
    laws.fit([file], output=str(law), plot=str(picture), bootstrap=3)
    said = capsys.readouterr().out
    assert re.search(r"R\^2 of log L (0\.99|1\.00)", said) and "r_data" in said
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    read = laws.load_law(str(law))
    assert read.optimum(1e20)[0] == pytest.approx(PLANTED.optimum(1e20)[0], rel=0.05)
    laws.plan(flops=1e19, law=str(law), unique_tokens=100_000_000)
    assert f"({law})" in capsys.readouterr().out


def finished_run(folder: Path, point: Point, objective: str = "ar", vocab_size: int = 257) -> str:
    folder.mkdir()
    row = {"step": 9, "tokens": point.tokens, "val_loss": point.loss, "parameters": point.params}
    metrics.write_text(folder / "final_metrics.json", json.dumps({**row, "unique_tokens": point.unique}))
    options = {"train": {"objective": objective}, "model": {"vocab_size": vocab_size}}
    metrics.write_text(folder / "config.json", json.dumps(options))
    return str(folder)


def test_fit_reads_run_directories_and_refuses_what_does_not_belong_together(tmp_path):
    points = planted_points(0.0, repeats=True)[30:40]
    runs = [finished_run(tmp_path / f"run{i}", point) for i, point in enumerate(points)]
    assert [laws.read_points(Path(run))[0] for run in runs] == points
    other = finished_run(tmp_path / "other", points[0], objective="mdm")
    with pytest.raises(ValueError, match="different objectives or tokenizers"):
        laws.fit([*runs, other])
    with pytest.raises(ValueError, match="five constants need at least 6 runs"):
        laws.fit(runs[-5:])
    (tmp_path / "bad.jsonl").write_text('{"params": 1e6, "tokens": "many", "loss": 3}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl lacks params, tokens or loss"):
        laws.fit([str(tmp_path / "bad.jsonl")])
    (tmp_path / "nan.jsonl").write_text('{"params": 1e6, "tokens": 1e6, "loss": NaN}\n')
    with pytest.raises(ValueError, match="must be above 0"):
        laws.fit([str(tmp_path / "nan.jsonl")])


# ---- sweep -----------------------------------------------------------------------------------------------------------


def test_a_chinchilla_sweep_spends_the_same_on_every_size(tmp_path, capsys):
    laws.sweep("chinchilla", flops=[1e18, 1e19], out_dir=str(tmp_path / "s"))
    files = sorted((tmp_path / "s").glob("*.toml"))
    assert len(files) == 14
    for C in 1e18, 1e19:
        sizes = []
        for file in (tmp_path / "s").glob(f"c{C:.3g}_*.toml"):
            cfg = parse(file.read_text())
            sizes.append(SHAPES[file.stem.split("_")[1]].params)
            assert 6 * sizes[-1] * cfg.train.max_tokens == pytest.approx(C, rel=1e-6)
            assert training.make_plan(training.with_vocabulary(cfg, None), 1).steps > 100
        best = LAWS["epoch"].optimum(C)[0]
        assert min(sizes) < best / 3 and max(sizes) > 3 * best and len(set(sizes)) == 7


def test_a_data_value_sweep_sees_the_same_tokens_of_ever_fewer(tmp_path):
    laws.sweep("data_value", flops=[1e18], out_dir=str(tmp_path / "s"))
    cfgs = [parse(file.read_text()) for file in sorted((tmp_path / "s").glob("*.toml"))]
    assert [round(cfg.train.epochs or 0) for cfg in cfgs] == [1, 2, 4, 10, 20, 50, 100]
    seen = [(cfg.train.epochs or 0) * (cfg.data.unique_tokens or 0) for cfg in cfgs]
    assert max(seen) == pytest.approx(min(seen), rel=1e-5) and len({cfg.model for cfg in cfgs}) == 1


def test_a_learning_rate_sweep_changes_the_learning_rate_alone(tmp_path):
    laws.sweep("learning_rate", flops=[1e18], batch_tokens=655_360, out_dir=str(tmp_path / "s"))
    cfgs = [parse(file.read_text()) for file in sorted((tmp_path / "s").glob("*.toml"))]
    rates = sorted(cfg.optim.peak_lr for cfg in cfgs)
    assert rates[-1] / rates[0] == pytest.approx(16, rel=0.05)
    assert {cfg.train.batch_tokens for cfg in cfgs} == {655_360} and len({cfg.train.max_tokens for cfg in cfgs}) == 1
    with pytest.raises(ValueError, match="is not empty"):
        laws.sweep("learning_rate", flops=[1e18], out_dir=str(tmp_path / "s"))


def test_a_run_of_a_sweep_is_what_fit_reads(tmp_path):
    """Really: the first of its files, on the Python reference."""
    data_pipeline.sample(tmp_path / "data")
    folder = tmp_path / "s"
    laws.sweep("chinchilla", [1e10, 2e10], 3, "ar", 32, 257, 64, str(tmp_path / "data"), str(folder))
    first = min(folder.glob("*.toml"))
    options = ["--hellaswag=none", "--eval_tokens=512", "--sample_every=0", "--compile=false"]
    training.main(config.parse_config(training.Config, [str(first), *options]))
    (point,) = laws.read_points(folder / "runs" / first.stem)
    assert 0 <= (parse(first.read_text()).train.max_tokens or 0) - point.tokens < 64 and point.is_new
    assert 0 <= 1e10 - point.flops < 6 * point.params * 65, "whole steps; the data's vocabulary counts"


def test_the_script_of_a_sweep_calls_training_with_each_file_or_one(tmp_path):
    laws.sweep("chinchilla", [1e18], 3, out_dir=str(tmp_path / "s"))
    files = [f"training.py {file} --seed=1" for file in sorted((tmp_path / "s").glob("*.toml"))]
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\ncase $1 in -c) echo 0;; *) echo "$@" >> {tmp_path}/called;; esac\n')
    python.chmod(0o755)
    environment = {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}"}

    def call(folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
        command = [tmp_path / "s" / "run.sh", "--seed=1"]
        return subprocess.run(command, cwd=folder, env=environment | more, capture_output=True, text=True, check=False)

    assert call(ROOT, JOB="1").returncode == call(ROOT).returncode == 0
    *called, last = (tmp_path / "called").read_text().splitlines()
    assert called == [files[1], *files] and last.startswith("scaling_laws.py fit ")
    elsewhere = call(tmp_path)
    assert elsewhere.returncode == 2 and "call it in the folder of training.py" in elsewhere.stderr


# ---- cluster ---------------------------------------------------------------------------------------------------------

NETWORK = Network(inside=400e9, across=40e9)


def test_the_cost_of_a_step_in_cases_that_can_be_counted_by_hand():
    shape = laws.CLUSTER_SHAPES["416M"]
    N = 416_417_792
    assert shape.params == N
    state, sent, seconds = laws.step_cost("ddp", shape, 8, 8192, NETWORK)
    assert state == 18 * N and sent == pytest.approx(2 * 7 / 8 * 4 * N)
    assert seconds > sent / 400e9
    state, sent, _ = laws.step_cost("fsdp", shape, 8, 8192, NETWORK)
    assert sent == pytest.approx(7 / 8 * (2 + 2 + 4) * N)
    assert state - 16 * N / 8 == 2 * (2 * shape.block_params + 50257 * 1024)
    for strategy in ("ddp", "fsdp", "hsdp"):
        assert laws.step_cost(strategy, shape, 1, 8192, NETWORK)[1:] == (0, 0), "one process talks to nobody"


def test_sharding_goes_as_one_over_n_and_hsdp_within_the_node():
    shape = laws.CLUSTER_SHAPES["7B"]
    own = lambda strategy, n: laws.step_cost(strategy, shape, n, 8192, NETWORK)[0]
    gathered = 2 * (2 * shape.block_params + shape.table_params)
    assert (own("fsdp", 8) - gathered) / (own("fsdp", 1024) - gathered) == pytest.approx(128)
    assert own("hsdp", 8) == own("fsdp", 8) == own("hsdp", 1024)
    slow = [laws.step_cost(s, shape, 1024, 8192, NETWORK)[2] for s in ("hsdp", "fsdp")]
    assert slow[0] < slow[1], "1,024 hops per layer cost more than eight"


def test_cluster_prints_three_sizes_three_clusters_four_strategies(capsys):
    laws.cluster()
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if re.match(r"(416M|1.4B|7B) ", line)]
    assert len(rows) == 36
    assert {row[0] for row in rows if "*" in row[6]} == {"7B"}, "only 7B under DDP is too large for 80 GB"
    assert {row[3] for row in rows if "*" in row[6]} == {"ddp"}


@pytest.mark.parametrize("name", ["1.4B", "7B"])
def test_the_clusters_shapes_are_the_presets(name):
    preset = {"1.4B": "dclm_1b", "7B": "dclm_7b"}[name]
    assert laws.CLUSTER_SHAPES[name].params == PRESETS[preset][0]
