"""Kuhn poker: two seats, three cards, one bet; `1J` is answered by `p` (pass) or `b` (bet); its optimum is known.

Each puts one chip into the pot and gets one card of J < Q < K. Passing checks, or folds to a bet; betting puts in one
chip more, or calls. (Kuhn 1950, "A simplified two-person poker".) Play is written as a string of actions:

    pp      higher card wins 1          bp      first wins 1
    pbp     second wins 1               bb      higher card wins 2
    pbb     higher card wins 2

An information set is what the one to act knows: the own card and the play so far, such as `Qpb`. A policy is a table:
information set -> probability of betting. The functions below are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import permutations
from typing import ClassVar, Literal

from mrlm_cli.draws import draw_key, uniforms
from mrlm_cli.envs.base import Environment, Player, Question
from mrlm_cli.records import Message, Reply, Split, Task, Turn
from mrlm_cli.strict import EnvironmentSettings

CARDS = "JQK"
DEALS = list(permutations(CARDS, 2))  # (first's card, second's card)
SEATS = ("first", "second")
ENDS = ("pp", "bp", "pbp", "bb", "pbb")
GAMES = 1024  # training tasks of every deal, so that the tasks of one step differ
VALUE = -1 / 18  # what the first player gets when both play an equilibrium

Table = Mapping[str, float]
INFORMATION_SETS = tuple(card + play for play in ("", "p", "b", "pb") for card in CARDS)
# What some equilibrium does at each information set; every other action loses against the best answer to it.
_SOUND = {
    **{"J": "pb", "Q": "p", "K": "pb", "Jpb": "p", "Qpb": "pb", "Kpb": "b"},
    **{"Jp": "pb", "Qp": "p", "Kp": "b", "Jb": "p", "Qb": "pb", "Kb": "b"},
}


def payoff(cards: tuple[str, str], play: str) -> int | None:
    """Chips that the first player wins when play ends so (loses, if negative); None while it goes on."""
    showdown = 1 if CARDS.index(cards[0]) > CARDS.index(cards[1]) else -1
    return {"pp": showdown, "bp": 1, "pbp": -1, "bb": 2 * showdown, "pbb": 2 * showdown}.get(play)


def equilibrium(alpha: float) -> dict[str, float]:
    """The equilibrium whose first player bets the jack with probability `alpha`, from 0 to 1/3; there are no others."""
    return {
        **{"J": alpha, "Q": 0.0, "K": 3 * alpha, "Jpb": 0.0, "Qpb": alpha + 1 / 3, "Kpb": 1.0},
        **{"Jp": 1 / 3, "Qp": 0.0, "Kp": 1.0, "Jb": 0.0, "Qb": 1 / 3, "Kb": 1.0},
    }


def value(first: Table, second: Table) -> float:
    """Mean chips of the first player, over all deals, when each seat plays its table."""

    def rest(cards: tuple[str, str], play: str) -> float:
        ended = payoff(cards, play)
        if ended is not None:
            return float(ended)
        seat = len(play) % 2
        bets = (first, second)[seat][cards[seat] + play]
        return bets * rest(cards, play + "b") + (1 - bets) * rest(cards, play + "p")

    return sum(rest(cards, "") for cards in DEALS) / len(DEALS)


def best_response(table: Table, seat: int) -> float:
    """Mean chips of the one in `seat` (0 or 1) who answers the other's table best, knowing his own card and the play.

    By backward induction for each card over the other's two possible cards, weighted by how likely the other comes so
    far with each.
    """

    def followed(card: str, play: str, reach: Mapping[str, float], then: Callable[..., float]) -> float:
        """Σ over the other's cards of reach · what the seat gets after `play`."""
        if play not in ENDS:
            return then(card, play, reach)
        return sum(weight * won(card, other, play) for other, weight in reach.items())

    def won(card: str, other: str, play: str) -> float:
        ended = payoff((card, other) if seat == 0 else (other, card), play)
        assert ended is not None
        return ended if seat == 0 else -ended

    def mine(card: str, play: str, reach: Mapping[str, float]) -> float:
        return max(followed(card, play + action, reach, theirs) for action in "pb")

    def theirs(card: str, play: str, reach: Mapping[str, float]) -> float:
        total = 0.0
        for action in "pb":
            acted = {
                other: weight * (table[other + play] if action == "b" else 1 - table[other + play])
                for other, weight in reach.items()
            }
            total += followed(card, play + action, acted, mine)
        return total

    begin = mine if seat == 0 else theirs
    others = {card: {other: 1 / len(DEALS) for other in CARDS if other != card} for card in CARDS}
    return sum(begin(card, "", reach) for card, reach in others.items())


def exploitability(table: Table) -> float:
    """Chips a game that a best responder wins from the policy on average over the two seats; 0 only at an equilibrium.

    Half of what both best responses win together (half of NashConv: Lanctot et al. 2017, Section 3).
    """
    return (best_response(table, 0) + best_response(table, 1)) / 2


class Kuhn(Environment):
    """Kuhn poker against oneself, a frozen policy or a scripted player; the optimum is known exactly.

    Agents: `first` and `second`, named by who acts first. Components: `chips`, won or lost; `invalid`, for a reply that
    is no action, 1 plus the share of its characters that are not of an action: it forfeits the chips put in so far, and
    so does a reply cut by the length limit; `exact`, 1 if every action of the game was one that some equilibrium takes.

    An evaluation reads the policy's exact probabilities at the 12 information sets. Findings: `exploitability`, of the
    policy playing both seats, which falls to 0; `value`, the first player's mean chips against himself, -1/18 at the
    optimum; `legal`, the mean probability of replying with an action at all (the others are of the policy given that it
    does). Scripted players: `equilibrium` (with alpha 1/3) and `random`.

    There is nothing to generalise to, so validation and test play the same six deals, once each: `held_out` is False.
    """

    class Config(EnvironmentSettings):
        """How the game is told."""

        form: Literal["symbols", "words"] = "symbols"
        """`1J` answered by `p` or `b`, for a model that begins with nothing; or sentences, answered by pass or bet."""

    components: ClassVar[dict[str, float]] = {"chips": 1.0, "invalid": -1.0, "exact": 0.0}
    agents: ClassVar[tuple[str, ...]] = SEATS
    players: ClassVar[tuple[str, ...]] = ("equilibrium", "random")
    audited: ClassVar[bool] = True
    held_out: ClassVar[bool] = False
    config: Config

    def size(self, split: Split) -> int:
        """Games in the split: every deal once, in training many times."""
        return len(DEALS) * (GAMES if split == "train" else 1)

    def task(self, split: Split, index: int) -> Task:
        """Game number `index` of the split. Raises ValueError outside range(size)."""
        if not 0 <= index < self.size(split):
            raise ValueError(f"{split} has no task {index}")
        game, deal = divmod(index, len(DEALS))
        return Task(f"{split}/{index}", self.config.label, split, index, {"cards": list(DEALS[deal]), "game": game})

    def open(self, task: Task, seed: int) -> KuhnSession:
        """A game; nothing depends on the seed."""
        return KuhnSession(self.config.form, (task.data["cards"][0], task.data["cards"][1]))

    def canonical(self, task: Task) -> str:
        """The deal."""
        return "".join(task.data["cards"])

    def player(self, name: str, task: Task, agent: str, seed: int) -> Player:
        """One that bets with the probabilities of a table."""
        table = equilibrium(1 / 3) if name == "equilibrium" else dict.fromkeys(INFORMATION_SETS, 0.5)
        card = task.data["cards"][SEATS.index(agent)]
        # An information set is known by what its owner was told.
        views = {_view(self.config.form, key): bets for key, bets in table.items() if key[0] == card}
        return _TablePlayer(views, _words(self.config.form), seed)

    def questions(self) -> Sequence[Question]:
        """Pass and bet at every information set."""
        actions = _words(self.config.form)
        return [Question(_view(self.config.form, key), actions[action]) for key in INFORMATION_SETS for action in "pb"]

    def findings(self, probabilities: Sequence[float]) -> Mapping[str, float]:
        """Exploitability, value and legality of the policy."""
        table, legal = {}, 0.0
        for place, key in enumerate(INFORMATION_SETS):
            passes, bets = probabilities[2 * place : 2 * place + 2]
            table[key] = bets / (passes + bets) if passes + bets > 0 else 0.5
            legal += (passes + bets) / len(INFORMATION_SETS)
        return {"exploitability": exploitability(table), "value": value(table, table), "legal": legal}


class KuhnSession:
    """One game."""

    def __init__(self, form: str, cards: tuple[str, str]) -> None:
        self._form = form
        self._cards = cards
        self._play = ""
        self._sound = dict.fromkeys(SEATS, 1.0)

    def start(self) -> Turn:
        """The first player's card."""
        return Turn((_told(self._form, self._cards[0], ""),), SEATS[0])

    def step(self, reply: Reply) -> Turn:
        """The other's turn, or the end."""
        seat = len(self._play) % 2
        key = self._cards[seat] + self._play
        actions = _words(self._form)
        action = next((each for each, word in actions.items() if reply.message.content == word), None)
        if action is None or reply.stop == "length":
            self._sound[SEATS[seat]] = 0.0
            # Whoever acts has only the first chip in the pot: he would have matched a bet just now.
            penalty = 1.0 + _strangeness(reply.message.content, actions)
            return self._end(-1 if seat == 0 else 1, invalid=(SEATS[seat], penalty))
        if action not in _SOUND[key]:
            self._sound[SEATS[seat]] = 0.0
        self._play += action
        won = payoff(self._cards, self._play)
        if won is not None:
            return self._end(won)
        following = len(self._play) % 2
        return Turn((_told(self._form, self._cards[following], self._play),), SEATS[following])

    def close(self) -> None:
        """Nothing is held."""

    def _end(self, won: int, invalid: tuple[str, float] | None = None) -> Turn:
        rewards = {
            seat: {"chips": float(chips), "exact": self._sound[seat]}
            for seat, chips in zip(SEATS, (won, -won), strict=True)
        }
        if invalid is not None:
            rewards[invalid[0]]["invalid"] = invalid[1]
        return Turn(agent=SEATS[0], rewards=rewards, done=True)


class _TablePlayer:
    """Bets with the probability that its table has for what it was told."""

    def __init__(self, views: Mapping[tuple[Message, ...], float], actions: Mapping[str, str], seed: int) -> None:
        self._views = views
        self._actions = actions
        self._key = draw_key("kuhn", seed)

    def reply(self, view: Sequence[Message]) -> str:
        """Pass or bet, drawn by the seed and the length of the view."""
        bets = uniforms(self._key, len(view))[0] < self._views[tuple(view)]
        return self._actions["b" if bets else "p"]


def _words(form: str) -> dict[str, str]:
    """Action -> how it is said."""
    return {"p": "pass", "b": "bet"} if form == "words" else {"p": "p", "b": "b"}


def _told(form: str, card: str, play: str) -> Message:
    """What the one to act is told of his card and of the play since he last acted."""
    if form == "symbols":
        return Message("user", {"": f"1{card}", "pb": "b"}.get(play, f"2{card}{play}"))
    if play == "pb":
        return Message("user", "Your opponent bet. Answer pass (to fold) or bet (to call).")
    name = {"J": "jack", "Q": "queen", "K": "king"}[card]
    before = {"": "", "p": "Your opponent passed. ", "b": "Your opponent bet. "}[play]
    return Message(
        "user",
        "Kuhn poker: the cards are jack, queen and king, the king is best; each has one card and one chip in the pot. "
        f"You act {'second' if play else 'first'} and hold the {name}. {before}Answer with one word, pass or bet.",
    )


def _view(form: str, key: str) -> tuple[Message, ...]:
    """All that the owner of an information set saw and said on the way to it."""
    card, play = key[0], key[1:]
    if play != "pb":
        return (_told(form, card, play),)
    return _told(form, card, ""), Message("assistant", _words(form)["p"]), _told(form, card, play)


def _strangeness(text: str, actions: Mapping[str, str]) -> float:
    """Share of the characters that are in no action; 1 for none at all."""
    letters = set("".join(actions.values()))
    return sum(character not in letters for character in text) / len(text) if text else 1.0
