"""CLIP and SigLIP against transformers, hidden state by hidden state."""

import pytest
import tiny
import torch
from transformers import AutoConfig, CLIPVisionModel, SiglipVisionModel

from minivlm.errors import MinivlmError
from minivlm.vit import ViT, ViTConfig, num_features, of_tower_size

CONFIGS = {
    "clip": tiny.CLIP,
    "clip, other numbers": tiny.CLIP | {"hidden_act": "gelu", "layer_norm_eps": 1e-3, "num_attention_heads": 4},
    "siglip": tiny.SIGLIP,
    "siglip, other numbers": tiny.SIGLIP | {"hidden_act": "gelu", "layer_norm_eps": 1e-3, "image_size": 48},
}


def both(name):
    """(ours, theirs) with the same random parameters, strictly loaded."""
    config = CONFIGS[name]
    architecture = CLIPVisionModel if "clip" in name and "siglip" not in name else SiglipVisionModel
    theirs = tiny.randomise(architecture(AutoConfig.for_model(**config)).eval())
    ours = ViT(ViTConfig.from_hf(config))
    state = {name.removeprefix("vision_model."): p for name, p in theirs.state_dict().items()}
    ours.load_state_dict({name: p for name, p in state.items() if "position_ids" not in name})
    return ours, theirs


def pixels(side, num=3):
    return torch.randn(num, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_every_hidden_state_equals_transformers(name):
    ours, theirs = both(name)
    x = pixels(ours.config.image_size)
    states = theirs(x, output_hidden_states=True).hidden_states
    assert len(states) == ours.config.num_layers + 1
    for i, state in enumerate(states):
        assert tiny.close(ours(x, (i,), drop_class_token=False), state, atol=2e-5)
        assert tiny.close(ours(x, (i - len(states),), drop_class_token=True), state[:, 1:], atol=2e-5)
        assert not any(tiny.close(state, other, atol=1e-3) for other in states if other is not state)


@pytest.mark.parametrize("layers", [(-2, 1), (1, -2), (0, 0), (4, 2, -1, -5)], ids=str)
@torch.inference_mode()
def test_several_layers_stand_side_by_side_in_the_order_asked_for(layers):
    ours, theirs = both("clip")
    x = pixels(40)
    states = theirs(x, output_hidden_states=True).hidden_states
    wanted = torch.cat([states[i][:, 1:] for i in layers], -1)
    assert tiny.close(ours(x, layers, drop_class_token=True), wanted, atol=2e-5)


TRAPS = {"hidden_act": "gelu", "layer_norm_eps": 1e-3, "num_attention_heads": 4}


@pytest.mark.parametrize("key", TRAPS)
@torch.inference_mode()
def test_another_number_changes_the_features(key):
    ours, _ = both("clip")
    other = ViT(ViTConfig.from_hf(tiny.CLIP | {key: TRAPS[key]}))
    other.load_state_dict(ours.state_dict())
    x = pixels(40)
    assert not tiny.close(ours(x, (-2,), True), other(x, (-2,), True), atol=1e-3)


@torch.inference_mode()
def test_no_layer_runs_behind_the_last_one_wanted():
    ours, _ = both("clip")
    for layer in ours.encoder.layers[3:]:
        layer.forward = None  # calling it would raise
    ours(pixels(40), (-2, 1), True)
    with pytest.raises(TypeError):
        ours(pixels(40), (-1,), True)


@torch.inference_mode()
def test_pictures_do_not_see_each_other():
    ours, _ = both("clip")
    x = pixels(40)
    together = ours(x, (-2,), True)
    assert tiny.close(together, torch.cat([ours(one[None], (-2,), True) for one in x]), atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("drop_class_token", [True, False])
@torch.inference_mode()
def test_as_many_features_as_announced(name, drop_class_token):
    ours, _ = both(name)
    drop_class_token = drop_class_token and ours.config.class_token
    features = ours(pixels(ours.config.image_size), (-2,), drop_class_token)
    assert features.shape[1] == num_features(ours.config, drop_class_token)


@pytest.mark.parametrize("model_type", ["clip_vision_model", "siglip_vision_model"])
def test_what_a_config_leaves_out_is_what_transformers_takes(model_type):
    theirs = AutoConfig.for_model(model_type).to_dict()
    assert ViTConfig.from_hf({"model_type": model_type}) == ViTConfig.from_hf(theirs)


def test_an_unknown_tower_is_refused_by_name():
    with pytest.raises(MinivlmError, match="'vit_mae'.*clip_vision_model, siglip_vision_model"):
        ViTConfig.from_hf({"model_type": "vit_mae"})


def test_pixels_of_another_size_are_refused_with_both_sizes():
    assert of_tower_size(pixels(40), 40).shape == (3, 3, 40, 40)
    with pytest.raises(MinivlmError, match="40 x 40 pixels.*48 x 48"):
        of_tower_size(pixels(40), 48)
