"""chat.py, driven as a person does: keys in a terminal, lines in a pipe."""

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pexpect
import pytest
import torch
from conftest import ROOT

import chat
from model import ModelConfig, Transformer
from nano416 import checkpoint, config
from nano416.generate import Sampling, apply_repetition_penalty, next_logits, sample
from nano416.tokenizer import load_tokenizer

COMMAND = [sys.executable, str(ROOT / "chat.py")]
SHAPE = ModelConfig(dim=32, n_layers=2, n_heads=2, vocab_size=257, seq_len=64)
READ_ONLY_HOME = "/proc"


def write_checkpoint(folder: Path, seed: int = 0, **changes: Any) -> str:
    """Write a checkpoint of random weights and the bytes tokenizer, as training would, and return its folder."""
    torch.manual_seed(seed)
    folder.mkdir()
    state = {
        "format": checkpoint.FORMAT,
        "step": 7,
        "tokens": 0,
        "config": {"model": config.to_dict(SHAPE)},
        "tokenizer": load_tokenizer("bytes").info(),
        "model": Transformer(SHAPE).state_dict(),
        "metrics": {},
    }
    checkpoint.write(checkpoint.checkpoint_path(folder, 7), {**state, **changes})
    return str(folder)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("chat")
    return write_checkpoint(folder / "a"), write_checkpoint(folder / "b", seed=1)


@pytest.fixture(scope="module")
def loaded(paths: tuple[str, str]) -> chat.LoadedModel:
    return chat.load(paths[0], options())


def options(*checkpoints: str, **changes: Any) -> chat.ChatConfig:
    return chat.ChatConfig(list(checkpoints) or ["none"], **{"device": "cpu", "max_tokens": 20, **changes})


def session_of(*checkpoints: str, **changes: Any) -> chat.Session:
    return chat.Session(options(*checkpoints, **changes))


def run_chat(*arguments: str) -> None:
    """chat.py with these arguments, in this process."""
    chat.main(config.parse_config(chat.ChatConfig, arguments))


def error_of(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that chat.py ends with, exit code 2."""
    with pytest.raises(SystemExit) as exit:
        config.run_cli(lambda: run_chat(*arguments))
    error = capsys.readouterr().err
    assert (exit.value.code, error.count("\n")) == (2, 1)
    return error


# ---- The command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--temperature=-1"], "temperature must be 0 or from 1e-06 to 1e+06, got -1.0"),
        (["x", "--max_tokens=0"], "max_tokens must be at least 1, got 0"),
        (["x", "--top_k=0"], "top_k must be at least 1, got 0"),
        (["x", "--top_p=1.5"], "top_p must be from 0 to 1, got 1.5"),
        (["x", "--min_p=2"], "min_p must be from 0 to 1, got 2"),
        (["x", "--repetition_penalty=0"], "repetition_penalty must be from 1e-06 to 1e+06, got 0"),
        (["x", "--seed=-2"], "seed must be from 0 to 2**63 - 1, got -2"),
        (["x", "--dtype=fp8"], "dtype expects {fp32,bf16,int8} or none, got 'fp8'"),
        (["x", "--temprature=1"], "unknown option --temprature; did you mean --temperature?"),
        (["x", "--compile"], "compile = true is for a GPU, the device is cpu"),
        (["x", "--device=tpu9"], "device 'tpu9' cannot be used here"),
        (["x", "--device=meta"], "device 'meta' cannot be used here"),
        (["x", "--device=hpu"], "device 'hpu' cannot be used here"),
        (["x", "--guidance=1e300"], "guidance must be from -1000 to 1000, got 1e+300"),
        (["x", "--device=cuda:77"], "device 'cuda:77' cannot be used here"),
        (["x", "--prompt=a", "--prompt_file=b"], "--prompt and --prompt_file exclude each other"),
        (["x", "--prompt_file=none.txt"], "cannot open none.txt: No such file or directory"),
        (["x", "y", "z"], "expected one or two checkpoints, got 3"),
        (["none/such"], "no checkpoint at none/such"),
        ([], "the following arguments are required: checkpoints"),
    ],
)
def test_a_bad_command_line_is_one_line_of_error(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error_of(*arguments, capsys=capsys)


def test_a_bad_prompt_or_checkpoint_is_one_line_of_error(
    paths: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    latin = f"--prompt_file={tmp_path / 'latin.txt'}"
    assert "latin.txt is not UTF-8 text" in error_of(paths[0], latin, capsys=capsys)
    assert "the prompt is empty" in error_of(paths[0], "--prompt=", capsys=capsys)
    other_shape = write_checkpoint(tmp_path / "c", config={"model": {**config.to_dict(SHAPE), "vocab_size": 255}})
    assert "does not fit the model" in error_of(other_shape, capsys=capsys)


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        config.parse_config(chat.ChatConfig, ["--help"], chat.__doc__)
    assert exit.value.code == 0
    assert "  --repetition_penalty above 1:" in capsys.readouterr().out


def test_one_completion_as_json(
    paths: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompt.txt").write_text("The sky\n")
    flags = ["--seed=3", "--max_tokens=20", "--json"]
    run_chat(paths[0], f"--prompt_file={tmp_path / 'prompt.txt'}", *flags)
    monkeypatch.setattr(sys, "stdin", io.StringIO("The sky\n/retry\n/quit\nnot read\n"))
    run_chat(paths[0], *flags)
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [o["seed"] for o in objects] == [3, 3, 4]
    assert objects[0]["options"]["max_tokens"] == 20
    assert objects[0].pop("tokens_per_s") > 0
    assert objects[0].items() <= objects[1].items()

    session = session_of(paths[0], seed=3)
    session.ask("The sky")
    assert session.last and asdict(session.last).items() <= objects[0].items()


def test_two_checkpoints_complete_one_prompt_as_two_objects_or_in_two_columns(
    paths: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--seed=3", "--max_tokens=20", "--prompt=The sky"]
    run_chat(*paths, *flags, "--json")
    one, other = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert one["text"] != other["text"]
    run_chat(*paths, *flags)
    assert re.search(r"^The sky.* \| The sky", capsys.readouterr().out, re.MULTILINE)


# ---- Completions -----------------------------------------------------------------------------------------------------


def replay(monkeypatch: pytest.MonkeyPatch, tokens: list[int]) -> list[list[int]]:
    """Make the model say `tokens`; returns the list of prompts that it will be given."""
    prompts = []

    def generate(model: Transformer, prompt: list[int], *_: Any) -> Any:
        prompts.append(prompt)
        return iter(tokens)

    monkeypatch.setattr(chat, "generate", generate)
    return prompts


def test_characters_appear_whole_and_an_incomplete_one_once(
    loaded: chat.LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    replay(monkeypatch, [*"é€😀".encode(), 0xE2, 0x82])
    completion = chat.respond(loaded, "x", options(), 0, shown.append)
    assert [text for text in shown if text] == ["é", "€", "😀", "�"]
    assert completion.text == "é€😀�"


def test_the_end_of_text_token_ends_a_completion_and_its_name_in_a_prompt_is_text(
    loaded: chat.LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = replay(monkeypatch, [104, 105, loaded.tokenizer.eot_id, 33])
    completion = chat.respond(loaded, "<|endoftext|>", options(), 0, chat.ignore)
    assert (completion.text, completion.finish) == ("hi", "stop")
    assert prompts == [list(b"<|endoftext|>")]


def test_control_characters_are_shown_and_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    chat.stream_text("a\n\tb\x1b[2J\r\x07\x7f\x9b\u202e\u2066\u200fé€😀\U000e0041\udc80")
    shown = capsys.readouterr().out
    assert shown == "a\n\tb\\x1b[2J\\x0d\\x07\\x7f\\x9b\\u202e\\u2066\\u200fé€😀\\U000e0041\\udc80"


def test_a_prompt_beyond_the_context_is_cut_from_the_left_with_a_note(
    loaded: chat.LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "".join(chr(33 + i % 90) for i in range(100))
    assert chat.encode(loaded, text) == list(text[-64:].encode())
    assert "(prompt of 100 tokens, context of 64: the first 36 are cut off)" in capsys.readouterr().err
    long, short = (chat.respond(loaded, t, options(), 5, chat.ignore) for t in (text, text[-64:]))
    assert long.tokens == short.tokens
    assert len(long.tokens) > 0


def test_an_int8_model_completes_text_too(paths: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    session = session_of(paths[0], seed=3, dtype="int8")
    session.ask("The sky The sky")
    assert session.last and len(session.last.tokens) > 0
    assert "int8 on cpu" in str(session.models[0])


def test_a_repetition_penalty_ends_loops_and_keeps_completions_reproducible(loaded: chat.LoadedModel) -> None:
    greedy = options(max_tokens=30, temperature=0)
    penalized = options(max_tokens=30, temperature=0, repetition_penalty=5.0)
    plain, first, second = (
        chat.respond(loaded, "The sky", cfg, 1, chat.ignore).tokens for cfg in (greedy, penalized, penalized)
    )
    assert len(set(first)) > len(set(plain))
    assert first == second
    mixed = options(max_tokens=30, min_p=0.3, repetition_penalty=1.1, top_p=0.9)
    assert len({chat.respond(loaded, "The sky", mixed, 6, chat.ignore).text for _ in range(3)}) == 1


def test_penalty_and_min_p_equal_those_of_transformers() -> None:
    logits = pytest.importorskip("transformers.generation.logits_process")
    torch.manual_seed(0)
    scores = 3 * torch.randn(2, 50)
    tokens = torch.tensor([[1, 2, 3, 2], [4, 4, 5, 6]])
    expected = logits.RepetitionPenaltyLogitsProcessor(1.3)(tokens, scores.clone())
    assert torch.equal(apply_repetition_penalty(scores, tokens, 1.3), expected)

    kept = logits.MinPLogitsWarper(0.1)(tokens, scores.clone()).isfinite()
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(temperature=1.0, min_p=0.1)
    drawn = torch.stack([sample(scores, sampling, generator) for _ in range(500)])  # [500, 2]
    for row in range(2):
        assert set(drawn[:, row].tolist()) == set(kept[row].nonzero().flatten().tolist())


def test_log_probabilities_equal_those_of_one_token_after_another(loaded: chat.LoadedModel) -> None:
    prompt = list(b"The sky")
    tokens = list(b" is blue and wide")
    one_by_one = [
        next_logits(loaded.model, prompt + tokens[:i])[0].log_softmax(-1)[token].item()
        for i, token in enumerate(tokens)
    ]
    assert chat.token_logprobs(loaded, prompt, tokens) == pytest.approx(one_by_one, abs=1e-5)
    assert len(chat.token_logprobs(loaded, prompt, tokens * 10)) == SHAPE.seq_len


def test_a_masked_diffusion_shows_its_tokens_from_left_to_right(loaded: chat.LoadedModel) -> None:
    """Each as soon as all tokens before it are decided."""
    mask = loaded.tokenizer.vocab_size
    states = [[mask, 2, mask, mask], [1, 2, mask, 4], [1, 2, 3, 4]]
    n_states = 0

    def count() -> Any:
        nonlocal n_states
        for state in states:
            n_states += 1
            yield state

    shown = [(token, n_states) for token in chat.decided_tokens(loaded, count())]
    assert shown == [(1, 2), (2, 2), (3, 3), (4, 3)]


# ---- Commands --------------------------------------------------------------------------------------------------------


def test_bench_and_compare_measure_both_checkpoints_and_bad_commands_are_errors(
    paths: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "/bench\n/compare The sky\n/nonsense\n/set top_q 3\n/set top_k 0\n/retry\n/probs\n/probs The sky\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    run_chat(*paths, "--max_tokens=12")
    out, error = capsys.readouterr()
    assert len(re.findall(r"^ *(?:1|2|3|median)(?: +\d+\.\d){3}$", out, re.MULTILINE)) == 2 * 4
    assert len(re.findall(r"tokens/s, \d+\.\d\dx, same greedy tokens", out)) == 2 * 2
    assert len(re.findall(r"GB/s: at most [\d.]+ tokens/s, \d+% reached", out)) == 2 * 2
    assert re.search(r"^The sky.* \| The sky", out, re.MULTILINE)
    assert [line.split(";")[0] for line in error.splitlines()] == [
        "error: unknown command /nonsense",
        "error: unknown option top_q",
        "error: top_k must be at least 1, got 0",
        "error: there is no completion yet",
        "error: there is no completion yet",
        "error: /probs takes no argument, got 'The sky'",
    ]


def test_set_changes_an_option_and_reloads_the_model_for_another_dtype(
    paths: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    session = session_of(paths[0])
    for line in ("/set temperature 0.3", "/set top-k=none", "/set dtype bf16"):
        chat.run_command(session, line)
    assert (session.cfg.temperature, session.cfg.top_k, session.cfg.max_tokens) == (0.3, None, 20)
    assert session.models[0].model.embed_tokens.weight.dtype == torch.bfloat16
    session.ask("The sky")
    chat.run_command(session, "/set dtype none")
    weights = session.models[0].model.state_dict()
    expected = chat.load(paths[0], session.cfg).model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in expected.items())
    capsys.readouterr()
    chat.run_command(session, "/set")
    shown = capsys.readouterr().out
    assert "temperature 0.3\ntop_k none\n" in shown
    assert "prompt" not in shown


def test_odd_settings_are_one_line_each_and_the_session_lives(
    paths: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("temperature", "repetition_penalty", "top_k", "top_p", "min_p", "seed", "guidance", "steps")
    values = ("1e-320", "1e300", "1e-300", "nan", "-1", "inf", "1e30", "[1]")
    lines = [f"/set {name} {value}\nThe sky\n" for name in names for value in values]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join([*lines, "/set seed none\n/set\n"])))
    run_chat(paths[0], "--max_tokens=2")
    out, error = capsys.readouterr()
    assert "temperature 0.8\n" in out
    assert all(line.startswith("error: ") for line in error.splitlines())
    assert error.count("\n") > 50


def write_biased_checkpoint(folder: Path, token: int, weight: float) -> str:
    """A model whose every token is `token`: all blocks add nothing and the head prefers it by `weight`."""
    shape = replace(SHAPE, tie_embeddings=False)
    model = Transformer(shape)
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    state["embed_tokens.weight"][:] = 1.0
    state["norm.weight"][:] = 1.0
    state["lm_head.weight"][token] = weight
    return write_checkpoint(folder, config={"model": config.to_dict(shape)}, model=state)


def test_weights_that_are_not_finite_are_one_line_and_the_session_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = write_biased_checkpoint(tmp_path / "nan", 5, float("nan"))
    monkeypatch.setattr(
        sys, "stdin", io.StringIO("The sky\n/set temperature 0\nThe sky\n/bench\n/compare\n/set top_k\n")
    )
    run_chat(broken)
    out, error = capsys.readouterr()
    message = "error: the model's logits are not finite: its weights are broken; take another checkpoint"
    assert error.splitlines() == [message] * 4
    assert out.endswith("top_k 50\n")
    assert "logits are not finite" in error_of(broken, "--prompt=The sky", capsys=capsys)


def test_escape_sequences_that_a_model_writes_do_not_reach_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    escape = write_biased_checkpoint(tmp_path / "esc\x1b[2J", 0x1B, 10.0)
    lines = "The sky\n/probs\n/compare\n/bench\n/set top_k 3\n/nonsense\x1b\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    run_chat(escape, escape, "--max_tokens=3")
    run_chat(escape, escape, "--max_tokens=3", "--prompt=\x1b[2J")
    run_chat(escape, "--max_tokens=3", "--prompt=The sky", "--json")
    out, error = capsys.readouterr()
    assert "\\x1b\\x1b\\x1b\n" in out
    assert "\x1b" not in out + error


def test_newlines_and_tabs_that_a_model_writes_are_kept(
    paths: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replay(monkeypatch, list(b"a\n\tb\r\x1b[2J"))
    session_of(paths[0]).ask("x")
    assert capsys.readouterr().out == "a\n\tb\\x0d\\x1b[2J\n"


def test_probs_lists_the_probability_of_each_token(paths: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    session = session_of(paths[0], seed=1)
    session.ask("The sky")
    capsys.readouterr()
    chat.run_command(session, "/probs")
    rows = capsys.readouterr().out.splitlines()
    assert session.last and len(rows) == len(session.last.tokens)
    assert all(re.match(r"[01]\.\d{4} ['\"]", row) for row in rows)


def test_help_names_every_command(paths: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    chat.run_command(session_of(paths[0]), "/help")
    shown = capsys.readouterr().out
    assert all(f"\n{name} " in "\n" + shown for name in chat.COMMANDS)


def test_columns_keep_every_word_of_every_text_in_the_given_width() -> None:
    texts = ["one two three four five\n\nsix", "a b c d e f g h"]
    shown = chat.columns(texts, 23)
    assert max(map(len, shown.split("\n"))) <= 23
    rows = [re.split(r" \|(?: |$)", row) for row in shown.split("\n")]
    for i, text in enumerate(texts):
        assert " ".join(row[i].strip() for row in rows if len(row) > i).split() == text.split()


# ---- Pipe and terminal -----------------------------------------------------------------------------------------------


def environment(state_home: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "XDG_STATE_HOME": state_home, "TERM": "dumb"}


def test_a_pipe_gets_the_completions_and_nothing_else_until_it_is_closed(
    paths: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (3, 3, 4):
        session_of(paths[0], seed=seed).ask("The sky")
    expected = capsys.readouterr().out.encode()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [*COMMAND, paths[0], "--seed=3", "--max_tokens=20"]
    child: Any = subprocess.Popen(command, **streams, env=environment(READ_ONLY_HOME))
    child.stdin.write(b"The sky\n\n  \nThe sky\n/set seed 4\nThe sky\n")
    child.stdin.flush()
    assert child.stdout.read(len(expected)) == expected
    child.stdout.close()
    assert (child.communicate(b"The sea\n", timeout=60)[1], child.returncode) == (b"", 141)


def test_a_terminal_has_line_editing_history_and_interrupts(paths: tuple[str, str], tmp_path: Path) -> None:
    """Typing, history, Ctrl-C in a completion and at the prompt, Ctrl-D."""
    history = tmp_path / "nano416/chat_history"
    history.parent.mkdir()
    history.write_text("/set max_tokens 10\n")  # of an earlier session
    arguments = [COMMAND[1], paths[0], "--temperature=0"]  # greedy, this model never ends its text
    child = pexpect.spawn(COMMAND[0], arguments, env=environment(str(tmp_path)), encoding="utf-8", timeout=60)
    child.expect("it continues your text")
    child.expect("\n> ")
    up = "\x1b[A"
    backspace = "\x7f"
    for keys, shown in (
        (f"{up}\r", "/set max_tokens 10"),
        (f"The skyx{backspace}\r", r"\(\d+ tokens, [\d.]+/s, (max_tokens reached|end of text)\)"),
        ("/probs\r", r"0\.\d{4} '"),
        ("/set max_tokens 1000000\r", "1000000"),
    ):
        child.send(keys)
        child.expect(f"(?s){shown}")
        child.expect("\n> ")
    child.send('"""The sea\r')
    child.expect(r"\n\.\.\. ")
    child.send('and the sky"""\r')
    child.expect(r"(?s)and the sky\"{3}\r\n.{40}")
    child.sendintr()
    child.expect(r"interrupted\)")
    child.expect("\n> ")
    child.send("/probs\r")  # of what was generated before Ctrl-C
    child.expect(r"0\.\d{4} '")
    child.expect("\n> ")
    child.sendintr()
    child.expect(r"Ctrl-D or /quit exits")
    child.expect("\n> ")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert (child.exitstatus, child.signalstatus) == (0, None)
    assert history.read_text().splitlines()[:2] == ["/set max_tokens 10", "The sky"]


def test_a_history_that_cannot_be_written_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", READ_ONLY_HOME)
    monkeypatch.setattr("builtins.input", lambda prompt: "The sky")
    assert chat.terminal_reader()("> ") == "The sky"


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (["one\\", "two\\", "three"], "one\ntwo\nthree"),
        (['"""one', "", "/two", 'three"""'], "one\n\n/two\nthree"),
        (['"""', "one", '"""'], "\none\n"),
        (['"""one"""'], "one"),
        (['"""one', "two"], "one\ntwo"),  # the input ends
        (["one\\"], "one\n"),
        (["  one two  "], "  one two  "),
    ],
)
def test_a_prompt_may_have_several_lines(lines: list[str], text: str) -> None:
    rest = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    assert chat.read_rest(read(""), read) == text


@pytest.mark.parametrize(
    "text", ["x" * 101, '"""' + "\n" * 200 + '"""', "x\\\n" * 200, '"""' + "x" * 90 + "\n" + "x" * 90 + '"""']
)
def test_a_line_or_prompt_without_end_is_one_error_and_the_next_line_is_the_next_prompt(
    text: str, paths: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chat, "MAX_PROMPT", 100)
    prompts = replay(monkeypatch, [33])
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{text}\nThe sky\n{'y' * 100}\n"))
    run_chat(paths[0])
    assert re.fullmatch(
        r"error: .* has more than 100 characters; .*\n\(prompt of 100 tokens.*\n", capsys.readouterr().err
    )
    assert prompts == [list(b"The sky"), list(b"y" * 64)]


@pytest.mark.parametrize("source", ["/dev/zero", "-"])
def test_a_prompt_file_without_end_is_one_error(
    source: str, paths: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chat, "MAX_PROMPT", 100)
    monkeypatch.setattr(sys, "stdin", io.StringIO("x" * 101))
    assert "has more than 100 characters" in error_of(paths[0], f"--prompt_file={source}", capsys=capsys)
