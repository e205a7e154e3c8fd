"""The denoiser of the Flux-style pipeline: a flow transformer and its T5, then distilled guidance."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, T5Config, T5EncoderModel

from training.loop import Run, TrainingArguments, make_optimizers
from training.rows import VARIANTS, Latents, Rows, wait_for
from training.vae import CHANNELS

#: Share of captions that are replaced by the empty one.
DROPOUT = 0.12
#: Range of the distilled scales.
GUIDANCE = (1.0, 6.0)


def make_model() -> FluxTransformer2DModel:
    """Return a FluxTransformer2DModel with 3 double and 6 single blocks of width 192, starting as the zero function.

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
    """Return a T5 encoder of 128 x 4; eager attention, since fused kernels failed on the GPU with its position bias."""
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
    """Return the scheduler of flow matching; the shift is fixed, for the token count never changes."""
    return FlowMatchEulerDiscreteScheduler(shift=1.5, use_dynamic_shifting=False)


@torch.no_grad()
def encode_pooled(work: Path, ids: torch.Tensor, device: str) -> torch.Tensor:
    """Encode captions as the pooled CLIP vector that the Flux pipeline computes, half precision [U, 128]."""
    clip = CLIPTextModel.from_pretrained(work / "text_encoder").to(device).float().eval()
    return torch.cat([clip(input_ids=part.to(device).long()).pooler_output.half() for part in ids.split(4096)])


def predict(
    net: Callable[..., tuple[torch.Tensor]],
    x: torch.Tensor,
    t: torch.Tensor,
    states: torch.Tensor,
    pooled: torch.Tensor,
    guidance: torch.Tensor,
) -> torch.Tensor:
    """Predict the velocity, noise minus latent, float32 [B, 64, 4 C].

    Args:
        net: transformer, compiled or not.
        x: noisy tokens [B, 64, 4 C].
        t: times [B] in (0, 1).
        states: T5's, of the captions [B, 32, 128].
        pooled: CLIP vectors [B, 128].
        guidance: scales [B].
    """
    return net(
        hidden_states=x,
        timestep=t,
        encoder_hidden_states=states,
        pooled_projections=pooled,
        guidance=guidance,
        img_ids=FluxPipeline._prepare_latent_image_ids(len(x), 8, 8, x.device, torch.float32),
        txt_ids=torch.zeros(states.shape[1], 3, device=x.device),
        return_dict=False,
    )[0].float()


class _Setup:
    """A transformer and T5 on the device, and the captions and latents that they are trained on.

    The networks are untrained, or read from the folders `transformer` and `encoder` where those are there.
    """

    def __init__(self, arguments: TrainingArguments, seed: int, transformer: Path, encoder: Path) -> None:
        arguments.seed(seed)
        work, device = arguments.work, arguments.device
        if arguments.on_gpu:  # an illegal memory access of the fused kernels at the first step, otherwise
            torch.backends.cuda.enable_mem_efficient_sdp(False)
            torch.backends.cuda.enable_cudnn_sdp(False)
        tokens = torch.load(work / "tokens.pt")
        model, text_encoder = make_model(), make_text_encoder(tokens["t5_size"])
        if transformer.exists():
            model.load_state_dict(FluxTransformer2DModel.from_pretrained(transformer).state_dict())
            text_encoder.load_state_dict(T5EncoderModel.from_pretrained(encoder).float().state_dict())
        self.model, self.encoder = model.to(device), text_encoder.to(device)
        wait_for(work / "text" / "card.json", work / "vae" / "latents.pt")
        latents = torch.load(work / "vae" / "latents.pt").flatten(0, 1)
        latents = FluxPipeline._pack_latents(latents, *latents.shape).unflatten(0, (-1, VARIANTS)).to(device)
        self.data = Latents(Rows(work / "data", device), latents)
        self.ids, self.pooled = tokens["t5"].to(device), encode_pooled(work, tokens["clip"], device)
        self.empty = len(self.ids) - 1  # the last caption


def train(arguments: TrainingArguments, seed: int = 6) -> None:
    """Train transformer and T5 by flow matching at guidance 1, into `work/flux`."""
    batch, out = arguments.batch or 512, arguments.work / "flux"
    setup = _Setup(arguments, seed, out / "start" / "transformer", out / "start" / "text_encoder_2")
    model, encoder, data = setup.model, setup.encoder, setup.data
    model.time_text_embed.guidance_embedder.requires_grad_(False)  # left as it is: see make_model
    compiled = arguments.compiled(model)
    dropout = DROPOUT if arguments.dropout is None else arguments.dropout

    def compute_loss(
        net: Callable, z: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, caption: torch.Tensor
    ) -> torch.Tensor:
        with arguments.autocast():
            states = encoder(input_ids=setup.ids[caption].long()).last_hidden_state.float()
            x, guidance = torch.lerp(z, noise, t[:, None, None]), torch.ones_like(t)
            v = predict(net, x, t, states, setup.pooled[caption].float(), guidance)
        return (v - (noise - z)).square().mean()

    def compute_losses() -> dict[str, torch.Tensor]:
        z, noise, t, caption = data.draw(batch, arguments.times or "noisy")
        dropped = torch.rand(batch, device=caption.device) < dropout
        return {"loss": compute_loss(compiled, z, noise, t, caption.masked_fill(dropped, setup.empty))}

    @torch.no_grad()
    def measure() -> dict[str, float]:
        return data.measure(lambda *row: compute_loss(model, *row))

    def save() -> None:
        model.save_pretrained(out / "stage1")
        encoder.save_pretrained(out / "text_encoder_2")

    optimizers = make_optimizers(arguments, model, encoder, muon=2.5e-3, adam=1.2e-3)
    run = Run("flux", arguments, [model, encoder], optimizers, 0.999, save, measure)
    run.fit(compute_losses)
    run.write_card(out, batch=batch, seed=seed)


def distil(arguments: TrainingArguments, seed: int = 7) -> None:
    """Distil the classifier-free guidance of what `train` ended with into the guidance embedding: `work/flux/model`."""
    batch, out = arguments.batch or 512, arguments.work / "flux"
    wait_for(out / "card.json")
    setup = _Setup(arguments, seed, out / "stage1", out / "text_encoder_2")
    model, teacher = setup.model, copy.deepcopy(setup.model).requires_grad_(False)
    compiled, compiled_teacher = arguments.compiled(model), arguments.compiled(teacher)
    with torch.no_grad(), arguments.autocast():
        parts = [setup.encoder(input_ids=part.long()).last_hidden_state.half() for part in setup.ids.split(1024)]
    table = torch.cat(parts)  # autocast on a CPU does not join halves
    unconditional = torch.full((batch,), setup.empty, device=table.device)

    def guided(x: torch.Tensor, t: torch.Tensor, caption: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Combine the teacher's predictions with and without the caption."""
        ones, predictions = torch.ones_like(t), []
        for chosen in (unconditional, caption):
            text = table[chosen].float(), setup.pooled[chosen].float()
            predictions.append(predict(compiled_teacher, x, t, *text, ones))
        return torch.lerp(*predictions, scale[:, None, None])

    def compute_losses() -> dict[str, torch.Tensor]:
        z, noise, t, caption = setup.data.draw(batch, arguments.times or "noisy")
        x, scale = torch.lerp(z, noise, t[:, None, None]), torch.empty_like(t).uniform_(*GUIDANCE)
        with arguments.autocast():
            with torch.no_grad():
                target = guided(x, t, caption, scale)
            predicted = predict(compiled, x, t, table[caption].float(), setup.pooled[caption].float(), scale)
        return {"loss": (predicted - target).square().mean()}

    optimizers = make_optimizers(arguments, model, muon=8e-4, adam=5e-4)
    run = Run("distil", arguments, [model], optimizers, 0.998, lambda: model.save_pretrained(out / "model"))
    run.fit(compute_losses)
    run.write_card(arguments.work / "distil", batch=batch, seed=seed)
