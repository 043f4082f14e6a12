"""Sampling from the policy: a decode loop of our own over a transformers model.

It departs from ``model.generate`` where rollouts gain by it: equal prompts are read and kept once
(``fst_dspy.model.prompt_cache``); finished rows leave the batch; every row samples from a
counter-based generator of its own seed, so its tokens do not depend on what else is in the batch
(beyond float noise); and the log-probability of each token is kept as it was sampled.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fst_dspy.errors import ModelError, PromptTooLongError
from fst_dspy.grammar.tokens import Walk
from fst_dspy.model.cache_layers import CHANGED, DynamicLayer, left_out, obstacle, refuse
from fst_dspy.model.endings import (
    End,
    closing_tokens,
    eos_ids,
    is_stopped,
    kept_tokens,
    texts_of,
)
from fst_dspy.model.graph_decode import GraphDecode, begin, release
from fst_dspy.model.growing_decode import GrowingDecode, forward
from fst_dspy.model.hardware import (
    as_current,
    cudnn_attention,
    give_back_memory,
    is_out_of_memory,
)
from fst_dspy.model.policy import Policy
from fst_dspy.model.prefixes import (
    backbone_of,
    can_continue,
    left_padded,
    pads_safely,
    positions,
    read_prefixes,
    read_rest,
    worthwhile_prefixes,
)
from fst_dspy.model.prompt_cache import CannotShare, can_share, make_room, share
from fst_dspy.model.sampling import HeldRows, Penalties, draw, uniforms, vocabulary
from fst_dspy.model.sizes import DecodingRoom
from fst_dspy.types import Grammar

logger = logging.getLogger(__name__)

SHARE_TOKENS = 2048  # prompt tokens of all rows, from which on rows share their prompts' cache
LOOK_FOR_END = {"cpu": 4}
"""Tokens after which rows are looked at for the marker that closes them, by type of device."""
LOOK_SELDOM = 16  # where to look is to wait for the device

LEAVE_SHARE = 0.25  # finished rows are dropped when they are this share of the batch
MANY = 2**31  # tokens, more than any vocabulary has


@dataclass(frozen=True)
class GenerationRequest:
    """One completion to sample.

    Attributes:
        prompt_ids_T: Token ids of the prompt, at least one.
        max_tokens: Longest completion, at least 1; cut to the room left in the context window.
        temperature: 0 takes the likeliest token every time.
        top_p: Nucleus mass, in (0, 1].
        stop: Strings that end the completion, in its answer; they are left out of its text.
        seed: Seed of this row alone, any int.
        top_k: How many of the likeliest tokens may be drawn, at least 1; ``None`` for all.
        frequency_penalty, presence_penalty: Taken from a token's logit, before the temperature, for
            each time that the completion has had it, and once where it has.
        repetition_penalty: Above 0; divides the logits, where above 0, of the tokens of prompt and
            completion, and multiplies those below.
        end: The line that closes the answer; its text is kept, and what is behind it is not.
        grammar: What the answer is held to; it ends where the grammar does.
        thought, opened: The marks around a thought, if the model has such, and whether the prompt
            has opened one: what is thought does not end the answer.
        begun: Of the prompt's last tokens so many are the answer's first. They are given back with
            it, as certain, and ``max_tokens`` does not count them.
    """

    prompt_ids_T: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    top_k: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    end: End | None = None
    grammar: Grammar | None = None
    thought: tuple[str, str] | None = None
    opened: bool = False
    begun: int = 0

    @property
    def is_penalised(self) -> bool:
        """Whether tokens are drawn from another distribution than the model's own."""
        return (self.frequency_penalty, self.presence_penalty, self.repetition_penalty) != (0, 0, 1)


@dataclass(frozen=True)
class GenerationResult:
    """One sampled completion.

    Attributes:
        completion_ids_T: As sampled, with the end token where there was one.
        logprobs_T: Of each token, in nats, under the softmax over the whole vocabulary, or over
            what the grammar allows, scaled by the temperature (1 for greedy rows), before
            ``top_p``, ``top_k`` and penalties.
        text: Decoded, without special tokens, cut before a stop string and behind the line that
            closes the answer, which has one token more among ``completion_ids_T``.
        finish_reason: ``"stop"`` for an end token, stop string or closed answer, else
            ``"length"``.
    """

    completion_ids_T: tuple[int, ...]
    logprobs_T: tuple[float, ...]
    text: str
    finish_reason: Literal["stop", "length"]


def check_prompt(policy: Policy, prompt_ids_T: Sequence[int]) -> None:
    """Raise ``PromptTooLongError`` when a prompt leaves no room for a completion."""
    if len(prompt_ids_T) >= policy.context_length:
        raise PromptTooLongError(
            f"the prompt has {len(prompt_ids_T)} tokens, but {policy.name} holds "
            f"{policy.context_length} tokens of prompt and completion; shorten the instructions, "
            "the demos or the inputs"
        )


def generate(policy: Policy, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
    """Sample a completion for every request, in the requests' order.

    Raises:
        PromptTooLongError: A prompt leaves no room for a completion; nothing is generated.
    """
    for request in requests:
        check_prompt(policy, request.prompt_ids_T)
    # What a grammar forces at the beginning is read along with the prompt.
    started = [_started(policy, request) for request in requests]
    results = [each if isinstance(each, GenerationResult) else None for each in started]
    requests = [each for each in started if isinstance(each, GenerationRequest)]
    places = [index for index, result in enumerate(results) if result is None]
    device = policy.device
    with policy.lock, torch.no_grad(), as_current(device), cudnn_attention(device, False):
        model = policy.model
        was_training = model.training
        model.eval()
        try:
            for chunk in _chunks(policy, requests):
                rows = _run_chunk(policy, [requests[index] for index in chunk])
                for index, result in zip(chunk, rows, strict=True):
                    results[places[index]] = result
        finally:
            model.train(was_training)
    give_back_memory()
    return [result for result in results if result is not None]


def _started(policy: Policy, request: GenerationRequest) -> GenerationRequest | GenerationResult:
    """The request, with what its grammar forces at the beginning said; or that is all of it."""
    if request.grammar is None:
        return request
    own, room = vocabulary(policy), room_for(policy, request)
    walk = Walk(own, request.grammar)
    forced = walk.begin()
    if len(forced) < room and not walk.ended:
        ids_T = (*request.prompt_ids_T, *forced)
        return replace(
            request, prompt_ids_T=ids_T, max_tokens=room - len(forced), begun=len(forced)
        )
    ids_T = tuple(forced[:room])
    (text,) = texts_of(policy, [ids_T], [request])
    whole = walk.ended and len(forced) <= room
    return GenerationResult(ids_T, (0.0,) * len(ids_T), text, "stop" if whole else "length")


def _run_chunk(policy: Policy, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
    """One batch; where memory runs out, its two halves."""
    try:
        try:
            return _Batch(policy, requests).run()
        except CannotShare:  # found out at the first new token; the second time it is known
            return _Batch(policy, requests).run()
        except CHANGED as error:  # in the middle of a call, past what ``obstacle`` tries
            if obstacle() is not None:
                raise
            release(policy)
            with left_out():
                results = _Batch(policy, requests).run()  # fails again where it is not the caches
            refuse(f"{type(error).__name__}: {error}")
            return results
    except (MemoryError, RuntimeError) as error:
        # A row by itself may do with what earlier batches have kept for theirs.
        if not is_out_of_memory(error) or not (release(policy) or len(requests) > 1):
            raise
    if policy.device.type == "cuda":
        torch.cuda.empty_cache()
    if len(requests) == 1:
        return _Batch(policy, requests).run()
    half = len(requests) // 2
    logger.warning("memory ran out on %d rows; generating %d at a time", len(requests), half)
    return _run_chunk(policy, requests[:half]) + _run_chunk(policy, requests[half:])


def _chunks(policy: Policy, requests: Sequence[GenerationRequest]) -> list[list[int]]:
    """Split requests into batches of alike length whose caches fit (``model.sizes``).

    Prompts count once where rows share them, else for each row, padded to the longest.
    """
    chunks: list[list[int]] = []
    equal_only = not pads_safely(policy.model)
    room, shares = DecodingRoom(policy.model), can_share(policy.model)
    longest_T, longest_new = 0, 0
    distinct: set[tuple[int, ...]] = set()
    for index in sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids_T)):
        request = requests[index]
        length, new = len(request.prompt_ids_T), room_for(policy, request)
        longest_new = max(longest_new, new)
        rows = len(chunks[-1]) + 1 if chunks else 1
        prompts = len(distinct) + (request.prompt_ids_T not in distinct) if shares else rows
        fits = chunks and room.holds(rows, prompts * length + rows * longest_new)
        if not fits or (equal_only and length != longest_T):
            chunks.append([])
            longest_new, distinct = new, set()
        chunks[-1].append(index)
        distinct.add(request.prompt_ids_T)
        longest_T = length
    return chunks


def room_for(policy: Policy, request: GenerationRequest) -> int:
    """Tokens that a completion may have."""
    return min(request.max_tokens, policy.context_length - len(request.prompt_ids_T))


class _Batch:
    """One batch from prompts to results. Tensors: U distinct prompts, B live rows, T tokens."""

    def __init__(self, policy: Policy, requests: Sequence[GenerationRequest]) -> None:
        self.policy, self.requests = policy, requests
        self.model, self.tokenizer = policy.model, policy.tokenizer
        device = policy.device
        limits = [room_for(policy, request) for request in requests]
        total, self.steps = len(requests), max(limits)
        width = self.steps + 1  # one place for what is of no account
        self.ids = torch.zeros((total, width), dtype=torch.long, device=device)
        self.logprobs = torch.zeros((total, width), device=device)
        self.uniform = torch.from_numpy(uniforms([r.seed for r in requests], width))
        self.uniform = self.uniform.to(device)
        self.lengths = torch.zeros(total, dtype=torch.long, device=device)
        self.stopped = torch.zeros(total, dtype=torch.bool, device=device)
        self.limits = torch.tensor(limits, device=device)
        temperature = torch.tensor([r.temperature for r in requests], device=device)
        self.greedy = temperature == 0
        self.scale = temperature.masked_fill(self.greedy, 1.0)
        self.any_greedy, self.any_scaled = bool(self.greedy.any()), bool((self.scale != 1).any())
        self.top_p = torch.tensor([r.top_p for r in requests], device=device)
        self.any_top_p = any(r.top_p < 1 for r in requests)
        self.top_k = torch.tensor([r.top_k or MANY for r in requests], device=device)
        self.any_top_k = any(r.top_k for r in requests)
        penalised = any(r.is_penalised for r in requests)
        self.penalties = Penalties(requests, self.scale) if penalised else None
        self.any_stop = any(r.stop for r in requests)
        self.markers = sorted({r.end.marker for r in requests if r.end is not None})
        self.look = LOOK_FOR_END.get(device.type, LOOK_SELDOM)
        self.may_close: Tensor | None = None
        self.eos = torch.tensor(sorted(eos_ids(policy)), dtype=torch.long, device=device)
        held = any(request.grammar is not None for request in requests)
        self.held = HeldRows(policy, requests, limits) if held else None
        # Other rows may be over in the middle of a run, or draw by what was in it.
        self.takes_runs = held and not self.any_stop and not penalised

    def run(self) -> list[GenerationResult]:
        rows = torch.arange(len(self.requests), device=self.policy.device)
        done = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        logits_BV, decode, position_B = self._prefill()
        takes_runs = self.takes_runs and decode.takes_runs
        at_B = torch.zeros_like(rows)  # the place of each row's next token
        count = _Count(rows.device)
        for step in range(self.steps):
            next_B, logprob_B = self._sample(logits_BV, rows, at_B)
            self.ids[rows, at_B], self.logprobs[rows, at_B] = next_B, logprob_B
            done = self._update_done(done, rows, next_B, step, at_B)
            runs: list[list[int]] = []
            if self.held is not None:
                closed, runs = self.held.advance(next_B, rows, done, at_B if takes_runs else None)
                self.lengths[rows] = torch.where(closed, at_B + 1, self.lengths[rows])
                done = done | closed | self._written(rows, at_B, runs)
            finished = count(done)
            if finished == len(rows):
                break
            if finished >= LEAVE_SHARE * len(rows) and decode.drops_rows:
                keep = (~done).nonzero().squeeze(1)
                if len(keep) == 0:
                    break
                decode.keep(keep)
                rows, next_B, done = rows[keep], next_B[keep], done[keep]
                position_B, at_B = position_B[keep], at_B[keep]
                runs = [runs[place] for place in keep.tolist()] if runs else runs
                count = _Count(rows.device)
            length_B = torch.ones_like(at_B)
            if any(runs) and isinstance(decode, GrowingDecode):
                logits_BV = decode.step_with_runs(next_B, position_B, runs).float()
                length_B += torch.tensor([len(run) for run in runs], device=rows.device)
            else:
                logits_BV = decode.step(next_B, position_B)
            position_B = position_B + length_B
            # In the last place is what rows that are over go on to say.
            at_B = (at_B + length_B).clamp(max=self.steps)
        return self._results()

    def _written(self, rows: Tensor, at_B: Tensor, runs: list[list[int]]) -> Tensor:
        """Write runs down, whose tokens are certain; the rows that are at their limit with them."""
        over = [False] * len(rows)
        for place, run in enumerate(runs):
            if run:
                row, start = int(rows[place]), int(at_B[place]) + 1
                end = start + len(run)
                self.ids[row, start:end] = torch.tensor(run, device=rows.device)
                if end == self.limits[row]:
                    over[place] = True
                    self.lengths[row] = end
                    run.clear()  # nothing is asked for behind it
        return torch.tensor(over, device=rows.device)

    def _prefill(self) -> tuple[Tensor, GrowingDecode | GraphDecode, Tensor]:
        """Read each distinct prompt once, then give every row its copy of the cache."""
        distinct: dict[tuple[int, ...], int] = {}
        owner = [distinct.setdefault(r.prompt_ids_T, len(distinct)) for r in self.requests]
        device = self.policy.device
        owner_B = torch.tensor(owner, device=device)
        length_B = torch.tensor([len(r.prompt_ids_T) for r in self.requests], device=device)
        begun = self._read_by_prefixes(list(distinct))
        logits_UV = None
        if begun is not None:
            cache, mask_UT = begun
        else:
            pad_id = self.tokenizer.pad_token_id
            ids_UT, mask_UT = left_padded(list(distinct), pad_id, device)
            logits_UV, cache = forward(self.model, ids_UT, mask_UT, positions(mask_UT), None)
        if not hasattr(cache, "reorder_cache") and len(distinct) < len(owner):
            logger.warning("equal prompts are read again: %s has no copies", type(cache))
            ids_BT, mask_BT = ids_UT[owner_B], mask_UT[owner_B]
            logits_BV, cache = forward(self.model, ids_BT, mask_BT, positions(mask_BT), None)
            return logits_BV.float(), GrowingDecode(self.model, cache, mask_BT, False), length_B
        decode = self._copied_out(cache, owner_B, mask_UT)
        if logits_UV is not None:
            return logits_UV[owner_B].float(), decode, length_B
        last_B = torch.tensor([r.prompt_ids_T[-1] for r in self.requests], device=device)
        return decode.step(last_B, length_B - 1), decode, length_B

    def _copied_out(
        self, cache: Any, owner_B: Tensor, mask_UT: Tensor
    ) -> GrowingDecode | GraphDecode:
        """Decoding of the rows from a cache of their prompts."""
        steps = self.steps + 1
        static = begin(self.policy, cache, owner_B, mask_UT, steps)
        if static is not None:
            return static
        many = len(owner_B) * mask_UT.shape[1] >= SHARE_TOKENS
        if self.takes_runs:
            many = many or all(type(y) is DynamicLayer for y in getattr(cache, "layers", [None]))
        shares = many and can_share(self.model) and share(cache, owner_B, mask_UT, steps)
        if not shares:
            if len(mask_UT) < len(owner_B):
                cache.reorder_cache(owner_B)
            make_room(cache, steps)
        return GrowingDecode(self.model, cache, mask_UT[owner_B], shares)

    def _read_by_prefixes(self, prompts_U: list[tuple[int, ...]]) -> tuple[Any, Tensor] | None:
        """The cache of all prompts but for their last tokens, where common beginnings are worth it.

        The last tokens are left to the decoding, whose rows end where their tokens do.
        """
        prefixes = worthwhile_prefixes(prompts_U)
        if prefixes is None or not can_continue(self.model):
            return None
        pad_id = self.tokenizer.pad_token_id
        backbone = backbone_of(self.model)
        cache, mask_UT = read_prefixes(backbone, prefixes, pad_id, self.policy.device)
        rest_U = [prefixes.rest(number, ids[:-1]) for number, ids in enumerate(prompts_U)]
        if any(rest_U):
            mask_UT = read_rest(backbone, cache, mask_UT, rest_U, pad_id)
        return cache, mask_UT

    def _sample(self, logits_BV: Tensor, rows: Tensor, at_B: Tensor) -> tuple[Tensor, Tensor]:
        if self.any_scaled:
            logits_BV = logits_BV / self.scale[rows][:, None]
        if self.held is not None:
            logits_BV = self.held.masked(logits_BV, rows)
        logprob_BV = drawn_BV = logits_BV.log_softmax(-1)
        if self.penalties is not None:
            drawn_BV = self.penalties.lowered(logits_BV, rows).log_softmax(-1)
        next_B = draw(
            drawn_BV.exp(),
            self.uniform[rows, at_B],
            self.top_p[rows] if self.any_top_p else None,
            self.top_k[rows] if self.any_top_k else None,
        )
        if self.any_greedy:
            next_B = torch.where(self.greedy[rows], drawn_BV.argmax(-1), next_B)
        if self.penalties is not None:
            self.penalties.had(next_B, rows)
        if self.markers and self.may_close is None:
            size = logits_BV.shape[1]
            found = [closing_tokens(self.tokenizer, marker, size) for marker in self.markers]
            self.may_close = torch.stack(found).any(0).to(logits_BV.device)
        return next_B, logprob_BV.gather(1, next_B[:, None]).squeeze(1)

    def _update_done(
        self, done: Tensor, rows: Tensor, next_B: Tensor, step: int, at_B: Tensor
    ) -> Tensor:
        ended = torch.isin(next_B, self.eos)
        if self.any_stop:
            ended = ended | self._hit_stop_string(done, rows, step)
        if self.may_close is not None and step % self.look == self.look - 1:
            ended = ended | self._closed(done, rows, step, at_B)
        now = ~done & (ended | (self.limits[rows] <= at_B + 1))
        self.lengths[rows] = torch.where(now, at_B + 1, self.lengths[rows])
        self.stopped[rows] |= now & ended
        return done | now

    def _hit_stop_string(self, done: Tensor, rows: Tensor, step: int) -> Tensor:
        hit = [False] * len(rows)
        for place, (row, over) in enumerate(zip(rows.tolist(), done.tolist(), strict=True)):
            request = self.requests[row]
            if request.stop and not over:
                # A token is at least a byte, but for special ones, which decode to nothing.
                tail = max(len(text.encode()) for text in request.stop) + 8
                ids = self.ids[row, max(0, step + 1 - tail) : step + 1].tolist()
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                hit[place] = any(s in text for s in request.stop)
                if hit[place] and request.thought is not None:
                    whole = self.tokenizer.decode(self.ids[row, : step + 1].tolist())
                    hit[place] = is_stopped(whole, request)
        return torch.tensor(hit, device=done.device)

    def _closed(self, done: Tensor, rows: Tensor, step: int, at_B: Tensor) -> Tensor:
        """Which rows have closed their answer before their latest token."""
        closed = torch.zeros_like(done)
        assert self.may_close is not None
        # Of all tokens since the last look and one before, for a row goes on by one behind it.
        since = slice(None) if self.takes_runs else slice(max(0, step - self.look), step)
        latest = self.ids[rows, since]
        for place in (self.may_close[latest].any(1) & ~done).nonzero().squeeze(1).tolist():
            row = int(rows[place])
            end = self.requests[row].end
            if end is not None:
                ids_T = self.ids[row, : int(at_B[place])].tolist()
                closed[place] = end.place(self.tokenizer.decode(ids_T)) is not None
        return closed

    def _results(self) -> list[GenerationResult]:
        if not torch.isfinite(self.logprobs).all():
            raise ModelError(
                f"weights {self.policy.version()} give probabilities that are not finite in "
                f"{self.policy.model.dtype}: "
                + (
                    "training has diverged, so lower learning_rate, or go back to a checkpoint"
                    if self.policy.step
                    else "load them in another dtype"
                )
            )
        lengths, stopped = self.lengths.tolist(), self.stopped.tolist()
        ids = [row[:n] for row, n in zip(self.ids.tolist(), lengths, strict=True)]
        logprobs = [row[:n] for row, n in zip(self.logprobs.tolist(), lengths, strict=True)]
        if self.held is not None:
            self.held.complete(ids, logprobs, stopped)
        # Where the marker was seen late, by the row's own count alone.
        kept = [
            kept_tokens(self.tokenizer, row, request.end)
            for row, request in zip(ids, self.requests, strict=True)
        ]
        stopped = [e or n < len(row) for e, n, row in zip(stopped, kept, ids, strict=True)]
        ids = [row[:n] for row, n in zip(ids, kept, strict=True)]
        logprobs = [row[:n] for row, n in zip(logprobs, kept, strict=True)]
        texts = texts_of(self.policy, ids, self.requests)
        return [
            GenerationResult(
                completion_ids_T=tuple(ids_T),
                logprobs_T=tuple(logprobs_T),
                text=text,
                finish_reason="stop" if ended else "length",
            )
            for ids_T, logprobs_T, text, ended in zip(ids, logprobs, texts, stopped, strict=True)
        ]


class _Count:
    """How many rows are done: on a GPU a step ago, for to wait for its latest leaves it idle."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._asked: tuple[Tensor, Any] | None = None

    def __call__(self, done: Tensor) -> int:
        if not self._cuda:
            return int(done.sum())
        before = self._asked
        number = torch.empty((), dtype=torch.long, pin_memory=True)
        number.copy_(done.sum(), non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        self._asked = number, ready
        if before is None:
            return 0
        before[1].synchronize()
        return int(before[0])
