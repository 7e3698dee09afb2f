"""Worker processes."""

from __future__ import annotations
from mrlm_cli.errors import SessionFailure, UserError
from mrlm_cli.records import Turn

Outcome = Turn | SessionFailure


class Worker:
    def __init__(self, *args: object) -> None:
        raise UserError("environments of a user cannot run yet")
