"""Whether the tests notice a changed line: mutants of the modules that decide a figure, each run against its tests.

    scripts/mutants                                      300 mutants, seed 0
    scripts/mutants --seed 7 --number 60 --only codecs losses
    scripts/mutants --list                               what would be drawn, without running it

cosmic-ray's operators make the mutants: another arithmetic or comparison operator, a number that is one more or one
less, a negated condition, and for or, True for False, a loop without a pass, an exception that is not caught. A place
is drawn before one of the operators that fit it, so a line with many possible mutants is not drawn more often.

Not drawn, because no test should notice them: type annotations, decorators, `if TYPE_CHECKING`, arguments of exceptions
and of functions that print, `strict=` of `zip`; `is` for `==` and the reverse; 1 for -1 where it is the last axis of a
matrix. Strings are never changed, nor are docstrings.

A mutant is killed when the fast tests of its package (`tests/<package>`) fail or exceed their time limit. Nothing is
changed in place: each process works in its own copy. Results are kept in the folder `--out`, and the same command
goes on with those that are missing. Exit code 1: less than 95 % were killed.
"""
