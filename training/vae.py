"""The autoencoder that both pipelines share: 128 x 128 images to 16 latent channels on a grid of 16 x 16."""

import torch
from diffusers import AutoencoderKL

from training.loop import VARIANTS, Images, Run, Setting, prepare, wait_for

CHANNELS = 16


def make_model() -> AutoencoderKL:
    """AutoencoderKL with f = 8; scaling 1 and shift 0, because the statistics go into the quant convolutions."""
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


class _Decode(torch.nn.Module):
    def __init__(self, model: AutoencoderKL) -> None:
        super().__init__()
        self.convolution, self.decoder = model.post_quant_conv, model.decoder

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.convolution(z))


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Absolute error of the pixels and of their differences to the right and below; images [N, 3, H, W]."""
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


def psnr(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each image, both in [-1, 1]: [N]."""
    error = ((output.clamp(-1, 1) - target) / 2).square().flatten(1).mean(1)
    return -10 * error.clamp(min=1e-10).log10()


@torch.no_grad()
def encode_all(model: AutoencoderKL, data: Images, setting: Setting) -> torch.Tensor:
    """Latent means of every version of every image, half precision [N, VARIANTS, C, 16, 16]."""
    n = len(data.rgba)
    out = torch.empty(n, VARIANTS, CHANNELS, 16, 16, dtype=torch.float16)
    for v in range(VARIANTS):
        for i in range(0, n, 512):
            index = torch.arange(i, min(i + 512, n), device=setting.device)
            with setting.autocast():
                pixels = data.render(index, torch.full_like(index, v)).contiguous(memory_format=torch.channels_last)
                out[i : i + 512, v] = model.encode(pixels).latent_dist.mean.half().cpu()
    return out


@torch.no_grad()
def evaluate(model: AutoencoderKL, data: Images, setting: Setting) -> dict:
    """PSNR on the held-out images (as drawn, on white) and on as many training images."""
    result = {}
    count = min(len(data.held_out), 512)
    train = data.row_image[:count].cpu()
    for name, chosen in (("held_out", data.held_out[:count]), ("train", train)):
        values = []
        for i in range(0, len(chosen), 64):
            index = chosen[i : i + 64].to(setting.device)
            target = data.render(index, torch.zeros_like(index))
            with setting.autocast():
                output = model.decode(model.encode(target).latent_dist.mean).sample
            values.append(psnr(output.float(), target))
        result[f"psnr_{name}"] = round(float(torch.cat(values).mean()), 2) if values else None
    return result


def train(setting: Setting, seed: int = 3) -> None:
    """Train the autoencoder, fold the statistics, and write all latents for the denoisers."""
    prepare(setting, seed)
    data = Images(setting.work / "data", setting.device)
    model = make_model().to(setting.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1.5e-3, weight_decay=1e-4, betas=(0.9, 0.99), fused=setting.on_gpu
    )
    batch = setting.batch or 64
    out = setting.work / "vae"
    fast = setting.compiled(_RoundTrip(model))
    for _ in range(2 if setting.on_gpu else 0):
        pixels = torch.zeros(batch, 3, 128, 128, device=setting.device).contiguous(memory_format=torch.channels_last)
        with setting.autocast():
            fast(pixels, torch.zeros(batch, CHANNELS, 16, 16, device=setting.device))[0].float().mean().backward()
    model.zero_grad(set_to_none=True)
    print("vae compiled", flush=True)

    run = Run("vae", setting, [model], [optimizer], 0.998, lambda: model.save_pretrained(out / "checkpoint"))
    for _ in run:
        image, _, variant = data.draw(batch)
        target = data.render(image, variant).contiguous(memory_format=torch.channels_last)
        with setting.autocast():
            noise = torch.randn(batch, CHANNELS, 16, 16, device=setting.device)
            output, mean, logvar = fast(target, noise)
        rec = reconstruction_loss(output.float(), target)
        kl = 0.5 * (mean.float().square() + logvar.exp() - 1 - logvar).mean()
        loss = rec + 1e-4 * kl
        run.descend(loss)
        run.log(rec=rec, kl=kl)
    run.ema.copy_to(run.ema.live)
    write_latents(model.eval(), data, setting)
    run.write_card(out, batch=batch, seed=seed, quality=evaluate(model, data, setting))


@torch.no_grad()
def write_latents(model: AutoencoderKL, data: Images, setting: Setting) -> None:
    """Fold the statistics of the training images' latents, and write all latents for the denoisers."""
    out = setting.work / "vae"
    latents = encode_all(model, data, setting)
    seen = torch.tensor([not e.held_out for e in data.emoji])
    kept = latents[seen].to(setting.device).float()
    mean, std = kept.mean((0, 1, 3, 4)), kept.std((0, 1, 3, 4))
    fold_statistics(model, mean, std)
    mean, std = mean.cpu()[:, None, None], std.cpu()[:, None, None]
    for i in range(0, len(latents), 1024):
        latents[i : i + 1024] = ((latents[i : i + 1024].float() - mean) / std).half()
    model.to(memory_format=torch.contiguous_format).save_pretrained(out / "model")
    torch.save(latents, out / "latents.tmp")
    (out / "latents.tmp").rename(out / "latents.pt")


def refine_decoder(setting: Setting, seed: int = 4) -> None:
    """Train the decoder further on the final, fixed latents, half of them with a little noise.

    Denoisers make latents that no encoder would: a decoder that has seen noise draws clean edges from them.
    """
    wait_for(setting.work / "vae" / "latents.pt")
    prepare(setting, seed)
    data = Images(setting.work / "data", setting.device)
    latents = torch.load(setting.work / "vae" / "latents.pt").to(setting.device)
    model = (
        AutoencoderKL.from_pretrained(setting.work / "vae" / "model")
        .to(setting.device, memory_format=torch.channels_last)
        .train()
    )
    part = _Decode(model)
    fast = setting.compiled(part)
    model.encoder.requires_grad_(False)
    model.quant_conv.requires_grad_(False)
    optimizer = torch.optim.AdamW(
        part.parameters(), lr=8e-4, weight_decay=1e-4, betas=(0.9, 0.99), fused=setting.on_gpu
    )
    batch = setting.batch or 64
    out = setting.work / "decoder"

    run = Run("decoder", setting, [model], [optimizer], 0.999, lambda: model.save_pretrained(out / "model"))
    for _ in run:
        image, _, variant = data.draw(batch)
        target = data.render(image, variant)
        z = latents[image, variant].float()
        noise = 0.12 * torch.rand(batch, 1, 1, 1, device=z.device) * (torch.rand(batch, 1, 1, 1, device=z.device) < 0.5)
        z = (z + noise * torch.randn_like(z)).contiguous(memory_format=torch.channels_last)
        with setting.autocast():
            output = fast(z)
        loss = reconstruction_loss(output.float(), target)
        run.descend(loss)
        run.log(loss=loss)
    with run.ema.swapped():
        run.write_card(out, batch=batch, seed=seed, quality=evaluate(model.eval(), data, setting))
