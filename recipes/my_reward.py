"""A reward of your own: a function of the finished session, named in a recipe as `path: ./my_reward.py:variety`."""


def variety(transcript):
    """Share of distinct characters in what the policy said, from 0 to 1."""
    said = "".join(message.content for message in transcript.views["policy"] if message.role == "assistant")
    return len(set(said)) / len(said) if said else 0.0
