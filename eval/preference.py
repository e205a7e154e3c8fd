"""Would people like the image, and would they say that it shows its text? Scores learned from people's answers.

Optional: three second opinions on quality beside the CLIPScore, for real models. Each is a model's guess of a
judgement, with that model's taste, and is named by the model. None needs a package beyond those of `eval`; the weights
lie where their publishers' code puts them, or where the arguments say. Without them each fails within seconds and says
what to put where.

- `AestheticScore`: LAION's aesthetic predictor, version 2. It sees the image alone.
- `HpsScore`: Human Preference Score v2 (Wu et al. 2023, arXiv 2306.09341), a CLIP model trained on people's choices.
- `VqaScore`: P("yes") when asked whether the image shows the text (Lin et al. 2024, arXiv 2404.01291), by
  InstructBLIP-FlanT5, the public one of their models that transformers can run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from eval.alignment import ClipScore
from eval.clip import OpenClip
from eval.encoders import Network, checked, quiet_transformers
from eval.images import load_image
from eval.imageset import ImageSet
from eval.metric import ImageMetric
from eval.weights import FACTS, WeightsFacts


class AestheticHead(Network):
    """The five linear layers of LAION's aesthetic predictor v2, with nothing between them but dropout."""

    ROW = "aesthetic"
    # Number of each linear layer in the file (dropout has the others), and its outputs and inputs.
    LAYERS: ClassVar = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}

    def _load(self, facts: WeightsFacts) -> list[tuple[torch.Tensor, torch.Tensor]]:
        state = torch.load(facts.files[0], map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError("no tensors by name")
        layers = [(state[f"layers.{n}.weight"].float(), state[f"layers.{n}.bias"].float()) for n in self.LAYERS]
        if [weight.shape for weight, _ in layers] != list(self.LAYERS.values()):
            raise ValueError("tensors of other shapes")
        return layers

    def score(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Score embeddings of CLIP ViT-L/14: float32 [N, 768], each of length 1, to [N], about 1 to 10."""
        for weight, bias in self._network:
            embeddings = F.linear(embeddings, weight, bias)
        return embeddings[:, 0]


class AestheticPredictor:
    """LAION's aesthetic predictor v2: five linear layers on the image embedding of OpenAI's CLIP ViT-L/14.

    Trained by least squares on people's ratings of 1 to 10 (SAC, LAION-Logos, AVA). The score is linear in the
    embedding of length 1.

    Args:
        file: the layers' file; among torch.hub's checkpoints if not given.
        weights_dir: where CLIP's weights are; see `eval.clip.OpenClip`.
    """

    ARCHITECTURE = "ViT-L-14-quickgelu"

    def __init__(
        self, file: str | Path | None = None, weights_dir: str | Path | None = None, device: str = "cpu"
    ) -> None:
        self.name = "LAION aesthetic predictor v2 (CLIP ViT-L/14)"
        self.head = AestheticHead(self.name, "laion-aesthetic-v2", device, file)
        self.clip = OpenClip(self.ARCHITECTURE, "openai", weights_dir, device=device)

    def weights(self) -> WeightsFacts:
        """State both files, the layers' and CLIP's; present only if both are."""
        parts = head, clip = self.head.weights(), self.clip.weights()
        wanted = [facts for facts in parts if not facts.present]
        return replace(
            clip,
            encoder=self.name,
            source=" and ".join(facts.source for facts in wanted or parts),
            files=() if wanted else head.files + clip.files,
            looked_in=tuple(path for facts in wanted or parts for path in facts.looked_in),
            licence=f"layers: {head.licence}; CLIP: {clip.licence}",
            how_to_get="; ".join(facts.how_to_get for facts in wanted or parts),
        )

    @property
    def id(self) -> str:
        """The ids of both parts."""
        return f"{self.head.id}-{self.clip.id}"

    def prepare(self) -> None:
        """Load layers and CLIP now, so that a missing file is found before any work is done."""
        self.head.prepare()
        self.clip.prepare()


class AestheticScore(ImageMetric):
    """Mean score of LAION's aesthetic predictor over the images of a group; the prompt plays no part.

    Args:
        file: see `AestheticPredictor`.
        weights_dir: see `AestheticPredictor`.
    """

    name = "aesthetic"
    version = 1
    higher_is_better = True
    unit = "predicted rating, about 1 to 10"
    description = "mean over a group's images of LAION's aesthetic predictor v2 on the CLIP ViT-L/14 embedding"

    def __init__(
        self,
        file: str | Path | None = None,
        weights_dir: str | Path | None = None,
        name: str | None = None,
        device: str = "cpu",
    ) -> None:
        super().__init__(AestheticPredictor(file, weights_dir, device), name)

    def scores(self, images: ImageSet) -> torch.Tensor:
        self.judge.head.prepare()  # a missing file is found before CLIP embeds thousands of images
        return self.judge.head.score(images.embeddings(self.judge.clip))


class HpsClip(OpenClip):
    """The CLIP model of Human Preference Score v2.1: a ViT-H/14 of open_clip, fine-tuned on people's choices.

    Wide and high images are padded and not cropped, as the authors' package does. Computed in float32 (theirs: mixed
    precision).

    Args:
        file: the checkpoint; the Hugging Face cache's if not given.
    """

    ROW = "hps"
    ARCHITECTURE = "ViT-H-14"

    def __init__(self, file: str | Path | None = None, device: str = "cpu") -> None:
        super().__init__(self.ARCHITECTURE, name="HPS v2.1 (CLIP ViT-H/14)", device=device)
        self.slug = "hps-v2.1"
        self._places = None if file is None else [Path(file)]

    def _published(self) -> tuple[dict[str, Any], str, list[str]]:
        return {"resize_mode": "longest"}, FACTS[self.ROW]["repository"], FACTS[self.ROW]["files"]


class HpsScore(ClipScore):
    """Mean Human Preference Score v2.1 of the images of a group for their prompt.

    It compares images of one prompt; a mean over prompts compares methods on the same prompts, and nothing else.

    Args:
        file: see `HpsClip`.
    """

    name = "hps_v2_1"
    version = 1
    unit = "100 max(cosine, 0), 0 to 100"
    description = "mean over a group's images of 100 max(cos, 0) of image and prompt by HPS v2.1 (Wu et al. 2023)"

    def __init__(self, file: str | Path | None = None, name: str | None = None, device: str = "cpu") -> None:
        super().__init__(HpsClip(file, device), name)


class InstructBlip(Network):
    """InstructBLIP-FlanT5 (Dai et al. 2023) of transformers, asked whether an image shows a text. In float32.

    Images are squashed to the model's size here (published: 224 x 224), since transformers' own resize changed with its
    versions; normalisation is that of the folder's processor.

    Args:
        folder: what transformers saves of model and processor, of whatever size; the Hugging Face cache's
            instructblip-flan-t5-xl (4 billion parameters, 16 GB) if not given.
    """

    ROW = "instructblip"
    ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"

    def __init__(self, folder: str | Path | None = None, device: str = "cpu") -> None:
        slug = Path(folder or FACTS[self.ROW]["repository"]).name
        super().__init__(f"{slug} (VQAScore's question)", slug, device, folder)

    def weights(self) -> WeightsFacts:
        facts = super().weights()
        if not facts.files or not self._complete(facts.files[0].parent):
            return replace(facts, files=())
        kept = {pattern[1:] for pattern in FACTS[self.ROW]["patterns"]}
        files = (file for file in facts.files[0].parent.rglob("*") if file.is_file() and file.suffix in kept)
        return replace(facts, files=tuple(sorted(files)))

    def _complete(self, folder: Path) -> bool:
        parts = [self.ONE_FILE]
        if (folder / self.INDEX).is_file():
            parts = json.loads((folder / self.INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        return all((folder / name).is_file() for name in parts)

    def _load(self, facts: WeightsFacts) -> tuple[Any, Any]:
        from transformers import InstructBlipForConditionalGeneration, InstructBlipProcessor

        folder = next(file.parent for file in facts.files if file.name == "config.json")
        with quiet_transformers():
            model, found = InstructBlipForConditionalGeneration.from_pretrained(
                folder, local_files_only=True, output_loading_info=True
            )
        processor = InstructBlipProcessor.from_pretrained(folder, local_files_only=True)
        # Each of these would give a number without a word: weights at random, a decoder-only model's position of the
        # answer, and a question whose places for the image nobody fills.
        token = processor.tokenizer.convert_tokens_to_ids("<image>")
        wrong = {
            "missing weights": sorted(found["missing_keys"])[:3],
            "a decoder-only language model": model.config.use_decoder_only_language_model,
            "another token for the image in tokenizer and model": token != model.config.image_token_index,
        }
        problems = [f"{what} {value}" if isinstance(value, list) else what for what, value in wrong.items() if value]
        if problems:
            raise ValueError(", ".join(problems))
        processor.num_query_tokens = model.config.num_query_tokens
        return model.float().eval().requires_grad_(False).to(self.device), processor

    @torch.inference_mode()
    def probability(self, images: Sequence[torch.Tensor], questions: Sequence[str], answer: str) -> torch.Tensor:
        """Return how probable an answer's words are as the beginning of what the model says.

        Args:
            images: N uint8 tensors [3, H, W], RGB.
            questions: N texts, one an image.
            answer: the same for all.

        Returns:
            float32 [N] in [0, 1], on the CPU.

        Raises:
            ValueError: a question is longer than the model reads.
        """
        model, processor = self._network
        size = (model.config.vision_config.image_size,) * 2
        inputs = processor(
            images=[to_pil_image(checked(image)).resize(size, Image.Resampling.BICUBIC) for image in images],
            text=list(questions),
            padding=True,
            return_tensors="pt",
        ).to(self.device)
        limit, length = model.config.qformer_config.max_position_embeddings, inputs["qformer_input_ids"].shape[1]
        if length > limit:
            raise ValueError(
                f"expected questions of at most {limit} tokens, got {length} in '{max(questions, key=len)[:60]}...'; "
                "shorten the prompt, or leave this metric out"
            )
        wanted = processor.tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
        wanted = wanted.expand(len(images), -1).to(self.device)
        start = wanted.new_full((len(images), 1), model.config.text_config.decoder_start_token_id)
        logits = model(**inputs, decoder_input_ids=torch.cat([start, wanted[:, :-1]], dim=1)).logits
        logarithms = logits.float().log_softmax(dim=-1).gather(-1, wanted[..., None])[..., 0]
        return logarithms.sum(dim=1).exp().cpu()


class VqaScore(ImageMetric):
    """Mean probability that a model answers "yes" when asked whether the image shows its prompt.

    Lin et al. recommend CLIP-FlanT5, whose code is bound to old versions of its libraries. InstructBLIP-FlanT5 is the
    other of their models; its numbers are not those of CLIP-FlanT5, and are never called so. The authors' package takes
    the geometric mean of "yes" and of the end of the answer; here it is P("yes") itself, as their paper defines it.

    Args:
        folder: see `InstructBlip`.
        question: with one `{}` for the prompt; the default is the authors' for this model.
        answer: the authors' for this model.
    """

    name = "vqa_score_instructblip"
    version = 1
    higher_is_better = True
    bounds = (0.0, 1.0)
    unit = "probability, 0 to 1"
    description = 'mean over a group\'s images of P("yes" | image, does it show the prompt?) (Lin et al. 2024)'

    def __init__(
        self,
        folder: str | Path | None = None,
        question: str = 'Question: Does this figure show "{}"? Please answer yes or no.',
        answer: str = "yes",
        name: str | None = None,
        device: str = "cpu",
    ) -> None:
        super().__init__(InstructBlip(folder, device), name)
        if question.count("{}") != 1:
            raise ValueError(f"expected a question with one {{}} for the prompt, got {question!r}")
        self.question = question
        self.answer = answer

    def settings(self) -> dict[str, Any]:
        return {"question": self.question, "answer": self.answer}

    def scores(self, images: ImageSet) -> torch.Tensor:
        # every image is asked about anew at every call
        starts = range(0, len(images.rows), images.batch_size)
        scores = []
        for start in tqdm(starts, desc=f"ask {self.judge.name}", unit="batch", disable=not images.progress):
            rows = images.rows[start : start + images.batch_size]
            pixels = [load_image(images.folder / row.path) for row in rows]
            # not `format`: prompts may have braces of their own
            questions = [self.question.replace("{}", row.prompt) for row in rows]
            scores.append(self.judge.probability(pixels, questions, self.answer))
        return torch.cat(scores)
