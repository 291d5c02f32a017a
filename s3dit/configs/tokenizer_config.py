"""Checks a tokenizer's `tokenizer_config.json` against what `model.tokenizer` does.

`check` reads the switches and the chat template, which is compared and never executed: another one than Qwen3's
own is noted, because diffusers would write the prompt with it. `check_added` holds the tokens that it adds, by list or
by name, to those of `tokenizer.json`: transformers would cut text at each of them.

Source: transformers 5 `Qwen2Tokenizer`, each key tried for its effect on ids.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from s3dit.configs import config_keys
from s3dit.configs.model_files import read_json
from s3dit.errors import CheckpointError

FILE = "tokenizer_config.json"
# SHA-256 of the templates, white space around them cut, that write one user's turn as `tokenizer.TEMPLATE` does.
TEMPLATES = (
    "a55ee1b1660128b7098723e0abcd92caa0788061051c62d51cbe87d9cf1974d8",  # Qwen3's, of the official repositories
    "ecab0705c9f1937ebe00dd50fd7c747cf08a6ea7b44881ce6ec9e9bd2f90c27f",  # the embedded model's
)
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
# Keys that name tokens: one, a list of them, or a dict of them.
NAMED = (
    "bos_token", "eos_token", "pad_token", "unk_token", "additional_special_tokens", "extra_special_tokens",
    "model_specific_special_tokens",
)  # fmt: skip


def check(folder: Path) -> list[str]:
    """Return notes on what a tokenizer's folder says without effect.

    Raises CheckpointError for a switch that would change ids.
    """
    path = folder / FILE
    settings = read_json(path) if path.is_file() else {}
    config_keys.TOKENIZER.check(settings, path)
    jinja, template = folder / "chat_template.jinja", settings.get("chat_template")
    if jinja.is_file() and jinja.stat().st_size < 1 << 20:
        template, path = jinja.read_text(encoding="utf-8", errors="replace"), jinja
    digest = hashlib.sha256(template.strip().encode(errors="replace")).hexdigest() if isinstance(template, str) else ""
    notes = []
    if template is not None and digest not in TEMPLATES:
        notes.append(f"{path}: its chat template is not Qwen3's own; it is not executed, prompts stand in Qwen3's turn")
    return notes + config_keys.TOKENIZER.note_unknown(
        settings, ("added_tokens_decoder", "chat_template"), folder / FILE
    )


def check_added(path: Path, tokens: Mapping[int, Any]) -> None:
    """Raise CheckpointError where a tokenizer_config.json adds tokens that are not among `tokens`, by id, or otherwise.

    tokens: what `tokenizer.json` adds, each with its content and flags.
    """
    settings = read_json(path) if path.is_file() else {}
    listed, contents = settings.get("added_tokens_decoder") or {}, {token.content for token in tokens.values()}
    for number, token in listed.items() if isinstance(listed, dict) else [("", None)]:
        added = tokens.get(int(number)) if number.isdecimal() and len(number) < 10 else None
        flags = token if isinstance(token, dict) else {}
        same = added is not None and flags.get("content") == added.content
        if not same or any(bool(flags.get(flag, False)) != getattr(added, flag) for flag in FLAGS):
            raise CheckpointError(
                f"{path}: its added token {number[:20]!r} is {token!r:.80}, which is not in tokenizer.json; needed "
                "two files of one tokenizer; download the tokenizer folder again"
            )
    for name in NAMED:
        for token in _named(settings.get(name)):
            if token not in contents:
                raise CheckpointError(
                    f"{path}: {name} is {token!r:.60}, which is no added token of tokenizer.json; needed two "
                    "files of one tokenizer; download the tokenizer folder again"
                )


def _named(value: Any) -> Iterator[Any]:
    """The tokens that a key names; transformers writes one as text, or as a dict with its content."""
    if isinstance(value, dict) and "content" in value:
        yield value["content"]
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _named(inner)
    elif value is not None:
        yield value
