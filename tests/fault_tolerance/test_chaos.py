import os

import pytest
from chaos import Chaos, draw

TRIALS = int(os.environ.get("CHAOS_TRIALS", "20"))
SEED = int(os.environ.get("CHAOS_SEED", "0"))


@pytest.mark.timeout(60 * TRIALS)
def test_no_fault_at_any_point_loses_a_state(policy, undisturbed, tmp_path):
    """20 in the suite; `make chaos` tries 200."""
    chaos = Chaos(policy, undisturbed, tmp_path)
    lost = [said for trial in draw(SEED, TRIALS) if (said := chaos.lost(trial))]
    print("", *lost, f"faults tried: {TRIALS}, states lost: {len(lost)}", sep="\n")
    assert lost == []
