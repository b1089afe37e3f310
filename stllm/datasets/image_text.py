"""The data set type `image_text`: image-text pairs in webdataset shards, such as the captions of the first stage.

A shard is a tar of images (jpg, png), each with a txt, or with a json that has a `caption`. This is the layout of the
shards that the published configurations name (cc_sbu, laion, cc_sbu_align). Letters in shapes: S image size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stllm.common.errors import UserError
from stllm.common.jsonl import loads
from stllm.common.registry import datasets
from stllm.common.schema import DatasetSettings, texts
from stllm.datasets.annotations import AnnotationError
from stllm.datasets.features import FeatureStore
from stllm.datasets.samples import LengthCheck, Sample, SampleKey
from stllm.datasets.shards.reader import Content, Shards, sample_key
from stllm.media.images import decode_image
from stllm.media.info import MediaError
from stllm.media.time_bound import now_reading
from stllm.processors.templates import Turn
from stllm.processors.transforms import ClipTransform


@datasets.register("image_text")
@dataclass(kw_only=True, eq=False)
class ImageTextCorpus:
    """A data set of image-text shards, with one caption per image.

    shards, cache_dir, cache_gb: see `Shards`. transform: prepares the image.
    instruction: texts such as "Describe this image in detail.", of which each sample draws one. If there are none, the
        prompt has no instruction.
    max_samples: use only this many samples from the beginning.
    features: precomputed features that replace the images. root: the folder that their keys are relative to.

    Raises the errors of `Shards`, and UserError if no shard holds a sample.
    """

    name: str
    shards: str | Sequence[str]
    transform: ClipTransform
    instruction: Sequence[str] = ()
    max_samples: int | None = None
    cache_dir: str | Path | None = None
    cache_gb: float | None = None
    features: FeatureStore | None = None
    root: str | None = None

    def __post_init__(self) -> None:
        self.media: str | None = "image"
        self.samples = Shards(self.name, self.shards, cache_dir=self.cache_dir, cache_gb=self.cache_gb)
        self.shards, self.reader, num_samples = self.samples.names, self.samples.reader, len(self.samples)
        if not num_samples:
            found = f"found no image or caption in {len(self.shards)} shards"
            raise UserError(f"{self.name}: {found}; expected jpg, png or webp with txt or json of the same name")
        self._num_samples = num_samples if self.max_samples is None else min(self.max_samples, num_samples)

    @classmethod
    def from_settings(cls, name: str, settings: DatasetSettings, *, transform: ClipTransform) -> "ImageTextCorpus":
        """Build the data set from its settings in the YAML. Raises UserError if they name no shards."""
        if not settings.shards:
            raise UserError(f"data set {name}: no shards are given; name its tar files, such as {{00000..01255}}.tar")
        return cls(
            name=name,
            shards=texts(settings.shards),
            transform=transform,
            instruction=texts(settings.instruction),
            max_samples=settings.max_samples,
            cache_dir=settings.cache_dir,
            cache_gb=settings.cache_gb,
            root=settings.media_dir,
        )

    def __len__(self) -> int:
        return self._num_samples

    def load(self, key: SampleKey, generator: np.random.Generator, check: LengthCheck | None = None) -> Sample:
        """Prepare the sample `key.index`, with pixel_values (1, 3, S, S); see `samples.Corpus`.

        Raises MediaError for an image that is missing or cannot be decoded, and AnnotationError for a missing or empty
        caption.
        """
        instruction = self.instruction[int(generator.integers(len(self.instruction)))] if self.instruction else ""
        crops = torch.Generator().manual_seed(int(generator.integers(2**63)))
        shard, number = self._place(key.index)
        now_reading(shard)
        content = self.reader.read(shard, number)
        name = f"{shard}/{content.name}"
        now_reading(name)
        turn = Turn(question="", answer=caption_of(content, name), instruction=instruction)
        sample = Sample(key, name, (turn,), media=self.media)
        if check is not None:
            check(sample, 1)
        if self.features is not None:
            self.features.fill(sample, sample_key(shard, number, content.name, self.root))
            return sample
        if content.image is None:
            raise MediaError(
                f"{name}: the caption has no image beside it; expected a jpg, png or webp of the same name",
                cause="missing",
            )
        frame = decode_image(content.image, name)
        sample.pixel_values = self.transform.for_clip(crops)(frame)[None]
        return sample

    @property
    def frame_settings(self) -> dict[str, Any]:
        """Empty, since an image has no frames to choose. See `FeatureSource`."""
        return {}

    def key_of(self, index: int) -> str:
        """Return the key of the features of sample `index`. Raises MediaError if its shard does not hold it."""
        shard, number = self._place(index)
        return sample_key(shard, number, self.reader.name(shard, number), self.root)

    def _place(self, index: int) -> tuple[str, int]:
        if index >= len(self):
            raise IndexError(f"{self.name}: sample {index} of {len(self)}")
        return self.samples.place(index)


def caption_of(content: Content, name: str) -> str:
    """Return the caption of a sample. Raises AnnotationError if it has none. name: the sample, for the message."""
    caption, is_json = (content.json, True) if content.text is None else (content.text, False)
    if caption is None:
        raise AnnotationError(f"{name}: the image has no caption beside it; expected a txt or json of the same name")
    try:
        text = caption.decode("utf-8")
        found = loads(text).get("caption") if is_json else text
    except (ValueError, AttributeError, RecursionError) as error:  # no UTF-8, no JSON, no object
        expected = 'a JSON object with "caption"' if is_json else "UTF-8 text"
        raise AnnotationError(f"{name}: the caption cannot be read ({error}); expected {expected}") from error
    if not isinstance(found, str) or not found.strip():
        raise AnnotationError(f"{name}: found the caption {found!r:.60}; expected text: correct or remove it")
    return found.strip().encode("utf-8", "replace").decode()  # JSON can spell half a surrogate pair, which is not text
