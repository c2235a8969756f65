"""nano416/tokenizer.py: the tokens are tiktoken's, and a tokenizer is known by its vocabulary."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import shared
from shards import DOCUMENTS, all_tokens, prepare, write_jsonl

from nano416.dataset import TokenDataset
from nano416.encode import Encoder, EncoderOptions, choose_encoder
from nano416.tokenizer import GPT2, fast_encoder, load_tokenizer


@pytest.fixture
def gpt2(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared("tiktoken_cache")))
    return load_tokenizer("gpt2")


def test_bytes_are_their_own_tokens():
    tokenizer = load_tokenizer("bytes")
    text = "a é 猫 <|endoftext|>\x00"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.encode_array(text).tolist() == list(text.encode())
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (257, 256)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([0xE7, 0x8C]) == "\ufffd"
    assert tokenizer.byte_lengths().tolist() == [1] * 256 + [0]


def test_gpt2_is_tiktokens_and_text_never_becomes_its_end_of_text(gpt2):
    assert gpt2.info() == GPT2
    assert gpt2.encode("Hello world<|endoftext|>")[:2] == [15496, 995]
    assert gpt2.eot_id not in gpt2.encode("<|endoftext|>")
    assert gpt2.byte_lengths()[[15496, 995, 50256]].tolist() == [5, 6, 0]


def test_a_lone_surrogate_is_the_replacement_character(gpt2):
    encode_bytes = fast_encoder(load_tokenizer("bytes"))
    assert encode_bytes
    for encode in gpt2.encode, gpt2.encode_array, encode_bytes:
        assert list(encode("a\ud800b")) == list(encode("a\ufffdb"))


def test_an_id_without_text_is_shown_as_its_number(gpt2):
    assert gpt2.decode([15496, 50300]) == "Hello<token 50300>"


def test_another_vocabulary_of_the_same_name_is_refused():
    with pytest.raises(ValueError, match=r"'bytes'.*000000000000"):
        load_tokenizer({"name": "bytes", "sha256": "0" * 64})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt3", "unknown tokenizer 'gpt3'; known are bytes"),
        ("none/tokenizer.json", "none/tokenizer.json does not exist"),
    ],
)
def test_a_tokenizer_that_does_not_exist_is_named(name, message):
    pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match=message):
        load_tokenizer(name)


def test_gigatoken_gives_the_tokens_of_tiktoken(gpt2):
    pytest.importorskip("gigatoken")
    encode = fast_encoder(gpt2)
    assert encode
    for text in DOCUMENTS:
        assert np.array_equal(encode(text), gpt2.encode_array(text))


def test_characters_that_only_one_encoder_knows_are_left_to_tiktoken(gpt2):
    """gigatoken and tiktoken have different versions of Unicode."""
    pytest.importorskip("gigatoken")
    encoder = Encoder(choose_encoder(EncoderOptions("gpt2", "text"), []))
    assert encoder.is_fast
    plain = fast_encoder(gpt2)
    assert plain
    characters = [chr(code) for code in range(0x80, 0x40000, 13) if not 0xD800 <= code < 0xE000]
    n_different = 0
    for context in "a{}a", " {} ", "7{}7", "{}'s", "'{}'ll":
        text = "\n".join(context.format(character) for character in characters)
        assert all(np.array_equal(encoder.encode_text(line), gpt2.encode_array(line)) for line in text.split("\n")[::7])
        assert np.array_equal(encoder.encode_text(text), gpt2.encode_array(text))
        n_different += not np.array_equal(plain(text), gpt2.encode_array(text))
    assert n_different


@pytest.mark.parametrize("run", [" ", "\t", " \t"])
def test_a_million_spaces_before_a_word_are_encoded(gpt2, run):
    """tiktoken alone gives up: Max stack size exceeded for backtracking."""
    text = "one" + run * (1_200_000 // len(run)) + "two"
    tokens = gpt2.encode_array(text)
    assert gpt2.decode(tokens) == text
    short = "one" + run * (120_000 // len(run)) + "two"
    assert tokens[:50].tolist() == gpt2.encode(short)[:50]
    assert tokens[-50:].tolist() == gpt2.encode(short)[-50:]


# ---- tokenizer.json --------------------------------------------------------------------------------------------------


@pytest.fixture
def byte_level_bpe(tmp_path):
    """A trained tokenizer of the package `tokenizers`, and its file."""
    tokenizers = pytest.importorskip("tokenizers")
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|pad|>", "<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(DOCUMENTS, trainer)
    trained.save(str(tmp_path / "tokenizer.json"))
    return trained, tmp_path / "tokenizer.json"


def test_a_tokenizer_json_encodes_and_decodes_any_text(byte_level_bpe):
    trained, path = byte_level_bpe
    tokenizer = load_tokenizer(str(path))
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (trained.get_vocab_size(), 1)
    for text in DOCUMENTS[:20]:
        tokens = tokenizer.encode(text)
        assert tokenizer.eot_id not in tokens  # though the text spells it
        assert tokenizer.decode(tokens) == text
        assert tokenizer.byte_lengths()[tokens].sum() == len(text.encode())


def test_truncation_and_padding_of_a_tokenizer_json_do_not_apply_to_documents(byte_level_bpe):
    trained, path = byte_level_bpe
    expected = load_tokenizer(str(path)).encode(DOCUMENTS[1])
    trained.enable_truncation(4)
    trained.enable_padding(length=500)
    trained.save(str(path))
    assert load_tokenizer(str(path)).encode(DOCUMENTS[1]) == expected


def test_a_dataset_made_with_a_tokenizer_json_knows_it_by_its_content(byte_level_bpe, tmp_path):
    trained, path = byte_level_bpe
    prepare(write_jsonl(tmp_path / "x.jsonl", DOCUMENTS), tmp_path / "d", tokenizer=str(tmp_path), val_tokens=0)
    tokens = all_tokens(tmp_path / "d", "train").tolist()
    assert load_tokenizer(str(path)).decode(tokens) == "".join(text + "<|endoftext|>" for text in DOCUMENTS)
    info = TokenDataset(tmp_path / "d").tokenizer
    assert load_tokenizer(info).vocab_size == trained.get_vocab_size()
    trained.add_tokens(["another"])
    trained.save(str(path))
    with pytest.raises(ValueError, match="was made with"):
        load_tokenizer(info)


def test_sentencepiece_pieces_are_spaces_and_bytes(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {"</s>": 0, "<0x0A>": 1, "\u2581a": 2, "b": 3}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    model.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).decode([2, 3, 1]) == " ab\n"


# ---- Tokenizers that change the text ---------------------------------------------------------------------------------


def write_tokenizer(path: Path, model=None, **parts) -> Path:
    """A byte-level BPE of the 256 bytes, or a tokenizer of another model, with some parts exchanged."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "</s>"])}
    tokenizer = tokenizers.Tokenizer(model or tokenizers.models.BPE(vocab, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.save(str(path / "tokenizer.json"))
    return path / "tokenizer.json"


def lossy(case: str, path: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    models, normalizers, pre_tokenizers = tokenizers.models, tokenizers.normalizers, tokenizers.pre_tokenizers
    words = {"[UNK]": 0, "</s>": 1, "a": 2, "##a": 3}
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((chr(code), -1.0) for code in range(33, 127)), ("\u2581", -1.0)]
    match case:
        case "WordPiece":
            return write_tokenizer(
                path, models.WordPiece(words, unk_token="[UNK]"), pre_tokenizer=pre_tokenizers.BertPreTokenizer()
            )
        case "WordLevel":
            return write_tokenizer(
                path, models.WordLevel(words, unk_token="[UNK]"), pre_tokenizer=pre_tokenizers.Whitespace()
            )
        case "Unigram without bytes":
            unigram = models.Unigram(pieces, unk_id=0)
            return write_tokenizer(path, unigram, pre_tokenizer=pre_tokenizers.Metaspace(), decoder=None)
        case "a removed character":
            removal = pre_tokenizers.Split(tokenizers.Regex(r"\s"), "removed")
            return write_tokenizer(path, pre_tokenizer=pre_tokenizers.Sequence([removal, pre_tokenizers.ByteLevel()]))
        case "StripAccents":
            accents = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
            return write_tokenizer(path, normalizer=accents)
        case "Replace":
            return write_tokenizer(path, normalizer=normalizers.Replace(tokenizers.Regex("[2-9]"), "0"))
        case _:
            return write_tokenizer(path, normalizer=getattr(normalizers, case)())


LOSSY = {
    "WordPiece": "spaces",
    "WordLevel": "spaces",
    "Unigram without bytes": "line breaks",
    "a removed character": "spaces",
    "Lowercase": "capitals",
    "StripAccents": "accents",
    "NFKC": "typographic",
    "Strip": "spaces",
    "BertNormalizer": "line breaks",
    "Replace": "digits",
}


@pytest.mark.parametrize("case", LOSSY)
def test_a_tokenizer_that_loses_text_is_refused_for_preparing_and_still_decodes(case, tmp_path):
    path = lossy(case, tmp_path)
    source = write_jsonl(tmp_path / "x.jsonl", DOCUMENTS)
    with pytest.raises(ValueError, match=f"loses {LOSSY[case]}.* comes back as .*; use one that") as error:
        prepare(source, tmp_path / "d", tokenizer=str(path))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "d").exists()
    # Datasets and checkpoints that were made with it are still read.
    assert load_tokenizer(load_tokenizer(str(path)).info()).decode([2])
    # As are ids, which somebody else has made.
    Encoder(EncoderOptions(f"passthrough:{path}", "ids"))


@pytest.mark.parametrize("name", ["llama2", "first space", "no space"])
def test_sentencepiece_tokenizers_may_put_a_space_before_a_text(sentencepiece_bpe, name):
    Encoder(EncoderOptions(str(sentencepiece_bpe(name)), "text"))


def test_canonically_equal_text_is_the_same_text(tmp_path):
    """Qwen's tokenizers normalize to NFC."""
    normalizers = pytest.importorskip("tokenizers").normalizers
    for normalizer in normalizers.NFC(), normalizers.NFD():
        Encoder(EncoderOptions(str(write_tokenizer(tmp_path, normalizer=normalizer)), "text"))


@pytest.mark.parametrize("special", [True, False])
def test_text_that_spells_the_end_token_does_not_end_its_document(special, tmp_path):
    path = write_tokenizer(tmp_path)
    data = json.loads(path.read_text())
    data["added_tokens"][0]["special"] = special
    path.write_text(json.dumps(data))
    texts = ["one </s> two", "</s>", "a</s>b\n</s></s>"]
    prepare(write_jsonl(tmp_path / "x.jsonl", texts), tmp_path / "d", tokenizer=str(path), val_tokens=0)
    tokens = all_tokens(tmp_path / "d", "train")
    tokenizer = load_tokenizer(str(path))
    assert np.count_nonzero(tokens == tokenizer.eot_id) == len(texts)
    assert tokenizer.decode(tokens.tolist()) == "".join(text + "</s>" for text in texts)


def test_an_end_token_that_is_an_ordinary_word_is_refused(tmp_path):
    """Here the merges of ordinary text build it."""
    models = pytest.importorskip("tokenizers").models
    alphabet = sorted(pytest.importorskip("tokenizers").pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "</", "</s", "</s>"])}
    path = write_tokenizer(tmp_path, models.BPE(vocab, [("<", "/"), ("</", "s"), ("</s", ">")]))
    data = json.loads(path.read_text())
    data["added_tokens"] = []
    data["pre_tokenizer"]["use_regex"] = False
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="ends a document where its text spells '</s>'"):
        prepare(write_jsonl(tmp_path / "x.jsonl", DOCUMENTS), tmp_path / "d", tokenizer=str(path))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_text_on_which_a_tokenizer_panics_is_a_fault_of_its_record(workers, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    # A regular expression that takes exponential time on a row of x.
    bomb = tokenizers.pre_tokenizers.Split(tokenizers.Regex("(x+x+)+y"), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    path = write_tokenizer(tmp_path, pre_tokenizer=tokenizers.pre_tokenizers.Sequence([bomb, byte_level]))
    source = write_jsonl(tmp_path / "x.jsonl", ["one", "x" * 40, "two", "x" * 50, "three"])
    options = {"tokenizer": str(path), "workers": workers, "val_tokens": 0}
    with pytest.raises(ValueError, match=r"x\.jsonl:2: tokenizer .*retry-limit-in-match"):
        prepare(source, tmp_path / "d", **options)
    prepare(source, tmp_path / "d", on_error="skip", **options)
    text = load_tokenizer(str(path)).decode(all_tokens(tmp_path / "d", "train").tolist())
    assert text == "one</s>two</s>three</s>"


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"null", b"{\xff", b'{"model": 1}', b"[" * 100_000, b'{"added_tokens": 5}']
)
def test_a_file_that_is_no_tokenizer_is_one_line(content, tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json") as error:
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert "\n" not in str(error.value)


def test_a_recorded_model_id_is_looked_up_in_the_cache_only(tmp_path, monkeypatch):
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "<|endoftext|>": 1}, [])).save(str(path))
    info = {**load_tokenizer(str(path)).info(), "name": "somebody/model"}
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: pytest.fail("the Hub was asked"))
    with pytest.raises(ValueError, match=r"is not on this machine; .*hf download somebody/model tokenizer\.json"):
        load_tokenizer(info)
    with pytest.raises(ValueError, match="is not the name of a Hub repository"):
        load_tokenizer({**info, "name": "a/b/$(c)"})
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(path))
    assert load_tokenizer(info).encode("aa") == [0, 0]


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_a_tokenizer_that_is_not_a_file_is_refused_and_not_read_forever(make, tmp_path):
    make(tmp_path / "tokenizer.json")
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(ValueError, match="cannot load tokenizer"):
            load_tokenizer(str(name))
