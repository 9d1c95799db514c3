"""The recipe of the demo models: the folder it makes, and what the second stage learns from."""

import json

import torch
import torch.nn.functional as F

from minivlm.demo import DEMO_CHECKPOINT
from minivlm.demo.train import Talks, answers_loss, make_folder, quieten
from minivlm.inputs import Inputs
from minivlm.models import llava_next
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
    ours = answers_loss(lambda _: logits, Inputs(labels, labels, labels))

    def answer(row, places):
        losses = [F.cross_entropy(logits[row, place - 1], labels[row, place]) for place in places]
        return sum(losses) / len(places) ** 0.5, len(places) ** 0.5

    answers = [answer(0, [1, 2]), answer(0, [5]), answer(1, [2, 3, 4, 5])]
    torch.testing.assert_close(ours, sum(loss for loss, _ in answers) / sum(weight for _, weight in answers))


def test_a_quiet_projector_says_the_same():
    config = json.loads((DEMO_CHECKPOINT / "config.json").read_text())
    model = llava_next.Model.from_config(config)
    initialise(model)
    features = 7 * torch.randn(2, 36, config["vision_config"]["hidden_size"])
    before = model.multi_modal_projector(features)
    quieten(model.multi_modal_projector, features)
    after = model.multi_modal_projector(features)
    torch.testing.assert_close(after, before / before.norm(dim=-1).mean())
