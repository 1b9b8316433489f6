"""The README's numbers are those of the files under results/."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_row_equals_its_result_and_every_result_has_a_row():
    found = set()
    for line in (ROOT / "README.md").read_text().splitlines():
        if not (named := re.search(r"`(results/\S+\.json)`", line)):
            continue
        found.add(named[1])
        result = json.loads((ROOT / named[1]).read_text())
        shown = re.findall(r"([\d.]+) % \((\d+)/(\d+)\)", line)
        roles = [role for role in ("teacher", "control", "student") if role in result]
        assert len(shown) == len(roles), line
        for role, (percent, correct, total) in zip(roles, shown, strict=True):
            row = result[role]
            assert (int(correct), int(total)) == (row["test_correct"], row["test_total"]), line
            assert percent == f"{100 * row['test_accuracy']:.1f}", line
        assert re.fullmatch(r"[0-9a-f]{40}", result["commit"]), f"{named[1]} was not made by a committed state"
        assert result["config"]["seed"] == int(re.search(r"seed (\d+)", line)[1]), line  # type: ignore[index]
    assert found == {str(path.relative_to(ROOT)) for path in (ROOT / "results").glob("*.json")}
