"""The decoding loop of the cached engine: admit, prefill, decode together, retire, refill."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch

from mrlm_cli.engines.cached.cache import SlotCache
from mrlm_cli.engines.cached.forward import AnyForward, Forward, extend
from mrlm_cli.engines.cached.graphs import Capture, Graphs
from mrlm_cli.engines.cached.llama import LlamaForward
from mrlm_cli.engines.cached.sizes import Sizes
from mrlm_cli.engines.cached.slots import Conversation, Layout, arranged
from mrlm_cli.engines.cached.steps import step, taken
from mrlm_cli.engines.drafts import Draft, check_requests
from mrlm_cli.engines.sampler import sample
from mrlm_cli.engines.weights import decoding
from mrlm_cli.errors import EngineError, UserError
from mrlm_cli.records import Completion, Request

PREFILL_TOKENS = 512  # padded tokens of one prefill forward, which suits a CPU's cache; a longer prompt makes its own
PREFILL_TOKENS_ELSEWHERE = 4096  # enough work for a GPU to outlast the launching of it
TURNOVER = 8  # rows are retired and refilled when at least one in this many has ended


class Decoder:
    """Conversations with their keys and values, and the loop that extends them.

    Every choice follows from weights, settings and the calls since the last load, never from a clock.
    With `capture`, which begins a family of captures, decode steps are captured and replayed; then few shapes occur,
    and the cache is made anew only for a call that it is too small for.
    """

    def __init__(
        self,
        slots: int,
        cached_tokens: int,
        precision: str,
        check: Callable[[], None],
        capture: Callable[[], Capture] | None = None,
    ) -> None:
        self._most_rows = slots
        self._cached_tokens = cached_tokens
        self._check = check
        self._precision = precision
        self._source: torch.nn.Module | None = None
        self._forward: Forward | None = None
        self._loaded = False
        self._device = torch.device("cpu")
        self._cache: SlotCache | None = None
        self._graphs = None if capture is None else Graphs(capture)
        self._sizes = Sizes(few=capture is not None)
        self._layout: Layout = []
        self._spots = 0  # slots that a step may fill up its shape with
        self._held: dict[str, Conversation] = {}

    def load(self, module: torch.nn.Module) -> None:
        """Take weights, forget every conversation. Raises UserError for a model whose steps cannot be captured."""
        self.free(list(self._held))
        if module is self._source and self._forward is not None:
            self._forward.refresh()
        else:
            llama = LlamaForward.of(module, self._precision)
            if self._graphs is not None and llama is None:
                config: Any = module.config
                raise UserError(
                    f"engine.cuda_graphs is true, and {config.model_type} has not Llama's shape; set it to false"
                )
            if self._graphs is not None:
                self._graphs.drop()
            self._forward = llama or AnyForward(module, self._precision)
            self._source, self._cache = module, None
            self._device = next(module.parameters()).device
        self._loaded = True

    def free(self, names: Iterable[str]) -> None:
        """Forget these conversations; unknown names are ignored."""
        for name in names:
            gone = self._held.pop(name, None)
            if gone is not None and gone.slot is not None:
                self._layout[gone.slot] = None

    def release(self) -> None:
        """Forget every conversation and give up the memory of weights, keys and values until the next load.

        With captures the memory stays, since they hold its addresses.
        """
        self.free(list(self._held))
        self._loaded = False
        if self._forward is not None and self._graphs is None:
            self._layout, self._cache = [], None
            self._forward.release()

    def generate(self, requests: Sequence[Request], decode: Callable[[Sequence[int]], str]) -> list[Completion]:
        """Completions in request order. After any exception nothing is held any more."""
        if self._forward is None or not self._loaded:
            raise EngineError("the engine has no weights yet: load a policy first")
        module = self._forward.module
        held = {name: row.tokens for name, row in self._held.items()}
        check_requests(requests, held, getattr(module.config, "max_position_embeddings", None))
        if not requests:
            return []
        try:
            with decoding(module):
                return self._generate([Draft(request, decode) for request in requests])
        except BaseException:
            self.free(list(self._held))
            self._cache = None
            raise

    def _generate(self, drafts: list[Draft]) -> list[Completion]:
        rows = self._make_room([draft.request for draft in drafts])
        waiting: deque[Conversation] = deque()
        for draft in drafts:
            row = self._held.setdefault(draft.request.conversation, Conversation(draft.request.conversation))
            row.draft = draft
            waiting.append(row)
        live: list[Conversation] = []
        prompts: dict[tuple[int, ...], Conversation] = {}
        while True:
            room = rows - sum(not row.ended for row in live)
            joining = [waiting.popleft() for _ in range(min(len(waiting), room))]
            live = self._arrange(live, joining)
            if not live:
                break
            self._prefill(joining, prompts)
            self._decode(live)
        for draft in drafts:
            row = self._held[draft.request.conversation]
            row.tokens, row.draft = draft.request.tokens + tuple(draft.tokens), None
        return [draft.completion() for draft in drafts]

    def _make_room(self, requests: Sequence[Request]) -> int:
        """Size the cache for this call, keeping what is held; returns the most rows that decode together."""
        asked = {request.conversation for request in requests}
        kept = [row for row in self._layout if row is not None]
        longest = max(len(request.tokens) + request.limits.max_new_tokens for request in requests)
        capacity = self._sizes.width(max([longest, *(row.fed + 1 for row in kept)]))  # one may be written behind each
        most = max(1, self._cached_tokens // capacity)
        slots = min(len(asked | set(self._held)), most)
        rows = min(self._most_rows, slots, len(requests))
        # What is asked for now stays first; the keys and values of the others are computed anew when they go on.
        kept = sorted(kept, key=lambda row: row.name not in asked)[:slots]
        self._spots = self._sizes.rows(slots, most)
        there = None if self._cache is None else (self._cache.slots, self._cache.capacity)
        size = self._sizes.memory((self._spots, capacity), there, self._cached_tokens)
        if self._cache is None or (not kept and size != there):
            self._cache = SlotCache(*size)
        elif size != there:
            sources = [row.slot for row in kept if row.slot is not None]
            self._cache.resize(*size, sources, max(row.fed for row in kept))
        else:
            self._move(kept)
        self._place([*kept, *[None] * (slots - len(kept))])
        return rows

    def _place(self, layout: Layout) -> None:
        """Enter a new layout; who has no place in it has nothing cached."""
        gone = {id(row): row for row in self._layout if row is not None}
        for slot, row in enumerate(layout):
            if row is not None:
                row.slot = slot
                gone.pop(id(row), None)
        for row in gone.values():
            row.slot, row.fed = None, 0
        self._layout = layout

    def _arrange(self, live: list[Conversation], joining: list[Conversation]) -> list[Conversation]:
        """Retire ended rows, admit `joining`, move keys and values accordingly; returns the rows that decode next."""
        assert self._cache is not None
        layout, rows = arranged(self._layout, live, joining)
        self._move(layout)
        self._place(layout)
        return rows

    def _move(self, layout: Sequence[Conversation | None]) -> None:
        """Put keys and values where a new layout has them."""
        assert self._cache is not None
        moved = [(row, slot) for slot, row in enumerate(layout) if row is not None and row.slot not in (None, slot)]
        self._cache.copy(
            [row.slot for row, _ in moved if row.slot is not None],
            [slot for _, slot in moved],
            max((row.fed for row, _ in moved), default=0),
        )

    def _prefill(self, joining: list[Conversation], prompts: dict[tuple[int, ...], Conversation]) -> None:
        """Feed what each joining row has not fed yet and choose its first token.

        Equal new prompts are computed once: rows that join together share the forward (keys, values and logits); one
        that joins later copies the keys and values of all but its last token, which it feeds itself.
        """
        assert self._cache is not None
        leaders: dict[tuple[int, ...], list[Conversation]] = {}  # prompt -> rows, the first of which is computed
        jobs: list[list[Conversation]] = []
        borrowed: list[tuple[Conversation, Conversation]] = []
        for row in joining:
            tokens = _request(row).tokens
            lender = prompts.get(tokens)
            if row.fed:
                jobs.append([row])
            elif tokens in leaders:
                leaders[tokens].append(row)
            elif lender is not None and lender.fed >= len(tokens) > 1:
                borrowed.append((lender, row))
                jobs.append([row])
            else:
                leaders[tokens] = [row]
                prompts[tokens] = row
                jobs.append(leaders[tokens])
        self._copy([(lender, row, len(_request(row).tokens) - 1) for lender, row in borrowed])
        for _, row in borrowed:
            row.fed = len(_request(row).tokens) - 1

        for chunk in _chunks(jobs, PREFILL_TOKENS if self._device.type == "cpu" else PREFILL_TOKENS_ELSEWHERE):
            self._check()
            logits = self._extend([rows[0] for rows in chunk])
            shared = [(rows[0], row, rows[0].fed) for rows in chunk for row in rows[1:]]
            self._copy(shared)
            for leader, row, _ in shared:
                row.fed = leader.fed
            index = [place for place, rows in enumerate(chunk) for _ in rows]
            everyone = [row for rows in chunk for row in rows]
            self._choose(everyone, logits if len(index) == len(chunk) else logits[index])

    def _extend(self, rows: list[Conversation]) -> torch.Tensor:
        """Feed all that these rows have not fed of their requests; logits [B, V] after it."""
        assert self._cache is not None
        assert self._forward is not None
        new = [_request(row).tokens[row.fed :] for row in rows]
        counts = [len(tokens) for tokens in new]
        longest = max(counts)
        padded = [tokens + (0,) * (longest - len(tokens)) for tokens in new]
        logits = extend(
            self._forward,
            self._cache,
            slots=self._tensor([row.slot for row in rows]),
            tokens=self._tensor(padded),
            starts=self._tensor([row.fed for row in rows]),
            counts=None if min(counts) == longest else self._tensor(counts),
            width=self._sizes.width(max(len(_request(row).tokens) for row in rows)),
            fresh=not any(row.fed for row in rows),
        )
        for row in rows:
            row.fed = len(_request(row).tokens)
        return logits

    def _decode(self, live: list[Conversation]) -> None:
        """Steps of one token for all live rows (slots 0 to B - 1) until enough of them have ended.

        Rows that have ended meanwhile are carried along: they write behind their end and choose nothing. So does
        whatever lies in the slots that fill up a captured shape.
        """
        assert self._cache is not None
        padded = self._sizes.rows(len(live), self._spots)
        idle = [0 if row is None else row.fed for row in (*self._layout, *[None] * padded)[len(live) : padded]]
        if self._graphs is not None:
            assert isinstance(self._forward, LlamaForward)
            self._graphs.lies([*self._forward.memory(), *self._cache.memory])
        ended = sum(row.ended for row in live)
        while ended * TURNOVER < len(live):
            self._check()
            given = taken(live, idle)
            width = self._sizes.width(max(row.fed for row in live) + 1)
            chosen = self._step(live, given, width).tolist()
            for row, (token, logprob) in zip(live, chosen, strict=False):
                if not row.ended:
                    row.fed += 1
                    _draft(row).add(int(token), logprob)
            ended = sum(row.ended for row in live)

    def _step(self, live: list[Conversation], given: torch.Tensor, width: int) -> torch.Tensor:
        """See `steps.step`; `given` is on the host."""
        assert self._cache is not None
        assert self._forward is not None
        if self._graphs is not None:
            return self._graphs.step(self._forward, self._cache, given, width)
        return step(self._forward, self._cache, given.to(self._device), width, **_work(live))

    def _choose(self, rows: list[Conversation], logits: torch.Tensor) -> None:
        """Each row's first token of its reply, from logits [B, V]."""
        drafts = [_draft(row) for row in rows]
        drawn = torch.tensor([draft.draw() for draft in drafts], dtype=torch.float64, device=self._device)
        temperatures = torch.tensor([draft.request.limits.temperature for draft in drafts], device=self._device)
        tokens, logprobs = sample(logits, temperatures, drawn, **_work(rows))
        for draft, token, logprob in zip(drafts, tokens.tolist(), logprobs.tolist(), strict=True):
            draft.add(token, logprob)

    def _copy(self, copies: list[tuple[Conversation, Conversation, int]]) -> None:
        """Copy the first `length` positions from one row's slot to another's, for each (from, to, length)."""
        assert self._cache is not None
        sources = [source.slot for source, _, _ in copies if source.slot is not None]
        targets = [target.slot for _, target, _ in copies if target.slot is not None]
        self._cache.copy(sources, targets, max((length for _, _, length in copies), default=0))

    def _tensor(self, numbers: Any) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._device)


def _draft(row: Conversation) -> Draft:
    assert row.draft is not None
    return row.draft


def _request(row: Conversation) -> Request:
    return _draft(row).request


def _work(rows: list[Conversation]) -> dict[Literal["scaled", "drawn"], bool]:
    """What the sampler has to do for these rows."""
    temperatures = {_request(row).limits.temperature for row in rows}
    return {"scaled": temperatures != {1.0}, "drawn": temperatures != {0.0}}


def _chunks(jobs: list[list[Conversation]], most: int) -> list[list[list[Conversation]]]:
    """Jobs sorted by (continuing, new tokens) and cut so that a chunk holds at most `most` padded tokens.

    A chunk holds either fresh rows only or continuing rows only.
    """
    keyed = sorted(
        ((rows[0].fed > 0, len(_request(rows[0]).tokens) - rows[0].fed, rows) for rows in jobs), key=lambda k: k[:2]
    )
    chunks: list[list[list[Conversation]]] = []
    kind = None
    for continuing, new, rows in keyed:
        if continuing is not kind or (len(chunks[-1]) + 1) * new > most:
            chunks.append([])
            kind = continuing
        chunks[-1].append(rows)
    return chunks
