"""minivlm: six vision-language models, written to be read.

    import minivlm
    vlm = minivlm.load("llava-v1.6")                     # an alias, a hub id, or a folder
    print(vlm.chat("What is this?", images=["cat.jpg"]))

The public face is `load`, `VLM`, `Inputs`, `Prompt` and `MinivlmError`. Each is imported when it is first used, so that
`import minivlm` costs nothing and `import minivlm.ops` needs torch alone.
"""

__version__ = "0.1.0"

_HOME = {  # public name → the module it lives in
    "load": "minivlm.vlm",
    "VLM": "minivlm.vlm",
    "Result": "minivlm.vlm",
    "Inputs": "minivlm.inputs",
    "Prompt": "minivlm.inputs",
    "MinivlmError": "minivlm.errors",
}

__all__ = [*_HOME]


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'minivlm' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__():
    return sorted([*globals(), *_HOME])
