"""Talk to a checkpoint: it continues the text you type.

    python chat.py checkpoints                              # a run directory, a checkpoint file or a Hub id
    python chat.py runs/a runs/b                            # a second one, for /compare side by side
    printf 'The sky is\\n/bench\\n' | python chat.py runs/a   # prompts and commands from a pipe

Each line is a prompt of its own: these are base models, which know no questions, answers or turns. /help lists the
commands. Ctrl-C stops an answer, Ctrl-D leaves. Typed lines are kept in ~/.local/state/nano416/chat_history.
"""

import codecs
import contextlib
import difflib
import inspect
import io
import os
import random
import re
import shutil
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple

import config


@dataclass(frozen=True)
class Options:
    """What the command line and /set change."""

    max_tokens: int = 200  # length of an answer at most
    temperature: float = 0.8  # 0 = always the likeliest token, 1 = as the model says
    top_k: int | None = 50  # choose among so many of the likeliest tokens; none = all
    top_p: float | None = None  # choose among the likeliest tokens that hold this probability together; none = all
    seed: int | None = None  # the same seed gives the same answers; none = new ones each time
    device: str | None = None  # cpu or cuda; none = cuda if there is one
    dtype: Literal["fp32", "bf16"] | None = None  # precision of the weights; none = bf16 on a GPU, else fp32

    def __post_init__(self) -> None:
        for name, valid, limits in (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or none"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1, or none"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "from 0 to 2**63 - 1, or none"),
        ):
            if not valid:
                raise ValueError(f"{name} must be {limits}, got {getattr(self, name)}")


def parse(argv: list[str] | None = None) -> Any:
    """The command line, its `options` checked. Runs before torch is imported, which takes seconds."""
    parser = config.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="file, run directory or Hub id")
    parser.add_argument("checkpoint2", metavar="CHECKPOINT2", nargs="?", help="another one, for /compare")
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(Options), re.MULTILINE))
    for f in fields(Options):
        text = f"{comments[f.name]} [{'none' if f.default is None else f.default}]"
        parser.add_argument(f"--{f.name}", default=f.default, metavar="X", help=text)
    args = parser.parse_args(argv)
    try:
        args.options = config.from_dict(Options, {f.name: getattr(args, f.name) for f in fields(Options)})
    except ValueError as error:
        parser.error(str(error))
    return args


if __name__ == "__main__":
    ARGS = parse()

import torch

import checkpoint
from data_pipeline import Tokenizer, load_tokenizer
from model import Transformer, generate

PROMPT = "The meaning of life is"  # of /bench and /compare
BENCH_RUNS, BENCH_TOKENS = 3, 128
COMPARE_TOKENS = 64  # without cache each token costs a pass over all the text before it
# Obeyed by terminals: C0 but \n and \t, DEL, C1, line separators, direction marks and overrides, tags.
CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\U000e0000-\U000e007f\ud800-\udfff]"
)


class Voice(NamedTuple):
    """One checkpoint, ready to speak."""

    name: str
    model: Transformer
    tokenizer: Tokenizer
    step: int

    def __str__(self) -> str:
        weight = self.model.embed_tokens.weight
        size = f"{self.model.num_params() / 1e6:.1f}M parameters, {self.tokenizer.name} tokenizer"
        context = f"context of {self.model.config.seq_len} tokens"
        return visible(f"{self.name}: step {self.step:,}, {size}, {context}, {_short(weight.dtype)} on {weight.device}")


@dataclass
class Turn:
    """A prompt and what the model made of it."""

    prompt: str
    seed: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: str = "interrupted"  # or "stop": the model ended the text; "length": max_tokens are reached


class Session:
    """The voices, the options, and the turns so far."""

    def __init__(self, paths: list[str], options: Options):
        self.paths, self.options = paths, options
        self.interactive = all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))
        self.voices = [load(path, options) for path in paths]
        self.turns: list[Turn] = []

    def ask(self, prompt: str) -> None:
        """Print the answer as it comes."""
        seed = random.randrange(2**31) if self.options.seed is None else self.options.seed
        started = time.monotonic()
        turn = answer(self.voices[0], prompt, self.options, seed, lambda text: print(visible(text), end="", flush=True))
        seconds = time.monotonic() - started
        print(flush=True)
        self.turns.append(turn)
        if self.interactive:
            print(f"({len(turn.tokens)} tokens, {len(turn.tokens) / seconds:.1f}/s, {FINISH[turn.finish]})")
        elif turn.finish == "interrupted":
            raise KeyboardInterrupt


FINISH = {"stop": "the model ended its text", "length": "max_tokens reached", "interrupted": "stopped"}


def load(path: str, options: Options) -> Voice:
    """A checkpoint on the device and in the precision that the options name. Raises ValueError."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {device!r} is not usable: {str(error).splitlines()[0]}") from error
    model, meta = checkpoint.load_model(path, device)
    tokenizer = load_tokenizer(meta["tokenizer"]["name"], meta["tokenizer"].get("sha256"))
    if not model.config.causal:
        raise ValueError(f"{path} sees the text on both sides (causal = false); chat.py needs a model that continues")
    if (model.config.vocab_size or 0) < tokenizer.vocab_size:
        raise ValueError(f"{path} has {model.config.vocab_size} tokens, its tokenizer {tokenizer.vocab_size}")
    if (options.dtype or ("fp32" if device == "cpu" else "bf16")) == "bf16":
        model.to(torch.bfloat16)
    return Voice(meta["path"], model, tokenizer, meta["step"])


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


# ---- Text in, text out -----------------------------------------------------------------------------------------------


def visible(text: str) -> str:
    """Control characters as \\xNN or \\uNNNN: shown to the reader, not obeyed by the terminal."""
    return CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}" if match[0] < "\x80" else ascii(match[0])[1:-1], text)


def note(text: str) -> None:
    """A remark beside the answers, on stderr."""
    print(f"({visible(text)})", file=sys.stderr, flush=True)


def encode(voice: Voice, text: str) -> list[int]:
    """The tokens of `text`, cut from the left to the model's context."""
    tokens, limit = voice.tokenizer.encode(text), voice.model.config.seq_len
    if len(tokens) > limit:
        note(f"the prompt has {len(tokens)} tokens, the context {limit}: the first {len(tokens) - limit} are cut off")
    return tokens[-limit:]


def token_bytes(voice: Voice, token: int) -> bytes:
    """What a token stands for; some vocabularies leave ids unused."""
    try:
        return voice.tokenizer.decode_bytes([token])
    except KeyError:
        return f"<token {token}>".encode()


def answer(voice: Voice, prompt: str, options: Options, seed: int, show: Callable[[str], None]) -> Turn:
    """Continue `prompt`, handing text to `show` as soon as its characters are whole. Ctrl-C ends it early."""
    turn = Turn(prompt, seed)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    with contextlib.suppress(KeyboardInterrupt):
        for token in generate(
            voice.model,
            encode(voice, prompt),
            options.max_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=seed,
            stop_token=voice.tokenizer.eot_id,
        ):
            turn.tokens.append(token)
            text = decoder.decode(token_bytes(voice, token))
            turn.text += text
            show(text)
        turn.finish = "length" if len(turn.tokens) == options.max_tokens else "stop"
    tail = decoder.decode(b"", final=True)
    turn.text += tail
    show(tail)
    return turn


def timed(voice: Voice, prompt: list[int], n_tokens: int, use_cache: bool = True) -> tuple[list[int], float, float]:
    """Greedy tokens, seconds to the first of them (prefill), seconds for the others (decode)."""
    tokens, first = [], 0.0
    started = time.perf_counter()
    for token in generate(voice.model, prompt, n_tokens, temperature=0, use_cache=use_cache):
        first = first or time.perf_counter()
        tokens.append(token)
    return tokens, first - started, time.perf_counter() - first


def columns(texts: list[str], width: int) -> str:
    """Texts beside each other, wrapped, in `width` characters."""
    each = max(10, (width - 3 * (len(texts) - 1)) // len(texts))
    wrapped = [
        [row for line in text.expandtabs().split("\n") for row in textwrap.wrap(line, each) or [""]] for text in texts
    ]
    rows = zip_longest(*wrapped, fillvalue="")
    return "\n".join(" | ".join(cell.ljust(each) for cell in row).rstrip() for row in rows)


# ---- Commands: the first line of each docstring is its line in /help -------------------------------------------------


def show_help(session: Session, argument: str) -> None:
    """/help: this list"""
    print("\n".join(str(command.__doc__).split("\n")[0].replace(": ", "\n    ", 1) for command in COMMANDS.values()))
    print("Anything else is text to continue; begin it with a space if it starts with a slash.")


def set_option(session: Session, argument: str) -> None:
    """/set [NAME VALUE]: change an option, as in /set temperature 0.7; alone: show them all"""
    name, _, value = argument.replace("=", " ", 1).partition(" ")
    values = config.to_dict(session.options)
    if not name:
        print("\n".join(f"{key} {'none' if value is None else value}" for key, value in values.items()))
        return
    options = config.from_dict(Options, {**values, name.replace("-", "_"): value.strip()})
    if (options.device, options.dtype) != (session.options.device, session.options.dtype):
        session.voices = [load(path, options) for path in session.paths]
    session.options = options


def bench(session: Session, argument: str) -> None:
    """/bench [PROMPT]: measure the speed, prefill (reading the prompt) and decode (writing) apart"""
    for voice in session.voices:
        prompt = encode(voice, argument or PROMPT)
        n_tokens = max(2, min(session.options.max_tokens, BENCH_TOKENS))
        timed(voice, prompt, 8)  # warm-up
        print(f"{voice}\nprompt of {len(prompt)} tokens, {n_tokens} new ones", flush=True)
        print(f"{'run':>6} {'prefill ms':>12} {'prefill tokens/s':>18} {'decode tokens/s':>17}")
        rows = []
        for run in range(1, BENCH_RUNS + 1):
            _, prefill_s, decode_s = timed(voice, prompt, n_tokens)
            rows.append((1000 * prefill_s, len(prompt) / prefill_s, (n_tokens - 1) / decode_s))
            print(_bench_row(str(run), rows[-1]), flush=True)
        print(_bench_row("median", [statistics.median(column) for column in zip(*rows, strict=True)]))


def _bench_row(name: str, values: Any) -> str:
    prefill_ms, prefill_per_s, decode_per_s = values
    return f"{name:>6} {prefill_ms:12.1f} {prefill_per_s:18.1f} {decode_per_s:17.1f}"


def compare(session: Session, argument: str) -> None:
    """/compare [PROMPT]: with and without KV cache; with a second checkpoint also both answers side by side"""
    prompt, n_tokens = argument or PROMPT, min(session.options.max_tokens, COMPARE_TOKENS)
    for voice in session.voices:
        print(voice, flush=True)
        tokens, seconds = encode(voice, prompt), {}
        found: dict[bool, list[int]] = {}
        for use_cache in (True, False):
            timed(voice, tokens, 2, use_cache)  # warm-up
            found[use_cache], *both = timed(voice, tokens, n_tokens, use_cache)
            seconds[use_cache] = sum(both)
            name = "with KV cache" if use_cache else "without"
            print(
                f"{name:>15} {n_tokens} tokens in {sum(both):.2f} s = {n_tokens / sum(both):.1f} tokens/s", flush=True
            )
        same = sum(1 for _ in _while_equal(found[True], found[False]))
        equal = "the same greedy tokens" if same == n_tokens else f"greedy tokens differ after {same} (rounding)"
        print(f"{equal}, {seconds[False] / seconds[True]:.2f}x the speed with the cache")
    if len(session.voices) > 1:
        side_by_side(session, prompt)


def _while_equal(a: list[int], b: list[int]) -> Iterator[int]:
    for x, y in zip(a, b):
        if x != y:
            return
        yield x


def side_by_side(session: Session, prompt: str) -> None:
    """What the voices make of one prompt, with the options and the seed that a typed prompt would have."""
    seed = random.randrange(2**31) if session.options.seed is None else session.options.seed
    answers = []
    for voice in session.voices:
        turn = answer(voice, prompt, session.options, seed, lambda text: None)
        answers.append(visible(f"{voice.name}\n\n{prompt}{turn.text}"))
        if turn.finish == "interrupted":
            raise KeyboardInterrupt
    print(columns(answers, shutil.get_terminal_size().columns))


def leave(session: Session, argument: str) -> None:
    """/quit: leave, as Ctrl-D does"""
    raise EOFError


COMMANDS: dict[str, Callable[[Session, str], None]] = {
    "/bench": bench,
    "/compare": compare,
    "/set": set_option,
    "/help": show_help,
    "/quit": leave,
}


def run_command(session: Session, line: str) -> None:
    """Do what a line that begins with a slash says."""
    name, _, argument = line.strip().partition(" ")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        raise ValueError(f"unknown command {name}; " + (f"did you mean {near[0]}?" if near else "/help lists them"))
    COMMANDS[name](session, argument.strip())


# ---- The conversation ------------------------------------------------------------------------------------------------


def terminal_reader() -> Callable[[str], str]:
    """input() with line editing, and with a history that outlives the session where a file can be written."""
    try:
        import readline
    except ImportError:  # Windows
        return input
    folder = Path(os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")) / "nano416"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        readline.read_history_file(folder / "chat_history")

    def read(prompt: str) -> str:
        line = input(prompt)
        with contextlib.suppress(OSError):  # after each line: a closed window ends without a word
            readline.set_history_length(1000)
            readline.write_history_file(folder / "chat_history")
        return line

    return read


def pipe_reader(prompt: str) -> str:
    """The next line of a pipe or a file, without a prompt."""
    line = sys.stdin.readline() if sys.stdin is not None else ""
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def converse(session: Session) -> None:
    """Read a line, answer it, until there are no more."""
    read = terminal_reader() if session.interactive else pipe_reader
    while True:
        try:
            line = read("> " if session.interactive else "")
            if line.startswith("/"):
                run_command(session, line)
            elif line.strip():
                session.ask(line)
        except EOFError:
            if session.interactive:
                print()
            return
        except KeyboardInterrupt:
            if not session.interactive:
                raise
            print("\n(Ctrl-D or /quit leaves)")
        except ValueError as error:
            print(visible("error: " + " ".join(str(error).split())), file=sys.stderr, flush=True)


def main(args: Any) -> None:
    """Command line."""
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    session = Session([path for path in (args.checkpoint, args.checkpoint2) if path], args.options)
    if session.interactive:
        print("\n".join(map(str, session.voices)))
        print("A base model: it continues your text, and knows no questions or turns. /help lists commands.")
    converse(session)
    print(end="", flush=True)  # a closed pipe shows here, inside config.run


if __name__ == "__main__":
    config.run(lambda: main(ARGS))
