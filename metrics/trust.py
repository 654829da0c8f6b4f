"""What a figure of so many images is worth: the one place that says whether it is labelled or refused, and why."""

from __future__ import annotations

from typing import NamedTuple

from common.errors import UserError
from common.wording import counted

CONVENTION = 50_000  # images on each side of a published FID, inception score, precision and recall
SMALLEST = 2  # images of which there is a covariance
FEW_IN_A_SPLIT = 4  # images a class, below which a split of the inception score does not know its classes


class Worth(NamedTuple):
    """Of a figure."""

    label: str  # to stand beside the number, such as `biased, N=500`; empty where nothing is to be said
    reason: str  # one sentence for a person; empty where nothing is to be said

    def __bool__(self) -> bool:
        """Whether there is something to be said."""
        return bool(self.label)


FINE = Worth("", "")


def frechet(made: int, reference: int, width: int) -> Worth:
    """Of a Frechet distance. Its estimate is too large by a term that falls with 1/N and is not the same for all
    models, so that figures of different counts, and of different models at one small count, cannot be compared (Chong
    and Forsyth 2020, arXiv:1911.07023; Binkowski et al. 2018, arXiv:1801.01401). Published figures are of 50,000
    images, as in Heusel et al. 2017 (arXiv:1706.08500), whose code advises 10,000 at least for its 2,048 features.

    made, reference: images of the smaller set of features, 0 for a reference that does not tell; width: of the
    features. Raises UserError for less than two images, which have no covariance.
    """
    if made < SMALLEST or 0 < reference < SMALLEST:
        raise UserError(f"a Frechet distance of {counted(min(made, reference or made), 'image')}, expected at least 2")
    fewest = min(made, reference or made)
    if fewest <= width:
        return Worth(
            f"singular, N={fewest}",
            f"the covariance of {width:,} features from {counted(fewest, 'image')} is singular, and the distance far "
            f"too large: take KID, or more than {width:,} images, or a network of fewer features",
        )
    if fewest < CONVENTION:
        return Worth(
            f"biased, N={fewest}",
            f"a Frechet distance of {fewest:,} images is larger than one of {CONVENTION:,}, by an amount that depends "
            "on the model: compare it with figures of as many images alone",
        )
    return FINE


def kernel(made: int, reference: int, subset_size: int) -> Worth:
    """Of a kernel distance, which is unbiased for any count (Binkowski et al. 2018, section 3): only its deviation over
    subsets means little where these overlap, as they do in sets that are hardly larger. Raises UserError for sets
    smaller than a subset."""
    fewest = min(made, reference)
    if fewest < max(SMALLEST, subset_size):
        raise UserError(
            f"a kernel distance over subsets of {subset_size} from {counted(fewest, 'image')}; give a subset size of "
            f"{SMALLEST} to {fewest}, or more images"
        )
    if fewest < 2 * subset_size:
        return Worth(
            f"overlapping subsets, N={fewest}",
            f"subsets of {subset_size:,} from {fewest:,} images are nearly the same ones: the mean is unbiased, the "
            "deviation over subsets too small",
        )
    return FINE


def inception_score(made: int, splits: int, classes: int) -> Worth:
    """Of an inception score: the entropy of the classes of a split is too low while its images are few beside the
    classes, so the score is too (Chong and Forsyth 2020; Barratt and Sharma 2018, arXiv:1801.01973, on splits and on
    images that are none of ImageNet's). Published figures are of 50,000 images in ten splits."""
    each = made // splits
    if each < FEW_IN_A_SPLIT * classes:
        return Worth(
            f"biased, {each} images a split",
            f"a split of {each:,} images is too small for {classes:,} classes: the score is too low, and more so the "
            f"better the model is; published ones are of {CONVENTION:,} images",
        )
    return FINE


def manifolds(made: int, reference: int, k: int) -> Worth:
    """Of precision, recall, density and coverage: balls reach to the k-th neighbour, so they are wider among fewer
    images, and sets of different sizes favour one side. Published figures are of 50,000 images on each side and k=3
    (Kynkaanniemi et al. 2019, arXiv:1904.06991), or of 10,000 and k=5 (Naeem et al. 2020, arXiv:2002.09797). Raises
    UserError where an image has no k-th neighbour."""
    fewest = min(made, reference)
    if fewest <= k:
        raise UserError(f"balls to the neighbour {k} of {counted(fewest, 'image')}: give more images than that")
    if made != reference:
        return Worth(
            f"unequal sets, N={made} and {reference}",
            f"{made:,} made and {reference:,} real images: the set of fewer has the wider balls, so precision and "
            "recall cannot be compared with each other; take as many of both",
        )
    if fewest < CONVENTION:
        return Worth(
            f"N={fewest}",
            f"balls among {fewest:,} images are wider than among {CONVENTION:,}: compare with figures of as many "
            "images and the same k alone",
        )
    return FINE


def check_comparable(made: dict[str, object], reference: dict[str, object]) -> None:
    """Raises UserError unless features of made and of reference images are of one network with one treatment, by their
    descriptions (`FeatureNetwork.describe`)."""
    if made.get("fingerprint") == reference.get("fingerprint"):
        return
    differing = sorted(key for key in {*made, *reference} - {"fingerprint"} if made.get(key) != reference.get(key))
    said = "; ".join(f"{key}: {made.get(key)} and {reference.get(key)}" for key in differing) or "their weights differ"
    raise UserError(
        f"the reference is of another network or treatment ({said}), so no distance from it means anything; make the "
        "reference anew with this network"
    )
