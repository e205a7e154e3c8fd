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
import pickle
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from eval.aggregates import GroupValue
from eval.alignment import ClipScore
from eval.clip import OpenClip
from eval.encoders import UNREADABLE, checked, quiet_transformers
from eval.images import load_image
from eval.imageset import ImageSet
from eval.metric import Metric
from eval.weights import (
    NO_NETWORK,
    WeightsFacts,
    checkpoints_folder,
    download,
    hub_cache,
    in_hub_cache,
    network_answers,
)


class AestheticPredictor:
    """LAION's aesthetic predictor v2: five linear layers on the image embedding of OpenAI's CLIP ViT-L/14.

    Trained by least squares on people's ratings of 1 to 10 (SAC, LAION-Logos, AVA). There is nothing between the layers
    but dropout, so that the score is linear in the embedding of length 1.

    Args:
        file: the layers' file; among torch.hub's checkpoints if not given.
        weights_dir: where CLIP's weights are; see `eval.clip.OpenClip`.
        device: where CLIP runs.
    """

    ARCHITECTURE = "ViT-L-14-quickgelu"
    FILE = "sac+logos+ava1-l14-linearMSE.pth"
    URL = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth"
    # Number of each linear layer in the file (dropout has the others), and its outputs and inputs.
    LAYERS: ClassVar = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}

    def __init__(
        self, file: str | Path | None = None, weights_dir: str | Path | None = None, device: str = "cpu"
    ) -> None:
        self.name = "LAION aesthetic predictor v2 (CLIP ViT-L/14)"
        self.file = None if file is None else Path(file)
        self.clip = OpenClip(self.ARCHITECTURE, "openai", weights_dir, device=device)

    def _head(self) -> WeightsFacts:
        path = self.file or checkpoints_folder() / self.FILE
        return WeightsFacts(
            encoder=self.name,
            source=self.FILE,
            files=(path,) if path.is_file() else (),
            looked_in=(path,),
            resize="",
            input_range="",
            licence="Apache-2.0",
            how_to_get=f"put the file of {self.URL} there or give its path as file",
        )

    def weights(self) -> WeightsFacts:
        """State both files, the layers' and CLIP's; present only if both are."""
        parts = [self._head(), self.clip.weights()]
        missing = [facts for facts in parts if not facts.present]
        return WeightsFacts(
            encoder=self.name,
            source=" and ".join(facts.source for facts in missing or parts),
            files=() if missing else tuple(file for facts in parts for file in facts.files),
            looked_in=tuple(path for facts in missing or parts for path in facts.looked_in),
            resize=parts[1].resize,
            input_range=parts[1].input_range,
            licence=f"layers: {parts[0].licence}; CLIP: {parts[1].licence}",
            how_to_get="; ".join(facts.how_to_get for facts in missing or parts),
        )

    def _obtain(self) -> WeightsFacts:
        facts = self._head()
        if not facts.present:
            if self.file:
                raise facts.missing()
            download(self.URL, facts.looked_in[0], facts)
        return self._head()

    @cached_property
    def id(self) -> str:
        """Fingerprint of the layers' file, and CLIP's own id."""
        return f"laion-aesthetic-v2-{self._obtain().fingerprint}-{self.clip.id}"

    @cached_property
    def _layers(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        facts = self._obtain()
        problem = "other tensors"
        try:
            state = torch.load(facts.files[0], map_location="cpu", weights_only=True)
            layers = [(state[f"layers.{n}.weight"].float(), state[f"layers.{n}.bias"].float()) for n in self.LAYERS]
            if [weight.shape for weight, _ in layers] == list(self.LAYERS.values()):
                return layers
        except (*UNREADABLE, AttributeError, TypeError, IndexError) as error:
            # torch's own text on a file that is more than tensors advises to run whatever is in it
            unsafe = isinstance(error, pickle.UnpicklingError)
            problem = "not a file of tensors alone" if unsafe else str(error).partition("\n")[0]
        raise ValueError(
            f"expected the layers of {self.name} in {facts.files[0]}, got {problem}; download it again from {self.URL}"
        )

    def prepare(self) -> None:
        """Load layers and CLIP now, so that a missing file is found before any work is done."""
        _ = self._layers
        self.clip.prepare()

    def score(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Score embeddings of `clip`: float32 [N, 768], each of length 1, to [N], about 1 to 10."""
        for weight, bias in self._layers:
            embeddings = F.linear(embeddings, weight, bias)
        return embeddings[:, 0]


class AestheticScore(Metric):
    """Mean score of LAION's aesthetic predictor over the images of a group; the prompt plays no part.

    Args:
        file: see `AestheticPredictor`.
        weights_dir: see `AestheticPredictor`.
        name: for tables.
        device: where CLIP runs.
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
        super().__init__(None, name)
        self._judge = AestheticPredictor(file, weights_dir, device)

    @property
    def judge(self) -> AestheticPredictor:
        """The predictor; see `Metric.judge`."""
        return self._judge

    def prepare(self) -> None:
        """See `Metric.prepare`."""
        self.judge.prepare()

    def per_group(self, images: ImageSet) -> list[GroupValue]:
        """See `Metric.per_group`."""
        _ = self.judge._layers  # a missing file is found before CLIP embeds thousands of images
        return _group_means(images, self.judge.score(images.embeddings(self.judge.clip)))


class HpsClip(OpenClip):
    """The CLIP model of Human Preference Score v2.1: a ViT-H/14 of open_clip, fine-tuned on people's choices.

    Wide and high images are padded and not cropped, as the authors' package does. Computed in float32 (theirs: mixed
    precision).

    Args:
        file: the checkpoint; the Hugging Face cache's if not given.
        device: where the model runs.
    """

    ARCHITECTURE = "ViT-H-14"
    REPOSITORY = "xswu/HPSv2"
    FILE = "HPS_v2.1_compressed.pt"

    def __init__(self, file: str | Path | None = None, device: str = "cpu") -> None:
        super().__init__(self.ARCHITECTURE, "hps_v2.1", name="HPS v2.1 (CLIP ViT-H/14)", device=device)
        self._places = None if file is None else [Path(file)]

    def _published(self) -> tuple[dict[str, Any], str, list[str]]:
        return {"resize_mode": "longest"}, self.REPOSITORY, [self.FILE]

    def weights(self) -> WeightsFacts:
        """See `Encoder.weights`."""
        size = self._config["vision_cfg"]["image_size"]
        return replace(
            super().weights(),
            resize=f"longest side to {size}, bicubic, antialiased, padded with black to {size}x{size}",
            input_range="[0, 1], less CLIP's mean, over its deviation",
            licence="Apache-2.0",
            how_to_get=f"on a machine with a network: hf download {self.REPOSITORY} {self.FILE}; "
            + ("put it there" if self._places else "or give its path as file"),
        )

    @cached_property
    def id(self) -> str:
        """Fingerprint of the checkpoint, which is fetched if it is missing."""
        self._obtain()
        return f"hps-v2.1-{self.weights().fingerprint}"


class HpsScore(ClipScore):
    """Mean Human Preference Score v2.1 of the images of a group for their prompt.

    It compares images of one prompt; a mean over prompts compares methods on the same prompts, and nothing else.

    Args:
        file: see `HpsClip`.
        name: for tables.
        device: where the model runs.
    """

    name = "hps_v2_1"
    version = 1
    unit = "100 max(cosine, 0), 0 to 100"
    description = "mean over a group's images of 100 max(cos, 0) of image and prompt by HPS v2.1 (Wu et al. 2023)"

    def __init__(self, file: str | Path | None = None, name: str | None = None, device: str = "cpu") -> None:
        super().__init__(HpsClip(file, device), name)


class InstructBlip:
    """InstructBLIP-FlanT5 (Dai et al. 2023) of transformers, asked whether an image shows a text. In float32.

    Images are squashed to the model's size here (published: 224 x 224), since transformers' own resize changed with its
    versions; normalisation is that of the folder's processor.

    Args:
        folder: what transformers saves of model and processor, of whatever size; the Hugging Face cache's
            instructblip-flan-t5-xl (4 billion parameters, 16 GB) if not given.
        device: where the model runs.
    """

    REPOSITORY = "Salesforce/instructblip-flan-t5-xl"
    NEEDED = ("config.json", "tokenizer_config.json", "qformer_tokenizer/tokenizer_config.json")
    ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
    KINDS = (".json", ".safetensors", ".txt", ".model")

    def __init__(self, folder: str | Path | None = None, device: str = "cpu") -> None:
        self.folder = None if folder is None else Path(folder)
        self.device = torch.device(device)
        self._slug = Path(folder or self.REPOSITORY).name
        self.name = f"{self._slug} (VQAScore's question)"

    def weights(self) -> WeightsFacts:
        """State the weights; see `eval.encoders.Encoder.weights`."""
        folder = self.folder or in_hub_cache(self.REPOSITORY, self.NEEDED)
        files = () if folder is None or not self._complete(folder) else folder.rglob("*")
        return WeightsFacts(
            encoder=self.name,
            source=f"{', '.join(self.NEEDED)} and {self.ONE_FILE}, whole or in parts"
            + ("" if self.folder else f", of {self.REPOSITORY}"),
            files=tuple(sorted(file for file in files if file.is_file() and file.suffix in self.KINDS)),
            looked_in=(self.folder or hub_cache(self.REPOSITORY),),
            resize="squashed to the model's size (published: 224x224), bicubic, antialiased, aspect lost",
            input_range="as its processor says (published: [0, 1], less CLIP's mean, over its deviation)",
            licence="as the folder's README.md says" if self.folder else "MIT",
            how_to_get="put an InstructBLIP-FlanT5 as transformers saves it there or give another folder"
            if self.folder
            else f"on a machine with a network: hf download {self.REPOSITORY} --exclude '*.bin'; "
            "or give a folder that has it as folder",
        )

    def _complete(self, folder: Path) -> bool:
        parts = [self.ONE_FILE]
        if (folder / self.INDEX).is_file():
            parts = json.loads((folder / self.INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        return all((folder / name).is_file() for name in (*self.NEEDED, *parts))

    def _obtain(self) -> WeightsFacts:
        facts = self.weights()
        if facts.present:
            return facts
        if self.folder:
            raise facts.missing()
        if not network_answers(None):
            raise facts.missing(NO_NETWORK)
        from huggingface_hub import snapshot_download

        try:
            snapshot_download(self.REPOSITORY, allow_patterns=[f"*{kind}" for kind in self.KINDS])
        except Exception as error:  # the kind of exception depends on the HTTP library of the installed version
            raise facts.missing(str(error)) from error
        facts = self.weights()
        if not facts.present:
            raise facts.missing("the repository lacks a file")
        return facts

    @cached_property
    def id(self) -> str:
        """The folder's or repository's name and a fingerprint of weights, tokenizers and processor."""
        return f"{self._slug}-{self._obtain().fingerprint}"

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        from transformers import InstructBlipForConditionalGeneration, InstructBlipProcessor

        folder = next(file.parent for file in self._obtain().files if file.name == "config.json")
        try:
            with quiet_transformers():
                model, found = InstructBlipForConditionalGeneration.from_pretrained(
                    folder, local_files_only=True, output_loading_info=True
                )
            processor = InstructBlipProcessor.from_pretrained(folder, local_files_only=True)
        except UNREADABLE as error:
            raise ValueError(
                f"expected an InstructBLIP-FlanT5 in {folder}, got what cannot be loaded "
                f"({str(error).partition(chr(10))[0]}); {self.weights().how_to_get}"
            ) from error
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
            raise ValueError(
                f"expected an InstructBLIP-FlanT5 in {folder}, got {', '.join(problems)}; {self.weights().how_to_get}"
            )
        processor.num_query_tokens = model.config.num_query_tokens
        return model.float().eval().requires_grad_(False).to(self.device), processor

    def prepare(self) -> None:
        """Load the model now, so that a missing file is found before any work is done."""
        _ = self._parts

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
        model, processor = self._parts
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


class VqaScore(Metric):
    """Mean probability that a model answers "yes" when asked whether the image shows its prompt.

    Lin et al. recommend CLIP-FlanT5, whose code is bound to old versions of its libraries. InstructBLIP-FlanT5 is the
    other of their models; its numbers are not those of CLIP-FlanT5, and are never called so. The authors' package takes
    the geometric mean of "yes" and of the end of the answer; here it is P("yes") itself, as their paper defines it.

    Args:
        folder: see `InstructBlip`.
        question: with one `{}` for the prompt; the default is the authors' for this model.
        answer: the authors' for this model.
        name: for tables.
        device: where the model runs.
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
        super().__init__(None, name)
        if question.count("{}") != 1:
            raise ValueError(f"expected a question with one {{}} for the prompt, got {question!r}")
        self.question = question
        self.answer = answer
        self._judge = InstructBlip(folder, device)

    @property
    def judge(self) -> InstructBlip:
        """The model that is asked; see `Metric.judge`."""
        return self._judge

    def settings(self) -> dict[str, Any]:
        """See `Metric.settings`."""
        return {"question": self.question, "answer": self.answer}

    def prepare(self) -> None:
        """See `Metric.prepare`."""
        self.judge.prepare()

    def per_group(self, images: ImageSet) -> list[GroupValue]:
        """See `Metric.per_group`; every image is asked about anew at every call."""
        starts = range(0, len(images.rows), images.batch_size)
        scores = []
        for start in tqdm(starts, desc=f"ask {self.judge.name}", unit="batch", disable=not images.progress):
            rows = images.rows[start : start + images.batch_size]
            pixels = [load_image(images.folder / row.path) for row in rows]
            # not `format`: prompts may have braces of their own
            questions = [self.question.replace("{}", row.prompt) for row in rows]
            scores.append(self.judge.probability(pixels, questions, self.answer))
        return _group_means(images, torch.cat(scores))


def _group_means(images: ImageSet, scores: torch.Tensor) -> list[GroupValue]:
    """Return each group's mean of the scores [N] of all images."""
    scores = scores.double()
    return [images.group_value(group, value=scores[members].mean().item()) for group, members in images.groups.items()]
