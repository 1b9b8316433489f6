"""torchrun's variables: a whole set of numbers, or no ranks at all."""

import pytest

from kd.machine import ranks

ALONE = (0, 1, 0)


@pytest.mark.parametrize("values, expected", [
    (("1", "4", "0"), (1, 4, 0)), (("", "", ""), ALONE), ((None, "4", None), ALONE), (("1", "4", ""), ALONE),
    (("one", "4", "0"), ALONE), (("4", "4", "0"), ALONE)])
def test_what_a_scheduler_or_an_old_shell_leaves_behind_starts_no_ranks(monkeypatch, values, expected):
    for name, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), values, strict=True):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert (ranks.rank(), ranks.ranks(), ranks.local_rank()) == expected
