"""Four mistakes that other engines made with this model, looked for by name in the stages of both sides.

Hidden states off by one layer; template tokens doubled or missing; queries and keys rotated in other pairs; padding
that is zeroed, or not attended to. Each is found from records alone, so also those of another program, as long as it
keeps the stages that a check names.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher

import torch
import torch.nn.functional as F
from torch import Tensor

from s3dit.model.layout import padded
from s3dit.parity.taps import SAMPLE

Record = Mapping[str, Tensor]
# Relative error up to which two tensors are the same here: far below any of these mistakes, far above bf16's rounding.
SAME = 0.03
UNTOLD = "there is no padding, or its place is not known; take a prompt whose tokens are no multiple of 32"


@dataclass(frozen=True, slots=True)
class Check:
    """What a check says: name · found: whether the mistake was made, None where it could not be told · why."""

    name: str
    found: bool | None
    why: str

    def __str__(self) -> str:
        """A line for a terminal."""
        return f"{'not seen' if self.found is None else 'FOUND' if self.found else 'ok':>8}  {self.name}: {self.why}"

    def to_json(self) -> dict[str, object]:
        """JSON values."""
        return asdict(self)


def named_checks(mine: Record, truth: Record, lengths: Sequence[int]) -> list[Check]:
    """Look for each mistake in `mine`; lengths: tokens of every item's prompt, empty where they are not known."""
    template = _checked("template tokens", ("token ids",), mine, truth, _template)
    # Of other tokens nothing else can be told.
    lengths = () if template.found else lengths
    attention = tuple(f"{SAMPLE}.attention.{part}" for part in ("q", "k", "to_v", "mixed"))
    return [
        _checked("hidden state", ("text features",), mine, truth, _hidden_state),
        template,
        _checked("rope pairing", (attention[0], "rope of text"), mine, truth, _pairing),
        _checked("pad tokens learned", ("tokens of text",), mine, truth, lambda a, b: _learned(a, b, lengths)),
        _checked("pad tokens attended", attention, mine, truth, lambda a, b: _attended(a, b, lengths)),
    ]


def _checked(
    name: str,
    stages: Sequence[str],
    mine: Record,
    truth: Record,
    look: Callable[[Record, Record], tuple[bool | None, str]],
) -> Check:
    missing = [stage for stage in stages if stage not in mine or stage not in truth]
    if missing:
        return Check(name, None, f"no stage {missing[0]} on both sides")
    return Check(name, *look(mine, truth))


def near(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same here; not where shapes differ or either is not finite."""
    if a.shape != b.shape:
        return False
    a, b = a.double(), b.double()
    return bool((a - b).norm() <= SAME * b.norm())


def _hidden_state(mine: Record, truth: Record) -> tuple[bool | None, str]:
    """Features that are those of another layer."""
    features = mine["text features"]
    if near(features, truth["text features"]):
        return False, "features are those of the last layer but one"
    layers = {name: truth[name] for name in truth if name.startswith("text.layers.") and name.count(".") == 2}
    layers |= {"the last layer": truth["text.beyond"]} if "text.beyond" in truth else {}
    same = [name for name, tensor in layers.items() if near(features, tensor)]
    if same:
        return True, f"features are those of {same[0].removeprefix('text.')}, needed the last layer but one, unnormed"
    return None, "features part, and are those of no other layer"


def _template(mine: Record, truth: Record) -> tuple[bool | None, str]:
    """Tokens too many or too few."""
    a, b = mine["token ids"].tolist(), truth["token ids"].tolist()
    if a == b:
        return False, f"the same {len(a)} tokens"
    edits = [edit for edit in SequenceMatcher(None, b, a, autojunk=False).get_opcodes() if edit[0] != "equal"]
    told = []
    for kind, start, stop, first, last in edits[:4]:
        if kind == "insert":
            doubled = a[first:last] in (b[start - (last - first) : start], b[start : start + last - first])
            told.append(f"{a[first:last]} {'doubled' if doubled else 'added'} at {start}")
        elif kind == "delete":
            told.append(f"{b[start:stop]} missing at {start}")
        else:
            told.append(f"{a[first:last]} in the place of {b[start:stop]} at {start}")
    return True, f"{len(a)} tokens, needed {len(b)}: {'; '.join(told)}"


def _turned(q: Tensor, rope: Tensor, *, halves: bool, back: bool = False) -> Tensor:
    """Rotate q (N, H, D) by rope (N, D/2, 2), pairing neighbours or halves; back: by the negative angles."""
    parts = q.unflatten(-1, (2, -1)).transpose(-1, -2) if halves else q.unflatten(-1, (-1, 2))
    cos, sin = rope[:, None, :, 0], rope[:, None, :, 1] * (-1 if back else 1)
    x, y = parts.unbind(-1)
    turned = torch.stack((x * cos - y * sin, x * sin + y * cos), -1)
    return (turned.transpose(-1, -2) if halves else turned).flatten(-2)


def _pairing(mine: Record, truth: Record) -> tuple[bool | None, str]:
    """Queries rotated in other pairs, backwards or not at all."""
    q, right = mine[f"{SAMPLE}.attention.q"].double(), truth[f"{SAMPLE}.attention.q"].double()
    rope = truth["rope of text"].double()
    if near(q, right):
        return False, "neighbours are pairs"
    plain = _turned(right, rope, halves=False, back=True)
    guesses = {
        "halves are pairs, needed neighbours (2i, 2i + 1)": _turned(plain, rope, halves=True),
        "rotated backwards": _turned(plain, rope, halves=False, back=True),
        "not rotated": plain,
    }
    for told, guess in guesses.items():
        if near(q, guess):
            return True, told
    return None, "queries part, and no other pairing explains it"


def _items(lengths: Sequence[int]) -> list[tuple[slice, slice]]:
    """Rows of each item's real tokens, and of its padding, in the text stream."""
    rows, start = [], 0
    for length in lengths:
        rows.append((slice(start, start + length), slice(start + length, start + padded(length))))
        start += padded(length)
    return rows


def _learned(mine: Record, truth: Record, lengths: Sequence[int]) -> tuple[bool | None, str]:
    """Padding that is not the learned token."""
    a, b = mine["tokens of text"], truth["tokens of text"]
    rows = [pads for _, pads in _items(lengths) if pads.start < pads.stop]
    if not rows or len(b) != sum(map(padded, lengths)):
        return None, UNTOLD
    if a.shape != b.shape:
        return True, f"{len(a)} tokens, needed {len(b)}: prompts are filled up to multiples of 32"
    pads, right = (torch.cat([tensor[each] for each in rows]) for tensor in (a, b))
    if near(pads, right):
        return False, f"{len(pads)} of them are cap_pad_token"
    return True, f"{len(pads)} of them are {'zeros' if not pads.any() else 'other numbers'}, needed cap_pad_token"


def _attended(mine: Record, truth: Record, lengths: Sequence[int]) -> tuple[bool | None, str]:
    """Padding that real tokens do not look at."""
    q, k, v, mixed = (mine[f"{SAMPLE}.attention.{part}"].double() for part in ("q", "k", "to_v", "mixed"))
    items = _items(lengths)
    if not any(pads.start < pads.stop for _, pads in items) or len(q) != sum(map(padded, lengths)):
        return None, UNTOLD
    v = v.unflatten(-1, (q.shape[1], -1))
    whole, real = [], []
    for tokens, pads in items:
        whole.append(_attention(q[tokens], k[tokens.start : pads.stop], v[tokens.start : pads.stop]))
        real.append(_attention(q[tokens], k[tokens], v[tokens]))
    rows = torch.cat([mixed[tokens] for tokens, _ in items])
    beside, without = ((rows - torch.cat(guess)).norm().item() for guess in (whole, real))
    if min(beside, without) > SAME * rows.norm().item():
        return None, "what attention answers is neither with nor without the padding"
    if beside <= without:
        return False, "real tokens look at the padding"
    return True, "real tokens do not look at the padding, needed attention to all tokens of the multiple of 32"


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of (n, H, D) over (m, H, D) -> (n, H · D)."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
