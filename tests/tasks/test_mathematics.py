"""Mathematical answers: where they stand in a text, how they are read and compared, and what hostile ones do."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from distill.errors import AnswerError, ConfigError
from distill.records import Example
from distill.tasks import is_right, mathematics
from distill.tasks.answers import AnswerFormat
from distill.tasks.mathematics import is_same, read_math, value
from tests.tasks.test_files import task

SCRIPT = Path(mathematics.__file__).with_name("mathematics_process.py")


def answers() -> AnswerFormat:
    return AnswerFormat(kind="math", pattern=None, choices=[])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"First \boxed{3}, then \boxed{\frac{1}{2}}. Done", r"\frac{1}{2}"),  # the last box, and its inner braces
        (r"$x = 3$, so the answer is $\sqrt{2}$.", r"\sqrt{2}"),
        (r"We get \[ x = \frac{3}{4} \] as said", r"x = \frac{3}{4}"),
        ("3 + 4 = 7\n#### $1,234.50", "1234.5"),
        ("I think it is 7", "7"),
        ("It costs $5 and $6 dollars, together 11.", "11"),
        (r"\boxed{5 apples}", "5"),
        (r"\boxed{5 \text{ cm}}", r"5 \text{ cm}"),
        ("x^2 + 2x + 1", "x^2 + 2x + 1"),
        ("[0, 1)", "[0, 1)"),
        ("3, 4", "3, 4"),
        ("1e-5", "0.00001"),
    ],
)
def test_the_formula_or_number_of_a_text_is_read(text: str, answer: str) -> None:
    assert answers().read(text) == answer
    assert answers().read(answer) == answer


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello world",
        "the answer is five",
        r"\boxed{no idea}",
        r"\frac{1}{0}",
        r"\boxed{\frac{1}{}",
        "####",
        r"\boxed{",
    ],
)
def test_a_text_without_a_formula_is_unreadable(text: str) -> None:
    with pytest.raises(AnswerError):
        read_math(text)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("0.5", r"\frac{1}{2}"),
        ("2 + 3", "5"),
        (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
        ("(x+1)^2", "x^2+2x+1"),
        (r"\{1, 2\}", "2, 1"),
        ("x=1 or x=2", r"\{1,2\}"),
        ("[0, 1)", "[0,1)"),
        (r"5 \text{ cm}", "5"),
        ("50%", "0.5"),
        (r"\text{Yes}", r"\text{yes}"),
        ("0.333333", "1/3"),
    ],
)
def test_equal_answers_are_the_same_in_either_order(answer: str, reference: str) -> None:
    assert is_same(answer, reference)
    assert is_same(reference, answer)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [("5", "6"), ("[0,1)", "(0,1]"), ("3.14", r"\pi"), ("0.333", "1/3"), ("x+1", "x+2"), (r"\{1,2\}", r"\{1,3\}")],
)
def test_other_answers_are_not(answer: str, reference: str) -> None:
    assert not is_same(answer, reference)
    assert not is_same(reference, answer)


@pytest.mark.parametrize(("answer", "reference"), [("2x+z=1", "1"), ("2+3=5", "5"), ("(1,2)", "1<x<2")])
def test_an_answer_may_say_more_than_its_reference_but_not_less(answer: str, reference: str) -> None:
    assert is_same(answer, reference)
    assert not is_same(reference, answer)


def test_votes_go_by_exact_values_of_numbers_and_by_spelling_of_others() -> None:
    assert value("2 + 3") == value("10/2") == "5"
    assert value("0.5") == value("1/2") == "1/2"
    assert value(r"\frac{1} {2}") == r"\frac{1}{2}"


def test_rows_with_mathematical_answers_are_a_task(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    gold = [rf"We see that \boxed{{\frac{{{k}}}{{7}}}}." for k in range(1, 31)]
    path.write_text("".join(json.dumps({"question": f"What is {k}?", "answer": a}) + "\n" for k, a in enumerate(gold)))
    made = task(path, read=answers())
    splits = made.splits()
    examples = [*splits.train, *splits.validation, *splits.test]
    example = next(e for e in examples if e.question == "What is 13?")
    assert example.answer == r"\frac{14}{7}"
    answer = made.read_answer("It is $\\frac{28}{14}$.", example)
    assert is_right(made, answer, example)
    assert is_right(made, "2", example)
    assert not is_right(made, "3", example)
    assert is_right(made, "2x+z=1", Example("q", "1"))  # the gold answer is the reference


HOSTILE = [
    "9^{9^{9^{9}}}",
    "9^{9^9}",
    "10^{10^{10}}",
    "(((10^{99})^{99})^{99})^{99}",
    "1000000000!",
    r"\frac{1}{9^{9^9}}",
]


@pytest.mark.parametrize("formula", HOSTILE)
def test_formulas_of_huge_value_are_unreadable_at_once(formula: str) -> None:
    assert is_same("1", "1.0")  # the process runs
    start = time.monotonic()
    with pytest.raises(AnswerError, match="can read and evaluate"):
        read_math(f"${formula}$")
    assert time.monotonic() - start < 2
    with pytest.raises(AnswerError, match="400 characters"):
        read_math("1+" * 199 + "12")


def test_answers_are_read_off_the_main_thread() -> None:
    read: list[str] = []
    thread = threading.Thread(target=lambda: read.append(read_math(r"$\frac{2}{3}$")[0]))
    thread.start()
    thread.join(20)
    assert read == [r"\frac{2}{3}"]


@pytest.mark.slow
def test_what_takes_too_long_ends_with_its_process_and_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    process = mathematics._Process()
    monkeypatch.setattr(mathematics, "_process", lambda pid: process)
    monkeypatch.setattr(mathematics, "_SECONDS", 1.0)
    assert process.ask(["1"]) is True
    before = process._running
    assert not is_same("(" * 40 + "1" + ")" * 40, "17.25")
    assert before.poll() is not None
    assert "counted as different" in capsys.readouterr().err
    assert process.ask(["1"]) is True
    process.stop()


def test_no_text_is_run_as_code() -> None:
    source = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
from mathematics_process import CodeGuard, answer, read
guard = CodeGuard()
assert answer(["1.5", "3/2"], guard)
sys.addaudithook(guard.check)
assert answer(["x=1.5", "3/2"], guard) and read("2^{{3}}", guard)
for text in ("__import__('os').system('true')", "exec(1)", "\\\\text{{eval(1)}}", "\\\\operatorname{{eval}}(1)"):
    read(text, guard)
guard.is_parsing = True
for run in (lambda: eval("1+1"), lambda: exec("x = 1"), lambda: eval("Integer(1) + f(2)")):
    try:
        run()
    except PermissionError:
        continue
    raise AssertionError
guard.is_parsing = False
import os
try:
    os.system("true")
except PermissionError:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-P", "-c", source], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("refused\n", "")


def test_the_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mathematics, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'distill\[math\]'"):
        answers()
