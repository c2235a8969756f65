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

import chat
import checkpoint
import config
from model import ModelConfig, Transformer, next_logits, penalize, sample
from shards import load_tokenizer
from terminal import cells, wrap

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
def voice(paths: tuple[str, str]) -> chat.Voice:
    return chat.load(paths[0], chat.Options(device="cpu"))


def environment(state_home: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "XDG_STATE_HOME": state_home, "TERM": "dumb"}


def session_of(*paths: str, **options: Any) -> chat.Session:
    return chat.Session(list(paths), chat.Options(**{"device": "cpu", "max_tokens": 20, **options}))


def test_a_pipe_gets_answers_and_nothing_else_until_nobody_reads(
    paths: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (3, 3, 4):
        session_of(paths[0], seed=seed).ask("The sky")
    expected, streams = capsys.readouterr().out.encode(), dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [*COMMAND, paths[0], "--seed=3", "--max_tokens=20"]
    child: Any = subprocess.Popen(command, **streams, env=environment(HOME_IS_READ_ONLY))
    child.stdin.write(b"The sky\n\n  \nThe sky\n/set seed 4\nThe sky\n")
    child.stdin.flush()
    assert child.stdout.read(len(expected)) == expected
    child.stdout.close()
    assert (child.communicate(b"The sea\n", timeout=60)[1], child.returncode) == (b"", 141)


def test_bench_and_compare_of_two_checkpoints(
    paths: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "/bench\n/compare The sky\n/nonsense\n/set top_q 3\n/set top_k 0\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    chat.main(chat.parse([*paths, "--max_tokens=12"]))
    out, error = capsys.readouterr()
    assert len(re.findall(r"^ *(?:1|2|3|median)(?: +\d+\.\d){3}$", out, re.MULTILINE)) == 2 * 4
    assert len(re.findall(r"tokens/s, \d+\.\d\dx, the same greedy tokens", out)) == 2 * 3
    assert len(re.findall(r"GB/s: at most [\d.]+ tokens/s, \d+% reached", out)) == 2 * 2
    assert re.search(r"^The sky.* \| The sky", out, re.MULTILINE)
    assert [line.split(";")[0] for line in error.splitlines()] == [
        "error: unknown command /nonsense",
        "error: unknown option top_q",
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
        (["--lookup=-1", "x"], "lookup must be at least 0, got -1"),
        (["--min_p=2", "x"], "min_p must be from 0 to 1, or none, got 2"),
        (["--repetition_penalty=0", "x"], "repetition_penalty must be above 0, or none, got 0"),
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
    with pytest.raises(ValueError, match="no checkpoint at"):
        session_of(str(tmp_path / "none"))
    for device in ("tpu9", "cuda:77"):
        with pytest.raises(ValueError, match=f"device '{device}' is not usable"):
            session_of(paths[0], device=device)
    smaller = {"model": {**config.to_dict(SHAPE), "vocab_size": 256 + 1 - 2}}
    with pytest.raises(ValueError, match="does not fit the model"):
        session_of(write_checkpoint(tmp_path / "smaller", config=smaller))


def terminal(state_home: str, *arguments: str) -> "pexpect.spawn[str]":
    child = pexpect.spawn(
        COMMAND[0], [COMMAND[1], *arguments], env=environment(state_home), encoding="utf-8", timeout=60
    )
    child.expect("it continues your text")
    child.expect("\n> ")
    return child


def end(child: "pexpect.spawn[str]") -> tuple[int | None, int | None]:
    child.expect(pexpect.EOF)
    child.close()
    return child.exitstatus, child.signalstatus


def test_a_terminal(paths: tuple[str, str], tmp_path: Path) -> None:
    """Typing, line editing, history, Ctrl-C in an answer and at the prompt, Ctrl-D."""
    history = tmp_path / "nano416/chat_history"
    history.parent.mkdir()
    history.write_text("/set max_tokens 10\n")  # an earlier session's
    child = terminal(str(tmp_path), paths[0], "--temperature=0")  # greedy, this model never ends its text
    for keys, shown in (
        ("\x1b[A\r", "/set max_tokens 10"),  # one line up
        ("The skyx\x7f\r", r"\(\d+ tokens, [\d.]+/s, (max_tokens reached|the model ended its text)\)"),  # backspace
        ("/probs\r", "\x1b\\[30;48;5;"),
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
    child.expect(r"stopped\)")
    child.expect("\n> ")
    child.send("/probs\r")  # what there is of it
    child.expect("probability at least")
    child.expect("\n> ")
    child.sendintr()
    child.expect(r"Ctrl-D or /quit leaves")
    child.expect("\n> ")
    child.sendeof()
    assert end(child) == (0, None)
    assert history.read_text().splitlines()[:2] == ["/set max_tokens 10", "The sky"]


def test_a_home_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", HOME_IS_READ_ONLY)
    monkeypatch.setattr("builtins.input", lambda prompt: "The sky")
    assert chat.terminal_reader()("> ") == "The sky"


def scripted(monkeypatch: pytest.MonkeyPatch, tokens: list[int]) -> list[list[int]]:
    """The model says `tokens`; returns the prompts that it is given."""
    prompts = []

    def generate(model: Transformer, prompt: list[int], *_: Any, stop_token: int, **__: Any) -> Any:
        prompts.append(prompt)
        return iter(tokens[: tokens.index(stop_token)] if stop_token in tokens else tokens)

    monkeypatch.setattr(chat, "generate", generate)
    return prompts


def test_characters_appear_whole_and_a_broken_one_once(voice: chat.Voice, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    scripted(monkeypatch, [*"é€😀".encode(), 0xE2, 0x82])
    turn = chat.answer(voice, "x", chat.Options(), 0, shown.append)
    assert [text for text in shown if text] == ["é", "€", "😀", "�"] and turn.text == "é€😀�"


def test_control_characters_are_shown_not_obeyed() -> None:
    text = "a\n\tb\x1b[2J\r\x07\x7f\x9b\u202e\u2066\u200fé€😀\U000e0041\udc80"
    shown = chat.visible(text)
    assert shown == "a\n\tb\\x1b[2J\\x0d\\x07\\x7f\\x9b\\u202e\\u2066\\u200fé€😀\\U000e0041\\udc80"
    assert chat.visible(shown) == shown


def test_the_end_of_text_token_ends_and_its_name_in_a_prompt_is_text(
    voice: chat.Voice, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = scripted(monkeypatch, [104, 105, voice.tokenizer.eot_id, 33])
    turn = chat.answer(voice, "<|endoftext|>", chat.Options(), 0, chat.ignore)
    assert (turn.text, turn.finish) == ("hi", "stop")
    assert prompts == [list(b"<|endoftext|>")]


def test_a_prompt_beyond_the_context_is_cut_from_the_left_with_a_note(
    voice: chat.Voice, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "".join(chr(33 + i % 90) for i in range(100))
    assert chat.encode(voice, text) == list(text[-64:].encode())
    assert "(prompt of 100 tokens, context of 64: the first 36 are cut off)" in capsys.readouterr().err
    options = chat.Options(max_tokens=20)
    long, short = (chat.answer(voice, t, options, 5, chat.ignore) for t in (text, text[-64:]))
    assert long.tokens == short.tokens and len(long.tokens) > 0


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


def test_int8_and_guessing_ahead_answer_too(paths: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    plain, guessed = session_of(paths[0], seed=3, lookup=0), session_of(paths[0], seed=3, lookup=8)
    int8 = session_of(paths[0], seed=3, dtype="int8")
    for session in (plain, guessed, int8):
        session.ask("The sky The sky The sky")
    assert plain.last().tokens == guessed.last().tokens and len(int8.last().tokens) > 0
    assert "int8 on cpu" in str(int8.voices[0])
    with pytest.raises(ValueError, match="compile = true is for a GPU"):
        session_of(paths[0], compile=True)


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


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("one two three", ["one two", "three"]),
        ("  indented", ["  indented"]),
        ("abcdefghijklmno pq", ["abcdefghij", "klmno pq"]),
        ("日本語日本語 ab", ["日本語日本", "語 ab"]),
        ("e\u0301" * 10 + " x", ["e\u0301" * 10, "x"]),
        ("a" + 5 * "😀", ["a😀😀😀😀", "😀"]),
        ("", [""]),
        (" " * 30, [""]),
    ],
)
def test_columns_count_the_cells_of_a_terminal(text: str, rows: list[str]) -> None:
    assert wrap(text, 10) == rows and all(cells(row) <= 10 for row in rows)
    beside = [row.partition("|")[0] for row in chat.columns([text, "x\n" * 3], 23).split("\n") if "|" in row]
    assert set(map(cells, beside)) == {11}


def test_one_answer_from_the_command_line_as_json(
    paths: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompt.txt").write_text("The sky\n")
    flags = ["--seed=3", "--max_tokens=20", "--json"]
    chat.main(chat.parse([paths[0], f"--prompt_file={tmp_path / 'prompt.txt'}", *flags]))
    monkeypatch.setattr(sys, "stdin", io.StringIO("The sky\n/retry\n/quit\nnot read\n"))
    chat.main(chat.parse([paths[0], *flags]))
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [o["seed"] for o in objects] == [3, 3, 4]
    assert objects[0]["options"]["max_tokens"] == 20 and objects[0].pop("tokens_per_s") > 0
    assert objects[0].items() <= objects[1].items()
    session = session_of(paths[0], seed=3)
    session.ask("The sky")
    capsys.readouterr()
    assert {**objects[0], **asdict(session.last())} == objects[0]
    for flag in (flags, flags[:-1]):  # both checkpoints: an object each, or side by side
        chat.main(chat.parse([*paths, "--prompt=The sky", *flag]))
    one, other, *rows = capsys.readouterr().out.splitlines()
    assert json.loads(one)["text"] == objects[0]["text"] != json.loads(other)["text"]
    assert any(re.match(r"The\b.* \| The\b", row) for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt_file=none.txt"], "cannot open none.txt: No such file or directory"),
        (["--prompt_file={latin}"], "latin.txt is not UTF-8 text"),
        (["--prompt="], "the prompt is empty"),
        (["--prompt=x", "--device=tpu9"], "device 'tpu9' is not usable"),
        (["--prompt=x", "--prompt_file=y"], "not allowed with argument"),
    ],
)
def test_bad_prompts_are_one_line(
    paths: tuple[str, str], tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    arguments = [argument.format(latin=tmp_path / "latin.txt") for argument in arguments]
    with pytest.raises(SystemExit) as exit:
        config.run(lambda: chat.main(chat.parse([paths[0], *arguments])))
    error = capsys.readouterr().err
    assert (exit.value.code, error.count("\n")) == (2, 1) and message in error


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
def test_a_prompt_of_several_lines(lines: list[str], text: str) -> None:
    rest = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    assert chat.whole_text(read(""), read) == text


def test_what_is_saved_comes_back(paths: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, session = tmp_path / "saved.json", session_of(paths[0], seed=9, temperature=0.5)
    scripts = ["The sky", "The sea"]
    for prompt in scripts:
        session.ask(prompt)
    for _ in range(2):  # the second time over the first
        chat.run_command(session, f"/save {file}")
    other = session_of(paths[0], dtype="bf16")
    capsys.readouterr()
    chat.run_command(other, f"/load {file}")
    told = capsys.readouterr().out
    assert [(t.prompt, t.text, t.seed) for t in other.turns] == [(t.prompt, t.text, t.seed) for t in session.turns]
    assert all(f"> {prompt}\n" in told for prompt in scripts)
    assert other.options == replace(session.options, dtype="bf16")
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("text", ["notes", "[]", '{"turns": 1}', '{"options": {"top_k": 0}, "turns": []}'])
def test_a_foreign_file_is_not_loaded_and_not_written_over(paths: tuple[str, str], tmp_path: Path, text: str) -> None:
    file, session = tmp_path / "notes.txt", session_of(paths[0])
    file.write_text(text)
    for command in ("/save", "/load"):
        with pytest.raises(ValueError, match="is not a file that /save wrote"):
            chat.run_command(session, f"{command} {file}")
    for command in ("/save", "/load", f"/load {tmp_path / 'none'}", f"/save {tmp_path / 'none/x'}", "/retry", "/probs"):
        with pytest.raises(ValueError, match=r"give its name|cannot open|there is no answer yet"):
            chat.run_command(session, command)
    assert file.read_text() == text


def test_probabilities_are_those_of_one_token_after_another(voice: chat.Voice) -> None:
    prompt, tokens = list(b"The sky"), list(b" is blue and wide")
    one_by_one = [
        next_logits(voice.model, prompt + tokens[:i])[0].softmax(-1)[token].item() for i, token in enumerate(tokens)
    ]
    assert chat.probabilities(voice, prompt, tokens) == pytest.approx(one_by_one, abs=1e-6)
    assert len(chat.probabilities(voice, prompt, tokens * 10)) == SHAPE.seq_len


def test_probabilities_on_demand(paths: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    session = session_of(paths[0], seed=1)
    session.ask("The sky")
    capsys.readouterr()
    chat.run_command(session, "/probs")
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == len(session.last().tokens) and all(re.match(r"0\.\d{4} '|0\.\d{4} \"", row) for row in rows)
    session.interactive = True
    chat.run_command(session, "/probs")
    shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert shown.startswith(chat.visible(session.last().text) + "\n")


def test_penalty_and_min_p_are_those_of_transformers() -> None:
    logits = pytest.importorskip("transformers.generation.logits_process")
    torch.manual_seed(0)
    scores, tokens = 3 * torch.randn(2, 50), torch.tensor([[1, 2, 3, 2], [4, 4, 5, 6]])
    assert torch.equal(
        penalize(scores, tokens, 1.3), logits.RepetitionPenaltyLogitsProcessor(1.3)(tokens, scores.clone())
    )
    kept = logits.MinPLogitsWarper(0.1)(tokens, scores.clone()).isfinite()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([sample(scores, generator=generator, min_p=0.1) for _ in range(500)])  # [500, 2]
    for row in range(2):
        assert set(drawn[:, row].tolist()) == set(kept[row].nonzero().flatten().tolist())


def test_a_penalty_ends_a_loop_and_leaves_reproducible_answers(voice: chat.Voice) -> None:
    options = chat.Options(max_tokens=30, temperature=0)
    plain, penalized, again = (
        chat.answer(voice, "The sky", o, 1, chat.ignore).tokens
        for o in (options, replace(options, repetition_penalty=5.0), replace(options, repetition_penalty=5.0))
    )
    assert len(set(penalized)) > len(set(plain)) and penalized == again
    options = chat.Options(max_tokens=30, min_p=0.3, repetition_penalty=1.1, top_p=0.9)
    assert len({chat.answer(voice, "The sky", options, 6, chat.ignore).text for _ in range(3)}) == 1


def test_help_does_not_wait_for_torch() -> None:
    script = "import runpy, sys\nsys.argv = ['chat.py', '--help']\ntry:\n    runpy.run_path('chat.py', run_name='__main__')\n"
    script += "except SystemExit as end:\n    sys.exit(100 if 'torch' in sys.modules else end.code)\n"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--repetition_penalty" in done.stdout
