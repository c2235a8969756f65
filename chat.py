"""Talk to a checkpoint: it continues the text you type.

    python chat.py checkpoints                              # a run directory, a checkpoint file or a Hub id
    python chat.py runs/a runs/b                            # two checkpoints, for /compare
    printf 'The sky is\\n/bench\\n' | python chat.py runs/a   # prompts and commands from a pipe
    python chat.py runs/a --prompt="The sky is" --json      # one completion, with its tokens and settings

These are base models: they continue text and know nothing of questions or turns, so each prompt stands alone. /help
lists the commands. Ctrl-C stops a completion, Ctrl-D exits. A prompt of several lines has a backslash at the end of
each line but the last, or \""" before and after it. The history is kept in ~/.local/state/nano416/chat_history.
"""

import codecs
import contextlib
import io
import json
import math
import os
import random
import shutil
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from model import Transformer
from nano416 import checkpoint, cpu_ops
from nano416.config import format_value, from_dict, parse_config, run_cli, unknown_name, visible
from nano416.devices import pick_device
from nano416.generate import Decode, Sampling, decode_cached, decode_uncached, generate, next_logits
from nano416.quantize import CompiledDecoder, bytes_per_token, memory_bandwidth, quantize_
from nano416.tokenizer import Tokenizer

# The prompt of /bench and /compare.
PROMPT = "The meaning of life is"
BENCH_RUNS = 3
BENCH_TOKENS = 128
# Fewer than for /bench: without a cache each token is a forward pass over all of the text before it.
COMPARE_TOKENS = 64
DIFFUSION_OPTIONS = ("steps", "block_length", "remasking", "guidance")
# Far beyond what helps; much larger ones would overflow the logits.
MAX_GUIDANCE = 1000.0
# Characters of a line or prompt, twice as many as fill a context of a million tokens with English.
MAX_PROMPT = 10_000_000
# Options that /set cannot change.
FIXED_OPTIONS = ("checkpoints", "prompt", "prompt_file", "json")
FINISH = {"stop": "end of text", "length": "max_tokens reached", "interrupted": "interrupted"}

Show = Callable[[str], None]
Read = Callable[[str], str]


@dataclass(frozen=True)
class ChatConfig:
    """What the command line sets and /set changes."""

    checkpoints: list[str]  # one or two of: run directory, checkpoint file, Hub id
    prompt: str | None = None  # continue this text and exit
    prompt_file: str | None = None  # continue the text of this file (- = stdin) and exit
    json: bool = False  # print completions as JSON objects, one per line
    max_tokens: int = 200  # maximum number of new tokens
    temperature: float = 0.8  # 0 = greedy
    top_k: int | None = 50  # sample from the k likeliest tokens; none = all
    top_p: float | None = None  # sample from the likeliest tokens that together have this probability; none = all
    min_p: float | None = None  # drop tokens less likely than this times the likeliest one; none = keep all
    repetition_penalty: float | None = None  # above 1: tokens of the context become less likely; none = 1
    seed: int | None = None  # random seed of a completion; none = a new one each time
    steps: int | None = None  # masked diffusion: forward passes per completion; none = one per token
    block_length: int | None = 32  # masked diffusion: tokens per block, filled in from left to right; none = one block
    remasking: Literal["low_confidence", "random"] = "low_confidence"  # masked diffusion: which predictions to redo
    guidance: float = 0.0  # masked diffusion: classifier-free guidance; above 0 follows the prompt more closely
    device: str | None = None  # cpu, cuda, cuda:1, ...; none = cuda if there is one
    dtype: Literal["fp32", "bf16", "int8"] | None = None  # of the weights; none = bf16 on a GPU, fp32 on a CPU
    compile: bool = False  # compile decoding (GPU only): the first token takes a minute, the others much less

    def __post_init__(self) -> None:
        if len(self.checkpoints) > 2:
            raise ValueError(f"expected one or two checkpoints, got {len(self.checkpoints)}")
        if self.prompt is not None and self.prompt_file is not None:
            raise ValueError("--prompt and --prompt_file exclude each other; leave one out")
        if abs(self.guidance) > MAX_GUIDANCE:
            raise ValueError(f"guidance must be from -{MAX_GUIDANCE:g} to {MAX_GUIDANCE:g}, got {self.guidance}")
        # Raises ValueError for what is out of range.
        self.sampling(self.seed or 0)
        for name in ("max_tokens", "steps", "block_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def sampling(self, seed: int) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty, seed)


class LoadedModel(NamedTuple):
    """A checkpoint that is ready to generate text."""

    name: str
    step: int
    model: Transformer
    tokenizer: Tokenizer
    dtype: str
    decode: Decode

    @property
    def is_diffusion(self) -> bool:
        return not self.model.config.causal

    def __str__(self) -> str:
        config = self.model.config
        device = self.model.norm.weight.device
        threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
        return visible(
            f"{self.name}: step {self.step:,}, {config.num_params() / 1e6:.1f}M parameters, {self.tokenizer.name} "
            f"tokenizer, context of {config.seq_len} tokens, {self.dtype} on {device}{threads}"
        )


@dataclass
class Completion:
    """A prompt and what the model made of it."""

    prompt: str
    seed: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: str = "interrupted"  # a key of FINISH


def load_models(cfg: ChatConfig) -> list[LoadedModel]:
    """Load the checkpoints. Raises ValueError if one cannot be read, or if none of them follows an option."""
    models = [load(path, cfg) for path in cfg.checkpoints]
    check_effect(models, cfg)
    return models


def load(path: str, cfg: ChatConfig) -> LoadedModel:
    """Load a checkpoint on the configured device, with weights of the configured dtype. Raises ValueError."""
    device = pick_device(cfg.device)
    if cfg.compile and device.type != "cuda":
        raise ValueError(f"compile = true is for a GPU, the device is {device}; leave it out")
    model, tokenizer, metadata = checkpoint.load_model_and_tokenizer(path, device)
    dtype = cfg.dtype or ("fp32" if device.type == "cpu" else "bf16")
    quantize_(model, dtype)
    # The best number of threads depends on the model and the machine. A number that the user has set is kept.
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # A step of masked diffusion processes the whole text, a step of decoding one token.
        n_tokens = 1 if model.config.causal else min(64, model.config.seq_len)
        cpu_ops.choose_threads(lambda: next_logits(model, [0] * n_tokens))
    decode = CompiledDecoder(model).decode if cfg.compile else decode_cached
    return LoadedModel(metadata["path"], metadata["step"], model, tokenizer, dtype, decode)


def check_effect(models: list[LoadedModel], cfg: ChatConfig) -> None:
    """Raise ValueError for an option that has no effect on any of the models."""
    # Options that were not given cannot be told from options given their default, which do no harm.
    defaults = ChatConfig(cfg.checkpoints)
    for name in (*DIFFUSION_OPTIONS, "repetition_penalty"):
        for_diffusion = name in DIFFUSION_OPTIONS
        is_changed = getattr(cfg, name) != getattr(defaults, name)
        if is_changed and all(loaded.is_diffusion != for_diffusion for loaded in models):
            kind = "autoregressive" if for_diffusion else "masked-diffusion"
            raise ValueError(f"{name} has no effect on {kind} checkpoints; leave it out")


# ---- Generation ------------------------------------------------------------------------------------------------------


def respond(loaded: LoadedModel, prompt: str, cfg: ChatConfig, seed: int, show: Show) -> Completion:
    """Continue `prompt`, calling `show` with each piece of text as soon as its characters are complete.

    Ctrl-C ends the completion early. Raises ValueError for an empty prompt.
    """
    if not prompt:
        raise ValueError("the prompt is empty; the model needs a text to continue")
    prompt_tokens = encode(loaded, prompt)
    if loaded.is_diffusion:
        new_tokens = decided_tokens(loaded, generate_diffusion(loaded, prompt_tokens, cfg, seed))
    else:
        new_tokens = generate(loaded.model, prompt_tokens, cfg.max_tokens, cfg.sampling(seed), loaded.decode)
    completion = Completion(prompt, seed)
    # A token may end in the middle of a character, whose bytes wait here for the next token.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    with contextlib.suppress(KeyboardInterrupt):
        for token in new_tokens:
            if token == loaded.tokenizer.eot_id:
                completion.finish = "stop"
                break
            completion.tokens.append(token)
            text = decoder.decode(loaded.tokenizer.token_bytes(token))
            completion.text += text
            show(text)
        else:
            completion.finish = "length"
        text = decoder.decode(b"", final=True)
        completion.text += text
        show(text)
    return completion


def encode(loaded: LoadedModel, text: str) -> list[int]:
    """The tokens of `text`; if they exceed the model's context, the last ones."""
    tokens = loaded.tokenizer.encode(text)
    seq_len = loaded.model.config.seq_len
    excess = len(tokens) - seq_len
    if excess > 0:
        warn(f"(prompt of {len(tokens)} tokens, context of {seq_len}: the first {excess} are cut off)")
    return tokens[-seq_len:]


def generate_diffusion(loaded: LoadedModel, prompt: list[int], cfg: ChatConfig, seed: int) -> Iterator[list[int]]:
    """Yield all new tokens after each step of masked diffusion; undecided ones are the mask token."""
    from nano416 import diffusion

    prompt, max_tokens = diffusion.fit_to_context(loaded.model, prompt, cfg.max_tokens)
    if max_tokens < cfg.max_tokens:
        warn(f"(only {max_tokens} new tokens: with the prompt they fill the context of {loaded.model.config.seq_len})")
    sampling = replace(cfg.sampling(seed), stop_token=loaded.tokenizer.eot_id)
    denoise_cfg = diffusion.DenoiseConfig(cfg.steps, cfg.block_length, cfg.remasking, cfg.guidance)
    yield from diffusion.denoise(loaded.model, prompt, max_tokens, sampling, denoise_cfg)


def decided_tokens(loaded: LoadedModel, states: Iterator[list[int]]) -> Iterator[int]:
    """Yield the tokens of a masked diffusion from left to right, each as soon as all before it are decided."""
    n_decided = 0
    for tokens in states:
        # The mask token is the first one after the vocabulary.
        while n_decided < len(tokens) and tokens[n_decided] < loaded.model.config.vocab_size:
            yield tokens[n_decided]
            n_decided += 1


@torch.inference_mode()
def token_logprobs(loaded: LoadedModel, prompt: list[int], tokens: list[int]) -> list[float]:
    """log p in nats of each of `tokens`, given all tokens before it; of the last ones if not all fit the context."""
    seq_len = loaded.model.config.seq_len
    if loaded.is_diffusion:
        from nano416 import diffusion

        prompt = prompt[-max(1, seq_len - len(tokens)) :]
        return diffusion.log_likelihood(loaded.model, prompt, tokens)[0].tolist()
    # One more than the context holds: the last token is only predicted.
    text = torch.tensor([prompt + tokens], device=loaded.model.norm.weight.device)[:, -seq_len - 1 :]  # [1, T + 1]
    logprobs = loaded.model(text[:, :-1]).float().log_softmax(-1)  # [1, T, V]
    return logprobs.gather(-1, text[:, 1:, None]).flatten()[-len(tokens) :].tolist()


class Session:
    """The options, the loaded models and the last completion."""

    def __init__(self, cfg: ChatConfig, interactive: bool = False):
        self.cfg = cfg
        self.models = load_models(cfg)
        self.interactive = interactive
        self.last: Completion | None = None

    def ask(self, prompt: str, seed: int | None = None, loaded: LoadedModel | None = None) -> None:
        """Print a completion as it is generated, by default the first model's with `next_seed`."""
        loaded = loaded or self.models[0]
        seed = self.next_seed() if seed is None else seed
        started = time.monotonic()
        completion = respond(loaded, prompt, self.cfg, seed, ignore if self.cfg.json else stream_text)
        tokens_per_s = len(completion.tokens) / (time.monotonic() - started)
        self.last = completion
        if self.cfg.json:
            options = {name: value for name, value in asdict(self.cfg).items() if name not in FIXED_OPTIONS}
            origin = {"checkpoint": loaded.name, "step": loaded.step, "options": options}
            print(json.dumps({**asdict(completion), "tokens_per_s": round(tokens_per_s, 1), **origin}), flush=True)
        else:
            print(flush=True)
        if self.interactive:
            print(f"({len(completion.tokens)} tokens, {tokens_per_s:.1f}/s, {FINISH[completion.finish]})")
        elif completion.finish == "interrupted":
            raise KeyboardInterrupt

    def next_seed(self) -> int:
        """Seed of the next completion: --seed, or a random one."""
        return random.randrange(2**31) if self.cfg.seed is None else self.cfg.seed


# ---- Measurements ----------------------------------------------------------------------------------------------------


def time_generate(
    loaded: LoadedModel, prompt: list[int], n_tokens: int, decode: Decode
) -> tuple[list[int], float, float]:
    """Generate greedily: (tokens, seconds to the first one (prefill), seconds for the others (decode))."""
    tokens = []
    first = 0.0
    started = time.perf_counter()
    for token in generate(loaded.model, prompt, n_tokens, Sampling(temperature=0), decode):
        first = first or time.perf_counter()
        tokens.append(token)
    return tokens, first - started, time.perf_counter() - first


def time_diffusion(loaded: LoadedModel, prompt: list[int], cfg: ChatConfig) -> tuple[list[int], int, float]:
    """Generate by masked diffusion: (tokens up to the end of text, number of steps, seconds)."""
    started = time.perf_counter()
    states = list(generate_diffusion(loaded, prompt, cfg, cfg.seed or 0))
    seconds = time.perf_counter() - started
    tokens = states[-1]
    if loaded.tokenizer.eot_id in tokens:
        tokens = tokens[: tokens.index(loaded.tokenizer.eot_id)]
    return tokens, len(states), seconds


def bench_autoregressive(loaded: LoadedModel, prompt: list[int], cfg: ChatConfig) -> dict[str, float]:
    _, prefill_s, decode_s = time_generate(loaded, prompt, cfg.max_tokens, loaded.decode)
    return {
        "prefill ms": 1000 * prefill_s,
        "prefill tokens/s": len(prompt) / prefill_s,
        "decode tokens/s": (cfg.max_tokens - 1) / decode_s,
    }


def bench_diffusion(loaded: LoadedModel, prompt: list[int], cfg: ChatConfig) -> dict[str, float]:
    tokens, n_steps, seconds = time_diffusion(loaded, prompt, cfg)
    return {"steps": n_steps, "ms per step": 1000 * seconds / n_steps, "tokens/s": len(tokens) / seconds}


def bench(session: Session, argument: str) -> None:
    # At least two tokens: the first one counts as prefill.
    cfg = replace(session.cfg, max_tokens=max(2, min(session.cfg.max_tokens, BENCH_TOKENS)))
    for loaded in session.models:
        print(loaded)
        prompt = encode(loaded, argument or PROMPT)
        measure = bench_diffusion if loaded.is_diffusion else bench_autoregressive
        # The first run is not counted: it allocates the memory and perhaps compiles.
        warm_up = measure(loaded, prompt, cfg)
        print(f"prompt of {len(prompt)} tokens, {cfg.max_tokens} new tokens")
        print(f"{'run':>6}" + "".join(f"{name:>18}" for name in warm_up), flush=True)
        runs = []
        for run in range(1, BENCH_RUNS + 1):
            runs.append(list(measure(loaded, prompt, cfg).values()))
            print(f"{run:>6}" + "".join(f"{value:18.1f}" for value in runs[-1]), flush=True)
        medians = [statistics.median(column) for column in zip(*runs)]
        print("median" + "".join(f"{value:18.1f}" for value in medians), flush=True)
        if not loaded.is_diffusion:
            print(bandwidth_line(loaded, medians[-1]), flush=True)


def bandwidth_line(loaded: LoadedModel, tokens_per_s: float) -> str:
    """How close a decoding speed comes to the limit of the memory: all weights are read once per token."""
    weights = bytes_per_token(loaded.model, loaded.dtype)
    bandwidth = memory_bandwidth(loaded.model.norm.weight.device)
    limit = bandwidth / weights
    return (
        f"{weights / 1e6:.1f} MB of weights per token from a memory with {bandwidth / 1e9:.1f} GB/s: "
        f"at most {limit:.1f} tokens/s, {tokens_per_s / limit:.0%} reached"
    )


def compare(session: Session, argument: str) -> None:
    prompt = argument or PROMPT
    cfg = replace(session.cfg, max_tokens=min(session.cfg.max_tokens, COMPARE_TOKENS))
    for loaded in session.models:
        print(loaded, flush=True)
        if loaded.is_diffusion:
            # An autoregressive model with the same tokenizer is the better judge: few models object to their own text.
            others = [m for m in session.models if not m.is_diffusion and m.tokenizer.name == loaded.tokenizer.name]
            compare_steps(loaded, prompt, cfg, judge=others[0] if others else loaded)
        else:
            compare_cache(loaded, encode(loaded, prompt), cfg.max_tokens)
    if len(session.models) > 1:
        side_by_side(session, prompt)


def compare_cache(loaded: LoadedModel, prompt: list[int], n_tokens: int) -> None:
    """Print the speed without and with a KV cache, and whether both give the same tokens."""
    seconds = []
    texts = []
    for name, decode in (("without KV cache", decode_uncached), ("with KV cache", loaded.decode)):
        # A short run to warm up.
        time_generate(loaded, prompt, 2, decode)
        tokens, prefill_s, decode_s = time_generate(loaded, prompt, n_tokens, decode)
        seconds.append(prefill_s + decode_s)
        texts.append(tokens)
        # Where two tokens are almost equally likely, rounding may decide differently.
        differences = [i for i in range(n_tokens) if texts[0][i] != tokens[i]]
        agreement = f"greedy tokens differ from token {differences[0] + 1} on" if differences else "same greedy tokens"
        print(
            f"{name:>16} {n_tokens} tokens in {seconds[-1]:.2f} s = {n_tokens / seconds[-1]:.1f} tokens/s, "
            f"{seconds[0] / seconds[-1]:.2f}x, {agreement}",
            flush=True,
        )
    print(bandwidth_line(loaded, n_tokens / seconds[-1]), flush=True)


def compare_steps(loaded: LoadedModel, prompt: str, cfg: ChatConfig, judge: LoadedModel) -> None:
    """Print speed and quality with 1 to 1/16 steps per token.

    Fewer steps are faster and worse: tokens decided in the same step are predicted independently of each other.
    """
    print(f"nats per token: loss of {visible(judge.name)} on the new tokens\n steps   tokens/s   nats per token")
    steps = cfg.max_tokens
    while steps >= max(1, cfg.max_tokens // 16):
        tokens, n_steps, seconds = time_diffusion(loaded, encode(loaded, prompt), replace(cfg, steps=steps))
        logprobs = token_logprobs(judge, judge.tokenizer.encode(prompt), tokens) if tokens else [math.nan]
        loss = -statistics.mean(logprobs)
        text = loaded.tokenizer.decode(tokens)
        print(f"{n_steps:6} {len(tokens) / seconds:10.1f} {loss:16.3f}   {text!r}", flush=True)
        steps //= 2


# ---- Commands --------------------------------------------------------------------------------------------------------


def side_by_side(session: Session, prompt: str) -> None:
    """Print the completions of both models in two columns, with the same options and seed."""
    seed = session.next_seed()
    texts = []
    for loaded in session.models:
        completion = respond(loaded, prompt, session.cfg, seed, ignore)
        if completion.finish == "interrupted":
            raise KeyboardInterrupt
        texts.append(visible(f"{loaded.name}\n\n{prompt}{completion.text}"))
    print(columns(texts, shutil.get_terminal_size().columns))


def columns(texts: list[str], width: int) -> str:
    """The texts side by side, wrapped so that a line has at most `width` characters."""
    column_width = max(10, (width - 3 * (len(texts) - 1)) // len(texts))
    wrapped = []
    for text in texts:
        paragraphs = [textwrap.fill(line, column_width) for line in text.split("\n")]
        wrapped.append("\n".join(paragraphs).split("\n"))
    rows = zip_longest(*wrapped, fillvalue="")
    return "\n".join(" | ".join(cell.ljust(column_width) for cell in row).rstrip() for row in rows)


def retry(session: Session, argument: str) -> None:
    if session.last is None:
        raise ValueError("there is no completion yet; type a prompt first")
    session.ask(session.last.prompt, (session.last.seed + 1) % 2**63)


def show_probabilities(session: Session, argument: str) -> None:
    if session.last is None or not session.last.tokens:
        raise ValueError("there is no completion yet; type a prompt first")
    loaded = session.models[0]
    tokens = session.last.tokens
    logprobs = token_logprobs(loaded, loaded.tokenizer.encode(session.last.prompt), tokens)
    if len(logprobs) < len(tokens):
        warn(f"(the first {len(tokens) - len(logprobs)} tokens are no longer in the context)")
    for logprob, token in zip(logprobs, tokens[-len(logprobs) :]):
        print(f"{math.exp(logprob):.4f} {loaded.tokenizer.decode([token])!r}")


def set_option(session: Session, argument: str) -> None:
    name, _, value = argument.replace("=", " ", 1).partition(" ")
    name = name.strip("-").replace("-", "_")  # --top-k, as on the command line
    options = asdict(session.cfg)
    names = [option for option in options if option not in FIXED_OPTIONS]
    if name and name not in names:
        raise ValueError(unknown_name("option", name, names, "/set lists them"))
    if not value:
        for option in [name] if name else names:
            print(f"{option} {format_value(options[option])}")
        return
    cfg = from_dict(ChatConfig, {**options, name: value.strip()})
    if name in ("device", "dtype", "compile") and cfg != session.cfg:
        session.models = load_models(cfg)
    check_effect(session.models, cfg)
    session.cfg = cfg


def show_help(session: Session, argument: str) -> None:
    for name, command in COMMANDS.items():
        print(f"{name + ' ' + command.argument:20} {command.help}")
    print("Anything else is text to continue; put a space before text that starts with a slash.")


def quit(session: Session, argument: str) -> None:
    raise EOFError


class Command(NamedTuple):
    run: Callable[[Session, str], None]
    argument: str
    help: str


COMMANDS = {
    "/retry": Command(retry, "", "another completion of the last prompt, with the next seed"),
    "/probs": Command(show_probabilities, "", "the probability of each token of the last completion"),
    "/bench": Command(bench, "[PROMPT]", "measure the speed of prefill (reading the prompt) and decode (writing)"),
    "/compare": Command(compare, "[PROMPT]", "speed with and without KV cache, or with fewer steps; both checkpoints"),
    "/set": Command(set_option, "[NAME [VALUE]]", "change an option, as in /set temperature 0.7, or show its value"),
    "/help": Command(show_help, "", "this list"),
    "/quit": Command(quit, "", "exit, as Ctrl-D does"),
}


def run_command(session: Session, line: str) -> None:
    """Run the command of a line that begins with a slash. Raises ValueError if it is unknown or misused."""
    name, _, argument = line.strip().partition(" ")
    if name not in COMMANDS:
        raise ValueError(unknown_name("command", name, COMMANDS, "/help lists them"))
    if argument and not COMMANDS[name].argument:
        raise ValueError(f"{name} takes no argument, got {argument.strip()!r}")
    COMMANDS[name].run(session, argument.strip())


# ---- Input and output ------------------------------------------------------------------------------------------------


def stream_text(text: str) -> None:
    print(visible(text), end="", flush=True)


def ignore(text: str) -> None:
    """Show nothing: for completions that are printed as a whole."""


def warn(text: str) -> None:
    """Print one line to stderr."""
    print(visible(" ".join(text.split())), file=sys.stderr, flush=True)


def terminal_reader() -> Read:
    """input() with line editing and a history, which is saved where a file can be written."""
    try:
        import readline
    except ImportError:
        # Python for Windows has no readline.
        return input
    state_home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    history = Path(state_home) / "nano416/chat_history"
    readline.set_history_length(1000)
    with contextlib.suppress(OSError):
        history.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        readline.read_history_file(history)

    def read(prompt: str) -> str:
        try:
            line = input(prompt)
        except EOFError:
            # Ctrl-D leaves the cursor behind the prompt.
            print()
            raise
        # After each line: when the window is closed it is too late.
        with contextlib.suppress(OSError):
            readline.write_history_file(history)
        return line

    return read


def pipe_reader(prompt: str) -> str:
    """The next line of stdin, without showing a prompt. Raises EOFError, or ValueError if the line is too long."""
    if sys.stdin is None:
        raise EOFError
    line = sys.stdin.readline(MAX_PROMPT + 1)
    if not line:
        raise EOFError
    if len(line) > MAX_PROMPT and not line.endswith("\n"):
        # The rest of the line must not be taken for the next prompt.
        while line and not line.endswith("\n"):
            line = sys.stdin.readline(MAX_PROMPT)
        raise ValueError(too_long("a line"))
    return line.removesuffix("\n")


def too_long(what: str) -> str:
    return f"{what} has more than {MAX_PROMPT:,} characters; give only the end of the text, which fits the context"


def read_rest(line: str, read: Read) -> str:
    """The whole prompt that begins with `line`: up to the closing quotes, or to a line without a final backslash.

    Raises ValueError if it is too long, once all of it is read.
    """
    quoted = line.startswith('"""')
    lines = [line[3:] if quoted else line]
    length = 0
    # If the input ends first, the prompt ends there.
    with contextlib.suppress(EOFError):
        while not lines[-1].endswith('"""') if quoted else lines[-1].endswith("\\"):
            length += len(lines[-1]) + 1
            if length > MAX_PROMPT:
                lines.clear()
            lines.append(read("... "))
    if length > MAX_PROMPT or length + len(lines[-1]) > MAX_PROMPT:
        raise ValueError(too_long("the prompt"))
    if quoted:
        return "\n".join(lines).removesuffix('"""')
    ending = "\n" if lines[-1].endswith("\\") else ""
    return "\n".join(line.removesuffix("\\") for line in lines) + ending


def repl(session: Session) -> None:
    """Read prompts, which the model continues, and commands until the input ends."""
    read = terminal_reader() if session.interactive else pipe_reader
    while True:
        try:
            line = read("> ")
            if line.startswith("/"):
                run_command(session, line)
                continue
            prompt = read_rest(line, read)
            if prompt.strip():
                session.ask(prompt)
        except EOFError:
            return
        except KeyboardInterrupt:
            if not session.interactive:
                raise
            print("\n(Ctrl-D or /quit exits)")
        except ValueError as error:
            warn(f"error: {error}")


def read_prompt(cfg: ChatConfig) -> str | None:
    """The text of --prompt or --prompt_file, without the newline that ends a file."""
    if cfg.prompt_file is None:
        return cfg.prompt
    # One character more than allowed tells a file that is too long, and /dev/zero, from others.
    limit = MAX_PROMPT + 1
    try:
        if cfg.prompt_file == "-":
            text = sys.stdin.read(limit) if sys.stdin is not None else ""
        else:
            with open(cfg.prompt_file, encoding="utf-8") as file:
                text = file.read(limit)
    except OSError as error:
        raise ValueError(f"cannot open {cfg.prompt_file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{cfg.prompt_file} is not UTF-8 text") from error
    if len(text) > MAX_PROMPT:
        raise ValueError(too_long(cfg.prompt_file))
    return text.removesuffix("\n")


def main(cfg: ChatConfig) -> None:
    """Continue the one prompt of the command line, or start the REPL."""
    # Replace or escape what is not UTF-8 or cannot be shown, where Python would raise UnicodeError.
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    prompt = read_prompt(cfg)
    interactive = prompt is None and all(s is not None and s.isatty() for s in (sys.stdin, sys.stdout))
    if cfg.json and interactive:
        raise ValueError("--json needs --prompt, --prompt_file or a pipe")
    session = Session(cfg, interactive)
    if interactive:
        print("\n".join(map(str, session.models)))
        print("A base model: it continues your text and knows nothing of questions or turns. /help lists the commands.")
    if prompt is None:
        repl(session)
    elif len(session.models) > 1 and not cfg.json:
        side_by_side(session, prompt)
    else:
        seed = session.next_seed()
        for loaded in session.models:
            session.ask(prompt, seed, loaded)
    # Flushed here, since run_cli handles the error of a pipe that was closed; at exit it would be a traceback.
    print(end="", flush=True)


if __name__ == "__main__":
    run_cli(lambda: main(parse_config(ChatConfig)))
