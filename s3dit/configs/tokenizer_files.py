"""Builds the function from text to tokens out of the files of a tokenizer.

Three generations of files are read: `tokenizer.json`; else `vocab.json` + `merges.txt`, from which the same BPE is
built; else a SentencePiece `tokenizer.model`, whose special tokens must be user-defined pieces. A GGUF file of the text
encoder carries vocabulary and merges in its metadata.

Source: Qwen2's tokenizer files (regex, NFC, byte-level alphabet, the 26 added tokens of Qwen3); llama.cpp's converter
for the metadata of GGUF.
"""

from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from s3dit.configs import tokenizer_json
from s3dit.configs.tokenizer_config import FILE, check_added
from s3dit.configs.tokenizer_json import PIECES
from s3dit.errors import CheckpointError
from s3dit.weights.gguf_file import GGUFFile
from s3dit.weights.json_files import parse_json, read_json, read_regular

# The special tokens of Qwen's chat template, which every tokenizer of this family knows.
TURN = ("<|im_start|>", "<|im_end|>")
# Qwen3's added tokens have the ids 151643 to 151668 in this order; the first fourteen are special.
ADDED = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|{kind}_{end}|>" for kind in ("object_ref", "box", "quad", "vision") for end in ("start", "end")),
    *(f"<|{kind}_pad|>" for kind in ("vision", "image", "video")),
    "<tool_call>",
    "</tool_call>",
    *(f"<|fim_{part}|>" for part in ("prefix", "middle", "suffix", "pad")),
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
FIRST_ADDED, SPECIAL = 151643, 14
# Bytes of a tokenizer's file; the official tokenizer.json has 11 MB.
LARGEST = 1 << 27
# Kinds of tokens in GGUF; a fifth fills the vocabulary up and never occurs in text.
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


class Tokens(NamedTuple):
    """The tokens of a text: ids, and of each the characters (start, stop) of the text that it stands for."""

    ids: list[int]
    places: list[tuple[int, int]]


Tokenize = Callable[[str], Tokens]


def open_tokenizer(source: str | Path | GGUFFile) -> Tokenize:
    """Return the function from a text to its tokens, of a folder's files or of a GGUF file's metadata.

    Raises CheckpointError when they are missing, broken or not of this family.
    """
    if isinstance(source, GGUFFile):
        return _ggml(source)
    folder = Path(source)
    readers: dict[str, Callable[[Path], Tokenize]] = {
        "tokenizer.json": _json,
        "vocab.json": _vocabulary,
        "tokenizer.model": _sentencepiece,
    }
    for file, reader in readers.items():
        if (folder / file).is_file():
            return reader(folder)
    raise CheckpointError(
        f"{folder}: no tokenizer in it; needed tokenizer.json, or vocab.json with merges.txt, or tokenizer.model; "
        "download the tokenizer folder of the model"
    )


def _json(folder: Path) -> Tokenize:
    """Read tokenizer.json, without the padding and truncation that may have been saved in it."""
    path = folder / "tokenizer.json"

    def read() -> tuple[tokenizers.Tokenizer, dict[int, str]]:
        text = read_regular(path, LARGEST).decode("utf-8")
        tokenizer_json.check(data := parse_json(text))
        return tokenizers.Tokenizer.from_str(text), tokenizer_json.added(data)

    tokenizer, added = _sound(path, read)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    _check_added(tokenizer, added, path)
    check_added(folder / FILE, tokenizer.get_added_tokens_decoder())
    return _checked(tokenizer, path)


def _vocabulary(folder: Path) -> Tokenize:
    """Build the BPE that tokenizer.json describes from vocab.json and merges.txt."""
    path, merges = folder / "vocab.json", folder / "merges.txt"
    if not merges.is_file():
        raise CheckpointError(f"{merges}: missing; needed beside vocab.json; download it")

    def read() -> models.BPE:
        # A line ends with a line feed only: other separators of lines are letters of the byte-level alphabet.
        lines = read_regular(merges, LARGEST).decode("utf-8").removesuffix("\n").split("\n")
        rules = (line.removesuffix("\r") for line in lines if not line.startswith("#version"))
        return _bpe(parse_json(read_regular(path, LARGEST)), tokenizer_json.pairs(rules))

    return _qwen(_sound(path, read), _added(folder / "tokenizer_config.json"), path)


def _ggml(file: GGUFFile) -> Tokenize:
    """Build the same BPE from the metadata of a GGUF file, as llama.cpp's converter writes it."""
    kind = file.metadata.get("tokenizer.ggml.model"), file.metadata.get("tokenizer.ggml.pre", "qwen2")
    if kind != ("gpt2", "qwen2"):
        raise CheckpointError(
            f"{file.path}: its tokenizer is of the kind {' '.join(map(str, kind))[:60]}; needed gpt2 qwen2, as every "
            "Qwen3 has it; give the model's own with --tokenizer DIR"
        )
    tokens, types = file.items("tokenizer.ggml.tokens"), file.items("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in file.items("tokenizer.ggml.merges")]
    if len(types) != len(tokens) or any(len(merge) != 2 for merge in merges):
        raise CheckpointError(f"{file.path}: its tokenizer is broken; give the model's own with --tokenizer DIR")
    vocabulary = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == NORMAL}
    added = {
        i: AddedToken(token, normalized=False, special=kind == CONTROL)
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    }
    return _qwen(_sound(file.path, lambda: _bpe(vocabulary, merges)), added, file.path)


def _bpe(vocabulary: dict[str, int], merges: Iterable[Any]) -> models.BPE:
    """Make a BPE of a vocabulary and merges; raises ValueError where they do not fit."""
    rules = [tuple(pair) for pair in merges]
    tokenizer_json.check_bpe(vocabulary, rules)
    return models.BPE(vocabulary, rules)


def _qwen(bpe: models.BPE, added: dict[int, AddedToken], path: Path) -> Tokenize:
    """Make Qwen2's tokenizer of a BPE; raises CheckpointError where added tokens get other ids than listed."""
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(list(added.values()))
    _check_added(tokenizer, {number: token.content for number, token in added.items()}, path)
    return _checked(tokenizer, path)


def _check_added(tokenizer: tokenizers.Tokenizer, added: Mapping[int, str], path: Path) -> None:
    """Raise CheckpointError where an added token gets another id than it is listed with."""
    for number, content in added.items():
        own = tokenizer.token_to_id(content)
        if own != number:
            raise CheckpointError(
                f"{path}: {content} gets id {own}, needed {number}; the vocabulary is not the one its added "
                "tokens belong to; download the tokenizer folder again"
            )


def _added(path: Path) -> dict[int, AddedToken]:
    """Return the added tokens by id, in order: of tokenizer_config.json if it lists them, else the official ones."""
    listed: Any = None
    if path.is_file():
        config = read_json(path, LARGEST)
        listed = config.get("added_tokens_decoder") if isinstance(config, dict) else None
    if listed is None:
        return {
            FIRST_ADDED + i: AddedToken(token, normalized=False, special=i < SPECIAL) for i, token in enumerate(ADDED)
        }
    flags = ("lstrip", "rstrip", "normalized", "single_word", "special")
    try:
        tokens = {
            int(number): AddedToken(token["content"], **{flag: bool(token.get(flag, False)) for flag in flags})
            for number, token in listed.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{path}: added_tokens_decoder is broken; needed id -> {{content, …}}; download the file again"
        ) from None
    return dict(sorted(tokens.items()))


def _sentencepiece(folder: Path) -> Tokenize:
    """Read a SentencePiece model; the library is imported here because few models have one."""
    path = folder / "tokenizer.model"
    if find_spec("sentencepiece") is None:
        raise CheckpointError(
            f"{path}: needs the package sentencepiece, which is not installed; pip install 's3dit[sentencepiece]', or "
            "take a folder with tokenizer.json"
        )
    import sentencepiece

    processor = _sound(path, lambda: sentencepiece.SentencePieceProcessor(model_file=str(path)))
    # A user-defined piece is one that text can hold; a control piece of this name would be spelled out.
    absent = [token for token in TURN if token not in processor.encode(token, out_type=str)]
    if absent:
        raise CheckpointError(
            f"{path}: {' and '.join(absent)} are not user-defined pieces; needed the tokenizer of a Qwen chat model"
        )

    def tokenize(text: str) -> Tokens:
        # Found by their spelling: the library's own offsets have other names in each of its versions.
        places, start = [], 0
        for piece in processor.encode(text, out_type=str):
            spelled = piece.replace("\u2581", " ").strip()
            at = text.find(spelled, start) if spelled else -1
            start = at + len(spelled) if at >= 0 else start
            places.append((at if at >= 0 else start, start))
        return Tokens(list(processor.encode(text)), places)

    return tokenize


def _checked(tokenizer: tokenizers.Tokenizer, path: Path) -> Tokenize:
    """Return the function from text to tokens; raises CheckpointError where the template's special ones are missing."""
    absent = [token for token in TURN if tokenizer.token_to_id(token) is None]
    if absent:
        raise CheckpointError(
            f"{path}: it has no {' and no '.join(absent)}; needed the tokenizer of a Qwen chat model; take the folder "
            "from the model's official place"
        )
    # parity: what the file adds around every text is added; Qwen's adds nothing.

    def tokenize(text: str) -> Tokens:
        encoding = tokenizer.encode(text)
        return Tokens(list(encoding.ids), list(encoding.offsets))

    return tokenize


def _sound(path: Path, read: Callable[[], Any]) -> Any:
    """Call `read` and turn whatever it raises into a CheckpointError that names the file."""
    if path.stat().st_size > LARGEST and path.suffix != ".gguf":
        raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes; needed at most {LARGEST:,}; download it again")
    try:
        return read()
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    # The tokenizers library raises the bare class, and where it panics a PanicException, which is no Exception.
    except BaseException as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: not a readable tokenizer file ({reason}); download it again") from None
