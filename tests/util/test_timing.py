"""What is compared is timed in turns."""
from __future__ import annotations

from timm_lfnsb.util import timing


def test_rounds_are_taken_in_turns(monkeypatch):
    calls: list[str] = []

    def timeit(run, number):
        run()
        return 0.05 * number

    monkeypatch.setattr(timing, 'timeit', timeit)
    times = timing.interleave([lambda name=name: calls.append(name) for name in 'ABC'], seconds=0.4, rounds=4)
    assert times.tolist() == [[0.05] * 4] * 3
    assert ''.join(calls).endswith('C' + 'AAABBBCCC' * 4)  # in each turn one untimed call and two timed ones
