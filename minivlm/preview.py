"""What a model will be shown, before it runs: the exact prompt, the tiles of each picture, token counts, memory.

`--show-prompt` and `--dry-run` of the command line. No weights are read: the model may stand on the meta device.
"""

from itertools import groupby

from torch import Tensor

from minivlm.text import Tokenizer


def show_prompt(token_ids: list[int], tokenizer: Tokenizer) -> str:
    """The prompt as text, special tokens included; a run of image tokens as `<image>×576`.

    A `<image>` without a number behind it is text that a user typed.
    """
    short, ends = [], []  # ids with each run of placeholders as one; (its place, its length)
    for token_id, run in groupby(token_ids):
        length = len(list(run))
        repeats = length if length > 2 and is_special(token_id, tokenizer) else 0
        short += [token_id] * (1 if repeats else length)
        ends += [(len(short), repeats)] if repeats else []
    text = tokenizer.decode(short, skip_special=False)
    for place, repeats in reversed(ends):
        at = len(tokenizer.decode(short[:place], skip_special=False))
        text = f"{text[:at]}×{repeats}{text[at:]}"
    return text


def is_special(token_id: int, tokenizer: Tokenizer) -> bool:
    token = tokenizer.decode([token_id], skip_special=False).strip()
    return token.startswith("<") and token.endswith(">")


def preview(vlm, question, max_new_tokens: int) -> str:
    """The report of `--dry-run` for one conversation."""
    inputs = vlm.preprocess([question])
    token_ids = inputs.input_ids[0].tolist()
    lines = [show_prompt(token_ids, vlm.processor.tokenizer), ""]
    if inputs.image_sizes is not None:
        grids = [None] * len(inputs.image_sizes) if inputs.image_grids is None else inputs.image_grids.tolist()
        for number, ((height, width), grid) in enumerate(zip(inputs.image_sizes.tolist(), grids, strict=True), 1):
            lines.append(f"picture {number}: {height} × {width} pixels (height × width)")
            lines += [] if grid is None else draw_tiles(*grid, inputs.pixel_values)
    lines.append(f"prompt: {len(token_ids):,} tokens; the answer may add {max_new_tokens:,}")
    weights, cache = weight_bytes(vlm), cache_bytes(vlm, len(token_ids) + max_new_tokens)
    lines.append(
        f"memory: {size(weights)} for the weights as {str(vlm.dtype).removeprefix('torch.')}, "
        f"{size(cache)} for keys and values, {size(weights + cache)} together and some more to work in"
    )
    return "\n".join(lines)


def draw_tiles(rows: int, columns: int, pixel_values: Tensor) -> list[str]:
    """Anyres: the grid of tiles as a small table, with the pixels of one tile."""
    height, width = pixel_values.shape[-2:]
    edge = "    +" + "---+" * columns
    table = [line for _ in range(rows) for line in ("    |" + "   |" * columns, edge)]
    return [f"    an overview and {rows} × {columns} tiles of {height} × {width} pixels", edge, *table]


def weight_bytes(vlm) -> int:
    return sum(parameter.numel() for parameter in vlm.model.parameters()) * vlm.dtype.itemsize


def cache_bytes(vlm, num_tokens: int) -> int:
    """Keys and values of `num_tokens` tokens in every layer of the decoder."""
    text = vlm.model.language_model.config
    return 2 * text.num_layers * text.num_kv_heads * text.head_dim * num_tokens * vlm.dtype.itemsize


def size(num_bytes: int) -> str:
    """1536 → "1.5 KiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.3g} GiB"
