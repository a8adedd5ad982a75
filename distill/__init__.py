"""distill: a large language model's skill at one task, put into a small one.

 conf/<group>/<name>.yaml --> app/    compose -> check every node against its signature -> build

 tasks/        rows of any file -> Example     question, answer, rationale
 prompts/      Example -> Prompt               token ids and spans: prompt | answer, prompt | rationale | answer
 models/       a name -> an opened model       read and made to write
 teachers/     ways to get an Annotation       rationale, answer, SoftTargets(ids, logprobs, tail)
 annotation/   what the cache lacks, each request once; which rationales are worth learning from
 cache/        == shards + manifest            the only meeting place of teacher and student
 lessons/      cache + examples -> Lesson -> Batch
 students/     opened, cut, adapted, saved     hidden_NH of tokens or of a class
 losses/       one formula each, and the head  logits_NV, a chunk at a time: value and slope per bucket
 training/     preflight, one exact step, checkpoints; the job from annotation to report
 evaluation/   accuracy, agreement with the teacher, KL, calibration, speed
 reports/      run folders -> arms -> verdicts -> one page
 exports/      a folder that others can run

The commands annotate, train, evaluate, judge, report and export only parse, call and print. `pyproject.toml` lists the
layers: a package imports only from layers below its own. errors.py and records.py hold what flows between packages.

The cache is the only meeting place of teacher and student. A loss sees probabilities in buckets and nothing else.
"""

__version__ = "0.1.0"
