"""The map of tokens says what the layout and the tokenizer say."""

import pytest
import torch

from s3dit.errors import RequestError
from s3dit.research.tokens import KINDS, tokens

PROMPTS = ["a red star above a blue ring", "a green ring"]


@pytest.fixture(scope="module")
def plan(pipe):
    return pipe.plan(PROMPTS, negative_prompt="a blue star", guidance_scale=2.0, seed=1, height=96, width=128)


def test_every_token_has_its_kind(pipe, plan):
    items = tokens(pipe, plan)
    layout = plan.layout(pipe.config.transformer, True, "cpu")
    assert [(item.item, item.branch) for item in items] == [
        (0, "positive"),
        (1, "positive"),
        (0, "negative"),
        (1, "negative"),
    ]
    assert [len(item) for item in items] == list(layout.joint.spans.lengths)
    begin, denoised = 0, []
    for item in items:
        denoised += [begin + i for i in item.find("image")]
        assert len(item.find("image")) == item.grid[0] * item.grid[1] == 48
        assert len(item.find("padding")) == sum(kind.endswith("padding") for kind in item.kinds)
        assert set(item.kinds) <= set(KINDS)
        begin += len(item)
    assert denoised == layout.joint.token_index.tolist()


def test_rows_of_streams_are_the_tokens_of_items(pipe, plan):
    """A stream's rows, taken item by item, are the rows that the joint order gathers."""
    items = tokens(pipe, plan)
    layout = plan.layout(pipe.config.transformer, True, "cpu")
    packs = {"image": layout.image, "text": layout.text}
    sizes = [len(pack.positions) for pack in packs.values()]
    place = torch.cat([pack.positions for pack in packs.values()])
    for name, pack in packs.items():
        seen = torch.cat(
            [pack.positions[item.starts[name] : item.starts[name] + len(item.rows[name])] for item in items]
        )
        assert torch.equal(seen, pack.positions) and len(seen) == sizes[list(packs).index(name)]
    begin = 0
    for item in items:
        joint = place[layout.gather][begin : begin + len(item)]
        for name, pack in packs.items():
            start = item.starts[name]
            assert torch.equal(pack.positions[start : start + len(item.rows[name])], joint[list(item.rows[name])])
        begin += len(item)


def test_words_are_found_by_their_characters(pipe, plan):
    item = tokens(pipe, plan)[0]
    assert item.words == ("a", "red", "star", "above", "a", "blue", "ring")
    ids = plan.captions[0][0]
    text = [i for i, kind in enumerate(item.kinds) if kind in ("prompt", "template")]
    assert len(text) == len(ids)
    for word in ("red", "star", "above", "blue ring", "RED"):
        assert "".join(item.text(i) for i in item.find(word)).strip() == word.casefold()
    assert len(item.find("a")) == 2 and item.find("template") == [i for i in text if i not in item.find("prompt")]


def test_a_word_that_is_not_there_is_named(pipe, plan):
    with pytest.raises(RequestError, match="rign.*nearest are.*ring"):
        tokens(pipe, plan)[0].find("rign")


def test_a_prompt_given_as_features(pipe):
    features = pipe.encode("a red star")[0]
    (item,) = tokens(pipe, pipe.plan(prompt_embeds=features, seed=1))
    assert len(item.find("embeds")) == len(features) == len(item.find("text")) and item.words == ()


def test_a_word_of_several_tokens_and_scripts(pipe):
    prompt = "Größe 红色的猫 a star’s ring STRASSE straße"
    (item,) = tokens(pipe, pipe.plan(prompt, seed=1))
    assert item.find("word:RING") == item.find("ring")
    for piece in ("Größe", "红色", "star", "ring", "straße"):
        covered = "".join(item.text(i) for i in dict.fromkeys(item.find(piece)))
        assert piece[0] in covered and piece[-1] in covered
