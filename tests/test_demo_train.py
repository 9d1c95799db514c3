"""The recipe of the demo models: the folder it makes, and what the second stage learns from."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minivlm.demo import DEMO_CHECKPOINT
from minivlm.demo.patches import WORDS
from minivlm.demo.train import Talks, answers_loss, make_folder, padded_behind, set_loudness, word_id
from minivlm.inputs import Inputs
from minivlm.models import llava_next
from minivlm.text import Tokenizer
from minivlm.train import initialise


def test_the_shipped_folder_is_what_the_recipe_makes(tmp_path):
    make_folder(tmp_path)
    for file in tmp_path.iterdir():
        assert json.loads(file.read_text()) == json.loads((DEMO_CHECKPOINT / file.name).read_text()), file.name


def test_batches_are_functions_of_their_number():
    config = json.loads((DEMO_CHECKPOINT / "config.json").read_text())
    processor = llava_next.Processor.from_folder(DEMO_CHECKPOINT, config)
    talks = Talks(processor, num_batches=2, batch_size=2, first_seed=50)
    first, again, second = talks[0], talks[0], talks[1]
    assert torch.equal(first.input_ids, again.input_ids) and torch.equal(first.pixel_values, again.pixel_values)
    assert not torch.equal(first.pixel_values[0], second.pixel_values[0])
    assert (first.labels >= 0).any(dim=1).all()


def test_answers_count_by_the_root_of_their_length():
    labels = torch.tensor([[-100, 5, 6, -100, -100, 7], [-100, -100, 3, 4, 2, 1]])
    logits = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(0))
    model = nn.Module()
    model.language_model = nn.Module()
    model.language_model.lm_head = nn.Identity()
    model.forward = lambda _: model.language_model.lm_head(logits)
    ours = answers_loss(model, Inputs(labels, labels, labels))

    def answer(row, places):
        losses = [F.cross_entropy(logits[row, place - 1], labels[row, place]) for place in places]
        return sum(losses) / len(places) ** 0.5, len(places) ** 0.5

    answers = [answer(0, [1, 2]), answer(0, [5]), answer(1, [2, 3, 4, 5])]
    torch.testing.assert_close(ours, sum(loss for loss, _ in answers) / sum(weight for _, weight in answers))


def test_padding_behind_changes_no_loss():
    """The first row is the shorter one; its own tokens, labels and losses stay together."""
    config = json.loads((DEMO_CHECKPOINT / "config.json").read_text())
    processor = llava_next.Processor.from_folder(DEMO_CHECKPOINT, config)
    model = llava_next.Model.from_config(config)
    initialise(model)

    def talk(question, answer):
        sides = (("user", question), ("assistant", answer))
        return [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in sides]

    talks = [talk("Is there a star?", "no"), talk("How many circles do you see? Count the circles.", "two")]
    before = processor(talks, labels=True, add_generation_prompt=False)
    behind = padded_behind(before)
    assert before.attention_mask[0, 0] == 0 and behind.attention_mask.all()
    assert torch.equal(behind.input_ids[1], before.input_ids[1])
    torch.testing.assert_close(answers_loss(model, behind), answers_loss(model, before))
    assert not torch.allclose(model(behind), model(before), atol=1e-2), "the rows have moved"


@pytest.mark.parametrize("factor", [0.1, 10])
def test_image_tokens_are_as_loud_as_what_layers_write(factor):
    config = json.loads((DEMO_CHECKPOINT / "config.json").read_text())
    model = llava_next.Model.from_config(config)
    initialise(model)
    features = factor * torch.randn(2, 36, config["vision_config"]["hidden_size"])
    before = model.multi_modal_projector(features)
    set_loudness(model.multi_modal_projector, features)
    after = model.multi_modal_projector(features)
    torch.testing.assert_close(after, before / before.square().mean().sqrt())


def test_every_word_of_the_patches_is_one_token(tmp_path):
    make_folder(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    ids = [word_id(tokenizer, word) for word in WORDS]
    assert len(set(ids)) == len(WORDS) and {"red", "star", "small", "top left", "centre", "Q", "7"} <= set(WORDS)
    said = tokenizer.encode("At the top left a small red star and in the centre a sign that says Q7.")
    assert {ids[WORDS.index(word)] for word in ("small", "red", "star", "top left", "centre", "sign", "Q", "7")} <= set(
        said
    )
