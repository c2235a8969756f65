"""nano416/tokenizer.py: the tokens are tiktoken's, and a tokenizer is known by its vocabulary."""

import numpy as np
import pytest
from conftest import shared
from shards import DOCUMENTS, all_tokens, prepare, write_jsonl

from nano416.dataset import TokenDataset
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
