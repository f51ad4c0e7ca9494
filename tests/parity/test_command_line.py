"""Bad input is one line that names the value and the mend, exit status 2, nothing written, nothing left running."""

import json
import os
import shlex

import numpy as np
import pytest
from safetensors.numpy import save_file

from parity.models import checkpoint

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


def refused(done, *said):
    """Whether a command was refused as it should be; what is wrong with it otherwise."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("dora-parity: ")
    assert [part for part in said if part not in done.stderr] == []
    return True


BAD_RUNS = {
    "--impl nosuch": ["--impl 'nosuch'", "torch_impl"],
    "--impl no_such_module:Dora": ["'no_such_module'"],
    "--impl fakes:Nobody": ["fakes has no 'Nobody'"],
    "--impl :Dora": ["':Dora'"],
    "--impl mutant:Nobody": ["'mutant:Nobody'"],
    "--impl fakes:Honest -k closed-form": ["--impl", "-k"],
    "-k 'fsdp2 and ('": ["-k 'fsdp2 and ('"],
    "-k nosuchcase": ["'nosuchcase'", "dora-parity list"],
    "--world 17": ["world 17", "1 to 16"],
    "--world two": ["'two'"],
    "--tier huge": ["'huge'", "quick, full"],
    "--device tpu": ["'tpu'", "cpu or cuda"],
    "--device cuda": ["cuda", "no CUDA device"],
    "--model nowhere": ["nowhere/config.json", "is missing"],
    "--json .": ["is no file"],
    "--json blocked/results.json": ["blocked/results.json", "cannot be written"],
}


@pytest.mark.parametrize("arguments", BAD_RUNS)
def test_bad_input_is_refused(called, tmp_path, monkeypatch, arguments):
    """An option that cannot be met is refused before anything runs or is written."""
    (tmp_path / "blocked").write_text("a file, not a folder")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    done = called("run", *shlex.split(arguments))

    assert refused(done, *BAD_RUNS[arguments])
    assert [path.name for path in tmp_path.iterdir()] == ["blocked"]


BAD_COMMANDS = {
    "show stack/one-hot": ["'stack/one-hot'", "dora-parity list"],
    "list -k '('": ["-k '('"],
    "mutants -k Nobody": ["'Nobody'", "SumForMean"],
}


@pytest.mark.parametrize("arguments", BAD_COMMANDS)
def test_other_commands_refuse_too(called, arguments):
    """Each command has the same manners."""
    assert refused(called(*shlex.split(arguments)), *BAD_COMMANDS[arguments])


@pytest.mark.parametrize("arguments", ["", "nosuch", "run --frobnicate", "run --seed x", "run --json", "show"])
def test_usage_is_status_2(called, tmp_path, arguments):
    """What the parser itself refuses has exit status 2 and no traceback, and nothing is written."""
    done = called(*shlex.split(arguments))

    assert done.returncode == 2
    assert done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


# checkpoints


def write(folder):
    """A small sound Llama."""
    shapes = dict(checkpoint._expected(CONFIGURATION | {"head_dim": 2}))
    del shapes["lm_head.weight"]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGURATION))
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, folder / "model.safetensors")
    return folder


def _cut(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])


def _lie(folder):
    weights = folder / "model.safetensors"
    raw = weights.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    header["model.norm.weight"]["shape"] = [4]
    text = json.dumps(header).encode()
    weights.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])


def _other_width(folder):
    (folder / "config.json").write_text(json.dumps(CONFIGURATION | {"hidden_size": 12}))


def _no_weights(folder):
    (folder / "model.safetensors").unlink()


def _no_tokenizer(folder):
    assert not (folder / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        pytest.param(_cut, ["model.safetensors", "cut short"], id="cut short"),
        pytest.param(_lie, ["model.norm.weight", "32 bytes for F32 [4], wanted 16"], id="lies about a shape"),
        pytest.param(_other_width, ["[16, 8]", "wants [16, 12]"], id="another width"),
        pytest.param(_no_weights, ["model.safetensors", "is missing"], id="no weights"),
        pytest.param(_no_tokenizer, ["tokenizer.json", "is missing"], id="no tokenizer"),
    ],
)
def test_a_bad_checkpoint_is_refused(called, tmp_path, damage, said):
    """A checkpoint that is cut short, lies about a shape or lacks a file is refused before a rank starts."""
    damage(write(tmp_path / "model"))

    assert refused(called("run", "-k", "pretrained", "--model", "model", "--json", "results.json"), *said)

    assert not (tmp_path / "results.json").exists()


# what is good


def test_list_is_quick_and_loads_no_framework(dora_parity):
    """`list` takes under two seconds of a processor, and neither torch nor jax is loaded for it."""
    before = os.times()
    done = dora_parity("list", "-k", "thin and one-hot", PYTHONPROFILEIMPORTTIME="1")
    after = os.times()

    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert done.returncode == 0
    assert "stack/one-hot/torch_impl/fsdp2-w2/thin/float32-float32/plain  [D11 " in done.stdout
    assert "parity" in loaded
    assert loaded & {"torch", "jax", "flax", "transformers", "ref", "torch_impl"} == set()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 2


def test_list_names_what_run_would_run(called):
    """One line a case, and their number beside."""
    done = called("list", "--world", "4", "-k", "single-row and one-hot")

    lines = done.stdout.splitlines()
    assert done.stderr == f"{len(lines)} cases\n"
    assert all("-w4/single-row/" in line for line in lines)


def test_show_tells_a_case(called):
    """`show` prints every field, the inputs, how tokens are dealt, and a command to run it."""
    case = "stack/one-hot/torch_impl/fsdp2-w2/thin/float32-float32/plain"

    done = called("show", case)

    assert done.returncode == 0
    assert "rank 0: 0:10, rank 1: 10:24" in done.stdout
    assert "layers.1.lora_B (30, 2)" in done.stdout
    assert f"dora-parity run -k '{case}'" in done.stdout


@pytest.mark.parametrize("command", [(), ("run",)], ids=["all", "run"])
def test_help_has_an_example(called, command):
    """Whoever asks for help gets a line to copy."""
    done = called(*command, "--help")

    assert done.returncode == 0
    assert "Example" in done.stdout
    assert "dora-parity run -k 'fsdp2 and nf4" in done.stdout
