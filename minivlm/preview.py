"""What a model will be shown, before it runs: the exact prompt, the tiles of each picture, the frames of each film,
token counts, memory.

`--show-prompt` and `--dry-run` of the command line. No weights are read: the model may stand on the meta device.
"""

from collections.abc import Iterable
from itertools import groupby

from torch import Tensor

from minivlm.conversation import split_media
from minivlm.inputs import Prompt
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
    question, films = keep_films(question)
    inputs = vlm.preprocess([question])
    token_ids = inputs.input_ids[0].tolist()
    lines = [show_prompt(token_ids, vlm.processor.tokenizer), ""]
    if inputs.image_sizes is not None:
        grids = [None] * len(inputs.image_sizes) if inputs.image_grids is None else inputs.image_grids.tolist()
        for number, ((height, width), grid) in enumerate(zip(inputs.image_sizes.tolist(), grids, strict=True), 1):
            lines.append(f"picture {number}: {height} × {width} pixels (height × width)")
            lines += draw_tiles(*grid, inputs.pixel_values) if grid and any(grid) else []
    lines += film_lines(films, token_ids, vlm.processor.config.video_token_id) if films else []
    lines.append(f"prompt: {len(token_ids):,} tokens; the answer may add {max_new_tokens:,}")
    weights, cache = weight_bytes(vlm), cache_bytes(vlm, len(token_ids) + max_new_tokens)
    lines.append(
        f"memory: {size(weights)} for the weights as {str(vlm.dtype).removeprefix('torch.')}, "
        f"{size(cache)} for keys and values, {size(weights + cache)} together and some more to work in"
    )
    return "\n".join(lines)


def keep_films(question: "list[dict] | Prompt") -> tuple["list[dict] | Prompt", list]:
    """The question with its films as `KeptFilm`s, which will know what was taken of them; and these."""
    if isinstance(question, Prompt):
        given = question.videos
    else:
        messages, images, videos = split_media(question)
        given = [source for source, _ in videos]
    if not given:
        return question, []
    from minivlm.videos import KeptFilm  # here, because films bring PyAV with them

    films = [KeptFilm(source) for source in given]
    if isinstance(question, Prompt):
        return Prompt(question.text, question.images, films), films
    options = [options for _, options in videos]
    media = {"image": iter(images), "video": iter(zip(films, options, strict=True))}
    for message in messages:
        for part in message["content"]:
            if part["type"] in media:
                source, options = next(media[part["type"]])
                part.update({part["type"]: source, **options})
    return messages, films


def film_lines(films: list, token_ids: list[int], video_token_id: int) -> list[str]:
    """Which frames are taken, and what they cost; all together where no token stands between two films."""
    runs = [len(list(run)) for token_id, run in groupby(token_ids) if token_id == video_token_id]
    costs = [f", {run:,} tokens" for run in runs] if len(runs) == len(films) else [""] * len(films)
    lines = []
    for number, (kept, cost) in enumerate(zip(films, costs, strict=True), 1):
        film = kept.film
        lines.append(f"film {number}: {len(film.frames)} of {film.num_source_frames} frames{cost}")
        lines.append(f"    frames {shortened(film.indices)}")
        if film.seconds is not None:
            lines.append(f"    shown at {shortened(f'{second:.2f}' for second in film.seconds)} s")
    return lines if len(runs) == len(films) else [*lines, f"all films: {sum(runs):,} tokens"]


def shortened(values: Iterable) -> str:
    """With an ellipsis in the middle of more than 24."""
    words = [str(value) for value in values]
    return ", ".join(words if len(words) <= 24 else [*words[:16], "...", *words[-4:]])


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
