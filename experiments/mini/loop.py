"""What every training stage shares: a clock-driven schedule, running averages, logging and checkpoints.

All schedules follow the clock, not a number of steps: the stages share one GPU, so nobody can know beforehand how many
steps fit into the time.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from experiments.mini.data import IMAGE_SIZE, load_table

VARIANTS = 4  # versions of each image: two as drawn and shifted, two also scaled, the last one on a colour
_COLOURS = (
    (184, 217, 250),
    (250, 199, 217),
    (178, 223, 168),
    (247, 192, 133),
    (208, 190, 240),
    (250, 230, 130),
    (192, 192, 192),
    (40, 62, 115),
    (24, 24, 26),
)


@dataclass(frozen=True)
class Setting:
    """Where a stage works and how long: `deadline` is a Unix time; `steps` limits a smoke run."""

    work: Path
    deadline: float
    steps: int | None = None
    batch: int | None = None
    device: str = "cuda"
    duty: float = 1.0
    lr: float = 1.0  # factor of the denoisers' learning rates: less than 1 when they continue from earlier weights
    half: bool = False  # bf16 on a CPU that has instructions for it

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    def autocast(self) -> contextlib.AbstractContextManager:
        """bf16 on the GPU; on the CPU only if asked for: without hardware support it takes minutes a step."""
        if self.on_gpu or self.half:
            return torch.autocast("cuda" if self.on_gpu else "cpu", torch.bfloat16)
        return contextlib.nullcontext()

    def batch_size(self, usual: int) -> int:
        return self.batch or usual

    def compiled(self, module: Callable) -> Callable:
        return torch.compile(module) if self.on_gpu else module


def prepare(setting: Setting, seed: int) -> None:
    """Seeds and fast matrix settings."""
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True


def wait_for(*paths: Path, poll: float = 0.5) -> None:
    """Block until other stages have written all the paths."""
    while not all(p.exists() for p in paths):
        time.sleep(poll)


def write_json(path: Path, content: dict) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1))
    os.replace(temporary, path)


def load_rows(folder: Path, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Image and caption of every training row, two int64 [R]: a uniform row is a draw of the training distribution."""
    rows = np.load(folder / "rows.npz")
    return torch.from_numpy(rows["image"]).to(device), torch.from_numpy(rows["caption"]).to(device)


class Images:
    """The artwork on the device, and its four versions, each the same whenever it is asked for.

    Args:
        folder: data folder.
        device: to hold the images (uint8 RGBA [N, 128, 128, 4]).
    """

    def __init__(self, folder: Path, device: str) -> None:
        wait_for(folder / "images.npy")
        self.rgba = torch.from_numpy(np.load(folder / "images.npy")).to(device)
        self.row_image, self.row_caption = load_rows(folder, device)
        self.emoji, _ = load_table(folder)
        n = len(self.rgba)
        g = torch.Generator().manual_seed(17)
        scale = 0.86 + 0.18 * torch.rand(n, VARIANTS, generator=g)
        scale[:, :2] = 1.0
        shift = torch.randint(-5, 6, (n, VARIANTS, 2), generator=g).float()
        shift[:, 0] = 0
        colour = torch.full((n, VARIANTS, 3), 255.0)
        colour[:, 3] = torch.tensor(_COLOURS).float()[torch.randint(len(_COLOURS), (n,), generator=g)]
        self.scale, self.shift, self.colour = scale.to(device), shift.to(device), colour.to(device)
        self.held_out = torch.tensor([i for i, e in enumerate(self.emoji) if e.held_out])

    def draw(self, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images, captions and versions of a random batch: three int64 [n]."""
        row = torch.randint(len(self.row_image), (n,), device=self.rgba.device)
        return (
            self.row_image[row],
            self.row_caption[row],
            torch.randint(VARIANTS, (n,), device=self.rgba.device),
        )

    def render(self, image: torch.Tensor, variant: torch.Tensor) -> torch.Tensor:
        """RGB in [-1, 1], float32 [n, 3, 128, 128]."""
        rgba = self.rgba[image].permute(0, 3, 1, 2).float() / 255
        alpha = rgba[:, 3:]
        layers = torch.cat([rgba[:, :3] * alpha, alpha], 1)
        scale, shift = self.scale[image, variant], self.shift[image, variant]
        # A sampling grid: output pixel -> artwork pixel, both in [-1, 1]. Scale 1 and whole shifts stay exact.
        theta = torch.zeros(len(image), 2, 3, device=rgba.device)
        theta[:, 0, 0] = theta[:, 1, 1] = 1 / scale
        theta[:, :, 2] = -shift * (2 / IMAGE_SIZE) / scale[:, None]
        grid = F.affine_grid(theta, list(layers.shape), align_corners=False)
        layers = F.grid_sample(layers, grid, align_corners=False)
        background = self.colour[image, variant][:, :, None, None] / 255
        return (layers[:, :3] + (1 - layers[:, 3:]) * background) * 2 - 1


class Ema:
    """Running average of parameters; its horizon grows with the steps up to `decay`."""

    def __init__(self, modules: Iterable[torch.nn.Module], decay: float) -> None:
        self.live = [p for m in modules for p in m.parameters()]
        self.average = [p.detach().clone() for p in self.live]
        self.decay, self.steps = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (12 + self.steps))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.live], 1 - decay)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """The averaged parameters in the modules, for the time of the block."""
        saved = [p.detach().clone() for p in self.live]
        with torch.no_grad():
            torch._foreach_copy_(self.live, self.average)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.live, saved)


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates for matrices (Jordan et al. 2024), batched over equal shapes.

    Small models spend their time launching kernels: stacking all matrices of one shape makes the Newton-Schulz
    iteration a handful of batched products. Updates are scaled to a root mean square of 0.2 (Liu et al. 2025,
    arXiv 2502.16982), so that the learning rate means about the same as AdamW's.

    Args:
        params: matrices, and kernels of convolutions, which count as matrices [out, in * height * width].
        lr: learning rate.
        momentum: of the Nesterov average, in [0, 1).
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(list(params), {"lr": lr, "momentum": momentum})
        self.stacks: dict[tuple[int, ...], list[torch.nn.Parameter]] = {}
        for p in self.param_groups[0]["params"]:
            if p.ndim < 2:
                raise ValueError(
                    f"expected matrices or kernels, got a parameter of shape {tuple(p.shape)}; give it to AdamW"
                )
            self.stacks.setdefault(tuple(p.shape), []).append(p)
        self.buffers = {s: torch.zeros(len(ps), *s, device=ps[0].device) for s, ps in self.stacks.items()}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        lr, momentum = self.param_groups[0]["lr"], self.param_groups[0]["momentum"]
        for shape, params in self.stacks.items():
            grad = torch.stack([p.grad for p in params]).float()
            buffer = self.buffers[shape].mul_(momentum).add_(grad, alpha=1 - momentum)
            flat = grad.lerp(buffer, momentum).reshape(len(params), shape[0], -1)
            update = orthogonalise(flat) * (-lr * 0.2 * max(flat.shape[1:]) ** 0.5)
            torch._foreach_add_(params, list(update.reshape(grad.shape).to(params[0].dtype).unbind(0)))


def orthogonalise(stack: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Approximately the nearest semi-orthogonal matrices of a stack [K, M, N], by Newton-Schulz (quintic)."""
    x = stack.bfloat16() if stack.is_cuda else stack
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return (x if wide else x.mT).to(stack.dtype)


def split_parameters(*modules: torch.nn.Module) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """Matrices and kernels inside the blocks, for Muon; embeddings, norms, modulation and ends, for AdamW."""
    matrices, rest = [], []
    for module in modules:
        for name, p in module.named_parameters():
            inside = any(part in name for part in ("blocks.", ".block.", "mid_block.", ".layers."))
            apart = any(part in name for part in ("norm", "relative_attention_bias", "time_emb", "guidance_embedder"))
            (matrices if p.ndim >= 2 and inside and not apart else rest).append(p)
    return matrices, rest


def cosine(progress: float, warmup: float = 0.02, floor: float = 0.01) -> float:
    """Learning-rate factor at a progress in [0, 1]: linear warm-up, then half a cosine down to `floor`."""
    if progress < warmup:
        return max(progress, 1e-3) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


class Run:
    """Iterates over the steps of a stage until its time is up, setting learning rates, logging, checkpointing.

    Args:
        name: for the log.
        setting: deadline, step limit, duty.
        optimizers: whose groups' learning rates are scaled by `cosine`; each group keeps its peak in "peak".
        save: called about once a minute and at the end.
    """

    def __init__(
        self,
        name: str,
        setting: Setting,
        optimizers: list[torch.optim.Optimizer],
        save: Callable[[Run], None],
    ) -> None:
        self.name, self.setting, self.optimizers, self.save = name, setting, optimizers, save
        self.step, self.losses, self.started = 0, {}, time.time()
        for o in optimizers:
            for group in o.param_groups:
                group.setdefault("peak", group["lr"])
        self.history: list[dict] = []

    def progress(self) -> float:
        if self.setting.steps:
            return min(1.0, self.step / self.setting.steps)
        return min(1.0, (time.time() - self.started) / max(1e-6, self.setting.deadline - self.started))

    def log(self, **losses: torch.Tensor) -> None:
        """Add to running sums on the device, without waiting for it."""
        for key, value in losses.items():
            total, n = self.losses.get(key, (0, 0))
            self.losses[key] = (total + value.detach().float(), n + 1)

    def report(self, since: tuple[float, int]) -> None:
        seconds, step = time.time() - since[0], self.step - since[1]
        means = {k: round(float(total) / n, 5) for k, (total, n) in self.losses.items()}
        self.losses = {}
        line = {
            "step": self.step,
            "progress": round(self.progress(), 3),
            "it_s": round(step / max(seconds, 1e-6), 2),
            **means,
        }
        self.history.append(line)
        print(f"[{time.strftime('%H:%M:%S')}] {self.name} {line}", flush=True)
        if not all(math.isfinite(v) for v in means.values()):
            raise FloatingPointError(f"{self.name}: a loss is not finite at step {self.step}; lower the learning rate")

    def __iter__(self) -> Iterator[int]:
        self.started = time.time()
        since, saved = (self.started, 0), self.started
        while self.progress() < 1 or self.step == 0:
            tick = time.time()
            factor = cosine(self.progress())
            for o in self.optimizers:
                for group in o.param_groups:
                    group["lr"] = group["peak"] * factor
            yield self.step
            self.step += 1
            if self.setting.duty < 1 and not self.setting.steps:
                if self.setting.on_gpu:
                    torch.cuda.synchronize()
                time.sleep((time.time() - tick) * (1 / self.setting.duty - 1))
            elif self.setting.on_gpu and self.step % 8 == 0:
                torch.cuda.synchronize()  # the clock must see the device's time, not that of a queue running ahead
            if time.time() - since[0] > 20:
                self.report(since)
                since = (time.time(), self.step)
            if time.time() - saved > 60:
                self.save(self)
                saved = time.time()
        self.report(since)
        self.save(self)

    def summary(self) -> dict:
        """For the model card: steps, seconds, device and the last losses."""
        device = torch.cuda.get_device_name() if self.setting.on_gpu else "CPU"
        return {
            "steps": self.step,
            "seconds": round(time.time() - self.started, 1),
            "device": device,
            "last": self.history[-1] if self.history else {},
            "history": self.history,
        }
