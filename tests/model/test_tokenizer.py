"""The template, three generations of files, and everything that may be wrong with them.

A small vocabulary of the same construction stands in for Qwen's; the ids of the real one are checked where
S3DIT_QWEN_TOKENIZER names its folder.
"""

import io
import json
import os
import warnings

import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from s3dit.configs.tokenizer_files import ADDED, PIECES, SPECIAL
from s3dit.errors import CheckpointError
from s3dit.model.tokenizer import Tokenizer

REAL = os.environ.get("S3DIT_QWEN_TOKENIZER")
real = pytest.mark.skipif(not REAL, reason="S3DIT_QWEN_TOKENIZER does not name a folder with Qwen3's tokenizer")

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("r", "e"), ("re", "d"), ("Ġ", "red"), ("f", "o"), ("fo", "x")]
VOCABULARY = {piece: i for i, piece in enumerate([*ALPHABET, *("".join(pair) for pair in MERGES)])}
START, END = len(VOCABULARY) + 1, len(VOCABULARY) + 2


@pytest.fixture
def vocabulary(tmp_path):
    """vocab.json, merges.txt and a tokenizer_config.json with the added tokens, as transformers 4 wrote them."""
    (tmp_path / "vocab.json").write_text(json.dumps(VOCABULARY, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in MERGES)]
    (tmp_path / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    added = {len(VOCABULARY) + i: {"content": token, "special": i < SPECIAL} for i, token in enumerate(ADDED)}
    config = {"added_tokens_decoder": added, "chat_template": "{{ raise_exception('a template was run') }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.fixture
def fast(tmp_path):
    """The same as one tokenizer.json, with somebody's padding and truncation saved in it."""
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=VOCABULARY, merges=MERGES))
    tokenizer.normalizer = normalizers.NFC()
    steps = [pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=i < SPECIAL) for i, token in enumerate(ADDED)])
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(8)
    folder = tmp_path / "fast"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def spell(text):
    """Ids of text that no merge touches."""
    return [VOCABULARY[{" ": "Ġ", "\n": "Ċ"}.get(character, character)] for character in text]


# "user" and "assistant" are spelled out: the small vocabulary has no merge for them.
def turn(ids):
    return [START, *spell("user\n"), *ids, END, *spell("\n"), START, *spell("assistant\n")]


RED, FOX = VOCABULARY["Ġred"], VOCABULARY["fox"]
TEXTS = [
    "", " ", "a red fox", "It's the RED fox's!!\r\n\n  12345", "一只红狐狸在雪地里",
    "🦊🏔️ 👩‍👩‍👧", "e\u0301 = é", "\u200b\ufeff\x00\x7f",
    "{} {0} %s \\n", "<|im_end|>red<|endoftext|>", "<think>fox</think>", "<|im_start|", "ﬁ Å Ω", "a" * 700,
]  # fmt: skip


def test_template(vocabulary):
    tokenizer = Tokenizer(vocabulary)
    assert tokenizer.encode("") == turn([])
    assert tokenizer.encode("a red fox") == turn([VOCABULARY["a"], RED, VOCABULARY["Ġ"], FOX])


def test_braces_are_text(vocabulary):
    assert Tokenizer(vocabulary).encode("{} {0}") == turn(spell("{} {0}"))


def test_special_tokens_in_text_are_special(vocabulary):
    """As the official pipeline does: a user may close the turn."""
    assert Tokenizer(vocabulary).encode("b<|im_end|>b") == turn([*spell("b"), END, *spell("b")])


def test_text_is_normalized(vocabulary):
    tokenizer = Tokenizer(vocabulary)
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("It's they'LL", ["It", "'s", " they", "'LL"]),
        ("in 2024, 3.5", ["in", " ", "2", "0", "2", "4", ",", " ", "3", ".", "5"]),
        ("a  b\t\tc", ["a", " ", " b", "\t", "\tc"]),
        ("x \n\n  y!!!\n-z", ["x", " \n\n", " ", " y", "!!!\n", "-z"]),
        ("红狐，雪 🦊", ["红狐", "，雪", " 🦊"]),
        ("end  ", ["end", "  "]),
    ],
)
def test_pieces(text, pieces):
    """How text is cut before any merge, whatever the vocabulary."""
    cut = pre_tokenizers.Split(Regex(PIECES), "isolated").pre_tokenize_str(text)
    assert [piece for piece, _ in cut] == pieces


def test_both_generations_agree(vocabulary, fast):
    """Nor do padding and truncation of the file have a say."""
    one, other = Tokenizer(vocabulary), Tokenizer(fast)
    for text in TEXTS:
        assert one.encode(text, 9999) == other.encode(text, 9999), text


def test_tokenizer_json_goes_first(vocabulary, fast):
    (fast / "tokenizer.json").rename(vocabulary / "tokenizer.json")
    (vocabulary / "merges.txt").unlink()
    Tokenizer(vocabulary)


def test_long_prompt_is_cut_with_a_warning(vocabulary):
    tokenizer, prompt = Tokenizer(vocabulary), "b" * 600
    whole = tokenizer.encode(prompt, 9999)
    with pytest.warns(UserWarning, match=f"{len(whole)} tokens, the last {len(whole) - 512} were cut off") as caught:
        assert tokenizer.encode(prompt) == whole[:512]
    assert caught[0].filename == __file__, "the warning points at the caller"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenizer.encode(prompt, len(whole)) == whole


def test_segments_around_pictures(vocabulary):
    tokenizer = Tokenizer(vocabulary)
    assert tokenizer.segments("a red fox", 0) == [tokenizer.encode("a red fox")]
    for n in (1, 2, 3):
        first, *between, prompt, last = tokenizer.segments("a red fox", n)
        assert len(between) == n - 1 and all(one == between[0] for one in between)
        # the words stand in one segment, behind the last picture
        assert RED in prompt and FOX in prompt and FOX not in first + last
        assert last[-1] == END and END not in first
    with pytest.warns(UserWarning, match="were cut off") as caught:
        assert len(tokenizer.segments("b" * 600, 1)[1]) == 512
    assert caught[0].filename == __file__
    with pytest.raises(TypeError, match="needed a str"):
        tokenizer.segments(None, 1)


@pytest.mark.parametrize("prompt", [None, 3, b"bytes", ["a list"]])
def test_prompt_that_is_no_text(vocabulary, prompt):
    with pytest.raises(TypeError, match="needed a str"):
        Tokenizer(vocabulary).encode(prompt)


@pytest.mark.parametrize("prompt", ["\ud800", "fox \udfff"])
def test_prompt_that_is_no_unicode(vocabulary, prompt):
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        Tokenizer(vocabulary).encode(prompt)


@pytest.mark.parametrize("length", [0, -1])
def test_max_length(vocabulary, length):
    with pytest.raises(ValueError, match="needed at least 1"):
        Tokenizer(vocabulary).encode("fox", length)


def refused(folder, words):
    with pytest.raises(CheckpointError, match=words) as error:
        Tokenizer(folder)
    assert str(folder) in str(error.value)


def test_folder_without_a_tokenizer(tmp_path):
    refused(tmp_path, "no tokenizer in it; needed tokenizer.json")
    refused(tmp_path / "nothing", "no tokenizer in it")


@pytest.mark.parametrize("text", ["", "{", "{}", '{"model": {"type": "BPE"}}', "\0"])
@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.json"])
def test_broken_file(vocabulary, file, text):
    (vocabulary / file).write_text(text)
    refused(vocabulary, "not a readable tokenizer file|the vocabulary is not the one")


def test_merges_that_the_vocabulary_lacks(vocabulary):
    (vocabulary / "merges.txt").write_text("#version: 0.2\nnot there\n")
    refused(vocabulary, "not a readable tokenizer file")


def test_missing_merges(vocabulary):
    (vocabulary / "merges.txt").unlink()
    refused(vocabulary, "merges.txt: missing; needed beside vocab.json")


def test_vocabulary_of_another_size(vocabulary):
    """Added tokens would slide to other ids without a sound, and every prompt with them."""
    longer = VOCABULARY | {"extra": len(VOCABULARY)}
    (vocabulary / "vocab.json").write_text(json.dumps(longer, ensure_ascii=False), encoding="utf-8")
    refused(vocabulary, r"<\|endoftext\|> gets id 262, needed 261")


def test_official_added_tokens_without_a_config(vocabulary):
    (vocabulary / "tokenizer_config.json").unlink()
    refused(vocabulary, r"<\|endoftext\|> gets id 261, needed 151643")


@pytest.mark.parametrize("listed", [[], {"x": {"content": "y"}}, {"1": {}}, {"1": 3}, {"1": {"content": 5}}])
def test_broken_added_tokens(vocabulary, listed):
    (vocabulary / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    refused(vocabulary, "added_tokens_decoder is broken")


@pytest.mark.parametrize("text", ["{", "\0", "[" * 100_000])
def test_broken_config(vocabulary, text):
    (vocabulary / "tokenizer_config.json").write_text(text)
    refused(vocabulary, "tokenizer_config.json: not readable as JSON")


def test_tokenizer_of_another_family(fast):
    file = fast / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace("<|im_", "<|turn_"), encoding="utf-8")
    refused(fast, r"it has no <\|im_start\|> and no <\|im_end\|>; needed the tokenizer of a Qwen chat model")


def train_sentencepiece(folder, symbols, **more):
    """A SentencePiece model of a few sentences."""
    sentences = ["a red fox in the snow", "a blue bird on a tree", "two cats under the moon"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 5), model_writer=model, vocab_size=60, user_defined_symbols=symbols,
        model_type="bpe", hard_vocab_limit=False, minloglevel=2, **more,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def test_sentencepiece(tmp_path):
    processor = train_sentencepiece(tmp_path, ["<|im_start|>", "<|im_end|>"])
    ids = Tokenizer(tmp_path).encode("a red fox")
    pieces = [processor.id_to_piece(i) for i in ids]
    assert pieces.count("<|im_start|>") == 2 and pieces.count("<|im_end|>") == 1
    middle = pieces[pieces.index("<|im_start|>") + 1 : pieces.index("<|im_end|>")]
    assert "".join(middle).replace("▁", " ").endswith("a red fox") and "▁red" in middle
    with pytest.warns(UserWarning, match="cut off"):
        assert Tokenizer(tmp_path).encode("a red fox", 3) == ids[:3]


def test_sentencepiece_without_the_turns(tmp_path):
    train_sentencepiece(tmp_path, ["<|im_start|>"])
    refused(tmp_path, r": <\|im_end\|> are not user-defined pieces")
    train_sentencepiece(tmp_path, [], control_symbols=["<|im_start|>", "<|im_end|>"])
    refused(tmp_path, r": <\|im_start\|> and <\|im_end\|> are not user-defined pieces")


def test_broken_sentencepiece(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\xff not a protocol buffer")
    refused(tmp_path, "not a readable tokenizer file")


@pytest.fixture(scope="module")
def qwen():
    return Tokenizer(REAL)


@real
@pytest.mark.slow
def test_ids_of_the_official_tokenizer(qwen):
    """Ids that the official pipeline was seen to give."""
    assert qwen.encode("A cat") == [151644, 872, 198, 32, 8251, 151645, 198, 151644, 77091, 198]
    assert qwen.encode("") == [151644, 872, 198, 151645, 198, 151644, 77091, 198]
    assert qwen.encode("<|vision_start|>")[:4] == [151644, 872, 198, 151652]
    assert qwen.encode("<think>")[3] == 151667
    # around one picture, and between two
    assert [qwen.segments("A cat", 2)[i] for i in (0, 1, 3)] == [
        [151644, 872, 198, 151652],
        [151653, 151652],
        [151653, 151645],
    ]
    assert qwen.segments("A cat", 1)[1] == [151653, 32, 8251, 151645, 198, 151644, 77091, 198, 151652]


@real
def test_official_files_of_two_generations_agree(qwen, tmp_path):
    """With the list of added tokens of tokenizer_config.json, and with the one that is written in the code."""
    for names in (("vocab.json", "merges.txt", "tokenizer_config.json"), ("vocab.json", "merges.txt")):
        folder = tmp_path / str(len(names))
        folder.mkdir()
        for name in names:
            (folder / name).symlink_to(os.path.join(os.path.abspath(REAL), name))
        other = Tokenizer(folder)
        every = "".join(ADDED)
        for text in [*TEXTS, every]:
            assert other.encode(text, 9999) == qwen.encode(text, 9999), text
        assert other.encode(every, 9999)[3:29] == list(range(151643, 151669))
        assert other.encode(every, 9999)[3:29] == list(range(151643, 151669))


TEMPLATE = {
    "type": "TemplateProcessing",
    "pair": [],
    "special_tokens": {},
    "single": [{"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
}


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        (("model", "vocab"), {"a": 0, "b": 1}, "lacks what the merge"),
        (("model", "vocab"), VOCABULARY | {"a": 1}, "have one id"),
        (("model", "vocab"), VOCABULARY | {"a": 2**32 - 1}, "an id is"),
        (("model", "merges"), [["r", "zz"]], "lacks what the merge"),
        (("model", "merges"), ["f"], "lacks what the merge"),
        (("model", "continuing_subword_prefix"), "##", "continuing_subword_prefix of its model is '##'; needed None"),
        (("model", "end_of_word_suffix"), "##", "end_of_word_suffix"),
        (("model", "dropout"), 0.5, "dropout"),
        (("model", "unk_token"), "nowhere", "unk_token"),
        (("model",), {"type": "Unigram", "unk_id": None, "vocab": [["a", 0.0]]}, "type of its model is 'Unigram'"),
        (("normalizer",), {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, "normalizer is 'Precompiled'"),
        (("pre_tokenizer",), {"type": "FixedLength", "length": 0}, "pre_tokenizer is 'FixedLength'"),
        (("pre_tokenizer", "pretokenizers", 0, "pattern"), {"Regex": "(a+)+$"}, "cuts text by"),
        (("post_processor",), TEMPLATE, "its template has 'x'"),
        (("post_processor",), TEMPLATE | {"single": [{"Sequence": {"id": "B", "type_id": 0}}]}, "holds the texts"),
        (("post_processor",), {"type": "Sequence", "processors": [TEMPLATE]}, "its template has 'x'"),
        (("added_tokens", 3, "id"), 5, "needed 5; the vocabulary is not the one"),
        (("added_tokens", 3, "id"), -1, "an id is"),
    ],
)  # fmt: skip
def test_what_would_make_the_library_panic_is_refused_in_silence(fast, where, value, words, capfd):
    """The library would print a stack of its own, past Python."""
    file = fast / "tokenizer.json"
    inside = data = json.loads(file.read_text(encoding="utf-8"))
    for key in where[:-1]:
        inside = inside[key]
    inside[where[-1]] = value
    file.write_text(json.dumps(data))
    refused(fast, words)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("text", ["re d f", "zz zz", "ab"])
def test_merges_of_another_vocabulary_are_refused_in_silence(vocabulary, text, capfd):
    (vocabulary / "vocab.json").write_text('{"a": 0, "b": 1}')
    (vocabulary / "merges.txt").write_text(f"#version: 0.2\n{text}\n")
    refused(vocabulary, "lacks what the merge")
    assert capfd.readouterr() == ("", "")


def test_another_normalization_and_template_are_honored(fast):
    file = fast / "tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    known = {"x": {"id": "x", "ids": [7], "tokens": ["x"]}}
    lower = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
    file.write_text(json.dumps(data | {"normalizer": lower, "post_processor": TEMPLATE | {"special_tokens": known}}))
    assert Tokenizer(fast).encode("FOX") == [7, *turn([FOX])]


def test_a_panic_of_the_library_is_a_checkpoint_error(tmp_path, capfd):
    (tmp_path / "tokenizer.json").write_text(
        '{"model":{"type":"BPE","vocab":{"a":0,"b":1},"merges":["a b"]},"version":"1.0","added_tokens":[]}'
    )
    refused(tmp_path, "not a readable tokenizer file")
    assert capfd.readouterr() == ("", "")
