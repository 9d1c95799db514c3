"""From scores to the next token: what may be asked for (`Sampling`), and the arithmetic that does it, on (B, V) scores.

Order and meaning of the steps are transformers': repetition penalty, temperature, top-k, top-p, min-p. No loop, model
or text here; those are in generate.py. Letters: B rows, V words that the head can say, C words left to choose from.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor, nn

from minivlm.errors import MinivlmError


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token, and when to stop. Nonsense is refused here, in one line, and nowhere later.

    Temperature 0 is greedy: the limit in which `top_k`, `top_p`, `min_p` and `seed` change nothing. With a seed every
    row draws the same numbers, so that its answer depends neither on its neighbours in a batch nor on the device;
    without one, rows differ.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0  # keep the likeliest words that together reach this probability, in (0, 1]
    top_k: int = 0  # keep this many words; 0: all
    min_p: float = 0.0  # keep words at least this many times as likely as the likeliest, in [0, 1]
    repetition_penalty: float = 1.0  # above 1: words of the prompt and of the answer so far become less likely
    num_beams: int = 1
    stop: str | Sequence[str] | None = ()  # strings that end an answer, sought in its own text; becomes a tuple
    seed: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()))
        for name in ("max_new_tokens", "top_k", "num_beams"):
            self._require(name, "a whole number", isinstance(vars(self)[name], Integral))
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            self._require(name, "a number", isinstance(vars(self)[name], Real))
        self._require("seed", "a whole number or None", self.seed is None or isinstance(self.seed, Integral))
        self._require("max_new_tokens", "at least 1", self.max_new_tokens >= 1)
        self._require("temperature", "0 (greedy) or a positive number", 0 <= self.temperature < math.inf)
        self._require("top_p", "above 0 and at most 1 (1 keeps every word)", 0 < self.top_p <= 1)
        self._require("top_k", "0 (keep every word) or a positive number", self.top_k >= 0)
        self._require("min_p", "between 0 (keep every word) and 1", 0 <= self.min_p <= 1)
        self._require("repetition_penalty", "positive (1 changes nothing)", 0 < self.repetition_penalty < math.inf)
        self._require("num_beams", "at least 1", self.num_beams >= 1)
        self._require("seed", "between 0 and 2**63 - 1", self.seed is None or 0 <= self.seed < 2**63)
        self._require("stop", "strings that are not empty", all(isinstance(s, str) and s for s in self.stop))
        if self.num_beams > 1 and self.temperature > 0:
            raise MinivlmError("beam search does not sample: use num_beams=1 or temperature=0")

    def _require(self, name: str, wanted: str, ok: bool):
        if not ok:
            raise MinivlmError(f"{name} must be {wanted}, not {vars(self)[name]!r}")


def prompt_words(input_ids: Tensor, attention_mask: Tensor, V: int, room: int) -> Tensor:
    """(B, T + room): the words of each row's prompt for `penalise`, and room to note those of the answer.

    Image placeholders count, as in transformers; left padding does not. V stands for no word: padding, room that is
    not yet used, and ids that the head cannot say (Mllama's image token lies beyond it).
    """
    words = input_ids.clamp(max=V).masked_fill(attention_mask == 0, V)
    return nn.functional.pad(words, (0, room), value=V)


def penalise(scores: Tensor, said: Tensor, penalty: float) -> Tensor:
    """Divides the positive scores (B, V) of the words in `said (B, N)`, multiplies the negative ones; once per word.

    Keskar et al. 2019 (CTRL), section 4.1, with transformers' sign rule: the paper divides negative scores, too, which
    makes those words likelier.
    """
    scores = nn.functional.pad(scores, (0, 1))  # (B, V + 1), the last column for what is no word
    theirs = scores.gather(1, said)  # (B, N)
    return scores.scatter_(1, said, torch.where(theirs < 0, theirs * penalty, theirs / penalty))[:, :-1]


def keep_likely(scores: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Scores (B, V) → weights (B, C) and the words (B, C) that they belong to; None: words 0 … V − 1.

    Weights are probabilities up to a factor, 0 where a filter took the word out. With `top_k` exactly that many words
    are left, so that 1 is greedy even where words tie (transformers keeps all that tie with the last one).
    """
    V, words = scores.shape[1], None
    if sampling.top_k > 0:
        scores, words = scores.topk(min(sampling.top_k, V))  # (B, C), likeliest first
    scores = scores - scores.amax(-1, keepdim=True)  # so that no temperature is too small
    weights = (scores / sampling.temperature).softmax(-1)  # (B, C)
    if sampling.top_p < 1:
        if words is None:
            # All words of probability (1 − p)/V and less do not reach 1 − p together, so none of them is kept: sorting
            # the others is ten times faster than sorting 152,000 words.
            C = int((weights > (1 - sampling.top_p) / V).sum(-1).max())
            weights, words = weights.topk(max(1, C))  # (B, C), likeliest first
        likelier = weights.cumsum(-1) - weights  # (B, C), probability of all the words before this one
        weights = weights.where(likelier < sampling.top_p, 0)
    if sampling.min_p > 0:
        weights = weights.where(weights >= sampling.min_p * weights.amax(-1, keepdim=True), 0)
    return weights, words


def draw(weights: Tensor, words: Tensor | None, number: Tensor) -> Tensor:
    """The word (B,) in which the running sum of the weights (B, C) passes `number (B, 1)`, in [0, 1), of its total.

    One random number per token: all numbers of an answer are drawn before it begins, on the host, the same everywhere.
    """
    total = weights.cumsum(-1, dtype=torch.float64)  # (B, C)
    index = torch.searchsorted(total, number * total[:, -1:], right=True)  # (B, 1)
    index = index.clamp(max=weights.shape[1] - 1)  # beyond the end only where NaN scores made all weights 0
    return (index if words is None else words.gather(1, index))[:, 0]
