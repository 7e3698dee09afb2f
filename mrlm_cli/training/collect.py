"""Episodes → rows to learn from: demonstrations, and pairs of a verified right and a verified wrong answer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from mrlm_cli.envs.base import Environment
from mrlm_cli.envs.host import Host, NoJournal
from mrlm_cli.envs.scripted import PREFIX, script
from mrlm_cli.errors import UserError
from mrlm_cli.events import Collected, Row, Wanted
from mrlm_cli.recipe.compose import Composed
from mrlm_cli.recipe.schema import Recipe
from mrlm_cli.recipe.sections import PretrainedModel
from mrlm_cli.records import Episode, Message
from mrlm_cli.rewards import base as rewards
from mrlm_cli.rewards.firewall import Scorers
from mrlm_cli.training.evaluate import component_sums
from mrlm_cli.training.rollout import Draw, Rollout
from mrlm_cli.training.scripted import ScriptedRollout
from mrlm_cli.training.source import held_out
from mrlm_cli.training.stage import Stage, settled

EXACT = "exact"  # the component by which an answer is verified
FORMAT = "format"  # the component, where there is one, that tells a well-formed answer
_ALIKE = ((re.compile(r"[^\W\d_]+(?:[ \t]+[^\W\d_]+)*"), "a"), (re.compile(r"\d+"), "0"), (re.compile(r"\s+"), " "))
_CUT = "were cut"  # in why an episode or a task gives no row


def collect(policy: str, composed: Composed, wanted: Wanted) -> Collected:
    """Let a model (by its path or hub id) or a scripted policy answer tasks of a recipe. Raises UserError."""
    recipe = settled(composed.recipe, composed.folders)

    def rows(rollout: ScriptedRollout | Rollout, environments: Mapping[str, Environment]) -> Collected:
        if wanted.component is not None:
            _check_component(wanted.component, environments, recipe)
        tasks = held_out(environments, wanted.split, wanted.tasks)
        draw = Draw(recipe.seed, f"collect {wanted.split}", 0, 0)
        episodes = rollout.episodes(tasks, wanted.samples, draw, recipe.sampling.temperature)
        if wanted.pairs:
            found = pairs(episodes, environments)
        else:
            found = demonstrations(episodes, wanted.component, wanted.least)
        limit = f" (sampling.max_new_tokens is {recipe.sampling.max_new_tokens})"
        told = {reason + (limit if _CUT in reason else ""): count for reason, count in found.left_out.items()}
        return Collected(found.rows, told)

    def phase(name: str, done: int, total: int) -> None:
        """Nobody listens."""

    if policy.startswith(PREFIX):
        hardware = recipe.hardware
        folders, workers = composed.folders, hardware.worker_processes
        with (
            Host(
                recipe.environments, folders=folders, workers=workers, deadline=hardware.deadline, journal=NoJournal()
            ) as host,
            Scorers(recipe.rewards, folders=folders, workers=workers, journal=NoJournal()) as scorers,
        ):
            turns = recipe.sampling.max_turns
            rollout = ScriptedRollout(host, script(policy), max_turns=turns, phase=phase, scorers=scorers)
            return rows(rollout, host.environments)
    model = PretrainedModel(type="pretrained", path=policy, chat=recipe.model.chat)
    with Stage(
        recipe.model_copy(update={"model": model}),
        composed.folders,
        journal=NoJournal(),
        check=lambda: None,
        phase=phase,
        values=False,
        start=recipe.model,
    ) as stage:
        stage.engine.load(stage.policy.lm)
        return rows(stage.rollout(bootstrap=False), stage.environments)


def _check_component(component: str, environments: Mapping[str, Environment], recipe: Recipe) -> None:
    known = {name for each in environments.values() for name in each.declared(each.config)}
    known |= {f"{rewards.PREFIX}{each.label}" for each in recipe.rewards}
    if component not in known:
        raise UserError(f"no task here has a reward component {component}; there are: {', '.join(sorted(known))}")


def demonstrations(episodes: Sequence[Episode], component: str | None, least: float | None) -> Collected:
    """A row of form chat of every episode that came to its end, with what it earned.

    With `least` only those that earned so much: of a reward component, or of the training reward.
    """
    rows: list[Row] = []
    left_out: Counter[str] = Counter()
    for one in episodes:
        reason = _unfit(one)
        if reason is None and least is not None:
            earned = sum(one.rewards) if component is None else component_sums(one).get(component, 0.0)
            reason = "earned too little" if earned < least else None
        if reason is not None:
            left_out[reason] += 1
            continue
        said = {"messages": _plain(_view(one)), **_origin(one)}
        rows.append({**said, "reward": sum(one.rewards), "components": component_sums(one)})
    return Collected(tuple(rows), left_out)


def pairs(episodes: Sequence[Episode], environments: Mapping[str, Environment]) -> Collected:
    """A row of form pairs of every task with an exactly right and a wrong answer among its episodes.

    Of all right and wrong answers the two are taken that differ least in what is no matter of right and wrong: as well
    formed as each other where the environment says so, then of the same shape, then of the most equal length. Replies
    that a limit cut are in no pair, so that both sides end as an answer should. Raises UserError where nothing verifies
    answers.
    """
    for label, environment in environments.items():
        if EXACT not in environment.declared(environment.config):
            raise UserError(f"environment {label} has no reward component {EXACT}, so its answers cannot be verified")
    rows: list[Row] = []
    left_out: Counter[str] = Counter()
    tasks: dict[str, list[Episode]] = {}
    for one in episodes:
        tasks.setdefault(one.group, []).append(one)
    for ones in tasks.values():
        fit = [one for one in ones if _unfit(one) is None]
        right = [one for one in fit if component_sums(one).get(EXACT, 0.0) >= 1]
        wrong = [one for one in fit if component_sums(one).get(EXACT, 0.0) < 1]
        candidates = [(a, b) for a in right for b in wrong if _prompt(a) == _prompt(b)]
        if not candidates:
            left_out[f"tasks of which {_unpaired(ones, right, wrong)}"] += 1
            continue
        best, worst = min(candidates, key=lambda two: _unlike(*two))
        given = len(_prompt(best))
        rows.append(
            {
                "prompt": _plain(_view(best)[:given]),
                "chosen": _plain(_view(best)[given:]),
                "rejected": _plain(_view(worst)[given:]),
                **_origin(best),
            }
        )
    return Collected(tuple(rows), left_out)


def _unpaired(ones: Sequence[Episode], right: Sequence[Episode], wrong: Sequence[Episode]) -> str:
    """Why a task's episodes make no pair; `right` and `wrong` are those of them that could."""
    if not right and not wrong:
        return f"all episodes {' or '.join(sorted({str(_unfit(one)) for one in ones}))}"
    if not right or not wrong:
        return f"no answer is {'wrong' if right else 'right'}"
    return "the right and the wrong answers are to different prompts"


def _unfit(one: Episode) -> str | None:
    """Why an episode can be no example, if it cannot."""
    if one.stop == "failed":
        return "failed"
    if not any(message.role == "assistant" for message in one.transcript.views.get(one.agent, ())):
        return "said nothing"
    return None if one.ended else f"{_CUT} by a limit"


def _view(one: Episode) -> tuple[Message, ...]:
    """What the agent saw and said, up to its last reply."""
    view = one.transcript.views[one.agent]
    last = max(place for place, message in enumerate(view) if message.role == "assistant")
    return view[: last + 1]


def _prompt(one: Episode) -> tuple[Message, ...]:
    view = _view(one)
    return view[: next(place for place, message in enumerate(view) if message.role == "assistant")]


def _unlike(one: Episode, other: Episode) -> tuple[bool, bool, int]:
    """How far two answers are from being comparable; smaller is nearer."""
    formed, wanted = (component_sums(each).get(FORMAT) for each in (one, other))
    return formed != wanted, _shape(one) != _shape(other), abs(_length(one) - _length(other))


def _shape(one: Episode) -> list[tuple[str, str, int]]:
    """What was said and answered, its words drawn together to one `a` and its digits to one `0`, calls counted."""
    found = []
    for message in _view(one)[len(_prompt(one)) :]:
        text = message.content.strip()
        for pattern, sign in _ALIKE:
            text = pattern.sub(sign, text)
        found.append((message.role, text, len(message.tool_calls)))
    return found


def _length(one: Episode) -> int:
    """Of the replies: in tokens, in characters where a script spoke."""
    return len(one.chosen) or sum(len(message.content) for message in _view(one)[len(_prompt(one)) :])


def _origin(one: Episode) -> Row:
    return {"environment": one.task.env, "task": one.task.id, "agent": one.agent}


def _plain(messages: Sequence[Message]) -> list[Row]:
    """Messages with the keys that say something."""
    rows: list[Row] = []
    for message in messages:
        row: Row = {"role": message.role, "content": message.content}
        if message.name is not None:
            row["name"] = message.name
        if message.tool_calls:
            row["tool_calls"] = list(message.tool_calls)
        if message.tool_call_id is not None:
            row["tool_call_id"] = message.tool_call_id
        rows.append(row)
    return rows
