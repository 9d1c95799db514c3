"""One file per paper. `MODULES` says which file reads which `model_type` of a config.json."""

MODULES = {
    "llava": "minivlm.models.llava",
    "video_llava": "minivlm.models.video_llava",
    "llava_next": "minivlm.models.llava_next",
    "llava_onevision": "minivlm.models.llava_onevision",
    "qwen2_vl": "minivlm.models.qwen2_vl",
    "mllama": "minivlm.models.mllama",
    "mllama_text_model": "minivlm.models.mllama",
}
