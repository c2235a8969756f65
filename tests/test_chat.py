"""chat.py, driven as a person does: keys in a terminal, lines in a pipe."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pexpect
import pytest
import torch

import chat
import checkpoint
import config
from data_pipeline import load_tokenizer
from model import ModelConfig, Transformer

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, str(ROOT / "chat.py")]
SHAPE = ModelConfig(dim=32, n_layers=2, n_heads=2, vocab_size=257, seq_len=64)
HOME_IS_READ_ONLY = "/proc"


def write_checkpoint(folder: Path, seed: int = 0, **changes: Any) -> str:
    """A checkpoint of random weights and the bytes tokenizer, as training would leave it."""
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
    checkpoint.write(checkpoint.path_of(folder, 7), {**state, **changes})
    return str(folder)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("chat")
    return write_checkpoint(folder / "a"), write_checkpoint(folder / "b", seed=1)


@pytest.fixture(scope="module")
def model_state(paths: tuple[str, str]) -> chat.Voice:
    return chat.load(paths[0], chat.Options(device="cpu"))


def environment(state_home: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "XDG_STATE_HOME": state_home, "TERM": "dumb"}


def pipe(lines: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], input=lines, capture_output=True, text=True, env=environment(HOME_IS_READ_ONLY)
    )


def session_of(*paths: str, **options: Any) -> chat.Session:
    return chat.Session(list(paths), chat.Options(**{"device": "cpu", "max_tokens": 20, **options}))


def test_a_pipe_gets_answers_and_nothing_else(paths: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    done = pipe(
        "The sky\n\n  \nThe sky\n/set seed 4\nThe sky\n/quit\nnot read\n", paths[0], "--seed=3", "--max_tokens=20"
    )
    assert (done.returncode, done.stderr) == (0, "")
    for seed in (3, 3, 4):
        session_of(paths[0], seed=seed).ask("The sky")
    assert done.stdout == capsys.readouterr().out


def test_bench_and_compare_of_two_checkpoints(paths: tuple[str, str]) -> None:
    done = pipe("/bench\n/compare The sky\n/nonsense\n/set top_q 3\n/set top_k 0\n", *paths, "--max_tokens=12")
    assert done.returncode == 0
    assert len(re.findall(r"^ *(?:1|2|3|median)(?: +\d+\.\d){3}$", done.stdout, re.MULTILINE)) == 2 * 4
    assert len(re.findall(r"the same greedy tokens, \d+\.\d\dx", done.stdout)) == 2
    assert re.search(r"^The sky.* \| The sky", done.stdout, re.MULTILINE)
    assert [line.split(";")[0] for line in done.stderr.splitlines()] == [
        "error: unknown command /nonsense",
        "error: unknown key top_q",
        "error: top_k must be at least 1, or none, got 0",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature=-1", "x"], "temperature must be at least 0, got -1.0"),
        (["--max_tokens=0", "x"], "max_tokens must be at least 1, got 0"),
        (["--top_p=1.5", "x"], "top_p must be above 0 and at most 1, or none, got 1.5"),
        (["--seed=-2", "x"], "seed must be from 0 to 2**63 - 1, or none, got -2"),
        (["--dtype=fp8", "x"], "dtype expects"),
        (["--temprature=1", "x"], "unknown option --temprature; did you mean --temperature?"),
        ([], "the following arguments are required: CHECKPOINT"),
    ],
)
def test_bad_options_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        chat.parse(arguments)
    error = capsys.readouterr().err
    assert (exit.value.code, error.count("\n")) == (2, 1) and message in error


def test_bad_checkpoints_and_devices_are_errors_that_name_them(paths: tuple[str, str], tmp_path: Path) -> None:
    done = pipe("", str(tmp_path / "none"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "no checkpoint at" in done.stderr
    for device in ("tpu9", "cuda:77"):
        with pytest.raises(ValueError, match=f"device '{device}' is not usable"):
            session_of(paths[0], device=device)
    smaller = {"model": {**config.to_dict(SHAPE), "vocab_size": 256 + 1 - 2}}
    both_sides = {"model": {**config.to_dict(SHAPE), "causal": False}}
    with pytest.raises(ValueError, match="does not fit the model"):
        session_of(write_checkpoint(tmp_path / "smaller", config=smaller))
    with pytest.raises(ValueError, match="sees the text on both sides"):
        session_of(write_checkpoint(tmp_path / "both", config=both_sides))


def test_a_terminal(paths: tuple[str, str], tmp_path: Path) -> None:
    """Typing, line editing, Ctrl-C in an answer and at the prompt, a change of options, Ctrl-D."""
    chat_ = pexpect.spawn(
        COMMAND[0], [COMMAND[1], paths[0]], env=environment(str(tmp_path)), encoding="utf-8", timeout=60
    )
    chat_.expect("it continues your text")
    chat_.expect("\n> ")
    chat_.send("/set max_tokens 10x\x7f\r")  # backspace takes the x
    chat_.expect("\n> ")
    chat_.send("The sky\r")
    chat_.expect(r"\(\d+ tokens, [\d.]+/s, (max_tokens reached|the model ended its text)\)")
    chat_.expect("\n> ")
    chat_.send("/set max_tokens 1000000\r")
    chat_.expect("\n> ")
    chat_.send("\x1b[A\x1b[A\r")  # two lines up
    chat_.expect("The sky")
    chat_.expect(r"(?s).{40}")
    chat_.sendintr()
    chat_.expect(r"stopped\)")
    chat_.expect("\n> ")
    chat_.sendintr()
    chat_.expect(r"Ctrl-D or /quit leaves")
    chat_.expect("\n> ")
    chat_.sendeof()
    chat_.expect(pexpect.EOF)
    chat_.close()
    assert (chat_.exitstatus, chat_.signalstatus) == (0, None)
    history = (tmp_path / "nano416/chat_history").read_text().splitlines()
    assert [line for line in history if line == "The sky"] == ["The sky"] * 2


def test_history_outlives_the_session_and_a_home_that_cannot_be_written_is_no_error(
    paths: tuple[str, str], tmp_path: Path
) -> None:
    (tmp_path / "nano416").mkdir()
    (tmp_path / "nano416/chat_history").write_text("/set top_k 5\n")
    for home, shown in ((str(tmp_path), "top_k 5"), (HOME_IS_READ_ONLY, "top_k 50")):
        chat_ = pexpect.spawn(COMMAND[0], [COMMAND[1], paths[0]], env=environment(home), encoding="utf-8", timeout=60)
        chat_.expect("\n> ")
        chat_.send("\x1b[A\r")
        chat_.expect("\n> ")
        chat_.send("/set\r")
        chat_.expect(rf"{shown}\r\n")
        chat_.expect("\n> ")
        chat_.send("/quit\r")
        chat_.expect(pexpect.EOF)
        chat_.close()
        assert chat_.exitstatus == 0


def test_nobody_reads_the_output(paths: tuple[str, str]) -> None:
    command = f"printf 'a\\nb\\nc\\n' | {COMMAND[0]} {COMMAND[1]} {paths[0]} --max_tokens=5000 | head -c 10 > /dev/null"
    done = subprocess.run(["bash", "-c", command], capture_output=True, env=environment(HOME_IS_READ_ONLY))
    assert done.stderr == b""


def scripted(monkeypatch: pytest.MonkeyPatch, tokens: list[int]) -> list[list[int]]:
    """The model says `tokens`; returns the prompts that it is given."""
    prompts = []

    def generate(model: Transformer, prompt: list[int], *_: Any, stop_token: int, **__: Any) -> Any:
        prompts.append(prompt)
        return iter(tokens[: tokens.index(stop_token)] if stop_token in tokens else tokens)

    monkeypatch.setattr(chat, "generate", generate)
    return prompts


def test_characters_appear_whole_and_a_broken_one_once(
    model_state: chat.Voice, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    scripted(monkeypatch, [*"é€😀".encode(), 0xE2, 0x82])
    turn = chat.answer(model_state, "x", chat.Options(), 0, shown.append)
    assert [text for text in shown if text] == ["é", "€", "😀", "�"] and turn.text == "é€😀�"


def test_control_characters_are_shown_not_obeyed() -> None:
    text = "a\n\tb\x1b[2J\r\x07\x7f\x9b\u202e\u2066\u200fé€😀\U000e0041\udc80"
    shown = chat.visible(text)
    assert shown == "a\n\tb\\x1b[2J\\x0d\\x07\\x7f\\x9b\\u202e\\u2066\\u200fé€😀\\U000e0041\\udc80"
    assert chat.visible(shown) == shown


def test_the_end_of_text_token_ends_and_its_name_in_a_prompt_is_text(
    model_state: chat.Voice, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = scripted(monkeypatch, [104, 105, model_state.tokenizer.eot_id, 33])
    turn = chat.answer(model_state, "<|endoftext|>", chat.Options(), 0, lambda text: None)
    assert (turn.text, turn.finish) == ("hi", "stop")
    assert prompts == [list(b"<|endoftext|>")]


def test_a_prompt_beyond_the_context_is_cut_from_the_left_with_a_note(
    model_state: chat.Voice, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "".join(chr(33 + i % 90) for i in range(100))
    assert chat.encode(model_state, text) == list(text[-64:].encode())
    assert "the prompt has 100 tokens, the context 64: the first 36 are cut off" in capsys.readouterr().err
    options = chat.Options(max_tokens=20)
    long, short = (chat.answer(model_state, t, options, 5, lambda text: None) for t in (text, text[-64:]))
    assert long.tokens == short.tokens and len(long.tokens) > 0


def test_cache_or_not_the_greedy_tokens_are_the_same(model_state: chat.Voice) -> None:
    prompt = list(b"The meaning of life is")
    cached, uncached = (chat.timed(model_state, prompt, 100, use_cache)[0] for use_cache in (True, False))
    assert cached == uncached and len(cached) == 100


def test_set_changes_what_it_names_and_reloads_for_another_precision(
    paths: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    session = session_of(paths[0])
    for line in ("/set temperature 0.3", "/set top-k=none", "/set dtype bf16"):
        chat.run_command(session, line)
    assert (session.options.temperature, session.options.top_k, session.options.max_tokens) == (0.3, None, 20)
    assert session.voices[0].model.embed_tokens.weight.dtype == torch.bfloat16
    session.ask("The sky")
    chat.run_command(session, "/set dtype none")
    weights = session.voices[0].model.state_dict()
    assert all(
        torch.equal(tensor, weights[name])
        for name, tensor in chat.load(paths[0], session.options).model.state_dict().items()
    )
    capsys.readouterr()
    chat.run_command(session, "/set")
    assert "temperature 0.3\ntop_k none\n" in capsys.readouterr().out


def test_help_names_every_command(paths: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    chat.run_command(session_of(paths[0]), "/help")
    shown = capsys.readouterr().out
    assert all(f"\n{name}" in "\n" + shown for name in chat.COMMANDS)


def test_columns_keep_every_word_of_every_text() -> None:
    texts = ["one two three four five\n\nsix", "a b c d e f g h"]
    rows = [re.split(r" \|(?: |$)", row) for row in chat.columns(texts, 23).split("\n")]
    assert max(map(len, chat.columns(texts, 23).split("\n"))) <= 23
    for i, text in enumerate(texts):
        assert " ".join(row[i].strip() for row in rows if len(row) > i).split() == text.split()
