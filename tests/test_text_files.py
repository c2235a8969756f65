"""nano416/text_files.py: pieces of a text give its tokens, in bounded memory; a damaged file is one line."""

import bz2
import gzip
import json
import lzma
import random
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tiktoken
from conftest import shared
from shards import DOCUMENTS, all_tokens, prepare, texts_of
from tiktoken_ext import openai_public

from nano416 import encode, text_files
from nano416.text_files import CUTS, Chunk, find_cut, read_chunks


def pieces_of(path: Path) -> list[bytes]:
    return [record for chunk in read_chunks([str(path)], "text") for record in chunk.records]


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


# ---- Where a text is cut ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encodings() -> list[tiktoken.Encoding]:
    """The splitting rules of tiktoken's encodings, with GPT-2's vocabulary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(shared("tiktoken_cache")))
        gpt2 = tiktoken.get_encoding("gpt2")
    with mock.patch.object(openai_public, "load_tiktoken_bpe", lambda *_, **__: {}):
        rules = [getattr(openai_public, name)()["pat_str"] for name in ("cl100k_base", "o200k_base")]
    return [
        tiktoken.Encoding("test", pat_str=rule, mergeable_ranks=gpt2._mergeable_ranks, special_tokens={})
        for rule in (gpt2._pat_str, *rules)
    ]


CHARACTERS = [
    "a",
    "B",
    "7",
    "'s",
    "'",
    "!",
    "/",
    "_",
    "\n",
    "\r",
    "\r\n",
    " ",
    "  ",
    "\t",
    "\x0b",
    "\x1c",
    "\x85",
    "\xa0",
]
CHARACTERS += ["\u3000", "\u2028", "\u200b", "é", "\u0301", "²", "Ⅷ", "ſ", "猫", "を", "。", "，", "ह", "ि", "٣", "😀"]


@pytest.mark.parametrize("number", range(len(CUTS)))
def test_wherever_a_text_may_be_cut_all_encodings_begin_a_new_token(encodings, number):
    pattern = re.compile(CUTS[number].pattern.removeprefix(b"(?s:.*)"))
    generator = random.Random(number)
    n_cuts = 0
    while n_cuts < 2000:
        text = "".join(generator.choices(CHARACTERS, k=8))
        for match in pattern.finditer(text.encode()):
            n_cuts += 1
            before = text.encode()[: match.end()].decode()
            after = text.encode()[match.end() :].decode()
            for encoding in encodings:
                assert encoding.encode_ordinary(before) + encoding.encode_ordinary(after) == encoding.encode_ordinary(
                    text
                )


PROSE = "Call me Ishmael. Some years ago, never mind how long 123 precisely -- having little\n"
TEXTS = {
    "lines": PROSE * 300,
    "CRLF": PROSE.replace("\n", "\r\n") * 300,
    "paragraphs between blank lines": PROSE.replace("\n", "\n\n") * 300,
    "CR alone": PROSE.replace("\n", "\r") * 300,
    "a single line": PROSE.replace("\n", " ") * 300,
    "Russian in a single line": "Зовите меня Измаил — несколько лет тому назад " * 300,
    "Chinese without spaces": "".join(chr(0x5000 + i * 37 % 9000) + "，" * (i % 9 == 0) for i in range(9000)),
    "Japanese without spaces": "吾輩は猫である。名前はまだ無い。" * 700,
    "minified code": "".join(f"f{i}=function(a){{return a.b[{i}]}};" for i in range(900)),
    "ends in white space": PROSE * 300 + "\r\n \r\n",
}


@pytest.mark.parametrize("case", TEXTS)
def test_the_pieces_of_a_text_give_the_tokens_of_the_whole(case, encodings, tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 1000)
    path = tmp_path / "x.txt"
    path.write_bytes(TEXTS[case].encode())
    pieces = pieces_of(path)
    assert b"".join(pieces).decode() == TEXTS[case]
    assert max(map(len, pieces)) < 3000
    for encoding in encodings:
        tokens = [token for piece in pieces for token in encoding.encode_ordinary(piece.decode())]
        assert tokens == encoding.encode_ordinary(TEXTS[case])


@pytest.mark.parametrize("name", ["llama2", "first space"])
def test_a_tokenizer_that_adds_a_space_adds_it_once_per_text(name, sentencepiece_bpe, tmp_path, monkeypatch):
    path = sentencepiece_bpe(name)
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 1000)
    encoder = encode.Encoder(encode.EncoderOptions(str(path), "text"))
    for case in ("lines", "CRLF", "a single line", "ends in white space"):
        (tmp_path / "x.txt").write_bytes(TEXTS[case].encode())
        chunks = list(read_chunks([str(tmp_path / "x.txt")], "text"))
        assert len(chunks) > 10
        tokens = np.concatenate([encoder(chunk).tokens for chunk in chunks])
        assert tokens.tolist() == [*encoder.tokenizer.encode(TEXTS[case]), encoder.tokenizer.eot_id]


@pytest.mark.parametrize("character", ["a", " ", "猫", "é", "\n", "7", "\u0301"])
def test_a_text_without_a_place_to_cut_it_is_cut_between_characters(character, tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(text_files, "MAX_PIECE_BYTES", 2500)
    text = character * 10_000
    (tmp_path / "x.txt").write_text(text, encoding="utf-8", newline="")
    pieces = pieces_of(tmp_path / "x.txt")
    assert "".join(piece.decode() for piece in pieces) == text
    assert {len(piece) for piece in pieces[:-1]} <= {2498, 2499, 2500}


def test_a_million_bytes_that_are_no_text_still_come_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_PIECE_BYTES", 2500)
    assert find_cut(b"\x80" * 10_000, 0) == 2496


def test_blank_ends_and_lost_pieces_still_end_their_document(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 1000)
    (tmp_path / "a.txt").write_bytes(b"word " * 399 + b"word\r\n\r\n" + b" " * 20)
    (tmp_path / "b.txt").write_bytes(b"word " * 399 + b"\xff" * 20)
    prepare(tmp_path, tmp_path / "d", val_tokens=0, on_error="skip")
    first, second = texts_of(tmp_path / "d", "train")
    assert first == "word " * 399 + "word\r\n\r\n" + " " * 20
    assert set(second.split()) == {"word"}


def test_old_cuts_stay_where_they_were(tmp_path, monkeypatch):
    """progress.json counts pieces: a prepare that an older version began must continue at the same place."""
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 1000)
    text = (PROSE + "\n  x\n") * 100
    (tmp_path / "x.txt").write_text(text)
    cuts = [match.end() for match in re.finditer(rb"[!-~]\n(?=[!-~])", text.encode())]
    position = 0
    for piece in pieces_of(tmp_path / "x.txt")[:-1]:
        position += len(piece)
        assert position in cuts


# ---- Encodings and compression ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.txt", "x.md", "x.json", "x.jsonl"])
def test_a_byte_order_mark_is_not_text(name, tmp_path):
    content = {"x.json": b'[{"text": "one"}]', "x.jsonl": b'{"text": "one"}\n'}.get(name, b"one")
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
    prepare(tmp_path / name, tmp_path / "d", val_tokens=0)
    assert texts_of(tmp_path / "d", "train") == ["one"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_a_text_that_is_not_utf_8_is_refused(encoding, tmp_path):
    (tmp_path / "x.txt").write_bytes(("café " * 100).encode(encoding))
    with pytest.raises(ValueError, match=r"x\.txt:1: .*(UTF-16|utf-8)"):
        prepare(tmp_path / "x.txt", tmp_path / "d")


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["x.jsonl{}", "X.JSONL{}", "x.Jsonl{}"])
def test_compressed_streams_in_a_row_are_all_read_whatever_the_case_of_the_name(suffix, name, tmp_path):
    compress = COMPRESS[suffix]
    suffix = suffix.upper() if name.startswith("X") else suffix
    path = tmp_path / name.format(suffix)
    path.write_bytes(compress(jsonl(DOCUMENTS[:90])) + compress(b"") + compress(jsonl(DOCUMENTS[90:])))
    prepare(path, tmp_path / "d", val_tokens=0)
    assert texts_of(tmp_path / "d", "train") == DOCUMENTS


def test_zst_is_known_by_a_name_in_capitals(tmp_path):
    import pyarrow

    (tmp_path / "X.TXT.ZST").write_bytes(pyarrow.compress(b"one", "zstd", asbytes=True))
    assert pieces_of(tmp_path / "X.TXT.ZST") == [b"one"]


def test_zeros_may_pad_xz(tmp_path):
    (tmp_path / "x.txt.xz").write_bytes(lzma.compress(b"one ") + bytes(8) + lzma.compress(b"two") + bytes(4))
    assert b"".join(pieces_of(tmp_path / "x.txt.xz")) == b"one two"


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("damage", ["garbage", "cut", "empty"])
def test_damage_to_a_compressed_file_is_noticed(suffix, damage, tmp_path):
    data = COMPRESS[suffix](jsonl(DOCUMENTS))
    data = {"garbage": data + b"garbage", "cut": data[:-5], "empty": b"\x01"}[damage]
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.jsonl\.\w+: damaged or cut off"):
        prepare(path, tmp_path / "d")


@pytest.mark.parametrize("suffix", COMPRESS)
def test_any_changed_byte_of_a_compressed_file_is_damage_or_nothing(suffix, tmp_path):
    """With every library that unpacks: each has errors of its own kind."""
    text = jsonl(DOCUMENTS) * 20
    data = COMPRESS[suffix](text)
    path = tmp_path / f"x.jsonl{suffix}"
    dice = random.Random(416)
    for _ in range(100):
        place = dice.randrange(len(data))
        path.write_bytes(data[:place] + bytes([dice.randrange(256)]) + data[place + 1 :])
        try:
            lines = [line for chunk in read_chunks([str(path)], "text") for line in chunk.records]
            assert b"\n".join(lines) == text.rstrip(b"\n")
        except ValueError as error:
            assert "damaged or cut off" in str(error)


# ---- Records ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_a_line_that_is_too_long_is_named_and_may_be_skipped(name, tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(text_files, "MAX_RECORD_BYTES", 5000)
    (tmp_path / name).write_bytes(jsonl(["one", "x" * 20_000, "two", "y" * 4000, "z" * 9000]))
    with pytest.raises(ValueError, match=rf"{name}:2: longer than"):
        prepare(tmp_path / name, tmp_path / "d")
    prepare(tmp_path / name, tmp_path / "d", on_error="skip", val_tokens=0)
    assert texts_of(tmp_path / "d", "train") == ["one", "two", "y" * 4000]
    assert json.loads((tmp_path / "d" / "meta.json").read_text())["skipped"]["faulty"] == 2


def test_a_bomb_is_never_in_memory_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_RECORD_BYTES", 4 * 2**20)
    sizes = []

    class Watched(text_files._Decompressed):
        def readinto(self, buffer, /):
            sizes.append(len(buffer))
            return super().readinto(buffer)

    monkeypatch.setattr(text_files, "_Decompressed", Watched)
    (tmp_path / "x.jsonl.xz").write_bytes(lzma.compress(bytes(50 * 2**20)))
    (chunk,) = read_chunks([str(tmp_path / "x.jsonl.xz")], "text")
    assert "longer than" in str(chunk.records[0])
    assert len(sizes) > 40 and max(sizes) <= 2**20


@pytest.mark.parametrize("chunk_bytes", [7, 100, 2**20])
def test_a_json_list_is_read_element_by_element(chunk_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "CHUNK_BYTES", chunk_bytes)
    rows = [{"text": 'a ] , [ \\" é 猫'}, 12345, [1, [2]], "x", None, -1.5e3, {}, {"text": "b" * 300}]
    for indent in None, 2:
        path = tmp_path / "x.json"
        path.write_text(" \n" + json.dumps(rows, indent=indent, ensure_ascii=False) + "\n ", encoding="utf-8")
        records = [json.loads(record) for chunk in read_chunks([str(path)], "text") for record in chunk.records]
        assert records == rows


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'[{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}]",
        b'[{"text": "a"}',
        b'[{"text": "a"}, ',
        b'[{"text": "a"} {"text": "b"}]',
        b'[{"text": "a"},]',
        b'[{"text": "a"}] and more',
        b'[{"text": "a"}]]',
        b'[,{"text": "a"}]',
        b'[{"text": "caf\xe9"}]',
        b"[nul]",
        b'[{"text": "a"}, {"text": b"a"}, {"text": "c"}]',
        b'["' + b"x" * 10_000 + b'"]',
    ],
)
def test_a_json_list_that_is_none_is_one_line(content, tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(text_files, "MAX_RECORD_BYTES", 20_000)
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.json: damaged or cut off \(not JSON after element") as error:
        prepare(tmp_path / "x.json", tmp_path / "d")
    assert "\n" not in str(error.value)


def random_json(generator: random.Random, depth: int = 0) -> object:
    value = generator.choice(["", 'a"\\ b\n', "[],{}", "é猫😀", 7, -12345, 1.5e-300, 0.1, True, None, [], {}])
    if depth < 3 and value == []:
        return [random_json(generator, depth + 1) for _ in range(generator.randrange(4))]
    if depth < 3 and value == {}:
        return {str(i): random_json(generator, depth + 1) for i in range(generator.randrange(4))}
    return value


def test_json_lists_are_those_of_json_whole_or_damaged(tmp_path, monkeypatch):
    generator = random.Random(0)
    path = tmp_path / "x.json"
    for _ in range(500):
        monkeypatch.setattr(text_files, "CHUNK_BYTES", generator.choice([8, 9, 17, 100]))
        rows = [random_json(generator) for _ in range(generator.randrange(6))]
        text = json.dumps(rows, indent=generator.choice([None, 1]), ensure_ascii=generator.random() < 0.5)
        place = generator.randrange(1, len(text))
        flipped = text[:place] + generator.choice('[]{},:"x1 \\') + text[place + 1 :]
        for content in text, text[:place], flipped:
            try:
                expected = json.loads(content)
            except ValueError:
                expected = None
            path.write_text(content, encoding="utf-8")
            try:
                found = [json.loads(record) for record in pieces_of(path)]
            except ValueError:
                found = None
            assert found == expected


def test_reading_starts_at_any_record(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 500)
    for name, content in {
        "x.jsonl": jsonl(DOCUMENTS),
        "x.json": json.dumps(DOCUMENTS).encode(),
        "x.txt": "\n".join(DOCUMENTS).encode(),
    }.items():
        (tmp_path / name).write_bytes(content)
        records = pieces_of(tmp_path / name)
        for start in range(0, len(records), 13):
            chunks = read_chunks([str(tmp_path / name)], "text", text_files.Position(0, start))
            assert [record for chunk in chunks for record in chunk.records] == records[start:]


BAD_IDS = {
    "fractions": [1.9, 2.9],
    "whole fractions": [1.0],
    "text": ["12"],
    "booleans": [True],
    "a boolean among numbers": [5, True, 7],
    "null among numbers": [5, None],
    "too large for int64": [2**64 - 1],
    "too large for any type": [10**400],
    "negative": [-1],
    "outside the vocabulary": [257],
    "nested": [[1]],
    "a number": 5,
    "a text": "12",
    "an object": {"1": 2},
}


@pytest.mark.parametrize("case", BAD_IDS)
@pytest.mark.parametrize("mode", ["passthrough", "chunks"])
def test_ids_that_are_no_ids_are_faults_and_not_converted(case, mode, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"ids": [1, 2]}\n' + json.dumps({"ids": BAD_IDS[case]}) + '\n{"ids": [3]}\n')
    options = {"tokenizer": f"{mode}:bytes", "text_key": "ids", "val_tokens": 0}
    with pytest.raises(ValueError, match=r"x\.jsonl:2: not a list of token ids"):
        prepare(path, tmp_path / "d", **options)
    prepare(path, tmp_path / "d", on_error="skip", **options)
    assert [token for token in all_tokens(tmp_path / "d", "train") if token != 256] == [1, 2, 3]
    assert json.loads((tmp_path / "d" / "meta.json").read_text())["skipped"]["faulty"] == 1


# ---- Parquet ---------------------------------------------------------------------------------------------------------


def test_parquet_columns_are_text_or_faults_by_row(tmp_path):
    import pyarrow
    from pyarrow import parquet

    not_utf8 = pyarrow.array([b"one", b"\xff", b"three"]).view(pyarrow.string())
    columns = {
        "dictionary": (pyarrow.array(["one", "two", "three"]).dictionary_encode(), 0),
        "large": (pyarrow.array(["one", "two", "three"], pyarrow.large_string()), 0),
        "null": (pyarrow.array(["one", None, "three"]), 1),
        "binary": (pyarrow.array([b"one", b"two", b"three"]), 3),
        "struct": (pyarrow.array([{"x": "one"}] * 3), 3),
        "not UTF-8": (not_utf8, 1),
    }
    encoder = encode.Encoder(encode.EncoderOptions("bytes", "text"))
    for name, (column, n_faults) in columns.items():
        parquet.write_table(pyarrow.table({"text": column}), tmp_path / "x.parquet")
        faults = [
            fault for chunk in read_chunks([str(tmp_path / "x.parquet")], "text") for fault in encoder(chunk).faults
        ]
        assert len(faults) == n_faults, name


def test_a_flipped_byte_in_a_page_with_a_checksum_is_noticed(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "x.parquet"
    table = pyarrow.table({"text": ["needle in a haystack"] * 5})
    parquet.write_table(table, path, write_page_checksum=True, compression="none", use_dictionary=False)
    path.write_bytes(path.read_bytes().replace(b"needle", b"noodle"))
    with pytest.raises(ValueError, match=r"x\.parquet: damaged or cut off"):
        prepare(path, tmp_path / "d")


def test_two_columns_of_one_name_are_refused(tmp_path):
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="'text' is not one of the columns text, text"):
        prepare(tmp_path / "x.parquet", tmp_path / "d")


def test_a_record_may_be_the_reason_why_there_is_none():
    encoder = encode.Encoder(encode.EncoderOptions("bytes", "text"))
    for kind in "json", "values", "piece", "end":
        assert encoder(Chunk(0, 3, kind, [ValueError("no reason")])).faults == [(3, "no reason")]
