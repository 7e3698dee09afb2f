"""The records that travel through a run. Messages below, tokens above.

One alignment everywhere: every per-token array is as long as `tokens`; index `t` speaks of `tokens[t]` given
`tokens[:t]`; `values[t]` is V(tokens[:t]), before token `t` is chosen; index 0 is never chosen.

    turn 0: prompt P0, the policy answers A0, the environment replies E0;  turn 1: the policy answers A1
    tokens   = P0 + A0 + E0 + A1          append-only, never re-tokenised
    spans    = prompt, chosen, observation, chosen  (and scaffold: what the chat template adds)
    mask     = F…   T…   F…   T…          the chosen spans; made where the choice is made
    logprobs = 0…   lp   0…   lp          the sampler's, at the sampling temperature
    rewards  = 0…   ..r0 0…   ..r1        on the last chosen token of the turn that earned it
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Split = Literal["train", "validation", "test"]
ReplyStop = Literal["end", "string", "length"]
EpisodeStop = Literal["done", "length", "turns", "failed"]
SpanKind = Literal["prompt", "chosen", "observation", "scaffold"]


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message. `role` is system, user, assistant or tool."""

    role: str
    content: str
    name: str | None = None
    tool_calls: tuple[Any, ...] = ()
    tool_call_id: str | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """What one session is about: JSON-able whole, so that it crosses a process, a wire and a checkpoint."""

    id: str  # unique within its environment, equal for equal (split, index)
    env: str  # the environment's name in the recipe
    split: Split
    index: int
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Reply:
    """What a policy answered. `stop`: "end" at its end token, "string" at a stop string, "length" if it was cut."""

    message: Message
    stop: ReplyStop


@dataclass(frozen=True, slots=True)
class Turn:
    """What a session says next: messages for `agent`, who speaks unless `done`; rewards for the action just taken."""

    messages: tuple[Message, ...] = ()
    agent: str = "policy"
    tools: tuple[Mapping[str, Any], ...] = ()
    rewards: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # {agent: {component: value}}
    done: bool = False
    truncated: bool = False  # the environment cut the episode (it did not come to its own end)
    facts: Mapping[str, float] = field(default_factory=dict)  # numbers that become metrics


@dataclass(frozen=True, slots=True)
class Transcript:
    """A finished session in message space."""

    task: Task
    sample: int
    views: Mapping[str, tuple[Message, ...]]  # agent -> what it saw and said, in order
    rewards: tuple[tuple[str, int, str, float], ...]  # (agent, turn, component, value), unweighted
    facts: Mapping[str, float]
    stop: EpisodeStop
    failure: str | None = None  # why the session failed; set exactly when stop is "failed"


@dataclass(frozen=True, slots=True)
class Span:
    """tokens[start:end] are of one kind, belong to one turn, and (if chosen) were sampled by the policy of one step."""

    start: int
    end: int
    kind: SpanKind
    turn: int
    policy_step: int = -1


@dataclass(frozen=True, slots=True)
class Episode:
    """One learner's view of a session, in tokens. Lists are as long as `tokens`."""

    id: str
    session: str
    task: Task
    group: str  # "<environment>/<task id>/<agent>": whose baseline it may share
    sample: int
    agent: str
    tokens: tuple[int, ...]
    spans: tuple[Span, ...]
    logprobs: tuple[float, ...]
    rewards: tuple[float, ...]  # weighted sum of components, on the last chosen token of the turn that earned it
    transcript: Transcript
    stop: EpisodeStop
    ended: bool  # the last reply came to its end token or a stop string
    failure: str | None = None
    attempt: int = 0  # the refill of the step in which it was sampled; 0 is the step's first sampling
    left_out: str | None = None  # why the algorithm does not train on its group; None if it may

    @property
    def chosen(self) -> list[int]:
        """Indices of the chosen tokens, ascending."""
        return [t for span in self.spans if span.kind == "chosen" for t in range(span.start, span.end)]


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded episodes. [B,T] unless said; a row is an episode. What is None is not known yet."""

    tokens: torch.Tensor  # int64; padding is 0 and lies behind `lengths`
    lengths: torch.Tensor  # int64 [B]: tokens in the row
    mask: torch.Tensor  # bool: chosen tokens
    score: torch.Tensor  # bool: where the LM head runs (wherever weights can be non-zero)
    logprobs: torch.Tensor  # fp32: the sampler's
    rewards: torch.Tensor  # fp32
    weights: torch.Tensor  # fp32: per-token weight in the policy loss; all zero for excluded rows
    mass: torch.Tensor  # fp32 [B]: what the row adds to the policy loss's denominator
    episode: torch.Tensor  # int64 [B]: index into the step's list of episodes
    group: torch.Tensor  # int64 [B]
    unit: torch.Tensor  # int64 [B]: rows of one unit are never split
    truncated: torch.Tensor  # bool [B]: cut by length or turns, not at a true end
    ended: torch.Tensor  # bool [B]: the last chosen span ended at its end token or stop string
    agent: torch.Tensor | None = None  # int64 [B]: which agent's view the row is, where several learn
    observed: torch.Tensor | None = None  # bool: tokens of observations, where an algorithm learns to foretell them
    old_logprobs: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None
    values: torch.Tensor | None = None
    final_values: torch.Tensor | None = None  # [B]: V(tokens[:length])
    advantages: torch.Tensor | None = None
    returns: torch.Tensor | None = None

    def replace(self, **fields: Any) -> Batch:
        """A copy with some fields replaced."""
        return replace(self, **fields)

    def rows(self, index: torch.Tensor) -> Batch:
        """The rows `index` (int64), trimmed on the right to the longest of them."""
        longest = int(self.lengths[index].max())
        fields: dict[str, Any] = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if value is not None:
                value = value[index]
                fields[name] = value[:, :longest] if value.ndim == 2 else value
        return Batch(**fields)


@dataclass(frozen=True, slots=True)
class PolicyOut:
    """What one forward says of a batch, aligned as everything else; zero where it was not asked for."""

    logprobs: torch.Tensor  # fp32 [B,T]: log π(tokens[t] | tokens[:t]) at the temperature, where scored
    entropy: torch.Tensor  # fp32 [B,T]: of the same distribution, in nats, where scored
    values: torch.Tensor | None  # fp32 [B,T]: V(tokens[:t]) where scored; None without a value head
    final_values: torch.Tensor | None  # fp32 [B]: V(tokens[:length])


@dataclass(frozen=True, slots=True)
class Limits:
    """When a completion ends and how it is drawn."""

    max_new_tokens: int
    temperature: float  # 0 is greedy; log-probs are then those at temperature 1
    end_tokens: tuple[int, ...]  # sampled end tokens stay in the completion
    stop_strings: tuple[str, ...] = ()  # the completion ends with the token that completes one of them
    ignore_end: bool = False  # a sampled end token is ordinary and does not stop the row


@dataclass(frozen=True, slots=True)
class Request:
    """Continue `tokens`, which must extend what the same conversation held before."""

    conversation: str
    tokens: tuple[int, ...]
    draw_key: bytes  # the uniforms of position t are a function of (draw_key, t) alone
    limits: Limits


@dataclass(frozen=True, slots=True)
class Completion:
    """Sampled tokens with the sampler's log-probs at the sampling temperature; lists of equal length."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop: ReplyStop


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands: `step` updates are done out of `steps`."""

    step: int
    steps: int
