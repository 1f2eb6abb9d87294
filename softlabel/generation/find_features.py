"""Find what teachers compute on the way to their logits, by a trial pass of each: embeddings, and maps of attention.

Legend: B batch, C channels, D width of an embedding, H and W height and width, K numbers of it before its projection.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from softlabel.dataset import Source
from softlabel.errors import DataError, UsageError
from softlabel.generation.config import GenerateConfig
from softlabel.generation.input_reader import InputReader
from softlabel.inputs.base import Inputs
from softlabel.inputs.image_transform import Preprocessing
from softlabel.models import LanguageModel, Program
from softlabel.models.head import Head
from softlabel.models.options import FEATURE_OPTIONS
from softlabel.models.precision import ieee_float32
from softlabel.models.taps import (
    OUTPUT,
    Side,
    choose_pool,
    find_last_linear,
    find_module,
    find_stages,
    hooked,
    measure_map,
    tensor_of,
)
from softlabel.models.teacher import Teacher
from softlabel.store.features import ATTENTION, EMBEDDING, Attention, Embedding, FeatureName, Features, Tap

# Numbers of an embedding, and of all maps of a row: 32 KB, several times what the logits take.
_MOST_NUMBERS = 16_384
_SAMPLES = 64  # samples tried, to find one that can be decoded
# Networks whose last linear layer gives classes.
_CLASSIFIERS = ("zoo", "torchvision", "timm", "hf", "text", "run")


def find_features(teachers: Sequence[Teacher], source: Source, config: GenerateConfig) -> Features | None:
    """What rows hold beside logits, found out by a trial pass of each teacher; None: nothing was asked for.

    Raises:
        UsageError: a teacher, or these together, cannot give it.
    """
    wanted = config.features
    if not wanted:
        for teacher in teachers:
            if odd := set(FEATURE_OPTIONS) & set(teacher.spec.options):
                raise UsageError(
                    f"{teacher.spec.text}: {min(odd)}= says where it is taken, found no request for it; leave it out, "
                    f"or label with 'softlabel generate --also {min(odd)}'"
                )
        return None
    kept = config.combine == "keep"
    if len(teachers) > 1 and not kept:
        raise UsageError(
            f"{wanted[0]}: expected one teacher, or members that are kept apart, found {len(teachers)} whose answers "
            "are averaged, which their features cannot be; use --combine keep"
        )
    for teacher in teachers:
        _refuse_teacher(teacher, wanted)
    trials = [_read_trial(teacher, source) for teacher in teachers]
    embedding = attention = None
    if EMBEDDING in wanted:
        taps = tuple(_find_tap(one, trial, config) for one, trial in zip(teachers, trials, strict=True))
        embedding = _make_embedding(teachers, taps, config, kept=kept)
    if ATTENTION in wanted:
        found = [_find_maps(one, trial) for one, trial in zip(teachers, trials, strict=True)]
        attention = _make_attention(teachers, found, kept=kept)
    return Features(embedding=embedding, attention=attention)


def _refuse_teacher(teacher: Teacher, wanted: Sequence[str]) -> None:
    name, options = teacher.spec.text, teacher.spec.options
    if isinstance(teacher.model, LanguageModel):
        raise UsageError(
            f"{wanted[0]}: {name}: a language model answers at many positions of a document, found no one embedding of "
            "it; --encoding head stores what enters its last layer at each"
        )
    for option in set(FEATURE_OPTIONS) & set(options):
        if option not in wanted:
            raise UsageError(f"{name}: {option}= says where it is taken; give --also {option}")
    if isinstance(teacher.model, Program):
        outputs = teacher.model.outputs
        for feature in wanted:
            if feature == EMBEDDING and EMBEDDING not in options and teacher.num_classes == 0:
                continue  # the answer itself
            asked = [part for part in options.get(feature, "").split(",") if part]
            if not asked or (odd := [one for one in asked if one not in outputs]):
                listed = f"its outputs are {', '.join(outputs)}" if outputs else "a .pt2 file has its answer alone"
                raise UsageError(
                    f"{feature}: {name}: expected the name of an output, ?{feature}=NAME, found "
                    f"{odd[0] if asked else 'none'}; {listed}; export the network with it as a further output"
                )


def _read_trial(teacher: Teacher, source: Source) -> Inputs:
    """A few samples as a teacher takes them: zeros where their shape is known, else of the data."""
    if (example := teacher.preprocessing.example(2)) is not None:
        return example
    reader = InputReader(source=source, transforms=(teacher.preprocessing,))
    for index in range(min(_SAMPLES, len(source))):
        if (batch := reader.batch([index])).keys:
            return batch.inputs[0]
    raise DataError(f"{source.name}: none of its first {_SAMPLES} samples can be decoded")


def _find_tap(teacher: Teacher, trial: Inputs, config: GenerateConfig) -> Tap:
    name, asked = teacher.spec.text, teacher.spec.options.get(EMBEDDING)
    if asked is None and config.stores_hidden:
        raise UsageError(
            f"embedding: {name}: encoding head stores what enters its last linear layer already; leave --also "
            "embedding out, or name another module, ?embedding=MODULE"
        )
    if isinstance(teacher.model, Program):
        return _measure_tap(teacher, trial, asked or "", "output")
    if asked == OUTPUT or (asked is None and teacher.num_classes == 0 and teacher.spec.kind not in _CLASSIFIERS):
        return _measure_tap(teacher, trial, "", "output")
    if asked is not None:
        return _measure_tap(teacher, trial, asked, "output")
    where, layer = find_last_linear(teacher.model)
    if layer is not None and teacher.num_classes in (0, layer.out_features):
        hidden_BK, logits_BC = _observe(teacher, trial, where, "input")
        if hidden_BK.dim() == 2 and (
            teacher.num_classes == 0 or bool(Head(teacher=teacher, layer=layer).explains(logits_BC, hidden_BK.float()))
        ):
            return Tap(module=where, side="input", width=hidden_BK.shape[1])
    found = "none" if layer is None else f"{where} with {layer.out_features} outputs"
    raise UsageError(
        f"embedding: {name}: expected a last linear layer whose outputs are the answer, found {found}; name a module, "
        "?embedding=MODULE"
    )


def _measure_tap(teacher: Teacher, trial: Inputs, module: str, side: Side) -> Tap:
    found, _ = _observe(teacher, trial, module, side)
    shape, where = tuple(found.shape), f"embedding: {teacher.spec.text}: {module or 'its answer'}"
    how = choose_pool(where, found, len(trial))
    if how == "tokens" and teacher.preprocessing.buckets:
        raise UsageError(
            f"{where}: expected one vector for each text, found one for each of its tokens, {shape}, padding among "
            "them; name a module that gives (batch, D)"
        )
    width = shape[1] if how == "pixels" else shape[-1]
    if width > _MOST_NUMBERS:
        raise UsageError(
            f"{where}: expected at most {_MOST_NUMBERS:,} numbers, found {width:,}: {2 * width:,} bytes a row; name a "
            "smaller module"
        )
    return Tap(module=module, side=side, width=width, pool=how)


def _observe(
    teacher: Teacher, trial: Inputs, module: str, side: Side, *, feature: FeatureName = EMBEDDING
) -> tuple[Tensor, Tensor]:
    """What enters a module or what it gives, and the logits, in a pass over a few samples."""
    model, subject, found = teacher.model, teacher.spec.text, list[Tensor]()

    def keep(value: object) -> None:
        found.append(tensor_of(f"{feature}: {subject}: {module or 'its answer'}", value))

    if isinstance(model, Program):
        watch = model.watching((module,), [keep])
    else:
        watch = hooked(find_module(f"{feature}: {subject}", model, module), side, keep)
    with watch, ieee_float32():
        logits_BC = teacher.logits(trial)
    if len(found) != 1:
        raise UsageError(
            f"{feature}: {subject}: expected {module} to run once in a forward pass, found {len(found)} times; name "
            "another module"
        )
    return found[0], logits_BC


def _make_embedding(
    teachers: Sequence[Teacher], taps: tuple[Tap, ...], config: GenerateConfig, *, kept: bool
) -> Embedding:
    wanted, widths = config.embedding_width, [tap.width for tap in taps]
    if wanted is None and len(set(widths)) > 1:
        listed = ", ".join(f"{one.spec.text} has {width}" for one, width in zip(teachers, widths, strict=True))
        raise UsageError(f"embedding: expected one width, found {listed}; give --embedding-width to project all to one")
    if wanted is not None and wanted >= min(widths):
        raise UsageError(
            f"embedding_width: expected fewer numbers than the embeddings have, {min(widths)}, found {wanted}; leave "
            "it out to store them as they are"
        )
    return Embedding(
        width=widths[0] if wanted is None else wanted,
        type=config.embedding_type or "float16",
        taps=taps,
        projection=None if wanted is None else config.seed,
        kept=kept,
    )


# ---- maps of attention ----


def _find_maps(teacher: Teacher, trial: Inputs) -> dict[str, tuple[int, int]]:
    """Height and width of the map of each module that gives one."""
    name, asked = teacher.spec.text, teacher.spec.options.get(ATTENTION)
    if not teacher.preprocessing.fixes_size and teacher.preprocessing.kind == Preprocessing.kind:
        raise UsageError(
            f"attention: {name}: takes images of any size, whose maps differ in size; give crop= in its SPEC"
        )
    if asked is None:
        with ieee_float32():
            maps = find_stages(teacher.model, lambda: teacher.logits(trial), len(trial))
        if len(maps) < 2:
            raise UsageError(
                f"attention: {name}: expected stages, modules whose outputs (batch, channels, height, width) become "
                f"smaller, found {f'one size, of {min(maps)}' if maps else 'none'}; name modules, "
                "?attention=MODULE,MODULE"
            )
    else:
        modules = list(dict.fromkeys(filter(None, asked.split(","))))
        if not modules:
            raise UsageError(f"attention: {name}: expected names of modules, ?attention=MODULE,MODULE, found none")
        maps = {
            module: measure_map(
                f"attention: {name}: {module}", _observe(teacher, trial, module, "output", feature=ATTENTION)[0]
            )
            for module in modules
        }
    total = sum(height * width for height, width in maps.values())
    if total > _MOST_NUMBERS:
        raise UsageError(
            f"attention: {name}: expected maps of at most {_MOST_NUMBERS:,} numbers in all ({2 * _MOST_NUMBERS:,} "
            f"bytes a row), found {total:,}; name smaller ones, ?attention=MODULE,MODULE"
        )
    return maps


def _make_attention(
    teachers: Sequence[Teacher], found: Sequence[Mapping[str, tuple[int, int]]], *, kept: bool
) -> Attention:
    sizes = [tuple(maps.values()) for maps in found]
    if len(set(sizes)) > 1:
        listed = ", ".join(f"{one.spec.text} has {list(size)}" for one, size in zip(teachers, sizes, strict=True))
        raise UsageError(
            f"attention: expected maps of the same sizes, found {listed}; name those that are, ?attention=MODULE,MODULE"
        )
    return Attention(
        heights=tuple(height for height, _ in sizes[0]),
        widths=tuple(width for _, width in sizes[0]),
        modules=tuple(tuple(maps) for maps in found),
        kept=kept,
    )
