"""`make doctor`: every encoder and model of the configuration in a line, and in full what to do for one."""

import os
import re
import subprocess
import sys

import pytest
from hydra.utils import instantiate

from eval.encoders import Encoder
from experiments import PROJECT
from experiments.compose import composed
from experiments.doctor import WIDTH, details, examine, main, table

CONF = PROJECT / "conf"


@pytest.fixture
def configuration(tmp_path, tiny_checkpoint):
    """A folder of configuration: encoders and models that are ready, missing and broken."""
    model = (
        "architecture: {}\nrevision: null\nvariant: null\nlicence: {{black-forest-labs/FLUX.1-dev: non-commercial}}\n"
    )
    lpips = f"  _target_: eval.perceptual.LpipsDistance\n  net: squeeze\n  weights_dir: {tmp_path}\n"
    pixels = "  _target_: eval.requests.NotOverrefuse\n  only: [near-*]\n"
    cosine = "  _target_: eval.diversity.PairwiseDistance\n  encoder: ${model.scorer}\n"
    files = {
        "config": "defaults:\n  - _self_\n  - model: here\ndevice: auto\n",
        "scorer/pixel": "_target_: eval.encoders.PixelEncoder\nsize: 4\n",
        "scorer/absent": f"_target_: eval.features.Sscd\nfile: {tmp_path}/descriptor.pt\ndevice: ${{device}}\n",
        "scorer/broken": "_target_: eval.encoders.Nothing\n",
        "metric/first": f"lpips:\n{lpips}cosine:\n{cosine}pixels:\n{pixels}",
        "metric/second": f"again:\n{lpips}",
        "model/here": f"name: here\nsource: {tiny_checkpoint('sdxl')}\n{model.format('sdxl')}",
        "model/there": f"name: there\nsource: black-forest-labs/FLUX.1-dev\n{model.format('flux')}",
    }
    for name, text in files.items():
        path = tmp_path / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_everything_is_listed_with_what_to_do(configuration):
    findings = {finding.option: finding for finding in examine(configuration)}
    assert {option: finding.state for option, finding in findings.items()} == {
        "scorer=absent": "missing", "scorer=broken": "broken", "scorer=pixel": "ready",
        "metric=first: lpips": "missing", "model=here": "ready", "model=there": "missing",
    }  # fmt: skip
    absent = findings["scorer=absent"].facts
    assert absent["looked in"] == f"{configuration}/descriptor.pt"
    assert "NC" in absent["licence"] and "dl.fbaipublicfiles.com" in absent["to do"] and "288" in absent["resize"]
    assert "Nothing" in findings["scorer=broken"].facts["error"]
    assert re.fullmatch("[0-9a-f]{16}", findings["model=here"].facts["fingerprint"])
    assert findings["model=here"].facts["licence"] == "as its page says", "not that of another source"
    there = findings["model=there"].facts
    assert "hf download black-forest-labs/FLUX.1-dev" in there["to do"] and "non-commercial" in there["licence"]
    lines = details(findings.values()).splitlines()
    assert lines[0] == "missing scorer=absent" and f"        looked in:   {configuration}/descriptor.pt" in lines


def test_one_can_be_examined(configuration):
    for name, option in (("there", "model=there"), ("model=there", "model=there"), ("lpips", "metric=first: lpips")):
        assert [finding.option for finding in examine(configuration, name)] == [option]
    with pytest.raises(ValueError, match="lists, got nowhere"):
        examine(configuration, "nowhere")


def test_the_table_has_a_line_for_each_with_its_size_and_licence(configuration, tiny_checkpoint):
    (configuration / "descriptor.pt").write_bytes(bytes(3 << 20))
    findings = examine(configuration)
    (absent,) = (finding for finding in findings if finding.option == "scorer=absent")
    assert absent.facts["weights"] == f"{configuration}/descriptor.pt" and "to do" not in absent.facts
    assert re.fullmatch("[0-9a-f]{12}", absent.facts["sha256"])
    lines = table(findings).splitlines()
    assert all(len(line) <= WIDTH for line in lines)
    rows = {line.split()[1]: line for line in lines[: lines.index("")]}
    assert rows["scorer=absent"].startswith("ready") and "3.0 MiB  CC BY-NC" in rows["scorer=absent"]
    assert rows["model=there"].startswith("missing") and rows["model=there"].endswith(" non-commercial")
    assert rows["scorer=broken"].startswith("broken") and "InstantiationException" in rows["scorer=broken"]
    size = sum(file.stat().st_size for file in tiny_checkpoint("sdxl").rglob("*") if file.is_file())
    assert f"{size / 2**20:.1f} MiB" in rows["model=here"]
    assert "3 of 6 are ready" in lines[len(rows) + 1]


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
    env = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    command = [sys.executable, "-c", guard + "from experiments.doctor import main\nmain([])"]
    done = subprocess.run(command, cwd=PROJECT, env=env, capture_output=True, text=True, check=True)
    states = {line.split()[1]: line.split()[0] for line in done.stdout.partition("\n\n")[0].splitlines()}
    names = {f"{group}={file.stem}" for group in ("scorer", "model") for file in (CONF / group).glob("*.yaml")}
    assert names <= set(states)
    assert "broken" not in states.values()
    for shipped in ("scorer=mini-clip", "scorer=efficientnet-lite0", "scorer=pixel", "model=mini-sdxl"):
        assert states[shipped] == "ready"


def test_every_scorer_is_an_encoder_that_can_be_chosen():
    names = sorted(file.stem for file in (CONF / "scorer").glob("*.yaml"))
    cfg = composed(["device=cpu", *(f"+scorer@scorer{number}={name}" for number, name in enumerate(names))])
    for number in range(len(names)):
        encoder = instantiate(cfg[f"scorer{number}"])
        assert isinstance(encoder, Encoder) and encoder.weights().encoder == encoder.name
