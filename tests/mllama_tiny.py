"""A tiny Mllama checkpoint with every gate felt, and transformers held to Meta's rules, for test_mllama*.

transformers 5 is another model in two places (`patched` says which), so the oracle is transformers with both put right.
"""

import tiny
import tokenizers_tiny
import torch
import transformers
from tiny import picture, turn
from tokenizers_tiny import TEMPLATES

from minivlm.image_config import CLIP_MEAN, CLIP_STD

RATIOS = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
CONFIG = {
    "architectures": ["MllamaForConditionalGeneration"], "model_type": "mllama", "torch_dtype": "float16",
    "text_config": {
        "model_type": "mllama_text_model", "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 5,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "cross_attention_layers": [1, 3], "tie_word_embeddings": False, "max_position_embeddings": 131072,
        "rope_scaling": {
            "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3",
            "original_max_position_embeddings": 8192,
        },
    },
    "vision_config": {
        "model_type": "mllama_vision_model", "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 4,
        "num_global_layers": 2, "attention_heads": 2, "image_size": 40, "patch_size": 8, "max_num_tiles": 4,
        "intermediate_layers_indices": [3, 0, 2], "vision_output_dim": 128, "supported_aspect_ratios": RATIOS,
    },
}  # fmt: skip
PREPROCESSOR = {
    "do_convert_rgb": True, "do_normalize": True, "do_pad": True, "do_rescale": True, "do_resize": True,
    "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "image_processor_type": "MllamaImageProcessor",
    "max_image_tiles": 4, "resample": 2, "rescale_factor": 1 / 255, "size": {"height": 40, "width": 40},
}  # fmt: skip

TALKS = [
    [turn("user", picture(47, 191), "What is this?")],
    [turn("user", "Hello! No picture here.")],
    [turn("user", "Compare", picture(40, 40, 1), picture(230, 77, 2), "both."), turn("assistant", "The left one."),
     turn("user", picture(100, 101, 3), "And now?")],
    [turn("user", "Text before it:", picture(1, 1), "Which?")],
]  # fmt: skip


def make(folder, kind):
    """A checkpoint in the hub's layout, `<|image|>` the first id behind the vocabulary, as in the published ones."""
    tokenizer = tokenizers_tiny.llama3()
    image_id = tokenizer.token_to_id("<|image|>")
    assert image_id == tokenizer.get_vocab_size() - 1
    ids = {
        "vocab_size": image_id, "bos_token_id": tokenizer.token_to_id("<|begin_of_text|>"),
        "eos_token_id": [tokenizer.token_to_id("<|end_of_text|>"), tokenizer.token_to_id("<|eot_id|>")],
        "pad_token_id": tokenizer.token_to_id("<|finetune_right_pad_id|>"),
    }  # fmt: skip
    config = CONFIG | {"image_token_index": image_id, "text_config": CONFIG["text_config"] | ids} | KINDS[kind]
    theirs = tiny.build(config)
    feel_gates(theirs)
    tiny.write(folder, config, theirs, preprocessor_config=PREPROCESSOR)
    tokenizers_tiny.save(tokenizer, folder, "llama3", TEMPLATES["mllama"])
    processor = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
    return tiny.Checkpoint(folder, patched(theirs), processor)


KINDS = {"hub": {}}
opened = tiny.opener(make, KINDS)


@torch.no_grad()
def feel_gates(model):
    """Gates start at zero, and tables of thousands of columns get small numbers: make both of them felt."""
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "gate" in name and p.numel() == 1:
            p.copy_(0.6 + 0.3 * torch.randn(1, generator=generator))
        elif "positional_embedding" in name:
            p.copy_(0.5 * torch.randn(p.shape, generator=generator))


def patched(theirs, entering=True, silent=True):
    """transformers with Meta's rules in the two places where it has others.

    1. `intermediate_layers_indices` name the states that enter those layers; transformers ≥ 4.50 takes what leaves
       them. With the tower's input put in front of its states, index i is the state that enters layer i.
    2. A token that may see no picture gets nothing from cross-attention; transformers stops only the MLP, and lets
       such a token attend to every picture slot of the batch.
    """

    rows = []  # 1 for tokens that may see a picture, (B, T, 1), as the layer that runs now was told

    def with_input(_, args, output):
        output.hidden_states = (args[0], *output.hidden_states)
        return output

    def note(_, __, kwargs):
        rows[:] = [kwargs["full_text_row_masked_out_mask"][:, 0]]

    if entering:
        theirs.model.vision_model.transformer.register_forward_hook(with_input)
    for layer in [layer for layer in theirs.model.language_model.layers if hasattr(layer, "cross_attn")]:
        if silent:
            layer.register_forward_pre_hook(note, with_kwargs=True)
            layer.cross_attn.register_forward_hook(lambda _, __, output: (output[0] * rows[0], *output[1:]))
    return theirs


def their_inputs(processor, talks):
    """Their processor takes pictures row by row."""
    texts = [processor.apply_chat_template(talk, add_generation_prompt=True) for talk in talks]
    pictures = [[part["image"] for m in talk for part in m["content"] if part["type"] == "image"] for talk in talks]
    return processor(
        text=texts, images=pictures if any(pictures) else None, padding=True, return_tensors="pt",
        add_special_tokens=False,
    )  # fmt: skip
