"""Small tokenizers in the three styles of the published checkpoints, trained in milliseconds.

`llama` (Vicuna, Mistral), `qwen2` and `llama3` give a `tokenizers.Tokenizer`; `save` writes the files of a checkpoint's
folder. Vocabularies are tiny, so prompts are several times as long as with the real ones, and every rule is exercised.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = """\
What do you see in the picture? Describe the image briefly. What is written on the sign?
There is a red square to the left of a blue circle, and three small green triangles are below them.
How many yellow stars are there? There are 4 stars, 12 dots and 365 lines: 1024 x 768 pixels, 3.5 metres.
USER: Which one is bigger? ASSISTANT: The second picture shows the bigger one. [INST] Compare both. [/INST]
system: You are a helpful assistant. user: hello! assistant: Hello, how can I help you today?
It's what they've said; I'm sure we'll see, you'd know. Don't stop, he isn't ready.
for row in table:
    print(row["name"], end="\\n\\n")   # one per line
Ça va très bien, merci – “vraiment” … Größe, señor, naïve café. Это картинка. 这是一张图片。 これは絵です。 🙂👍🏽
""".splitlines()

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%d}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def llama(added=("<image>", "<pad>"), vocab_size=440, texts=TEXTS, legacy=True, special=True):
    """SentencePiece-like: <unk>, <s>, </s>, 256 bytes, pieces; `added` at the end. BOS before every text.

    `legacy`: every stretch between special tokens gets a "▁" in front, as in the hub's files; else the text only.
    `special=False` adds `added` as tokens that are not special.
    """
    control = ["<unk>", "<s>", "</s>"]
    trained = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, special_tokens=control + [f"<0x{byte:02X}>" for byte in range(256)],
        initial_alphabet=["▁", *map(chr, range(0x21, 0x7F))], limit_alphabet=110,
    )  # fmt: skip
    trained.train_from_iterator(texts, trainer)
    tokenizer = Tokenizer.from_str(json.dumps(json.loads(trained.to_str()) | {"added_tokens": []}))
    if legacy:
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = _bos_first("<s>", 1)
    tokenizer.add_special_tokens(_tokens(control))
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(_tokens(added, special))
    return tokenizer


def qwen2(added=("<image>",), vocab_size=400, texts=TEXTS):
    """Byte-level, digits one by one, NFC; ChatML tokens after the vocabulary, then `added`. No BOS."""
    tokenizer = _byte_level(vocab_size, 1, texts)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens(_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *added]))
    return tokenizer


def llama3(added=("<|image|>",), vocab_size=400, texts=TEXTS):
    """Byte-level, up to three digits together; header tokens after the vocabulary, then `added`. BOS first."""
    tokenizer = _byte_level(vocab_size, 3, texts)
    names = ("begin_of_text", "end_of_text", "finetune_right_pad_id", "start_header_id", "end_header_id", "eot_id")
    tokenizer.add_special_tokens(_tokens([*(f"<|{name}|>" for name in names), *added]))
    bos = "<|begin_of_text|>"
    steps = [processors.ByteLevel(trim_offsets=False), _bos_first(bos, tokenizer.token_to_id(bos))]
    tokenizer.post_processor = processors.Sequence(steps)
    return tokenizer


SPECIAL = {  # what tokenizer_config.json says, by style
    "llama": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "qwen2": {"bos_token": None, "eos_token": "<|im_end|>", "unk_token": None, "pad_token": "<|endoftext|>"},
    "llama3": {
        "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>"
    },
}  # fmt: skip


def save(tokenizer, folder, style, template=None, **config):
    """tokenizer.json, tokenizer_config.json and special_tokens_map.json; `template` into chat_template.json.

    `style`: a key of SPECIAL; `config`: further entries of tokenizer_config.json. Returns the folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = ("content", "lstrip", "rstrip", "single_word", "normalized", "special")
    config = {
        "added_tokens_decoder": {
            index: {name: getattr(token, name) for name in names}
            for index, token in sorted(tokenizer.get_added_tokens_decoder().items())
        },
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
        **SPECIAL[style],
        **config,
    }
    files = {"tokenizer_config.json": config, "special_tokens_map.json": SPECIAL[style]}
    if template is not None:
        files["chat_template.json"] = {"chat_template": template}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    return folder


def _byte_level(vocab_size, digits, texts):
    tokenizer = Tokenizer(models.BPE(ignore_merges=digits == 3))  # tiktoken takes a whole known word as it is
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_SPLIT % digits), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, initial_alphabet=sorted(alphabet))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _tokens(literals, special=True):
    return [AddedToken(literal, normalized=False, special=special) for literal in literals]


def _bos_first(bos, index):
    pair = f"{bos} $A {bos}:1 $B:1"
    return processors.TemplateProcessing(single=f"{bos} $A", pair=pair, special_tokens=[(bos, index)])


# --- chat templates that write what the published ones write, by family -----------------------------------------------

_EACH = "{%% for part in message['content'] | selectattr('type', 'equalto', '%s') %%}%s{%% endfor %%}"
_IMAGES = _EACH % ("image", "<image>{{ '\\n' }}")

TEMPLATES = {
    # USER: <image>\nquestion ASSISTANT: answer USER: ... (pictures first, whatever their place; no end-of-turn token)
    "llava": (
        "{% for message in messages %}{{ message['role'].upper() }}: " + _IMAGES +
        "{% if message['role'] == 'assistant' %}"
        + _EACH % ("text", "{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}") +
        "{% else %}" + _EACH % ("text", "{{ part['text'] + ' ' }}") + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    # [INST] <image>\nquestion [/INST] answer<\s> (the published template has this slip of the pen)
    "mistral": (
        "{% for message in messages %}{% if message['role'] == 'user' %}[INST] " + _IMAGES
        + _EACH % ("text", "{{ part['text'] }}") + " [/INST]"
        "{% elif message['role'] == 'assistant' %} {{ message['content'][0]['text'] }}<\\s> "
        "{% else %}{{ raise_exception('Only user and assistant speak here!') }}{% endif %}{% endfor %}"
    ),
    # <|im_start|>user <image>\nquestion<|im_end|><|im_start|>assistant\n
    "onevision": (
        "{% for message in messages %}<|im_start|>{{ message['role'] + ' ' }}" + _EACH % ("image", "<image>")
        + _EACH % ("video", "<video>") + "{% if message['role'] == 'assistant' %}"
        + _EACH % ("text", "{% generation %}{{ '\\n' + part['text'] }}{% endgeneration %}") +
        "{% else %}" + _EACH % ("text", "{{ '\\n' + part['text'] }}") + "{% endif %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
    ),
    # parts in their order, a default system turn, pictures numbered on request
    "qwen2_vl": (
        "{% set seen = namespace(images=0) %}{% for message in messages %}"
        "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n{% endif %}"
        "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        "{% set seen.images = seen.images + 1 %}{% if add_vision_id %}Picture {{ seen.images }}: {% endif %}<image>"
        "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # BOS written by the template, trimmed text, a system turn only where there is no picture
    "mllama": (
        "{{- bos_token }}{%- set seen = namespace(image=false) %}"
        "{%- for message in messages %}{%- for part in message['content'] %}"
        "{%- if part['type'] == 'image' %}{%- set seen.image = true %}{%- endif %}{%- endfor %}{%- endfor %}"
        "{%- if not seen.image %}{{- '<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>' }}{%- endif %}"
        "{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
        "{%- for part in message['content'] %}{%- if part['type'] == 'image' %}{{- '<|image|>' }}"
        "{%- elif part['type'] == 'text' %}{{- part['text'] | trim }}{%- endif %}{%- endfor %}{{- '<|eot_id|>' }}"
        "{%- endfor %}{%- if add_generation_prompt %}"
        "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
    ),
}  # fmt: skip
