"""Importing torchorbax makes torchax work on torch releases that it cannot import on, and changes nothing else."""

from __future__ import annotations

import textwrap
from functools import partial

import pytest

from tests.helpers.programs import RunPython


def joined(*parts: str) -> str:
    return "\n".join(textwrap.dedent(part) for part in parts)


@pytest.fixture
def run_python(run_python: RunPython) -> RunPython:
    """In new interpreters, since these tests are about what an import does."""
    return partial(run_python, fresh=True)


HIDE_OPS = """
    import sys, torch._ops
    lookup = torch._ops._OpNamespace.__getattr__
    def without(self, key):
        asking = sys._getframe(1).f_globals["__name__"].partition(".")[0]  # this torch itself still uses them
        if self.name == "aten" and key in ("qr", "cholesky") and asking != "torch":
            raise AttributeError(key)
        return lookup(self, key)
    torch._ops._OpNamespace.__getattr__ = without
    for key in ("qr", "cholesky"):
        vars(torch.ops.aten).pop(key, None)
    assert not hasattr(torch.ops.aten, "qr")
"""

REMEMBER = """
    import torch, torch._ops
    PATCHABLE = torch._ops._OpNamespace, torch._ops.OpOverloadPacket
    ORIGINALS = [cls.__getattr__ for cls in PATCHABLE]
    def nothing_is_patched():
        return [cls.__getattr__ for cls in PATCHABLE] == ORIGINALS and not any(
            hasattr(torch.ops.aten, name) for name in ("qr_no_such_op", "_no_such_op")
        ) and not hasattr(torch.ops.aten.add, "NoSuchOverload")
"""

COMPUTE = """
    def compute():
        import jax.numpy as jnp, torchax
        env = torchax.default_env()
        with env:
            x = env.j2t_iso(jnp.full((3, 3), 2.0))
            return float((x @ x).sum().jax())
"""

TRAIN = """
    import optax, torch, torchorbax
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    optimizer = torchorbax.OptaxOptimizer(model, optax.adam(3e-2))
    step = torchorbax.train_step(model, optimizer, lambda model, x: (model(x) - x.sum(1, keepdim=True)).square().mean())
    losses = [float(step(torch.ones(16, 4))) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0], losses
"""


def test_import_makes_torchax_compute_and_leaves_nothing_behind(run_python: RunPython) -> None:
    run_python(
        joined(
            REMEMBER,
            COMPUTE,
            """
            import sys
            import torchorbax
            assert nothing_is_patched()
            assert compute() == 108.0
            assert nothing_is_patched()  # torchax imports some of its modules late
            assert "optax" not in sys.modules, "optax is an extra"
            """,
        )
    )


def test_import_starts_nothing(run_python: RunPython) -> None:
    """What programs do after their imports still counts: configuring JAX, `jax.distributed.initialize`, seeding."""
    run_python(
        """
        import torchorbax, jax, torch, torchax
        jax.config.update("jax_num_cpu_devices", 3)  # raises once a backend runs
        assert len(jax.devices()) == 3

        def key_of(env):
            return jax.random.key_data(env.param.prng).tolist()

        torch.manual_seed(7)
        key = key_of(torchax.default_env())
        torch.manual_seed(7)
        assert key == key_of(torchax.tensor.Environment())
        torch.manual_seed(8)
        assert key != key_of(torchax.tensor.Environment())
        """,
        devices=None,
    )


def test_torch_without_whole_operators_imports_and_trains(run_python: RunPython) -> None:
    """As torch 2.14 and 2.15, which have no `aten.qr` and no `aten.cholesky`."""
    run_python(
        joined(
            HIDE_OPS,
            REMEMBER,
            TRAIN,
            """
            assert nothing_is_patched()
            for key in ("qr", "cholesky"):  # this torch itself may have looked them up, and keeps what it found
                assert isinstance(vars(torch.ops.aten).pop(key, None), torch._ops.OpOverloadPacket | None)
                assert not hasattr(torch.ops.aten, key)
            """,
        )
    )


def test_only_torchax_sees_placeholders_and_only_for_what_aten_lacks(run_python: RunPython) -> None:
    """Looked at from a finder that Python's import system calls in the middle of torchax's import."""
    run_python(
        joined(
            HIDE_OPS,
            REMEMBER,
            """
            import sys

            def asked_by(module, expression):
                return eval(expression, {"__name__": module, "torch": torch})

            def raises(module, expression):
                try:
                    asked_by(module, expression)
                except AttributeError:
                    return True

            class Spy:
                seen = 0
                def find_spec(self, name, path=None, target=None):
                    if name == "torchax.ops.jaten":
                        Spy.seen += 1
                        check()

            def check():
                missing = "torch.ops.aten.qr_no_such_op"
                assert not isinstance(asked_by("torchax.ops.jaten", missing), torch._ops.OpOverloadPacket)
                hash(asked_by("torchax.ops.jaten", missing + ".default"))  # what a registry needs
                assert "qr_no_such_op" in repr(asked_by("torchax.ops.jaten", missing))
                for stranger in ("__main__", "torch.library", "torchaxial", "my.torchax"):
                    assert raises(stranger, missing), stranger
                    assert raises(stranger, "torch.ops.aten.add.NoSuchOverload"), stranger
                assert not hasattr(torch.ops.aten, "qr_no_such_op")
                for other in ("mine.qr_no_such_op", "prims.qr_no_such_op", "aten.__wrapped__"):
                    assert raises("torchax.ops.jaten", f"torch.ops.{other}"), other
                assert isinstance(asked_by("torchax.ops.jaten", "torch.ops.aten.add.Tensor"), torch._ops.OpOverload)

            sys.meta_path.insert(0, Spy())
            import torchorbax
            assert Spy.seen == 1
            assert nothing_is_patched()
            """,
        )
    )


def test_a_failing_import_of_torchax_leaves_nothing_patched(run_python: RunPython) -> None:
    run_python(
        joined(
            REMEMBER,
            """
            import sys
            class Broken:
                def find_spec(self, name, path=None, target=None):
                    if name == "torchax.decompositions":
                        raise ImportError("cannot be read")
            sys.meta_path.insert(0, Broken())
            try:
                import torchorbax
            except ImportError as error:
                assert "cannot be read" in str(error)
            else:
                raise SystemExit("imported")
            assert nothing_is_patched()
            """,
        )
    )


def test_threads_that_import_at_once(run_python: RunPython) -> None:
    run_python(
        joined(
            REMEMBER,
            """
            import threading
            start, done, failures = threading.Barrier(8), [], []
            def work():
                start.wait()
                try:
                    import torchorbax
                    import numpy, torchax
                    done.append((torchax.tensor.Tensor, torchorbax.to_jax(numpy.ones(2, "float32")).tolist()))
                except BaseException as error:
                    failures.append(repr(error))
            threads = [threading.Thread(target=work) for _ in range(8)]
            for thread in threads: thread.start()
            for thread in threads: thread.join()
            assert not failures, failures
            assert len(done) == 8 and len({tensor for tensor, _ in done}) == 1
            assert nothing_is_patched()
            """,
        )
    )


def test_torchax_that_was_imported_first_is_used_as_it_is(run_python: RunPython) -> None:
    """As on a torch that has every operator: torchax is imported, and in use, before torchorbax is."""
    run_python(
        joined(
            REMEMBER,
            COMPUTE,
            """
            def complete_torch():  # defines what this torch lacks; kept referenced, or torch takes it back
                library = torch.library.Library("aten", "FRAGMENT")
                def having(cls, original, name_of):
                    def lookup(self, key):
                        try:
                            return original(self, key)
                        except AttributeError:
                            name = name_of(self, key)
                            if key.startswith("_") or not name.startswith("aten::"):
                                raise
                            restore()  # define() looks names up, too
                            try:
                                library.define(name.removeprefix("aten::") + "(Tensor self) -> Tensor")
                            finally:
                                patch()
                            return original(self, key)
                    return lookup
                def restore():
                    for cls, original in zip(PATCHABLE, ORIGINALS):
                        cls.__getattr__ = original
                def patch():
                    namespace, packet = PATCHABLE
                    namespace.__getattr__ = having(namespace, ORIGINALS[0], lambda self, key: f"{self.name}::{key}")
                    named = lambda self, key: f"{self._qualified_op_name}.{key}"
                    packet.__getattr__ = having(packet, ORIGINALS[1], named)
                return library, patch, restore

            library, patch, restore = complete_torch()
            patch()
            import torchax
            torchax.default_env()
            restore()
            assert compute() == 108.0
            with torchax.default_env():
                before = torch.ones(2, device="jax")
            import torchorbax, sys
            assert sys.modules["torchax"] is torchax
            assert torchorbax.to_jax(before) is before.jax()
            assert compute() == 108.0
            assert nothing_is_patched()
            """,
        )
    )
