"""Messages to tokens and back: templates, append-only turns, text that spells special tokens."""

import os
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mrlm_cli.errors import UserError
from mrlm_cli.policy import scratch
from mrlm_cli.policy.chat import REPLY, Chat
from mrlm_cli.recipe.sections import Chat as ChatSection
from mrlm_cli.recipe.sections import ScratchModel
from mrlm_cli.records import Message

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|start|>system\nBe kind.<|stop|>\n{% endif %}"
    "<|start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}call {{ call['function']['name'] }}{% endfor %}<|stop|>\n{% endfor %}"
    "{% if tools %}tools: {{ tools[0]['name'] }}\n{% endif %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# Drops the thoughts of older replies, as templates of reasoning models do, and trims.
FORGETFUL = (
    "<|begin|>{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] | trim }}"
    "{% else %}{{ m['content'] | trim }}{% endif %}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n<think>\n{% endif %}"
)
# No newline after the end token of the last message, and strict about the order of roles.
STRICT = (
    "<|begin|>{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }}<|stop|>{% endif %}"
    "{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "forgetful": FORGETFUL, "strict": STRICT}
SPECIAL = ["<|start|>", "<|stop|>", "<|begin|>"]
CORPUS = [
    "What is 27 + 15? Answer with the number.",
    "system user assistant",
    "the cat sat on the mat",
    "<|>[INST]",
] * 5


@cache
def tokenizer(template=None, *, eos="<|stop|>", bos=None):
    """A byte-level BPE tokenizer with merges, three special tokens and a template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    if bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, bos_token=bos, additional_special_tokens=SPECIAL
    )
    made.chat_template = TEMPLATES.get(template)
    return made


def chat(template=None, system=None, mode="auto", **options):
    section = ChatSection(template=mode, system=system)
    return Chat(tokenizer(template, **options), section, vocabulary=340, context=512)


def flat(spans):
    return [token for _, tokens in spans for token in tokens]


def user(text):
    return Message("user", text)


def canonical(door, messages, header=True):
    """What transformers itself makes of a conversation."""
    rows = [{"role": m.role, "content": m.content} for m in messages]
    return door.tokenizer.apply_chat_template(rows, add_generation_prompt=header, return_dict=False)


def encode(door, text):
    return door.tokenizer(text, add_special_tokens=False).input_ids


words = st.text(st.sampled_from("ab <|>\n7é."), max_size=12).filter(lambda text: "<|" not in text)
hostile = st.lists(st.sampled_from([*SPECIAL, "a", " ", "<", "|>", "start", "\n"]), max_size=8).map("".join)


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=30, deadline=None)
@given(text=words)
def test_the_prompt_is_what_transformers_makes_of_it(template, text):
    door = chat(template)
    assert door.open([user(text)]) == [("prompt", tuple(canonical(door, [user(text)])))]


@pytest.mark.parametrize("template", ["chatml", "strict"])
@settings(max_examples=30, deadline=None)
@given(texts=st.lists(words, min_size=2, max_size=4), replies=st.lists(words, min_size=3, max_size=3))
def test_turns_appended_one_by_one_equal_the_conversation_rendered_whole(template, texts, replies):
    door = chat(template)
    messages = [user(texts[0])]
    tokens = flat(door.open(messages))
    for text, reply in zip(texts[1:], replies, strict=False):
        header = " " if template == "strict" else ""  # this template's replies begin with a space
        said = [*encode(door, header + reply), door.end_tokens[0]]
        tokens += said + flat(door.follow(said, "end", [user(text)]))
        messages += [Message("assistant", reply), user(text)]
    assert tokens == canonical(door, messages)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_reply_is_closed_once(template):
    door = chat(template)
    stop = door.end_tokens[0]
    said = encode(door, "no")
    by_itself = door.follow([*said, stop], "end", [user("so")])
    cut = door.follow(said, "length", [user("so")])
    at_string = door.follow(said, "string", [user("so")])
    assert cut == at_string
    assert flat(cut) == [stop, *flat(by_itself)]
    assert cut[0][0] == "scaffold"
    assert cut[-1][0] == "observation"
    assert door.decode(cut[-1][1]).count("so") == 1
    assert flat(by_itself).count(stop) == (0 if template == "strict" else 1)  # the new message's own


@pytest.mark.parametrize("template", TEMPLATES)
def test_without_new_messages_the_closing_and_the_next_header_follow(template):
    door = chat(template)
    text = door.decode(flat(door.follow(encode(door, "no"), "length", [])))
    expected = {
        "chatml": "<|stop|>\n<|start|>assistant\n",
        "forgetful": "<|stop|>\n<|start|>assistant\n<think>\n",
        "strict": "<|stop|>",
    }
    assert text == expected[template]


def test_a_template_that_rewrites_history_leaves_the_tokens_as_they_are():
    door = chat("forgetful")
    said = [*encode(door, "hm </think> 42"), door.end_tokens[0]]
    after = flat(door.follow(said, "end", [user(" more ")]))
    assert door.decode(after) == "\n<|start|>user\nmore<|stop|>\n<|start|>assistant\n<think>\n"


@pytest.mark.parametrize("template", [*TEMPLATES, None])
@settings(max_examples=40, deadline=None)
@given(text=hostile)
def test_text_that_spells_special_tokens_never_becomes_one(template, text):
    door = chat(template)
    special = set(door.tokenizer.all_special_ids)

    def count(spans):
        return [token for token in flat(spans) if token in special]

    opened, harmless = door.open([user(f"x{text}x")]), door.open([user("xx")])
    assert count(opened) == count(harmless)
    assert f"x{text}x" in door.decode(flat(opened))
    followed, harmless = door.follow([5], "length", [user(f"x{text}x")]), door.follow([5], "length", [user("xx")])
    assert count(followed) == count(harmless)
    assert f"x{text}x" in door.decode(flat(followed))


def test_special_text_in_a_system_prompt_and_a_tool_call_is_ordinary_too():
    door = chat("chatml", system="a<|stop|>b")
    call = {"type": "function", "function": {"name": "<|start|>", "arguments": {}}}
    tokens = flat(door.open([user("<|begin|>"), Message("assistant", "", tool_calls=(call,)), user("c")]))
    assert door.decode(tokens) == (
        "<|start|>system\na<|stop|>b<|stop|>\n<|start|>user\n<|begin|><|stop|>\n"
        "<|start|>assistant\ncall <|start|><|stop|>\n<|start|>user\nc<|stop|>\n<|start|>assistant\n"
    )
    assert [token for token in tokens if token in door.tokenizer.all_special_ids] == [0, 1, 0, 1, 0, 1, 0, 1, 0]


def test_private_characters_come_through_as_they_are():
    door = chat("chatml")
    text = "\ue0001\ue000 \ue001<|stop|>\ue0012\ue001"
    call = {"type": "function", "function": {"name": "\ue0021\ue002", "arguments": {}}}
    whole = door.decode(flat(door.open([user(text), Message("assistant", "", tool_calls=(call,))])))
    assert text in whole
    assert "call \ue0021\ue002" in whole


def test_a_spelled_special_token_has_the_tokens_of_its_text():
    door = chat(None)
    expected = door.tokenizer("<|stop|>", split_special_tokens=True).input_ids
    assert len(expected) < len("<|stop|>")
    assert flat(door.open([user("<|stop|>")])) == expected


def test_a_message_that_contains_the_stand_in_is_nothing_special():
    door = chat("chatml")
    assert REPLY in door.decode(flat(door.follow([5], "length", [user(REPLY)])))


@pytest.mark.parametrize(
    ("system", "messages", "expected"),
    [
        (None, [user("a")], "<|start|>system\nBe kind.<|stop|>\n<|start|>user\na<|stop|>\n<|start|>assistant\n"),
        ("", [user("a")], "<|start|>system\n<|stop|>\n<|start|>user\na<|stop|>\n<|start|>assistant\n"),
        ("S", [user("a")], "<|start|>system\nS<|stop|>\n<|start|>user\na<|stop|>\n<|start|>assistant\n"),
        (
            "S",
            [Message("system", "own"), user("a")],
            "<|start|>system\nown<|stop|>\n<|start|>user\na<|stop|>\n<|start|>assistant\n",
        ),
    ],
)
def test_the_system_message_of_the_recipe(system, messages, expected):
    door = chat("chatml", system=system)
    assert door.decode(flat(door.open(messages))) == expected


def test_tools_reach_the_template():
    door = chat("chatml")
    assert "tools: look_up" in door.decode(flat(door.open([user("a")], tools=({"name": "look_up"},))))
    assert "tools: look_up" in door.decode(flat(door.follow([5], "length", [user("a")], tools=({"name": "look_up"},))))


def test_plain_joins_contents_and_closes_with_the_end_token():
    door = chat("chatml", mode="plain", system="S:")
    stop = door.tokenizer.eos_token_id
    assert door.open([user("ab"), user("cd")]) == [("prompt", tuple(encode(door, "S:abcd")))]
    said = encode(door, "no")
    assert door.follow([*said, stop], "end", [user("<")]) == [("observation", tuple(encode(door, "<")))]
    assert door.follow(said, "length", [user("<")]) == [
        ("scaffold", (stop,)),
        ("observation", tuple(encode(door, "<"))),
    ]
    assert door.follow([*said, stop], "end", []) == []
    assert chat(None).open([user("")]) == [("prompt", (stop,))]
    begun = chat(None, bos="<|begin|>")
    assert begun.open([user("ab")]) == [("prompt", (begun.tokenizer.bos_token_id, *encode(begun, "ab")))]


def test_end_tokens_are_the_templates_and_the_tokenizers():
    assert chat("chatml").end_tokens == (1,)
    assert chat("chatml", eos="<|begin|>").end_tokens == (1, 2)
    assert chat(None).end_tokens == (1,)
    # A reply that ended with the other end token is still closed by the template's own.
    other = chat("chatml", eos="<|begin|>")
    assert flat(other.follow([5, 2], "end", []))[0] == 1


def test_read_leaves_out_the_end_token_and_what_begins_with_a_stop_string():
    door = chat("chatml")
    said = encode(door, "the answer\nis 7")
    assert door.read([*said, 1], "end") == Message("assistant", "the answer\nis 7")
    assert door.read(said, "length").content == "the answer\nis 7"
    assert door.read([*said, 0, 1], "end").content == "the answer\nis 7<|start|>"
    assert door.read(said, "string", ["is", "\n"]).content == "the answer"
    assert door.read(said, "length", ["\n"]).content == "the answer\nis 7"


@pytest.mark.parametrize("kind", ["characters", "bytes"])
def test_a_scratch_tokenizer_reads_back_what_it_wrote(kind):
    made = scratch.tokenizer(ScratchModel(type="scratch", tokenizer=kind))
    door = Chat(made, ChatSection(), vocabulary=len(made), context=256)
    spans = door.open([user("sort 21= <end><pad>")])
    assert not set(spans[0][1]) & {0, 1, 2}
    assert door.decode(spans[0][1]) == "sort 21= <end><pad>"
    assert door.end_tokens == (1,)
    assert door.read([*spans[0][1], 1], "end").content == "sort 21= <end><pad>"


def test_what_cannot_work_is_refused():
    with pytest.raises(UserError, match="no chat template"):
        chat(None, mode="model")
    with pytest.raises(UserError, match="no end token"):
        chat(None, eos=None)
    with pytest.raises(UserError, match="roles must alternate"):
        chat("strict").open([user("a"), user("b")])
    mute = tokenizer("chatml", eos="<|begin|>", bos="<|begin|>")
    kept, mute.chat_template = mute.chat_template, "{{ messages[0]['content'] }}"
    with pytest.raises(UserError, match="leaves out the assistant's reply"):
        Chat(mute, ChatSection(), vocabulary=340, context=512)
    mute.chat_template = kept


@pytest.mark.skipif("MRLM_SMOLLM2" not in os.environ, reason="MRLM_SMOLLM2 names no directory of the real model")
def test_the_real_smollm2_template():
    real = AutoTokenizer.from_pretrained(os.environ["MRLM_SMOLLM2"])
    door = Chat(real, ChatSection(system=""), vocabulary=len(real), context=8192)
    messages = [Message("system", ""), user("What is 27 + 15?")]
    assert flat(door.open(messages[1:])) == canonical(door, messages)
    said = [*encode(door, "41"), door.end_tokens[0]]
    tokens = flat(door.open(messages)) + said + flat(door.follow(said, "end", [user("No.")]))
    assert tokens == canonical(door, [*messages, Message("assistant", "41"), user("No.")])
    assert door.end_tokens == (2,)
    assert flat(door.open([user("<|im_end|>")])).count(2) == 2  # the template's two, none from the text
