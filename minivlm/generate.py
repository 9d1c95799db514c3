"""From a prompt to an answer: one prefill, then one token at a time until every row has ended.

The loop asks two things of a model: `model(inputs, cache, last_only=True)` for the prompt, `model.decode(ids, cache)`
for each further token. Here is when a row has ended, what of its text is certain enough to be shown, and beam search;
the choice of one token is in sampling.py.

Letters: B rows, T prompt tokens, V words that the head can say, k beams.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minivlm.cache import KVCache
from minivlm.errors import MinivlmError
from minivlm.inputs import Inputs
from minivlm.sampling import Sampling, draw, keep_likely, penalise, prompt_words
from minivlm.text import Tokenizer

ROOM = 4096  # tokens of an answer that the cache has room for from the start; a longer one doubles it


@dataclass(frozen=True)
class Timing:
    """Wall-clock seconds of one call, which all its rows share."""

    first_token: float  # pictures, prompt and the choice of the first token
    total: float
    new_tokens: int  # of all rows together
    rows: int

    @property
    def tokens_per_second(self) -> float:
        """Tokens after each row's first, per second of decoding; 0.0 where there are none."""
        decoding = self.total - self.first_token
        return (self.new_tokens - self.rows) / decoding if decoding > 0 else 0.0


@dataclass(frozen=True)
class Generation:
    """The answer of one row."""

    token_ids: list[int]  # the new tokens as they came, the stop token included
    text: str  # without the stop token, and cut before a stop string
    finish_reason: str  # "stop" | "length"
    timing: Timing
    score: float | None = None  # beam search only: mean log probability per token


def generate(
    model: nn.Module, inputs: Inputs, sampling: Sampling, tokenizer: Tokenizer, eos_ids: Sequence[int], pad_id: int
) -> list[Generation]:
    """The answers to a left-padded batch, each as if its row had been asked alone.

    Any of `eos_ids` ends an answer. `pad_id` is what the model is fed in rows that have ended while others go on.
    """
    run = _Run(model, inputs, sampling, tokenizer, eos_ids, pad_id)
    for _ in run.steps():
        pass
    return run.results()


def stream(
    model: nn.Module, inputs: Inputs, sampling: Sampling, tokenizer: Tokenizer, eos_ids: Sequence[int], pad_id: int
) -> "Stream":
    """The same for one row, as an iterator of pieces of its text."""
    if len(inputs.input_ids) != 1:
        raise MinivlmError(f"a stream is for one conversation, not {len(inputs.input_ids)}: use generate for a batch")
    return Stream(_Run(model, inputs, sampling, tokenizer, eos_ids, pad_id))


class Stream:
    """Pieces of text as they become certain. Once they are exhausted, `result` is the Generation.

    A piece ends neither inside a character nor in what may turn out to begin a stop string. Beams come in one piece.
    """

    def __init__(self, run: "_Run"):
        self.result: Generation | None = None
        self._pieces = self._follow(run)

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def _follow(self, run: "_Run") -> Iterator[str]:
        (answer,) = run.answers
        shown = 0
        for _ in run.steps():
            if len(answer.text) > shown:
                piece, shown = answer.text[shown:], len(answer.text)
                yield piece
        (self.result,) = run.results()


def find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the stop string begins that is complete first. So it does not matter how the text was cut into tokens."""
    ends = [(start + len(string), start) for string in stop if (start := text.find(string)) >= 0]
    return min(ends)[1] if ends else None


def stop_overlap(text: str, stop: Sequence[str]) -> int:
    """Length of the longest tail of `text` that may go on to a stop string: 1 for "ab<" and "<end>"."""
    return max((n for string in stop for n in range(1, len(string)) if text.endswith(string[:n])), default=0)


class Answer:
    """One row's answer as it grows."""

    def __init__(self, tokenizer: Tokenizer, sampling: Sampling, eos: frozenset[int]):
        self.eos, self.stop, self.max_new_tokens = eos, sampling.stop, sampling.max_new_tokens
        self.pieces = tokenizer.stream()
        self.token_ids: list[int] = []
        self.text = ""  # certain: nothing of it will be taken back
        self.held = ""  # may turn out to begin a stop string
        self.finish_reason: str | None = None
        self.score: float | None = None

    def push(self, token: int):
        """Takes one more token; sets `finish_reason` if it is the last."""
        self.token_ids.append(token)
        ended = token in self.eos
        self.held += "" if ended else self.pieces.push(token)
        if ended or len(self.token_ids) == self.max_new_tokens:
            self.finish_reason = "stop" if ended else "length"
            self.held += self.pieces.end()
        certain = find_stop(self.held, self.stop)
        if certain is not None:
            self.finish_reason = "stop"
        else:
            certain = len(self.held) - (stop_overlap(self.held, self.stop) if self.finish_reason is None else 0)
        self.text, self.held = self.text + self.held[:certain], self.held[certain:]


@dataclass
class Beam:
    total: float  # log probability of all its tokens
    parent: int  # the beam, one step before, that it goes on from
    token_ids: list[int]


class Beams:
    """The k beams of one row that go on, and the k best that have ended, with their mean log probability; best first.

    This is transformers 5 with early_stopping=False and length_penalty=1. Only a candidate among the k best of its step
    may end. A row is open until it has k ended beams and its best other one, at its present mean, is no better than any
    of them: a guess, since that mean might still rise.
    """

    def __init__(self, k: int):
        self.alive = [Beam(0.0, 0, [])] + [Beam(-math.inf, 0, [])] * (k - 1)  # k times the same: one counts
        self.ended: list[tuple[float, list[int]]] = []
        self.open = True

    def advance(self, candidates: list[tuple[float, int, int]], ends: Callable[[list[int]], bool]):
        """One step: `candidates` (log probability of all tokens, beam, next token), best first; k of them go on."""
        k, alive = len(self.alive), []
        for rank, (total, parent, token) in enumerate(candidates):
            token_ids = [*self.alive[parent].token_ids, token]
            if not ends(token_ids):
                alive.append(Beam(total, parent, token_ids))
            elif rank < k:
                self.ended.append((total / len(token_ids), token_ids))
        self.ended = sorted(self.ended, key=lambda pair: pair[0], reverse=True)[:k]
        full = len(self.ended) == k
        self.open = bool(alive) and not (full and alive[0].total / len(alive[0].token_ids) <= self.ended[-1][0])
        self.alive = (alive + [Beam(-math.inf, 0, token_ids)] * k)[:k]


@dataclass
class _Run:
    """One call of `generate` or `stream`: the loop, its answers and its clock."""

    model: nn.Module
    inputs: Inputs
    sampling: Sampling
    tokenizer: Tokenizer
    eos_ids: Sequence[int]
    pad_id: int

    def __post_init__(self):
        # A stop string that spells a special token would never be found, for text leaves special tokens out.
        decode = self.tokenizer.decode
        known = [i for string in self.sampling.stop if (i := self.tokenizer.token_to_id(string)) is not None]
        self.eos = frozenset([*self.eos_ids, *(i for i in known if decode([i]) != decode([i], skip_special=False))])
        self.answers = [Answer(self.tokenizer, self.sampling, self.eos) for _ in self.inputs.input_ids]

    def steps(self) -> Iterator[None]:
        """Comes back to the caller after every token; the answers have grown meanwhile."""
        begin = time.perf_counter()
        self.first_token = None
        for _ in self._beams() if self.sampling.num_beams > 1 else self._tokens():
            if self.first_token is None:
                self.first_token = time.perf_counter() - begin
            yield
        self.total = time.perf_counter() - begin

    def results(self) -> list[Generation]:
        answers = self.answers
        timing = Timing(self.first_token, self.total, sum(len(a.token_ids) for a in answers), len(answers))
        return [Generation(a.token_ids, a.text, a.finish_reason, timing, a.score) for a in answers]

    def _prefill(self) -> tuple[KVCache, Tensor, Tensor | None]:
        """The cache, the last position's logits (B, V), and the words (B, S) that a penalty is for, if there is one."""
        ids, room = self.inputs.input_ids, self.sampling.max_new_tokens
        cache = self.model.new_cache(ids.shape[1] + min(room, ROOM))
        logits = self.model(self.inputs, cache, last_only=True)[:, -1]
        if self.sampling.repetition_penalty == 1:
            return cache, logits, None
        return cache, logits, prompt_words(ids, self.inputs.attention_mask, logits.shape[1], room)

    @torch.inference_mode()
    def _tokens(self) -> Iterator[None]:
        """Greedy or sampled. The host waits for the device once per token, to see what it said and who has ended."""
        sampling, answers = self.sampling, self.answers
        cache, logits, said = self._prefill()
        (B, V), device = logits.shape, logits.device
        if sampling.temperature > 0:
            generator = None if sampling.seed is None else torch.Generator().manual_seed(int(sampling.seed))
            numbers = torch.rand(sampling.max_new_tokens, B if generator is None else 1, 1, generator=generator)
            numbers = numbers.to(device, torch.float64)  # drawn in float32, so that none times a total is the total
        for i in range(sampling.max_new_tokens):
            if said is not None:
                logits = penalise(logits, said, sampling.repetition_penalty)
            best, ids = logits.max(-1)  # (B,); twice as fast as argmax, and a NaN anywhere makes best NaN
            if sampling.temperature > 0:
                ids = draw(*keep_likely(logits, sampling), numbers[i])  # (B,)
            tokens = ids.where(best.isfinite(), -1).tolist()
            for answer, token in zip(answers, tokens, strict=True):
                if answer.finish_reason is None:
                    _require_finite(token >= 0)
                    answer.push(token)
            yield
            going = [answer.finish_reason is None for answer in answers]
            if not any(going):
                return
            if not all(going):
                ids = ids.where(torch.tensor(going, device=device), self.pad_id)
            if said is not None:
                said[:, cache.length] = ids.clamp(max=V)
            logits = self.model.decode(ids[:, None], cache)  # (B, V)

    @torch.inference_mode()
    def _beams(self) -> Iterator[None]:
        """Beam search, a batch at a time. The prompt is computed once per row; its cache is then copied to k beams."""
        penalty, k = self.sampling.repetition_penalty, self.sampling.num_beams
        cache, logits, said = self._prefill()
        (B, V), device = logits.shape, logits.device
        parents = torch.arange(B, device=device).repeat_interleave(k)  # (B·k,)
        cache.reorder(parents)
        logits = logits[parents]  # (B·k, V)
        said = None if said is None else said[parents]
        rows = [Beams(k) for _ in range(B)]
        # Each beam may end in any of the eos ids, and k candidates have to go on.
        num_candidates = min(k * (1 + max(1, len(self.eos))), k * V)
        while True:
            scores = logits.log_softmax(-1)  # (B·k, V)
            if said is not None:
                scores = penalise(scores, said, penalty)  # of log probabilities, as transformers does in beam search
            totals = torch.tensor([[beam.total for beam in row.alive] for row in rows], device=device)  # (B, k)
            totals, places = (scores.view(B, k, V) + totals[:, :, None]).flatten(1).topk(num_candidates)
            for row, row_totals, row_places in zip(rows, totals.tolist(), places.tolist(), strict=True):
                if row.open:
                    _require_finite(not math.isnan(row_totals[0]))
                    candidates = zip(row_totals, row_places, strict=True)
                    row.advance([(total, *divmod(place, V)) for total, place in candidates], self._ends)
            yield
            if not any(row.open for row in rows):
                break
            beams = [(beam.token_ids[-1], b * k + beam.parent) for b, row in enumerate(rows) for beam in row.alive]
            ids, parents = torch.tensor(beams, device=device).unbind(1)  # (B·k,) each
            cache.reorder(parents)
            if said is not None:
                said = said[parents]
                said[:, cache.length] = ids
            logits = self.model.decode(ids[:, None], cache)  # (B·k, V)
        for row, answer in zip(rows, self.answers, strict=True):
            answer.score, token_ids = row.ended[0]
            for token in token_ids:
                answer.push(token)
        yield

    def _ends(self, token_ids: list[int]) -> bool:
        if token_ids[-1] in self.eos or len(token_ids) == self.sampling.max_new_tokens:
            return True
        stop = self.sampling.stop
        return bool(stop) and find_stop(self.tokenizer.decode(token_ids), stop) is not None


def _require_finite(finite: bool):
    if not finite:
        raise MinivlmError("the model's logits are not finite: half precision may have overflowed, so try float32")
