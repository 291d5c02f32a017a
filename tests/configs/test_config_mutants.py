"""Mutants of every JSON file of a model: each is planned or refused with one clear line, at once.

The default suite tries some hundred; S3DIT_MUTANTS=20000 is for a longer run.
"""

import copy
import json
import os
import random
import shutil
import time
import warnings
from collections import Counter

import pytest

from s3dit import Pipeline
from s3dit.errors import CheckpointError, RequestError
from s3dit.runtime.embedded import EMBEDDED

MUTANTS = int(os.environ.get("S3DIT_MUTANTS", "400" if os.environ.get("S3DIT_SLOW") == "1" else "80"))
VALUES = (
    None, True, False, 0, 1, -1, 2, 3, 7, 16, 128, 255, 256, 1 << 16, 1 << 20, (1 << 20) + 1, 1 << 31, 1 << 63, 10**30,
    0.0, -0.0, 0.5, 1e-30, 1e30, 1e308, float("nan"), float("inf"), -float("inf"), "", "x", "1", "3.0", "default",
    "yarn", "\x1b[2J", "a\nb", "ü" * 300, [], [0], [1, 2, 3], [[]], ["a"], [None], [1] * 40, {}, {"a": 1},
    {"rope_type": "default"}, {"rope_theta": 0}, [True], [1e400], "full_attention", ["full_attention"] * 3,
)  # fmt: skip
NAMES = ("x", "rope_scaling", "layer_types", "use_sliding_window", "shift_terminal", "use_dynamic_shifting", "variant",
         "use_karras_sigmas", "sliding_window", "per_layer_config", "base_shift", "time_shift_type", "",
         "max_image_seq_len", "quantization_config", "siglip_feat_dim", "_class_name")  # fmt: skip


def places(data, path=()):
    """Every place in a JSON value."""
    yield path
    for key, inner in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield from places(inner, (*path, key))


def mutant(text, draw):
    """A file after one to three changes of its values, or of its bytes."""
    if draw.random() < 0.2:
        data = bytearray(text)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(data))
            data[at : at + draw.choice((0, 1, 9))] = draw.choice(
                (b"", b"0", b"9" * 20, b'"', b"[", b"}", b"\xff", b"e99")
            )
        return bytes(data)
    data = json.loads(text)
    for _ in range(draw.randint(1, 3)):
        found = list(places(data))
        # Long lists, of words and tokens, would be all that is hit.
        *path, last = draw.choice([one for one in found if one and len(one) == 1] + found[1:40])
        home = data
        for key in path:
            home = home[key]
        what = draw.random()
        if what < 0.1 and isinstance(home, dict):
            del home[last]
        elif what < 0.2 and isinstance(home, dict):
            home[draw.choice(NAMES)] = copy.deepcopy(draw.choice(VALUES))
        else:
            home[last] = copy.deepcopy(draw.choice(VALUES))
        if not data:
            break
    return json.dumps(data).encode()


def dry_run(folder):
    """What happened: planned, or the class of the refusal; the line of a refusal is short and printable."""
    try:
        Pipeline.load(folder, device="cpu").plan(prompt="a red star", seed=1)
    except (CheckpointError, RequestError) as error:
        assert "\n" not in str(error) and len(str(error)) < 1200, str(error)
        return type(error).__name__
    return "planned"


def mutate_all(folder, files, count, seed):
    """Mutants of the files in turn; what became of them."""
    draw, seen, slowest = random.Random(seed), Counter(), 0.0
    for i in range(count):
        path = folder / files[i % len(files)]
        whole = path.read_bytes()
        path.write_bytes(mutant(whole, draw))
        start = time.process_time()
        try:
            seen[dry_run(folder)] += 1
        except Exception as error:
            raise AssertionError(f"mutant {i} of seed {seed}, {path.name}: {path.read_bytes()[:3000]!r}") from error
        taken = time.process_time() - start
        slowest = max(slowest, taken)
        # A model of the largest bounds is 128 layers of modules, built without memory.
        assert taken < 5, path.read_bytes()[:3000]
        path.write_bytes(whole)
    return seen, slowest


def copied(source, target):
    """A model whose JSON files are its own, and whose weights are links."""
    for path in source.rglob("*"):
        if path.is_file():
            home = target / path.relative_to(source)
            home.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".json":
                shutil.copyfile(path, home)
            else:
                home.symlink_to(path)
    return target


FILES = ("model_index.json", "transformer/config.json", "text_encoder/config.json", "vae/config.json",
         "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json")  # fmt: skip


@pytest.mark.longer
def test_mutants(tmp_path):
    folder = copied(EMBEDDED.resolve(), tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen, slowest = mutate_all(folder, (*FILES, "s3dit.json"), MUTANTS, 1)
    print(dict(seen), f"slowest {slowest:.2f} s")
    # Both ends were reached, so it looks at more than the first check of each reader.
    assert seen["planned"] > MUTANTS // 20 and seen["CheckpointError"] > MUTANTS // 4
