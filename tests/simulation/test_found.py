"""What the simulation has found, each as the schedule in which it was seen: they are all fine now."""

from __future__ import annotations

import pytest

from tests.simulation.schedule import Fault, Program, Schedule
from tests.simulation.world import simulate

ONE, TWO = Program(steps=1), Program(2, steps=1)

FOUND: dict[str, Schedule] = {
    # It said that the step was not saved, process 0 that it was.
    "a process whose report is not answered hears the outcome": Schedule(
        store="gcs", programs=(TWO,), faults=(Fault(0, 1, "set run/save/1.write", 0, "lose", 0.5),)
    ),
    # Process 0 said that the step was not saved, the others that it was.
    "an announcement that is not answered has been made": Schedule(
        programs=(TWO,), faults=(Fault(0, 0, "set run/save/1.commit", 0, "lose", 100.0),)
    ),
    # A JaxRuntimeError came out, instead of a ProcessError.
    "the service fails while keys are deleted": Schedule(
        programs=(TWO,), faults=(Fault(0, 0, "forget run/run/open", 0, "drop", 3.0),)
    ),
    # A FileNotFoundError came out of opening a run: its owner was removing leftovers.
    "a probe is taken for a leftover": Schedule(
        programs=(Program(steps=2), Program(steps=1, start_s=0.1)),
        faults=(Fault(1, 0, "replace", 0, "suspend", 3.0),),
    ),
    "a record that is being written is taken for a leftover": Schedule(
        programs=(Program(steps=2), Program(steps=1, start_s=0.4, takeover=True)),
        faults=(Fault(1, 0, "swap", 0, "suspend", 3.0),),
    ),
    "a rename is made twice over NFS": Schedule(
        store="nfs", programs=(ONE,), faults=(Fault(0, 0, "swap", 0, "lose", 0.5),)
    ),
    # The base was damaged, and with it every step that refers to it.
    "a base is begun, and another owner writes one": Schedule(
        store="gcs",
        programs=(ONE, Program(steps=1, start_s=2.0, takeover=True)),
        faults=(Fault(0, 0, "put run/base/0", 0, "slow", 100.0),),
        frozen=True,
    ),
    # The marker of a step that had been removed was written all the same, so that a damaged step was listed.
    "an owner that has been ousted wakes up before the marker": Schedule(
        store="gcs",
        programs=(ONE, Program(steps=2, start_s=70.0)),
        faults=(Fault(0, 0, "run/0/commit_success.txt", 0, "suspend", 400.0),),
        keep=1,
    ),
    "a request for the marker arrives late": Schedule(
        store="gcs",
        programs=(Program(steps=2), Program(steps=2, start_s=4.0, takeover=True)),
        faults=(Fault(0, 0, "run/1/commit_success.txt", 0, "late", 400.0),),
    ),
    # A process that had been suspended wrote its own state into the step of a later program.
    "a process wakes up when its program is over": Schedule(
        store="gcs",
        programs=(TWO, Program(2, steps=1, start_s=250.0)),
        faults=(Fault(0, 1, "run/0/manifest/process_1", 0, "suspend", 500.0),),
    ),
    # "There are other things under names of steps": the folder was being deleted meanwhile.
    "a run is opened while a step is deleted": Schedule(
        store="gcs",
        programs=(Program(steps=2), Program(steps=1, start_s=10.0)),
        faults=(Fault(0, 0, "unlink run/0/model/", 0, "suspend", 25.0),),
        keep=1,
    ),
    # The same, of what an owner wrote that had been ousted.
    "a run is opened that has a folder of arrays alone": Schedule(
        store="gcs",
        programs=(ONE, Program(steps=2, start_s=8.0, takeover=True)),
        faults=(Fault(0, 0, "put run/0/model/", 0, "slow", 15.0),),
        keep=1,
    ),
    # The same, of a request to a step that had been deleted by the time it arrived.
    "a run is opened that has nothing of a step but the marker of an item": Schedule(
        seed=15968,
        store="gcs",
        programs=(Program(steps=2, elsewhere=True), Program(steps=1, start_s=70.0, elsewhere=True)),
        faults=(Fault(0, 0, "put", 4, "late", 45.0),),
        keep=1,
        verify_after_save=False,
    ),
    # Opening took as long as the other program was suspended.
    "an owner is suspended while it changes the record": Schedule(
        programs=(ONE, Program(steps=1, start_s=35.0)), faults=(Fault(0, 0, "look ", 1, "suspend", 3000.0),)
    ),
    # It started afresh, although there was a step at every moment: one it had listed, then a newer one.
    "steps are listed while they are replaced": Schedule(
        seed=14109,
        store="gcs",
        programs=(ONE, Program(2, steps=3, start_s=8.0)),
        faults=(Fault(0, 0, "exists", 1, "lose", 15.0), Fault(0, 0, "list", 1, "suspend after", 45.0)),
        keep=1,
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_is_mended(name: str) -> None:
    report = simulate(FOUND[name])
    assert not report.violations, "\n".join(report.trace[-80:])


@pytest.mark.parametrize("name", FOUND)
def test_the_faults_come_to_pass(name: str) -> None:
    """The labels of requests may change with the product; then a schedule would say nothing any more."""
    report = simulate(FOUND[name])
    happened = [line for line in report.trace if " at " in line]
    assert len(happened) == len(FOUND[name].faults)
