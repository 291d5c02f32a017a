"""Mutants of adapter files, in header, names, dtypes, shapes and values: each is read or refused, quickly."""

import json
import random
import time

import torch
from safetensors.torch import save

from s3dit.errors import CheckpointError
from s3dit.weights.adapter import read_adapter
from s3dit.weights.adapter_info import METADATA, describe
from s3dit.weights.checkpoint import open_checkpoint

L = "transformer.layers.0.attention.to_q"


def base(r):
    k = r.randrange(4)
    if k == 0:
        t = {
            f"{L}.lora_A.weight": torch.ones(2, 6),
            f"{L}.lora_B.weight": torch.ones(8, 2),
            f"{L}.alpha": torch.tensor(1.0),
        }
    elif k == 1:
        t = {
            f"{L}.lokr_w1": torch.ones(2, 2),
            f"{L}.lokr_w2_a": torch.ones(4, 2),
            f"{L}.lokr_w2_b": torch.ones(2, 3),
            f"{L}.alpha": torch.tensor(1.0),
        }
    elif k == 2:
        t = {
            f"{L}.{n}": torch.ones(*s)
            for n, s in (("hada_w1_a", (8, 2)), ("hada_w1_b", (2, 6)), ("hada_w2_a", (8, 2)), ("hada_w2_b", (2, 6)))
        }
    else:
        t = {
            f"{L}.lora_A.weight": torch.ones(2, 6),
            f"{L}.lora_B.weight": torch.ones(8, 2),
            f"{L}.lora_magnitude_vector": torch.ones(8),
            f"{L}.lora_B.bias": torch.ones(8),
        }
    return t


V = [
    None,
    0,
    -1,
    1,
    1e30,
    float("inf"),
    "x",
    [],
    {},
    True,
    10**400,
    [[1]],
    "(a+)+",
    {"to_q": 2},
    {"^layers.0.*": 3},
    {"(": 1},
    {"to_q": "x"},
    {"a{2,1}": 1},
    {"[[a": 1},
]
K = [
    "r",
    "lora_alpha",
    "alpha_pattern",
    "rank_pattern",
    "use_rslora",
    "peft_type",
    "init_lora_weights",
    "alpha",
    "transformer.r",
    "transformer.alpha_pattern",
]
D = [
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.complex64,
    torch.float8_e8m0fnu,
]
S = [(), (1,), (0,), (2, 3), (1, 1, 1), (8, 2, 1, 1), (2, 6, 3, 3), (0, 6), (1, 0)]


def mutant(r):
    t = base(r)
    m = {}
    for _ in range(r.randrange(1, 4)):
        key = r.choice(list(t))
        w = r.randrange(6)
        if w == 0:
            t[key] = torch.ones(r.choice(S))
        elif w == 1:
            t[key] = (t[key].real if t[key].is_complex() else t[key]).float().to(r.choice(D))
        elif w == 2:
            t[key + r.choice([".x", "_", ".alpha", ".weight"])] = t.pop(key)
        elif w == 3:
            t[key] = (t[key].real if t[key].is_complex() else t[key]).float() * r.choice(
                [float("nan"), float("inf"), 0, 1e38]
            )
        elif w == 4 and len(t) > 1:
            t.pop(key)
        else:
            m[METADATA] = json.dumps({r.choice(K): r.choice(V) for _ in range(3)})
    data = bytearray(save(t, m or None))
    if r.random() < 0.4:
        for _ in range(r.randrange(1, 4)):
            data[r.randrange(min(len(data), 500))] = r.randrange(256)
    return bytes(data)


def test_mutants_are_read_or_refused(tmp_path):
    choice, path, read = random.Random(7), tmp_path / "adapter.safetensors", 0
    for _ in range(400):
        path.write_bytes(mutant(choice))
        start = time.process_time()
        for action in (lambda: describe(open_checkpoint(path)), lambda: read_adapter(path)):
            try:
                action()
                read += 1
            except CheckpointError:
                continue
        assert time.process_time() - start < 5
    assert read > 40
