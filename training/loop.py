"""Arguments, optimizers, schedule, running averages and checkpoints of every training stage.

Schedules follow the clock, not a number of steps: the stages share a device, so nobody can know beforehand how many
steps fit into the time.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel

from eval.files import write_json

#: Seconds between two lines of the log, and between two checkpoints.
REPORT_SECONDS, CHECKPOINT_SECONDS = 20, 300
#: Last share of the time, in which the learning rate falls to zero.
COOLDOWN = 0.3


@dataclass(frozen=True)
class TrainingArguments:
    """Arguments of a stage: folder, time and recipe.

    Attributes:
        work: folder of the data, the other stages' results and the checkpoints.
        hours: of training, interruptions not counted; None: until `deadline`.
        deadline: Unix time at which the stage must end.
        steps: limit of the steps, for trying out.
        batch: rows in a step; None: as each stage does.
        device: torch device.
        lr: factor of the denoisers' learning rates; below 1 where they continue from earlier weights.
        bf16: on a CPU too; without instructions for it a step takes minutes.
        compile: on a CPU too: 90 seconds and a C++ compiler for 13 % more images a second.
        muon: orthogonalised updates for the matrices of the blocks; False: AdamW for everything.
        times: "uniform" or "noisy" training times (`rows.draw_times`); None: as each denoiser does.
        dropout: share of captions that are left empty; None: as each denoiser does.
    """

    work: Path
    hours: float | None = None
    deadline: float = 0.0
    steps: int | None = None
    batch: int | None = None
    device: str = "cuda"
    lr: float = 1.0
    bf16: bool = False
    compile: bool = False
    muon: bool = True
    times: str | None = None
    dropout: float | None = None

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    def autocast(self) -> contextlib.AbstractContextManager:
        """Compute in bf16 within the block, where that is chosen."""
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.on_gpu or self.bf16)

    def compiled(self, module: Callable) -> Callable:
        return torch.compile(module) if self.on_gpu or self.compile else module

    def seed(self, seed: int) -> None:
        """Seed torch and choose fast matrix products."""
        torch.manual_seed(seed)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True


def as_matrix(kernel: torch.Tensor) -> torch.Tensor:
    """View a matrix or kernel [out, ...] as a matrix [out, rest], columns in the order of memory, whatever that is."""
    columns = kernel[0].numel()
    return kernel.as_strided((len(kernel), columns), (columns, 1))


class Muon(torch.optim.Muon):
    """Muon (Jordan et al. 2024) for matrices and, as torch's takes none, for kernels of convolutions.

    Updates are scaled to a root mean square of 0.2 (Liu et al. 2025, arXiv 2502.16982), so that the learning rate means
    about the same as AdamW's. The order of a matrix's columns makes no difference to an orthogonalised update.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], lr: float) -> None:
        self.parameters = list(parameters)
        matrices = [as_matrix(parameter.detach()) for parameter in self.parameters]
        super().__init__(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    def step(self, closure: None = None) -> None:
        for matrix, parameter in zip(self.param_groups[0]["params"], self.parameters, strict=True):
            matrix.grad = as_matrix(parameter.grad)
        super().step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def split_parameters(*modules: torch.nn.Module) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """Split into matrices and kernels inside the blocks, for Muon, and embeddings, norms, modulation and ends."""
    matrices, rest = [], []
    for module in modules:
        for name, parameter in module.named_parameters():
            inside = any(part in name for part in ("blocks.", ".block.", "mid_block.", ".layers."))
            apart = any(part in name for part in ("norm", "relative_attention_bias", "time_emb", "guidance_embedder"))
            (matrices if parameter.ndim >= 2 and inside and not apart else rest).append(parameter)
    return matrices, rest


def make_optimizers(
    arguments: TrainingArguments, *modules: torch.nn.Module, muon: float, adam: float
) -> list[torch.optim.Optimizer]:
    """Make Muon for the matrices of all modules and AdamW for the rest, with these peak learning rates."""
    matrices, rest = split_parameters(*modules)
    if not arguments.muon:
        matrices, rest = [], matrices + rest
    optimizers = [Muon(matrices, muon * arguments.lr)] if matrices else []
    adamw = torch.optim.AdamW(rest, lr=adam * arguments.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=arguments.on_gpu)
    return [*optimizers, adamw]


def trapezoid(progress: float, warmup: float = 0.02) -> float:
    """Compute the factor of the learning rate at a progress in [0, 1].

    It rises linearly in the warm-up, stays at 1, and falls linearly to 0 in the last `COOLDOWN`: unlike a cosine, the
    end need not be known at the start.
    """
    return min(1.0, max(progress, 1e-3) / warmup, max(1 - progress, 0.01) / COOLDOWN)


class Run:
    """The steps of a stage until its time is up: learning rates, averaged weights, log and checkpoints.

    Everything that the training consists of goes into `work/NAME.state.pt` every five minutes and at the end; a stage
    that finds this file goes on from it.

    Args:
        name: for the log and the checkpoint.
        arguments: time, step limit and device.
        models: what is trained; parameters that need no gradient stay as they are.
        optimizers: their learning rates are peaks, scaled by `trapezoid`.
        decay: of the running average of the weights, in [0, 1).
        save: writes the models, called with the averaged weights in them at every checkpoint.
        measure: losses that no training step sees, of the averaged weights, logged at every checkpoint.
    """

    def __init__(
        self,
        name: str,
        arguments: TrainingArguments,
        models: Sequence[torch.nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
        decay: float,
        save: Callable[[], None],
        measure: Callable[[], dict[str, float]] = dict,
    ) -> None:
        self.name, self.arguments, self.save, self.measure = name, arguments, save, measure
        self.parameters = [parameter for model in models for parameter in model.parameters()]
        # after n steps the decay is (1 + n) / (12 + n), and `decay` at most: the horizon grows with the training
        self.ema = EMAModel(
            self.parameters, decay, use_ema_warmup=True, inv_gamma=11, power=1, update_after_step=-2, foreach=True
        )
        self.optimizers, self.parts = optimizers, [*models, *optimizers, self.ema]
        self.peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        self.step, self.losses, self.history, self.seconds_before = 0, {}, [], 0.0
        self.started = self.reported = time.time()
        self.state = arguments.work / f"{name}.state.pt"
        if self.state.exists():
            saved = torch.load(self.state, map_location=arguments.device)
            for part, state in zip(self.parts, saved["parts"], strict=True):
                part.load_state_dict(state)
            self.step, self.seconds_before, self.history = saved["step"], saved["seconds"], saved["history"]
            print(f"{name} goes on from step {self.step}", flush=True)

    @property
    def seconds(self) -> float:
        """Seconds of training, interruptions not counted."""
        return self.seconds_before + time.time() - self.started

    def progress(self) -> float:
        """Return the share of the training that is done, in [0, 1]."""
        if self.arguments.steps:
            return min(1.0, self.step / self.arguments.steps)
        if self.arguments.hours:
            return min(1.0, self.seconds / 3600 / self.arguments.hours)
        return min(1.0, (time.time() - self.started) / max(1e-6, self.arguments.deadline - self.started))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged parameters into the models for the length of the block."""
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    def optimizer_step(self, loss: torch.Tensor) -> None:
        """Step all optimizers, with gradients of norm 1 at most, and the running average."""
        factor = trapezoid(self.progress())
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, peak in zip(groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.ema.step(self.parameters)

    def fit(self, compute_losses: Callable[[], dict[str, torch.Tensor]]) -> None:
        """Train until the time is up, by at least one step.

        Args:
            compute_losses: draws a batch and returns scalars by name; the first one is minimised, all are logged.

        Raises:
            FloatingPointError: a loss is not finite.
        """
        self.started = self.reported = checkpointed = time.time()
        while self.progress() < 1 or self.step == 0:
            losses = compute_losses()
            self.optimizer_step(next(iter(losses.values())))
            self.step += 1
            for name, value in losses.items():  # summed on the device, without waiting for it
                total, count = self.losses.get(name, (0, 0))
                self.losses[name] = (total + value.detach().float(), count + 1)
            if self.arguments.on_gpu and self.step % 8 == 0:
                torch.cuda.synchronize()  # the clock must see the device's time, not that of a queue running ahead
            if time.time() - checkpointed >= CHECKPOINT_SECONDS:
                self.checkpoint()
                checkpointed = time.time()
            elif time.time() - self.reported > REPORT_SECONDS:
                self.report({})
        self.checkpoint()

    def report(self, measured: dict[str, float]) -> None:
        """Print and keep the mean losses since the last report, and what was measured."""
        counts = [count for _, count in self.losses.values()]
        means = {name: float(total) / count for name, (total, count) in self.losses.items()} | measured
        if not all(map(math.isfinite, means.values())):
            raise FloatingPointError(f"{self.name}: a loss is not finite at step {self.step}; lower the learning rate")
        rate = max(counts, default=0) / max(time.time() - self.reported, 1e-6)
        line = {"step": self.step, "progress": round(self.progress(), 3), "it_s": round(rate, 2)}
        self.history.append(line | {name: round(value, 5) for name, value in means.items()})
        self.losses, self.reported = {}, time.time()
        print(f"[{time.strftime('%H:%M:%S')}] {self.name} {self.history[-1]}", flush=True)

    def checkpoint(self) -> None:
        """Measure, save the averaged models, and write everything that the training consists of."""
        with self.averaged():
            self.report(self.measure())
            self.save()
        parts = [part.state_dict() for part in self.parts]
        content = {"parts": parts, "step": self.step, "seconds": self.seconds, "history": self.history}
        temporary = self.state.with_suffix(".tmp")
        torch.save(content, temporary)
        os.replace(temporary, self.state)
        self.reported = time.time()

    def write_card(self, folder: Path, **facts: object) -> None:
        """Write the facts for the model card, with steps, seconds, device and the last losses."""
        card = {
            "steps": self.step,
            "seconds": round(self.seconds, 1),
            "device": torch.cuda.get_device_name() if self.arguments.on_gpu else "CPU",
            "last": self.history[-1],
            "history": self.history,
        }
        write_json(folder / "card.json", card | facts)
