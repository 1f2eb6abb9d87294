"""Reports made by hand: a realistic one, and ones that are hard to draw. No store is measured for them."""

import base64
import dataclasses
import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from softlabel.report.figures import (
    About,
    Absent,
    Agreement,
    Calibrated,
    Calibration,
    Confusion,
    Coverage,
    Duplicates,
    EncodingCost,
    Ensemble,
    Example,
    Histogram,
    Noise,
    Reliability,
    Sharpness,
    SharpnessAt,
    TeacherFacts,
    Views,
)
from softlabel.report.pictures import Picture
from softlabel.report.report import Report, Sentence
from softlabel.report.student_figures import Comparison, Corner, Grid, RunFacts, Students

CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SECTIONS = (
    "agreement",
    "noise",
    "calibration",
    "sharpness",
    "confusion",
    "ensemble",
    "views",
    "encoding",
    "coverage",
    "students",
)
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'quoted' & \"double\"",
    "שלום עולם",
    "‮evil‬",
    "a" * 300,
    "",
    "line\nbreak\ttab",
    "</style></title>",
    "{{ 7 * 7 }}",
    "\ud800lone",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
)


def make_examples(rng: np.random.Generator, count: int, classes: int, prefix: str = "train/") -> tuple[Example, ...]:
    found = []
    for number in range(count):
        label, suggestion = (int(one) for one in rng.choice(classes, 2, replace=classes < 2))
        wrong = float(rng.uniform(0, 0.1))
        found.append(
            Example(
                key=f"{prefix}{number:05d}_{label}.jpg",
                view=0,
                label=label,
                suggestion=suggestion,
                p_label=wrong,
                p_suggestion=1 - 2 * wrong,
                score=float(rng.uniform(-1, 0)),
                members_agreeing=int(rng.integers(1, 5)),
                views_agreeing=int(rng.integers(1, 4)),
            )
        )
    return tuple(sorted(found, key=lambda one: one.p_label or 0))


def make_reliability(rng: np.random.Generator, slope: float = 0.85) -> Reliability:
    middles = (np.arange(15) + 0.5) / 15
    counts = (np.exp(middles * 6) * 20).astype(int)
    counts[:2] = 0
    accuracy = np.clip(middles * slope + rng.normal(0, 0.02, 15), 0, 1)
    return Reliability(
        counts=tuple(counts.tolist()),
        confidence=tuple(float(value) if count else None for value, count in zip(middles, counts, strict=True)),
        accuracy=tuple(float(value) if count else None for value, count in zip(accuracy, counts, strict=True)),
        calibration_error=0.0612 * slope,
        cross_entropy=0.37,
    )


def make_histogram(rng: np.random.Generator, top: float, scale: float) -> Histogram:
    counts, edges = np.histogram(np.clip(rng.exponential(scale, 50000), 0, top), bins=30, range=(0, top))
    return Histogram(edges=tuple(edges.tolist()), counts=tuple(counts.tolist()))


def make_merges(rng: np.random.Generator, classes: int) -> tuple[tuple[int, int, float, int], ...]:
    alive, sizes, merges = list(range(classes)), dict.fromkeys(range(classes), 1), []
    for number in range(classes - 1):
        one, other = (alive.pop(int(rng.integers(len(alive)))) for _ in range(2))
        sizes[classes + number] = sizes[one] + sizes[other]
        merges.append((one, other, 0.1 + number / classes, sizes[classes + number]))
        alive.append(classes + number)
    return tuple(merges)


def make_report(*, classes: int = 10, names: Sequence[str] | None = CIFAR, candidates: int = 400) -> Report:
    """A report such as a store of CIFAR-10 by four teachers with two views, and three students, has."""
    rng = np.random.default_rng(7)
    accuracy = np.clip(rng.normal(0.91, 0.05, classes), 0, 0.995)
    few = min(classes, 50)
    matrix = rng.gamma(0.3, 0.02, (few, few)) + np.diag(accuracy[:few])
    matrix /= matrix.sum(axis=1, keepdims=True)
    pairs = sorted(
        ((i, j, float(matrix[i, j])) for i in range(few) for j in range(few) if i != j),
        key=lambda one: -one[2],
    )[:50]
    members = ("resnet20-12fca82f", "resnet32-d509ac18", "resnet44-014dd654", "resnet56-4bfd9763")
    agreement = np.clip(0.88 + rng.normal(0, 0.02, (4, 4)), 0, 1)
    np.fill_diagonal(agreement, 1)
    divergence = np.abs(rng.normal(0.2, 0.04, (4, 4)))
    np.fill_diagonal(divergence, 0)
    examples = make_examples(rng, candidates, classes)
    shares = tuple(accuracy.tolist())
    return Report(
        title="labels/cifar10",
        about=About(
            store="labels/cifar10",
            fingerprint="9c1fe0b7d3a85e2246b1c07f5d9a3e18",
            rows=100_000,
            samples=50_000,
            views=2,
            data="../shared/data/cifar10-jpeg/train.parquet",
            classes=classes,
            class_names=None if names is None else tuple(names),
            teachers=tuple(
                TeacherFacts(spec=f"zoo:resnet?weights={one}.th", weight=0.25, calibration=1.31, precision="fp32")
                for one in members
            ),
            combine="logits",
            made_by=("--teacher", "zoo:resnet20@weights.th", "--temperature", "4"),
            derived="",
            temperature=4.0,
            encoding="int8",
            activation="softmax",
            seen="in-sample",
            seen_samples=50_000,
            seen_note="The teachers were trained on these images: their confidence hides label noise, and the shares "
            "of wrong labels below are lower bounds. Labels by cross-fitting are free of this.",
            noun="images",
            unit="image",
            measured=20_000,
            version="0.1.0",
        ),
        summary=(
            Sentence(
                section="agreement",
                level="good",
                text="The labels agree with the hard labels for 91.3% of 50,000 images; "
                "the weakest class is cat with 82.1%.",
            ),
            Sentence(
                section="noise",
                level="act",
                text="About 2.4% of the hard labels look wrong: 1,204 candidates. Look at the first "
                "400, with labels by teachers that did not see them.",
                command="softlabel crossfit --data ../shared/data/cifar10-jpeg/train.parquet --student zoo:resnet20 "
                "--folds 4 --out labels/oof",
            ),
            Sentence(
                section="sharpness",
                level="look",
                text="At temperature 1 the labels are nearly one-hot (1.1 effective classes, "
                "81% of rows above 99.9%); temperature 4 gives 2.3.",
                command="softlabel combine labels/cifar10 labels/cifar10-t4 --temperature 4",
            ),
            Sentence(
                section="encoding",
                level="good",
                text="int8 costs 0.00003 nats a row on average, at 16 bytes; no coarser encoding is needed.",
            ),
            Sentence(
                section="coverage",
                level="look",
                text="Every image has labels; 3 are bad, and 12 groups of exact doubles have different labels.",
                command="softlabel inspect labels/cifar10",
            ),
            Sentence(
                section="students",
                level="good",
                text="The best of 3 students reaches 90.2% on held-out data, its teacher 89.3%.",
            ),
        ),
        agreement=Agreement(
            labelled=100_000,
            accuracy=0.9134,
            top5=0.9971,
            class_rows=(10_000,) * classes,
            class_accuracy=shares,
            class_p_label=tuple((accuracy - 0.03).tolist()),
            view_accuracy=(0.931, 0.896),
        ),
        noise=Noise(
            share=0.0241,
            candidates=1204,
            judged=50_000,
            thresholds=tuple((accuracy - 0.05).tolist()),
            pairs=tuple((i, j, int(value * 4000)) for i, j, value in pairs),
            examples=examples,
        ),
        calibration=Calibration(
            rows=20_000,
            curves=tuple(
                Calibrated(
                    name=name, before=make_reliability(rng), fitted_temperature=1.42, after=make_reliability(rng, 0.99)
                )
                for name in ("stored labels", *members)
            ),
        ),
        sharpness=Sharpness(
            at=(
                SharpnessAt(
                    temperature=1.0,
                    entropy=make_histogram(rng, math.log(classes or 2), 0.1),
                    mean_entropy=0.1,
                    effective_classes=1.1,
                    one_hot=0.81,
                ),
                SharpnessAt(
                    temperature=4.0,
                    entropy=make_histogram(rng, math.log(classes or 2), 0.8),
                    mean_entropy=0.8,
                    effective_classes=2.3,
                    one_hot=0.02,
                ),
            ),
            suggested_temperature=4.0,
        ),
        confusion=Confusion(
            matrix=tuple(map(tuple, matrix.tolist())) if classes <= 50 else None,
            pairs=tuple(pairs),
            merges=make_merges(rng, classes) if classes <= 200 else (),
            by="label",
        ),
        ensemble=Ensemble(
            rows=20_000,
            names=members,
            accuracy=(0.881, 0.889, 0.891, 0.894),
            cross_entropy=(0.39, 0.38, 0.375, 0.37),
            agreement=tuple(map(tuple, agreement.tolist())),
            divergence=tuple(map(tuple, divergence.tolist())),
            disagreement=make_histogram(rng, math.log(4), 0.08),
            mean_disagreement=0.083,
            all_accuracy=0.913,
            all_cross_entropy=0.28,
            without_accuracy=(0.914, 0.911, 0.910, 0.909),
            without_cross_entropy=(0.275, 0.284, 0.285, 0.289),
            droppable=0,
            examples=make_examples(rng, 60, classes),
        ),
        views=Views(
            samples=50_000,
            sampled=20_000,
            agreement=0.91,
            flips=0.047,
            divergence=0.061,
            lost=812,
            examples=make_examples(rng, 60, classes),
        ),
        encoding=EncodingCost(
            name="int8",
            row_bytes=16,
            store_bytes=1_600_000,
            mean_t1=3.1e-5,
            worst_t1=1.7e-4,
            mean_t=1.4e-5,
            worst_t=2.6e-5,
            of="teachers",
        ),
        coverage=Coverage(
            samples=50_000,
            with_hard_label=50_000,
            class_samples=tuple(int(one) for one in rng.integers(4000, 6000, classes)),
            bad_count=3,
            bad=(
                ("train/00017_3.jpg", "cannot identify image file"),
                ("train/00018_3.jpg", "empty, 0 bytes"),
                ("train/00019_3.jpg", "truncated"),
            ),
            missing=0,
            non_finite=0,
            duplicates=Duplicates(
                groups=40,
                samples=83,
                conflicting=12,
                examples=tuple(make_examples(rng, 2, classes) for _ in range(6)),
                compared=50_000,
            ),
        ),
        students=make_students(rng, classes, shares),
    )


def make_students(rng: np.random.Generator, classes: int, shares: tuple[float, ...]) -> Students:
    joint = rng.poisson(
        np.exp(6 - np.abs(np.subtract.outer(np.arange(20), np.arange(20))) * 0.5 + np.arange(20) * 0.2 - 4)
    )
    epochs = np.arange(1, 31)
    runs = tuple(
        RunFacts(
            run=f"runs/grid/{name}",
            settings={"temperature": temperature, "hard_weight": "0.1"},
            final={"accuracy": final, "cross_entropy": 1.2 - final},
            curves={
                "accuracy": tuple((float(e), final - 0.5 * math.exp(-e / 6)) for e in epochs),
                "loss": tuple((float(e), 0.3 + 2 * math.exp(-e / (5 + final))) for e in epochs),
            },
        )
        for name, temperature, final in (("t1", "1", 0.881), ("t2", "2", 0.894), ("t4", "4", 0.902))
    )
    corners = tuple(
        Corner(name=name, count=count, examples=make_examples(rng, 12, classes, "test/"))
        for name, count in (
            ("both right", 8612),
            ("teacher alone right", 318),
            ("student alone right", 408),
            ("both wrong", 662),
        )
    )
    comparison = Comparison(
        run="runs/grid/t4",
        data="../shared/data/cifar10-jpeg/test.parquet",
        held_out=True,
        trained_on=0,
        by_keys=0,
        of_eval_data=True,
        samples=10_000,
        non_finite=0,
        with_teacher=10_000,
        accuracy=0.902,
        teacher_accuracy=0.893,
        agreement=0.924,
        divergence=0.081,
        joint=tuple(map(tuple, joint.tolist())),
        class_agreement=shares,
        class_divergence=tuple(rng.uniform(0.02, 0.2, classes).tolist()),
        divergence_by_entropy=(0.01, 0.03, 0.08, 0.12, 0.15, 0.2, 0.22, None, None, None),
        student=make_reliability(rng, 0.95),
        teacher=make_reliability(rng, 0.85),
        corners=corners,
    )
    grid = Grid(
        metric="accuracy",
        row_setting="hard_weight",
        rows=("0", "0.1", "0.5"),
        column_setting="temperature",
        columns=("1", "2", "4"),
        values=((0.879, 0.891, 0.9), (0.881, 0.894, 0.902), (0.876, 0.887, None)),
    )
    return Students(
        runs=runs,
        comparisons=(comparison,),
        grid=grid,
        notes=("runs/hard has no curve of the soft loss: it was trained without.",),
    )


def make_hostile_report() -> Report:
    """Names, keys and words from data that was made to break a page."""
    report = make_report(classes=len(HOSTILE), names=HOSTILE, candidates=24)
    noise, about = report.noise, report.about
    assert isinstance(noise, Noise)
    assert isinstance(about, About)
    keys = [*HOSTILE, "path/" + "x" * 2000, "javascript:alert(1)"]
    examples = tuple(
        dataclasses.replace(one, key=f"{number} {keys[number % len(keys)]}")
        for number, one in enumerate(noise.examples)
    )
    return dataclasses.replace(
        report,
        title=HOSTILE[0] + "y" * 200,
        about=dataclasses.replace(about, store="</script><b>" + "s" * 300, data=HOSTILE[1], seen_note=HOSTILE[0]),
        summary=tuple(
            Sentence(section=one, level="act", text=HOSTILE[0] + "z" * 300, command=f"softlabel {HOSTILE[1]}")
            for one in ("noise", "about", "x'\"")
        ),
        noise=dataclasses.replace(noise, examples=examples),
        coverage=dataclasses.replace(report.coverage, bad=((HOSTILE[1], HOSTILE[0]), ("k" * 3000, "r" * 3000))),  # type: ignore[type-var]
        ensemble=Absent(reason=HOSTILE[0]),
    )


def make_absent_report() -> Report:
    """Nothing was measured."""
    absent = {name: Absent(reason=f"no {name} here; measure some") for name in ("about", *SECTIONS)}
    return Report(title="nothing", summary=(), **absent)  # type: ignore[arg-type]


def make_bare_report() -> Report:
    """As few rows and classes as there can be: every number that may be missing is."""
    row = Example(key="only", view=0, label=None, suggestion=0, p_label=None, p_suggestion=1.0, score=0.0)
    empty = Reliability(
        counts=(0,) * 15, confidence=(None,) * 15, accuracy=(None,) * 15, calibration_error=0.0, cross_entropy=0.0
    )
    zero = Histogram(edges=(0.0, 0.0), counts=(1,))
    base = make_report(classes=2, names=None, candidates=1)
    about = base.about
    assert isinstance(about, About)
    return dataclasses.replace(
        base,
        about=dataclasses.replace(
            about, rows=1, samples=1, views=1, classes=1, teachers=about.teachers[:1], seen="unknown"
        ),
        agreement=Agreement(
            labelled=1,
            accuracy=0.0,
            top5=None,
            class_rows=(1, 0),
            class_accuracy=(0.0, None),
            class_p_label=(0.0, None),
            view_accuracy=(0.0,),
        ),
        noise=Noise(share=0.0, candidates=0, judged=0, thresholds=(None,), pairs=(), examples=()),
        calibration=Calibration(
            rows=0, curves=(Calibrated(name="stored labels", before=empty, fitted_temperature=1.0, after=empty),)
        ),
        sharpness=Sharpness(
            at=(SharpnessAt(temperature=1.0, entropy=zero, mean_entropy=0.0, effective_classes=1.0, one_hot=1.0),),
            suggested_temperature=None,
        ),
        confusion=Confusion(matrix=((1.0,),), pairs=(), merges=(), by="prediction"),
        ensemble=Ensemble(
            rows=1,
            names=("only",),
            accuracy=(None,),
            cross_entropy=(None,),
            agreement=((1.0,),),
            divergence=((0.0,),),
            disagreement=zero,
            mean_disagreement=0.0,
            all_accuracy=None,
            all_cross_entropy=None,
            without_accuracy=(None,),
            without_cross_entropy=(None,),
            droppable=None,
            examples=(row,),
        ),
        views=Views(samples=1, agreement=1.0, flips=0.0, divergence=0.0, lost=None, sampled=1, examples=(row,)),
        encoding=EncodingCost(
            name="float32",
            row_bytes=4,
            store_bytes=4,
            mean_t1=None,
            worst_t1=None,
            mean_t=0.0,
            worst_t=None,
            of="teachers",
        ),
        coverage=Coverage(
            samples=1,
            with_hard_label=0,
            class_samples=(0,),
            bad_count=0,
            bad=(),
            missing=0,
            non_finite=0,
            duplicates=Duplicates(groups=0, samples=0, conflicting=0, examples=(), compared=0),
        ),
        students=Students(
            runs=(RunFacts(run="r", settings={}, final={}, curves={"accuracy": ((1.0, 0.5),), "none": ()}),),
            grid=Grid(metric="m", row_setting="a", rows=("1",), column_setting="b", columns=("2",), values=((None,),)),
            notes=(),
            comparisons=(
                Comparison(
                    run="r",
                    data="d",
                    held_out=False,
                    trained_on=1,
                    by_keys=0,
                    of_eval_data=False,
                    samples=1,
                    non_finite=0,
                    with_teacher=1,
                    accuracy=None,
                    teacher_accuracy=None,
                    agreement=0.0,
                    divergence=float("inf"),
                    joint=((0,) * 20,) * 20,
                    class_agreement=(None,),
                    class_divergence=(None,),
                    divergence_by_entropy=(None,) * 10,
                    student=None,
                    teacher=None,
                    corners=(Corner(name="both wrong", count=0, examples=()),),
                ),
            ),
        ),
    )


def make_pictures_for(report: Report, side: int = 32) -> dict[str, Picture]:
    """A JPEG for each example of a report."""
    keys = {one.key for one in _examples(report)}
    pictures = {}
    for number, key in enumerate(sorted(keys)):
        rng = np.random.default_rng(number)
        image = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(
            (side, side), Image.Resampling.BICUBIC
        )
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=75)
        data = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        pictures[key] = Picture(kind="image", data=data, width=side, height=side)
    return pictures


def _examples(found: object) -> list[Example]:
    if isinstance(found, Example):
        return [found]
    if isinstance(found, tuple):
        return [one for part in found for one in _examples(part)]
    if dataclasses.is_dataclass(found):
        return [one for field in dataclasses.fields(found) for one in _examples(getattr(found, field.name))]
    return []
