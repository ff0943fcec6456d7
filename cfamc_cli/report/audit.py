"""The audit of an evaluation in plain words, to be pasted where a reviewer reads: made from its record alone."""

from __future__ import annotations

from cfamc_cli.report import terminal
from cfamc_cli.store.records import AttackRecord, Flag, failed_names, failures

_LAST_CHECK = "between"  # of an audit: a record without it has none, or one of an older version
_LOOKED_FOR: dict[str, tuple[str, ...]] = {
    "answers that change with the pass, the batch or what was asked before": (
        "random",
        "batch",
        "not-finite",
        "memory",
        "drift",
        "process",
    ),
    "gradients that are missing, lead nowhere or are not those of the answers": (
        "zero-gradient",
        "grad-mode",
        "test-time-gradient",
        "no-ascent",
        "noise-over-pgd",
        "gradient",
    ),
    "logits that blind a loss": (
        "probabilities",
        "logit-scale",
        "logit-gap",
        "logit-shift",
        "temperature",
        "ratio-tied",
        "decoy",
    ),
    "a copy that answers otherwise than what was judged": ("search",),
    "answers that hardly change before an image leaves the ball": ("radius", "leap"),
    "answers that leap halfway to another image": ("between",),
    "images that only 8-bit examples break": ("rounding",),
    "images that fall to weaker attacks alone": ("fgsm-over-pgd", "more-steps", "more-restarts"),
    "images that fall to PGD, APGD-DLR or a surrogate with standardised logits": (
        "weak-attack",
        "adaptive-loss",
        "surrogate",
    ),
    "images that fall to Square, which needs no gradient": ("black-box",),
    "images that fall to examples of another network": ("transfer",),
    "accuracy that does not fall as eps rises": ("reach", "eps-zero", "eps-one", "eps-monotone", "eps-flat"),
    "examples outside the ball or the image range": ("invalid-example",),
}


def lacks_audit(record: AttackRecord, *, source: str = "") -> bool:
    """Whether the full audit, with all checks of this version and examples of the run `source`, was not made."""
    texts = {flag.name: flag.text for flag in record.flags}
    return _LAST_CHECK not in texts or source not in texts.get("transfer", "")


def verdict(record: AttackRecord) -> str:
    """What came of the checks, in a few words."""
    if failed := failed_names(record.flags):
        return f"failed: {', '.join(failed)}"
    made = sum(flag.verdict == "passed" for flag in record.flags)
    return f"{made} passed" + (", no audit" if lacks_audit(record) else "")


def audit_paragraph(record: AttackRecord) -> str:
    """What was attacked, with what, what was looked for and what was not, in one paragraph without a line break."""
    threat, data, flags = record.threat, record.data, {flag.name: flag for flag in record.flags}
    where = "the pixels of an image" if threat.space == "image" else "every crop of an image by itself"
    settings = ", ".join(
        f"{key} {value}"
        for key, value in record.settings.items()
        if key not in ("name", "eps", "norm") and isinstance(value, str | int | float)
    )
    said = [
        f"The {record.head} head {record.probe} on {record.features} features of run {record.run} was attacked in "
        f"float32 on {record.subset} of {data.dataset}: {record.attack}{f' ({settings})' if settings else ''}, which "
        f"may change {where} within {threat.norm} {threat.eps}.",
        f"Without an attack {terminal.interval(record.clean)} % are right, and {terminal.interval(record.robust)} % "
        "under it.",
    ]
    absent, unseen, found = [], [], []
    for what, names in _LOOKED_FOR.items():
        made = [flags[name] for name in names if name in flags and flags[name].verdict != "skipped"]
        failed = failures(made)
        found += [f"{what} ({', '.join(map(_figure, failed))})"] if failed else []
        absent += [what] if made and not failed else []
        unseen += [what] if not made else []
    named = [name for names in _LOOKED_FOR.values() for name in names]
    found += [_figure(flag) for flag in failures(record.flags) if flag.name not in named]
    if rounded := flags.get("robust-rounded"):
        said.append(f"Robust after rounding: {_value(rounded.figure)} ({rounded.text}).")
    said.append(f"The audit found {'; '.join(found)}." if found else "The audit found nothing against these numbers.")
    said += [f"It looked for, and did not find: {'; '.join(absent)}."] if absent else []
    said += [f"It did not look for: {'; '.join(unseen)}."] if unseen else []
    asked = "process" in flags and flags["process"].verdict != "skipped"
    said.append(
        f"Not covered: other norms than {threat.norm}, radii above {threat.eps}, attacks designed by hand against this "
        f"model{'' if asked else ', and state that it keeps outside itself'}."
    )
    return " ".join(said)


def _figure(flag: Flag) -> str:
    return f"{flag.name} {_value(flag.figure)}, at most {_value(flag.limit)}: {flag.text}"


def _value(figure: float | None) -> str:
    return "unknown" if figure is None else terminal.number(figure)
