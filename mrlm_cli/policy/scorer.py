"""A trained reward model as a function of transcripts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from mrlm_cli.errors import CheckpointError, UserError
from mrlm_cli.policy import load
from mrlm_cli.policy.pretrained import checkpoint_directory, hashed
from mrlm_cli.policy.written import written
from mrlm_cli.recipe import compose
from mrlm_cli.recipe.schema import Recipe
from mrlm_cli.recipe.sections import PretrainedModel
from mrlm_cli.records import Transcript


def fingerprint(path: str) -> str:
    """A sha256 of all files that a Scorer of `path` reads, and of their names. Raises as a Scorer."""
    checkpoint, _ = _trained(path)
    files = [checkpoint / "recipe.yaml", checkpoint / load.VALUE_FILE]
    files += [file for part in ("policy", load.CRITIC) for file in (checkpoint / part).glob("*")]
    return hashed(checkpoint, files)


def _trained(path: str) -> tuple[Path, Recipe]:
    """The checkpoint of a reward model, and the recipe that trained it."""
    place = Path(path).expanduser()
    if not place.is_dir():
        raise UserError(f"there is no reward model {path}; expected a run or checkpoint of algorithm reward_model")
    checkpoint = checkpoint_directory(place)
    if not (checkpoint / "recipe.yaml").is_file():
        raise CheckpointError(f"{checkpoint} has no recipe.yaml, so its reward model cannot be built")
    recipe = compose.load(checkpoint / "recipe.yaml").recipe
    if recipe.algorithm.type != "reward_model":
        raise UserError(f"{path} is a run of {recipe.algorithm.type}; expected one of algorithm reward_model")
    return checkpoint, recipe


class Scorer:
    """The reward model of a run or checkpoint, with its own tokenizer and chat template; `path` as in `model.path`.

    Raises UserError if the run trained something else than a reward model, CheckpointError if it cannot be read.
    """

    def __init__(self, path: str, *, device: str = "cpu", precision: str = "float32", budget: int = 4096) -> None:
        checkpoint, recipe = _trained(path)
        value = recipe.model.value  # a critic has the shape that it had, whatever lies now where it began
        value = value.model_copy(update={"path": str(checkpoint) if value.type == "separate" else None})
        section = PretrainedModel(
            type="pretrained", path=str(checkpoint / "policy"), value=value, chat=recipe.model.chat
        )
        self._policy, self._chat = load.build(
            section, seed=0, device=device, precision=precision, gradient_checkpointing=False
        )
        load.load_weights(self._policy, checkpoint)
        self._device = device
        self._budget = budget

    @torch.no_grad()
    def score(self, transcripts: Sequence[Transcript], agent: str = "policy") -> list[float]:
        """V after the last reply of the agent's view, for each transcript; the same whatever stands beside it.

        Raises ValueError for a view without a reply, UserError for one that is longer than the model's context.
        """
        rows = [self._tokens(each, agent) for each in transcripts]
        scores = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
        while order:
            count = max(1, self._budget // len(rows[order[0]]))
            taken, order = order[:count], order[count:]
            longest = len(rows[taken[0]])
            tokens = torch.tensor([[*rows[row], *[0] * (longest - len(rows[row]))] for row in taken])
            lengths = torch.tensor([len(rows[row]) for row in taken])
            nowhere = torch.zeros(tokens.shape, dtype=torch.bool)
            out = self._policy(
                tokens.to(self._device),
                lengths.to(self._device),
                nowhere.to(self._device),
                temperature=1.0,
                logprobs=False,
                entropy=False,
            )
            assert out.final_values is not None
            for row, score in zip(taken, out.final_values.tolist(), strict=True):
                scores[row] = score
        return scores

    def _tokens(self, transcript: Transcript, agent: str) -> tuple[int, ...]:
        view = transcript.views[agent]
        replies = [place for place, message in enumerate(view) if message.role == "assistant"]
        if not replies:
            raise ValueError(f"agent {agent} said nothing in task {transcript.task.id}")
        tokens, _ = written(self._chat, view[: replies[-1] + 1], replies[0])
        if len(tokens) > self._chat.context:
            raise UserError(f"{len(tokens)} tokens of task {transcript.task.id} are more than the reward model can see")
        return tokens
