"""distill: a large language model's skill at one task, put into a small one.

conf/<group>/<name>.yaml --> config.py   compose -> check every node against its signature -> build
                                 |
  ANNOTATE (once per task x teacher)                                TRAIN (many times, teacher not in memory)
  tasks/<task>.py     Example     question, answer?, rationale?
       |
  prompts.py          Prompt      token ids + spans: prompt | answer, prompt | rationale (| answer)
       |
  teachers/<kind>.py  frozen; modules.TeacherModule.predict_step
       |              Annotation  rationale, answer, SoftTargets(ids, logprobs, tail)
  filling.py          what the cache lacks, each question once
       v
  cache/store.py  ==  shards (arrays: safetensors; text: Parquet) + manifest (fingerprint, hashes)
       |                                     \\
       |  same ids, any order, any rank       |--> rationales.py   votes, arithmetic, filters: what is worth learning
       |                                      `--> lessons.py      join by key, share prompts
       |                                           data.py         order, steps, collate -> Batch
       |                                                |
       |                                       preflight/, forecast   what cannot work, and what it will need
       |                                                |
       |                                       student.py  hidden_NH -> head.py  logits_NV, a chunk at a time
       |                                                |
       |                                       losses/<loss>.py    value and slope per bucket
       |                                                |
       |                                       modules.StudentModule   sum_k  w_k * sum_k / count_k(whole step)
       |                                       training.py      all of it put together, looked ahead at, run
       |                                       sharding.py      the student in parts, where one process cannot hold it
       |                                       checkpoints, preemption   stopped between two steps, gone on from there
       |                                                |
       |                                       metrics.py  accuracy, agreement with the teacher, KL, calibration
       |                                                |
       `---- evaluate (teacher, student, baselines) -> tracking.py -> W&B       run folder: config, metrics
                                                       runs -> arms -> verdicts, costs -> report.html / report.md
                                                       export     -> Hugging Face folder: weights, tokenizer

The cache is the only meeting place of teacher and student. A loss sees probabilities in buckets and nothing else.
"""

__version__ = "0.1.0"
