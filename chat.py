"""Talk to a checkpoint: it continues the text you type.

    python chat.py checkpoints                              # a run directory, a checkpoint file or a Hub id
    python chat.py runs/a runs/b                            # a second one, for /compare side by side
    printf 'The sky is\\n/bench\\n' | python chat.py runs/a   # prompts and commands from a pipe
    python chat.py runs/a --prompt="The sky is" --json      # one answer, with its tokens and settings

A masked-diffusion checkpoint fills its answer in, in any order; on a terminal one sees it do so. Each prompt stands
alone: these are base models, which know no questions, answers or turns. /help lists the commands. Ctrl-C stops an
answer, Ctrl-D leaves. A prompt of several lines has a backslash at the end of each but the last, or \""" before and
after it. What you type is kept in ~/.local/state/nano416/chat_history.
"""

import codecs
import contextlib
import dataclasses
import inspect
import io
import json
import math
import os
import random
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import config


@dataclass(frozen=True)
class Options:
    """What the command line and /set change."""

    max_tokens: int = 200  # length of an answer at most
    temperature: float = 0.8  # 0 = always the likeliest token, 1 = as the model says
    top_k: int | None = 50  # choose among so many of the likeliest tokens; none = all
    top_p: float | None = None  # choose among the likeliest tokens that together hold this probability; none = all
    min_p: float | None = None  # drop tokens less likely than this times the likeliest one; none = drop none
    repetition_penalty: float | None = None  # above 1: tokens already in the text become less likely; none = 1
    seed: int | None = None  # the same seed gives the same answer to a prompt; none = a new one each time
    steps: int | None = None  # masked diffusion: forward passes for an answer; none = one per token
    block_length: int | None = 32  # masked diffusion: fill so many tokens before the next ones; none = all at once
    remasking: Literal["low_confidence", "random"] = "low_confidence"  # masked diffusion: which predictions wait
    guidance: float = 0.0  # masked diffusion: above 0 the answer keeps closer to the prompt (classifier-free guidance)
    device: str | None = None  # cpu or cuda; none = cuda if there is one
    dtype: Literal["fp32", "bf16", "int8"] | None = None  # of the weights; none = bf16 on a GPU, else fp32
    lookup: int = 8  # tokens to guess at once where the text repeats itself: the same text, sooner; 0 = none
    compile: bool = False  # on a GPU: a minute to begin with, then tokens in a fraction of the time; int8 needs it

    def __post_init__(self) -> None:
        for name, holds, limits in (
            ("max_tokens", lambda x: x >= 1, "at least 1"),
            ("temperature", lambda x: x >= 0, "at least 0"),
            ("top_k", lambda x: x >= 1, "at least 1, or none"),
            ("top_p", lambda x: 0 < x <= 1, "above 0 and at most 1, or none"),
            ("min_p", lambda x: 0 <= x <= 1, "from 0 to 1, or none"),
            ("repetition_penalty", lambda x: x > 0, "above 0, or none"),
            ("lookup", lambda x: x >= 0, "at least 0"),
            ("steps", lambda x: x >= 1, "at least 1, or none"),
            ("block_length", lambda x: x >= 1, "at least 1, or none"),
            ("seed", lambda x: 0 <= x < 2**63, "from 0 to 2**63 - 1, or none"),
        ):
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise ValueError(f"{name} must be {limits}, got {value}")


def parse(argv: list[str] | None = None) -> Any:
    """The command line, its `options` checked. Runs before torch is imported, which takes seconds."""
    parser = config.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="file, run directory or Hub id")
    parser.add_argument("checkpoint2", metavar="CHECKPOINT2", nargs="?", help="another one, for /compare and --prompt")
    once = parser.add_mutually_exclusive_group()
    once.add_argument("--prompt", metavar="TEXT", help="continue this text and leave")
    once.add_argument("--prompt_file", metavar="FILE", help="continue this file's text (- = stdin) and leave")
    parser.add_argument("--json", action="store_true", help="answers as JSON objects, one a line")
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(Options), re.MULTILINE))
    for f in dataclasses.fields(Options):
        text = f"{comments[f.name]} [{'none' if f.default is None else f.default}]"
        parser.add_argument(f"--{f.name}", default=f.default, metavar="X", help=text)
    args = parser.parse_args(argv)
    try:
        args.options = config.from_dict(Options, {f.name: getattr(args, f.name) for f in dataclasses.fields(Options)})
    except ValueError as error:
        parser.error(str(error))
    return args


if __name__ == "__main__":
    ARGS = parse()
    # Read when torch is loaded. Threads that spin at barriers starve where others compute too: on 2 shared cores
    # a 2.7M model wrote 19-48 tokens/s instead of 244-265, a 141M model 5-7 instead of 12-21.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import checkpoint
from inference import Step, bandwidth, bytes_per_token, choose_threads, prepare
from model import Transformer, generate
from shards import Tokenizer, load_tokenizer
from terminal import HEAT, Frame, columns, heat, pipe_reader, remark, terminal_reader, visible, whole_text

DRAWING = ("temperature", "top_k", "top_p", "min_p")
SAMPLING = (*DRAWING, "repetition_penalty")  # options that `generate` takes as they are
FILLING = ("steps", "block_length", "remasking", "guidance")  # and with DRAWING those that `diffusion.fill` does
PROMPT = "The meaning of life is"  # of /bench and /compare
BENCH_RUNS, BENCH_TOKENS = 3, 128
OPEN = "░"  # a token that is not filled in yet
COMPARE_TOKENS = 64  # without cache each token costs a pass over all the text before it
Show = Callable[[str], None]  # what is done with a piece of text
FINISH = {"stop": "the model ended its text", "length": "max_tokens reached", "interrupted": "stopped"}


class Voice(NamedTuple):
    """One checkpoint, ready to speak."""

    name: str
    step: int
    model: Transformer
    tokenizer: Tokenizer
    dtype: str
    n_params: int
    bytes_per_token: int
    compiled: Step | None = None

    def __str__(self) -> str:
        device = self.model.embed_tokens.weight.device
        threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
        return visible(
            f"{self.name}: step {self.step:,}, {self.n_params / 1e6:.1f}M parameters, {self.tokenizer.name} tokenizer, "
            f"context of {self.model.config.seq_len} tokens, {self.dtype} on {device}{threads}"
        )


@dataclass
class Turn:
    """A prompt and what the model made of it."""

    prompt: str
    seed: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: str = "interrupted"


class Session:
    """The voices, the options, and the turns so far."""

    def __init__(self, paths: list[str], options: Options, interactive: bool = False, as_json: bool = False):
        self.paths, self.options, self.interactive, self.as_json = paths, options, interactive, as_json
        self.voices = [load(path, options) for path in paths]
        self.turns: list[Turn] = []
        check_effect(self.voices, options)

    def ask(self, prompt: str, seed: int | None = None, voice: Voice | None = None) -> None:
        """Print the answer as it comes."""
        voice, seed = voice or self.voices[0], self.seed() if seed is None else seed
        started = time.monotonic()
        show = ignore if self.as_json else write
        draw = Frame() if self.interactive and os.environ.get("TERM") != "dumb" else ignore
        turn = answer(voice, prompt, self.options, seed, show, draw)
        per_s = len(turn.tokens) / (time.monotonic() - started)
        self.turns.append(turn)
        if self.as_json:
            facts = {"checkpoint": voice.name, "step": voice.step, "options": asdict(self.options)}
            print(json.dumps({**asdict(turn), "tokens_per_s": round(per_s, 1), **facts}), flush=True)
        else:
            print(flush=True)
        if self.interactive:
            print(f"({len(turn.tokens)} tokens, {per_s:.1f}/s, {FINISH[turn.finish]})")
        elif turn.finish == "interrupted":
            raise KeyboardInterrupt

    def seed(self) -> int:
        """That of the next answer: any, unless one is set."""
        return random.randrange(2**31) if self.options.seed is None else self.options.seed

    def last(self) -> Turn:
        """The last prompt and its answer. Raises ValueError."""
        if not self.turns:
            raise ValueError("there is no answer yet")
        return self.turns[-1]


def load(path: str, options: Options) -> Voice:
    """A checkpoint on the device and in the precision that the options name. Raises ValueError."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} is not usable: {str(error).splitlines()[0]}") from error
    if options.compile and not device.startswith("cuda"):
        raise ValueError(f"compile = true is for a GPU, the device is {device}; leave it out")
    model, meta = checkpoint.load_model(path, device)
    tokenizer = load_tokenizer(meta["tokenizer"])
    dtype = options.dtype or ("fp32" if device == "cpu" else "bf16")
    size = model.num_params(), bytes_per_token(model, dtype)  # of the weights as they are before they are packed
    prepare(model, dtype)
    if device == "cpu" and "OMP_NUM_THREADS" not in os.environ and model.config.causal:
        choose_threads(model)
    step = Step(model) if options.compile else None
    if step is not None:
        step.compile(mode="reduce-overhead", fullgraph=True)
    return Voice(meta["path"], meta["step"], model, tokenizer, dtype, *size, step)


def check_effect(voices: list[Voice], options: Options) -> None:
    """Raise ValueError for an option that none of the voices can follow."""
    continuing = [voice.model.config.causal for voice in voices]
    for names, followed, kind in (
        (FILLING, not all(continuing), "autoregressive"),
        (("repetition_penalty",), any(continuing), "masked-diffusion"),
    ):
        changed = [name for name in names if getattr(options, name) != getattr(Options(), name)]
        if changed and not followed:
            raise ValueError(f"{changed[0]} has no effect on {kind} checkpoints; leave it out")


# ---- Text in, text out -----------------------------------------------------------------------------------------------


def write(text: str) -> None:
    """A piece of an answer, at once."""
    print(visible(text), end="", flush=True)


def ignore(text: str) -> None:
    """For an answer that is shown when it is whole."""


def encode(voice: Voice, text: str) -> list[int]:
    """The tokens of `text`, cut from the left to the model's context."""
    tokens, limit = voice.tokenizer.encode(text), voice.model.config.seq_len
    if len(tokens) > limit:
        remark(f"(prompt of {len(tokens)} tokens, context of {limit}: the first {len(tokens) - limit} are cut off)")
    return tokens[-limit:]


def pieces(voice: Voice, tokens: Iterator[int]) -> Iterator[tuple[int, str]]:
    """Each token with the characters that it completes; -1 stands for the end, with what is left of a broken one."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        yield token, decoder.decode(voice.tokenizer.spell(token))
    yield -1, decoder.decode(b"", final=True)


def answer(voice: Voice, prompt: str, options: Options, seed: int, show: Show, draw: Show = ignore) -> Turn:
    """Continue `prompt`, handing text to `show` as soon as its characters are whole. Ctrl-C ends it early.

    A masked-diffusion model hands its answer to `draw` after each step, then an empty text, and to `show` at the end.
    """
    if not prompt:
        raise ValueError("the prompt is empty; the model needs a text to continue")
    turn, tokens = Turn(prompt, seed), encode(voice, prompt)
    if not voice.model.config.causal:
        fill_in(voice, turn, tokens, options, draw)
        show(turn.text)
        return turn
    ways: dict[str, Any] = {name: getattr(options, name) for name in (*SAMPLING, "lookup")}
    ways |= {"seed": seed, "step": voice.compiled, "stop_token": voice.tokenizer.eot_id}
    with contextlib.suppress(KeyboardInterrupt):
        for token, text in pieces(voice, generate(voice.model, tokens, options.max_tokens, **ways)):
            turn.tokens += [token] if token >= 0 else []
            turn.text += text
            show(text)
        turn.finish = "length" if len(turn.tokens) == options.max_tokens else "stop"
    return turn


def fill_in(voice: Voice, turn: Turn, prompt: list[int], options: Options, draw: Show) -> None:
    """Let a masked-diffusion model write the turn. What Ctrl-C leaves is the text before the first open token."""
    import diffusion

    prompt, length = diffusion.fit(voice.model, prompt, options.max_tokens)
    if length < options.max_tokens:
        remark(f"(answer of {length} tokens: with the prompt it fills the context of {voice.model.config.seq_len})")
    eot, mask, tokens = voice.tokenizer.eot_id, diffusion.mask_id(voice.model), []
    settings = {name: getattr(options, name) for name in (*DRAWING, *FILLING)}
    with contextlib.suppress(KeyboardInterrupt):
        for tokens in diffusion.fill(voice.model, prompt, length, **settings, seed=turn.seed, stop_token=eot):
            parts = [OPEN.encode() if token == mask else voice.tokenizer.spell(token) for token in tokens]
            draw(b"".join(parts).decode("utf-8", "replace"))
        turn.finish = "stop" if eot in tokens else "length"
    draw("")
    end = next((i for i, token in enumerate(tokens) if token in (eot, mask)), len(tokens))
    turn.tokens = tokens[:end]
    turn.text = voice.tokenizer.decode(turn.tokens)


@torch.inference_mode()
def probabilities(voice: Voice, prompt: list[int], tokens: list[int]) -> list[float]:
    """How likely each of `tokens` is after all before it, at temperature 1; the last ones if not all fit the context."""
    if not voice.model.config.causal:
        import diffusion

        prompt = prompt[-max(1, voice.model.config.seq_len - len(tokens)) :]
        return diffusion.log_likelihood(voice.model, prompt, tokens)[0].exp().tolist()
    text = torch.tensor([prompt + tokens], device=voice.model.embed_tokens.weight.device)
    text = text[:, -voice.model.config.seq_len - 1 :]
    chances = voice.model(text[:, :-1]).float().softmax(-1).gather(-1, text[:, 1:, None])  # [1, T, 1]
    return chances.flatten()[-len(tokens) :].tolist()


def timed(voice: Voice, prompt: list[int], n_tokens: int, **ways: Any) -> tuple[list[int], float, float]:
    """Greedy tokens, seconds to the first of them (prefill), seconds for the others (decode)."""
    tokens, first = [], 0.0
    started = time.perf_counter()
    for token in generate(voice.model, prompt, n_tokens, temperature=0, **{"step": voice.compiled, **ways}):
        first = first or time.perf_counter()
        tokens.append(token)
    return tokens, first - started, time.perf_counter() - first


@contextlib.contextmanager
def opening(path: str) -> Iterator[Path]:
    """The file that a user names; what goes wrong with it is a ValueError that names it too."""
    if not path:
        raise ValueError("which file? give its name")
    try:
        yield Path(path)
    except OSError as error:
        raise ValueError(f"cannot open {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text") from error


# ---- Commands: a docstring is the command's line in /help ------------------------------------------------------------


def show_help(session: Session, argument: str) -> None:
    """/help: this list"""
    rows = [str(command.__doc__).split(": ", 1) for command in COMMANDS.values()]
    print("\n".join(f"{usage:18} {text}" for usage, text in rows))
    print("Anything else is text to continue; begin it with a space if it starts with a slash.")


def set_option(session: Session, argument: str) -> None:
    """/set NAME VALUE: change an option, as in /set temperature 0.7; without a value, show it, or all"""
    name, _, value = argument.replace("=", " ", 1).partition(" ")
    name, values = name.strip("-").replace("-", "_"), asdict(session.options)  # --top-k as on the command line
    if name and name not in values:
        raise ValueError(config.unknown("option", name, values, "/set lists them"))
    if not value:
        shown = [name] if name else values
        print("\n".join(f"{key} {'none' if values[key] is None else values[key]}" for key in shown))
        return
    options = config.from_dict(Options, {**values, name: value.strip()})
    check_effect(session.voices, options)
    if any(getattr(options, name) != values[name] for name in ("device", "dtype", "compile")):
        session.voices = [load(path, options) for path in session.paths]
    session.options = options


def retry(session: Session, argument: str) -> None:
    """/retry: another answer to the last prompt, with the next seed"""
    session.ask(session.last().prompt, (session.last().seed + 1) % 2**63)


def show_probabilities(session: Session, argument: str) -> None:
    """/probs: how likely the model found each token of its last answer, as colours on a terminal"""
    voice, turn = session.voices[0], session.last()
    if not turn.tokens:
        raise ValueError("the last answer is empty")
    chances = probabilities(voice, voice.tokenizer.encode(turn.prompt), turn.tokens)
    if len(chances) < len(turn.tokens):
        remark(f"(the first {len(turn.tokens) - len(chances)} tokens lie beyond the context)")
    tokens = turn.tokens[-len(chances) :]
    if not session.interactive or "NO_COLOR" in os.environ:
        print("\n".join(f"{p:.4f} {voice.tokenizer.decode([token])!r}" for p, token in zip(chances, tokens)))
        return
    print("".join(heat(text, p) for (_, text), p in zip(pieces(voice, iter(tokens)), [*chances, 0.0])))
    print("probability at least " + " ".join(heat(f" {p} ", p) for p, _ in HEAT))


def bench(session: Session, argument: str) -> None:
    """/bench [PROMPT]: measure the speed, prefill (reading the prompt) and decode (writing) apart"""
    n_tokens = min(session.options.max_tokens, BENCH_TOKENS)
    for voice in session.voices:
        print(voice, flush=True)
        if voice.model.config.causal:
            bench_writing(voice, encode(voice, argument or PROMPT), max(2, n_tokens))
        else:
            bench_filling(voice, argument or PROMPT, dataclasses.replace(session.options, max_tokens=n_tokens))


def bench_writing(voice: Voice, prompt: list[int], n_tokens: int) -> None:
    """Speed of autoregression, beside the memory's limit."""
    print(f"prompt of {len(prompt)} tokens, {n_tokens} new ones")
    print("   run     prefill ms  prefill tokens/s   decode tokens/s", flush=True)
    timed(voice, prompt, 8)  # warm-up
    runs = (timed(voice, prompt, n_tokens) for _ in range(BENCH_RUNS))
    rates = ((1000 * prefill, len(prompt) / prefill, (n_tokens - 1) / decode) for _, prefill, decode in runs)
    *_, tokens_per_s = print_runs("{:>6} {:14.1f} {:17.1f} {:17.1f}", rates)
    print(limit_line(voice, tokens_per_s), flush=True)


def bench_filling(voice: Voice, prompt: str, options: Options) -> None:
    """Speed of masked diffusion, which has no cache: each step reads prompt and answer again."""
    print("   run      steps   ms per step          tokens/s", flush=True)
    filled(voice, prompt, options)  # warm-up
    runs = (filled(voice, prompt, options) for _ in range(BENCH_RUNS))
    print_runs("{:>6} {:10.0f} {:13.1f} {:17.1f}", ((n, 1000 * s / n, len(turn.tokens) / s) for n, turn, s in runs))


def print_runs(row: str, runs: Iterable[tuple[float, ...]]) -> list[float]:
    """A row for each run as it ends, then one of the medians, which are returned."""
    done = []
    for number, rates in enumerate(runs, 1):
        done.append(rates)
        print(row.format(number, *rates), flush=True)
    medians = [statistics.median(column) for column in zip(*done, strict=True)]
    print(row.format("median", *medians))
    return medians


def limit_line(voice: Voice, tokens_per_s: float) -> str:
    """How near a speed is to what the memory allows."""
    gives = bandwidth(voice.model.embed_tokens.weight.device)
    most = gives / voice.bytes_per_token
    return (
        f"{voice.bytes_per_token / 1e6:.1f} MB of weights per token from a memory of {gives / 1e9:.1f} GB/s: "
        f"at most {most:.1f} tokens/s, {tokens_per_s / most:.0%} reached"
    )


def filled(voice: Voice, prompt: str, options: Options) -> tuple[int, Turn, float]:
    """Steps, the turn and seconds of one answer."""
    steps: list[str] = []
    started, turn = time.perf_counter(), Turn(prompt, options.seed or 0)
    fill_in(voice, turn, encode(voice, prompt), options, steps.append)
    if turn.finish == "interrupted":
        raise KeyboardInterrupt
    return len(steps) - 1, turn, time.perf_counter() - started


def compare_steps(voice: Voice, prompt: str, options: Options, judge: Voice) -> None:
    """Fewer steps are faster and fill in more tokens at once, without knowing of each other: what does that cost?"""
    print(f"nats per token: of the answer, as {visible(judge.name)} reads it\n steps   tokens/s   nats per token")
    n = steps = min(options.max_tokens, COMPARE_TOKENS)
    while steps >= max(1, n // 16):
        done, turn, seconds = filled(voice, prompt, dataclasses.replace(options, max_tokens=n, steps=steps))
        chances = probabilities(judge, judge.tokenizer.encode(prompt), turn.tokens) if turn.tokens else []
        nats = -sum(map(math.log, chances)) / len(chances) if chances else math.nan
        print(f"{done:6} {len(turn.tokens) / seconds:10.1f} {nats:16.3f}   {visible(turn.text)!r}", flush=True)
        steps //= 2


def compare(session: Session, argument: str) -> None:
    """/compare [PROMPT]: speed without cache, with it, guessing ahead, or with fewer steps; a second checkpoint's answer beside it"""
    prompt, n_tokens = argument or PROMPT, min(session.options.max_tokens, COMPARE_TOKENS)
    ways = {"without KV cache": {"use_cache": False}, "with KV cache": {}}
    ways |= {"and guessing": {"lookup": session.options.lookup, "step": None}} if session.options.lookup else {}
    for voice in session.voices:
        print(voice, flush=True)
        if not voice.model.config.causal:
            others = [v for v in session.voices if v.model.config.causal and v.tokenizer.name == voice.tokenizer.name]
            compare_steps(voice, prompt, session.options, others[0] if others else voice)
            continue
        tokens, found, seconds = encode(voice, prompt), [], []
        for name, way in ways.items():
            timed(voice, tokens, 2, **way)  # warm-up
            new, prefill_s, decode_s = timed(voice, tokens, n_tokens, **way)
            found.append(new)
            seconds.append(prefill_s + decode_s)
            print(
                f"{name:>16} {n_tokens} tokens in {seconds[-1]:.2f} s = {n_tokens / seconds[-1]:.1f} tokens/s, "
                f"{seconds[0] / seconds[-1]:.2f}x, {agreement(found[0], new)}",
                flush=True,
            )
        print(limit_line(voice, n_tokens / seconds[1]), flush=True)
    if len(session.voices) > 1:
        side_by_side(session, prompt)


def agreement(one: list[int], other: list[int]) -> str:
    """Whether two ways to decode wrote the same; rounding may turn a tie."""
    differ = [i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
    return f"greedy tokens differ from number {differ[0] + 1} on" if differ else "the same greedy tokens"


def side_by_side(session: Session, prompt: str) -> None:
    """What the voices make of one prompt, with the options and the seed that a typed prompt would have."""
    seed, answers = session.seed(), []
    for voice in session.voices:
        turn = answer(voice, prompt, session.options, seed, ignore)
        if turn.finish == "interrupted":
            raise KeyboardInterrupt
        answers.append(visible(f"{voice.name}\n\n{prompt}{turn.text}"))
    print(columns(answers, shutil.get_terminal_size().columns))


def save(session: Session, argument: str) -> None:
    """/save FILE: write options, prompts and answers as JSON"""
    options = {name: getattr(session.options, name) for name in ("max_tokens", *SAMPLING, *FILLING, "seed")}
    turns = [{key: value for key, value in asdict(turn).items() if key != "tokens"} for turn in session.turns]
    with opening(argument) as path:
        if path.exists():
            read_saved(path, session.options)  # only what /save wrote is written over
        partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        partial.write_text(json.dumps({"options": options, "turns": turns}, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)


def load_saved(session: Session, argument: str) -> None:
    """/load FILE: go on with what /save wrote, options included"""
    with opening(argument) as path:
        session.options, session.turns = read_saved(path, session.options)
    for turn in session.turns:
        turn.tokens = session.voices[0].tokenizer.encode(turn.text)
        print(visible(f"> {turn.prompt}\n{turn.text}"))


def read_saved(path: Path, options: Options) -> tuple[Options, list[Turn]]:
    """What /save wrote, its options over the given ones. Raises ValueError when it is something else."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        turns = [config.from_dict(Turn, turn) for turn in saved["turns"]]
        return config.from_dict(Options, {**asdict(options), **saved["options"]}), turns
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a file that /save wrote ({type(error).__name__}: {error})") from error


def leave(session: Session, argument: str) -> None:
    """/quit: leave, as Ctrl-D does"""
    raise EOFError


COMMANDS: dict[str, Callable[[Session, str], None]] = {
    "/retry": retry,
    "/probs": show_probabilities,
    "/bench": bench,
    "/compare": compare,
    "/set": set_option,
    "/save": save,
    "/load": load_saved,
    "/help": show_help,
    "/quit": leave,
}


def run_command(session: Session, line: str) -> None:
    """Do what a line that begins with a slash says."""
    name, _, argument = line.strip().partition(" ")
    if name not in COMMANDS:
        raise ValueError(config.unknown("command", name, COMMANDS, "/help lists them"))
    COMMANDS[name](session, argument.strip())


# ---- The conversation ------------------------------------------------------------------------------------------------


def converse(session: Session) -> None:
    """Read a text, answer it, until there are no more."""
    read = terminal_reader() if session.interactive else pipe_reader
    while True:
        try:
            line = read("> ")
            if line.startswith("/"):
                run_command(session, line)
            elif (text := whole_text(line, read)).strip():
                session.ask(text)
        except EOFError:
            return
        except KeyboardInterrupt:
            if not session.interactive:
                raise
            print("\n(Ctrl-D or /quit leaves)")
        except ValueError as error:
            remark(f"error: {error}")


def read_prompt(args: Any) -> str | None:
    """The text of --prompt or --prompt_file, without the newline that ends a file."""
    if args.prompt_file is None:
        return args.prompt
    with opening(args.prompt_file) as path:
        text = sys.stdin.read() if args.prompt_file == "-" else path.read_text(encoding="utf-8")
    return text.removesuffix("\n")


def main(args: Any) -> None:
    """Command line."""
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    prompt = read_prompt(args)
    interactive = prompt is None and all(s is not None and s.isatty() for s in (sys.stdin, sys.stdout))
    if args.json and interactive:
        raise ValueError("--json needs --prompt, --prompt_file or a pipe")
    paths = [path for path in (args.checkpoint, args.checkpoint2) if path]
    session = Session(paths, args.options, interactive, args.json)
    if interactive:
        print("\n".join(map(str, session.voices)))
        print("A base model: it continues your text, and knows no questions or turns. /help lists commands.")
    if prompt is None:
        converse(session)
    elif len(paths) > 1 and not args.json:
        side_by_side(session, prompt)
    else:
        seed = session.seed()
        for voice in session.voices:
            session.ask(prompt, seed, voice)
    print(end="", flush=True)  # a closed pipe shows here, inside config.run


if __name__ == "__main__":
    config.run(lambda: main(ARGS))
