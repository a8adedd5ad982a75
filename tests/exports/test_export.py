"""Export of a run's student: folder, model card and task for lm-evaluation-harness."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distill.app import config as configuration
from distill.errors import ConfigError
from distill.exports.folder import export
from distill.exports.harness import HarnessTask, harness_task
from distill.prompts.rendering import Prompts
from distill.prompts.tokenizers import load_tokenizer
from distill.records import Example
from tests.conftest import LAYOUT, environment, make_model, make_tokenizer, reviews, run, tiny_overrides
from tests.exports.conftest import choosing
from tests.prompts.kinds import with_byte_tokens
from tests.tasks.conftest import answer_format
from tests.tasks.test_files import task

CHOICES = ("negative", "positive")
QUESTIONS = [
    Example("It is dull.", "negative"),
    Example("A fine film", "positive"),
    Example(" spaced \n and broken  ", "negative"),
    Example("Été: 12 €!", "positive"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on a task of two choices of one token each, since padding rows of these models are untrained."""
    root = tmp_path_factory.mktemp("root")
    folders = [make_model(root / f"model{seed}", seed=seed) for seed in (1, 2)]
    for folder in folders:
        make_tokenizer(folder, texts=[f" {choice}" for choice in CHOICES] * 999)
    tiny = [o for o in tiny_overrides(root, *folders) if not o.startswith("task")]
    sizes = [f"task.examples.num_{name}=8" for name in ("labelled", "unlabelled", "validation")]
    steps = ["trainer.max_steps=20", "batch_size=4", "optim.optimizer.lr=0.01", "optim.schedule.num_warmup_steps=0"]
    few = ["max_new_tokens=4", "num_samples=0", "teacher.calibrate=0", "evaluate_before=false"]
    done = run(root, *reviews(root), *tiny, *sizes, "task.examples.num_test=12", *steps, *few, "loss=[answer]")
    assert done.returncode == 0, done.stderr
    return next((root / "runs").iterdir())


@pytest.fixture
def run_folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may damage."""
    return shutil.copytree(finished, tmp_path / "run")


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def task_of(tokenizer: PreTrainedTokenizerFast, *examples: Example) -> tuple[HarnessTask, Prompts]:
    prompts = Prompts(tokenizer, LAYOUT, (), max_length=256, too_long="drop")
    return harness_task("any", prompts, choosing(*CHOICES), examples or QUESTIONS, 4), prompts


def with_start(folder: Path) -> PreTrainedTokenizerFast:
    make_tokenizer(folder, has_start=True)
    return load_tokenizer(folder)


def with_a_leading_space(folder: Path) -> PreTrainedTokenizerFast:
    tokenizer = with_byte_tokens(prepends=True)
    tokenizer.save_pretrained(folder)
    return load_tokenizer(folder)


def joining_full_stop_and_newline() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for ".\\n": as in many models, newlines after punctuation belong to its word."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet, ".Ċ"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(".", "Ċ")]))
    words = pre_tokenizers.Split(Regex(r" ?\p{L}+|[^\s\p{L}]+[\r\n]*|\s"), "isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, plain])
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("make", [with_start, with_a_leading_space])
def test_the_harness_reads_the_tokens_of_training(
    make: Callable[[Path], PreTrainedTokenizerFast], tmp_path: Path
) -> None:
    tokenizer = make(tmp_path)
    made, prompts = task_of(tokenizer)
    for example, row in zip(QUESTIONS, made.rows, strict=True):
        for choice, written in zip(CHOICES, made.choices, strict=True):
            prompt = prompts.answer_prompt(example, choice)
            start, _ = prompt.spans["answer"]
            assert tuple(tokenizer.encode(row["prompt"])) == prompt.ids[:start]
            assert tuple(tokenizer.encode(row["prompt"] + written)) == prompt.ids
        assert [CHOICES[place] for place in row["gold"]] == [example.answer]
    assert made.num_differing == 0
    assert made.caution == ""


def test_the_written_task_is_read_as_the_harness_reads_it(prompts: Prompts, tmp_path: Path) -> None:
    harness_task("any", prompts, choosing(*CHOICES), QUESTIONS, 4).write(tmp_path)
    task = yaml.safe_load((tmp_path / "lm_eval" / "distill_any.yaml").read_text())
    assert (task["output_type"], task["num_fewshot"]) == ("multiple_choice", 0)
    assert task["metric_list"] == [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    rows = lines(tmp_path / task["dataset_kwargs"]["data_files"][task["test_split"]])
    for example, row in zip(QUESTIONS, rows, strict=True):
        (right,) = row[task["doc_to_target"]]
        answer = task["doc_to_choice"][right]
        text = row[task["doc_to_text"]] + task["target_delimiter"] + answer
        assert tuple(prompts.tokenizer.encode(text)) == prompts.answer_prompt(example, str(example.answer)).ids


def test_the_harness_compares_texts_with_gold_texts(prompts: Prompts, tmp_path: Path) -> None:
    of_texts = task(tmp_path / "none.jsonl", read=answer_format("text"))
    answers = {"Describe it.": "It is old.\n\n  - It is small.", "And this?": None, "Why?": "So."}
    texts = [Example(question, answer) for question, answer in answers.items()]
    made = harness_task("texts", prompts, of_texts, texts, 9)
    made.write(tmp_path)
    written = yaml.safe_load((tmp_path / "lm_eval" / "distill_texts.yaml").read_text())
    assert (written["output_type"], "doc_to_choice" in written) == ("generate_until", False)
    assert written["generation_kwargs"] == {"until": ["</s>"], "max_gen_toks": 9, "do_sample": False}
    assert written["metric_list"] == [{"metric": "chrf", "aggregation": "chrf", "higher_is_better": True}]
    rows = lines(tmp_path / written["dataset_kwargs"]["data_files"][written["test_split"]])
    for example, row in zip((texts[0], texts[2]), rows, strict=True):
        ids = tuple(prompts.tokenizer.encode(row[written["doc_to_text"]]))
        assert ids == prompts.prefix("answer") + prompts.question(example, "answer")
        assert row[written["doc_to_target"]] == example.answer
    assert made.num_differing == 0
    with pytest.raises(ConfigError, match="texts has no gold texts"):
        harness_task("texts", prompts, of_texts, texts[1:2], 9)


def test_questions_that_the_harness_tokenizes_differently_are_counted() -> None:
    with_stop, without_stop = Example("It is dull.", "negative"), Example("A fine film", "positive")
    tokenizer = joining_full_stop_and_newline()
    assert task_of(tokenizer, without_stop)[0].num_differing == 0
    made, _ = task_of(tokenizer, with_stop, without_stop, Example("A bore.", "negative"))
    assert made.num_differing == 2
    assert "2 of 3 questions" in made.caution


def test_a_long_question_is_cut_as_in_training(prompts: Prompts) -> None:
    short = Prompts(prompts.tokenizer, LAYOUT, (), max_length=40, too_long="cut")
    example = Example("A sentence of many words that goes on and on. " * 9, "positive")
    made = harness_task("any", short, choosing(*CHOICES), [example], 4)
    assert tuple(short.tokenizer.encode(made.rows[0]["prompt"])) == short.question(example, "answer")


def test_every_choice_with_the_value_of_a_right_answer_is_right_in_the_harness(prompts: Prompts) -> None:
    names = choosing("red", "green", "blue")
    examples = [Example("Which?", "green", accepted=("red",)), Example("Which one?", "blue", accepted=("mauve",))]
    assert [row["gold"] for row in harness_task("any", prompts, names, examples, 4).rows] == [[0, 1], [2]]
    sums = choosing("1 + 2", "3", "2 * 2", kind="expression")
    assert [row["gold"] for row in harness_task("any", prompts, sums, [Example("Sum?", "3")], 4).rows] == [[0, 1]]


@pytest.mark.parametrize(
    ("choices", "answer", "why"),
    [((), "12", "free text"), (CHOICES, "neutral", "'neutral'; expected one of negative, positive")],
)
def test_answers_that_the_harness_cannot_score_are_refused(
    choices: tuple[str, ...], answer: str, why: str, prompts: Prompts
) -> None:
    with pytest.raises(ConfigError, match=why):
        harness_task("any", prompts, choosing(*choices), [Example("How many?", answer)], 4)


@pytest.mark.slow
def test_a_student_is_exported_with_its_test_questions(finished: Path, tmp_path: Path) -> None:
    done = run(tmp_path, f"run={finished}", f"to={tmp_path / 'out'}", command="export")
    assert done.returncode == 0, done.stderr
    out, name = tmp_path / "out", "distill_movie_reviews"
    definition = yaml.safe_load((out / "lm_eval" / f"{name}.yaml").read_text())
    assert definition["task"] == name
    assert definition["doc_to_choice"] == [" negative</s>", " positive</s>"]
    rows = lines(out / definition["dataset_kwargs"]["data_files"]["test"])
    config = OmegaConf.load(finished / "config.yaml")
    test = configuration.build(config.task.examples).splits().test
    assert len(test) == len(rows) == 12
    prompts = Prompts(
        load_tokenizer(out), configuration.build(config.task.layout), (), max_length=256, too_long="refuse"
    )
    tokenizer = AutoTokenizer.from_pretrained(out)
    for example, row in zip(test, rows, strict=True):
        assert row["prompt"] == f"Review: {example.question}\nSentiment:"
        (gold,) = row["gold"]
        whole = tokenizer.encode(row["prompt"] + definition["doc_to_choice"][gold])
        assert tuple(whole) == prompts.answer_prompt(example, example.answer).ids
    line = f"lm_eval run --model hf --model_args pretrained=. --tasks {name} --include_path lm_eval"
    assert line in (out / "README.md").read_text()
    assert f"cd {out} && " in done.stdout
    assert line in done.stdout


@pytest.mark.slow
def test_questions_are_exported_without_the_tasks_files(run_folder: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    config["task"]["examples"]["file"] = str(tmp_path / "gone.tsv")
    (run_folder / "config.yaml").write_text(yaml.safe_dump(config))
    predictions = [row | {"accepted": CHOICES} for row in lines(run_folder / "predictions.jsonl")]
    (run_folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in predictions))
    export(run_folder, tmp_path / "out")
    rows = lines(tmp_path / "out" / "lm_eval" / "distill_movie_reviews.jsonl")
    assert [row["gold"] for row in rows] == [[0, 1]] * 12


def without_predictions(folder: Path) -> None:
    (folder / "predictions.jsonl").unlink()


def with_a_removed_task(folder: Path) -> None:
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("movie_reviews.MovieReviews", "movie_reviews.Gone"))


def without_answer_mode(folder: Path) -> None:
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("answer_mode:", "answer_manner:"))


def with_reasoning(folder: Path) -> None:
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("answer_mode: direct", "answer_mode: reasoned"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "why", "example"),
    [
        (without_predictions, "predictions.jsonl is missing", False),
        (with_a_removed_task, "does not exist", False),
        (without_answer_mode, "answer_mode", False),
        (with_reasoning, "reasons before it answers", True),
    ],
)
def test_a_student_is_exported_even_without_a_task(
    damage: Callable[[Path], None], why: str, example: bool, run_folder: Path, tmp_path: Path
) -> None:
    damage(run_folder)
    about_example, about_task = export(run_folder, tmp_path / "out").splitlines()
    assert about_task.startswith("no lm-eval task: ")
    assert why in about_task
    assert about_example.startswith("answers with transformers alone" if example else "no example: ")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    made = {"README.md", "prompt.json", "example.py"} if example else {"README.md"}
    has_prompt = damage in (without_predictions, with_reasoning)  # else the template may not be that of the prompt
    lost = set() if has_prompt else {"chat_template.jinja"}
    assert names == ({path.name for path in (run_folder / "student").iterdir()} | made) - lost
    assert "lm_eval" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="pip install lm-eval to compare with it")
def test_the_harness_measures_the_accuracy_of_the_report(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(finished, out)
    line = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", "pretrained=.", "--device", "cpu"]
    line += [
        "--tasks",
        "distill_movie_reviews",
        "--include_path",
        "lm_eval",
        "--log_samples",
        "--output_path",
        "results",
    ]
    settings = environment(HF_DATASETS_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    done = subprocess.run(line, cwd=out, env=settings, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(next((out / "results").rglob("results_*.json")).read_text())
    expected = json.loads((finished / "results.json").read_text())["rows"]["student"]["accuracy"]
    assert results["results"]["distill_movie_reviews"]["acc,none"] == expected
    samples = {sample["doc"]["id"]: sample for sample in lines(next((out / "results").rglob("samples_*.jsonl")))}
    for prediction in lines(finished / "predictions.jsonl"):
        scores = [float(answer) for ((answer, _),) in samples[prediction["id"]]["resps"]]
        assert CHOICES[scores.index(max(scores))] == prediction["student_answer"]
        confidence = 1 / sum(math.exp(score - max(scores)) for score in scores)
        assert confidence == pytest.approx(prediction["student_confidence"], abs=1e-4)
