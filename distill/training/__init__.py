"""One run of one student: what it will need, one exact step, checkpoints, and the job from annotation to report."""
