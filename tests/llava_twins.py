"""One random model twice: in the hub's layout, and in the original LLaVA repository's."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import tiny
import tokenizers_tiny
import torch
from tiny import load
from tokenizers import AddedToken, Tokenizer

# The published ones, with 40 for 336: (width, height) in the original, (height, width) in the hub's.
PINPOINTS = [[40, 80], [80, 40], [80, 80], [120, 40], [40, 120]]
KINDS = {  # the hub's architecture and text model; the original's architecture and model_type; what only it says
    "1.5": ("Llava", "llama", "LlavaLlamaForCausalLM", "llava", {"image_aspect_ratio": "pad"}),
    "1.6": (
        "LlavaNext", "llama", "LlavaLlamaForCausalLM", "llava_llama",
        {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": PINPOINTS},
    ),
    "1.6 mistral": (
        "LlavaNext", "mistral", "LlavaMistralForCausalLM", "llava_mistral",
        {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": PINPOINTS},
    ),
}  # fmt: skip
MM = {
    "mm_hidden_size": 32, "mm_projector_type": "mlp2x_gelu", "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False, "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
    "mm_vision_tower": "./clip", "tune_mm_mlp_adapter": False, "use_mm_proj": True, "image_crop_resolution": 224,
}  # fmt: skip
TOKENIZER = tokenizers_tiny.llama(added=())
BASE = TOKENIZER.get_vocab_size()  # rows of the table, as 32000 in the published ones


class Twins:
    """One random model as a folder of the hub's and, with `original`, as one of the original repository's."""

    def __init__(self, kind, folder):
        architecture, text, self.architecture, self.model_type, self.more = KINDS[kind]
        model_type = {"Llava": "llava", "LlavaNext": "llava_next"}[architecture]
        self.text = tiny.TEXTS[text]
        config = {
            "architectures": [f"{architecture}ForConditionalGeneration"], "model_type": model_type,
            "image_token_index": BASE, "text_config": self.text | {"vocab_size": BASE + 8}, "vision_config": tiny.CLIP,
            "image_grid_pinpoints": PINPOINTS,
        }  # fmt: skip
        folder.mkdir(parents=True)
        self.hub, theirs = folder, tiny.build(config)
        tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
        tokenizer.add_special_tokens([AddedToken("<image>", normalized=False)])
        tokenizers_tiny.save(tokenizer, folder, "llama", pad_token="<unk>")
        tiny.write_json(folder / "config.json", config)
        self.tensors = tiny.tensors_of(theirs)
        tiny.save_tensors(self.tensors, folder)

    def original(self, folder, tower="inside", rows=BASE, **changes):
        """`tower`: inside or outside of the checkpoint; outside it is in .bin files. `rows` of the token table."""
        folder.mkdir(parents=True)
        tokenizers_tiny.save(TOKENIZER, folder, "llama", pad_token="<unk>")
        text = {key: value for key, value in self.text.items() if key != "model_type"}
        config = {"architectures": [self.architecture], "model_type": self.model_type, "vocab_size": rows}
        config |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **text, **MM, **self.more, **changes}
        tiny.write_json(folder / "config.json", {key: value for key, value in config.items() if value != "absent"})
        clip = folder / "clip"
        clip.mkdir()
        tiny.write_json(clip / "config.json", {"model_type": "clip", "vision_config": tiny.CLIP})
        tiny.write_json(clip / "preprocessor_config.json", {"size": 40, "crop_size": 40, "do_center_crop": True})
        own, seen = {}, {}
        for name, tensor in self.tensors.items():
            name = name.removeprefix("language_model.").replace("image_newline", "model.image_newline")
            for i in range(1, 4):
                name = name.replace(f"multi_modal_projector.linear_{i}", f"model.mm_projector.{2 * i - 2}")
            if name.startswith("vision_tower."):
                seen[name.removeprefix("vision_tower.")] = tensor
            else:
                is_table = name.endswith(("embed_tokens.weight", "lm_head.weight"))
                own[name] = tensor[:rows].contiguous() if is_table else tensor
        if tower == "inside":
            own |= {f"model.vision_tower.vision_tower.{name}": tensor for name, tensor in seen.items()}
            tiny.save_tensors(own, folder)
        else:  # a whole CLIP: its other half and its old tables are passed over
            seen["vision_model.embeddings.position_ids"] = torch.arange(26)[None]
            others = ("logit_scale", "text_projection.weight", "visual_projection.weight", "text_model.x.bias")
            torch.save(seen | dict.fromkeys(others, torch.ones(3)), clip / "pytorch_model.bin")
            torch.save(own, folder / "pytorch_model.bin")
        return folder


_ROOM = TemporaryDirectory()


@cache
def twins(kind):
    return Twins(kind, Path(_ROOM.name, "hub", kind))


@cache
def opened(kind):
    """The original, loaded."""
    return load(twins(kind).original(Path(_ROOM.name, "original", kind)))
