"""A tiny random Qwen2-VL as transformers has it and as a folder on disk; conversations; the reference's side of a test.

transformers 5's own video processor needs torchvision. The pixels of films are checked against its image processor,
frame by frame, and everything behind the pixels by giving its model ours. It orders patches cell by cell.
"""

import tiny
import tokenizers_tiny
import torch
from tiny import picture, turn
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import minivlm
from minivlm.image_config import CLIP_MEAN, CLIP_STD
from minivlm.models.qwen2_vl import TEMPLATE

SPECIAL = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TOKENIZER = tokenizers_tiny.qwen2(SPECIAL)
START, END, IMAGE, VIDEO = (TOKENIZER.token_to_id(token) for token in SPECIAL)
# As the hub has it: the text part at the top level, `in_chans`, "mrope".
CONFIG = {
    "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", "torch_dtype": "bfloat16",
    "vision_start_token_id": START, "vision_end_token_id": END, "image_token_id": IMAGE, "video_token_id": VIDEO,
    "vocab_size": -(-TOKENIZER.get_vocab_size() // 64) * 64, "hidden_size": 48, "intermediate_size": 80,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "sliding_window": 4096,
    "use_sliding_window": False, "max_window_layers": 3, "tie_word_embeddings": False,
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 3]},
    "vision_config": {
        "model_type": "qwen2_vl", "depth": 2, "embed_dim": 32, "hidden_size": 48, "in_chans": 3, "mlp_ratio": 3,
        "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "spatial_patch_size": 4, "temporal_patch_size": 2,
    },
}  # fmt: skip
WINDOW = {"use_sliding_window": True, "sliding_window": 19, "max_window_layers": 1}
KINDS = {"untied": {}, "tied": {"tie_word_embeddings": True}, "with a window": WINDOW}
PREPROCESSOR = {
    "min_pixels": 4 * 64, "max_pixels": 60 * 64, "patch_size": 4, "temporal_patch_size": 2, "merge_size": 2,
    "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "image_processor_type": "Qwen2VLImageProcessor",
}  # fmt: skip
LIMITS = {"min_pixels": 4 * 64, "max_pixels": 60 * 64}
SIZES = [
    (1, 1), (8, 8), (40, 40), (3000, 40), (40, 3000), (200, 1), (1, 200), (12, 20), (20, 12), (4, 4), (60, 64),
    (61, 63), (100, 37), (333, 500), (28, 84),
]  # fmt: skip
PICTURES = [
    [turn("user", picture(47, 91), "What is this?")],
    [turn("user", "Hello! No picture here.")],
    [turn("user", picture(40, 40, 1), picture(130, 17, 2), "Compare both."), turn("assistant", "The left one."),
     turn("user", "And ", picture(30, 71, 3), "now?")],
    [turn("user", picture(1, 1), "Which?")],
]  # fmt: skip


def film(num_frames, height=24, width=40, seed=0, **options):
    """A part of a message. The limits are those of pictures here, so that frames are small."""
    frames = [picture(height, width, 100 * seed + i) for i in range(num_frames)]
    return {"type": "video", "video": frames, **LIMITS, **options}


def ask(*parts):
    """A question of parts that are films, pictures or text."""
    return [{"role": "user", "content": [p if isinstance(p, dict) else turn("user", p)["content"][0] for p in parts]}]


# Frame pairs are at most as many as half the rows or columns, where transformers 5's positions are the paper's.
FILMS = [
    ask(film(5), "What moves?"),
    ask("Hi."),
    ask("First ", picture(30, 50), film(1, seed=1), "then ", film(7, 50, 70, seed=2), picture(47, 20), "Which is it?"),
]
TALKS = PICTURES + FILMS

# --- what tests/fixtures/qwen2_vl_videos has the reference's answers to -----------------------------------------------

# The longer ones have more frames than the budget allows in full size: 180 tokens for all frame pairs.
FILM_SETTINGS = {
    "size": {"shortest_edge": 8 * 64, "longest_edge": 40 * 64}, "patch_size": 4, "temporal_patch_size": 2,
    "merge_size": 2, "cap_pixels_per_frame": True, "max_video_tokens": 200,
}  # fmt: skip
FILM_SIZES = {1: (47, 91), 5: (40, 40), 7: (97, 64), 24: (50, 70), 30: (61, 33)}  # frames: (height, width)
# How films are sampled: (frames, frames per second, what is asked for).
SAMPLED = [
    (n, rate, asked)
    for n, rate in [(30, 30.0), (47, 24.0), (300, 29.97), (301, 25.0), (5000, 10.0), (9, 2.0), (5, 1.0), (100000, 30.0)]
    for asked in [{"fps": 2}, {"fps": 0.1}, {"fps": 1.7}, {"num_frames": 2}, {"num_frames": 4}, {"num_frames": 5}]
]
# The four conversations of Qwen2-VL's page in transformers' documentation: one row of each kind.
MEDIA = {"type": "video", "video": [picture(40, 64, 10 + i) for i in range(5)]}
DOCUMENTED = [
    ask(picture(47, 91, 1), "Describe this image."),
    ask(picture(47, 91, 1), picture(30, 50, 2), "What is written in the pictures?"),
    ask("who are you?"),
    ask(picture(47, 91, 1), picture(30, 50, 2), MEDIA, "What are the common elements in these medias?"),
]


def film_of(num_frames):
    return [picture(*FILM_SIZES[num_frames], 100 + i) for i in range(num_frames)]


LAYOUTS = {"hub": ((r"^model\.visual", "visual"), (r"^model\.language_model", "model")), "4.52": ()}


class OurProcessor:
    """Stands where the others have transformers': see above."""

    def __init__(self, folder):
        self.folder, self.see = folder, minivlm.load(folder, weights=False).processor

    def save_pretrained(self, folder):
        tiny.copy_settings(self.folder, folder)


def make(folder, kind):
    config = CONFIG | KINDS[kind]
    theirs = tiny.build(config)
    tiny.write(folder, config, theirs, LAYOUTS, preprocessor_config=PREPROCESSOR)
    tokenizers_tiny.save(TOKENIZER, folder, "qwen2", TEMPLATE)
    return tiny.Checkpoint(folder, theirs, OurProcessor(folder), LAYOUTS)


opened = tiny.opener(make, KINDS)


# --- the reference's side ---------------------------------------------------------------------------------------------


def by_cell(patches, grids):
    """Our raster order → theirs, cell by cell of 2 × 2."""
    parts = patches.split(grids.prod(-1).tolist())
    both = zip(parts, grids.tolist(), strict=True)
    cells = [x.view(t, h // 2, 2, w // 2, 2, -1).transpose(2, 3).flatten(0, 4) for x, (t, h, w) in both]
    return torch.cat(cells)


def their_images(pictures, **settings):
    processor = Qwen2VLImageProcessorPil(**(PREPROCESSOR | settings))
    return processor(images=pictures, return_tensors="pt")


def their_inputs(processor, conversations):
    return of_inputs(processor.see(conversations))


def of_inputs(ours):
    """Our inputs as their model takes them."""
    ids = ours.input_ids
    theirs = {"input_ids": ids, "attention_mask": ours.attention_mask}
    theirs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    for pixels, grids in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")):
        if ours.__dict__[grids] is not None:
            theirs[grids] = ours.__dict__[grids]
            theirs[pixels] = by_cell(ours.__dict__[pixels], theirs[grids])
    return theirs


def their_ids(folder, conversations, counts, **template_kwargs):
    """What their processor does: placeholders repeated in the text, which is then tokenised, padded on the left."""
    tokenizer, counts = AutoTokenizer.from_pretrained(folder), {key: iter(value) for key, value in counts.items()}
    texts = []
    for conversation in conversations:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True,
                                             chat_template=TEMPLATE, **template_kwargs)  # fmt: skip
        for token, queue in counts.items():
            first, *rest = text.split(token)
            text = first + "".join(token * next(queue) + part for part in rest)
        texts.append(text)
    return tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")


def their_positions(theirs, inputs):
    wanted = {key: value for key, value in inputs.items() if "pixel" not in key}
    return theirs.model.get_rope_index(**wanted)[0]


def their_logits(theirs, inputs, **more):
    with torch.inference_mode():
        return theirs(**inputs, **more).logits[inputs["attention_mask"] > 0]


def slow_positions(ids, grids, merge=2):
    """The paper's rule for one row without padding, a token at a time. → [(frame, row, column)]"""
    queues, positions, following = {key: list(value) for key, value in grids.items()}, [], 0
    while len(positions) < len(ids):
        token = ids[len(positions)]
        if token not in queues:
            positions.append((following, following, following))
        else:
            t, h, w = queues[token].pop(0)
            for frame in range(t):
                for row in range(h // merge):
                    for column in range(w // merge):
                        positions.append((following + frame, following + row, following + column))
        following = max(max(position) for position in positions) + 1
    return positions
