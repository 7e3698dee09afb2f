"""Rows → episodes: the tokens of a conversation, the order of rows, the cursor, what does not fit."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mrlm_cli.errors import CheckpointError, UserError
from mrlm_cli.events import Listener
from mrlm_cli.policy.written import given, written
from mrlm_cli.records import Episode, Message
from mrlm_cli.report.plain import PlainLines
from mrlm_cli.training.collate import collate
from mrlm_cli.training.dataset import DatasetSource
from mrlm_cli.training.loop import iteration, run
from mrlm_cli.training.stopping import Stopper
from tests.data_helpers import chat_row, chats, jsonl, pair_row, two_turns
from tests.kit import tiny, trainer
from tests.test_chat import chat, tokenizer


def on(path: Path, **changes: Any) -> Any:
    data = {"type": "jsonl", "path": str(path), "rows_per_step": 8, **changes.pop("data", {})}
    return tiny(**{"algorithm": {"type": "sft"}, **changes, "data": data})


def text(one: Episode, kind: str, made: Any) -> list[str]:
    decode = made._tokenizer.decode
    return [decode(list(one.tokens[span.start : span.end])) for span in one.spans if span.kind == kind]


@pytest.mark.parametrize("environment", [{"type": "guess", "low": 1, "high": 3}, {"type": "sort_digits", "digits": 3}])
def test_a_rollouts_words_written_again_are_its_tokens(tmp_path: Path, environment: dict[str, Any]) -> None:
    model = {"characters": "0123"}
    recipe = tiny(environments=[environment], model=model, sampling={"tasks_per_step": 120, "max_new_tokens": 4})
    with trainer(tmp_path / "run", recipe) as made:
        ended = 0
        episodes = made.source.episodes(0)
        for one in episodes:
            view = one.transcript.views["policy"]
            end = made._tokenizer.eos_token_id
            chosen = [one.tokens[span.start : span.end] for span in one.spans if span.kind == "chosen"]
            if any(reply[-1] != end or {0, end, made._tokenizer.unk_token_id} & {*reply[:-1]} for reply in chosen):
                continue  # a cut reply has no end token, and a special token no ordinary text
            last = max(place for place, message in enumerate(view) if message.role == "assistant")
            tokens, spans = written(made.source._rollout._chat, view[: last + 1], given(view))
            ended += 1
            assert tokens == one.tokens
            assert [(s.start, s.end, s.kind, s.turn) for s in spans] == [
                (s.start, s.end, s.kind, s.turn) for s in one.spans
            ]
    assert ended > 3, "too few replies came to their end"


def test_with_a_template_a_reply_is_what_stands_behind_the_header() -> None:
    messages = [
        Message("user", "the cat"),
        Message("assistant", "sat <|stop|> on"),
        Message("user", "27"),
        Message("assistant", "", tool_calls=({"function": {"name": "add"}},)),
        Message("tool", "42"),
    ]
    talk = chat("chatml")
    tokens, spans = written(talk, messages, 1)
    pieces = [(span.kind, talk.decode(tokens[span.start : span.end])) for span in spans]
    assert pieces == [
        ("prompt", "<|start|>system\nBe kind.<|stop|>\n<|start|>user\nthe cat<|stop|>\n<|start|>assistant\n"),
        ("chosen", "sat <|stop|> on<|stop|>"),
        ("scaffold", "\n"),
        ("observation", "<|start|>user\n27<|stop|>\n<|start|>assistant\n"),
        ("chosen", "call add<|stop|>"),
        ("scaffold", "\n"),
        ("observation", "<|start|>tool\n42<|stop|>\n<|start|>assistant\n"),
    ]
    stop = tokenizer("chatml").convert_tokens_to_ids("<|stop|>")
    chosen = [tokens[span.start : span.end] for span in spans if span.kind == "chosen"]
    assert [piece.count(stop) for piece in chosen] == [1, 1], "a spelled end token is ordinary text"
    with pytest.raises(UserError, match="tool calls"):
        chat("strict", mode="plain").write(messages[3])


def test_a_header_that_the_template_drops_behind_the_reply_leaves_the_content() -> None:
    talk = chat("forgetful")
    assert talk.decode(talk.write(Message("assistant", "two words"))) == "two words<|stop|>"


def test_every_epoch_goes_through_all_rows_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    with trainer(tmp_path / "run", on(chats(tmp_path / "x.jsonl", 22), data={"validation_share": 0})) as made:
        drawn = [one.task.index for step in range(11) for one in made.source.episodes(step)]
    epochs = [drawn[begin : begin + 22] for begin in (0, 22, 44, 66)]
    assert all(sorted(epoch) == list(range(22)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_cursor_goes_on_and_other_rows_are_refused(tmp_path: Path) -> None:
    path = chats(tmp_path / "x.jsonl", 30)
    with trainer(tmp_path / "a", on(path)) as made:
        made.source.episodes(0)
        state = made.source.state()
        expected = made.source.episodes(1)
    with trainer(tmp_path / "b", on(path)) as made:
        made.source.load_state(state)
        assert made.source.episodes(1) == expected
    chats(tmp_path / "x.jsonl", 31)
    with trainer(tmp_path / "c", on(path)) as made, pytest.raises(CheckpointError, match="have changed"):
        made.source.load_state(state)


def test_held_out_rows_are_never_drawn(tmp_path: Path) -> None:
    with trainer(
        tmp_path / "run", on(chats(tmp_path / "x.jsonl", 40), data={"validation_share": 0.3, "test_share": 0.0})
    ) as made:
        assert isinstance(made.source, DatasetSource)
        held = {one.tokens for one in made.source.held_out(100)}
        drawn = {one.tokens for step in range(10) for one in made.source.episodes(step)}
    assert 5 < len(held) < 25
    assert not held & drawn
    assert len(held | drawn) == 40


def test_a_row_that_is_too_long_is_left_out_by_name_and_its_pair_with_it(tmp_path: Path) -> None:
    heard: list[str] = []

    class Ear(Listener):
        def warned(self, text: str) -> None:
            heard.append(text)

    rows = [pair_row("21"), pair_row("43", wrong="9" * 40), pair_row("65")]
    data = {"form": "pairs", "max_tokens": 30, "rows_per_step": 3, "validation_share": 0}
    path = jsonl(tmp_path / "x.jsonl", rows)
    recipe = on(path, data=data, algorithm={"type": "dpo", "reference_free": True})
    with trainer(tmp_path / "run", recipe, Ear()) as made:
        iteration(made)
        (row,) = made.run.metrics()
    assert (row["excluded_rate"], row["episodes"], row["failed_rate"]) == (pytest.approx(1 / 3), 4, 0)
    assert heard == [f"data: excluded: {path}:2: 49 tokens are more than the limit of 30"]


@pytest.mark.parametrize("long", [0, 1, 8])
def test_how_many_rows_were_left_out_is_told_at_the_end_whether_or_not_it_was_resumed(
    tmp_path: Path, long: int
) -> None:
    rows = [chat_row(str(number) * (40 if number < long else 1)) for number in range(20)]
    data = {"max_tokens": 40, "rows_per_step": 8, "validation_share": 0, "test_share": 0}
    path = jsonl(tmp_path / "x.jsonl", rows)

    def told(name: str, steps: int, before: Path | None = None) -> list[str]:
        heard: list[str] = []

        class Ear(Listener):
            def warned(self, text: str) -> None:
                heard.append(text)

        recipe = on(path, data=data, steps=steps)
        with Stopper() as stopper, trainer(tmp_path / name, recipe, Ear()) as made:
            if before is not None:
                (made.run.path / "metrics.jsonl").write_bytes((before / "metrics.jsonl").read_bytes())
                made.load(before / "checkpoints/step-000001")
            run(made, stopper)
        return heard

    first = told("part", 1)
    metrics = json.loads((tmp_path / "part/metrics.jsonl").read_text())
    seen = round(8 * metrics["excluded_rate"])
    assert seen < 8
    assert seen > 0 or long < 8
    assert first[min(seen, 5) :] == [f"data: in all, {seen} of 8 training rows left out"][: seen > 0]
    whole = told("whole", 6)  # more than two epochs, in which each row counts once
    assert whole[min(long, 5) :] == [f"data: in all, {long} of 20 training rows left out"][: long > 0]
    assert told("resumed", 6, tmp_path / "part")[-1:] == whole[-1:]


def test_a_pair_whose_sides_become_the_same_tokens_is_left_out_by_name(tmp_path: Path) -> None:
    heard: list[str] = []

    class Ear(Listener):
        def warned(self, text: str) -> None:
            heard.append(text)

    rows = [pair_row("21"), pair_row("43", wrong="3ä") | {"chosen": "3ö"}]  # neither letter is in the tokenizer
    data = {"form": "pairs", "rows_per_step": 2, "validation_share": 0}
    path = jsonl(tmp_path / "x.jsonl", rows)
    recipe = on(path, data=data, algorithm={"type": "dpo", "reference_free": True})
    with trainer(tmp_path / "run", recipe, Ear()) as made:
        iteration(made)
        (row,) = made.run.metrics()
    assert (row["excluded_rate"], row["episodes"]) == (0.5, 2)
    assert f"data: excluded: {path}:2: both sides are the same tokens" in heard


def test_held_out_pairs_that_are_too_long_count_once_each_and_are_told_of(tmp_path: Path) -> None:
    rows = [pair_row("21"), pair_row("43", wrong="9" * 40), pair_row("65"), pair_row("87", wrong="9" * 41)]
    held = str(jsonl(tmp_path / "held.jsonl", rows))
    data = {"form": "pairs", "max_tokens": 30, "rows_per_step": 2, "validation_path": held}
    algorithm = {"type": "dpo", "reference_free": True}
    recipe = on(jsonl(tmp_path / "x.jsonl", rows), data=data, algorithm=algorithm)
    stream = io.StringIO()
    with trainer(tmp_path / "run", recipe, PlainLines(stream)) as made:
        made.evaluate()
    found = json.loads((tmp_path / "run/eval/step-000000.json").read_text())
    assert (found["tasks"], found["failed"]) == (2, 2)
    assert "of 2 held-out rows" in stream.getvalue()
    assert ", 2 unfit and left out" in stream.getvalue()


def test_a_row_that_the_template_refuses_is_left_out_by_name(tmp_path: Path) -> None:
    refused = {"messages": [{"role": "assistant", "content": "x"}]}  # `strict` wants the user first
    with trainer(
        tmp_path / "run", on(jsonl(tmp_path / "x.jsonl", [refused, chat_row("1")]), data={"validation_share": 0})
    ) as made:
        assert isinstance(made.source, DatasetSource)
        made.source._chat = chat("strict")
        episodes = made.source.episodes(0)
    failures = Counter(one.failure for one in episodes)
    assert len(failures) == 2
    assert any(failure and "x.jsonl:1: the model's chat template refuses" in failure for failure in failures)


def test_spans_become_masks(tmp_path: Path) -> None:
    with trainer(tmp_path / "run", on(chats(tmp_path / "x.jsonl", 8, two_turns), data={"validation_share": 0})) as made:
        episodes = made.source.episodes(0)
        batch = collate(episodes, "cpu", observed=True)
        assert batch is not None
        assert batch.observed is not None
        for row, one in enumerate(episodes):
            digits = one.transcript.views["policy"][-1].content[::-1]
            assert text(one, "chosen", made) == [f"{digits[0]}<end>", f"{digits[::-1]}<end>"]
            assert text(one, "observation", made) == [f"to {digits} "]
            tokens = list(one.tokens)
            seen = [token for token, here in zip(tokens, batch.observed[row].tolist(), strict=False) if here]
            assert made._tokenizer.decode(seen) == f"to {digits} "
        assert (batch.score == batch.mask | batch.observed).all()
        assert not (batch.mask & batch.observed).any()
        pairs = collate(episodes[:4], "cpu", pairs=True)
        assert pairs is not None
        assert pairs.unit.tolist() == [0, 1, 2, 3]
