"""`make doctor`: every encoder and model of the configuration in a line, and in full what to do for one."""

import os
import re
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from eval.encoders import Encoder
from experiments import PROJECT
from experiments.doctor import WIDTH, details, examine, main, table

CONF = PROJECT / "conf"


def write(folder, **files):
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def configuration(tmp_path, tiny_checkpoint):
    """A folder of configuration: encoders and models that are ready, missing and broken."""
    device = "device: ${device}\n"
    model = (
        "architecture: {}\nrevision: null\nvariant: null\nlicence: {{black-forest-labs/FLUX.1-dev: non-commercial}}\n"
    )
    lpips = f"  _target_: eval.perceptual.LpipsDistance\n  net: squeeze\n  weights_dir: {tmp_path}\n"
    pixels = "  _target_: eval.requests.NotOverrefuse\n  only: [near-*]\n"
    cosine = "  _target_: eval.diversity.PairwiseDistance\n  encoder: ${model.scorer}\n"
    write(
        tmp_path,
        config="defaults:\n  - _self_\n  - model: here\ndevice: auto\n",
        scorer__pixel="_target_: eval.encoders.PixelEncoder\nsize: 4\n",
        scorer__absent=f"_target_: eval.features.Sscd\nfile: {tmp_path}/descriptor.pt\n{device}",
        scorer__broken="_target_: eval.encoders.Nothing\n",
        metric__first=f"lpips:\n{lpips}cosine:\n{cosine}pixels:\n{pixels}",
        metric__second=f"again:\n{lpips}",
        model__here=f"name: here\nsource: {tiny_checkpoint('sdxl')}\n{model.format('sdxl')}",
        model__there=f"name: there\nsource: black-forest-labs/FLUX.1-dev\n{model.format('flux')}",
    )
    return tmp_path


def test_everything_is_listed_with_what_to_do(configuration):
    findings = {finding.option: finding for finding in examine(configuration)}
    assert {option: finding.state for option, finding in findings.items()} == {
        "scorer=absent": "missing",
        "scorer=broken": "broken",
        "scorer=pixel": "ready",
        "metric=first: lpips": "missing",
        "model=here": "ready",
        "model=there": "missing",
    }
    absent = findings["scorer=absent"].facts
    assert absent["looked in"] == f"{configuration}/descriptor.pt"
    assert "NC" in absent["licence"] and "dl.fbaipublicfiles.com" in absent["to do"] and "288" in absent["resize"]
    assert "Nothing" in findings["scorer=broken"].facts["error"]
    assert re.fullmatch("[0-9a-f]{16}", findings["model=here"].facts["fingerprint"])
    assert findings["model=here"].facts["licence"] == "as its page says", "that of another source is not told"
    there = findings["model=there"].facts
    assert "hf download black-forest-labs/FLUX.1-dev" in there["to do"] and "non-commercial" in there["licence"]


def test_weights_that_are_there_are_hashed(configuration):
    (configuration / "descriptor.pt").write_bytes(b"weights")
    (finding,) = (finding for finding in examine(configuration) if finding.option == "scorer=absent")
    assert finding.state == "ready" and "to do" not in finding.facts
    assert finding.facts["weights"] == f"{configuration}/descriptor.pt"
    assert re.fullmatch("[0-9a-f]{12}", finding.facts["sha256"])


def test_one_can_be_asked_for(configuration):
    for name in ("there", "model=there"):
        assert [finding.option for finding in examine(configuration, name)] == ["model=there"]
    assert [finding.option for finding in examine(configuration, "lpips")] == ["metric=first: lpips"]
    with pytest.raises(ValueError, match="lists, got nowhere"):
        examine(configuration, "nowhere")


def test_the_table_has_a_line_for_each_with_its_size_and_licence(configuration, tiny_checkpoint):
    (configuration / "descriptor.pt").write_bytes(bytes(3 << 20))
    lines = table(examine(configuration)).splitlines()
    assert all(len(line) <= WIDTH for line in lines)
    rows = {line.split()[1]: line for line in lines[: lines.index("")]}
    assert rows["scorer=absent"].startswith("ready") and "3.0 MiB  CC BY-NC" in rows["scorer=absent"]
    assert rows["model=there"].startswith("missing") and rows["model=there"].endswith(" non-commercial")
    assert rows["scorer=broken"].startswith("broken") and "InstantiationException" in rows["scorer=broken"]
    whole = sum(file.stat().st_size for file in tiny_checkpoint("sdxl").rglob("*") if file.is_file())
    assert f"{whole / 2**20:.1f} MiB" in rows["model=here"]
    assert "3 of 6 are ready" in lines[len(rows) + 1]


def test_details_have_a_block_for_each(configuration):
    lines = details(examine(configuration)).splitlines()
    assert lines[0] == "missing scorer=absent" and f"        looked in:   {configuration}/descriptor.pt" in lines


def test_the_command_takes_a_name_or_nothing(capsys):
    main(["pixel"])
    assert capsys.readouterr().out.startswith("ready   scorer=pixel\n        encoder:")
    with pytest.raises(ValueError, match=r"expected one name, --details, .* or nothing, got pixel sdxl"):
        main(["pixel", "sdxl"])


@pytest.mark.slow
def test_the_command_reports_the_project_without_a_network():
    """As `make doctor` runs it: all options, exit status 0, and nothing is asked of the network."""
    guard = (
        "import socket\ndef refuse(*a, **k): raise SystemExit('the network was used')\nsocket.getaddrinfo = refuse\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", guard + "from experiments.doctor import main\nmain([])"],
        cwd=PROJECT,
        env={key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"},
        capture_output=True,
        text=True,
        check=True,
    )
    states = {line.split()[1]: line.split()[0] for line in done.stdout.partition("\n\n")[0].splitlines()}
    names = {f"{group}={file.stem}" for group in ("scorer", "model") for file in (CONF / group).glob("*.yaml")}
    assert names <= set(states)
    assert "broken" not in states.values()
    for shipped in ("scorer=mini-clip", "scorer=efficientnet-lite0", "scorer=pixel", "model=mini-sdxl"):
        assert states[shipped] == "ready"


@pytest.mark.parametrize("name", sorted(file.stem for file in (CONF / "scorer").glob("*.yaml")))
def test_every_scorer_is_an_encoder_that_can_be_chosen(name):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        encoder = instantiate(compose("config", [f"scorer@model.scorer={name}", "device=cpu"]).model.scorer)
    assert isinstance(encoder, Encoder)
    assert encoder.weights().encoder == encoder.name
