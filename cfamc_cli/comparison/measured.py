"""What a measure comes to beside attacks: one accuracy, what it is under, and its other figures in words."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cfamc_cli.comparison.tables import USUAL_EPS
from cfamc_cli.recipe.schema import Norm, number
from cfamc_cli.store.records import Accuracy, MeasureResult, ThreatModel


@dataclass(frozen=True)
class Headline:
    """What of a measure stands beside the accuracy under an attack."""

    accuracy: Accuracy | None  # at the usual radius, or the mean over corruptions; None where there is none
    threat: ThreatModel | None  # that it is under; None for corruptions
    words: str  # its other figures


def headline(record: MeasureResult) -> Headline:
    """Sum up a measure; torch is not needed."""
    figures, norm = record.figures, norm_of(record)
    match record.measure:
        case "smallest":
            eps, limit = USUAL_EPS if norm == "linf" else "128/255", figures.get("auc up to eps")
            auc = f", AUC {_told(figures.get('auc'))} up to {length(limit, norm)}" if limit else ""
            words = f"median eps {length(figures.get('median eps'), norm)}{auc}"
        case "smoothing":
            eps, words = "0.25", f"mean certified radius {_told(figures.get('mean certified radius'))}"
        case "corruptions":
            return Headline(_mean(record), None, f"relative to clean {_told(figures.get('relative to clean'))}")
    at = next((point.accuracy for point in record.points if math.isclose(point.at, number(eps))), None)
    return Headline(at, ThreatModel(space="image", norm=norm, eps=eps), words)


def norm_of(record: MeasureResult) -> Norm:
    """What its lengths are measured in; certificates are in L2."""
    return "linf" if record.settings.get("norm") == "linf" else "l2"


def length(value: float | None, norm: Norm) -> str:
    """A length for a person: in 255ths, as images are stored, where it is of one pixel."""
    if value is None:
        return "unknown"
    return f"{255 * value:.3g}/255" if norm == "linf" and value else f"{value:.4g}"


def _told(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


def _mean(record: MeasureResult) -> Accuracy | None:
    """The mean over corruptions, with an interval for as many images as there are."""
    values = [point.accuracy.value for point in record.points]
    if not values:
        return None
    n, mean = record.clean.n, sum(values) / len(values)
    return Accuracy.of(round(mean * n), n).model_copy(update={"value": mean})
