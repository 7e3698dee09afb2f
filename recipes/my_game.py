"""A game of your own as a Gymnasium environment: copy the words that are shown. `gymnasium_smoke.yaml` trains it."""

import gymnasium
from gymnasium.spaces import Text

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class CopyWords(gymnasium.Env):
    """Shows a word of random letters, pays 1 for saying it, and shows the next, until `words` were shown."""

    def __init__(self, words: int = 3, length: int = 4):
        self.observation_space = Text(length, charset=LETTERS)
        self.action_space = Text(length, charset=LETTERS)
        self._words, self._length = words, length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)  # makes self.np_random a function of the seed: draw from nothing else
        self._shown = 0
        return self._next(), {}

    def step(self, action):
        reward = float(action == self._word)
        done = self._shown == self._words
        return self._word if done else self._next(), reward, done, False, {}

    def _next(self):
        self._shown += 1
        self._word = "".join(LETTERS[number] for number in self.np_random.integers(len(LETTERS), size=self._length))
        return self._word


def compass(reply, environment):
    """An `act`: a point of the compass for an environment whose actions are left, down, right and up."""
    points = {"west": 0, "south": 1, "east": 2, "north": 3}
    if reply.strip().lower() not in points:
        raise ValueError("Answer with west, south, east or north.")
    return points[reply.strip().lower()]


def lake(observation, environment):
    """An `observe`: where one stands on a lake of 4 by 4, in words."""
    row, column = divmod(int(observation), 4)
    return f"You stand in row {row + 1}, column {column + 1}; the goal is in row 4, column 4. Which way?"
