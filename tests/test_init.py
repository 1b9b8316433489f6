"""kd/__init__.py: what the error messages of all modules share."""

from kd import first_error, one_line


def test_the_text_of_an_error_becomes_one_line_of_at_most_200_characters():
    assert one_line(ValueError("two\n   lines")) == "two lines"
    assert one_line(ValueError("x" * 200)) == "x" * 200
    assert one_line(ValueError("x" * 201)) == "x" * 199 + "…"
    assert one_line(KeyError()) == "KeyError"


def test_the_message_is_the_line_of_the_output_that_names_the_error():
    error = RuntimeError("Error building extension\n[1/2] c++ -c x.cpp\nx.cpp:3:7: error: expected ';'\nninja: stopped")
    assert first_error(error) == "x.cpp:3:7: error: expected ';'"
    assert first_error(OSError(28, "No space left on device")) == "[Errno 28] No space left on device"
    assert first_error(ValueError()) == "ValueError()"
