"""What every family's `Processor` does alike: conversations in, `Inputs` out.

    conversations → read (conversation.py) → see (the family's own) → collate (conversation.py) → Inputs

A family's own part is `see`: it says how many tokens every picture becomes, and makes the tensors. Besides, it names
its config class, its chat template, and how its folders' image settings are read.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from minivlm.conversation import Row, collate, read
from minivlm.errors import MinivlmError
from minivlm.image_config import ImageConfig
from minivlm.inputs import Inputs, Prompt
from minivlm.text import ChatTemplate, Tokenizer


class BaseProcessor:
    """`config` is the family's own. `images` are the checkpoint's image settings: an `ImageConfig`, or what a family
    with settings for films besides makes of them in `read_images`, changes in `override` and takes in `see`."""

    # What a family sets:
    Config: type  # has `from_hf(config.json's contents)`
    template_source: str  # the chat template of folders without one
    picture_options: tuple[str, ...] = ()  # what a part of a message may say of its picture: min_pixels, …
    film_options: tuple[str, ...] | None = None  # and of its film; None: the family takes no films

    def __init__(self, config, tokenizer: Tokenizer, template: ChatTemplate, images: ImageConfig):
        self.config, self.tokenizer, self.template, self.images = config, tokenizer, template, images

    @classmethod
    def from_folder(cls, folder: Path, config: dict):
        own = cls.Config.from_hf(config)
        return cls(
            own,
            Tokenizer.from_folder(folder),
            ChatTemplate.from_folder(folder, default=cls.template_source),
            cls.read_images(folder, own),
        )

    # What a family defines:

    @classmethod
    def read_images(cls, folder: Path, config) -> ImageConfig:
        """The image settings of a folder; what its files leave out is the family's."""
        raise NotImplementedError

    def see(self, rows: list[Row], images: ImageConfig) -> dict[str, Tensor]:
        """Repeats the placeholders of every row (`expand`); returns the vision tensors, by their names in `Inputs`."""
        raise NotImplementedError

    # What a family may change:

    def override(self, images_kwargs: dict) -> ImageConfig:
        """The image settings with a caller's on top."""
        return self.images.override(images_kwargs)

    def complete(self, prompt: Prompt) -> Prompt:
        """A raw prompt as the family's models expect it."""
        return prompt

    def __call__(
        self,
        conversations: "list[list[dict] | Prompt]",
        template_kwargs: dict | None = None,
        images_kwargs: dict | None = None,
        labels: bool = False,
        add_generation_prompt: bool = True,
    ) -> Inputs:
        images = self.override(images_kwargs or {})
        rows = []
        for conversation in conversations:
            if isinstance(conversation, Prompt):
                conversation = self.complete(conversation)
            row = read(conversation, self.tokenizer, self.template, template_kwargs, add_generation_prompt, labels)
            if row.films and self.film_options is None:
                raise MinivlmError("this model takes pictures only; give it a film's frames as pictures")
            row.picture_options = [known(options, self.picture_options) for options in row.picture_options]
            row.films = [(film, known(options, self.film_options)) for film, options in row.films]
            rows.append(row)
        tensors = self.see(rows, images)
        sizes = [(picture.height, picture.width) for row in rows for picture in row.pictures]
        if sizes:
            tensors["image_sizes"] = torch.tensor(sizes)
        return replace(collate(rows, self.tokenizer.pad_id, labels), **tensors)


def known(options: dict, names: tuple[str, ...]) -> dict:
    """What a part of a message asks for; null means that it does not."""
    options = {key: value for key, value in options.items() if value is not None}
    for key in options:
        if key not in names:
            told = f"known here: {', '.join(names)}" if names else "this model knows none"
            raise MinivlmError(f"a picture or film has the setting {key!r}; {told}")
    return options
