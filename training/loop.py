"""What every training stage shares: a clock-driven schedule, running averages, logging and checkpoints.

All schedules follow the clock, not a number of steps: the stages share one GPU, so nobody can know beforehand how many
steps fit into the time.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.training_utils import EMAModel

from eval.files import write_json
from training.data import load_table
from training.sources import IMAGE_SIZE

VARIANT_SHARE = (0.6, 0.4)  # how often each version of an image is drawn: as it is, and shifted by up to five pixels
VARIANTS = len(VARIANT_SHARE)


@dataclass(frozen=True)
class Recipe:
    """What `training.ablation` varies; as it is here, the shipped weights were trained.

    Attributes:
        muon: orthogonalised updates for the matrices of the blocks; False: AdamW for everything.
        times: how the training times are drawn, "uniform" or "noisy" (see `draw_times`); None: as each denoiser does.
        dropout: share of captions that are left empty; None: as each denoiser does.
    """

    muon: bool = True
    times: str | None = None
    dropout: float | None = None


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
    compile: bool = False  # on a CPU too: 90 seconds and a C++ compiler for 13 % more images a second
    recipe: Recipe = Recipe()

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def dtype(self) -> torch.dtype:
        """bf16 on the GPU; on the CPU only if asked for: without hardware support it takes minutes a step."""
        return torch.bfloat16 if self.on_gpu or self.half else torch.float32

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.dtype is torch.bfloat16:
            return torch.autocast("cuda" if self.on_gpu else "cpu", self.dtype)
        return contextlib.nullcontext()

    def compiled(self, module: Callable) -> Callable:
        return torch.compile(module) if self.on_gpu or self.compile else module


def prepare(setting: Setting, seed: int) -> None:
    """Seeds and fast matrix settings."""
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True


def wait_for(*paths: Path, poll: float = 0.5) -> None:
    """Block until other stages have written all the paths."""
    while not all(p.exists() for p in paths):
        time.sleep(poll)


def load_rows(folder: Path, device: str, held_out: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Image and caption of every training row, two int64 [R]: a uniform row is a draw of the training distribution.

    `held_out`: one row for each image that no training row shows.
    """
    rows, prefix = np.load(folder / "rows.npz"), "held_" if held_out else ""
    return torch.from_numpy(rows[prefix + "image"]).to(device), torch.from_numpy(rows[prefix + "caption"]).to(device)


def fixed_rows(folder: Path, device: str, n: int = 256) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Images and captions that a stage measures its loss on: "fixed" are training rows, "held_out" are not."""
    pick = torch.Generator().manual_seed(0)
    found = {}
    for name in ("fixed", "held_out"):
        image, caption = load_rows(folder, device, held_out=name == "held_out")
        row = torch.randperm(len(image), generator=pick)[:n].to(device)
        if len(row):
            found[name] = image[row], caption[row]
    return found


# Of the logit of "noisy" times. Above 0 favours noise, where the shape is decided: half of them are above 0.7.
TIME_MEAN, TIME_SD = 0.9, 1.1


def draw_times(n: int, device: str | torch.device, kind: str) -> torch.Tensor:
    """Training times in (0, 1), 1 being pure noise: [n], "uniform", or logit-normal and "noisy"."""
    if kind == "uniform":
        return torch.rand(n, device=device)
    return torch.sigmoid(TIME_MEAN + TIME_SD * torch.randn(n, device=device))


def draw_variants(n: int, device: str | torch.device) -> torch.Tensor:
    """Versions of images, int64 [n]."""
    return torch.tensor(VARIANT_SHARE, device=device).multinomial(n, replacement=True)


class Images:
    """The artwork on the device, and its versions, each the same whenever it is asked for.

    Args:
        folder: data folder.
        device: to hold the images (uint8 RGBA [N, 128, 128, 4]).
    """

    def __init__(self, folder: Path, device: str) -> None:
        wait_for(folder / "images.npy")
        self.rgba = torch.from_numpy(np.load(folder / "images.npy")).to(device)
        self.row_image, self.row_caption = load_rows(folder, device)
        self.emoji, _ = load_table(folder)
        shift = torch.randint(-5, 6, (len(self.rgba), VARIANTS, 2), generator=torch.Generator().manual_seed(17))
        shift[:, 0] = 0
        self.shift = shift.to(device)
        self.held_out = torch.tensor([i for i, e in enumerate(self.emoji) if e.held_out])

    def draw(self, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images, captions and versions of a random batch: three int64 [n]."""
        row = torch.randint(len(self.row_image), (n,), device=self.rgba.device)
        return self.row_image[row], self.row_caption[row], draw_variants(n, self.rgba.device)

    def render(self, image: torch.Tensor, variant: torch.Tensor) -> torch.Tensor:
        """RGB on white in [-1, 1], float32 [n, 3, 128, 128]."""
        rgba = self.rgba[image].permute(0, 3, 1, 2).float() / 255
        row = torch.arange(IMAGE_SIZE, device=rgba.device)
        y, x = (row - self.shift[image, variant, axis, None] for axis in (1, 0))
        inside = ((y >= 0) & (y < IMAGE_SIZE))[:, :, None] & ((x >= 0) & (x < IMAGE_SIZE))[:, None]
        y, x = y.clamp(0, IMAGE_SIZE - 1), x.clamp(0, IMAGE_SIZE - 1)
        n = torch.arange(len(rgba), device=rgba.device)[:, None, None]
        rgba = rgba.permute(0, 2, 3, 1)[n, y[:, :, None], x[:, None]].permute(0, 3, 1, 2) * inside[:, None]
        return (rgba[:, :3] * rgba[:, 3:] + (1 - rgba[:, 3:])) * 2 - 1


class Ema(EMAModel):
    """Running average of all parameters of some modules.

    After n steps the decay is (1 + n) / (12 + n), and `decay` at most: the horizon grows with the training.
    """

    def __init__(self, modules: Iterable[torch.nn.Module], decay: float) -> None:
        self.live = [p for m in modules for p in m.parameters()]
        super().__init__(
            self.live, decay, use_ema_warmup=True, inv_gamma=11, power=1, update_after_step=-2, foreach=True
        )

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """The averaged parameters in the modules, for the time of the block."""
        self.store(self.live)
        self.copy_to(self.live)
        try:
            yield
        finally:
            self.restore(self.live)


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates for matrices (Jordan et al. 2024), batched over equal shapes.

    torch.optim.Muon takes no kernels of convolutions, of which the UNet has many, and one matrix at a time. Small
    models spend their time launching kernels: stacking all matrices of one shape makes the Newton-Schulz iteration a
    handful of batched products. Updates are scaled to a root mean square of 0.2 (Liu et al. 2025, arXiv 2502.16982),
    so that the learning rate means about the same as AdamW's.

    Args:
        params: matrices, and kernels of convolutions, which count as matrices [out, in * height * width].
        lr: learning rate.
        dtype: of the iteration; bfloat16 is enough where the hardware has it.
        momentum: of the Nesterov average, in [0, 1).
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float,
        dtype: torch.dtype = torch.float32,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(list(params), {"lr": lr, "momentum": momentum})
        self.dtype = dtype
        self.stacks: dict[tuple[int, ...], list[torch.nn.Parameter]] = {}
        for p in self.param_groups[0]["params"]:
            if p.ndim < 2:
                raise ValueError(
                    f"expected matrices or kernels, got a parameter of shape {tuple(p.shape)}; give it to AdamW"
                )
            self.stacks.setdefault(tuple(p.shape), []).append(p)
        for shape, stack in self.stacks.items():  # under the first of the stack, so that `state_dict` holds it
            self.state[stack[0]]["momentum"] = torch.zeros(len(stack), *shape, device=stack[0].device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        lr, momentum = self.param_groups[0]["lr"], self.param_groups[0]["momentum"]
        for shape, params in self.stacks.items():
            grad = torch.stack([p.grad for p in params]).float()
            buffer = self.state[params[0]]["momentum"].mul_(momentum).add_(grad, alpha=1 - momentum)
            flat = grad.lerp(buffer, momentum).reshape(len(params), shape[0], -1)
            update = orthogonalise(flat, self.dtype) * (-lr * 0.2 * max(flat.shape[1:]) ** 0.5)
            torch._foreach_add_(params, list(update.reshape(grad.shape).to(params[0].dtype).unbind(0)))


def orthogonalise(stack: torch.Tensor, dtype: torch.dtype = torch.float32, steps: int = 5) -> torch.Tensor:
    """Approximately the nearest semi-orthogonal matrices of a stack [K, M, N], by Newton-Schulz (quintic)."""
    x = stack.to(dtype)
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


def make_optimizers(
    setting: Setting, *modules: torch.nn.Module, muon: float, adam: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of all modules and AdamW for the rest, with these peak learning rates."""
    matrices, rest = split_parameters(*modules)
    if not setting.recipe.muon:
        matrices, rest = [], matrices + rest
    optimizers = [Muon(matrices, lr=muon * setting.lr, dtype=setting.dtype)] if matrices else []
    return [
        *optimizers,
        torch.optim.AdamW(rest, lr=adam * setting.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=setting.on_gpu),
    ]


COOLDOWN = 0.3  # last share of the time, in which the learning rate falls to zero


def trapezoid(progress: float, warmup: float = 0.02) -> float:
    """Learning-rate factor at a progress in [0, 1]: linear warm-up, 1, then linearly to 0 in the last `COOLDOWN`.

    A training that goes on later starts from where the factor was still 1; half a cosine would have to be known to its
    end beforehand.
    """
    return min(1.0, max(progress, 1e-3) / warmup, max(1 - progress, 0.01) / COOLDOWN)


STATE_SECONDS = 300  # between two states of a training on disk, each with a measurement


class Run:
    """Iterates over the steps of a stage until its time is up: learning rates, averaged weights, log, checkpoints.

    Everything that the training is goes into `work/NAME.state.pt` every five minutes until the cool-down begins; where
    that file is found, the stage goes on from it.

    Args:
        name: for the log and the state.
        setting: deadline, step limit, duty.
        models: what is trained; what of it needs no gradient stays as it is.
        optimizers: whose learning rates are peaks, scaled by `trapezoid`.
        decay: of the running average of the weights, in [0, 1).
        save: writes the models, called with the averaged weights in them about once a minute and at the end.
        measure: losses that no training step sees, of the averaged weights, logged every five minutes.
    """

    def __init__(
        self,
        name: str,
        setting: Setting,
        models: Sequence[torch.nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
        decay: float,
        save: Callable[[], None],
        measure: Callable[[], dict[str, float]] = dict,
    ) -> None:
        self.name, self.setting, self.optimizers, self.save, self.measure = name, setting, optimizers, save, measure
        self.ema = Ema(models, decay)
        self.parts = [*models, *optimizers, self.ema]
        self.peaks = [group["lr"] for o in optimizers for group in o.param_groups]
        self.step, self.losses, self.started, self.seconds = 0, {}, time.time(), 0.0
        self.history: list[dict] = []
        self.state = setting.work / f"{name}.state.pt"
        if self.state.exists():
            self._load()

    def _load(self) -> None:
        saved = torch.load(self.state, map_location=self.setting.device)
        for part, state in zip(self.parts, saved["parts"], strict=True):
            part.load_state_dict(state)
        self.step, self.seconds, self.history = saved["step"], saved["seconds"], saved["history"]
        print(f"{self.name} goes on from step {self.step}", flush=True)

    def _store(self) -> None:
        content = {
            "parts": [part.state_dict() for part in self.parts],
            "step": self.step,
            "seconds": self.seconds + time.time() - self.started,
            "history": self.history,
        }
        temporary = self.state.with_suffix(".tmp")
        torch.save(content, temporary)
        os.replace(temporary, self.state)

    def progress(self) -> float:
        if self.setting.steps:
            return min(1.0, self.step / self.setting.steps)
        return min(1.0, (time.time() - self.started) / max(1e-6, self.setting.deadline - self.started))

    def descend(self, loss: torch.Tensor) -> None:
        """One step of all optimizers down the loss, with gradients of norm 1 at most, and of the running average."""
        for o in self.optimizers:
            o.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.ema.live, 1.0)
        for o in self.optimizers:
            o.step()
        self.ema.step(self.ema.live)

    def log(self, **losses: torch.Tensor) -> None:
        """Add to running sums on the device, without waiting for it."""
        for key, value in losses.items():
            total, n = self.losses.get(key, (0, 0))
            self.losses[key] = (total + value.detach().float(), n + 1)

    def report(self, since: tuple[float, int], measure: bool = False) -> None:
        """Print and keep the mean losses since a time and step."""
        seconds, step = time.time() - since[0], self.step - since[1]
        means = {k: float(total) / n for k, (total, n) in self.losses.items()}
        self.losses = {}
        if not all(map(math.isfinite, means.values())):
            raise FloatingPointError(f"{self.name}: a loss is not finite at step {self.step}; lower the learning rate")
        if measure:
            with self.ema.swapped():
                means |= self.measure()
        line = {"step": self.step, "progress": round(self.progress(), 3), "it_s": round(step / max(seconds, 1e-6), 2)}
        self.history.append(line | {k: round(v, 5) for k, v in means.items()})
        print(f"[{time.strftime('%H:%M:%S')}] {self.name} {self.history[-1]}", flush=True)

    def _save(self) -> None:
        with self.ema.swapped():
            self.save()

    def __iter__(self) -> Iterator[int]:
        self.started = time.time()
        since, saved, stored, first = (self.started, self.step), self.started, self.started, self.step
        while self.progress() < 1 or self.step == first:
            tick = time.time()
            factor = trapezoid(self.progress())
            groups = [group for o in self.optimizers for group in o.param_groups]
            for group, peak in zip(groups, self.peaks, strict=True):
                group["lr"] = peak * factor
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
                self._save()
                saved = time.time()
            if time.time() - stored >= STATE_SECONDS and self.progress() < 1 - COOLDOWN:
                self._store()
                self.report(since, measure=True)
                since, stored = (time.time(), self.step), time.time()
        self.report(since, measure=True)
        self._save()

    def write_card(self, folder: Path, **facts: object) -> None:
        """Write for the model card: steps, seconds, device, the last losses, and the facts."""
        card = {
            "steps": self.step,
            "seconds": round(self.seconds + time.time() - self.started, 1),
            "device": torch.cuda.get_device_name() if self.setting.on_gpu else "CPU",
            "last": self.history[-1],
            "history": self.history,
        }
        write_json(folder / "card.json", card | facts)
