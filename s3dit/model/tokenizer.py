"""Turns a prompt into the ids that the text encoder reads: Qwen's byte-level BPE, inside Qwen's chat template.

The template is a constant: a single user turn that asks for an answer, no system turn, thinking left open. A template
in the model's folder is not executed. Where there are reference pictures (Omni, Edit) the turn is cut into the texts
around them, and each is encoded by itself: no text knows of another. Special tokens typed by a user are parsed as
special, and a prompt that is too long is cut from the right, closing tags and all: both as the official pipeline does.

Nothing is padded: the text encoder is causal, so padding changes no feature of a real token.

Source: the official repository's prompt format. Not here: the files (`configs.tokenizer_files`).
"""

import warnings
from pathlib import Path

from s3dit.configs.tokenizer_files import open_tokenizer
from s3dit.weights.gguf_file import GGUFFile

TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
# The turn around pictures: a text before the first, one between each two, the prompt between the last and the picture
# that is to be drawn, and one after that.
BEFORE, BETWEEN = "<|im_start|>user\n<|vision_start|>", "<|vision_end|><|vision_start|>"
PROMPT, AFTER = (
    "<|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n<|vision_start|>",
    "<|vision_end|><|im_end|>",
)


class Tokenizer:
    """The tokenizer of a model folder, `tokenizer/` in the official layout, or of a GGUF file that carries one."""

    def __init__(self, source: str | Path | GGUFFile) -> None:
        """Read the files of a folder, or the metadata of a GGUF file.

        Raises CheckpointError when they are missing, broken or not of this family.
        """
        self._tokenize = open_tokenizer(source)

    def encode(self, prompt: str, max_length: int = 512) -> list[int]:
        """Return the ids of one prompt in the chat template, at most `max_length` of them; no padding.

        Warns, with the number of ids, when the end was cut off. Raises TypeError for anything but a str, ValueError for
        a max_length below 1 or text that is not Unicode (a lone surrogate).
        """
        _check(prompt, max_length)
        return self._cut(TEMPLATE.format(prompt), max_length)

    def segments(self, prompt: str, references: int, max_length: int = 512) -> list[list[int]]:
        """Return the ids of the texts around `references` pictures: n + 2 lists, or one where there is no picture.

        Each is cut to `max_length` by itself. Warns and raises as `encode` does.
        """
        _check(prompt, max_length)
        # A loop and not a comprehension, which Python before 3.12 counts as a frame of its own for warnings.
        ids = []
        for template in _templates(references):
            ids.append(self._cut(template.format(prompt), max_length))
        return ids

    def places(self, prompt: str, references: int, max_length: int = 512) -> list[list[tuple[int, int] | None]]:
        """Return, for each id of `segments`, the characters (start, stop) of the prompt that it stands for.

        None for tokens of the template; a character of several tokens is in the range of each.
        """
        _check(prompt, max_length)
        found = []
        for template in _templates(references):
            begin = template.find("{}") if "{}" in template else len(template)
            tokens = self._tokenize(template.format(prompt)).places[:max_length]
            inside = [(max(start - begin, 0), min(stop - begin, len(prompt))) for start, stop in tokens]
            found.append([place if place[0] < place[1] else None for place in inside])
        return found

    def _cut(self, text: str, max_length: int) -> list[int]:
        """The ids of a text, cut to max_length; warns in the name of the caller's caller."""
        ids = self._tokenize(text).ids
        if len(ids) > max_length:
            warnings.warn(
                f"the prompt has {len(ids)} tokens, the last {len(ids) - max_length} were cut off; "
                f"shorten it, or raise max_sequence_length above {max_length}",
                stacklevel=3,
            )
        return ids[:max_length]


def _templates(references: int) -> list[str]:
    """The texts around so many pictures, `{}` being the place of the prompt."""
    return [BEFORE, *[BETWEEN] * (references - 1), PROMPT, AFTER] if references else [TEMPLATE]


def _check(prompt: str, max_length: int) -> None:
    """Raise TypeError or ValueError for what cannot be encoded."""
    if not isinstance(prompt, str):
        raise TypeError(f"prompt is a {type(prompt).__name__}; needed a str; encode several prompts one by one")
    if max_length < 1:
        raise ValueError(f"max_length is {max_length}; needed at least 1; 512 is usual")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ValueError("prompt holds half of a surrogate pair; needed Unicode text; decode it as UTF-8 or UTF-16")
