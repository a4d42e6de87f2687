"""Tests lie as the code does: each module of the package has a test file of its name, or a reason why not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torchorbax

TESTS = Path(__file__).parent
SOURCE = Path(torchorbax.__file__).parent / "_src"
MOST_LINES = 600

TESTED_ELSEWHERE = {
    "arrays/leaves": ("tensors/test_live", "a few lines that every test of live tensors runs"),
    "distributed/failures": ("save/test_writer", "errors travel between processes, of which there are several there"),
    "distributed/torch_processes": ("training/test_circumstances", "processes that JAX does not know of are refused"),
    "format/decode": ("format/test_values", "the way back"),
    "format/encode": ("format/test_values", "the way there"),
    "format/per_process": ("storage/test_storage", "written and read by a storage; several processes have more of it"),
    "run/saves": ("run/test_background_save", "the saves of one tier; run/test_tier has those of two"),
    "save/contribution": ("save/test_writer", "what processes compare before they write"),
    "save/decision": ("save/test_writer", "what process 0 makes of it"),
    "save/local_tier": ("run/test_tier", "saved and restored by runs with two tiers"),
    "save/save": ("save/test_writer", "a record that goes from the loop to the writer"),
    "state/capture": ("state/test_sharing", "what items share, from the capture to the restore"),
    "state/item": ("restore/test_in_place", "the protocol of all items; every restore uses it"),
    "state/generators": ("state/test_refusals", "generators of every library, saved, restored and refused"),
    "state/merge": ("state/test_growing", "what has grown is merged into what is live"),
    "state/module_names": ("state/test_module_tensors", "names that hooks give, and odd names"),
    "state/torch_optimizer_tree": ("state/test_optimizers", "what an optimizer is saved as"),
    "state/trees": ("state/test_law", "trees of every kind"),
    "state/values": ("format/test_values", "the same values, with tensors"),
    "state/live_leaves": ("restore/test_plan", "what a live leaf would be saved as, which plans compare"),
    "storage/files": ("storage/test_local_files", "a protocol; gs:// has its tests in storage/test_gcs"),
    "storage/files_at": ("storage/test_run_folder", "a line that tells a URI from a folder"),
    "storage/gcs_files": ("storage/test_gcs", "every test of gs:// goes through it"),
    "storage/owner": ("storage/test_ownership", "what an owner is, for those who ask who owns a run"),
    "storage/owner_records": ("storage/test_two_programs", "records on a disk and under gs://, by real programs"),
    "storage/opening": ("storage/test_run_folder", "three lines that open what is at a path"),
    "storage/orbax_storage": ("storage/test_storage", "one of the two storages that must do the same"),
    "storage/run_layout": ("storage/test_run_folder", "what a run's folder may hold"),
    "storage/step_reader": ("storage/test_storage", "the reading half of `orbax_storage`"),
    "storage/traffic": ("run/test_options", "limits that are checked once, as options of a run"),
    "storage/zarr": ("storage/test_array_writer", "one layout for writer and reader"),
    "tensors/torchax_tensors": ("tensors/test_live", "the few facts about torchax that live tensors stand on"),
    "training/batches": ("training/test_train_step", "batches of any kind"),
    "training/host_tensors": ("training/test_live_values", "CPU tensors that a loss reads"),
    "training/in_flight": ("training/test_train_step", "a few lines that every step runs"),
    "training/live_function": ("training/test_live_values", "what a loss reads is an input"),
    "training/live_inputs": ("training/test_live_values", "what a loss reads is found"),
    "training/mentioned_names": ("training/test_hidden_state", "attributes under names that code computes"),
    "training/programs": ("training/test_hyperparameters", "how many programs are compiled, and kept"),
    "training/random_keys": ("training/test_train_step", "random numbers of a step"),
    "training/results": ("training/test_train_step", "what a loss may return"),
    "training/surroundings": ("training/test_live_values", "what a loss reaches, by name"),
    "training/torch_update": ("training/test_updates", "optimizers of torch, traced"),
    "training/traced_state": ("training/test_updates", "the state of an optimizer while it is traced"),
    "training/tracing": ("training/test_train_step", "small helpers of the step"),
}
"""By module: the test file that has its tests, and why there."""

ACROSS_MODULES = {
    "restore/test_resharding": "all of a save and a restore, on other numbers of devices",
    "restore/test_several_processes": "all of a restore, by several processes",
    "run/test_interrupts": "Ctrl-C at every line of all that happens on the loop's thread",
    "run/test_several_processes": "all of a run, on changing numbers of processes",
    "storage/test_two_programs": "two programs on one path, from opening to deletion",
    "state/test_growing": "state that has grown since the run was opened, of every kind",
    "state/test_law": "the law, with generated states: what save accepts comes back",
    "state/test_module_tensors": "which tensors of a module are saved, whatever its state_dict says",
    "state/test_old_steps": "steps that earlier versions have written",
    "state/test_optimizers": "optimizers with odd state, of torch and optax",
    "state/test_places": "where things are after a restore",
    "state/test_refusals": "what cannot be saved, of every kind, and what to do",
    "training/test_averages": "averages of weights of torch and timm, inside and outside the step",
    "training/test_circumstances": "threads, transfer guards, changed layers, other keys, autocast",
    "training/test_hidden_state": "what a loss reads and writes in less visible places",
    "training/test_live_values": "whatever a loss reads besides model and batch: partners, teachers, queues, numbers",
    "storage/test_offloaded": "arrays in the memory of the host, all the way from a save to a restore",
}
"""Test files in a folder of the package that have no module of their name."""


def modules() -> set[str]:
    paths = {path.relative_to(SOURCE) for path in SOURCE.rglob("*.py") if path.name != "__init__.py"}
    return {str(path.with_suffix("")) for path in paths}


def file_of(module: str) -> Path:
    folder, _, name = module.rpartition("/")
    return TESTS / folder / f"test_{name}.py"


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_module_has_a_test_file_of_its_name_or_a_reason(module: str) -> None:
    assert file_of(module).exists() != (module in TESTED_ELSEWHERE)


def test_reasons_are_about_modules_and_tests_that_exist() -> None:
    assert set(TESTED_ELSEWHERE) <= modules()
    for where, _ in TESTED_ELSEWHERE.values():
        assert (TESTS / f"{where}.py").exists(), where


def test_a_test_file_is_about_the_module_of_its_name_or_says_what_else() -> None:
    wings = {module.partition("/")[0] for module in modules()}
    files = {path.relative_to(TESTS) for wing in wings for path in (TESTS / wing).glob("test_*.py")}
    of_modules = {file_of(module).relative_to(TESTS) for module in modules()}
    assert {str(path.with_suffix("")) for path in files - of_modules} == set(ACROSS_MODULES)


def test_files_of_tests_stay_short() -> None:
    lengths = {str(path.relative_to(TESTS)): len(path.read_text().splitlines()) for path in TESTS.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}
