"""Stands in for a VLM where the command line is tested: it answers at once with what it was asked."""

import os
import signal
import time
from types import SimpleNamespace

import torch

from minivlm.errors import MinivlmError
from minivlm.videos import FilmRule, open_video


class FakeVLM:
    """Says "<number of pictures> pictures: <last text>", a word at a time.

    A text of "fail" is a MinivlmError, "bug" a TypeError, "ctrl-c" the user's Ctrl-C after the first word; "slow" takes
    a tenth of a second. `asked` lists the conversations and the sampling they came with.
    """

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self):
        self.asked = []

    def preprocess(self, conversations):
        """Takes two frames of every kept film."""
        parts = [part for messages in conversations for m in messages for part in m["content"]]
        for film in [part["video"] for part in parts if part["type"] == "video"]:
            open_video(film, {}, FilmRule(num_frames=2))
        return SimpleNamespace(input_ids=torch.tensor([[1, 2, 3]] * len(conversations)))

    def stream(self, messages, **sampling):
        return Stream(self, messages, sampling)

    def generate(self, conversations, **sampling):
        streams = [self.stream(messages, **sampling) for messages in conversations]
        for stream in streams:
            for _ in stream:
                pass
        return [stream.result for stream in streams]


class Stream:
    def __init__(self, vlm, messages, sampling):
        self.vlm, self.messages, self.sampling = vlm, messages, sampling

    def __iter__(self):
        self.vlm.asked.append((self.messages, self.sampling))
        parts = [part for message in self.messages for part in message["content"]]
        text = [part["text"] for part in parts if part["type"] == "text"][-1]
        if text == "fail":
            raise MinivlmError("the picture\nis broken: give another")
        if text == "bug":
            raise TypeError("no such thing")
        if text == "slow":
            time.sleep(0.1)
        answer = f"{sum(part['type'] == 'image' for part in parts)} pictures: {text}"
        for i, word in enumerate(answer.split(" ")):
            if text == "ctrl-c" and i == 1:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)  # never reached its end: the signal comes first
            yield word if i == 0 else " " + word
        ids = list(answer.encode())
        self.result = SimpleNamespace(
            text=answer, token_ids=ids, prompt_token_ids=[1, 2, 3], prompt_tokens=3, finish_reason="stop",
            stats={"first_token_seconds": 0.5, "tokens_per_second": 20.0, "new_tokens": len(ids)},
        )  # fmt: skip
