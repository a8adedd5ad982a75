"""Models with a class head: opened whole, and cut where the losses see them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModel, AutoModelForSequenceClassification

from distill.errors import ConfigError
from distill.lessons.choices import choice_targets
from distill.lessons.collate import collate
from distill.lessons.join import Lesson, TrainingSequence
from distill.losses.head import head_loss
from distill.models.classifiers import check_classifier, class_head, load_classifier, new_parameters, text_limit
from distill.prompts.classes import ClassPrompts
from distill.records import Annotation, Batch, Example
from distill.students.classifier import ClassSeam
from distill.students.layers import cut_layers
from tests.conftest import keep, read, student_module
from tests.students.encoders import FAMILIES, LABELS, PADDING, class_prompts, make_body, make_encoder

EXAMPLES = [
    Example("How many are left?", "negative"),
    Example("Yes", "positive"),
    Example("A text that is a good deal longer than the others are, " * 2, "negative"),
    Example("Seven apples.", None),
]
SCORES = torch.randn(4, 2, generator=torch.Generator().manual_seed(1)).mul(2).log_softmax(-1)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder"), request.param)


def opened(folder: Path, labels: tuple[str, ...] = LABELS) -> Any:
    return load_classifier(folder, torch.float32, labels, PADDING).eval()


def class_batch(prompts: ClassPrompts, examples: Sequence[Example], padding_id: int = PADDING) -> Batch:
    """The examples as one microbatch, each with the scores of a teacher as its soft target."""
    lessons = []
    for example, scores in zip(examples, SCORES.tolist(), strict=True):
        soft = {"answer": keep(choice_targets([Annotation("", {}, None, choice_logprobs=tuple(scores))]))}
        prompt = prompts.answer_prompt(example, example.answer or "positive")
        lessons.append(
            Lesson((TrainingSequence.of(prompt, example.id, {"answer"} if example.answer else set(), soft),))
        )
    counts = sum((lesson.counts() for lesson in lessons), Counter[Any]())
    return collate(lessons, counts, padding_id, read)


def plain_logits(model: Any, prompts: ClassPrompts, examples: Sequence[Example]) -> torch.Tensor:
    """The logits of the model itself for each text alone, without anything of this package."""
    texts = [torch.tensor([prompts.tokenizer(example.text).input_ids]) for example in examples]
    with torch.no_grad():
        return torch.cat([model(text).logits for text in texts])


@pytest.mark.parametrize("padding_id", [PADDING, 7])
def test_losses_on_classes_are_those_of_the_logits_of_each_text_alone(folder: Path, padding_id: int) -> None:
    model, prompts = opened(folder), class_prompts(folder)
    module = student_module(model, prompts, "answer", "kl", seam=ClassSeam(PADDING))
    batch = class_batch(prompts, EXAMPLES, padding_id)
    logits_BC = plain_logits(model, prompts, EXAMPLES)
    gold = torch.tensor([LABELS.index(example.answer) for example in EXAMPLES if example.answer])
    expected = {
        "answer": cross_entropy(logits_BC[: len(gold)], gold),
        "kl": kl_div(logits_BC.log_softmax(-1), SCORES, log_target=True, reduction="batchmean"),
    }
    terms = module.terms(batch)
    with torch.no_grad():
        _, sums_L = head_loss(module.hidden(batch), module.head(), list(terms.values()))
    for (name, term), sum_ in zip(terms.items(), sums_L, strict=True):
        assert float(sum_ / term.is_used_N.sum()) == pytest.approx(float(expected[name]), abs=2e-5), name


def test_the_class_behind_a_text_is_hidden_from_the_model(folder: Path) -> None:
    model, prompts, seam = opened(folder), class_prompts(folder), ClassSeam(PADDING)
    swapped = [Example(e.question, "positive" if e.answer == "negative" else "negative") for e in EXAMPLES]
    with torch.no_grad():
        left, right = (seam.hidden(model, class_batch(prompts, examples)) for examples in (EXAMPLES, swapped))
    assert torch.equal(left, right)


def test_the_body_of_a_published_model_is_kept_and_its_head_is_new(folder: Path, tmp_path: Path) -> None:
    whole = opened(folder)
    whole.base_model.save_pretrained(tmp_path)
    three = opened(tmp_path, ("a", "b", "c"))
    body = AutoModel.from_pretrained(tmp_path).state_dict()
    new = {id(parameter) for parameter in new_parameters(three)}
    names = {name for name, parameter in three.base_model.named_parameters() if id(parameter) not in new}
    assert names
    assert all(torch.equal(three.base_model.state_dict()[name], body[name]) for name in names)
    assert three.config.num_labels == len(three(torch.tensor([[5, 6]])).logits[0]) == 3
    assert {name for name in body if name not in names} <= {name for name in body if name.startswith("pooler")}


@pytest.mark.parametrize("family", ["BERT", "RoBERTa", "DistilBERT", "Qwen3"])
def test_layers_of_a_classifier_are_cut(family: str, tmp_path: Path) -> None:
    model = opened(make_encoder(tmp_path, family))
    cut = cut_layers(model, [0, 2]).eval()
    cut.save_pretrained(tmp_path / "cut")
    reopened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "cut").eval()
    ids = torch.tensor([[5, 6, 7]])
    assert torch.allclose(reopened(ids).logits, cut(ids).logits, atol=1e-6)
    assert sum(p.numel() for p in reopened.parameters()) < sum(p.numel() for p in opened(tmp_path).parameters())


@pytest.mark.parametrize(("family", "limit"), [("BERT", 40), ("RoBERTa", 38), ("MPNet", 38), ("XLNet", None)])
def test_a_model_reads_texts_up_to_its_own_limit(family: str, limit: int | None, tmp_path: Path) -> None:
    settings = {} if limit is None else {"max_position_embeddings": 40}
    folder = make_encoder(tmp_path, family, **settings)
    assert text_limit(folder) == limit
    if limit:
        assert opened(folder)(torch.full((1, limit), 9)).logits.isfinite().all()
        with pytest.raises((IndexError, RuntimeError)):
            opened(folder)(torch.full((1, limit + 1), 9))


def changed_files(folder: Path, change: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("check", [opened, lambda folder: check_classifier(folder, LABELS, PADDING)])
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda w: w.pop("encoder.layer.1.output.dense.weight"), "1 weights of the model are missing"),
        (lambda w: w.update({"encoder.layer.3.output.dense.weight": torch.zeros(32, 48)}), "1 weights in the files"),
        (lambda w: w.update({"embeddings.word_embeddings.weight": torch.zeros(9, 32)}), "1 weights of the model"),
    ],
    ids=["missing", "unused", "of another shape"],
)
def test_a_body_without_its_weights_is_refused(check: Any, change: Any, problem: str, tmp_path: Path) -> None:
    make_body(tmp_path)
    changed_files(tmp_path, change)
    with pytest.raises(ConfigError, match=problem):
        check(tmp_path)


def test_a_saved_classifier_without_its_head_is_refused(tmp_path: Path) -> None:
    make_encoder(tmp_path)
    changed_files(tmp_path, lambda weights: weights.pop("classifier.weight"))
    with pytest.raises(ConfigError, match=r"1 weights of the model are missing in its files: classifier\.weight"):
        opened(tmp_path)


def test_the_head_of_other_labels_is_not_taken(tmp_path: Path) -> None:
    make_encoder(tmp_path, labels=("positive", "negative"))
    head = load_file(tmp_path / "model.safetensors")["classifier.weight"]
    assert not torch.equal(opened(tmp_path).classifier.weight, head)
    assert torch.equal(opened(tmp_path, ("positive", "negative")).classifier.weight, head)


def test_the_same_labels_in_other_letters_are_the_same(tmp_path: Path) -> None:
    make_encoder(tmp_path, labels=("NEGATIVE", "POSITIVE"))
    head = load_file(tmp_path / "model.safetensors")["classifier.weight"]
    model = opened(tmp_path)
    assert torch.equal(model.classifier.weight, head)
    assert model.config.id2label == dict(enumerate(LABELS))


def test_a_model_that_reads_padding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a text is read otherwise in a batch than alone"):
        opened(make_encoder(tmp_path, "XLNet"))


def test_a_model_without_a_class_head_is_refused_in_a_sentence(tmp_path: Path) -> None:
    make_encoder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "mamba2"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="does not open as a model with a class head"):
        text_limit(tmp_path)


def test_the_head_is_the_last_module_where_another_has_as_many_outputs(tmp_path: Path) -> None:
    labels = tuple(f"label {index}" for index in range(32))  # as many as the hidden size
    model = opened(make_encoder(tmp_path, "RoBERTa", labels=labels), labels)
    assert class_head(model) is model.classifier.out_proj
