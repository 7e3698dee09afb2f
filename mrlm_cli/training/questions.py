"""The policy's exact answers to what environments ask of it at an evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from mrlm_cli.envs.base import Environment, Question
from mrlm_cli.errors import UserError
from mrlm_cli.policy.chat import Chat
from mrlm_cli.policy.model import Policy
from mrlm_cli.records import Completion, Message
from mrlm_cli.training.conversation import Conversation


def findings(
    environments: Mapping[str, Environment], policy: Policy, chat: Chat, *, temperature: float, budget: int
) -> dict[str, float]:
    """`environment/finding` → number, for the environments that ask; `budget` is padded tokens of one forward.

    Raises UserError for a question that the policy's context cannot hold, and where the environment raises.
    """
    found: dict[str, float] = {}
    for label, environment in environments.items():
        try:
            questions = environment.questions()
        except Exception as error:  # a border: a user's code may raise anything
            raise UserError(f"environment {label}: questions() raised {error!r}") from error
        if not questions:
            continue
        answers = probabilities(questions, policy, chat, temperature=temperature, budget=budget)
        try:
            found |= {f"{label}/{name}": float(value) for name, value in environment.findings(answers).items()}
        except Exception as error:
            raise UserError(f"environment {label}: findings() raised {error!r}") from error
    return found


@torch.no_grad()
def probabilities(
    questions: Sequence[Question], policy: Policy, chat: Chat, *, temperature: float, budget: int
) -> list[float]:
    """For each question, the probability at `temperature` that the policy writes the reply and then its end token.

    The reply is taken as the tokens that the tokenizer itself makes of it; what other tokens with the same text would
    add is left out (nothing, for tokens of one character).
    """
    asked = [_conversation(question, chat) for question in questions]
    device = next(policy.parameters()).device
    logs = [0.0] * len(asked)
    order = sorted(range(len(asked)), key=lambda place: len(asked[place].tokens))
    size = max(1, budget // max(len(one.tokens) for one in asked))
    for begin in range(0, len(order), size):
        places = order[begin : begin + size]
        part = [asked[place] for place in places]
        longest = max(len(one.tokens) for one in part)
        tokens = torch.tensor([one.tokens + [0] * (longest - len(one.tokens)) for one in part], device=device)
        score = torch.zeros(tokens.shape, dtype=torch.bool, device=device)
        for row, one in enumerate(part):
            score[row, one.spans[-1].start : one.spans[-1].end] = True
        lengths = torch.tensor([len(one.tokens) for one in part], device=device)
        out = policy(tokens, lengths, score, temperature=temperature, entropy=False, values=False)
        for place, total in zip(places, out.logprobs.double().sum(1).tolist(), strict=True):
            logs[place] = total
    return [math.exp(each) for each in logs]


def _conversation(question: Question, chat: Chat) -> Conversation:
    talk = Conversation(chat, "question", b"", chat.context)

    def say(text: str) -> None:
        tokens = chat.reply(text)
        talk.say(Completion(tokens, (0.0,) * len(tokens), "end"), -1)

    heard: list[Message] = []
    room = True
    for message in question.view:
        if message.role == "assistant":
            room = room and talk.hear(heard, ())
            heard = []
            say(message.content)
        else:
            heard.append(message)
    room = room and talk.hear(heard, ())
    say(question.reply)
    if not room or talk.room < 0:
        raise UserError(f"a question of an environment does not fit the policy's context of {chat.context} tokens")
    return talk
