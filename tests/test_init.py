"""kd/__init__.py: what the error messages of all modules share."""

from kd import one_line


def test_the_text_of_an_error_becomes_one_line_of_at_most_200_characters():
    assert one_line(ValueError("two\n   lines")) == "two lines"
    assert one_line(ValueError("x" * 200)) == "x" * 200
    assert one_line(ValueError("x" * 201)) == "x" * 199 + "…"
    assert one_line(KeyError()) == "KeyError"
