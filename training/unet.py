"""The denoiser of the SDXL-style pipeline: v-prediction with zero terminal signal, on the shared latents."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from training.loop import (
    Run,
    Setting,
    draw_times,
    draw_variants,
    fixed_rows,
    load_rows,
    make_optimizers,
    prepare,
    wait_for,
)
from training.vae import CHANNELS

DROPOUT = 0.1  # of the caption, for classifier-free guidance
TIME_IDS = (128, 128, 0, 0, 128, 128)  # original size, crop, target size: what the pipeline sends at 128 x 128


def make_model() -> UNet2DConditionModel:
    """UNet2DConditionModel with self- and cross-attention at 16 x 16 and 8 x 8."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(96, 160),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        attention_head_dim=(3, 5),
        transformer_layers_per_block=(1, 1),
        use_linear_projection=True,
        norm_num_groups=16,
        cross_attention_dim=256,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=128 + 6 * 16,
    )


def make_scheduler() -> EulerDiscreteScheduler:
    """The scheduler that the pipeline ships with; training takes its noise levels from it."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def noised(latent: torch.Tensor, noise: torch.Tensor, alpha_bar: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy latents and the velocity to predict, both [N, C, H, W].

    Args:
        latent: clean, [N, C, H, W].
        noise: unit normal, [N, C, H, W].
        alpha_bar: cumulative signal share of each sample's time, [N], in [0, 1].
    """
    a, s = alpha_bar.sqrt()[:, None, None, None], (1 - alpha_bar).sqrt()[:, None, None, None]
    return a * latent + s * noise, a * noise - s * latent


@torch.no_grad()
def encode_captions(work: Path, device: str, chunk: int = 2048) -> tuple[torch.Tensor, torch.Tensor]:
    """What the SDXL pipeline computes from each caption: states [U, 32, 256] and pooled [U, 128], half precision."""
    ids = torch.load(work / "tokens.pt")["clip"]
    one = CLIPTextModel.from_pretrained(work / "text_encoder").to(device).float().eval()
    two = CLIPTextModelWithProjection.from_pretrained(work / "text_encoder_2").to(device).float().eval()
    states, pooled = [], []
    for i in range(0, len(ids), chunk):
        part = ids[i : i + chunk].to(device).long()
        a = one(input_ids=part, output_hidden_states=True)
        b = two(input_ids=part, output_hidden_states=True)
        states.append(torch.cat([a.hidden_states[-2], b.hidden_states[-2]], -1).half())
        pooled.append(b.text_embeds.half())
    return torch.cat(states), torch.cat(pooled)


def predict(
    net: Callable[..., UNet2DConditionOutput],
    x: torch.Tensor,
    t: torch.Tensor,
    words: torch.Tensor,
    pooled: torch.Tensor,
) -> torch.Tensor:
    """The velocity that the UNet predicts, float32 [N, C, 16, 16].

    Args:
        net: UNet, compiled or not.
        x: noisy latents [N, C, 16, 16].
        t: time steps, int64 [N].
        words: states of the captions [N, 32, 256].
        pooled: of the captions [N, 128].
    """
    added = {"text_embeds": pooled, "time_ids": _time_ids(len(x), x.device)}
    x = x.contiguous(memory_format=torch.channels_last)
    return net(x, t, encoder_hidden_states=words, added_cond_kwargs=added).sample.float()


@functools.cache
def _time_ids(n: int, device: torch.device) -> torch.Tensor:
    return torch.tensor([TIME_IDS], device=device).float().expand(n, 6)


def train(setting: Setting, seed: int = 5) -> None:
    """Train into `work/unet`; compiles on made-up data while the earlier stages still run."""
    prepare(setting, seed)
    device, batch, work, out = setting.device, setting.batch or 256, setting.work, setting.work / "unet"
    model = UNet2DConditionModel.from_pretrained(out / "start") if (out / "start").exists() else make_model()
    model = model.to(device, memory_format=torch.channels_last).train()
    fast = setting.compiled(model)
    for _ in range(2 if setting.on_gpu else 0):
        z, t = torch.randn(batch, CHANNELS, 16, 16, device=device), torch.zeros(batch, device=device, dtype=torch.long)
        words, pooled = torch.zeros(batch, 32, 256, device=device), torch.zeros(batch, 128, device=device)
        with setting.autocast():
            loss = predict(fast, z, t, words, pooled).square().mean()
        loss.backward()
        torch.cuda.synchronize()
    model.zero_grad(set_to_none=True)
    print("unet compiled", flush=True)

    wait_for(work / "text" / "card.json", work / "vae" / "latents.pt")
    row_image, row_caption = load_rows(work / "data", device)
    latents = torch.load(work / "vae" / "latents.pt").to(device)
    states, pooled = encode_captions(work, device)
    alpha_bar = make_scheduler().alphas_cumprod.to(device)
    fixed = fixed_rows(work / "data", device)
    dropout = DROPOUT if setting.recipe.dropout is None else setting.recipe.dropout

    @torch.no_grad()
    def measure() -> dict[str, float]:
        losses = {}
        with setting.autocast():
            for name, (image, caption) in fixed.items():
                g, z = torch.Generator(device).manual_seed(0), latents[image, 0].float()
                t = torch.linspace(0, 999, len(z), device=device).long()
                x, v = noised(z, torch.randn(z.shape, generator=g, device=device), alpha_bar[t])
                predicted = predict(model, x, t, states[caption].float(), pooled[caption].float())
                losses[name] = float((predicted - v).square().mean())
        return losses

    optimizers = make_optimizers(setting, model, muon=2e-3, adam=1e-3)
    run = Run("unet", setting, [model], optimizers, 0.999, lambda: model.save_pretrained(out / "model"), measure)
    for _ in run:
        row = torch.randint(len(row_image), (batch,), device=device)
        z = latents[row_image[row], draw_variants(batch, device)].float()
        caption = row_caption[row]
        keep = (torch.rand(batch, device=device) >= dropout).float()  # an empty prompt is all zeros in this pipeline
        t = (1000 * draw_times(batch, device, setting.recipe.times or "uniform")).long().clamp(max=999)
        x, v = noised(z, torch.randn_like(z), alpha_bar[t])
        words, condition = states[caption].float() * keep[:, None, None], pooled[caption].float() * keep[:, None]
        with setting.autocast():
            predicted = predict(fast, x, t, words, condition)
        loss = (predicted - v).square().mean()
        run.descend(loss)
        run.log(loss=loss)
    run.write_card(out, batch=batch, seed=seed)
