# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from prefault.cli.interrupt import Terminated, results_kept


@pytest.mark.parametrize(("ending", "status"), [(KeyboardInterrupt(), 130), (Terminated(), 143)])
def test_what_ends_long_work_early_keeps_what_was_found(
    ending: BaseException, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with results_kept(lambda: [1]) as interruption:
        raise ending
    assert interruption.status(0) == status  # type: ignore[unreachable]  # it is kept in
    assert "interrupted" in capsys.readouterr().err


def test_where_nothing_was_found_the_interruption_goes_on() -> None:
    with pytest.raises(KeyboardInterrupt), results_kept(list):
        raise KeyboardInterrupt


def test_without_interruption_the_status_is_the_commands_own() -> None:
    with results_kept(list) as interruption:
        pass
    assert interruption.status(1) == 1
