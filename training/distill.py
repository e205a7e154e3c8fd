"""Distil a small model to four steps without guidance, and write what it learned as LoRA weights.

The recipe is progressive distillation (Salimans and Ho 2022, arXiv 2202.00512) in one round, with guidance in the
targets (Meng et al. 2023, arXiv 2210.03142). The teacher draws from noise with 12 steps. The student learns to make
every three of them in one, so it needs no images. It starts as its teacher: LoRA weights start as the zero function.
"""

import abc
import time
from pathlib import Path

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionXLPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from training import flux, taxonomy, unet

#: Steps of the student, and steps of its teacher for each of them.
STEPS, RATIO = 4, 3
#: Guidance scale of the teacher.
SCALE = 5.0
#: Rows in a step, and in a call of the teacher.
BATCH = 32
#: Peak learning rate, and the largest decay of the averaged weights.
RATE, DECAY = 1e-3, 0.99
#: Share of the time that the teacher may take.
TEACHER_SHARE = 0.35
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")


class Student(abc.ABC):
    """A denoiser with LoRA weights; without them it is the teacher.

    Args:
        pipe: the teacher's pipeline.
        prompts: to encode once.
    """

    #: Shape of a latent, rank of the LoRA weights, and the layers that have them.
    shape: tuple[int, ...]
    rank: int
    targets: tuple[str, ...]

    def __init__(self, pipe: DiffusionPipeline, prompts: list[str]) -> None:
        self.pipe = pipe
        with torch.no_grad():
            self.states, self.pooled = self.encode(prompts)
        self.net = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
        self.net.requires_grad_(False)
        self.net.add_adapter(LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=list(self.targets)))
        self.parameters = [parameter for parameter in self.net.parameters() if parameter.requires_grad]

    @abc.abstractmethod
    def encode(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode prompts: states [N, 32, D] and pooled [N, 128]."""

    @abc.abstractmethod
    def noise_levels(self, steps: int) -> torch.Tensor:
        """Return the noise levels of a schedule [steps + 1], falling to 0."""

    @abc.abstractmethod
    def predict(self, x: torch.Tensor, steps: int, index: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """Predict the student's velocity at a step of each row, shaped as x."""

    def predict_guided(self, x: torch.Tensor, steps: int, index: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """Predict the teacher's velocity with guidance."""
        return self.predict(x, steps, index, prompt)

    @abc.abstractmethod
    def advance(self, x: torch.Tensor, v: torch.Tensor, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        """Make one deterministic step between two noise levels."""

    def move(self, x: torch.Tensor, v: torch.Tensor, steps: int, index: torch.Tensor) -> torch.Tensor:
        """Make the step `index` of a schedule, one index a row."""
        levels = self.noise_levels(steps).view(-1, *[1] * (x.ndim - 1))
        return self.advance(x, v, levels[index], levels[index + 1])

    @torch.no_grad()
    def draw_trajectories(self, prompt: torch.Tensor) -> torch.Tensor:
        """Draw the teacher's latents at the student's steps, from noise to image: [N, STEPS + 1, ...]."""
        x = torch.randn(len(prompt), *self.shape)
        latents, steps = [x], STEPS * RATIO
        self.net.disable_adapters()
        for step in range(steps):
            index = torch.full((len(x),), step)
            x = self.move(x, self.predict_guided(x, steps, index, prompt), steps, index)
            if (step + 1) % RATIO == 0:
                latents.append(x)
        self.net.enable_adapters()
        return torch.stack(latents, 1)

    def compute_loss(self, latents: torch.Tensor, index: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """Return the mean squared distance of the student's steps from where the teacher arrives."""
        rows = torch.arange(len(latents))
        x, goal = latents[rows, index], latents[rows, index + 1]
        return (self.move(x, self.predict(x, STEPS, index, prompt), STEPS, index) - goal).square().mean()

    def save(self, folder: Path) -> None:
        """Write the LoRA weights in half precision, as `load_lora_weights` reads them."""
        weights = {name: value.half() for name, value in get_peft_model_state_dict(self.net).items()}
        part = "unet" if hasattr(self.pipe, "unet") else "transformer"
        self.pipe.save_lora_weights(folder, **{f"{part}_lora_layers": weights})


class UNetStudent(Student):
    """The student of mini-sdxl; noise levels are angles, 0 for an image and half of pi for noise."""

    shape, rank = (16, 16, 16), 64
    targets = (*ATTENTION, "proj_in", "proj_out", "time_emb_proj", "linear_1", "linear_2")

    def __init__(self, pipe: StableDiffusionXLPipeline, prompts: list[str]) -> None:
        pipe.unet.to(memory_format=torch.channels_last)
        self.signal = DDPMScheduler.from_config(pipe.scheduler.config).alphas_cumprod.clamp(0, 1).sqrt()
        super().__init__(pipe, prompts)

    def encode(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        states, _, pooled, _ = self.pipe.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
        return states, pooled

    def timesteps(self, steps: int) -> torch.Tensor:
        return torch.tensor([round(1000 - 1000 * step / steps) - 1 for step in range(steps)])

    def noise_levels(self, steps: int) -> torch.Tensor:
        return torch.cat([torch.arccos(self.signal[self.timesteps(steps)]), torch.zeros(1)])

    def predict(self, x: torch.Tensor, steps: int, index: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        return unet.predict(self.net, x, self.timesteps(steps)[index], self.states[prompt], self.pooled[prompt])

    def predict_guided(self, x: torch.Tensor, steps: int, index: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        states, pooled = self.states[prompt], self.pooled[prompt]
        doubled = [torch.cat([part, part]) for part in (x, self.timesteps(steps)[index])]
        texts = [torch.cat([torch.zeros_like(part), part]) for part in (states, pooled)]
        return torch.lerp(*unet.predict(self.net, *doubled, *texts).chunk(2), SCALE)

    def advance(self, x: torch.Tensor, v: torch.Tensor, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        return (start - end).cos() * x - (start - end).sin() * v


class FluxStudent(Student):
    """The student of mini-flux; the guidance embedding stays at the teacher's scale."""

    shape, rank = (64, 64), 48
    targets = (
        *ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context.net.0.proj",
        "ff_context.net.2", "proj_mlp", "norm.linear", "norm1.linear", "norm1_context.linear",
        *(f"single_transformer_blocks.{block}.proj_out" for block in range(6)),
    )  # fmt: skip

    def encode(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        states, pooled, _ = self.pipe.encode_prompt(prompts, prompts, device="cpu", max_sequence_length=32)
        return states, pooled

    def noise_levels(self, steps: int) -> torch.Tensor:
        levels, shift = torch.linspace(1, 1 / steps, steps), self.pipe.scheduler.config.shift
        return torch.cat([shift * levels / (1 + (shift - 1) * levels), torch.zeros(1)])

    def predict(self, x: torch.Tensor, steps: int, index: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        times, scale = self.noise_levels(steps)[index], torch.full((len(x),), SCALE)
        return flux.predict(self.net, x, times, self.states[prompt], self.pooled[prompt], scale)

    def advance(self, x: torch.Tensor, v: torch.Tensor, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        return x + (end - start) * v


STUDENTS = {"mini-sdxl": UNetStudent, "mini-flux": FluxStudent}


def make_student(teacher: Path) -> Student:
    """Load a teacher, `mini-sdxl` or `mini-flux` by the folder's name, and give it LoRA weights."""
    if teacher.name not in STUDENTS:
        raise ValueError(f"the teacher must be a folder named {' or '.join(STUDENTS)}, got {teacher}")
    pipe = DiffusionPipeline.from_pretrained(teacher, torch_dtype=torch.float32)
    names = [*taxonomy.EVALUATED, *taxonomy.DEVELOPMENT, *taxonomy.DESIGNS]
    return STUDENTS[teacher.name](pipe, [f"{template} {name}" for name in names for template in taxonomy.TEMPLATES])


def distil(
    teacher: Path, out: Path, minutes: float = 5.0, steps: int | None = None, bf16: bool = False, seed: int = 0
) -> None:
    """Distil a teacher on the CPU and write `pytorch_lora_weights.safetensors` into a folder.

    Args:
        teacher: folder of mini-sdxl or mini-flux.
        out: folder of the LoRA weights.
        minutes: of training; the teacher draws new trajectories in the first 70 % of them.
        steps: limit of the steps, in place of the time: one new batch of trajectories a step.
        bf16: compute in bf16, on a CPU that has instructions for it.
        seed: of the weights and the noise.
    """
    torch.manual_seed(seed)
    student, data, step, drawing = make_student(teacher), [], 0, 0.0
    optimizer = torch.optim.AdamW(student.parameters, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)
    average = [parameter.detach().clone() for parameter in student.parameters]
    student.net.train()
    start = reported = time.time()
    while (share := step / steps if steps else (time.time() - start) / (60 * minutes)) < 1:
        enough = drawing > TEACHER_SHARE * (time.time() - start) or share > 0.7
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if not data or steps or not enough:
                before, prompt = time.time(), torch.randint(len(student.states), (BATCH,))
                data += zip(student.draw_trajectories(prompt), prompt, strict=True)
                drawing += time.time() - before
            rows = [data[row] for row in torch.randint(len(data), (BATCH,)).tolist()]
            latents, prompts = (torch.stack(part) for part in zip(*rows, strict=True))
            loss = student.compute_loss(latents, torch.randint(STEPS, (BATCH,)), prompts)
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 10, max(0.02, (1 - share) / 0.4))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters, 1.0)
        optimizer.step()
        step += 1
        decay = min(DECAY, (1 + step) / (12 + step))
        with torch.no_grad():
            torch._foreach_lerp_(average, student.parameters, 1 - decay)
        if time.time() - reported > 20:
            reported = time.time()
            print(f"step {step}, loss {loss.item():.5f}, {len(data)} trajectories", flush=True)
    with torch.no_grad():
        torch._foreach_copy_(student.parameters, average)
    student.save(out)
