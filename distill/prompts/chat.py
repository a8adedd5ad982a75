"""Prompts in a model's own chat template: the question is a user's turn, the target the beginning of the assistant's.

The template is not read but rendered, with a marker in place of each text. What lies between the markers is the
template's, and is encoded with its special tokens; the texts are encoded as pieces, in which no special token occurs.
A prompt of such parts is compared with the tokens of a whole rendering before a model is used, and before the first
conversation of a new sequence of roles. The text of every conversation is compared with its whole rendering, because a
template may change earlier turns by what they contain.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn, final

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from distill.errors import ConfigError
from distill.prompts import check_texts
from distill.prompts.pieces import Ids, Pieces
from distill.prompts.reasoning import Marks, marks_of
from distill.prompts.templates import own_template, templates_for
from distill.records import Example, Message, Role, Span

Turn = dict[str, str]
Roles = tuple[Role, ...]  # of the messages before the question
_MARKER = re.compile("\ue000(\\d+)\ue001")  # characters for private use: templates leave them alone
_QUESTION, _TARGET, _SYSTEM, _SHOTS = range(4)  # numbers of the texts; shots have two each
_NO_CLOCK = ""  # in place of the function that tells a template the time: a text cannot be called
_SAMPLES = (("What is 3 + 4?", "7"), ("Is it so?\nYes or no.", "Yes, it is."))
_REASONING = re.compile(r"^.*</think>\s*", re.DOTALL)  # which templates leave out of earlier turns


@dataclass(frozen=True)
class Layout:
    """The fixed texts of a conversation; `arguments` are those of the template, such as `enable_thinking`.

    With `system` None, a conversation has the system's turn of its own row, or none. A model that reasons between
    `reasoning_marks` gets no `rationale_request`: its reasoning is the rationale.
    """

    system: str | None
    rationale_request: str
    answer_cue: str
    arguments: Mapping[str, Any]
    reasoning_marks: Sequence[str] | None

    def __post_init__(self) -> None:
        """Raise ConfigError for texts in which a line break stayed two characters, as on most command lines."""
        names = ("system", "rationale_request", "answer_cue")
        check_texts({f"prompt.layout.{name}": getattr(self, name) or "" for name in names})

    def frame(
        self, tokenizer: PreTrainedTokenizerBase, shots: Sequence[Example], *, template: str | None = None
    ) -> Chat:
        """The layout in a template, or else that of the model; raises ConfigError if it has no suitable one."""
        return Chat(self, tokenizer, shots, template or own_template(tokenizer))


@final
class Chat:
    """A layout in the chat template and the tokens of one model."""

    def __init__(
        self, layout: Layout, tokenizer: PreTrainedTokenizerBase, shots: Sequence[Example], template: str | None
    ) -> None:
        """Raise ConfigError if the template does not give what a model reads and what it learns to write."""
        self.layout = self._layout = layout
        self._tokenizer, self._shots = tokenizer, tuple(shots)
        self._name = tokenizer.name_or_path or type(tokenizer).__name__
        self.template = template or self._no_template()
        self._marks = self._reasoning_marks()
        marks = (self._marks.open, self._marks.close) if self._marks else ()
        self.pieces = Pieces(tokenizer, ("Say", " so", "\n", "Say", " so"), marks)
        self.separator = self._marks.close if self._marks else f"\n{layout.answer_cue}"
        self._check_separator()
        self._split = functools.cache(self._split_at_question)
        self._check_roles = functools.cache(self._check_conversation)
        self._has_system_turns = self._accepts_system_turns()
        self.question_lead, _ = self._around_question("answer", ())
        self.target_lead, ending = self._around_target()
        self.end = self._end(ending)
        if shots:  # which may name special tokens, and then are not encoded as in a whole rendering
            layout.frame(tokenizer, (), template=template)
        else:
            for question, target in _SAMPLES:
                self._check(question, target)

    def prefix(self, span: Span) -> Ids:
        """Token ids of the system's turn, of the shots, and of the user's turn up to the question.

        None if each row has a system's turn of its own, because then prompts begin differently.
        """
        return () if self._layout.system is None else self._before(span, ())

    def question(self, span: Span, text: str, history: Sequence[Message] = ()) -> tuple[Ids, Ids, Ids]:
        """Token ids of earlier turns, of the question, and of what follows up to the target.

        Raises ConfigError for a conversation that the template changes or refuses.
        """
        history = tuple(map(_without_reasoning, history))
        if history:
            self._compare(span, text, history)
        prefix = self.prefix(span)
        lead, after = self._around_question(span, _roles(history))
        head = self._before(span, history)[len(prefix) :] if history or not prefix else ()
        return head, self.pieces(f"{lead}{text}"), self.pieces.template(after, is_first=False)

    def separator_ids(self) -> Ids:
        """Token ids between a rationale and the answer after it."""
        if self._marks:
            return self.pieces.template(self._marks.separator, is_first=False)
        return self.pieces(self._separated(""))

    def opening(self, span: Span) -> str:
        """The text between a turn as the template begins it and a target, in which reasoning begins or ends."""
        return self._openings[span] if self._marks else ""

    def around(self, span: Span, history: Sequence[Message] = ()) -> tuple[str, str]:
        """The texts before and after the question, without special tokens."""
        head, _, after = self.question(span, "?", history)
        lead, _ = self._around_question(span, _roles(history))
        return self.pieces.decode(self.prefix(span) + head) + lead, self.pieces.decode(after)

    def literal(self, span: Span) -> tuple[str, str]:
        """The same texts with the names of special tokens, as a tokenizer reads them."""
        before, after = self._split(span, ())
        return self._filled(before, self._texts(span, ())), after

    def fingerprint(self) -> Mapping[str, Any]:
        """The template, which is no part of the tokenizer's fingerprint."""
        return {"template": hashlib.sha256(self.template.encode()).hexdigest()}

    def _separated(self, rationale: str) -> str:
        """A rationale and what stands between it and an answer, which brings its own space, or has none."""
        return f"{rationale}{self.separator}{'' if self.target_lead else chr(10)}"

    def _reasoning_marks(self) -> Marks | None:
        """The marks of the model's reasoning; None if it has none, or is told by the arguments to answer at once."""
        marks = marks_of(self.template, self._layout.reasoning_marks)
        begun = self._rendered([_turn("user", "a")], begin=True) if marks else ""
        if marks is None or marks.is_closed(begun):
            return None
        self._openings = marks.openings(begun)
        return marks

    def _check_separator(self) -> None:
        if self._marks and self.separator not in self.pieces.decode(self.separator_ids()):
            raise ConfigError(
                f"the tokenizer of {self._name} has {self.separator!r} as a special token, which is no part of a text, "
                "so reasoning and answer could not be separated; set prompt.layout.reasoning_marks=[] and, for answers "
                "without reasoning, prompt.layout.arguments={enable_thinking: false}"
            )

    def _no_template(self) -> NoReturn:
        raise ConfigError(
            f"the tokenizer of {self._name} has no chat template; give it one with "
            f"prompt.without_template={'|'.join(templates_for(self._tokenizer))}, or set prompt=cues"
        )

    def _accepts_system_turns(self) -> bool:
        try:
            self._apply([_turn("system", "a"), _turn("user", "b")], begin=True)
        except TemplateError:
            return False
        return True

    def _around_target(self) -> tuple[str, str]:
        """The spaces before a target, and the text after it."""
        turns = self._turns("answer", ())
        begun = self._rendered(turns, begin=True)
        whole = self._rendered([*turns, _turn("assistant", _mark(_TARGET))], begin=False)
        written, marker, ending = whole.partition(_mark(_TARGET))
        if self._marks:
            begun, written = map(self._marks.removed, (begun, written))
        lead = written.removeprefix(begun)
        if not written.startswith(begun) or not marker or lead.strip():
            raise ConfigError(
                f"the chat template of {self._name} begins an assistant's turn with {begun[-60:]!r}, but writes "
                f"{whole[-60:]!r}: a student would answer after another text than it learned; with templates for "
                "reasoning, try prompt.layout.arguments={enable_thinking: false}"
            )
        return "" if self._marks else lead, ending

    def _end(self, ending: str) -> int:
        """The token that ends an assistant's turn."""
        ids = self.pieces.template(ending, is_first=False)
        if not ids or ids[0] not in {*self._tokenizer.all_special_ids, *self._tokenizer.added_tokens_decoder}:
            raise ConfigError(
                f"the chat template of {self._name} ends an assistant's turn with {ending!r}, expected a special token"
            )
        return ids[0]

    def _before(self, span: Span, history: Sequence[Message]) -> Ids:
        """Token ids up to the question: the template's text between the markers, and the texts in their places."""
        texts = self._texts(span, history)
        first, *parts = _MARKER.split(self._split(span, _roles(history))[0])
        ids = self.pieces.template(first.rstrip(), is_first=True)
        for before, number, after in zip((first, *parts[1::2]), parts[::2], parts[1::2], strict=False):
            ids += self.pieces(f"{_spaces_after(before)}{texts[int(number)]}")
            ids += self.pieces.template(after.rstrip(), is_first=False)
        return ids

    def _check(self, question: str, target: str, history: Sequence[Message] = ()) -> None:
        """Compare a prompt and its target, made of parts, with the tokens of their whole rendering."""
        texts = self._texts("answer", history)
        rendered = self._filled(self._whole(self._turns("answer", _roles(history), question), target), texts)
        whole = self.pieces.template(rendered, is_first=True)
        lead, after = self._around_question("answer", _roles(history))
        ids = self._before("answer", history) + self.pieces(f"{lead}{question}")
        ids += self.pieces.template(after, is_first=False)
        ids += (*self.pieces(f"{self.target_lead}{target}"), self.end)
        if whole[: len(ids)] != ids:
            raise ConfigError(
                f"the tokenizer of {self._name} encodes {rendered!r} otherwise than its parts, so the prompt that is "
                "served would not be the one that was trained; set prompt=cues, or choose another model"
            )

    def _whole(self, turns: Sequence[Turn], target: str) -> str:
        """The text of a conversation with its answer; before this stands what a model is served that reasons."""
        rendered = self._rendered([*turns, _turn("assistant", target)], begin=False)
        if not self._marks:
            return rendered
        return f"{self._begun('answer', turns)}{rendered[rendered.rindex(target) :]}"

    def _begun(self, span: Span, turns: Sequence[Turn]) -> str:
        """The text of a conversation up to a target."""
        return f"{self._rendered(turns, begin=True)}{self.opening(span)}"

    def _check_conversation(self, roles: Roles) -> None:
        """Check a conversation with messages of these roles before the question."""
        self._check(*_SAMPLES[1], _sample(roles))

    def _compare(self, span: Span, question: str, history: Sequence[Message]) -> None:
        """Compare the text of a conversation that is made of parts with its whole rendering."""
        texts = self._texts(span, history)
        before, after = self._split(span, _roles(history))
        self._check_roles(_roles(history))
        turns = self._turns(span, _roles(history), question)
        for turn in turns:
            turn["content"] = self._filled(turn["content"], texts)
        rendered, joined = self._begun(span, turns), f"{self._filled(before, texts)}{question}{after}"
        if rendered != joined:
            place = next((n for n, (a, b) in enumerate(zip(rendered, joined, strict=False)) if a != b), len(joined))
            raise ConfigError(
                f"the chat template of {self._name} changes what a conversation contains: it writes "
                f"{rendered[max(0, place - 20) : place + 40]!r} for {joined[max(0, place - 20) : place + 40]!r}; a "
                "student would be served other prompts than it learned"
            )

    def _split_at_question(self, span: Span, roles: Roles) -> tuple[str, str]:
        """The rendered conversation before and after the last question, up to the target; markers stand for texts."""
        rendered = self._begun(span, self._turns(span, roles))
        numbers = sorted(int(number) for number in _MARKER.findall(rendered))
        if numbers != sorted([_QUESTION, *self._texts(span, _sample(roles))]):
            reason = "leaves out or repeats texts of earlier turns; "
            advice = "learn only the first turn of each conversation" if roles else "set prompt.num_shots=0"
            raise ConfigError(f"the chat template of {self._name} {reason}{advice}")
        before, _, after = rendered.partition(_mark(_QUESTION))
        return before, after

    def _around_question(self, span: Span, roles: Roles) -> tuple[str, str]:
        """The spaces before the question, which are encoded with it, and the text after it."""
        before, after = self._split(span, roles)
        return _spaces_after(before), after

    def _filled(self, rendered: str, texts: Mapping[int, str]) -> str:
        """A rendered conversation with texts in place of their markers."""
        return _MARKER.sub(lambda marker: texts[int(marker[1])], rendered)

    def _texts(self, span: Span, history: Sequence[Message]) -> dict[int, str]:
        """The texts of a conversation by the numbers of their markers, without the last question and its target."""
        system, earlier = self._system_and_turns(history)
        texts = {_SYSTEM: system} if system else {}
        for number, shot in enumerate(self._shots):
            is_reasoned = span == "rationale" and not self._marks  # templates drop the reasoning of earlier turns
            if shot.answer is None or (is_reasoned and shot.rationale is None):
                raise ConfigError(f"the shot {shot.question[:60]!r} has no answer or no rationale")
            reasoning = self._separated(f"{shot.rationale}") + self.target_lead if is_reasoned else ""
            texts |= {_SHOTS + 2 * number: shot.question, _SHOTS + 2 * number + 1: f"{reasoning}{shot.answer}"}
        return texts | {self._first_earlier + number: message.content for number, message in enumerate(earlier)}

    def _system_and_turns(self, history: Sequence[Message]) -> tuple[str, Sequence[Message]]:
        """The system's text, of the layout or of this conversation, and the turns after it."""
        if not history or history[0].role != "system":
            return self._layout.system or "", history
        if self._layout.system is not None:
            raise ConfigError(
                f"prompt.layout.system={self._layout.system!r}, but a conversation has the system's turn "
                f"{history[0].content[:60]!r}; set prompt.layout.system=null for the turns of the conversations"
            )
        return history[0].content, history[1:]

    @property
    def _first_earlier(self) -> int:
        """The number of the marker of the first turn of a conversation, which stands after the shots."""
        return _SHOTS + 2 * len(self._shots)

    def _turns(self, span: Span, roles: Roles, question: str | None = None) -> list[Turn]:
        """The turns up to the last question, with markers in place of all texts, or all but the last question."""
        request = f"\n{self._layout.rationale_request}" if span == "rationale" and not self._marks else ""
        turns = []
        for number in range(_SHOTS, self._first_earlier, 2):
            turns += [_turn("user", f"{_mark(number)}{request}"), _turn("assistant", _mark(number + 1))]
        earlier = [role for role in roles if role != "system"]
        turns += [_turn(role, _mark(self._first_earlier + number)) for number, role in enumerate(earlier)]
        turns.append(_turn("user", f"{question or _mark(_QUESTION)}{request}"))
        if not self._layout.system and "system" not in roles:
            return turns
        if self._has_system_turns:
            return [_turn("system", _mark(_SYSTEM)), *turns]
        turns[0]["content"] = f"{_mark(_SYSTEM)}\n\n{turns[0]['content']}"
        return turns

    def _rendered(self, turns: Sequence[Turn], *, begin: bool) -> str:
        """The text of a conversation, with `begin` up to where the assistant begins to write."""
        try:
            return self._apply(turns, begin=begin)
        except TemplateError as error:
            raise ConfigError(f"the chat template of {self._name} refuses this prompt: {error}") from None

    def _apply(self, turns: Sequence[Turn], *, begin: bool) -> str:
        arguments = {"strftime_now": _NO_CLOCK, "chat_template": self.template, **self._layout.arguments}
        render = functools.partial(self._tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=begin)
        try:
            return str(render(list(turns), **arguments))
        except TypeError as error:
            if "strftime_now" not in self.template:
                raise ConfigError(f"the chat template of {self._name} refuses this prompt: {error}") from None
            raise ConfigError(
                f"the chat template of {self._name} writes the date into each prompt, so a student would read another "
                "prompt each day; name a fixed one: prompt.layout.arguments={date_string: 26 Jul 2024}"
            ) from None


def _mark(number: int) -> str:
    return f"\ue000{number}\ue001"


def _roles(history: Sequence[Message]) -> Roles:
    return tuple(message.role for message in history)


def _sample(roles: Roles) -> list[Message]:
    return [Message(role, f"Say {number}.") for number, role in enumerate(roles)]


def _without_reasoning(message: Message) -> Message:
    """An earlier turn of the assistant without the reasoning before its answer."""
    return replace(message, content=_REASONING.sub("", message.content)) if message.role == "assistant" else message


def _spaces_after(text: str) -> str:
    """Spaces and line breaks at the end of a text, which are encoded with the text after them."""
    return text[len(text.rstrip()) :]


def _turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}
