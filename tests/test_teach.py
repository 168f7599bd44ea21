"""Exercises: every check accepts its solution and rejects wrong answers with help; each runs up to its first stub.

That solutions run whole and are accepted again is nbval's part of the same pytest call.
"""

import re

import nbformat
import pytest
import torch
from nbclient.exceptions import CellExecutionError

import build
from clseg import teach

SOLUTIONS = sorted(path.stem for path in (build.FOLDER / "solutions").glob("*.py"))
USED = re.compile(r"^teach\.(\w+)\(\w+\)$", re.MULTILINE)


@pytest.mark.parametrize("name", teach.CHECKS)
def test_every_check_accepts_the_answer_and_says_what_is_wrong_with_others(name):
    check = teach.CHECKS[name]()
    assert check.tell(check.right) == teach.Verdict(True, check.why)
    assert len(check.wrong) >= 2
    for hint, answer in check.wrong.items():
        assert check.tell(answer) == teach.Verdict(False, hint)
    other = (lambda *_: -7.5) if check.cases else "zz" if isinstance(check.right, str) else torch.tensor([-7.5])
    assert not check.tell(other).right
    sentences = [check.why, check.otherwise, *check.wrong]
    assert len({*sentences}) == len(sentences)
    assert all(sentence.endswith((".", "?")) for sentence in sentences)


def test_every_check_is_used_once_and_in_one_solution_only():
    used = [name for stem in SOLUTIONS for name in USED.findall(build.script_of(stem).read_text(encoding="utf-8"))]
    assert sorted(used) == sorted(teach.CHECKS)
    print(f"{len(SOLUTIONS)} notebooks, {len(used)} exercises, each with its solution accepted")


@pytest.mark.parametrize("stem", SOLUTIONS)
def test_every_answer_of_a_solution_was_accepted_and_is_compared_by_nbval(stem):
    solution = nbformat.read(build.FOLDER / "solutions" / f"{stem}.ipynb", as_version=4)
    cells = [cell for cell in solution.cells if cell.cell_type == "code" and USED.search(cell.source)]
    shown = [cell.outputs[-1].data["text/plain"] for cell in cells]
    assert 3 <= len(shown) <= 5
    assert all(text.startswith("Right: ") for text in shown), shown
    assert all(build.CHECKED in cell.metadata.tags for cell in cells)


@pytest.mark.parametrize("stem", SOLUTIONS)
def test_an_exercise_runs_up_to_its_first_stub_and_stops_with_its_hint(stem, tmp_path):
    exercise = build.exercise_of(build.convert(build.script_of(stem)))
    with pytest.raises(CellExecutionError) as error:
        build.execute(exercise, tmp_path)
    assert error.value.ename == "NotYet"
    stubs = [i for i, cell in enumerate(exercise.cells) if cell.cell_type == "code" and "teach.todo(" in cell.source]
    errors = {
        index: output.traceback
        for index, cell in enumerate(exercise.cells)
        for output in cell.get("outputs", [])
        if output.output_type == "error"
    }
    stopped = stubs[0] if stubs[0] in errors else stubs[0] + 1  # a stub in a function stops where it is called
    assert errors == {stopped: [f"Your turn: {error.value.evalue}"]}


@pytest.mark.parametrize("stem", SOLUTIONS)
def test_an_exercise_holds_no_answer(stem):
    solution = build.convert(build.script_of(stem))
    exercise = nbformat.read(build.FOLDER / f"{stem}.ipynb", as_version=4)
    text = "\n".join(cell.source for cell in exercise.cells)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in exercise.cells)
    cut = [cell.source for cell in solution.cells if "solution" in cell.metadata.get("tags", [])]
    assert len(cut) >= 4
    for source in cut:
        answer = source[source.find("# hint:") :].splitlines()[1:] if "# hint:" in source else [source]
        assert not any(len(line.strip()) > 12 and line in text for line in answer), source


def test_a_stub_keeps_what_is_before_and_after_it():
    source = "def f(x):\n    y = 2 * x\n    # hint: double, then add\n    z = y + 1\n\n    return z\n\n\nprint(f(1))"
    stubbed = 'def f(x):\n    y = 2 * x\n    return teach.todo("double, then add")\nprint(f(1))'
    assert build.stub(source) == stubbed
    assert build.stub('# hint: say "no"\na = 1\nb, c = 2, 3') == '(b, c) = teach.todo("say \\"no\\"")'


@pytest.mark.parametrize(
    ("source", "words"), [("answer = 3", "has no line `# hint: ...`"), ("# hint: print\nprint(1)", "must end with")]
)
def test_a_solution_that_cannot_be_cut_out_is_told(source, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        build.stub(source)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (0.75, "write a function, not its result"),
        (lambda prediction, reference: None, "end it with `return ...`"),
        (lambda prediction: 1.0, "it stops with TypeError"),
        (lambda prediction, reference: "a half", "the pixels that both have"),
    ],
)
def test_answers_of_another_kind_are_told(answer, words):
    verdict = teach.dice(answer)
    assert not verdict.right
    assert words in verdict.text


def test_values_that_are_no_functions_and_stubs():
    assert "not a function" in teach.dice_by_hand(lambda: 0.75).text
    assert not teach.dice_by_hand(None).right
    assert "one number" in teach.dice_by_hand([0.75, 0.75]).text
    assert all(teach.infonce_statements(text).right for text in ("ad", "AD", "a, d", "(a)(d)", ["a", "d"]))
    assert teach.infonce_statements("c").text.startswith("(c)"), "what was chosen wrongly comes first"
    assert all("letters" in teach.infonce_statements(text).text for text in ("", "e", "ade", "all"))
    assert teach.dice_by_hand(torch.tensor(0.75, requires_grad=True)).right
    as_int = teach.gd_positives(lambda p: (p[:, None] == p[None, :]).int().fill_diagonal_(0))
    assert "tensor of bool" in as_int.text
    as_float = teach.believe(lambda z, c: (z.argmax(dim=1), (z.softmax(dim=1).amax(dim=1) >= c).float()))
    assert "tensor of bool" in as_float.text
    with_gradient = tuple(torch.tensor(float(n), requires_grad=True) for n in teach.CHECKS["pairs_of_gd_minus"]().right)
    assert teach.pairs_of_gd_minus(with_gradient).right
    with pytest.raises(teach.NotYet, match="count the pixels"):
        teach.dice(lambda prediction, reference: teach.todo("count the pixels"))


def test_a_check_does_not_let_an_answer_change_its_cases():
    def spoils(prediction, reference):
        prediction[:] = False
        return 0.0

    assert not teach.dice(spoils).right
    assert teach.dice(lambda p, r: 2 * (p & r).sum() / (p.sum() + r.sum())).right
