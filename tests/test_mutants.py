"""The deliberate faults of mutants.py: each can be put in, and each is caught."""

import ast

import mutants
import pytest
from mutants import MUTANTS, ROOT, Mutant, attempt


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_fault_can_be_put_in_and_has_tests(mutant):
    source = (ROOT / mutant.file).read_text(encoding="utf-8")
    assert source.count(mutant.before) == 1
    faulty = source.replace(mutant.before, mutant.after)
    assert ast.dump(ast.parse(faulty)) != ast.dump(ast.parse(source))
    assert mutant.tests and all((ROOT / "tests" / name).exists() for name in mutant.tests.split())


def test_names_are_unique():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_a_fault_is_caught_or_survives_and_is_taken_out_again(tmp_path):
    module, tests = tmp_path / "sums.py", tmp_path / "tests" / "test_sums.py"
    tests.parent.mkdir()
    module.write_text("def add(a, b):\n    return a + b\n")
    tests.write_text("from sums import add\n\n\ndef test_zero():\n    assert add(2, 0) == 2\n")

    def verdict(before: str, after: str) -> tuple[str, str]:
        result = attempt(Mutant("m", "sums.py", before, after, "test_sums.py"), tmp_path)
        assert module.read_text() == "def add(a, b):\n    return a + b\n"
        return result.verdict, result.test

    assert verdict("a + b", "a * b") == ("caught", "test_sums.py::test_zero")
    assert verdict("a + b", "a - b") == ("survives", "")
    assert verdict("a - b", "a * b") == ("text found 0 times", "")
    assert verdict("a", "b")[0] == "text found 3 times"
    assert verdict("return", "retrun")[0] == "pytest ended with 2"


def test_a_name_that_is_none_is_said(capsys):
    assert mutants.main(["no-such-fault"]) == 2
    assert "no such mutant: no-such-fault" in capsys.readouterr().err


@pytest.mark.slow
def test_every_fault_is_caught():
    assert mutants.main([]) == 0
