"Sequential traces as steps: not a letter is changed, and every need is found that is mentioned."
import random

import pytest

from threadweaver_ref.domains import Sequential, WheneverReady
from threadweaver_ref.format import Fork, render
from threadweaver_ref.rewrite import STOPPED, cut, link, outline, prompt_for, read_groups, rewrite, rewrite_rows, rewrite_with, runs
from threadweaver_ref.yourdata import problem_of, row_faults

QUESTION = "Ann buys 3 pens for 4 each, Bob 5 books for 7 each. They have 60. How much is left?"
TRACE = ("Ann buys 3 pens for 4 each: 3*4=12. Bob buys 5 books for 7 each: 5*7=35. "
         "Together they pay 12+35=47. They have 60, so 60-47=13 is left. \\boxed{13}")
ROW = {"question": QUESTION, "answer": "13", "text": TRACE, "family": "bills"}
GROUPS = ('[{"pieces": [1], "needs": [], "outline": "pens"}, {"pieces": [2], "needs": [], "outline": " the\\n books "}, '
          '{"pieces": [3, 4], "needs": [1, 2, 1], "outline": "the rest"}]')


def sequential(row): return render(Sequential().arrange(problem_of(row)))


@pytest.mark.parametrize("trace, pieces", [
    ("a. b; c", ["a.", " b;", " c"]), ("a 1.5 b.\nc\n\nd", ["a 1.5 b.\n", "c\n\n", "d"]), ("one", ["one"]), ("  a! b? ", ["  a!", " b? "]),
    ("one. two. \n", ["one.", " two. \n"]), ("One is 1.  Two is 2.", ["One is 1.", "  Two is 2."]), ("a\r\n\r\nb\r\n", ["a\r\n\r\n", "b\r\n"]),
    ("a\n  \n  b", ["a\n  \n", "  b"]), ("1. Ann 3*4=12. 2. Bob 5*7=35.", ["1. Ann 3*4=12.", " 2. Bob 5*7=35."]), (" \n", [" \n"])])
def test_pieces(trace, pieces): assert cut(trace) == pieces


def test_pieces_joined_are_the_trace():
    for seed in range(300):
        rng = random.Random(seed)
        trace = "".join(rng.choice(["a", "b1", ". ", "; ", "\n", "\r\n", " ", "!", "? ", "=3", "2. "]) for _ in range(rng.randint(1, 30)))
        assert "".join(cut(trace)) == trace and "" not in cut(trace)
        assert all(piece.strip() for piece in cut(trace)[1:])   # blank lines in front of everything are the opening's


@pytest.mark.parametrize("pieces, needs", [
    (["3*4=12.", "12+1=13.", "13*2=26."], [set(), {0}, {1}]),
    (["3*4=12.", "So Bob has 12.", "12+1=13."], [set(), {0}, {0}]),         # said again, not made anew
    (["3*4=12.", "Take 24.", "24+1=25."], [set(), set(), {1}]),
    (["Ann has 5+7=12 pens.", "The rest is 12-3=9."], [set(), {0}]),        # 12 is calculated with, not made
    (["5+7=12.", "The rest = 12 - 3 = 9.", "The rest of 12."], [set(), {0}, {0, 1}]),
    (["30/2=15 are boys.", "So 30-15=15 are girls."], [set(), {0}]),        # of two 15 one is made
    (["3*100=300m.", "So 300/10=30 parts."], [set(), {0}]), (["2.50+3=5.50.", "5.5*20=$110."], [set(), {0}]),
    (["3*4=12.", "6+6=12.", "12+1=13."], [set(), set(), {1}]),              # the last one that made it
    (["x = 5.", "y = 7.", "So x+y=12."], [set(), set(), {0, 1}]),           # by name
    (["The total is $1,200.", "Half of 1200 is 600."], [set(), {0}]),
    (["A: lamp backwards: 4p 3m;", "A is pmal.", "B: A pmal in capitals: pP;", "B is PMAL."], [set(), {0}, {1}, {2}]),
    (["A is x.", "B is x.", "C: box with x for o: bb;"], [set(), set(), set()]),   # a letter links nothing
    (["It is 5.", "It rains."], [set(), set()]),                            # nor does a word that names nothing
    (["3*4=12.", "120 and 1.12 and 12a."], [set(), set()]),                 # whole numbers and words alone
    (["Take x12 now.", "12+1=13."], [set(), set()]), (["5-7=-2.", "-2*3=-6."], [set(), {0}])])
def test_links(pieces, needs): assert [p.needs for p in link(pieces)] == needs


def test_runs():
    def of(*needs): return runs([type("P", (), {"needs": n})() for n in needs])
    assert of(set(), {0}, {1}) == [[0, 1, 2]] and of(set(), set(), {0, 1}) == [[0], [1], [2]]
    assert of(set(), {0}, {0}) == [[0], [1], [2]] and of(set(), {0}, set(), {2, 1}) == [[0, 1], [2], [3]] and of() == []


@pytest.mark.parametrize("text, said", [
    ("Ann buys 3 pens for 4 each: 3*4=12. ", "Ann buys 3 pens for 4 each"), ("A: lamp in capitals: lL aA; A is LAMP. ", "A: lamp in capitals"),
    ("The total is 7.", "The total"), ("48/2 = 24", "48/2"), ("word " * 20, "word " * 7 + "word"), ("x" * 50, "x" * 40)])
def test_outlines_say_no_result(text, said): assert outline(text) == said


def test_a_trace_by_rules():
    made = rewrite(ROW)
    assert row_faults(made) == [] and sequential(made) == TRACE and made["family"] == "bills" and "text" not in made
    assert [s["needs"] for s in made["steps"]] == [[], [], ["s1", "s2"]] and made["closing"] == " \\boxed{13}"
    assert made["steps"][0]["work"] == "" and made["steps"][0]["result"] == "Ann buys 3 pens for 4 each: 3*4=12."   # one piece: all of it goes back
    assert made["steps"][2]["work"] == " Together they pay 12+35=47." and made["steps"][2]["result"] == " They have 60, so 60-47=13 is left."
    first = WheneverReady().arrange(problem_of(made))[0]
    assert isinstance(first, Fork) and first.outlines == ["Ann buys 3 pens for 4 each", "Bob buys 5 books for 7 each"]


def test_no_content_is_a_useless_reply():
    replies = iter([None, GROUPS])   # as servers send where a reasoner's thoughts took all
    assert rewrite_with(lambda prompt: next(replies), ROW)["steps"][1]["outline"] == "the books"


def test_an_opening_and_a_closing():
    made = rewrite({**ROW, "text": "Let me think. " + TRACE.replace("\\boxed{13}", "So it is \\boxed{13}. Done. ")})
    assert made["opening"] == "Let me think." and made["closing"] == " So it is \\boxed{13}. Done. " and len(made["steps"]) == 3


def test_random_traces_stay_as_they_are():
    done = 0
    for seed in range(300):
        rng = random.Random(seed)
        said = ["x = 3. ", "3+4=7. ", "A: b c; ", "A is lamp. ", "Well. ", "lamp and 7 = 12. ", "12\n", "the sum is 19. "]
        parts = [rng.choice(said) for _ in range(6)]
        row = {"question": "7?", "answer": "13", "text": "".join(parts) + "\\boxed{13}"}
        try: made = rewrite(row)
        except ValueError as error: assert "no piece" in str(error)
        else:
            done += 1
            assert sequential(made) == row["text"] and row_faults(made) == []
    assert done > 250


@pytest.mark.parametrize("row, said", [
    ({"question": "?", "answer": "13"}, "no text"), ({**ROW, "text": "So."}, "text has no .boxed"),
    ({**ROW, "text": "Well. \\boxed{13}"}, "no piece"),
    ({**ROW, "text": "<Parallel><Outlines><Outline>1:a</Outline><Outline>2:b</Outline></Outlines><Thread>1:x</Thread><Thread>2:y</Thread></Parallel>"
                     "\\boxed{13}"}, "the text forks already")])
def test_what_cannot_be_rewritten(row, said):
    for way in (rewrite, lambda row: rewrite_with(lambda prompt: GROUPS, row)):
        with pytest.raises(ValueError, match=said): way(row)
    assert rewrite_rows([row])[0] == [row]


def test_a_model_says_where_to_cut():
    asked = []
    def model(prompt): return asked.append(prompt) or f"Here you are:\n```json\n{GROUPS}\n```"
    made = rewrite_with(model, ROW)
    assert sequential(made) == TRACE and row_faults(made) == [] and len(asked) == 1
    said = [("s1", [], "pens"), ("s2", [], "the books"), ("s3", ["s1", "s2"], "the rest")]
    assert [(s["name"], s["needs"], s["outline"]) for s in made["steps"]] == said
    assert QUESTION in asked[0] and "\n4. They have 60, so 60-47=13 is left.\n" in asked[0] and "boxed" not in asked[0] and "\n5." not in asked[0]


def test_a_useless_reply_is_answered_with_what_was_wrong():
    asked, replies = [], ["No.", GROUPS]
    made = rewrite_with(lambda prompt: asked.append(prompt) or replies[len(asked) - 1], ROW)
    assert len(made["steps"]) == 3 and asked[0] == prompt_for(QUESTION, cut(TRACE)[:-1]) and asked[1] == asked[0] + (
        "\nYour last reply could not be used: it holds no JSON list of steps. Reply with JSON alone.\n")
    with pytest.raises(ValueError, match="^no useful reply in 3 tries: it holds no JSON list of steps$"):
        rewrite_with(lambda prompt: "No.", ROW, tries=3)


@pytest.mark.parametrize("reply, said", [
    ("", "no JSON list"), ("[1]", "no JSON list"), ("[]", "no JSON list"), ('[{"pieces": 1}', "no JSON list"),
    ("[{}, 7]", "lacks pieces"), ('[{"pieces": [1, 2], "needs": []}]', "lacks pieces"), ("[" * 99_999 + "]", "no JSON list"),
    ('[{"a": ' + "[" * 99_999, "no JSON list"),
    ('[{"pieces": [1], "needs": [], "outline": "a"}]', "the pieces are not 1 to 2"),
    ('[{"pieces": [2, 1], "needs": [], "outline": "a"}]', "not 1 to 2"),
    ('[{"pieces": [1, 2], "needs": [1], "outline": "a"}]', "step 1 needs a step that is not before it"),
    ('[{"pieces": [1, 2], "needs": [0], "outline": "a"}]', "step 1 needs a step that is not before it"),
    ('[{"pieces": [1, 2], "needs": [], "outline": " "}]', "step 1 has no outline"),
    ('[{"pieces": "12", "needs": [], "outline": "a"}]', "whole numbers"),
    ('[{"pieces": [1, true], "needs": [], "outline": "a"}]', "whole numbers"),
    ('[{"pieces": [], "needs": [], "outline": "a"}, {"pieces": [1, 2], "needs": [], "outline": "a"}]', "step 1 has no pieces")])
def test_useless_replies(reply, said):
    with pytest.raises(ValueError, match=said): read_groups(reply, 2)


@pytest.mark.parametrize("reply", [f"<think>Pieces [1] and [2], or [{{ }}]?</think>\n{GROUPS}", f"<think>{GROUPS}</think>{GROUPS}",
                                   f"Groups [as you asked]: {GROUPS} I hope [1] fits."])
def test_text_around_a_reply_does_no_harm(reply):
    assert read_groups(reply, 4) == read_groups(GROUPS, 4)


def test_whatever_a_client_raises_costs_one_row():
    raised = [OSError("no route\nto host"), KeyError("choices"), TimeoutError()]
    def ask(prompt):
        if raised: raise raised.pop(0)
        return GROUPS
    made, faults = rewrite_rows([ROW] * 4, ask)
    assert made == [ROW] * 3 + [rewrite_with(lambda prompt: GROUPS, ROW)]
    assert faults == [(1, "no route to host"), (2, "'choices'"), (3, "TimeoutError")]


def test_rows_that_a_model_has_rewritten_outlive_ctrl_c():
    left = [GROUPS]
    def ask(prompt):
        if not left: raise KeyboardInterrupt
        return left.pop()
    made, faults = rewrite_rows([ROW] * 4, ask)
    assert made == [rewrite_with(lambda prompt: GROUPS, ROW)] + [ROW] * 3
    assert faults == [(2, STOPPED)]
    assert rewrite_rows(made, lambda prompt: GROUPS) == ([made[0]] * 4, [])   # the new file, given to the command, goes on


def test_a_tag_in_an_outline_is_no_outline():
    with pytest.raises(ValueError, match="control token <Thread>"): rewrite_with(lambda prompt: GROUPS.replace("pens", "<Thread>"), ROW)


def test_a_whole_file():
    rows = [ROW, {"question": "b", "answer": "b"}, {**ROW, "text": "Well. \\boxed{13}"}]
    made, faults = rewrite_rows(rows)
    assert made == [rewrite(ROW), *rows[1:]] and faults == [(3, "no piece of the text makes a value or a name")]
    assert rewrite_rows(rows[:1], lambda prompt: GROUPS)[0] == [rewrite_with(lambda prompt: GROUPS, ROW)]
