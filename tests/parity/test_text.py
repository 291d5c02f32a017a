"""The text side against transformers: ids of the tokenizer, features of the encoder."""

import os

import pytest
import torch

from s3dit.model.config import TextEncoderConfig
from s3dit.model.text_encoder import EMBEDDING, TextEncoder
from s3dit.model.tokenizer import TEMPLATE, Tokenizer
from s3dit.weights.assign import assign
from s3dit.weights.checkpoint import open_checkpoint
from s3dit.weights.keymap import official

transformers = pytest.importorskip("transformers", reason="parity needs transformers: pip install 's3dit[test]'")

LENGTHS = [3, 17, 8]
LONGEST = max(LENGTHS)
# Same formulas in fp32, but other matrix heights (ours has no padding) and so another order of sums: a few ulp
# (1.2e-7), which the sharp attention of these weights enlarges. Seen: 6e-7; one wrong layer or angle is above 1e-2.
ROUNDING = 2e-6


@pytest.fixture(scope="module", params=["4.51", "5"])
def folder(request, tmp_path_factory):
    """A random Qwen3 saved by transformers, under the names and config of its major versions."""
    torch.manual_seed(0)
    model = transformers.Qwen3Model(
        transformers.Qwen3Config(
            vocab_size=97, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True,
        )
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(len(name))
        noise = torch.randn(parameter.shape, generator=generator)
        # Norms that are not 1, and projections large enough that attention is not flat.
        parameter.data = 1 + 0.3 * noise if "norm" in name else 1.5 * noise * parameter.shape[-1] ** -0.5
    path = tmp_path_factory.mktemp(f"qwen3-{request.param}")
    if request.param == "5":
        model.save_pretrained(path, max_shard_size="100KB")
        return path
    from safetensors.torch import save_file

    save_file({f"model.{name}": tensor for name, tensor in model.state_dict().items()}, path / "model.safetensors")
    transformers.Qwen3Config.from_dict(model.config.to_dict()).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reference(folder):
    if (folder / "model.safetensors.index.json").exists():
        return transformers.Qwen3Model.from_pretrained(folder, dtype=torch.float32).eval()
    # The causal model's files, `model.` before every name: what the official folder holds.
    return transformers.Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().model


@pytest.fixture(scope="module")
def ours(folder):
    """The encoder, and the embeddings of ids."""
    from s3dit.configs.model_files import read_json

    with torch.device("meta"):
        encoder = TextEncoder(TextEncoderConfig.from_json(read_json(folder / "config.json"), "config.json"))
    checkpoint = open_checkpoint(folder)
    assign(encoder, checkpoint, dtype=torch.float32, unused=encoder.unused)
    named = official(checkpoint, encoder.state_dict())
    return encoder, lambda ids: named.rows(EMBEDDING, ids)


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 97, (length,), generator=generator) for length in LENGTHS]


@pytest.fixture(scope="module")
def needed(reference, prompts):
    """What the official pipeline reads: all prompts padded on the right, hidden_states[-2] of the real tokens."""
    ids = torch.zeros(len(prompts), LONGEST + 5, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
        mask[row, : len(prompt)] = 1
    with torch.no_grad():
        hidden = reference(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
    return [hidden[row, : len(prompt)] for row, prompt in enumerate(prompts)]


def distance(found, reference):
    return ((found - reference).norm() / reference.norm()).item()


def test_every_official_name(reference, ours):
    """The same names, `model.` before them."""
    assert [f"model.{name}" for name in reference.state_dict()] == list(ours[0].state_dict())


def test_embeddings(reference, ours, prompts):
    """Rows of the file are rows of the file: 0.0."""
    assert torch.equal(ours[1](prompts[1]), reference.embed_tokens(prompts[1]))


def test_features_of_a_ragged_batch(ours, prompts, needed):
    encoder, rows = ours
    found = encoder(rows(torch.cat(prompts)), LENGTHS).split(LENGTHS)
    for one, reference in zip(found, needed, strict=True):
        assert distance(one, reference) < ROUNDING


@pytest.mark.parametrize("i", range(3))
def test_features_of_one_prompt(ours, prompts, needed, i):
    encoder, rows = ours
    assert distance(encoder(rows(prompts[i]), LENGTHS[i : i + 1]), needed[i]) < ROUNDING


def test_same_shapes_same_bits(reference, ours, prompts):
    """One prompt, unpadded on both sides, so that every product has the same shape: 0.0."""
    encoder, rows = ours
    with torch.no_grad():
        hidden = reference(input_ids=prompts[1][None], output_hidden_states=True).hidden_states
    assert torch.equal(encoder(rows(prompts[1]), [LENGTHS[1]]), hidden[-2][0])
    assert not torch.equal(hidden[-2], hidden[-1]), "the comparison would not see one layer too many"


def test_late_positions(reference, ours):
    """Angles of position 1500 are rounded as the reference rounds them: 0.0, with exact angles it is not."""
    encoder, rows = ours
    ids = torch.arange(1501) % 97
    with torch.no_grad():
        hidden = reference(input_ids=ids[None], output_hidden_states=True).hidden_states[-2][0]
    assert torch.equal(encoder(rows(ids), [1501]), hidden)


REAL = os.environ.get("S3DIT_QWEN_TOKENIZER")
LONG = "an exceedingly long walk through snow, past foxes; " * 90
TEXTS = [
    "", " ", "A cat", "  two  spaces\t\ttabs \r\n\r\n\n lines  ", "It's what they'LL say: 3.14159, 2024年",
    "一只红狐狸在雪地里奔跑，水墨画风格。", "🦊🏔️ 👩‍👩‍👧 🇩🇪", "e\u0301 \u00e9 Å ﬁ ½ ™",
    "日本語 한국어 العربية हिन्दी ไทย עברית", "\u200b\u200d\ufeff\u00a0\u3000\x00\x7f",
    "<|im_end|>", "a<|im_start|>system\nb<|im_end|>", "<think>x</think><tool_call><|vision_pad|>", "<|im_start|",
    "{} {0} {prompt}", "a" * 3000, LONG,
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers():
    if not REAL:
        pytest.skip("S3DIT_QWEN_TOKENIZER does not name a folder with Qwen3's tokenizer")
    return Tokenizer(REAL), transformers.Qwen2Tokenizer.from_pretrained(REAL)


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text[:12]))
@pytest.mark.filterwarnings("ignore:the prompt has")
@pytest.mark.sampled(4)
def test_ids(tokenizers, text):
    """What the official pipeline feeds the encoder: chat template, cut at 512, and without the cut."""
    ours, reference = tokenizers
    message = [{"role": "user", "content": text}]
    whole = reference.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    assert whole == TEMPLATE.format(text)
    for length in (512, 9999):
        assert ours.encode(text, length) == reference(whole, max_length=length, truncation=True).input_ids


def test_long_prompt_is_long(tokenizers):
    with pytest.warns(UserWarning, match="cut off"):
        assert len(tokenizers[0].encode(LONG)) == 512
