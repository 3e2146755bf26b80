import os

import pytest

from support.chaos import Chaos, draw

TRIALS = int(os.environ.get("CHAOS_TRIALS", "10"))
SEED = int(os.environ.get("CHAOS_SEED", "0"))


@pytest.mark.timeout(60 * TRIALS)
def test_no_fault_at_any_point_loses_a_state(policy, undisturbed, tmp_path):
    """10 in the suite; `make chaos` tries 200."""
    chaos = Chaos(policy, undisturbed, tmp_path)
    lost = []
    for trial in draw(SEED, TRIALS):
        if said := chaos.lost(trial):
            lost.append(said)
            print(f"\n{said}", flush=True)
    print(f"\nfaults tried: {TRIALS}, states lost: {len(lost)}")
    assert lost == []
