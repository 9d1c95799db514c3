"""The recipe of the demo models: the folder it makes, and what the second stage learns from."""

import json

import torch

from minivlm.demo import DEMO_CHECKPOINT
from minivlm.demo.train import Talks, make_folder
from minivlm.models import llava_next


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
