"""TextArena: the games of that package, alone or against another agent."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from mrlm_cli.draws import integer
from mrlm_cli.envs.base import Environment, Player
from mrlm_cli.envs.global_random import OwnRandom
from mrlm_cli.errors import MissingExtra, SessionFailure, UserError
from mrlm_cli.records import Message, Reply, Split, Task, Turn
from mrlm_cli.strict import EnvironmentSettings

SEATS = ("first", "second")
LONGEST = 4000  # characters of a reply that a game is shown: int() raises beyond 4300 digits
_SPLITS: tuple[Split, ...] = get_args(Split)

_DOWNLOAD = "it downloads lists of words when it starts"
_NETWORK = "it asks models behind a network"
_PARTS = "its package lacks files that it needs"
_ENDLESS = "replies that are no moves never end it"
UNUSABLE: dict[str, str] = {
    **dict.fromkeys(("Codenames", "DontSayIt", "Hangman", "LetterAuction", "SpellingBee"), _DOWNLOAD),
    **dict.fromkeys(("WordChains", "WordLadder", "WordSearch", "Wordle"), _DOWNLOAD),
    **dict.fromkeys(("Debate", "GuessWho", "ScenarioPlanning", "TwentyQuestions"), _NETWORK),
    **dict.fromkeys(("ScorableGames", "UsedCar", "UsedCarNegotiation"), _PARTS),
    **dict.fromkeys(("HighSociety", "MarketEntryGame", "Poker", "PublicGoodsGame", "Santorini"), _ENDLESS),
    **dict.fromkeys(
        ("Countdown", "Cryptarithm", "Slitherlink", "ThreeCardMonte"), "it breaks on replies that are no moves"
    ),
    "BabyAiText": "it needs gym, which Gymnasium has replaced",
}
"""Games that cannot be played here, by their folder in textarena.envs, and why."""


class TextArena(Environment):
    """A game of textarena 0.7.4 (extra `textarena`), for one player or for two against each other.

    With `seats: 1` the agent is `policy`; with 2 they are `first` and `second` (TextArena's players 0 and 1; who
    begins is the game's affair), each the learner, a frozen policy or scripted, as the section `agents` says. One
    scripted player is there, `random`: what he says is one of the texts in square brackets that he was told last, often
    a move and often a legal one.

    Components: `reward`, what the game pays at its end, 1 for the winner and -1 for the loser, often in [0, 1] where
    one plays alone; `invalid`, 1 for the player whose illegal move ended the game; `exact`, 1 for a reward of 1. What
    is legal, how often a player may try again, and what a forfeit costs is left to the game.

    A turn shows what the game told its player since the last one; of several boards the last. The games' wrappers for
    actions are kept (many add the square brackets), those for observations are not: they would tell all again at every
    turn. A reply is cut after 4000 characters.

    Splits have seeds of their own, so that no split shares a seed with another; there is no end of them. A game with
    few openings, or one (tic-tac-toe), deals the same from many seeds. Chance within a game follows the task's seed
    too: the games draw from Python's global generator, which each session has for itself.

    Refused, with the reason: games that download, ask a judge over the network, or do not load under this Python.
    """

    class Config(EnvironmentSettings):
        """Which game."""

        game: Annotated[str, Field(min_length=1, max_length=200)]
        """Its id in TextArena, such as GuessTheNumber-v0."""
        seats: Literal[1, 2] = 1
        """How many play; most games are for one or for two."""
        settings: dict[str, Any] = Field(default_factory=dict)
        """Parameters of the game over those of its id, as TextArena calls them, such as {max_number: 9}."""

        @model_validator(mode="after")
        def _fits(self) -> TextArena.Config:
            if self.game.endswith("-raw"):
                raise ValueError(f"write {self.game.removesuffix('-raw')}: observations are never wrapped here")
            return self

        @property
        def needed_extras(self) -> tuple[str, ...]:
            """See Strict."""
            return ("textarena",)

    components: ClassVar[dict[str, float]] = {"reward": 1.0, "invalid": 0.0, "exact": 0.0}
    players: ClassVar[tuple[str, ...]] = ("random",)
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if importlib.util.find_spec("textarena") is None:
            raise MissingExtra("the environment textarena", "textarena")
        self._checked = False

    @classmethod
    def roles(cls, config: Any) -> tuple[str, ...]:
        """`policy` alone, or the two seats."""
        return SEATS if config.seats == 2 else ("policy",)

    def size(self, split: Split) -> None:
        """There is no end of seeds. Raises UserError for a game that there is not, or that cannot be played."""
        if not self._checked:  # it plays the game's beginning, and sizes are asked for often
            check(self.config)
            self._checked = True

    def task(self, split: Split, index: int) -> Task:
        """Game number `index` of the split: its seed. Raises ValueError for a negative index."""
        if index < 0:
            raise ValueError(f"{split} has no task {index}")
        seed = index * len(_SPLITS) + _SPLITS.index(split)
        return Task(f"{split}/{index}", self.config.label, split, index, {"game": self.config.game, "seed": seed})

    def open(self, task: Task, seed: int) -> TextArenaSession:
        """A game; it depends on the task's seed alone."""
        return TextArenaSession(self.config, task.data["seed"])

    def player(self, name: str, task: Task, agent: str, seed: int) -> Player:
        """One that says something in square brackets that it was told."""
        return _RandomPlayer(seed)


class TextArenaSession:
    """One game."""

    def __init__(self, config: TextArena.Config, seed: int) -> None:
        self._roles = TextArena.roles(config)
        self._chance = OwnRandom(seed)
        self._moves = 0
        _load(config.game)  # a module that draws when it is loaded must not do so in this session alone
        with self._chance:
            self._game = _made(config)
            self._game.reset(num_players=config.seats, seed=seed)
        self._core = _core(self._game)
        if self._core.state.num_players != config.seats:
            raise ValueError(f"it has {self._core.state.num_players} players")

    def start(self) -> Turn:
        """The rules, for whoever begins."""
        with self._chance:
            return self._turn()

    def step(self, reply: Reply) -> Turn:
        """The next player's turn, or the end and what it pays."""
        self._moves += 1
        with self._chance:
            done, _ = self._game.step(action=reply.message.content[:LONGEST])
            if not done:
                return self._turn()
            paid, about = self._game.close()
        return Turn(
            agent=self._roles[0],
            rewards={role: _earned(paid, about, number) for number, role in enumerate(self._roles)},
            done=True,
            facts={"moves": float(self._moves)},
        )

    def close(self) -> None:
        """Nothing is held."""

    def _turn(self) -> Turn:
        number, told = self._core.get_observation()
        return Turn((Message("user", _text(told, number, self._core.state)),), self._roles[number])


class _RandomPlayer:
    """Says one of the bracketed texts of the newest message that has any."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def reply(self, view: Sequence[Message]) -> str:
        """A text drawn by the seed and the length of the view."""
        for message in reversed(view):
            if message.role == "user" and (found := re.findall(r"\[[^\[\]\n]{1,40}\]", message.content)):
                return found[integer(len(found), "textarena", self._seed, len(view))]
        return "[0]"


def check(config: TextArena.Config) -> None:
    """Raises UserError for a game that there is not, that is refused, or that does not start with these settings."""
    import textarena  # noqa: F401  (its import fills the table)
    from textarena.envs.registration import ENV_REGISTRY

    spec = ENV_REGISTRY.get(config.game)
    if spec is None:
        near = difflib.get_close_matches(config.game, ENV_REGISTRY, n=1)
        raise UserError(
            f"textarena has no game {config.game!r}; "
            + (f"did you mean {near[0]}?" if near else "an id looks like GuessTheNumber-v0")
        )
    family = str(spec.entry_point).split(".")[2]
    if family in UNUSABLE:
        raise UserError(f"textarena's {config.game} cannot be played: {UNUSABLE[family]}")
    try:
        TextArenaSession(config, 0).start()
    except SyntaxError as error:
        version = ".".join(map(str, sys.version_info[:2]))
        raise UserError(f"textarena's {config.game} is not written for Python {version}: {error}") from error
    except Exception as error:  # a border: a game refuses settings and seats by whatever its code runs into
        said = f"{type(error).__name__}: {error}"
        raise UserError(f"textarena's {config.game} does not start with seats: {config.seats}: {said}") from error


def _load(name: str) -> None:
    from textarena.envs.registration import ENV_REGISTRY

    importlib.import_module(str(ENV_REGISTRY[name].entry_point).split(":")[0])


def _made(config: TextArena.Config) -> Any:
    import textarena

    return textarena.make(config.game, **config.settings)


def _core(game: Any) -> Any:
    """The game without its wrappers."""
    import textarena

    while isinstance(game, textarena.Wrapper):
        game = game.env
    return game


def _text(told: Sequence[tuple[int, str, Any]], number: int, state: Any) -> str:
    """What a player was told since he last spoke: not his own words, and of boards the last."""
    from textarena import ObservationType

    boards = [place for place, (_, _, kind) in enumerate(told) if kind == ObservationType.GAME_BOARD]
    lines = []
    for place, (sender, text, kind) in enumerate(told):
        if kind == ObservationType.PLAYER_ACTION:
            if sender != number:
                lines.append(f"{state.role_mapping.get(sender, f'Player {sender}')}: {text}")
        elif kind != ObservationType.GAME_BOARD or place == boards[-1]:
            lines.append(text)
    return "\n".join(lines).strip() or "It is your turn."


def _earned(paid: Any, about: Mapping[int, Mapping[str, Any]], number: int) -> dict[str, float]:
    if not isinstance(paid, Mapping) or number not in paid:
        raise SessionFailure(f"the game ended without a reward for player {number}")
    reward = float(paid[number])
    invalid = bool(about[number].get("invalid_move"))
    return {"reward": reward, "invalid": float(invalid), "exact": float(reward >= 1)}
