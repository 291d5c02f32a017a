"""PEFT's settings of an adapter: its strength by layer, and the meaning of each of their keys.

They are in a file's header (diffusers) or beside it (PEFT). A key is read, or without effect for the reason given in
`INERT`, or refused where it makes another change of the weights; keys that PEFT does not know, and choices of layers,
are noted.

Source: the configurations of LoRA, LoHa and LoKr in PEFT 0.21.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Patterns of layer names come from files that are not trusted. `re` backtracks, so its time grows with the length of a
# name to the power of the repetitions in a pattern; a repeated group, a look-around or a back-reference could take for
# ever.
MAX_PATTERN_LENGTH, MAX_REPEATS, PATTERN_COST = 200, 3, 1 << 19
# The last form warns: Python may give nested sets a meaning.
UNSAFE = re.compile(r"\)[*+{]|\(\?[^:]|\\[1-9]|[*+}?][*+{]|\{,?\d{3,}|\{\d+,\d{3,}|\[[^\]]*(?:\[|--|&&|~~|\|\|)")

READ = (
    "peft_type", "r", "lora_alpha", "alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights",
    "use_dora", "modules_to_save",
)  # fmt: skip
# Settings by which a change of weights becomes another one, and which are not offered here.
UNSUPPORTED = (
    "alora_invocation_tokens", "layer_replication", "use_qalora", "use_bdlora", "arrow_config", "kasa_config",
    "velora_config", "monteclora_config", "target_parameters", "trainable_token_indices",
)  # fmt: skip
# PEFT would leave out of the file what these do not choose.
CHOICES = ("layers_to_transform", "exclude_modules")
# Ways to start that leave the base weights as they are; with another one they are the rest of a decomposition, without
# which the adapter gives another picture.
SAME_BASE = ("gaussian", "eva", "orthogonal", "mica")
INERT = {
    "says who wrote the file, and for what": (
        "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    ),
    "acts in training only": (
        "inference_mode", "lora_dropout", "rank_dropout", "rank_dropout_scale", "module_dropout", "init_weights",
    ),
    "spreads or moves the arithmetic": ("megatron_config", "megatron_core", "runtime_config"),
    "what was trained is what the file holds": ("target_modules", "layers_pattern"),
    "biases are keys of their own, which are read or counted as unmatched": ("bias", "lora_bias"),
    "PEFT itself takes it back for linear layers": ("fan_in_fan_out",),
    "acts with ways to start that are refused, or in training only": (
        "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    ),
    "acts with use_qalora, which is refused": ("qalora_group_size",),
    "acts on embeddings of text, which no layer here is": ("ensure_weight_tying",),
    "the shapes of the factors say it": ("decompose_both", "decompose_factor", "use_effective_conv2d"),
}  # fmt: skip
# Keys that a note names, how much of each; and names that are looked for among a file's keys.
SHOWN_KEYS, SHOWN_CHARACTERS, MAX_MODULES = 10, 60, 100

Patterns = tuple[tuple[re.Pattern[str], float], ...]


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a part of the model.

    alpha, rank: of every layer (rank None: the tensors have it) · alphas, ranks: exceptions by pattern · root: the
    strength is alpha / √rank · norms: whether layers have norms (DoRA), None where it is not stated · whole: modules
    that are stored whole · notes: settings without effect, in words.
    """

    alpha: float
    rank: float | None
    root: bool
    alphas: Patterns
    ranks: Patterns
    norms: bool | None
    whole: tuple[str, ...]
    notes: tuple[str, ...]

    def alpha_of(self, layer: str) -> float:
        """Return the alpha of a layer, by its official name."""
        return _value_for(self.alphas, layer, self.alpha)

    def rank_of(self, layer: str) -> float:
        """Return the rank of a layer whose tensors do not have it; raises ValueError where it is not stated."""
        rank = _value_for(self.ranks, layer, self.rank)
        if rank is None:
            raise ValueError("an alpha without a rank")
        return rank


def _value_for(exceptions: Patterns, layer: str, default: Any) -> Any:
    """Return a layer's own value: of the first pattern that matches the end of its name, as PEFT does."""
    return next((value for pattern, value in exceptions if pattern.match(layer)), default)


def read_settings(values: Mapping[str, Any]) -> Settings:
    """Read PEFT's settings of a part; raises ValueError for another kind, or a setting that is not supported."""
    kind = str(values.get("peft_type") or "LORA").rpartition(".")[2].upper()
    if kind not in ("LORA", "LOHA", "LOKR"):
        raise ValueError(f"it is PEFT's {kind[:40]}, needed LORA, LOHA or LOKR; merge it into the model with PEFT")
    if unsupported := [key for key in UNSUPPORTED if values.get(key)]:
        raise ValueError(f"{unsupported[0]} is set, which is not supported; merge the adapter into the model with PEFT")
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in SAME_BASE:
        raise ValueError(
            f"init_lora_weights is {start[:40]!r}, which changes the model's own weights; save it as plain LoRA with "
            "PEFT's path_initial_model_for_weight_conversion"
        )
    alphas, ranks = (_patterns(values, name) for name in ("alpha_pattern", "rank_pattern"))
    # PEFT's own values where a file leaves them out.
    alpha = _number(values.get("lora_alpha", values.get("alpha", 8)), "alpha")
    rank = None if values.get("r") is None else _number(values["r"], "r")
    norms = None if values.get("use_dora") is None else bool(values["use_dora"])
    whole = values.get("modules_to_save") or []
    whole = tuple(map(str, whole)) if isinstance(whole, list) else (str(whole),)
    if len(whole) > MAX_MODULES:
        raise ValueError(f"modules_to_save has {len(whole)} names, needed at most {MAX_MODULES}")
    return Settings(alpha, rank, bool(values.get("use_rslora")), alphas, ranks, norms, whole, tuple(_notes(values)))


def _notes(values: Mapping[str, Any]) -> list[str]:
    """Return what the settings state without effect here."""
    notes = [
        f"{key} is {str(values[key])[:SHOWN_CHARACTERS]}, but every layer in the file is used"
        for key in CHOICES
        if values.get(key) not in (None, [])
    ]
    known = {*READ, *UNSUPPORTED, *CHOICES, *(key for keys in INERT.values() for key in keys)}
    if unknown := sorted(values.keys() - known):
        shown = ", ".join(key[:SHOWN_CHARACTERS] for key in unknown[:SHOWN_KEYS])
        notes.append(
            f"settings that PEFT does not know, without effect: {shown}{', …' if len(unknown) > SHOWN_KEYS else ''}"
        )
    return notes


def _patterns(values: Mapping[str, Any], name: str) -> Patterns:
    """Compile a table of exceptions as PEFT matches them; raises ValueError for a pattern that could take for ever."""
    table = values.get(name) or {}
    if not isinstance(table, dict):
        raise ValueError(f"{name} is {str(table)[:40]}, needed a table")
    cost, compiled = 0.0, []
    for key, value in table.items():
        if (
            len(key) > MAX_PATTERN_LENGTH
            or (repeats := len(re.findall(r"[*+{]", key))) > MAX_REPEATS
            or UNSAFE.search(key)
        ):
            raise ValueError(
                f"{name} has the regular expression {key[:60]!r}; needed at most {MAX_PATTERN_LENGTH} characters, "
                f"{MAX_REPEATS} repetitions, no repeated group, look-around or back-reference"
            )
        # Ways through: of each repetition as many as a name is long, of `?` two, of groups their alternatives at most.
        groups, choices = key.count("(") + 1, key.count("|")
        cost += 64**repeats * 2 ** key.count("?") * (1 + choices / groups) ** groups
        if cost > PATTERN_COST:
            raise ValueError(f"{name} has too many patterns with repetitions; name the layers instead")
        try:
            compiled.append((re.compile(rf"(.*\.)?({key})$"), _number(value, name)))
        except (re.error, OverflowError) as error:
            raise ValueError(f"{name} has {key[:60]!r}, which is no regular expression ({error})") from None
    return tuple(compiled)


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise ValueError(f"{name} is {repr(value)[:40]}, needed a number")
    if value <= 0 and name in ("r", "rank_pattern"):
        raise ValueError(f"{name} is {value!r}, needed one above 0")
    return float(value)
