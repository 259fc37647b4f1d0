"""How long something may take."""

from depthmill.workers.pace import Limits, Pace

OPEN_S = 1800.0


def test_limits_follow_the_pace_between_what_is_granted_and_what_is_allowed():
    pace = Pace(60.0, 1.0, OPEN_S)
    unmeasured = Limits((64 + 16) * 60.0 + OPEN_S, 32 * 60.0, OPEN_S)
    assert pace.to_do(64) == unmeasured
    pace.add(0, 1000.0)  # broken pictures tell nothing
    assert pace.to_do(64) == unmeasured
    pace.add(100, 1.0)  # however quick, a frame has a second
    assert pace.to_do(64) == Limits((64 + 16) * 1.0 + OPEN_S, 32 * 1.0, OPEN_S)
    pace.add(100, 199.0)  # a second a frame: twenty are granted, as they are to opening what was opened in 0.1 s
    assert pace.to_do(64, 0.1) == Limits((64 + 16) * 20.0 + 2.0, 32 * 20.0, 2.0)
    assert pace.to_do(64, 0.1, 2.0) == Limits((64 + 16) * 40.0 + 4.0, 32 * 40.0, 4.0)
    assert pace.to_do(64, 0.1, 1e9) == unmeasured
    pace.add(100, 1300.0)  # five: not a hundred, but what is allowed
    assert pace.to_do(64, 1e6) == unmeasured
