"""How sure is a figure? Intervals, and the difference between two methods.

    wilson(right, n)        95 % interval of a share of right answers, one answer per question
    bootstrap(values)       95 % interval of a mean, where answers are not single and independent
    paired(ours, theirs)    the mean difference over the same questions, with its interval
"""
import math
from statistics import fmean

import numpy as np


def wilson(right, n, z=1.96):
    """95 % interval [low, high] of a share right / n (Wilson score interval).

    Its ends are the two p for which the share lies z standard errors of p away:

        |share - p| = z sqrt(p (1 - p) / n)"""
    share = right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return [max(0.0, middle - half), min(1.0, middle + half)]


def bootstrap(values, resamples=2000):
    """95 % interval [low, high] of the mean of values.

    The values are drawn anew, with replacement, and averaged, many times. The interval holds the
    middle 95 % of these means. The draw has a fixed seed, so a table comes out the same twice."""
    values, n = np.asarray(values, dtype=float), len(values)
    draw = np.random.RandomState([0])                # numpy promises the same draws for ever
    means = sorted(values[(draw.random_sample(n) * n).astype(int)].mean()
                   for _ in range(resamples))
    return [float(means[int(share * resamples)]) for share in (0.025, 0.975)]


def value_of(line):
    """What a line counts for: nats per token (--measure loss), else its share of right answers."""
    return line.get("nats", sum(line["correct"]) / max(1, len(line["correct"])))


def paired(ours, theirs):
    """The mean difference between two methods over the same questions, with its 95 % interval.

    Two methods are asked the same questions, and a hard question is hard for both. So the interval
    of the difference (a bootstrap over questions) is narrower than the two intervals suggest.
    ours_only and theirs_only count questions on which one method is better, by more right answers
    or by fewer nats (with right and wrong alone, these are McNemar's counts). If both methods are
    equally good, the two counts are about equal."""
    by_id = {line["id"]: value_of(line) for line in theirs if line["outputs"]}
    pairs = [(value_of(line), by_id[line["id"]]) for line in ours
             if line["outputs"] and line["id"] in by_id]
    differences = [a - b for a, b in pairs] or [math.nan]
    sign = -1 if any("nats" in line for line in ours) else 1             # fewer nats are better
    return {"difference": fmean(differences), "ci95": bootstrap(differences),
            "n": len(pairs), "ours_only": sum(sign * a > sign * b for a, b in pairs),
            "theirs_only": sum(sign * a < sign * b for a, b in pairs)}
