"""tools/decontaminate.py: every planted copy of an evaluation item is found, and nothing else."""

import functools
import gzip
import itertools
import json
import random
import unicodedata

import pytest
from conftest import shared
from processes import python
from shards import prepare, texts_of, write_jsonl

from tools.decontaminate import DecontaminateConfig, NgramIndex, decontaminate, fold_words, read_items, split_words

HELLASWAG = "data/hellaswag_val_2000.jsonl"


def test_planted_items_are_found_and_removed(tmp_path, capsys):
    """All of 500 real HellaSwag items, re-spaced, re-cased and cut across shards, and nothing of 1,000 documents."""
    items = [json.loads(line) for line in shared(HELLASWAG).read_text().splitlines()[::4]]
    files = [shared(f"data/textbooks/train-0{i}.jsonl.gz") for i in range(4)]
    lines = [line for file in files for line in gzip.decompress(file.read_bytes()).splitlines()]
    clean = [json.loads(line)["text"][:6000] for line in lines[:1000]]
    planted = [
        f"{clean[i][:300]}\n\n{item['ctx'].upper()}\n  {item['endings'][int(item['label'])]} -- {clean[-i][:300]}"
        for i, item in enumerate(items)
    ]
    mixed = [text for pair in itertools.zip_longest(clean, planted) for text in pair if text is not None]
    source = write_jsonl(tmp_path / "x.jsonl", mixed)
    val_source = write_jsonl(tmp_path / "val.jsonl", planted[:5])
    prepare(source, tmp_path / "d", val_source=str(val_source), shard_tokens=700_000)
    against = str(shared(HELLASWAG))
    decontaminate(DecontaminateConfig(str(tmp_path / "d"), against, write=str(tmp_path / "e"), workers=2))
    assert "500 of 1,500 training documents" in capsys.readouterr().out
    assert texts_of(tmp_path / "e", "train") == clean
    assert texts_of(tmp_path / "e", "val") == planted[:5]
    assert python("data_pipeline.py", "verify", f"--out_dir={tmp_path}/e")[0] == 0


def test_a_document_longer_than_a_shard_is_found_and_removed(tmp_path):
    item = "one two three four five six seven eight nine ten eleven twelve thirteen"
    documents = ["before", f"{'x ' * 200} {item} {'y ' * 200}", "after"]
    source = write_jsonl(tmp_path / "x.jsonl", documents)
    write_jsonl(tmp_path / "items.jsonl", [item])
    prepare(source, tmp_path / "d", val_tokens=0, shard_tokens=300)
    cfg = DecontaminateConfig(str(tmp_path / "d"), str(tmp_path / "items.jsonl"), write=str(tmp_path / "e"), workers=1)
    decontaminate(cfg)
    assert texts_of(tmp_path / "e", "train") == ["before", "after"]


# ---- What counts as a copy -------------------------------------------------------------------------------------------


def in_every_fifth_word(text: str, inserted: str) -> str:
    words = text.split(" ")
    words[::5] = [word[: len(word) // 2] + inserted + word[len(word) // 2 :] for word in words[::5]]
    return " ".join(words)


def full_width(text: str) -> str:
    return text.translate({code: code + 0xFEE0 for code in range(0x21, 0x7F)} | {0x20: 0x3000})


# What a reader would still call the same text.
VARIANTS = {
    "capitals": str.upper,
    "line breaks": lambda text: text.replace(" ", " \r\n\t"),
    "curly quotes": lambda text: text.replace("'", "’").replace(".", "”."),
    "straight quotes": lambda text: text.replace(".", '".'),
    "modifier apostrophes": lambda text: text.replace("'", "ʼ"),
    "no-break spaces": lambda text: text.replace(" ", "\xa0"),
    "thin and ideographic spaces": lambda text: text.replace(", ", ",\u2009").replace(" ", "\u3000"),
    "em dashes": lambda text: text.replace(", ", "—"),
    "ellipses": lambda text: text.replace(". ", "…"),
    "no-break hyphens": lambda text: text.replace("-", "\u2011"),
    "soft hyphens": lambda text: in_every_fifth_word(text, "\xad"),
    "zero-width spaces": lambda text: in_every_fifth_word(text, "\u200b"),
    "direction marks and byte order marks": lambda text: in_every_fifth_word(text, "\u200e\ufeff"),
    "variation selectors": lambda text: in_every_fifth_word(text, "\ufe0f"),
    "accents": lambda text: in_every_fifth_word(text, "\u0301"),
    "ligatures": lambda text: text.replace("fi", "\ufb01").replace("fl", "\ufb02"),
    "full-width letters": full_width,
    "HTML entities": lambda text: text.replace("'", "&#39;").replace(" ", "&nbsp;"),
}


@functools.cache
def hellaswag() -> tuple[NgramIndex, list[str]]:
    """The index of all items, and the text of every tenth one."""
    items = [json.loads(line) for line in shared(HELLASWAG).read_text().splitlines()[::10]]
    texts = [f"{item['ctx']} {item['endings'][int(item['label'])]}" for item in items]
    return NgramIndex(read_items(str(shared(HELLASWAG))), 13), texts


@pytest.mark.parametrize("name", VARIANTS)
def test_a_copy_that_looks_the_same_is_found(name):
    index, texts = hellaswag()
    for text in texts:
        variant = VARIANTS[name](text)
        assert index.find(f"Before it.{variant} And after it".encode()) is not None, variant


FRENCH = "À l'été, l'élève reçoit son diplôme dans la forêt près du château où son père était né, ça va de soi"
RUSSIAN = "Он вошёл в комнату и увидел, что ёлка уже наряжена и все дети сидят вокруг неё на полу и поют"
GERMAN = "Die Straße ist groß und süß, aber der Fußgänger mußte heute schließlich außen herum nach Hause gehen"
GREEK = "Ο άνθρωπος κάθεται στη στέγη και αρχίζει να βγάζει τα κεραμίδια από την παλιά στέγη της"
TURKISH = "Isparta'da ışık ılık bir kış sabahı yağan karın altında sırtını dönen kızın ıslak yüzüne vurdu ve durdu"
HINDI = "एक आदमी छत पर बैठा है और वह छत से पुरानी टाइलें निकालना शुरू करता है फिर नीचे देखता है"
KOREAN = "한 남자가 지붕 위에 앉아 있다 그는 지붕에서 낡은 기와를 하나씩 뜯어내기 시작하고 아래를 내려다 본다"
ARABIC = "جلس الرجل على السطح وبدأ في إزالة البلاط القديم واحدا تلو الآخر ثم نظر إلى الأسفل ورأى ابنه"
CHINESE = "一个男人坐在屋顶上，他开始把屋顶上的旧瓦片一块一块地拆下来，然后扔到院子里。"
JAPANESE = "男の人が屋根の上に座っています。彼は屋根の古いガラス瓦を一枚ずつ外し始めました。"
THAI = "ผู้ชายคนหนึ่งนั่งอยู่บนหลังคาแล้วเขาก็เริ่มรื้อกระเบื้องเก่าออกทีละแผ่นแล้วโยนลงไปที่สนามหญ้าหน้าบ้าน"
KHMER = "បុរសម្នាក់អង្គុយនៅលើដំបូលផ្ទះហើយគាត់ចាប់ផ្តើមដកក្បឿងចាស់ៗចេញម្តងមួយៗរួចបោះទៅលើដី"
LANGUAGES = [FRENCH, RUSSIAN, GERMAN, GREEK, TURKISH, HINDI, KOREAN, ARABIC, CHINESE, JAPANESE, THAI, KHMER]


@pytest.mark.parametrize("text", LANGUAGES)
@pytest.mark.parametrize(
    "change",
    [
        str.upper,
        functools.partial(unicodedata.normalize, "NFD"),
        functools.partial(unicodedata.normalize, "NFKC"),
        lambda text: f"{text[:9]}\u200b{text[9:]}",
        lambda text: text.replace(",", "").replace("，", "").replace("。", "\n"),
        lambda text: f"一ก{text}ក一",
    ],
    ids=["capitals", "decomposed", "composed", "zero-width space", "punctuation", "surrounded by other letters"],
)
def test_a_copy_in_any_language_is_found(text, change):
    index = NgramIndex([split_words(text.encode())], 13)
    assert index.find(change(text).encode()) == 0


@pytest.mark.parametrize("change", ["ÉCOLE", "ecole", "e\u0301cole", "éco\xadle"])
def test_a_word_is_the_same_with_and_without_its_accents(change):
    assert split_words(change.encode()) == split_words("école".encode())


def test_only_as_many_letters_as_words_have_make_a_copy_in_scripts_without_spaces():
    """26 letters of Chinese and 52 of Thai are 13 words; fewer are a common phrase, as 12 words of English are."""
    index = NgramIndex([split_words(text.encode()) for text in (CHINESE, THAI)], 13)
    letters = [b"".join(split_words(text.encode())[3:]).decode() for text in (CHINESE, THAI)]
    for item, (text, n) in enumerate(zip(letters, (26, 52), strict=True)):
        assert index.find(f"日本{text[:n]}ไทย".encode()) == item
        assert index.find(f"日本{text[: n - 1]}ไทย".encode()) is None


def test_other_texts_of_the_same_words_are_not_copies():
    index = NgramIndex([split_words(text.encode()) for text in LANGUAGES], 13)
    for text in LANGUAGES:
        words = split_words(text.encode())
        assert index.find(b" ".join(reversed(words))) is None
        assert index.find(b" ".join(words[: len(words) // 3])) is None


def test_ascii_text_has_the_same_words_on_the_fast_and_on_the_slow_path():
    rng = random.Random(0)
    for _ in range(200):
        text = bytes(rng.randrange(128) for _ in range(200)).replace(b"&", b"")
        words = split_words(text)
        assert words == fold_words(text)
        assert split_words(text + " é".encode()) == [*words, b"e"]


@pytest.mark.parametrize(
    "text", ["&#" + "9" * 5000 + ";", "&#xD800;", "&#1114112;", "&nonsense;", "&;", "&#;", "&" * 9]
)
def test_what_only_resembles_an_html_entity_is_text(text):
    item = b"one two three four five six seven eight nine ten"
    index = NgramIndex([split_words(item)], 13)
    assert index.find(f"{text} ".encode() + item + text.encode()) == 0


def test_bytes_that_are_not_utf_8_separate_words():
    item = b"one two three four five six seven eight nine ten"
    index = NgramIndex([split_words(item)], 13)
    assert index.find(b"\xff\xfe" + item.replace(b" ", b"\x80\xe2 ") + b"\xe2\x80") == 0
    assert index.find(b"\xc3" * 1000) is None


def test_items_without_a_text_of_their_own_are_counted_as_too_short(tmp_path, data, capsys):
    (tmp_path / "x.jsonl").write_text('{"q": "too short"}\n{"q": 5}\n{"q": "短い"}\n{"q": "\\ud800"}\n')
    decontaminate(DecontaminateConfig(str(data), str(tmp_path / "x.jsonl"), workers=1))
    assert "4 items too short" in capsys.readouterr().out


# ---- Files -----------------------------------------------------------------------------------------------------------


def test_if_no_document_would_remain_nothing_is_written(tmp_path):
    text = "one two three four five six seven eight nine ten eleven twelve thirteen"
    prepare(write_jsonl(tmp_path / "x.jsonl", [text, text]), tmp_path / "d", val_tokens=0)
    cfg = DecontaminateConfig(str(tmp_path / "d"), str(tmp_path / "x.jsonl"), write=str(tmp_path / "e"), workers=1)
    with pytest.raises(ValueError, match=r"e is not written: none of the training documents would remain"):
        decontaminate(cfg)
    assert not (tmp_path / "e").exists()


def test_a_copy_made_against_other_items_of_the_same_file_name_is_not_taken_for_this_one(tmp_path):
    texts = [f"{word} two three four five six seven eight nine ten eleven twelve thirteen" for word in ("a", "b")]
    prepare(write_jsonl(tmp_path / "x.jsonl", texts), tmp_path / "d", val_tokens=0)
    cfg = DecontaminateConfig(
        str(tmp_path / "d"), str(tmp_path / "items.jsonl"), ngram=13, write=str(tmp_path / "e"), workers=1
    )
    write_jsonl(tmp_path / "items.jsonl", texts[:1])
    decontaminate(cfg)
    decontaminate(cfg)
    write_jsonl(tmp_path / "items.jsonl", texts[1:])
    with pytest.raises(ValueError, match="holds another dataset"):
        decontaminate(cfg)


ITEM = {"ctx": "a b", "endings": ["c", "d"], "label": 1}


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[1]",
        "5",
        "[" * 100_000,
        *(json.dumps({**ITEM, "label": label}) for label in (1.9, True, -1, 2, "", "1.0", None, [0], 10**30)),
        *(json.dumps({**ITEM, "endings": endings}) for endings in ("cd", {"0": "c", "1": "d"}, [1, 2], None, [])),
        json.dumps({**ITEM, "ctx": 5}),
        '{"label": Infinity, "ctx": "a", "endings": ["b"]}',
    ],
)
def test_an_odd_item_is_named_with_its_line(line, tmp_path):
    (tmp_path / "x.jsonl").write_text(f"{json.dumps(ITEM)}\n{line}\n")
    with pytest.raises(ValueError, match=r"x\.jsonl:2: not an evaluation item"):
        read_items(str(tmp_path / "x.jsonl"))


@pytest.mark.parametrize("label", [1, "1"])
def test_a_label_may_be_text_as_in_the_hub_copy_of_hellaswag(label, tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({**ITEM, "label": label}))
    assert read_items(str(tmp_path / "x.jsonl")) == [[b"a", b"b", b"d"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"against": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"against": "{}/x.jsonl"}, "x.jsonl:1: not an evaluation item"),
        ({"against": "{}/empty.jsonl"}, "empty.jsonl holds no evaluation items"),
        ({"against": "{}"}, "cannot read .*: Is a directory"),
        ({"ngram": 3}, "ngram=3 is below 8"),
        ({"workers": 0}, "workers=0 must be at least 1"),
    ],
)
def test_bad_options_are_named(data, tmp_path, options, message):
    (tmp_path / "x.jsonl").write_text('{"ctx": "a", "endings": ["b"], "label": "3"}')
    (tmp_path / "empty.jsonl").touch()
    if "against" in options:
        options = {"against": options["against"].format(tmp_path)}
    with pytest.raises(ValueError, match=message):
        decontaminate(DecontaminateConfig(str(data), **options))


def test_the_command_is_run_from_the_root(data):
    code, _, error = python("-m", "tools.decontaminate", f"--out_dir={data}", "--ngram=3")
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith("python -m tools.decontaminate: error: ngram=3 is below 8")
