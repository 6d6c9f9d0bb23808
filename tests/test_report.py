"""Reports: intervals against slow ones, comparisons and means on rows made by hand, files that were cut off."""
import itertools
import json
import random
from statistics import fmean, pstdev

import matplotlib
import pytest

from threadweaver_ref.domains import (
    BestFlat,
    Grouped,
    Problem,
    Sequential,
    WheneverReady,
    best_flat,
    draw_split,
    families_of,
    split_problems,
    write_rows,
)
from threadweaver_ref.format import render
from threadweaver_ref.programs import parse
from threadweaver_ref.report import (
    HEAD,
    Report,
    arranged,
    average,
    bootstrap,
    markdown,
    number,
    plain_table,
    read_lines,
    read_report,
    reports_table,
    schedule_latencies,
    spread,
    text_length,
    times_faster,
    wilson,
)
from threadweaver_ref.tokenizer import char_tokenizer, encode_text

try: from scipy import stats
except ImportError: stats = None   # not needed by the package; where it is installed, it is asked too
matplotlib.use("Agg")
CHAR = char_tokenizer()
LENGTH = text_length(CHAR)


def row(question, latency, best=None, correct=True, family="f", forks=0, width=1, best_width=1, **more):
    "As much of a row of `problem_row` as a summary reads; without `best` of a problem that has no steps."
    known = {} if best is None else {"never": 2 * best, "whenever_ready": 3 * best, "best_flat": best, "best_width": best_width}
    return {"question": question, "family": family, "correct": correct, "token_latency": latency, "total_tokens": 2 * latency,
            "decode_steps": latency, "peak_context": 7, "forks": forks, "width": width,
            "reprefilled": 3 * forks, "well_formed": True, "seconds": .5, **known, **more}


# ---- intervals

@pytest.mark.parametrize("correct, total", [(0, 1), (1, 1), (3, 7), (49, 50), (250, 500), (500, 500)])
def test_wilson_ends_where_the_share_lies_z_standard_errors_away(correct, total):
    "Found again by bisection from the definition."
    share = correct / total
    def far(p): return (share - p) ** 2 * total > 1.96 ** 2 * p * (1 - p)
    def end(inside, outside):
        for _ in range(80):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if far(middle) else (middle, outside)
        return inside
    assert wilson(correct, total) == pytest.approx((end(share, 0.0), end(share, 1.0)), abs=1e-9)
    wide, narrow = wilson(correct, total, z=3), wilson(correct, total, z=1)
    assert wide[0] <= narrow[0] <= share + 1e-9 and share - 1e-9 <= narrow[1] <= wide[1] + 1e-9


def values(kind, n=80):
    rng = random.Random(kind)
    draw = {"even": rng.random, "skewed": lambda: rng.expovariate(.2), "ratio": lambda: rng.lognormvariate(0, .3), "marks": lambda: rng.random() < .9}
    return [draw[kind]() for _ in range(n)]


@pytest.mark.parametrize("kind", ["even", "skewed", "ratio", "marks"])
def test_bootstrap_against_a_plain_loop(kind):
    "Means of problems drawn with replacement, one after another: the same ends but for chance, near those of the normal approximation."
    given, rng = values(kind), random.Random(0)
    drawn = sorted(fmean(rng.choices(given, k=len(given))) for _ in range(4000))
    mean, low, high = bootstrap(given, rounds=4000)
    error = pstdev(given) / len(given) ** .5
    assert mean == pytest.approx(fmean(given)) and (low, high) == pytest.approx((drawn[100], drawn[3899]), abs=.25 * error)
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=.5 * error) and low < mean < high
    if stats:
        found = stats.bootstrap((given,), fmean, n_resamples=4000, method="percentile", vectorized=False).confidence_interval
        assert (low, high) == pytest.approx((found.low, found.high), abs=.25 * error)


def test_bootstrap_covers_the_mean_19_times_in_20():
    "Of 200 draws of 60 values around 1."
    rng = random.Random(4)
    inside = [low <= 1 <= high for _, low, high in (bootstrap([rng.gauss(1, 2) for _ in range(60)], rounds=400, seed=i) for i in range(200))]
    assert .89 <= fmean(inside) <= .99


def test_bootstrap_is_the_same_again_and_narrows():
    given = values("skewed")
    assert bootstrap(given) == bootstrap(given) != bootstrap(given, seed=1) and bootstrap(iter(given)) == bootstrap(given)
    def width(n): return (lambda b: b[2] - b[1])(bootstrap(values("even", n)))
    assert width(1600) == pytest.approx(width(100) / 4, rel=.25)
    assert bootstrap([]) == (None, None, None) and bootstrap([3]) == (3, 3, 3) and bootstrap([2.5] * 9) == (2.5, 2.5, 2.5)


# ---- schedules

@pytest.mark.parametrize("name", ["wide", "quick", "chain", "mixed", "nested"])
def test_latencies_of_the_schedules(name):
    "Never: every character and the end of sequence. The best one is never longer than the others."
    for problem in draw_split("programs", "dev", 6, name):
        found = schedule_latencies(problem, LENGTH)
        assert found["never"] == len(encode_text(CHAR, render(Sequential().arrange(problem)))) + 1
        best = best_flat(problem)
        assert found["best_flat"] == best.best <= min(found["never"], found["whenever_ready"])
        assert found["best_width"] == (max(len(S) for S in best.stages) if best.pays else 1)
        assert (found["best_width"] > 1) == (best.best < found["never"])
    assert schedule_latencies(Problem("?", 1, "mine"), LENGTH) == {}


def test_a_text_is_as_long_as_its_tokens():
    assert LENGTH("<Thread>1:abc</Thread>") == 7 and LENGTH("") == 0 and LENGTH is not text_length(CHAR)


def test_a_schedule_as_a_report():
    "Two loops of four turns and a sum: by hand."
    p = parse("a=7+3x4;b=2+5x4;c=a+b;c?", "wide")
    texts = [s.text for s in p.steps]
    ends = len(r"\boxed{6}") + 1
    outlines = 3 + 2 * (2 + len("1:a=7+3x4"))
    one, many = arranged([p], Sequential(), LENGTH), arranged([p, parse("a=1+2;a?")], WheneverReady(), LENGTH)
    assert one.rows[0]["token_latency"] == one.rows[0]["never"] == sum(map(len, texts)) + ends and one.rows[0]["total_tokens"] == one.rows[0]["never"]
    forked = outlines + 2 + len("1:" + texts[0]) + 1 + len(texts[2]) + ends
    assert many.rows[0]["token_latency"] == many.rows[0]["whenever_ready"] == forked
    assert many.rows[0]["total_tokens"] == forked + 2 + len("2:" + texts[1]) and (many.rows[0]["forks"], many.rows[0]["width"]) == (1, 2)
    assert (many.rows[1]["forks"], many.rows[1]["width"], many.rows[1]["family"]) == (0, 1, "programs")
    assert many.about == {"arrangement": "WheneverReady(conclude=False)"}
    deep = arranged(draw_split("programs", "dev", 3, "nested"), Grouped(), LENGTH).rows
    assert all(r["correct"] and r["forks"] >= 3 for r in deep)   # inner forks count


def test_the_best_schedule_has_no_regret():
    problems = [p for ps in split_problems("programs", "dev", 3).values() for p in ps]
    found = arranged(problems, BestFlat(), LENGTH).summary()
    assert found["regret"] == 0 and found["ratio"] == (1, 1, 1) and found["forks_where_it_pays"] == 1 and found["forks_where_not"] == 0
    assert arranged(problems, Sequential(), LENGTH).summary()["forks_where_it_pays"] == 0


# ---- summaries

ROWS = [row("a", 120, 100, forks=2, width=5, best_width=4), row("b", 90, 60, correct=False, forks=1, width=4, best_width=3),
        row("c", 50, 50, family="g"),
        row("d", 80, 40, forks=1, width=3, family="g", well_formed=False, seconds=1.5), row("e", 70, family="g")]


def test_summary_by_hand():
    "Latencies and regret over the four correct answers, forks over the problems whose best schedule is known."
    found = Report(ROWS).summary()
    assert found["problems"] == 5 and found["accuracy"] == .8 and found["interval"] == wilson(4, 5)
    assert found["token_latency"] == found["decode_steps"] == (120 + 50 + 80 + 70) / 4 and found["total_tokens"] == 160 and found["peak_context"] == 7
    assert found["best_flat"] == pytest.approx((100 + 50 + 40) / 3) and found["regret"] == pytest.approx((20 + 0 + 40) / 3)
    assert found["ratio"] == bootstrap([1.2, 1, 2]) and found["ratio"][0] == pytest.approx(1.4) and found["reprefilled"] == (6 + 0 + 3 + 0) / 4
    assert found["forks_where_it_pays"] == 1 and found["forks_where_not"] == .5   # a yes, b yes; c no, d yes
    assert found["width"] == 4 and found["well_formed"] == .8 and found["seconds"] == .7


def test_wrong_answers_do_not_count_as_fast():
    fast = [row("a", 5, 100, correct=False), *ROWS[2:]]
    assert Report(fast).summary()["token_latency"] == fmean(r["token_latency"] for r in ROWS[2:]) and Report(fast).summary()["regret"] == 20
    assert Report(fast).against(Report([row("a", 100, 100), *ROWS[2:]]))["speedup"] == (1, 1, 1)


def test_nothing_correct_and_problems_without_steps():
    found = Report([row("a", 9, correct=False), row("b", 9, correct=False)]).summary()
    assert found["accuracy"] == 0 and found["interval"] == wilson(0, 2) and found["ratio"] == (None, None, None)
    assert [found[k] for k in ("token_latency", "best_flat", "regret", "forks_where_it_pays", "forks_where_not", "width")] == [None] * 6
    assert Report([row("a", 9, correct=False)]).against(Report([row("a", 9)])) == {"speedup": (None,) * 3, "accuracy": (-1, -1, -1), "both": 0}
    assert all(c == "-" for c in Report([row("a", 9, correct=False)]).table()[1][3:6])


def test_a_report_without_problems():
    found = Report([]).summary()
    assert found["problems"] == 0 and found["accuracy"] is None and len(Report([]).table()) == 2


def test_families_in_their_order():
    report = Report(ROWS, {"settings": 1})
    assert report.families == ["f", "g"] and report.of("g").rows == ROWS[2:] and report.of("g").about == {"settings": 1}
    assert repr(report) == "Report(5 problems, 4 correct)"


# ---- comparisons

def test_against_by_hand():
    "Problem by problem, over those that both answered; the accuracy over all."
    ours = Report([row("a", 50), row("b", 40), row("c", 10, correct=False), row("d", 100)])
    theirs = Report([row("a", 100), row("b", 60), row("c", 90), row("d", 9, correct=False)])
    found = ours.against(theirs)
    assert found["both"] == 2 and found["speedup"] == bootstrap([2, 1.5]) and found["speedup"][0] == 1.75
    assert found["accuracy"] == bootstrap([0, 0, -1, 1]) and found["accuracy"][0] == 0
    back = theirs.against(ours)
    assert back["speedup"][0] == pytest.approx((.5 + 40 / 60) / 2) and ours.against(ours)["speedup"] == (1, 1, 1)
    for other in ([row("a", 1)], ours.rows[::-1]):
        with pytest.raises(ValueError, match="^the two reports are of different problems$"): ours.against(Report(other))


def test_paired_intervals_are_narrower():
    "Latencies differ a hundred times more among problems than between the two policies."
    rng = random.Random(1)
    base = [rng.randint(50, 5000) for _ in range(60)]
    slower = [row(str(i), b * (1.1 + rng.uniform(-.02, .02))) for i, b in enumerate(base)]
    found = Report([row(str(i), b) for i, b in enumerate(base)]).against(Report(slower))
    assert found["speedup"][0] == pytest.approx(1.1, abs=.01) and found["speedup"][2] - found["speedup"][1] < .02


def three():
    "Three seeds on four problems: all correct, one wrong, all wrong, all correct; `a` is forked by one of them, `b` by all."
    marks = [(1, 1, 0, 1), (1, 0, 0, 1), (1, 1, 0, 1)]
    forks = [(3, 1, 0, 0), (0, 1, 0, 0), (0, 1, 0, 0)]
    def one(seed, i):
        n = forks[seed][i]
        return row("abcd"[i], 100 + 30 * seed, 80, bool(marks[seed][i]), forks=n, width=4 if n else 1, best_width=2, answer=str(seed))
    return [Report([one(seed, i) for i in range(4)], {"seed": seed}) for seed in range(3)]


def test_average_by_hand():
    "Means problem by problem; texts and what the reports are of from the first."
    found = average(three())
    assert [r["correct"] for r in found.rows] == pytest.approx([1, 2 / 3, 0, 1]) and [r["token_latency"] for r in found.rows] == [130] * 4
    assert [r["question"] for r in found.rows] == [*"abcd"] and {r["answer"] for r in found.rows} == {"0"} and found.about == {"seed": 0}
    summary = found.summary()
    assert summary["accuracy"] == pytest.approx(2 / 3) and summary["interval"] == (wilson(8 / 3, 4)[0], 1)
    assert summary["token_latency"] == 130 and summary["regret"] == 50 and summary["ratio"][0] == pytest.approx(130 / 80)
    assert average(three()[:1]).summary() == three()[0].summary()
    with pytest.raises(ValueError, match="^the reports are of different problems$"): average([three()[0], Report(three()[0].rows[:2])])
    with pytest.raises(ValueError): average([])


def test_forks_of_an_average_are_those_of_its_reports():
    "How often and how wide the seeds fork, on average: `a` is forked by one seed of three, `b` by all."
    summaries = [r.summary() for r in three()]
    found = average(three()).summary()
    assert found["forks_where_it_pays"] == pytest.approx(fmean(s["forks_where_it_pays"] for s in summaries)) == pytest.approx(4 / 12)
    assert found["width"] == 4


def test_times_faster():
    rows = [{"slow": 2, "fast": 1}, {"slow": 9, "fast": 3}]
    assert times_faster(rows, "fast", "slow") == bootstrap([2, 3]) and times_faster(rows, "slow", "slow") == (1, 1, 1)


def test_what_was_timed_together_is_one_time():
    "Two portions of five problems each are two values, not ten."
    rows = [{"turn": turn, "slow": slow, "fast": 1} for turn, slow in ((0, 2), (1, 4)) for _ in range(5)]
    assert times_faster(rows, "fast", "slow") == bootstrap([2, 4])


# ---- tables

def test_numbers_in_words():
    assert number(None) == "-" and number(12.6) == "13" and number(.123, ".1%") == "12.3%" and spread((None,) * 3) == "-"
    assert spread((1, .5, 1.5)) == "1.00 (0.50 to 1.50)" and spread((.5, .25, 1), ".0%") == "50% (25% to 100%)"


def test_tables_have_a_line_a_family():
    lines = Report(ROWS).table()
    assert [line[0] for line in lines] == ["", "f", "g", "all"] and lines[0] == HEAD and {len(line) for line in lines} == {len(HEAD)}
    assert lines[3][1:5] == ["5", "80.0% ({:.1%} to {:.1%})".format(*wilson(4, 5)), "80", "63"]
    assert lines[3][6:] == ["100% / 50%", "4.0", "2", "0.700"]
    plain = plain_table(lines).splitlines()
    assert len(plain) == 4 and all(line[plain[0].index("problems"):].startswith(n) for line, n in zip(plain[1:], "235"))
    marked = markdown(lines).splitlines()
    assert len(marked) == 5 and len({line.count("|") for line in marked}) == 1 and set(marked[1]) == {"|", "-", " "}
    assert Report(ROWS)._repr_markdown_() == markdown(lines)


@pytest.mark.parametrize("wrong", [0, 1, 3])
def test_a_mean_of_seeds_is_no_surer_than_its_problems(wrong):
    "One wrong answer of three seeds is no better than none: close to 1 a bootstrap is too narrow."
    reports = [Report([row(str(i), 10, 10, correct=not (i == 0 and k < wrong)) for i in range(300)]) for k in range(3)]
    low, high = average(reports).interval()
    assert (low, high) == (pytest.approx(wilson(300 - wrong / 3, 300)[0]), pytest.approx(1, abs=1e-3)) and low <= wilson(300, 300)[0]


def test_equal_pairs_are_not_proof():
    "Where no pair differs, one in 10 may, or one in 300; the same report twice is the same report."
    for n in (10, 300):
        ours, theirs = (Report([row(str(i), 10, 10) for i in range(n)]) for _ in range(2))
        mean, low, high = ours.against(theirs)["accuracy"]
        assert mean == 0 and high == -low == pytest.approx(1.96 ** 2 / (n + 1.96 ** 2))
        assert ours.against(ours)["accuracy"] == (0, 0, 0)


def test_a_table_of_reports():
    ours, theirs = Report([row("a", 50, 50), row("b", 40, 20)]), Report([row("a", 100, 50), row("b", 60, 20, correct=False)])
    assert [line[0] for line in reports_table({"ours": ours, "theirs": theirs})] == ["", "ours", "theirs"]
    head, one, two = reports_table({"ours": ours, "theirs": theirs}, "theirs")
    assert head[-2:] == ["speedup over theirs (95%)", "accuracy, points more (95%)"] and len(head) == len(one) == len(two) == len(HEAD) + 2
    assert one[-2] == "2.00 (2.00 to 2.00)" and one[-1].startswith("50.0 (") and two[-2:] == ["1.00 (1.00 to 1.00)", "0.0 (0.0 to 0.0)"]
    assert len(HEAD) == len(ours.table()[0])   # no table changes it


def test_a_plot_has_the_correct_answers():
    ax = Report(ROWS).plot()
    points = {line.get_label(): [*map(float, line.get_xdata())] for line in ax.lines[:2]}
    assert points == {"f": [100], "g": [50, 40]} and [*map(float, ax.lines[0].get_ydata())] == [120]
    assert Report(ROWS).plot(ax) is ax


# ---- files

def test_a_cut_file_gives_its_whole_lines(tmp_path):
    "Cut at every single place."
    rows = [{"settings": {"a": 1}}, {"question": "é?", "n": [1, 2]}, {"question": "b"}]
    text = "".join(json.dumps(r) + "\n" for r in rows)
    ends = [*itertools.accumulate(len(json.dumps(r)) + 1 for r in rows)]
    for cut in range(len(text) + 1):
        (tmp_path / "r").write_text(text[:cut])
        assert read_lines(tmp_path / "r") == rows[:sum(end - 1 <= cut for end in ends)]
    report = read_report(tmp_path / "r")
    assert (report.rows, report.about) == (rows[1:], rows[0])


@pytest.mark.parametrize("text", ["", "\n", "hello", '{"settings"', '{"question": "a"}\n', "[1, 2]\n", "5\n", '"settings"\n'])
def test_another_file_is_no_report(tmp_path, text):
    (tmp_path / "r").write_text(text)
    with pytest.raises(ValueError, match="is no report of `evaluate`: its first line has no settings"): read_report(tmp_path / "r")


@pytest.mark.parametrize("question", ["a\u2028b?", "a\x85b?", "a\x0cb?", "é\n?", "\u2029"])
def test_a_question_does_not_end_a_line(tmp_path, question):
    "Written as `evaluate` and `write_rows` write."
    rows = [{"settings": {}}, row(question, 9), row("b", 9)]
    write_rows(tmp_path / "r", rows)
    assert read_report(tmp_path / "r").rows == rows[1:]


def test_every_family_of_the_domain_is_a_line():
    problems = [p for ps in split_problems("programs", "dev", 2).values() for p in ps]
    assert [line[0] for line in arranged(problems, Sequential(), LENGTH).table()] == ["", *families_of("programs"), "all"]
