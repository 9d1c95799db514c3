"""Original LLaVA checkpoints: the prompt that follows from the config, where the tower is, what is refused."""

import json

import pytest
import tiny
import tokenizers_tiny
import torch
from llava_twins import BASE, TOKENIZER, opened, twins
from tiny import load, our_logits, picture, turn

import minivlm
from minivlm import Prompt
from minivlm import vlm as vlm_module
from minivlm.chat_template import ChatTemplate
from minivlm.errors import MinivlmError
from minivlm.models.llava_original import CONVERSATIONS, conversation_of, is_original, pinpoints
from minivlm.text import Tokenizer

# --- prompts ----------------------------------------------------------------------------------------------------------

HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
HELPFUL = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
HEAD = "<|start_header_id|>{}<|end_header_id|>\n\n"
WANTED = {  # a question; two turns behind a system message, the answer between « and »
    "vicuna_v1": (
        HUMAN + " USER: <image>\nWhat? ASSISTANT:",
        "Be brief. USER: <image>\nWhat? ASSISTANT: «A cat.</s>»USER: Why? ASSISTANT:",
    ),
    "mistral_instruct": (
        "[INST] <image>\nWhat? [/INST]",
        "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>\nWhat? [/INST] «A cat. </s>»[INST] Why? [/INST]",
    ),
    "chatml_direct": (
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nWhat?<|im_end|>"
        "<|im_start|>assistant\n",
        "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\n<image>\nWhat?<|im_end|>"
        "<|im_start|>assistant\n«A cat.<|im_end|>»<|im_start|>user\nWhy?<|im_end|><|im_start|>assistant\n",
    ),
    "llava_llama_3": (
        "<|begin_of_text|>" + HEAD.format("system") + HELPFUL + "<|eot_id|>" + HEAD.format("user")
        + "<image>\nWhat?<|eot_id|>" + HEAD.format("assistant"),
        "<|begin_of_text|>" + HEAD.format("system") + "Be brief.<|eot_id|>" + HEAD.format("user")
        + "<image>\nWhat?<|eot_id|>" + HEAD.format("assistant") + "«A cat.<|eot_id|>»" + HEAD.format("user")
        + "Why?<|eot_id|>" + HEAD.format("assistant"),
    ),
    "qwen_1_5": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\n«A cat.<|im_end|>\n»<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "plain": ("<image>\nWhat?\n", "Be brief.<image>\nWhat?\n«A cat.\n»Why?\n"),
}  # fmt: skip
QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}


def text(role, words):
    return {"role": role, "content": [{"type": "text", "text": words}]}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_templates_write_what_the_original_writes(name):
    template = ChatTemplate(CONVERSATIONS[name])
    talk = [text("system", "Be brief."), QUESTION, text("assistant", "A cat."), text("user", "Why?")]
    assert template.render([QUESTION], True) == WANTED[name][0]
    assert template.render(talk, True, answer_marks=("«", "»")) == WANTED[name][1]
    closed = template.render(talk[:3], False, answer_marks=("«", "»"))
    assert WANTED[name][1].startswith(closed) and closed.endswith("»")
    with pytest.raises(MinivlmError, match="only user and assistant"):
        template.render([QUESTION, text("system", "Be brief.")], True)


LLAMA, MISTRAL = ["LlavaLlamaForCausalLM"], ["LlavaMistralForCausalLM"]
CHOICES = [  # style of the tokenizer, the word that ends an answer, the rest of the config
    ("llama", "</s>", {"architectures": LLAMA}, "vicuna_v1"),
    ("llama", "</s>", {"model_type": "llava"}, "vicuna_v1"),
    ("llama", "</s>", {"architectures": MISTRAL}, "mistral_instruct"),
    ("llama", "</s>", {"model_type": "llava_mistral"}, "mistral_instruct"),
    ("llama", "</s>", {"architectures": LLAMA, "tune_mm_mlp_adapter": True}, "plain"),
    ("qwen2", "<|im_end|>", {"architectures": LLAMA}, "chatml_direct"),
    ("qwen2", "<|im_end|>", {"architectures": ["LlavaQwenForCausalLM"]}, "qwen_1_5"),
    ("qwen2", "<|im_end|>", {"model_type": "llava_qwen"}, "qwen_1_5"),
    ("llama3", "<|eot_id|>", {"architectures": LLAMA}, "llava_llama_3"),
    ("llama3", "<|end_of_text|>", {"architectures": LLAMA}, "llava_llama_3"),
]


@pytest.mark.parametrize("style, end, config, name", CHOICES)
def test_the_template_follows_from_the_config(style, end, config, name):
    makers = {"llama": tokenizers_tiny.llama, "qwen2": tokenizers_tiny.qwen2, "llama3": tokenizers_tiny.llama3}
    tokenizer = Tokenizer(makers[style](), tokenizers_tiny.SPECIAL[style])
    index = tokenizer.token_to_id(end)
    assert conversation_of({"eos_token_id": index, **config}, tokenizer) == name
    assert conversation_of({"eos_token_id": [index], **config}, tokenizer) == name


def test_labels_and_answers_follow_the_template():
    """The answer and the </s> behind it are learned; the answer that is generated ends there."""
    talk = [[turn("user", picture(50, 30), "Say <image></s>."), turn("assistant", "A cat.")]]
    inputs = opened("1.5").preprocess(talk, labels=True)
    tokenizer = opened("1.5").processor.tokenizer
    learned = inputs.labels[inputs.labels >= 0].tolist()
    assert tokenizer.decode(learned, skip_special=False).strip() == "A cat.</s>" and learned[-1] == 2
    assert (inputs.input_ids == BASE).sum() == 25  # what the user typed is no picture
    assert opened("1.5").eos_ids == (2,)
    result = opened("1.5").generate(talk[0][:1], max_new_tokens=4, repetition_penalty=1.3)
    assert all(token < BASE for token in result.token_ids)


def test_text_around_a_picture_is_encoded_piece_by_piece():
    """The original cuts its prompt at <image> and encodes every piece as a text of its own."""
    tokenizer = opened("1.5").processor.tokenizer
    for prompt in ("USER: <image>\nWhat? ASSISTANT:", "<image><image> a\n<image>", "It<image>'s <image>  here"):
        first, *others = (TOKENIZER.encode(piece).ids[1:] for piece in prompt.split("<image>"))
        wanted = [1, *first]
        for piece in others:
            wanted += [BASE, *piece]
        assert tokenizer.encode(prompt, add_bos=True) == wanted


def test_marks_around_a_picture(tmp_path):
    """<im_patch>, <im_start> and <im_end> are appended in this order, where the files lack them; <image> comes last."""
    folder = twins("1.5").original(
        tmp_path / "original", rows=BASE + 3, mm_use_im_start_end=True, mm_use_im_patch_token="absent"
    )
    vlm = load(folder)
    inputs = vlm.preprocess([[turn("user", picture(30, 30), "What?")]])
    ids = inputs.input_ids[0].tolist()
    first, count = ids.index(BASE + 3), ids.count(BASE + 3)
    assert count == 25 and ids[first - 1] == BASE + 1 and ids[first + count] == BASE + 2
    assert our_logits(vlm, inputs).isfinite().all()
    plain = load(twins("1.5").original(tmp_path / "plain")).preprocess([[turn("user", picture(30, 30), "What?")]])
    assert not {BASE + 1, BASE + 2} & set(plain.input_ids[0].tolist())


def test_a_template_in_the_folder_goes_first(tmp_path):
    folder = twins("1.5").original(tmp_path / "original")
    (folder / "chat_template.jinja").write_text("Q: {{ messages[0].content[0].text }} A:")
    assert load(folder).processor.template.render([text("user", "Why?")], True) == "Q: Why? A:"


# --- where the tower is, and what is ignored --------------------------------------------------------------------------


def test_image_settings_are_the_towers(tmp_path):
    folder = twins("1.5").original(tmp_path / "original")
    tiny.write_json(folder / "clip" / "preprocessor_config.json", {"size": 40, "image_mean": [0.5, 0.25, 0]})
    pixels = load(folder).preprocess([Prompt("<image>", images=[picture(2, 40)])]).pixel_values
    colour = torch.tensor([127 / 255 - 0.5, 63 / 255 - 0.25, 0]) / torch.tensor([0.26862954, 0.26130258, 0.27577711])
    assert torch.allclose(pixels[0, :, 0, 0], colour, atol=1e-6)  # of the padding: int(255 · mean)


def test_the_known_tower_needs_no_files_for_its_sizes(tmp_path, monkeypatch):
    """And no network, where its weights are not needed."""
    known = {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_hidden_size": 1024}
    asked, find = {}, vlm_module.resolve

    def resolve(name, *given, **more):
        asked[str(name)] = more.get("offline")
        return find(name, *given, **more)

    monkeypatch.setattr(vlm_module, "resolve", resolve)
    vlm = minivlm.load(twins("1.5").original(tmp_path / "original", **known), device="cpu", weights=False)
    assert asked["openai/clip-vit-large-patch14-336"] is True
    vision = vlm.model.config.vision
    assert (vision.hidden_size, vision.num_layers, vision.num_heads, vision.image_size) == (1024, 24, 16, 336)
    assert vlm.preprocess([Prompt("<image>", images=[picture(30, 50)])]).pixel_values.shape == (1, 3, 336, 336)


def test_text_alone_needs_no_tower(tmp_path):
    folder = twins("1.5").original(tmp_path / "original", "outside", image_token_index=64002)
    whole = load(folder)
    (folder / "clip" / "pytorch_model.bin").unlink()
    vlm = minivlm.load(folder, device="cpu", dtype="float32", vision=False)
    prompt = [Prompt("Hello")]
    assert torch.equal(our_logits(vlm, vlm.preprocess(prompt)), our_logits(whole, whole.preprocess(prompt)))


@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_a_tower_folder_may_be_absolute_and_of_vision_alone(tmp_path, prefix):
    vlm = load(twins("1.5").original(tmp_path / "original", "outside"))
    prompt = [Prompt("<image>", images=[picture(33, 70)])]
    logits = our_logits(vlm, vlm.preprocess(prompt))
    clip = (tmp_path / "original" / "clip").rename(tmp_path / "tower")
    config = json.loads((clip / "config.json").read_text())["vision_config"]
    tiny.write_json(clip / "config.json", config)
    tensors = torch.load(clip / "pytorch_model.bin")
    tensors = {name.replace("vision_model.", prefix): x for name, x in tensors.items() if name.startswith("vision_")}
    torch.save(tensors, clip / "pytorch_model.bin")
    other = twins("1.5").original(tmp_path / "other", "outside", mm_vision_tower=str(clip))
    (other / "clip" / "pytorch_model.bin").unlink()
    other = load(other)
    assert torch.equal(our_logits(other, other.preprocess(prompt)), logits)


def test_pinpoints_may_be_a_string():
    assert pinpoints("[(336, 672), [672, 336]]") == [[672, 336], [336, 672]]
    for broken in ("(1x1),...,(6x6)", "[[336]]", 7, None, "[(336, 672)", [["a", 1]]):
        with pytest.raises(MinivlmError, match="image_grid_pinpoints"):
            pinpoints(broken)


def test_a_hub_config_is_no_original():
    assert is_original({"mm_vision_tower": "x", "model_type": "llava"})
    assert not is_original({"model_type": "llava", "text_config": {}, "vision_config": {}})


REFUSED = [
    ({"mm_projector_type": "identity"}, "mm_projector_type"),
    ({"mm_projector_type": "mlp0x_gelu"}, "mm_projector_type"),
    ({"mm_projector_type": ["linear"]}, "mm_projector_type"),
    ({"image_aspect_ratio": "anyres_max_9"}, "must be a SigLIP"),
    ({"image_aspect_ratio": "highres"}, "image_aspect_ratio"),
    ({"image_aspect_ratio": ["pad"]}, "image_aspect_ratio"),
    ({"image_aspect_ratio": "anyres", "mm_patch_merge_type": "flat"}, "mm_patch_merge_type"),
    ({"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}, "image_grid_pinpoints"),
    ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type"),
    ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature"),
    ({"mm_vision_select_layer": -9}, "hidden states"),
    ({"mm_vision_select_layer": "-2"}, "mm_vision_select_layer"),
    ({"mm_resampler_type": "spatial_pool"}, "mm_resampler_type"),
    ({"s2": True}, "s2"),
    ({"architectures": ["LlavaMptForCausalLM"]}, "LlavaMptForCausalLM"),
    ({"architectures": ["LlavaQwenForCausalLM"]}, "q_proj.bias"),  # Qwen's decoder, and this one is a Llama's
    ({"mm_vision_tower": None}, "mm_vision_tower"),
    ({"mm_vision_tower": "absent", "mm_image_tower": "LanguageBind/LanguageBind_Image"}, "mm_vision_tower"),
    ({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, "mm_vision_tower"),  # needed, and not on disk
    ({"mm_vision_tower": "google/siglip-so400m-patch14-384"}, "mm_vision_tower"),
    ({"mm_vision_tower": "clip, I think"}, "mm_vision_tower"),
    ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
    ({"vocab_size": BASE + 1}, "embed_tokens"),
]


@pytest.mark.parametrize("changes, named", REFUSED)
def test_what_is_not_known_is_refused_by_name(tmp_path, changes, named):
    with pytest.raises(MinivlmError) as error:
        load(twins("1.5").original(tmp_path / "original", "outside", **changes))
    assert named in str(error.value) and "\n" not in str(error.value)


def test_a_tower_that_is_no_clip_is_refused(tmp_path):
    folder = twins("1.5").original(tmp_path / "original", "outside")
    tiny.write_json(folder / "clip" / "config.json", {"model_type": "siglip"})
    with pytest.raises(MinivlmError, match="siglip"):
        load(folder)


PARTS = {
    "LoRA": ({"adapter_config.json": {"base_model_name_or_path": "lmsys/vicuna-7b-v1.5"}}, "lmsys/vicuna-7b-v1.5"),
    "LoRA and projector": ({"adapter_config.json": {}, "non_lora_trainables.bin": {}}, "merge"),
    "projector": ({"mm_projector.bin": {}}, "lmsys/vicuna-13b-v1.5"),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_a_model_is_refused_with_what_to_merge(tmp_path, part):
    folder = twins("1.5").original(tmp_path / "original", _name_or_path="lmsys/vicuna-13b-v1.5")
    (folder / "model.safetensors").unlink()
    for name, content in PARTS[part][0].items():
        tiny.write_json(folder / name, content)
    with pytest.raises(MinivlmError) as error:
        load(folder)
    assert "merge" in str(error.value) and PARTS[part][1] in str(error.value) and "\n" not in str(error.value)
