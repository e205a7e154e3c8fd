"""`on_step` reports exactly what moved, compared with the tokens themselves, and changes no image."""

import copy

import pytest
import torch
from tiny import CONFIGS, generate

import negtome


def record(pipe, config, *, seeds=(0, 1, 2, 3), options=None, **attached):
    """Return the latents, the reports of all steps, and the attachment."""
    reports = []
    with negtome.attach(pipe, config, on_step=reports.append, **attached) as attachment:
        images = generate(pipe, seeds, **(options or {}))
    return images, reports, attachment


@pytest.mark.parametrize("reference", ["first", "others"])
def test_reports_agree_with_the_tokens_before_and_after_the_push(pipe, kind, reference):
    config = CONFIGS[kind].replace(reference=reference)
    guidance = {} if kind == "sdxl" else {"true_cfg_scale": 3.0, "negative_prompt": "a cat"}
    changed = []

    def push(name, tokens, pushed, group_size):
        changed.append((name, (tokens != pushed).any(dim=-1)))
        return pushed

    images, reports, attachment = record(pipe, config, options=guidance, group_size=2, push=push)
    with negtome.attach(pipe, config, group_size=2):
        assert torch.equal(generate(pipe, (0, 1, 2, 3), **guidance), images)

    assert [(report.index, report.timestep, report.active) for report in reports] == [
        (index, *step) for index, step in enumerate(attachment.steps)
    ]
    assert all(not report.counts and not report.moved for report in reports[2:])
    active = reports[:2]
    assert sum(report.tokens_pushed for report in active) == attachment.summary()["tokens_pushed"] > 0
    for name, total in attachment.counts().items():
        assert sum(report.counts[name].compared for report in active) == total.compared
        assert sum(report.counts[name].pushed for report in active) == total.pushed
        moved = torch.cat([rows for site, rows in changed if site == name])  # [2 steps * 2 chunks * 4 images, N]
        expected = moved.float().unflatten(0, (2, 2, 4)).mean(dim=1)
        torch.testing.assert_close(torch.stack([report.moved[name] for report in active]), expected)


def test_a_report_that_is_no_function_is_refused_before_the_pipeline_changes(pipe, kind):
    before = dict(vars(pipe))
    with pytest.raises(TypeError, match="on_step must be a function"):
        negtome.attach(pipe, CONFIGS[kind], on_step=3)
    assert vars(pipe) == before


def test_an_image_without_a_reference_is_reported_as_still(pipe, kind):
    picture = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    references = [None, negtome.Reference(picture), None, negtome.Reference(picture, seed=1)]
    config = CONFIGS[kind].replace(threshold=0.0)
    _, reports, attachment = record(pipe, config, references=references)
    assert sum(report.tokens_pushed for report in reports) == attachment.summary()["tokens_pushed"]
    for share in reports[0].moved.values():
        assert not share[[0, 2]].any() and share[1].any() and share[3].any()


def test_on_step_may_call_another_pipeline_and_end_the_call(pipe, kind):
    other = type(pipe)(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)})
    alone = generate(other, (5, 6))
    seen = []

    def on_step(report):
        seen.append(generate(other, (5, 6)))
        if report.index == 1:
            raise InterruptedError("enough")

    with (
        pytest.warns(RuntimeWarning, match="that call runs unchanged"),
        pytest.raises(InterruptedError, match="enough"),
        negtome.attach(pipe, CONFIGS[kind], on_step=on_step),
    ):
        generate(pipe)
    assert len(seen) == 2 and all(torch.equal(images, alone) for images in seen)
    assert "_negtome" not in vars(pipe)
