"""The denoiser of the Flux-style pipeline: a flow transformer and its T5, then distilled guidance."""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from transformers import CLIPTextModel, T5Config, T5EncoderModel

from experiments.training.loop import (
    VARIANTS,
    Ema,
    Muon,
    Run,
    Setting,
    draw_variants,
    fixed_rows,
    load_rows,
    prepare,
    split_parameters,
    wait_for,
    write_json,
)
from experiments.training.vae import CHANNELS

DROPOUT = 0.12  # of the caption, replaced by the empty one
# Of the logit of the training times. Above 0 favours noise, where the shape is decided: half of them are above 0.7.
TIME_MEAN, TIME_SD = 0.9, 1.1
GUIDANCE = (1.0, 6.0)  # range of the distilled scales
FIRST_SHARE = 0.7  # of the time, for the first stage


def make_model() -> FluxTransformer2DModel:
    """FluxTransformer2DModel with 3 double and 6 single blocks of width 192, starting as the zero function.

    The guidance embedder starts at zero too and is left there by the first stage: the student of the second stage then
    starts as its teacher for every guidance scale.
    """
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * CHANNELS,
        num_layers=3,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        axes_dims_rope=(8, 12, 12),
        guidance_embeds=True,
    )
    zero = [b.norm.linear for b in model.single_transformer_blocks]
    for block in model.transformer_blocks:
        zero += [block.norm1.linear, block.norm1_context.linear]
    zero += [model.norm_out.linear, model.proj_out, model.time_text_embed.guidance_embedder.linear_2]
    for layer in zero:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return model


def make_text_encoder(vocabulary: int) -> T5EncoderModel:
    """A T5 encoder of 128 x 4; plain attention, since fused kernels failed on the GPU with its position bias."""
    config = T5Config(
        vocab_size=vocabulary,
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=4,
        num_heads=4,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=32,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    config._attn_implementation = "eager"
    return T5EncoderModel(config)


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Plain flow matching; a fixed shift, for the token count never changes."""
    return FlowMatchEulerDiscreteScheduler(shift=1.5, use_dynamic_shifting=False)


def pack(latent: torch.Tensor) -> torch.Tensor:
    """Latents [N, C, 16, 16] as tokens [N, 64, 4 C], in the pipeline's order."""
    n, c, h, w = latent.shape
    return latent.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, (h // 2) * (w // 2), 4 * c)


def image_ids(device: str | torch.device, side: int = 8) -> torch.Tensor:
    """Positions of the image tokens [side * side, 3]: (0, row, column)."""
    ids = torch.zeros(side, side, 3, device=device)
    ids[..., 1] = torch.arange(side, device=device)[:, None]
    ids[..., 2] = torch.arange(side, device=device)[None]
    return ids.view(-1, 3)


def sample_times(n: int, device: str) -> torch.Tensor:
    """Logit-normal times in (0, 1), 1 being pure noise: [n]."""
    return torch.sigmoid(TIME_MEAN + TIME_SD * torch.randn(n, device=device))


def load_start(model: FluxTransformer2DModel, encoder: T5EncoderModel, folder: Path) -> None:
    """Continue from an earlier transformer and T5, of the same sizes; one without guidance keeps the zero embedder."""
    earlier = FluxTransformer2DModel.from_pretrained(folder / "transformer").state_dict()
    missing, unexpected = model.load_state_dict(earlier, strict=False)
    missing = [name for name in missing if "guidance_embedder" not in name]
    if missing or unexpected:
        raise ValueError(
            f"{folder}: expected a transformer of the same layers, got missing {missing} and "
            f"unexpected {unexpected}; start from another one"
        )
    encoder.load_state_dict(T5EncoderModel.from_pretrained(folder / "text_encoder_2").float().state_dict())


class _Batches:
    """Random training batches on the device: tokens [B, 64, 64], caption index [B], empty captions dropped in."""

    def __init__(self, setting: Setting, batch: int) -> None:
        work, device = setting.work, setting.device
        wait_for(work / "text" / "card.json", work / "vae" / "latents.pt")
        self.row_image, self.row_caption = load_rows(work / "data", device)
        latents = torch.load(work / "vae" / "latents.pt").to(device)
        self.tokens = pack(latents.flatten(0, 1)).view(len(latents), VARIANTS, 64, 4 * CHANNELS)
        tokens = torch.load(work / "tokens.pt")
        self.ids = tokens["t5"].to(device)
        self.pooled = pooled_captions(setting, tokens["clip"])
        self.empty = len(self.ids) - 1
        self.batch, self.device = batch, device
        self.fixed = fixed_rows(work / "data", device)

    def draw(self, dropout: float) -> tuple[torch.Tensor, torch.Tensor]:
        row = torch.randint(len(self.row_image), (self.batch,), device=self.device)
        variant = draw_variants(self.batch, self.device)
        caption = self.row_caption[row]
        if dropout:
            dropped = torch.rand(self.batch, device=self.device) < dropout
            caption = caption.masked_fill(dropped, self.empty)
        return self.tokens[self.row_image[row], variant].float(), caption


@torch.no_grad()
def pooled_captions(setting: Setting, ids: torch.Tensor, chunk: int = 4096) -> torch.Tensor:
    """The pooled CLIP vector that the Flux pipeline computes from each caption, half precision [U, 128]."""
    clip = CLIPTextModel.from_pretrained(setting.work / "text_encoder").to(setting.device).float().eval()
    parts = [
        clip(input_ids=ids[i : i + chunk].to(setting.device).long()).pooler_output.half()
        for i in range(0, len(ids), chunk)
    ]
    return torch.cat(parts)


def velocity(
    net: Callable[..., tuple[torch.Tensor]],
    x: torch.Tensor,
    t: torch.Tensor,
    words: torch.Tensor,
    pooled: torch.Tensor,
    guidance: torch.Tensor,
) -> torch.Tensor:
    """What the transformer predicts, noise minus latent, float32 [B, 64, 4 C].

    Args:
        net: transformer, compiled or not.
        x: noisy tokens [B, 64, 4 C].
        t: times [B] in (0, 1).
        words: T5 states [B, 32, 128].
        pooled: CLIP vectors [B, 128].
        guidance: scales [B].
    """
    return net(
        hidden_states=x,
        timestep=t,
        encoder_hidden_states=words,
        pooled_projections=pooled,
        guidance=guidance,
        img_ids=image_ids(x.device),
        txt_ids=torch.zeros(words.shape[1], 3, device=x.device),
        return_dict=False,
    )[0].float()


def train(setting: Setting, seed: int = 6, only_distil: bool = False) -> None:
    """Both stages, into `work/flux`: flow matching with T5, then distillation of guidance into the embedding.

    Args:
        setting: where and how long.
        seed: of everything random.
        only_distil: skip the first stage, whose results are in `work/flux` already.
    """
    prepare(setting, seed)
    if setting.on_gpu:  # an illegal memory access of the fused kernels at the first step, otherwise
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
    device, batch, work = setting.device, setting.batch_size(512), setting.work
    model = make_model().to(device)
    encoder = make_text_encoder(torch.load(work / "tokens.pt")["t5_size"]).to(device)
    start = work / "flux" / "start"
    if only_distil:
        model = FluxTransformer2DModel.from_pretrained(work / "flux" / "stage1").to(device).train()
        encoder.load_state_dict(T5EncoderModel.from_pretrained(work / "flux" / "text_encoder_2").float().state_dict())
    elif start.exists():
        load_start(model, encoder, start)
    teacher = copy.deepcopy(model).requires_grad_(False)
    fast, fast_teacher = setting.compiled(model), setting.compiled(teacher)
    ones = torch.ones(batch, device=device)
    for _ in range(2 if setting.on_gpu else 0):
        # Separate tensors, as in the loops: the compiler takes note when two arguments are the same one.
        x, t = torch.randn(batch, 64, 4 * CHANNELS, device=device), torch.rand(batch, device=device)
        pooled, w = torch.zeros(batch, 128, device=device), torch.rand(batch, device=device)
        with setting.autocast():
            words = encoder(input_ids=torch.zeros(batch, 32, dtype=torch.long, device=device)).last_hidden_state.float()
            velocity(fast, x, t, words, pooled, ones).square().mean().backward()
            words = words.detach()
            velocity(fast, x, t, words, pooled, w).square().mean().backward()
            with torch.no_grad():
                velocity(fast_teacher, x, t, words, pooled, ones)
        torch.cuda.synchronize()
    model.zero_grad(set_to_none=True)
    encoder.zero_grad(set_to_none=True)
    print("flux compiled", flush=True)

    data = _Batches(setting, batch)
    if not only_distil:
        began = time.time()
        share = FIRST_SHARE * (setting.deadline - began)
        _first_stage(dataclasses.replace(setting, deadline=began + share), model, encoder, fast, data, seed)
    teacher.load_state_dict(model.state_dict())
    _second_stage(setting, model, encoder, fast, fast_teacher, data)


def _first_stage(
    setting: Setting,
    model: FluxTransformer2DModel,
    encoder: T5EncoderModel,
    fast: Callable[..., tuple[torch.Tensor]],
    data: _Batches,
    seed: int,
) -> None:
    """Flow matching of the transformer and T5, at guidance 1; both modules end with their averaged weights."""
    device, batch, out = setting.device, data.batch, setting.work / "flux"
    ones = torch.ones(batch, device=device)
    ema = Ema([model, encoder], 0.999)
    matrices, rest = split_parameters(model, encoder)
    guidance_parameters = list(model.time_text_embed.guidance_embedder.parameters())
    optimizers = [
        Muon(matrices, lr=2.5e-3 * setting.lr, dtype=setting.dtype),
        torch.optim.AdamW(rest, lr=1.2e-3 * setting.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=setting.on_gpu),
    ]

    def save(run: Run) -> None:
        with ema.swapped():
            model.save_pretrained(out / "stage1")
            encoder.save_pretrained(out / "text_encoder_2")

    @torch.no_grad()
    def measure() -> dict[str, float]:
        found = {}
        with ema.swapped(), setting.autocast():
            for name, (image, caption) in data.fixed.items():
                g, z = torch.Generator(device).manual_seed(0), data.tokens[image, 0].float()
                t = (torch.arange(len(z), device=device) + 0.5) / len(z)
                noise = torch.randn(z.shape, generator=g, device=device)
                words = encoder(input_ids=data.ids[caption].long()).last_hidden_state.float()
                x = torch.lerp(z, noise, t[:, None, None])
                v = velocity(model, x, t, words, data.pooled[caption].float(), torch.ones(len(z), device=device))
                found[name] = float((v - (noise - z)).square().mean())
        return found

    run = Run("flux", setting, optimizers, save, {"model": model, "encoder": encoder, "ema": ema}, measure)
    for _ in run:
        z, caption = data.draw(DROPOUT)
        t = sample_times(batch, device)
        noise = torch.randn_like(z)
        x = torch.lerp(z, noise, t[:, None, None])
        with setting.autocast():
            words = encoder(input_ids=data.ids[caption].long()).last_hidden_state.float()
            loss = (velocity(fast, x, t, words, data.pooled[caption].float(), ones) - (noise - z)).square().mean()
        for o in optimizers:
            o.zero_grad(set_to_none=True)
        loss.backward()
        for p in guidance_parameters:  # left at zero: see make_model
            p.grad = None
        torch.nn.utils.clip_grad_norm_(matrices + rest, 1.0)
        for o in optimizers:
            o.step()
        ema.update()
        run.log(loss=loss)
    card = {"first": run.summary(), "batch": batch, "seed": seed}
    write_json(out / "first.json", card)

    with torch.no_grad():
        torch._foreach_copy_(ema.live, ema.average)


def _second_stage(
    setting: Setting,
    model: FluxTransformer2DModel,
    encoder: T5EncoderModel,
    fast: Callable[..., tuple[torch.Tensor]],
    fast_teacher: Callable[..., tuple[torch.Tensor]],
    data: _Batches,
) -> None:
    """Distil classifier-free guidance of the frozen teacher into the guidance embedding of the student."""
    device, batch, out = setting.device, data.batch, setting.work / "flux"
    ones = torch.ones(batch, device=device)
    encoder.requires_grad_(False)
    with torch.no_grad(), setting.autocast():
        states = [encoder(input_ids=part.long()).last_hidden_state.half() for part in data.ids.split(1024)]
    table = torch.cat(states)
    ema = Ema([model], 0.998)
    matrices, rest = split_parameters(model)
    optimizers = [
        Muon(matrices, lr=8e-4, dtype=setting.dtype),
        torch.optim.AdamW(rest, lr=5e-4, betas=(0.9, 0.98), weight_decay=0.0, fused=setting.on_gpu),
    ]

    def save_student(run: Run) -> None:
        with ema.swapped():
            model.save_pretrained(out / "model")

    run = Run("distil", setting, optimizers, save_student, {"model": model, "ema": ema})
    no_words = table[data.empty].float().expand(batch, -1, -1).contiguous()
    no_pooled = data.pooled[data.empty].float().expand(batch, -1).contiguous()
    for _ in run:
        z, caption = data.draw(0.0)
        t = sample_times(batch, device)
        x = torch.lerp(z, torch.randn_like(z), t[:, None, None])
        w = torch.empty(batch, device=device).uniform_(*GUIDANCE)
        words, pooled = table[caption].float(), data.pooled[caption].float()
        with setting.autocast():
            with torch.no_grad():
                free = velocity(fast_teacher, x, t, no_words, no_pooled, ones)
                bound = velocity(fast_teacher, x, t, words, pooled, ones)
                target = free + w[:, None, None] * (bound - free)
            loss = (velocity(fast, x, t, words, pooled, w) - target).square().mean()
        for o in optimizers:
            o.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(matrices + rest, 1.0)
        for o in optimizers:
            o.step()
        ema.update()
        run.log(loss=loss)
    first = json.loads((out / "first.json").read_text()) if (out / "first.json").exists() else {}
    write_json(out / "card.json", first | {"distil": run.summary(), "distil_batch": batch})
