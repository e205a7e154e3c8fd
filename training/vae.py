"""The autoencoder that both pipelines share: 128 x 128 images to 16 latent channels on a grid of 16 x 16."""

import torch
from diffusers import AutoencoderKL
from torchmetrics.functional.image import peak_signal_noise_ratio

from training.loop import Run, TrainingArguments
from training.rows import VARIANTS, Images, wait_for

CHANNELS = 16


def make_model() -> AutoencoderKL:
    """Return an AutoencoderKL with f = 8; scaling is 1 and shift 0, for the quant convolutions take the statistics."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=CHANNELS,
        sample_size=128,
        block_out_channels=(32, 64, 96, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=16,
        scaling_factor=1.0,
        shift_factor=0.0,
        force_upcast=False,
    )


class _RoundTrip(torch.nn.Module):
    """Encoder, sampling and decoder in one module, so that one graph is compiled."""

    def __init__(self, model: AutoencoderKL) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mean, logvar = self.model.quant_conv(self.model.encoder(pixels)).chunk(2, 1)
        logvar = logvar.float().clamp(-30, 20)
        z = mean.float() + (0.5 * logvar).exp() * noise
        return self.model.decoder(self.model.post_quant_conv(z)), mean, logvar


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Compute the absolute error of the pixels and of their differences to the right and below; images [N, 3, H, W]."""
    loss = (output - target).abs().mean()
    for dim in (-1, -2):
        loss = loss + (output.diff(dim=dim) - target.diff(dim=dim)).abs().mean()
    return loss


@torch.no_grad()
def fold_statistics(model: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Change the quant convolutions so that latents come out with mean 0 and deviation 1, and the decoder undoes it.

    Args:
        model: changed in place.
        mean: of each latent channel [C].
        std: of each latent channel [C], positive.
    """
    c = len(mean)
    conv, back = model.quant_conv, model.post_quant_conv
    back.bias += back.weight[:, :, 0, 0] @ mean
    back.weight *= std[None, :, None, None]
    conv.weight[:c] /= std[:, None, None, None]
    conv.bias[:c] = (conv.bias[:c] - mean) / std
    conv.bias[c:] -= 2 * std.log()  # the other half of the outputs is the log variance


@torch.no_grad()
def encode_all(model: AutoencoderKL, data: Images, arguments: TrainingArguments) -> torch.Tensor:
    """Encode every version of every image into latent means, half precision [N, VARIANTS, C, 16, 16]."""
    versions = []
    for variant in range(VARIANTS):
        parts = []
        for index in torch.arange(len(data.rgba), device=arguments.device).split(512):
            pixels = data.render(index, torch.full_like(index, variant))
            with arguments.autocast():
                latent = model.encode(pixels.contiguous(memory_format=torch.channels_last)).latent_dist.mean
            parts.append(latent.half().cpu())
        versions.append(torch.cat(parts))
    return torch.stack(versions, dim=1)


@torch.no_grad()
def evaluate(model: AutoencoderKL, data: Images, arguments: TrainingArguments) -> dict:
    """Measure the mean PSNR, in dB, on at most 512 held-out images and on as many training images."""
    quality, held_out = {}, data.held_out[:512].to(arguments.device)
    for name, chosen in (("held_out", held_out), ("train", data.rows.image[: len(held_out)])):
        values = []
        for index in chosen.split(64):
            target = data.render(index, torch.zeros_like(index))
            with arguments.autocast():
                output = model.decode(model.encode(target).latent_dist.mean).sample
            output = output.float().clamp(-1, 1)
            ratios = peak_signal_noise_ratio(output, target, data_range=2.0, dim=(1, 2, 3), reduction="none")
            values.append(ratios)
        quality[f"psnr_{name}"] = round(float(torch.cat(values).mean()), 2) if len(chosen) else None
    return quality


def _optimizer(arguments: TrainingArguments, module: torch.nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=1e-4, betas=(0.9, 0.99), fused=arguments.on_gpu)


def train(arguments: TrainingArguments, seed: int = 3) -> None:
    """Train the autoencoder, fold the statistics, and write all latents for the denoisers."""
    arguments.seed(seed)
    device, batch, out = arguments.device, arguments.batch or 64, arguments.work / "vae"
    data = Images(arguments.work / "data", device)
    model = make_model().to(device, memory_format=torch.channels_last)
    compiled = arguments.compiled(_RoundTrip(model))

    def compute_losses() -> dict[str, torch.Tensor]:
        image, _, variant = data.rows.draw(batch)
        target = data.render(image, variant).contiguous(memory_format=torch.channels_last)
        noise = torch.randn(batch, CHANNELS, 16, 16, device=device)
        with arguments.autocast():
            output, mean, logvar = compiled(target, noise)
        rec = reconstruction_loss(output.float(), target)
        kl = 0.5 * (mean.float().square() + logvar.exp() - 1 - logvar).mean()
        return {"loss": rec + 1e-4 * kl, "rec": rec, "kl": kl}

    optimizers = [_optimizer(arguments, model, 1.5e-3)]
    run = Run("vae", arguments, [model], optimizers, 0.998, lambda: model.save_pretrained(out / "checkpoint"))
    run.fit(compute_losses)
    run.ema.copy_to(run.parameters)
    write_latents(model.eval(), data, arguments)
    run.write_card(out, batch=batch, seed=seed, quality=evaluate(model, data, arguments))


@torch.no_grad()
def write_latents(model: AutoencoderKL, data: Images, arguments: TrainingArguments) -> None:
    """Fold the statistics of the training images' latents, and write all latents for the denoisers."""
    out = arguments.work / "vae"
    latents = encode_all(model, data, arguments).float()
    of_training = latents[torch.tensor([not item.held_out for item in data.emoji])]
    mean, std = of_training.mean((0, 1, 3, 4)), of_training.std((0, 1, 3, 4))
    fold_statistics(model, mean.to(arguments.device), std.to(arguments.device))
    latents = ((latents - mean[:, None, None]) / std[:, None, None]).half()
    model.to(memory_format=torch.contiguous_format).save_pretrained(out / "model")
    torch.save(latents, out / "latents.tmp")
    (out / "latents.tmp").rename(out / "latents.pt")


def refine_decoder(arguments: TrainingArguments, seed: int = 4) -> None:
    """Train the decoder further on the final, fixed latents, half of them with a little noise.

    Denoisers make latents that no encoder would: a decoder that has seen noise draws clean edges from them.
    """
    arguments.seed(seed)
    device, batch, out = arguments.device, arguments.batch or 64, arguments.work / "decoder"
    wait_for(arguments.work / "vae" / "latents.pt")
    data = Images(arguments.work / "data", device)
    latents = torch.load(arguments.work / "vae" / "latents.pt").to(device)
    model = AutoencoderKL.from_pretrained(arguments.work / "vae" / "model")
    model = model.to(device, memory_format=torch.channels_last).train()
    model.encoder.requires_grad_(False)
    model.quant_conv.requires_grad_(False)
    decoder = torch.nn.Sequential(model.post_quant_conv, model.decoder)
    compiled = arguments.compiled(decoder)

    def compute_losses() -> dict[str, torch.Tensor]:
        image, _, variant = data.rows.draw(batch)
        z = latents[image, variant].float()
        strength, noisy = torch.rand(2, batch, 1, 1, 1, device=device)
        z = z + 0.12 * strength * (noisy < 0.5) * torch.randn_like(z)
        with arguments.autocast():
            output = compiled(z.contiguous(memory_format=torch.channels_last))
        return {"loss": reconstruction_loss(output.float(), data.render(image, variant))}

    optimizers = [_optimizer(arguments, decoder, 8e-4)]
    run = Run("decoder", arguments, [model], optimizers, 0.999, lambda: model.save_pretrained(out / "model"))
    run.fit(compute_losses)
    with run.averaged():
        run.write_card(out, batch=batch, seed=seed, quality=evaluate(model.eval(), data, arguments))
