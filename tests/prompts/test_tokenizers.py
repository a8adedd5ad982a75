"""The decoded prompt is the text that was laid out, for every kind of tokenizer, or the tokenizer is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from distill.errors import ConfigError
from distill.prompts.cues import Layout
from distill.prompts.rendering import Prompts
from distill.prompts.tokenizers import load_tokenizer, tokenizer_fingerprint
from distill.records import Example
from tests.conftest import make_model
from tests.prompts.kinds import KEPT, REFUSED, byte_level, with_template

LAYOUT = Layout(instruction="", question_cue="Question:", rationale_cue="Reason:", answer_cue="Answer:")
SHOTS = (Example("Is it 10?", "no, thanks", "It is 3."), Example("Is it 3?", "yes", "It is 3."))
QUESTION = Example("Is it good but slow?", "yes", "Both, it is.")


def prompts_of(tokenizer: Any, shots: int = 0, instruction: str = "") -> Prompts:
    layout = Layout(instruction, LAYOUT.question_cue, LAYOUT.rationale_cue, LAYOUT.answer_cue)
    return Prompts(tokenizer, layout, SHOTS[:shots], max_length=256, too_long="refuse")


@pytest.mark.parametrize("instruction", ["", "Is it so?"])
@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize("kind", KEPT)
def test_the_decoded_prompt_is_the_laid_out_text(kind: str, shots: int, instruction: str) -> None:
    prompts = prompts_of(KEPT[kind](), shots, instruction)
    before = f"{instruction}\n\n" if instruction else ""
    for span in ("answer", "rationale"):
        text = before
        for shot in SHOTS[:shots]:
            reason = f"Reason: {shot.rationale}\n" if span == "rationale" else ""
            text += f"Question: {shot.question}\n{reason}Answer: {shot.answer}\n"
        text += f"Question: {QUESTION.question}\n"
        if span == "answer":
            ids, text = prompts.answer_prompt(QUESTION, "yes").ids, f"{text}Answer: yes"
        else:
            ids = prompts.rationale_prompt(QUESTION, "Both, it is.", "yes").ids
            text += "Reason: Both, it is.\nAnswer: yes"
        assert prompts.decode(ids) == text
        assert ids[0] == prompts.tokenizer.bos_token_id
        assert prompts.tokenizer.unk_token_id not in ids


@pytest.mark.parametrize("kind", KEPT)
def test_target_ids_do_not_depend_on_the_prompt(kind: str) -> None:
    tokenizer = KEPT[kind]()
    for choice in ("yes", "no, thanks", "10"):
        zero, few = (prompts_of(tokenizer, shots).answer_prompt(QUESTION, choice) for shots in (0, 2))
        targets = [prompt.ids[slice(*prompt.spans["answer"])] for prompt in (zero, few)]
        assert targets[0] == targets[1] == prompts_of(tokenizer).answer_ids(choice)


@pytest.mark.parametrize("kind", [kind for kind in KEPT if "byte tokens" in kind])
def test_a_choice_begins_with_its_word_as_in_the_whole_text(kind: str) -> None:
    prompts = prompts_of(KEPT[kind]())
    assert prompts.tokenizer.convert_ids_to_tokens(prompts.answer_ids("yes")) == ["▁yes", "</s>"]
    ids = prompts.answer_prompt(QUESTION, "yes").ids
    assert list(ids[:-1]) == prompts.tokenizer.encode(prompts.decode(ids))


@pytest.mark.parametrize("kind", KEPT)
def test_the_name_of_a_special_token_in_a_text_is_ordinary_text(kind: str) -> None:
    tokenizer = KEPT[kind]()
    prompts = prompts_of(tokenizer)
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    for text in ("</s>", " yes</s>no", " <s></s> </s>"):
        assert special.isdisjoint(prompts.encode(text))
        assert special.isdisjoint(prompts.answer_ids(text)[:-1])
        ids = prompts.answer_prompt(Example(text.strip(), "yes"), "yes").ids
        assert [index for index in ids if index in special] == [tokenizer.bos_token_id, tokenizer.eos_token_id]


def test_an_end_token_that_is_ordinary_text_is_not_taken_from_a_text() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens(["\n\n", "!"])
    tokenizer.eos_token = "\n\n"
    prompts = prompts_of(tokenizer)
    assert prompts.end not in prompts.encode("one\n\ntwo")
    assert prompts.decode(prompts.encode("one\n\ntwo")) == "one\n\ntwo"
    tokenizer.eos_token = "!"
    with pytest.raises(ConfigError, match="has a special token that is ordinary text, in 'Ah! So'"):
        prompts_of(tokenizer).encode("Ah! So")


def test_a_tokenizer_that_draws_its_tokens_at_random_is_made_deterministic(tmp_path: Path) -> None:
    random = byte_level()
    random.backend_tokenizer.model.dropout = 0.5
    random.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert len({tuple(tokenizer.encode(QUESTION.question)) for _ in range(9)}) == 1
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(byte_level())


@pytest.mark.parametrize("choice", ["5 ¢", "naïve"])
def test_a_choice_that_the_tokenizer_cannot_write_is_refused(choice: str) -> None:
    prompts = prompts_of(KEPT["metaspace first"]())
    assert prompts.choice_ids(["yes", "no, thanks"])
    with pytest.raises(ConfigError, match=f"reads the choice '{choice}' back as '"):
        prompts.choice_ids(["yes", choice])


@pytest.mark.parametrize("kind", REFUSED)
def test_a_tokenizer_that_changes_texts_is_refused_by_name(kind: str) -> None:
    tokenizer = REFUSED[kind]()
    tokenizer.name_or_path = "some/model"
    with pytest.raises(ConfigError, match=r"tokenizer of some/model does not keep texts as they are: .* is read back"):
        prompts_of(tokenizer)


@pytest.mark.parametrize(
    ("single", "special", "settings", "expected"),
    [
        ("</s> $A", ["</s>"], {"start": "</s>"}, ["</s>"]),
        ("[CLS] $A [SEP]", ["[CLS]", "[SEP]"], {}, ["[CLS]"]),
        ("<s> $A </s>", ["<s>", "</s>"], {"start": "<s>"}, ["<s>"]),
        ("$A </s>", ["</s>"], {}, []),
        ("[gMASK] <s> $A", ["[gMASK]", "<s>"], {}, ["[gMASK]", "<s>"]),
        ("$A", [], {}, []),
    ],
)
def test_only_what_stands_before_a_text_starts_a_prompt(
    single: str, special: list[str], settings: dict[str, str], expected: list[str]
) -> None:
    tokenizer = with_template(single, *special, **settings)
    start = tuple(tokenizer.convert_tokens_to_ids(expected))
    for span in ("answer", "rationale"):
        assert prompts_of(tokenizer).prefix(span) == start
    assert prompts_of(tokenizer).answer_prompt(QUESTION, "yes").ids[: len(start)] == start


def saved(tokenizer: Any, folder: Path, change: Callable[[Tokenizer], object] = lambda _: None) -> Any:
    change(tokenizer.backend_tokenizer)
    tokenizer.save_pretrained(folder)
    return load_tokenizer(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.enable_truncation(5),
        lambda t: t.enable_padding(length=9),
        lambda t: t.enable_truncation(7, stride=2),
    ],
)
def test_saved_truncation_and_padding_change_neither_ids_nor_fingerprint(
    change: Callable[[Tokenizer], object], tmp_path: Path
) -> None:
    tokenizer = byte_level()
    tokenizer.pad_token = "<unk>"
    plain, limited = saved(tokenizer, tmp_path / "a"), saved(tokenizer, tmp_path / "b", change)
    before = tokenizer_fingerprint(limited)
    assert before == tokenizer_fingerprint(plain)
    prompt = prompts_of(limited).answer_prompt(QUESTION, "yes")
    assert prompt == prompts_of(plain).answer_prompt(QUESTION, "yes")
    limited(["a", "two words"], padding=True, truncation=True, max_length=1)
    assert tokenizer_fingerprint(limited) == before


@pytest.mark.parametrize("role", ["bos_token", "eos_token", "pad_token"])
def test_the_ids_of_start_end_and_padding_are_in_the_fingerprint(role: str) -> None:
    plain = byte_level()
    other = copy.deepcopy(plain)
    setattr(other, role, "<unk>")
    assert tokenizer_fingerprint(plain) != tokenizer_fingerprint(other)
    assert prompts_of(plain).fingerprint() != prompts_of(other).fingerprint()


DAMAGED = {
    "configuration": ("config.json", {"hidden_size": "64"}),
    "type of the configuration": ("config.json", []),
    "dtype": ("config.json", {"dtype": "nonsense"}),
    "special token": ("tokenizer_config.json", {"eos_token": 7}),
    "class": ("tokenizer_config.json", {"tokenizer_class": 7}),
    "length": ("tokenizer_config.json", {"model_max_length": "long"}),
    "model": ("tokenizer.json", {"model": {"type": "Unknown"}}),
    "version": ("tokenizer.json", {"version": "9"}),
    "content": ("tokenizer.json", None),
    "added tokens": ("added_tokens.json", [7]),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused_in_a_line(case: str, tmp_path: Path) -> None:
    name, damage = DAMAGED[case]
    file = make_model(tmp_path, seed=0) / name
    content = json.loads(file.read_text()) | damage if isinstance(damage, dict) else damage
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="no tokenizer that loads") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_order_of_a_vocabulary_does_not_change_a_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level()
    monkeypatch.setattr(type(tokenizer), "backend_tokenizer", None)  # as of a tokenizer that is written in Python
    vocabulary = tokenizer.get_vocab()
    prints = []
    for items in (sorted(vocabulary.items()), sorted(vocabulary.items(), reverse=True), [("a", 1), ("b", 2)]):
        monkeypatch.setattr(tokenizer, "get_vocab", lambda items=items: dict(items))
        prints.append(tokenizer_fingerprint(tokenizer))
    assert prints[0] == prints[1] != prints[2]
