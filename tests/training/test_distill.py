"""Distillation to four steps: the loss, the schedules, and LoRA weights that stock diffusers loads."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from experiments import PROJECT
from negtome.model_files import LORA
from training import distill

MODELS = PROJECT / "models"


@pytest.fixture(scope="module", params=sorted(distill.STUDENTS))
def student(request: pytest.FixtureRequest) -> distill.Student:
    pipe = DiffusionPipeline.from_pretrained(MODELS / request.param, torch_dtype=torch.float32)
    return distill.STUDENTS[request.param](pipe, ["a photo of a dog", "a photo of a bird"])


def test_a_student_that_arrives_where_its_teacher_does_has_no_loss(student: distill.Student) -> None:
    torch.manual_seed(0)
    index, prompt = torch.tensor([0, 3]), torch.tensor([0, 1])
    latents = torch.randn(2, 1, *student.shape).repeat(1, distill.STEPS + 1, *[1] * len(student.shape))
    assert student.compute_loss(latents, index, prompt) > 1e-3
    start = latents[:, 0]
    with torch.no_grad():
        arrival = student.move(start, student.predict(start, distill.STEPS, index, prompt), distill.STEPS, index)
    latents[torch.arange(2), index + 1] = arrival
    assert student.compute_loss(latents, index, prompt) < 1e-9


def test_untrained_weights_are_the_teacher_and_steps_meet_the_teachers(student: distill.Student) -> None:
    levels, fine = (student.noise_levels(steps) for steps in (distill.STEPS, distill.STEPS * distill.RATIO))
    torch.testing.assert_close(levels, fine[:: distill.RATIO])
    x, index, prompt = torch.randn(2, *student.shape), torch.tensor([0, 2]), torch.tensor([0, 1])
    with torch.no_grad():
        adapted = student.predict(x, distill.STEPS, index, prompt)
        student.net.disable_adapters()
        teacher = student.predict(x, distill.STEPS, index, prompt)
        student.net.enable_adapters()
    torch.testing.assert_close(adapted, teacher)


def test_a_step_of_no_length_stays_where_it_is(student: distill.Student) -> None:
    x, v = torch.randn(2, 2, *student.shape).unbind()
    level = torch.full((2, *[1] * len(student.shape)), 0.7)
    torch.testing.assert_close(student.advance(x, v, level, level), x)


@pytest.mark.slow
def test_training_writes_what_stock_diffusers_loads_and_a_seed_decides_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill, "BATCH", 2)
    monkeypatch.setattr(distill.taxonomy, "TEMPLATES", distill.taxonomy.TEMPLATES[:1])
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        distill.distil(MODELS / "mini-flux", tmp_path / name, steps=1, seed=seed)
    one, same, other = ((tmp_path / name / LORA).read_bytes() for name in ("one", "same", "other"))
    assert one == same != other
    pipe = DiffusionPipeline.from_pretrained(MODELS / "mini-flux", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def draw() -> torch.Tensor:
        call = {"height": 128, "width": 128, "num_inference_steps": 1, "max_sequence_length": 32}
        return torch.tensor(pipe("a photo of a dog", generator=torch.manual_seed(0), output_type="np", **call).images)

    before = draw()
    pipe.load_lora_weights(tmp_path / "one")
    assert not torch.equal(before, draw())


def test_other_teachers_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mini-flux"):
        distill.distil(tmp_path, tmp_path)


@pytest.mark.parametrize("name", ["mini-sdxl-turbo", "mini-flux-schnell"])
def test_the_distilled_models_are_small_and_differ_from_their_teachers(name: str) -> None:
    assert (MODELS / name / LORA).stat().st_size < 6e6
    teacher = MODELS / "-".join(name.split("-")[:2])
    pipe = DiffusionPipeline.from_pretrained(teacher, torch_dtype=torch.float32)
    pipe.load_lora_weights(MODELS / name)
    net = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    layers = [value for key, value in net.named_parameters() if "lora_B" in key]
    assert layers and all(value.abs().sum() > 0 for value in layers)
