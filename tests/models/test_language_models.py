"""``lm:FOLDER``: hidden states and last layer against plain forward passes of transformers."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from softlabel.common.spec import parse_spec
from softlabel.dataset import open_source, tokenize_source
from softlabel.errors import SpecError
from softlabel.inputs.base import Sample, TokenIds
from softlabel.inputs.batch import collate_samples, decode_samples
from softlabel.inputs.tokens import TOKENS
from softlabel.inputs.vocabulary import read_vocabulary
from softlabel.models import RunModel, build_model, check_packing, save_run
from softlabel.models.teacher import load_teacher, student_preprocessing
from tests.support.language_models import find_stories, write_language_model, write_tokenizer
from tests.support.teachers import write_teacher

# What differs: names of fields, scales and caps of the logits, positions, biases.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48},
    "gemma2": {"final_logit_softcapping": 0.02, "head_dim": 8, "sliding_window": 6},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 8.0},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 16},
    "gpt_neox": {},
    "qwen3": {"head_dim": 8, "num_key_value_heads": 2},
    "phi": {},
}


def plain_logits(folder: Path, ids: list[int]) -> Tensor:
    """Logits (L, V) of one document alone, as transformers computes them."""
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found: Tensor = network(input_ids=torch.tensor([ids])).logits[0]
    return found


def document(ids: list[int]) -> Any:
    item, _ = TOKENS.decode(
        Sample(key="a", raw=TokenIds(ids=np.array(ids, np.int32), mask=np.ones(len(ids), np.uint8)))
    )
    return item


def teacher_logits(spec: str, documents: list[list[int]], bucket: int | None = None) -> list[Tensor]:
    """The same for several documents in one batch, by way of the hidden states."""
    teacher = load_teacher(spec, kind="tokens")
    transform = teacher.preprocessing
    inputs = transform.cut(transform.collate([transform.fit(document(ids)) for ids in documents]), bucket)
    hidden_BLD = teacher.hidden(inputs)
    assert hidden_BLD.shape[:2] == inputs.tensors["input_ids"].shape
    return [teacher.position_logits(row_LD[: len(ids)]) for row_LD, ids in zip(hidden_BLD, documents, strict=True)]


def test_a_real_model_gives_the_logits_of_transformers_alone_padded_and_in_other_buckets() -> None:
    folder = find_stories()
    texts = [json.loads(line)["text"] for line in (folder / "test.jsonl").read_text().splitlines()[:4]]
    encoded = read_vocabulary(folder).tokenizer.encode_batch(texts, add_special_tokens=True)
    documents = [[1], encoded[0].ids[:5], encoded[1].ids[:90], encoded[2].ids]
    expected = [plain_logits(folder, ids) for ids in documents]
    teacher = load_teacher(f"lm:{folder}", kind="tokens")
    assert (teacher.num_classes, teacher.preprocessing.max_length) == (512, 512)  # type: ignore[attr-defined]
    together = teacher_logits(f"lm:{folder}?max_length=320", documents)
    alone = [teacher_logits(f"lm:{folder}", [ids])[0] for ids in documents]
    wide = teacher_logits(f"lm:{folder}?buckets=400,512", documents, 512)
    for found in (together, alone, wide):
        for one, reference in zip(found, expected, strict=True):
            assert one.shape == reference.shape
            assert (one - reference).abs().max() <= 1e-4


def test_from_a_file_of_texts_to_the_likelihood_that_is_published_with_the_model(tmp_path: Path) -> None:
    folder = find_stories()
    text = (
        "Once upon a time, there was a little girl named Lily. She loved to play with her toys in the park. One day, "
        "she saw a big red ball."
    )
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in (text[:30], text)))
    teacher = load_teacher(f"lm:{folder}?max_length=100", kind="tokens")
    source = tokenize_source(open_source(f"{tmp_path}/t.jsonl"), read_vocabulary(folder), max_length=100)
    decoded = decode_samples(source.read([0, 1]), source.inputs, name=source.name)
    (inputs,), _ = collate_samples(list(decoded.items.values()), source.keys(), [teacher.preprocessing], network="lm")
    inputs = teacher.preprocessing.cut(inputs)
    hidden_BLD = teacher.hidden(inputs)
    logits_PV = teacher.position_logits(hidden_BLD[inputs.tensors["mask"] != 0])
    assert len(logits_PV) == source.counted.sum() == source.lengths.sum()
    ids_L = source.read([1])[0].raw.ids  # type: ignore[union-attr]
    log_probs = logits_PV[-len(ids_L) :].log_softmax(dim=1)
    loss = torch.nn.functional.nll_loss(log_probs[:-1], torch.from_numpy(ids_L[1:]).long())
    assert (len(ids_L) - 1, round(float(loss), 5)) == (43, 0.39189)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures_are_taken_apart_into_body_and_last_layer(tmp_path: Path, architecture: str) -> None:
    fields = ARCHITECTURES[architecture]
    folder = write_language_model(tmp_path, architecture, rows=300, **fields)
    documents = [[7], [5, 6, 7, 8, 9, 200, 201], list(range(20, 60))]
    size = read_vocabulary(folder).size
    for found, ids in zip(teacher_logits(f"lm:{folder}", documents), documents, strict=True):
        expected = plain_logits(folder, ids)
        assert expected.shape[1] == 300
        assert found.shape == (len(ids), size)
        assert (found - expected[:, :size]).abs().max() <= 1e-4
    model = build_model(f"lm:{folder}")
    assert model.logit_scale == {"cohere": 0.25, "granite": 0.125}.get(architecture, 1.0)
    assert model.softcap == fields.get("final_logit_softcapping")
    assert len(model.head_weight) == size


def test_networks_that_mix_documents_are_refused_for_packing(tmp_path: Path) -> None:
    folder = write_language_model(tmp_path, "bloom")
    spec = parse_spec(f"lm:{folder}")
    with pytest.raises(SpecError, match=r"documents in one row .* model type 'bloom' see each other"):
        check_packing(spec, build_model(spec))


def test_documents_side_by_side_do_not_see_each_other(tmp_path: Path) -> None:
    folder = write_language_model(tmp_path, "gemma2", head_dim=8, sliding_window=6)
    model = build_model(f"lm:{folder}").eval()
    check_packing(parse_spec(f"lm:{folder}"), model)
    documents = [[7, 8], list(range(20, 40)), [5, 6, 7]]
    ids = torch.tensor([[one for ids in documents for one in ids]])
    positions = torch.tensor([[*range(2), *range(20), *range(3)]])
    with torch.no_grad():
        packed = model.logits(model.hidden(ids, None, positions))[0]
    for found, one in zip(packed.split([2, 20, 3]), documents, strict=True):
        assert (found - plain_logits(folder, one)[:, : len(found[0])]).abs().max() <= 1e-4


def test_students_are_drawn_at_random_from_a_config_alone(tmp_path: Path) -> None:
    folder = write_language_model(tmp_path, "llama", num_key_value_heads=2)
    (folder / "model.safetensors").unlink()
    options = "?init=random&seed=3&layers=1&hidden=48&heads=6&intermediate_size=20"
    model = build_model(f"lm:{folder}{options}")
    config = model.network.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (1, 48, 6)
    assert (config.intermediate_size, config.head_dim, config.num_key_value_heads) == (20, 8, 2)
    weights, before = model.state_dict(), torch.random.get_rng_state()
    for name, value in build_model(f"lm:{folder}{options}").state_dict().items():
        assert torch.equal(value, weights[name])
    assert torch.equal(torch.random.get_rng_state(), before), "a seed of its own leaves that of the run alone"
    other = build_model(f"lm:{folder}{options.replace('seed=3', 'seed=4')}")
    assert not torch.equal(other.head_weight, model.head_weight)
    torch.manual_seed(1)
    first = build_model(f"lm:{folder}?init=random").head_weight
    torch.manual_seed(2)
    assert not torch.equal(build_model(f"lm:{folder}?init=random").head_weight, first)


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [("gpt2", ARCHITECTURES["gpt2"]), ("gemma2", {"head_dim": 8, "num_key_value_heads": 2, "sliding_window": 6})],
)
def test_sizes_have_the_same_words_for_every_architecture(
    tmp_path: Path, architecture: str, fields: dict[str, Any]
) -> None:
    folder = write_language_model(tmp_path, architecture, **fields)
    for options, width, layers in (("?layers=1", 32, 1), ("?init=random&hidden=48&heads=6&layers=3", 48, 3)):
        model = build_model(f"lm:{folder}{options}")
        assert (model.head_weight.shape, model.network.config.num_hidden_layers) == ((263, width), layers)


def test_a_student_may_begin_with_the_first_layers(tmp_path: Path) -> None:
    folder = write_language_model(tmp_path, "llama")
    whole, part = (build_model(f"lm:{folder}{options}").network.model.layers for options in ("", "?layers=1"))
    assert len(part) == 1
    assert torch.equal(part[0].mlp.up_proj.weight, whole[0].mlp.up_proj.weight)


def test_a_run_folder_is_whole(tmp_path: Path) -> None:
    folder = write_language_model(tmp_path / "start", "llama", template="{{ bos_token }}{{ messages[0].content }}")
    spec = f"lm:{folder}?init=random&layers=1&max_length=24"
    model = build_model(spec).eval()
    transform = student_preprocessing(spec, model, "tokens")
    run = tmp_path / "run"
    run.mkdir()
    save_run(run, model, RunModel(student=spec, num_classes=263, preprocessing=transform.to_dict()))
    shutil.rmtree(folder)
    again = load_teacher(f"run:{run}", kind="tokens")
    assert again.preprocessing == transform
    ids = torch.tensor([[1, 20, 30]])
    with torch.no_grad():
        assert torch.equal(again.model(ids, torch.ones_like(ids)), model(ids, torch.ones_like(ids)))
    template = read_vocabulary(run).template
    assert template is not None
    assert template.render([{"role": "user", "content": "x"}])[0] == "<s>x"
    write_tokenizer(run, added=["<more>"])
    with pytest.raises(SpecError, match=r"tokenizer\.json: expected"):
        load_teacher(f"run:{run}", kind="tokens")


def test_teachers_without_trained_weights_are_refused(tmp_path: Path) -> None:
    folder = write_language_model(tmp_path, "llama")
    assert parse_spec(f"lm:{folder}").starts_trained
    assert not parse_spec(f"lm:{folder}?init=random").starts_trained
    for option, message in (("init=random", "random weights label nothing"), ("layers=1", "has not learnt yet")):
        with pytest.raises(SpecError, match=message):
            load_teacher(f"lm:{folder}?{option}", kind="tokens")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(SpecError, match=r"expected a folder with config\.json, model\.safetensors and tokenizer\.json"):
        load_teacher(f"lm:{folder}", kind="tokens")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("init=zero", "init: expected random"),
        ("hidden=32", "expected no option but init, layers.*found 'hidden'; seed= and sizes go with init=random"),
        ("layers=9", "layers: expected at most 2"),
        ("layers=no", "layers: expected a whole number above 0"),
        ("max_length=65", "max_length: expected at most 64, which its positions allow"),
        ("init=random&hidden=30", "a width that is a multiple of the heads, found 30 and 4"),
        ("init=random&colour=3", "colour: expected a field of its config.json"),
        ("init=random&vocab_size=100", "at least 263 rows, one for each token"),
        ("buckets=9,8", "buckets: expected ascending lengths"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path: Path, option: str, message: str) -> None:
    folder = write_language_model(tmp_path, "llama")
    spec = f"lm:{folder}?{option}"
    with pytest.raises(SpecError, match=message):
        student_preprocessing(spec, build_model(spec), "tokens")


def test_networks_that_are_no_causal_language_models_are_refused(tmp_path: Path) -> None:
    bert = write_language_model(tmp_path / "bert", "bert", is_decoder=False)
    with pytest.raises(SpecError, match=r"expected (logits that are the last layer's|a causal language model)"):
        build_model(f"lm:{bert}")
    vit = tmp_path / "vit"
    write_tokenizer(vit)
    transformers.ViTConfig().save_pretrained(vit)
    with pytest.raises(SpecError, match="expected a causal language model, found a network of model type 'vit'"):
        build_model(f"lm:{vit}?init=random")
    few = write_language_model(tmp_path / "few", "llama", rows=200)
    with pytest.raises(SpecError, match=r"at least 263 rows, one for each token of tokenizer\.json, found 200"):
        build_model(f"lm:{few}")
    with pytest.raises(SpecError, match="has a vocabulary of 263 tokens, but 9 are needed"):
        build_model(f"lm:{write_language_model(tmp_path / 'good', 'llama')}", num_classes=9)


def test_other_networks_do_not_take_documents(tmp_path: Path) -> None:
    folder = write_language_model(tmp_path, "llama")
    with pytest.raises(SpecError, match="takes samples of kind tokens, and these are of kind image"):
        load_teacher(f"lm:{folder}")
    with pytest.raises(SpecError, match="the samples are documents; give a language model, lm:FOLDER"):
        load_teacher(write_teacher(tmp_path / "zoo.pt"), kind="tokens")
