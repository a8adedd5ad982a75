"""Laws 3, 5 and 15: the turns of a conversation share a sequence, with the targets and counts that they have apart."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from distill.cache.codecs.topk import TopK
from distill.cache.store import Store
from distill.lessons.collate import collate
from distill.lessons.join import Lesson, TrainingSequence, with_shared_turns
from distill.prompts.rendering import Prompts
from distill.records import Annotation, Example, FilteredRationale, Message, Prompt, RowCounts, Target
from tests.conftest import read
from tests.lessons.conftest import soft
from tests.lessons.test_join import ALL_TARGETS, annotation, make_join
from tests.prompts.templates import TEMPLATES
from tests.prompts.test_chat import prompts_of

END = 9


def turns(*texts: str, system: str | None = None) -> list[Example]:
    """The examples of a conversation, of which every second text is the assistant's."""
    history = (Message("system", system),) if system else ()
    examples = []
    for question, answer in zip(texts[::2], texts[1::2], strict=True):
        examples.append(Example(question, answer, history=history))
        history += (Message("user", question), Message("assistant", answer))
    return examples


def lesson_of(prompts: Prompts, example: Example, answer: str | None = None) -> Lesson:
    prompt = prompts.answer_prompt(example, answer or str(example.answer))
    return Lesson((TrainingSequence.of(prompt, example.id, {"answer"}, {}),), example.answer)


def of_tokens(name: str, start: int, *ids: int) -> Lesson:
    """A lesson of which the tokens from `start` on are learned."""
    return Lesson((TrainingSequence.of(Prompt(ids, {"answer": (start, len(ids))}), name, {"answer"}, {}),))


def learned(lessons: list[Lesson]) -> Counter[object]:
    """Each target with all tokens before it and its own."""
    sequences = (sequence for lesson in lessons for sequence in lesson.sequences)
    return Counter((s.ids[: target.stop], target) for s in sequences for target in s.targets)


@pytest.mark.parametrize("name", TEMPLATES)
def test_turns_share_a_sequence_where_the_template_renders_earlier_turns_alike(name: str) -> None:
    prompts = prompts_of(name, system=None)
    examples = turns("One?", "First.", "Two?", "Second one.", "Three?", "Third.", "Four?", "Fourth.")
    separate = [lesson_of(prompts, example) for example in examples]
    shared = with_shared_turns(separate)
    if name == "Qwen 3":  # writes an empty reasoning before the last answer, and not before earlier ones
        assert shared == separate
        return
    (lesson,) = shared
    (sequence,) = lesson.sequences
    assert sequence.ids == separate[-1].sequences[0].ids
    assert lesson.example_ids == tuple(example.id for example in examples)
    assert lesson.answer == "Fourth."
    words = [prompts.text(sequence.ids[target.start : target.stop]) for target in sequence.targets]
    assert words == [example.answer for example in examples]
    assert learned(shared) == learned(separate)
    assert lesson.counts() == sum((turn.counts() for turn in separate), Counter())
    assert lesson.num_tokens < sum(turn.num_tokens for turn in separate) / 2


def test_a_conversation_has_no_target_at_a_turn_without_a_lesson() -> None:
    prompts = prompts_of("ChatML", system=None)
    first, _, third = turns("One?", "First.", "Two?", "Second.", "Three?", "Third.", system="Be brief.")
    (lesson,) = with_shared_turns([lesson_of(prompts, first), lesson_of(prompts, third)])
    assert lesson.example_ids == (first.id, third.id)


def test_an_answer_in_other_words_is_not_in_the_conversation_that_goes_on() -> None:
    prompts = prompts_of("ChatML", system=None)
    first, second, third = turns("One?", "First.", "Two?", "Second.", "Three?", "Third.")
    separate = [lesson_of(prompts, first), lesson_of(prompts, second, "Another."), lesson_of(prompts, third)]
    shared = with_shared_turns(separate)
    assert len(shared) == 2
    assert not any({second.id, third.id} <= {*lesson.example_ids} for lesson in shared)
    assert learned(shared) == learned(separate)


def test_a_beginning_of_several_conversations_is_learned_in_one_of_them() -> None:
    prompts = prompts_of("ChatML", system=None)
    first, second = turns("One?", "First.", "Two?", "Second.")
    _, other = turns("One?", "First.", "And?", "Other.")
    separate = [lesson_of(prompts, example) for example in (other, first, second)]
    shared = with_shared_turns(separate)
    assert len(shared) == 2
    assert learned(shared) == learned(separate)


def test_a_turn_is_shared_only_with_its_end_and_before_the_next_answer() -> None:
    unended = [of_tokens("a", 2, 1, 2, 3, END), of_tokens("b", 6, 1, 2, 3, END + 1, 5, 6, 7, END)]
    assert with_shared_turns(unended) == unended
    overlapping = [of_tokens("a", 2, 1, 2, 3, END), of_tokens("b", 3, 1, 2, 3, END, 4, END)]
    assert with_shared_turns(overlapping) == overlapping
    equal = [of_tokens("a", 2, 1, 2, 3, END), of_tokens("b", 2, 1, 2, 3, END)]
    assert with_shared_turns(equal) == equal
    adjacent = [of_tokens("a", 2, 1, 2, 3, END), of_tokens("b", 4, 1, 2, 3, END, 4, END)]
    ((sequence,),) = (lesson.sequences for lesson in with_shared_turns(adjacent))
    assert [(target.start, target.stop) for target in sequence.targets] == [(2, 4), (4, 6)]


def test_random_trees_of_conversations_keep_all_targets_and_share_every_beginning() -> None:
    generator = random.Random(0)
    for _ in range(60):
        separate: list[Lesson] = []
        for number in range(generator.randint(1, 12)):
            before = generator.choice(separate).sequences[0].ids if separate and generator.random() < 0.8 else (0,)
            question = [generator.randint(1, 3) for _ in range(generator.randint(0, 2))]
            ids = (*before, *question, generator.randint(1, 3), END)
            if not any(ids == lesson.sequences[0].ids for lesson in separate):
                separate.append(of_tokens(str(number), len(ids) - 2, *ids))
        generator.shuffle(separate)
        shared = with_shared_turns(separate)
        assert learned(shared) == learned(separate)
        all_ids = {lesson.sequences[0].ids for lesson in separate}
        endings = [ids for ids in all_ids if not any(ids == other[: len(ids)] for other in all_ids - {ids})]
        assert len(shared) == len(endings)
        batch = collate(shared, {}, 0, read)
        labels = sorted(batch.input_ids_BT[batch.sequence_N, batch.before_N + 1].tolist())
        assert sorted(batch.label_N.tolist()) == labels
        assert sorted(batch.example_ids) == sorted(id_ for lesson in separate for id_ in lesson.example_ids)
        assert len(batch.target_N.unique()) == len(separate)


def test_targets_that_overlap_or_leave_their_sequence_are_refused() -> None:
    (sequence,) = of_tokens("a", 2, 1, 2, 3, END).sequences
    for start, stop in ((0, 2), (3, 4), (1, 3)):
        with pytest.raises(ValueError, match="do not follow each other"):
            replace(sequence, targets=(replace(sequence.targets[0], start=start, stop=stop), *sequence.targets))


def test_a_joined_conversation_counts_its_examples_and_keeps_rationales_apart(tmp_path: Path) -> None:
    prompts = prompts_of("ChatML", system=None)
    examples = turns("One?", "1.", "Two?", "2.", "Three?", "3.")
    long = Example("why " * 600, "4", history=examples[-1].history)
    annotations = {example.id: annotation(prompts, str(example.answer)) for example in examples[1:]}
    words = [
        Annotation(key * 32, {"rationale": Target(ids := prompts.rationale_ids(text), soft(len(ids)))}, "2.", text)
        for key, text in (("e", "So."), ("f", "Or so."))
    ]
    with Store(tmp_path, {"for": "test"}, TopK(k=3, temperature=1.0)).writing() as writer:
        writer.add(words)
    kept = {examples[1].id: [FilteredRationale(examples[1].id, text, "gold", None, 0.5) for text in words]}
    join = make_join(prompts, tmp_path, examples, annotations, rationales=kept, needed=ALL_TARGETS)
    joined = join.join([*examples, long])
    assert joined.counts == RowCounts(4, {"too long": 1}, 3)
    conversation, further = joined.lessons
    assert conversation.example_ids == tuple(example.id for example in examples)
    assert [sequence.spans for sequence in conversation.sequences] == [{"answer"}, {"rationale"}]
    assert (conversation.answer, conversation.confidence, further.confidence) == ("3.", None, 0.5)
    assert conversation.branched() is conversation
    assert [bool(target.soft) for target in conversation.sequences[0].targets] == [False, True, True]
    places = [target.soft.place[0] for target in conversation.sequences[0].targets if target.soft]
    assert places == [prompts.request(example, "answer").key for example in examples[1:]]


def test_a_conversation_has_the_mean_confidence_of_its_turns() -> None:
    first, second = of_tokens("a", 2, 1, 2, 3, END), of_tokens("b", 4, 1, 2, 3, END, 4, END)
    (lesson,) = with_shared_turns([replace(first, confidence=0.25), replace(second, confidence=0.75)])
    assert lesson.confidence == 0.5
    (lesson,) = with_shared_turns([replace(first, confidence=0.25), second])
    assert lesson.confidence is None
