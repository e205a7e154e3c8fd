"""The denoiser of the Flux-style pipeline: a flow transformer and its T5, then distilled guidance."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from transformers import CLIPTextModel, T5Config, T5EncoderModel

from training.loop import (
    VARIANTS,
    Run,
    Setting,
    draw_times,
    draw_variants,
    fixed_rows,
    load_rows,
    make_optimizers,
    prepare,
    wait_for,
)  # fmt: skip
from training.vae import CHANNELS

DROPOUT = 0.12  # of the caption, replaced by the empty one
GUIDANCE = (1.0, 6.0)  # range of the distilled scales


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


def _prepare(setting: Setting, seed: int) -> tuple[FluxTransformer2DModel, T5EncoderModel]:
    """Seeds, and an untrained transformer and T5 on the device."""
    prepare(setting, seed)
    if setting.on_gpu:  # an illegal memory access of the fused kernels at the first step, otherwise
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
    vocabulary = torch.load(setting.work / "tokens.pt")["t5_size"]
    return make_model().to(setting.device), make_text_encoder(vocabulary).to(setting.device)


def _compile(setting: Setting, batch: int, *networks: Callable[..., tuple[torch.Tensor]], train: bool = True) -> None:
    """Compile on made-up data, while the earlier stages still run."""
    for network in networks * (2 if setting.on_gpu else 0):
        # Separate tensors, as in the loops: the compiler takes note when two arguments are the same one.
        x, t = torch.randn(batch, 64, 4 * CHANNELS, device=setting.device), torch.rand(batch, device=setting.device)
        words = torch.zeros(batch, 32, 128, device=setting.device, requires_grad=train)
        pooled, w = torch.zeros(batch, 128, device=setting.device), torch.rand(batch, device=setting.device)
        with setting.autocast(), torch.set_grad_enabled(train):
            out = velocity(network, x, t, words, pooled, w)
            if train:
                out.square().mean().backward()


def train(setting: Setting, seed: int = 6) -> None:
    """Flow matching of the transformer and T5 into `work/flux`, at guidance 1."""
    model, encoder = _prepare(setting, seed)
    device, batch, out = setting.device, setting.batch or 512, setting.work / "flux"
    if (out / "start").exists():
        load_start(model, encoder, out / "start")
    model.time_text_embed.guidance_embedder.requires_grad_(False)  # left as it is: see make_model
    fast = setting.compiled(model)
    _compile(setting, batch, fast)
    print("flux compiled", flush=True)
    data = _Batches(setting, batch)
    dropout = DROPOUT if setting.recipe.dropout is None else setting.recipe.dropout
    optimizers = make_optimizers(setting, model, encoder, muon=2.5e-3, adam=1.2e-3)

    def save() -> None:
        model.save_pretrained(out / "stage1")
        encoder.save_pretrained(out / "text_encoder_2")

    def loss_of(
        net: Callable, z: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, caption: torch.Tensor
    ) -> torch.Tensor:
        words = encoder(input_ids=data.ids[caption].long()).last_hidden_state.float()
        x, guidance = torch.lerp(z, noise, t[:, None, None]), torch.ones(len(z), device=device)
        v = velocity(net, x, t, words, data.pooled[caption].float(), guidance)
        return (v - (noise - z)).square().mean()

    @torch.no_grad()
    def measure() -> dict[str, float]:
        losses = {}
        with setting.autocast():
            for name, (image, caption) in data.fixed.items():
                g, z = torch.Generator(device).manual_seed(0), data.tokens[image, 0].float()
                t = (torch.arange(len(z), device=device) + 0.5) / len(z)
                noise = torch.randn(z.shape, generator=g, device=device)
                losses[name] = float(loss_of(model, z, noise, t, caption))
        return losses

    run = Run("flux", setting, [model, encoder], optimizers, 0.999, save, measure)
    for _ in run:
        z, caption = data.draw(dropout)
        t = draw_times(batch, device, setting.recipe.times or "noisy")
        noise = torch.randn_like(z)
        with setting.autocast():
            loss = loss_of(fast, z, noise, t, caption)
        run.descend(loss)
        run.log(loss=loss)
    run.write_card(out, batch=batch, seed=seed)


def distil(setting: Setting, seed: int = 7) -> None:
    """Distil the classifier-free guidance of what `train` ended with into the guidance embedding: `work/flux/model`."""
    model, encoder = _prepare(setting, seed)
    device, batch, out = setting.device, setting.batch or 512, setting.work / "flux"
    teacher = copy.deepcopy(model).requires_grad_(False)
    fast, fast_teacher = setting.compiled(model), setting.compiled(teacher)
    _compile(setting, batch, fast)
    _compile(setting, batch, fast_teacher, train=False)
    print("distil compiled", flush=True)
    data = _Batches(setting, batch)
    wait_for(out / "card.json")
    for network in (model, teacher):
        network.load_state_dict(FluxTransformer2DModel.from_pretrained(out / "stage1").state_dict())
    encoder.load_state_dict(T5EncoderModel.from_pretrained(out / "text_encoder_2").float().state_dict())
    with torch.no_grad(), setting.autocast():
        parts = [encoder(input_ids=part.long()).last_hidden_state.half() for part in data.ids.split(1024)]
    table = torch.cat(parts)  # autocast on a CPU does not join halves
    optimizers = make_optimizers(setting, model, muon=8e-4, adam=5e-4)
    run = Run("distil", setting, [model], optimizers, 0.998, lambda: model.save_pretrained(out / "model"))
    ones = torch.ones(batch, device=device)
    no_words = table[data.empty].float().expand(batch, -1, -1).contiguous()
    no_pooled = data.pooled[data.empty].float().expand(batch, -1).contiguous()
    for _ in run:
        z, caption = data.draw(0.0)
        t = draw_times(batch, device, setting.recipe.times or "noisy")
        x = torch.lerp(z, torch.randn_like(z), t[:, None, None])
        w = torch.empty(batch, device=device).uniform_(*GUIDANCE)
        words, pooled = table[caption].float(), data.pooled[caption].float()
        with setting.autocast():
            with torch.no_grad():
                free = velocity(fast_teacher, x, t, no_words, no_pooled, ones)
                bound = velocity(fast_teacher, x, t, words, pooled, ones)
                target = free + w[:, None, None] * (bound - free)
            loss = (velocity(fast, x, t, words, pooled, w) - target).square().mean()
        run.descend(loss)
        run.log(loss=loss)
    run.write_card(setting.work / "distil", batch=batch, seed=seed)
