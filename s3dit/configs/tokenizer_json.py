"""Checks `tokenizer.json` against what the tokenizers library runs without a panic, and against Qwen's construction.

The library in Rust runs the file, so what it says is honored: another normalization, tokens that it adds around every
text. But a vocabulary, merges or template that contradict themselves make it panic, with a text of its own on standard
error that nobody here can catch; so they are looked at first. Another way to cut the text (a stranger's regular
expression may run for ages), dropout (another picture every time) and other models than BPE are refused by name.

Source: tokenizers 0.22 `models/bpe/model.rs`, `processors/template.rs`; every panic was tried.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

# Above every vocabulary of this family (151,936).
MOST_IDS = 1 << 20
# How Qwen2 cuts text before any merge: English clitics, words with the mark before them, single digits, runs of
# marks, line breaks, spaces.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLIT = {"type": "Split", "pattern": {"Regex": PIECES}, "behavior": "Isolated", "invert": False}
# The steps of each stage that change ids, and the key of a Sequence that lists them. The decoder is never run.
STAGES = {
    "normalizer": ("normalizers", ("NFC", "NFD", "NFKC", "NFKD", "Lowercase")),
    "pre_tokenizer": ("pretokenizers", ("Split", "ByteLevel")),
    "post_processor": ("processors", ("ByteLevel", "TemplateProcessing")),
}
# Keys of a BPE that must be as Qwen's.
BPE: Mapping[str, tuple[Any, ...]] = {
    "type": ("BPE",), "dropout": (None, 0), "continuing_subword_prefix": (None, ""), "end_of_word_suffix": (None, ""),
}  # fmt: skip


def check(data: Any) -> None:
    """Raise ValueError for a parsed tokenizer.json that the library cannot run, or that is built unlike Qwen's."""
    model = _dict(_dict(data, "it").get("model"), "its model")
    for key, values in BPE.items():
        _need(model.get(key) in values, f"{key} of its model is {model.get(key)!r:.60}", repr(values[0]))
    check_bpe(model.get("vocab"), pairs(_list(model.get("merges"), "merges")))
    unknown = model.get("unk_token")
    _need(unknown is None or unknown in model["vocab"], f"unk_token is {unknown!r:.60}", "a token of its vocabulary")
    for stage in STAGES:
        for step in _steps(data.get(stage), stage):
            _need(step["type"] != "Split" or step == SPLIT, f"it cuts text by {step!r:.200}", "Qwen's way to cut")
            if step["type"] == "TemplateProcessing":
                _check_template(step)
    ids = added(data)
    _need(len(ids) == len(data["added_tokens"]), "added_tokens repeat an id, or lack their content", "one of each")


def check_bpe(vocabulary: Any, merges: Iterable[Any]) -> None:
    """Raise ValueError unless tokens have ids of their own, and each merge makes a token of two."""
    ids = _dict(vocabulary, "its vocabulary").values()
    _check_ids(ids)
    _need(len(set(ids)) == len(ids), "two tokens of its vocabulary have one id", "one each")
    for pair in merges:
        try:
            left, right = pair
            known = left in vocabulary and right in vocabulary and left + right in vocabulary
        except (TypeError, ValueError):
            known = False
        if not known:
            _need(False, f"its vocabulary lacks what the merge {pair!r:.60} needs", "two tokens that make a third")


def pairs(merges: Iterable[Any]) -> Iterator[Any]:
    """Yield merges in either spelling, "a b" or ["a", "b"], as pairs."""
    return (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)


def added(data: Mapping[str, Any]) -> dict[int, str]:
    """Return the tokens that a tokenizer.json adds, by id; raises ValueError."""
    listed = [_dict(token, "an added token") for token in _list(data.get("added_tokens"), "added_tokens")]
    contents = {token.get("id"): token.get("content") for token in listed if isinstance(token.get("content"), str)}
    _check_ids(contents)
    return contents  # type: ignore[return-value]


def _steps(value: Any, stage: str) -> list[dict[str, Any]]:
    """The steps of a stage, one Sequence taken apart; ValueError for one of another kind."""
    if value is None:
        return []
    key, kinds = STAGES[stage]
    step = _dict(value, stage)
    steps = _list(step.get(key), stage) if step.get("type") == "Sequence" else [step]
    for inner in steps:
        kind = _dict(inner, stage).get("type")
        _need(kind in kinds, f"its {stage} is {kind!r:.60}", " or ".join(kinds))
    return steps


def _check_template(step: Mapping[str, Any]) -> None:
    """Raise ValueError where a template names a text that is not there, or a token that it does not describe."""
    known = _dict(step.get("special_tokens"), "special_tokens")
    for piece in chain(_list(step.get("single"), "single"), _list(step.get("pair"), "pair")):
        token, text = (_dict(piece, "a piece of its template").get(key) for key in ("SpecialToken", "Sequence"))
        name = _dict(text if token is None else token, "a piece of its template").get("id")
        fits = name in ("A", "B") if token is None else isinstance(name, str) and name in known
        _need(fits, f"its template has {name!r:.60}", "A, or one of its special_tokens")
    singles = [piece["Sequence"]["id"] for piece in step["single"] if "Sequence" in piece]
    _need(singles == ["A"], f"its template for one text holds the texts {singles!r:.60}", "A once")
    for token in known.values():
        _check_ids(_list(_dict(token, "a special token").get("ids"), "ids"))


def _check_ids(ids: Collection[Any]) -> None:
    """Raise ValueError for an id that is no integer from 0, below MOST_IDS."""
    wrong = [number for number in ids if type(number) is not int or not 0 <= number < MOST_IDS]
    _need(not wrong, f"an id is {wrong[:1]!r:.40}", f"a number below {MOST_IDS:,}")


def _dict(value: Any, name: str) -> dict[str, Any]:
    """The value, if it is an object; else ValueError."""
    _need(isinstance(value, dict), f"{name} is a {type(value).__name__}", "an object")
    return value


def _list(value: Any, name: str) -> list[Any]:
    """The value, if it is a list; else ValueError."""
    _need(isinstance(value, list), f"{name} is a {type(value).__name__}", "a list")
    return value


def _need(holds: bool, state: str, needed: str) -> None:
    """Raise ValueError, which says what was read and what was needed, unless `holds`."""
    if not holds:
        raise ValueError(f"{state}; needed {needed}")
