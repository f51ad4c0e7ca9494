"""`dora-parity gpu`: parts run where there is no GPU too, findings are judged, and the file goes on where it ended."""

import io
import json

import pytest
from rich.console import Console

from parity.errors import CannotRun
from parity.gpu import bench, codec, command, jax, suite
from parity.gpu.finding import Finding, judged

HOLDS = Finding("jax/one", "holds", "0 of 8 numbers differ")
SHORT = Finding("jax/two", "falls short", "1 of 8 numbers differ")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Run parts whose findings are given; the exit status, what was said, and the file."""

    def run(part="jax", keep="", **given):
        def lines(_, name, *words, **__):
            assert words == ("cpu", keep)
            for found in given[name]:
                if isinstance(found, Exception):
                    raise found
                yield found.as_json()

        monkeypatch.setattr(command, "json_lines", lines)
        text = io.StringIO()
        place = tmp_path / "gpu.json"
        status = command.run_parts(part, "cpu", keep, place, Console(file=text, width=200))
        return status, text.getvalue(), json.loads(place.read_text())

    return run


def test_what_holds_is_status_0(gpu):
    """All findings are in the file, with what they were found on."""
    status, said, content = gpu(jax=[HOLDS])

    assert status == 0
    assert said.splitlines()[-1] == "whole: 1 holds"
    assert content["environment"]["device"] == "cpu"
    assert content["parts"]["jax"]["complete"] is True
    assert content["parts"]["jax"]["findings"] == [HOLDS.as_json()]


@pytest.mark.parametrize(
    ("findings", "last"),
    [
        pytest.param([HOLDS, SHORT], "whole: 1 falls short, 1 holds", id="one falls short"),
        pytest.param([HOLDS, CannotRun("part jax: out of memory")], "INCOMPLETE: 1 holds", id="it ended early"),
    ],
)
def test_what_falls_short_or_ends_early_is_status_1(gpu, findings, last):
    """What was found before is kept, and why it ended."""
    status, said, content = gpu(jax=findings)

    assert (status, said.splitlines()[-1]) == (1, last)
    assert len(content["parts"]["jax"]["findings"]) == sum(isinstance(found, Finding) for found in findings)
    assert content["parts"]["jax"]["reason"] == ("part jax: out of memory" if "INCOMPLETE: 1" in last else "")


def test_a_part_that_finds_nothing_shows_nothing(gpu):
    """Its reason is in the file."""
    status, _, content = gpu(jax=[])

    assert status == 1
    assert "nothing of it has ''" in content["parts"]["jax"]["reason"]


def test_it_goes_on_where_it_ended(gpu):
    """A whole part is not run again, one that ended early is; the parts that were not asked for stay."""
    gpu(jax=[HOLDS, CannotRun("gone")])
    gpu("codec", codec=[HOLDS])

    status, said, content = gpu("all", suite=[HOLDS], jax=[HOLDS, HOLDS], bench=[HOLDS])  # of codec there is nothing

    assert status == 0
    assert "codec: in" in said
    assert [len(content["parts"][part]["findings"]) for part in command.PARTS] == [1, 1, 2, 1]


@pytest.mark.parametrize(
    ("part", "keep", "said"),
    [("jaks", "", "'jaks' is unknown.*suite"), ("jax", "x", "was begun with other versions")],
    ids=["no such part", "other findings"],
)
def test_what_cannot_go_on_is_refused(gpu, part, keep, said):
    """In one line, and the file stays as it is."""
    gpu(jax=[HOLDS])

    with pytest.raises(CannotRun, match=said):
        gpu(part, keep, jax=[HOLDS])


def test_a_file_that_is_another_thing_stays(gpu, tmp_path):
    """It is not overwritten."""
    (tmp_path / "gpu.json").write_text("[1]")

    with pytest.raises(CannotRun, match="remove it"):
        gpu(jax=[HOLDS])
    assert (tmp_path / "gpu.json").read_text() == "[1]"


def test_bits_are_counted():
    """One that differs falls short."""
    assert [judged("x", wrong, 8, "bytes").status for wrong in (0, 1)] == ["holds", "falls short"]


@pytest.mark.parametrize(("code", "nested"), [("nf4", "nested"), ("fp4", "plain")])
def test_the_codec_of_this_machine_is_its_profile(code, nested):
    """On a CPU: bytes, scales and the decoded weight."""
    found = list(codec.findings("cpu", f"{code}/64/{nested}/float32"))

    assert [finding.name.rpartition("/")[2] for finding in found] == ["packed", "absmax", "decoded"]
    assert {finding.status for finding in found} == {"holds"}


def test_another_profile_s_bytes_fall_short(monkeypatch):
    """FP4's exact codes are not bitsandbytes'."""
    right = codec.quant.encode
    monkeypatch.setattr(codec.quant, "encode", lambda W, **form: right(W, **form | {"profile": "exact"}))

    packed, *_ = codec.findings("cpu", "fp4/64/plain/float32")

    assert packed.status == "falls short"


def test_the_compiled_reference_is_exact_on_lattices():
    """Both statements of the gradients, in both dtypes."""
    found = list(jax.findings("cpu", "thin"))

    assert len(found) == 4
    assert {finding.status for finding in found} == {"holds"}


def test_what_the_device_computes_otherwise_falls_short(monkeypatch):
    """It is compared with the host's float64, not with itself; a function of its own, as JAX keeps what it compiled."""

    def wrong(x, W, adapter, G, *, scaling):
        found = jax.by_autodiff(x, W, adapter, G, scaling=scaling)
        one = int(adapter.magnitude.dtype == jax.jnp.float32)
        return found | {"y": found["y"].at[0, 0].add(one)}

    monkeypatch.setattr(jax, "WAYS", (("autodiff", wrong),))

    (found,) = jax.findings("cpu", "autodiff/thin/float32")

    assert (found.status, found.said.split()[0]) == ("falls short", "1")


def test_operands_of_ten_bits_fall_short(monkeypatch):
    """TF32's, which the lattices' short numbers do not show."""
    right = jax.dora.forward

    def rounded(x, W, adapter, **options):
        ten = W.view("int32") & ~0x1FFF
        return right(x, ten.view("float32"), adapter, **options)

    before = next(jax.findings("cpu", "one-hot"))
    monkeypatch.setattr(jax.dora, "forward", rounded)

    assert before.status == "holds"
    assert next(jax.findings("cpu", "one-hot")).status == "falls short"


@pytest.mark.parametrize("status", [1, 2, 130])
def test_a_suite_that_ended_early_does_not_hold(status):
    """What passed before is in the file, and is not the whole."""
    right = {"id": "c", "status": "passed", "checks": [{"passed": True}]}

    assert suite.verdict("x", [right], status).status == "falls short"


def test_a_suite_that_skips_all_shows_nothing():
    """Counted skips are no proof; who fell short is named."""
    cases = [{"id": "a", "status": "skipped", "checks": []}]
    wrong = [{"id": "b", "status": "failed", "checks": [{"vacuous": False}]}]
    right = [{"id": "c", "status": "passed", "checks": [{"vacuous": False}, {"vacuous": True}]}]

    assert suite.verdict("x", cases, 0).status == "falls short"
    assert suite.verdict("x", wrong + right, 1) == Finding("x", "falls short", "1 failed, 1 passed; 2 checks: b")
    assert suite.verdict("x", cases + right, 0) == Finding("x", "holds", "1 passed, 1 skipped; 1 checks")


@pytest.mark.distributed
def test_the_suite_runs_on_the_device():
    """World 1 and world 2, of the cases that are asked for."""
    found = list(suite.findings("cpu", "thin/float32-float32/plain and lattice"))

    assert [(finding.name, finding.status) for finding in found] == [
        ("suite/world-1", "holds"),
        ("suite/world-2", "holds"),
    ]


def test_steps_are_timed():
    """Each comparison has a number, whatever the device."""
    found = list(bench.findings("cpu", "linear"))

    assert [finding.status for finding in found] == ["shown"] * 4
    assert all(float(finding.said.split(":")[0]) > 0 for finding in found)
