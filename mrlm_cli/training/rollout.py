"""Sessions and an engine make episodes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from mrlm_cli.draws import draw_key, integer
from mrlm_cli.engines.base import Engine
from mrlm_cli.envs.host import Host, Ticket
from mrlm_cli.envs.players import heard
from mrlm_cli.envs.players import label as player_label
from mrlm_cli.errors import SessionFailure
from mrlm_cli.policy.chat import Chat
from mrlm_cli.recipe.sections import Sampling
from mrlm_cli.records import Episode, EpisodeStop, Limits, Reply, Task, Transcript, Turn
from mrlm_cli.rewards.base import PREFIX, Failure, Outcome
from mrlm_cli.rewards.firewall import Scorers
from mrlm_cli.training.agents import Frozen, Other, Scored, Script, Scripted
from mrlm_cli.training.conversation import Conversation

EXCLUDED = "excluded: "  # a failure that begins so is an episode that never fitted, not a technical failure
UNSCORED = "reward "  # and one that begins so, with the reward's name, is of a session that a reward could not score


@dataclass(frozen=True, slots=True)
class Draw:
    """What the episodes of one rollout are a function of, besides weights, task and sample."""

    seed: int
    stream: str  # "train", or the split of an evaluation
    step: int  # an evaluation draws the same at every step, so that two of them differ by the policy alone
    policy_step: int  # how many updates the policy has seen
    attempt: int = 0  # refill of the step
    first: int = 0  # tasks of the step before these: a task is drawn by its place in the whole step, refills included


@dataclass(slots=True)
class _Live:
    """A session under way."""

    name: str  # unique in the run, for the journal
    key: tuple[int | str, ...]  # what every draw in the session is a function of
    task: Task
    sample: int
    conversations: dict[str, Conversation | Script] = field(default_factory=dict)
    rewards: list[tuple[str, int, str, float]] = field(default_factory=list)
    facts: dict[str, float] = field(default_factory=dict)
    speaker: str = ""
    stop: EpisodeStop | None = None
    finished: bool = False  # the environment itself said that it is done
    failure: str | None = None

    def end(self, stop: EpisodeStop, failure: str | None = None) -> None:
        self.stop, self.failure = stop, failure


@dataclass(slots=True)
class _Cohort:
    sessions: list[_Live]
    ticket: Ticket


class Rollout:
    """Runs sessions to their end and returns their episodes, in the order of (task, sample, agent).

    An agent that is not among `others` is the policy that learns, and its view is an episode; what the others see and
    say is in the transcript only. A session with two learners makes two episodes.

    Sessions in worker processes are cut into two cohorts, so that one decodes while the other's environments think;
    who belongs to which depends on counts only, never on a clock.
    """

    def __init__(
        self,
        host: Host,
        engine: Engine,
        chat: Chat,
        sampling: Sampling,
        *,
        bootstrap: bool,
        phase: Callable[[str, int, int], None],
        others: Mapping[str, Other] | None = None,
        players: Host | None = None,
        scorers: Scorers | None = None,
    ) -> None:
        self._host = host
        self._engine = engine
        self._chat = chat
        self._sampling = sampling
        self._bootstrap = bootstrap
        self._phase = phase
        self._others = others or {}
        self._players = players
        self._scorers = scorers
        self.decoding_seconds = 0.0  # of the learner's engine, since the beginning
        self._engines = {id(one.engine): one.engine for one in self._others.values() if isinstance(one, Frozen)}
        self._max_tokens = min(sampling.max_tokens or chat.context, chat.context)

    def episodes(self, tasks: Sequence[Task], samples: int, draw: Draw, temperature: float) -> list[Episode]:
        """The episodes of `samples` sessions of each task. `temperature` is the learner's."""
        for one in self._others.values():
            if isinstance(one, Frozen):
                one.engine.load(one.policy.lm)  # what it kept of another rollout must not reach this one's bits
        limits = Limits(
            max_new_tokens=self._sampling.max_new_tokens,
            temperature=temperature,
            end_tokens=self._chat.end_tokens,
            stop_strings=self._sampling.stop,
        )
        sessions = [
            _Live(
                f"{draw.stream}/{draw.policy_step}/{task.env}/{task.id}/{number}.{sample}",
                (draw.seed, draw.stream, draw.step, number, task.env, task.id, sample),
                task,
                sample,
            )
            for number, task in enumerate(tasks, draw.first)
            for sample in range(samples)
        ]
        waiting: deque[_Cohort] = deque()
        for members in self._cohorts(sessions):
            opened = [(one.name, one.task, integer(2**63, "session", *one.key)) for one in members]
            waiting.append(_Cohort(members, self._host.open(opened)))
        done = 0
        while waiting:
            cohort = waiting.popleft()
            self._phase(f"{draw.stream}: sampling", done, len(sessions))
            turns = self._host.collect(cohort.ticket)
            replies = self._advance(cohort, turns, draw, limits)
            over = [one for one in cohort.sessions if one.stop is not None]
            self._host.close([one.name for one in over])
            if self._players is not None:
                self._players.close([talk.name for one in over for talk in one.conversations.values()])
            gone = [f"{one.name}/{agent}" for one in over for agent in one.conversations]
            for engine in (self._engine, *self._engines.values()):
                engine.free(gone)
            done += len(over)
            cohort.sessions = [one for one in cohort.sessions if one.stop is None]
            if cohort.sessions:
                cohort.ticket = self._host.step(replies)
                waiting.append(cohort)
        self._phase(f"{draw.stream}: sampling", done, len(sessions))
        self._score(sessions, draw)
        return [episode for one in sessions for episode in self._episodes(one, draw.attempt)]

    def _score(self, sessions: Sequence[_Live], draw: Draw) -> None:
        """Add what the recipe's rewards give to each session that came to an end; one they cannot score has failed.

        Where the value is bootstrapped, a session that was cut would have gone on, and is left unscored.
        """
        if self._scorers is None or not self._scorers.weights:
            return
        ended = [one for one in sessions if one.stop == "done" or (one.stop != "failed" and not self._bootstrap)]
        self._phase(f"{draw.stream}: scoring", 0, len(ended))
        given = self._scorers.score([(one.name, self._transcript(one)) for one in ended])
        for one, outcomes in zip(ended, given, strict=True):
            for label, outcome in outcomes.items():
                if isinstance(outcome, Failure):
                    one.end("failed", f"{UNSCORED}{label}: {outcome.text}")
            if one.stop != "failed":
                self._take_scores(one, outcomes)

    def _take_scores(self, one: _Live, outcomes: Mapping[str, Outcome]) -> None:
        assert self._scorers is not None
        for label, values in outcomes.items():
            assert not isinstance(values, Failure)
            for agent, value in values.items():
                talk = one.conversations[agent]
                one.rewards.append((agent, max(0, talk.turn - 1), f"{PREFIX}{label}", value))
                talk.reward(self._scorers.weights[label] * value)

    def _cohorts(self, sessions: list[_Live]) -> list[list[_Live]]:
        if len(sessions) < 2 or not any(self._host.thinks_apart(one.task.env) for one in sessions):
            return [sessions]
        middle = (len(sessions) + 1) // 2
        return [sessions[:middle], sessions[middle:]]

    def _advance(
        self, cohort: _Cohort, turns: Mapping[str, Turn | SessionFailure], draw: Draw, limits: Limits
    ) -> list[tuple[str, Reply]]:
        """Hear every session's turn, let the policy answer, and return the replies for sessions that go on."""
        speaking: list[_Live] = []
        for one in cohort.sessions:
            self._hear(one, turns[one.name])
            if one.stop is None:
                speaking.append(one)
        said = self._decoded(speaking, draw, limits)
        played = self._played(speaking)
        replies = []
        for one in speaking:
            talk = one.conversations[one.speaker]
            if isinstance(talk, Script):
                text = played[one.name]
                if isinstance(text, SessionFailure):
                    one.end("failed", f"agent {one.speaker}: {text}")
                    continue
                reply = talk.say(text)
            else:
                reply = said[one.name]
            if reply.stop == "length" and self._bootstrap and self._learns(one.speaker):
                one.end("length")  # the same decision would have gone on: the environment is not asked to score it
                self._await_decisions(one, one.speaker)
            else:
                replies.append((one.name, reply))
        return replies

    def _decoded(self, speaking: Sequence[_Live], draw: Draw, limits: Limits) -> dict[str, Reply]:
        """Session → the reply of its speaker, where that is a policy; every engine is asked once."""
        asked: dict[int, list[tuple[_Live, Conversation, Limits]]] = {}
        engines = {id(self._engine): self._engine, **self._engines}
        for one in speaking:
            talk, other = one.conversations[one.speaker], self._others.get(one.speaker)
            if isinstance(talk, Conversation):
                engine, its = (other.engine, other.limits) if isinstance(other, Frozen) else (self._engine, limits)
                asked.setdefault(id(engine), []).append((one, talk, its))
        said: dict[str, Reply] = {}
        for key, group in asked.items():
            begun = time.perf_counter()
            completions = engines[key].generate([talk.request(its) for _, talk, its in group])
            if engines[key] is self._engine:
                self.decoding_seconds += time.perf_counter() - begun
            for (one, talk, _), completion in zip(group, completions, strict=True):
                said[one.name] = talk.say(completion, draw.policy_step if self._learns(one.speaker) else -1)
        return said

    def _played(self, speaking: Sequence[_Live]) -> dict[str, str | SessionFailure]:
        """Session → what its speaker says, where that is a scripted player; those in worker processes at once."""
        said: dict[str, str | SessionFailure] = {}
        away: dict[str, tuple[_Live, Script]] = {}
        asked: dict[str, list[tuple[_Live, Script]]] = {}
        for one in speaking:
            talk = one.conversations[one.speaker]
            if isinstance(talk, Script) and isinstance(talk.other, Scored):
                asked.setdefault(talk.other.reward, []).append((one, talk))
            elif isinstance(talk, Script) and talk.make is None:
                away[talk.name] = one, talk
            elif isinstance(talk, Script):
                try:
                    said[one.name] = talk.ask()
                except SessionFailure as failure:
                    said[one.name] = failure
        for reward, group in asked.items():
            said |= self._verdicts(reward, group)
        if not away:
            return said
        assert self._players is not None
        new = [
            (name, replace(one.task, env=player_label(one.speaker, one.task.env)), self._player_seed(one, one.speaker))
            for name, (one, talk) in away.items()
            if talk.turn == 0
        ]
        began = self._players.collect(self._players.open(new))
        ready = [name for name in away if not isinstance(began.get(name), SessionFailure)]
        told = self._players.step([(name, heard(away[name][1].unheard())) for name in ready])
        answers = {**began, **self._players.collect(told)}
        for name, (one, _) in away.items():
            answer = answers[name]
            said[one.name] = answer if isinstance(answer, SessionFailure) else answer.messages[0].content
        return said

    def _verdicts(self, reward: str, group: Sequence[tuple[_Live, Script]]) -> dict[str, str | SessionFailure]:
        """Session → the number that a reward gives to what its role was shown, in digits that read back exactly."""
        assert self._scorers is not None
        sessions = []
        for one, talk in group:
            views = {one.speaker: tuple(talk.unheard())}
            sessions.append((f"{talk.name}.{talk.turn}", Transcript(one.task, one.sample, views, (), {}, "done")))
        said: dict[str, str | SessionFailure] = {}
        for (one, _), outcomes in zip(group, self._scorers.score(sessions, only=reward), strict=True):
            outcome = outcomes[reward]
            if isinstance(outcome, Failure):
                said[one.name] = SessionFailure(f"{UNSCORED}{reward}: {outcome.text}")
            elif one.speaker not in outcome:
                said[one.name] = SessionFailure(f"{UNSCORED}{reward}: it gave no value to what it was shown")
            else:
                said[one.name] = repr(outcome[one.speaker])
        return said

    def _player_seed(self, one: _Live, agent: str) -> int:
        return integer(2**63, "player", *one.key, agent)

    def _learns(self, agent: str) -> bool:
        return agent not in self._others

    def _hear(self, one: _Live, turn: Turn | SessionFailure) -> None:
        if isinstance(turn, SessionFailure):
            one.end("failed", str(turn))
            return
        acted = one.conversations.get(one.speaker)
        # A cut reply of an agent that does not learn is no limit of this policy's: the environment judges it.
        cut = acted is not None and acted.last_stop == "length" and self._learns(one.speaker)
        self._take_rewards(one, turn)
        one.facts.update(turn.facts)
        talk = self._conversation(one, turn.agent)
        asks = isinstance(talk, Script) and isinstance(talk.other, Scored)  # a reward may be asked as often as it takes
        out_of_turns = talk.turn >= self._sampling.max_turns and not asks
        if turn.done or cut or out_of_turns:
            one.end("length" if cut else "turns" if turn.truncated or not turn.done else "done")
            one.finished = turn.done
            if self._bootstrap and one.stop == "turns" and acted is not None:
                talk.hear(turn.messages, turn.tools)
                self._await_decisions(one, turn.agent)
            else:
                talk.view.extend(turn.messages)
        elif not talk.hear(turn.messages, turn.tools):
            if talk.turn == 0 and isinstance(talk, Conversation):
                room = self._room(turn.agent)
                told = f"{EXCLUDED}the prompt of {turn.agent} has {talk.asked} tokens and leaves no room in {room}"
                one.end("failed", told)
            else:
                one.end("length")
        one.speaker = turn.agent

    def _await_decisions(self, one: _Live, known: str) -> None:
        """Bring every learner but `known` from its reply to the header of its next, for V is asked at a decision."""
        for agent, talk in one.conversations.items():
            if agent != known and talk.turn and self._learns(agent):
                talk.hear((), ())

    def _take_rewards(self, one: _Live, turn: Turn) -> None:
        environment = self._host.environments[one.task.env]
        weights = environment.reward_weights(environment.config)
        for agent, components in turn.rewards.items():
            talk = self._conversation(one, agent)
            for component, value in components.items():
                one.rewards.append((agent, max(0, talk.turn - 1), component, float(value)))
            talk.reward(sum(weights[component] * value for component, value in components.items()))

    def _conversation(self, one: _Live, agent: str) -> Conversation | Script:
        if agent not in one.conversations:
            other = self._others.get(agent)
            if other is None or isinstance(other, Frozen):
                chat = self._chat if other is None else other.chat
                key = draw_key("reply", *one.key, agent)
                one.conversations[agent] = Conversation(chat, f"{one.name}/{agent}", key, self._room(agent))
            else:
                environment = self._host.environments[one.task.env]
                name = other.name if isinstance(other, Scripted) else ""
                make = partial(environment.player, name, one.task, agent, self._player_seed(one, agent))
                here = isinstance(other, Scripted) and not other.apart(environment)
                one.conversations[agent] = Script(f"{one.name}/{agent}", other, make if here else None)
        return one.conversations[agent]

    def _room(self, agent: str) -> int:
        """Tokens that the agent's view may hold."""
        other = self._others.get(agent)
        return other.chat.context if isinstance(other, Frozen) else self._max_tokens

    def _transcript(self, one: _Live) -> Transcript:
        assert one.stop is not None
        return Transcript(
            task=one.task,
            sample=one.sample,
            views={agent: tuple(talk.view) for agent, talk in one.conversations.items()},
            rewards=tuple(one.rewards),
            facts=one.facts,
            stop=one.stop,
            failure=one.failure,
        )

    def _episodes(self, one: _Live, attempt: int) -> list[Episode]:
        assert one.stop is not None
        transcript = self._transcript(one)
        environment = self._host.environments[one.task.env]
        learners = [agent for agent in environment.roles(environment.config) if self._learns(agent)]
        spoke = [agent for agent in learners if agent in one.conversations and one.conversations[agent].turn]
        talks: dict[str, Conversation | None] = {}
        # A failure is every learner's; a session in which no learner spoke still counts, as an episode of the first.
        for agent in learners if one.stop == "failed" else spoke or learners[:1]:
            talk = one.conversations.get(agent)
            talks[agent] = talk if isinstance(talk, Conversation) else None
        return [
            Episode(
                id=f"{one.name}/{agent}",
                session=one.name,
                task=one.task,
                group=f"{one.task.env}/{one.task.id}/{agent}",
                sample=one.sample,
                agent=agent,
                tokens=tuple(talk.tokens) if talk else (),
                spans=tuple(talk.spans) if talk else (),
                logprobs=tuple(talk.logprobs) if talk else (),
                rewards=tuple(talk.rewards) if talk else (),
                transcript=transcript,
                # The reply that was cut is its speaker's; where that ended the session, the others came to its end.
                stop="done" if one.stop == "length" and one.finished and not _was_cut(talk) else one.stop,
                ended=talk is not None and talk.last_stop in ("end", "string"),
                failure=one.failure,
                attempt=attempt,
            )
            for agent, talk in talks.items()
        ]


def _was_cut(talk: Conversation | None) -> bool:
    return talk is not None and talk.last_stop == "length"
