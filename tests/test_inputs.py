"""What travels between processor and model."""

import torch

from minivlm.inputs import Inputs


def test_to_changes_the_dtype_of_pixels_alone():
    inputs = Inputs(torch.ones(1, 2).long(), torch.ones(1, 2).long(), pixel_values=torch.zeros(1, 3, 2, 2))
    moved = inputs.to("cpu", torch.bfloat16)
    assert moved.pixel_values.dtype == torch.bfloat16
    assert moved.input_ids.dtype == moved.attention_mask.dtype == torch.int64
    assert moved.labels is None and inputs.pixel_values.dtype == torch.float32, "the original stays as it was"
