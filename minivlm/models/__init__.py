"""One file per paper. `MODULES` says which file reads which `model_type` of a config.json."""

MODULES = {
    "llava": "minivlm.models.llava",
    "llava_next": "minivlm.models.llava_next",
    "mllama": "minivlm.models.mllama",
    "mllama_text_model": "minivlm.models.mllama",
}
