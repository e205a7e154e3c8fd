"""The denoiser of the SDXL-style pipeline: v-prediction with zero terminal signal, on the shared latents."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from training.loop import Run, TrainingArguments, make_optimizers
from training.rows import Latents, Rows, wait_for
from training.vae import CHANNELS

#: Share of captions that are left empty, for classifier-free guidance.
DROPOUT = 0.1
#: Original size, crop and target size: what the pipeline sends at 128 x 128.
TIME_IDS = (128, 128, 0, 0, 128, 128)


def make_model() -> UNet2DConditionModel:
    """Return a UNet2DConditionModel with self- and cross-attention at 16 x 16 and 8 x 8."""
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
    """Return the scheduler that the pipeline ships with; training has its noise levels."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


@torch.no_grad()
def encode_captions(work: Path, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode captions as the SDXL pipeline does: states [U, 32, 256] and pooled [U, 128], half precision."""
    one = CLIPTextModel.from_pretrained(work / "text_encoder").to(device).float().eval()
    two = CLIPTextModelWithProjection.from_pretrained(work / "text_encoder_2").to(device).float().eval()
    states, pooled = [], []
    for part in torch.load(work / "tokens.pt")["clip"].split(2048):
        ids = part.to(device).long()
        first = one(input_ids=ids, output_hidden_states=True)
        second = two(input_ids=ids, output_hidden_states=True)
        states.append(torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1).half())
        pooled.append(second.text_embeds.half())
    return torch.cat(states), torch.cat(pooled)


def predict(
    net: Callable[..., UNet2DConditionOutput],
    x: torch.Tensor,
    t: torch.Tensor,
    states: torch.Tensor,
    pooled: torch.Tensor,
) -> torch.Tensor:
    """Predict the velocity, float32 [N, C, 16, 16].

    Args:
        net: UNet, compiled or not.
        x: noisy latents [N, C, 16, 16].
        t: time steps, int64 [N].
        states: of the captions [N, 32, 256].
        pooled: of the captions [N, 128].
    """
    time_ids = torch.tensor(TIME_IDS, device=x.device).float().expand(len(x), 6)
    added = {"text_embeds": pooled, "time_ids": time_ids}
    x = x.contiguous(memory_format=torch.channels_last)
    return net(x, t, encoder_hidden_states=states, added_cond_kwargs=added).sample.float()


def train(arguments: TrainingArguments, seed: int = 5) -> None:
    """Train the UNet into `work/unet`, from `work/unet/start` where that is there."""
    arguments.seed(seed)
    device, batch, work = arguments.device, arguments.batch or 256, arguments.work
    out, start = work / "unet", work / "unet" / "start"
    model = UNet2DConditionModel.from_pretrained(start) if start.exists() else make_model()
    model = model.to(device, memory_format=torch.channels_last).train()
    compiled = arguments.compiled(model)
    wait_for(work / "text" / "card.json", work / "vae" / "latents.pt")
    data = Latents(Rows(work / "data", device), torch.load(work / "vae" / "latents.pt").to(device))
    states, pooled = encode_captions(work, device)
    schedule = DDPMScheduler.from_config(make_scheduler().config)
    dropout = DROPOUT if arguments.dropout is None else arguments.dropout

    def compute_loss(
        net: Callable, z: torch.Tensor, noise: torch.Tensor, times: torch.Tensor, caption: torch.Tensor, share: float
    ) -> torch.Tensor:
        t = (1000 * times).long().clamp(max=999)
        x, v = schedule.add_noise(z, noise, t), schedule.get_velocity(z, noise, t)
        keep = (torch.rand(len(z), device=device) >= share).float()  # an empty prompt is all zeros in this pipeline
        text, condition = states[caption].float() * keep[:, None, None], pooled[caption].float() * keep[:, None]
        with arguments.autocast():
            predicted = predict(net, x, t, text, condition)
        return (predicted - v).square().mean()

    def compute_losses() -> dict[str, torch.Tensor]:
        return {"loss": compute_loss(compiled, *data.draw(batch, arguments.times or "uniform"), dropout)}

    @torch.no_grad()
    def measure() -> dict[str, float]:
        return data.measure(lambda *row: compute_loss(model, *row, 0.0))

    optimizers = make_optimizers(arguments, model, muon=2e-3, adam=1e-3)
    run = Run("unet", arguments, [model], optimizers, 0.999, lambda: model.save_pretrained(out / "model"), measure)
    run.fit(compute_losses)
    run.write_card(out, batch=batch, seed=seed)
