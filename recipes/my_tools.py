"""Tools of your own: typed Python functions, named in a recipe as `functions: ["./my_tools.py:travel_time"]`.

What the policy is told about a tool is its name, the types of its parameters, and the first paragraph of its docstring.
It may raise ToolError with a text that helps: the policy sees it. The tasks in my_tools.jsonl are made by

    python recipes/my_tools.py > recipes/my_tools.jsonl
"""

import json
from itertools import combinations
from typing import Annotated

from mrlm_cli.envs.tool_schema import ToolError

MINUTES = {"Alder": 0, "Birch": 17, "Cedar": 43, "Elm": 71, "Hazel": 118, "Linden": 139, "Rowan": 164, "Yew": 205}


def travel_time(
    start: Annotated[str, "where the train leaves"],
    end: Annotated[str, "where it arrives"],
) -> int:
    """Say how many minutes the train takes from one station to another."""
    for station in (start, end):
        if station not in MINUTES:
            raise ToolError(f"there is no station {station[:40]!r}; there are {', '.join(MINUTES)}")
    return abs(MINUTES[start] - MINUTES[end])


if __name__ == "__main__":
    for start, end in combinations(MINUTES, 2):
        question = f"How many minutes does the train take from {start} to {end}?"
        print(json.dumps({"question": question, "answer": travel_time(start, end), "tools": ["travel_time"]}))
