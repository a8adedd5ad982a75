"""Every causal family of the installed transformers works as teacher and student, or is refused in one sentence.

`python -m tests.models.test_families` prints what docs/families.md holds.
"""

from __future__ import annotations

import tempfile
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.errors import ConfigError
from distill.lessons.collate import collate
from distill.losses.head import head_loss
from distill.models.loading import MODEL_ERRORS
from distill.models.reading import check_student_reading
from distill.prompts.rendering import Prompts
from distill.prompts.tokenizers import load_tokenizer
from distill.records import Annotation, Example, Request, Span
from distill.students.causal_lm import open_student, weights_hash
from distill.students.saving import SavedStudentError, save_student
from tests.conftest import LAYOUT, WHOLE_STUDENT, arithmetic, lessons, read, student_module
from tests.models.tiny import FAMILIES, make_tiny
from tests.teachers.conftest import make_teacher

# Families whose default configuration gives no small model, and why.
NOT_BUILT = {
    "cohere_compass_text": "KeyError",  # its default has no rotation for one kind of its layers
    "dbrx": "AttributeError",  # its default attention has no rope_theta
    "dots3_note": "StrictDataclassClassValidationError",  # sizes of heads that must add up
    "dots3_note_text": "StrictDataclassClassValidationError",
    "gemma3n": "ImportError",  # timm, for images
    "gemma4_assistant": "StrictDataclassClassValidationError",  # its default is invalid
    "gemma4_unified_assistant": "ValueError",  # a draft that reads another model's cache
    "musicgen": "AttributeError",  # audio; its decoder's settings are below another name
    "musicgen_melody": "AttributeError",
    "qwen4_exp": "StrictDataclassClassValidationError",  # numbers that must fit each other
    "qwen4_exp_text": "StrictDataclassClassValidationError",
    "reformer": "ValueError",  # positions in two parts that must add up
}
WORKS = {
    "deepseek_v3", "falcon_h1", "gemma3_text", "gpt_oss", "granitemoehybrid", "lfm2", "llama4_text", "mamba2", "mpt",
    "qwen3_next",
}  # fmt: skip
QUESTIONS = [
    Example(text, "has") for text in ("Two?", "How many are two and three?", "Tom has 4 pens. Tom gets 5. Now?")
]


@dataclass(frozen=True)
class Outcome:
    """What a family can be used for: "works", how it is read if slowly, or the sentence that refuses it."""

    teacher: str
    student: str
    cut: str


def try_family(folder: Path) -> Outcome:
    """Take a model through annotation, and with all and with some layers through training, saving and reopening."""
    prompts = Prompts(load_tokenizer(folder), LAYOUT, arithmetic().shots(), max_length=256, too_long="drop")
    return Outcome(
        _attempt(lambda: _annotate(folder, prompts)),
        _attempt(lambda: _train(folder, prompts, None)),
        _attempt(lambda: _train(folder, prompts, [0, 1, 3])),
    )


def _attempt(work: Callable[[], str]) -> str:
    try:
        return work()
    except (ConfigError, SavedStudentError) as error:  # the second is one, when the student is checked
        message = str(error)
        assert "\n" not in message
        return f"refused: {message}"


def _annotate(folder: Path, prompts: Prompts) -> str:
    """Annotate all kinds of requests, and compare every probability with that of a plain forward pass."""
    teacher = make_teacher(folder, prompts, max_new_tokens=4, constrain=False)
    model = teacher.load()
    for span in ("answer", "rationale"):
        given = [prompts.request(example, span, given="Two. And has 12") for example in QUESTIONS]
        generated = [prompts.request(Example(example.question), span) for example in QUESTIONS]
        for requests in (given, generated):
            for request, annotation in zip(requests, teacher.annotate(requests), strict=True):
                _check(model, prompts, span, request, annotation)
    way: str = teacher._readers["answer"].way
    teacher.close()
    return {"batched": "works", "grouped": "works", "stepwise": "works"}.get(way, "one prompt at a time")


def _check(model: Any, prompts: Prompts, span: Span, request: Request, annotation: Annotation) -> None:
    before = (*prompts.prefix(span), *request.question_ids)
    for target in annotation.targets.values():
        if target.soft is not None:
            text = torch.tensor([[*before, *target.token_ids]])
            with torch.no_grad():
                logits_TV = model(text).logits[0, len(before) - 1 : -1, : prompts.vocabulary_size]
            expected_TV = logits_TV.double().softmax(-1)
            found_TV = torch.from_numpy(target.soft.logprobs_E.reshape(len(target.soft), -1)).double().exp()
            assert (found_TV - expected_TV).abs().max() <= 1e-5


def _train(folder: Path, prompts: Prompts, keep_layers: list[int] | None) -> str:
    """Open and check a student as a run does, train it for a step, save it, and compare it with the reopened one."""
    student = open_student(folder, **WHOLE_STUDENT | {"keep_layers": keep_layers})
    check_student_reading(student.eval(), prompts.vocabulary_size)
    zero_shot = prompts.zero_shot(prompts.tokenizer)
    module, before = student_module(student, zero_shot, "answer", "kl"), weights_hash(student)
    made = lessons(zero_shot, 3)
    counts = sum((lesson.counts() for lesson in made), Counter[tuple[Span, str]]())
    batch = collate(made, counts, zero_shot.end, read)
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=1e-3)
    total: Tensor = head_loss(module.hidden(batch), module.head(), list(module.terms(batch).values()))[0]
    total.backward()
    optimizer.step()
    assert weights_hash(student) != before
    with tempfile.TemporaryDirectory() as temporary:
        to = Path(temporary) / "student"
        saved = save_student(student, prompts.tokenizer, to, dtype=torch.float32, max_new_tokens=4)
    ids_BT = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        trained, reopened = (model.eval()(ids_BT).logits.double().softmax(-1) for model in (student, saved.model))
    assert (trained - reopened).abs().max() <= 1e-5
    return "works"


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore")  # of the families' own code
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_works_or_is_refused_in_one_sentence(family: str, tmp_path: Path) -> None:
    if family in NOT_BUILT:
        with pytest.raises(MODEL_ERRORS) as caught:
            make_tiny(family, tmp_path)
        assert type(caught.value).__name__ == NOT_BUILT[family]
        return
    make_tiny(family, tmp_path)
    outcome = try_family(tmp_path)
    if family in WORKS:
        assert not outcome.teacher.startswith("refused")
        assert outcome.student == "works"


def test_the_lists_of_families_are_of_this_version() -> None:
    assert {*NOT_BUILT, *WORKS} <= set(FAMILIES)


def summary(outcomes: dict[str, Outcome]) -> str:
    """Families that work in every way in one line, the others in a table."""
    working = [family for family, outcome in outcomes.items() if set(vars(outcome).values()) == {"works"}]
    lines = [f"{len(working)} of {len(FAMILIES)} work in every way: {', '.join(working)}.", ""]
    lines += ["| family | teacher | student | cut student |", "|---|---|---|---|"]
    for family, outcome in outcomes.items():
        if family not in working:
            teacher, student, cut = vars(outcome).values()
            cells = [teacher, "the same" if student == teacher else student, "the same" if cut == student else cut]
            lines.append(f"| {family} | {' | '.join(textwrap.shorten(cell, 160) for cell in cells)} |")
    return "\n".join(lines)


def outcome_of(family: str, folder: Path) -> Outcome:
    """The outcome of a family, or the error for which it has no small model."""
    try:
        make_tiny(family, folder)
    except MODEL_ERRORS as error:
        return Outcome(*[f"no small model ({type(error).__name__})"] * 3)
    told = (cell.replace(str(folder), "the folder").replace("|", "/") for cell in vars(try_family(folder)).values())
    return Outcome(*told)


def main() -> None:
    """Print the outcome of every family."""
    outcomes = {}
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            outcomes[family] = outcome_of(family, Path(folder))
    print(summary(outcomes))


if __name__ == "__main__":
    main()
