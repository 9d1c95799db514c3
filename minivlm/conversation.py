"""Messages → rows of token ids with their pictures and films; rows → one left-padded batch.

The parts of which `processor.py` is made, and `expand`, which a family calls once it knows how many tokens a picture
becomes.
"""

from dataclasses import dataclass, field

import torch

from minivlm.errors import MinivlmError
from minivlm.inputs import Inputs, Prompt
from minivlm.open_image import open_image
from minivlm.text import ChatTemplate, Tokenizer, tokenize_chat

IGNORED = -100  # the label of a token that is no target, torch's `ignore_index`

# Where a part of a message may keep its picture or film. The last spelling of each is OpenAI's.
IMAGE_KEYS = ("image", "url", "path", "image_url")
VIDEO_KEYS = ("video", "url", "path", "video_url")


@dataclass
class Row:
    """One conversation, tokenised: every picture and film still stands as a single placeholder id."""

    text: str  # the rendered prompt
    ids: list[int]
    is_answer: list[bool]  # which ids the assistant said, if that was asked for
    pictures: list = field(default_factory=list)  # PIL, RGB, upright; in the order of their placeholders
    picture_options: list[dict] = field(default_factory=list)  # what else stood in the part: min_pixels, …
    films: list[tuple] = field(default_factory=list)  # (path, URL or frames, as given; what else stood in the part)


def read(
    conversation: "list[dict] | Prompt",
    tokenizer: Tokenizer,
    template: ChatTemplate,
    template_kwargs: dict | None = None,
    add_generation_prompt: bool = True,
    answers: bool = False,
) -> Row:
    """Renders and tokenises one conversation and opens its pictures. `answers`: also mark what the assistant said."""
    if isinstance(conversation, Prompt):
        ids = tokenizer.encode(unicode(conversation.text), add_bos=True)
        pictures = [open_image(image) for image in conversation.images]
        films = [(source, {}) for source in conversation.videos]
        return Row(conversation.text, ids, [False] * len(ids), pictures, [{}] * len(pictures), films)
    messages, images, videos = split_media(conversation)
    chat = tokenize_chat(tokenizer, template, messages, add_generation_prompt, template_kwargs, answers)
    return Row(
        chat.text,
        chat.ids,
        chat.is_answer or [False] * len(chat.ids),
        [open_image(source) for source, _ in images],
        [options for _, options in images],
        videos,
    )


def split_media(messages: list[dict]) -> tuple[list[dict], list[tuple], list[tuple]]:
    """Messages as people write them → messages of plain parts; pictures; films, each in order as (source, options)."""
    if not isinstance(messages, (list, tuple)) or not all(isinstance(m, dict) for m in messages):
        raise MinivlmError('messages must be a list such as [{"role": "user", "content": "..."}]')
    plain, images, videos = [], [], []
    for message in messages:
        if "role" not in message or "content" not in message:
            raise MinivlmError(f"a message needs a role and a content; this one has {sorted(message) or 'nothing'}")
        parts = []
        for part in as_parts(message["content"]):
            kind = part.get("type")
            if kind == "text":
                parts.append({"type": "text", "text": unicode(str(part.get("text", "")))})
            elif kind in ("image", "image_url"):
                images.append(source_of(part, IMAGE_KEYS))
                parts.append({"type": "image"})
            elif kind in ("video", "video_url"):
                videos.append(source_of(part, VIDEO_KEYS))
                parts.append({"type": "video"})
            else:
                raise MinivlmError(f"a part of a message must be of type text, image or video, not {kind!r}")
        plain.append({"role": message["role"], "content": parts})
    return plain, images, videos


def as_parts(content: "str | list[dict]") -> list[dict]:
    """A plain string is one text part: the LLaVA templates silently drop strings."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)) or not all(isinstance(part, dict) for part in content):
        raise MinivlmError("a message's content must be a string or a list of parts: {'type': 'text', 'text': ...}")
    return list(content)


def unicode(text: str) -> str:
    """The text, if tokenizers can read it: half of a surrogate pair is no character, though a string may hold it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MinivlmError(f"the text is no valid Unicode (character {error.start}); read it as UTF-8") from error
    return text


def source_of(part: dict, keys: tuple[str, ...]) -> tuple[object, dict]:
    """(picture or film, the part's other settings)."""
    found = [key for key in keys if part.get(key) is not None]
    if not found:
        raise MinivlmError(f"a part of type {part['type']!r} names no file; put it under the key {keys[0]!r}")
    source = part[found[0]]
    if isinstance(source, dict):  # OpenAI: {"image_url": {"url": ..., "detail": ...}}
        source = source.get("url")
    return source, {key: value for key, value in part.items() if key not in ("type", "detail", *keys)}


def expand(row: Row, counts: dict[int, list[int]]):
    """Repeats each placeholder id as often as its picture or film has tokens, in place.

    `counts[placeholder id]` lists the token counts in order; the first id stands for pictures, a second for films.
    """
    for (token_id, wanted), name in zip(counts.items(), ("pictures", "films"), strict=False):
        found = row.ids.count(token_id)
        if found != len(wanted):
            raise MinivlmError(
                f"the prompt has {found} placeholders for {name}, but {len(wanted)} were given; "
                "each needs one, in order"
            )
    queues = {token_id: iter(wanted) for token_id, wanted in counts.items()}
    ids, is_answer = [], []
    for token_id, answer in zip(row.ids, row.is_answer, strict=True):
        repeats = next(queues[token_id]) if token_id in queues else 1
        ids += [token_id] * repeats
        is_answer += [answer and token_id not in queues] * repeats
    row.ids, row.is_answer = ids, is_answer


def collate(rows: list[Row], pad_id: int, labels: bool = False) -> Inputs:
    """Rows of unlike lengths → `Inputs` with ids, mask and (if wanted) labels, padded on the left.

    Left, because generation appends on the right: the last real token of every row must stand in the last column.
    """
    if not rows or not all(row.ids for row in rows):
        raise MinivlmError("the prompt is empty; say something")
    T = max(len(row.ids) for row in rows)
    input_ids = torch.full((len(rows), T), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    targets = torch.full_like(input_ids, IGNORED)
    for i, row in enumerate(rows):
        ids = torch.tensor(row.ids)
        start = T - len(ids)
        input_ids[i, start:] = ids
        attention_mask[i, start:] = 1
        targets[i, start:] = torch.where(torch.tensor(row.is_answer), ids, IGNORED)
    return Inputs(input_ids, attention_mask, targets if labels else None)
