"""Codes of other pictures, which a model of given codes goes by: by the number of a sample, or by an image's name."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from codes.shard_folder import Split
from codes.shards import CodeDataset
from codes.spec import Codes
from common.errors import UserError
from pipelines.stages import check_given
from pipelines.two_stage import TwoStagePipeline
from stage2_prior.priors import Prior
from training.task import Batch


class GivenCodes:
    """Codes of other pictures, by the number of the sample; after the last picture the first comes again."""

    def __init__(self, dataset: CodeDataset, note: str | None) -> None:
        """note: what a person should know of them."""
        self.dataset = dataset
        self.note = note
        self._places: dict[str, int] | None = None
        shards = "".join(shard.sha256 for shard in dataset.shards)
        self.fingerprint = hashlib.sha256(shards.encode()).hexdigest()

    def of(self, samples: Sequence[int]) -> Codes:
        return self._fetch(samples)["codes"]

    def labels_of(self, samples: Sequence[int]) -> list[int]:
        """The class of each picture; that of one without any is the null label."""
        labels = self._fetch(samples)["labels"]
        return labels.masked_fill(labels < 0, self.dataset.num_classes).tolist()

    def has_classes_of(self, pipeline: TwoStagePipeline) -> bool:
        """Whether the pictures are of the classes that the model knows."""
        return bool(pipeline.num_classes) and self.dataset.class_names == pipeline.class_names

    def of_names(self, names: Sequence[str]) -> Codes:
        """Of the images of these names. Raises UserError where one is not among them."""
        if self._places is None:
            self._places = {name: place for place, name in enumerate(self.dataset.names())}
        for name in names:
            if name not in self._places:
                raise UserError(
                    f"given={self.dataset.folder} has no codes of the image {name}: encode exactly these images with "
                    "the tokenizer that the model goes by, and name the part of them, --given_split"
                )
        chosen = [self._places[name] for name in names]
        return self.dataset.fetch(chosen, chosen)["codes"]

    def _fetch(self, samples: Sequence[int]) -> Batch:
        chosen = [sample % len(self.dataset) for sample in samples]
        return self.dataset.fetch(chosen, chosen)


def given_codes(prior: Prior, folder: str, split: Split) -> GivenCodes:
    """Raises UserError for codes that are not those the prior goes by."""
    dataset = CodeDataset(folder, split)
    note = check_given(dataset, prior)
    if not len(dataset):
        raise UserError(f"{folder} holds no {split} images; give the other given_split, or other codes")
    return GivenCodes(dataset, note)
